"""Composites: which rule each layer gets, from the named ones, from rows and from `base`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from composed import N, P, X, close, cnn, every_composite, table
from jaxlrp import Composite, composites, lrp, plan, rewrite, rules, value_and_lrp
from jaxlrp.errors import InputError, NoRuleError, SelectorError
from jaxlrp.rules import Epsilon, Flat, Pass, SoftmaxTaylor, Uniform, UniformEpsilon, Winner, WSquare, ZPlus
from jaxlrp.select import everything, first, kind, last, named
from models import mlp
from nets import quick_compilation  # noqa: F401

# ---------------------------------------------------------------------------------------------------- the named ones


@every_composite
def test_named_composite(composite, right):
    got = plan(cnn, composite)(X, P)
    assert [(row.name, row.rule) for row in got] == right, str(got)
    assert [row.base for row in got] == [row.kind not in ("conv", "dense") for row in got]


@pytest.mark.parametrize(
    "composite, right",
    [
        (composites.epsilon(), [Epsilon(1e-6), Epsilon(1e-6)]),
        (composites.epsilon_plus(), [Epsilon(1e-6), Epsilon(1e-6)]),
        (composites.epsilon_plus_flat(), [Flat(), Epsilon(1e-6)]),
        # z^B is for a first convolution, as in zennit
        (composites.epsilon_gamma_box(-3.0, 4.0), [Epsilon(1e-6), Epsilon(1e-6)]),
        (composites.epsilon_alpha2_beta1_flat(), [Flat(), Epsilon(1e-6)]),
        (composites.deep_taylor(), [WSquare(), ZPlus()]),
    ],
)
def test_named_composite_where_the_first_layer_is_dense(composite, right):
    p = models.mlp_parameters(4, 3, 2)
    got = plan(mlp, composite)(np.zeros((2, 4)), p)
    assert [row.rule for row in got] == [right[0], Pass(), right[1]]


def test_excitation_backprop():
    """z+ everywhere, Zhang et al. 2016."""
    got = plan(cnn, composites.excitation_backprop())(X, P)
    assert [(row.name, row.rule) for row in got] == table(ZPlus(), ZPlus(), ZPlus()), str(got)


@pytest.mark.parametrize("name", ["guided_backprop", "deconvnet"])
def test_composites_that_change_the_relu(name):
    """And leave every other layer to the gradient."""
    x, p = models.rng(5).normal(size=(2, 4)), models.mlp_parameters(4, 6, 6, 3)
    got = lrp(mlp, getattr(composites, name)(), target=1)(x, p)

    def through(R, h):  # Springenberg et al. 2015; Zeiler and Fergus 2014
        return np.maximum(R, 0) * (h > 0) if name == "guided_backprop" else np.maximum(R, 0)

    h1 = x @ p[0]["kernel"] + p[0]["bias"]
    h2 = np.maximum(h1, 0) @ p[1]["kernel"] + p[1]["bias"]
    y = np.maximum(h2, 0) @ p[2]["kernel"] + p[2]["bias"]
    start = np.where(np.arange(3) == 1, y, 0)
    R = through(through(start @ p[2]["kernel"].T, h2) @ p[1]["kernel"].T, h1) @ p[0]["kernel"].T
    close(got, R)


def test_base():
    """What serves every composite where its own rows leave a layer open."""

    def function(x, w):
        h = jax.nn.gelu(x @ w["a"])
        h = h * (x @ w["b"])
        h = h.reshape(2, 2, 2).transpose(0, 2, 1).reshape(2, 4) + w["shift"]
        h = jnp.maximum(h, x)
        h = jax.nn.softmax(h @ h.T) @ h + h
        return jax.nn.softmax(h @ h.T)

    w = {"a": np.ones((4, 4)), "b": np.ones((4, 4)), "shift": np.ones(4)}
    got = [(row.kind, row.rule, row.base) for row in plan(function, composites.epsilon())(np.ones((2, 4)), w)]
    E = Epsilon(1e-6)
    assert [row for row in got if row[0] != "structural"] == [
        ("dense", E, False),
        ("activation", Pass(), True),
        ("dense", E, False),
        ("product", Uniform(), True),
        ("scale", N, True),
        ("max_pool", Winner(), True),
        ("attention", rules.Attention(), True),
        ("add", N, True),
        ("matmul", UniformEpsilon(1e-9), True),
        ("softmax", SoftmaxTaylor(), True),
    ]
    assert all(row == ("structural", Pass(), True) for row in got if row[0] == "structural")


def test_base_passes_a_batch_norm_without_a_linear_neighbour():
    def function(x, p):
        return jax.nn.relu(models.batch_norm(jnp.tanh(x), p))

    (tanh, norm, relu) = plan(function, Composite())(np.zeros((2, 4)), models.numbers()["norm"])
    assert (norm.kind, norm.rule, norm.base) == ("batch_norm", Pass(), True)


def test_base_itself_can_be_a_part():
    """Rows of base that a user writes out are the user's."""
    got = plan(mlp, composites.epsilon() + composites.base())(np.zeros((2, 4)), models.mlp_parameters(4, 3, 2))
    assert [(row.rule, row.base) for row in got] == [(Epsilon(1e-6), False), (Pass(), False), (Epsilon(1e-6), False)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: composites.deep_taylor("pixels"),
        lambda: composites.deep_taylor("box"),
        lambda: composites.deep_taylor("box", low=0.0),
        lambda: composites.deep_taylor(high=1.0),
        lambda: composites.epsilon(-1e-6),
        lambda: composites.epsilon_gamma_box(-1.0, 1.0, gamma=-0.1),
        lambda: composites.epsilon_gamma_box(1.0, -1.0),
        lambda: Composite([(kind("dense"), Epsilon)]),
        lambda: Composite([(kind("dense"), 0.1)]),
        lambda: Composite([kind("dense")]),
        lambda: Composite([(kind("dense"), Epsilon(), Epsilon())]),
    ],
)
def test_wrong_composites(make):
    with pytest.raises(InputError):
        make()


