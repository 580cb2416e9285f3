"""Recognition: equations become the layers a person would name, however they were written and wrapped.

A table is a list of (kind, rule), one pair per layer in program order; conv layers get ZPlus and dense layers Epsilon,
so that every other rule in a table is the one that `composites.base()` gives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.scipy.special import erf, erfc, logsumexp
from jax.scipy.stats import norm as normal

import models
from jaxlrp import Composite, composites, logits, lrp, plan, rules, select, value_and_lrp
from jaxlrp.analysis import analyse
from jaxlrp.program import Op
from models import batch_norm, conv, dense

CONV, DENSE = ("conv", "ZPlus"), ("dense", "Epsilon")
ACT, BN, MOVE = ("activation", "Pass"), ("batch_norm", "Pass"), ("structural", "Pass")
ADD, SCALE, REDUCE, AVG = (("add", "Epsilon"), ("scale", "Epsilon"), ("reduce", "Epsilon"), ("avg_pool", "Epsilon"))
MAX, SOFTMAX, PRODUCT = ("max_pool", "Winner"), ("softmax", "SoftmaxTaylor"), ("product", "Uniform")

COMPOSITE = composites.epsilon_plus()
ZERO = Composite([(select.kind("dense", "conv"), rules.Zero())])


def rows(function: Callable, *args) -> list[tuple[str, str]]:
    return [(row.kind, type(row.rule).__name__) for row in plan(function, COMPOSITE)(*args)]


def ops(function: Callable, *args) -> list[Op]:
    return list(analyse(function, args, {}, 0)[1].ops())


def names(function: Callable, *args) -> list[str]:
    """Of the layers that have parameters."""
    return [
        row.name for row in plan(function, COMPOSITE)(*args) if row.kind in ("dense", "conv", "batch_norm", "scale")
    ]


def close(got, right, tolerance=1e-10, where=""):
    right = np.asarray(right)
    assert np.any(right), "a comparison with nothing shows nothing"
    np.testing.assert_allclose(got, right, rtol=0, atol=tolerance * abs(right).max(), err_msg=where)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """XLA's optimiser would take half of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# The same layers, however the function is wrapped.
WRAPS: dict[str, Callable[[Callable], Callable]] = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "jit of jit": lambda f: jax.jit(lambda *args: jax.jit(f)(*args)),
    "checkpoint": jax.checkpoint,
    "jit of checkpoint": lambda f: jax.jit(jax.checkpoint(f)),
}
every_wrap = pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)


# ---------------------------------------------------------------------------------------------------- one CNN, thrice

CNN = [
    ("stem", "conv", rules.ZPlus()),
    ("relu", "activation", rules.Pass()),
    ("block", "conv", rules.ZPlus()),
    ("relu#2", "activation", rules.Pass()),
    ("add", "add", rules.Epsilon(1e-9)),
    ("max_pool", "max_pool", rules.Winner()),
    ("avg_pool", "avg_pool", rules.Epsilon(1e-9)),
    ("reduce", "reduce", rules.Epsilon(1e-9)),
    ("head", "dense", rules.Epsilon(1e-6)),
]
every_cnn = pytest.mark.parametrize("model", models.cnns(), ids=str)


@every_wrap
@every_cnn
def test_cnn_layers(model: models.Model, wrap):
    table = plan(wrap(model.apply), COMPOSITE)(models.images(), model.parameters)
    weighted = ("stem", "block", "head")
    right = [(model.prefix + name if name in weighted else name, kind, rule) for name, kind, rule in CNN]
    assert [(row.name, row.kind, row.rule) for row in table] == right, str(table)


@cache
def relevance_of_cnn(name: str) -> dict[str, np.ndarray]:
    """By composite, for class 1, compiled as a whole."""
    model = next(m for m in models.cnns() if m.name == name)
    return {
        title: np.asarray(jax.jit(lrp(model.apply, composite, target=1))(models.images(), model.parameters))
        for title, composite in CNN_COMPOSITES.items()
    }


CNN_COMPOSITES = {
    "zero": ZERO,
    "epsilon_plus": COMPOSITE,
    "epsilon_gamma_box": composites.epsilon_gamma_box(-4.0, 4.0),
}


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_cnn_relevance_does_not_depend_on_the_library(name: str):
    for title, right in relevance_of_cnn("plain").items():
        close(relevance_of_cnn(name)[title], right, where=title)


@every_cnn
def test_cnn_zero_rule_is_gradient_x_input(model: models.Model):
    x = models.images()
    gradient = jax.jit(jax.grad(lambda x: model.apply(x, model.parameters)[:, 1].sum()))(x)
    close(relevance_of_cnn(model.name)["zero"], x * gradient, 1e-6)  # adds and pools have an epsilon of 1e-9


def test_cnn_batch_norm_is_folded():
    """z+ sees the sign of the folded kernel, which is not that of the convolution's own."""
    own = models.numbers()
    factor = own["norm"]["scale"] / np.sqrt(own["norm"]["var"] + models.EPSILON)
    folded = {
        **own,
        "stem": {
            "kernel": own["stem"]["kernel"] * factor,
            "bias": (own["stem"]["bias"] - own["norm"]["mean"]) * factor + own["norm"]["bias"],
        },
        "norm": {"scale": np.ones(4), "bias": np.zeros(4), "mean": np.zeros(4), "var": np.ones(4) - models.EPSILON},
    }
    right = jax.jit(lrp(models.plain_cnn, COMPOSITE, target=1))(models.images(), folded)
    close(relevance_of_cnn("plain")["epsilon_plus"], right)


@pytest.mark.parametrize("name, wrap", [("linen", "jit"), ("nnx", "checkpoint"), ("plain", "jit of checkpoint")])
def test_cnn_relevance_does_not_depend_on_wrappers(name: str, wrap: str):
    model = next(m for m in models.cnns() if m.name == name)
    got = jax.jit(lrp(WRAPS[wrap](model.apply), COMPOSITE, target=1))(models.images(), model.parameters)
    close(got, relevance_of_cnn(name)["epsilon_plus"])


