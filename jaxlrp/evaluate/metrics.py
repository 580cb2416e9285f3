"""Measures of explanations beside pixel flipping.

- Does relevance say what the score loses? `sensitivity_n`, `infidelity`: random sets of positions are replaced.
- Does it hold still when the input hardly moves? `max_sensitivity`.
- Is it short? `sparseness`, `complexity`. Neither looks at the network.
- Is it where the object is? `pointing_game`, `relevance_mass`, `relevance_rank`: against masks, for networks that are
  known to use nothing else.

All return one number per example, (N,), in at least float32, and run under `jax.jit`. A number that is not defined is
NaN, not 0. An example's random draws depend on the key and its place alone, not on the examples beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ..errors import InputError
from ..tiles import Tiles, keys_of, tiles_of
from .flipping import Flipping, as_partial, called, flipping_of, folded, relevance_of


def sensitivity_n(
    predict: Callable,
    inputs: Any,
    relevance: Any,
    targets: Any,
    *,
    size: int,
    samples: int = 128,
    fill: Any = "mean",
    region: int | Sequence[int] = 1,
    key: Any = None,
    channels: int | None = -1,
) -> jax.Array:
    """(N,): whether the relevance of a set of tiles says how much the score falls when they are replaced.

        correlation over random sets S, |S| = size, of   sum_{i in S} R_i   and   f(x) - f(x with S replaced)

    Pearson's, from -1 to 1; 1 where relevance is right up to scale and offset, as for a linear f with R = w (x - fill).
    Sensitivity-n of Ancona et al. 2018; the faithfulness correlation of Bhatt et al. 2020.

    NaN where the correlation is not defined: relevance that is the same on all tiles, or a score that varies by no
    more than its rounding. Neither is a correlation of 0.

    Args:
      size: how many tiles are replaced at once, 1 to all but one; it decides what is measured: single positions (no
        interactions) or half of the input. Report it, or several: another size does not compile again.
      samples: how many sets; the standard error is about 1 / sqrt(samples) where the correlation is small.
      The others: as `pixel_flipping`, the sets drawn by `key`. A random fill is drawn once for each example.

    Raises InputError and TargetError as `pixel_flipping`, InputError for `size` or `samples` out of range.
    """
    flipping, tiles = flipping_of(predict, inputs, relevance, targets, region, fill, key, channels)
    check_count("size", size, 1, tiles.count - 1)
    check_count("samples", samples, 2)
    return _correlation(flipping, size, samples, tiles)


def infidelity(
    predict: Callable,
    inputs: Any,
    relevance: Any,
    targets: Any,
    *,
    size: int,
    samples: int = 128,
    scale: bool = False,
    fill: Any = "mean",
    region: int | Sequence[int] = 1,
    key: Any = None,
    channels: int | None = -1,
) -> jax.Array:
    """(N,): how far the relevance of a set of tiles is from what the score loses when they are replaced.

        mean over random sets S, |S| = size, of   (beta sum_{i in S} R_i - (f(x) - f(x with S replaced)))^2

    0 is best, and its unit is the score's, squared. beta = 1, for relevance that sums to the score; scale=True takes,
    for each example, the beta that is best, so that maps of any scale compare:

        beta = sum_S (sum_{i in S} R_i) (f(x) - f(x_S)) / sum_S (sum_{i in S} R_i)^2

    Yeh et al. 2019, with the perturbation that replaces S, for relevance that contains the factor of the input:
    multiply a gradient by x - fill first.

    Args:
      size: how many tiles are replaced at once, 1 to all.
      The others: as `sensitivity_n`.

    Raises InputError and TargetError as `sensitivity_n`.
    """
    flipping, tiles = flipping_of(predict, inputs, relevance, targets, region, fill, key, channels)
    check_count("size", size, 1, tiles.count)
    check_count("samples", samples, 1)
    return _infidelity(flipping, size, samples, scale, tiles)


def max_sensitivity(
    explain: Callable, inputs: Any, *, radius: Any, samples: int = 10, key: Any = None, relative: bool = True
) -> jax.Array:
    """(N,): how far an explanation moves when its input hardly does.

        max over draws d, uniform in [-radius, radius] at every number of x, of  |R(x + d) - R(x)| / |R(x)|

    in the Euclidean norm over one example's map (Yeh et al. 2019). 0 is best, and a constant map has it. The maximum of
    a few draws is a lower bound of that over the whole box, and grows with their number: compare at equal `samples`.

    Args:
      explain: any function from inputs (N, ...) to relevance (N, ...), with its targets fixed, or a change of the
        predicted class counts as one of the explanation. Compiled once for each function object; a
        `jax.tree_util.Partial(explain, params)` passes its parameters as arguments.
      inputs: floating point; for token ids explain the embeddings.
      radius: > 0, in the inputs' unit.
      samples: how many draws.
      key: a `jax.random.key`; None: key(0).
      relative: False leaves out the division by |R(x)|; with it, a map of zeros gives NaN, or infinity if it moves.

    Raises InputError for inputs that are not floating point, a radius or `samples` out of range, or where `explain`
    does not return one map per example.
    """
    inputs, function = jnp.asarray(inputs), as_partial(explain)
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise InputError(f"inputs of type {inputs.dtype} cannot be moved a little: explain their embeddings")
    if not isinstance(radius, jax.core.Tracer) and not (np.ndim(radius) == 0 and 0 < radius < np.inf):
        raise InputError(f"radius={radius!r}: write a number > 0, in the inputs' unit")
    check_count("samples", samples, 1)
    maps = jax.tree.leaves(called.eval_shape(function, inputs))
    if len(maps) != 1 or inputs.ndim < 1 or maps[0].shape[:1] != inputs.shape[:1]:
        shapes = [leaf.shape for leaf in maps]
        raise InputError(f"explain returned {shapes} for inputs of shape {inputs.shape}: write one map per example")
    return _moved(function, inputs, radius, keys_of(key, jnp.arange(len(inputs))), samples, relative)


def sparseness(relevance: Any, *, channels: int | None = -1) -> jax.Array:
    """(N,): the Gini index of |R| over the P positions (Chalasani et al. 2020).

        G = sum_i (2 i - P - 1) v_i / (P sum_i v_i),   v = |R| in increasing order, i = 1 .. P

    From 0, all equal, to 1 - 1/P, a single position. NaN where all relevance is 0.

    relevance: (N, ..., channels), a position's channels summed first; `channels` says which axis they are, None for no
    such axis: write it for maps (N, height, width). (N, positions) have none.

    Raises InputError for such shapes that do not fit, or relevance with NaN.
    """
    return _gini(at_positions(relevance, channels))


def complexity(relevance: Any, *, channels: int | None = -1) -> jax.Array:
    """(N,): the entropy of |R| over the P positions, in nats (Bhatt et al. 2020).

        H = -sum_i p_i log p_i,   p_i = |R_i| / sum_j |R_j|

    From 0, a single position, to log P, all equal. NaN where all relevance is 0.

    Arguments and errors: as `sparseness`.
    """
    return _entropy(at_positions(relevance, channels))


def pointing_game(relevance: Any, mask: Any, *, channels: int | None = -1) -> jax.Array:
    """(N,): 1 where the most relevant position lies in the mask, 0 elsewhere (Zhang et al. 2018).

    Where several share the maximum, the part of them in the mask: what picking one at random gives on average, so that
    a constant map has the mask's share of the positions. The mean over N is the accuracy. (The paper counts hits up to
    15 pixels beside the object: dilate the masks.)

    relevance: (N, ..., channels), a position's channels summed first, `channels` saying which axis they are.
    mask: (N, ...) without the channels, true (or not 0) on the object; or like relevance, and then every number of it
      is a position by itself.

    Raises InputError for shapes that do not fit, relevance with NaN, or a mask without a position. Under `jit`, where
    that cannot be seen, such an example has NaN.
    """
    return _hit(*_masked(relevance, mask, channels))


def relevance_mass(relevance: Any, mask: Any, *, channels: int | None = -1) -> jax.Array:
    """(N,): the share of the positive relevance that lies in the mask, 0 to 1 (Arras et al. 2022).

        sum_{i in mask} max(R_i, 0) / sum_i max(R_i, 0)

    NaN where no relevance is positive. Arguments and errors: as `pointing_game`.
    """
    return _mass(*_masked(relevance, mask, channels))


def relevance_rank(relevance: Any, mask: Any, *, channels: int | None = -1) -> jax.Array:
    """(N,): the share of the K most relevant positions that lies in the mask of K positions, 0 to 1.

    Relevance rank accuracy of Arras et al. 2022. Positions that tie for the last of the K places share them, as if
    drawn at random. Arguments and errors: as `pointing_game`.
    """
    return _rank(*_masked(relevance, mask, channels))


def check_count(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raises InputError unless `value` is an integer from `least` to `most`."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        range_ = (
            f">= {least}" if most is None else f"from {least} to {most}" if most >= least else "that the input has not"
        )
        raise InputError(f"{name}={value!r}: write a number {range_}")


def at_positions(relevance: Any, channels: int | None) -> jax.Array:
    """(N, positions), in at least float32, channels summed; or an InputError."""
    relevance = jnp.asarray(relevance)
    return relevance_of(tiles_of(relevance, 1, channels, "relevance"), relevance, relevance)


def correlation(a: jax.Array, b: jax.Array, coarse: float = 0.0) -> jax.Array:
    """(N,): Pearson's, along the last axis; NaN where either varies by no more than rounding (b's may be `coarse`)."""

    def standard(v: jax.Array, eps: float) -> jax.Array:
        largest = jnp.abs(v).max(-1, keepdims=True)
        constant = jnp.ptp(v, axis=-1, keepdims=True) <= 4 * max(eps, float(jnp.finfo(v.dtype).eps)) * largest
        v = v - v.mean(-1, keepdims=True)
        v = v / jnp.abs(v).max(-1, keepdims=True)  # squares of small numbers would be 0
        return jnp.where(constant, jnp.nan, v / jnp.linalg.norm(v, axis=-1, keepdims=True))

    return jnp.clip((standard(a, 0.0) * standard(b, coarse)).sum(-1), -1, 1)


@functools.partial(jax.jit, static_argnames=("samples", "tiles"))
def _correlation(flipping: Flipping, size: jax.Array, samples: int, tiles: Tiles) -> jax.Array:
    # sets are of one size, so an offset to all relevance changes nothing; this one makes constant relevance exactly 0
    low, high = (end(flipping.relevance, axis=-1, keepdims=True) for end in (jnp.min, jnp.max))
    sums, left = _drawn(flipping, flipping.relevance - (low / 2 + high / 2), size, samples, tiles)
    digits = called.eval_shape(flipping.predict, flipping.inputs).dtype  # those of half precision are fewer than left's
    coarse = float(jnp.finfo(digits).eps) if jnp.issubdtype(digits, jnp.floating) else 0.0
    return correlation(sums, -left, coarse)  # and f(x) is an offset to what is lost


@functools.partial(jax.jit, static_argnames=("samples", "scale", "tiles"))
def _infidelity(flipping: Flipping, size: jax.Array, samples: int, scale: bool, tiles: Tiles) -> jax.Array:
    sums, left = _drawn(flipping, flipping.relevance, size, samples, tiles)
    whole = flipping.scores(tiles)(jnp.zeros(flipping.relevance.shape, bool))
    lost = whole.astype(left.dtype)[:, None] - left
    if scale:
        square = (sums**2).sum(-1, keepdims=True)
        sums = sums * (sums * lost).sum(-1, keepdims=True) / jnp.where(square == 0, 1, square)
    return ((sums - lost) ** 2).mean(-1)


def _drawn(
    flipping: Flipping, relevance: jax.Array, size: jax.Array, samples: int, tiles: Tiles
) -> tuple[jax.Array, jax.Array]:
    """(N, samples) each: the relevance of random sets of tiles, and the scores without them."""
    keys, without = folded(flipping.keys, 0), flipping.scores(tiles)

    def step(_: None, i: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
        chosen = jax.vmap(lambda k: jax.random.permutation(jax.random.fold_in(k, i), tiles.count) < size)(keys)
        left = without(chosen)
        return None, (jnp.where(chosen, relevance, 0).sum(-1), left)

    sums, left = jax.lax.scan(step, None, jnp.arange(samples))[1]
    return sums.T, left.T


@functools.partial(jax.jit, static_argnames=("samples", "relative"))
def _moved(
    explain: Partial, inputs: jax.Array, radius: jax.Array, keys: jax.Array, samples: int, relative: bool
) -> jax.Array:
    def explained(x: jax.Array) -> jax.Array:
        (relevance,) = jax.tree.leaves(explain(x))
        return relevance.astype(jnp.promote_types(relevance.dtype, jnp.float32)).reshape(len(inputs), -1)

    def draw(key: jax.Array, x: jax.Array) -> jax.Array:
        return x + jax.random.uniform(key, x.shape, x.dtype, -radius, radius)

    def step(worst: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        near = jax.vmap(draw)(jax.vmap(lambda k: jax.random.fold_in(k, i))(keys), inputs)
        return jnp.maximum(worst, jnp.linalg.norm(explained(near) - first, axis=-1)), None

    first = explained(inputs)
    size = jnp.linalg.norm(first, axis=-1)
    worst = jax.lax.scan(step, jnp.zeros_like(size), jnp.arange(samples))[0]
    return worst / size if relative else worst


@jax.jit
def _gini(relevance: jax.Array) -> jax.Array:
    v = jnp.sort(jnp.abs(relevance), axis=-1)
    count = v.shape[-1]
    weights = 2 * jnp.arange(1, count + 1, dtype=v.dtype) - count - 1
    return (_shares(v) * weights).sum(-1) / count


@jax.jit
def _entropy(relevance: jax.Array) -> jax.Array:
    return jax.scipy.special.entr(_shares(jnp.abs(relevance))).sum(-1)


def _shares(v: jax.Array) -> jax.Array:
    """v >= 0 as parts of its sum; NaN where that is 0."""
    return v / v.sum(-1, keepdims=True)


def _masked(relevance: Any, mask: Any, channels: int | None) -> tuple[jax.Array, jax.Array]:
    """(N, positions) each: relevance, and whether the position is in the mask; or an InputError."""
    relevance, mask = jnp.asarray(relevance), jnp.asarray(mask)
    tiles = tiles_of(relevance, 1, None if mask.shape == relevance.shape else channels, "relevance")
    wanted = (len(relevance), *tiles.positions)
    if mask.shape != wanted:
        raise InputError(f"mask of shape {mask.shape} for relevance of shape {relevance.shape}: write {wanted}")
    inside = (mask != 0).reshape(len(mask), -1)
    if (
        not isinstance(mask, jax.core.Tracer)
        and not (there := np.asarray(mask, bool).reshape(len(mask), -1).any(1)).all()
    ):
        empty = int(there.argmin())
        raise InputError(f"the mask of example {empty} has no position: leave such examples out")
    return relevance_of(tiles, relevance, relevance), inside


@jax.jit
def _hit(values: jax.Array, inside: jax.Array) -> jax.Array:
    best = values == values.max(-1, keepdims=True)
    return _where_any(inside, _count(best & inside, values) / _count(best, values))


@jax.jit
def _mass(values: jax.Array, inside: jax.Array) -> jax.Array:
    return _where_any(inside, jnp.where(inside, _shares(jnp.maximum(values, 0)), 0).sum(-1))


@jax.jit
def _rank(values: jax.Array, inside: jax.Array) -> jax.Array:
    size = inside.sum(-1, keepdims=True)
    last = jnp.take_along_axis(-jnp.sort(-values, axis=-1), jnp.maximum(size - 1, 0), axis=-1)
    above, tied = values > last, values == last
    places = _count(inside, values) - _count(above, values)
    found = _count(above & inside, values) + places * _count(tied & inside, values) / _count(tied, values)
    return _where_any(inside, found / _count(inside, values))


def _where_any(inside: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.where(inside.any(-1), value, jnp.nan)


def _count(true: jax.Array, like: jax.Array) -> jax.Array:
    return true.sum(-1).astype(like.dtype)
