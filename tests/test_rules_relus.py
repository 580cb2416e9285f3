"""Rules that change the gradient at the relus, and excitation backprop, against the sums of the papers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from jaxlrp import composites, errors, lrp
from nets import draw, quick_compilation  # noqa: F401
from reference import positive
from rule_checks import check

# ---------------------------------------------------------------------------------------------------- gradients


W1, W2, C1, C2 = (np.asarray(draw(33 + i, *s)) for i, s in enumerate([(5, 6), (6, 4), (6,), (4,)]))

RELUS = {
    "guided": (composites.guided_backprop(), lambda z, R: R if z > 0 and R > 0 else 0.0),
    "deconvnet": (composites.deconvnet(), lambda z, R: R if R > 0 else 0.0),
    "beta-smooth": (composites.beta_smooth(2.0), lambda z, R: R / (1 + np.exp(-2.0 * z))),
}


SPELLINGS = (jax.nn.relu, lambda x: jnp.maximum(x, 0), lambda x: jnp.maximum(0.0, x))


def test_modified_relus():
    """The gradient, unit by unit, with another derivative at the relus, however they are written."""

    def net(relu, x):
        return relu(relu(x @ W1 + C1) @ W2 + C2)

    def right(x, R, relu):
        z = x @ W1 + C1
        y = np.maximum(z, 0) @ W2 + C2
        g = [relu(y[k], R[k]) for k in range(4)]
        h = [relu(z[j], sum(W2[j, k] * g[k] for k in range(4))) for j in range(6)]
        return np.array([sum(W1[i, j] * h[j] for j in range(6)) for i in range(5)])

    cases = [
        (partial(net, spelling), composite, partial(right, relu=relu))
        for composite, relu in RELUS.values()
        for spelling in SPELLINGS
    ]
    check(cases, draw(40, 3, 5), draw(41, 3, 4))


def test_modified_relus_leave_everything_else_to_the_gradient():
    """Sums, pools, softmax, products, other activations."""

    def smooth(x):
        y = jnp.tanh(x @ W1[:, :5]) * x
        y = jax.nn.softmax(y + 3 * x) @ W1
        return y.reshape(2, 3).max(0)

    xs, Rs = draw(42, 3, 5), draw(43, 3, 3)

    def right(x, R, relu):
        y, pull = jax.vjp(smooth, x)
        return pull(np.array([relu(z, r) for z, r in zip(y, R, strict=True)]))[0]

    f = lambda x: jax.nn.relu(smooth(x))
    check([(f, composite, partial(right, relu=relu)) for composite, relu in RELUS.values()], xs, Rs)


def test_excitation_backprop():
    """Zhang 2016: R_j = sum_k a_j w+_jk / (sum_i a_i w+_ik) R_k, from the winning logit of a relu network down."""
    xs = np.abs(draw(44, 3, 5))

    def f(x):
        return jax.nn.relu(x @ W1) @ W2

    def right(x, R):
        a = np.maximum(x @ W1, 0)
        layers = [reference.Layer(positive(w), np.zeros(w.shape[1]), np.ones(w.shape, bool)) for w in (W1, W2)]
        return reference.zero(x, layers[0], reference.zero(a, layers[1], R))

    check([(f, composites.excitation_backprop(), right)], xs, np.eye(4)[:3])


# ---------------------------------------------------------------------------------------------------- bounded ReLUs

BOUNDED = {
    "relu": (jax.nn.relu, np.inf),
    "maximum": (lambda x: jnp.maximum(0.0, x), np.inf),
    "relu6": (jax.nn.relu6, 6.0),
    "clip": (lambda x: jnp.clip(x, 0, 6), 6.0),
    "by hand": (lambda x: jnp.minimum(jnp.maximum(x, 0), 2.0), 2.0),
}


@pytest.mark.parametrize("relu, bound", BOUNDED.values(), ids=BOUNDED)
def test_gradients_with_modified_relus_know_the_upper_bound(relu, bound):
    x, R = np.linspace(-8.0, 8.0, 9), np.asarray([1.0, -2.0, 3.0] * 3)
    explain = lambda composite: np.asarray(lrp(relu, composite, target=lambda y: R)(x))
    np.testing.assert_allclose(explain(composites.deconvnet()), np.maximum(R, 0))
    np.testing.assert_allclose(explain(composites.guided_backprop()), np.maximum(R, 0) * ((x > 0) & (x < bound)))
    sigmoid = lambda v: 1 / (1 + np.exp(-3.0 * v))
    smooth = sigmoid(x) - (sigmoid(x - bound) if np.isfinite(bound) else 0)
    np.testing.assert_allclose(explain(composites.beta_smooth(3.0)), smooth * R, atol=1e-12)


@pytest.mark.parametrize("f", [jnp.tanh, lambda x: jnp.clip(x, -1, 1), lambda x: jnp.maximum(x, 1.0), jax.nn.gelu])
def test_gradients_with_modified_relus_need_relus(f):
    with pytest.raises(errors.SelectorError, match="GuidedBackprop cannot be applied to.*it is for: activation"):
        lrp(f, composites.guided_backprop())(np.ones(3))
