"""Laws of single layers: which rules agree with one another, for which numbers and inputs.

`test_properties.py` has the laws of networks and the first of the laws of one layer.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlrp import rules
from nets import quick_compilation  # noqa: F401
from reference import negative, positive
from single_layers import KERNELS, POLICIES, WITH_BIAS, Parts, compiled, divided, every_rule, explain, laws, padded
from test_properties import eighths, equal, layers


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
