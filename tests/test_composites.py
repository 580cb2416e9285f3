"""Composites: which rule each layer gets, composites as pytrees, and the plan that shows the assignment."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from jaxlrp import Composite, composites, lrp, plan, rewrite, rules, value_and_lrp
from jaxlrp.errors import InputError, NoRuleError, SelectorError
from jaxlrp.rules import (
    AlphaBeta,
    Epsilon,
    Flat,
    GeneralizedGamma,
    Pass,
    SoftmaxTaylor,
    Uniform,
    UniformEpsilon,
    Winner,
    WSquare,
    ZBox,
    ZPlus,
)
from jaxlrp.select import everything, first, kind, last, named, where
from models import mlp


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """XLA's optimiser would take half of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def close(got, right, tolerance=1e-10):
    right = np.asarray(right)
    assert np.any(right), "a comparison with nothing shows nothing"
    np.testing.assert_allclose(got, right, rtol=0, atol=tolerance * abs(right).max())


# ---------------------------------------------------------------------------------------------------- the named ones

# The CNN with a second dense layer, so that one of each is not the first, and not the last.
CNN = models.cnn()
X = models.images()
WIDE = {"kernel": models.rng(3).normal(size=(3, 5)), "bias": models.rng(4).normal(size=5)}
P = {**CNN.parameters, "last": WIDE}


def cnn(x, p):
    return models.dense(jax.nn.relu(models.plain_cnn(x, p)), p["last"])


LAYERS = ["stem", "relu", "block", "relu#2", "add", "max_pool", "avg_pool", "reduce", "head", "relu#3", "last"]
N = Epsilon(1e-9)  # zennit's Norm


def table(stem, conv, dense) -> list[tuple[str, rules.Rule]]:
    """What the layers of `cnn` get: activations and sums are the same in all."""
    return list(zip(LAYERS, [stem, Pass(), conv, Pass(), N, Winner(), N, N, dense, Pass(), dense], strict=True))


NAMED: dict[str, tuple[Composite, list[tuple[str, rules.Rule]]]] = {
    "epsilon": (composites.epsilon(), table(Epsilon(1e-6), Epsilon(1e-6), Epsilon(1e-6))),
    "epsilon, number": (composites.epsilon(epsilon=0.1), table(Epsilon(0.1), Epsilon(0.1), Epsilon(0.1))),
    "epsilon_plus": (composites.epsilon_plus(), table(ZPlus(), ZPlus(), Epsilon(1e-6))),
    "epsilon_plus, number": (composites.epsilon_plus(epsilon=0.1), table(ZPlus(), ZPlus(), Epsilon(0.1))),
    "epsilon_plus_flat": (composites.epsilon_plus_flat(), table(Flat(), ZPlus(), Epsilon(1e-6))),
    "epsilon_plus_flat, number": (composites.epsilon_plus_flat(epsilon=0.1), table(Flat(), ZPlus(), Epsilon(0.1))),
    "epsilon_gamma_box": (
        composites.epsilon_gamma_box(-3.0, 4.0),
        table(ZBox(-3.0, 4.0), GeneralizedGamma(0.25), Epsilon(1e-6)),
    ),
    "epsilon_gamma_box, numbers": (
        composites.epsilon_gamma_box(low=-3.0, high=4.0, epsilon=0.1, gamma=0.5),
        table(ZBox(-3.0, 4.0), GeneralizedGamma(0.5), Epsilon(0.1)),
    ),
    "epsilon_alpha2_beta1": (
        composites.epsilon_alpha2_beta1(),
        table(AlphaBeta(2.0, 1.0), AlphaBeta(2.0, 1.0), Epsilon(1e-6)),
    ),
    "epsilon_alpha2_beta1, number": (
        composites.epsilon_alpha2_beta1(epsilon=0.1),
        table(AlphaBeta(2.0, 1.0), AlphaBeta(2.0, 1.0), Epsilon(0.1)),
    ),
    "epsilon_alpha2_beta1_flat": (
        composites.epsilon_alpha2_beta1_flat(),
        table(Flat(), AlphaBeta(2.0, 1.0), Epsilon(1e-6)),
    ),
    "deep_taylor": (composites.deep_taylor(), table(WSquare(), ZPlus(), ZPlus())),
    "deep_taylor, non-negative": (composites.deep_taylor("nonnegative"), table(ZPlus(), ZPlus(), ZPlus())),
    "deep_taylor, box": (
        composites.deep_taylor("box", low=-3.0, high=4.0),
        table(ZBox(-3.0, 4.0), ZPlus(), ZPlus()),
    ),
    "deep_taylor, bounds": (composites.deep_taylor(low=-3.0, high=4.0), table(ZBox(-3.0, 4.0), ZPlus(), ZPlus())),
}
every_composite = pytest.mark.parametrize("composite, right", NAMED.values(), ids=NAMED)


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


