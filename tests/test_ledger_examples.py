"""The ledger by example and for all of them together: targets, arguments, outputs, errors, and what it prints."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxlrp import Composite, errors, lrp
from jaxlrp.evaluate import conservation
from ledgers import (
    COLUMNS,
    EPSILON,
    FLAT,
    NETS,
    B,
    W,
    X,
    closes,
    draw,
    near,
    scanned,
    single_precision,  # noqa: F401
    stopped,
    tokens,
)
from nets import quick_compilation  # noqa: F401

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
