"""Transformations of `lrp` itself: `vmap`, `jit`, `grad` and `scan`, over inputs, targets and composites."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import nets
from jaxlrp import Composite, lrp, rules, select
from nets import LOCAL, close, draw, quick_compilation  # noqa: F401
from programs import EPSILON, FOUR_LAYERS, LOOPS, MLP, X

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("composite", LOCAL.values(), ids=LOCAL)
def test_vmap_over_inputs(composite):
    f = jax.jit(lrp(MLP, composite, target=1))
    right = jnp.stack([f(x) for x in X])
    close(jax.vmap(f)(X), right)
    close(f(X), right)  # a batch by hand


def test_vmap_without_jit():
    close(jax.vmap(lrp(MLP, EPSILON))(X), lrp(MLP, EPSILON)(X))


def test_vmap_over_targets():
    def f(t):
        return lrp(MLP, EPSILON, target=t)(X)

    close(jax.vmap(f)(jnp.arange(3)), jnp.stack([f(t) for t in range(3)]))


DEEP = partial(nets.mlp, nets.mlp_parameters(4, 6, 5, 3))


def mixed(low, gamma, epsilon):
    """A rule of its own for each of three layers, with one number each."""
    return Composite([
        (select.first(), rules.ZBox(low, 4.0)),
        (select.depth(1, 2), rules.Gamma(gamma)),
        (select.last(), rules.Epsilon(epsilon)),
    ])  # fmt: skip


MIXED = [mixed(-3.0, 0.1, 0.5), mixed(-4.0, 0.2, 0.1), mixed(-5.0, 1.0, 0.01)]


def test_vmap_over_stacked_composite():
    stacked = jax.tree.map(lambda *numbers: jnp.stack(numbers), *MIXED)
    right = jax.jit(lambda cs, x: jnp.stack([lrp(DEEP, c)(x) for c in cs]))(MIXED, X)
    close(jax.vmap(lambda c: lrp(DEEP, c)(X))(stacked), right)
    pairs = jax.jit(jax.vmap(lambda c, x: lrp(DEEP, c)(x)))(stacked, X)
    close(pairs, jnp.stack([right[i, i] for i in range(3)]))


def test_jit_with_composite_as_argument_compiles_once():
    traces = []

    def f(x):
        traces.append(x)
        return DEEP(x)

    explain = jax.jit(lambda composite, x: lrp(f, composite)(x))
    for composite in MIXED:
        close(explain(composite, X), lrp(DEEP, composite)(X))
    assert len(traces) == 1


@pytest.mark.parametrize("rule", [rules.Epsilon, rules.Gamma, rules.GeneralizedGamma])
@pytest.mark.parametrize("f", [DEEP, partial(LOOPS["jit-remat-scan"], FOUR_LAYERS[0])], ids=["plain", "jit-remat-scan"])
def test_grad_with_respect_to_a_rules_number(rule, f):
    R, weights, h = draw(16, *f(X).shape), draw(17, 3, 4), 1e-5

    @jax.jit
    def score(number):
        return (weights * lrp(f, nets.linear(rule(number)), target=lambda y: R)(X)).sum()

    differences = (score(0.3 + h) - score(0.3 - h)) / (2 * h)
    assert abs(differences) > 1e-3
    np.testing.assert_allclose(jax.grad(score)(0.3), differences, rtol=1e-6)


@pytest.mark.parametrize("rule", ["epsilon", "gamma"])
def test_grad_with_respect_to_input_and_parameters(rule):
    at = nets.mlp_parameters(4, 6, 3), X
    toward, weights, h = jax.tree.map(lambda v: draw(18, *v.shape), at), draw(17, 3, 4), 1e-6

    @jax.jit
    def score(parameters, x):
        return (weights * lrp(nets.mlp, LOCAL[rule], argnums=1, target=0)(parameters, x)).sum()

    def moved(i, size):
        return [jax.tree.map(lambda v, d: v + size * d, a, t) if i == j else a
                for j, (a, t) in enumerate(zip(at, toward, strict=True))]  # fmt: skip

    for i, gradient in enumerate(jax.grad(score, (0, 1))(*at)):
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, toward[i])))
        differences = (score(*moved(i, h)) - score(*moved(i, -h))) / (2 * h)
        np.testing.assert_allclose(slope, differences, rtol=1e-5)


def test_explained_inside_scan():
    explain = lrp(MLP, EPSILON, target=2)

    def step(total, x):
        return total + explain(x), explain(x)

    right = explain(X)
    close(lax.scan(step, jnp.zeros(4), X), (right.sum(0), right))
    close(lax.map(explain, X), right)