# ---------------------------------------------------------------------------------------------------- pytree


def test_leaves_are_the_numbers():
    composite = composites.epsilon_gamma_box(-3.0, 4.0, epsilon=0.1, gamma=0.5)
    assert jax.tree.leaves(composite) == [-3.0, 4.0, 0.5, 0.1]
    assert jax.tree.leaves(composites.epsilon_alpha2_beta1(0.2)) == [2.0, 1.0, 0.2]
    assert jax.tree.leaves(composites.deep_taylor()) == []
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(composite)]
    assert len(set(paths)) == 4 and [path.split(".")[-1] for path in paths] == ["low", "high", "gamma", "epsilon"]


@every_composite
def test_round_trip(composite, right):
    leaves, structure = jax.tree.flatten(composite)
    again = jax.tree.unflatten(structure, leaves)
    assert isinstance(again, Composite) and again.rows == composite.rows
    assert jax.tree.structure(again) == structure and hash(structure) == hash(jax.tree.structure(again))


def test_structure_tells_selectors_and_rules_apart():
    structure = lambda *rows: jax.tree.structure(Composite(rows))
    base = structure((kind("dense"), Epsilon(0.1)))
    assert base == structure((kind("dense"), Epsilon(0.2)))
    assert base != structure((kind("conv"), Epsilon(0.1)))
    assert base != structure((kind("dense"), GeneralizedGamma(0.1)))
    assert base != structure((kind("dense"), Epsilon(0.1)), (first(), Flat()))
    predicate = lambda op: True
    assert structure((where(predicate), Flat())) == structure((where(predicate), Flat()))
    assert structure((where(predicate), Flat())) != structure((where(lambda op: True), Flat()))


ONE_OF_EACH = [
    AlphaBeta(), Epsilon(), Flat(), rules.Gamma(), GeneralizedGamma(), Pass(), SoftmaxTaylor(), Uniform(),
    UniformEpsilon(), rules.SignalTakesAll(), WSquare(), Winner(), ZBox(-1.0, 1.0), ZPlus(), rules.Zero(),
]  # fmt: skip


def test_structure_tells_every_rule_from_every_other():
    """`jit` looks compiled functions up by structure: two rules of equal structure may run as one another.

    jax < 0.12 finds trees equal whose nodes are different classes made with `register_dataclass`; one pair of classes
    in about a hundred then collides in the cache.
    """
    structures = [jax.tree.structure(rule) for rule in ONE_OF_EACH]
    equal = [
        (type(ONE_OF_EACH[i]).__name__, type(ONE_OF_EACH[j]).__name__)
        for i, one in enumerate(structures)
        for j, other in enumerate(structures)
        if i < j and one == other
    ]
    assert not equal


def test_trees_of_numbers_that_are_no_rules():
    """Gradients, differences and updates of composites are composites, negative or not."""
    for composite in (mixed(0.3, 0.5), composites.epsilon_alpha2_beta1(), composites.epsilon_gamma_box(-3.0, 4.0)):
        turned = jax.tree.map(lambda number: -number, composite)
        assert jax.tree.leaves(turned) == [-number for number in jax.tree.leaves(composite)]
        nothing = jax.tree.map(lambda one, other: one + other, composite, turned)
        assert not any(jax.tree.leaves(nothing))
        for placeholder in (None, object(), jnp.nan):
            jax.tree.map(lambda number, placeholder=placeholder: placeholder, composite)


