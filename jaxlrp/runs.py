"""Linear runs: a convolution or dense layer with its bias, BatchNorm, reshapes and preprocessing is one Op.

From each linear core the run goes forward along values read once, over reshapes, over sums and products with
parameters (a BatchNorm in inference mode is four of these), and over the sum of what the devices of a `shard_map` have
each computed from their part of the inputs; then backward over what nothing else claimed. A factor joins a convolution
only where it varies along the kernel's own output axes: then it folds into the kernel.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from . import _compat
from .graph import Draft, Graph
from .kinds import ELEMENTWISE, PSUMS, kind_of
from .program import Atom, Constant, Equation, Linear, Value
from .single import data_slots, linear_in, multiplies

Axes = dict[int, int]  # axis of a value -> axis of the kernel

_SAME_SHAPE = frozenset((
    p.convert_element_type_p, p.copy_p, p.reduce_precision_p, p.sharding_constraint_p, p.name_p, _compat.pvary_p,
))  # fmt: skip
_MOVES = _SAME_SHAPE | {p.reshape_p, p.transpose_p, p.squeeze_p, p.broadcast_in_dim_p}
_SHIFTS = frozenset((p.add_p, p.sub_p))
_FACTORS = frozenset((p.mul_p, p.div_p, p.neg_p))
_CORES = ("dense", "conv", "avg_pool", "reduce")
# what lax.ragged_dot asks for: the rows of the first operand come in groups, each with a matrix of its own
_ROWS = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))


def claim_linear(graph: Graph) -> None:
    drafts = []
    for e in graph.equations:
        kind = kind_of(e.primitive)
        if kind in _CORES and graph.free(e) and graph.carries(e) and _is_core(graph, e):
            drafts.append(_forward(graph, e, "resize" if _interpolates(graph, e) else kind))
    for draft in drafts:
        if draft.linear is not None:
            _backward(graph, draft, draft.linear)


def _is_core(graph: Graph, e: Equation) -> bool:
    """Whether `e` is linear in one value of the data, and nothing else about it but the sizes of groups is derived."""
    if e.primitive is _compat.RAGGED_DOT:
        return (
            len(graph.data(e)) == 1
            and kernel_axes(e, graph.data(e)[0]) is not None
            and not any(graph.fact(a).derived for a in e.inputs[:2] if a is not graph.data(e)[0])
        )
    alone = len(graph.data(e)) == len(graph.derived(e)) == 1
    return alone and linear_in(e, data_slots(graph, e)) and not multiplies(e)


def _over_devices(e: Equation) -> bool:
    """Whether `e` is a sum over devices, and over nothing else: axes that `vmap` made of names are numbers."""
    total = e.primitive in PSUMS and not any(isinstance(a, int) for a in e.params["axes"])
    return total or e.primitive is _compat.reduce_scatter_p


def parameter_step(graph: Graph, e: Equation) -> Atom | None:
    """The parameter that `e` adds to one data value, or multiplies it by; None if it does neither."""
    if e.primitive is p.neg_p and graph.carries(e):
        return Constant(-1.0, jax.typeof(np.float32(-1)))
    if e.primitive not in _SHIFTS | _FACTORS or not graph.carries(e) or len(graph.data(e)) != 1:
        return None
    slot = next(i for i, v in enumerate(e.inputs) if v in graph.data(e))
    other = e.inputs[1 - slot]
    stretched = e.inputs[slot].aval.shape != e.outputs[0].aval.shape
    if stretched or graph.fact(other).derived or (e.primitive is p.div_p and slot == 1):
        return None
    return other


def _interpolates(graph: Graph, core: Equation) -> bool:
    """Whether the kernel is made of literals alone and takes means, as that of `jax.image.resize` does."""
    kernels = [v for v in core.values if not graph.fact(v).derived]
    if len(kernels) != 1 or kernels[0].aval.size > 2**24 or not (e := graph.producer.get(kernels[0])):
        return False
    if not graph.literal(e):
        return False
    axes = kernel_axes(core, graph.data(core)[0]) or {}
    kernel = graph.literal_value(kernels[0])
    sums = kernel.sum(tuple(i for i in range(kernel.ndim) if i not in axes.values()))
    return bool((np.isclose(sums, 1, atol=1e-3) | (sums == 0)).all())


def _forward(graph: Graph, core: Equation, kind: str) -> Draft:
    """The run from `core` on. Of one that interpolates, the next such core, for the next axis, is part."""
    axes = kernel_axes(core, graph.data(core)[0]) if kind in ("dense", "conv") else None
    after: list[Equation] = []
    scales: list[tuple[Equation, Axes]] = []
    value = core.outputs[0]
    while isinstance(value, Value) and (e := graph.reader(value)) is not None:
        if not graph.free(e) or not graph.carries(e) or len(graph.data(e)) != 1:
            break
        if kind == "resize" and kind_of(e.primitive) == "dense" and _interpolates(graph, e):
            pass
        elif e.primitive in _MOVES or _over_devices(e):
            moved = _move(axes or {}, e)
            # a pool keeps its shape: the reshape after it belongs to the dense layer that it prepares
            if moved is None or (axes is None and _long(e.inputs[0]) != _long(e.outputs[0])):
                break
            axes = moved if axes is not None else None
        else:
            other = parameter_step(graph, e)
            if other is None or (axes is None and e.primitive in _SHIFTS):
                break
            if axes is not None:
                varying = _varying(graph, other)
                if e.primitive in _FACTORS and not varying <= axes.keys():
                    break
                if e.primitive in _FACTORS or e.primitive is p.sub_p:
                    scales.append((e, {a: axes[a] for a in sorted(varying & axes.keys())}))
        after.append(e)
        value = e.outputs[0]
    assert isinstance(value, Value)
    linear = None
    if axes is not None:
        slot = next(i for i, v in enumerate(core.inputs) if v is graph.data(core)[0])
        linear = Linear((), core, slot, tuple(after), tuple(scales), nonneg=graph.fact(core.inputs[slot]).nonneg)
    return graph.claim(Draft(kind, kind, [core, *after], value, core, linear))


def _backward(graph: Graph, draft: Draft, linear: Linear) -> None:
    before: list[Equation] = []
    value, reader = graph.data(linear.core)[0], linear.core
    while (e := graph.producer.get(value)) is not None and graph.reader(value) is reader:
        if not graph.free(e) or not graph.carries(e) or len(graph.data(e)) != 1 or len(e.outputs) != 1:
            break
        movable = e.primitive in _MOVES or (e.primitive is p.pad_p and e.inputs[0] in graph.data(e))
        if not movable and parameter_step(graph, e) is None:
            break
        before.append(e)
        value, reader = graph.data(e)[0], e
    if before:
        shifts = any(e.primitive in _SHIFTS or e.primitive is p.pad_p and not _zero_pad(graph, e) for e in before)
        draft.linear = dataclasses.replace(
            linear, before=tuple(before[::-1]), shifted=shifts, nonneg=linear.nonneg and not shifts
        )
        draft.equations.extend(before)
        graph.claim(draft)


def _long(atom: Atom) -> list[int]:
    return [n for n in atom.aval.shape if n != 1]


def _zero_pad(graph: Graph, e: Equation) -> bool:
    """Whether a pad fills with the literal 0, cast or not."""
    value = e.inputs[1]
    while isinstance(value, Value):
        cast = graph.producer.get(value)
        if cast is None or cast.primitive not in _SAME_SHAPE:
            return False
        value = cast.inputs[0]
    return isinstance(value, Constant) and not np.any(np.asarray(value.value))


def kernel_axes(core: Equation, data: Atom) -> Axes | None:
    """Which axes of the core's output are output axes of its kernel; None for a core without a kernel."""
    if core.primitive is _compat.RAGGED_DOT:  # (m, k) x (groups, k, n) -> (m, n)
        rows = core.inputs[0] is data and core.params["ragged_dot_dimension_numbers"] == _ROWS
        return {1: 2} if rows and core.params["group_offset"] is None else None
    if core.primitive is p.conv_general_dilated_p:
        numbers = core.params["dimension_numbers"]
        return {numbers.out_spec[1]: numbers.rhs_spec[0]} if core.inputs[0] is data else {}
    if core.primitive is p.dot_general_p:
        (contract, batch) = core.params["dimension_numbers"]
        slot = 1 if core.inputs[0] is data else 0
        kernel, other = core.inputs[slot], core.inputs[1 - slot]
        free = [i for i in range(kernel.aval.ndim) if i not in (*contract[slot], *batch[slot])]
        batches = len(batch[0])
        skip = batches + (other.aval.ndim - len(contract[0]) - batches if slot == 1 else 0)
        return {**dict(enumerate(batch[slot])), **{skip + j: a for j, a in enumerate(free)}}
    return None


