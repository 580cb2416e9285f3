"""The measures of explanations against plain NumPy loops, and where their value is known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import jaxlrp
from jaxlrp import composites, errors, evaluate
from jaxlrp.evaluate.randomisation import shuffled
from nets import close, draw, mlp, mlp_parameters, quick_compilation  # noqa: F401

X = draw(0, 3, 5, 4, 2, dtype=np.float32)
R = draw(1, 3, 5, 4, 2, dtype=np.float32)
TARGETS = np.array([0, 2, 1])
FIRST, LAST = draw(2, 40, 8, dtype=np.float32) / 6, draw(3, 8, 3, dtype=np.float32)


def predict(x):
    return jax.nn.softmax(jnp.tanh(x.reshape(len(x), -1) @ FIRST) @ LAST)


def watched(function):
    """The function, and a list that gets what it is called with when it runs."""
    seen = []

    def watching(*args):
        jax.debug.callback(lambda *args: seen.append(jax.tree.map(np.array, args)), *args, ordered=True)
        return function(*args)

    return watching, seen


def numbers(value):
    """As float64, once all callbacks have run."""
    jax.block_until_ready(value)
    jax.effects_barrier()
    return np.asarray(value, np.float64)


# ------------------------------------------------------------------------------------------------------ random sets


def by_a_loop(seen, size, region):
    """(sums of relevance, drops), (samples, N) each, from the inputs that were scored: what changed is the set."""
    sums, drops = [], []
    before = np.asarray(predict(X), np.float64)[range(3), TARGETS]
    for y in seen:
        changed = (y != np.asarray(X)).any(-1)
        for i in range(3):
            corners = [changed[i, a, b] for a in range(0, 5, region[0]) for b in range(0, 4, region[1])]
            assert sum(corners) == size
        assert (y[changed] == 0.5).all()
        sums.append([np.asarray(R, np.float64)[i][changed[i]].sum() for i in range(3)])
        drops.append(before - np.asarray(predict(y), np.float64)[range(3), TARGETS])
    return np.array(sums), np.array(drops)


@pytest.mark.smoke
@pytest.mark.parametrize("size, region", [(7, (1, 1)), (3, (2, 3))])
def test_sets_of_tiles_are_those_of_a_loop(size, region):
    options = {"size": size, "region": region, "fill": 0.5, "samples": 9}
    watching, seen = watched(predict)
    got = numbers(evaluate.sensitivity_n(watching, X, R, TARGETS, **options))
    sums, drops = by_a_loop([y for (y,) in seen], size, region)
    assert sums.shape == (9, 3) and len({tuple(row) for row in sums.round(9).tolist()}) > 1
    np.testing.assert_allclose(got, [np.corrcoef(a, b)[0, 1] for a, b in zip(sums.T, drops.T, strict=True)], atol=1e-5)
    # the same key draws the same sets
    plain = numbers(evaluate.infidelity(predict, X, R, TARGETS, **options))
    np.testing.assert_allclose(plain, ((sums - drops) ** 2).mean(0), rtol=1e-5)
    scaled = numbers(evaluate.infidelity(predict, X, R, TARGETS, scale=True, **options))
    best = [np.linalg.lstsq(a[:, None], b, rcond=None)[1][0] / 9 for a, b in zip(sums.T, drops.T, strict=True)]
    np.testing.assert_allclose(scaled, best, atol=1e-5 * max(best), rtol=1e-4)


def test_a_linear_model_is_explained_by_w_times_x():
    x, w = draw(4, 4, 7), draw(5, 7, 2)
    linear, relevance = lambda v: v @ w, x * w[:, 1]
    right = {"size": 3, "fill": 0.0, "samples": 20}
    np.testing.assert_allclose(evaluate.sensitivity_n(linear, x, relevance, 1, **right), 1, atol=1e-12)
    np.testing.assert_allclose(evaluate.sensitivity_n(linear, x, 5 - 2 * relevance, 1, **right), -1, atol=1e-12)
    np.testing.assert_allclose(evaluate.infidelity(linear, x, relevance, 1, **right), 0, atol=1e-24)
    assert (evaluate.infidelity(linear, x, 3 * relevance, 1, **right) > 0.1).all()
    np.testing.assert_allclose(evaluate.infidelity(linear, x, 3 * relevance, 1, scale=True, **right), 0, atol=1e-24)
    everything = evaluate.infidelity(linear, x, relevance + 1, 1, size=7, samples=1, fill=0.0)
    np.testing.assert_allclose(everything, 49, rtol=1e-12)  # seven too much, squared


def test_every_set_is_as_likely_as_any():
    """The mean over many draws is that over all sets of three of six."""
    x, relevance = draw(6, 1, 6), draw(7, 1, 6)
    score = lambda v: jnp.tanh(v[:, 0] * v[:, 1]) + jax.nn.relu(v[:, 2:]).sum(-1)
    errors_of = []
    for chosen in itertools.combinations(range(6), 3):
        without = x.at[0, list(chosen)].set(0)
        errors_of.append(float((relevance[0, list(chosen)].sum() - (score(x) - score(without))[0]) ** 2))
    got = evaluate.infidelity(score, x, relevance, None, size=3, samples=4000, fill=0.0)
    assert abs(float(got[0]) - np.mean(errors_of)) < 4 * np.std(errors_of) / np.sqrt(4000)


def test_a_correlation_with_a_constant_is_not_a_number():
    x, relevance = draw(8, 2, 6, dtype=np.float32), np.array([[0.1] * 6, [0.3, -1, 2, 0.1, 5, 1]], np.float32)

    def measured(slope, offset, relevance=relevance):
        score = jax.tree_util.Partial(lines, jnp.float32(slope), jnp.float32(offset))
        return np.asarray(evaluate.sensitivity_n(score, x, relevance, None, size=3, fill=0.0))

    lines = lambda slope, offset, v: slope * v.sum(-1) + offset
    got = measured(1, 0)
    assert np.isnan(got).tolist() == [True, False]
    assert np.isnan(measured(0, 0.7)).all()
    assert np.isnan(measured(1e-6, 1e3)).all()  # varies by less than a float32 of this size can
    faint = measured(1e-30, 0, 1e-30 * relevance)  # squares of these are 0 in float32
    np.testing.assert_allclose(faint, got, rtol=1e-4)
    nothing = evaluate.infidelity(lambda v: v[:, 0], x, 0 * relevance, None, size=6, fill=0.0, scale=True)
    np.testing.assert_allclose(nothing, x[:, 0] ** 2, rtol=1e-6)  # of zeros every scale is as good


# ------------------------------------------------------------------------------------------------------ small moves


def gradient(x):
    return jax.grad(lambda v: predict(v)[:, 1].sum())(x)


@pytest.mark.parametrize("relative", [True, False])
def test_the_largest_move_is_that_of_a_loop(relative):
    watching, seen = watched(gradient)
    got = numbers(evaluate.max_sensitivity(watching, X, radius=0.2, samples=4, relative=relative))
    (first,), *moved = seen
    assert (first == X).all() and len(moved) == 4
    vectors = lambda x: np.asarray(gradient(x), np.float64).reshape(3, -1)
    worst = np.zeros(3)
    for (near,) in moved:
        assert 0.15 < np.abs(near - X).max() <= 0.2 + 1e-6
        worst = np.maximum(worst, np.linalg.norm(vectors(near) - vectors(X), axis=1))
    assert len({near.tobytes() for (near,) in moved}) == 4
    np.testing.assert_allclose(got, worst / np.linalg.norm(vectors(X), axis=1) ** relative, rtol=1e-4)


def test_the_gradient_of_a_linear_model_holds_still():
    x, w = draw(9, 4, 7), draw(10, 7)
    hold = evaluate.max_sensitivity(jax.grad(lambda v: (v @ w).sum()), x, radius=0.5)
    np.testing.assert_array_equal(hold, np.zeros(4))
    move = evaluate.max_sensitivity(lambda v: v * w, x, radius=0.5, relative=False, samples=300)
    assert (move <= 0.5 * jnp.linalg.norm(w)).all() and (move > 0.3 * jnp.linalg.norm(w)).all()
    assert np.isnan(evaluate.max_sensitivity(jnp.zeros_like, x, radius=0.5)).all()


# ------------------------------------------------------------------------------------------------------------ brevity


def test_gini_and_entropy_by_hand():
    maps = np.array([[0, 0, -3, 0], [2, -2, 2, 2], [1, 2, 3, -4], [0, 0, 0, 0]], np.float32)
    np.testing.assert_allclose(evaluate.sparseness(maps), [0.75, 0, 0.25, np.nan], atol=1e-6)
    p = np.array([0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(evaluate.complexity(maps), [0, np.log(4), -(p * np.log(p)).sum(), np.nan], atol=1e-6)
    for measure in (evaluate.sparseness, evaluate.complexity):
        np.testing.assert_allclose(measure(maps * np.float32(1e-30)), measure(maps), atol=1e-6)
        assert measure(maps.astype(np.float16)).dtype == jnp.float32


def test_gini_and_entropy_are_those_of_a_loop():
    v = np.abs(np.asarray(R, np.float64).sum(-1)).reshape(3, -1)
    gini = [sum(abs(a - b) for a in row for b in row) / (2 * len(row) * row.sum()) for row in v]
    np.testing.assert_allclose(evaluate.sparseness(R), gini, rtol=1e-5)
    np.testing.assert_allclose(evaluate.complexity(R), [scipy.stats.entropy(row) for row in v], rtol=1e-5)
    for measure in (evaluate.sparseness, evaluate.complexity):
        np.testing.assert_array_equal(measure(jnp.moveaxis(R, -1, 1), channels=1), measure(R))
        np.testing.assert_allclose(measure(R.sum(-1), channels=None), measure(R), rtol=1e-6)


# -------------------------------------------------------------------------------------------------------------- masks


def test_masks_by_hand():
    maps = np.array([[5, 1, -2, 4], [3, 3, 1, 0], [-1, -2, -3, -4], [2, 2, 2, 2]], np.float32)
    mask = np.array([[0, 1, 0, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 1]])
    np.testing.assert_allclose(evaluate.pointing_game(maps, mask), [0, 0.5, 1, 0.75])
    np.testing.assert_allclose(evaluate.relevance_mass(maps, mask), [0.5, 3 / 7, np.nan, 0.75], rtol=1e-6)
    # two places, one hit; a tie for one place; both hit; three places shared by four
    np.testing.assert_allclose(evaluate.relevance_rank(maps, mask), [0.5, 0.5, 1, 0.75])


def test_masks_are_those_of_a_loop():
    mask = np.random.default_rng(0).uniform(size=(3, 5, 4)) < 0.4
    hits, mass, rank = [], [], []
    for r, m in zip(np.asarray(R, np.float64).sum(-1), mask, strict=True):
        order = np.argsort(-r, axis=None)
        hits.append(m.flat[order[0]])
        mass.append(np.maximum(r, 0)[m].sum() / np.maximum(r, 0).sum())
        rank.append(np.mean(m.flat[order[: m.sum()]]))
    wanted = {evaluate.pointing_game: hits, evaluate.relevance_mass: mass, evaluate.relevance_rank: rank}
    for measure, right in wanted.items():
        np.testing.assert_allclose(measure(R, mask), right, rtol=1e-5)
        np.testing.assert_array_equal(measure(jnp.moveaxis(R, -1, 1), mask, channels=1), measure(R, mask))
        np.testing.assert_array_equal(measure(R.reshape(3, 40), np.repeat(mask, 2).reshape(3, 40)),
                                      measure(R, np.repeat(mask, 2).reshape(R.shape)))  # fmt: skip
        empty = mask.copy()
        empty[1] = False
        assert np.isnan(jax.jit(measure)(R, empty)).tolist() == [False, True, False]


# ------------------------------------------------------------------------------------------------- shuffled parameters

PARAMS = {"in": {"w": draw(11, 6, 8), "b": draw(12, 8)}, "out": {"w": draw(13, 8, 3)}, "step": np.int32(3)}


def product(params, x):
    """Gradient times input of a small network."""
    network = lambda v: jnp.tanh(v @ params["in"]["w"] + params["in"]["b"]) @ params["out"]["w"]
    return x * jax.grad(lambda v: network(v)[:, 0].sum())(x)


def test_parameters_are_shuffled_stage_by_stage():
    x = draw(14, 4, 6)
    watching, seen = watched(product)
    got = numbers(evaluate.parameter_randomisation(watching, PARAMS, x, layers=["out/*", "*/w", "in/b"]))
    assert len(seen) == 4
    before = np.abs(np.asarray(product(PARAMS, x)))
    changed = []
    for (params, _), row in zip(seen, [None, *got], strict=True):
        close(
            jax.tree.map(np.sort, jax.tree.map(np.ravel, params)), jax.tree.map(np.sort, jax.tree.map(np.ravel, PARAMS))
        )
        flat = zip(jax.tree.leaves(params), jax.tree.leaves(PARAMS), strict=True)
        changed.append([bool((a != b).any()) for a, b in flat])
        if row is not None:
            after = np.abs(np.asarray(product(params, x)))
            wanted = [scipy.stats.spearmanr(a, b).statistic for a, b in zip(before, after, strict=True)]
            np.testing.assert_allclose(row, wanted, atol=1e-12)
    # in/b, in/w, out/w, step
    assert changed == [[False] * 4, [False, False, True, False], [False, True, True, False], [True, True, True, False]]
    assert (got < 0.999).any(1).all()
    np.testing.assert_array_equal(evaluate.parameter_randomisation(product, PARAMS, x), got[-1:])
    np.testing.assert_array_equal(evaluate.parameter_randomisation(product, PARAMS, x, layers="*"), got[-1:])
    other = evaluate.parameter_randomisation(product, PARAMS, x, key=jax.random.key(1))
    assert not np.array_equal(other, got[-1:])
    shuffle = shuffled(jax.random.key(2), jnp.arange(12.0).reshape(3, 4))
    assert (shuffle[:, 1:] - shuffle[:, :-1] != 1).any() and (shuffle % 4 != jnp.arange(4)).any()  # not whole rows


def test_ties_and_maps_that_ignore_the_parameters():
    ties = jnp.array([[0.0, 0, 1, 1, 3, -2], [1, 1, 1, 1, 1, 1]])
    parts = {"w": jnp.array([1.0, 2, 3, 4, 5, 6])}
    got = evaluate.parameter_randomisation(lambda p, x: jnp.round(x * p["w"] / 4), parts, ties)
    after = jnp.round(ties * shuffled(jax.random.fold_in(jax.random.key(0), 0), parts["w"]) / 4)
    wanted = scipy.stats.spearmanr(jnp.abs(jnp.round(ties * parts["w"] / 4))[0], jnp.abs(after)[0]).statistic
    np.testing.assert_allclose(got[0, 0], wanted, atol=1e-12)
    ignores = evaluate.parameter_randomisation(lambda p, x: x, parts, ties)
    np.testing.assert_allclose(ignores, [[1, np.nan]], atol=1e-12)  # a constant map has no ranks
    turned = evaluate.parameter_randomisation(lambda p, x: x * jnp.sign(p["w"][0] - p["w"][1]), parts, ties[:1])
    np.testing.assert_allclose(turned, 1, atol=1e-12)  # its sign at most


# ------------------------------------------------------------------------------------------------- all of them together


@pytest.mark.slow
def test_lrp_is_measured():
    """LRP of a small network, step by step, and fewer examples within one jit."""
    params, x = mlp_parameters(6, 8, 3), draw(15, 4, 6)
    explain = jax.jit(jaxlrp.lrp(mlp, composites.epsilon(), argnums=1, target=1))

    def measures(params, x):
        relevance, score = explain(params, x), jax.tree_util.Partial(mlp, params)
        sets = {"size": 2, "samples": 8, "fill": "uniform"}
        return (
            evaluate.sensitivity_n(score, x, relevance, 1, **sets),
            evaluate.infidelity(score, x, relevance, 1, **sets),
            evaluate.max_sensitivity(jax.tree_util.Partial(explain, params), x, radius=0.1, samples=3),
            evaluate.sparseness(relevance),
            evaluate.complexity(relevance),
            evaluate.pointing_game(relevance, x > 0),
            evaluate.relevance_mass(relevance, x > 0),
            evaluate.relevance_rank(relevance, x > 0),
            evaluate.parameter_randomisation(explain, params, x)[0],
        )

    eager = measures(params, x)
    assert all(v.shape == (4,) and v.dtype == jnp.float64 for v in eager)
    close(jax.jit(measures)(params, x[:2]), tuple(v[:2] for v in eager), 1e-10)  # whatever stands beside them
    assert (eager[0] > 0.2).all() and (eager[2] < 3).all() and (eager[-1] < 0.999).all()


def test_one_compilation_serves_other_parameters():
    traces = []

    def score(w, x):
        traces.append(1)
        return x * w

    x, r, counts = draw(16, 3, 4), draw(17, 3, 4), []
    for seed in range(3):
        w = draw(seed, 4)
        evaluate.infidelity(jax.tree_util.Partial(score, w), x, r, 1, size=2, samples=3)
        evaluate.max_sensitivity(jax.tree_util.Partial(score, w), x, radius=0.1 * (seed + 1), samples=2)
        evaluate.parameter_randomisation(score, w, x)
        counts.append(len(traces))
    assert counts[0] == counts[1] == counts[2]


SETS = {"size": 2, "samples": 4}
MASK = np.ones((3, 5, 4))
EMPTY = np.concatenate([np.ones((2, 5, 4)), np.zeros((1, 5, 4))])
BAD = {
    "size": (evaluate.sensitivity_n, (predict, X, R, 0), {"size": 20}, errors.InputError, "size=20: .* 1 to 19"),
    "no size": (evaluate.infidelity, (predict, X, R, 0), {"size": 0}, errors.InputError, "size=0: .* 1 to 20"),
    "samples": (evaluate.sensitivity_n, (predict, X, R, 0), {"size": 2, "samples": 1}, errors.InputError, ">= 2"),
    "half": (evaluate.infidelity, (predict, X, R, 0), {"size": 2, "samples": 0.5}, errors.InputError, "samples=0.5"),
    "target": (evaluate.sensitivity_n, (predict, X, R, 9), SETS, errors.TargetError, "out of range"),
    "fill": (evaluate.infidelity, (predict, X, R, 0), SETS | {"fill": "black"}, errors.InputError, "fill='black'"),
    "ids": (evaluate.max_sensitivity, (gradient, np.ones((2, 3), int)), {"radius": 1}, errors.InputError, "int64"),
    "radius": (evaluate.max_sensitivity, (gradient, X), {"radius": 0.0}, errors.InputError, "radius=0.0"),
    "draws": (evaluate.max_sensitivity, (gradient, X), {"radius": 1, "samples": 0}, errors.InputError, "samples=0"),
    "maps": (evaluate.max_sensitivity, (jnp.sum, X), {"radius": 1}, errors.InputError, r"explain returned \[\(\)\]"),
    "vector": (evaluate.sparseness, (np.ones(4),), {}, errors.InputError, r"relevance of shape \(4,\)"),
    "axis": (evaluate.complexity, (R,), {"channels": 0}, errors.InputError, "channels=0: relevance of"),
    "nan": (evaluate.complexity, (R * np.nan,), {}, errors.InputError, "NaN or infinity, first in example 0"),
    "mask": (evaluate.pointing_game, (R, MASK[..., None]), {}, errors.InputError, r"mask of shape .* \(3, 5, 4\)$"),
    "empty": (evaluate.relevance_mass, (R, EMPTY), {}, errors.InputError, "mask of example 2 has no position"),
    "pattern": (
        evaluate.parameter_randomisation,
        (product, PARAMS, draw(0, 2, 6)),
        {"layers": ["out/*", "st*"]},
        errors.SelectorError,
        "'st.' matches no parameter; they are: in/b, in/w, out/w$",
    ),
    "patterns": (evaluate.parameter_randomisation, (product, {}, X), {"layers": []}, errors.SelectorError, "layers="),
    "map": (evaluate.parameter_randomisation, (lambda p, x: x[:, 0], PARAMS, X), {}, errors.InputError, "of shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    measure, args, options, error, words = BAD[case]
    with pytest.raises(error, match=words):
        measure(*args, **options)
