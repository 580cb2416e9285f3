"""Values: rewriting a program never changes what it computes, and no parameter receives relevance."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import nets
from jaxlrp import lrp, plan, rewrite, value_and_lrp
from nets import LOCAL, close, draw, quick_compilation, same  # noqa: F401
from programs import EPSILON, MLP, B, W, X, single, variables_of

pytestmark = pytest.mark.smoke


@pytest.fixture
def optimised() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


ACTIVATIONS = {f.__name__: f for f in (
    jax.nn.relu, jax.nn.relu6, jax.nn.elu, jax.nn.celu, jax.nn.selu, jax.nn.silu, jax.nn.sigmoid, jax.nn.softplus,
    jax.nn.hard_sigmoid, jax.nn.hard_tanh, jax.nn.hard_silu, jax.nn.leaky_relu, jax.nn.log_sigmoid, jax.nn.mish,
    jax.nn.soft_sign, jax.nn.squareplus, jax.nn.sparse_plus, jax.nn.sparse_sigmoid, jax.nn.softmax, jax.nn.log_softmax,
    jnp.tanh, jnp.sin, jnp.exp, jnp.abs, jnp.square, jnp.arctan, jnp.sinh, jax.scipy.special.erf,
)} | {
    "gelu-tanh": jax.nn.gelu,
    "gelu-erf": partial(jax.nn.gelu, approximate=False),
    "glu": jax.nn.glu,
    "leaky-by-maximum": lambda x: jnp.maximum(x, 0.1 * x),
    "leaky-by-where": lambda x: jnp.where(x > 0, x, 0.2 * x),
    "clip": lambda x: jnp.clip(x, -0.5, 0.5),
    "cube": lambda x: x**3,
    "silu-by-hand": lambda x: x / (1 + jnp.exp(-x)),
    "gelu-by-hand": lambda x: 0.5 * x * (1 + jnp.tanh(0.8 * (x + 0.04 * x**3))),
}  # fmt: skip


def hidden(activation):
    """A function that neither begins nor ends with the activation, and its arguments."""
    x, w, b = single(X, draw(2, 4, 6), draw(3, 6))
    return lambda x, w, b, v: activation(x @ w + b) @ v, (
        x,
        w,
        b,
        *single(draw(4, jax.eval_shape(activation, b).shape[-1], 2)),
    )


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_value_with_activation(activation):
    f, args = hidden(activation)
    same(rewrite(f, EPSILON)(*args), f(*args))


def test_compiled_value_with_activations():
    functions = {name: hidden(activation) for name, activation in ACTIVATIONS.items()}
    compiled = jax.jit(lambda: {name: value_and_lrp(f, EPSILON)(*args) for name, (f, args) in functions.items()})()
    close(
        {name: value for name, (value, _) in compiled.items()},
        {name: f(*args) for name, (f, args) in functions.items()},
        1e-6,
    )
    for name, (_, relevance) in compiled.items():
        assert np.isfinite(relevance).all() and np.any(relevance) and relevance.dtype == np.float32, name


def check_value(f, *args):
    """The value of `f`: bit for bit as it runs eagerly; compiled, and beside the relevance, to float32's rounding."""
    right = f(*args)
    same(rewrite(f, EPSILON)(*args), right)
    value, relevance = jax.jit(value_and_lrp(f, EPSILON))(*args)
    close(value, right, 1e-6)
    assert np.isfinite(relevance).all() and np.any(relevance)
    assert relevance.shape == args[0].shape and relevance.dtype == args[0].dtype


def test_value_of_cnn(optimised):
    (x,) = single(draw(5, 2, 4, 4, 2))
    f, p = lambda x, p: nets.cnn(p, x), nets.cnn_parameters(dtype=np.float32)
    check_value(f, x, p)
    close(jax.jit(rewrite(f, EPSILON))(x, p), f(x, p), 1e-6)


