"""Tiles of positions, which are replaced together, and a random key for every example."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .errors import InputError


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How positions make tiles. `axis`: that of the channels, after the examples, or None; `size`: of a tile."""

    positions: tuple[int, ...]
    size: tuple[int, ...]
    axis: int | None

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(-(-n // s) for n, s in zip(self.positions, self.size, strict=True))

    @property
    def count(self) -> int:
        return int(np.prod(self.grid))

    def channels_last(self, x: jax.Array) -> jax.Array:
        """(N, *positions, channels)."""
        return x[..., None] if self.axis is None else jnp.moveaxis(x, self.axis, -1)

    def restored(self, x: jax.Array) -> jax.Array:
        return x[..., 0] if self.axis is None else jnp.moveaxis(x, -1, self.axis)

    def sums(self, relevance: jax.Array) -> jax.Array:
        """(N, tiles) from relevance at the positions, (N, *positions)."""
        fit = [(0, g * s - n) for n, g, s in zip(self.positions, self.grid, self.size, strict=True)]
        wide = jnp.pad(relevance, [(0, 0), *fit])
        apart = wide.reshape(len(relevance), *(v for pair in zip(self.grid, self.size, strict=True) for v in pair))
        return apart.sum(tuple(range(2, apart.ndim, 2))).reshape(len(relevance), -1)

    def spread(self, of_tiles: jax.Array) -> jax.Array:
        """(N, *positions, 1) from (N, tiles)."""
        out = of_tiles.reshape(len(of_tiles), *self.grid)
        for axis, (n, s) in enumerate(zip(self.positions, self.size, strict=True), 1):
            out = jax.lax.slice_in_dim(jnp.repeat(out, s, axis) if s > 1 else out, 0, n, axis=axis)
        return out[..., None]


def tiles_of(inputs: Any, region: int | Sequence[int], channels: int | None, name: str = "inputs") -> Tiles:
    """The tiles of inputs (N, ...), or an InputError that calls them by their name."""
    if inputs.ndim < 2 or not all(inputs.shape):
        raise InputError(f"{name} of shape {inputs.shape}: write (examples, positions) or (examples, ..., channels)")
    axis = None
    if inputs.ndim > 2 and channels is not None:
        if not isinstance(channels, int) or not -inputs.ndim < channels < inputs.ndim or channels % inputs.ndim == 0:
            raise InputError(f"channels={channels!r}: {name} of shape {inputs.shape}; write the axis of the channels")
        axis = channels % inputs.ndim
    positions = tuple(n for i, n in enumerate(inputs.shape) if i not in (0, axis))
    try:
        size = tuple(map(operator.index, region if np.ndim(region) else (region,) * len(positions)))  # type: ignore
    except TypeError:
        size = ()
    if len(size) != len(positions) or isinstance(region, bool) or min(size) < 1:
        raise InputError(f"region={region!r}: write a size >= 1, or one for each of the axes {positions}")
    return Tiles(positions, tuple(min(s, n) for s, n in zip(size, positions, strict=True)), axis)


def keys_of(key: Any, places: jax.Array) -> jax.Array:
    """A key for each example, which depends on its place alone and not on how many there are."""
    key = jax.random.key(0) if key is None else key
    return jax.vmap(functools.partial(jax.random.fold_in, key))(places)
