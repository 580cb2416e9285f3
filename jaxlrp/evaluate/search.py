"""Hyper-parameter search: the composite's numbers, the best gamma or epsilon at each depth, for a measure.

    grid       c* = argmax_k  mean_i measure(c_k)_i                     of the composites given
    ascend     theta = log v,   theta <- theta + optimiser(d objective / d theta)       for the chosen numbers v > 0
    surrogate  SRG with tiles replaced by degrees, which `ascend` can climb: order statistics have no useful slope

A number fitted to some images says nothing about others: search on one set, report the measure on another. Sources:
Bluecher et al. 2024 (SRG); Pahde et al. 2023 (the best LRP rules for each layer of a network, by search).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..composites import Composite
from ..errors import InputError
from ..tiles import Tiles
from .fills import Inpaint
from .flipping import Flipping, counts_of, flipping_of, folded, score


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found.

    composite: the best one. values: the measure of all that were tried, in their order, (K,) or (K, N) from `grid`,
    (steps + 1,) from `ascend`. best: the place of the best among them, the first where several are.
    """

    composite: Composite
    values: jax.Array
    best: int


def grid(measure: Callable[[Composite], jax.Array], composites: Sequence[Composite]) -> Found:
    """The best of some composites that differ in their numbers alone, by one compiled call over all of them.

        gammas = [composites.epsilon_gamma_box(-1.0, 1.0, gamma=g) for g in (0.0, 0.1, 0.25, 1.0)]
        evaluate.grid(measure, gammas).composite

    measure: from a composite to one number, or one per example (N,), whose mean counts; the higher the better. It is
    traced once, and run for one composite after the other, in the memory of one. The images and parameters that it
    closes over are arguments of what is compiled.

    Raises InputError for no composites, composites without numbers or that differ in more, or a measure that returns
    anything else or nothing finite. A composite whose measure is not finite is never the best.
    """
    tried = list(composites)
    wrong = next((c for c in tried if not isinstance(c, Composite)), None)
    if not tried or wrong is not None:
        raise InputError(f"grid: write a list of composites, not {composites!r}")
    structure = jax.tree.structure(tried[0])
    shapes = [(jax.tree.structure(c), [jnp.shape(v) for v in jax.tree.leaves(c)]) for c in tried]
    unlike = next((k for k, shape in enumerate(shapes) if shape != shapes[0]), None)
    if unlike is not None:
        raise InputError(f"grid: composite {unlike} differs from the first in more than numbers:\n{tried[unlike]!r}")
    columns = zip(*(jax.tree.leaves(c) for c in tried), strict=True)
    stacked = [jnp.stack([jnp.asarray(v) for v in column]) for column in columns]
    if not stacked:
        raise InputError("grid: these composites have no numbers, so there is nothing to choose")
    closed = _traced("grid", measure, jax.tree.unflatten(structure, [column[0] for column in stacked]))

    @jax.jit
    def run(consts: list[Any], stacked: list[jax.Array]) -> jax.Array:
        return jax.lax.map(lambda c: _value(closed, consts, c), stacked)

    values = run(closed.consts, stacked)
    means = np.asarray(values.reshape(len(tried), -1).mean(1))
    if not np.isfinite(means).any():
        raise InputError(f"grid: no composite's measure is finite: {means}")
    best = int(np.where(np.isfinite(means), means, -np.inf).argmax())
    return Found(tried[best], values, best)


