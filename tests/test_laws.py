"""Laws of single layers, for every rule and option: what agrees with what, what changes nothing, what is lost and why.

`test_properties.py` has the laws of networks and the first of the laws of one layer; the draws are the same.
"""

from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import nets
from jaxlrp import Composite, composites, lrp, rules, select
from nets import draw, linear, quick_compilation  # noqa: F401
from reference import negative, positive
from test_properties import bounded, dense, eighths, equal, layers

laws = partial(bounded, max_examples=30)


@cache
def compiled(f, kind):
    """Relevance by any rule, whose numbers are arguments: one program for each rule and choice."""

    def explain(rule, R, *args):
        composite = linear(rule) if kind == "linear" else Composite([(select.kind(kind), rule)])
        return lrp(f, composite, target=lambda y: R)(*args)

    return jax.jit(explain)


def explain(rule, x, w, b, R):
    return np.asarray(compiled(dense, "linear")(rule, R, x, w, b))


POLICIES = ("absorb", "distribute", "ignore")
WITH_BIAS = {
    "zero": rules.Zero,
    "epsilon": partial(rules.Epsilon, 0.5),
    "zplus": rules.ZPlus,
    "alpha-beta": partial(rules.AlphaBeta, 2.0, 1.0),
    "gamma": partial(rules.Gamma, 0.25),
    "generalised-gamma": partial(rules.GeneralizedGamma, 0.25),
}
RULES = {f"{name}, {policy}": rule(bias=policy) for (name, rule), policy in product(WITH_BIAS.items(), POLICIES)}
RULES |= {
    "relative": rules.Epsilon(0.5, stabiliser="relative"),
    "four": rules.FourQuadrant(0.75, 0.5, -0.5, 0.25),
    "wsquare": rules.WSquare(),
    "flat": rules.Flat(),
    "zbox": rules.ZBox(-2.0, 3.0),
}


def every_rule(*without):
    """But those whose name begins so."""
    chosen = {name: rule for name, rule in RULES.items() if not name.startswith(without)}
    return pytest.mark.parametrize("rule", chosen.values(), ids=chosen)


def divided(r, z):
    return np.divide(r, z, out=np.zeros_like(z), where=z != 0)


class Parts:
    """The sums of a layer: contributions c, outputs z, and their parts by sign, biases included."""

    def __init__(self, x, w, b):
        self.c = x[:, None] * w
        self.b = b
        self.plus, self.minus = positive(self.c).sum(0), negative(self.c).sum(0)
        self.z = self.c.sum(0) + b
        self.z_plus, self.z_minus = self.plus + positive(b), self.minus + negative(b)


# ---------------------------------------------------------------------------------------------------- linearity


@every_rule()
@laws()
@given(layers(), eighths(4))
def test_linear_in_relevance(rule, layer, other):
    x, w, b, R = layer
    S = other / 8
    equal(explain(rule, x, w, b, 2 * R - 3 * S), 2 * explain(rule, x, w, b, R) - 3 * explain(rule, x, w, b, S))


OTHERS = {
    "winner": (lambda x: x.reshape(2, 3).max(1), "max_pool", rules.Winner()),
    "winner, split": (lambda x: x.reshape(2, 3).max(1), "max_pool", rules.Winner("split")),
    "logsumexp": (lambda x: jax.nn.logsumexp(x.reshape(2, 3), 1), "max_pool", rules.Winner()),
    "proportional": (lambda x: x.reshape(2, 3).max(1), "max_pool", rules.Proportional()),
    "absolute share": (lambda x: x[:2] + x[2:4] + x[4:], "add", rules.AbsoluteShare()),
    "norm": (lambda x: x[:2] + x[2:4] + x[4:], "add", rules.Norm(0.5)),
    "uniform": (lambda x: x[:2] + x[2:4] + x[4:], "add", rules.Uniform()),
    "uniform mean": (lambda x: x.reshape(2, 3).mean(1), "reduce", rules.Uniform()),
    "product": (lambda x: x[:2] * x[2:4], "product", rules.Uniform()),
    "matmul": (lambda x: x[:4].reshape(2, 2) @ x[4:], "matmul", rules.UniformEpsilon(0.5)),
    "gate": (lambda x: x[:2] * jax.nn.sigmoid(x[2:4]), "product", rules.SignalTakesAll()),
    "gated sum": (lambda x: x[:4].reshape(2, 2) @ x[4:], "matmul", rules.SignalTakesAll("second", 0.5)),
    "softmax": (lambda x: jax.nn.softmax(x[:2]), "softmax", rules.SoftmaxTaylor()),
}
every_other = pytest.mark.parametrize("f, kind, rule", OTHERS.values(), ids=OTHERS)
values, pairs = eighths(6), eighths(2)