def test_value_of_flax_resnet(optimised):
    model, (x,) = nets.ResNet(), single(draw(6, 2, 8, 8, 3))
    check_value(lambda x, variables: model.apply(variables, x), x, variables_of(model, x))


def attention(x):
    """Two batches, three positions, two heads of two features; all three operands are data."""
    heads = jnp.stack([x, -x]).reshape(2, 3, 2, 2)
    return jax.nn.dot_product_attention(heads, jnp.tanh(heads), heads**2)


PROGRAMS = {
    "attention": attention,
    "cumsum": lambda x: jnp.cumsum(x @ W, 1),
    "derivative": lambda x: jax.grad(lambda x: (jax.nn.relu(x @ W) ** 2).sum())(x),
    "dropout": lambda x: jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, x.shape), 2 * x, 0) @ W,
    "dynamic slice": lambda x: lax.dynamic_slice(x, (np.argmax(B) % 2, 0), (2, 3)) @ W[:3],
    "dynamic update": lambda x: lax.dynamic_update_slice(jnp.ones((5, 4)), x, (1, 0)) @ W,
    "einsum of three": lambda x: jnp.einsum("ni,ij,nk->jk", x, W, x),
    "gather": lambda x: x[:, jnp.asarray([2, 0, 2])] @ W[:3],
    "logsumexp": lambda x: jax.nn.logsumexp(x @ W, 1),
    "resize": lambda x: jax.image.resize(x, (6, 5), "bilinear") @ jnp.ones((5, 2)),
    "roll and pad": lambda x: jnp.pad(jnp.roll(x, 1, 1), ((1, 0), (0, 1)), constant_values=2.0) @ draw(21, 5, 2),
    "statistics": lambda x: (x - x.mean(1, keepdims=True)) / jnp.sqrt(x.var(1, keepdims=True) + 0.1) @ W,
    "straight-through": lambda x: (x + lax.stop_gradient(jnp.round(x) - x)) @ W,
    "vmap": lambda x: jax.vmap(lambda x: jax.nn.relu(W.T @ x))(x),
    "while among parameters": lambda x: x @ lax.while_loop(lambda w: (w**2).sum() > 1, lambda w: w / 2, W),
}  # fmt: skip


@pytest.mark.parametrize("f", PROGRAMS.values(), ids=PROGRAMS)
def test_value_of_program(f):
    """What people write: the value stays, and relevance is of the value's magnitude."""
    right = f(X)
    same(rewrite(f, EPSILON)(X), right)
    value, relevance = jax.jit(value_and_lrp(f, EPSILON))(X)
    close(value, right)
    assert 0 < abs(relevance).sum() < 100 * abs(right).sum()


def test_value_of_layer_across_jit_boundary():
    """The bias outside belongs to the product inside: the wrapper falls, and the value stays to rounding."""
    inner = jax.jit(lambda x, w: x @ w)
    across, plain = (partial(lambda dot, x, w, b: jnp.tanh(dot(x, w) + b), dot) for dot in (inner, jnp.matmul))
    args = single(X, W, B)
    assert [row.kind for row in plan(across, EPSILON)(*args)] == ["dense", "activation"]
    close(rewrite(across, EPSILON)(*args), across(*args), 1e-6)
    close(lrp(across, EPSILON)(*args), lrp(plain, EPSILON)(*args), 1e-6)


@pytest.mark.parametrize("composite", LOCAL.values(), ids=LOCAL)
def test_vjp_of_rewrite_is_lrp(composite):
    R = draw(7, 3, 3)
    _, pull = jax.vjp(rewrite(MLP, composite), X)
    close(pull(R)[0], lrp(MLP, composite, target=lambda y: R)(X))


def test_parameters_receive_no_relevance():
    _, pull = jax.vjp(rewrite(nets.mlp, EPSILON, argnums=1), nets.mlp_parameters(4, 6, 3), X)
    parameters, relevance = pull(draw(7, 3, 3))
    assert np.any(relevance) and not any(np.any(r) for r in jax.tree.leaves(parameters))
