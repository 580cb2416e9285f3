"""Pixel flipping: how the score falls when positions are replaced in the order of their relevance.

    s_k = score(x with its k most relevant positions replaced),   k = 0 .. K,   s_0 = score(x)

A map that found what the network uses makes the curve fall fast when the most relevant go first (MoRF), and slowly
when the least relevant go first (LeRF). Sources: Bach et al. 2015 (pixel flipping); Samek et al. 2017 (regions, MoRF
and LeRF, AOPC); Petsiuk et al. 2018 (deletion and insertion); Bluecher et al. 2024 (SRG, and why the fill is to be
stated).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ..attribute import chosen
from ..errors import InputError, TargetError
from ..functional import functional
from ..tiles import Tiles, keys_of, tiles_of
from .fills import Constant, Custom, Fill, Inpaint, as_fill

ORDERS = ("morf", "lerf", "random")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Curves:
    """One curve per example.

    scores: (N, steps + 1), the first column the untouched input's (for `insertion` the filled one's).
    fractions: (steps + 1,), the part of the positions that is replaced (for `insertion`, shown).
    """

    scores: jax.Array
    fractions: jax.Array

    def auc(self) -> jax.Array:
        """(N,): the area under the curve over the fractions, by trapezoids, divided by their range: a mean score."""
        width = jnp.diff(self.fractions)
        means = (self.scores[:, 1:] + self.scores[:, :-1]) / 2
        return means @ width.astype(means.dtype) / (self.fractions[-1] - self.fractions[0]).astype(means.dtype)

    def aopc(self) -> jax.Array:
        """(N,): 1/(K+1) sum_k (s_0 - s_k), k = 0 .. K (Samek et al. 2017, eq. 12)."""
        return (self.scores[:, :1] - self.scores).mean(1)


def srg(lerf: Curves, morf: Curves) -> jax.Array:
    """(N,): AUC(LeRF) - AUC(MoRF), the symmetric relevance gain (Bluecher et al. 2024): 0 for a random order."""
    return lerf.auc() - morf.auc()


def pixel_flipping(
    predict: Callable,
    inputs: Any,
    relevance: Any,
    targets: Any,
    *,
    order: str = "morf",
    region: int | Sequence[int] = 1,
    steps: int | Sequence[float] | None = None,
    fill: Any = "mean",
    key: Any = None,
    channels: int | None = -1,
) -> Curves:
    """The target's score while positions are replaced in the order of their relevance.

    Args:
      predict: any function from `inputs` to scores (N, classes), logits or probabilities; or to (N,), with
        targets=None. It is compiled once for each function object, with the numbers that it holds: a
        `jax.tree_util.Partial(apply, params)` passes its parameters as arguments, so that other parameters neither
        compile again nor are overlooked. An nnx or Equinox model is taken as it is now, and compiled anew;
        `Partial(*jaxlrp.functional(model))` once is quicker.
      inputs: (N, ..., channels): images, time series; (N, positions): token ids, or a series without channels.
      relevance: like inputs, or without the channel axis. A position's channels are flipped together, by their sum.
      targets: the class, or one per example.
      order: "morf", the most relevant first; "lerf", the least; "random", by the key, whatever the relevance.
      region: positions are flipped in tiles of this size, one number or one per position axis; a tile's relevance is
        its sum. The last tiles are smaller where the size does not divide.
      steps: None, one tile a step; a number, so many steps of equally many tiles (up to rounding), to the last tile;
        or increasing fractions in (0, 1], such as jnp.geomspace(0.01, 1, 15).
      fill: what stands in the place of a flipped position: see `evaluate.fills`. The default is the example's mean.
      key: a `jax.random.key` for random fills and orders, and for ties, which are broken at random; None: key(0).
      channels: which axis of the inputs holds channels, None for no such axis. Inputs (N, positions) have none.

    Returns `Curves`. One compiled call: between the steps nothing leaves the device.

    Raises InputError for an unknown order or fill, for shapes that do not fit, relevance with NaN, or steps out of
    range; TargetError for a target that does not fit what `predict` returns.
    """
    return _curves(predict, inputs, relevance, targets, order, region, steps, fill, key, channels, False)


def deletion(predict: Callable, inputs: Any, relevance: Any, targets: Any, **options: Any) -> Curves:
    """`pixel_flipping` from the most relevant on (Petsiuk et al. 2018): the lower its `auc`, the better the map."""
    return pixel_flipping(predict, inputs, relevance, targets, **{"order": "morf", **options})


def insertion(predict: Callable, inputs: Any, relevance: Any, targets: Any, **options: Any) -> Curves:
    """The reverse: from the filled input on, the most relevant positions are shown first (Petsiuk et al. 2018).

    Options as `pixel_flipping`. The higher its `auc`, the better the map.
    """
    given: dict[str, Any] = {
        "order": "morf",
        "region": 1,
        "steps": None,
        "fill": "mean",
        "key": None,
        "channels": -1,
    } | options
    return _curves(predict, inputs, relevance, targets, reveal=True, **given)


def relevance_of(tiles: Tiles, inputs: jax.Array, relevance: Any) -> jax.Array:
    """(N, tiles): the relevance of every tile, in at least float32, or an InputError."""
    relevance = jnp.asarray(relevance)
    alone = (len(inputs), *tiles.positions)
    if relevance.shape not in (inputs.shape, alone):
        raise InputError(
            f"relevance of shape {relevance.shape} for inputs of {inputs.shape}: write {alone}, or like them"
        )
    if not isinstance(relevance, jax.core.Tracer):
        wrong = ~np.isfinite(np.asarray(relevance, np.float64)).reshape(len(relevance), -1).all(1)
        if wrong.any():
            raise InputError(f"relevance has NaN or infinity, first in example {wrong.argmax()}")
    relevance = relevance.astype(jnp.promote_types(relevance.dtype, jnp.float32))
    if relevance.shape != alone:
        relevance = tiles.channels_last(relevance).sum(-1)
    return tiles.sums(relevance)


def check_fill(fill: Fill, dtype: Any) -> None:
    """Raises InputError unless inputs of this dtype can be filled so."""
    if jnp.issubdtype(dtype, jnp.floating):
        return
    if not isinstance(fill, Custom | Constant):
        raise InputError(f"fill={fill!r} for inputs of {dtype}; write the id of a mask token, or a function")
    if isinstance(fill, Constant) and not isinstance(fill.value, jax.core.Tracer):
        value = np.asarray(fill.value)
        with np.errstate(invalid="ignore"):
            if (value.astype(dtype) != value).any():
                raise InputError(f"fill={value} for inputs of {dtype}; write a value that {dtype} has")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flipping:
    """What is flipped and who scores it. `relevance`: (N, tiles). `keys`: one for each example."""

    predict: Partial
    inputs: jax.Array
    relevance: Any
    targets: Any
    fill: Fill
    keys: jax.Array

    def scores(self, tiles: Tiles) -> Callable[[jax.Array], jax.Array]:
        """A function of the flipped tiles, (N, tiles) bool, to the scores without them, (N,)."""
        x, fill = tiles.channels_last(self.inputs), self.fill
        replaced = x if isinstance(fill, Inpaint) else jax.vmap(fill.replacement)(folded(self.keys, 1), x)

        def without(flipped: jax.Array) -> jax.Array:
            at = tiles.spread(flipped)
            y = jax.vmap(fill.inpainted)(x, at) if isinstance(fill, Inpaint) else jnp.where(at, replaced, x)
            return score(self.predict(tiles.restored(y)), self.targets)

        return without

    def curves(self, ranks: jax.Array, counts: Any, tiles: Tiles, reveal: bool = False) -> jax.Array:
        """(N, steps + 1): the scores while the tiles are replaced by their ranks (N, tiles)."""
        score_without = self.scores(tiles)

        def step(_: None, count: jax.Array) -> tuple[None, jax.Array]:
            return None, score_without((ranks < count) ^ reveal)

        return jax.lax.scan(step, None, counts)[1].T


def folded(keys: jax.Array, purpose: int) -> jax.Array:
    """Other keys for every purpose."""
    return jax.vmap(lambda k: jax.random.fold_in(k, purpose))(keys)


def flipping_of(
    predict: Callable,
    inputs: Any,
    relevance: Any,
    targets: Any,
    region: int | Sequence[int],
    fill: Any,
    key: Any,
    channels: int | None,
) -> tuple[Flipping, Tiles]:
    """The user's arguments, checked: InputError and TargetError as `pixel_flipping` says."""
    inputs = jnp.asarray(inputs)
    tiles = tiles_of(inputs, region, channels)
    found = as_fill(fill)
    check_fill(found, inputs.dtype)
    sums = relevance_of(tiles, inputs, relevance)
    function = as_partial(predict)
    check_targets(called.eval_shape(function, inputs), targets, len(inputs))
    targets = None if targets is None else jnp.asarray(targets)  # a list would be many arguments
    return Flipping(function, inputs, sums, targets, found, keys_of(key, jnp.arange(len(inputs)))), tiles


