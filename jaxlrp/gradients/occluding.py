"""Occlusion: what the score loses when a part of the input is covered."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..attribute import Target
from ..errors import InputError
from ..tiles import Tiles, tiles_of
from .call import Call


def occlusion(
    fun: Callable,
    argnums: int | Sequence[int] = 0,
    target: Target = None,
    *,
    region: int | Sequence[int] = 1,
    stride: int | Sequence[int] | None = None,
    fill: Any = 0.0,
    channels: int | None = -1,
) -> Callable:
    """R_p = mean over the tiles T that cover p of (f(x) - f(x with T filled)) / |T|, |T| its elements, as `gradient`.

    Where tiles do not overlap, relevance sums over each to the drop of f: the target logit (for None the sum of the
    outputs, for a callable the inner product of what it makes of the output at x with the output).

    region: a tile's size, one number or one per position axis; a tile covers all channels. The last tiles are smaller
    where they do not fit.
    stride: from one tile to the next, at most the region, so that every position is covered; None: the region.
    fill: what a tile is replaced by: a number, what broadcasts to the explained argument(s) (a pytree like them), or a
    function of them, such as a blur.
    channels: which axis of the argument holds channels, None for no such axis. An example (positions,) has none. If the
    output is (examples, classes), of as many examples as the argument has, its first axis is that of the examples.

    The explained argument may hold token ids: `fill` is the id of the mask token, the relevance is in float. One
    forward pass for each tile, one after another; of several arguments, or a pytree's arrays, each is occluded alone.

    Source: Zeiler and Fergus 2014. Raises TargetError and InputError as `gradient`; InputError for a region, stride or
    fill that does not fit.
    """

    @functools.wraps(fun, updated=())
    def explained(*args: Any, **kwargs: Any) -> Any:
        call = Call(fun, argnums, target, args, kwargs, "occlusion", ids=True)
        leaves, tree = jax.tree.flatten(call.x)
        fills = jax.tree.leaves(call.reference(fill))
        seed = call.seed(call.output(call.x))
        begun = call.score(call.x, seed)

        def relevance(i: int) -> jax.Array:
            def drop(x: jax.Array) -> jax.Array:
                """(N,): of the score, with examples (N, ...) in the i-th place."""
                point = jax.tree.unflatten(tree, [*leaves[:i], x if call.batched else x[0], *leaves[i + 1 :]])
                return (begun - call.score(point, seed)).reshape(-1)

            x, filled = (v if call.batched else v[None] for v in (jnp.asarray(leaves[i]), fills[i]))
            shifted = channels is not None and channels >= 0 and not call.batched
            tiles = tiles_of(x, region, channels + 1 if shifted else channels)  # type: ignore[operator]
            out = _occluded(drop, x, filled, tiles, *_windows(tiles, region, stride))
            out = out.astype(x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else out.dtype)
            return out if call.batched else out[0]

        return call.only(jax.tree.unflatten(tree, [relevance(i) for i in range(len(leaves))]))

    return explained


def _windows(tiles: Tiles, region: Any, stride: Any) -> tuple[np.ndarray, np.ndarray]:
    """(first positions, last positions + 1) of every tile, (tiles, axes) each, or an InputError."""
    rank = len(tiles.positions)
    widths = (region,) * rank if isinstance(region, int) else tuple(region)
    steps = widths if stride is None else (stride,) * rank if isinstance(stride, int) else tuple(stride)
    if len(steps) != rank or any(
        isinstance(d, bool) or not isinstance(d, int) or not 1 <= d <= s for d, s in zip(steps, widths, strict=True)
    ):
        raise InputError(f"stride={stride!r}: write a step from 1 to the region {widths}, or one for each of its axes")
    starts = [
        np.arange(0, max(n - s, 0) + d, d)[: 1 + -(-(n - s) // d)]
        for n, s, d in zip(tiles.positions, tiles.size, steps, strict=True)
    ]
    first = np.stack([grid.ravel() for grid in np.meshgrid(*starts, indexing="ij")], -1)
    return first, np.minimum(first + tiles.size, tiles.positions)


def _occluded(
    drop: Callable, x: jax.Array, fill: jax.Array, tiles: Tiles, first: np.ndarray, last: np.ndarray
) -> jax.Array:
    channels = 1 if tiles.axis is None else x.shape[tiles.axis]
    elements = (last - first).prod(-1) * channels
    dtype = jnp.promote_types(jax.eval_shape(drop, x).dtype, jnp.float32)

    def step(sums: tuple[jax.Array, jax.Array], window: tuple[jax.Array, ...]) -> tuple[Any, None]:
        begin, end, share = window
        inside = jnp.ones((), bool)
        for axis, n in enumerate(tiles.positions):
            at = jnp.arange(n).reshape([n if a == axis + 1 else 1 for a in range(x.ndim + (tiles.axis is None))])
            inside &= (at >= begin[axis]) & (at < end[axis])
        lost = drop(jnp.where(tiles.restored(inside), fill, x)).astype(dtype) * share
        total, count = sums
        return (total + inside * lost.reshape(-1, *(1,) * (inside.ndim - 1)), count + inside), None

    wide = (1, *tiles.positions, 1)
    zeros = jnp.zeros((len(x), *wide[1:]), dtype), jnp.zeros(wide, dtype)
    windows = jnp.asarray(first, jnp.int32), jnp.asarray(last, jnp.int32), jnp.asarray(1 / elements, dtype)
    (total, count), _ = jax.lax.scan(step, zeros, windows)
    return jnp.broadcast_to(tiles.restored(total / count), x.shape)
