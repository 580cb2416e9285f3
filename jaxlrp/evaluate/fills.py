"""Fills: what stands in the place of a flipped position.

A ranking of explanations depends on it (Bluecher et al. 2024): a fill that a map's zeros already show, such as the
black of a digit's background, flatters maps that are zero there and punishes the others. State the fill with every
figure, and try two.

A fill is a number or array (one per channel), a name, one of the classes below, or a function of a key and one example
that returns its replacement. It sees the example with its positions first and its channels last, one channel where
there are none, and draws once for each example: a position that was flipped keeps its value.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import InputError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fill(ABC):
    """The base of the fills: `replacement(key, x)` for one example x of shape (*positions, channels), like x."""

    @abstractmethod
    def replacement(self, key: jax.Array, x: jax.Array) -> jax.Array: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Constant(Fill):
    """One value, or one for each channel: black, a data set's mean, the id of a mask token."""

    value: Any = 0.0

    def replacement(self, key: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(self.value, x.dtype), x.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean(Fill):
    """The mean of the example, channel by channel."""

    def replacement(self, key: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x.mean(tuple(range(x.ndim - 1))), x.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Uniform(Fill):
    """Independent draws from [low, high), numbers or one per channel (Samek et al. 2017)."""

    low: Any = -1.0
    high: Any = 1.0

    def replacement(self, key: jax.Array, x: jax.Array) -> jax.Array:
        low, high = (jnp.asarray(v, x.dtype) for v in (self.low, self.high))
        return low + (high - low) * jax.random.uniform(key, x.shape, x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gaussian(Fill):
    """Independent draws from the normal distribution, numbers or one per channel."""

    mean: Any = 0.0
    deviation: Any = 1.0

    def replacement(self, key: jax.Array, x: jax.Array) -> jax.Array:
        noise = jax.random.normal(key, x.shape, x.dtype)
        return jnp.asarray(self.mean, x.dtype) + jnp.asarray(self.deviation, x.dtype) * noise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Invert(Fill):
    """low + high - x: black for white in inputs between low and high (Bach et al. 2015, pixel flipping)."""

    low: Any = -1.0
    high: Any = 1.0

    def replacement(self, key: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.asarray(self.low, x.dtype) + jnp.asarray(self.high, x.dtype) - x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blur(Fill):
    """The example, blurred along its positions by a Gaussian of so many positions, renormalised at the borders."""

    deviation: Any = 8.0

    def replacement(self, key: jax.Array, x: jax.Array) -> jax.Array:
        for axis, size in enumerate(x.shape[:-1]):
            at = jnp.arange(size, dtype=jnp.promote_types(x.dtype, jnp.float32))  # 8 bits count to 256
            weights = jax.nn.softmax(-((at[:, None] - at) ** 2) / (2 * jnp.asarray(self.deviation, at.dtype) ** 2))
            x = jnp.moveaxis(jnp.tensordot(weights.astype(x.dtype), x, (1, axis)), 0, axis)
        return x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inpaint(Fill):
    """From the neighbours that are not flipped, outside in: each ring of flipped positions takes the mean of its known
    neighbours, direct ones with twice the weight of diagonal ones (the weights of ROAD, Rong et al. 2022); then that
    ring is known. Where nothing is known, the example's mean.
    """

    def replacement(self, key: jax.Array, x: jax.Array) -> jax.Array:
        return self.inpainted(x, jnp.ones((*x.shape[:-1], 1), bool))

    def inpainted(self, x: jax.Array, flipped: jax.Array) -> jax.Array:
        """x with the positions where `flipped` (*positions, 1) is true filled in."""
        known = (~flipped).astype(x.dtype)

        def around(v: jax.Array) -> jax.Array:
            for axis in range(v.ndim - 1):
                wide = jnp.pad(v, [(int(a == axis),) * 2 for a in range(v.ndim)])
                before, after = (jax.lax.slice_in_dim(wide, s, s + v.shape[axis], axis=axis) for s in (0, 2))
                v = before + 2 * v + after
            return v

        def ring(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            image, known = state
            weight = around(known)
            mean = around(image * known) / jnp.maximum(weight, 1)
            return jnp.where(known > 0, image, mean), (weight > 0).astype(x.dtype)

        start = jnp.where(flipped & (known.sum() == 0), x.mean(tuple(range(x.ndim - 1))), x)
        return jax.lax.while_loop(lambda s: (s[1].sum() > 0) & (s[1].min() == 0), ring, (start, known))[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Custom(Fill):
    """A user's function of a key and an example."""

    function: Any

    def replacement(self, key: jax.Array, x: jax.Array) -> jax.Array:
        made = jnp.asarray(self.function(key, x))
        if made.shape != x.shape:
            raise InputError(f"fill={self.function!r} made shape {made.shape} of an example of shape {x.shape}")
        return made.astype(x.dtype)


NAMES: dict[str, Callable[[], Fill]] = {
    "mean": Mean,
    "uniform": Uniform,
    "gaussian": Gaussian,
    "invert": Invert,
    "blur": Blur,
    "inpaint": Inpaint,
}


def as_fill(fill: Any) -> Fill:
    """The fill that a user's value stands for; InputError where it is none."""
    if isinstance(fill, Fill):
        return fill
    if isinstance(fill, str):
        if fill not in NAMES:
            raise InputError(f"fill={fill!r}; write one of {', '.join(map(repr, NAMES))}, a number, or a function")
        return NAMES[fill]()
    if callable(fill) and not isinstance(fill, type):
        return Custom(jax.tree_util.Partial(fill))
    try:
        return Constant(jnp.asarray(fill if fill is not None else object()))
    except TypeError as error:
        raise InputError(
            f"fill={fill!r}; write a number, one of {', '.join(map(repr, NAMES))}, or a function"
        ) from error
