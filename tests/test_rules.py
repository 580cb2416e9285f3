"""The rule table: every rule on every linear operation, against the paper's sum on the dense matrix (reference.py).

A new rule is one row of RULES; a new way to write a linear layer is one function in operations.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import product

import jax
import numpy as np
import pytest

import reference
from jaxlrp import Composite, lrp, plan, rules, select
from operations import OPERATIONS, Operation


@dataclass(frozen=True)
class Row:
    name: str
    rule: rules.Rule
    reference: Callable  # (a, layer, R) -> relevance of a

    def __str__(self) -> str:
        return self.name


RULES = [
    Row("zero", rules.Zero(), reference.zero),
    # so large that no test can pass without it
    Row("epsilon", rules.Epsilon(0.3), lambda a, layer, R: reference.epsilon(a, layer, R, eps=0.3)),
    Row("gamma", rules.Gamma(0.25), lambda a, layer, R: reference.gamma(a, layer, R, gamma=0.25)),
    Row(
        "generalized-gamma",
        rules.GeneralizedGamma(0.4),
        lambda a, layer, R: reference.generalized_gamma(a, layer, R, gamma=0.4),
    ),
    Row("zplus", rules.ZPlus(), reference.zplus),
    Row("alpha-beta", rules.AlphaBeta(2.0, 1.0), lambda a, layer, R: reference.alpha_beta(a, layer, R, 2.0, 1.0)),
    Row("wsquare", rules.WSquare(), reference.wsquare),
    Row("flat", rules.Flat(), reference.flat),
    Row("zbox", rules.ZBox(-3.0, 4.0), lambda a, layer, R: reference.zbox(a, layer, R, low=-3.0, high=4.0)),
]
BY_NAME = {operation.name: operation for operation in OPERATIONS}

every_rule = pytest.mark.parametrize("row", RULES, ids=str)
every_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=str)


def some_operations(*names: str):
    return pytest.mark.parametrize("operation", [BY_NAME[name] for name in names], ids=str)


def linear(rule: rules.Rule) -> Composite:
    return Composite([(select.kind("dense", "conv"), rule)])


def explain(function, rule, x, R, *parameters):
    """Relevance of x, where the outputs of `function` start with relevance R."""
    return lrp(function, linear(rule), target=lambda output: R)(x, *parameters)


@cache
def dense_layer(operation: Operation, with_bias: bool) -> reference.Layer:
    return reference.layer(operation.apply, operation.input, *operation.parameters(with_bias))


def expected(reference_rule: Callable, operation: Operation, with_bias: bool, x, R) -> np.ndarray:
    layer = dense_layer(operation, with_bias)
    return reference_rule(x.ravel(), layer, R.ravel()).reshape(x.shape)


def examples(operation: Operation) -> tuple[np.ndarray, np.ndarray]:
    """Three inputs, each with zeros among its values: signed, non-negative, sparse. And relevance of either sign."""
    rng = operation.rng("examples")
    signed, nonnegative, sparse = rng.normal(size=(3, *operation.input))
    signed.flat[1] = 0.0
    nonnegative.flat[2] = 0.0
    sparse[rng.random(sparse.shape) < 0.5] = 0.0
    return np.stack([signed, abs(nonnegative), sparse]), rng.normal(size=(3, *operation.output))


# ---------------------------------------------------------------------------------------------------- the table


@pytest.fixture(autouse=True)
def quick_compilation(request):
    """XLA's optimiser would take half of the time of the table. In float32 it stays on, as rounding depends on it."""
    jax.config.update("jax_disable_most_optimizations", "float32" not in request.node.name)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


CASES = [(sign, with_bias) for sign in ("any sign", "behind a relu") for with_bias in (True, False)]


