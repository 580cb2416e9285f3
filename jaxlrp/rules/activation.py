"""Rules for layers that act element by element, for softmax, and the gradient with its modified ReLUs."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from .. import _compat
from ..program import Atom, Constant, Op, leaves
from .arithmetic import divide
from .base import NORMS, Rule, broadcasts, check_number, rule
from .layer import Layer


@rule
class Pass(Rule):
    """Relevance passes unchanged: R_in = R_out; through a reshape, a slice or a resize it follows the
    values.

    For any layer with one data input and an output of the same shape, and for norms; an activation that repeats its
    input gets the sum over the copies. What arrives at a constant (padding, a token joined to the data) ends there.
    Source: Bach et al. 2015: monotonous activations keep the
    relevance of their input.
    """

    uses: ClassVar[frozenset[str]] = frozenset()

    def supports(self, op: Op) -> bool:
        if op.kind == "activation" and len(op.in_shapes) == 1 and broadcasts(op.in_shapes[0], op.out_shape):
            return True
        return op.kind in ("structural", "blocked", "resize") or op.kind in NORMS or op.in_shapes == (op.out_shape,)

    def needs(self, op: Op) -> frozenset[str]:
        moves = op.kind in ("structural", "resize")
        return frozenset(("inputs", "params")) if moves else self.uses

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        if layer.op.kind in NORMS:  # each element where it came from, whatever is transposed on the way
            like = jax.lax.full_like(relevance, 0, shape=layer.op.in_shapes[0])
            return tuple(jax.linear_transpose(layer.moved, like)(relevance))
        if layer.op.kind not in ("structural", "resize"):
            (shape,) = layer.op.in_shapes
            if shape == relevance.shape:
                return (relevance,)
            repeat = jax.linear_transpose(
                lambda x: jnp.broadcast_to(x, relevance.shape), jax.ShapeDtypeStruct(shape, layer.dtype)
            )
            return tuple(repeat(relevance))
        _, pull = jax.vjp(layer.apply, *layer.inputs)
        received = pull(relevance)
        layer.book("ended", lambda: relevance.sum() - sum(r.sum() for r in received))
        return received


@rule
class SoftmaxTaylor(Rule):
    """Softmax, or log-softmax, linearised at its input: R_i = x_i (R_i - s_i sum_j R_j), at the raw logits x.

    s is the softmax; the bracket is the derivative of log s, pulled back from R, so that reshapes within the layer do
    not matter. Logits of -inf (masks) get 0. Not conserving. Source: Achtibat et al. 2024, Prop. 3.1.
    """

    kinds: ClassVar[frozenset[str]] = frozenset(("softmax",))
    conserves: ClassVar[bool] = False

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        (x,) = layer.inputs
        _, pull = jax.vjp(layer.apply, x)
        (pulled,) = pull(relevance if layer.op.label == "log_softmax" else divide(relevance, layer.output))
        masked = jnp.isneginf(x)
        return (jnp.where(masked, 0, jnp.where(masked, 0, x) * pulled),)


@rule
class Stop(Rule):
    """The layer's output counts as a constant: relevance that arrives ends there, R_in = 0. For any layer."""

    uses: ClassVar[frozenset[str]] = frozenset()

    def supports(self, op: Op) -> bool:
        return True

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        layer.book("ended", lambda: relevance)
        return tuple(jnp.zeros(shape, layer.dtype) for shape in layer.op.in_shapes)


@rule
class Gradient(Rule):
    """The plain derivative instead of relevance: R_in = J^T R_out. Conserves nothing.

    What `on_unknown="gradient"` gives a primitive without a kind, and what guided backprop and its kin use everywhere
    but at ReLUs.
    """

    conserves: ClassVar[bool] = False

    def supports(self, op: Op) -> bool:
        return op.kind != "embedding"  # an id has no derivative

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        return layer.pull(relevance)


def is_relu(op: Op) -> bool:
    """Whether the Op is max(x, 0), or that with an upper bound as relu6 has, however it is written."""
    return op.kind == "activation" and upper_bound(op) is not None


def upper_bound(op: Op) -> float | None:
    """The largest value of a ReLU (inf for the plain one); None for any other activation."""
    lowest, highest = -np.inf, np.inf
    known: dict[Atom, float] = {}  # numbers on their way to the maximum: cast, repeated
    for e in leaves(op.steps):
        known.update({a: np.asarray(a.value).item() for a in e.inputs if isinstance(a, Constant) and a.aval.size == 1})
        bounds = [known[a] for a in e.inputs if a in known]
        if e.primitive is p.max_p and len(bounds) == 1:
            lowest = max(lowest, bounds[0])
        elif e.primitive is p.min_p and len(bounds) == 1:
            highest = min(highest, bounds[0])
        elif e.primitive is p.clamp_p and len(bounds) == 2:
            lowest, highest = max(lowest, bounds[0]), min(highest, bounds[1])
        elif e.primitive in (p.convert_element_type_p, p.copy_p, p.broadcast_in_dim_p, _compat.pvary_p):
            known.update({e.outputs[0]: bounds[0]} if bounds else {})
        else:
            return None
    return highest if lowest == 0 < highest else None


class _Relu(Rule):
    kinds: ClassVar[frozenset[str]] = frozenset(("activation",))
    conserves: ClassVar[bool] = False
    uses: ClassVar[frozenset[str]] = frozenset(("inputs",))

    def supports(self, op: Op) -> bool:
        return is_relu(op)


@rule
class DeconvNet(_Relu):
    """A ReLU lets positive signals through, whatever its input was: R_in = max(R_out, 0).

    For ReLUs, with an upper bound (relu6) or without. Source: Zeiler and Fergus 2014.
    """

    linear: ClassVar[bool] = False

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        return (jnp.maximum(relevance, 0),)


@rule
class GuidedBackprop(_Relu):
    """A ReLU lets positive signals through where it was active: R_in = 1[0 < x < u] max(R_out, 0).

    u: the upper bound of a relu6, else infinity. Source: Springenberg et al. 2015.
    """

    linear: ClassVar[bool] = False

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        x = layer.inputs[0]
        active = (x > 0) & (x < upper_bound(layer.op))
        return (jnp.where(active, jnp.maximum(relevance, 0), 0),)


@rule
class BetaSmooth(_Relu):
    """The derivative of a softplus in place of the ReLU's: R_in = sigmoid(beta x) R_out.

    With an upper bound u (relu6), that of softplus(x) - softplus(x - u). beta: float > 0. Source: Dombrowski et al.
    2019. Raises InputError for a negative beta.
    """

    beta: Any = 10.0

    def __post_init__(self) -> None:
        check_number(self, "beta", minimum=0)

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        x, bound = layer.inputs[0], upper_bound(layer.op)
        above = 0 if bound is None or np.isinf(bound) else jax.nn.sigmoid(self.beta * (x - bound))
        return ((jax.nn.sigmoid(self.beta * x) - above) * relevance,)


__all__ = ["BetaSmooth", "DeconvNet", "Gradient", "GuidedBackprop", "Pass", "SoftmaxTaylor", "Stop", "is_relu"]