@every_cnn
def test_cnn_with_parameters_closed_over(model: models.Model):
    function = lambda x: model.apply(x, model.parameters)
    table = plan(function, COMPOSITE)(models.images())
    assert [(row.kind, row.rule) for row in table] == [(kind, rule) for _, kind, rule in CNN], str(table)
    value, relevance = jax.jit(value_and_lrp(function, COMPOSITE, target=1))(models.images())
    close(value, model.apply(models.images(), model.parameters))
    close(relevance, relevance_of_cnn(model.name)["epsilon_plus"])


def test_cnn_of_one_image_under_vmap():
    """Relevance of a model that is itself a vmap over images."""
    model = models.cnn()
    function = lambda x, p: jax.vmap(lambda image: model.apply(image[None], p)[0])(x)
    weighted = [row for row in rows(function, models.images(), model.parameters) if row[0] != "structural"]
    assert weighted == [(kind, type(rule).__name__) for _, kind, rule in CNN]
    got = jax.jit(lrp(function, COMPOSITE, target=1))(models.images(), model.parameters)
    close(got, relevance_of_cnn("plain")["epsilon_plus"])


def test_cnn_in_parts_that_are_wrapped():
    """Boundaries of jit and checkpoint inside the model: around parts of a layer too."""
    convolve = jax.jit(conv)
    rest_of_layer = jax.jit(lambda x, bias, norm: batch_norm(x + bias, norm))
    block = jax.checkpoint(lambda x, p: jax.nn.relu(convolve(x, p["kernel"]) + p["bias"]))

    @jax.jit
    def pools(x):
        return models.avg_pool(models.max_pool(x)).mean((1, 2))

    def function(x, p):
        x = jax.nn.relu(rest_of_layer(convolve(x, p["stem"]["kernel"]), p["stem"]["bias"], p["norm"]))
        return jax.jit(dense)(pools(block(x, p["block"]) + x), p["head"])

    x, p = models.images(), models.numbers()
    table = plan(function, COMPOSITE)(x, p)
    assert [(row.name, row.kind, row.rule) for row in table] == CNN, str(table)
    close(jax.jit(lrp(function, COMPOSITE, target=1))(x, p), relevance_of_cnn("plain")["epsilon_plus"])
    close(lrp(function, COMPOSITE, target=1)(x, p), relevance_of_cnn("plain")["epsilon_plus"])


@pytest.mark.parametrize("transform", [nn.jit, nn.remat, lambda m: nn.remat(nn.jit(m))], ids=["jit", "remat", "both"])
def test_cnn_under_transforms_of_linen(transform):
    model = models.cnns()[0]
    function = lambda x, variables: transform(models.LinenCNN)().apply(variables, x)
    table = plan(function, COMPOSITE)(models.images(), model.parameters)
    assert [(row.name.removeprefix("params/"), row.kind, row.rule) for row in table] == CNN, str(table)


def test_low_precision_casts_are_no_layers():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), dtype=jnp.bfloat16)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True, dtype=jnp.bfloat16)(x))
            return nn.Dense(3, dtype=jnp.bfloat16)(x.mean((1, 2))).astype(jnp.float32)

    x = jnp.asarray(models.images(), jnp.float32)
    variables = jax.eval_shape(Net().init, jax.random.key(0), x)
    function = lambda x, variables: Net().apply(variables, x)
    got = rows(function, x, variables)
    assert [row for row in got if row != MOVE] == [CONV, ACT, REDUCE, DENSE]


# ---------------------------------------------------------------------------------------------------- the table of nets

P = {
    **models.numbers(),
    "side": {"kernel": models.rng(3).normal(size=(3, 3, 3, 4)), "bias": models.rng(4).normal(size=4)},
    "third": {"kernel": models.rng(5).normal(size=(3, 3, 3, 4)), "bias": models.rng(6).normal(size=4)},
    "wide": {"kernel": models.rng(7).normal(size=(3, 3, 8, 4)), "bias": models.rng(8).normal(size=4)},
    "wide_norm": {k: np.concatenate([v, v]) for k, v in models.numbers()["norm"].items()},
    "depthwise": {"kernel": models.rng(9).normal(size=(3, 3, 1, 4))},
    "grouped": {"kernel": models.rng(10).normal(size=(3, 3, 2, 4))},
    "gate": {"kernel": models.rng(11).normal(size=(4, 4)), "bias": models.rng(12).normal(size=4)},
    "flat": {"kernel": models.rng(13).normal(size=(256, 3)), "bias": models.rng(14).normal(size=3)},
    "mean": models.rng(15).normal(size=3),
    "std": np.array([0.5, 1.0, 2.0]),
    "spatial": models.rng(16).normal(size=(8, 8, 1)),
}
LINEAR_NETS = []  # piecewise linear: the zero rule is gradient x input
OTHER_NETS = []


@dataclass(frozen=True)
class Net:
    apply: Callable  # (x, parameters) -> output
    rows: list[tuple[str, str]]
    input: tuple[int, ...]

    def __str__(self) -> str:
        return self.apply.__name__.strip("_").replace("_", "-")


def net(*rows: tuple[str, str], linear: bool = True, input=models.IMAGES):
    def add(function):
        (LINEAR_NETS if linear else OTHER_NETS).append(Net(function, list(rows), input))
        return function

    return add


def layer(x, p):
    return conv(x, p["kernel"]) + p["bias"]


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


@pytest.mark.parametrize("net", NETS, ids=str)
def test_net(net: Net):
    for title, wrap in WRAPS.items():
        table = plan(wrap(net.apply), COMPOSITE)(np.zeros(net.input), P)
        got = [(row.kind, type(row.rule).__name__) for row in table]
        assert got == net.rows, f"{title}\n{table}"


@partial(jax.jit, static_argnums=0)
def zero_and_gradient_x_input(function: Callable, x) -> tuple[jax.Array, jax.Array]:
    """These agree to the 1e-9 that adds, scales and pools have as epsilon."""
    total = lambda x: sum(y.sum() for y in jax.tree.leaves(function(x, P)))
    return lrp(function, ZERO)(x, P), x * jax.grad(total)(x)


@pytest.mark.parametrize("net", LINEAR_NETS, ids=str)
def test_zero_rule_is_gradient_x_input(net: Net):
    """Bias or no bias, wrapped or not: which proves that recognition put every equation in the right place."""
    close(*zero_and_gradient_x_input(net.apply, models.rng(20).normal(size=net.input)), 1e-5)


