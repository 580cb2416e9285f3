"""Nets as people write them, each with the layers that a person would name."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

import models
from models import batch_norm, conv, dense
from recognition import (
    ACT,
    ADD,
    AVG,
    BN,
    CONV,
    DENSE,
    LINEAR_NETS,
    MAX,
    MOVE,
    OTHER_NETS,
    PRODUCT,
    REDUCE,
    SCALE,
    layer,
    net,
)

# a layer is one Op


@net(CONV)
def conv_without_bias(x, p):
    return conv(x, p["stem"]["kernel"])


@net(CONV)
def conv_bias(x, p):
    return layer(x, p["stem"])


@net(CONV)
def conv_bias_batch_norm(x, p):
    return batch_norm(layer(x, p["stem"]), p["norm"])


@net(CONV, ACT)
def conv_batch_norm_relu(x, p):
    return jax.nn.relu(batch_norm(conv(x, p["stem"]["kernel"]), p["norm"]))


@net(CONV, ACT, CONV, ACT)
def batch_norm_and_relu_in_a_jit_of_their_own(x, p):
    tail = jax.jit(lambda x, norm: jax.nn.relu(batch_norm(x, norm)))
    return tail(layer(tail(layer(x, p["stem"]), p["norm"]), p["block"]), p["norm"])


@net(CONV, ACT, CONV, ACT)
def scalars_and_relu_in_a_jit_of_their_own(x, p):
    tail = jax.jit(lambda x: jax.nn.relu(2 * x - 1))
    return tail(layer(tail(layer(x, p["stem"])), p["block"]))


@net(CONV, ACT, DENSE)
def conv_relu_reshape_dense(x, p):
    x = jax.nn.relu(layer(x, p["stem"]))
    return dense(x.reshape(len(x), -1), p["flat"])


@net(CONV, ACT, DENSE)
def conv_reshape_relu_dense(x, p):
    x = layer(x, p["stem"])
    return dense(jax.nn.relu(x.reshape(len(x), -1)), p["flat"])


@net(CONV)
def negated_conv(x, p):
    return 1 - 2 * layer(x, p["stem"])


@net(CONV, SCALE)
def conv_with_a_factor_per_pixel(x, p):
    """Such a factor does not fold into the kernel."""
    return layer(x, p["stem"]) * p["spatial"]


@net(CONV, CONV)
def conv_conv(x, p):
    return layer(layer(x, p["stem"]), p["block"])


# BatchNorm


@net(CONV, ACT, CONV)
def batch_norm_right_before_a_conv(x, p):
    return layer(batch_norm(jax.nn.relu(layer(x, p["stem"])), p["norm"]), p["block"])


@net(CONV)
def batch_norm_first_of_all(x, p):
    own = {k: v[:3] for k, v in p["norm"].items()}
    return layer(batch_norm(x, own), p["stem"])


@net(CONV, ACT, DENSE)
def batch_norm_before_a_dense(x, p):
    x = jax.nn.relu(layer(x, p["stem"]))
    return dense(batch_norm(x, p["norm"]), p["head"])


@net(CONV, CONV)
def batch_norm_between_two_convs(x, p):
    return layer(batch_norm(layer(x, p["stem"]), p["norm"]), p["block"])


@net(CONV, BN, ACT, ADD, linear=False)
def batch_norm_after_a_conv_that_something_else_reads(x, p):
    y = layer(x, p["stem"])
    return jax.nn.relu(batch_norm(y, p["norm"])) + y


@net(CONV, BN, ACT, CONV, ACT, CONV, ADD, linear=False)
def resnet_v2(x, p):
    y = layer(x, p["stem"])
    z = conv(jax.nn.relu(batch_norm(y, p["norm"])), p["block"]["kernel"])
    z = jax.nn.relu(batch_norm(z, p["norm"]))  # of the convolution before it
    return conv(z, p["block"]["kernel"]) + y


@net(CONV, ACT, CONV, ACT, MOVE, BN, ACT, CONV, linear=False)
def densenet(x, p):
    x = jax.nn.relu(layer(x, p["stem"]))
    x = jnp.concatenate([x, jax.nn.relu(layer(x, p["block"]))], -1)
    return layer(jax.nn.relu(batch_norm(x, p["wide_norm"])), p["wide"])


@net(CONV, CONV, ADD, BN, ACT, linear=False)
def batch_norm_after_an_add(x, p):
    return jax.nn.relu(batch_norm(layer(x, p["stem"]) + layer(x, p["side"]), p["norm"]))


@net(CONV, MAX, BN, ACT, CONV, linear=False)
def batch_norm_after_a_max_pool(x, p):
    x = models.max_pool(layer(x, p["stem"]))
    return layer(jax.nn.relu(batch_norm(x, p["norm"])), p["block"])


# preprocessing


@net(CONV)
def preprocessing(x, p):
    return layer((x - p["mean"]) / p["std"], p["stem"])


@net(CONV)
def preprocessing_with_literals(x, p):
    return layer(x / 127.5 - 1, p["stem"])


@net(CONV)
def preprocessing_with_arrays_closed_over(x, p):
    return layer((x - np.array([0.4, 0.5, 0.6])) * np.array([4.0, 5.0, 6.0]), p["stem"])


@net(CONV, input=(2, 3, 8, 8))
def preprocessing_of_nchw_images(x, p):
    x = (x - p["mean"][:, None, None]) / p["std"][:, None, None]
    return layer(x.transpose(0, 2, 3, 1), p["stem"])


@net(SCALE, CONV, CONV, ADD)
def preprocessing_for_two_stems(x, p):
    x = (x - p["mean"]) / p["std"]
    return layer(x, p["stem"]) + layer(x, p["side"])


@net(CONV, ACT, SCALE, ACT)
def scale_between_activations(x, p):
    x = jax.nn.relu(layer(x, p["stem"]))
    return jax.nn.relu(x * p["head"]["kernel"][:, 0] + p["norm"]["mean"])


@net(CONV, ACT, SCALE, ACT)
def scale_by_the_root_of_a_number(x, p):
    x = jax.nn.relu(layer(x, p["stem"]))
    return jax.nn.relu(x * jnp.sqrt(16.0) + p["norm"]["mean"])


# sums


@net(CONV, CONV, CONV, ADD)
def add_of_three_from_the_left(x, p):
    return (layer(x, p["stem"]) + layer(x, p["side"])) + layer(x, p["third"])


@net(CONV, CONV, CONV, ADD)
def add_of_three_from_the_right(x, p):
    return layer(x, p["stem"]) + (layer(x, p["side"]) + layer(x, p["third"]))


@net(CONV, CONV, CONV, ADD)
def add_with_differences(x, p):
    return layer(x, p["stem"]) - (layer(x, p["side"]) - layer(x, p["third"]))


@net(CONV, CONV, ADD, ACT, CONV, ADD)
def add_that_is_read_twice(x, p):
    y = layer(x, p["stem"]) + layer(x, p["side"])
    return jax.nn.relu(y) + y + layer(x, p["third"])


@net(CONV, ACT, CONV, ADD, ACT)
def residual_block(x, p):
    y = jax.nn.relu(layer(x, p["stem"]))
    return jax.nn.relu(layer(y, p["block"]) + y)


@net(CONV, ACT, CONV, ADD)
def residual_block_with_a_factor(x, p):
    y = jax.nn.relu(layer(x, p["stem"]))
    return y + 0.1 * layer(y, p["block"])


@net(CONV, ACT, SCALE, SCALE, ADD)
def sum_of_multiples(x, p):
    """Paths that part and meet again, but bend nowhere, are no activation."""
    y = jax.nn.relu(layer(x, p["stem"]))
    return 2 * y + 3 * y


# pooling


@net(CONV, MAX)
def max_pool_linen(x, p):
    return nn.max_pool(layer(x, p["stem"]), (3, 3), (2, 2), "SAME")


@net(CONV, MAX)
def max_pool_nnx(x, p):
    return nnx.max_pool(layer(x, p["stem"]), (2, 2), (2, 2))


@net(CONV, ACT, MOVE, MAX)
def max_pool_by_reshape(x, p):
    x = jax.nn.relu(layer(x, p["stem"]))
    return x.reshape(2, 4, 2, 4, 2, 4).max((2, 4))


@net(CONV, MAX)
def max_pool_by_reshape_right_after_a_conv(x, p):
    return layer(x, p["stem"]).reshape(2, 4, 2, 4, 2, 4).max((2, 4))


@net(CONV, ACT, MAX, DENSE)
def max_over_axes(x, p):
    return dense(jnp.max(jax.nn.relu(layer(x, p["stem"])), axis=(1, 2)), p["head"])


@net(CONV, MAX, DENSE)
def min_over_axes(x, p):
    return dense(layer(x, p["stem"]).min((1, 2)), p["head"])


@net(CONV, CONV, MAX)
def maxout(x, p):
    return jnp.maximum(layer(x, p["stem"]), layer(x, p["side"]))


@net(CONV, ACT, AVG, DENSE)
def avg_pool_that_counts_padding(x, p):
    x = nn.avg_pool(jax.nn.relu(layer(x, p["stem"])), (3, 3), (8, 8), "SAME", count_include_pad=True)
    return dense(x, p["head"])


@net(CONV, ACT, AVG, DENSE)
def avg_pool_that_does_not_count_padding(x, p):
    x = nn.avg_pool(jax.nn.relu(layer(x, p["stem"])), (3, 3), (8, 8), "SAME", count_include_pad=False)
    return dense(x, p["head"])


@net(CONV, AVG, ACT)
def avg_pool_right_after_a_conv(x, p):
    return jax.nn.relu(nnx.avg_pool(layer(x, p["stem"]), (2, 2), (2, 2)))


@net(CONV, ACT, AVG, DENSE)
def global_pool_by_window(x, p):
    x = jax.nn.relu(layer(x, p["stem"]))
    x = nn.avg_pool(x, x.shape[1:3])
    return dense(x.reshape(len(x), -1), p["head"])


@net(CONV, ACT, REDUCE, DENSE)
def global_mean(x, p):
    return dense(jax.nn.relu(layer(x, p["stem"])).mean((1, 2)), p["head"])


@net(CONV, ACT, REDUCE, DENSE)
def global_mean_keepdims(x, p):
    x = jax.nn.relu(layer(x, p["stem"])).mean((1, 2), keepdims=True)
    return dense(x[:, 0, 0], p["head"])


@net(CONV, ACT, REDUCE, DENSE)
def global_sum_over_count(x, p):
    return dense(jnp.sum(jax.nn.relu(layer(x, p["stem"])), (1, 2)) / 64, p["head"])


# what moves values


@net(CONV, CONV, MOVE, ACT, CONV)
def concatenate(x, p):
    x = jnp.concatenate([layer(x, p["stem"]), layer(x, p["side"])], axis=-1)
    return layer(jax.nn.relu(x), p["wide"])


@net(CONV, ACT, MOVE, CONV)
def crop(x, p):
    return layer(lax.slice(jax.nn.relu(layer(x, p["stem"])), (0, 1, 1, 0), (2, 7, 7, 4)), p["block"])


@net(CONV, ACT, MOVE, MAX)
def pad_before_a_max_pool(x, p):
    x = jnp.pad(jax.nn.relu(layer(x, p["stem"])), ((0, 0), (1, 1), (1, 1), (0, 0)))
    return models.max_pool(x)


@net(CONV, ACT, CONV)
def pad_before_a_conv(x, p):
    x = jnp.pad(jax.nn.relu(layer(x, p["stem"])), ((0, 0), (1, 1), (1, 1), (0, 0)))
    return conv(x, p["block"]["kernel"], padding="VALID") + p["block"]["bias"]


@net(CONV)
def preprocessing_and_pad_before_a_conv(x, p):
    x = jnp.pad((x - p["mean"]) / p["std"], ((0, 0), (1, 1), (1, 1), (0, 0)))
    return conv(x, p["stem"]["kernel"], padding="VALID")


@net(CONV, ACT, CONV, ACT, MOVE, REDUCE)
def stack(x, p):
    x = jax.nn.relu(layer(x, p["stem"]))
    return jnp.stack([x, jax.nn.relu(layer(x, p["block"]))]).sum(0)


@net(CONV, ACT, MOVE, DENSE)
def index(x, p):
    return dense(jax.nn.relu(layer(x, p["stem"]))[:, 3, -1], p["head"])


@net(CONV, ACT, MOVE, CONV)
def flip(x, p):
    return layer(jax.nn.relu(layer(x, p["stem"]))[:, :, ::-1], p["block"])


@net(CONV, ACT, MOVE, MAX)
def transpose_before_a_max_pool(x, p):
    x = jax.nn.relu(layer(x, p["stem"])).transpose(0, 3, 1, 2)
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")


@net(CONV, ACT, MOVE, CONV, DENSE, ADD)
def transpose_for_two_readers(x, p):
    x = jax.nn.relu(layer(x, p["stem"])).transpose(0, 2, 1, 3)
    return layer(x, p["block"]) + dense(x, p["gate"])


@net(CONV, ACT, MOVE, PRODUCT, linear=False)
def split_into_signal_and_gate(x, p):
    signal, gate = jnp.split(jax.nn.relu(layer(x, p["stem"])), 2, axis=-1)
    return signal * gate


@net(CONV, ACT, REDUCE, DENSE, ACT, MOVE, PRODUCT, linear=False)
def squeeze_and_excitation(x, p):
    x = jax.nn.relu(layer(x, p["stem"]))
    gate = jax.nn.sigmoid(dense(x.mean((1, 2)), p["gate"]))
    return x * lax.broadcast_in_dim(gate, x.shape, (0, 3))


# convolutions


@net(CONV, ACT, CONV, ACT)
def depthwise_conv_batch_norm(x, p):
    x = jax.nn.relu(layer(x, p["stem"]))
    return jax.nn.relu(batch_norm(conv(x, p["depthwise"]["kernel"], feature_group_count=4), p["norm"]))


@net(CONV, ACT, CONV, ACT)
def grouped_conv_batch_norm(x, p):
    x = jax.nn.relu(layer(x, p["stem"]))
    return jax.nn.relu(batch_norm(conv(x, p["grouped"]["kernel"], feature_group_count=2), p["norm"]))


@net(CONV, ACT)
def transposed_conv_batch_norm(x, p):
    x = lax.conv_transpose(x, p["stem"]["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jax.nn.relu(batch_norm(x + p["stem"]["bias"], p["norm"]))


@net(CONV, ACT)
def dilated_conv(x, p):
    return jax.nn.relu(conv(x, p["stem"]["kernel"], rhs_dilation=(2, 2)) + p["stem"]["bias"])


@net(CONV, ACT, DENSE)
def conv_of_one_pixel(x, p):
    """A 1x1 convolution is a convolution; a dense layer on the last axis is dense."""
    x = conv(x, p["stem"]["kernel"][:1, :1], padding="VALID") + p["stem"]["bias"]
    return dense(jax.nn.relu(x), p["head"])


@net(DENSE, ACT, DENSE, input=(4,))
def dense_on_one_example(x, p):
    return dense(jax.nn.relu(dense(x, p["gate"])), p["head"])


@net(DENSE, input=(2, 5, 4))
def dense_by_einsum(x, p):
    return jnp.einsum("btc,cd->btd", x, p["gate"]["kernel"]) + p["gate"]["bias"]


@net(CONV, CONV, ACT, REDUCE, DENSE)
def results_on_the_way(x, p):
    """What a function returns is not an inner value of a layer."""
    y = conv(x, p["stem"]["kernel"])
    z = conv(y, p["block"]["kernel"])
    return y, dense(jax.nn.relu(z + p["block"]["bias"]).mean((1, 2)), p["head"])


@net(CONV, ACT)
def dead_code(x, p):
    y = layer(x, p["stem"])
    jnp.tanh(dense(y, p["gate"])) * y
    return jax.nn.relu(y)


NETS = LINEAR_NETS + OTHER_NETS
