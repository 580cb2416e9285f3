"""Rules for layers that act element by element, and for softmax."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from ..program import Op
from .base import Layer, Rule, rule


@rule
class Pass(Rule):
    """Relevance passes unchanged: R_in = R_out; through a reshape or a slice it follows the values.

    For any layer with one data input and an output of the same shape. Source: Bach et al. 2015, section "Pixel-wise
    decomposition for multilayer networks": monotonous activations keep the relevance of their input.
    """

    uses: ClassVar[frozenset[str]] = frozenset()

    def supports(self, op: Op) -> bool:
        return op.kind in ("structural", "blocked") or op.in_shapes == (op.out_shape,)

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        return (relevance,)


@rule
class SoftmaxTaylor(Rule):
    """Softmax, or log-softmax, linearised at its input: R_i = x_i (R_i - s_i sum_j R_j), at the raw logits x.

    s is the softmax. Logits of -inf (masks) get 0. Not conserving. Source: Achtibat et al. 2024, Prop. 3.1.
    """

    kinds: ClassVar[frozenset[str]] = frozenset(("softmax",))

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        (x,) = layer.inputs
        # with s = R / y the chain rule through the layer itself gives x_i (R_i - s_i sum_j R_j)
        masked = jnp.isneginf(x)
        y = layer.output
        if layer.op.label == "log_softmax":
            y, start = jax.nn.softmax(x, axis=_axis(layer.op)), relevance
            pulled = start - y * start.sum(_axis(layer.op), keepdims=True)
        else:
            pulled = relevance - y * relevance.sum(_axis(layer.op), keepdims=True)
        return (jnp.where(masked, 0, jnp.where(masked, 0, x) * pulled),)


def _axis(op: Op) -> tuple[int, ...]:
    from jax.extend.core import primitives as p

    axes = [e.params["axes"] for e in _leaves(op) if e.primitive is p.reduce_sum_p]
    return tuple(axes[0])


def _leaves(op: Op) -> list:
    from ..program import leaves

    return leaves(op.steps)


__all__ = ["Pass", "SoftmaxTaylor"]
