"""Recognition of one CNN in linen, nnx and plain JAX: the same layers and the same relevance, however it is wrapped."""

from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from jaxlrp import composites, lrp, plan, rules, value_and_lrp
from models import batch_norm, conv, dense
from nets import quick_compilation  # noqa: F401
from recognition import ACT, COMPOSITE, CONV, DENSE, MOVE, REDUCE, WRAPS, ZERO, close, every_wrap, rows

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
