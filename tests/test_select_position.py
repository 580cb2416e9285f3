"""Selectors by position: first, last and depth go by the flow of data, not by the order in which layers are written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import models
from jaxlrp.analysis import analyse
from jaxlrp.select import depth, first, kind, last
from models import dense, mlp
from selection import layer, ops, selected

# ---------------------------------------------------------------------------------------------------- first, last


def test_first_by_data_flow_and_not_by_order():
    """The layer that is written last reads the input; the one that is written first does not."""

    def function(x, p):
        y = dense(jnp.tanh(dense(x, p["a"])), p["b"])
        return y + dense(x, p["c"])

    args = function, np.zeros(3), {k: layer(3, 3) for k in "abc"}
    assert selected(first(), *args) == ["a", "c"]
    assert selected(last(), *args) == ["b", "c"]


@pytest.mark.parametrize(
    "front",
    [
        lambda x: (x - 0.5) / 0.25,
        lambda x: x[:, ::-1].transpose(0, 2, 1).reshape(2, 12),
        lambda x: jnp.pad(x, ((0, 0), (1, 1), (0, 0))).reshape(2, -1),
        lambda x: jnp.concatenate([x, x], 1).reshape(2, 24),
        lambda x: jnp.where(np.arange(3) > 0, x, 0.0).reshape(2, -1),
        lambda x: x.astype(np.float32).reshape(2, -1),
    ],
)  # fmt: skip
def test_first_behind_what_only_moves_and_scales(front):
    x = np.zeros((2, 4, 3))
    width = front(jnp.asarray(x)).shape[-1]
    p = {"stem": layer(width, 3), "next": layer(3, 3)}
    assert selected(first(), lambda x, p: dense(jnp.tanh(dense(front(x), p["stem"])), p["next"]), x, p) == ["stem"]


@pytest.mark.parametrize(
    "front",
    [
        jnp.tanh,
        jax.nn.softmax,
        lambda x: x + jnp.tanh(x),
        lambda x: x * x,
        lambda x: x.mean(0, keepdims=True),
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2), (1, 1), "SAME"),
    ],
)
def test_not_first_behind_anything_else(front):
    assert selected(first(), lambda x, w: front(x) @ w, np.zeros((2, 4)), np.ones((4, 3))) == []


def test_first_reads_the_explained_argument_only():
    """What depends on no explained argument is a parameter."""
    function = lambda a, b, w, v: (a @ w) + jnp.tanh(b @ w) @ v
    a = b = np.zeros(3)
    w = v = np.ones((3, 3))
    assert selected(first(), function, a, b, w, v) == ["w"]
    traced = analyse(function, (a, b, w, v), {}, (0, 1))[1]
    assert [(op.name, op.first) for op in traced.ops() if op.kind == "dense"] == [
        ("w", True),
        ("w#2", True),
        ("v", False),
    ]


def test_second_layer_is_not_first_where_a_skip_leads_round_it():
    function = lambda x, p: dense(jnp.concatenate([x, jnp.tanh(dense(x, p["a"]))]), p["b"])
    assert selected(first(), function, np.zeros(3), {"a": layer(3, 3), "b": layer(6, 3)}) == ["a"]


def test_loop_that_reads_its_own_carry_is_not_first():
    w, v, u = np.ones((3, 3)), np.ones((2, 3)), np.ones((3, 3))

    def recurrent(xs, w, v, u):
        h, _ = lax.scan(lambda h, x: (jnp.tanh(h @ w + x @ v), None), jnp.zeros(3), xs)
        return h @ u

    assert selected(first(), recurrent, np.zeros((5, 2)), w, v, u) == ["v"]
    # a carry that begins with the input: the first turn reads it, the others do not
    deep = lambda x, w, u: lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=3)[0] @ u
    assert selected(first(), deep, np.zeros(3), w, u) == []
    # a carry that only moves
    still = lambda x, ws: lax.scan(lambda c, w: (c[::-1], c @ w), x, ws)[1]
    assert len(selected(first(), still, np.zeros(3), np.ones((4, 3, 3)))) == 1
    # two carries that change places: one is the input at first, the other never
    swap = lambda x, w: lax.scan(lambda c, _: ((jnp.tanh(c[1]), c[0] @ w), None), (x, x), None, length=3)[0]
    assert selected(first(), swap, np.zeros(3), w) == []


def test_first_in_the_branches_of_a_cond():
    function = lambda x, p, c: dense(lax.cond(c, lambda x: dense(x, p["a"]), lambda x: x @ p["b"]["kernel"], x), p["c"])
    args = function, np.zeros(3), {k: layer(3, 3) for k in "abc"}, np.array(True)
    found = {op.name: (op.first, op.depth) for op in ops(*args) if op.kind == "dense"}
    assert found == {"a": (True, 0), "b": (True, 0), "c": (False, 1)}


def test_last_does_not_stop_at_a_loop():
    w, u = np.ones((3, 3)), np.ones((3, 3))
    deep = lambda x, w, u: lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=3)[0] @ u
    assert selected(last(), deep, np.zeros(3), w, u) == ["u"]


# ---------------------------------------------------------------------------------------------------- depth


def test_depth_of_a_chain():
    p = models.mlp_parameters(2, 3, 4, 5, 6)
    args = mlp, np.zeros(2), p
    names = ["0", "1", "2", "3"]
    for i in range(4):
        assert selected(depth(i, i + 1) & kind("dense"), *args) == names[i : i + 1]
        assert selected(depth(i - 4, i - 3 if i < 3 else None) & kind("dense"), *args) == names[i : i + 1]
        assert selected(depth(i) & kind("dense"), *args) == names[i:]
        assert selected(depth(None, i) & kind("dense"), *args) == names[:i]
    assert selected(depth(4), *args) == [] and selected(depth(None, -4), *args) == []


def test_depth_counts_the_longest_path():
    """Of a residual branch of two layers and a skip, the branch counts."""

    def function(x, p):
        y = dense(x, p["a"])
        y = y + dense(jnp.tanh(dense(jnp.tanh(y), p["b"])), p["c"])
        return dense(jnp.tanh(y), p["d"])

    found = {op.name: (op.depth, op.height) for op in ops(function, np.zeros(3), {k: layer(3, 3) for k in "abcd"})}
    assert {k: found[k] for k in "abcd"} == {"a": (0, 3), "b": (1, 2), "c": (2, 1), "d": (3, 0)}
    assert found["add"] == (3, 1)


def test_depth_of_a_side_branch_counts_from_either_end():
    function = lambda x, p: dense(jnp.tanh(dense(jnp.tanh(dense(x, p["a"])), p["b"])), p["c"]) + dense(x, p["d"])
    args = function, np.zeros(3), {k: layer(3, 3) for k in "abcd"}
    assert selected(depth(0, 1) & kind("dense"), *args) == ["a", "d"]
    assert selected(depth(-1) & kind("dense"), *args) == ["c", "d"]


def test_depth_counts_a_loop_body_once():
    w, u = np.ones((3, 3)), np.ones((3, 3))
    deep = lambda x, w, u: lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=3)[0] @ u
    assert [(op.name, op.depth, op.height) for op in ops(deep, np.zeros(3), w, u) if op.kind == "dense"] == [
        ("w", 0, 1),
        ("u", 1, 0),
    ]
