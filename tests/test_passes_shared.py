"""Passes that are left out: channels that are all alike, what every call and every target has in common."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convolved import CASES, convolutions, draw
from jaxlrp import Composite, lrp, per_target, rules, select
from jaxlrp.analysis import analyse
from jaxlrp.rules import passes


@pytest.mark.parametrize("case", [name for name in CASES if name != "groups" and not name.startswith("depthwise")])
def test_a_kernel_of_ones_is_one_channel(case):
    conv, image, window = CASES[case]
    x, ones = draw(1, *image), jnp.ones(window)
    (op,) = analyse(conv, (x, ones), {}, 0)[1].ops()
    assert passes.uniform(op.linear.core)
    sums = lambda x: passes.by_sums(op.linear.core, x)
    (value, pull), (right, right_pull) = jax.vjp(sums, x), jax.vjp(lambda x: conv(x, ones), x)
    np.testing.assert_allclose(value, right, rtol=0, atol=1e-12)
    r = draw(3, *value.shape)
    np.testing.assert_allclose(pull(r)[0], right_pull(r)[0], rtol=0, atol=1e-12)


@pytest.mark.smoke
def test_flat_multiplies_no_channels():
    conv, image, window = CASES["plain"]
    x, w = draw(1, *image), draw(2, *window)
    explain = lrp(lambda x, w: conv(x, w), Composite([(select.everything(), rules.Flat())]))
    kernels = {tuple(e.invars[1].aval.shape) for e in convolutions(jax.make_jaxpr(explain)(x, w))}
    assert kernels == {window, (3, 3, 1, 1)}  # the network's own, and sums over windows
    (op,) = analyse(CASES["depthwise"][0], (x, draw(2, *CASES["depthwise"][2])), {}, 0)[1].ops()
    assert not passes.uniform(op.linear.core)


def test_denominators_of_known_parameters_are_computed_once():
    """w^2 of a kernel that is closed over: when the explanation is traced. Of an argument: in every call."""
    conv, image, window = CASES["strides and edges"]
    x, w = draw(1, *image), draw(2, *window)
    composite = Composite([(select.everything(), rules.WSquare())])
    known, passed = lrp(lambda x: conv(x, w), composite), lrp(lambda x, w: conv(x, w), composite)
    counts = [len([*convolutions(jax.make_jaxpr(f)(*args))]) for f, args in ((known, (x,)), (passed, (x, w)))]
    assert counts == [2, 3]
    np.testing.assert_allclose(jax.jit(known)(x), jax.jit(passed)(x, w), rtol=0, atol=1e-12)
    several = jax.jit(jax.vmap(known))(jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(several, jnp.stack([known(x), known(2 * x)]), rtol=0, atol=1e-12)


@pytest.mark.smoke
def test_what_waits_for_relevance_is_shared_by_all_targets_and_has_derivatives():
    conv, image, window = CASES["plain"]
    x, w = draw(1, *image), draw(2, *window)
    f = lambda x: jnp.tanh(conv(x, w)).mean((1, 2))
    composite = Composite([(select.kind("conv"), rules.AlphaBeta())])
    every = per_target(f, composite)
    program = jax.make_jaxpr(every)(x)
    assert "tanh" in str(program)
    assert {e.params["feature_group_count"] for e in convolutions(program)} == {1}  # no kernel for each target
    right = jnp.stack([lrp(f, composite, target=t)(x) for t in range(window[-1])])
    np.testing.assert_allclose(jax.jit(every)(x), right, rtol=0, atol=1e-12)
    size = lambda x: (lrp(f, composite, target=1)(x) ** 2).sum()
    np.testing.assert_allclose(jax.jit(jax.grad(size))(x), jax.grad(size)(x), rtol=0, atol=1e-10)
