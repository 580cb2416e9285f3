"""PatternNet and PatternAttribution: a backward pass through learned patterns instead of weights.

A unit y = w^T x + b reads a signal s = a y from its input x = s + d and filters the distractor d out, so w^T a = 1 and
w^T d = 0. The weight tells how the distractor is cancelled, the pattern a where the signal lies. `jaxlrp.patterns.fit`
learns a from data. Source: Kindermans et al. 2018, "Learning how to explain neural networks".
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import InputError
from ..program import Op
from .arithmetic import divide
from .base import KERNEL, Rule, concrete, rule
from .layer import Layer


@rule
class PatternNet(Rule):
    """The signal that reaches a unit, in its inputs: R_j = sum_k a_jk R_k.

    pattern: array a of the kernel's shape, of the effective kernel (a BatchNorm that joined the layer is folded in).
    Where preprocessing joined the layer, R is the signal in the raw input's units: divided by the preprocessing's
    factor. Conserves nothing. Source: Kindermans et al. 2018, section 4. Raises InputError for a number that is not
    finite, at assignment where the shape is not the kernel's.
    """

    pattern: Any
    kinds: ClassVar[frozenset[str]] = KERNEL
    conserves: ClassVar[bool] = False
    uses: ClassVar[frozenset[str]] = frozenset(("inputs", "params"))

    def __post_init__(self) -> None:
        pattern = concrete(self.pattern)
        if pattern is not None and not np.isfinite(pattern).all():
            raise InputError(f"{type(self).__name__}: the pattern of shape {pattern.shape} holds NaN or infinity")

    def check(self, op: Op) -> None:
        assert op.linear is not None  # as every dense and conv Op has
        shape, wanted = jnp.shape(self.pattern), op.linear.core.inputs[1 - op.linear.slot].aval.shape
        if shape != wanted:
            raise InputError(
                f"{type(self).__name__}: the pattern of shape {shape} is not of the kernel's shape {wanted} of "
                f"{op.name} ({op.source})"
            )

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        signal = layer.backward(relevance, jnp.asarray(self.pattern, layer.dtype))
        factor = layer.enter(jnp.ones_like(layer.inputs[0]))
        return (layer.leave(divide(signal, factor)),)


@rule
class PatternAttribution(PatternNet):
    """How much the signal of each input contributed to a unit: R_j = sum_k w_jk a_jk R_k.

    pattern: as `PatternNet`. Keeps the relevance of a unit with w^T a = 1, as fitted patterns have, away from padding.
    Source: Kindermans et al. 2018, section 4: the root point of a deep Taylor decomposition lies along the
    distractor. Raises InputError as `PatternNet` does.
    """

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        product = layer.kernel * jnp.asarray(self.pattern, layer.dtype)
        return (layer.leave(layer.backward(relevance, product)),)


__all__ = ["PatternAttribution", "PatternNet"]
