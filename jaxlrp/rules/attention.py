"""The rule for attention, O = A V with A = softmax(Q K^T / sqrt(d) + masks)."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as p

from ..program import Equation
from ..single import multiplies
from .arithmetic import divide, stabilise
from .base import Rule, check_choice, check_number, rule
from .layer import Layer


@rule
class Attention(Rule):
    """R_v = v * dO/dv S / 2, R_q = q * dO/dq S / 4, R_k = k * dO/dk S / 4, with S = R / stab(O).

    That is the rules for softmax (at the raw logits), and for products of two data values, half to each, in one step:
    nothing is divided by a score or a weight, so scores of zero lose nothing and masked ones (-inf) give zero.

    weights: "propagated" as above (AttnLRP: Achtibat et al. 2024, Prop. 3.1 and 3.3), or "constant" (CP-LRP: Ali et al.
    2022, eq. 11): A is held constant, R_v = v * dO/dv S, and nothing goes to queries and keys. epsilon: float >= 0, of
    stab. The softmax does not conserve; with constant weights the layer does. Raises InputError for a negative epsilon
    or another choice.
    """

    weights: str = "propagated"
    epsilon: Any = 1e-9
    kinds: ClassVar[frozenset[str]] = frozenset(("attention",))
    conserves: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice(self, "weights", "propagated", "constant")
        check_number(self, "epsilon", minimum=0)

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        def share(e: Equation, operands: list[Any]) -> list[Any]:
            if self.weights == "constant":
                return list(map(jax.lax.stop_gradient, operands)) if e.primitive is p.exp_p else operands
            return list(map(_half, operands)) if e.primitive is p.dot_general_p and not multiplies(e) else operands

        _, pull = jax.vjp(lambda *xs: layer.apply_with(share, *xs), *layer.inputs)
        divisor = stabilise(layer.output, self.epsilon)
        s = divide(relevance, divisor)
        layer.book("stabiliser", lambda: s * (divisor - layer.output))
        layer.book("dropped", lambda: jnp.where(divisor == 0, relevance, 0))
        return tuple(x * g for x, g in zip(layer.inputs, pull(s), strict=True))


@jax.custom_jvp
def _half(x: jax.Array) -> jax.Array:
    """x, of which half the derivative passes; as x itself, so that XLA finds the forward pass again."""
    return x


@_half.defjvp
def _half_derivative(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return primals[0], tangents[0] / 2


__all__ = ["Attention"]