def ascend(
    objective: Callable[[Composite], jax.Array],
    composite: Composite,
    optimiser: Any,
    steps: int,
    *,
    trainable: Sequence[str] = ("*/gamma", "*/epsilon"),
) -> Found:
    """Gradient ascent on a composite's numbers, in their logarithms, so that they stay positive.

        evaluate.ascend(objective, composite, optax.adam(0.2), 30)

    Args:
      objective: a differentiable function from a composite to one number, or one per example, whose mean counts: as
        `surrogate` of relevance that `lrp` made with that composite.
      optimiser: an optax.GradientTransformation, or anything with its `init` and `update`. A step of 0.2 in a logarithm
        is one by a fifth of the number.
      trainable: globs on the path of a number in the composite, "row/field": "1/gamma" is the gamma of the second row.
        What fits none stays as it is. Numbers that depend on one another (alpha - beta = 1) cannot be trained alone.

    Returns the best of the composites passed, the start included; `values` has the objective at each. One compiled
    call.

    Raises InputError where nothing is trainable, where a trainable number is not above 0 (its logarithm has no place to
    start), for steps below 1, for a glob that fits nothing unless it is one of the default ones, or where the objective
    or its gradient is not finite on the way.
    """
    if not isinstance(composite, Composite):
        raise InputError(f"ascend: {composite!r} is no composite")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"ascend(steps={steps!r}): write a number of steps >= 1")
    keyed, structure = jax.tree.flatten_with_path(composite)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in keyed]
    found = {g: [path for path in paths if fnmatchcase(path, g)] for g in trainable}
    missing = [g for g, fits in found.items() if not fits and g not in ("*/gamma", "*/epsilon")]
    if missing or not any(found.values()):
        raise InputError(f"ascend(trainable={trainable!r}) fits nothing, or has a glob that does: there are {paths}")
    leaves = dict(zip(paths, (leaf for _, leaf in keyed), strict=True))
    chosen = [path for path in paths if any(path in fits for fits in found.values())]
    for path in chosen:
        if not (np.asarray(leaves[path]) > 0).all():
            raise InputError(f"ascend: {path} is {leaves[path]!r}; start it above 0, or leave it out of trainable")

    def made(logs: dict[str, jax.Array]) -> Composite:
        return jax.tree.unflatten(structure, [jnp.exp(logs[p]) if p in logs else leaves[p] for p in paths])

    start = {path: jnp.log(jnp.asarray(leaves[path], jnp.result_type(float))) for path in chosen}
    closed = _traced("ascend", objective, made(start))

    @jax.jit
    def run(consts: list[Any], logs: dict[str, jax.Array]) -> tuple[Any, jax.Array, jax.Array]:
        def descend(logs: dict[str, jax.Array]) -> jax.Array:  # optimisers go down
            return -_value(closed, consts, jax.tree.leaves(made(logs))).mean()

        def step(state: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], tuple[Any, jax.Array, jax.Array]]:
            logs, memory = state
            loss, slope = jax.value_and_grad(descend)(logs)
            update, memory = optimiser.update(slope, memory, logs)
            sound = jnp.isfinite(loss) & jnp.all(jnp.asarray([jnp.isfinite(g).all() for g in slope.values()]))
            return (jax.tree.map(jnp.add, logs, update), memory), (logs, -loss, sound)

        return jax.lax.scan(step, (logs, optimiser.init(logs)), None, steps + 1)[1]

    logs, values, sound = run(closed.consts, start)
    if not sound.all():
        at = int(jnp.argmin(sound))
        raise InputError(
            f"ascend: the objective, {values[at]}, or its gradient is not finite at step {at}, at "
            f"{ {p: np.exp(v[at]).tolist() for p, v in logs.items()} }; take smaller steps, or another start"
        )
    best = int(jnp.argmax(values))
    return Found(made({path: v[best] for path, v in logs.items()}), values, best)


def _traced(search: str, measure: Callable[[Composite], jax.Array], composite: Composite) -> Any:
    """The measure as a jaxpr, apart from the arrays it closes over: XLA would fold a network's pass over constants."""
    closed, out = jax.make_jaxpr(measure, return_shape=True)(composite)
    fits = isinstance(out, jax.ShapeDtypeStruct) and out.ndim <= 1 and jnp.issubdtype(out.dtype, jnp.floating)
    if not fits:
        raise InputError(f"{search}: the measure returned {out}; return one number, or one per example")
    return closed


