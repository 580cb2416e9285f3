"""Local response normalisation is recognised however it is written and wrapped, and nothing else is."""

from collections.abc import Callable
from functools import partial

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxlrp import Composite, composites, lrp, plan, rewrite, rules, select
from jaxlrp.nn import local_response_norm
from nets import close, draw, quick_compilation  # noqa: F401
from responses import (
    KIND,
    B,
    C,
    K,
    N,
    X,
    by_convolution,
    by_function,
    by_jacobian,
    by_loops,
    by_window,
    every_form,
    explain,
    taylor,
    windowed,
)


class Linen(flax.linen.Module):
    form: Callable

    @flax.linen.compact
    def __call__(self, x):
        return self.form(x)


class NNX(nnx.Module):
    def __init__(self, form):
        self.form = form

    def __call__(self, x):
        return self.form(x)


WRAPS: dict[str, Callable[[Callable], Callable]] = {
    "plain": lambda f: f,
    "linen": lambda f: partial(Linen(f).apply, {}),
    "nnx": lambda f: NNX(f),
    "jit": jax.jit,
    "vmap": jax.vmap,
    "jit of vmap": lambda f: jax.jit(jax.vmap(f)),
    "checkpoint": jax.checkpoint,
}


def kinds(f: Callable, x=X) -> list[str]:
    return [row.kind for row in plan(f, taylor() + composites.epsilon())(x) if row.kind != "structural"]


@pytest.mark.slow
@every_form
def test_recognised(form):
    """In every wrap the same layer, with the relevance of the definition."""
    R = draw(1, *X.shape)
    right = by_jacobian(form, X[0, 0], R[0, 0])
    close(right, by_loops(X[0, 0], R[0, 0], "normalised"), 1e-10)
    for name, wrap in WRAPS.items():
        assert kinds(wrap(form)) == [KIND], name

    wraps = WRAPS if form in (by_window, by_convolution) else {"plain": WRAPS["plain"]}

    @jax.jit
    def explained(x, R):
        each = {name: lrp(wrap(form), taylor(), target=lambda y: R)(x) for name, wrap in wraps.items()}
        return each | {"vmap of lrp": jax.vmap(lambda x, R: lrp(form, taylor(), target=lambda y: R)(x))(x, R)}

    for name, got in explained(X, R).items():
        np.testing.assert_allclose(got[0, 0], right, rtol=0, atol=1e-10 * abs(right).max(), err_msg=name)
        close(got, by_loops(X, R, "normalised"), 1e-10)


@every_form
def test_value_is_unchanged(form):
    """Bit for bit, compiled in the same way."""
    x = X.astype(np.float32)
    assert np.array_equal(jax.jit(rewrite(form, taylor()))(x), jax.jit(form)(x))


def spatially(x, size=3):
    window = (1, size, size, 1)
    return lax.reduce_window(x**2, 0.0, lax.add, window, (1,) * 4, "SAME")


UNEVEN = np.broadcast_to(draw(5, 3, 3, 1, 1) ** 2, (3, 3, 1, 8))


