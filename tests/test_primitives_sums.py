"""Primitives that add or multiply: sums are in proportion, products in equal parts, ragged products are dense layers.

The references are sums and Jacobians written out in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxlrp import rules
from nets import close, draw, linear, quick_compilation  # noqa: F401
from proportions import UNIT, WHERE, X, explain, in_proportion, kinds_of, start

# ---------------------------------------------------------------------------------------------------- sums

LOWER, BAND = jnp.tril(draw(5, 4, 4)) + 3 * jnp.eye(4), draw(6, 3, 4)
UPDATES = draw(7, 3, 2)
SUMS = {
    "segment_sum": lambda x: jax.ops.segment_sum(x, WHERE, 4),
    "segment_sum, by an index of the data": lambda x: jax.ops.segment_sum(x, jnp.argmax(x, 1), 4),
    "add to constants": lambda x: UPDATES.at[:, jnp.asarray([0, 1, 0])].add(x[:, :3]),
    "constants added": lambda x: x.at[WHERE, :2].add(UPDATES),
    "both data": lambda x: x.at[:, jnp.asarray([0, 3, 0])].add(2 * x[:, 1:]),
    "subtract": lambda x: x.at[WHERE].subtract(0.4 * x),
    "cumsum": lambda x: jnp.cumsum(x, 1),
    "triangular_solve": lambda x: lax.linalg.triangular_solve(LOWER, x, lower=True),
    "tridiagonal_solve": lambda x: lax.linalg.tridiagonal_solve(BAND[0], BAND[1] + 5, BAND[2], x.T),
    "solve": lambda x: jnp.linalg.solve(LOWER, x.T),
}


@pytest.mark.parametrize("f", SUMS.values(), ids=SUMS)
def test_sums_are_in_proportion(f):
    R = start(f, X)
    close(explain(f, X, R), in_proportion(f, X, R), 1e-6)
    assert "reduce" in kinds_of(f) and not {"unknown", "matmul", "product"} & set(kinds_of(f))


def test_derivative_of_a_max_pool_inside():
    """What is scattered to the winners of a pool is linear in what is scattered; the pool itself decides where."""

    def scattered(x):
        _, pull = jax.vjp(lambda u: lax.reduce_window(u, -jnp.inf, lax.max, (1, 2), (1, 2), "VALID"), UNIT)
        return pull(x[:, :2])[0]

    R = start(scattered, X)
    close(explain(scattered, X, R), in_proportion(scattered, X, R), 1e-6)


def test_gather_at_the_winners_of_a_pool_inside():
    pool = lambda u: lax.reduce_window(u, -jnp.inf, lax.max, (1, 2), (1, 2), "VALID")
    gathered = lambda x: jax.jvp(pool, (UNIT.astype(np.float32),), (x,))[1]
    x = X.astype(np.float32)
    R = start(gathered, x).astype(np.float32)
    left = UNIT.reshape(3, 2, 2)[..., 0] >= UNIT.reshape(3, 2, 2)[..., 1]
    right = np.stack([np.where(left, R, 0), np.where(left, 0, R)], -1).reshape(3, 4)
    close(explain(gathered, x, R), right, 1e-6)


def test_scatter_in_half_precision():
    f = lambda x: x.at[WHERE].add(x * 2).at[:, WHERE].subtract(x[:, 1:]).at[WHERE].multiply(x).at[WHERE].max(x)
    x = jnp.asarray([[1.0, 2.0, 1.5, 3.0], [2.0, 0.5, 1.0, 1.0], [0.5, 1.0, 3.0, 2.0]])
    exact = explain(f, x, jnp.ones((3, 4)))
    got = explain(f, x.astype(jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    close(got, exact, 0.03)


# ---------------------------------------------------------------------------------------------------- grouped products

ROWS = jnp.asarray([2, 0, 3])
A, GROUPS = draw(10, 6, 4), draw(11, 3, 4, 5)


def ragged(x):
    return lax.ragged_dot(x, GROUPS, ROWS) + 0.1


def apart(x):
    return jnp.concatenate([x[:2] @ GROUPS[0] + 0.1, x[2:5] @ GROUPS[2] + 0.1])


RULES = (
    rules.Epsilon(0.1),
    rules.Zero("distribute"),
    rules.Gamma(0.3),
    rules.GeneralizedGamma(0.3),
    rules.AlphaBeta(2.0, 1.0),
    rules.WSquare(),
    rules.Flat(),
    rules.ZBox(-3.0, 3.0),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_ragged_dot_is_a_dense_layer_for_each_group(rule):
    within = lambda x: ragged(x)[:5]  # the last row is in no group
    R = start(within, A)
    assert kinds_of(within, A) == ["dense", "structural"]
    close(explain(within, A, R, linear(rule)), explain(apart, A, R, linear(rule)))


def test_a_mixture_of_experts():
    """The router sorts the rows by expert: sizes of the groups and places depend on the data, the kernels do not."""
    router = draw(12, 4, 3)

    def experts(x):
        chosen = jnp.argmax(x @ router, 1)
        order = jnp.argsort(chosen)
        y = lax.ragged_dot(x[order], GROUPS, jnp.bincount(chosen, length=3))
        return jnp.zeros_like(y).at[order].set(y)

    expected = np.stack([x @ GROUPS[k] for x, k in zip(A, np.argmax(A @ router, 1), strict=True)])
    np.testing.assert_allclose(experts(A), expected)
    R = start(experts, A)
    each = lambda x, k, r: in_proportion(lambda v: v @ GROUPS[k], x, r)
    right = np.stack([each(x, k, r) for x, k, r in zip(A, np.argmax(A @ router, 1), R, strict=True)])
    close(explain(experts, A, R, linear(rules.Epsilon(1e-9))), right, 1e-7)
    assert kinds_of(experts, A).count("dense") == 1


def test_groups_of_matrices_from_the_data():
    f = lambda w: lax.ragged_dot(A, w, ROWS)[:5]
    R = start(f, GROUPS)
    written = lambda w: jnp.concatenate([A[:2] @ w[0], A[2:5] @ w[2]])
    close(explain(f, GROUPS, R), in_proportion(written, GROUPS, R), 1e-6)


# ---------------------------------------------------------------------------------------------------- products


def test_a_product_over_an_axis_is_shared_equally():
    f = lambda x: jnp.prod(x, 1)
    R = np.asarray(start(f, X))
    close(explain(f, X, R), np.repeat(R[:, None] / 4, 4, 1))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_cumulative_product_is_shared_equally(reverse):
    f = lambda x: lax.cumprod(x, 1, reverse)
    R = np.asarray(start(f, X))
    right = np.zeros((3, 4))
    for k in range(4):
        factors = range(k, 4) if reverse else range(k + 1)
        for j in factors:
            right[:, j] += R[:, k] / len(factors)
    close(explain(f, X, R), right)


def test_scattered_products_are_shared_equally():
    """Of what was there and the factors of each place; a constant that was there is no factor of the data."""
    R = np.asarray(draw(13, 3, 4))
    both = lambda x: x.at[WHERE].multiply(x)
    right = np.stack([R[0] / 2, R[1], R[2] / 3])
    for i, place in enumerate(WHERE):
        right[i] += R[place] / {0: 2, 2: 3}[place]
    close(explain(both, X, R), right)
    constant = lambda x: jnp.full((3, 4), 2.0).at[WHERE].multiply(x)
    close(explain(constant, X, R), np.stack([R[2] / 2, R[0], R[2] / 2]))
    by_constants = lambda x: x.at[WHERE].multiply(2.0)
    close(explain(by_constants, X, R), R, 1e-6)
