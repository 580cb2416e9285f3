"""Gates: which factor of a product is one, by its bounds or by a mark, and that the signal takes all."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxlrp import Composite, composites, lrp, plan, rewrite, rules
from jaxlrp.select import kind
from nets import close, draw, quick_compilation, same  # noqa: F401

GATES: dict[str, Callable] = {
    "sigmoid": jax.nn.sigmoid,
    "sigmoid by hand": lambda a: 1 / (1 + jnp.exp(-a)),
    "sigmoid from tanh": lambda a: 0.5 * jnp.tanh(a / 2) + 0.5,
    "hard sigmoid": jax.nn.hard_sigmoid,
    "clipped line": lambda a: jnp.clip(0.2 * a + 0.5, 0, 1),
    "rest": lambda a: 1 - jax.nn.sigmoid(a),
    "product of gates": lambda a: jax.nn.sigmoid(a) * jax.nn.sigmoid(2 * a),
    "mean of gates": lambda a: jnp.broadcast_to(jax.nn.sigmoid(a).mean(-1, keepdims=True), a.shape),
    "repeated gate": lambda a: jnp.repeat(jax.nn.sigmoid(a)[:, :1], 4, 1),
    "slice of a gate": lambda a: jax.nn.sigmoid(jnp.concatenate([a, a], 1))[:, 2:6],
    "split gate": lambda a: jnp.split(jax.nn.sigmoid(jnp.concatenate([a, a], 1)), 2, 1)[1],
    "masked gate": lambda a: jnp.where(a > 0, jax.nn.sigmoid(a), 0),
    "gate in half precision": lambda a: jax.nn.sigmoid(a.astype(jnp.bfloat16)).astype(a.dtype),
    "decay": lambda a: jnp.exp(-jax.nn.softplus(a)),
    "decay by logaddexp": lambda a: jnp.exp(-jnp.logaddexp(a, 0.0)),
    "decay by square": lambda a: jnp.exp(-(a**2) / 2),
    "softmax": jax.nn.softmax,
    "moved softmax": lambda a: jax.nn.softmax(a.T, 0).T,
    "one of a softmax": lambda a: jnp.broadcast_to(jax.nn.softmax(a)[:, 1:2], a.shape),
    "marked": lambda a: checkpoint_name(a, "gate"),
    "made from what is marked": lambda a: jax.nn.softplus(checkpoint_name(a, "gate")[:, ::-1] @ draw(50, 4, 4) + 1),
    "product of gates in a loop": lambda a: lax.scan(
        lambda g, _: (g * jax.nn.sigmoid(a), None), jnp.ones_like(a), None, length=2
    )[0],
    "either of two": lambda a: lax.cond(a.sum() > 0, jax.nn.sigmoid, lambda a: 1 - jax.nn.sigmoid(a), a),
}  # fmt: skip
NO_GATES: dict[str, Callable] = {
    "nothing": lambda a: a,
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "softplus": jax.nn.softplus,
    "silu": jax.nn.silu,
    "twice a sigmoid": lambda a: 2 * jax.nn.sigmoid(a),
    "less than a sigmoid": lambda a: jax.nn.sigmoid(a) - 0.5,
    "sum of gates": lambda a: jax.nn.sigmoid(a) + jax.nn.sigmoid(2 * a),
    "dense layer on a gate": lambda a: jax.nn.sigmoid(a) @ draw(51, 4, 4),
    "growth": lambda a: jnp.exp(jax.nn.softplus(a)),
    "growth by square": lambda a: jnp.exp(a**2),
    "log softmax": jax.nn.log_softmax,
    "another name": lambda a: checkpoint_name(a, "signal"),
    "made from what is marked, and from what is not": lambda a: a + checkpoint_name(a, "gate"),
    "sum of gates in a loop": lambda a: lax.scan(
        lambda g, _: (g + jax.nn.sigmoid(a), None), jnp.zeros_like(a), None, length=2
    )[0],
    "one of two": lambda a: lax.cond(a.sum() > 0, jax.nn.sigmoid, lambda a: 2 * jax.nn.sigmoid(a), a),
}  # fmt: skip
S, A, START = draw(52, 3, 4), draw(53, 3, 4), draw(54, 3, 4)
TAKES_ALL = Composite([(kind("product", "matmul"), rules.SignalTakesAll())]) + composites.epsilon()


def shares(f: Callable, *args, composite=TAKES_ALL, start=START):
    return lrp(f, composite, argnums=(0, 1), target=lambda y: start)(*args)


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_gates(gate):
    """On either side of the product."""
    same(shares(lambda s, a: jnp.sin(s) * gate(a), S, A), (START, jnp.zeros_like(A)))
    same(shares(lambda s, a: gate(a) * jnp.sin(s), S, A), (START, jnp.zeros_like(A)))
    assert not plan(lambda s, a: jnp.sin(s) * gate(a), TAKES_ALL, argnums=(0, 1))(S, A).notes


@pytest.mark.parametrize("factor", NO_GATES.values(), ids=NO_GATES)
def test_what_is_no_gate(factor):
    f = lambda s, a: jnp.sin(s) * factor(a)
    same(shares(f, S, A)[0], START / 2)
    (note,) = (n for n in plan(f, TAKES_ALL, argnums=(0, 1))(S, A).notes if "gate" in n)
    assert note.startswith("mul") and "test_gates.py" in note and note.endswith("each gets half")


def test_marks_come_before_bounds():
    """A signal between 0 and 1 is no gate where the model says which one is."""
    f = lambda s, a: jax.nn.sigmoid(s) * checkpoint_name(a, "gate")
    same(shares(f, S, A), (START, jnp.zeros_like(A)))


def test_both_are_gates():
    f = lambda s, a: jax.nn.sigmoid(s) * jax.nn.sigmoid(a)
    same(shares(f, S, A), (START / 2, START / 2))


def test_the_signal_by_hand():
    f = lambda s, a: jnp.sin(s) * jax.nn.sigmoid(a)
    for signal, right in (("first", (START, 0 * START)), ("second", (0 * START, START))):
        composite = Composite([(kind("product"), rules.SignalTakesAll(signal))])
        same(shares(f, S, A, composite=composite), right)


def test_the_numerator_is_the_signal():
    f = lambda s, a: jnp.sin(s) / jnp.exp(a)
    same(shares(f, S, A), (START, jnp.zeros_like(A)))
    composite = Composite([(kind("product"), rules.SignalTakesAll("second"))])
    same(shares(f, S, A, composite=composite), (jnp.zeros_like(A), START))


def test_a_signal_that_is_broadcast():
    s = draw(55, 1, 4)
    same(shares(lambda s, a: jnp.sin(s) * jax.nn.sigmoid(a), s, A), (START.sum(0, keepdims=True), jnp.zeros_like(A)))


def test_a_matrix_times_itself():
    x, start = draw(62, 4, 4), draw(63, 4, 4)
    s = start / (2 * x @ x)
    composite = Composite([(kind("matmul"), rules.SignalTakesAll("first", 0.0))])
    close(lrp(lambda x: x @ x, composite, target=lambda y: start)(x), x * (s @ x.T + x.T @ s))


def test_matrix_products():
    """Attention with its weights held constant: R_V = V * A^T (R / stab(A V)), the weights get nothing."""
    scores, V, start = draw(56, 3, 3), draw(57, 3, 4), draw(58, 3, 4)
    A = np.asarray(jax.nn.softmax(scores))
    y = A @ V
    right = V * (A.T @ (start / (y + 0.3 * np.where(y >= 0, 1, -1))))
    composite = Composite([(kind("matmul"), rules.SignalTakesAll(epsilon=0.3))])
    cases = {
        "weights first": lambda v, a: jax.nn.softmax(a) @ v,
        "weights second": lambda v, a: (v.T @ jax.nn.softmax(a).T).T,
        "einsum": lambda v, a: jnp.einsum("kd,qk->qd", v, jax.nn.softmax(a)),
        "marked": lambda v, a: checkpoint_name(jax.nn.softmax(a), "gate") @ v,
    }
    run = jax.jit(lambda *args: [shares(f, *args, composite=composite, start=start) for f in cases.values()])
    for got in run(V, scores):
        close(got[0], right)
        assert not got[1].any()


def test_matrix_products_without_a_gate():
    """Half each, which is the rule of AttnLRP; by hand, all to one."""
    V, W, start = draw(59, 3, 5), draw(60, 5, 4), draw(61, 3, 4)
    f = lambda v, w: jnp.sin(v) @ jnp.sin(w)
    attention = Composite([(kind("matmul"), rules.UniformEpsilon(0.2))])
    none, first, second = (
        shares(f, V, W, composite=Composite([(kind("matmul"), rules.SignalTakesAll(signal, 0.2))]), start=start)
        for signal in ("gated", "first", "second")
    )
    same(none, shares(f, V, W, composite=attention, start=start))
    y = jnp.sin(V) @ jnp.sin(W)
    s = start / (y + 0.2 * np.where(y >= 0, 1, -1))
    close(first[0], jnp.sin(V) * (s @ jnp.sin(W).T))
    close(second[1], jnp.sin(W) * (jnp.sin(V).T @ s))
    assert not first[1].any() and not second[0].any()


@pytest.mark.parametrize("rule", [rules.SignalTakesAll(), rules.Uniform()], ids=["signal", "uniform"])
def test_products_keep_nothing_of_the_forward_pass(rule):
    """A scan would else keep gates and signals of every step for a rule that does not read them."""
    composite = Composite([(kind("product"), rule), (kind("add"), rules.Uniform())])
    step = lambda c, x: (jax.nn.sigmoid(c) * jnp.sin(x) + c, None)
    f = rewrite(lambda x: lax.scan(step, jnp.ones(4), x)[0], composite)
    kept = jax.make_jaxpr(lambda x: jax.vjp(f, x)[1])(S)
    assert not kept.jaxpr.outvars
