"""The ledger's columns: what is absorbed, dropped, ended or created, by numbers that are worked out by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import nets
from jaxlrp import composites, rules
from jaxlrp.evaluate import conservation
from ledgers import EPSILON, B, W, X, closes, draw, near, row, single_precision  # noqa: F401
from nets import linear, quick_compilation  # noqa: F401


def test_bias_and_stabiliser():
    """What Epsilon keeps of a dense layer: R b / (z + eps sign z), and R eps sign z / (z + eps sign z)."""
    eps, R = 0.1, draw(7, 3, 4)
    ledger = closes(conservation(lambda x: x @ W + B, EPSILON, target=lambda y: R[:1])(X))
    z = X @ W + B
    stable = z + eps * np.sign(z)
    (only,) = ledger
    near(only.arrived, np.full(3, R[0].sum()))
    near(only.bias, (R[0] * B / stable).sum(1))
    near(only.stabiliser, (R[0] * eps * np.sign(z) / stable).sum(1))
    near(only.passed, (R[0] * (X @ W) / stable).sum(1))
    near(only.size, np.full(3, abs(R[0]).sum()))
    assert not np.any(only.dropped) and not np.any(only.ended) and not np.any(only.created)


@pytest.mark.parametrize("policy", ["absorb", "distribute", "ignore"])
@pytest.mark.parametrize(
    "rule",
    [rules.Zero, partial(rules.Epsilon, 0.1), partial(rules.Epsilon, 0.1, stabiliser="relative"), rules.ZPlus,
     rules.AlphaBeta, rules.Gamma, rules.GeneralizedGamma],
    ids=["zero", "epsilon", "relative", "zplus", "alpha-beta", "gamma", "generalised"],
)  # fmt: skip
def test_policies_of_the_bias(rule, policy):
    """Only "absorb" leaves anything with the bias; in every case the rest is passed on, or dropped."""
    ledger = closes(conservation(lambda x: nets.mlp([(W, B), (W, B)], x), linear(rule(bias=policy)))(X))
    absorbed = [np.any(r.bias) for r in ledger if r.kind == "dense"]
    assert absorbed == [policy == "absorb"] * 2


@pytest.mark.parametrize("policy", ["absorb", "distribute", "ignore"])
def test_bias_of_units_that_read_padding_alone(policy):
    """There is nobody to give the bias's share to."""

    def f(x):
        options = {"dimension_numbers": ("NWC", "WIO", "NWC")}
        return lax.conv_general_dilated(x[..., None], W[:2, None, :1], (1,), [(3, 0)], **options)[..., 0] + B[0]

    closes(conservation(f, linear(rules.Epsilon(1e-6, bias=policy)))(X))


def test_dropped():
    """Units whose denominator is zero: no excitation for z+, neither for alpha-beta's half."""
    w = np.array([[1, -1, 0, 2], [1, -2, 0, -1]], np.float32)
    x = np.array([[1, 1], [2, 0]], np.float32)
    f, R = lambda x: x @ w, np.array([[1, -2, 4, 8]], np.float32)
    zplus = closes(conservation(f, linear(rules.ZPlus()), target=lambda y: R)(x))[0]
    near(zplus.dropped, [-2 + 4, -2 + 4])
    half = closes(conservation(f, linear(rules.AlphaBeta(2.0, 1.0)), target=lambda y: R)(x))[0]
    # the third unit reads nothing: 2 R - R; the first has no inhibition (-R), the second no excitation (2 R)
    near(half.dropped, [4 - 1 - 4, 4 - 1 - 4 - 8])
    wsquare = closes(conservation(f, linear(rules.WSquare()), target=lambda y: R)(x))[0]
    near(wsquare.dropped, [4, 4])


def test_ended_at_constants():
    """A token gets the relevance that belongs to it, and keeps it."""
    R = draw(8, 1, 5)

    def f(x):
        return jnp.concatenate([np.ones((len(x), 1), np.float32), x], axis=1)

    ledger = closes(conservation(f, EPSILON, target=lambda y: R)(X))
    near(sum(r.ended for r in ledger), np.full(3, R[0, 0]))
    near(ledger.received, np.full(3, R[0, 1:].sum()))


def test_ended_at_a_loops_start():
    R = draw(9, 1, 4)

    def f(x):
        return lax.scan(lambda c, _: (c + x, None), jnp.full_like(x, 2.0), None, length=3)[0]

    ledger = closes(conservation(f, EPSILON, target=lambda y: R)(X))
    near(row(ledger, "constants of scan").ended, (R * 2 / (2 + 3 * X)).sum(1), 1e-3)


def test_created_by_softmax():
    """sum_i x_i (R_i - s_i sum_j R_j) is passed on of sum_i R_i."""
    R = draw(10, 1, 4)
    (only,) = closes(conservation(jax.nn.softmax, EPSILON, target=lambda y: R)(X))
    s = np.exp(X) / np.exp(X).sum(1, keepdims=True)
    passed = (X * (R - s * R.sum())).sum(1)
    near(only.passed, passed)
    near(only.created, passed - R.sum())


def test_created_by_gradients():
    R = draw(11, 1, 4)
    (only,) = closes(conservation(lambda x: x @ W + B, composites.guided_backprop(), target=lambda y: R)(X))
    near(only.created, np.full(3, (R @ W.T).sum() - R.sum()))


def test_what_a_stopped_branch_adds_is_no_bias():
    """Relevance that would go on into `stop_gradient` ends there; that of a constant is the bias's."""
    x, w = np.asarray(draw(93, 4, 6), np.float32), np.asarray(draw(94, 6, 6), np.float32)
    stopped = closes(conservation(lambda x: jnp.tanh(x @ w) + lax.stop_gradient(jnp.sin(x)), EPSILON)(x))
    constant = closes(conservation(lambda x: jnp.tanh(x @ w) + np.float32(0.3), EPSILON)(x))
    total = lambda ledger, column: sum(np.abs(getattr(row, column)).sum() for row in ledger)
    assert total(stopped, "ended") > 0 == total(stopped, "bias")
    assert total(constant, "bias") > 0 == total(constant, "ended")
