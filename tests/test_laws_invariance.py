"""Laws of single layers: relevance is linear, has known signs, and scales, signs and shifts of the layer play no part.

`test_properties.py` has the laws of networks and the first of the laws of one layer.
"""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlrp import composites, lrp, rules
from nets import draw, quick_compilation  # noqa: F401
from single_layers import POLICIES, WITH_BIAS, Parts, compiled, every_other, every_rule, explain, laws, pairs, values
from test_properties import dense, eighths, equal, layers

# ---------------------------------------------------------------------------------------------------- linearity


@every_rule()
@laws()
@given(layers(), eighths(4))
def test_linear_in_relevance(rule, layer, other):
    x, w, b, R = layer
    S = other / 8
    equal(explain(rule, x, w, b, 2 * R - 3 * S), 2 * explain(rule, x, w, b, R) - 3 * explain(rule, x, w, b, S))


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
