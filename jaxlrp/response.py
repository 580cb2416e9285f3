"""Local response normalisation, found by data flow: y = x g(h), with h a windowed sum of x^2 and g a falling power.

    h = sum over a window of x_i^2,        g(h) = (k + b h)^-c

Three stretches in a row make one: moves and padding of x up to its square; linear steps of the squares, which all
positions share (windowed sums, convolutions, shifted copies added up, differences of running sums) or which are one
matrix between channels; element-wise steps that come to a power of h. The window makes it local: a statistic that is
repeated over the positions it was summed over (RMSNorm, L2 normalisation) is another layer, and so is x / (1 + x^2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from . import _compat
from .graph import Draft, Graph, small
from .program import Atom, Constant, Equation, Value
from .runs import _varying, _zero_pad

_COPIES = frozenset((p.convert_element_type_p, p.copy_p, p.reduce_precision_p, p.name_p))
# of these only what neither drops nor repeats an element counts as a move
_RESHAPES = _COPIES | {p.reshape_p, p.transpose_p, p.squeeze_p, p.broadcast_in_dim_p}
_SHIFTED = frozenset((p.pad_p, p.slice_p, p.concatenate_p, lax.split_p, *_compat.MOVES))
_SUMS = frozenset((p.add_p, p.sub_p, p.add_jaxvals_p))
_PRODUCTS = frozenset((p.mul_p, p.div_p))
_WINDOWS = frozenset((p.reduce_window_sum_p, p.conv_general_dilated_p, p.cumsum_p, p.reduce_sum_p, p.dot_general_p))
_ROOTS = {p.sqrt_p: 0.5, p.rsqrt_p: -0.5, p.cbrt_p: 1 / 3, p.square_p: 2.0}


class Parts(NamedTuple):
    """A local response normalisation taken apart.

    before: the steps from x to h. squares: those among them that square x, or take its absolute value, so that without
    them `before` is the linear map from x^2 to h. matrix: the step among them that multiplies the channels by a matrix,
    and which of its operands that is. shifted: scalars are added on the way, as where a sum starts with k. copies: x,
    and x cast. total: h. after: the steps from h (and x) to y.
    """

    before: tuple[Equation, ...]
    squares: frozenset[Equation]
    copies: frozenset[Value]
    total: Value
    after: tuple[Equation, ...]
    matrix: tuple[Equation, int] | None
    shifted: bool


def claim_response(graph: Graph) -> None:
    for e in reversed(graph.equations):
        if e.primitive not in _PRODUCTS or not graph.free(e) or not graph.carries(e) or len(set(graph.derived(e))) != 2:
            continue
        entry = graph.dominator(graph.derived(e))
        if entry is None or not graph.fact(entry).data:
            continue
        region = graph.between(e, entry)
        found = parts(region, entry, e.outputs[0])
        if (
            found is not None
            and set(region) == {*found.before, *found.after}
            and _sums_evenly(graph, found)
            and _is_power(graph, found, e.outputs[0])
            and graph.sealed(region, e.outputs[0])
        ):
            graph.claim(Draft("local_response_norm", "local_response_norm", region, e.outputs[0], e))


def parts(steps: Sequence[Equation], x: Value, y: Value) -> Parts | None:
    """The parts of the layer that leads from x to y by these steps; None where none of them sums squares of x.

    Steps that belong to none of the three stretches are left out.
    """
    steps = _leading(steps, {y})
    moved, squared, copies = {x}, set[Value](), {x}
    before, squares, shifts = list[Equation](), set[Equation](), set[Equation]()
    total: Value | None = None
    matrix: tuple[Equation, int] | None = None
    for e in steps:
        sources = {v for v in e.values if v in moved or v in squared}
        if not sources:
            continue
        out = e.outputs[0]
        if sources <= moved:
            if _squares(e):
                squared.add(out)
                squares.add(e)
            elif e.primitive is p.abs_p:
                moved.add(out)
                squares.add(e)
            elif e.primitive in _SHIFTED or _reshapes(e):
                moved.update(e.outputs)
                if e.primitive in _COPIES and sources <= copies:
                    copies.add(out)
            else:
                continue
        elif sources <= squared and (_spreads(e, squared) or _reshapes(e) or _scalar_step(e, squared)):
            squared.update(e.outputs)
            if _spreads(e, squared):
                total, slot = out, _matrix_slot(e, squared)
                matrix = (e, slot) if slot is not None else matrix
            elif e.primitive in _SUMS:
                shifts.add(e)
        else:
            continue
        before.append(e)
    if total is None:
        return None
    before = _leading(before, {total, *copies})
    shifted = any(e in shifts for e in before)
    reached, after = {total}, list[Equation]()
    for e in steps:
        if any(v in reached for v in e.values):
            reached.update(e.outputs)
            after.append(e)
    return Parts(tuple(before), frozenset(squares), frozenset(copies), total, tuple(after), matrix, shifted)


def _leading(steps: Sequence[Equation], ends: set[Value]) -> list[Equation]:
    """The steps that lead to any of these values."""
    needed, kept = set(ends), list[Equation]()
    for e in reversed(steps):
        if any(v in needed for v in e.outputs):
            needed.update(e.values)
            kept.append(e)
    return kept[::-1]


def _squares(e: Equation) -> bool:
    """Whether `e` is the square of its operand. An exponent that is no literal is none of a square."""
    match e.primitive:
        case p.mul_p:
            return e.inputs[0] is e.inputs[1]
        case p.integer_pow_p:
            return e.params["y"] == 2
        case p.pow_p:
            return isinstance(e.inputs[1], Constant) and bool(np.all(np.asarray(e.inputs[1].value) == 2))
    return e.primitive is p.square_p


def _reshapes(e: Equation) -> bool:
    return e.primitive in _RESHAPES and e.inputs[0].aval.size == e.outputs[0].aval.size


def _spreads(e: Equation, squared: set[Value]) -> bool:
    """Whether `e` sums squares of several positions, or moves them against each other."""
    several = e.primitive in _SUMS and all(v in squared for v in e.inputs)
    return several or e.primitive in _WINDOWS or e.primitive in _SHIFTED


def _scalar_step(e: Equation, squared: set[Value]) -> bool:
    """Whether `e` multiplies by a scalar, or adds what is none of the data (`_sums_evenly` looks at what it adds)."""
    if e.primitive not in _SUMS | _PRODUCTS or len(e.values) > 1 and all(v in squared for v in e.inputs):
        return False
    left, right = e.inputs
    other = right if left in squared else left
    return e.primitive in _SUMS or (small(other) and not (e.primitive is p.div_p and other is left))


def _sums_evenly(graph: Graph, found: Parts) -> bool:
    """Whether every position has the same window with the same weights, zeros beyond the edge; or one matrix is all.

    Then one number, or the matrix's diagonal, says how much of its own square each position has in its sum.
    """
    windows = [e for e in found.before if e.primitive in _WINDOWS or _adds(graph, e)]
    shifts = [e for e in found.before if e.primitive in _SUMS and len(graph.derived(e)) == 1]
    numbers = [a for e in shifts for a in e.inputs if a not in graph.derived(e)]
    if not all(small(a) or not math.isnan(_number(graph, a)) for a in numbers):
        return False
    axes = [i for e in windows for i in _window_axes(e)]
    if len(set(axes)) < len(axes):  # of two windows in a row the edges see less than one window twice as wide
        return False
    if found.matrix is not None:
        return len(windows) == 1 and not shifts and not any(e.primitive in _SHIFTED for e in found.before)
    shifted = set[Value]()
    for e in found.before:  # after the k that a sum starts with come further terms, and no window
        if any(v in shifted for v in e.values) and e.primitive not in _SUMS | _PRODUCTS | _RESHAPES | {p.slice_p}:
            return False
        if e in shifts or any(v in shifted for v in e.values):
            shifted.update(e.outputs)
    return bool(windows) and all(_even(graph, e) for e in found.before) and _keeps_edges(graph, found)


def _keeps_edges(graph: Graph, found: Parts) -> bool:
    """Whether what a slice cut off is gone only from copies that are shifted: those are summed and moved no more.

    Zeros put in place of a cut end would else make the edges' windows differ from those of the middle.
    """
    cut, filled = set[Value](), set[Value]()
    for e in found.before:
        sources = set(graph.derived(e))
        moves = e.primitive in _SHIFTED - {p.concatenate_p, *_compat.MOVES}
        if sources & filled and (moves or e.primitive in _WINDOWS - {p.reduce_sum_p}):
            return False
        fills = e.primitive is p.pad_p or (e.primitive is p.concatenate_p and len(graph.derived(e)) < len(e.inputs))
        if fills and sources & cut:
            slices = [graph.producer[v] for v in sources]
            starts = [q.params["start_indices"] for q in slices if q.primitive is p.slice_p]
            lows = [low for low, _, _ in e.params["padding_config"]] if e.primitive is p.pad_p else []
            if len(starts) != 1 or not lows or tuple(lows) == tuple(starts[0]):
                return False
            filled.update(e.outputs)
        if sources & filled:
            filled.update(e.outputs)
        if e.primitive is p.slice_p or sources & cut:
            cut.update(e.outputs)
    return True


def _window_axes(e: Equation) -> list[int]:
    """The axes along which `e` sums by itself."""
    if e.primitive is p.reduce_window_sum_p:
        return [i for i, n in enumerate(e.params["window_dimensions"]) if n > 1]
    if e.primitive is p.conv_general_dilated_p:
        numbers, kernel = e.params["dimension_numbers"], e.inputs[1].aval.shape
        return [i for i, j in zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], strict=True) if kernel[j] > 1]
    return []


def _adds(graph: Graph, e: Equation) -> bool:
    return e.primitive in _SUMS and len(graph.derived(e)) == 2


def _even(graph: Graph, e: Equation) -> bool:
    """Whether `e` treats all positions alike, up to zeros at the edges."""
    prim = e.primitive
    if prim is p.pad_p:
        inner = any(interior for _, _, interior in e.params["padding_config"])
        return e.inputs[0] in graph.derived(e) and not inner and _zero_pad(graph, e)
    if prim is p.slice_p:
        return e.params["strides"] is None or set(e.params["strides"]) == {1}
    if prim is p.concatenate_p:
        return all(a in graph.derived(e) or _number(graph, a) == 0 for a in e.inputs)
    if prim is p.reduce_window_sum_p:
        return set(e.params["window_strides"]) == set(e.params["base_dilation"]) == {1}
    if prim is p.conv_general_dilated_p:
        return _even_conv(graph, e)
    return prim is not p.dot_general_p and (prim not in _SUMS | _PRODUCTS or _same_shape(graph, e))


def _same_shape(graph: Graph, e: Equation) -> bool:
    """Whether `e` repeats no value of the data."""
    return all(v.aval.shape == e.outputs[0].aval.shape for v in graph.derived(e))


def _even_conv(graph: Graph, e: Equation) -> bool:
    """A convolution that sees one channel, or each channel on its own with the same weights for all."""
    if len(graph.derived(e)) != 1 or e.inputs[0] not in graph.derived(e) or e.params["batch_group_count"] != 1:
        return False
    if set(e.params["window_strides"]) | set(e.params["lhs_dilation"]) != {1}:
        return False
    kernel, (out, into, *_) = e.inputs[1], e.params["dimension_numbers"].rhs_spec
    outputs, inputs = kernel.aval.shape[out], kernel.aval.shape[into]
    if inputs != 1 or outputs != e.params["feature_group_count"]:
        return False
    constant = graph.block.constants.get(kernel) if isinstance(kernel, Value) else kernel.value
    if constant is not None and not isinstance(constant, jax.core.Tracer):
        return bool(np.all(np.asarray(constant) == np.take(constant, [0], out)))
    return outputs == 1 or out not in _varying(graph, kernel)


def _matrix_slot(e: Equation, squared: set[Value]) -> int | None:
    """The operand of `e` that is a square matrix by which it multiplies one axis of its data; None if none is."""
    if e.primitive not in (p.dot_general_p, p.conv_general_dilated_p) or sum(a in squared for a in e.inputs) != 1:
        return None
    slot = 1 if e.inputs[0] in squared else 0
    if not isinstance(e.inputs[slot], Value):
        return None
    if e.primitive is p.dot_general_p:
        contract, batch = e.params["dimension_numbers"]
        kernel = e.inputs[slot].aval.shape
        return slot if len(set(kernel)) == 1 and len(kernel) == 2 and len(contract[0]) == 1 and not batch[0] else None
    shape, numbers = e.inputs[1].aval.shape, e.params["dimension_numbers"]
    out, into, *window = (shape[i] for i in numbers.rhs_spec)
    plain = {e.params["feature_group_count"], e.params["batch_group_count"], *window} == {1}
    still = {*e.params["window_strides"], *e.params["lhs_dilation"]} == {1} and not np.any(e.params["padding"])
    return slot if slot == 1 and plain and still and out == into > 1 else None


class _Power(NamedTuple):
    """h^exponent, its logarithm, or x times it. An exponent that is a parameter is NaN."""

    exponent: float
    log: bool = False
    with_x: bool = False


def _is_power(graph: Graph, found: Parts, y: Value) -> bool:
    """Whether `after` multiplies x by a power of k + b h whose exponent is not known to be positive."""
    powers: dict[Value, _Power] = {found.total: _Power(1.0)} | {v: _Power(0.0, with_x=True) for v in found.copies}
    for e in found.after:
        known = all(v in powers for v in graph.derived(e)) and (_reshapes(e) or _same_shape(graph, e))
        made = _power(graph, e, powers) if known else None
        if made is None:
            return False
        powers[e.outputs[0]] = made
    return powers[y].with_x and not powers[y].exponent > 0


def _power(graph: Graph, e: Equation, powers: dict[Value, _Power]) -> _Power | None:
    """What `e` makes of powers; None where that is none."""
    prim = e.primitive
    known = [powers.get(a) if isinstance(a, Value) else None for a in e.inputs]
    left, right = (*known, None)[:2]
    if left is not None and right is not None:
        if prim not in _PRODUCTS or left.log or right.log or right.with_x and (prim is p.div_p or left.with_x):
            return None
        sign = 1 if prim is p.mul_p else -1
        return _Power(left.exponent + sign * right.exponent, with_x=left.with_x or right.with_x)
    if left is None and right is not None:  # a parameter first: k + h, b h, 1 / h, c log h
        if prim is p.div_p and not right.log and not right.with_x:
            return _Power(-right.exponent)
        if prim is p.mul_p:
            return right._replace(exponent=right.exponent * _number(graph, e.inputs[0])) if right.log else right
        return right if prim in _SUMS - {p.sub_p} and right == _Power(1.0) else None
    if left is None:
        return None
    number = _number(graph, e.inputs[1]) if len(e.inputs) == 2 else math.nan
    if _reshapes(e):
        return left
    if prim in _PRODUCTS:
        factor = number if prim is p.mul_p else 1 / (number or math.nan)
        return left._replace(exponent=left.exponent * factor) if left.log else left
    if left.with_x or (prim in _SUMS and left != _Power(1.0)):
        return None
    if left.log:
        return {p.exp_p: _Power(left.exponent), p.neg_p: left._replace(exponent=-left.exponent)}.get(prim)
    if prim is p.log_p or (prim is p.log1p_p and left.exponent == 1):
        return _Power(left.exponent, log=True)
    if prim in _SUMS:
        return left
    factors = {**_ROOTS, p.pow_p: number, p.integer_pow_p: e.params.get("y", math.nan)}
    return _Power(left.exponent * factors[prim]) if prim in factors else None


def _number(graph: Graph, atom: Atom | None) -> float:
    """The number that `atom` holds everywhere, if it is written into the program; else NaN."""
    while isinstance(atom, Value):
        e = graph.producer.get(atom)
        if e is None or e.primitive not in _RESHAPES:
            return math.nan
        atom = e.inputs[0]
    return float(np.asarray(atom.value)) if atom is not None and np.size(atom.value) == 1 else math.nan