@pytest.mark.parametrize("net", OTHER_NETS, ids=str)
def test_wrappers_do_not_change_relevance(net: Net):
    x = models.rng(21).normal(size=net.input)
    value, right = value_and_lrp(net.apply, COMPOSITE)(x, P)
    close(value, net.apply(x, P))
    for wrap in (jax.jit, jax.checkpoint):
        close(lrp(wrap(net.apply), COMPOSITE)(x, P), right)


def test_batch_norm_joins_the_layer_before_it_rather_than_the_one_after():
    norm = {"norm/scale", "norm/bias", "norm/mean", "norm/var"}
    stem, block = ops(batch_norm_between_two_convs, models.images(), P)
    assert norm <= set(stem.paths) and not norm & set(block.paths)
    stem, _, block = ops(batch_norm_right_before_a_conv, models.images(), P)
    assert norm <= set(block.paths) and not norm & set(stem.paths)


def test_batch_norm_of_the_libraries_passes_before_a_relu():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Conv(4, (3, 3), name="stem")(x)
            z = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(y))
            return nn.Conv(4, (3, 3), name="block")(z) + y

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
            self.block = nnx.Conv(4, 4, (3, 3), rngs=rngs)

        def __call__(self, x):
            y = self.stem(x)
            return self.block(nnx.relu(self.norm(y))) + y

    x = models.images()
    variables = Linen().init(jax.random.key(0), x)
    graph, state = nnx.split(Nnx(nnx.Rngs(0)))
    functions = {
        "params/": (lambda x, variables: Linen().apply(variables, x), variables),
        "": (lambda x, state: nnx.merge(graph, state)(x), state),
    }
    right = [CONV, BN, ACT, CONV, ADD]
    for prefix, (function, parameters) in functions.items():
        assert rows(function, x, parameters) == right
        stem, norm, block = names(function, x, parameters)
        assert stem == prefix + "stem" and block == prefix + "block"
        assert norm in ("norm", "params/norm", "batch_stats/norm")
        own = [op for op in ops(function, x, parameters) if select.named(prefix + "norm/*").matches(op)]
        assert [op.kind for op in own] == ["batch_norm"]
        assert rows(lambda x, f=function, p=parameters: f(x, p), x) == right


def test_add_of_three_has_three_inputs():
    for function in (add_of_three_from_the_left, add_of_three_from_the_right, add_with_differences):
        add = ops(function, models.images(), P)[-1]
        assert add.kind == "add" and add.in_shapes == ((2, 8, 8, 4),) * 3
    inner, outer = [op for op in ops(add_that_is_read_twice, models.images(), P) if op.kind == "add"]
    assert len(inner.inputs) == 2 and len(outer.inputs) == 3


def test_add_splits_in_proportion_to_its_inputs():
    """And not pairwise: three branches of 1, 2 and 3 share as such, whatever the order of the sum."""
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):

        def function(x, ws, order=order):
            a, b, c = (x[i] * jax.nn.relu(ws[i]) for i in order)
            return jax.nn.relu(a) + (jax.nn.relu(b) + jax.nn.relu(c))

        got = lrp(function, Composite())(jnp.array([1.0, 2.0, 3.0]), jnp.ones(3))
        close(got, [1.0, 2.0, 3.0], 1e-8)


@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic"])
def test_resize(method):
    """What interpolation makes of an image is neither a dense layer nor in need of a rule."""

    def function(x, p):
        x = jax.nn.relu(layer(x, p["stem"]))
        return layer(jax.image.resize(x, (2, 16, 16, 4), method), p["block"])

    kinds = [kind for kind, _ in rows(function, models.images(), P)]
    middle = kinds[2:-1]
    assert kinds[:2] + kinds[-1:] == ["conv", "activation", "conv"]
    assert set(middle) == ({"structural"} if method == "nearest" else {"resize"})


@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic"])
def test_zero_rule_is_gradient_x_input_through_resize(method):
    def function(x, p):
        x = jax.nn.relu(layer(x, p["stem"]))
        return layer(jax.image.resize(x, (2, 16, 16, 4), method), p["block"])

    close(*zero_and_gradient_x_input(function, models.images()), 1e-5)


def test_three_dimensions_and_one():
    for shape in ((2, 8, 3), (2, 4, 4, 4, 3)):
        kernel = (3,) * (len(shape) - 2)

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x, kernel=kernel):
                x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(4, kernel)(x)))
                return nn.relu(nn.ConvTranspose(4, kernel, strides=tuple(2 for _ in kernel))(x))

        x = np.zeros(shape)
        variables = jax.eval_shape(Net().init, jax.random.key(0), x)
        assert rows(lambda x, variables: Net().apply(variables, x), x, variables) == [CONV, ACT, CONV, ACT]


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_dropout_at_inference_is_nothing(library: str):
    x, w, v = models.rng(0).normal(size=(2, 4)), np.ones((4, 4)), np.ones((4, 3))
    drop = {
        "linen": lambda x: nn.Dropout(0.5, deterministic=True).apply({}, x),
        "nnx": nnx.Dropout(0.5, deterministic=True),
    }[library]
    function = lambda x, w, v: drop(jax.nn.relu(drop(x @ w))) @ v
    assert rows(function, x, w, v) == [DENSE, ACT, DENSE]


# ---------------------------------------------------------------------------------------------------- activations

SLOPES = np.array([0.1, 0.2, 0.3, 0.4])


@jax.custom_jvp
def users_own(x):
    return x * jax.nn.sigmoid(1.5 * x) + 0.1 * jnp.tanh(x)


users_own.defjvp(lambda primals, tangents: (users_own(*primals), tangents[0]))


@jax.custom_vjp
def users_other(x):
    return jnp.maximum(x, 0) - 0.1 * jnp.minimum(x, 0) ** 2


users_other.defvjp(lambda x: (users_other(x), x), lambda x, g: (g,))

