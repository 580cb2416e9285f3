"""Passes written anew are the same passes: convolutions by taps, where those are faster, and maxima by slices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from convolved import CASES, IMAGES, convolution, convolutions, draw
from jaxlrp import Composite, composites, lrp, rewrite, rules, select
from jaxlrp.analysis import analyse
from jaxlrp.rules import passes


@pytest.mark.parametrize("conv, image, window", CASES.values(), ids=CASES)
def test_channels_last_are_the_convolution_and_its_transpose(conv, image, window):
    x, w = draw(1, *image), draw(2, *window)
    (op,) = analyse(conv, (x, w), {}, 0)[1].ops()
    right, pull = jax.vjp(lambda x: conv(x, w), x)
    np.testing.assert_allclose(passes.convolved(op.linear.core, x, w), right, rtol=0, atol=1e-12)
    r = draw(3, *right.shape)
    np.testing.assert_allclose(passes.back_convolved(op.linear.core, r, w), pull(r)[0], rtol=0, atol=1e-12)


@pytest.mark.smoke
@pytest.mark.parametrize("case", ["plain", "strides and edges", "dilated"])
def test_convolutions_in_a_loop_are_those_that_xla_has_fast(case):
    """Of what is in a loop XLA turns none into its own normal form, and computes other forms number by number."""
    conv, image, window = CASES[case]
    x, w = jnp.float32(draw(1, 3, *image)), jnp.float32(draw(2, *window))
    explain = lrp(lambda x: conv(x, w), Composite([(select.everything(), rules.ZPlus())]))
    text = jax.jit(lambda x: lax.map(explain, x)).lower(x).compile().as_text()
    found = set(re.findall(r"dim_labels=(\w+->\w+)", text))
    assert found == {"b01f_01io->b01f"}, found


@pytest.mark.parametrize("conv, image, window", [c for name, c in CASES.items() if name != "groups"])
def test_taps_are_the_convolution_and_its_transpose(conv, image, window):
    x, w = draw(1, *image), draw(2, *window)
    (op,) = analyse(conv, (x, w), {}, 0)[1].ops()
    taps = lambda x: passes.by_taps(op.linear.core, x, w)
    (value, pull), (right, right_pull) = jax.vjp(taps, x), jax.vjp(lambda x: conv(x, w), x)
    np.testing.assert_allclose(value, right, rtol=0, atol=1e-12)
    r = draw(3, *value.shape)
    np.testing.assert_allclose(pull(r)[0], right_pull(r)[0], rtol=0, atol=1e-12)
    if passes.own_windows(op.linear.core):
        np.testing.assert_allclose(passes.back_by_taps(op.linear.core, r, w), pull(r)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("depthwise")])
def test_taps_of_one_example_after_another(case):
    conv, image, window = CASES[case]
    x, w = draw(1, *image), draw(2, *window)
    (op,) = analyse(conv, (x, w), {}, 0)[1].ops()
    one_by_one = jax.jit(lambda x: passes.one_by_one(op.linear.core, x, w))
    np.testing.assert_allclose(one_by_one(x), conv(x, w), rtol=0, atol=1e-12)
    assert "while" in one_by_one.lower(x).as_text()
    (op,) = analyse(conv, (x[:1], w), {}, 0)[1].ops()
    assert "while" not in jax.jit(lambda x: passes.one_by_one(op.linear.core, x, w)).lower(x[:1]).as_text()


@pytest.mark.parametrize("case", CASES)
def test_rules_do_not_depend_on_the_form(case, monkeypatch):
    conv, image, window = CASES[case]
    x, w = draw(4, *image), draw(5, *window)
    composite = Composite([(select.kind("conv"), rules.AlphaBeta()), (select.everything(), rules.Epsilon())])
    found = []
    for written, by_taps in ((True, case != "groups"), (True, False), (False, False)):
        monkeypatch.setattr("jaxlrp.rules.passes.channels_last", lambda core, written=written: written)
        monkeypatch.setattr("jaxlrp.rules.passes.faster", lambda core, transposed, by_taps=by_taps: by_taps)
        found.append([jax.jit(lrp(lambda x: conv(x, w), c))(x) for c in (composite, Composite(composite.rows[1:]))])
    for taps, last, own in zip(*found, strict=True):
        np.testing.assert_allclose(taps, own, rtol=0, atol=1e-10 * np.abs(own).max())
        np.testing.assert_allclose(last, own, rtol=0, atol=1e-10 * np.abs(own).max())


@pytest.mark.parametrize(
    "image, window, stride, groups, forward, transposed",
    [
        ((1, 28, 28, 64), (1, 1, 64, 8), 1, 1, True, True),  # one wide
        ((1, 28, 28, 64), (3, 3, 1, 64), 1, 64, True, True),  # depthwise
        ((1, 28, 28, 64), (3, 3, 2, 64), 1, 32, False, False),  # other groups
        ((1, 28, 28, 64), (3, 3, 64, 64), 1, 1, False, False),
        ((1, 28, 28, 256), (3, 3, 256, 256), 1, 1, False, True),  # the kernel costs time to turn
        ((1, 14, 14, 256), (3, 3, 256, 256), 1, 1, False, True),
        ((1, 7, 7, 256), (3, 3, 256, 256), 1, 1, True, True),
        ((16, 28, 28, 256), (3, 3, 256, 256), 1, 1, False, False),
        ((16, 2, 2, 8), (3, 3, 8, 8), 1, 1, True, True),  # smaller than its window
        ((1, 28, 28, 3), (9, 9, 3, 3), 1, 1, False, False),
        ((1, 28, 28, 3), (4, 4, 3, 8), 4, 1, True, True),  # side by side
        ((1, 27, 27, 3), (4, 4, 3, 8), 4, 1, False, False),
    ],
)
def test_where_taps_are_faster(image, window, stride, groups, forward, transposed):
    conv = convolution(IMAGES, (stride, stride), "SAME", None, groups)
    shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (image, window))
    core = jax.make_jaxpr(conv)(*shapes).eqns[0]

    class Core:  # an equation whose atoms are JAX's own
        primitive, params, inputs, outputs = core.primitive, core.params, core.invars, core.outvars

    assert (passes.faster(Core, False), passes.faster(Core, True)) == (forward, transposed)


def test_a_compiled_value_takes_the_faster_form_and_an_eager_one_that_of_the_model():
    """A depthwise convolution takes XLA ten times as long as its taps; in half precision taps would round each sum."""
    conv, image, window = CASES["depthwise"]
    x, w = jnp.float32(draw(1, *image)), jnp.float32(draw(2, *window))
    composite = Composite([(select.everything(), rules.Epsilon())])

    def count(f, *args):
        return len([*convolutions(jax.make_jaxpr(f)(*args))])

    for dtype, kept in ((jnp.float32, 0), (jnp.float64, 0), (jnp.bfloat16, 1), (jnp.float16, 1)):
        explained = rewrite(lambda x, w: jnp.tanh(conv(x, w)), composite)
        assert count(explained, x.astype(dtype), w.astype(dtype)) == kept, dtype
    explained = rewrite(lambda x, w: jnp.tanh(conv(x, w)), composite)
    np.testing.assert_array_equal(explained(x, w), jnp.tanh(conv(x, w)))
    np.testing.assert_allclose(jax.jit(explained)(x, w), jnp.tanh(conv(x, w)), rtol=0, atol=1e-6)
    assert "while" in jax.jit(explained).lower(x, w).as_text()  # one image after another
    spec = {"dimension_numbers": IMAGES, "feature_group_count": 3}
    wide = lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME", preferred_element_type=jnp.float64, **spec) + 1.0
    assert jax.jit(rewrite(wide, composite))(x, w).dtype == jnp.float64
    for case, kept in (("smaller than its window", 0), ("one wide", 1), ("plain", 1)):  # not where little is gained
        conv, image, window = CASES[case]
        explained = rewrite(lambda x, w, conv=conv: conv(x, w), composite)
        assert count(explained, jnp.float32(draw(1, *image)), jnp.float32(draw(2, *window))) == kept, case


@pytest.mark.parametrize("case", ["plain", "one wide", "depthwise"])
def test_layers_under_the_gradient_give_their_parameters_none_whatever_their_form(case):
    conv, image, window = CASES[case]
    x, w = draw(1, *image), draw(2, *window)
    explained = rewrite(lambda x, w: conv(x, w).sum(), Composite([(select.everything(), rules.Gradient())]))
    of_x, of_w = jax.grad(explained, (0, 1))(x, w)
    np.testing.assert_allclose(of_x, jax.grad(lambda x: conv(x, w).sum())(x), rtol=0, atol=1e-12)
    assert not np.any(of_w)


def pooling(better, start, size, strides, padding, spread=1, apart=1):
    def pool(x):
        ones = (1,) * (x.ndim - 1 - len(size))
        wide, steps = ((1, *n, *ones) for n in (size, strides))
        edges = padding if isinstance(padding, str) else ((0, 0), *padding, *((0, 0) for _ in ones))
        spreads = {
            "base_dilation": (1, *(spread for _ in size), *ones),
            "window_dilation": (1, *(apart for _ in size), *ones),
        }
        return lax.reduce_window(x, start, better, wide, steps, edges, **spreads)

    return pool


POOLS = {
    "halves": (pooling(lax.max, -np.inf, (2, 2), (2, 2), "VALID"), (2, 8, 6, 3)),
    "overlapping": (pooling(lax.max, -np.inf, (3, 3), (2, 2), ((1, 1), (1, 1))), (2, 8, 7, 3)),
    "in place": (pooling(lax.max, -np.inf, (3, 3), (1, 1), "SAME"), (2, 5, 6, 3)),
    "gaps between windows": (pooling(lax.max, -np.inf, (2, 1), (3, 2), ((0, 2), (1, 0))), (2, 8, 7, 3)),
    "zeros between": (pooling(lax.max, -np.inf, (2, 3), (1, 2), ((1, 1), (0, 2)), spread=2), (2, 5, 6, 3)),
    "minima": (pooling(lax.min, np.inf, (3, 2), (2, 2), "SAME"), (2, 8, 7, 3)),
    "a line": (pooling(lax.max, -np.inf, (4,), (2,), "SAME"), (2, 9, 3)),
    "a volume": (pooling(lax.max, -np.inf, (2, 2, 1), (2, 1, 1), "SAME"), (2, 4, 5, 3, 2)),
}


@pytest.mark.parametrize("steps", [1, 1000], ids=["ties", "no ties"])
@pytest.mark.parametrize("pool, image", POOLS.values(), ids=POOLS)
def test_slices_are_the_maxima_and_their_derivative(pool, image, steps):
    """Of several elements that are the largest the first one, in the order of the window, as JAX has it."""
    x = jnp.round(steps * draw(1, *image))
    (op,) = analyse(pool, (x,), {}, 0)[1].ops()
    (e,) = op.steps
    assert passes.windowed(e)
    value, pull = jax.vjp(pool, x)
    np.testing.assert_array_equal(passes.extremes(e, x), value)
    r = draw(2, *value.shape)
    np.testing.assert_allclose(passes.back_extremes(e, x, r), pull(r)[0], rtol=0, atol=1e-12)


def test_the_derivative_of_relevance_at_ties_is_the_same_compiled_and_not():
    pool, _ = POOLS["halves"]
    size = lambda x: lrp(lambda x: pool(x) ** 2, composites.epsilon())(x).sum()
    np.testing.assert_array_equal(jax.jit(jax.grad(size))(jnp.ones((1, 2, 2, 1))), [[[[2], [0]], [[0], [0]]]])


@pytest.mark.parametrize("image", [(0, 4, 4, 1), (1, 1, 1, 2)], ids=["no image", "no window"])
def test_maxima_of_nothing(image):
    pool, _ = POOLS["halves"]
    explain = lrp(pool, Composite([(select.everything(), rules.Winner())]))
    for f in (explain, jax.jit(explain)):
        np.testing.assert_array_equal(f(jnp.ones(image)), jnp.zeros(image))


@pytest.mark.smoke
@pytest.mark.parametrize("rule", [rules.Winner(), rules.Gradient()], ids=["Winner", "Gradient"])
def test_maxima_are_explained_without_the_derivative_that_xla_has(rule, monkeypatch):
    pool, image = POOLS["overlapping"]
    x, composite = draw(1, *image), Composite([(select.everything(), rule)])
    explain = lrp(pool, composite)
    assert "select_and" not in str(jax.make_jaxpr(explain)(x))
    found = jax.jit(explain)(x), jax.jit(jax.vmap(explain))(x[:, None])[:, 0], explain(x)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    explain = lrp(lambda x: pool(x), composite)  # a new function, for the program of the old one is known
    assert "select_and" in str(jax.make_jaxpr(explain)(x))
    for relevance in found:
        np.testing.assert_allclose(relevance, explain(x), rtol=0, atol=1e-12)


def test_windows_of_many_places_stay_as_they_are():
    for places, written in ((128, True), (129, False)):
        pool = pooling(lax.max, -np.inf, (places,), (1,), "SAME")
        (op,) = analyse(pool, (draw(1, 2, 200, 1),), {}, 0)[1].ops()
        assert passes.windowed(op.steps[0]) == written
        relevance = jax.jit(lrp(pool, Composite([(select.everything(), rules.Winner())])))(draw(1, 2, 200, 1))
        np.testing.assert_allclose(relevance.sum(), pool(draw(1, 2, 200, 1)).sum(), rtol=1e-12)


def test_an_image_without_a_whole_window():
    x, w = draw(1, 2, 2, 2, 3), draw(2, 5, 5, 3, 4)
    f = lambda x: convolution(IMAGES, (1, 1), "VALID")(x, w).sum((1, 2))
    assert not np.any(lrp(f, Composite([(select.everything(), rules.Epsilon())]))(x))


def test_other_platforms_keep_their_convolutions(monkeypatch):
    conv, image, window = CASES["one wide"]
    (op,) = analyse(conv, (draw(1, *image), draw(2, *window)), {}, 0)[1].ops()
    assert passes.rewritten(op.linear.core) and passes.faster(op.linear.core, False)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert not passes.rewritten(op.linear.core) and not passes.faster(op.linear.core, False)


DENSE = {
    "a matrix": (lambda x, w: x @ w, (2, 20), (20, 6)),
    "tokens": (lambda x, w: x @ w, (2, 3, 20), (20, 6)),
    "heads": (lambda x, w: jnp.einsum("nsd,dhk->nshk", x, w), (2, 3, 20), (20, 2, 3)),
    "a vector": (lambda x, w: x @ w, (20,), (20, 6)),
    "nothing left over": (lambda x, w: x @ w, (2, 18), (18, 6)),
    "one block": (lambda x, w: x @ w, (2, 6), (6, 6)),
    "scaled": (lambda x, w: x @ w * jnp.arange(1.0, 7), (2, 20), (20, 6)),
}
RULES = (
    rules.ZPlus(),
    rules.AlphaBeta(),
    rules.GeneralizedGamma(),
    rules.Gamma(),
    rules.WSquare(),
    rules.FourQuadrant(),
)


@pytest.fixture
def small(monkeypatch):
    """What is large from 36 elements on, by six rows of six columns."""

    def switch():
        jax.clear_caches()
        monkeypatch.setattr(passes, "LARGE", 36)
        monkeypatch.setattr(passes, "BLOCK", 36)

    return switch


@pytest.mark.parametrize("case", DENSE)
def test_rules_do_not_depend_on_rows(case, small):
    dense, data, kernel = DENSE[case]
    x, w = draw(6, *data), draw(7, *kernel)
    explain = [
        jax.jit(lrp(lambda x, w=w, f=f: dense(f(x), w), Composite([(select.kind("dense"), rule)])))
        for rule in (RULES if case == "a matrix" else RULES[:1])
        for f in (jnp.sin, jax.nn.relu)  # of either sign, and not
    ]
    whole = [f(x) for f in explain]
    mapped = [jax.vmap(f)(jnp.stack([x, -x])) for f in explain]
    small()
    for f, right, rights in zip(explain, whole, mapped, strict=True):
        np.testing.assert_allclose(f(x), right, rtol=0, atol=1e-12 * max(np.abs(right).max(), 1))
        np.testing.assert_allclose(jax.vmap(f)(jnp.stack([x, -x])), rights, rtol=0, atol=1e-12 * np.abs(rights).max())
        assert "while" in f.lower(x).as_text()


def test_numbers_and_kernels_by_rows(small):
    """Swept, differentiated, and of a model in half precision."""
    x, w = draw(8, 2, 20), draw(9, 3, 20, 6)

    def explain(gamma, w, x=x):
        composite = Composite([(select.kind("dense"), rules.Gamma(gamma))])
        return lrp(lambda x: jax.nn.relu(x) @ w, composite)(x)

    functions = {
        "swept": lambda: jax.jit(jax.vmap(explain, (0, None)))(jnp.array([0.1, 0.5]), w[0]),
        "kernels": lambda: jax.jit(jax.vmap(explain, (None, 0)))(0.5, w),
        "differentiated": lambda: jax.jit(jax.grad(lambda g: (explain(g, w[0]) ** 2).sum()))(0.5),
    }
    half = lambda: jax.jit(explain)(0.5, w[0].astype(jnp.bfloat16), x.astype(jnp.bfloat16))
    right, right_half = {name: f() for name, f in functions.items()}, half()
    small()
    for name, f in functions.items():
        np.testing.assert_allclose(f(), right[name], rtol=0, atol=1e-11 * np.abs(right[name]).max(), err_msg=name)
    np.testing.assert_allclose(np.float32(half()), np.float32(right_half), rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("dtype, share", [(jnp.float32, 1 / 4), (jnp.bfloat16, 1 / 2)])
def test_a_large_kernel_is_not_made_whole(dtype, share):
    kernel = jax.ShapeDtypeStruct((4096, 2048), dtype)
    explain = lrp(lambda x, w: jax.nn.relu(x) @ w, Composite([(select.kind("dense"), rules.ZPlus())]))
    compiled = jax.jit(explain).lower(jax.ShapeDtypeStruct((1, 4096), dtype), kernel).compile()
    own = jax.jit(lambda x, w: jax.nn.relu(x) @ w).lower(jax.ShapeDtypeStruct((1, 4096), dtype), kernel).compile()
    extra = compiled.memory_analysis().temp_size_in_bytes - own.memory_analysis().temp_size_in_bytes
    assert extra < share * kernel.size * kernel.dtype.itemsize


@pytest.mark.smoke
def test_groups_of_channels_keep_their_form():
    conv, image, window = CASES["groups"]
    (op,) = analyse(conv, (draw(1, *image), draw(2, *window)), {}, 0)[1].ops()
    (plain,) = analyse(CASES["plain"][0], (draw(1, 2, 7, 6, 3), draw(2, 3, 3, 3, 4)), {}, 0)[1].ops()
    found = []
    jax.make_jaxpr(lambda: found.append([passes.channels_last(o.linear.core) for o in (op, plain)]))()
    assert found == [[False, True]] and not passes.channels_last(plain.linear.core)


def test_eager_calls_do_not_compile_a_loop_each_time(small, monkeypatch):
    small()
    explain = lrp(lambda x: jax.nn.relu(x) @ draw(2, 20, 6), Composite([(select.kind("dense"), rules.ZPlus())]))
    for name in ("by_rows", "back_by_rows", "convolved", "back_convolved"):
        monkeypatch.setattr(passes, name, None)
    x = draw(1, 2, 20)
    right = explain(x)
    np.testing.assert_allclose(jax.vmap(lambda x: explain(x[None])[0])(x), right, rtol=0, atol=1e-12)
    with pytest.raises(TypeError, match="not callable"):
        jax.jit(explain)(x)


def test_only_a_product_whose_result_stays_in_the_cache_is_taken_by_rows(small):
    small()
    explain = jax.jit(
        lrp(lambda x: jax.nn.relu(x) @ draw(2, 20, 6), Composite([(select.kind("dense"), rules.ZPlus())]))
    )
    assert ["while" in explain.lower(draw(1, n, 20)).as_text() for n in (6, 7)] == [True, False]


def test_a_function_that_is_not_element_by_element_is_no_kernel():
    """By rows it would be another function, and say nothing."""

    @rules.rule
    class Centred(rules.Rule):
        def propagate(self, layer, relevance):
            return (layer.backward(relevance, lambda w: w - w.mean(0)),)

    with pytest.raises(TypeError):
        lrp(lambda x: x @ draw(2, 20, 6), Composite([(select.kind("dense"), Centred())]))(draw(1, 2, 20))