MLP = models.mlp_parameters(4, 5, 3)
INPUT = models.rng(6).normal(size=(2, 4))


def mixed(epsilon, gamma) -> Composite:
    return Composite([(first(), GeneralizedGamma(gamma)), (kind("dense"), Epsilon(epsilon))])


def explain(composite, x=INPUT):
    return lrp(mlp, composite, target=1)(x, MLP)


NUMBERS = [(0.1, 0.25), (0.3, 0.5), (1.0, 2.0)]


def test_vmap_over_stacked_composites():
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(mixed(*pair) for pair in NUMBERS))
    singly = [explain(mixed(*pair)) for pair in NUMBERS]
    assert not np.allclose(singly[0], singly[1]) and not np.allclose(singly[1], singly[2])
    close(jax.jit(jax.vmap(explain))(stacked), np.stack(singly))


def test_vmap_over_one_number_of_a_composite():
    epsilons = jnp.array([0.1, 0.3, 1.0])
    got = jax.vmap(lambda epsilon: explain(mixed(epsilon, 0.5)))(epsilons)
    close(got, np.stack([explain(mixed(epsilon, 0.5)) for epsilon in (0.1, 0.3, 1.0)]))


def test_gradient_with_respect_to_a_composite():
    total = jax.jit(lambda composite: (explain(composite) ** 2).sum())
    gradient = jax.grad(total)(mixed(0.3, 0.5))
    assert isinstance(gradient, Composite)
    step = 1e-5
    for name, change in {"epsilon": (step, 0.0), "gamma": (0.0, step)}.items():
        up, down = (total(mixed(0.3 + sign * change[0], 0.5 + sign * change[1])) for sign in (1, -1))
        (got,) = [getattr(rule, name) for _, rule in gradient.rows if hasattr(rule, name)]
        assert abs(up - down) > 1e-9
        np.testing.assert_allclose(got, (up - down) / (2 * step), rtol=1e-6)


def test_new_numbers_do_not_retrace():
    traces = 0

    @jax.jit
    def explained(composite, x):
        nonlocal traces
        traces += 1
        return explain(composite, x)

    for pair in NUMBERS:
        close(explained(mixed(*pair), INPUT), explain(mixed(*pair)))
    assert traces == 1
    explained(mixed(0.4, 0.75), INPUT + 1)
    assert traces == 1
    # other rows are another program
    explained(composites.epsilon(0.1), INPUT)
    assert traces == 2
    explained(composites.epsilon(0.2), INPUT)
    assert traces == 2


def test_new_numbers_do_not_retrace_the_explained_function():
    traces = 0

    def counted(x, p):
        nonlocal traces
        traces += 1
        return mlp(x, p)

    explained = jax.jit(lambda composite, x: lrp(counted, composite, target=1)(x, MLP))
    for box in ((-3.0, 3.0), (-4.0, 5.0)):
        for epsilon in (1e-6, 0.1):
            explained(Composite([(first(), ZBox(*box)), (kind("dense"), Epsilon(epsilon))]), INPUT)
    assert traces == 1


def test_bounds_may_be_arrays():
    low, high = INPUT.min(0) - 1, INPUT.max(0) + 1
    box = lambda low, high: Composite([(first(), ZBox(low, high)), (kind("dense"), Epsilon(1e-6))])
    got = jax.jit(explain)(box(low, high))
    close(got, explain(box(low, high)))
    assert abs(got - explain(box(low.min(), high.max()))).max() > 1e-3


def test_numbers_may_be_of_any_dtype():
    right = explain(mixed(0.5, 0.25))
    for dtype in (np.float16, np.float32, np.float64):
        close(explain(mixed(dtype(0.5), jnp.asarray(0.25, dtype))), right)
        assert explain(mixed(dtype(0.5), dtype(0.25)), INPUT.astype(np.float32)).dtype == np.float32
    close(explain(mixed(1, 2)), explain(mixed(1.0, 2.0)))


