"""Rules for layers linear in their data: c_jk = a_j w_jk is what input j contributes to z_k = sum_j c_jk + b_k.

Signs are those of the contributions, not of the weights, so inputs of either sign are handled; where the input is known
not to be negative the cheaper form is taken. c+ = max(c, 0), c- = min(c, 0), likewise b+ and b-. Only Epsilon adds a
stabiliser; elsewhere a zero denominator gives zero messages.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import InputError
from ..program import Op
from .base import KERNEL, LINEAR, Layer, Rule, check_number, concrete, divide, rule, stabilise

Terms = list[tuple[jax.Array, jax.Array]]  # (input, kernel) pairs: their sum of products is one set of contributions


def positive(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0)


def negative(x: jax.Array) -> jax.Array:
    return jnp.minimum(x, 0)


def excitatory(layer: Layer) -> Terms:
    """The contributions c+ of a dense or conv layer."""
    a, w = layer.active, layer.kernel
    if layer.nonneg:
        return [(a, positive(w))]
    return [(positive(a), positive(w)), (negative(a), negative(w))]


def inhibitory(layer: Layer) -> Terms:
    """The contributions c- of a dense or conv layer."""
    a, w = layer.active, layer.kernel
    if layer.nonneg:
        return [(a, negative(w))]
    return [(positive(a), negative(w)), (negative(a), positive(w))]


def total(layer: Layer, terms: Terms) -> jax.Array:
    """sum_j c_jk over the terms."""
    return sum((layer.forward(a, w) for a, w in terms[1:]), layer.forward(*terms[0]))


def messages(layer: Layer, terms: Terms, s: jax.Array) -> jax.Array:
    """sum_k c_jk s_k over the terms, at the core's entrance."""
    (a, w), *rest = terms
    return sum((a * layer.backward(s, w) for a, w in rest), a * layer.backward(s, w))


def proportional(layer: Layer, s: jax.Array) -> tuple[jax.Array, ...]:
    """x_j sum_k dz_k/dx_j s_k for each input: the shares of all contributions, s being R / z."""
    if layer.op.linear is not None:
        return (layer.leave(layer.active * layer.backward(s, layer.kernel)),)
    _, pull = jax.vjp(layer.apply, *layer.inputs)
    return tuple(x * g for x, g in zip(layer.inputs, pull(s), strict=True))


@rule
class Zero(Rule):
    """LRP-0: R_j = sum_k c_jk / z_k R_k; messages of units with z_k = 0 are dropped.

    Source: Bach et al. 2015, eq. 56. Passes: one transposed pass. Equals gradient x input on piecewise linear networks.
    """

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        return proportional(layer, divide(relevance, layer.output))


@rule
class Epsilon(Rule):
    """LRP-epsilon: R_j = sum_k c_jk / (z_k + epsilon sign(z_k)) R_k, with sign(0) = +1.

    epsilon: float >= 0, absolute. The stabiliser absorbs epsilon / (|z| + epsilon) of each unit's relevance, the bias
    its share b / z. Source: Bach et al. 2015, eq. 58. Raises InputError for a negative or NaN epsilon.
    """

    epsilon: Any = 1e-6

    def __post_init__(self) -> None:
        check_number(self, "epsilon", minimum=0)

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        return proportional(layer, divide(relevance, stabilise(layer.output, self.epsilon)))


@rule
class ZPlus(Rule):
    """LRP-z+ (alpha 1, beta 0): R_j = sum_k c+_jk / (sum_i c+_ik + b+_k) R_k.

    Source: Montavon et al. 2017, eq. 14, for inputs of either sign.
    """

    kinds: ClassVar[frozenset[str]] = KERNEL

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        terms = excitatory(layer)
        s = divide(relevance, total(layer, terms) + positive(layer.bias))
        return (layer.leave(messages(layer, terms, s)),)


@rule
class AlphaBeta(Rule):
    """R_j = sum_k (alpha c+_jk / (sum_i c+_ik + b+_k) - beta c-_jk / (sum_i c-_ik + b-_k)) R_k.

    alpha, beta: floats, beta >= 0 and alpha - beta = 1. A unit without inhibitory (excitatory) contributions gives
    alpha R (-beta R) instead of R. Source: Bach et al. 2015, eq. 60. Raises InputError for numbers that do not fit.
    """

    alpha: Any = 2.0
    beta: Any = 1.0
    kinds: ClassVar[frozenset[str]] = KERNEL

    def __post_init__(self) -> None:
        check_number(self, "alpha")
        check_number(self, "beta", minimum=0)
        alpha, beta = concrete(self.alpha), concrete(self.beta)
        if alpha is not None and beta is not None and not np.allclose(alpha - beta, 1, rtol=0, atol=1e-5):
            raise InputError(
                f"AlphaBeta(alpha={self.alpha!r}, beta={self.beta!r}): alpha - beta must be 1; "
                f"write AlphaBeta.from_beta({self.beta!r})"
            )

    @classmethod
    def from_beta(cls, beta: Any) -> AlphaBeta:
        """The talk's parametrisation, (1 + beta, beta)."""
        return cls(1 + beta, beta)

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        plus, minus = excitatory(layer), inhibitory(layer)
        z_plus = total(layer, plus) + positive(layer.bias)
        z_minus = total(layer, minus) + negative(layer.bias)
        r = messages(layer, plus, self.alpha * divide(relevance, z_plus))
        r -= messages(layer, minus, self.beta * divide(relevance, z_minus))
        return (layer.leave(r),)