@every_rule
@every_operation
def test_rule(operation: Operation, row: Row):
    """Inputs of any sign, and known to be non-negative, as a relu passes relevance; eager, compiled and batched."""
    xs, Rs = examples(operation)
    kernel, bias = operation.parameters(with_bias=True)

    def run(rule, x, R, kernel, bias):
        def function(x, kernel, bias, front):
            return operation.apply(front(x), kernel, bias)

        fronts = {"any sign": lambda x: x, "behind a relu": jax.nn.relu}
        return [
            explain(partial(function, front=fronts[sign]), rule, x, R, kernel, bias if with_bias else None)
            for sign, with_bias in CASES
        ]

    results = {
        "eager": [run(row.rule, x, R, kernel, bias) for x, R in zip(xs, Rs, strict=True)],
        # The rule is an argument, so its numbers are traced; elsewhere they are concrete.
        "jit": [jax.jit(run)(row.rule, x, R, kernel, bias) for x, R in zip(xs, Rs, strict=True)],
        "vmap": list(zip(*jax.vmap(run, (None, 0, 0, None, None))(row.rule, xs, Rs, kernel, bias), strict=True)),
    }
    dense_fronts = {"any sign": lambda x: x, "behind a relu": reference.positive}
    for (i, (sign, with_bias)), transform in product(enumerate(CASES), results):
        for got, x, R in zip(results[transform], xs, Rs, strict=True):
            right = expected(row.reference, operation, with_bias, dense_fronts[sign](x), R)
            where = f"{transform}, input {sign}, {'with' if with_bias else 'without'} bias"
            np.testing.assert_allclose(got[i], right, rtol=0, atol=1e-8, err_msg=where)


@every_operation
def test_operation_is_one_layer(operation: Operation):
    for with_bias in (True, False):
        table = plan(operation.apply, linear(rules.Zero()))(examples(operation)[0][0], *operation.parameters(with_bias))
        assert [row.kind for row in table if row.kind != "structural"] == [operation.kind], str(table)


@every_rule
@some_operations("dense", "einsum-per-head", "conv-strided-same", "conv-transposed", "conv-batch-norm")
def test_rule_float32(operation: Operation, row: Row):
    xs, Rs = (array.astype(np.float32) for array in examples(operation))
    for with_bias in (True, False):
        parameters = jax.tree.map(np.float32, operation.parameters(with_bias))
        for x, R in zip(xs, Rs, strict=True):
            got = explain(operation.apply, row.rule, x, R, *parameters)
            right = expected(row.reference, operation, with_bias, x.astype(np.float64), R.astype(np.float64))
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, right, rtol=0, atol=1e-4 * abs(right).max())


@every_rule
@some_operations("dense-per-position", "conv-2d", "flax-conv-batch-norm")
def test_closed_over_parameters(operation: Operation, row: Row):
    """The same numbers where parameters are constants of the function rather than arguments."""
    xs, Rs = examples(operation)
    kernel, bias = operation.parameters(with_bias=True)
    got = explain(lambda x: operation.apply(x, kernel, bias), row.rule, xs[0], Rs[0])
    right = expected(row.reference, operation, True, xs[0], Rs[0])
    np.testing.assert_allclose(got, right, rtol=0, atol=1e-8)


@every_rule
@some_operations("dense", "conv-2d")
def test_batched_parameters(operation: Operation, row: Row):
    """An ensemble: vmap over inputs, relevance and parameters together."""
    xs, Rs = examples(operation)
    kernel, bias = operation.parameters(with_bias=True)
    kernels, biases = np.stack([kernel, -2 * kernel, abs(kernel)]), np.stack([bias, bias, -bias])
    got = jax.vmap(lambda x, R, kernel, bias: explain(operation.apply, row.rule, x, R, kernel, bias))(
        xs, Rs, kernels, biases
    )
    for i in range(3):
        layer = reference.layer(operation.apply, operation.input, kernels[i], biases[i])
        right = row.reference(xs[i].ravel(), layer, Rs[i].ravel()).reshape(operation.input)
        np.testing.assert_allclose(got[i], right, rtol=0, atol=1e-8, err_msg=f"member {i}")


# ---------------------------------------------------------------------------------------------------- edges


@some_operations(
    "dense", "dense-batched", "einsum-weights-left", "einsum-two-contracting", "conv-asymmetric-padding", "conv-nchw",
    "preprocessing-then-conv",
)  # fmt: skip
def test_zbox_with_a_box_per_input(operation: Operation):
    """Bounds of the input's shape, in the input's own units also where preprocessing comes first."""
    xs, Rs = examples(operation)
    rng = operation.rng("box")
    low, high = xs.min(axis=0) - rng.random(operation.input), xs.max(axis=0) + rng.random(operation.input)
    for with_bias in (True, False):
        parameters = operation.parameters(with_bias)
        for x, R in zip(xs, Rs, strict=True):
            got = explain(operation.apply, rules.ZBox(low, high), x, R, *parameters)
            right = expected(
                lambda a, layer, R: reference.zbox(a, layer, R, low.ravel(), high.ravel()), operation, with_bias, x, R
            )
            np.testing.assert_allclose(got, right, rtol=0, atol=1e-8)


