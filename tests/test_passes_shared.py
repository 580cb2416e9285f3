"""Passes that are left out: channels that are all alike, what every call and every target has in common."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convolved import CASES, IMAGES, convolution, convolutions, draw
from jaxlrp import Composite, lrp, per_target, rules, select
from jaxlrp.analysis import analyse
from jaxlrp.rules import order, passes


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
    sums = [e for e in convolutions(jax.make_jaxpr(explain)(x, w)) if e.invars[1].aval.shape != window]
    assert {e.params["precision"] for e in sums} == {(jax.lax.Precision.HIGHEST,) * 2}
    (op,) = analyse(CASES["depthwise"][0], (x, draw(2, *CASES["depthwise"][2])), {}, 0)[1].ops()
    assert not passes.uniform(op.linear.core)


@pytest.mark.smoke
def test_what_waits_for_relevance_is_shared_by_all_targets_and_has_derivatives():
    conv, image, window = CASES["plain"]
    x, w = draw(1, *image), draw(2, *window)
    f = lambda x: jax.nn.relu(conv(x, w)).mean((1, 2))
    composite = Composite([(select.kind("conv"), rules.AlphaBeta())])
    every = per_target(f, composite)
    program = jax.make_jaxpr(every)(x)
    assert "tanh" in str(program)  # by which `order.late` has XLA wait
    assert {e.params["feature_group_count"] for e in convolutions(program)} == {1}  # no kernel for each target
    right = jnp.stack([lrp(f, composite, target=t)(x) for t in range(window[-1])])
    np.testing.assert_allclose(jax.jit(every)(x), right, rtol=0, atol=1e-12)
    size = lambda x: (lrp(f, composite, target=1)(x) ** 2).sum()
    np.testing.assert_allclose(jax.jit(jax.grad(size))(x), jax.grad(size)(x), rtol=0, atol=1e-10)


def test_what_waits_in_nested_explanations():
    """A kernel that waits for relevance is no data: the outer composite has a rule for its layer."""
    w = [draw(3, 3, 3, 2, 4), draw(4, 4, 3)]
    conv = convolution(IMAGES, (1, 1), "SAME")
    net = lambda x: jax.nn.relu(conv(x, w[0])).mean((1, 2)) @ w[1]
    composite = Composite([(select.kind("conv", "dense"), rules.ZPlus())])
    inner = lambda x: lrp(net, composite, target=0)(x).sum((1, 2))
    x = jnp.abs(draw(1, 2, 5, 5, 2))
    found = lrp(inner, composite, on_unknown="gradient")(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "late", lambda relevance: None)
        right = lrp(lambda x: inner(x), composite, on_unknown="gradient")(x)
    assert np.any(right)
    np.testing.assert_allclose(found, right, rtol=0, atol=1e-8 * np.abs(right).max())


def test_what_waits_on_sharded_batches():
    x, w = draw(1, 4, 6), draw(2, 6, 3)
    mesh = jax.make_mesh((4,), ("i",), (jax.sharding.AxisType.Explicit,))
    sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P("i")))
    explain = lrp(lambda x: jnp.tanh(x[None] @ w), Composite([(select.kind("dense"), rules.ZPlus())]))
    right = jnp.stack([explain(one) for one in x])
    np.testing.assert_allclose(jax.jit(jax.vmap(explain))(sharded), right, rtol=0, atol=1e-12)
    assert jax.jit(jax.vmap(explain))(x[:0]).shape == (0, 6)


def test_passes_of_a_rule_within_another_transformation():
    """What a layer computes first in a transformation of the rule's own is computed again outside of it."""

    @rules.rule
    class Twice(rules.Rule):
        kinds = rules.LINEAR
        conserves = False

        def propagate(self, layer, relevance):
            z = jax.checkpoint(lambda a: layer.forward(a, layer.kernel))(layer.active)
            z += layer.forward(layer.active, layer.kernel)
            return (layer.active * layer.backward(relevance / z, layer.kernel),)

    w = draw(2, 6, 3)
    explain = lrp(lambda x: x @ w, Composite([(select.everything(), Twice())]))
    np.testing.assert_allclose(jax.jit(explain)(draw(1, 2, 6)), explain(draw(1, 2, 6)), rtol=0, atol=1e-12)
