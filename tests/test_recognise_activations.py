"""Recognition of activations: each is one layer that passes relevance, however it is written; a gate is a product."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from activations import ACTIVATIONS, SLOPES
from jaxlrp import Composite, plan, rules, select, value_and_lrp
from nets import quick_compilation  # noqa: F401
from recognition import ACT, ADD, COMPOSITE, DENSE, PRODUCT, WRAPS, close, rows

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
