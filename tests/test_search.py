"""Search: grid against a loop, the surrogate against pixel flipping and NumPy, ascent where the best is known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nets
from jaxlrp import Composite, composites, errors, evaluate, lrp, rules, select
from nets import draw, linear, quick_compilation  # noqa: F401

PARAMETERS = nets.mlp_parameters(12, 10, 8, 3)
MLP = partial(nets.mlp, PARAMETERS)
X, TARGETS = draw(1, 5, 12), np.array([0, 2, 1, 1, 0])
# two dense layers without a non-linearity: the true contributions are what gamma = 0 gives
DEEP = [draw(i, *shape) for i, shape in ((2, (12, 6)), (3, (6, 2)))]
PRODUCT = lambda x: x @ DEEP[0] @ DEEP[1]
MANY = draw(4, 40, 12)


def by_depth(first, last, epsilon=0.1) -> Composite:
    rows = [(select.depth(0, 1), rules.GeneralizedGamma(first)), (select.depth(1, 2), rules.GeneralizedGamma(last))]
    return Composite([*rows, (select.kind("dense"), rules.Epsilon(epsilon))])


def gain(f, x, targets, composite, **options):
    relevance = lrp(f, composite, target=targets)(x)
    lerf, morf = (evaluate.pixel_flipping(f, x, relevance, targets, order=o, **options) for o in ("lerf", "morf"))
    return evaluate.srg(lerf, morf)


def soft(f, x, targets, composite, **options):
    return evaluate.surrogate(f, x, lrp(f, composite, target=targets)(x), targets, **options)


def descent(rate):
    """A minimiser with optax's two functions and none of its code."""
    return optax.GradientTransformation(lambda p: (), lambda g, s, p: (jax.tree.map(lambda v: -rate * v, g), s))


# ------------------------------------------------------------------------------------------------------------- grid


@pytest.mark.smoke
def test_a_grid_is_a_loop():
    tried = [by_depth(a, b) for a in (0.0, 0.3, 2.0) for b in (0.1, 1.0)]
    traces = []

    def measure(c):
        traces.append(1)
        return gain(MLP, X, TARGETS, c, fill=0.0)

    found = evaluate.grid(measure, tried)
    assert len(traces) == 1
    alone = jax.jit(lambda c: gain(MLP, X, TARGETS, c, fill=0.0))
    wanted = np.stack([alone(c) for c in tried])
    assert found.values.shape == (6, 5) and len(np.unique(wanted.mean(1))) > 3
    np.testing.assert_allclose(found.values, wanted, rtol=1e-10)
    assert found.best == wanted.mean(1).argmax() and found.composite is tried[found.best]


def test_one_number_per_composite_and_what_is_not_finite_loses():
    numbers = lambda c: jnp.sqrt(1 - jax.tree.leaves(c)[0])
    found = evaluate.grid(numbers, [composites.epsilon(e) for e in (2.0, 0.5, 0.75)])
    assert found.best == 1 and found.values.shape == (3,) and np.isnan(found.values[0])
    np.testing.assert_allclose(found.values[1:], [0.5**0.5, 0.5])


def test_the_grid_finds_that_a_linear_network_wants_no_gamma():
    tried = [linear(rules.GeneralizedGamma(g)) for g in (5.0, 0.5, 0.0, 1.0)]
    found = evaluate.grid(lambda c: gain(PRODUCT, MANY, 0, c, fill=0.0), tried)
    assert found.best == 2
    best = found.values[2]
    assert (best[None] >= found.values - 1e-12).all()  # on every example: the true order falls fastest at every step


# -------------------------------------------------------------------------------------------------------- surrogate


@pytest.mark.parametrize("region, steps", [(1, 7), ((3, 2), [0.1, 0.4, 0.7])])
def test_a_cold_surrogate_is_the_symmetric_relevance_gain(region, steps):
    x, relevance = draw(5, 3, 5, 6, 2), draw(6, 3, 5, 6, 2)
    weights = draw(7, 60, 3)
    predict = lambda v: jax.nn.softmax(jnp.tanh(v.reshape(len(v), -1) @ weights))
    options = {"region": region, "steps": steps, "fill": "uniform", "key": jax.random.key(3)}
    curves = [evaluate.pixel_flipping(predict, x, relevance, 1, order=o, **options) for o in ("lerf", "morf")]
    cold = evaluate.surrogate(predict, x, relevance, 1, temperature=1e-9, **options)
    np.testing.assert_allclose(cold, evaluate.srg(*curves), rtol=1e-9)
    warm = evaluate.surrogate(predict, x, relevance, 1, temperature=0.3, **options)
    assert np.abs(warm - cold).max() > 1e-3
    # its scale is no matter
    np.testing.assert_allclose(
        evaluate.surrogate(predict, x, 7 * relevance, 1, temperature=0.3, **options), warm, rtol=1e-9
    )