def test_zbox_with_a_box_per_channel():
    operation = BY_NAME["preprocessing-then-conv"]
    xs, Rs = examples(operation)
    low, high = np.array([-4.0, -5.0]), np.array([5.0, 4.0])
    got = explain(operation.apply, rules.ZBox(low, high), xs[0], Rs[0], *operation.parameters(True))
    box = (np.broadcast_to(bound, operation.input).ravel() for bound in (low, high))
    right = reference.zbox(xs[0].ravel(), dense_layer(operation, True), Rs[0].ravel(), *box).reshape(operation.input)
    np.testing.assert_allclose(got, right, rtol=0, atol=1e-8)


@every_rule
@some_operations("dense", "einsum-two-contracting-weights-left", "conv-strided-same", "conv-batch-norm")
def test_input_of_zeros(operation: Operation, row: Row):
    x, R = np.zeros(operation.input), examples(operation)[1][0]
    for with_bias in (True, False):
        for front in (lambda x: x, jax.nn.relu):
            function = lambda x, *parameters, front=front: operation.apply(front(x), *parameters)
            got = explain(function, row.rule, x, R, *operation.parameters(with_bias))
            right = expected(row.reference, operation, with_bias, x, R)
            np.testing.assert_allclose(got, right, rtol=0, atol=1e-8)


@every_rule
def test_denominators_of_zero(row: Row):
    """Outputs that cancel, that nothing reaches, or that one sign does not reach; and others that the bias cancels."""
    x = np.array([1.0, 1.0])
    kernel = np.array([[1.0, 0.0, -1.0, 1.0, 2.0], [-1.0, 0.0, -2.0, 3.0, -1.0]])
    R = np.array([1.0, -2.0, 3.0, 4.0, -5.0])
    for bias in (np.zeros(5), np.array([-1.0, 1.0, 3.0, -4.0, -1.0])):
        layer = reference.Layer(kernel, bias, np.ones((2, 5), bool))
        got = explain(lambda x, kernel, bias: x @ kernel + bias, row.rule, x, R, kernel, bias)
        np.testing.assert_allclose(got, row.reference(x, layer, R), rtol=0, atol=1e-8, err_msg=f"bias {bias}")


@some_operations("dense-weights-left", "conv-2d")
def test_pass(operation: Operation):
    xs, Rs = examples(operation)
    for with_bias in (True, False):
        got = explain(operation.apply, rules.Pass(), xs[0], Rs[0], *operation.parameters(with_bias))
        np.testing.assert_array_equal(got, Rs[0])


# ---------------------------------------------------------------------------------------------------- laws

two_operations = some_operations("dense-per-position", "conv-strided-same")


@every_rule
@two_operations
def test_linear_in_relevance(operation: Operation, row: Row):
    xs, Rs = examples(operation)
    first, second, both = (
        explain(operation.apply, row.rule, xs[0], R, *operation.parameters(True)) for R in (*Rs[:2], 3 * Rs[0] - Rs[1])
    )
    np.testing.assert_allclose(both, 3 * first - second, rtol=0, atol=1e-8)


def assert_equivalent(operation: Operation, one: rules.Rule, other: rules.Rule, with_bias=True, bias_of_other=True):
    xs, Rs = examples(operation)
    for x, R in zip(xs, Rs, strict=True):
        np.testing.assert_allclose(
            explain(operation.apply, one, x, R, *operation.parameters(with_bias)),
            explain(operation.apply, other, x, R, *operation.parameters(bias_of_other)),
            rtol=0,
            atol=1e-8,
        )


@two_operations
def test_gamma_of_zero_is_zero_rule(operation: Operation):
    assert_equivalent(operation, rules.Gamma(0.0), rules.Zero())
    assert_equivalent(operation, rules.GeneralizedGamma(0.0), rules.Zero())


@two_operations
def test_epsilon_of_zero_is_zero_rule(operation: Operation):
    assert_equivalent(operation, rules.Epsilon(0.0), rules.Zero())


@two_operations
def test_zplus_is_alpha_one(operation: Operation):
    assert_equivalent(operation, rules.ZPlus(), rules.AlphaBeta(1.0, 0.0))


