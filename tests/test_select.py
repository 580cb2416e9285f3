"""Selectors: which layers a row of a composite is for; selectors as values that are equal, hashed and combined."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlrp import Composite, composites, kinds, plan, rules, select
from jaxlrp.errors import SelectorError
from jaxlrp.select import depth, everything, first, kind, last, named, where
from models import conv, dense
from selection import ALL, FORKED, WEIGHTED, kernel, layer, selected

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
