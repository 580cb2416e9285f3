"""Rules for layers linear in their data: c_jk = a_j w_jk is what input j contributes to z_k = sum_j c_jk + b_k.

Signs are those of the contributions, not of the weights, so inputs of either sign are handled; where the input is known
not to be negative the cheaper form is taken. c+ = max(c, 0), c- = min(c, 0), likewise b+ and b-. Only Epsilon adds a
stabiliser; elsewhere a zero denominator gives zero messages.

`bias`, a choice of most rules, says what becomes of the bias's share of a unit's relevance: "absorb" (the bias keeps
it), "distribute" (every connected input gets the same part of it), "ignore" (the bias is left out of the denominator).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import InputError
from ..program import Op
from .arithmetic import by_parts, divide, stabilise
from .base import KERNEL, LINEAR, Rule, check_choice, check_number, concrete, rule
from .layer import ONES, Elementwise, Kernel, Layer

Terms = Sequence[tuple[jax.Array, Kernel]]  # (input, kernel) pairs: their sum of products is one set of contributions
Parts = list[tuple[jax.Array, Elementwise]]


def positive(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0)


def negative(x: jax.Array) -> jax.Array:
    return jnp.minimum(x, 0)


PLUS, MINUS, SIZE = Elementwise(positive), Elementwise(negative), Elementwise(jnp.abs)


def excitatory(layer: Layer) -> Parts:
    """The contributions c+ of a dense or conv layer."""
    a = layer.active
    return [(a, PLUS)] if layer.nonneg else [(positive(a), PLUS), (negative(a), MINUS)]


def inhibitory(layer: Layer) -> Parts:
    """The contributions c- of a dense or conv layer."""
    a = layer.active
    return [(a, MINUS)] if layer.nonneg else [(positive(a), MINUS), (negative(a), PLUS)]


def favoured(gamma: Any, part: Elementwise) -> Elementwise:
    """The kernel w + gamma part(w)."""
    return Elementwise(lambda w: w + gamma * part.make(w), numbered=True)


def total(layer: Layer, terms: Terms) -> jax.Array:
    """sum_j c_jk over the terms."""
    return sum((layer.forward(a, w) for a, w in terms[1:]), layer.forward(*terms[0]))


def messages(layer: Layer, terms: Terms, s: jax.Array) -> jax.Array:
    """sum_k c_jk s_k over the terms, at the core's entrance."""
    (a, w), *rest = terms
    return sum((a * layer.backward(s, w) for a, w in rest), a * layer.backward(s, w))


def share(
    layer: Layer,
    relevance: jax.Array,
    terms: Terms,
    z: jax.Array,
    bias: jax.Array | None = None,
    policy: str = "absorb",
    epsilon: Any = None,
) -> jax.Array:
    """R_j = sum_k c_jk / z_k R_k at the core's entrance, and the books of what is not passed on.

    z: sum_j c_jk + bias, the denominator under the policies "absorb" and "distribute".
    """
    s, spread = ratio(layer, relevance, z, bias, policy, epsilon)
    return messages(layer, terms, s) + spread


