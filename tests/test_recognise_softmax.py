"""Recognition of softmax: it is one layer, from its logits on; `logits` gives what comes before it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from activations import LOG_SOFTMAXES, SOFTMAXES
from jaxlrp import Composite, logits, lrp, plan
from models import dense
from nets import quick_compilation  # noqa: F401
from recognition import ACT, ADD, COMPOSITE, DENSE, MOVE, REDUCE, SOFTMAX, WRAPS, close, every_wrap, rows

ENDS = {f"softmax, {k}": f for k, f in SOFTMAXES.items()} | {f"log_softmax, {k}": f for k, f in LOG_SOFTMAXES.items()}
every_end = pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)


def classifier(end: Callable) -> tuple[Callable, tuple]:
    p = models.mlp_parameters(5, 4, 3)
    return lambda x, p: end(models.mlp(x, p)), (models.rng(40).normal(size=(2, 5)), p)


@every_end
def test_softmax_is_one_layer_and_the_plan_says_so(end: Callable):
    function, arrays = classifier(end)
    for title, wrap in WRAPS.items():
        table = plan(wrap(function), COMPOSITE)(*arrays)
        got = [(row.kind, type(row.rule).__name__) for row in table]
        assert got == [DENSE, ACT, DENSE, SOFTMAX], f"{title}\n{table}"
        assert len(table.notes) == 1 and "jaxlrp.logits(" in table.notes[0], title
        assert table.notes[0] in str(table) and table[-1].name in table.notes[0]


@every_wrap
@every_end
def test_logits(end: Callable, wrap):
    function, (x, p) = classifier(end)
    before = logits(wrap(function))
    close(before(x, p), models.mlp(x, p))
    assert rows(before, x, p) == [DENSE, ACT, DENSE]
    assert not plan(before, COMPOSITE)(x, p).notes


def test_relevance_of_logits():
    x, p = classifier(jax.nn.softmax)[1]
    right = lrp(models.mlp, COMPOSITE, target=1)(x, p)
    for end in (jax.nn.softmax, jax.nn.log_softmax, SOFTMAXES["by hand, shifted"]):
        close(lrp(logits(classifier(end)[0]), COMPOSITE, target=1)(x, p), right)
        close(jax.jit(lrp(logits(jax.jit(classifier(end)[0])), COMPOSITE, target=1))(x, p), right)


@pytest.mark.parametrize("end", SOFTMAXES.values(), ids=SOFTMAXES)
def test_softmax_rule_is_applied_to_the_raw_logits(end: Callable):
    """R_i = z_i (R_i - s_i sum_j R_j) changes when logits are shifted: z - max(z) would be something else."""
    z = np.array([[1.0, -2.0, 0.5], [3.0, 0.0, 3.5]])
    s = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    R = s * [0, 1, 0]
    close(lrp(end, Composite(), target=1)(z), z * (R - s * R.sum(-1, keepdims=True)))


@pytest.mark.parametrize("end", LOG_SOFTMAXES.values(), ids=LOG_SOFTMAXES)
def test_log_softmax_has_one_relevance(end: Callable):
    z = np.array([[1.0, -2.0, 0.5], [3.0, 0.0, 3.5]])
    close(lrp(end, Composite(), target=1)(z), lrp(jax.nn.log_softmax, Composite(), target=1)(z))


def test_logits_of_a_function_without_softmax():
    x, p = classifier(jax.nn.softmax)[1]
    close(logits(models.mlp)(x, p), models.mlp(x, p))
    # a softmax on the way is no end
    inner = lambda x, p: dense(jax.nn.softmax(dense(x, p[0])), p[1])
    close(logits(inner)(x, p), inner(x, p))
    assert rows(inner, x, p) == [DENSE, SOFTMAX, DENSE] and not plan(inner, COMPOSITE)(x, p).notes


@pytest.mark.parametrize(
    "behind", [lambda y: y[0], lambda y: y.squeeze(), lambda y: y.T, lambda y: y.astype("float32")]
)
def test_softmax_behind_a_move_is_an_end(behind: Callable):
    """A model of batches, explained for one image: `softmax(model(x[None]))[0]`."""
    p = models.mlp_parameters(5, 4, 3)
    x = models.rng(40).normal(size=5)
    function = lambda x, p: behind(jax.nn.softmax(models.mlp(x[None], p)))
    table = plan(function, COMPOSITE)(x, p)
    assert [row for row in rows(function, x, p) if row != MOVE] == [DENSE, ACT, DENSE, SOFTMAX]
    assert len(table.notes) == 1, str(table)
    close(logits(function)(x, p), behind(models.mlp(x[None], p)), 1e-6)


BEFORE_SOFTMAX: dict[str, tuple[Callable, list[tuple[str, str]]]] = {
    "temperature": (lambda h: h / 0.5, []),
    "centred": (lambda h: h - h.mean(-1, keepdims=True), [REDUCE, ADD]),
    "difference of halves": (lambda h: h[:, :2] - h[:, 2:], [MOVE, MOVE, ADD]),
    "differences of pairs": (lambda h: h[:, None] - h[None], [MOVE, MOVE, ADD]),
    "softmax": (jax.nn.softmax, [SOFTMAX]),
    "activation": (jnp.tanh, [ACT]),
}


@pytest.mark.parametrize("front, between", BEFORE_SOFTMAX.values(), ids=BEFORE_SOFTMAX)
def test_softmax_begins_at_its_logits(front: Callable, between: list):
    """And not at a difference before them; the relevance of the logits is the rule's."""
    x, w = models.rng(42).normal(size=(2, 5)), models.rng(43).normal(size=(5, 4))
    function = lambda x, w: jax.nn.softmax(front(x @ w))
    assert rows(function, x, w) == [DENSE, *between, SOFTMAX]
    relevance = lrp(function, COMPOSITE, target=lambda y: y**2)(x, w)
    in_two = lambda R: lrp(lambda x, w: front(x @ w), COMPOSITE, target=lambda z: R)(x, w)
    z = np.asarray(front(jnp.asarray(x @ w)))
    s = np.asarray(jax.nn.softmax(z))
    close(relevance, in_two(z * (s**2 - s * (s**2).sum(-1, keepdims=True))))