# ---------------------------------------------------------------------------------------------------- rows


def assigned(composite: Composite) -> list[rules.Rule]:
    """Of the three dense layers of an MLP."""
    p = models.mlp_parameters(4, 3, 3, 2)
    return [row.rule for row in plan(mlp, composite)(np.zeros((2, 4)), p) if row.kind == "dense"]


def test_first_match_wins():
    E = Epsilon(0.1)
    rows = [(named("1"), Flat()), (kind("dense"), E)]
    assert assigned(Composite(rows)) == [E, Flat(), E]
    # and the other way round the second row is shadowed
    assert assigned(Composite(rows[::-1])) == [E, E, E]
    assert assigned(Composite([(last(), ZPlus()), (first(), WSquare()), (everything(), E)])) == [WSquare(), E, ZPlus()]


def test_plus_puts_left_rows_first():
    one, two = Composite([(first(), Flat())]), Composite([(first(), WSquare()), (kind("dense"), ZPlus())])
    assert assigned(one + two) == [Flat(), ZPlus(), ZPlus()]
    assert assigned(two + one) == [WSquare(), ZPlus(), ZPlus()]
    assert (one + two).rows == one.rows + two.rows
    assert ((one + two) + one).rows == (one + (two + one)).rows
    assert (Composite() + one).rows == one.rows
    assert len(one.rows) == 1 and len(two.rows) == 2  # the parts stay as they are


@pytest.mark.parametrize("other", [[(first(), Flat())], Flat(), None, 1])
def test_plus_something_else(other):
    with pytest.raises(TypeError):
        composites.epsilon() + other
    with pytest.raises(TypeError):
        other + composites.epsilon()


def test_rule_is_skipped_where_it_cannot_be_applied():
    """`everything` with ZPlus is for the layers that have a kernel; what is left falls to base."""
    got = plan(cnn, Composite([(everything(), ZPlus())]))(X, P)
    assert [(row.name, row.rule) for row in got if row.kind in ("conv", "dense")] == [
        (name, ZPlus()) for name in ("stem", "block", "head", "last")
    ]
    assert {row.rule for row in got if row.kind == "activation"} == {Pass()}
    # Epsilon is for sums and pools as well
    got = plan(cnn, Composite([(everything(), Epsilon(0.1))]))(X, P)
    assert {row.kind for row in got if row.rule == Epsilon(0.1)} == {"conv", "dense", "add", "avg_pool", "reduce"}


def test_row_whose_rule_fits_nothing_that_it_selects():
    with pytest.raises(SelectorError, match="(?s)ZPlus.*relu"):
        plan(cnn, Composite([(kind("activation"), ZPlus())]) + composites.epsilon())(X, P)


def test_users_rows_come_before_base():
    composite = composites.epsilon() + Composite([(kind("activation"), Pass()), (kind("add"), Uniform())])
    got = {row.kind: (row.rule, row.base) for row in plan(cnn, composite)(X, P)}
    assert got["activation"] == (Pass(), False) and got["add"] == (Uniform(), False)
    assert got["max_pool"] == (Winner(), True)


@pytest.mark.parametrize("verb", [plan, lrp, value_and_lrp, rewrite])
def test_dense_and_conv_have_no_default(verb):
    with pytest.raises(NoRuleError) as caught:
        verb(cnn, Composite([(kind("conv"), ZPlus())]))(X, P)
    message = str(caught.value)
    assert "head" in message and "dense" in message and "models.py" in message
    assert 'jaxlrp.select.kind("dense")' in message and "jaxlrp.rules.Epsilon" in message


@pytest.mark.parametrize("wrong", [composites.epsilon, None, Epsilon(), [(kind("dense"), Epsilon())], "epsilon"])
def test_what_is_no_composite(wrong):
    with pytest.raises(InputError, match=r"composites\.epsilon\(\)"):
        plan(cnn, wrong)(X, P)
