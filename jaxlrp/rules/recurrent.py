"""The rule for gates: of a product, the signal takes all relevance.

In an LSTM, c_t = f_t * c_{t-1} + i_t * g_t and h_t = o_t * tanh(c_t): the gates f, i and o say how much passes, the
relevance of what passes is the signal's. With the epsilon rule for sums and dense layers, and tanh passing, this is LRP
for recurrent networks (Arras et al. 2017); in a selective state space, whose A, B, C and Delta are made from the data
too, MambaLRP (Rezaei Jafari et al. 2024).
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
from jax.extend.core import primitives as p

from ..program import Op, Value, leaves
from .base import Rule, check_choice, check_number, rule
from .layer import Layer
from .product import by_operands, equal_shares, operands, shares_by_value


@rule
class SignalTakesAll(Rule):
    """The signal s takes all, the gate g nothing: of a product y = s * g, R_s = R; of a matrix product y = s g,
    R_s = s * (S g^T) with S = R / stab(y).

        Composite([(select.kind("product", "matmul"), rules.SignalTakesAll())]) + composites.epsilon()

    signal: "gated" tells the two apart. A gate lies between 0 and 1 by construction: a sigmoid however it is written,
    1 - z, exp(-softplus), a softmax, a product of gates, any of them moved. A model may also say it, by
    `jax.ad_checkpoint.checkpoint_name(v, "gate")`, which changes nothing; then v is a gate, and so is what is computed
    from such values and parameters alone: one mark, on the projection that B, C and Delta come from, serves a whole
    state space. Where one operand is marked, bounds do not count. Of a quotient the numerator is the signal. Two gates
    get half each; so do two operands of which none is known as a gate, and the plan notes it. "linear" reads gated
    units as CP-LRP does: in silu(g) * u, what the activation made is the gate. "first" and "second" name the signal by
    hand, in the order of the plan's inputs. epsilon: float >= 0, stabilises the matrix product.

    A layer that reads two inputs, z = W x + U h + b with R_i = x_i w_ij / stab(z_j) R_j in the paper, is a sum of dense
    layers here: Epsilon for the "add" and Zero for those is the same. Sources: Arras et al. 2017;
    Rezaei Jafari et al. 2024, whose half rule for the output gate y * silu(z) is what no gate gives. Raises InputError
    for a negative epsilon or another signal.
    """

    signal: str = "gated"
    epsilon: Any = 1e-9
    kinds: ClassVar[frozenset[str]] = frozenset(("product", "matmul"))

    def __post_init__(self) -> None:
        check_choice(self, "signal", "gated", "linear", "first", "second")
        check_number(self, "epsilon", minimum=0)

    def supports(self, op: Op) -> bool:
        return op.kind == "matmul" or (op.kind == "product" and by_operands(op))

    def needs(self, op: Op) -> frozenset[str]:
        return self.uses if op.kind == "matmul" else frozenset()

    def note(self, op: Op) -> str:
        if len(self._takers(op)) == 1 or all(op.gates):  # a product of gates gets no relevance, but by a person's say
            return ""
        return "none of its operands is known as a gate: each gets half"

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        takers = self._takers(layer.op)
        if layer.op.kind == "product":
            return equal_shares(layer, relevance, takers)
        return shares_by_value(layer, relevance, takers, self.epsilon)

    def _takers(self, op: Op) -> list[Value]:
        """The operand that takes all, or both of them."""
        both = operands(op)
        if len(set(both)) == 1:
            return both
        if self.signal in ("first", "second"):
            return [both[self.signal == "second"]]
        if leaves(op.steps)[-1].primitive is p.div_p:
            return both[:1]
        if self.signal == "linear" and sum(op.activated) == 1:
            return [v for v in both if not op.activated[op.inputs.index(v)]]
        signals = [v for v in both if not op.gates[op.inputs.index(v)]]
        return signals if len(signals) == 1 else both


__all__ = ["SignalTakesAll"]