# ---------------------------------------------------------------------------------------------------- plan


def test_plan_is_iterable():
    got = plan(cnn, composites.epsilon_plus())(X, P)
    assert len(got) == len(LAYERS) == len(list(got))
    assert [row.name for row in got] == LAYERS and got[0] is next(iter(got)) and got[-1].name == "last"
    stem = got[0]
    assert (stem.kind, stem.in_shapes, stem.out_shape) == ("conv", ((2, 8, 8, 3),), (2, 8, 8, 4))
    assert got[4].in_shapes == ((2, 8, 8, 4), (2, 8, 8, 4)) and got[-1].out_shape == (2, 5)


def test_plan_runs_nothing():
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (X, P))
    assert str(plan(cnn, composites.epsilon_plus())(*shapes)) == str(plan(cnn, composites.epsilon_plus())(X, P))


def test_plan_of_a_linen_model_in_one_line():
    model = nn.Dense(3)
    variables = model.init(jax.random.key(0), X)
    (row,) = plan(lambda x: model.apply(variables, x), composites.epsilon())(X)
    assert row.kind == "dense" and "Dense" in row.name


TITLES = ["name", "kind", "input", "output", "rule", "source"]


def cells(text: str) -> list[list[str]]:
    """The table of a printed plan, cut where the titles begin: text that does not line up gives wrong cells."""
    lines = text.splitlines()
    starts = [lines[0].index(title) for title in TITLES]
    ends = [*starts[1:], None]
    rows = [line for line in lines if "  " in line]
    for line in rows:
        assert all(line[start - 2 : start] == "  " for start in starts[1:] if start < len(line)), line
    return [[line[a:b].rstrip() for a, b in zip(starts, ends, strict=True)] for line in rows]


def test_plan_as_text():
    got = plan(cnn, composites.epsilon_gamma_box(-3.0, 4.0))(X, P)
    titles, rule, *rows = cells(str(got))
    assert titles == TITLES and all(set(cell) == {"-"} for cell in rule)
    assert len(rows) == len(got)
    assert [row[0] for row in rows] == LAYERS
    assert rows[0][:5] == ["stem", "conv", "(2, 8, 8, 3)", "(2, 8, 8, 4)", "ZBox(low=-3, high=4)"]
    assert rows[1][:5] == ["relu", "activation", "(2, 8, 8, 4)", "(2, 8, 8, 4)", "Pass() *"]
    assert rows[2][4] == "GeneralizedGamma(gamma=0.25)"
    assert rows[4][2] == "(2, 8, 8, 4) (2, 8, 8, 4)"
    assert rows[-1][:5] == ["last", "dense", "(2, 3)", "(2, 5)", "Epsilon(epsilon=1e-06)"]
    assert all(len(line) == len(line.rstrip()) for line in str(got).splitlines())
    assert repr(got) == str(got)


def test_plan_names_the_users_line():
    got = plan(cnn, composites.epsilon())(X, P)
    with open(__file__) as file:
        line = 1 + next(i for i, text in enumerate(file) if "models.plain_cnn(x, p)), p" in text)
    assert f"test_composites.py:{line} (cnn)" in got[-2].source
    assert all("models.py:" in row.source for row in got if row.name in ("stem", "block", "head", "max_pool"))


def test_plan_marks_what_comes_from_base():
    got = plan(cnn, composites.epsilon() + Composite([(kind("activation"), Pass())]))(X, P)
    marked = {row[0] for row in cells(str(got))[2:] if row[4].endswith(" *")}
    assert marked == {row.name for row in got if row.base} == {"add", "max_pool", "avg_pool", "reduce"}
    assert any(line.startswith("*") and "composites.base()" in line for line in str(got).splitlines())
    # nothing to mark, nothing to say
    only = str(plan(lambda x, w: x @ w, composites.epsilon())(np.zeros(3), np.ones((3, 2))))
    assert "*" not in only


