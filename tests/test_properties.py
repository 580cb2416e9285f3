"""Laws that hold whatever the network: hypothesis draws it, or the numbers of a layer.

The draws are the same in every run. Where a law does not hold for a rule (Epsilon under scaling, w^2 at zero inputs)
that is asserted too: a law that cannot fail shows nothing.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax import lax

import nets
from jaxlrp import Composite, gradients, lrp, rewrite, rules, select, value_and_lrp
from nets import LOCAL, close, draw, linear, quick_compilation  # noqa: F401

bounded = partial(settings, deadline=None, derandomize=True, database=None)
# a program takes a second to compile, which is too long for hundreds of smaller ones that fail as well
compiling = partial(bounded, phases=[Phase.generate], report_multiple_bugs=False)
seeds = st.integers(0, 2**16)
ZERO = LOCAL["zero"] + Composite([(select.kind("add", "avg_pool"), rules.Zero())])


# ---------------------------------------------------------------------------------------------------- networks

ACTIVATIONS = {"relu": jax.nn.relu, "leaky": partial(jax.nn.leaky_relu, negative_slope=0.2), "abs": jnp.abs}
POOLS = {"max": (lax.max, -np.inf), "avg": (lax.add, 0.0)}


def plus(y, bias):
    return y if bias is None else y + bias


def network(steps, x, parameters):
    """(2, 4, 4, 2) -> (2, 3) through steps such as "conv relu", "residual leaky" and "max", then two dense layers."""
    *convolutions, (w1, b1), (w2, b2) = parameters
    remaining = iter(convolutions)
    for step in steps:
        if step in POOLS:
            x = nets.pool(x, *POOLS[step], size=min(2, x.shape[1]))
        else:
            layer, activation = step.split()
            kernel, bias = next(remaining)
            y = ACTIVATIONS[activation](plus(nets.conv(x, kernel), bias))
            x = x + y if layer == "residual" else y
    x = jax.nn.relu(plus(x.reshape(len(x), -1) @ w1, b1))
    return plus(x @ w2, b2)


@st.composite
def networks(draw, steps, bias):
    """(a function of x and parameters, x, its parameters)"""
    chosen = draw(st.lists(st.sampled_from(steps), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(seeds))
    shapes, size, width = [], 4, 2
    for step in chosen:
        if step in POOLS:
            size = max(1, size // 2)
        else:
            new = width if step.startswith("residual") else 3
            shapes.append((3, 3, width, new))
            width = new
    shapes += [(size * size * width, 5), (5, 3)]
    kernels = [rng.normal(size=s) / np.sqrt(np.prod(s[:-1])) for s in shapes]
    parameters = [(w, 0.2 * rng.normal(size=w.shape[-1]) if bias else None) for w in kernels]
    return partial(network, chosen), rng.normal(size=(2, 4, 4, 2)), parameters


def positive(y):
    """Relevance for positive logits only: z+ drops what starts where every contribution is negative."""
    return jnp.maximum(y, 0)


@compiling(max_examples=6)
@given(networks(["conv relu", "residual relu", "max", "avg"], bias=False))
def test_conservation(drawn):
    """What starts at the logits arrives at the input, where no bias absorbs any of it."""
    f, x, parameters = drawn
    names = ("zero", "zplus", "gamma")
    for dtype, tolerance in ((np.float64, 1e-8), (np.float32, 1e-4)):
        args = jax.tree.map(lambda v, dtype=dtype: v.astype(dtype), (x, parameters))
        results = jax.device_get(nets.explained(f, *args, rows=[LOCAL[name] for name in names], target=positive))
        assume(np.any(results[0][0] > 0))
        for name, (value, relevance) in zip(names, results, strict=True):
            lost = abs(np.maximum(value, 0).sum() - relevance.sum())
            assert lost <= tolerance * abs(relevance).sum(), (name, dtype)
            assert abs(relevance).sum() > 0, (name, dtype)


@compiling(max_examples=8)
@given(networks(["conv relu", "conv leaky", "conv abs", "residual relu", "max", "avg"], bias=True))
def test_zero_is_gradient_x_input(drawn):
    """On piecewise linear networks, with biases too."""
    f, x, parameters = drawn
    both = jax.jit(
        lambda x: (lrp(f, ZERO, target=1)(x, parameters), gradients.gradient_x_input(f, target=1)(x, parameters))
    )
    got, right = both(x)
    assume(np.any(right))
    close(got, right, 1e-9)


def test_bias_absorbs():
    """The share of the bias is what gradient x input lacks, too: with biases neither adds up."""
    value, relevance = nets.explained(nets.mlp, nets.mlp_parameters(4, 6, 3), draw(1, 3, 4), rows=[ZERO], argnums=1)[0]
    assert abs(relevance.sum() - value.sum()) > 0.1 * abs(relevance).sum()


@compiling(max_examples=3)
@given(networks(["conv relu", "residual leaky", "max", "avg"], bias=True), seeds)
def test_relevance_is_linear_and_examples_are_independent(drawn, seed):
    f, x, parameters = drawn
    one, two = np.random.default_rng(seed).normal(size=(2, 2, 3))
    rows = [*LOCAL.values(), linear(rules.ZBox(-4.0, 4.0))]

    @jax.jit
    def pulled(x):
        pulls = [jax.vjp(rewrite(lambda x, row=row: f(x, parameters), row), x)[1] for row in rows]
        return [jax.vmap(pull)(np.stack([one, two, 3 * one - two]))[0] for pull in pulls]

    results, others = pulled(x), pulled(np.stack([x[0], x[1] + 1]))
    for result, other in zip(results, others, strict=True):
        first, second, both = result
        close(both, 3 * first - second, 1e-9)
        close(other[:, 0], result[:, 0])


# ---------------------------------------------------------------------------------------------------- wrappers

PIECES = {
    "dense": lambda x, p: x @ p["w"],
    "weights left": lambda x, p: p["w"] @ x,
    "bias": lambda x, p: x + p["b"],
    "scale": lambda x, p: x * p["g"],
    "norm": lambda x, p: (x - p["b"]) * lax.rsqrt(p["g"] ** 2 + 0.1) * p["g"],
    "layer norm": lambda x, p: (x - x.mean(1, keepdims=True)) * lax.rsqrt(x.var(1, keepdims=True) + 0.1),
    "relu": lambda x, p: jax.nn.relu(x),
    "softplus": lambda x, p: jax.nn.softplus(x),
    "gelu": lambda x, p: jax.nn.gelu(x),
    "square": lambda x, p: x**2,
    "negative": lambda x, p: -x,
    "residual": lambda x, p: x + jnp.tanh(x @ p["w"]),
    "gate": lambda x, p: x * jax.nn.sigmoid(x @ p["w"]),
    "attention": lambda x, p: jax.nn.softmax(x @ x.T) @ x,
    "transpose": lambda x, p: x.T,
    "halves": lambda x, p: jnp.concatenate([x[:2] @ p["w"], x[2:]]),
    "sum": lambda x, p: x + x.sum(1, keepdims=True),
    "loop": lambda x, p: lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x @ p["w"] + p["b"]), x),
    "cond": lambda x, p: lax.cond(p["b"][0] > 0, lambda x: x @ p["w"], jnp.tanh, x),
}


def custom_vjp(f):
    """With a derivative that is wrong: relevance does not look at it."""
    wrapped = jax.custom_vjp(f)
    wrapped.defvjp(lambda *args: (f(*args), args), lambda args, g: jax.tree.map(jnp.zeros_like, args))
    return wrapped


WRAPPERS = {
    "none": lambda f: f,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "custom_vjp": custom_vjp,
    "jit remat": lambda f: jax.jit(jax.checkpoint(f)),
    "remat jit": lambda f: jax.checkpoint(jax.jit(f)),
    "jit with more results": lambda f: lambda *args: jax.jit(lambda *args: (args, f(*args), args[0] * 2))(*args)[1],
}

# (the pieces in a wrapper, the wrapper, whether the parameters are closed over)
segments = st.tuples(
    st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=2), st.sampled_from(sorted(WRAPPERS)), st.booleans()
)


@compiling(max_examples=20)
@given(st.lists(segments, min_size=1, max_size=3), st.sampled_from(sorted(WRAPPERS)), seeds)
def test_wrappers_change_nothing(chosen, outer, seed):
    rng = np.random.default_rng(seed)
    parameters = [
        [{"w": 0.6 * rng.normal(size=(4, 4)), "b": rng.normal(size=4), "g": rng.normal(size=4)} for _ in names]
        for names, _, _ in chosen
    ]

    def segment(names):
        def apply(x, ps):
            for name, p in zip(names, ps, strict=True):
                x = PIECES[name](x, p)
            return x

        return apply

    def plain(x):
        for (names, _, _), ps in zip(chosen, parameters, strict=True):
            x = segment(names)(x, ps)
        return x

    def inner(x):
        for (names, wrapper, closed), ps in zip(chosen, parameters, strict=True):
            f = segment(names)
            x = WRAPPERS[wrapper](partial(f, ps=ps))(x) if closed else WRAPPERS[wrapper](f)(x, ps)
        return x

    x, R = rng.normal(size=(2, 4, 4))
    row = LOCAL["alpha-beta"]
    both = jax.jit(lambda x: [value_and_lrp(f, row, target=lambda y: R)(x) for f in (plain, WRAPPERS[outer](inner))])
    (value, right), (wrapped, relevance) = both(x)
    assume(np.any(value) and 1e-6 < abs(right).max() < 1e6)
    close(wrapped, value)
    close(relevance, right, 1e-8)


# ---------------------------------------------------------------------------------------------------- one layer

# Eighths: sums of products are exact, so that zero is zero, however the sum is ordered or scaled.
eighths = partial(arrays, np.int64, elements=st.integers(-16, 16))


@st.composite
def layers(draw):
    """x (6,), w (6, 4), b (4,) and relevance (4,), zeros among them."""
    return tuple(draw(eighths(shape)) / 8 for shape in ((6,), (6, 4), (4,), (4,)))


def dense(x, w, b):
    return x @ w + b


@cache
def compiled(rule: type[rules.Rule]):
    """Relevance of one dense layer; the rule's numbers are arguments."""

    def explain(x, w, b, R, *numbers):
        return lrp(dense, linear(rule(*numbers)), target=lambda y: R)(x, w, b)

    return jax.jit(explain)