def test_the_surrogate_is_its_formula():
    weights = draw(8, 7, 2)
    predict = lambda v: jnp.tanh(v @ weights)
    x, r, temperature = np.asarray(draw(9, 4, 7)), np.asarray(draw(10, 4, 7)), 0.4
    got = evaluate.surrogate(predict, x, r, [0, 1, 1, 0], temperature=temperature, fill=0.5)
    for i, target in enumerate([0, 1, 1, 0]):
        ordered = np.sort(r[i])[::-1]
        flips = {}
        for k in range(1, 7):
            threshold = (ordered[k - 1] + ordered[k]) / 2
            flips[k] = 1 / (1 + np.exp(-(r[i] - threshold) / (temperature * r[i].std())))
        scores = lambda w: float(predict((1 - w) * x[i] + w * 0.5)[target])  # noqa: B023
        total = sum(scores(1 - flips[7 - k]) - scores(flips[k]) for k in range(1, 7)) / 7
        assert float(got[i]) == pytest.approx(total, rel=1e-10)


def test_its_gradient_by_a_composite_is_that_of_finite_differences():
    value = jax.jit(lambda c: soft(MLP, X, TARGETS, c, fill="uniform", temperature=0.5, steps=4).mean())
    rows = [(select.depth(0, 1), rules.GeneralizedGamma(0.4)), (select.depth(1, 2), rules.Epsilon(0.3))]
    start = Composite(rows) + linear(rules.GeneralizedGamma(1.3))
    numbers, structure = jax.tree.flatten(start)
    slopes = jax.tree.leaves(jax.jit(jax.grad(value))(start))
    for i, slope in enumerate(slopes):
        up, down = ([v + d * (i == j) for j, v in enumerate(numbers)] for d in (1e-5, -1e-5))
        wanted = (value(jax.tree.unflatten(structure, up)) - value(jax.tree.unflatten(structure, down))) / 2e-5
        assert abs(slope) > 1e-5 and float(slope) == pytest.approx(float(wanted), rel=1e-5)


def test_a_flat_map_has_no_gain_and_no_slope():
    value = lambda r: evaluate.surrogate(MLP, X, r, 0).sum()
    flat = jnp.zeros_like(X)
    assert abs(float(value(flat))) < 1e-12 and np.isfinite(jax.grad(value)(flat)).all()


# ----------------------------------------------------------------------------------------------------------- ascent


@pytest.mark.parametrize("optimiser, steps", [(optax.adam(0.1), 150), (descent(0.1), 60)])
def test_ascent_reaches_the_top_of_a_hill(optimiser, steps):
    def hill(c):
        (_, first), (_, last), (_, rest) = c.rows
        return -(jnp.log(first.gamma / 2) ** 2) - jnp.log(last.gamma / 0.01) ** 2 + 0 * rest.epsilon

    found = evaluate.ascend(hill, by_depth(0.25, 0.25), optimiser, steps)
    assert found.values.shape == (steps + 1,) and float(found.values[0]) == pytest.approx(
        float(hill(by_depth(0.25, 0.25)))
    )
    np.testing.assert_allclose(jax.tree.leaves(found.composite), [2, 0.01, 0.1], rtol=0.05)
    assert float(found.values[found.best]) == float(found.values.max()) > -0.01
    assert float(hill(found.composite)) == pytest.approx(float(found.values[found.best]), abs=1e-9)


def test_ascent_improves_the_measure_that_the_surrogate_stands_for():
    """On the linear network, whose best gamma is 0, from 1 towards 0: always positive, and the gain rises with it."""
    start = linear(rules.GeneralizedGamma(1.0))
    seen = []

    def objective(c):
        jax.debug.callback(lambda g: seen.append(float(g)), c.rows[0][1].gamma)
        return soft(PRODUCT, MANY, 0, c, fill=0.0, steps=6)

    found = evaluate.ascend(objective, start, optax.adam(0.3), 12)
    jax.effects_barrier()
    assert len(seen) >= 13 and min(seen) > 0
    assert found.composite.rows[0][1].gamma < 0.1
    assert found.values[found.best] > found.values[0]
    exact = evaluate.grid(lambda c: gain(PRODUCT, MANY, 0, c, fill=0.0), [start, found.composite])
    assert exact.best == 1


