"""Rules for max-pooling; average pooling and sums take the linear rules."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as p

from ..program import leaves
from .base import Layer, Rule, rule


@rule
class Winner(Rule):
    """All relevance to the largest element of each window (or smallest, for a minimum), the first one on ties.

    For max-pooling, maxima over axes, and the maximum of two values (on ties half each). Source: Bach et al. 2015.
    """

    kinds: ClassVar[frozenset[str]] = frozenset(("max_pool",))
    uses: ClassVar[frozenset[str]] = frozenset(("inputs", "params"))

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        (e,) = leaves(layer.op.steps)
        if e.primitive in (p.reduce_max_p, p.reduce_min_p):
            return (_first(layer.inputs[0], e, relevance),)
        _, pull = jax.vjp(layer.apply, *layer.inputs)  # a window's derivative is its first winner
        return pull(relevance)


def _first(x: jax.Array, e, relevance: jax.Array) -> jax.Array:
    """The derivative of a maximum over axes splits ties; here the first takes all."""
    axes = tuple(e.params["axes"])
    kept = [i for i in range(x.ndim) if i not in axes]
    flat = x.transpose(*kept, *axes).reshape(*(x.shape[i] for i in kept), -1)
    pick = jnp.argmax(flat, -1) if e.primitive is p.reduce_max_p else jnp.argmin(flat, -1)
    routed = jax.nn.one_hot(pick, flat.shape[-1], dtype=relevance.dtype) * relevance[..., None]
    routed = routed.reshape(*(x.shape[i] for i in kept), *(x.shape[i] for i in axes))
    order = [*kept, *axes]
    return routed.transpose([order.index(i) for i in range(x.ndim)])


__all__ = ["Winner"]
