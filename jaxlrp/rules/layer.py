"""What a rule sees of a layer: its arrays, its kernel, and the passes forward and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from .. import _compat
from ..errors import InputError
from ..kinds import PSUMS
from ..program import Atom, Constant, Equation, Op, Value, Wrapper, leaves
from ..runs import kernel_axes
from . import order, passes
from .arithmetic import halved, resolved, summed
from .base import LINEAR, NORMS


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """A kernel that is made of the layer's own, w, element by element: make(w). A large one is never made whole.

    numbered: whether numbers of the rule are in it, for many of which `jax.vmap` makes a kernel each.
    """

    make: Callable[[jax.Array], jax.Array]
    numbered: bool = False


ONES = Elementwise(jnp.ones_like)
Kernel = jax.Array | Elementwise


class Layer:
    """An Op with its arrays, as a rule sees it in the backward pass.

    inputs: the data values, in the compute dtype. output: what the forward pass gave. In half precision both are
    `arithmetic.resolved`. `apply(*inputs)` is the layer itself; `kernel` and the methods below it exist for dense and
    conv Ops, whose every step but the core has been folded away: output = forward(active, kernel) + bias.

    rectified: whether no relevance arrives where the output is negative or 0, a ReLU being what reads it.
    awaited: the relevance that passes wait for (`order.late`), so that nothing is kept for them from the forward pass
    but what that keeps anyway.
    books: what became of relevance that was not passed on, where a ledger asks for it ("bias", "stabiliser",
    "dropped"); else None.
    """

    def __init__(
        self,
        op: Op,
        inputs: Sequence[Any] | None,
        params: Sequence[Any] | None,
        output: Any,
        books: bool = False,
        rectified: bool = False,
        awaited: jax.Array | None = None,
    ):
        self.op, self.rectified, self._awaited = op, rectified, awaited
        self.books: dict[str, jax.Array] | None = {} if books else None
        # the compute dtype; of complex numbers, that of their parts
        self.dtype = jnp.finfo(jnp.promote_types(op.output.aval.dtype, jnp.float32)).dtype
        self._exact = all(_dtype(v) in (None, self.dtype) for e in op.steps for v in (*e.inputs, *e.outputs))
        exact = (op.first or n for n in op.nonneg)  # such a zero is one: in the explained input, or past a ReLU
        self.inputs = tuple(self._data(x, e) for x, e in zip(inputs or (), exact, strict=False))
        self.output = self._data(output)
        self._params: dict[Atom, Any] = dict(zip(op.params, params or (), strict=params is not None))
        self._kernels: dict[Elementwise, jax.Array] = {}

    def apply(self, *inputs: jax.Array) -> jax.Array:
        """The layer's own equations on other inputs."""
        env: dict[Atom, Any] = dict(self._params)
        env.update(zip(self.op.inputs, inputs, strict=True))
        return self._run(self.op.steps, env)[self.op.output]

    def apply_with(self, change: Callable[[Equation, list[Any]], list[Any]], *inputs: jax.Array) -> jax.Array:
        """`apply`, each equation on `change(equation, operands)`: how a rule holds some constant."""
        env: dict[Atom, Any] = dict(self._params)
        env.update(zip(self.op.inputs, inputs, strict=True))
        for e in leaves(self.op.steps):
            operands = [a.value if isinstance(a, Constant) else env[a] for a in e.inputs]
            env.update(zip(e.outputs, self._evaluate(e, change(e, operands)), strict=True))
        return env[self.op.output]

    def book(self, entry: str, amount: Callable[[], jax.Array]) -> None:
        """Adds the sum of `amount()` to an entry of the books, if there are any: "bias", "stabiliser", "dropped"."""
        if entry not in ("bias", "stabiliser", "dropped", "ended"):
            raise InputError(f'book({entry!r}): the books have "bias", "stabiliser", "dropped" and "ended"')
        if self.books is not None:
            self.books[entry] = self.books.get(entry, jnp.zeros((), self.dtype)) + summed(amount())

    @cached_property
    def offset(self) -> jax.Array:
        """What a linear layer gives where the data is zero: its bias, of whatever kind it is."""
        return self.bias if self.op.linear is not None else self.apply(*(jnp.zeros_like(x) for x in self.inputs))

    @property
    def degree(self) -> int:
        """By what power the layer grows with its data: 2 for a product of two data values, which are linear in each."""
        last = leaves(self.op.steps)[-1]
        return 2 if last.primitive in _BILINEAR and all(a in self.op.inputs for a in last.inputs[:2]) else 1

    @property
    def occurrences(self) -> tuple[int, ...]:
        """How often each data input stands in the layer: x + y + x has x twice."""
        steps = leaves(self.op.steps)
        return tuple(sum(a is v for e in steps for a in e.inputs) for v in self.op.inputs)

    def _cast(self, x: Any) -> Any:
        inexact = x is not None and jnp.issubdtype(jnp.result_type(x), jnp.floating)
        return jnp.asarray(x, self.dtype) if inexact else x

    def _data(self, x: Any, exact: bool = False) -> Any:
        shared = self.op.kind in _BY_VALUE and x is not None and halved(x) and not exact
        return resolved(self._cast(x), x.dtype) if shared else self._cast(x)

    def _run(self, steps: Sequence[Equation], env: dict[Atom, Any]) -> dict[Atom, Any]:
        for e in steps:
            values = [a.value if isinstance(a, Constant) else env[a] for a in e.inputs]
            env.update(zip(e.outputs, self._evaluate(e, values), strict=True))
        return env

    def _evaluate(self, e: Equation, values: list[Any]) -> list[Any]:
        """One equation in the compute dtype, whatever the model's."""
        if self._exact:
            return e.evaluate(*values)
        if isinstance(e, Wrapper):
            env = dict(zip(e.inputs, values, strict=True))
            inner = self._run(e.children, {**self._params, **env})
            return [a.value if isinstance(a, Constant) else inner[a] for a in e.outputs]
        values = e.spread([self._cast(v) for v in values])
        if e.primitive in (p.convert_element_type_p, p.reduce_precision_p):
            floating = jnp.issubdtype(e.outputs[0].aval.dtype, jnp.floating)  # a mask may become numbers here
            return [jnp.asarray(v, self.dtype) for v in values] if floating else e.evaluate(*values)
        params = dict(e.params)
        if params.get("preferred_element_type") is not None:
            params["preferred_element_type"] = np.dtype(self.dtype)
        if params.get("update_jaxpr") is not None:  # how a scatter combines two numbers, in the model's dtype
            two = [jax.ShapeDtypeStruct((), self.dtype)] * 2
            combine = jax.make_jaxpr(partial(jax.core.eval_jaxpr, params["update_jaxpr"], params["update_consts"]))
            params["update_jaxpr"] = combine(*two).jaxpr
        out = e.primitive.bind(*values, **params)
        return list(out) if e.primitive.multiple_results else [out]

    # dense and conv: output = after(core(before(x), kernel))

    def _linear(self) -> Any:
        if self.op.linear is None:
            raise InputError(f"{self.op.name} ({self.op.kind}, {self.op.source}) has no kernel")
        return self.op.linear

    def _read(self, atom: Atom) -> Any:
        return self._cast(atom.value if isinstance(atom, Constant) else self._fixed[atom])

    @cached_property
    def _fixed(self) -> dict[Atom, Any]:
        """Everything in the layer that does not depend on its inputs."""
        env = dict(self._params)
        for e in leaves(self.op.steps):
            if all(v in env for v in e.values):
                self._run([e], env)
        return env

    @cached_property
    def kernel(self) -> jax.Array:
        """The effective kernel: scales that follow the core (a BatchNorm's) are folded into its output axes."""
        linear = self._linear()
        kernel = self._read(linear.core.inputs[1 - linear.slot])
        for e, axes in linear.scales:
            kernel = kernel * self._factor(e, axes, kernel.ndim)
        return kernel

    def _factor(self, e: Equation, axes: dict[int, int], ndim: int) -> Any:
        if e.primitive is p.neg_p:
            return -1
        slot = next(i for i, a in enumerate(e.inputs) if a not in self._fixed and isinstance(a, Value))
        if e.primitive is p.sub_p:
            return -1 if slot == 1 else 1
        factor = self._read(e.inputs[1 - slot])
        if factor.ndim:
            factor = factor[tuple(slice(None) if i in axes else 0 for i in range(factor.ndim))]
            kept = sorted(axes)
            order = sorted(range(len(kept)), key=lambda i: axes[kept[i]])
            factor = factor.transpose(order)
            factor = jnp.expand_dims(factor, [i for i in range(ndim) if i not in axes.values()])
        return 1 / factor if e.primitive is p.div_p else factor

    @cached_property
    def bias(self) -> jax.Array:
        """What the layer gives where the data contributes nothing, shaped like the output."""
        linear = self._linear()
        if linear.shifted:
            entered = self._before(jnp.zeros_like(self.inputs[0]))
            raw = self._read(linear.core.inputs[1 - linear.slot])
            value = self._core(entered, raw)
        else:
            value = self._zeros
        env: dict[Atom, Any] = {**self._fixed, self._end: value}
        return self._run(linear.after, env)[self.op.output]

    @cached_property
    def active(self) -> jax.Array:
        """The data at the core's entrance, preprocessing's factors included and its shifts left out."""
        return self.enter(self.inputs[0])

    @cached_property
    def entered(self) -> jax.Array:
        """The data as the core reads it, the shifts of its preprocessing included."""
        return self._before(self.inputs[0])

    @property
    def nonneg(self) -> bool:
        """Whether `active` is known to have no negative element."""
        return self._linear().nonneg

    def enter(self, x: jax.Array) -> jax.Array:
        """`x`, shaped like the input, through the linear part of the preprocessing."""
        if not self._linear().before:
            return x
        return jax.jvp(self._before, (x,), (x,))[1]

    @cached_property
    def ones(self) -> jax.Array:
        """1 at the core's entrance wherever the input arrives, 0 in padding."""
        return self._move(jnp.ones_like(self.inputs[0]))

    def leave(self, r: jax.Array) -> jax.Array:
        """Relevance at the core's entrance, back in the shape of the input."""
        if not self._linear().before:
            return r
        (out,) = jax.linear_transpose(self._move, self.inputs[0])(r)
        return out

    def forward(self, x: jax.Array, kernel: Kernel) -> jax.Array:
        """core(x, kernel) in the shape of the output, without bias.

        kernel: an array, or what is made of `self.kernel`: `Elementwise(jnp.abs)`.
        """
        return self._follow(self._linear().after, {self._end: self._core(x, kernel)}, self.op.output)

    def backward(self, s: jax.Array, kernel: Kernel) -> jax.Array:
        """The transpose of `forward` in its first argument."""
        return self._back(self._to_core(s), kernel, self.active)

    def pull(self, s: jax.Array) -> tuple[jax.Array, ...]:
        """The transpose of the layer's derivative: sum_k s_k dz_k / da_j for each data input."""
        if self.op.linear is None:
            steps = leaves(self.op.steps)
            if len(steps) == 1 and passes.windowed(steps[0]):
                return (passes.back_extremes(steps[0], self.inputs[0], s),)
            return jax.vjp(self.apply, *self.inputs)[1](s)
        linear = self.op.linear

        def follow(y: jax.Array) -> jax.Array:
            return self._run(linear.after, {**self._fixed, self._end: y})[self.op.output]

        (s,) = jax.vjp(follow, self._zeros)[1](s)  # scales multiply s, not the kernel
        entered, before = jax.vjp(self._before, self.inputs[0])
        return before(self._back(s, self._read(linear.core.inputs[1 - linear.slot]), entered))

    def per_unit(self, values: jax.Array) -> jax.Array:
        """Sums of an output-shaped array over all positions of each unit; the result broadcasts to the kernel."""
        linear = self._linear()
        values = self._to_core(values)
        axes = kernel_axes(linear.core, linear.core.inputs[linear.slot]) or {}
        values = values.sum([i for i in range(values.ndim) if i not in axes])
        kept = [axes[i] for i in sorted(axes)]
        values = values.transpose(sorted(range(len(kept)), key=kept.__getitem__))
        return jnp.expand_dims(values, [i for i in range(self.kernel.ndim) if i not in kept])

    def moved(self, x: jax.Array) -> jax.Array:
        """`x`, shaped like the input, where its elements stand in the output of a norm."""
        return self._follow(leaves(self.op.steps), {self.op.inputs[0]: x}, self.op.output)

    @property
    def _end(self) -> Value:
        return self._linear().core.outputs[0]

    @property
    def _zeros(self) -> jax.Array:
        """What the core gives where the data is zero."""
        return _compat.vary(jnp.zeros(self._end.aval.shape, self.dtype), _compat.varying(self._end.aval))

    def _to_core(self, s: jax.Array) -> jax.Array:
        """What is shaped like the output, in the shape of the core's."""
        after = self._linear().after
        (s,) = jax.linear_transpose(lambda y: self._follow(after, {self._end: y}, self.op.output), self._zeros)(s)
        return s

    def _core(self, x: jax.Array, kernel: Kernel) -> jax.Array:
        core, left, x = self._linear().core, self._linear().slot == 0, self._late(x)
        if isinstance(kernel, Elementwise):
            if left and kernel is ONES and passes.uniform(core):
                return passes.by_sums(core, x)
            if left and passes.large(core):
                return passes.by_rows(core, x, *self._source(kernel))
            kernel = self._made(kernel)
        if left and passes.rewritten(core):
            return passes.value(core, x, kernel)
        return self._own(x, kernel)

    def _back(self, s: jax.Array, kernel: Kernel, entered: jax.Array) -> jax.Array:
        """The transpose of `_core` in x, which is shaped like `entered`."""
        core, left = self._linear().core, self._linear().slot == 0
        numbered = isinstance(kernel, Elementwise) and kernel.numbered
        if isinstance(kernel, Elementwise):
            if left and kernel is ONES and passes.uniform(core):
                return jax.linear_transpose(partial(passes.by_sums, core), entered)(s)[0]
            if left and passes.large(core):
                return passes.back_by_rows(core, s, *self._source(kernel))
            kernel = self._made(kernel)
        if left and passes.rewritten(core):
            back = partial(passes.back, core, jax.typeof(entered))
            return (order.kernel_by_kernel(back) if numbered and order.compiled() else back)(s, kernel)
        (out,) = jax.linear_transpose(lambda x: self._own(x, kernel), entered)(s)
        return out

    def _late(self, x: jax.Array) -> jax.Array:
        """x, not to be known before relevance is: in a program that is compiled, where there is such an order."""
        zero = None if self._awaited is None or not order.compiled() else order.late(self._awaited)
        return x if zero is None else x + zero

    def _own(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The core's own equation."""
        core, slot = self._linear().core, self._linear().slot
        sizes = map(self._read, core.inputs[2:])  # of the groups of a ragged product
        (out,) = self._evaluate(core, [*([x, kernel] if slot == 0 else [kernel, x]), *sizes])
        return out

    def _made(self, kernel: Elementwise) -> jax.Array:
        """The array, made once."""
        if kernel not in self._kernels:
            self._kernels[kernel] = kernel.make(self._late(self.kernel))
        return self._kernels[kernel]

    def _source(self, kernel: Elementwise) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
        """What some rows of the array are made of, and how: of the parameter as it is stored, unless it is scaled."""
        if self._linear().scales:
            return self.kernel, kernel.make
        stored = self._linear().core.inputs[1]
        array = jnp.asarray(stored.value if isinstance(stored, Constant) else self._fixed[stored])
        return array, lambda w: kernel.make(self._cast(w))

    def _before(self, x: jax.Array) -> jax.Array:
        linear = self._linear()
        return self._run(linear.before, {**self._fixed, self.op.inputs[0]: x})[linear.core.inputs[linear.slot]]

    def _move(self, x: jax.Array) -> jax.Array:
        linear = self._linear()
        return self._follow(linear.before, {self.op.inputs[0]: x}, linear.core.inputs[linear.slot])

    def _follow(self, steps: Sequence[Equation], env: dict[Atom, Any], end: Atom) -> jax.Array:
        """Through the reshapes among the steps and sums over devices, padding with zeros, past sums and products."""
        for e in steps:
            value = next((env[a] for a in e.inputs if a in env), None)
            if value is None or e.primitive is p.reduce_sum_p:  # a norm's statistics
                continue
            if e.primitive is p.pad_p:
                env[e.outputs[0]] = jax.lax.pad(value, jnp.zeros((), value.dtype), e.params["padding_config"])
            elif e.primitive in _MOVED:
                (env[e.outputs[0]],) = self._evaluate(e, [value])
            else:
                env[e.outputs[0]] = value
        return env[end]


_BY_VALUE = LINEAR | NORMS | {"attention", "softmax"}  # whose rules multiply by the values of the data
_BILINEAR = frozenset((p.mul_p, p.dot_general_p, p.conv_general_dilated_p, _compat.RAGGED_DOT))
_MOVED = PSUMS | {
    p.reshape_p, p.transpose_p, p.squeeze_p, p.broadcast_in_dim_p, _compat.pvary_p, _compat.reduce_scatter_p
}  # fmt: skip


def _dtype(atom: Atom) -> Any:
    """The floating dtype of a value, None for any other."""
    dtype = atom.aval.dtype
    return dtype if jnp.issubdtype(dtype, jnp.floating) else None