ACTIVATIONS: dict[str, Callable] = {
    "relu": jax.nn.relu,
    "relu, linen": nn.relu,
    "relu, nnx": nnx.relu,
    "relu, maximum": lambda x: jnp.maximum(x, 0),
    "relu, maximum from the left": lambda x: jnp.maximum(0.0, x),
    "relu, lax": lambda x: lax.max(x, jnp.zeros_like(x)),
    "relu, clip": lambda x: jnp.clip(x, 0),
    "relu, where": lambda x: jnp.where(x > 0, x, 0),
    "relu, select": lambda x: lax.select(x > 0, x, jnp.zeros_like(x)),
    "relu, product": lambda x: x * (x > 0),
    "relu, product of floats": lambda x: x * (x > 0).astype(x.dtype),
    "relu, absolute value": lambda x: (x + jnp.abs(x)) / 2,
    "relu6": jax.nn.relu6,
    "relu6, clip": lambda x: jnp.clip(x, 0, 6),
    "relu6, min of max": lambda x: jnp.minimum(jnp.maximum(x, 0), 6),
    "relu6, max of min": lambda x: jnp.maximum(jnp.minimum(x, 6), 0),
    "relu6, clamp": lambda x: lax.clamp(0.0, x, 6.0),
    "leaky relu": jax.nn.leaky_relu,
    "leaky relu, where": lambda x: jnp.where(x > 0, x, 0.1 * x),
    "leaky relu, maximum": lambda x: jnp.maximum(x, 0.1 * x),
    "elu": jax.nn.elu,
    "elu, where": lambda x: jnp.where(x > 0, x, jnp.exp(x) - 1),
    "selu": jax.nn.selu,
    "celu": jax.nn.celu,
    "silu": jax.nn.silu,
    "silu, linen": nn.silu,
    "silu, product": lambda x: x * jax.nn.sigmoid(x),
    "silu, product from the right": lambda x: jax.nn.sigmoid(x) * x,
    "silu, lax": lambda x: x * lax.logistic(x),
    "silu, quotient": lambda x: x / (1 + jnp.exp(-x)),
    "swish with a factor": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu, exact": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu, tanh": lambda x: 0.5 * x * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu, tanh of products": lambda x: (x * 0.5) * (jnp.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x)) + 1.0),
    "gelu, erf": lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2))),
    "gelu, erfc": lambda x: 0.5 * x * erfc(-x / np.sqrt(2)),
    "gelu, normal distribution": lambda x: x * normal.cdf(x),
    "tanh": jnp.tanh,
    "tanh, nnx": nnx.tanh,
    "sigmoid": jax.nn.sigmoid,
    "sigmoid, quotient": lambda x: 1 / (1 + jnp.exp(-x)),
    "softplus": jax.nn.softplus,
    "softplus, logaddexp": lambda x: jnp.logaddexp(x, 0.0),
    "softplus, log of exp": lambda x: jnp.log(1 + jnp.exp(x)),
    "hard swish": jax.nn.hard_swish,
    "hard swish, relu6": lambda x: x * jax.nn.relu6(x + 3) / 6,
    "hard swish, clip": lambda x: x * jnp.clip(x + 3, 0, 6) / 6,
    "hard swish, min of max": lambda x: x * jnp.minimum(jnp.maximum(x + 3, 0), 6) / 6,
    "hard swish, hard sigmoid": lambda x: x * jax.nn.hard_sigmoid(x),
    "hard sigmoid": jax.nn.hard_sigmoid,
    "hard tanh": jax.nn.hard_tanh,
    "hard tanh, clip": lambda x: jnp.clip(x, -1, 1),
    "mish": jax.nn.mish,
    "mish, product": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    "log sigmoid": jax.nn.log_sigmoid,
    "squareplus": jax.nn.squareplus,
    "squareplus, by hand": lambda x: 0.5 * (x + jnp.sqrt(x * x + 4)),
    "soft sign": jax.nn.soft_sign,
    "soft sign, quotient": lambda x: x / (1 + jnp.abs(x)),
    "prelu, array of slopes": lambda x: jnp.where(x >= 0, x, SLOPES * x),
    "prelu, maximum and minimum": lambda x: jnp.maximum(x, 0) + SLOPES * jnp.minimum(x, 0),
    "prelu, linen": lambda x: nn.PReLU().apply({"params": {"negative_slope": jnp.float64(0.3)}}, x),
    "square": jnp.square,
    "square, product": lambda x: x * x,
    "exponential": jnp.exp,
    "user's own, custom_jvp": users_own,
    "user's own, custom_vjp": users_other,
}
every_activation = pytest.mark.parametrize("act", ACTIVATIONS.values(), ids=ACTIVATIONS)


def two_layers(act: Callable) -> tuple[Callable, tuple[np.ndarray, ...]]:
    rng = models.rng(30)
    arrays = rng.normal(size=(3, 5)), rng.normal(size=(5, 4)), rng.normal(size=4), rng.normal(size=(4, 2))
    return lambda x, w, b, v: act(x @ w + b) @ v, arrays


@every_activation
def test_activation_is_one_layer(act: Callable):
    function, arrays = two_layers(act)
    for title, wrap in WRAPS.items():
        table = plan(wrap(function), COMPOSITE)(*arrays)
        assert [(row.kind, type(row.rule).__name__) for row in table] == [DENSE, ACT, DENSE], f"{title}\n{table}"
    function, arrays = two_layers(jax.jit(act))
    assert rows(function, *arrays) == [DENSE, ACT, DENSE]


@every_activation
def test_activation_passes_relevance(act: Callable):
    """Signed rules at both ends, so that nothing of the activation may have joined a dense layer."""
    function, (x, w, b, v) = two_layers(act)
    composite = Composite([(select.kind("dense"), rules.ZPlus())])
    hidden = x @ w + b
    output = np.asarray(act(jnp.asarray(hidden)))
    value, got = value_and_lrp(function, composite)(x, w, b, v)
    close(value, output @ v)
    positive = lambda a: np.maximum(a, 0)

    def zplus(a, w, b, R):
        shares = positive(a[:, :, None] * w)
        total = (shares.sum(1) + positive(b))[:, None]
        return (np.divide(shares, total, out=np.zeros_like(shares), where=total > 0) * R[:, None]).sum(2)

    close(got, zplus(x, w, b, zplus(output, v, np.zeros(2), output @ v)))


