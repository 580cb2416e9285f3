"""Dtypes: relevance in half precision and through casts is that of float32, up to rounding."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nets
from jaxlrp import composites, gradients, lrp, rewrite, rules
from nets import LOCAL, close, draw, explained, quick_compilation  # noqa: F401
from programs import W, X, single, variables_of

pytestmark = pytest.mark.smoke

HALVES = pytest.mark.parametrize(
    "dtype, tolerance", [(jnp.bfloat16, 0.05), (jnp.float16, 0.005)], ids=["bfloat16", "float16"]
)


@HALVES
def test_half_precision(dtype, tolerance):
    """With parameters of the same dtype, and of float32."""
    half = jax.tree.map(lambda v: v.astype(dtype), nets.mlp_parameters(4, 8, 3))
    full, x = jax.tree.map(lambda v: v.astype(np.float32), half), X.astype(dtype)
    explain = partial(explained, nets.mlp, rows=LOCAL.values(), argnums=1, target=0)
    right = [r for _, r in explain(full, x.astype(np.float32))]
    for parameters in (half, full):
        relevance = [r for _, r in explain(parameters, x)]
        assert {r.dtype for r in relevance} == {np.dtype(dtype)} and right[0].dtype == np.float32
        close(relevance, right, tolerance)


@HALVES
def test_rules_compute_in_float32(dtype, tolerance):
    """What float32 gives for these numbers, rounded once; a sum of 64 in half precision is further off."""
    x, w, R = draw(23, 64).astype(dtype), draw(24, 64, 8).astype(dtype), jnp.abs(draw(25, 8)).astype(dtype)
    explain = lrp(lambda x, w: x @ w, LOCAL["zplus"], target=lambda y: R)
    full = explain(x.astype(np.float32), w.astype(np.float32))
    np.testing.assert_array_equal(explain(x, w), full.astype(dtype))


def test_half_precision_of_flax_resnet():
    model, x = nets.ResNet(), draw(6, 1, 8, 8, 3).astype(jnp.bfloat16)
    half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), variables_of(model, x))
    explain = jax.jit(lrp(model.apply, composites.epsilon_plus(0.1), argnums=1, target=0))
    relevance = explain(half, x)
    assert relevance.dtype == jnp.bfloat16
    close(relevance, explain(*jax.tree.map(lambda v: v.astype(np.float32), (half, x))), 0.1)


def test_casts_inside_the_network():
    """A network that computes in bfloat16 and is given float32: the values are bfloat16's, the rules are float32's."""

    def f(dtype, x, w, v):
        y = jax.nn.relu(jnp.dot(x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32))
        return (y.astype(dtype) @ v.astype(dtype)).astype(jnp.float32)

    args = single(X, W, draw(20, 5, 2))
    half, full = (explained(partial(f, t), *args, rows=LOCAL.values()) for t in (jnp.bfloat16, jnp.float32))
    assert {r.dtype for _, r in half} == {np.dtype(np.float32)}
    close(half, full, 0.05)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_sum_in_half_precision_that_cancels(dtype):
    """Two such values cancel exactly every so often: relevance there is bounded by rounding, not by epsilon."""
    x, y = jnp.asarray([1.0, 1.0], dtype), jnp.asarray([-1.0, 0.5], dtype)
    _, pull = jax.vjp(rewrite(lambda x, y: x + y, composites.epsilon(), (0, 1)), x, y)
    (r_x, r_y) = (np.asarray(r, np.float64) for r in pull(jnp.ones(2, dtype)))
    bound = 2 / float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(r_x, [bound, 2 / 3], rtol=1e-2)
    np.testing.assert_allclose(r_y, [-bound, 1 / 3], rtol=1e-2)


def test_sums_in_half_precision_lose_nothing_where_they_are_zero():
    """One residual sum in some 250 is exactly 0 in 8 bits: what lies below must not lose its share by that."""

    def f(params, x):
        for up, down in params:
            x = x + jax.nn.gelu(nn.LayerNorm().apply({"params": SCALE}, x) @ up) @ down
        return x

    def off(explain):
        full, half = (
            np.asarray(jax.jit(explain)(*args), np.float64) for args in ((params, x), jax.tree.map(short, (params, x)))
        )
        return np.abs(half - full).max() / np.abs(full).max()

    short = lambda v: v.astype(jnp.bfloat16)
    wide = lambda v: short(v).astype(jnp.float32)
    SCALE = {"scale": jnp.ones(128, jnp.bfloat16), "bias": jnp.zeros(128, jnp.bfloat16)}
    params = jax.tree.map(wide, [(draw(i, 128, 256) / 11, draw(i + 9, 256, 128) / 16) for i in range(8)])
    x = wide(draw(20, 32, 128))
    yardstick = off(gradients.gradient_x_input(f, 1, 3))
    assert off(lrp(f, composites.attnlrp(), 1, 3)) < 1.2 * yardstick < 0.1


def test_numbers_of_another_dtype():
    """A float64 number, as a stacked composite holds where JAX has float64, explains a float32 layer in float32."""
    x, w = (jnp.asarray(draw(i, 3, 3), jnp.float32) for i in (27, 28))
    for number in (np.float64(0.3), jnp.asarray(0.3, jnp.float64)):
        got = lrp(lambda x: x @ w, nets.linear(rules.GeneralizedGamma(number)))(x)
        assert got.dtype == jnp.float32
        close(got, lrp(lambda x: x @ w, nets.linear(rules.GeneralizedGamma(0.3)))(x), 1e-6)


def test_masks_that_become_numbers_inside_a_layer():
    """Booleans cast to float32 within a layer that computes in another dtype."""

    def f(x):
        mask = jnp.tril(jnp.ones((2, 2), bool)).astype(jnp.float32)
        bias = jnp.where(mask > 0, 0.0, -9.0).astype(x.dtype)
        return jax.nn.softmax(x @ x.T + bias) @ x

    explain = lrp(jax.jit(f), composites.attnlrp())  # the mask, made of literals, is part of the layer
    x = draw(26, 2, 3).astype(jnp.bfloat16)
    close(explain(x), explain(x.astype(np.float32)), 0.05)