def _move(axes: Axes, e: Equation) -> Axes | None:
    """Where the axes lie after a reshape or transpose; None where the value is repeated."""
    prim, old, new = e.primitive, e.inputs[0].aval.shape, e.outputs[0].aval.shape
    if prim in _SAME_SHAPE | PSUMS:
        return axes
    if prim is _compat.reduce_scatter_p:  # of the axis that is scattered each device has its own part, or it is gone
        scattered, gone = e.params["scatter_dimension"], not e.params["tiled"]
        return {i - (gone and i > scattered): axis for i, axis in axes.items() if i != scattered}
    if prim is p.transpose_p:
        return {i: axes[j] for i, j in enumerate(e.params["permutation"]) if j in axes}
    if prim is p.squeeze_p:
        kept = [i for i in range(len(old)) if i not in {d % len(old) for d in e.params["dimensions"]}]
        return {i: axes[j] for i, j in enumerate(kept) if j in axes}
    if prim is p.broadcast_in_dim_p:
        if e.outputs[0].aval.size != e.inputs[0].aval.size:
            return None
        return {new_axis: axes[i] for i, new_axis in enumerate(e.params["broadcast_dimensions"]) if i in axes}
    return {j: axes[i] for i, j in _aligned(old, new).items() if i in axes}


def _aligned(old: tuple[int, ...], new: tuple[int, ...]) -> Axes:
    """Axes that a reshape leaves as they are: those longer than one where they agree, else equal ends."""
    long_old, long_new = ([i for i, n in enumerate(s) if n != 1] for s in (old, new))
    if [old[i] for i in long_old] == [new[j] for j in long_new]:
        return dict(zip(long_old, long_new, strict=True))
    kept: Axes = {}
    for step in (1, -1):
        for i, j in zip(range(len(old))[::step], range(len(new))[::step], strict=False):
            if old[i] != new[j]:
                break
            kept[i] = j
    return kept


def _varying(graph: Graph, atom: Atom) -> set[int]:
    """Axes along which a parameter may take different values."""
    shape = atom.aval.shape
    full = {i for i, n in enumerate(shape) if n > 1}
    e = graph.producer.get(atom) if isinstance(atom, Value) else None
    if isinstance(atom, Constant) or e is None or not full:
        return set() if isinstance(atom, Constant) and atom.aval.size == 1 or not full else full
    if e.primitive is p.broadcast_in_dim_p:
        inner = _varying(graph, e.inputs[0])
        return {new for i, new in enumerate(e.params["broadcast_dimensions"]) if i in inner} & full
    if e.primitive is p.reshape_p:
        kept, inner = _aligned(e.inputs[0].aval.shape, shape), _varying(graph, e.inputs[0])
        return {kept[i] for i in inner} & full if inner <= kept.keys() else full
    if e.primitive in ELEMENTWISE:
        return set().union(*(_varying(graph, a) for a in e.inputs)) & full
    return full