def explain(rule, x, w, b, R, *numbers):
    return np.asarray(compiled(rule)(x, w, b, R, *map(float, numbers)))


NUMBERS = {
    rules.Zero: (),
    rules.Epsilon: (0.3,),
    rules.ZPlus: (),
    rules.Gamma: (0.4,),
    rules.GeneralizedGamma: (0.4,),
    rules.AlphaBeta: (2.0, 1.0),
    rules.WSquare: (),
    rules.Flat: (),
    rules.ZBox: (-3.0, 4.0),
}


def rules_except(*others):
    chosen = [rule for rule in NUMBERS if rule not in others]
    return pytest.mark.parametrize("rule", chosen, ids=[rule.__name__ for rule in chosen])


def equal(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@rules_except(rules.Epsilon, rules.ZBox)
@bounded(max_examples=40)
@given(layers(), st.sampled_from([0.25, 2, 64]))
def test_scale_invariance(rule, layer, scale):
    x, w, b, R = layer
    right = explain(rule, x, w, b, R, *NUMBERS[rule])
    equal(explain(rule, x, scale * w, scale * b, R, *NUMBERS[rule]), right)
    equal(explain(rule, scale * x, w, scale * b, R, *NUMBERS[rule]), right)


@bounded(max_examples=40)
@given(layers(), st.sampled_from([0.25, 2, 64]))
def test_scale_invariance_with_the_numbers_scaled(layer, scale):
    x, w, b, R = layer
    equal(explain(rules.Epsilon, x, scale * w, scale * b, R, scale * 0.25), explain(rules.Epsilon, x, w, b, R, 0.25))
    equal(explain(rules.ZBox, scale * x, w, b, R, -3 * scale, 4 * scale), explain(rules.ZBox, x, w, b, R, -3, 4))


def test_epsilon_is_not_scale_invariant():
    x, w, b, R = draw(1, 6), draw(2, 6, 4), draw(3, 4), draw(4, 4)
    assert (
        np.abs(explain(rules.Epsilon, x, 9 * w, 9 * b, R, 0.3) - explain(rules.Epsilon, x, w, b, R, 0.3)).max() > 0.01
    )


@rules_except()
@bounded(max_examples=25)
@given(layers(), st.permutations(range(6)), st.permutations(range(4)))
def test_permutations(rule, layer, inputs, outputs):
    """Inputs exchanged, their relevance is; outputs exchanged, nothing changes."""
    x, w, b, R = layer
    right = explain(rule, x, w, b, R, *NUMBERS[rule])
    equal(explain(rule, x[inputs], w[inputs], b, R, *NUMBERS[rule]), right[inputs])
    equal(explain(rule, x, w[:, outputs], b[outputs], R[outputs], *NUMBERS[rule]), right)


@bounded(max_examples=60)
@given(layers())
def test_zplus_keeps_signs(layer):
    x, w, b, R = layer
    relevance = explain(rules.ZPlus, x, w, b, abs(R))
    assert (relevance >= 0).all() and (explain(rules.ZPlus, x, w, b, -abs(R)) <= 0).all()
    assert relevance.sum() <= abs(R).sum() * (1 + 1e-12)
    assert abs(explain(rules.ZPlus, x, w, b, R)).sum() <= abs(R).sum() * (1 + 1e-12)


@bounded(max_examples=60)
@given(layers(), st.sampled_from([0, 0.5, 1, 3]))
def test_alpha_beta_is_bounded(layer, beta):
    """|R| grows by no more than 1 + 2 beta in a layer; by Zero it may grow without bound."""
    x, w, b, R = layer
    assert abs(explain(rules.AlphaBeta, x, w, b, R, 1 + beta, beta)).sum() <= (1 + 2 * beta) * abs(R).sum() * (
        1 + 1e-12
    )


@rules_except(rules.WSquare, rules.Flat, rules.ZBox)
@bounded(max_examples=40)
@given(layers())
def test_no_activation_no_relevance(rule, layer):
    x, w, b, R = layer
    assert not np.any(explain(rule, x, w, b, R, *NUMBERS[rule])[x == 0])


@pytest.mark.parametrize("rule", [rules.WSquare, rules.Flat, rules.ZBox])
def test_rules_of_the_first_layer_see_inputs_of_zero(rule):
    relevance = explain(rule, np.zeros(6), draw(2, 6, 4), np.zeros(4), np.ones(4), *NUMBERS[rule])
    assert (relevance > 0).all()


@pytest.mark.parametrize("rule", [rules.WSquare, rules.Flat, rules.ZBox])
@bounded(max_examples=40)
@given(layers())
def test_rules_of_the_first_layer_conserve_with_bias(rule, layer):
    """Wherever a unit reads anything: a kernel of zeros gives w^2 and z^B nothing to distribute by."""
    x, w, b, R = layer
    reads = np.ones(4, bool) if rule is rules.Flat else w.any(0)
    relevance = explain(rule, x, w, b, R, *NUMBERS[rule])
    np.testing.assert_allclose(relevance.sum(), R[reads].sum(), rtol=0, atol=1e-12 * (1 + abs(R).sum()))


SAME = {
    "alpha 1, beta 0 is z+": (rules.AlphaBeta(1.0, 0.0), rules.ZPlus(), lambda x, w, b: (x, w, b)),
    "gamma 0 is zero": (rules.Gamma(0.0), rules.Zero(), lambda x, w, b: (x, w, b)),
    "generalised gamma 0 is zero": (rules.GeneralizedGamma(0.0), rules.Zero(), lambda x, w, b: (x, w, b)),
    "epsilon 0 is zero": (rules.Epsilon(0.0), rules.Zero(), lambda x, w, b: (x, w, b)),
    "gamma grows to z+": (rules.Gamma(1e12), rules.ZPlus(), lambda x, w, b: (x, w, b)),
    "flat is w^2 of equal weights": (rules.Flat(), rules.WSquare(), lambda x, w, b: (x, 3 * jnp.sign(w), b)),
    "an empty box is zero, without the bias": (rules.ZBox(0.0, 0.0), rules.Zero(), lambda x, w, b: (x, w, 0 * b)),
}


@pytest.mark.parametrize("one, other, change", SAME.values(), ids=SAME)
def test_rules_that_agree(one, other, change):
    R = draw(5, 3, 4)
    args = change(draw(6, 3, 6), draw(7, 6, 4), draw(8, 4))
    got, right = (lrp(dense, linear(rule), target=lambda y: R)(*args) for rule in (one, other))
    close(got, right, 1e-10)
