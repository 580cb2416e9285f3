"""Pixel flipping against a plain NumPy loop, and what is known about its curves on a linear model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlrp import errors, evaluate
from jaxlrp.evaluate import fills

RNG = np.random.default_rng(0)


def network(shape, classes=3, seed=0):
    """A small non-linear function of images, of any shape."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    first, last = (jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), jnp.float32) for s in ((size, 16), (16, classes)))
    return lambda x: jax.nn.softmax(jnp.tanh(x.reshape(len(x), -1).astype(jnp.float32) @ first) @ last)


def flipped_by_a_loop(predict, x, relevance, targets, order, region, counts, filled):
    """The scores, image by image and tile by tile. Channels last; relevance at the positions."""
    n, h, w, _ = x.shape
    scores = np.zeros((n, len(counts)))
    for i in range(n):
        tiles = {}
        for a in range(0, h, region[0]):
            for b in range(0, w, region[1]):
                tiles[a, b] = relevance[i, a : a + region[0], b : b + region[1]].sum()
        ordered = sorted(tiles, key=lambda t: -tiles[t] if order == "morf" else tiles[t])
        for k, count in enumerate(counts):
            y = x[i].copy()
            for a, b in ordered[:count]:
                y[a : a + region[0], b : b + region[1]] = filled[i, a : a + region[0], b : b + region[1]]
            scores[i, k] = np.asarray(predict(y[None]))[0, targets[i]]
    return scores


