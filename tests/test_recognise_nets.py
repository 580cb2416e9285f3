"""Recognition of whole nets: equations become the layers a person would name, however they were written and wrapped."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import models
from jaxlrp import Composite, composites, lrp, plan, select, value_and_lrp
from nets import quick_compilation  # noqa: F401
from recognition import (
    ACT,
    ADD,
    BN,
    COMPOSITE,
    CONV,
    DENSE,
    LINEAR_NETS,
    OTHER_NETS,
    WRAPS,
    ZERO,
    Net,
    P,
    close,
    layer,
    names,
    ops,
    rows,
)
from recognition_nets import (
    NETS,
    add_of_three_from_the_left,
    add_of_three_from_the_right,
    add_that_is_read_twice,
    add_with_differences,
    batch_norm_between_two_convs,
    batch_norm_right_before_a_conv,
)


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
