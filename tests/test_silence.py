"""Units at which no relevance arrives, and how many passes rules make of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlrp
from jaxlrp import attribute, rules, select
from jaxlrp.analysis import analyse
from jaxlrp.silence import rectified

GAMMA = jaxlrp.Composite([(select.kind("dense", "conv"), rules.GeneralizedGamma(0.25))])
KEY = jax.random.key(0)


def conv(x, w):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def weights(*shape):
    return jax.random.normal(jax.random.fold_in(KEY, shape[-1]), shape)


def chain(params, x, act=jax.nn.relu):
    """Three convolutions, the first of a signed input, the last of what a max-pool of an activation gives."""
    a, b, c = params
    x = act(conv(x, a))
    x = nn.max_pool(act(conv(x, b)), (2, 2), (2, 2))
    return conv(x, c).sum((1, 2))


def residual(params, x):
    a, b, c = params
    x = jax.nn.relu(conv(x, a))
    x = jax.nn.relu(conv(jax.nn.relu(conv(x, b)), b) + x)
    return conv(x, c).mean((1, 2))


def twice(params, x):
    """A ReLU that is an output too, where relevance may start at its zeros."""
    a, b, c = params
    x = jax.nn.relu(conv(x, a))
    return conv(x, c).mean((1, 2)), x


PARAMS = (weights(3, 3, 3, 5), weights(3, 3, 5, 5), weights(3, 3, 5, 4))
X = jax.random.normal(KEY, (2, 6, 6, 3))


def found(fun, composite=GAMMA, params=PARAMS, x=X):
    _, body = analyse(fun, (params, x), {}, 1)
    ops = list(body.ops())
    chosen, _ = attribute.assign(ops, composite)
    kept = rectified(body, chosen)
    return [op in kept for op in ops if op.kind in ("conv", "dense")]


def moved(params, x):
    """Between a ReLU and what reads it: slices, pads, a join, a gather, a sort, a choice, an average and a scale."""
    a, b, c = params
    x = jax.nn.relu(conv(x, a))
    x = jnp.pad(x[:, ::2], ((0, 0), (1, 2), (0, 0), (0, 0)))
    x = jnp.concatenate([x[:, :3, ::-1], jnp.take(x, jnp.asarray([0, 4, 4]), 1)], 1)
    x = jnp.where(jnp.arange(6)[:, None] > 2, jnp.sort(x, 2), x)
    x = jax.nn.relu(conv(x, b))
    return conv(nn.avg_pool(x, (2, 2), (2, 2)) * jnp.arange(5, dtype=x.dtype), c).mean((1, 2))


def scanned(params, x):
    a, b, c = params
    x, _ = jax.lax.scan(lambda x, w: (jax.nn.relu(conv(jax.nn.relu(conv(x, w)), w)), None), conv(x, a), jnp.stack([b]))
    return conv(x, c).mean((1, 2))


@pytest.mark.parametrize(
    "fun, expected",
    [
        (chain, [True, True, False]),
        (lambda p, x: chain(p, x, jax.nn.relu6), [True, True, False]),
        (lambda p, x: chain(p, x, jax.nn.gelu), [False, False, False]),
        (lambda p, x: chain(p, x, jax.jit(lambda v: jnp.maximum(v, 0))), [True, True, False]),
        (jax.checkpoint(chain), [True, True, False]),
        (residual, [True, True, False, False]),
        (moved, [True, True, False]),
        (twice, [False, False]),
        (scanned, [False, True, False, False]),
    ],
)
def test_what_a_relu_turned_off_and_reads_in_proportion(fun, expected):
    assert found(fun) == expected


@pytest.mark.parametrize(
    "rule, silent",
    [
        (rules.Zero(), True),
        (rules.Epsilon(), True),
        (rules.Epsilon(bias="distribute"), False),
        (rules.ZPlus(), True),
        (rules.AlphaBeta(), True),
        (rules.FourQuadrant(), True),
        (rules.Gamma(), True),
        (rules.GeneralizedGamma(), True),
        (rules.GeneralizedGamma(bias="distribute"), False),
        (rules.Flat(), False),
        (rules.WSquare(), False),
        (rules.ZBox(0.0, 1.0), False),
        (rules.Stop(), False),  # nothing arrives below; no need to know
    ],
)
def test_rules_in_proportion_give_zeros_nothing(rule, silent):
    """What a rule says of itself is what it does to an input with zeros."""

    def last(params, x):
        return conv(jax.nn.relu(conv(x, params[0])), params[2]).sum((1, 2))

    layers = jaxlrp.Composite([(select.first(), rules.Epsilon()), (select.kind("conv"), rule)])
    assert found(last, layers)[0] is silent
    bias = jnp.arange(4.0) + 1
    one = jaxlrp.Composite([(select.everything(), rule)])
    zeros = X.at[:, ::2].set(0)
    received = jaxlrp.lrp(lambda x: (conv(x, PARAMS[0]) + 1) @ weights(5, 4) + bias, one)(zeros)
    if silent:
        assert not np.any(np.asarray(received)[:, ::2])
    elif not isinstance(rule, rules.Stop):
        assert np.any(np.asarray(received)[:, ::2])


@rules.rule
class Even(rules.Zero):
    """Of another rule's class, with messages of its own, for zeros too."""

    def propagate(self, layer, relevance):
        return tuple(jnp.full_like(x, relevance.sum() / x.size) for x in layer.inputs)