def _value(closed: Any, consts: Sequence[Any], numbers: Sequence[jax.Array]) -> jax.Array:
    """The measure of the composite with these numbers."""
    return jax.core.eval_jaxpr(closed.jaxpr, consts, *numbers)[0]


def surrogate(
    predict: Callable,
    inputs: Any,
    relevance: Any,
    targets: Any,
    *,
    temperature: float = 0.1,
    region: int | Sequence[int] = 1,
    steps: int | Sequence[float] | None = None,
    fill: Any = "mean",
    key: Any = None,
    channels: int | None = -1,
) -> jax.Array:
    """(N,): the symmetric relevance gain with soft flips, differentiable in the relevance.

        w_t(k)  =  sigmoid((r_t - q_k) / (temperature * deviation of r)),     x_k = (1 - w) x + w fill
        sum_k  (score(x replaced by 1 - w(T - k)) - score(x replaced by w(k)))  *  width of step k

    r_t is the relevance of tile t of T, q_k lies half way between the k-th and the next greatest. As the temperature
    falls it becomes `srg` of the curves of `pixel_flipping`, whose arguments it has, with the same fill for the same
    key; its gradient gets rough with it. The forward pass is repeated in the backward pass to save memory.

    Raises InputError and TargetError as `pixel_flipping`, and InputError for integer inputs, which cannot be blended,
    for a temperature not above 0, and for inpainting, which has no meaning for a pixel flipped in part.
    """
    if not jnp.issubdtype(jnp.result_type(inputs), jnp.floating):
        raise InputError(f"surrogate: inputs of {jnp.result_type(inputs)} cannot be blended with a fill; write floats")
    if not isinstance(temperature, jax.core.Tracer) and not temperature > 0:
        raise InputError(f"surrogate(temperature={temperature!r}): write a number above 0")
    flipping, tiles = flipping_of(predict, inputs, relevance, targets, region, fill, key, channels)
    if isinstance(flipping.fill, Inpaint):
        raise InputError(
            "surrogate(fill='inpaint'): a pixel flipped in part has no known neighbours; take another fill"
        )
    counts = counts_of(steps, tiles.count)
    widths = np.diff(counts / tiles.count)
    weights = (np.append(widths, 0) + np.append(0, widths)) / 2 / widths.sum()
    inner = (counts > 0) & (counts < tiles.count)  # with no tile or all of them flipped both orders are the same
    return _gain(flipping, counts[inner], weights[inner], temperature, tiles)


@functools.partial(jax.jit, static_argnames=("tiles",))
def _gain(flipping: Flipping, counts: jax.Array, weights: jax.Array, temperature: Any, tiles: Tiles) -> jax.Array:
    x, relevance = tiles.channels_last(flipping.inputs), flipping.relevance
    filled = jax.vmap(flipping.fill.replacement)(folded(flipping.keys, 1), x)
    ordered = jnp.sort(relevance, axis=1)[:, ::-1]
    # a map that is flat has no deviation, and no slope
    variance = relevance.var(1, keepdims=True)
    width = temperature * jnp.sqrt(jnp.where(variance > 0, variance, 1))

    def flipped(count: jax.Array) -> jax.Array:
        threshold = (ordered[:, count - 1] + ordered[:, count]) / 2
        return jax.nn.sigmoid((relevance - threshold[:, None]) / width)

    def blended(part: jax.Array) -> jax.Array:
        w = tiles.spread(part).astype(x.dtype)
        return score(flipping.predict(tiles.restored((1 - w) * x + w * filled)), flipping.targets)

    @jax.checkpoint
    def step(total: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        count, weight = at
        gain = blended(1 - flipped(tiles.count - count)) - blended(flipped(count))
        return total + weight.astype(gain.dtype) * gain, None

    start = jnp.zeros_like(score(flipping.predict(flipping.inputs), flipping.targets))
    return jax.lax.scan(step, start, (counts, weights))[0]
