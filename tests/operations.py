"""Linear operations as people write them: the columns of the rule table.

Each is a plain function `apply(x, kernel, bias)`, where bias may be None. Sizes are small, because the reference
implementation asks for the dense matrix, and many share their shapes, because compilation is what the table waits for.
Constants inside an operation (the statistics of a BatchNorm) are plain
numpy arrays, as a function that closes over loaded weights would have them.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclass(frozen=True)
class Operation:
    name: str
    kind: str  # what jaxlrp should call it
    input: tuple[int, ...]
    kernel: tuple[int, ...]
    bias: tuple[int, ...]
    apply: Callable

    def __str__(self) -> str:
        return self.name

    @property
    def output(self) -> tuple[int, ...]:
        return jax.eval_shape(self.apply, *(np.zeros(shape) for shape in (self.input, self.kernel, self.bias))).shape

    def rng(self, salt: str = "") -> np.random.Generator:
        return np.random.default_rng(zlib.crc32((self.name + salt).encode()))

    def parameters(self, with_bias: bool) -> tuple[np.ndarray, np.ndarray | None]:
        rng = self.rng()
        kernel = rng.normal(size=self.kernel)
        kernel.flat[0] = 0.0  # a tap whose weight is zero is still a tap
        bias = rng.normal(size=self.bias)
        return kernel, bias if with_bias else None


OPERATIONS: list[Operation] = []


def operation(kind: str, input, kernel, bias):
    """Adds the decorated `apply(x, kernel, bias)` to the table, under its own name."""

    def add(apply):
        name = apply.__name__.strip("_").replace("_", "-")
        OPERATIONS.append(Operation(name, kind, input, kernel, bias, apply))
        return apply

    return add


def plus(y, bias):
    return y if bias is None else y + bias


# ---------------------------------------------------------------------------------------------------- dense


@operation("dense", input=(5,), kernel=(5, 4), bias=(4,))
def dense(x, kernel, bias):
    return plus(x @ kernel, bias)


@operation("dense", input=(5, 3), kernel=(3, 4), bias=(4,))
def dense_per_position(x, kernel, bias):
    return plus(lax.dot_general(x, kernel, (((1,), (0,)), ((), ()))), bias)


@operation("dense", input=(2, 3, 4), kernel=(4, 3), bias=(3,))
def dense_batched(x, kernel, bias):
    return plus(x @ kernel, bias)


@operation("dense", input=(5,), kernel=(5, 5), bias=(5,))
def dense_weights_left(x, kernel, bias):
    return plus(kernel @ x, bias)


@operation("dense", input=(2, 3, 4), kernel=(24, 3), bias=(3,))
def dense_after_flatten(x, kernel, bias):
    return plus(x.reshape(-1) @ kernel, bias)


@operation("dense", input=(5, 3), kernel=(4, 3), bias=(4,))
def einsum_weights_left(x, kernel, bias):
    return plus(jnp.einsum("oi,ti->ot", kernel, x), None if bias is None else bias[:, None])


@operation("dense", input=(3, 2, 4), kernel=(2, 4, 5), bias=(5,))
def einsum_two_contracting(x, kernel, bias):
    return plus(jnp.einsum("thd,hdo->to", x, kernel), bias)


@operation("dense", input=(2, 3, 4), kernel=(5, 4, 2), bias=(5,))
def einsum_two_contracting_weights_left(x, kernel, bias):
    return plus(jnp.einsum("odh,htd->to", kernel, x), bias)


@operation("dense", input=(2, 3, 4), kernel=(3, 4, 2), bias=(3, 2))
def einsum_per_head(x, kernel, bias):
    return plus(jnp.einsum("bhi,hio->bho", x, kernel), bias)


@operation("dense", input=(2, 3, 4), kernel=(3, 2, 4), bias=(2,))
def einsum_per_head_weights_left(x, kernel, bias):
    return plus(jnp.einsum("hoi,bhi->hbo", kernel, x), bias)


def variables(kernel, bias):
    return {"params": {"kernel": kernel} | ({} if bias is None else {"bias": bias})}


@operation("dense", input=(2, 3, 4), kernel=(4, 3), bias=(3,))
def flax_dense(x, kernel, bias):
    return nn.Dense(3, use_bias=bias is not None).apply(variables(kernel, bias), x)


@operation("dense", input=(3, 4), kernel=(4, 2, 2), bias=(2, 2))
def flax_dense_general_to_heads(x, kernel, bias):
    return nn.DenseGeneral((2, 2), use_bias=bias is not None).apply(variables(kernel, bias), x)


@operation("dense", input=(3, 2, 4), kernel=(2, 4, 5), bias=(5,))
def flax_dense_general_from_heads(x, kernel, bias):
    return nn.DenseGeneral(5, axis=(-2, -1), use_bias=bias is not None).apply(variables(kernel, bias), x)


# ---------------------------------------------------------------------------------------------------- convolutions


def conv(x, kernel, strides, padding, layout=("NHWC", "HWIO", "NHWC"), **options):
    """A convolution of one example, which has no batch axis."""
    return lax.conv_general_dilated(x[None], kernel, strides, padding, dimension_numbers=layout, **options)[0]


@operation("conv", input=(8, 2), kernel=(3, 2, 3), bias=(3,))
def conv_1d(x, kernel, bias):
    return plus(conv(x, kernel, (1,), "SAME", layout=("NWC", "WIO", "NWC")), bias)


@operation("conv", input=(4, 4, 2), kernel=(3, 3, 2, 2), bias=(2,))
def conv_2d(x, kernel, bias):
    return plus(conv(x, kernel, (1, 1), "SAME"), bias)


@operation("conv", input=(3, 4, 3, 2), kernel=(2, 3, 2, 2, 3), bias=(3,))
def conv_3d(x, kernel, bias):
    return plus(conv(x, kernel, (1, 1, 1), "VALID", layout=("NDHWC", "DHWIO", "NDHWC")), bias)


@operation("conv", input=(4, 4, 2), kernel=(3, 3, 2, 2), bias=(2,))
def conv_strided_same(x, kernel, bias):
    return plus(conv(x, kernel, (2, 2), "SAME"), bias)


@operation("conv", input=(6, 5, 2), kernel=(2, 3, 2, 2), bias=(2,))
def conv_strided_valid(x, kernel, bias):  # the last row of inputs reaches no output
    return plus(conv(x, kernel, (3, 2), "VALID"), bias)


@operation("conv", input=(4, 4, 2), kernel=(3, 3, 2, 2), bias=(2,))
def conv_asymmetric_padding(x, kernel, bias):
    return plus(conv(x, kernel, (1, 2), ((2, 0), (0, 1))), bias)


@operation("conv", input=(4, 4, 4), kernel=(3, 3, 2, 4), bias=(4,))
def conv_grouped(x, kernel, bias):
    return plus(conv(x, kernel, (1, 1), "VALID", feature_group_count=2), bias)


@operation("conv", input=(4, 4, 2), kernel=(3, 3, 1, 4), bias=(4,))
def conv_depthwise(x, kernel, bias):
    return plus(conv(x, kernel, (2, 2), "SAME", feature_group_count=2), bias)


@operation("conv", input=(4, 4, 2), kernel=(3, 3, 2, 2), bias=(2,))
def conv_dilated(x, kernel, bias):
    return plus(conv(x, kernel, (1, 1), ((1, 1), (1, 3)), rhs_dilation=(2, 3)), bias)


@operation("conv", input=(3, 3, 2), kernel=(3, 3, 2, 1), bias=(1,))
def conv_transposed(x, kernel, bias):
    return plus(lax.conv_transpose(x[None], kernel, (2, 2), "SAME")[0], bias)


@operation("conv", input=(3, 2, 2), kernel=(2, 3, 2, 2), bias=(2,))
def conv_input_dilated(x, kernel, bias):
    return plus(conv(x, kernel, (1, 1), ((1, 1), (0, 2)), lhs_dilation=(2, 3)), bias)


@operation("conv", input=(2, 4, 4), kernel=(3, 2, 3, 3), bias=(3,))
def conv_nchw(x, kernel, bias):
    bias = None if bias is None else bias[:, None, None]
    return plus(conv(x, kernel, (1, 1), ((0, 1), (1, 0)), layout=("NCHW", "OIHW", "NCHW")), bias)


@operation("conv", input=(2, 4, 4, 2), kernel=(3, 3, 2, 2), bias=(2,))
def flax_conv(x, kernel, bias):
    return nn.Conv(2, (3, 3), strides=2, use_bias=bias is not None).apply(variables(kernel, bias), x)


@operation("conv", input=(1, 3, 2, 2), kernel=(2, 2, 2, 2), bias=(2,))
def flax_conv_transpose(x, kernel, bias):
    return nn.ConvTranspose(2, (2, 2), strides=(2, 2), use_bias=bias is not None).apply(variables(kernel, bias), x)


# ------------------------------------------------------------------------- layers that people write as several


def batch_norm(y, scale):
    """Inference by hand. The shift acts as a bias, the scale changes the weights, and their signs where negative."""
    mean, var, beta = ([0.3, -0.2, 0.5, 0.0], [0.5, 2.0, 1.0, 1.5], [0.1, -0.7, 0.4, 0.2])
    mean, var, scale, beta = (np.asarray(v[: y.shape[-1]], y.dtype) for v in (mean, var, scale, beta))
    return (y - mean) * (scale * lax.rsqrt(var + np.asarray(1e-5, y.dtype))) + beta


@operation("conv", input=(4, 4, 2), kernel=(3, 3, 2, 2), bias=(2,))
def conv_batch_norm(x, kernel, bias):
    return batch_norm(plus(conv(x, kernel, (1, 1), "VALID"), bias), scale=[-1.5, 0.5])


@operation("dense", input=(5, 3), kernel=(3, 4), bias=(4,))
def dense_batch_norm(x, kernel, bias):
    return batch_norm(plus(x @ kernel, bias), scale=[-1.5, 0.5, -1.0, 2.0])


@operation("conv", input=(4, 4, 2), kernel=(3, 3, 1, 4), bias=(4,))
def conv_depthwise_batch_norm(x, kernel, bias):
    y = plus(conv(x, kernel, (2, 2), "SAME", feature_group_count=2), bias)
    return batch_norm(y, scale=[-1.5, 0.5, -1.0, 2.0])


@operation("conv", input=(2, 4, 4, 2), kernel=(3, 3, 2, 2), bias=(2,))
def flax_conv_batch_norm(x, kernel, bias):
    y = nn.Conv(2, (3, 3), strides=2, use_bias=bias is not None).apply(variables(kernel, bias), x)
    scale, beta, mean, var = (np.asarray(v, x.dtype) for v in ([-1.5, 0.5], [0.1, -0.7], [0.3, -0.2], [0.5, 2.0]))
    stored = {"params": {"scale": scale, "bias": beta}, "batch_stats": {"mean": mean, "var": var}}
    return nn.BatchNorm(use_running_average=True).apply(stored, y)


@operation("conv", input=(4, 4, 2), kernel=(3, 3, 2, 2), bias=(2,))
def preprocessing_then_conv(x, kernel, bias):
    """In raw units: the weights are w / std, and the mean is a bias, smaller at the border, where taps are missing."""
    mean, std = (np.asarray(v, x.dtype) for v in ([0.4, 0.6], [0.25, 0.5]))
    return plus(conv((x - mean) / std, kernel, (1, 1), "SAME"), bias)


@operation("dense", input=(2, 3, 4), kernel=(24, 3), bias=(3,))
def preprocessing_then_flatten_then_dense(x, kernel, bias):
    mean, std = (np.asarray(v, x.dtype) for v in ([0.4, 0.6, 0.5, 0.0], [0.25, 0.5, 1.0, 2.0]))
    return plus(((x - mean) / std).reshape(-1) @ kernel, bias)


@operation("dense", input=(5, 3), kernel=(3, 4), bias=(4,))
def batch_norm_then_dense(x, kernel, bias):
    """Where the scale is negative, so are the contributions of inputs and weights that are positive."""
    return plus(batch_norm(x, scale=[-1.5, 0.5, -1.0]) @ kernel, bias)


@operation("conv", input=(4, 4, 2), kernel=(3, 3, 2, 2), bias=(2,))
def inverted_then_conv(x, kernel, bias):
    return plus(conv(1 - x, kernel, (1, 1), "SAME"), bias)


@operation("conv", input=(4, 4, 2), kernel=(3, 3, 2, 2), bias=(2,))
def padded_then_conv(x, kernel, bias):
    return plus(conv(jnp.pad(x, ((1, 0), (1, 0), (0, 0))), kernel, (1, 1), "VALID"), bias)


@operation("conv", input=(2, 4, 4), kernel=(3, 3, 2, 2), bias=(2,))
def transposed_then_conv(x, kernel, bias):
    return plus(conv(x.transpose(1, 2, 0), kernel, (2, 2), "SAME"), bias)


@operation("dense", input=(2, 3, 4), kernel=(3, 2, 4), bias=(2, 3))
def einsum_per_head_divided(x, kernel, bias):
    spread = np.asarray([[0.5, -2.0, 1.0], [-0.5, 3.0, 1.5]], x.dtype)  # (o, h), where the kernel has (h, o)
    return plus(jnp.einsum("hoi,bhi->boh", kernel, x) / spread, bias)


@operation("dense", input=(5,), kernel=(5, 4), bias=(4,))
def dense_subtracted(x, kernel, bias):
    y = x @ kernel
    return -y if bias is None else bias - y
