"""One layer explained by every rule and option, for the laws of single layers; the draws are test_properties.py's."""

from functools import cache, partial
from itertools import product

import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import nets
from jaxlrp import Composite, lrp, rules, select
from nets import linear
from reference import negative, positive
from test_properties import bounded, dense, eighths

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

KERNELS = arrays(np.int64, (3, 3, 2, 2), elements=st.integers(-16, 16))


def padded(x, kernel):
    return nets.conv(x[None], kernel, stride=2)[0] + 0.5
