"""Laws of single layers: how much of the relevance every rule and option keeps, and what is lost and why.

`test_properties.py` has the laws of networks and the first of the laws of one layer.
"""

import numpy as np
import pytest
from hypothesis import given

from jaxlrp import rules
from nets import quick_compilation  # noqa: F401
from single_layers import KERNELS, OTHERS, WITH_BIAS, Parts, compiled, divided, explain, laws, padded, pairs, values
from test_properties import eighths, equal, layers


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


@pytest.mark.parametrize("rule", [rules.WSquare(), rules.Flat(), rules.ZBox(-2.5, 2.5)], ids=["w^2", "flat", "box"])
@laws(max_examples=15)
@given(eighths((5, 4, 2)), KERNELS, eighths((3, 2, 2)))
def test_padding_takes_nothing(rule, x, kernel, R):
    """Bounds of a box do not hold in the padding, which is 0: else border units would lose relevance to it."""
    kernel = np.where(kernel == 0, 1, kernel) / 8  # a unit that reads nothing has nothing to distribute by
    got = compiled(padded, "linear")(rule, R / 8, x / 8, kernel)
    equal(np.sum(got), R.sum() / 8)