NO_SOFTMAX: dict[str, Callable] = {
    "logits times exponentials": lambda h: h * (e := jnp.exp(h)) / e.sum(-1, keepdims=True),
    "other exponentials below": lambda h: jnp.exp(h) / jnp.exp(-h).sum(-1, keepdims=True),
    "squares above": lambda h: (e := jnp.exp(h)) ** 2 / e.sum(-1, keepdims=True),
    "square root of the sum": lambda h: (e := jnp.exp(h)) / jnp.sqrt(e.sum(-1, keepdims=True)),
    "mean": lambda h: (e := jnp.exp(h)) / e.mean(-1, keepdims=True),
    "sum of relus": lambda h: (e := jax.nn.relu(h)) / e.sum(-1, keepdims=True),
    "another value less logsumexp": lambda h: jnp.tanh(h) - jnp.log(jnp.exp(h).sum(-1, keepdims=True)),
    "twice the value less logsumexp": lambda h: 2 * h - jnp.log(jnp.exp(h).sum(-1, keepdims=True)),
    "without the logarithm": lambda h: h - jnp.exp(h).sum(-1, keepdims=True),
}


@pytest.mark.parametrize("function", NO_SOFTMAX.values(), ids=NO_SOFTMAX)
def test_what_is_no_softmax(function: Callable):
    """An exponential, a sum and a quotient do not make one: its rule would take the output for probabilities."""
    x, w = models.rng(42).normal(size=(2, 5)), models.rng(43).normal(size=(5, 4))
    assert SOFTMAX not in rows(lambda x, w: function(x @ w), x, w)


def test_softmax_over_another_axis_and_with_a_mask():
    z, v = models.rng(41).normal(size=(2, 3)), np.ones((3, 3))
    mask = np.array([True, False, True])
    assert rows(lambda z, v: jax.nn.softmax(z @ v, axis=0), z, v) == [DENSE, SOFTMAX]
    assert rows(lambda z, v: jax.nn.softmax(z @ v, axis=(0, 1)), z, v) == [DENSE, SOFTMAX]
    masked = lambda z, v, mask: jax.nn.softmax(jnp.where(mask, z @ v, -jnp.inf))
    assert rows(masked, z, v, mask) == [DENSE, MOVE, SOFTMAX]
    assert np.isfinite(lrp(masked, COMPOSITE, target=0)(z, v, mask)).all()