@rules.rule
class Louder(rules.Zero):
    """Says of its own messages that they are in proportion."""

    def propagate(self, layer, relevance):
        return super().propagate(layer, 2 * relevance)

    def proportional(self, op):
        return True


@pytest.mark.parametrize("rule, silent", [(Even(), False), (Louder(), True), (rules.Norm(), True)])
def test_a_rule_derived_from_another_speaks_for_itself(rule, silent):
    layers = jaxlrp.Composite([(select.last("conv"), rule)]) + GAMMA
    assert found(lambda p, x: conv(jax.nn.relu(conv(x, p[0])), p[2]).sum((1, 2)), layers)[0] is silent


@pytest.mark.parametrize("fun", [chain, residual, moved, twice, scanned])
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
def test_leaving_silent_units_out_changes_nothing(fun, dtype, monkeypatch):
    params, x = jax.tree.map(lambda v: v.astype(dtype), (PARAMS, X))
    explain = jaxlrp.lrp(fun, GAMMA, argnums=1)
    cheap = explain(params, x)
    monkeypatch.setattr(attribute, "rectified", lambda body, chosen: frozenset())
    both = np.asarray(cheap, float), np.asarray(explain(params, x), float)
    np.testing.assert_allclose(*both, rtol=0, atol=1e-12 if dtype == jnp.float64 else 0.02)


def convolutions(*explained, before=None, after=None):
    """How many the compiled program has that explains one convolution, under several composites at once."""
    before, after = before or (lambda x: x), after or (lambda x: x)

    def fun(w, v, x):
        return after(conv(before(x), w)).reshape(len(x), -1) @ v

    def explain(w, v, x):
        made = [jaxlrp.Composite([(select.kind("conv"), r), (select.everything(), rules.Zero())]) for r in explained]
        return [jaxlrp.value_and_lrp(fun, c, argnums=2)(w, v, x) for c in made]

    text = jax.jit(explain).lower(PARAMS[0], weights(180, 3), X).compile().as_text()
    return text.count(" convolution(")


@pytest.mark.parametrize(
    "rule, signed, nonneg, rectified",
    [
        (rules.Epsilon(), 2, 2, 2),
        (rules.ZPlus(), 5, 3, 3),
        (rules.AlphaBeta(), 9, 5, 5),
        (rules.Gamma(), 5, 3, 3),
        (rules.GeneralizedGamma(), 4, 4, 3),
    ],
)
def test_passes(rule, signed, nonneg, rectified):
    """Forward and transposed convolutions of one layer: the forward pass of the network is one of them."""
    relu = jax.nn.relu
    assert convolutions(rule) == signed
    assert convolutions(rule, before=relu) == nonneg
    assert convolutions(rule, before=relu, after=relu) == rectified


def test_variants_share_all_that_does_not_depend_on_gamma():
    gammas = [rules.GeneralizedGamma(g) for g in (0.1, 0.2, 0.3, 0.4)]
    relu = jax.nn.relu
    assert convolutions(*gammas, before=relu, after=relu) == 2 + 4
    assert convolutions(*gammas, before=relu) == 2 + 8
    assert convolutions(*gammas) == 2 + 8