@every_other
@laws()
@given(values, pairs, pairs)
def test_linear_in_relevance_beyond_dense(f, kind, rule, x, R, S):
    go = lambda R: np.asarray(compiled(f, kind)(rule, R / 8, x / 8))
    equal(go(2 * R - 3 * S), 2 * go(R) - 3 * go(S))


@pytest.mark.parametrize("composite", [composites.guided_backprop(), composites.deconvnet()])
def test_guided_gradients_are_not_linear(composite):
    """Only for positive factors: the sign of what arrives decides."""
    w, x, R = draw(0, 5, 5), draw(1, 5), draw(2, 5)
    go = jax.jit(lambda R: lrp(lambda x: jax.nn.relu(x @ w), composite, target=lambda y: R)(x))
    equal(go(3 * R), 3 * go(R))
    assert abs(go(-R) + go(R)).max() > 0.1


# ---------------------------------------------------------------------------------------------------- equivalences


@laws()
@given(layers(), st.sampled_from(POLICIES))
def test_alpha_one_is_zplus(layer, policy):
    equal(explain(rules.AlphaBeta(1.0, 0.0, policy), *layer), explain(rules.ZPlus(policy), *layer))


@laws()
@given(layers(), st.sampled_from(POLICIES), st.sampled_from([0.25, 0.5, 3.0]))
def test_alpha_beta_is_affine_in_beta(layer, policy, beta):
    at = [explain(rules.AlphaBeta(1.0 + k, float(k), policy), *layer) for k in (0, 1, beta)]
    equal(at[2], at[0] + beta * (at[1] - at[0]))


@laws()
@given(layers(), st.sampled_from(POLICIES))
def test_without_number_all_are_the_zero_rule(layer, policy):
    right = explain(rules.Zero(policy), *layer)
    equal(explain(rules.Gamma(0.0, policy), *layer), right)
    equal(explain(rules.Epsilon(0.0, bias=policy), *layer), right)
    equal(explain(rules.Epsilon(0.0, "relative", policy), *layer), right)
    if policy != "ignore":  # then the side of a unit that only its bias moves away from 0 is another
        equal(explain(rules.GeneralizedGamma(0.0, policy), *layer), right)


@laws()
@given(layers())
def test_gamma_grows_to_zplus(layer):
    """Where a unit is excited at all; elsewhere gamma changes nothing."""
    x, w, b, R = layer
    excited = Parts(x, w, b).z_plus > 0
    right = explain(rules.ZPlus(), x, w, b, R * excited) + explain(rules.Zero(), x, w, b, R * ~excited)
    equal(explain(rules.Gamma(1e13), *layer), right)


@laws()
@given(layers())
def test_generalised_gamma_grows_to_the_part_of_the_units_sign(layer):
    x, w, b, R = layer
    p = Parts(x, w, b)
    right = (positive(p.c) * divided(np.where(p.z > 0, R, 0), p.z_plus)).sum(1)
    right += (negative(p.c) * divided(np.where(p.z < 0, R, 0), p.z_minus)).sum(1)
    equal(explain(rules.GeneralizedGamma(1e13), *layer), right)


@laws()
@given(layers())
def test_gammas_agree_on_positive_units(layer):
    x, w, b, R = layer
    R = R * (Parts(x, w, b).z > 0)
    equal(explain(rules.GeneralizedGamma(0.5), x, w, b, R), explain(rules.Gamma(0.5), x, w, b, R))


