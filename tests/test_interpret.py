"""The transformation itself: rewriting never changes a value, and relevance passes every form in which JAX holds a program.

Wherever two programs compute the same thing (wrapped in `jit` or `remat`, as a loop or unrolled, one example at a time
or in a batch), their relevance must be the same; the plainest of them is the reference.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import nets
from jaxlrp import Composite, composites, lrp, plan, rewrite, rules, select, value_and_lrp
from nets import LOCAL, close, draw, same

pytestmark = pytest.mark.smoke

every_rule = pytest.mark.parametrize("composite", LOCAL.values(), ids=LOCAL)
some_rules = pytest.mark.parametrize("composite", [LOCAL[k] for k in ("epsilon", "zplus", "alpha-beta")],
                                     ids=["epsilon", "zplus", "alpha-beta"])  # fmt: skip
EPSILON = composites.epsilon(0.1)
X = draw(1, 3, 4)
W, B = draw(2, 4, 5), draw(3, 5)


# ---------------------------------------------------------------------------------------------------- values

ACTIVATIONS = {f.__name__: f for f in (
    jax.nn.relu, jax.nn.relu6, jax.nn.elu, jax.nn.celu, jax.nn.selu, jax.nn.silu, jax.nn.sigmoid, jax.nn.softplus,
    jax.nn.hard_sigmoid, jax.nn.hard_tanh, jax.nn.hard_silu, jax.nn.leaky_relu, jax.nn.log_sigmoid, jax.nn.mish,
    jax.nn.soft_sign, jax.nn.squareplus, jax.nn.sparse_plus, jax.nn.sparse_sigmoid, jax.nn.softmax, jax.nn.log_softmax,
    jnp.tanh, jnp.sin, jnp.exp, jnp.abs, jnp.square, jnp.arctan, jnp.sinh, jax.scipy.special.erf,
)} | {
    "gelu_tanh": jax.nn.gelu,
    "gelu_erf": partial(jax.nn.gelu, approximate=False),
    "glu": jax.nn.glu,
    "maximum": lambda x: jnp.maximum(x, 0.1 * x),
    "where": lambda x: jnp.where(x > 0, x, 0.2 * x),
    "clip": lambda x: jnp.clip(x, -0.5, 0.5),
    "cube": lambda x: x**3,
    "hand-written-silu": lambda x: x / (1 + jnp.exp(-x)),
    "hand-written-gelu": lambda x: 0.5 * x * (1 + jnp.tanh(0.8 * (x + 0.04 * x**3))),
}  # fmt: skip
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)


def activated(activation, x, w, b, v):
    return activation(x @ w + b) @ v


def check_value(f, *args):
    """The value of `f`: eager, bit for bit; compiled and beside the relevance, to float32's rounding."""
    rewritten, right = rewrite(f, EPSILON), f(*args)
    same(rewritten(*args), right)
    close(jax.jit(rewritten)(*args), right, 1e-6)
    value, relevance = value_and_lrp(f, EPSILON)(*args)
    close(value, right, 1e-6)
    assert np.isfinite(relevance).all()
    return relevance


@every_activation
def test_value_of_activations(activation):
    x, w, b = (v.astype(np.float32) for v in (X, draw(2, 4, 6), draw(3, 6)))
    v = draw(4, activation(b).shape[-1], 2, dtype=np.float32)
    relevance = check_value(partial(activated, activation), x, w, b, v)
    compiled = jax.jit(lrp(partial(activated, activation), EPSILON))(x, w, b, v)
    close(compiled, relevance, 1e-4)


def test_value_of_a_cnn():
    relevance = check_value(nets.cnn_on_x if False else lambda x, p: nets.cnn(p, x), CNN_X, CNN_P)
    assert relevance.shape == CNN_X.shape


CNN_X, CNN_P = draw(5, 2, 4, 4, 2, dtype=np.float32), nets.cnn_parameters(dtype=np.float32)


def resnet(dtype=np.float32, **options):
    model = nets.ResNet(**options)
    x = draw(6, 2, 8, 8, 3, dtype=dtype)
    variables = nets.randomise(jax.eval_shape(model.init, jax.random.key(0), x))
    return lambda x, variables: model.apply(variables, x), x, variables


def test_value_of_a_flax_resnet():
    check_value(*resnet())


