"""Bounds of values: what equations give never leaves them, and where it matters they are tight."""

import warnings
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxlrp.facts import infer
from jaxlrp.program import Fact
from jaxlrp.trace import trace
from nets import draw, quick_compilation  # noqa: F401

INF = np.inf


def facts_of(f: Callable, x) -> Fact:
    traced = trace(f, (x,), {}, 0)
    return infer(traced.block, traced.facts)[0]


def clipped(f: Callable, low: float, high: float) -> Callable:
    """`f` of an input that is known to lie between these."""
    return lambda x: f(jnp.minimum(jnp.maximum(x, low), high))


UNARY: dict[str, Callable] = {
    "abs": jnp.abs, "arctan": jnp.arctan, "arcsinh": jnp.arcsinh, "cbrt": jnp.cbrt, "ceil": jnp.ceil, "cos": jnp.cos,
    "cumsum": jnp.cumsum, "cummax": lambda x: lax.cummax(x), "erf": jax.scipy.special.erf,
    "erfc": jax.scipy.special.erfc, "exp": jnp.exp, "exp2": jnp.exp2, "expm1": jnp.expm1, "floor": jnp.floor,
    "fourth power": lambda x: x**4, "inverse": lambda x: 1 / x, "inverse cube": lambda x: x**-3,
    "inverse square": lambda x: x**-2, "log": jnp.log, "log1p": jnp.log1p, "maximum": lambda x: jnp.maximum(x, 0.3),
    "mean": lambda x: x.mean(keepdims=True), "minimum": lambda x: jnp.minimum(0.3, x), "negative": lambda x: -x,
    "power of zero": lambda x: x**0, "round": jnp.round, "rsqrt": lax.rsqrt, "shift": lambda x: x - 0.7,
    "shift from": lambda x: 0.7 - x, "sigmoid": jax.nn.sigmoid, "sign": jnp.sign, "sin": jnp.sin, "sinh": jnp.sinh,
    "softplus": jax.nn.softplus, "sqrt": jnp.sqrt, "square": jnp.square, "tanh": jnp.tanh,
    "third": lambda x: x / -3, "cube": lambda x: x**3, "to integers": lambda x: x.astype(int).astype(float),
    "halves of integers": lambda x: (x.astype(int) // 2).astype(float),
    "to truth": lambda x: x.astype(bool).astype(float), "comparison": lambda x: (x > 0.2).astype(float),
    "padding": lambda x: jnp.pad(x, 1, constant_values=-0.4), "itself": lambda x: x * x, "moves": lambda x: x[::-1][2:],
    "windows": lambda x: lax.reduce_window(x, 0.0, lax.add, (3,), (1,), "SAME"),
    "convolution": lambda x: jnp.convolve(x, np.array([0.2, 0.3, 0.1])),
    "dot": lambda x: jnp.dot(x, jnp.tile(jnp.float64(0.3), x.size))[None],
    "choice": lambda x: jnp.where(x > 0, x, 0.25), "update": lambda x: x.at[1:3].set(-0.2),
    "guard": lambda x: jnp.where(jnp.isnan(x), -9.0, jnp.abs(x)), "steps": lambda x: x * jnp.arange(x.size),
    "logaddexp": lambda x: jnp.logaddexp(x, -x), "difference": lambda x: x - x[::-1],
    "interleaved": lambda x: jnp.stack([x, -x], 1).ravel(), "prefixes": lambda x: lax.associative_scan(jnp.maximum, x),
}  # fmt: skip
BOXES = [(-INF, INF), (0, INF), (-INF, 0), (-2, 3), (0, 1), (0.5, 2), (-3, -0.5), (-1, 0), (2, 2)]


@pytest.mark.parametrize("name", UNARY)
def test_nothing_leaves_its_bounds(name):
    """But for NaN, and for quotients by zero."""
    xs = np.stack([
        np.concatenate([np.linspace(max(low, -5), min(high, 5), 16), 3 * draw(0, 8)]).clip(low, high)
        for low, high in BOXES
    ])  # fmt: skip
    ys = np.asarray(jax.jit(jax.vmap(UNARY[name]))(xs))
    for y, (low, high) in zip(ys, BOXES, strict=True):
        found = facts_of(clipped(UNARY[name], low, high), jnp.zeros(24))
        y = y[np.isfinite(y)]
        slack = 1e-9 * abs(y).max(initial=1)
        assert found.low - slack <= y.min(initial=INF) and y.max(initial=-INF) <= found.high + slack, (low, high)


TIGHT: dict[str, tuple[Callable, float, float]] = {
    "sum": (lambda x: jax.nn.sigmoid(x) + 2, 2, 3),
    "product of signs": (lambda x: -jax.nn.relu(x) * jnp.exp(x), -INF, 0),
    "product of intervals": (lambda x: jnp.tanh(x) * (1 + jax.nn.sigmoid(x)), -2, 2),
    "even power across zero": (lambda x: jnp.tanh(x) ** 2, 0, 1),
    "inverse of what is above one": (lambda x: 1 / (1 + jnp.exp(x)), 0, 1),
    "quotient of negatives": (lambda x: -jnp.exp(x) / -(1 + x**2), 0, INF),
    "clip": (lambda x: jnp.clip(x, -0.5, 0.5), -0.5, 0.5),
    "softplus": (jax.nn.softplus, 0, INF),
    "mean of gates": (lambda x: jax.nn.sigmoid(x).reshape(2, 4).mean(1), 0, 1),
    "product of matrices": (lambda x: jax.nn.sigmoid(x).reshape(2, 4) @ jnp.tanh(x).reshape(4, 2), -4, 4),
    "one-hot": (lambda x: jax.nn.one_hot(jnp.argmax(x), 3), 0, 1),
    "interleaved by sums": (lambda x: lax.associative_scan(jnp.multiply, jax.nn.sigmoid(x)), 0, 1),
    "loop of gates": (lambda x: lax.fori_loop(0, 3, lambda _, g: g * jax.nn.sigmoid(x), jnp.full(8, 0.7)), 0, 0.7),
    "loop that grows": (lambda x: lax.fori_loop(0, 3, lambda _, g: g + jax.nn.sigmoid(x), jnp.full(8, 0.7)), 0.7, INF),
    "loop that turns": (lambda x: lax.fori_loop(0, 3, lambda _, g: -g, jax.nn.sigmoid(x)), -1, 1),
    "branches": (lambda x: lax.cond(x.sum() > 0, jax.nn.sigmoid, lambda x: -jax.nn.relu(x), x), -INF, 1),
}  # fmt: skip


@pytest.mark.parametrize("f, low, high", TIGHT.values(), ids=TIGHT)
def test_tight(f, low, high):
    found = facts_of(f, jnp.ones(8))
    np.testing.assert_allclose((found.low, found.high), (low, high), rtol=1e-12)


ANYTHING: dict[str, Callable] = {
    "nothing": lambda x: x,
    "complex": lambda x: jnp.abs(x) * 1j,
    "by what may be zero": lambda x: 1 / jnp.tanh(x),
    "a guard of its own": lambda x: jnp.where(jnp.isnan(x - 1), x, jnp.abs(x)),
    "a number that is none": lambda x: jnp.exp(x) * np.nan,
    "pads that overlap": lambda x: -(jnp.pad(jnp.abs(x), (0, 1)) + jnp.pad(jnp.abs(x), (1, 0))) + x.sum(),
    "a sorted value": jnp.sort,
}


@pytest.mark.parametrize("f", ANYTHING.values(), ids=ANYTHING)
def test_what_is_not_known(f):
    found = facts_of(f, jnp.ones(8))
    assert (found.low, found.high) == (-INF, INF)
    assert not found.nonneg and not found.gate


def pads(x, one, other, value=0.0):
    """sigmoid(x) put in twice, with these paddings."""
    g = jax.nn.sigmoid(x)
    return lax.pad(g, value, [one]) + lax.pad(g, 0.0, [other])


def padded(n: int, low: int, high: int, gap: int) -> np.ndarray:
    """Ones with `gap` zeros between, and `low` and `high` at the ends, or as many numbers less."""
    y = np.zeros(n + (n - 1) * gap)
    y[:: gap + 1] = 1
    y = np.concatenate([np.zeros(max(low, 0)), y, np.zeros(max(high, 0))])
    return y[max(-low, 0) : len(y) - max(-high, 0)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-2, 3), min_size=4, max_size=4), st.integers(0, 2), st.integers(0, 2))
def test_sums_of_pads(edges, gap, other_gap):
    """Where two pads never meet, the sum is one or the other: still a gate. Where they meet, it may be larger."""
    n = 4
    low, high, other_low, other_high = edges
    one, other = (low, high, gap), (other_low, other_high, other_gap)
    size = lambda c: max(0, n + c[0] + c[1] + (n - 1) * c[2])
    longer = size(one) - size(other)
    other = (other_low, other_high + longer, other_gap)
    if size(one) == 0:
        return
    f = partial(pads, one=one, other=other)
    met = (padded(n, *one) + padded(n, *other)).max() > 1
    found = facts_of(f, jnp.zeros(n))
    assert found.high == (2 if met else 1) and found.low == 0


def test_a_pad_with_other_numbers_is_no_gap():
    found = facts_of(partial(pads, one=(0, 1, 1), other=(1, 0, 1), value=1.0), jnp.zeros(4))
    assert found.high == 2


def test_huge_numbers_make_no_noise():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        huge = lambda x: (jnp.clip(x, -1e300, 1e300) ** 3 + jnp.exp(jnp.clip(x, 0, 1e6))) * 1e300
        found = facts_of(huge, jnp.ones(3))
    assert (found.low, found.high) == (-INF, INF)
