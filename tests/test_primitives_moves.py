"""Primitives that move or pick values: relevance goes with the value, in sorts, scatters, barriers and maxima.

The references are loops over places.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxlrp import Composite, lrp, rules, select, value_and_lrp
from jaxlrp.errors import InputError
from nets import close, quick_compilation, same  # noqa: F401
from proportions import EPSILON, W, X, explain, kinds_of, moved, start

# ---------------------------------------------------------------------------------------------------- moved values


def test_sort_carries_relevance_with_the_value():
    R = start(jnp.sort, X)
    order = np.argsort(X, 1)
    close(explain(jnp.sort, X, R), np.take_along_axis(np.asarray(R), np.argsort(order, 1), 1))


def test_sort_carries_what_comes_along():
    """Two operands sorted by the first, and integers: relevance of each goes to its own operand."""

    def f(x):
        keys, values, _ = lax.sort((x, x[:, ::-1] * 1.0, lax.broadcasted_iota(jnp.int32, x.shape, 1)), num_keys=1)
        return jnp.concatenate([keys, values])

    R = start(f, X)
    back = np.argsort(np.argsort(X, 1), 1)
    right = np.take_along_axis(np.asarray(R[:3]), back, 1) + np.take_along_axis(np.asarray(R[3:]), back, 1)[:, ::-1]
    close(explain(f, X, R), right, 1e-6)


def test_a_parameter_sorted_by_the_data_stays_a_parameter():
    """It is a scale, not a product of two data values, and keeps no relevance."""

    def f(x):
        _, weights = lax.sort((x, jnp.arange(1.0, 13).reshape(3, 4)), num_keys=1)
        return x * weights

    assert "product" not in kinds_of(f)
    close(explain(f, X, jnp.ones((3, 4))), np.ones((3, 4)), 1e-6)


def test_top_k():
    for top_k in (lax.top_k, lax.approx_max_k):
        f = lambda x, top_k=top_k: top_k(x, 2)[0]
        R = start(f, X)
        places = np.argsort(-X, 1)[:, :2]
        close(explain(f, X, R), moved((np.arange(3)[:, None], places), R))
    both = lambda x: lax.top_k(x, 2)
    (values, places), relevance = value_and_lrp(both, EPSILON)(X)
    close(relevance, moved((np.arange(3)[:, None], places), values))


def test_scatter_overwrites():
    """What is written gets the relevance of its place, what was there before gets none."""
    columns = np.asarray([3, 0])

    def f(x):
        return x.at[:, columns].set(x[:, 1:3])

    R = np.asarray(start(f, X))
    right = np.zeros((3, 4))
    right[:, 1:3] += R[:, 1:3] + R[:, columns]
    close(explain(f, X, R), right)
    into_constants = lambda x: jnp.ones((3, 6)).at[:, 1:5].set(x)
    R = start(into_constants, X)
    close(explain(into_constants, X, R), R[:, 1:5])


def test_barrier_keeps_operands_apart():
    """A kernel that goes through a barrier together with the data is still a kernel."""

    def f(x):
        y, w = lax.optimization_barrier((x, W))
        return y @ w

    assert kinds_of(f).count("dense") == 1 and "matmul" not in kinds_of(f)
    close(lrp(f, EPSILON)(X), lrp(lambda x: x @ W, EPSILON)(X))


def test_layers_with_several_outputs_have_no_one_relevance():
    f = lambda x: lax.top_k(x @ W @ W.T, 2)[0]
    _, _, seen = value_and_lrp(f, EPSILON, layers=select.everything())(X)
    assert "top_k" not in seen and "dense[1]" in seen
    with pytest.raises(InputError, match="no one output"):
        lrp(f, EPSILON, masks={"top_k": 1.0})(X)


def test_transformations_of_what_moves():
    f = lambda x: lax.top_k(jnp.sort(x) @ W, 2)[0] @ W[:2]
    each = jax.vmap(lambda x: lrp(lambda v: f(v[None])[0], EPSILON)(x))(X)
    close(each, lrp(f, EPSILON)(X))
    same(jax.jit(value_and_lrp(f, EPSILON))(X)[0], jax.jit(f)(X))


# ---------------------------------------------------------------------------------------------------- maxima

TIED = jnp.asarray([[1.0, 3.0, 2.0, 3.0, 4.0, 4.0], [5.0, 1.0, 5.0, 2.0, 2.0, 0.0]])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("smallest", [False, True])
def test_cumulative_maxima_go_to_the_record(smallest, reverse):
    """Each output's relevance goes to the element that first became the largest so far."""
    f = lambda x: (lax.cummin if smallest else lax.cummax)(x, 1, reverse)
    R, right = np.asarray(start(f, TIED)), np.zeros(TIED.shape)
    n = TIED.shape[1]
    for i, row in enumerate(np.asarray(TIED) * (-1 if smallest else 1)):
        best = None
        for j in range(n)[::-1] if reverse else range(n):
            best = j if best is None or row[j] > row[best] else best
            right[i, best] += R[i, j]
    close(explain(f, TIED, R), right)


def test_cumlogsumexp_is_a_smooth_maximum():
    f = lambda x: lax.cumlogsumexp(x, 1)
    R, e = np.asarray(start(f, X)), np.exp(X)
    weights = e[:, :, None] * np.tri(4).T / np.cumsum(e, 1)[:, None, :]
    close(explain(f, X, R), (weights * R[:, None, :]).sum(2))


def test_scattered_maxima():
    x = jnp.asarray([[1.0, 2.0, 5.0], [4.0, 0.0, 3.0], [2.0, 2.0, 9.0]])
    f = lambda x: jnp.full((2, 3), 3.0).at[jnp.asarray([0, 1, 0])].max(x)
    R = np.asarray(start(f, x))
    right = np.zeros((3, 3))
    right[2, 2], right[1, 0], right[1, 2] = R[0, 2], R[1, 0], R[1, 2] / 2  # the 3 that was there ties
    close(explain(f, x, R), right)


def test_clip_between_values_of_the_data():
    x = jnp.asarray([[0.0, 2.0, 1.0], [0.5, 1.0, 3.0], [-1.0, 2.0, 5.0]])
    f = lambda x: lax.clamp(x[:, 0], x[:, 2], x[:, 1])
    close(explain(f, x, R := np.asarray([1.0, -2.0, 3.0])), moved(([0, 1, 2], [2, 1, 1]), R, x.shape))


@pytest.mark.parametrize("ties", ["first", "split"])
def test_maxima_that_start_from_a_number(ties):
    """A max-pool that starts from 0: where 0 is the largest, relevance ends there; JAX has no derivative of it."""
    winner = Composite([(select.kind("max_pool"), rules.Winner(ties))]) + EPSILON
    pool = lambda x: lax.reduce_window(x, 0.0, lax.max, (1, 2), (1, 2), "VALID")
    plain = lambda x: lax.reduce_window(x, -np.inf, lax.max, (1, 2), (1, 2), "VALID")
    rows = lambda x: lax.reduce(x, 0.0, lax.max, (1,))
    R = start(pool, TIED)
    above = np.asarray(plain(TIED)) > 0
    close(explain(pool, TIED, R, winner), explain(plain, TIED, R * above, winner))
    x = TIED - 4.5
    R = start(rows, x)
    got = explain(rows, x, R, winner)
    assert not np.any(got[0])
    close(got[1], explain(lambda x: x.max(1), x, R, winner)[1])