def test_value_where_a_layer_spans_a_jit_boundary():
    """The bias outside belongs to the convolution inside: the wrapper falls, and the value stays to rounding."""
    inner = jax.jit(lambda x, w: x @ w)

    def f(x, w, b):
        return jnp.tanh(inner(x, w) + b)

    x, w, b = (v.astype(np.float32) for v in (X, W, B))
    assert [row.kind for row in plan(f, EPSILON)(x, w, b)] == ["dense", "activation"]
    close(rewrite(f, EPSILON)(x, w, b), f(x, w, b), 1e-6)
    close(lrp(f, EPSILON)(x, w, b), lrp(lambda x, w, b: jnp.tanh(x @ w + b), EPSILON)(x, w, b), 1e-6)


def test_vjp_of_rewrite_pulls_any_relevance_back():
    parameters = nets.mlp_parameters(4, 6, 3)
    R = draw(7, 3, 3)
    for composite in LOCAL.values():
        _, pull = jax.vjp(rewrite(partial(nets.mlp, parameters), composite), X)
        close(pull(R)[0], lrp(partial(nets.mlp, parameters), composite, target=lambda y: R)(X))


def test_parameters_get_no_relevance():
    _, pull = jax.vjp(rewrite(lambda x, p: nets.mlp(p, x), EPSILON), X, nets.mlp_parameters(4, 6, 3))
    R, rest = pull(draw(7, 3, 3))
    assert np.any(R) and not any(np.any(v) for v in jax.tree.leaves(rest))


# ---------------------------------------------------------------------------------------------------- wrappers


def custom_jvp(f):
    """`f` with a derivative that is wrong: relevance must not look at it."""
    wrapped = jax.custom_jvp(f)
    wrapped.defjvp(lambda primals, tangents: (f(*primals), 0 * f(*primals)))
    return wrapped


def custom_vjp(f):
    wrapped = jax.custom_vjp(f)
    wrapped.defvjp(lambda *xs: (f(*xs), xs), lambda xs, g: jax.tree.map(jnp.zeros_like, xs))
    return wrapped


def named_dots(f):
    return jax.checkpoint(f, policy=jax.checkpoint_policies.save_only_these_names("hidden"))


WRAPPERS = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "remat-policy": partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable),
    "remat-names": named_dots,
    "remat-no-cse": partial(jax.checkpoint, prevent_cse=False),
    "custom_jvp": custom_jvp,
    "custom_vjp": custom_vjp,
    "jit-remat": lambda f: jax.jit(jax.checkpoint(f)),
    "remat-jit": lambda f: jax.checkpoint(jax.jit(f)),
    "jit-custom_vjp-jit": lambda f: jax.jit(custom_vjp(jax.jit(f))),
    "named_call": partial(jax.named_call, name="block"),
}


def block(x, w, b, v):
    """An expanding and a projecting layer, and the input added."""
    hidden = checkpoint_name(jax.nn.relu(x @ w + b), "hidden")
    return x + jnp.tanh(hidden @ v)


BLOCK = draw(8, 4, 6), draw(9, 6), draw(10, 6, 4)


def two_blocks(wrap, x, w, b, v):
    wrapped = wrap(block)
    return wrapped(wrapped(x, w, b, v), 0.5 * w, b, v).sum(0)


@some_rules
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_layers(wrap, composite):
    wrapped, plain = partial(two_blocks, wrap), partial(two_blocks, lambda f: f)
    value, relevance = value_and_lrp(wrapped, composite)(X, *BLOCK)
    right_value, right = value_and_lrp(plain, composite)(X, *BLOCK)
    close(value, right_value)
    close(relevance, right)
    close(jax.jit(lrp(wrapped, composite))(X, *BLOCK), right)
    close(lrp(wrap(plain), composite)(X, *BLOCK), right)


def test_wrapped_cnn():
    for wrap in (jax.jit, jax.checkpoint, custom_vjp):
        close(lrp(wrap(nets.cnn), EPSILON, argnums=1)(CNN_P, CNN_X), lrp(nets.cnn, EPSILON, argnums=1)(CNN_P, CNN_X), 1e-5)


def test_custom_vjp_with_static_arguments():
    @partial(jax.custom_vjp, nondiff_argnums=(1,))
    def power(x, n):
        return jax.nn.relu(x @ W) ** n

    power.defvjp(lambda x, n: (power(x, n), x), lambda n, x, g: (0 * x,))
    close(lrp(lambda x: power(x, 2), EPSILON)(X), lrp(lambda x: jax.nn.relu(x @ W) ** 2, EPSILON)(X))


def test_stop_gradient_blocks():
    whole = lrp(lambda x: jax.nn.relu(x @ W), EPSILON)(X)
    close(lrp(lambda x: jax.nn.relu(x @ W) + lax.stop_gradient(x @ W), EPSILON, target=lambda y: jnp.maximum(X @ W, 0))(X), whole)