@pytest.mark.smoke
@pytest.mark.parametrize("order", ["morf", "lerf"])
@pytest.mark.parametrize("region, steps", [(1, None), (3, None), ((2, 5), 4), (2, [0.1, 0.5, 1.0])])
def test_the_scores_are_those_of_a_loop(order, region, steps):
    x = RNG.normal(size=(4, 7, 8, 2)).astype(np.float32)
    relevance, targets = RNG.normal(size=x.shape).astype(np.float32), np.array([0, 2, 1, 1])
    predict = network(x.shape[1:])
    size = (region, region) if isinstance(region, int) else region
    tiles = -(-7 // size[0]) * -(-8 // size[1])
    counts = {
        type(None): range(tiles + 1),
        int: np.round(np.arange(5) * tiles / 4),
        list: [0, *np.round(np.array(steps or 0) * tiles).ravel()],
    }[type(steps)]
    counts = [int(c) for c in counts]
    curves = evaluate.pixel_flipping(predict, x, relevance, targets, order=order, region=region, steps=steps, fill=0.5)
    wanted = flipped_by_a_loop(predict, x, relevance.sum(-1), targets, order, size, counts, np.full_like(x, 0.5))
    np.testing.assert_allclose(curves.scores, wanted, atol=1e-5)
    np.testing.assert_allclose(curves.fractions, np.array(counts) / tiles, rtol=1e-6)
    np.testing.assert_allclose(curves.scores[:, 0], np.asarray(predict(x))[np.arange(4), targets], rtol=1e-6)
    steps_of = np.diff(np.array(counts) / tiles)
    areas = ((wanted[:, 1:] + wanted[:, :-1]) / 2 * steps_of).sum(1)
    np.testing.assert_allclose(curves.auc(), areas, rtol=1e-4)
    np.testing.assert_allclose(curves.aopc(), (wanted[:, :1] - wanted).mean(1), atol=1e-5)


def test_a_linear_model_loses_what_its_relevance_says():
    """f = w.x with fill 0: after k flips f has lost the k largest contributions, exactly."""
    x, w = RNG.normal(size=(5, 6)), RNG.normal(size=(6, 2))
    with jax.enable_x64(True):
        relevance = x * w[:, 1]
        curves = evaluate.pixel_flipping(lambda v: v @ w, x, relevance, 1, fill=0.0)
        shown = evaluate.insertion(lambda v: v @ w, x, relevance, 1, fill=0.0)
    lost = np.cumsum(-np.sort(-relevance, axis=1), axis=1)
    total = relevance.sum(1, keepdims=True)
    np.testing.assert_allclose(curves.scores, np.hstack([total, total - lost]), atol=1e-12)
    np.testing.assert_allclose(shown.scores, np.hstack([0 * total, lost]), atol=1e-12)


def test_the_true_order_falls_fastest_and_a_random_one_has_no_gain():
    x, w = RNG.normal(size=(400, 6, 6, 1)).astype(np.float32), RNG.normal(size=(36, 2)).astype(np.float32)
    predict = lambda v: v.reshape(len(v), -1) @ w
    relevance = x * w[:, 0].reshape(6, 6, 1)
    areas = {}
    for name, r in {"true": relevance, "noise": RNG.normal(size=x.shape)}.items():
        lerf, morf = (evaluate.pixel_flipping(predict, x, r, 0, order=o, fill=0.0) for o in ("lerf", "morf"))
        areas[name] = np.asarray(evaluate.srg(lerf, morf))
    assert (areas["true"] > 0).all()
    error = areas["noise"].std() / np.sqrt(len(x))
    assert abs(areas["noise"].mean()) < 4 * error
    drawn = [
        evaluate.pixel_flipping(predict, x, relevance, 0, order="random", fill=0.0, key=jax.random.key(i)).auc()
        for i in (1, 2)
    ]
    difference = np.asarray(drawn[0] - drawn[1])
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(len(x)) and difference.std() > 0


def test_ties_are_broken_at_random():
    x = np.ones((200, 4), np.float32)
    curves = evaluate.pixel_flipping(lambda v: v[:, 0], x, np.zeros_like(x), None, fill=0.0, steps=4)
    first_flip = np.asarray(curves.scores[:, 1])
    assert 25 < (first_flip == 0).sum() < 80  # the first position is the first of four in about 50 of 200


def test_channels_may_stand_first_or_be_absent():
    x, r = RNG.normal(size=(3, 2, 5, 4)).astype(np.float32), RNG.normal(size=(3, 2, 5, 4)).astype(np.float32)
    predict = network((2, 5, 4))
    first = evaluate.pixel_flipping(predict, x, r, 0, fill=0.0, channels=1)
    turned = lambda v: np.moveaxis(v, 1, -1)
    last = evaluate.pixel_flipping(lambda v: predict(jnp.moveaxis(v, -1, 1)), turned(x), turned(r), 0, fill=0.0)
    np.testing.assert_array_equal(first.scores, last.scores)
    assert evaluate.pixel_flipping(predict, x, r, 0, channels=None, steps=2).scores.shape == (3, 3)
    assert evaluate.pixel_flipping(predict, x, r.sum(1), 0, channels=1).scores.shape == (3, 21)


def test_tokens_and_time_series():
    ids = RNG.integers(1, 9, (4, 6))
    predict = lambda v: jnp.stack([(v == 0).sum(-1), (v > 4).sum(-1)], -1).astype(jnp.float32)
    curves = evaluate.pixel_flipping(predict, ids, RNG.normal(size=(4, 6)), 0, fill=0)
    np.testing.assert_array_equal(curves.scores, np.tile(np.arange(7.0), (4, 1)))
    series = RNG.normal(size=(2, 30, 3)).astype(np.float32)
    curves = evaluate.pixel_flipping(network((30, 3)), series, series, 0, region=7)
    assert curves.scores.shape == (2, 6)  # tiles of 7, 7, 7, 7, 2 time steps
    with pytest.raises(errors.InputError, match="for inputs of int"):
        evaluate.pixel_flipping(predict, ids, ids.astype(float), 0, fill="blur")


def test_one_compilation_serves_other_parameters():
    traces = []

    def predict(w, x):
        traces.append(1)
        return x @ w

    x, r = RNG.normal(size=(3, 4)).astype(np.float32), RNG.normal(size=(3, 4)).astype(np.float32)
    for seed in range(3):
        w = np.random.default_rng(seed).normal(size=(4, 2)).astype(np.float32)
        curves = evaluate.pixel_flipping(jax.tree_util.Partial(predict, w), x, r, 0, fill=0.0)
        np.testing.assert_allclose(curves.scores[:, 0], (x @ w)[:, 0], rtol=1e-5)
    seen = len(traces)
    evaluate.pixel_flipping(jax.tree_util.Partial(predict, w), x, -r, 1, fill=0.5)
    assert len(traces) == seen


def test_targets_may_be_a_list():
    x, predict = RNG.normal(size=(3, 4)).astype(np.float32), network((4,))
    scores = [evaluate.pixel_flipping(predict, x, x, t, fill=0.0).scores for t in ([0, 2, 1], np.array([0, 2, 1]))]
    np.testing.assert_array_equal(*scores)


def test_it_runs_inside_jit():
    x, r = RNG.normal(size=(3, 4)).astype(np.float32), RNG.normal(size=(3, 4)).astype(np.float32)
    predict = network((4,))
    area = lambda r: evaluate.pixel_flipping(predict, x, r, 0, fill=0.0).auc()
    np.testing.assert_allclose(jax.jit(area)(r), area(r), rtol=1e-6)


@pytest.mark.parametrize("name", fills.NAMES)
def test_every_fill_replaces_only_what_is_flipped(name):
    x = RNG.uniform(-1, 1, size=(2, 6, 5, 3)).astype(np.float32)
    seen = []

    def predict(v):
        jax.debug.callback(lambda v: seen.append(np.array(v)), v, ordered=True)
        return v[:, 0, 0, :2]

    evaluate.pixel_flipping(predict, x, RNG.normal(size=x.shape), 0, fill=name, steps=3).scores.block_until_ready()
    jax.effects_barrier()
    assert len(seen) == 4 and (seen[0] == x).all()
    earlier = np.zeros(x.shape, bool)
    for k in (1, 2, 3):
        changed = (seen[k] != x).any(-1)
        assert (changed.sum((1, 2)) <= 10 * k).all() and changed.sum() > 0.8 * 20 * k
        if name != "inpaint":  # what was flipped before keeps its value
            np.testing.assert_array_equal(seen[k][earlier], seen[k - 1][earlier])
        earlier = np.broadcast_to(changed[..., None], x.shape)
        assert np.isfinite(seen[k]).all()


def test_fills_by_hand():
    x = jnp.asarray(RNG.uniform(-1, 1, size=(5, 4, 2)), jnp.float32)
    key = jax.random.key(3)
    np.testing.assert_allclose(fills.Mean().replacement(key, x)[2, 3], x.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(fills.Invert(0.0, 1.0).replacement(key, x), 1 - x, rtol=1e-6)
    np.testing.assert_array_equal(fills.Constant([1, 2]).replacement(key, x)[0, 0], [1, 2])
    drawn = fills.Uniform(jnp.array([0.0, 5.0]), jnp.array([1.0, 6.0])).replacement(key, jnp.zeros((50, 50, 2)))
    assert drawn[..., 0].min() >= 0 and drawn[..., 0].max() < 1 and drawn[..., 1].min() >= 5
    assert abs(float(drawn[..., 1].mean()) - 5.5) < 0.03
    normal = fills.Gaussian(2.0, 0.5).replacement(key, jnp.zeros((50, 50, 2)))
    assert abs(float(normal.mean()) - 2) < 0.03 and abs(float(normal.std()) - 0.5) < 0.03
    constant = jnp.full((9, 7, 1), 0.3)
    np.testing.assert_allclose(fills.Blur(2.0).replacement(key, constant), constant, rtol=1e-5)
    with pytest.raises(errors.InputError, match="made shape"):
        evaluate.pixel_flipping(
            network((4,)), np.zeros((2, 4), np.float32), np.zeros((2, 4)), 0, fill=lambda k, v: v[:1]
        )


def test_inpainting_takes_the_mean_of_known_neighbours():
    x = jnp.arange(25.0).reshape(5, 5, 1)
    one = jnp.zeros((5, 5, 1), bool).at[2, 2].set(True)
    assert float(fills.Inpaint().inpainted(x, one)[2, 2, 0]) == pytest.approx(12)
    corner = jnp.zeros((5, 5, 1), bool).at[0, 0].set(True)  # neighbours 1 and 5 twice, 6 once
    assert float(fills.Inpaint().inpainted(x, corner)[0, 0, 0]) == pytest.approx((2 * 1 + 2 * 5 + 6) / 5)
    most = jnp.ones((5, 5, 1), bool).at[4, 4].set(False)
    np.testing.assert_allclose(fills.Inpaint().inpainted(x, most), 24.0, rtol=1e-6)
    np.testing.assert_allclose(fills.Inpaint().inpainted(x, jnp.ones((5, 5, 1), bool)), 12.0, rtol=1e-6)


def test_predict_must_return_one_row_for_each_example():
    x, r = np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32)
    for predict, target in ((lambda v: v[:, 0], 2), (lambda v: v[:2], 0), (lambda v: v[:2, 0], None)):
        with pytest.raises(errors.TargetError, match="must return"):
            evaluate.pixel_flipping(predict, x, r, target)


@pytest.mark.parametrize("dtype", [np.int32, bool, jnp.bfloat16])
def test_scores_of_any_dtype_are_measured_in_float32(dtype):
    x, r = RNG.integers(0, 2, (3, 300)).astype(np.float32), RNG.normal(size=(3, 300))
    exact = evaluate.pixel_flipping(lambda v: (v.sum(1) > 100).astype(jnp.float32), x, r, None, fill=0.0)
    rounded = evaluate.pixel_flipping(lambda v: (v.sum(1) > 100).astype(dtype), x, r, None, fill=0.0)
    np.testing.assert_array_equal(exact.fractions, rounded.fractions)
    np.testing.assert_array_equal(exact.auc(), rounded.auc())
    np.testing.assert_array_equal(exact.aopc(), rounded.aopc())


def test_orders_break_ties_differently():
    x = RNG.normal(size=(8, 12)).astype(np.float32)
    curves = {
        o: evaluate.pixel_flipping(lambda v: v @ x[0], x, 0 * x, None, order=o, fill=0.0)
        for o in ("morf", "lerf", "random")
    }
    for one, other in (("morf", "lerf"), ("morf", "random"), ("lerf", "random")):
        assert np.abs(curves[one].scores - curves[other].scores).max() > 0.1


def test_integers_take_only_what_they_can_hold():
    x, r = RNG.integers(0, 255, (2, 5), np.uint8), RNG.normal(size=(2, 5))
    predict = lambda v: v.astype(jnp.float32).sum(1)
    assert evaluate.pixel_flipping(predict, x, r, None, fill=7).scores[0, -1] == 35
    for fill in (0.5, -1, 300, "mean"):
        with pytest.raises(errors.InputError, match="for inputs of uint8"):
            evaluate.pixel_flipping(predict, x, r, None, fill=fill)
    with pytest.raises(errors.InputError, match="for inputs of bool"):
        evaluate.pixel_flipping(predict, x > 9, r, None)


def test_blur_counts_beyond_256_in_half_precision():
    x = jnp.asarray(RNG.normal(size=(400, 1)), jnp.float32)
    exact, half = (fills.Blur(1.0).replacement(None, v).astype(jnp.float32) for v in (x, x.astype(jnp.bfloat16)))
    np.testing.assert_allclose(half, exact, atol=0.03)


def test_what_a_compiled_function_closes_over_is_checked():
    x, r = RNG.normal(size=(3, 4)).astype(np.float32), jnp.asarray(RNG.normal(size=(3, 4)))
    predict = network((4,))
    scores = jax.jit(lambda x: evaluate.pixel_flipping(predict, x, r, 0, fill=0.0).scores)(x)
    np.testing.assert_allclose(scores, evaluate.pixel_flipping(predict, x, r, 0, fill=0.0).scores, rtol=1e-6)


def test_python_keywords_stay_python_values():
    def apply(w, x, train, name=None):
        return x @ w * (2.0 if train else 1.0)

    x, w = RNG.normal(size=(3, 4)).astype(np.float32), RNG.normal(size=(4, 2)).astype(np.float32)
    for train in (False, True):
        predict = jax.tree_util.Partial(apply, w, train=train, name="logits")
        curves = evaluate.pixel_flipping(predict, x, x, 0, fill=0.0)
        np.testing.assert_allclose(curves.scores[:, 0], apply(w, x, train)[:, 0], rtol=1e-5)


def test_a_model_is_measured_as_it_is_now():
    x = RNG.normal(size=(3, 4)).astype(np.float32)
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    for kernel in (model.kernel[...], jnp.ones((4, 2))):
        model.kernel[...] = kernel
        curves = evaluate.pixel_flipping(model, x, x, 0, fill=0.0, region=np.int64(2))
        np.testing.assert_allclose(curves.scores[:, 0], (x @ kernel)[:, 0], rtol=1e-5)


X, R = np.zeros((2, 4, 4, 1), np.float32), np.zeros((2, 4, 4, 1), np.float32)
BAD = {
    "order": ({"order": "best"}, errors.InputError, "order='best'"),
    "region": ({"region": 0}, errors.InputError, "region=0"),
    "regions": ({"region": (2, 2, 2)}, errors.InputError, "region="),
    "steps": ({"steps": 17}, errors.InputError, "there are 16 tiles"),
    "fractions": ({"steps": [0.5, 0.2]}, errors.InputError, "increasing fractions"),
    "fill": ({"fill": "black"}, errors.InputError, "fill='black'"),
    "object": ({"fill": object()}, errors.InputError, "fill=<object"),
    "channels": ({"channels": 0}, errors.InputError, "channels=0"),
    "target": ({"targets": 3}, errors.TargetError, "out of range"),
    "no target": ({"targets": None}, errors.TargetError, "must return"),
    "shape": ({"relevance": np.zeros((2, 4, 5))}, errors.InputError, "relevance of shape"),
    "nan": ({"relevance": np.full((2, 4, 4), np.nan)}, errors.InputError, "NaN or infinity, first in example 0"),
    "infinity": ({"relevance": np.full((2, 4, 4), np.inf)}, errors.InputError, "infinity, first in example 0"),
    "nothing flipped": ({"steps": [0.001]}, errors.InputError, "not one of 16 tiles"),
    "no fill": ({"fill": None}, errors.InputError, "fill=None"),
    "a class": ({"fill": fills.Mean}, errors.InputError, "fill=<class"),
    "no examples": (
        {"inputs": np.zeros((0, 4, 4, 1)), "relevance": np.zeros((0, 4, 4))},
        errors.InputError,
        "inputs of",
    ),
    "no positions": ({"inputs": np.zeros(4)}, errors.InputError, "inputs of shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    options, error, words = BAD[case]
    given = {"inputs": X, "relevance": R, "targets": 0} | options
    with pytest.raises(error, match=words):
        evaluate.pixel_flipping(network((4, 4, 1)), **given)
