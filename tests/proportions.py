"""What the tests of primitives share: small arrays, and relevance in proportion on the dense Jacobian, in float64."""

import jax
import numpy as np

from jaxlrp import composites, lrp, plan
from nets import draw

EPSILON = composites.epsilon()
X, W = draw(1, 3, 4), draw(2, 4, 3)
WHERE = np.asarray([2, 0, 2])

UNIT = np.random.default_rng(3).uniform(0.15, 0.85, (3, 4))


def stab(z, eps=1e-9):
    return z + np.where(z >= 0, eps, -eps)


def in_proportion(f, x, R):
    """R_j = sum_k J_kj x_j / stab(f_k) R_k, on the dense Jacobian: for f linear, or of the first degree."""
    jacobian = np.asarray(jax.jacobian(lambda v: f(v.reshape(x.shape)).ravel())(x.ravel()))
    share = np.asarray(R).ravel() / stab(np.asarray(f(x)).ravel())
    return (x.ravel() * (share @ jacobian)).reshape(x.shape)


def start(f, x):
    """Start relevance that is not the output's value."""
    return draw(9, *f(x).shape)


def explain(f, x, R, composite=EPSILON):
    return jax.jit(lrp(f, composite, target=lambda y: R))(x)


def kinds_of(f, x=X):
    return [row.kind for row in plan(f, EPSILON)(x)]


def moved(places, values, shape=X.shape):
    """An array with each value added at its place."""
    found = np.zeros(shape)
    np.add.at(found, places, values)
    return found


FILTER = draw(22, 5) + 1j * draw(23, 5)
