"""What the tests of the ledger share: composites, networks and what it is to close, in float32, as in practice.

Rounding is measured against the size of what a row sees, the sum of |R_out|, and of what it makes of that: where a unit
is small beside its bias, both its messages and the bias's share are larger than it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import nets
from jaxlrp import composites

TOLERANCE = 1e-5
COMPOSITES = {
    "epsilon": composites.epsilon(),
    "epsilon, visibly": composites.epsilon(0.1),
    "epsilon_plus": composites.epsilon_plus(),
    "epsilon_plus_flat": composites.epsilon_plus_flat(),
    "epsilon_gamma_box": composites.epsilon_gamma_box(-3.0, 3.0),
    "epsilon_alpha2_beta1": composites.epsilon_alpha2_beta1(),
    "epsilon_alpha2_beta1_flat": composites.epsilon_alpha2_beta1_flat(),
    "deep_taylor": composites.deep_taylor(),
    "deep_taylor, nonnegative": composites.deep_taylor("nonnegative"),
    "deep_taylor, box": composites.deep_taylor(low=-3.0, high=3.0),
    "excitation_backprop": composites.excitation_backprop(),
    "guided_backprop": composites.guided_backprop(),
    "deconvnet": composites.deconvnet(),
    "beta_smooth": composites.beta_smooth(),
    "attnlrp": composites.attnlrp(),
    "cp_lrp": composites.cp_lrp(),
}
EPSILON, FLAT = COMPOSITES["epsilon, visibly"], COMPOSITES["epsilon_plus_flat"]
GRADIENTS = ("GuidedBackprop", "DeconvNet", "BetaSmooth")
COLUMNS = ("arrived", "passed", "bias", "stabiliser", "dropped", "created", "ended", "size")


@pytest.fixture(autouse=True, scope="module")
def single_precision():
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, W, B = draw(0, 3, 4), draw(1, 4, 4), draw(2, 4)
IMAGES = draw(3, 3, 8, 8, 3)


def closes(ledger, tolerance=TOLERANCE):
    """Every row, and the whole; returns the ledger."""
    for row in ledger:
        assert np.isfinite(row.size).all(), row.name
        scale = row.size + abs(row.passed) + abs(row.bias)
        assert (abs(row.gap) <= tolerance * scale).all(), f"{row.name}: gap {row.gap} of {scale}\n{ledger}"
    scale = sum((row.size + abs(row.bias) for row in ledger), start=abs(ledger.start))
    assert (abs(ledger.gap) <= tolerance * scale).all(), f"gap {ledger.gap} of {scale}\n{ledger}"
    return ledger


def row(ledger, name):
    (found,) = (r for r in ledger if r.name == name)
    return found


def near(got, right, tolerance=1e-4):
    right = np.asarray(right)
    np.testing.assert_allclose(got, right, rtol=0, atol=tolerance * (np.abs(right).max() + 1e-3))


def tokens(x):
    """A constant token is joined to the data, then attention, a gate and a layer norm."""
    x = x.reshape(-1, 2, 2)
    x = jnp.concatenate([jnp.full((len(x), 1, 2), 0.5), x], axis=1)
    x = x @ W[:2] + B
    x = x + jax.nn.softmax(x @ x.swapaxes(1, 2)) @ x
    x = (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-3) * B
    x = jax.nn.relu(x @ W + 1)
    x = x * jax.nn.sigmoid(x @ W)
    return x.mean(1) @ W + B


def padded(x):
    """Padding that is not zero reaches convolutions, pools and sums."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=0.7)
    x = jax.nn.relu(nets.conv(x, draw(4, 3, 3, 3, 4), stride=2) + B)
    x = lax.reduce_window(x, -np.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    x = x + jnp.pad(x[:, 1:], ((0, 0), (1, 0), (0, 0), (0, 0)), constant_values=-0.3)
    return x.mean((1, 2)) @ W + B


def stopped(x):
    """Relevance ends at a branch that was declared constant."""
    y = jax.nn.relu(jnp.tanh(x @ W + B))
    return (y + lax.stop_gradient(x * y)) @ W


def scanned(x):
    """A loop whose state starts from constants."""

    def step(state, w):
        return jax.nn.relu(state @ w + x @ W + B), None

    return lax.scan(step, jnp.full_like(x, 0.5), draw(5, 3, 4, 4))[0] @ W


def maxima(x):
    """Every kind of maximum, minimum and clip."""
    y = jnp.maximum(x @ W + B, x)
    y = jnp.minimum(jnp.maximum(y, B), 1.5)
    y = jnp.stack([y.max(1), y.min(1), jax.nn.logsumexp(y, 1), y.mean(1)], axis=1)
    return jax.nn.relu(jnp.clip(y, -1.0, 1.0) @ W + B) @ W


RESNET = nets.ResNet()
VARIABLES = nets.randomise(jax.eval_shape(RESNET.init, jax.random.key(0), IMAGES))


def residual(x):
    """BatchNorm after every convolution, residual sums, both kinds of pool."""
    return RESNET.apply(VARIABLES, x)


NETS = {
    "tokens": (tokens, X),
    "padded": (padded, IMAGES),
    "stopped": (stopped, X),
    "scanned": (scanned, X),
    "maxima": (maxima, X),
    "residual": (residual, IMAGES),
}
