"""Rules for products of data values, and the equal share."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ..program import leaves
from .base import Layer, Rule, check_number, divide, rule, stabilise


@rule
class Uniform(Rule):
    """Equal shares: every operand of a product or sum gets R / n, every element of an average pool's window too.

    An operand that is broadcast gets the sum over its copies. Source: Achtibat et al. 2024, Prop. 3.2; for pools the
    rule "flat" of Lapuschkin et al. 2017.
    """

    kinds: ClassVar[frozenset[str]] = frozenset(("product", "add", "avg_pool", "reduce"))
    uses: ClassVar[frozenset[str]] = frozenset(("inputs", "params"))

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        if layer.op.kind in ("avg_pool", "reduce"):
            weights, pull = jax.vjp(layer.apply, jnp.ones_like(layer.inputs[0]))
            return pull(divide(relevance, weights))
        counts = layer.occurrences
        _, pull = jax.vjp(lambda *xs: sum(jnp.broadcast_to(x, relevance.shape) for x in xs), *layer.inputs)
        return tuple(n * r for n, r in zip(counts, pull(relevance / sum(counts)), strict=True))


@rule
class UniformEpsilon(Rule):
    """A matrix product O = A V of two data values: R_A = A * (S V^T), R_V = V * (A^T S), S = R / stab(2 O).

    Where only one operand carries data it gets all: S = R / stab(O). epsilon: float >= 0. Source: Achtibat et al.
    2024, Prop. 3.3. Raises InputError for a negative epsilon.
    """

    epsilon: Any = 1e-9
    kinds: ClassVar[frozenset[str]] = frozenset(("matmul",))

    def __post_init__(self) -> None:
        check_number(self, "epsilon", minimum=0)

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        _, pull = jax.vjp(layer.apply, *layer.inputs)
        operands = sum(a in layer.op.inputs for a in leaves(layer.op.steps)[-1].inputs)
        z = operands * layer.output
        divisor = stabilise(z, self.epsilon)
        s = divide(relevance, divisor)
        layer.book("stabiliser", lambda: s * (divisor - z))
        layer.book("dropped", lambda: jnp.where(divisor == 0, relevance, 0))
        return tuple(x * g for x, g in zip(layer.inputs, pull(s), strict=True))


__all__ = ["Uniform", "UniformEpsilon"]