@two_operations
def test_beta_of_the_talk(operation: Operation):
    assert_equivalent(operation, rules.AlphaBeta.from_beta(0.5), rules.AlphaBeta(1.5, 0.5))


@two_operations
def test_wsquare_of_equal_magnitudes_is_flat(operation: Operation):
    xs, Rs = examples(operation)
    kernel = np.where(operation.rng("signs").random(operation.kernel) < 0.5, -0.7, 0.7)
    np.testing.assert_allclose(
        explain(operation.apply, rules.WSquare(), xs[0], Rs[0], kernel, None),
        explain(operation.apply, rules.Flat(), xs[0], Rs[0], kernel, None),
        rtol=0,
        atol=1e-8,
    )


@two_operations
def test_box_of_nothing_is_zero_rule_without_bias(operation: Operation):
    assert_equivalent(operation, rules.ZBox(0.0, 0.0), rules.Zero(), with_bias=True, bias_of_other=False)


@pytest.mark.parametrize("row", [row for row in RULES if row.name != "epsilon"], ids=str)  # epsilon absorbs
@two_operations
def test_conserves_without_bias(operation: Operation, row: Row):
    """Positive weights and inputs leave no denominator at zero, but for z-, which then sends nothing."""
    xs, Rs = examples(operation)
    kernel = abs(operation.parameters(False)[0])
    total = {"alpha-beta": 2.0}.get(row.name, 1.0) * Rs[1].sum()
    got = explain(operation.apply, row.rule, xs[1], Rs[1], kernel, None)
    np.testing.assert_allclose(got.sum(), total, rtol=0, atol=1e-8)


# ---------------------------------------------------------------------------------------------------- the references


def test_references_by_hand():
    """One layer, worked on paper: c = [[2, -3], [-1, 6]], z = (4, -1), z+ = (5, 6), z- = (-1, -7)."""
    a = np.array([1.0, -1.0])
    layer = reference.Layer(
        w=np.array([[2.0, -3.0], [1.0, -6.0]]),
        b=np.array([3.0, -4.0]),
        connected=np.array([[True, True], [True, False]]),
    )
    R = np.array([1.0, 10.0])
    by_hand = {
        reference.zero: [2 / 4 + 10 * 3, -1 / 4 - 10 * 6],
        reference.epsilon: [2 / 5 + 10 * 3 / 2, -1 / 5 - 10 * 6 / 2],  # eps = 1
        reference.zplus: [2 / 5, 10 * 6 / 6],
        reference.alpha_beta: [2 * 2 / 5 - 10 * 3 / 7, -1 + 20],  # (2, 1)
        reference.gamma: [4 / 9 + 10 * -3 / 5, -1 / 9 + 10 * 12 / 5],  # gamma = 1
        reference.generalized_gamma: [4 / 9 + 10 * 6 / 8, -1 / 9 - 10 * 6 / 8],  # gamma = 1
        reference.wsquare: [4 / 5 + 10 * 9 / 45, 1 / 5 + 10 * 36 / 45],
        reference.flat: [1 / 2 + 10, 1 / 2],
        # box (-1, 2): q = [[2 + 2, -3 + 6], [-1 + 1, 6 + 12]]
        reference.zbox: [4 / 4 + 10 * 3 / 21, 10 * 18 / 21],
    }
    numbers = {
        reference.epsilon: (1.0,),
        reference.alpha_beta: (2.0, 1.0),
        reference.gamma: (1.0,),
        reference.generalized_gamma: (1.0,),
        reference.zbox: (-1.0, 2.0),
    }
    for rule, right in by_hand.items():
        got = rule(a, layer, R, *numbers.get(rule, ()))
        np.testing.assert_allclose(got, right, rtol=0, atol=1e-12, err_msg=rule.__name__)


@every_operation
def test_matrix_of_operation(operation: Operation):
    """The dense matrix is the operation: the references are worth nothing otherwise."""
    for with_bias in (True, False):
        layer, parameters = dense_layer(operation, with_bias), operation.parameters(with_bias)
        for x in examples(operation)[0]:
            right = np.ravel(operation.apply(x, *parameters))
            np.testing.assert_allclose(x.ravel() @ layer.w + layer.b, right, rtol=0, atol=1e-10)
        assert np.all(layer.connected[layer.w != 0])
        assert np.any(layer.connected[layer.w == 0])  # the zero weight of the kernel still has its taps