def counts_of(steps: int | Sequence[float] | None, tiles: int) -> np.ndarray:
    """How many tiles are flipped at each step, from none on, or an InputError."""
    if steps is None:
        return np.arange(tiles + 1)
    if isinstance(steps, int | np.integer) and not isinstance(steps, bool):
        if not 1 <= steps <= tiles:
            raise InputError(f"steps={steps}: there are {tiles} tiles; write a number from 1 to {tiles}")
        return np.round(np.arange(steps + 1) * tiles / steps).astype(int)
    fractions = np.asarray(steps, float)
    if fractions.ndim != 1 or not len(fractions) or not (np.diff(fractions, prepend=0) > 0).all() or fractions[-1] > 1:
        raise InputError(f"steps={steps!r}: write a number of steps, or increasing fractions in (0, 1]")
    counts = np.concatenate([[0], np.round(fractions * tiles).astype(int)])
    if not counts[-1]:
        raise InputError(f"steps={steps!r}: not one of {tiles} tiles is flipped; write greater fractions")
    return counts


def ranks_of(order: str, relevance: jax.Array, keys: jax.Array) -> jax.Array:
    """(N, tiles): each tile's place in the order, ties at random, and not alike in two orders."""
    own = folded(keys, 2 + ORDERS.index(order))  # 1 is the fill's
    random = jax.vmap(lambda k: jax.random.uniform(k, relevance.shape[1:]))(own)
    signed = {"morf": -relevance, "lerf": relevance, "random": jnp.zeros_like(relevance)}[order]
    return jnp.argsort(jnp.lexsort((random, signed), axis=-1), axis=-1)


