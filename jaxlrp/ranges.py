"""Between which bounds every value lies, whatever the inputs: interval arithmetic over the equations.

Where nothing can be negative rules take a cheaper form, and what lies between 0 and 1 is a gate. Bounds hold in real
arithmetic, NaNs and quotients by zero apart; what no line here knows is unbounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from . import _compat
from .kinds import PSUMS
from .program import Atom, Equation, Value

Range = tuple[float, float]
ANY: Range = (-np.inf, np.inf)

_STEPS = (-np.inf, -1.0, 0.0, 1.0, np.inf)

# every element is one of an operand's
_MOVES = frozenset((
    p.reshape_p, p.transpose_p, p.broadcast_in_dim_p, p.squeeze_p, p.slice_p, p.pad_p, p.concatenate_p, p.rev_p,
    p.copy_p, p.reduce_precision_p, p.sharding_constraint_p, p.device_put_p, p.name_p, p.stop_gradient_p, lax.split_p,
    p.reduce_max_p, p.reduce_min_p, p.cummax_p, p.cummin_p, p.reduce_window_max_p, p.reduce_window_min_p,
    p.sort_p, lax.optimization_barrier_p, p.all_gather_p, p.all_to_all_p, p.pmax_p, p.pmin_p,
    *_compat.MOVES, _compat.pvary_p, _compat.all_gather_invariant_p,
))  # fmt: skip


def hull(ranges: Iterable[Range]) -> Range:
    """What holds for a value that may be any of several."""
    lows, highs = zip(*ranges, strict=True)
    return min(lows), max(highs)


def widen(old: Range, new: Range) -> Range:
    """`new`, a bound that moved since `old` put off to the next of -1, 0, 1 and infinity: so a loop's fixpoint ends."""
    low = new[0] if new[0] >= old[0] else max(s for s in _STEPS if s <= new[0])
    high = new[1] if new[1] <= old[1] else min(s for s in _STEPS if s >= new[1])
    return low, high


def of_constant(value: np.ndarray) -> Range:
    if not _real(value.dtype) or not value.size or np.isnan(value).any():
        return ANY
    return float(value.min()), float(value.max())


def bounds(e: Equation, inputs: Sequence[Range], maker: Mapping[Value, Equation]) -> Range:
    """The range of the outputs of `e`, given those of its inputs; `maker`: who makes each value of the block."""
    if not e.outputs or not _real(e.outputs[0].aval.dtype):
        return ANY
    if jnp.issubdtype(e.outputs[0].aval.dtype, np.bool_):
        small, large = inputs[::-1] if e.primitive is p.gt_p else inputs[:2] if e.primitive is p.lt_p else (ANY, ANY)
        return (0.0, 0.0) if small[0] >= large[1] else (0.0, 1.0)  # never so
    if e.primitive in _MOVES or interleaved(e, maker):
        return hull(inputs)
    if e.primitive not in _KNOWN:
        return ANY
    if _guards_nan(e, maker):
        return inputs[1]
    with np.errstate(all="ignore"):
        low, high = map(float, _KNOWN[e.primitive](e, *inputs))
    return ANY if np.isnan([low, high]).any() else (low, high)


def interleaved(e: Equation, maker: Mapping[Value, Equation]) -> list[Equation]:
    """The two pads with zeros that a sum puts into each other's gaps, as `lax.associative_scan` does; else none."""
    pads = [maker[a] for a in e.inputs if isinstance(a, Value) and a in maker]
    if e.primitive is not p.add_p or len(pads) != 2 or any(x.primitive is not p.pad_p for x in pads):
        return []
    filled = [_is_zero(x.inputs[1], maker) for x in pads]
    one, other = map(_padded, pads)
    apart = any(a.isdisjoint(b) for a, b in zip(one, other, strict=True))
    return pads if all(filled) and apart else []


def _is_zero(atom: Atom, maker: Mapping[Value, Equation]) -> bool:
    """Whether it is the literal 0, perhaps handed to the devices of a shard_map."""
    if isinstance(atom, Value):
        e = maker.get(atom)
        return e is not None and e.primitive is _compat.pvary_p and _is_zero(e.inputs[0], maker)
    return bool(np.all(np.asarray(atom.value) == 0))


def _padded(pad: Equation) -> list[set[int]]:
    """Where along each axis of a padded array the operand's elements stand."""
    sizes = zip(pad.inputs[0].aval.shape, pad.outputs[0].aval.shape, strict=True)
    found = zip(sizes, pad.params["padding_config"], strict=True)
    return [{low + i * (gap + 1) for i in range(n)} & set(range(m)) for (n, m), (low, _, gap) in found]


