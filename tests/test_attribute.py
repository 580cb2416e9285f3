"""What a person calls: where relevance starts, what it is explained for, what comes back, and `logits`."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nets
from jaxlrp import composites, logits, lrp, plan, rewrite, rules, select, value_and_lrp
from nets import LOCAL, close, draw, quick_compilation, same  # noqa: F401

EPSILON, ZERO = composites.epsilon(0.1), LOCAL["zero"]
PARAMETERS = nets.mlp_parameters(4, 6, 3)
MLP = partial(nets.mlp, PARAMETERS)
X = draw(1, 5, 4)
W, V = draw(2, 4, 3), draw(3, 2, 3)


def pulled(f, x, R):
    """Relevance of x where relevance R starts, by the VJP of `rewrite`."""
    value, pull = jax.vjp(rewrite(f, EPSILON), x)
    return pull(R)[0]


def one_hot(y, classes):
    return y * np.eye(3)[classes]


# ---------------------------------------------------------------------------------------------------- targets


def test_none_starts_with_every_output():
    close(lrp(MLP, EPSILON)(X), pulled(MLP, X, MLP(X)))
    close(lrp(MLP, EPSILON)(X[0]), pulled(MLP, X[0], MLP(X[0])))


@pytest.mark.parametrize("integer", [int, np.int32, np.uint8, np.asarray, jnp.asarray, jnp.int8])
def test_integer_starts_with_that_logit(integer):
    close(lrp(MLP, EPSILON, target=integer(2))(X), pulled(MLP, X, one_hot(MLP(X), [2])))
    close(lrp(MLP, EPSILON, target=integer(0))(X[0]), pulled(MLP, X[0], one_hot(MLP(X[0]), 0)))


def test_integer_array_starts_with_one_logit_per_example():
    classes = [2, 0, 1, 1, 2]
    right = jnp.stack([lrp(MLP, EPSILON, target=t)(x) for t, x in zip(classes, X, strict=True)])
    for integers in (np.asarray(classes), jnp.asarray(classes, np.int8), classes):
        close(lrp(MLP, EPSILON, target=integers)(X), right)
    close(jax.vmap(lambda t, x: lrp(MLP, EPSILON, target=t)(x))(np.asarray(classes), X), right)


def test_relevance_of_the_targets_adds_up():
    close(sum(lrp(MLP, EPSILON, target=t)(X) for t in range(3)), lrp(MLP, EPSILON)(X))


def test_traced_target():
    """It selects; out of range, and negative, it selects nothing: never another class."""
    explain = jax.jit(lambda t, x: lrp(MLP, EPSILON, target=t)(x))
    for t in range(3):
        close(explain(t, X), lrp(MLP, EPSILON, target=t)(X))
        close(explain(t, X[0]), lrp(MLP, EPSILON, target=t)(X[0]))
    for t in (3, 100, -1, -3):
        assert not np.any(explain(t, X)) and not np.any(explain(t, X[0]))
    per_example = explain(np.asarray([2, 3, -1, 0, 1]), X)
    close(per_example[::3], lrp(MLP, EPSILON, target=np.asarray([2, 0]))(X[::3]))
    assert not np.any(per_example[1:3])


def test_jit_takes_the_top_class():
    explain = jax.jit(lambda x: lrp(MLP, EPSILON, target=MLP(x).argmax(-1))(x))
    close(explain(X), lrp(MLP, EPSILON, target=np.asarray(MLP(X).argmax(-1)))(X))


def test_target_beside_a_logit_of_minus_infinity():
    """A class that is masked out says nothing about the others."""
    mask = jnp.log(jnp.asarray([1.0, 0.0, 1.0]))
    f = lambda x: x @ W + mask
    for target in (0, 2, np.asarray([0, 2, 0, 2, 0])):
        close(lrp(f, ZERO, target=target)(X), lrp(lambda x: x @ W, ZERO, target=target)(X))


def top_class(y):
    return y * (y == y.max(-1, keepdims=True))


CALLABLES = {
    "contrastive": lambda y: y * np.asarray([1, -1, 0]),
    "top class": top_class,
    "several classes": lambda y: y.at[:, 1].set(0),
    "not the logit's value": lambda y: jnp.ones_like(y),
    "numpy": lambda y: np.arange(15.0).reshape(5, 3),
}


@pytest.mark.parametrize("target", CALLABLES.values(), ids=CALLABLES)
def test_callable_gives_the_start(target):
    close(lrp(MLP, EPSILON, target=target)(X), pulled(MLP, X, jnp.asarray(target(MLP(X)))))


def test_callable_is_cast_to_the_output():
    x = X.astype(np.float32)
    f = lambda x: x @ W.astype(np.float32)
    relevance = lrp(f, EPSILON, target=lambda y: np.ones(y.shape, int))(x)
    assert relevance.dtype == np.float32
    close(relevance, lrp(f, EPSILON, target=jnp.ones_like)(x))


def pytree(x):
    y = MLP(x)
    return {"logits": y, "more": [jnp.tanh(y[:, 0]), y.argmax(-1)]}


def test_pytree_of_outputs():
    y = pytree(X)
    explain = partial(lrp, pytree, EPSILON)
    head = lrp(lambda x: jnp.tanh(MLP(x)[:, 0]), EPSILON)(X)
    close(explain()(X), lrp(MLP, EPSILON)(X) + head)
    target = lambda y: {"logits": one_hot(y["logits"], 1), "more": [0 * y["more"][0], y["more"][1]]}
    close(explain(target=target)(X), lrp(MLP, EPSILON, target=1)(X))
    value, _ = value_and_lrp(pytree, EPSILON, target=target)(X)
    close(value, y)


def test_one_output_in_a_container_takes_an_integer():
    close(lrp(lambda x: {"logits": MLP(x)}, EPSILON, target=1)(X), lrp(MLP, EPSILON, target=1)(X))


# ---------------------------------------------------------------------------------------------------- arguments


def bilinear(p, x, z):
    return jax.nn.relu(x["a"] @ p) + jnp.tanh(x["b"] @ p) + z @ V


ARGS = W, {"a": X, "b": draw(4, 5, 4)}, draw(5, 5, 2)


def test_argnums():
    """Any argument, counted from either end; several as a tuple, in the order that was asked for."""
    third = lrp(lambda z: bilinear(*ARGS[:2], z), EPSILON)(ARGS[2])
    for argnums in (2, -1):
        # what is not explained is a constant that is added
        close(lrp(bilinear, EPSILON, argnums=argnums)(*ARGS), third)
    pair, swapped = (lrp(bilinear, EPSILON, argnums=argnums)(*ARGS) for argnums in ((1, 2), [2, 1]))
    assert isinstance(pair, tuple) and isinstance(swapped, tuple)
    close(pair, swapped[::-1])
    (alone,) = lrp(bilinear, EPSILON, argnums=(2,))(*ARGS)
    close(alone, third)


def test_pytree_argument():
    relevance = lrp(bilinear, ZERO, argnums=1)(*ARGS)
    assert jax.tree.map(jnp.shape, relevance) == {"a": (5, 4), "b": (5, 4)}
    # all by all: the sum of both branches, of which each leaf is in one
    each = {name: lrp(f, ZERO)(ARGS[1][name]) for name, f in {
        "a": lambda a: bilinear(W, ARGS[1] | {"a": a}, ARGS[2]),
        "b": lambda b: bilinear(W, ARGS[1] | {"b": b}, ARGS[2]),
    }.items()}  # fmt: skip
    close(relevance, each, 1e-5)


def test_explained_parameters():
    """The first argument explained, the second is what it multiplies: the roles are by argnums, not by name."""
    relevance = lrp(lambda w, x: x @ w, ZERO)(W, X)
    close(relevance, W * (X.T @ np.ones((5, 3))), 1e-8)


def test_argument_that_matters_not():
    relevance = lrp(lambda x: x["used"] @ W, EPSILON)({"used": X, "unused": draw(6, 7)})
    assert np.any(relevance["used"]) and relevance["unused"].shape == (7,) and not np.any(relevance["unused"])


def test_empty_and_missing_leaves():
    relevance = lrp(lambda x: x["a"] @ W, EPSILON)({"a": X, "none": None, "empty": ()})
    assert jax.tree.structure(relevance) == jax.tree.structure({"a": 0, "none": None, "empty": ()})
    assert lrp(MLP, EPSILON)(X[:0]).shape == (0, 4)


def test_python_and_numpy_numbers():
    relevance = lrp(lambda x, y: x * W.sum() + y, ZERO)(2.0, 1.0)
    assert relevance.shape == () and isinstance(relevance, jax.Array)
    close(relevance, 2.0 * W.sum(), 1e-6)
    close(lrp(MLP, EPSILON)(np.asarray(X)), lrp(MLP, EPSILON)(X))


# ---------------------------------------------------------------------------------------------------- results


def test_value_is_the_functions_output():
    for f in (bilinear, lambda *args: {"y": bilinear(*args), "n": (3, args[1]["a"] > 0, 2.0, W)}):
        value, relevance = value_and_lrp(f, EPSILON, argnums=1)(*ARGS)
        right = f(*ARGS)
        assert jax.tree.map(jnp.result_type, value) == jax.tree.map(jnp.result_type, right)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), value, right)
        close(relevance, lrp(f, EPSILON, argnums=1)(*ARGS))
        same(rewrite(f, EPSILON, argnums=1)(*ARGS), right)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("parameters", [np.float64, np.float32])
def test_relevance_has_the_dtype_of_its_argument(dtype, parameters):
    p = jax.tree.map(lambda v: v.astype(parameters), PARAMETERS)
    args = {"a": X.astype(dtype), "b": X}
    relevance = jax.jit(lrp(lambda x: nets.mlp(p, x["a"]) + nets.mlp(p, x["b"]), EPSILON, target=1))(args)
    assert relevance["a"].dtype == dtype and relevance["b"].dtype == np.float64
    close(relevance["a"], relevance["b"], 0.1)


def test_names_and_docstrings_stay():
    def classify(x):
        """Says what is seen."""

    verbs = [partial(f, classify, EPSILON) for f in (rewrite, lrp, value_and_lrp, plan)] + [partial(logits, classify)]
    for verb in verbs:
        assert verb().__name__ == "classify" and verb().__doc__ == "Says what is seen."


class Model:
    """A callable with state and without a name."""

    def __call__(self, x):
        return MLP(x)

    def method(self, x, scale=1.0):
        return scale * MLP(x)


@pytest.mark.parametrize(
    "f",
    [Model(), Model().method, partial(nets.mlp, PARAMETERS), jax.jit(MLP), jnp.tanh],
    ids=["instance", "method", "partial", "jit", "function"],
)
def test_any_callable(f):
    close(lrp(f, EPSILON)(X), lrp(lambda x: f(x), EPSILON)(X))


# --------------------------------------------------------------------------------------- relevance inside the network


def hidden(x):
    """What MLP computes up to its relu."""
    w, b = PARAMETERS[0]
    return jax.nn.relu(x @ w + b)


def rest(y):
    w, b = PARAMETERS[1]
    return y @ w + b


def test_layers_report_the_relevance_that_arrives():
    """At their outputs, by their names in the plan; nothing else changes."""
    value, relevance, layers = value_and_lrp(MLP, EPSILON, target=1, layers=select.kind("dense", "activation"))(X)
    close((value, relevance), value_and_lrp(MLP, EPSILON, target=1)(X))
    arrived = lrp(rest, EPSILON, target=1)(hidden(X))
    close(layers, {"dense[0]": arrived, "relu": arrived, "dense[1]": one_hot(MLP(X), [1])})


def test_layers_of_a_scan_have_its_iterations_in_front():
    stacked = jax.tree.map(lambda *vs: jnp.stack(vs), LAYER, LAYER)

    def scanned(x):
        return jax.lax.scan(lambda x, p: (nets.layer(x, p), None), x, stacked)[0]

    *_, layers = value_and_lrp(scanned, EPSILON, layers=select.kind("dense"))(X)
    *_, right = value_and_lrp(lambda x: nets.layer(nets.layer(x, LAYER), LAYER), EPSILON, layers=select.kind("dense"))(
        X
    )
    (name,) = layers
    close(layers[name], jnp.stack([right["dense[0]"], right["dense[1]"]]))


LAYER = draw(7, 4, 4), draw(8, 4)


def test_masks_condition_on_a_layer():
    """Relevance through one channel at a time adds up to all of it."""
    masks = np.eye(6)
    each = jnp.stack([lrp(MLP, EPSILON, target=1, masks={"relu": mask})(X) for mask in masks])
    close(each.sum(0), lrp(MLP, EPSILON, target=1)(X))
    arrived = lrp(rest, EPSILON, target=1)(hidden(X))
    close(each, jnp.stack([lrp(hidden, EPSILON, target=lambda y, m=mask: m * arrived)(X) for mask in masks]))
    close(jax.vmap(lambda mask: lrp(MLP, EPSILON, target=1, masks={"relu": mask})(X))(masks), each)


# ---------------------------------------------------------------------------------------------------- plan


def test_plan_runs_nothing_and_takes_shapes():
    ran = []

    def f(p, x):
        jax.debug.callback(ran.append, p[0][1].sum())
        return nets.mlp(p, x)

    shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), (PARAMETERS, X))
    table = plan(f, EPSILON, argnums=1)(*shapes)
    jax.effects_barrier()
    assert not ran
    assert [(row.name, row.kind) for row in table if row.kind == "dense"] == [("0", "dense"), ("1", "dense")]
    assert str(table) == str(plan(f, EPSILON, argnums=1)(PARAMETERS, X))


def test_plan_is_plain_data():
    composite = composites.Composite([(select.first("dense"), rules.ZBox(-np.ones(4), 1.0))]) + EPSILON
    table = plan(nets.mlp, composite, argnums=1)(PARAMETERS, X)
    rows = json.loads(json.dumps(table.to_dict()))["rows"]
    assert [row["rule"] for row in rows] == [type(row.rule).__name__ for row in table] == ["ZBox", "Pass", "Epsilon"]
    assert rows[0]["numbers"] == {"low": [-1.0] * 4, "high": 1.0} and [row["base"] for row in rows] == [
        False,
        True,
        False,
    ]
    assert len(table) == 3 and table[1].kind == "activation" and "ZBox" in str(table)


# ---------------------------------------------------------------------------------------------------- logits

ENDS = {
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "by hand": lambda y: jnp.exp(y) / jnp.exp(y).sum(-1, keepdims=True),
    "shifted by hand": lambda y: (e := jnp.exp(y - y.max(-1, keepdims=True))) / e.sum(-1, keepdims=True),
    "jit": jax.jit(jax.nn.softmax),
    "neither": lambda y: y,
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_logits(end):
    """What enters the final softmax, whose relevance is then that of the function without it."""
    f = logits(lambda p, x: end(nets.mlp(p, x)))
    close(f(PARAMETERS, X), MLP(X))
    close(jax.jit(f)(PARAMETERS, X), MLP(X))
    close(lrp(f, EPSILON, argnums=1, target=1)(PARAMETERS, X), lrp(MLP, EPSILON, target=1)(X))


def test_logits_leaves_an_inner_softmax():
    f = lambda x: jax.nn.softmax(MLP(x)) @ V.T
    close(logits(f)(X), f(X))


def test_plan_says_where_a_softmax_ends():
    softmax = lambda x: jax.nn.softmax(MLP(x))
    (note,) = plan(softmax, EPSILON)(X).notes
    assert "logits" in note and "test_attribute.py" in note
    assert not plan(logits(softmax), EPSILON)(X).notes