@laws()
@given(layers(), st.sampled_from([(1.0, 0.0), (2.0, 1.0), (1.5, 0.5)]))
def test_four_quadrants_of_inputs_of_one_sign(layer, numbers):
    """alpha and beta without biases: at ++ and +- for positive inputs, at -- and -+ for negative ones."""
    x, w, b, R = layer
    alpha, beta = numbers
    right = rules.AlphaBeta(alpha, beta, bias="ignore")
    equal(explain(rules.FourQuadrant(alpha, 0.0, -beta, 0.0), abs(x), w, b, R), explain(right, abs(x), w, b, R))
    equal(explain(rules.FourQuadrant(0.0, alpha, 0.0, -beta), -abs(x), w, b, R), explain(right, -abs(x), w, b, R))


@laws()
@given(layers(), st.sampled_from([0.125, 1.0, 3.0]))
def test_wsquare_of_equal_weights_is_flat(layer, size):
    x, w, b, R = layer
    w = size * np.where(w >= 0, 1.0, -1.0)
    equal(explain(rules.WSquare(), x, w, b, R), explain(rules.Flat(), x, w, b, R))


@laws()
@given(layers())
def test_an_empty_box_is_the_zero_rule_without_bias(layer):
    equal(explain(rules.ZBox(0.0, 0.0), *layer), explain(rules.Zero("ignore"), *layer))


@laws()
@given(layers())
def test_a_box_from_zero_is_zplus_of_positive_inputs(layer):
    """With l = 0 and h = a, a w - h w- is a w+."""
    x, w, b, R = layer
    x = abs(x)
    equal(explain(rules.ZBox(np.zeros(6), x), x, w, b, R), explain(rules.ZPlus("ignore"), x, w, b, R))


@pytest.mark.parametrize("name", WITH_BIAS)
@laws()
@given(layers())
def test_ignored_bias_is_no_bias(name, layer):
    """But that the generalised gamma still asks the whole unit for its side: there none may change it."""
    x, w, b, R = layer
    if name == "generalised-gamma":
        b = np.where(np.sign(Parts(x, w, b).z) == np.sign(Parts(x, w, 0 * b).z), b, 0)
    rule = WITH_BIAS[name]
    equal(explain(rule(bias="ignore"), x, w, b, R), explain(rule(), x, w, 0 * b, R))


@every_rule("flat")
@laws(max_examples=15)
@given(layers(), eighths(4), eighths(4))
def test_a_batch_norm_folds_into_its_layer(rule, layer, scale, shift):
    """The relevance is that of one layer with other weights: for every rule, not for the zero rule alone."""
    x, w, b, R = layer
    g, s = scale / 8, shift / 8
    got = compiled(normalised, "linear")(rule, R, x, w, b, g, s)
    equal(got, explain(rule, x, w * g, b * g + s, R))


def normalised(x, w, b, g, s):
    return (x @ w + b) * g + s


# ---------------------------------------------------------------------------------------------------- invariances


@every_rule("epsilon", "zbox")
@laws(max_examples=20)
@given(layers(), st.sampled_from([0.25, 2.0, 64.0]))
def test_scales_play_no_part(rule, layer, scale):
    """Nor for Epsilon in units of its outputs."""
    x, w, b, R = layer
    right = explain(rule, x, w, b, R)
    equal(explain(rule, x, scale * w, scale * b, R), right)
    equal(explain(rule, scale * x, w, scale * b, R), right)


@laws()
@given(layers(), st.sampled_from(POLICIES), st.sampled_from([0.25, 7.0]))
def test_epsilon_is_in_units_of_the_output(layer, policy, scale):
    x, w, b, R = layer
    one = explain(rules.Epsilon(scale * 0.5, bias=policy), x, scale * w, scale * b, R)
    equal(one, explain(rules.Epsilon(0.5, bias=policy), x, w, b, R))


@every_rule("four", "zbox")
@laws(max_examples=20)
@given(layers())
def test_signs_of_input_and_weight_play_no_part(rule, layer):
    """Only those of their product do."""
    x, w, b, R = layer
    equal(explain(rule, -x, -w, b, R), explain(rule, x, w, b, R))


