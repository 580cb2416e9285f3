"""Many numbers at once: kernels that `jax.vmap` makes one for each, and what they share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from convolved import CASES, IMAGES, convolution, convolutions, draw
from jaxlrp import Composite, lrp, per_target, rules, select
from jaxlrp.evaluate.sweep import _explained

COMMON = ("plain", "channels first", "depthwise", "groups", "side by side")
GAMMAS = jnp.asarray([0.1, 0.5, 2.0])


def gamma(number):
    return Composite([(select.kind("conv"), rules.Gamma(number))])


def groups(fun, *args):
    return {e.params["feature_group_count"] for e in convolutions(jax.make_jaxpr(fun)(*args))}


@pytest.mark.parametrize(
    "case", [case if case in COMMON else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_many_gammas_give_what_each_gives(case):
    conv, image, window = CASES[case]
    x, w = draw(1, *image), draw(2, *window)
    explain = lambda number: lrp(conv, gamma(number))(x, w)
    right = jnp.stack([explain(number) for number in GAMMAS])
    np.testing.assert_allclose(jax.jit(jax.vmap(explain))(GAMMAS), right, rtol=1e-10, atol=1e-10)
    four = jax.jit(lambda numbers: jax.lax.map(explain, numbers, batch_size=2))
    np.testing.assert_allclose(four(GAMMAS), right, rtol=1e-10, atol=1e-10)


@pytest.mark.smoke
def test_many_gammas_make_no_groups():
    conv, image, window = CASES["plain"]
    x, w = draw(1, *image), draw(2, *window)
    f = lambda x: jnp.tanh(conv(x, w)).mean((1, 2))
    explain = lambda number, x: lrp(f, gamma(number), target=1)(x)
    assert groups(jax.vmap(explain, (0, None)), GAMMAS, x) == {1}
    assert groups(jax.vmap(explain, (0, None)), GAMMAS[:1], x) == {1}
    relu = lambda x: jax.nn.relu(conv(jnp.abs(x), w))
    signed = lambda number: Composite([(select.kind("conv"), rules.GeneralizedGamma(number))])
    rectified = lambda number, x: lrp(relu, signed(number))(x)
    assert groups(jax.vmap(rectified, (0, None)), GAMMAS, x) == {1}


def test_derivatives_by_many_gammas():
    w = [draw(2, 3, 3, 2, 4), draw(3, 3, 3, 4, 3)]
    conv = convolution(IMAGES, (1, 1), "SAME")
    net = lambda x: jax.nn.relu(conv(jax.nn.relu(conv(x, w[0])), w[1])).mean((1, 2))
    x = draw(1, 2, 5, 4, 2)
    size = lambda number: (lrp(net, gamma(number), target=0)(x) ** 2).sum()
    one, two = jax.jit(jax.grad(size)), jax.jit(jax.grad(jax.grad(size)))
    right = jnp.stack([one(number) for number in GAMMAS])
    sized, step = jax.jit(size), 1e-6
    numeric = jnp.stack([(sized(number + step) - sized(number - step)) / (2 * step) for number in GAMMAS])
    np.testing.assert_allclose(right, numeric, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(size)))(GAMMAS), right, rtol=1e-9)
    np.testing.assert_allclose(jax.jit(jax.grad(lambda g: jax.vmap(size)(g).sum()))(GAMMAS), right, rtol=1e-9)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.jacfwd(size)))(GAMMAS), right, rtol=1e-9)
    twice = jnp.stack([two(number) for number in GAMMAS])
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(jax.grad(size))))(GAMMAS), twice, rtol=1e-8)


def test_many_gammas_with_many_targets_and_examples():
    w = draw(2, 3, 3, 2, 4)
    conv = convolution(IMAGES, (1, 1), "SAME")
    f = lambda x: jax.nn.relu(conv(x, w)).mean((1, 2))
    x = draw(1, 3, 5, 4, 2)
    right = jnp.stack([jnp.stack([lrp(f, gamma(g), target=t)(x) for t in range(4)]) for g in GAMMAS])
    each = lambda number, x: per_target(f, gamma(number))(x)
    both = jax.jit(jax.vmap(each, (0, None)))
    np.testing.assert_allclose(both(GAMMAS, x), right, rtol=1e-10, atol=1e-10)
    assert groups(both, GAMMAS, x) == {1}
    examples = jax.vmap(lambda x: jax.vmap(each, (0, None))(GAMMAS, x[None]), out_axes=2)(x)
    np.testing.assert_allclose(examples[..., 0, :, :, :], right, rtol=1e-10, atol=1e-10)


def test_programs_keep_nothing_of_what_is_traced():
    w = [draw(2, 3, 3, 2, 4), draw(3, 3, 3, 4, 3)]
    conv = convolution(IMAGES, (1, 1), "SAME")
    net = lambda x: jax.nn.relu(conv(jax.nn.relu(conv(x, w[0])), w[1])).mean((1, 2))
    explain = lambda number, x: lrp(net, gamma(number), target=0)(x)
    x = draw(1, 2, 5, 4, 2)
    with jax.checking_leaks():
        jax.jit(explain)(0.5, x)
        jax.jit(jax.vmap(explain, (0, None)))(GAMMAS, x)


def test_no_term_for_what_does_not_vary():
    conv, image, window = CASES["plain"]
    x, w = draw(1, *image), draw(2, *window)
    explain = lambda x: lrp(lambda x: jnp.tanh(conv(x, w)), gamma(0.5))(x)
    along = lambda x: jax.jvp(explain, (x,), (x,))
    count = lambda fun: len(list(convolutions(jax.make_jaxpr(fun)(x))))
    assert count(along) == 2 * count(explain)  # each convolution once more, of tangents; kernels have none


PLAIN_CONV, IMAGE, WINDOW = CASES["plain"]
PREDICT = Partial(lambda w, x: jax.nn.relu(PLAIN_CONV(x, w)).mean((1, 2)), draw(2, *WINDOW))
TARGETS = jnp.zeros(IMAGE[0], int)


def test_variants_of_a_sweep_share_their_program():
    """However many variants, each convolution stands in it once, or twice where four do not divide them."""

    def count(numbers):
        explained = lambda numbers, x: _explained(PREDICT, [gamma(n) for n in numbers], x, TARGETS)
        return len(list(convolutions(jax.make_jaxpr(explained)(list(numbers), draw(1, *IMAGE)))))

    assert count(np.ones(4)) == count(np.ones(8)) == count(np.ones(16)) > 1
    assert count(np.ones(9)) == 2 * count(np.ones(8))


def test_variants_of_every_form():
    """Numbers of other dtypes, none at all, and functions keep their places."""
    plus = Composite([(select.kind("conv"), rules.ZPlus())])
    explainers = [gamma(0.1), plus, gamma(jnp.float16(0.2)), lambda x, t: x, plus, gamma(0.3), gamma(0.4)]
    x = draw(1, *IMAGE)
    found = jax.jit(lambda x: _explained(PREDICT, explainers, x, TARGETS))(x)
    assert len(found) == len(explainers)
    for e, relevance in zip(explainers, found, strict=True):
        right = lrp(PREDICT, e, target=TARGETS)(x) if isinstance(e, Composite) else x
        np.testing.assert_allclose(relevance, right, rtol=1e-10, atol=1e-10)


def test_many_gammas_on_several_devices():
    w = draw(2, 3, 3, 2, 4)
    conv = convolution(IMAGES, (1, 1), "SAME")
    f = lambda x: jax.nn.relu(conv(x, w)).mean((1, 2))
    explain = lambda x: jax.vmap(lambda number: lrp(f, gamma(number), target=1)(x))(GAMMAS)
    x, mesh = draw(1, 4, 5, 4, 2), jax.make_mesh((4,), ("i",), (jax.sharding.AxisType.Auto,))
    right = jnp.stack([lrp(f, gamma(number), target=1)(x) for number in GAMMAS])
    spread = jax.shard_map(explain, mesh=mesh, in_specs=jax.P("i"), out_specs=jax.P(None, "i"))
    np.testing.assert_allclose(jax.jit(spread)(x), right, rtol=1e-10, atol=1e-10)
    sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P("i")))
    np.testing.assert_allclose(jax.jit(explain)(sharded), right, rtol=1e-10, atol=1e-10)
