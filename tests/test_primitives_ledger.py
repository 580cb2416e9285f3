"""The ledger closes for primitives that no network of the other tests contains."""

import jax.numpy as jnp
import pytest
from jax import lax

from jaxlrp.evaluate import conservation
from nets import quick_compilation  # noqa: F401
from proportions import EPSILON, FILTER, W, X

LEDGERS = {
    "scatter": lambda x: (x.at[:, jnp.asarray([0, 3])].add(x[:, 1:3]) + 0.1) @ W,
    "constants": lambda x: jnp.ones_like(x).at[:, 1:3].add(x[:, 1:3]) @ W,
    "products": lambda x: jnp.cumprod(x, 1) @ W,
    "scattered products": lambda x: jnp.ones((len(x), 6)).at[:, 1:5].multiply(x) @ jnp.ones((6, 2)),
    "maxima": lambda x: lax.cummax(x, 1) @ W,
    "maxima from 0": lambda x: lax.reduce_window(x, 0.0, lax.max, (1, 2), (1, 2), "VALID") @ W[:2],
    "sorted": lambda x: jnp.sort(x, 1) @ W,
    "magnitudes": lambda x: (jnp.abs(jnp.fft.rfft(x, axis=1) + 0.1)) @ W[:3],
    "filter": lambda x: jnp.fft.irfft(jnp.fft.rfft(x, axis=1) * FILTER[:3] + FILTER[2:], 4, axis=1) @ W,
}


@pytest.mark.parametrize("f", LEDGERS.values(), ids=LEDGERS)
def test_the_ledger_closes(f):
    books = conservation(f, EPSILON)(X)
    size = sum(row.size for row in books)
    assert (abs(books.gap) < 1e-4 * size).all(), str(books)
    for row in books:
        assert (abs(row.gap) <= 1e-4 * (row.size + abs(row.passed) + abs(row.bias))).all(), f"{row.name}\n{books}"