@laws()
@given(layers())
def test_signs_exchange_quadrants_and_bounds(layer):
    x, w, b, R = layer
    equal(explain(rules.FourQuadrant(0.75, 0.5, -0.5, 0.25), -x, -w, b, R),
          explain(rules.FourQuadrant(0.5, 0.75, 0.25, -0.5), x, w, b, R))  # fmt: skip
    equal(explain(rules.FourQuadrant(0.75, 0.5, -0.5, 0.25), x, -w, b, R),
          explain(rules.FourQuadrant(-0.5, 0.25, 0.75, 0.5), x, w, b, R))  # fmt: skip
    equal(explain(rules.ZBox(-3.0, 2.0), -x, -w, b, R), explain(rules.ZBox(-2.0, 3.0), x, w, b, R))


@every_rule("epsilon", "relative", "zplus", "alpha", "gamma", "four", "zbox")
@laws(max_examples=20)
@given(layers())
def test_the_sign_of_a_unit_plays_no_part(rule, layer):
    """For the zero rule, the generalised gamma, w^2 and flat; for Epsilon but at z = 0, whose sign is +1."""
    x, w, b, R = layer
    equal(explain(rule, x, -w, -b, R), explain(rule, x, w, b, R))
    R = R * (Parts(x, w, b).z != 0)
    equal(explain(rules.Epsilon(0.5), x, -w, -b, R), explain(rules.Epsilon(0.5), x, w, b, R))


@laws()
@given(layers(), st.sampled_from([-4.0, 0.5, 3.0]))
def test_a_box_moves_with_its_input(layer, by):
    x, w, b, R = layer
    equal(explain(rules.ZBox(-2.0 + by, 3.0 + by), x + by, w, b, R), explain(rules.ZBox(-2.0, 3.0), x, w, b, R))


@laws()
@given(layers(), layers())
def test_rules_that_look_at_weights_alone(layer, other):
    x, w, b, R = layer
    equal(explain(rules.WSquare(), other[0], w, other[2], R), explain(rules.WSquare(), x, w, b, R))
    equal(explain(rules.Flat(), other[0], other[1], other[2], R), explain(rules.Flat(), x, w, b, R))


@every_rule("flat", "wsquare", *(f"{n}, distribute" for n in WITH_BIAS))
@laws(max_examples=15)
@given(layers())
def test_an_input_in_two_halves(rule, layer):
    """Two inputs that contribute half each share their relevance; not where shares go by weights or by heads."""
    x, w, b, R = layer
    got = np.asarray(compiled(dense, "linear")(rule, R, np.tile(x, 2), np.tile(w, (2, 1)) / 2, b))
    equal(got[:6], got[6:])
    equal(got[:6] + got[6:], explain(rule, x, w, b, R))


@every_rule()
@laws(max_examples=10)
@given(layers())
def test_units_add_up(rule, layer):
    """The relevance of a layer is the sum over its units, each a layer of its own."""
    x, w, b, R = layer
    if getattr(rule, "stabiliser", "") == "relative":
        return  # in units of all outputs together
    equal(sum(explain(rule, x, w, b, R * one) for one in np.eye(4)), explain(rule, x, w, b, R))


# ---------------------------------------------------------------------------------------------------- signs


@laws()
@given(layers())
def test_signs_of_relevance(layer):
    """z+, w^2, flat and a box around the input keep the sign of what arrives."""
    x, w, b, R = layer
    box = rules.ZBox(x - abs(w[:, 0]), x + abs(w[:, 1]))
    for rule in (rules.ZPlus(), rules.ZPlus("ignore"), rules.WSquare(), rules.Flat(), rules.FourQuadrant(), box):
        assert (explain(rule, x, w, b, abs(R)) >= 0).all() and (explain(rule, x, w, b, -abs(R)) <= 0).all()