def test_prelu_slopes_as_parameters():
    x, w, v = np.zeros((2, 5)), np.zeros((5, 4)), np.zeros((4, 2))
    functions = {
        "where": lambda x, w, v, slopes: jnp.where(x @ w >= 0, x @ w, slopes * (x @ w)) @ v,
        "where, one product": lambda x, w, v, slopes: (lambda h: jnp.where(h >= 0, h, slopes * h))(x @ w) @ v,
    }
    assert rows(functions["where, one product"], x, w, v, SLOPES) == [DENSE, ACT, DENSE]

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.PReLU()(nn.Dense(4)(x)))

    variables = Net().init(jax.random.key(0), x)
    assert rows(lambda x, variables: Net().apply(variables, x), x, variables) == [DENSE, ACT, DENSE]
    model = nnx.Sequential(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), nnx.PReLU(), nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    assert rows(lambda x, state: nnx.merge(graph, state)(x), x, state) == [DENSE, ACT, DENSE]


def test_activation_right_at_the_input_and_at_the_end():
    x = models.rng(0).normal(size=(2, 4))
    for act in (jax.nn.gelu, jax.nn.silu, jax.nn.relu, lambda x: x * jax.nn.sigmoid(x)):
        assert rows(lambda x, act=act: act(x), x) == [ACT]
        assert rows(lambda x, act=act: act(act(x)), x) == [ACT, ACT]


def test_activation_beside_a_skip():
    """The value that enters the activation is read outside it as well."""
    x, w, v = models.rng(0).normal(size=(2, 4)), np.ones((4, 4)), np.ones((4, 4))

    def function(x, w, v, act):
        h = x @ w
        return act(h) @ v + h

    for act in (jax.nn.silu, jax.nn.gelu, jax.nn.relu, lambda x: x * jax.nn.sigmoid(x), lambda x: x * (x > 0)):
        assert rows(lambda x, w, v, act=act: function(x, w, v, act), x, w, v) == [DENSE, ACT, DENSE, ADD]


def test_gate_of_another_layer_is_a_product():
    x, w, v = models.rng(0).normal(size=(2, 4)), np.ones((4, 4)), np.ones((4, 4))
    assert rows(lambda x, w, v: (x @ w) * jax.nn.silu(x @ v), x, w, v) == [DENSE, DENSE, ACT, PRODUCT]
    assert rows(lambda x, w, v: (x @ w) * (x @ v), x, w, v) == [DENSE, DENSE, PRODUCT]


def test_interleaved_values_are_moved():
    """`lax.associative_scan` writes it as a sum of two values with zeros between, where each only meets zeros."""
    moved = lambda x, y: lax.pad(x, 0.0, [(0, 1, 1)]) + lax.pad(y, 0.0, [(1, 0, 1)])
    added = lambda x, y: lax.pad(x, 0.0, [(0, 2, 1)]) + lax.pad(y, 0.0, [(1, 1, 1)]) + lax.pad(x, 0.0, [(2, 0, 1)])
    filled = lambda x, y: lax.pad(x, 1.0, [(0, 1, 1)]) + lax.pad(y, 0.0, [(1, 0, 1)])
    read = lambda x, y: ((p := lax.pad(x, 0.0, [(0, 1, 1)])) + lax.pad(y, 0.0, [(1, 0, 1)])) * p
    x, y, start = np.array([0.0, 1.0, 2.0]), np.array([3.0, 0.0, 4.0]), np.arange(1.0, 7.0)
    kinds_of = lambda f: [r.kind for r in plan(f, composites.epsilon(), argnums=(0, 1))(x, y)]
    assert kinds_of(moved) == ["structural"]
    assert kinds_of(added).count("add") == kinds_of(filled).count("add") == kinds_of(read).count("add") == 1
    # what is zero keeps its relevance: nothing is divided
    got = lrp(moved, composites.epsilon(), argnums=(0, 1), target=lambda z: start)(x, y)
    np.testing.assert_array_equal(got, ([1.0, 3.0, 5.0], [2.0, 4.0, 6.0]))


# ---------------------------------------------------------------------------------------------------- softmax

SOFTMAXES: dict[str, Callable] = {
    "jax.nn": jax.nn.softmax,
    "linen": nn.softmax,
    "jit": jax.jit(jax.nn.softmax),
    "by hand": lambda z: jnp.exp(z) / jnp.exp(z).sum(-1, keepdims=True),
    "by hand, one exponential": lambda z: (e := jnp.exp(z)) / e.sum(-1, keepdims=True),
    "by hand, shifted": lambda z: (e := jnp.exp(z - z.max(-1, keepdims=True))) / e.sum(-1, keepdims=True),
    "by hand, shifted by a constant": lambda z: (
        (e := jnp.exp(z - lax.stop_gradient(z.max(-1, keepdims=True)))) / e.sum(-1, keepdims=True)
    ),
    "by hand, in jit": jax.jit(lambda z: (e := jnp.exp(z - z.max(-1, keepdims=True))) / jnp.sum(e, -1)[:, None]),
    "by hand, through logsumexp": lambda z: jnp.exp(z - logsumexp(z, -1, keepdims=True)),
}
LOG_SOFTMAXES: dict[str, Callable] = {
    "jax.nn": jax.nn.log_softmax,
    "linen": nn.log_softmax,
    "logsumexp": lambda z: z - logsumexp(z, axis=-1, keepdims=True),
    "by hand": lambda z: z - jnp.log(jnp.exp(z).sum(-1, keepdims=True)),
    "by hand, shifted": lambda z: (s := z - z.max(-1, keepdims=True)) - jnp.log(jnp.exp(s).sum(-1, keepdims=True)),
    "by hand, shifted by a constant": lambda z: (
        (s := z - lax.stop_gradient(z.max(-1, keepdims=True))) - jnp.log(jnp.exp(s).sum(-1, keepdims=True))
    ),
}
ENDS = {f"softmax, {k}": f for k, f in SOFTMAXES.items()} | {f"log_softmax, {k}": f for k, f in LOG_SOFTMAXES.items()}
every_end = pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)