def _curves(
    predict: Callable,
    inputs: Any,
    relevance: Any,
    targets: Any,
    order: str,
    region: int | Sequence[int],
    steps: int | Sequence[float] | None,
    fill: Any,
    key: Any,
    channels: int | None,
    reveal: bool,
) -> Curves:
    if order not in ORDERS:
        raise InputError(f"order={order!r}; write one of {', '.join(map(repr, ORDERS))}")
    flipping, tiles = flipping_of(predict, inputs, relevance, targets, region, fill, key, channels)
    counts = counts_of(steps, tiles.count)
    scores = _run(flipping, counts, order, tiles, reveal)
    return Curves(scores, jnp.asarray(counts / tiles.count, scores.dtype))


@functools.partial(jax.jit, static_argnames=("order", "tiles", "reveal"))
def _run(flipping: Flipping, counts: jax.Array, order: str, tiles: Tiles, reveal: bool) -> jax.Array:
    """(N, steps + 1)."""
    return flipping.curves(ranks_of(order, flipping.relevance, flipping.keys), counts, tiles, reveal)


called = jax.jit(lambda function, *args: function(*args))


@dataclasses.dataclass(frozen=True)
class _Fixed:
    """A function with keywords that are no arrays, which a Partial would trace."""

    function: Callable
    keywords: tuple[tuple[str, Any], ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **dict(self.keywords), **kwargs)


def as_partial(function: Callable) -> Partial:
    """A function as an argument of a compiled one, which is compiled once for each function object.

    A Partial's bool, str, None and function keywords stay Python values. The arrays of a model that is an nnx module or
    a pytree become arguments, as they are now, and it is compiled anew.
    """
    if isinstance(function, Partial):
        static = {k: v for k, v in function.keywords.items() if isinstance(v, bool | str) or v is None or callable(v)}
        if not static:
            return function
        rest = {k: v for k, v in function.keywords.items() if k not in static}
        return Partial(_Fixed(function.func, tuple(sorted(static.items()))), *function.args, **rest)
    modules = {c.__module__.split(".")[1] for c in type(function).__mro__ if c.__module__.startswith("flax.")}
    if "nnx" in modules or not jax.tree_util.all_leaves([function]):
        return Partial(*functional(function))
    return Partial(function)


def check_targets(value: Any, targets: Any, count: int) -> None:
    """Raises TargetError unless `predict`'s output, or its shape, is one row per example, with these targets."""
    shape = getattr(value, "shape", None)
    if shape is None or len(shape) != (1 if targets is None else 2) or shape[0] != count:
        shapes = [leaf.shape for leaf in jax.tree.leaves(value)]
        wanted = (
            f"({count},), or write the classes" if targets is None else f"({count}, classes), or write targets=None"
        )
        raise TargetError(f"targets={targets!r}: predict returned {shapes}; it must return {wanted}")
    if targets is not None:
        chosen(value, targets)


def score(value: jax.Array, targets: Any) -> jax.Array:
    """(N,), in at least float32: each example's score for its target; targets=None: what `predict` returned."""
    value = value.astype(jnp.promote_types(value.dtype, jnp.float32))
    return value if targets is None else jnp.where(chosen(value, targets) > 0, value, 0).sum(-1)
