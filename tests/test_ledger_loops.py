"""The ledger of loops and wrappers: a row for every iteration, and for what ends at constants within."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxlrp.evaluate import conservation
from ledgers import COLUMNS, EPSILON, B, W, X, closes, draw, near, row, single_precision, stopped  # noqa: F401
from nets import quick_compilation  # noqa: F401


def test_a_row_for_every_iteration():
    """The rows of a loop are those of the layers written one after the other."""
    ws = draw(14, 3, 4, 4)

    def looped(x):
        return lax.scan(lambda x, w: (jax.nn.relu(x @ w + B), None), x, ws)[0]

    def unrolled(x):
        for w in ws:
            x = jax.nn.relu(x @ w + B)
        return x

    got, right = (closes(conservation(f, EPSILON)(X)) for f in (looped, unrolled))
    assert sum(r.kind == "dense" for r in got) == 3
    for i in range(3):
        a, b = row(got, f"dense[0][{i}]"), row(right, f"dense[{i}]")
        near((a.arrived, a.passed, a.bias, a.stabiliser), (b.arrived, b.passed, b.bias, b.stabiliser))


def test_loops_in_loops_have_two_indices():
    def f(x):
        def outer(x, w):
            return lax.scan(lambda x, _: (jax.nn.relu(x @ w + B), None), x, None, length=2)[0], None

        return lax.scan(outer, x, draw(15, 3, 4, 4))[0]

    ledger = closes(conservation(f, EPSILON)(X))
    assert [r.name for r in ledger if r.kind == "dense"] == [f"dense[0][{i}][{j}]" for i in range(3) for j in range(2)]


def constant_start(x):
    return lax.scan(lambda c, _: (jnp.tanh(c @ W + x @ W), None), jnp.ones_like(x), None, length=2)[0]


def nested(x):
    def outer(c, _):
        c = jnp.tanh(c @ W)
        return constant_start(c), None

    return lax.scan(outer, x, None, length=2)[0]


def chosen(x):
    return lax.cond(W[0, 0] > 0, constant_start, nested, jnp.tanh(x @ W))


WRAPPED = {
    "alone": constant_start,
    "jit": jax.jit(constant_start),
    "jit inside": lambda x: jax.nn.relu(jax.jit(constant_start)(x @ W)),
    "checkpoint": jax.checkpoint(constant_start),
    "scan": nested,
    "cond": chosen,
    "fori_loop": lambda x: lax.fori_loop(0, 3, lambda _, c: c @ W + x, jnp.zeros_like(x)),
    "reversed": lambda x: lax.scan(lambda c, v: (c @ W + v, c), jnp.ones_like(x[0]), x, reverse=True)[1],
}


@pytest.mark.parametrize("f", WRAPPED.values(), ids=WRAPPED)
def test_constant_starts_within(f):
    """Loops that start from constants, within whatever stands around them."""
    closes(conservation(f, EPSILON, batched=f is not WRAPPED["reversed"])(X))


def joined(x):
    """Constants written where they are used: a token, a padding, a scale."""
    x = jnp.concatenate([jnp.full((len(x), 1), 0.5), x[:, 1:] * 2], axis=1)
    x = jax.nn.relu(x @ W + B)
    return jnp.pad(x, ((0, 0), (1, 0)), constant_values=0.5)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
@pytest.mark.parametrize("f", [joined, stopped])
def test_wrappers_change_nothing(f, wrap):
    """Not the rows, their order or their numbers."""
    got, right = (conservation(g, EPSILON)(X) for g in (wrap(f), f))
    assert [r.name for r in closes(got)] == [r.name for r in closes(right)]
    for a, b in zip(got, right, strict=True):
        near([getattr(a, c) for c in COLUMNS], [getattr(b, c) for c in COLUMNS], 1e-3)


LOOPS_WITH_CONSTANTS = {
    "cond": lambda x: lax.cond(True, lambda x: jnp.ones_like(x), lambda x: x @ np.ones((6, 6), np.float32), x),
    "scan": lambda x: lax.scan(lambda c, w: (jnp.ones_like(c), c @ w), x, np.ones((3, 6, 6), np.float32) / 6)[1].sum(0),
}


@pytest.mark.parametrize("f", LOOPS_WITH_CONSTANTS.values(), ids=LOOPS_WITH_CONSTANTS)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "remat"])
def test_loops_that_replace_data_by_a_constant(f, wrap):
    """What arrives at the constant has a row of its own."""
    x, w = np.asarray(draw(91, 4, 6), np.float32), np.asarray(draw(92, 6, 2), np.float32)
    audit = conservation(wrap(lambda x: f(x) @ w), EPSILON)(x)
    assert any(row.name.startswith("constants of") and np.any(row.ended) for row in audit), str(audit)
    np.testing.assert_allclose(audit.gap, 0, atol=1e-4 * max(row.size.max() for row in audit))
