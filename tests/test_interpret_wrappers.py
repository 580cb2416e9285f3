"""Wrappers: relevance is the same in `jit`, in `remat` and in functions with a derivative of their own.

The program without wrappers is the reference.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import nets
from jaxlrp import lrp, rewrite, value_and_lrp
from nets import close, draw, explained, quick_compilation  # noqa: F401
from programs import EPSILON, B, W, X

pytestmark = pytest.mark.smoke


def custom_jvp(f):
    """With a derivative that is wrong on purpose: relevance does not look at it."""
    wrapped = jax.custom_jvp(f)
    wrapped.defjvp(lambda primals, tangents: (f(*primals), 0 * f(*primals)))
    return wrapped


def custom_vjp(f):
    wrapped = jax.custom_vjp(f)
    wrapped.defvjp(lambda *args: (f(*args), args), lambda args, g: jax.tree.map(jnp.zeros_like, args))
    return wrapped


policies = jax.checkpoint_policies
WRAPPERS = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "remat-saves-dots": partial(jax.checkpoint, policy=policies.dots_saveable),
    "remat-saves-names": partial(jax.checkpoint, policy=policies.save_only_these_names("hidden")),
    "remat-without-barrier": partial(jax.checkpoint, prevent_cse=False),
    "custom-jvp": custom_jvp,
    "custom-vjp": custom_vjp,
    "jit-remat": lambda f: jax.jit(jax.checkpoint(f)),
    "remat-jit": lambda f: jax.checkpoint(jax.jit(f)),
    "jit-custom-vjp-jit": lambda f: jax.jit(custom_vjp(jax.jit(f))),
    "named-call": partial(jax.named_call, name="block"),
}


def two_blocks(wrap, x, w, b, v):
    """Twice an expanding and a projecting layer, with the input added."""

    @wrap
    def block(x, w, b, v):
        return x + jnp.tanh(checkpoint_name(jax.nn.relu(x @ w + b), "hidden") @ v)

    return block(block(x, w, b, v), 0.5 * w, b, v).sum(0)


TWO_BLOCKS = X, draw(8, 4, 6), draw(9, 6), draw(10, 6, 4)
plain_blocks = cache(lambda: explained(partial(two_blocks, lambda f: f), *TWO_BLOCKS))


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped(wrap):
    """The blocks, and all of them together once more."""
    wrapped = wrap(partial(two_blocks, wrap))
    close(explained(wrapped, *TWO_BLOCKS), plain_blocks())


@pytest.mark.parametrize("name", ["jit", "remat", "jit-custom-vjp-jit"])
def test_wrapped_without_jit(name):
    wrapped = partial(two_blocks, WRAPPERS[name])
    close(value_and_lrp(wrapped, nets.SOME[0])(*TWO_BLOCKS), plain_blocks()[0])


plain_cnn = cache(lambda: explained(nets.cnn, nets.cnn_parameters(), draw(5, 2, 4, 4, 2), argnums=1))


def test_wrappers_are_applied_again():
    """What a person wraps for memory or compile time stays wrapped: the name, and remat's policy."""
    policy = policies.save_only_these_names("hidden")

    @jax.jit
    @partial(jax.checkpoint, policy=policy, prevent_cse=False)
    def mine(x):
        return jnp.tanh(jax.nn.relu(x @ W) @ W.T)

    (outer,) = jax.make_jaxpr(rewrite(lambda x: mine(x), EPSILON))(X).eqns
    (inner,) = outer.params["jaxpr"].eqns
    assert outer.params["name"] == "mine"
    assert inner.params["policy"] is policy and inner.params["prevent_cse"] is False


@pytest.mark.parametrize("wrap", [custom_vjp, lambda f: jax.jit(jax.checkpoint(f))], ids=["custom-vjp", "jit-remat"])
def test_wrapped_cnn(wrap):
    close(explained(wrap(nets.cnn), nets.cnn_parameters(), draw(5, 2, 4, 4, 2), argnums=1), plain_cnn())


CLOSED_OVER = {
    "dense": lambda x: x @ W,
    "weights left": lambda x: W.T @ x.T,
    "numpy weights": lambda x: x @ np.asarray(W),
    "scaled weights": lambda x: x @ (2 * W),
    "bias": lambda x: x @ W + B,
    "scale": lambda x: x * B[:4],
    "transpose": lambda x: x.T,
    "reshape": lambda x: x.reshape(2, 6),
    "cast": lambda x: x.astype(np.float32),
    "negative": lambda x: -x,
    "sum": lambda x: x.sum(0),
    "products": lambda x: x @ x.T,
    "shifted activation": lambda x: jnp.tanh(2 - x),
}


@pytest.mark.parametrize("f", CLOSED_OVER.values(), ids=CLOSED_OVER)
def test_wrapped_single_layer(f):
    """One layer alone in a wrapper, its weights closed over; and the derivative of a custom_vjp never counts."""
    wrappers = (jax.jit, jax.checkpoint, custom_jvp, custom_vjp)
    right, *got = jax.jit(lambda x: [lrp(g, nets.SOME[-1])(x) for g in (f, *(wrap(f) for wrap in wrappers))])(X)
    for relevance, wrap in zip(got, wrappers, strict=True):
        close({wrap.__name__: relevance}, {wrap.__name__: right})


def test_wrapper_with_more_than_is_used():
    """Arguments that nothing reads, results that nobody takes: in a wrapper, and in a wrapper within."""

    def f(wrap, x):
        inner = wrap(lambda x, w: (-x, jnp.argmax(x), x @ w))
        outer = wrap(lambda x, w: (inner(x + x.sum(), W)[0], jnp.sin(x), inner(x, W)))
        return outer(jnp.tanh(x), W)[0]

    right = explained(partial(f, lambda f: f), X)
    for wrap in (jax.jit, jax.checkpoint):
        close(explained(partial(f, wrap), X), right)


def test_wrapper_that_hands_its_argument_on():
    """One of its results is what it was given, which somebody else made."""
    layers = (lambda x: jax.nn.gelu(x), lambda x: x @ W, lambda x: jnp.tanh(x @ W + B), lambda x: x.T)
    for layer in layers:
        right = explained(lambda x, f=layer: f(jnp.sin(x)), X)
        for wrap in (jax.jit, jax.checkpoint):
            close(explained(lambda x, f=layer, wrap=wrap: wrap(lambda x: (x, f(x)))(jnp.sin(x))[1], X), right)


def test_custom_vjp_with_static_argument():
    @partial(jax.custom_vjp, nondiff_argnums=(1,))
    def power(x, n):
        return jax.nn.relu(x @ W) ** n

    power.defvjp(lambda x, n: (power(x, n), x), lambda n, x, g: (0 * x,))
    close(explained(lambda x: power(x, 2), X), explained(lambda x: jax.nn.relu(x @ W) ** 2, X))


def test_stop_gradient_makes_a_constant():
    stopped = explained(lambda x: jax.nn.relu(x @ W) + lax.stop_gradient(x @ W), X)
    close(stopped, explained(lambda x, c: jax.nn.relu(x @ W) + c, X, X @ W))