@pytest.mark.parametrize(
    "selector, rule, words",
    [
        (kind("embedding", "resize"), Epsilon(0.125), ["embedding", "resize", "Epsilon", "0.125"]),
        (first("dense"), Flat(), ["dense", "Flat"]),
        (last("resize"), Pass(), ["resize", "Pass"]),
        (named("stem"), WSquare(), ["stem", "WSquare"]),  # shadowed by the row above
        (where(lambda op: False), Flat(), ["Flat"]),
    ],
)
def test_plan_lists_unused_rows(selector, rule, words):
    got = plan(cnn, composites.epsilon_plus() + Composite([(selector, rule)]))(X, P)
    (unused,) = got.unused
    assert all(word in unused for word in words), unused
    (line,) = [line for line in str(got).splitlines() if line.startswith("unused row")]
    assert unused in line
    assert got.to_dict()["unused"] == [unused]


def test_plan_without_unused_rows():
    got = plan(cnn, composites.epsilon_plus_flat())(X, P)
    assert got.unused == () and "unused" not in str(got)


@every_composite
def test_plan_as_json(composite, right):
    got = json.loads(json.dumps(plan(cnn, composite)(X, P).to_dict()))
    assert [row["name"] for row in got["rows"]] == LAYERS
    assert [row["rule"] for row in got["rows"]] == [type(rule).__name__ for _, rule in right]
    assert got["unused"] == [] and got["notes"] == []
    block, last_ = got["rows"][2], got["rows"][-1]
    assert block["in_shapes"] == [[2, 8, 8, 4]] and block["out_shape"] == [2, 8, 8, 4]
    assert last_["kind"] == "dense" and last_["base"] is False and got["rows"][1]["base"] is True
    assert got["rows"][4]["numbers"] == {"epsilon": 1e-9}


def test_plan_as_json_of_numbers_that_are_arrays():
    small, large = np.array([-3.0, -3.0, -4.0]), np.full(models.IMAGES[1:], 4.0)
    got = plan(cnn, composites.epsilon_gamma_box(small, jnp.asarray(large), epsilon=np.float32(0.5)))(X, P)
    rows = json.loads(json.dumps(got.to_dict()))["rows"]
    assert rows[0]["numbers"]["low"] == [-3.0, -3.0, -4.0]
    assert "8, 8, 3" in rows[0]["numbers"]["high"]  # 192 numbers are too many to read
    assert rows[-1]["numbers"] == {"epsilon": 0.5}
    cells(str(got))


def test_plan_inside_jit():
    """Numbers that are traced are shown as what they are."""
    seen = []

    @jax.jit
    def inside(composite, x):
        seen.append(plan(cnn, composite)(x, P))
        return x

    inside(composites.epsilon_gamma_box(-3.0, 4.0), X)
    (got,) = seen
    assert [row.name for row in got] == LAYERS
    json.dumps(got.to_dict())
    assert all("\n" not in cell for row in cells(str(got)) for cell in row)


def test_plan_shows_rules_of_the_user():
    @rules.rule
    class Damped(rules.Rule):
        factor: float = 0.5
        mode: str = "soft"

        def propagate(self, layer, relevance):
            return (self.factor * relevance,)

    got = plan(lambda x, w: x @ w, Composite([(kind("dense"), Damped(0.25))]))(np.zeros(3), np.ones((3, 3)))
    assert "Damped(factor=0.25)" in str(got)
    assert got.to_dict()["rows"][0]["numbers"] == {"factor": 0.25}  # the choice is the default one


def test_plan_does_not_change():
    got = plan(cnn, composites.epsilon())(X, P)
    with pytest.raises(AttributeError):
        got.rows = ()
    with pytest.raises(AttributeError):
        got[0].rule = Flat()


def test_composite_as_text():
    text = repr(composites.epsilon_plus_flat(epsilon=0.125))
    assert text.startswith("Composite(") and text.count("Flat") == 1 and "0.125" in text and "ZPlus" in text