def classifier(end: Callable) -> tuple[Callable, tuple]:
    p = models.mlp_parameters(5, 4, 3)
    return lambda x, p: end(models.mlp(x, p)), (models.rng(40).normal(size=(2, 5)), p)


@every_end
def test_softmax_is_one_layer_and_the_plan_says_so(end: Callable):
    function, arrays = classifier(end)
    for title, wrap in WRAPS.items():
        table = plan(wrap(function), COMPOSITE)(*arrays)
        got = [(row.kind, type(row.rule).__name__) for row in table]
        assert got == [DENSE, ACT, DENSE, SOFTMAX], f"{title}\n{table}"
        assert len(table.notes) == 1 and "jaxlrp.logits(" in table.notes[0], title
        assert table.notes[0] in str(table) and table[-1].name in table.notes[0]


@every_wrap
@every_end
def test_logits(end: Callable, wrap):
    function, (x, p) = classifier(end)
    before = logits(wrap(function))
    close(before(x, p), models.mlp(x, p))
    assert rows(before, x, p) == [DENSE, ACT, DENSE]
    assert not plan(before, COMPOSITE)(x, p).notes


def test_relevance_of_logits():
    x, p = classifier(jax.nn.softmax)[1]
    right = lrp(models.mlp, COMPOSITE, target=1)(x, p)
    for end in (jax.nn.softmax, jax.nn.log_softmax, SOFTMAXES["by hand, shifted"]):
        close(lrp(logits(classifier(end)[0]), COMPOSITE, target=1)(x, p), right)
        close(jax.jit(lrp(logits(jax.jit(classifier(end)[0])), COMPOSITE, target=1))(x, p), right)


@pytest.mark.parametrize("end", SOFTMAXES.values(), ids=SOFTMAXES)
def test_softmax_rule_is_applied_to_the_raw_logits(end: Callable):
    """R_i = z_i (R_i - s_i sum_j R_j) changes when logits are shifted: z - max(z) would be something else."""
    z = np.array([[1.0, -2.0, 0.5], [3.0, 0.0, 3.5]])
    s = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    R = s * [0, 1, 0]
    close(lrp(end, Composite(), target=1)(z), z * (R - s * R.sum(-1, keepdims=True)))


@pytest.mark.parametrize("end", LOG_SOFTMAXES.values(), ids=LOG_SOFTMAXES)
def test_log_softmax_has_one_relevance(end: Callable):
    z = np.array([[1.0, -2.0, 0.5], [3.0, 0.0, 3.5]])
    close(lrp(end, Composite(), target=1)(z), lrp(jax.nn.log_softmax, Composite(), target=1)(z))


def test_logits_of_a_function_without_softmax():
    x, p = classifier(jax.nn.softmax)[1]
    close(logits(models.mlp)(x, p), models.mlp(x, p))
    # a softmax on the way is no end
    inner = lambda x, p: dense(jax.nn.softmax(dense(x, p[0])), p[1])
    close(logits(inner)(x, p), inner(x, p))
    assert rows(inner, x, p) == [DENSE, SOFTMAX, DENSE] and not plan(inner, COMPOSITE)(x, p).notes


@pytest.mark.parametrize(
    "behind", [lambda y: y[0], lambda y: y.squeeze(), lambda y: y.T, lambda y: y.astype("float32")]
)
def test_softmax_behind_a_move_is_an_end(behind: Callable):
    """A model of batches, explained for one image: `softmax(model(x[None]))[0]`."""
    p = models.mlp_parameters(5, 4, 3)
    x = models.rng(40).normal(size=5)
    function = lambda x, p: behind(jax.nn.softmax(models.mlp(x[None], p)))
    table = plan(function, COMPOSITE)(x, p)
    assert [row for row in rows(function, x, p) if row != MOVE] == [DENSE, ACT, DENSE, SOFTMAX]
    assert len(table.notes) == 1, str(table)
    close(logits(function)(x, p), behind(models.mlp(x[None], p)), 1e-6)


BEFORE_SOFTMAX: dict[str, tuple[Callable, list[tuple[str, str]]]] = {
    "temperature": (lambda h: h / 0.5, []),
    "centred": (lambda h: h - h.mean(-1, keepdims=True), [REDUCE, ADD]),
    "difference of halves": (lambda h: h[:, :2] - h[:, 2:], [MOVE, MOVE, ADD]),
    "differences of pairs": (lambda h: h[:, None] - h[None], [MOVE, MOVE, ADD]),
    "softmax": (jax.nn.softmax, [SOFTMAX]),
    "activation": (jnp.tanh, [ACT]),
}


@pytest.mark.parametrize("front, between", BEFORE_SOFTMAX.values(), ids=BEFORE_SOFTMAX)
def test_softmax_begins_at_its_logits(front: Callable, between: list):
    """And not at a difference before them; the relevance of the logits is the rule's."""
    x, w = models.rng(42).normal(size=(2, 5)), models.rng(43).normal(size=(5, 4))
    function = lambda x, w: jax.nn.softmax(front(x @ w))
    assert rows(function, x, w) == [DENSE, *between, SOFTMAX]
    relevance = lrp(function, COMPOSITE, target=lambda y: y**2)(x, w)
    in_two = lambda R: lrp(lambda x, w: front(x @ w), COMPOSITE, target=lambda z: R)(x, w)
    z = np.asarray(front(jnp.asarray(x @ w)))
    s = np.asarray(jax.nn.softmax(z))
    close(relevance, in_two(z * (s**2 - s * (s**2).sum(-1, keepdims=True))))


NO_SOFTMAX: dict[str, Callable] = {
    "logits times exponentials": lambda h: h * (e := jnp.exp(h)) / e.sum(-1, keepdims=True),
    "other exponentials below": lambda h: jnp.exp(h) / jnp.exp(-h).sum(-1, keepdims=True),
    "squares above": lambda h: (e := jnp.exp(h)) ** 2 / e.sum(-1, keepdims=True),
    "square root of the sum": lambda h: (e := jnp.exp(h)) / jnp.sqrt(e.sum(-1, keepdims=True)),
    "mean": lambda h: (e := jnp.exp(h)) / e.mean(-1, keepdims=True),
    "sum of relus": lambda h: (e := jax.nn.relu(h)) / e.sum(-1, keepdims=True),
    "another value less logsumexp": lambda h: jnp.tanh(h) - jnp.log(jnp.exp(h).sum(-1, keepdims=True)),
    "twice the value less logsumexp": lambda h: 2 * h - jnp.log(jnp.exp(h).sum(-1, keepdims=True)),
    "without the logarithm": lambda h: h - jnp.exp(h).sum(-1, keepdims=True),
}