def _guards_nan(e: Equation, maker: Mapping[Value, Equation]) -> bool:
    """Whether `e` is the end of logaddexp(a, b), which is a + b where a - b is NaN: it has the bounds of the rest."""
    if e.primitive is not p.select_n_p or not all(a in maker for a in (e.inputs[0], e.inputs[-1])):
        return False
    is_nan, total = (maker[a] for a in (e.inputs[0], e.inputs[-1]))  # type: ignore[index]
    difference = maker.get(is_nan.inputs[0]) if is_nan.primitive is p.ne_p else None  # type: ignore[arg-type]
    return (
        difference is not None
        and is_nan.inputs[0] is is_nan.inputs[1]
        and (difference.primitive, total.primitive) == (p.sub_p, p.add_p)
        and difference.inputs == total.inputs
    )


def _real(dtype: Any) -> bool:
    return any(jnp.issubdtype(dtype, kind) for kind in (np.floating, np.integer, np.bool_))


# ------------------------------------------------------------------------------------------------------- one by one


def _times(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a * b


def _product(x: Range, y: Range) -> Range:
    corners = [_times(a, b) for a in x for b in y]
    return min(corners), max(corners)


def _power(x: Range, n: int) -> Range:
    if n < 0:
        return _inverse(_power(x, -n))
    ends = [float(np.float64(a) ** n) for a in x]
    inside = [0.0] if n % 2 == 0 and x[0] < 0 < x[1] else []
    return (1.0, 1.0) if n == 0 else (min(ends + inside), max(ends + inside))


def _inverse(x: Range) -> Range:
    if x[0] < 0 < x[1]:
        return ANY
    if x[0] < 0:
        low, high = _inverse((-x[1], -x[0]))
        return -high, -low
    return 1 / x[1] if x[1] else np.inf, 1 / x[0] if x[0] else np.inf


def _sign(x: Range) -> Range:
    """A sum of any number of such."""
    return 0.0 if x[0] >= 0 else -np.inf, 0.0 if x[1] <= 0 else np.inf


def _nonneg(x: Range) -> Range:
    """A product of any number of such; the largest of them, beside their places."""
    return (0.0, np.inf) if x[0] >= 0 else ANY


def _sum(n: int, x: Range) -> Range:
    return _times(n, x[0]), _times(n, x[1])


def _contracted(e: Equation) -> int:
    (axes, _), _ = e.params["dimension_numbers"]
    return math.prod(e.inputs[0].aval.shape[i] for i in axes)


def _divided(e: Equation, x: Range, y: Range) -> Range:
    low, high = _product(x, _inverse(y))
    whole = jnp.issubdtype(e.outputs[0].aval.dtype, np.integer)
    return (math.trunc(low) if whole and np.isfinite(low) else low), high


def _cast(e: Equation, x: Range) -> Range:
    whole = jnp.issubdtype(e.outputs[0].aval.dtype, np.integer)
    low, high = (math.trunc(a) if whole and np.isfinite(a) else a for a in x)
    return low, high


def _rising(f: Callable[[Any], Any], start: float = -np.inf) -> Callable[..., Range]:
    """A function that never falls, defined from `start` on."""
    return lambda e, x: (f(max(x[0], start)), f(max(x[1], start)))


def _within(low: float, high: float) -> Callable[..., Range]:
    return lambda e, *xs: (low, high)


def _all_of(f: Callable[[Iterable[float]], float]) -> Callable[..., Range]:
    return lambda e, x, y: (f((x[0], y[0])), f((x[1], y[1])))


def _same(e: Equation) -> bool:
    return e.inputs[0] is e.inputs[1]


_KNOWN: dict[Any, Callable[..., Range]] = {
    p.add_p: lambda e, x, y: (x[0] + y[0], x[1] + y[1]),
    p.add_jaxvals_p: lambda e, x, y: (x[0] + y[0], x[1] + y[1]),
    p.sub_p: lambda e, x, y: (x[0] - y[1], x[1] - y[0]),
    p.neg_p: lambda e, x: (-x[1], -x[0]),
    p.mul_p: lambda e, x, y: _power(x, 2) if _same(e) else _product(x, y),
    p.div_p: _divided,
    p.max_p: _all_of(max),
    p.min_p: _all_of(min),
    p.clamp_p: lambda e, low, x, high: tuple(min(max(x[i], low[i]), high[i]) for i in (0, 1)),
    p.select_n_p: lambda e, which, *cases: hull(cases),
    p.gather_p: lambda e, x, at: hull((x, (0.0, 0.0), of_constant(np.asarray(e.params["fill_value"] or 0)))),
    p.scatter_p: lambda e, x, at, y: hull((x, y)),
    p.scatter_max_p: lambda e, x, at, y: hull((x, y)),
    p.scatter_min_p: lambda e, x, at, y: hull((x, y)),
    p.scatter_add_p: lambda e, x, at, y: _sign(hull((x, y))),
    p.scatter_mul_p: lambda e, x, at, y: _nonneg(hull((x, y))),
    p.select_and_gather_add_p: lambda e, x, y: hull((x, (0.0, 0.0))),
    p.select_and_scatter_add_p: lambda e, x, y: _sign(x),
    p.top_k_p: lambda e, x: _nonneg(x),
    p.approx_top_k_p: lambda e, x: _nonneg(x),
    p.dynamic_slice_p: lambda e, x, *at: x,
    p.dynamic_update_slice_p: lambda e, x, y, *at: hull((x, y)),
    p.convert_element_type_p: _cast,
    p.abs_p: lambda e, x: (max(x[0], -x[1], 0.0), max(-x[0], x[1])),
    p.square_p: lambda e, x: _power(x, 2),
    p.integer_pow_p: lambda e, x: _power(x, e.params["y"]),
    p.reduce_sum_p: lambda e, x: _sum(e.inputs[0].aval.size // max(e.outputs[0].aval.size, 1), x),
    p.dot_general_p: lambda e, x, y: _sum(_contracted(e), _product(x, y)),
    _compat.RAGGED_DOT: lambda e, x, y, *sizes: _sign(_product(x, y)),
    p.conv_general_dilated_p: lambda e, x, y: _sign(_product(x, y)),
    p.reduce_window_sum_p: lambda e, x: _sign(x),
    p.cumsum_p: lambda e, x: _sign(x),
    p.reduce_prod_p: lambda e, x: _nonneg(x),
    p.cumprod_p: lambda e, x: _nonneg(x),
    p.rem_p: lambda e, x, y: hull((x, (0.0, 0.0))),
    p.exp_p: _rising(np.exp),
    p.exp2_p: _rising(np.exp2),
    p.expm1_p: _rising(np.expm1),
    p.log_p: _rising(np.log, 0.0),
    p.log1p_p: _rising(np.log1p, -1.0),
    p.sqrt_p: _rising(np.sqrt, 0.0),
    p.rsqrt_p: lambda e, x: _inverse((np.sqrt(max(x[0], 0.0)), np.sqrt(max(x[1], 0.0)))),
    p.cbrt_p: _rising(np.cbrt),
    p.tanh_p: _rising(np.tanh),
    p.logistic_p: _rising(lambda a: 1 / (1 + np.exp(-a))),
    p.erf_p: _rising(math.erf),
    p.erfc_p: _within(0.0, 2.0),
    p.erf_inv_p: lambda e, x: _sign(x),
    p.igamma_p: _within(0.0, 1.0),
    p.igammac_p: _within(0.0, 1.0),
    p.regularized_incomplete_beta_p: _within(0.0, 1.0),
    p.bessel_i0e_p: _within(0.0, 1.0),
    p.bessel_i1e_p: lambda e, x: _sign(x),
    p.cosh_p: _within(1.0, np.inf),
    p.acosh_p: _within(0.0, np.inf),
    p.acos_p: _within(0.0, np.pi),
    p.asin_p: lambda e, x: _sign(x),
    p.atanh_p: lambda e, x: _sign(x),
    p.sinh_p: _rising(np.sinh),
    p.asinh_p: _rising(np.arcsinh),
    p.atan_p: _rising(np.arctan),
    p.sin_p: _within(-1.0, 1.0),
    p.cos_p: _within(-1.0, 1.0),
    p.floor_p: _rising(np.floor),
    p.ceil_p: _rising(np.ceil),
    p.round_p: _rising(np.round),
    p.sign_p: _rising(np.sign),
    p.iota_p: _within(0.0, np.inf),
    p.axis_index_p: _within(0.0, np.inf),
    p.ppermute_p: lambda e, x: hull((x, (0.0, 0.0))),  # zeros for a device that receives nothing
    **dict.fromkeys((*PSUMS, _compat.reduce_scatter_p), lambda e, x: _sign(x)),
}