def test_only_what_is_trainable_moves():
    start = Composite([(select.first("dense"), rules.ZBox(-1.0, 1.0))]) + by_depth(0.5, 0.5, 0.2)
    both = lambda c: -sum(jnp.sum(v) for v in jax.tree.leaves(c))
    moved = lambda trainable: [
        bool(a != b)
        for a, b in zip(
            jax.tree.leaves(evaluate.ascend(both, start, descent(1.0), 2, trainable=trainable).composite),
            jax.tree.leaves(start),
            strict=True,
        )
    ]
    assert moved(("*/gamma", "*/epsilon")) == [False, False, True, True, True]
    assert moved(("1/gamma",)) == [False, False, True, False, False]
    assert moved(("1/gamma", "3/*")) == [False, False, True, False, True]


def test_the_best_is_kept_where_the_last_is_worse():
    peak = lambda c: -jnp.abs(jnp.log(c.rows[0][1].epsilon))
    found = evaluate.ascend(peak, composites.epsilon(np.e**-1), descent(1.0), 3)  # -1, 0, then to and fro
    assert found.best == 1 and float(found.values[1]) > -1e-6 and found.values[-1] <= found.values[1]


def test_arrays_of_numbers_are_trained_too():
    gammas = np.full(3, 0.5)
    objective = lambda c: -(jnp.log(c.rows[0][1].gamma / jnp.arange(1.0, 4.0)) ** 2).sum()
    found = evaluate.ascend(objective, linear(rules.GeneralizedGamma(gammas)), descent(0.2), 40)
    np.testing.assert_allclose(found.composite.rows[0][1].gamma, [1, 2, 3], rtol=1e-3)


# ----------------------------------------------------------------------------------------------------------- errors

ONE = composites.epsilon(0.1)
FIRST = lambda c: jax.tree.leaves(c)[0]
CLIMB = partial(evaluate.ascend, FIRST, ONE, descent(0.1), 2)
SOFT = partial(evaluate.surrogate, MLP, X, X, 0)
BAD = {
    "no composites": (lambda: evaluate.grid(FIRST, []), "write a list of composites"),
    "one composite": (lambda: evaluate.grid(FIRST, [ONE, 0.1]), "write a list of composites"),
    "other rows": (lambda: evaluate.grid(FIRST, [ONE, ONE, ONE + ONE]), "composite 2 differs"),
    "other shapes": (lambda: evaluate.grid(FIRST, [ONE, composites.epsilon(np.ones(2))]), "composite 1 differs"),
    "no numbers": (lambda: evaluate.grid(lambda c: jnp.ones(()), [linear(rules.ZPlus())] * 2), "no numbers"),
    "no finite measure": (lambda: evaluate.grid(lambda c: jnp.log(-FIRST(c)), [ONE]), "no composite's measure"),
    "a matrix": (lambda: evaluate.grid(lambda c: jnp.ones((2, 2)) * FIRST(c), [ONE]), "grid: the measure returned"),
    "integers": (lambda: evaluate.grid(lambda c: 1, [ONE]), "the measure returned"),
    "two": (lambda: evaluate.ascend(lambda c: (1.0, 2.0), ONE, descent(1), 1), "ascend: the measure returned"),
    "no composite": (lambda: evaluate.ascend(FIRST, 0.1, descent(1), 1), "0.1 is no composite"),
    "no steps": (lambda: evaluate.ascend(FIRST, ONE, descent(1), 0), "steps=0"),
    "nothing trainable": (
        lambda: evaluate.ascend(FIRST, linear(rules.ZPlus()), descent(1), 1),
        "fits nothing",
    ),
    "a glob without a leaf": (lambda: CLIMB(trainable=("7/gamma", "*/epsilon")), "7/gamma.*0/epsilon"),
    "zero": (lambda: evaluate.ascend(FIRST, composites.epsilon(0.0), descent(1), 1), "0/epsilon is 0.0"),
    "not finite": (lambda: evaluate.ascend(lambda c: jnp.log(-FIRST(c)), ONE, descent(1), 1), "not finite at step 0"),
    "no slope": (
        lambda: evaluate.ascend(lambda c: jnp.sqrt(1 - FIRST(c)), composites.epsilon(1.0), descent(1), 1),
        "not finite at step 0, at {'0/epsilon': 1.0}",
    ),
    "ids": (lambda: evaluate.surrogate(MLP, np.ones((2, 12), int), X[:2], 0), "cannot be blended"),
    "temperature": (lambda: SOFT(temperature=0.0), "temperature=0.0"),
    "inpainting": (lambda: SOFT(fill="inpaint"), "inpaint"),
    "steps": (lambda: SOFT(steps=13), "steps=13"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    act, words = BAD[case]
    with pytest.raises(errors.InputError, match=words):
        act()


def test_a_target_out_of_range_is_named():
    with pytest.raises(errors.TargetError, match="out of range"):
        evaluate.surrogate(MLP, X, X, 3)