@pytest.mark.parametrize("function", NO_SOFTMAX.values(), ids=NO_SOFTMAX)
def test_what_is_no_softmax(function: Callable):
    """An exponential, a sum and a quotient do not make one: its rule would take the output for probabilities."""
    x, w = models.rng(42).normal(size=(2, 5)), models.rng(43).normal(size=(5, 4))
    assert SOFTMAX not in rows(lambda x, w: function(x @ w), x, w)


def test_softmax_over_another_axis_and_with_a_mask():
    z, v = models.rng(41).normal(size=(2, 3)), np.ones((3, 3))
    mask = np.array([True, False, True])
    assert rows(lambda z, v: jax.nn.softmax(z @ v, axis=0), z, v) == [DENSE, SOFTMAX]
    assert rows(lambda z, v: jax.nn.softmax(z @ v, axis=(0, 1)), z, v) == [DENSE, SOFTMAX]
    masked = lambda z, v, mask: jax.nn.softmax(jnp.where(mask, z @ v, -jnp.inf))
    assert rows(masked, z, v, mask) == [DENSE, MOVE, SOFTMAX]
    assert np.isfinite(lrp(masked, COMPOSITE, target=0)(z, v, mask)).all()


# ---------------------------------------------------------------------------------------------------- names


def test_names_of_layers_that_share_weights():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            shared, other = nn.Conv(3, (3, 3)), nn.Conv(3, (3, 3))
            return nn.relu(shared(nn.relu(other(nn.relu(shared(x))))))

    x = models.images()
    params = Net().init(jax.random.key(0), x)["params"]
    got = names(lambda x, params: Net().apply({"params": params}, x), x, params)
    assert got == ["Conv_0", "Conv_1", "Conv_0#2"]
    assert names(lambda x, p: dense(jnp.tanh(dense(jnp.tanh(dense(x, p)), p)), p), np.ones(3), {
        "kernel": np.ones((3, 3)), "bias": np.ones(3),
    }) == ["kernel", "kernel#2", "kernel#3"]  # fmt: skip


def test_names_from_parameters():
    x, w = np.ones((2, 3)), np.ones((3, 3))
    assert names(lambda x, p: x @ p["encoder"]["layer_0"]["kernel"], x, {"encoder": {"layer_0": {"kernel": w}}}) == [
        "encoder/layer_0"
    ]
    assert names(lambda x, w: x @ w, x, w) == ["w"]
    assert names(lambda x, layers: (x @ layers[0]["w"]) @ layers[1]["w"], x, [{"w": w}, {"w": w}]) == ["0", "1"]
    # an argument's name is prefixed only where two arguments have the same path
    two = lambda x, first, second: (x @ first["a"]["w"]) @ second["a"]["w"] @ second["b"]["w"]
    assert names(two, x, {"a": {"w": w}}, {"a": {"w": w}, "b": {"w": w}}) == ["first/a", "second/a", "b"]


def test_names_come_from_the_kernel():
    """And not from the bias, nor from the norm that was folded into it."""
    function = lambda x, p: batch_norm(p["later"]["bias"] + conv(x, p["stem"]["kernel"]), p["norm"])
    p = {"later": {"bias": np.zeros(4)}, "stem": models.numbers()["stem"], "norm": models.numbers()["norm"]}
    assert names(function, models.images(), p) == ["stem"]


def test_names_where_parameters_are_closed_over():
    """The name stack, where the model leaves one; else the position."""
    linen, _, plain = models.cnns()
    x = models.images()
    assert names(lambda x: linen.apply(x, linen.parameters), x) == ["LinenCNN/stem", "LinenCNN/block", "LinenCNN/head"]
    assert names(lambda x: plain.apply(x, plain.parameters), x) == ["conv[0]", "conv[1]", "dense[0]"]
    w = np.ones((3, 3))

    def scoped(x):
        with jax.named_scope("first"):
            x = jnp.tanh(x @ w)
        return x @ w

    assert names(scoped, np.ones(3)) == ["first", "dense[1]"]


# ---------------------------------------------------------------------------------------------------- signs