def ratio(
    layer: Layer,
    relevance: jax.Array,
    z: jax.Array,
    bias: jax.Array | None = None,
    policy: str = "absorb",
    epsilon: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """s_k = R_k / z_k, and what the policy "distribute" gives the inputs of the bias's share."""
    if bias is not None and policy == "ignore":
        z, bias = z - bias, None
    divisor = z if epsilon is None else stabilise(z, epsilon)
    s, spread = divide(relevance, divisor), jnp.zeros((), layer.dtype)
    if bias is not None and policy == "distribute":
        ones = [(layer.ones, ONES)]
        count = total(layer, ones)
        spread = messages(layer, ones, divide(s * bias, count))
        layer.book("dropped", lambda: jnp.where(count == 0, s * bias, 0))  # of a unit that reads padding alone
    elif bias is not None:
        layer.book("bias", lambda: s * bias)
    if epsilon is not None:
        layer.book("stabiliser", lambda: s * (divisor - z))
    layer.book("dropped", lambda: jnp.where(divisor == 0, relevance, 0))
    return s, spread


def in_proportion(
    layer: Layer, relevance: jax.Array, policy: str = "absorb", epsilon: Any = None
) -> tuple[jax.Array, ...]:
    """R_j = sum_k c_jk / z_k R_k for any layer that is linear in its data: all contributions, of either sign.

    A complex number counts as two, its real and its imaginary part (Vielhaben et al. 2024, for the Fourier transform);
    z_k is twice the output where two complex data values are multiplied, as each is a factor of all contributions.
    """
    if layer.op.linear is not None and policy == "distribute":
        terms = [(layer.active, layer.kernel)]
        return (layer.leave(share(layer, relevance, terms, layer.output, layer.bias, policy, epsilon)),)
    z = layer.output - layer.offset if policy == "ignore" else layer.degree * layer.output
    divisor = z if epsilon is None else stabilise(z, epsilon)
    s = divide(relevance, divisor)
    received = [by_parts(jnp.multiply, x, g) for x, g in zip(layer.inputs, layer.pull(s), strict=True)]
    if policy == "distribute" and layer.op.kind in ("scale", "batch_norm"):
        received[0] += s * layer.offset
    elif policy != "ignore":
        layer.book(
            "ended" if layer.op.stopped and layer.op.linear is None else "bias",
            lambda: by_parts(jnp.multiply, s, layer.offset),
        )
    layer.book("stabiliser", lambda: by_parts(jnp.multiply, s, divisor - z))
    layer.book("dropped", lambda: by_parts(lambda z, r: jnp.where(z == 0, r, 0), divisor, relevance))
    return tuple(received)


def scaled(epsilon: Any, stabiliser: str, z: jax.Array) -> Any:
    """The stabiliser's size: as it is, or times the root mean square of z over all axes but the first."""
    if stabiliser == "absolute":
        return epsilon
    axes = tuple(range(1, z.ndim)) or None
    return by_parts(lambda z: epsilon * jnp.sqrt(jnp.mean(z**2, axis=axes, keepdims=True)), z)


_POLICIES = ("absorb", "distribute", "ignore")


_PROPORTIONAL = LINEAR | {"complex"}


def _unless_distributed(rule: Any, op: Op) -> bool:
    """`proportional` of rules whose messages are shares of the contributions; of a bias, inputs of 0 get theirs too."""
    return rule.bias != "distribute"


@rule
class Zero(Rule):
    """LRP-0: R_j = sum_k c_jk / z_k R_k; messages of units with z_k = 0 are dropped.

    bias: "absorb", "distribute" or "ignore". Source: Bach et al. 2015, eq. 56. Passes: one transposed pass. Equals
    gradient x input on piecewise linear networks. Raises InputError for another choice.
    """

    bias: str = "absorb"
    kinds: ClassVar[frozenset[str]] = _PROPORTIONAL
    proportional = _unless_distributed

    def __post_init__(self) -> None:
        check_choice(self, "bias", *_POLICIES)

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        return in_proportion(layer, relevance, self.bias)


@rule
class Epsilon(Rule):
    """LRP-epsilon: R_j = sum_k c_jk / (z_k + epsilon sign(z_k)) R_k, with sign(0) = +1.

    epsilon: float >= 0; with stabiliser="relative", in units of the root mean square of z over all axes but the first
    (Montavon et al. 2019). The stabiliser absorbs epsilon / (|z| + epsilon) of each unit's relevance, the bias its
    share b / z unless bias is "distribute" or "ignore". Source: Bach et al. 2015, eq. 58. Raises InputError for a
    negative or NaN epsilon, or another choice.
    """

    epsilon: Any = 1e-6
    stabiliser: str = "absolute"
    bias: str = "absorb"
    kinds: ClassVar[frozenset[str]] = _PROPORTIONAL
    proportional = _unless_distributed

    def __post_init__(self) -> None:
        check_number(self, "epsilon", minimum=0)
        check_choice(self, "stabiliser", "absolute", "relative")
        check_choice(self, "bias", *_POLICIES)

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        return in_proportion(layer, relevance, self.bias, scaled(self.epsilon, self.stabiliser, layer.output))


@rule
class Norm(Epsilon):
    """A sum's relevance in proportion to its terms: Epsilon under the name that zennit gives it for sums and pools."""


@rule
class ZPlus(Rule):
    """LRP-z+ (alpha 1, beta 0): R_j = sum_k c+_jk / (sum_i c+_ik + b+_k) R_k.

    bias: "absorb", "distribute" or "ignore". Source: Montavon et al. 2017, eq. 14, for inputs of either sign.
    """

    bias: str = "absorb"
    kinds: ClassVar[frozenset[str]] = KERNEL
    proportional = _unless_distributed

    def __post_init__(self) -> None:
        check_choice(self, "bias", *_POLICIES)

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        terms, b = excitatory(layer), positive(layer.bias)
        return (layer.leave(share(layer, relevance, terms, total(layer, terms) + b, b, self.bias)),)


@rule
class AlphaBeta(Rule):
    """R_j = sum_k (alpha c+_jk / (sum_i c+_ik + b+_k) - beta c-_jk / (sum_i c-_ik + b-_k)) R_k.

    alpha, beta: floats, beta >= 0 and alpha - beta = 1. bias: "absorb", "distribute" or "ignore". A unit without
    inhibitory (excitatory) contributions gives alpha R (-beta R) instead of R. Source: Bach et al. 2015, eq. 60.
    Raises InputError for numbers that do not fit.
    """

    alpha: Any = 2.0
    beta: Any = 1.0
    bias: str = "absorb"
    kinds: ClassVar[frozenset[str]] = KERNEL
    proportional = _unless_distributed

    def __post_init__(self) -> None:
        check_choice(self, "bias", *_POLICIES)
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
        # z- has a pass of its own. As z - z+ - b it would have the error of z+, which is all of it where inhibition is
        # weak, and a unit without any would divide by that error.
        plus, minus = excitatory(layer), inhibitory(layer)
        b_plus, b_minus = positive(layer.bias), negative(layer.bias)
        z_plus, z_minus = total(layer, plus) + b_plus, total(layer, minus) + b_minus
        r = share(layer, self.alpha * relevance, plus, z_plus, b_plus, self.bias)
        r += share(layer, -self.beta * relevance, minus, z_minus, b_minus, self.bias)
        return (layer.leave(r),)


@rule
class FourQuadrant(Rule):
    """alpha-beta with a number for each combination of signs of input and weight, each normalised on its own:

        R_j = sum_q n_q sum_k c^q_jk / (sum_i c^q_ik) R_k,    q in {++, --, +-, -+}, the input's sign first

    pos_pos, neg_neg, pos_neg, neg_pos: floats with sum 1 (so that relevance is conserved where no quadrant is empty);
    biases are left out. (1, 0, 0, 0) is z+ restricted to positive inputs. Source: Binder et al. 2021. Raises
    InputError if the sum is not 1.
    """

    pos_pos: Any = 1.0
    neg_neg: Any = 0.0
    pos_neg: Any = 0.0
    neg_pos: Any = 0.0
    kinds: ClassVar[frozenset[str]] = KERNEL

    def __post_init__(self) -> None:
        names = ("pos_pos", "neg_neg", "pos_neg", "neg_pos")
        for name in names:
            check_number(self, name)
        values = [concrete(getattr(self, name)) for name in names]
        if all(v is not None for v in values) and not np.allclose(sum(values), 1, rtol=0, atol=1e-5):  # type: ignore[arg-type]
            raise InputError(f"{self!r}: the four numbers must have the sum 1")

    def proportional(self, op: Op) -> bool:
        return True

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        a = layer.active
        quadrants = [(self.pos_pos, positive(a), PLUS), (self.pos_neg, positive(a), MINUS)]
        if not layer.nonneg:
            quadrants += [(self.neg_neg, negative(a), MINUS), (self.neg_pos, negative(a), PLUS)]
        else:
            missing = self.neg_neg + self.neg_pos
            layer.book("dropped", lambda: missing * relevance)
        parts = (share(layer, n * relevance, [(x, v)], layer.forward(x, v)) for n, x, v in quadrants)
        return (layer.leave(sum(parts)),)  # type: ignore[arg-type]


@rule
class Gamma(Rule):
    """LRP-gamma: R_j = sum_k (c_jk + gamma c+_jk) / (z_k + gamma (sum_i c+_ik + b+_k)) R_k.

    gamma: float >= 0. bias: "absorb", "distribute" or "ignore". Source: Montavon et al. 2019, section 10.2.3, for
    inputs of either sign. Raises InputError for a negative gamma.
    """

    gamma: Any = 0.25
    bias: str = "absorb"
    kinds: ClassVar[frozenset[str]] = KERNEL
    proportional = _unless_distributed

    def __post_init__(self) -> None:
        check_choice(self, "bias", *_POLICIES)
        check_number(self, "gamma", minimum=0)

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        plus, b = excitatory(layer), layer.bias
        z = layer.output + self.gamma * (total(layer, plus) + positive(b))
        terms = [(a, favoured(self.gamma, part)) for a, part in plus]  # as many passes as c+ alone
        return (layer.leave(share(layer, relevance, terms, z, b + self.gamma * positive(b), self.bias)),)


@rule
class GeneralizedGamma(Rule):
    """LRP-gamma for units of either sign, as zennit's Gamma:

        z_k > 0:  (c_jk + gamma c+_jk) / (z_k + gamma (sum_i c+_ik + b+_k)) R_k
        z_k < 0:  (c_jk + gamma c-_jk) / (z_k + gamma (sum_i c-_ik + b-_k)) R_k
        z_k = 0:  nothing

    gamma: float >= 0. bias: "absorb", "distribute" or "ignore". Source: Andeol et al. 2021, eq. 8. Raises InputError
    for a negative gamma.
    """

    gamma: Any = 0.25
    bias: str = "absorb"
    kinds: ClassVar[frozenset[str]] = KERNEL
    proportional = _unless_distributed

    def __post_init__(self) -> None:
        check_choice(self, "bias", *_POLICIES)
        check_number(self, "gamma", minimum=0)

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        a, z, b = layer.active, layer.output, layer.bias
        size = jnp.abs(a)
        # c+ = (c + |c|) / 2 is one pass, for signed a too
        plus = (z - b + layer.forward(size, SIZE)) / 2 + positive(b)
        # The sum of one sign enters that of z only where it is the larger one, so nothing cancels in these differences;
        # in the messages below (1 + gamma/2) c - gamma/2 |c| does, by a factor of gamma, beside others of that size.
        up, spread = self._ratio(layer, relevance, z > 0, plus, positive(b))
        down = jnp.zeros_like(up)
        if not layer.rectified:
            down, more = self._ratio(layer, relevance, z < 0, z - plus, negative(b))
            spread += more
        layer.book("dropped", lambda: jnp.where(z == 0, relevance, 0))
        if layer.nonneg and layer.rectified:
            received = a * layer.backward(up, favoured(self.gamma, PLUS))
        else:  # kernels without gamma, which variants share
            half = self.gamma / 2
            received = (1 + half) * a * layer.backward(up + down, layer.kernel)
            received += half * size * layer.backward(up - down, SIZE)
        return (layer.leave(received + spread),)

    def _ratio(self, layer: Layer, relevance: jax.Array, chosen: jax.Array, part: jax.Array, b: jax.Array) -> Any:
        """`ratio` of the chosen units, whose contributions of one sign, and their bias b, sum to `part`."""
        z = jnp.where(chosen, layer.output + self.gamma * part, 1)
        return ratio(layer, jnp.where(chosen, relevance, 0), z, layer.bias + self.gamma * b, self.bias)
