"""Rules for products of data values, and the equal share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ..program import Atom, Op, Value, leaves
from .base import Layer, Rule, check_number, divide, rule, stabilise


def operands(op: Op) -> list[Value]:
    """What a product multiplies that carries relevance, in order; a value times itself stands twice."""
    return [a for a in leaves(op.steps)[-1].inputs if a in op.inputs and isinstance(a, Value)]


def equal_shares(layer: Layer, relevance: jax.Array, takers: Sequence[Atom]) -> tuple[jax.Array, ...]:
    """R / n to each of n takers, the others nothing; one that is broadcast gets the sum over its copies."""
    counts = [sum(t is v for t in takers) for v in layer.op.inputs]
    each = relevance / len(takers)
    copies = [
        jax.linear_transpose(lambda x: jnp.broadcast_to(x, each.shape), jax.lax.full_like(each, 0, shape=s))(each)
        for s in layer.op.in_shapes
    ]
    return tuple(n * r for n, (r,) in zip(counts, copies, strict=True))


def shares_by_value(layer: Layer, relevance: jax.Array, takers: Sequence[Atom], epsilon: Any) -> tuple[jax.Array, ...]:
    """R / n to each of n takers, split among its elements by what they contribute; S = R / stab(n O)."""
    _, pull = jax.vjp(layer.apply, *layer.inputs)
    z = len(takers) * layer.output
    divisor = stabilise(z, epsilon)
    s = divide(relevance, divisor)
    layer.book("stabiliser", lambda: s * (divisor - z))
    layer.book("dropped", lambda: jnp.where(divisor == 0, relevance, 0))
    given = zip(layer.op.inputs, layer.inputs, pull(s), strict=True)
    return tuple(x * g if v in takers else jnp.zeros_like(x) for v, x, g in given)


@rule
class Uniform(Rule):
    """Equal shares: every operand of a product or sum gets R / n, every element of an average pool's window too.

    An operand that is broadcast gets the sum over its copies. Source: Achtibat et al. 2024, Prop. 3.2; for pools the
    rule "flat" of Lapuschkin et al. 2017.
    """

    kinds: ClassVar[frozenset[str]] = frozenset(("product", "add", "avg_pool", "reduce"))
    uses: ClassVar[frozenset[str]] = frozenset(("inputs", "params"))

    def needs(self, op: Op) -> frozenset[str]:
        return self.uses if op.kind in ("avg_pool", "reduce") else frozenset()

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        if layer.op.kind in ("avg_pool", "reduce"):
            weights, pull = jax.vjp(layer.apply, jnp.ones_like(layer.inputs[0]))
            return pull(divide(relevance, weights))
        repeated = [v for v, n in zip(layer.op.inputs, layer.occurrences, strict=True) for _ in range(n)]
        return equal_shares(layer, relevance, repeated)


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
        return shares_by_value(layer, relevance, operands(layer.op), self.epsilon)


__all__ = ["Uniform", "UniformEpsilon"]
