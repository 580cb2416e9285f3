"""What a primitive is, before what a rule does with it: one table, primitive -> kind.

The kind an equation ends up with also depends on which operands carry data: `mul` of one data value and a parameter is
a scale, of two data values a product; `single` decides that. A primitive without a kind that carries relevance is an
error: it gives the reason, for the named exceptions, and for all others the line that registers them.
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
    "complex",
    "structural",
    "blocked",
    "unknown",
)

# y_i depends on x_i alone, and not linearly; of those with several operands one alone may carry data
_ACTIVATIONS = (
    p.tanh_p, p.logistic_p, p.exp_p, p.exp2_p, p.expm1_p, p.log_p, p.log1p_p, p.sqrt_p, p.rsqrt_p, p.cbrt_p,
    p.sin_p, p.cos_p, p.tan_p, p.asin_p, p.acos_p, p.atan_p, p.sinh_p, p.cosh_p, p.asinh_p, p.acosh_p, p.atanh_p,
    p.erf_p, p.erfc_p, p.erf_inv_p, p.lgamma_p, p.digamma_p, p.bessel_i0e_p, p.bessel_i1e_p,
    p.abs_p, p.integer_pow_p, p.square_p, p.pow_p, p.clamp_p, p.rem_p, p.atan2_p, p.nextafter_p,
    p.polygamma_p, p.zeta_p, p.igamma_p, p.igammac_p, p.regularized_incomplete_beta_p, p.random_gamma_p,
    *_compat.ACTIVATIONS, *_compat.POLYNOMIAL,
)  # fmt: skip

# relevance follows the value: each output element is one input element, or a constant
STRUCTURAL = frozenset((
    p.reshape_p, p.transpose_p, p.broadcast_in_dim_p, p.squeeze_p, p.slice_p, p.dynamic_slice_p,
    p.dynamic_update_slice_p, p.pad_p, p.concatenate_p, p.rev_p, p.gather_p, p.select_n_p, p.convert_element_type_p,
    p.copy_p, p.reduce_precision_p, p.sharding_constraint_p, p.device_put_p, p.name_p, lax.split_p,
    p.scatter_p, p.sort_p, p.top_k_p, p.approx_top_k_p, lax.optimization_barrier_p, p.select_and_gather_add_p,
    p.real_p, p.imag_p, p.complex_p, p.all_gather_p, p.all_to_all_p, p.ppermute_p, _compat.pvary_p,
    _compat.all_gather_invariant_p, *_compat.MOVES,
))  # fmt: skip

# sums over the devices of a shard_map
PSUMS = frozenset((p.psum_p, _compat.psum_invariant_p))

# no relevance passes: zero derivative everywhere, or declared constant by the user
_BLOCKED = (
    p.stop_gradient_p, p.sign_p, p.floor_p, p.ceil_p, p.round_p, p.is_finite_p, *_compat.COMPARISONS,
    p.eq_p, p.ne_p, p.lt_p, p.le_p, p.gt_p, p.ge_p, p.and_p, p.or_p, p.not_p, p.xor_p, p.argmax_p, p.argmin_p,
    p.reduce_and_p, p.reduce_or_p, p.reduce_xor_p, p.bitcast_convert_type_p, p.population_count_p, p.clz_p,
    p.shift_left_p, p.shift_right_logical_p, p.shift_right_arithmetic_p, lax.mulhi_p,
    p.random_bits_p, p.random_seed_p, p.random_split_p, p.random_fold_in_p,
)  # fmt: skip

# the largest (smallest) of some values, and smooth maxima
_MAXIMA = (
    p.max_p, p.min_p, p.reduce_max_p, p.reduce_min_p, p.reduce_window_max_p, p.reduce_window_min_p,
    p.cummax_p, p.cummin_p, p.cumlogsumexp_p, p.scatter_max_p, p.scatter_min_p, p.pmax_p, p.pmin_p,
)  # fmt: skip

# linear in their data
_SUMS = frozenset((
    p.reduce_sum_p, p.cumsum_p, p.scatter_add_p, lax.scatter_sub_p, p.select_and_scatter_add_p,
    p.triangular_solve_p, p.tridiagonal_solve_p, p.linear_solve_p, _compat.reduce_scatter_p,
))  # fmt: skip

_TABLE: dict[Any, str] = {
    p.dot_general_p: "dense",
    _compat.RAGGED_DOT: "dense",
    p.conv_general_dilated_p: "conv",
    p.add_p: "add",
    p.sub_p: "add",
    p.add_jaxvals_p: "add",
    p.neg_p: "scale",
    p.fft_p: "complex",
    p.conj_p: "complex",
    p.reduce_window_sum_p: "avg_pool",
    **dict.fromkeys((p.mul_p, p.div_p, p.reduce_prod_p, p.cumprod_p, p.scatter_mul_p), "product"),
    **dict.fromkeys(_MAXIMA, "max_pool"),
    **dict.fromkeys(_SUMS | PSUMS, "reduce"),
    **dict.fromkeys(_ACTIVATIONS, "activation"),
    **dict.fromkeys(STRUCTURAL, "structural"),
    **dict.fromkeys(_BLOCKED, "blocked"),
}

# the operands in which these are linear, all of them together; any other "reduce" is linear in one
LINEAR_IN = {
    p.scatter_add_p: (0, 2),
    lax.scatter_sub_p: (0, 2),
    p.select_and_scatter_add_p: (0, 1),
    p.triangular_solve_p: (1,),
    p.tridiagonal_solve_p: (3,),
}

# Primitives that relevance cannot pass, by name, as many of them have no public other: {reason: names}.
_WITHOUT_RULE = {
    "the length of the loop depends on data, or it stands in a shard_map; write lax.fori_loop with constant bounds, or "
    "lax.scan": "while",
    "the matrix of a linear system depends on data, whose elements have no share of the solution": (
        "triangular_solve tridiagonal_solve custom_linear_solve"
    ),
    "an element of a matrix has no share of its decomposition; explain what is computed before it": (
        "cholesky cholesky_update eig eigh hessenberg householder_product lu ormqr qr schur svd symmetric_product "
        "tridiagonal"
    ),
    "it is computed outside JAX; write it in jax.numpy": "pure_callback io_callback ffi_call buffer_callback",
    "a kernel that is known only as a program for the device; explain its plain version in jax.numpy": (
        "pallas_call core_map mpmd_map cudnn_fusion custom_partitioning scaled_matmul scaled_matmul_wrapper"
    ),
    'attention by cuDNN; write jax.nn.dot_product_attention(..., implementation="xla")': (
        "dot_product_attention_fwd dot_product_attention_fwd_wrapper dot_product_attention_fp8_fwd "
        "dot_product_attention_fp8_fwd_wrapper"
    ),
    "it reduces by a function of the caller's; write jnp.sum, jnp.max, or lax.add and lax.max with their own starts": (
        "reduce reduce_window"
    ),
    "an experimental sparse matrix; multiply by its .todense(), or register the product (jax.experimental.sparse has "
    'its primitive) as "reduce", where the matrix is constant': (
        "bcoo_dot_general bcoo_dot_general_sampled bcoo_extract bcoo_fromdense bcoo_sort_indices bcoo_spdot_general "
        "bcoo_sum_duplicates bcoo_todense bcoo_transpose bcsr_dot_general bcsr_extract bcsr_fromdense bcsr_todense "
        "coo_fromdense coo_matmat coo_matvec coo_todense csr_fromdense csr_matmat csr_matvec csr_todense spsolve "
        "todense"
    ),
    "it has no rule across devices; write lax.psum, psum_scatter, all_gather, all_to_all or ppermute": (
        "all_gather_reduced pbroadcast pbroadcast_dynamic ragged_all_to_all preduced reduced_vary_cast "
        "reduced_vary_cast_p unreduced_psum unreduced_reduce_scatter vary_unreduced_cast vary_unreduced_cast_p"
    ),
    "it is one of JAX's experimental types; write the same with arrays": (
        "box_get box_set new_box log_extend log_read new_log call_hi_primitive to_edtype from_edtype"
    ),
    "it advises the compiler on where or how to compute; leave that out": (
        "compute_on relayout with_memory_space_constraint tie xla_metadata_call xla_metadata_value "
        "host_local_array_to_global_array global_array_to_host_local_array"
    ),
}  # fmt: skip

# of these JAX has no derivative either
UNDIFFERENTIABLE = frozenset(("while", *_WITHOUT_RULE["it is computed outside JAX; write it in jax.numpy"].split()))
EXCEPTIONS = {name: reason for reason, names in _WITHOUT_RULE.items() for name in names.split()}

# output element i reads element i (or the broadcast one) of each operand
ELEMENTWISE = frozenset((
    *_ACTIVATIONS, p.add_p, p.sub_p, p.add_jaxvals_p, p.neg_p, p.mul_p, p.div_p, p.max_p, p.min_p, p.select_n_p,
    p.convert_element_type_p, p.copy_p, p.reduce_precision_p, p.stop_gradient_p, p.sign_p, p.floor_p, p.ceil_p,
    p.round_p, p.is_finite_p, p.eq_p, p.ne_p, p.lt_p, p.le_p, p.gt_p, p.ge_p, p.and_p, p.or_p, p.not_p, p.xor_p,
))  # fmt: skip

CUSTOM = frozenset((p.custom_jvp_call_p, p.custom_vjp_call_p))
WRAPPERS = frozenset((
    p.jit_p, p.custom_jvp_call_p, p.custom_vjp_call_p, p.remat_p, p.closed_call_p, p.call_p, *_compat.CALLS,
))  # fmt: skip
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
    "structural" (relevance follows the value, by the primitive's own transpose), "reduce" (linear in its data, which is
    one operand: proportional), "blocked" (no relevance).

    Raises:
      InputError: the kind is not one of these.
    """
    allowed = ("activation", "structural", "reduce", "blocked")
    if kind not in allowed:
        raise InputError(f"cannot register {primitive} as {kind!r}; write one of: {', '.join(allowed)}")
    _TABLE[primitive] = kind
