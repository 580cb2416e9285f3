"""The Taylor rule for local response normalisation.

    y_k = x_k g(h_k),   h_k = sum_j B_kj x_j^2,   g(h) = (k + b h)^-c

B is the window: a band of ones, or any matrix. Source: Binder et al. 2016.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ..program import Atom, leaves
from ..response import parts
from .base import Rule, check_choice, rule
from .layer import Layer


@rule
class LocalResponseTaylor(Rule):
    """A first-order Taylor expansion at the input, around the response without neighbours (x_j = 0 for j != k):

        z_kk = x_k g(B_kk x_k^2),    z_jk = B_kj x_j^2 * 2 x_k g'(h_k) for j != k,    R_j = sum_k v_jk R_k

    messages: "normalised" v_jk = z_jk / sum_i z_ik, which conserves; "over_y" v_jk = z_jk / y_k; "unnormalised"
    v_jk = z_jk, as the authors' own code has it. The sign of R_k goes to k itself and the opposite one to those that
    suppress it: normalised, 1 <= v_kk <= 1 / (1 - 2 (c / (c + 1))^(c + 1)), which is 1.8316 for c = 0.75 and 3.79 at
    most, as long as B has no negative weight. A unit with x_k = 0 sends nothing (dropped).

    For an Op of kind local_response_norm: one data input, an output of the same shape, across channels or within them,
    in float32 or wider. Source: Binder et al. 2016. Raises InputError for another choice of messages.
    """

    messages: str = "normalised"
    kinds: ClassVar[frozenset[str]] = frozenset(("local_response_norm",))
    uses: ClassVar[frozenset[str]] = frozenset(("inputs", "params"))

    def __post_init__(self) -> None:
        check_choice(self, "messages", "normalised", "over_y", "unnormalised")

    @property
    def conserves(self) -> bool:  # type: ignore[override]  # it depends on the choice
        return self.messages == "normalised"

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        (x,) = layer.inputs
        steps = _Response(layer)
        square = x * x
        total, pull = jax.vjp(steps.total, square)
        own_total = steps.own(square)
        factor, slope = jax.jvp(steps.factor, (total,), (jnp.ones_like(total),))
        own = steps.home(own_total)
        alone = jnp.where(x == 0, 1, steps.factor(own_total + steps.start))  # unused there, and infinite where k is 0
        # x_k is a factor of every z_jk: with it cancelled nothing is divided by zero
        if self.messages == "unnormalised":
            sent = x * relevance
        else:
            neighbours = steps.home(total - steps.start) - own
            divisor = factor if self.messages == "over_y" else alone + 2 * slope * neighbours
            sent = jnp.where(x == 0, 0, relevance) / divisor
            layer.book("dropped", lambda: jnp.where(x == 0, relevance, 0))
        suppressed = 2 * slope * sent
        (spread,) = pull(steps.away(suppressed))
        return (alone * sent + square * spread - own * suppressed,)


class _Response:
    """The layer's steps as functions: x^2 -> h -> factor, in the layout that h has there; `home` leads to that of x."""

    def __init__(self, layer: Layer):
        found = parts(leaves(layer.op.steps), layer.op.inputs[0], layer.op.output)
        assert found is not None  # as the Op was recognised by it
        self._layer, self._parts = layer, found
        # h at x = 0 (a sum may start with k), and the weight of a position's own square in its window
        self.start: Any = 0.0
        self._weight: Any = None
        if found.matrix is None and layer.op.params:
            self.start, self._weight = self._probe()
        elif found.matrix is None:
            with jax.ensure_compile_time_eval():  # all numbers are written into the program: known before it runs
                self.start, self._weight = map(float, self._probe())

    def total(self, square: jax.Array) -> jax.Array:
        """h, from squares in the place of x."""
        return self._total(square, self._layer._fixed)

    def _total(self, square: jax.Array, env: dict[Atom, Any]) -> jax.Array:
        env = {**env, self._layer.op.inputs[0]: square}
        for e in self._parts.before:
            if e in self._parts.squares:
                env[e.outputs[0]] = env[e.inputs[0]]
            else:
                self._layer._run([e], env)
        return env[self._parts.total]

    def factor(self, total: jax.Array) -> jax.Array:
        """g(h), shaped like x: what comes after h, where x is 1."""
        ones: dict[Atom, Any] = {v: jnp.ones(v.aval.shape, self._layer.dtype) for v in self._parts.copies}
        env: dict[Atom, Any] = {**self._layer._fixed, **ones, self._parts.total: total}
        return self._layer._run(self._parts.after, env)[self._layer.op.output]

    def home(self, total: jax.Array) -> jax.Array:
        """From the layout of h to that of x."""
        return self._layer._follow(self._parts.after, {self._parts.total: total}, self._layer.op.output)

    def away(self, x: jax.Array) -> jax.Array:
        """From the layout of x to that of h."""
        like = jax.lax.full_like(x, 0, shape=self._parts.total.aval.shape)
        (out,) = jax.linear_transpose(self.home, like)(x)
        return out

    def own(self, square: jax.Array) -> jax.Array:
        """B_kk x_k^2, in the layout of h: the matrix's diagonal, or the one weight that all positions have."""
        if self._parts.matrix is None:
            return self._weight * self.away(square)
        e, slot = self._parts.matrix
        kernel = self._layer._read(e.inputs[slot])
        axes = (0, 1) if kernel.ndim == 2 else e.params["dimension_numbers"].rhs_spec[:2]
        first, second = (jax.lax.broadcasted_iota(jnp.int32, kernel.shape, a) for a in axes)
        diagonal = jnp.where(first == second, kernel, 0)
        return self._total(square, {**self._layer._fixed, e.inputs[slot]: diagonal})

    def _probe(self) -> tuple[jax.Array, jax.Array]:
        """`start` and the weight, which are the same for all positions, so read off at one."""
        shape = self._layer.op.in_shapes[0]
        middle = tuple(n // 2 for n in shape)
        # behind the barrier, or XLA would fold these constants while compiling, much more slowly than running them
        zeros = jax.lax.optimization_barrier(jnp.zeros(shape, self._layer.dtype))
        start = self.home(self.total(zeros))[middle] if self._parts.shifted else jnp.zeros((), self._layer.dtype)
        return start, self.home(self.total(zeros.at[middle].set(1)))[middle] - start


__all__ = ["LocalResponseTaylor"]
