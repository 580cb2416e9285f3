"""The Taylor rule of local response normalisation: its messages, its laws and its edges."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxlrp import Composite, composites, lrp, plan, rewrite, rules, select, value_and_lrp
from jaxlrp.evaluate import conservation
from jaxlrp.nn import local_response_norm
from nets import close, draw, quick_compilation  # noqa: F401
from responses import (
    X,
    by_convolution_power_first,
    by_function,
    by_jacobian,
    by_loop,
    by_loops,
    by_matrix,
    by_window,
    every_message,
    explain,
    taylor,
)

# ---------------------------------------------------------------------------------------------------- messages


@every_message
@pytest.mark.parametrize("form", [by_function, by_loop, by_matrix, by_convolution_power_first])
def test_messages(form, messages):
    """The double loop, and the definition by the Jacobian."""
    R = draw(2, *X.shape)
    close(explain(form, X, R, messages), by_loops(X, R, messages), 1e-10)
    x, R = X[0, 0], R[0, 0]
    close(explain(form, x, R, messages), by_jacobian(form, x, R, messages), 1e-10)


# ---------------------------------------------------------------------------------------------------- laws

numbers = st.floats(-8, 8, allow_nan=False).map(lambda v: 0.0 if abs(v) < 1e-6 else v)
vectors = st.lists(numbers, min_size=7, max_size=7).map(np.asarray)
law = settings(deadline=None, derandomize=True, database=None, max_examples=60)
layers = st.fixed_dictionaries({
    "size": st.sampled_from([1, 2, 3, 5, 7]),
    "k": st.floats(0.1, 4),
    "alpha": st.floats(0, 4),
    "beta": st.floats(0.05, 4),
})  # fmt: skip


@partial(jax.jit, static_argnums=0)
def _messages(size, x, k, alpha, beta):
    f = rewrite(lambda x: local_response_norm(x, size, k, alpha, beta, alpha_per="element"), taylor())
    return jax.vmap(jax.vjp(f, x)[1])(jnp.eye(x.size))[0]


def messages_of(layer, x) -> np.ndarray:
    """v_jk, with k on the first axis."""
    return np.asarray(_messages(layer["size"], x, layer["k"], layer["alpha"], layer["beta"]))


@law
@given(vectors, layers)
def test_own_relevance_keeps_its_sign_and_neighbours_get_the_other(x, layer):
    v = messages_of(layer, x)
    own, others = np.diag(v), v - np.diag(np.diag(v))
    c = layer["beta"]
    bound = 1 / (1 - 2 * (c / (c + 1)) ** (c + 1))
    assert np.all(others <= 1e-12)
    assert np.all((x == 0) | (own >= 1 - 1e-9) & (own <= bound + 1e-9))
    np.testing.assert_allclose(v.sum(1), x != 0, rtol=0, atol=1e-9)


def test_the_bound_is_met():
    """One neighbour whose square is 1 / (b c): in the limit of a small x_k the own share is 1.8316."""
    v = messages_of({"size": 3, "k": 1.0, "alpha": 2.0, "beta": 0.75}, np.asarray([1e-7, np.sqrt(1 / 1.5)]))
    assert abs(v[0, 0] - 1.8316) < 1e-4


@law
@given(vectors, layers, st.floats(0.1, 10))
def test_scale_law(x, layer, factor):
    """Relevance of s x at b / s^2 is that of x at b."""
    scaled = {**layer, "alpha": layer["alpha"] / factor**2}
    np.testing.assert_allclose(messages_of(scaled, factor * x), messages_of(layer, x), rtol=0, atol=1e-9)


@law
@given(vectors, layers)
def test_without_neighbours_the_identity(x, layer):
    for still in ({**layer, "alpha": 0.0}, {**layer, "alpha": 1e-13}, {**layer, "size": 1}):
        np.testing.assert_allclose(messages_of(still, x), np.diag((x != 0).astype(float)), rtol=0, atol=1e-9)


@every_message
def test_books(messages):
    """Normalised it conserves, but for what arrives at zeros; the ledger shows what the others create."""
    x = np.where(draw(11, *X.shape) > 0.5, 0, X)
    rule = rules.LocalResponseTaylor(messages)
    assert rule.conserves == (messages == "normalised")
    ones = lambda y: jnp.ones_like(y)
    (row,) = conservation(by_window, taylor(messages), target=ones)(x)
    assert np.all(abs(row.gap) <= 1e-9 * row.size)
    close(row.passed.sum(), lrp(by_window, taylor(messages), target=ones)(x).sum(), 1e-9)
    close(row.arrived.sum(), x.size)
    if messages != "unnormalised":  # which sends x_k R_k itself
        close(row.dropped.sum(), (x == 0).sum())
    if messages == "normalised":
        assert not np.any(row.created)
    else:
        assert np.any(row.created)


def test_rule_is_a_pytree_without_leaves():
    rule = rules.LocalResponseTaylor("over_y")
    assert jax.tree.leaves(rule) == []
    assert jax.tree.map(lambda v: v, rule) == rule
    value, relevance = jax.jit(lambda c, x: value_and_lrp(by_window, c)(x))(taylor("over_y"), X)
    close(value, by_window(X), 1e-12)
    close(relevance, by_loops(X, by_window(X), "over_y"), 1e-10)


# ---------------------------------------------------------------------------------------------------- edges of the rule


def window(x, size):
    return lax.reduce_window(x, 0.0, lax.add, (1,) * (x.ndim - 1) + (size,), (1,) * x.ndim, "SAME")


def test_zeros_without_a_constant():
    """k = 0: a unit that is 0 among others that are not sends nothing, and nothing is not a number."""
    x = np.asarray([[0.5, 1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 1.5]])
    for f in (lambda x: x / jnp.sqrt(window(x * x, 5)), lambda x: x / (0.1 * window(x * x, 5)) ** 0.75):
        taylor = Composite([(select.kind("local_response_norm"), rules.LocalResponseTaylor())])
        value, relevance = value_and_lrp(f, taylor)(x)
        assert np.isfinite(relevance).all()
        np.testing.assert_allclose(relevance.sum(), value.sum(), rtol=1e-7)


def test_two_windows_in_a_row_are_no_band():
    """At the edges the second one misses what the first had cut off."""
    kinds = lambda f: {row.kind for row in plan(f, composites.epsilon())(np.ones((2, 9)))}
    assert "local_response_norm" not in kinds(lambda x: x / (1 + window(window(x * x, 3), 3)) ** 0.75)


def test_sums_that_start_from_an_array_of_one_number():
    """`s = zeros_like(x); s = s + shifted`, as it is written most often; and full_like(x, k)."""
    x = np.random.default_rng(3).normal(size=(2, 9))
    taylor = Composite([(select.kind("local_response_norm"), rules.LocalResponseTaylor())])

    def accumulated(begin, x):
        padded, s = jnp.pad(x * x, ((0, 0), (1, 1))), begin(x)
        for i in range(3):
            s = s + padded[:, i : i + 9]
        return s

    right = lrp(lambda x: x / (2 + window(x * x, 3)) ** 0.75, taylor)(x)
    for f in (
        lambda x: x / (2 + accumulated(jnp.zeros_like, x)) ** 0.75,
        lambda x: x / accumulated(lambda x: jnp.full_like(x, 2.0), x) ** 0.75,
    ):
        assert [row.kind for row in plan(f, taylor)(x)] == ["local_response_norm"]
        for g in (f, jax.jit(f)):
            np.testing.assert_allclose(lrp(g, taylor)(x), right, atol=1e-10)