@laws()
@given(layers(), st.sampled_from(["absorb", "ignore"]))
def test_alpha_beta_gives_signs_by_contribution(layer, policy):
    """An input that only excites gets positive relevance, one that only inhibits gets negative."""
    x, w, b, R = layer
    received = explain(rules.AlphaBeta(2.0, 1.0, policy), x, w, b, abs(R))
    c = Parts(x, w, b).c
    assert (received[(c >= 0).all(1)] >= 0).all() and (received[(c <= 0).all(1)] <= 0).all()


@laws()
@given(layers())
def test_epsilon_dampens(layer):
    """More of it, less relevance from each unit, and of no other sign."""
    x, w, b, R = layer
    for one in np.eye(4):
        R_k = R * one * (Parts(x, w, b).z != 0)
        some, more = (explain(rules.Epsilon(eps), x, w, b, R_k) for eps in (0.25, 2.0))
        assert (abs(more) <= abs(some)).all() and (some * more >= 0).all()


# ---------------------------------------------------------------------------------------------------- what is lost


def kept_by(name, p, R):
    """sum_j R_j of each rule that lets its bias absorb, unit by unit."""
    z, b, s = p.z, p.b, np.where(p.z >= 0, 1, -1)
    plus, minus = divided(R * p.plus, p.z_plus), divided(R * p.minus, p.z_minus)
    if name == "zero":
        return divided(R * (z - b), z)
    if name == "epsilon":
        return R * (z - b) / (z + 0.5 * s)
    if name == "zplus":
        return plus
    if name == "alpha-beta":
        return 2 * plus - minus
    if name == "gamma":
        return divided(R * (z - b + 0.25 * p.plus), z + 0.25 * p.z_plus)
    of_plus = divided(R * (z - b + 0.25 * p.plus), z + 0.25 * p.z_plus)
    of_minus = divided(R * (z - b + 0.25 * p.minus), z + 0.25 * p.z_minus)
    return np.where(z > 0, of_plus, 0) + np.where(z < 0, of_minus, 0)


every_bias = pytest.mark.parametrize("name", WITH_BIAS)


@every_bias
@laws()
@given(layers())
def test_what_a_bias_absorbs(name, layer):
    """Exactly its share of the denominator; and all of a unit whose denominator is zero is dropped."""
    x, w, b, R = layer
    received = explain(WITH_BIAS[name](), x, w, b, R).sum()
    equal(received, kept_by(name, Parts(x, w, b), R).sum())


@laws()
@given(layers())
def test_what_is_lost_without_bias(layer):
    """Epsilon: the factor |z| / (|z| + eps). alpha-beta: a unit that is not inhibited gives alpha R, one that is not
    excited -beta R, one that reads nothing 0; z+ nothing at all where nothing excites."""
    x, w, b, R = layer
    p = Parts(x, w, 0 * b)
    excited, inhibited = p.plus > 0, p.minus < 0
    right = {
        rules.Zero(): R * (p.z != 0),
        rules.Epsilon(0.5): R * abs(p.z) / (abs(p.z) + 0.5),
        rules.Epsilon(0.5, stabiliser="relative"): R * divided(abs(p.z), abs(p.z) + 0.5 * np.sqrt((p.z**2).mean())),
        rules.ZPlus(): R * excited,
        rules.AlphaBeta(2.0, 1.0): 2 * R * excited - R * inhibited,
        rules.Gamma(0.25): R * (p.z + 0.25 * p.plus != 0),
        rules.GeneralizedGamma(0.25): R * (p.z != 0),
        rules.WSquare(): R * w.any(0),
        rules.Flat(): R,
    }
    for rule, units in right.items():
        equal(explain(rule, x, w, 0 * b, R).sum(), units.sum())


@laws()
@given(layers())
def test_four_quadrants_lose_those_that_are_empty(layer):
    x, w, b, R = layer
    signs = {(1, 1): 0.75, (-1, -1): 0.5, (1, -1): -0.5, (-1, 1): 0.25}
    filled = {q: ((np.sign(x)[:, None] == q[0]) & (np.sign(w) == q[1])).any(0) for q in signs}
    units = sum(n * filled[q] * R for q, n in signs.items())
    equal(explain(rules.FourQuadrant(0.75, 0.5, -0.5, 0.25), x, w, b, R).sum(), units.sum())


