"""Rules for products of data values, and the equal share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as p

from ..program import Atom, Op, leaves
from .arithmetic import divide, stabilise
from .base import Layer, Rule, check_number, rule


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

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        ones = [jnp.ones_like(x) for x in layer.inputs]
        if layer.op.kind in ("avg_pool", "reduce"):
            _, counts = jax.jvp(layer.apply, layer.inputs, tuple(ones))
            _, pull = jax.vjp(layer.apply, *layer.inputs)
        else:
            counts, pull = jax.vjp(lambda *xs: _added(layer, xs), *ones)
        layer.book("dropped", lambda: jnp.where(counts == 0, relevance, 0))
        return pull(divide(relevance, counts))


def _added(layer: Layer, values: Sequence[jax.Array]) -> jax.Array:
    """These values, in the places of the layer's inputs, added where the layer multiplies its operands."""
    e = leaves(layer.op.steps)[-1]
    if e.primitive is p.reduce_prod_p:
        return values[0].sum(tuple(e.params["axes"]))
    if e.primitive is p.cumprod_p:
        return jax.lax.cumsum(values[0], e.params["axis"], e.params["reverse"])
    if e.primitive is p.scatter_mul_p:
        given: dict[Atom, jax.Array] = dict(zip(layer.op.inputs, values, strict=True))
        operand, updates = (given.get(a, jnp.zeros(a.aval.shape, layer.dtype)) for a in (e.inputs[0], e.inputs[2]))
        how = {k: v for k, v in e.params.items() if k not in ("update_jaxpr", "update_consts")}
        return jax.lax.scatter_add(operand, layer._read(e.inputs[1]), updates, **how)
    shape = layer.op.out_shape
    total = jnp.zeros(shape, layer.dtype)
    return sum((n * jnp.broadcast_to(x, shape) for n, x in zip(layer.occurrences, values, strict=True)), total)


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
        z = layer.degree * layer.output
        divisor = stabilise(z, self.epsilon)
        s = divide(relevance, divisor)
        layer.book("stabiliser", lambda: s * (divisor - z))
        layer.book("dropped", lambda: jnp.where(divisor == 0, relevance, 0))
        return tuple(x * g for x, g in zip(layer.inputs, pull(s), strict=True))


__all__ = ["Uniform", "UniformEpsilon"]
