"""Rules for products of two data values and for matrix products of two data values."""

from __future__ import annotations

from typing import Any, ClassVar

import jax

from .base import Layer, Rule, check_number, divide, rule, stabilise


@rule
class Uniform(Rule):
    """Every data operand gets the same share: R / n each (a product of two: half each).

    For operands of the output's shape; one that is broadcast gets the sum over its copies. Source: Achtibat et al.
    2024, Prop. 3.2.
    """

    kinds: ClassVar[frozenset[str]] = frozenset(("product", "add"))
    uses: ClassVar[frozenset[str]] = frozenset()

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        shares = []
        for shape in layer.op.in_shapes:
            axes = [i for i, (n, m) in enumerate(zip(shape, relevance.shape, strict=True)) if n != m]
            shares.append(relevance.sum(axes, keepdims=True) / len(layer.op.in_shapes))
        return tuple(shares)


@rule
class UniformEpsilon(Rule):
    """A matrix product O = A V of two data values: R_A = A * (S V^T), R_V = V * (A^T S), S = R / stab(2 O).

    epsilon: float >= 0. Source: Achtibat et al. 2024, Prop. 3.3. Raises InputError for a negative epsilon.
    """

    epsilon: Any = 1e-9
    kinds: ClassVar[frozenset[str]] = frozenset(("matmul",))

    def __post_init__(self) -> None:
        check_number(self, "epsilon", minimum=0)

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        _, pull = jax.vjp(layer.apply, *layer.inputs)
        s = divide(relevance, stabilise(2 * layer.output, self.epsilon))
        return tuple(x * g for x, g in zip(layer.inputs, pull(s), strict=True))


__all__ = ["Uniform", "UniformEpsilon"]
