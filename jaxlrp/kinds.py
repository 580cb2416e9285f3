"""What a primitive is, before what a rule does with it: one table, primitive -> kind.

The kind an equation ends up with also depends on which operands carry data: `mul` of one data value and a parameter is
a scale, of two data values a product; `recognise` decides that. An unknown primitive that carries relevance is an
error which prints the line that registers it.
"""

from __future__ import annotations

from typing import Any

from jax import lax
from jax.extend.core import primitives as p

from . import _compat
from .errors import InputError, SelectorError

KINDS = (
    "dense",
    "conv",
    "scale",
    "embedding",
    "batch_norm",
    "layer_norm",
    "rms_norm",
    "group_norm",
    "local_response_norm",
    "activation",
    "softmax",
    "attention",
    "add",
    "product",
    "matmul",
    "max_pool",
    "avg_pool",
    "reduce",
    "resize",
    "structural",
    "blocked",
    "unknown",
)

# y_i depends on x_i alone, and not linearly
_ACTIVATIONS = (
    p.tanh_p, p.logistic_p, p.exp_p, p.exp2_p, p.expm1_p, p.log_p, p.log1p_p, p.sqrt_p, p.rsqrt_p, p.cbrt_p,
    p.sin_p, p.cos_p, p.tan_p, p.asin_p, p.acos_p, p.atan_p, p.sinh_p, p.cosh_p, p.asinh_p, p.acosh_p, p.atanh_p,
    p.erf_p, p.erfc_p, p.erf_inv_p, p.lgamma_p, p.digamma_p, p.bessel_i0e_p, p.bessel_i1e_p,
    p.abs_p, p.integer_pow_p, p.square_p, p.pow_p, p.clamp_p,
)  # fmt: skip

# relevance follows the value: each output element is one input element, or a constant
STRUCTURAL = frozenset((
    p.reshape_p, p.transpose_p, p.broadcast_in_dim_p, p.squeeze_p, p.slice_p, p.dynamic_slice_p,
    p.dynamic_update_slice_p, p.pad_p, p.concatenate_p, p.rev_p, p.gather_p, p.select_n_p, p.convert_element_type_p,
    p.copy_p, p.reduce_precision_p, p.sharding_constraint_p, p.device_put_p, p.name_p, lax.split_p,
    *_compat.MOVES, p.all_gather_p, p.all_to_all_p, p.ppermute_p, _compat.pvary_p,
))  # fmt: skip

# sums over the devices of a shard_map
PSUMS = frozenset((p.psum_p, _compat.psum_invariant_p))

# no relevance passes: zero derivative everywhere, or declared constant by the user
_BLOCKED = (
    p.stop_gradient_p, p.sign_p, p.floor_p, p.ceil_p, p.round_p, p.is_finite_p, p.nextafter_p,
    p.eq_p, p.ne_p, p.lt_p, p.le_p, p.gt_p, p.ge_p, p.and_p, p.or_p, p.not_p, p.xor_p, p.argmax_p, p.argmin_p,
    p.reduce_and_p, p.reduce_or_p, p.bitcast_convert_type_p, p.population_count_p, p.clz_p,
    p.shift_left_p, p.shift_right_logical_p, p.shift_right_arithmetic_p,
)  # fmt: skip

_TABLE: dict[Any, str] = {
    p.dot_general_p: "dense",
    p.conv_general_dilated_p: "conv",
    p.add_p: "add",
    p.sub_p: "add",
    p.add_jaxvals_p: "add",
    p.neg_p: "scale",
    p.mul_p: "product",
    p.div_p: "product",
    p.max_p: "max_pool",
    p.min_p: "max_pool",
    p.reduce_max_p: "max_pool",
    p.reduce_min_p: "max_pool",
    p.reduce_window_max_p: "max_pool",
    p.reduce_window_min_p: "max_pool",
    p.reduce_window_sum_p: "avg_pool",
    p.reduce_sum_p: "reduce",
    p.cumsum_p: "reduce",
    p.pmax_p: "max_pool",
    p.pmin_p: "max_pool",
    _compat.reduce_scatter_p: "reduce",
    **dict.fromkeys(PSUMS, "reduce"),
    **dict.fromkeys(_ACTIVATIONS, "activation"),
    **dict.fromkeys(STRUCTURAL, "structural"),
    **dict.fromkeys(_BLOCKED, "blocked"),
}

# output element i reads element i (or the broadcast one) of each operand
ELEMENTWISE = frozenset((
    *_ACTIVATIONS, p.add_p, p.sub_p, p.add_jaxvals_p, p.neg_p, p.mul_p, p.div_p, p.max_p, p.min_p, p.select_n_p,
    p.convert_element_type_p, p.copy_p, p.reduce_precision_p, p.stop_gradient_p, p.sign_p, p.floor_p, p.ceil_p,
    p.round_p, p.is_finite_p, p.eq_p, p.ne_p, p.lt_p, p.le_p, p.gt_p, p.ge_p, p.and_p, p.or_p, p.not_p, p.xor_p,
))  # fmt: skip

WRAPPERS = frozenset((p.jit_p, p.custom_jvp_call_p, p.custom_vjp_call_p, p.remat_p, p.closed_call_p))
LOOPS = frozenset((p.scan_p, p.cond_p, _compat.shard_map_p))


def kind_of(primitive: Any) -> str:
    """The kind that `primitive` has on its own, "unknown" where the table has none."""
    return _TABLE.get(primitive, "unknown")


def check(kind: str) -> str:
    """`kind` itself; raises `SelectorError` naming the known kinds if it is none of them."""
    if kind not in KINDS:
        raise SelectorError(f"unknown kind {kind!r}; the kinds are: {', '.join(KINDS)}")
    return kind


def register(primitive: Any, kind: str) -> None:
    """Teaches jaxlrp a primitive: `jaxlrp.kinds.register(my_p, "activation")`.

    Only the kinds that hold for a single equation make sense: "activation" (element-wise: relevance passes),
    "structural" (relevance follows the value, by the primitive's own transpose), "reduce" (linear in its data:
    proportional), "blocked" (no relevance).

    Raises:
      InputError: the kind is not one of these.
    """
    allowed = ("activation", "structural", "reduce", "blocked")
    if kind not in allowed:
        raise InputError(f"cannot register {primitive} as {kind!r}; write one of: {', '.join(allowed)}")
    _TABLE[primitive] = kind
