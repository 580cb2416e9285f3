"""Rules for products of data values, and the equal share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as p

from ..program import Atom, Op, Value, leaves
from .arithmetic import divide, stabilise
from .base import Rule, check_number, rule
from .layer import Layer


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

    Factors of a product over an axis, a cumulative one or `x.at[i].multiply` are its operands. An operand that is
    broadcast gets the sum over its copies. A place that no factor of the data reaches is dropped. Source: Achtibat et
    al. 2024, Prop. 3.2; for pools the rule "flat" of Lapuschkin et al. 2017.
    """

    kinds: ClassVar[frozenset[str]] = frozenset(("product", "add", "avg_pool", "reduce"))
    uses: ClassVar[frozenset[str]] = frozenset(("inputs", "params"))

    def supports(self, op: Op) -> bool:
        return op.kind in self.kinds and (op.kind != "reduce" or len(op.inputs) == 1)

    def needs(self, op: Op) -> frozenset[str]:
        return frozenset() if by_operands(op) else self.uses

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        if by_operands(layer.op):
            repeated = [v for v, n in zip(layer.op.inputs, layer.occurrences, strict=True) for _ in range(n)]
            return equal_shares(layer, relevance, repeated)
        ones = [jnp.ones_like(x) for x in layer.inputs]
        if layer.op.kind in ("avg_pool", "reduce"):
            _, counts = jax.jvp(layer.apply, layer.inputs, tuple(ones))
            _, pull = jax.vjp(layer.apply, *layer.inputs)
        else:
            counts, pull = jax.vjp(lambda *xs: _added(layer, xs), *ones)
        layer.book("dropped", lambda: jnp.where(counts == 0, relevance, 0))
        return pull(divide(relevance, counts))


def by_operands(op: Op) -> bool:
    """Whether whole operands are multiplied, or added, element by element."""
    return op.kind == "add" or (op.kind == "product" and leaves(op.steps)[-1].primitive in (p.mul_p, p.div_p))


def _added(layer: Layer, values: Sequence[jax.Array]) -> jax.Array:
    """These values, in the places of the layer's inputs, added where the layer multiplies its operands."""
    e = leaves(layer.op.steps)[-1]
    if e.primitive is p.reduce_prod_p:
        return values[0].sum(tuple(e.params["axes"]))
    if e.primitive is p.cumprod_p:
        return jax.lax.cumsum(values[0], e.params["axis"], e.params["reverse"])
    given: dict[Atom, jax.Array] = dict(zip(layer.op.inputs, values, strict=True))
    operand, updates = (given.get(a, jnp.zeros(a.aval.shape, layer.dtype)) for a in (e.inputs[0], e.inputs[2]))
    how = {k: v for k, v in e.params.items() if k not in ("update_jaxpr", "update_consts")}
    return jax.lax.scatter_add(operand, layer._read(e.inputs[1]), updates, **how)


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
