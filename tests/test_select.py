"""Selectors: which layers a row of a composite is for."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import models
from jaxlrp import Composite, composites, kinds, plan, rules, select
from jaxlrp.analysis import analyse
from jaxlrp.errors import SelectorError
from jaxlrp.program import Op
from jaxlrp.select import depth, everything, first, kind, last, named, where
from models import conv, dense, mlp


def ops(function: Callable, *args) -> list[Op]:
    return list(analyse(function, args, {}, 0)[1].ops())


def selected(selector: select.Selector, function: Callable, *args) -> list[str]:
    """Names of the layers that the selector picks, in program order."""
    found = ops(function, *args)
    selector.check(found)
    return [op.name for op in found if selector.matches(op)]


# A net with two stems, two heads and a layer of every common kind.
#
#   x --- left: conv - relu --- add - max_pool --- trunk: conv - relu - mean --- neck: dense - tanh --- head: dense
#     \-- right: conv - relu -/                                                                   \--- side: dense


def forked(x, p):
    left = jax.nn.relu(conv(x, p["left"]["kernel"]))
    right = jax.nn.relu(conv(x, p["right"]["kernel"]))
    y = models.max_pool(left + right)
    y = jax.nn.relu(conv(y, p["trunk"]["kernel"])).mean((1, 2))
    y = jnp.tanh(dense(y, p["neck"]))
    return dense(y, p["head"]), dense(y, p["side"])


def kernel(*shape: int) -> dict[str, np.ndarray]:
    return {"kernel": np.ones(shape)}


def layer(*shape: int) -> dict[str, np.ndarray]:
    return {"kernel": np.ones(shape), "bias": np.ones(shape[-1])}


FORKED = (
    forked,
    np.zeros((2, 8, 8, 3)),
    {
        "left": kernel(3, 3, 3, 4),
        "right": kernel(3, 3, 3, 4),
        "trunk": kernel(3, 3, 4, 4),
        "neck": layer(4, 5),
        "head": layer(5, 3),
        "side": layer(5, 2),
    },
)
ALL = [
    "left",
    "relu",
    "right",
    "relu#2",
    "add",
    "max_pool",
    "trunk",
    "relu#3",
    "reduce",
    "neck",
    "tanh",
    "head",
    "side",
]
WEIGHTED = ["left", "right", "trunk", "neck", "head", "side"]

TABLE: dict[str, tuple[select.Selector, list[str]]] = {
    "one kind": (kind("conv"), ["left", "right", "trunk"]),
    "two kinds": (kind("dense", "conv"), WEIGHTED),
    "a kind without weights": (kind("activation"), ["relu", "relu#2", "relu#3", "tanh"]),
    "a kind that does not occur": (kind("embedding"), []),
    "a name": (named("trunk"), ["trunk"]),
    "a glob": (named("*r*"), ["left", "relu", "right", "relu#2", "trunk", "relu#3", "reduce", "neck", "head", "side"]),
    "a glob of one letter": (named("?eck"), ["neck"]),
    "a glob on the path": (named("*/bias"), ["neck", "head", "side"]),
    "a glob of a set": (named("[lr]*t"), ["left", "right"]),
    "a regular expression": (named(re.compile("^(left|head)$")), ["left", "head"]),
    "a regular expression is searched": (named(re.compile("ea")), ["head"]),
    "a regular expression on the path": (named(re.compile("side/kernel$")), ["side"]),
    "first": (first(), ["left", "right"]),
    "first of a kind that is not first": (first("dense"), []),
    "first and other kinds": (first("activation", "conv"), ["left", "right"]),
    "last": (last(), ["head", "side"]),
    "last of a kind": (last("conv"), ["trunk"]),
    "last of several": (last("conv", "add"), ["trunk"]),
    "last of what occurs once": (last("add"), ["add"]),
    "depth of nothing": (depth(), ALL),
    "depth from zero": (depth(0, 1), ["left", "right"]),
    "depth in the middle": (depth(1, 3), ["relu", "relu#2", "add", "max_pool", "trunk", "relu#3", "reduce", "neck"]),
    "depth from below": (depth(3), ["tanh", "head", "side"]),
    "depth up to": (depth(None, 1), ["left", "right"]),
    "depth from the output": (depth(-1), ["head", "side"]),
    "depth but for the output": (depth(None, -1), [n for n in ALL if n not in ("head", "side")]),
    "depth between negatives": (depth(-3, -1), ["trunk", "relu#3", "reduce", "neck", "tanh"]),
    "depth of both signs": (depth(1, -1), [n for n in ALL if n not in ("left", "right", "head", "side")]),
    "depth that is empty": (depth(3, 3), []),
    "where": (where(lambda op: op.out_shape == (2, 5)), ["neck", "tanh"]),
    "everything": (everything(), ALL),
    "and": (kind("conv") & first(), ["left", "right"]),
    "and of disjoint": (kind("conv") & kind("dense"), []),
    "or": (named("neck") | last("conv"), ["trunk", "neck"]),
    "not": (~kind("activation", "add", "max_pool", "reduce"), WEIGHTED),
    "not not": (~~kind("dense"), ["neck", "head", "side"]),
    "de Morgan": (
        ~(kind("dense") | kind("activation")) & ~named("left"),
        ["right", "add", "max_pool", "trunk", "reduce"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("selector, right", TABLE.values(), ids=TABLE)
def test_table(selector, right):
    assert selected(selector, *FORKED) == right


@pytest.mark.parametrize("selector, right", TABLE.values(), ids=TABLE)
def test_wrapped_or_not(selector, right):
    function, *args = FORKED
    assert selected(selector, jax.jit(function), *args) == right
    assert selected(selector, jax.checkpoint(function), *args) == right


@pytest.mark.parametrize("selector, right", TABLE.values(), ids=TABLE)
def test_row_of_a_composite(selector, right):
    """A selected layer gets the rule, if it is one for its kind."""

    @rules.rule
    class Mark(rules.Rule):
        kinds = frozenset(("conv", "dense", "activation", "add", "max_pool", "reduce"))

    composite = Composite([(selector, Mark())]) + composites.epsilon()
    table = plan(FORKED[0], composite)(*FORKED[1:])
    assert [row.name for row in table if row.rule == Mark()] == right


# ---------------------------------------------------------------------------------------------------- named

PATHS = {"params": {f"block_{i}": {"Conv_0": kernel(1, 1, 3, 3), "Dense_0": layer(3, 3)} for i in range(2)}}


def blocks(x, variables):
    for block in ("block_0", "block_1"):
        p = variables["params"][block]
        x = jnp.tanh(dense(jnp.tanh(conv(x, p["Conv_0"]["kernel"])), p["Dense_0"]))
    return x


@pytest.mark.parametrize(
    "pattern, right",
    [
        ("params/block_0/Conv_0", ["params/block_0/Conv_0"]),
        ("params/block_0/*", ["params/block_0/Conv_0", "params/block_0/Dense_0"]),
        ("*/Conv_0", ["params/block_0/Conv_0", "params/block_1/Conv_0"]),  # * passes over /, as in fnmatch
        ("*Conv*kernel", ["params/block_0/Conv_0", "params/block_1/Conv_0"]),
        ("params/block_1/Dense_0/bias", ["params/block_1/Dense_0"]),
        (re.compile(r"block_\d/Dense"), ["params/block_0/Dense_0", "params/block_1/Dense_0"]),
        (re.compile("CONV_0", re.I), ["params/block_0/Conv_0", "params/block_1/Conv_0"]),
    ],
)
def test_named(pattern, right):
    assert selected(named(pattern), blocks, np.zeros((1, 2, 2, 3)), PATHS) == right


@pytest.mark.parametrize("pattern", ["Conv_0", "PARAMS/*", "params/block_0", re.compile("^block"), ""])
def test_named_fits_the_whole_path_and_minds_case(pattern):
    with pytest.raises(SelectorError):
        selected(named(pattern), blocks, np.zeros((1, 2, 2, 3)), PATHS)


def test_named_matches_every_use_of_shared_weights():
    w = kernel(3, 3)
    function = lambda x, p: jnp.tanh(jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]) @ p["a"]["kernel"]
    args = function, np.zeros(3), {"a": w, "b": w}
    assert selected(named("a"), *args) == ["a", "a#2"]
    assert selected(named("a#2"), *args) == ["a#2"]


def test_named_without_a_match_lists_the_layers():
    composite = Composite([(named("Conv_7"), rules.Flat())]) + composites.epsilon()
    with pytest.raises(SelectorError) as caught:
        plan(FORKED[0], composite)(*FORKED[1:])
    assert "Conv_7" in str(caught.value)
    assert all(name in str(caught.value) for name in WEIGHTED)
    with pytest.raises(SelectorError, match="unknown.*left"):
        plan(FORKED[0], Composite([(named(re.compile("unknown")), rules.Flat())]))(*FORKED[1:])


@pytest.mark.parametrize(
    "wrap",
    [lambda s: s & kind("conv"), lambda s: kind("conv") | s, lambda s: ~s, lambda s: ~(kind("dense") & ~s)],
)
def test_named_without_a_match_inside_another_selector(wrap):
    with pytest.raises(SelectorError, match="nowhere"):
        selected(wrap(named("nowhere")), *FORKED)


def test_named_that_matches_but_is_shadowed_is_no_error():
    table = plan(FORKED[0], Composite([(everything(), rules.Epsilon(1.0)), (named("left"), rules.Flat())]))(*FORKED[1:])
    assert len(table.unused) == 1 and "Flat" in table.unused[0]


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


# ---------------------------------------------------------------------------------------------------- values

predicate = lambda op: op.kind == "conv"
SAME = [
    lambda: kind("dense", "conv"),
    lambda: named("params/Conv_*"),
    lambda: named(re.compile("Conv_[0-9]")),
    lambda: first(),
    lambda: first("conv"),
    lambda: last("dense"),
    lambda: depth(1, -1),
    lambda: where(predicate),
    lambda: everything(),
    lambda: (kind("dense") & ~first()) | named("head"),
]


@pytest.mark.parametrize("make", SAME)
def test_equal_selectors_are_equal_and_hash_alike(make):
    assert make() == make() and not make() != make()
    assert hash(make()) == hash(make())
    assert len({make(), make()}) == 1


def test_different_selectors_differ():
    different = [make() for make in SAME] + [
        kind("conv"), kind("dense"), first("dense"), last("conv"), last(), named("Conv_[0-9]"),
        depth(1), depth(None, 1), depth(), kind("dense") & first(), kind("dense") | first(), ~kind("dense"),
        ~~kind("dense"),
        where(lambda op: op.kind == "conv"), where(lambda op: op.kind == "conv"),
    ]  # fmt: skip
    assert len(set(different)) == len(different)
    for i, one in enumerate(different):
        assert [j for j, other in enumerate(different) if one == other] == [i]


def test_first_without_kinds_is_of_dense_and_conv():
    assert first() == first("dense", "conv") and last() == last("dense", "conv")


def test_where_compares_by_identity():
    """A predicate with an `__eq__` of its own does not change that."""

    class Vague:
        def __eq__(self, other):
            return True

        __hash__ = None

        def __call__(self, op):
            return True

    one, other = Vague(), Vague()
    assert where(one) != where(other) and where(one) == where(one)
    assert isinstance(hash(where(one)), int)


def test_where_sees_what_an_op_is():
    seen = {}

    def look(op):
        seen[op.name] = (op.kind, op.first, op.depth, op.in_shapes, op.out_shape, op.paths)
        return False

    selected(where(look), *FORKED)
    assert seen["neck"] == ("dense", False, 2, ((2, 4),), (2, 5), ("neck/kernel", "neck/bias"))
    assert seen["add"] == ("add", False, 1, ((2, 8, 8, 4),) * 2, (2, 8, 8, 4), ())


def test_users_own_selector():
    class Wide(select.Selector):
        def matches(self, op):
            return op.out_shape[-1] > 4

    assert selected(Wide() & kind("dense"), *FORKED) == ["neck"]
    with pytest.raises(NotImplementedError, match="matches"):
        selected(select.Selector(), *FORKED)


def test_selectors_do_not_change():
    for make in SAME:
        with pytest.raises((AttributeError, TypeError)):
            make().kinds = ()


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("make", [kind, first, last])
def test_unknown_kind(make):
    for wrong in ("Dense", "convolution", "", "linear"):
        with pytest.raises(SelectorError) as caught:
            make("dense", wrong)
        assert repr(wrong) in str(caught.value)
        assert all(known in str(caught.value) for known in ("dense", "conv", "batch_norm", "max_pool", "attention"))
    with pytest.raises(SelectorError):
        make(rules.Epsilon)


@pytest.mark.parametrize(
    "make",
    [
        lambda: kind(),
        lambda: named(3),
        lambda: named(None),
        lambda: named(["Conv_0"]),
        lambda: depth("1"),
        lambda: depth(0.5),
        lambda: depth(None, True),
        lambda: where("conv"),
        lambda: where(None),
        lambda: kind("conv") & "dense",
        lambda: kind("conv") | (lambda op: True),
        lambda: kind("conv") & None,
        lambda: Composite([("conv", rules.Flat())]),
        lambda: Composite([(lambda op: True, rules.Flat())]),
        lambda: Composite([(select.first, rules.Flat())]),
    ],
)
def test_what_is_no_selector(make):
    with pytest.raises(SelectorError) as caught:
        make()
    assert str(caught.value)


def test_every_known_kind_can_be_selected():
    contract = (
        "dense conv scale embedding batch_norm layer_norm rms_norm group_norm local_response_norm activation softmax "
        "attention add product matmul max_pool avg_pool reduce resize structural blocked"
    ).split()
    assert set(contract) <= set(kinds.KINDS)
    for name in contract:
        assert select.kind(name) == kind(name)