NONNEGATIVE: dict[str, Callable] = {
    "relu": jax.nn.relu,
    "relu, maximum": lambda h: jnp.maximum(h, 0),
    "relu, where": lambda h: jnp.where(h > 0, h, 0) ** 2,
    "relu6": jax.nn.relu6,
    "clip": lambda h: jnp.clip(h, 0, 1),
    "sigmoid": jax.nn.sigmoid,
    "hard sigmoid": jax.nn.hard_sigmoid,
    "softmax": jax.nn.softmax,
    "softmax by hand": SOFTMAXES["by hand, shifted"],
    "square": jnp.square,
    "product with itself": lambda h: h * h,
    "even power": lambda h: h**4,
    "absolute value": jnp.abs,
    "exponential": jnp.exp,
    "max-pool of relu": lambda h: lax.reduce_window(jax.nn.relu(h), -jnp.inf, lax.max, (1, 1), (1, 1), "SAME"),
    "mean of relu": lambda h: jnp.repeat(jax.nn.relu(h).mean(-1, keepdims=True), 4, -1),
    "reshape of relu": lambda h: jax.nn.relu(h).reshape(4, 3).T,
    "concatenation of relus": lambda h: jnp.concatenate([jax.nn.relu(h)[:, :2], jax.nn.sigmoid(h)[:, 2:]], -1),
    "sum of relus": lambda h: jax.nn.relu(h) + jax.nn.relu(-h),
    "factor after relu": lambda h: jax.nn.relu(h) * 2 / 3,
    "relu, sorted": lambda h: jnp.sort(jax.nn.relu(h)),
    "relu, sorted by something signed": lambda h: lax.sort((h, jax.nn.relu(h)), num_keys=1)[1],
    "largest of relu": lambda h: lax.top_k(jax.nn.relu(h), 4)[0],
    "relu, taken": lambda h: jax.nn.relu(h)[:, jnp.asarray([3, 0, 0, 2])],
    "relu with a place set": lambda h: jax.nn.relu(h).at[:, 1].set(2),
    "relu with a slice replaced": lambda h: lax.dynamic_update_slice(jax.nn.relu(h), h[:, :1] ** 2, (0, 1)),
    "sum in segments": lambda h: jax.ops.segment_sum(jax.nn.relu(h), jnp.asarray([0, 2, 0]), 3),
    "cumulative product": lambda h: jnp.cumprod(jax.nn.relu(h), 1),
    "incomplete gamma function": lambda h: jax.scipy.special.gammainc(2.0, h * h),
    "behind a barrier": lambda h: lax.optimization_barrier((jax.nn.relu(h), h))[0],
    "modulus": lambda h: jnp.abs(h + 1j),
}
SIGNED: dict[str, Callable] = {
    "nothing": lambda h: h,
    "gelu": jax.nn.gelu,
    "exact gelu": lambda h: jax.nn.gelu(h, approximate=False),
    "gelu by hand": ACTIVATIONS["gelu, tanh"],
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "elu": jax.nn.elu,
    "leaky relu": jax.nn.leaky_relu,
    "hard tanh": jax.nn.hard_tanh,
    "clip": lambda h: jnp.clip(h, -1, 1),
    "difference of relus": lambda h: jax.nn.relu(h) - jax.nn.relu(-h),
    "relu less one": lambda h: jax.nn.relu(h) - 1,
    "relu turned round": lambda h: -jax.nn.relu(h),
    "odd power": lambda h: h**3,
    "relu and skip": lambda h: jax.nn.relu(h) + h,
    "parameter after relu": lambda h: jax.nn.relu(h) * models.rng(3).normal(size=4),
    "padding of minus one": lambda h: jnp.pad(jax.nn.relu(h)[:, 1:-1], ((0, 0), (1, 1)), constant_values=-1),
    "log softmax": jax.nn.log_softmax,
    "sorted": jnp.sort,
    "filled with minus one": lambda h: jnp.take(jax.nn.relu(h), jnp.arange(1, 5), 1, mode="fill", fill_value=-1),
    "relu with places set to minus one": lambda h: jax.nn.relu(h).at[:, 1].set(-1),
    "relu less, in place": lambda h: jax.nn.relu(h).at[:, 1].subtract(1),
    "smooth cumulative maximum": lambda h: lax.cumlogsumexp(jax.nn.relu(h) - 4, 1),
    "rotated twice": lambda h: ((1 + 2j) * (1 + 1j) * jax.nn.relu(h)).real,
}


def last_dense(front: Callable) -> tuple[Op, np.ndarray]:
    """The dense layer behind `front`, and what enters its core."""
    rng = models.rng(50)
    x, w, v = rng.normal(size=(3, 5)), 3 * rng.normal(size=(5, 4)), rng.normal(size=(4, 2))
    return ops(lambda x, w, v: front(x @ w) @ v, x, w, v)[-1], np.asarray(front(jnp.asarray(x @ w)))


@pytest.mark.parametrize("front", NONNEGATIVE.values(), ids=NONNEGATIVE)
def test_nonnegative_inputs_are_known(front: Callable):
    op, value = last_dense(front)
    assert op.kind == "dense" and (value >= 0).all()
    assert op.linear.nonneg


@pytest.mark.parametrize("front", SIGNED.values(), ids=SIGNED)
def test_signed_inputs_are_not_taken_for_nonnegative(front: Callable):
    op, value = last_dense(front)
    assert op.kind == "dense" and (value < 0).any()
    assert not op.linear.nonneg


def test_signs_of_every_input():
    def function(x, w):
        h = x @ w
        return jax.nn.relu(h) + jax.nn.gelu(h) + jax.nn.sigmoid(h)

    dense_, *_, add = ops(function, np.ones((2, 4)), np.ones((4, 4)))
    assert dense_.nonneg == (False,) and not dense_.linear.nonneg
    assert sorted(add.nonneg) == [False, True, True]


def test_signs_of_a_batch_norm_that_joined():
    """What enters the Op is non-negative, what enters its core is not."""
    _, _, block = ops(batch_norm_right_before_a_conv, models.images(), P)
    assert block.nonneg == (True,) and not block.linear.nonneg


def test_signs_of_a_carry_are_a_fixpoint():
    def loop(x, w, start):
        return lax.scan(lambda h, _: (jax.nn.relu(h @ w), None), start(x), None, length=3)[0]

    x, w = models.rng(0).normal(size=(2, 4)), np.ones((4, 4))
    for start, known in ((jax.nn.relu, True), (lambda x: x, False)):
        (op,) = [op for op in ops(lambda x, w, start=start: loop(x, w, start), x, w) if op.kind == "dense"]
        assert op.linear.nonneg is known
    # non-negative at first, signed from the second turn on
    turned = lambda x, w: lax.scan(lambda h, _: (-jax.nn.relu(h @ w), None), jax.nn.relu(x), None, length=3)[0]
    (op,) = [op for op in ops(turned, x, w) if op.kind == "dense"]
    assert not op.linear.nonneg


def test_signs_do_not_change_relevance():
    """The cheap form for non-negative inputs is the general one."""
    rng = models.rng(51)
    x, w, v = rng.normal(size=(3, 5)), rng.normal(size=(5, 4)), rng.normal(size=(4, 2))
    hide = lambda h: h * models.rng(0).uniform(1, 1, size=4)  # a parameter whose sign is not known
    for rule in (rules.ZPlus(), rules.AlphaBeta(2.0, 1.0), rules.GeneralizedGamma(0.3)):
        composite = Composite([(select.kind("dense"), rule)])
        known = lambda x, w, v: jax.nn.relu(x @ w) @ v
        unknown = lambda x, w, v: hide(jax.nn.relu(x @ w)) @ v
        assert ops(known, x, w, v)[-1].linear.nonneg and not ops(unknown, x, w, v)[-1].linear.nonneg
        close(lrp(known, composite)(x, w, v), lrp(unknown, composite)(x, w, v))
