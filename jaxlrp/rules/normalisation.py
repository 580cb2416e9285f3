"""Normalisation by statistics of the data: LayerNorm, RMSNorm, GroupNorm, InstanceNorm, BatchNorm in training mode.

    y = g (x - mean) / sigma + b

`Pass`, the identity, is what composites give it unless told otherwise.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as p

from ..norms import ROOTS
from ..program import Equation, Op
from .arithmetic import divide, halved, stabilise
from .base import NORMS, Rule, check_choice, check_number, rule
from .layer import Layer


@rule
class ConstantStatistics(Rule):
    """The layer with sigma held constant, which makes it linear, explained by LRP-epsilon:

        R_j = x_j sum_k J_jk R_k / (y_k + epsilon sign(y_k)),    J = dy/dx at constant sigma

    epsilon: float >= 0; 0 drops the messages of units with y_k = 0. mean: "propagated" through the centring, or "held"
    constant as well, which gives the mean its share. A bias keeps its share b / y. On a LayerNorm with epsilon 0 and a
    propagated mean, R_j = x_j (s_j - mean(s)) with s = R g / (sigma y): the layer norm rule of Ali et al. 2022, eq. 12
    and of RelevancePropagation.jl. Raises InputError for a negative epsilon, or another choice.
    """

    epsilon: Any = 1e-6
    mean: str = "propagated"
    kinds: ClassVar[frozenset[str]] = NORMS | {"batch_norm"}
    uses: ClassVar[frozenset[str]] = frozenset(("inputs", "params"))

    def __post_init__(self) -> None:
        check_number(self, "epsilon", minimum=0)
        check_choice(self, "mean", "propagated", "held")

    def needs(self, op: Op) -> frozenset[str]:
        return self.uses | {"output"} if halved(op.inputs[0].aval.dtype) else self.uses

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        (x,) = layer.inputs
        held = ROOTS | ({p.reduce_sum_p} if self.mean == "held" else frozenset())

        def constant(e: Equation, operands: list[Any]) -> list[Any]:
            return list(map(jax.lax.stop_gradient, operands)) if e.primitive in held else operands

        linear = partial(layer.apply_with, constant)
        y, pull = jax.vjp(linear, x)
        if halved(layer.op.inputs[0].aval.dtype):  # a zero of x is none here: y is what the next layer multiplied by
            y = layer.output
        divisor = stabilise(y, self.epsilon)
        s = divide(relevance, divisor)
        (pulled,) = pull(s)
        layer.book("bias", lambda: s * (y - jax.jvp(linear, (x,), (x,))[1]))
        layer.book("stabiliser", lambda: s * (divisor - y))
        layer.book("dropped", lambda: jnp.where(divisor == 0, relevance, 0))
        return (x * pulled,)


__all__ = ["ConstantStatistics"]
