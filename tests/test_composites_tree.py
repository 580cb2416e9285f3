"""Composites as pytrees: numbers are leaves, to be stacked, traced and differentiated; all else is structure."""

import jax
import jax.numpy as jnp
import numpy as np

import models
from composed import close, every_composite
from jaxlrp import Composite, composites, lrp, rules
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
from jaxlrp.select import first, kind, where
from models import mlp
from nets import quick_compilation  # noqa: F401


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