@every_bias
@laws()
@given(layers())
def test_a_distributed_bias_loses_nothing(name, layer):
    """But what the stabiliser absorbs, and units whose denominator is zero."""
    x, w, b, R = layer
    p = Parts(x, w, b)
    whole = {
        "zero": p.z != 0,
        "epsilon": abs(p.z) / (abs(p.z) + 0.5),
        "zplus": p.z_plus > 0,
        "alpha-beta": 2.0 * (p.z_plus > 0) - (p.z_minus < 0),
        "gamma": p.z + 0.25 * p.z_plus != 0,
        "generalised-gamma": p.z != 0,
    }[name]
    equal(explain(WITH_BIAS[name](bias="distribute"), x, w, b, R).sum(), (R * whole).sum())


@laws()
@given(values, pairs)
def test_what_others_lose(x, R):
    """Softmax does not conserve; sums drop units that cancel; winners and equal shares lose nothing."""
    x, R = x / 8, R / 8
    halves, thirds = x.reshape(2, 3), x.reshape(3, 2)
    s = np.exp(x[:2]) / np.exp(x[:2]).sum()
    o = x[:4].reshape(2, 2) @ x[4:]
    z = thirds.sum(0)
    right = {
        "winner": R,
        "winner, split": R,
        "logsumexp": R,
        "uniform": R,
        "uniform mean": R,
        "product": R,
        "proportional": R * (halves.sum(1) != 0),
        "absolute share": R * thirds.any(0),
        "norm": R * abs(z) / (abs(z) + 0.5),
        "matmul": R * abs(2 * o) / (abs(2 * o) + 0.5),
        "gate": R,
        "gated sum": R * abs(o) / (abs(o) + 0.5),
        "softmax": x[:2] * (R - s * R.sum()),
    }
    assert right.keys() == OTHERS.keys()
    for name, (f, kind, rule) in OTHERS.items():
        equal(np.sum(compiled(f, kind)(rule, R, x)), right[name].sum())


KERNELS = arrays(np.int64, (3, 3, 2, 2), elements=st.integers(-16, 16))


def padded(x, kernel):
    return nets.conv(x[None], kernel, stride=2)[0] + 0.5


@pytest.mark.parametrize("rule", [rules.WSquare(), rules.Flat(), rules.ZBox(-2.5, 2.5)], ids=["w^2", "flat", "box"])
@laws(max_examples=15)
@given(eighths((5, 4, 2)), KERNELS, eighths((3, 2, 2)))
def test_padding_takes_nothing(rule, x, kernel, R):
    """Bounds of a box do not hold in the padding, which is 0: else border units would lose relevance to it."""
    kernel = np.where(kernel == 0, 1, kernel) / 8  # a unit that reads nothing has nothing to distribute by
    got = compiled(padded, "linear")(rule, R / 8, x / 8, kernel)
    equal(np.sum(got), R.sum() / 8)


@laws(max_examples=15)
@given(eighths((5, 4, 2)), KERNELS, eighths((3, 2, 2)))
def test_laws_of_convolutions(x, kernel, R):
    """Some of the equivalences, where inputs are shared between units."""
    x, kernel, R = x / 8, kernel / 8, R / 8
    go = lambda rule, x=x: np.asarray(compiled(padded, "linear")(rule, R, x, kernel))
    equal(go(rules.AlphaBeta(1.0, 0.0)), go(rules.ZPlus()))
    equal(go(rules.Gamma(0.0)), go(rules.Zero()))
    equal(go(rules.ZBox(0.0, 0.0)), go(rules.Zero("ignore")))
    equal(go(rules.FourQuadrant(2.0, 0.0, -1.0, 0.0), abs(x)), go(rules.AlphaBeta(2.0, 1.0, "ignore"), abs(x)))
    equal(go(rules.ZBox(jnp.zeros(x.shape), abs(x)), abs(x)), go(rules.ZPlus("ignore"), abs(x)))
