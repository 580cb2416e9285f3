"""Rules for a first layer, by the domain of its input: unbounded, a box, or nothing known at all.

Bias and padding play no part. With preprocessing that joined the layer, weights and bounds are those of the raw input.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ..errors import InputError
from ..program import Op
from .base import KERNEL, Rule, broadcasts, check_number, concrete, rule
from .layer import ONES, Elementwise, Layer
from .linear import MINUS, PLUS, share, total


@rule
class WSquare(Rule):
    """LRP-w^2: R_j = sum_k w_jk^2 / (sum_i w_ik^2) R_k, for unbounded inputs; input and bias play no part.

    Source: Montavon et al. 2017, eq. 12.
    """

    kinds: ClassVar[frozenset[str]] = KERNEL

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        # the weight seen from the raw input includes the preprocessing's factor
        factor = layer.enter(jnp.ones_like(layer.inputs[0]))
        terms = [(factor**2, Elementwise(jnp.square))]
        return (layer.leave(share(layer, relevance, terms, total(layer, terms))),)


@rule
class Flat(Rule):
    """LRP-flat: every connected input gets the same share 1/n; padding gets none; input, weights, bias play no part.

    Source: Lapuschkin et al. 2017.
    """

    kinds: ClassVar[frozenset[str]] = KERNEL

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        terms = [(layer.ones, ONES)]
        return (layer.leave(share(layer, relevance, terms, total(layer, terms))),)


@rule
class ZBox(Rule):
    """LRP-z^B, for inputs in a box: R_j = sum_k (a_j w_jk - l_j w+_jk - h_j w-_jk) / sum_i (same) R_k.

    low <= 0 <= high usually, floats or arrays that broadcast to the input, in the units of the explained input
    (preprocessing that joined the layer is accounted for). Source: Montavon et al. 2017, eq. 16. Raises InputError
    where low > high, at assignment where a bound does not broadcast to the input.
    """

    low: Any
    high: Any
    kinds: ClassVar[frozenset[str]] = KERNEL

    def __post_init__(self) -> None:
        low, high = concrete(self.low), concrete(self.high)
        check_number(self, "low")
        check_number(self, "high")
        if low is None or high is None:
            return
        if not (broadcasts(low.shape, high.shape) or broadcasts(high.shape, low.shape)):
            raise InputError(
                f"ZBox(low of shape {low.shape}, high of shape {high.shape}): they do not broadcast together"
            )
        if (low > high).any():
            raise InputError(f"ZBox(low={self.low!r}, high={self.high!r}): low must not exceed high")

    def check(self, op: Op) -> None:
        shape = op.in_shapes[0]
        for name in ("low", "high"):
            bound = jnp.shape(getattr(self, name))
            if not broadcasts(bound, shape):
                raise InputError(
                    f"ZBox: {name} of shape {bound} does not broadcast to the input {shape} of {op.name} ({op.source})"
                )

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        x = layer.inputs[0]
        bounds = [layer.enter(jnp.broadcast_to(jnp.asarray(b, x.dtype), x.shape)) for b in (self.low, self.high)]
        # a negative preprocessing factor turns the box over
        low, high = jnp.minimum(*bounds), jnp.maximum(*bounds)
        # a w - l w+ - h w- of two passes; in the box neither has terms that cancel
        terms = [(layer.active - low, PLUS), (layer.active - high, MINUS)]
        return (layer.leave(share(layer, relevance, terms, total(layer, terms))),)


__all__ = ["Flat", "WSquare", "ZBox"]