def depthwise(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", feature_group_count=8, dimension_numbers=numbers)


WITHIN = {
    "function": lambda x: local_response_norm(x, 3, K, B, C, axis=(1, 2)),
    "even": lambda x: local_response_norm(x, 2, K, B, 2.0, axis=(1, 2)),
    "window": lambda x: x / (K + B * spatially(x)) ** C,
    "avg_pool": lambda x: x / (K + B * flax.linen.avg_pool(x**2, (3, 3), (1, 1), "SAME")) ** C,
    "depthwise": lambda x: x / (K + depthwise(x**2, jnp.ones((3, 3, 1, 8)))) ** C,
    "depthwise, a constant": lambda x: x / (K + depthwise(x**2, np.ones((3, 3, 1, 8)))) ** C,
    "uneven weights": lambda x: x / (K + depthwise(x**2, UNEVEN)) ** C,
    "two axes in turn": lambda x: (
        x / (K + lax.reduce_window(lax.reduce_window(
            x**2, 0.0, lax.add, (1, 3, 1, 1), (1,) * 4, "SAME"
        ), 0.0, lax.add, (1, 1, 3, 1), (1,) * 4, "SAME")) ** C
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", WITHIN.values(), ids=WITHIN)
def test_within_channels(form):
    x = X[:1]
    R = draw(3, *x.shape)
    assert kinds(form, x) == [KIND]
    close(explain(form, x, R), by_jacobian(form, x, R), 1e-10)


def test_divisive_normalisation():
    """Learned weights between all channels, an offset for each (Balle et al. 2016): parameters of the function."""
    weights, offset = jnp.asarray(draw(4, 8, 8) ** 2), jnp.asarray(draw(5, 8) ** 2 + 0.5)
    f = lambda x, weights, offset: x / jnp.sqrt(offset + x**2 @ weights)
    x, R = X[0, 0], draw(6, 4, 8)
    got = jax.jit(lrp(f, taylor(), target=lambda y: R))(x, weights, offset)
    close(got, by_jacobian(lambda x: f(x, weights, offset), x, R), 1e-10)


def test_numbers_may_be_parameters():
    f = lambda x, p: x / (p["k"] + p["alpha"] * windowed(x**2)) ** p["beta"]
    R = draw(7, *X.shape)
    table = plan(f, taylor())(X, {"k": K, "alpha": B, "beta": jnp.asarray(C)})
    assert [row.kind for row in table] == [KIND]
    got = jax.jit(lrp(f, taylor(), target=lambda y: R))(X, {"k": K, "alpha": B, "beta": jnp.asarray(C)})
    close(got, by_loops(X, R, "normalised"), 1e-10)


def test_half_precision():
    """In bfloat16 the rule computes in float32 and sends bfloat16."""

    def model(x):
        return (x / (K + B * windowed(x.astype(jnp.float32) ** 2)) ** C).astype(x.dtype)

    x, R = jnp.asarray(X, jnp.bfloat16), jnp.asarray(draw(8, *X.shape), jnp.bfloat16)
    for f in (model, partial(local_response_norm, size=N, k=K, alpha=B, alpha_per="element")):
        assert KIND in kinds(f, x)
        got = explain(f, x, R)
        assert got.dtype == jnp.bfloat16
        close(got, by_loops(np.asarray(x, float), np.asarray(R, float), "normalised"), 0.02)


def test_in_a_network():
    """Between a ReLU and a dense layer, twice, one of them under scan."""
    w = draw(9, 8, 8)

    def model(x):
        x = by_window(jax.nn.relu(x @ w))
        x, _ = lax.scan(lambda x, _: (by_function(jnp.tanh(x @ w)), None), x, None, length=2)
        return x @ w

    found = kinds(model)
    assert found.count(KIND) == 2, found
    relevance = lrp(model, taylor() + Composite([(select.kind("dense"), rules.Zero())]))(X)
    close(relevance.sum(), model(X).sum(), 1e-9)
    identity = [row.rule for row in plan(model, composites.epsilon())(X) if row.kind == KIND]
    assert identity == [rules.Pass()] * 2


def squeeze_excite(x):
    scale = jax.nn.sigmoid(x.mean((1, 2)) @ draw(10, 8, 8))
    return x * scale[:, None, None]


def reflected(x):
    padded = jnp.pad(x**2, [(0, 0)] * 3 + [(2, 2)], mode="reflect")
    return x / (K + sum(padded[..., i : i + 8] for i in range(N))) ** C


OTHERS: dict[str, Callable] = {
    "layer norm": lambda x: (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-6),
    "flax layer norm": lambda x: flax.linen.LayerNorm().bind(
        {"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}
    )(x),
    "rms norm": lambda x: x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6),
    "rms norm, by an average pool": lambda x: x / jnp.sqrt(
        lax.reduce_window(x**2, 0.0, lax.add, (1, 1, 1, 8), (1,) * 4, "VALID") / 8 + 1e-6
    ),
    "l2": lambda x: x / jnp.sqrt((x * x).sum(-1, keepdims=True)),
    "l2, linalg": lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True),
    "global response norm": lambda x: x * jnp.sqrt((x**2).sum((1, 2), keepdims=True)),
    "squeeze and excite": squeeze_excite,
    "swish": lambda x: x * jax.nn.sigmoid(x),
    "swish of a window": lambda x: x * jax.nn.sigmoid(windowed(x**2)),
    "inverse square root unit": lambda x: x / jnp.sqrt(1 + x**2),
    "no square": lambda x: x / (K + windowed(jnp.abs(x))) ** C,
    "a cube": lambda x: x / (K + windowed(jnp.abs(x) ** 3)) ** C,
    "a rising power": lambda x: x * (K + windowed(x**2)) ** C,
    "a rising power, by logarithm": lambda x: x / jnp.exp(-C * jnp.log(K + windowed(x**2))),
    "an exponential": lambda x: x * jnp.exp(-windowed(x**2)),
    "a sum of powers": lambda x: x / (1 + (K + windowed(x**2)) ** C),
    "another numerator": lambda x: x**3 / (K + windowed(x**2)) ** C,
    "the squares' own share": lambda x: x**2 / (K + windowed(x**2)) ** C,
    "two inputs": lambda x: jnp.tanh(x) / (K + windowed(x**2)) ** C,
    "a strided window": lambda x: x[..., ::2] / (K + windowed(x**2)[..., ::2]) ** C,
    "a pad that reflects": reflected,
    "a pad with ones": lambda x: x / (
        K + windowed(jnp.pad(x**2, [(0, 0)] * 3 + [(2, 2)], constant_values=1.0))[..., 2:-2]
    ) ** C,
    "edges cut off": lambda x: x / (K + windowed(jnp.pad(x[..., 1:-1] ** 2, [(0, 0)] * 3 + [(1, 1)]))) ** C,
    "own squares cut off": lambda x: x / (
        K + windowed(x**2) + jnp.pad(x[..., 1:-1] ** 2, [(0, 0)] * 3 + [(1, 1)])
    ) ** C,
    "weights that differ": lambda x: x / (K + depthwise(x**2, draw(5, 3, 3, 1, 8) ** 2)) ** C,
    "a softmax": lambda x: jax.nn.softmax(x, -1),
}  # fmt: skip


@pytest.mark.parametrize("f", OTHERS.values(), ids=OTHERS)
def test_others_are_not(f):
    assert KIND not in kinds(f)


def test_an_inner_value_that_is_read_elsewhere():
    def f(x):
        q = K + B * windowed(x**2)
        return x / q**C + q

    assert KIND not in kinds(f)


def test_a_statistic_that_the_user_holds_constant():
    """stop_gradient says that the factor is no data: a scale remains, which passes everything on."""
    f = lambda x: x / lax.stop_gradient((K + B * windowed(x**2)) ** C)
    assert KIND not in kinds(f)
    close(explain(f, X, f(X)), f(X), 1e-8)