@rule
class Gamma(Rule):
    """LRP-gamma: R_j = sum_k (c_jk + gamma c+_jk) / (z_k + gamma (sum_i c+_ik + b+_k)) R_k.

    gamma: float >= 0. Source: Montavon et al. 2019, section 10.2.3, for inputs of either sign. Raises InputError for a
    negative gamma.
    """

    gamma: Any = 0.25
    kinds: ClassVar[frozenset[str]] = KERNEL

    def __post_init__(self) -> None:
        check_number(self, "gamma", minimum=0)

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        z = layer.output + self.gamma * (total(layer, excitatory(layer)) + positive(layer.bias))
        terms = _weighted(layer, self.gamma, excitatory(layer))
        return (layer.leave(messages(layer, terms, divide(relevance, z))),)


@rule
class GeneralizedGamma(Rule):
    """LRP-gamma for units of either sign, as zennit's Gamma:

        z_k > 0:  (c_jk + gamma c+_jk) / (z_k + gamma (sum_i c+_ik + b+_k)) R_k
        z_k < 0:  (c_jk + gamma c-_jk) / (z_k + gamma (sum_i c-_ik + b-_k)) R_k
        z_k = 0:  nothing

    gamma: float >= 0. Source: Andeol et al. 2021, eq. 8. Raises InputError for a negative gamma.
    """

    gamma: Any = 0.25
    kinds: ClassVar[frozenset[str]] = KERNEL

    def __post_init__(self) -> None:
        check_number(self, "gamma", minimum=0)

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        plus, minus, z = excitatory(layer), inhibitory(layer), layer.output
        z_plus = total(layer, plus) + positive(layer.bias)
        # z- needs no pass of its own: no denominator below is smaller than the z it comes from
        z_minus = z - z_plus
        upper = jnp.where(z > 0, divide(relevance, z + self.gamma * z_plus), 0)
        lower = jnp.where(z < 0, divide(relevance, z + self.gamma * z_minus), 0)
        r = messages(layer, _weighted(layer, self.gamma, plus), upper)
        r += messages(layer, _weighted(layer, self.gamma, minus), lower)
        return (layer.leave(r),)


def _weighted(layer: Layer, gamma: Any, terms: Terms) -> Terms:
    """c + gamma c', where the terms give c': as many passes as c' alone."""
    w = layer.kernel
    return [(a, w + gamma * part) for a, part in terms]


@rule
class WSquare(Rule):
    """LRP-w^2: R_j = sum_k w_jk^2 / (sum_i w_ik^2) R_k, for unbounded inputs; input and bias play no part.

    Source: Montavon et al. 2017, eq. 12.
    """

    kinds: ClassVar[frozenset[str]] = KERNEL

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        # the weight seen from the raw input includes the preprocessing's factor
        factor = layer.enter(jnp.ones_like(layer.inputs[0]))
        terms = [(factor**2, layer.kernel**2)]
        return (layer.leave(messages(layer, terms, divide(relevance, total(layer, terms)))),)


@rule
class Flat(Rule):
    """LRP-flat: every connected input gets the same share 1/n; padding gets none; input, weights, bias play no part.

    Source: Lapuschkin et al. 2017.
    """

    kinds: ClassVar[frozenset[str]] = KERNEL

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        terms = [(layer.ones, jnp.ones_like(layer.kernel))]
        return (layer.leave(messages(layer, terms, divide(relevance, total(layer, terms)))),)


@rule
class ZBox(Rule):
    """LRP-z^B, for inputs in a box: R_j = sum_k (a_j w_jk - l_j w+_jk - h_j w-_jk) / sum_i (same) R_k.

    low <= 0 <= high usually, floats or arrays that broadcast to the input, in the units of the explained input
    (preprocessing that joined the layer is accounted for). Source: Montavon et al. 2017, eq. 16. Raises InputError
    where low > high, at assignment where a bound does not broadcast to the input.
    """

    low: Any
    high: Any
    kinds: ClassVar[frozenset[str]] = KERNEL

    def __post_init__(self) -> None:
        low, high = concrete(self.low), concrete(self.high)
        check_number(self, "low")
        check_number(self, "high")
        if low is not None and high is not None and (low > high).any():
            raise InputError(f"ZBox(low={self.low!r}, high={self.high!r}): low must not exceed high")

    def check(self, op: Op) -> None:
        shape = op.in_shapes[0]
        for name in ("low", "high"):
            bound = jnp.shape(getattr(self, name))
            if not _broadcasts(bound, shape):
                raise InputError(
                    f"ZBox: {name} of shape {bound} does not broadcast to the input {shape} of {op.name} ({op.source})"
                )

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        x, w = layer.inputs[0], layer.kernel
        bounds = [layer.enter(jnp.broadcast_to(jnp.asarray(b, x.dtype), x.shape)) for b in (self.low, self.high)]
        # a negative preprocessing factor turns the box over
        low, high = _ordered(*bounds)
        terms = [(layer.active, w), (-low, positive(w)), (-high, negative(w))]
        return (layer.leave(messages(layer, terms, divide(relevance, total(layer, terms)))),)


def _ordered(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.minimum(a, b), jnp.maximum(a, b)


def _broadcasts(bound: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(bound) <= len(shape) and all(b in (1, n) for b, n in zip(bound[::-1], shape[::-1], strict=False))


__all__ = [
    "LINEAR", "AlphaBeta", "Epsilon", "Flat", "Gamma", "GeneralizedGamma", "WSquare", "ZBox", "ZPlus", "Zero",
]  # fmt: skip
