"""The plan: which rule each layer gets, as rows, as text and as JSON."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import composed
import models
from composed import LAYERS, P, X, cnn, every_composite
from jaxlrp import Composite, composites, plan, rules
from jaxlrp.rules import Epsilon, Flat, Pass, WSquare
from jaxlrp.select import first, kind, last, named, where
from nets import quick_compilation  # noqa: F401


def test_plan_is_iterable():
    got = plan(cnn, composites.epsilon_plus())(X, P)
    assert len(got) == len(LAYERS) == len(list(got))
    assert [row.name for row in got] == LAYERS and got[0] is next(iter(got)) and got[-1].name == "last"
    stem = got[0]
    assert (stem.kind, stem.in_shapes, stem.out_shape) == ("conv", ((2, 8, 8, 3),), (2, 8, 8, 4))
    assert got[4].in_shapes == ((2, 8, 8, 4), (2, 8, 8, 4)) and got[-1].out_shape == (2, 5)


def test_plan_runs_nothing():
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (X, P))
    assert str(plan(cnn, composites.epsilon_plus())(*shapes)) == str(plan(cnn, composites.epsilon_plus())(X, P))


def test_plan_of_a_linen_model_in_one_line():
    model = nn.Dense(3)
    variables = model.init(jax.random.key(0), X)
    (row,) = plan(lambda x: model.apply(variables, x), composites.epsilon())(X)
    assert row.kind == "dense" and "Dense" in row.name


TITLES = ["name", "kind", "input", "output", "rule", "source"]


def cells(text: str) -> list[list[str]]:
    """The table of a printed plan, cut where the titles begin: text that does not line up gives wrong cells."""
    lines = text.splitlines()
    starts = [lines[0].index(title) for title in TITLES]
    ends = [*starts[1:], None]
    rows = [line for line in lines if "  " in line]
    for line in rows:
        assert all(line[start - 2 : start] == "  " for start in starts[1:] if start < len(line)), line
    return [[line[a:b].rstrip() for a, b in zip(starts, ends, strict=True)] for line in rows]


def test_plan_as_text():
    got = plan(cnn, composites.epsilon_gamma_box(-3.0, 4.0))(X, P)
    titles, rule, *rows = cells(str(got))
    assert titles == TITLES and all(set(cell) == {"-"} for cell in rule)
    assert len(rows) == len(got)
    assert [row[0] for row in rows] == LAYERS
    assert rows[0][:5] == ["stem", "conv", "(2, 8, 8, 3)", "(2, 8, 8, 4)", "ZBox(low=-3, high=4)"]
    assert rows[1][:5] == ["relu", "activation", "(2, 8, 8, 4)", "(2, 8, 8, 4)", "Pass() *"]
    assert rows[2][4] == "GeneralizedGamma(gamma=0.25)"
    assert rows[4][2] == "(2, 8, 8, 4) (2, 8, 8, 4)"
    assert rows[-1][:5] == ["last", "dense", "(2, 3)", "(2, 5)", "Epsilon(epsilon=1e-06)"]
    assert all(len(line) == len(line.rstrip()) for line in str(got).splitlines())
    assert repr(got) == str(got)


def test_plan_names_the_users_line():
    got = plan(cnn, composites.epsilon())(X, P)
    with open(composed.__file__) as file:
        line = 1 + next(i for i, text in enumerate(file) if "models.plain_cnn(x, p)), p" in text)
    assert f"composed.py:{line} (cnn)" in got[-2].source
    assert all("models.py:" in row.source for row in got if row.name in ("stem", "block", "head", "max_pool"))


def test_plan_marks_what_comes_from_base():
    got = plan(cnn, composites.epsilon() + Composite([(kind("activation"), Pass())]))(X, P)
    marked = {row[0] for row in cells(str(got))[2:] if row[4].endswith(" *")}
    assert marked == {row.name for row in got if row.base} == {"add", "max_pool", "avg_pool", "reduce"}
    assert any(line.startswith("*") and "composites.base()" in line for line in str(got).splitlines())
    # nothing to mark, nothing to say
    only = str(plan(lambda x, w: x @ w, composites.epsilon())(np.zeros(3), np.ones((3, 2))))
    assert "*" not in only


@pytest.mark.parametrize(
    "selector, rule, words",
    [
        (kind("embedding", "resize"), Epsilon(0.125), ["embedding", "resize", "Epsilon", "0.125"]),
        (first("dense"), Flat(), ["dense", "Flat"]),
        (last("resize"), Pass(), ["resize", "Pass"]),
        (named("stem"), WSquare(), ["stem", "WSquare"]),  # shadowed by the row above
        (where(lambda op: False), Flat(), ["Flat"]),
    ],
)
def test_plan_lists_unused_rows(selector, rule, words):
    got = plan(cnn, composites.epsilon_plus() + Composite([(selector, rule)]))(X, P)
    (unused,) = got.unused
    assert all(word in unused for word in words), unused
    (line,) = [line for line in str(got).splitlines() if line.startswith("unused row")]
    assert unused in line
    assert got.to_dict()["unused"] == [unused]


def test_plan_without_unused_rows():
    got = plan(cnn, composites.epsilon_plus_flat())(X, P)
    assert got.unused == () and "unused" not in str(got)


@every_composite
def test_plan_as_json(composite, right):
    got = json.loads(json.dumps(plan(cnn, composite)(X, P).to_dict()))
    assert [row["name"] for row in got["rows"]] == LAYERS
    assert [row["rule"] for row in got["rows"]] == [type(rule).__name__ for _, rule in right]
    assert got["unused"] == [] and got["notes"] == []
    block, last_ = got["rows"][2], got["rows"][-1]
    assert block["in_shapes"] == [[2, 8, 8, 4]] and block["out_shape"] == [2, 8, 8, 4]
    assert last_["kind"] == "dense" and last_["base"] is False and got["rows"][1]["base"] is True
    assert got["rows"][4]["numbers"] == {"epsilon": 1e-9}


def test_plan_as_json_of_numbers_that_are_arrays():
    small, large = np.array([-3.0, -3.0, -4.0]), np.full(models.IMAGES[1:], 4.0)
    got = plan(cnn, composites.epsilon_gamma_box(small, jnp.asarray(large), epsilon=np.float32(0.5)))(X, P)
    rows = json.loads(json.dumps(got.to_dict()))["rows"]
    assert rows[0]["numbers"]["low"] == [-3.0, -3.0, -4.0]
    assert "8, 8, 3" in rows[0]["numbers"]["high"]  # 192 numbers are too many to read
    assert rows[-1]["numbers"] == {"epsilon": 0.5}
    cells(str(got))


def test_plan_inside_jit():
    """Numbers that are traced are shown as what they are."""
    seen = []

    @jax.jit
    def inside(composite, x):
        seen.append(plan(cnn, composite)(x, P))
        return x

    inside(composites.epsilon_gamma_box(-3.0, 4.0), X)
    (got,) = seen
    assert [row.name for row in got] == LAYERS
    json.dumps(got.to_dict())
    assert all("\n" not in cell for row in cells(str(got)) for cell in row)


def test_plan_shows_rules_of_the_user():
    @rules.rule
    class Damped(rules.Rule):
        factor: float = 0.5
        mode: str = "soft"

        def propagate(self, layer, relevance):
            return (self.factor * relevance,)

    got = plan(lambda x, w: x @ w, Composite([(kind("dense"), Damped(0.25))]))(np.zeros(3), np.ones((3, 3)))
    assert "Damped(factor=0.25)" in str(got)
    assert got.to_dict()["rows"][0]["numbers"] == {"factor": 0.25}  # the choice is the default one


def test_plan_does_not_change():
    got = plan(cnn, composites.epsilon())(X, P)
    with pytest.raises(AttributeError):
        got.rows = ()
    with pytest.raises(AttributeError):
        got[0].rule = Flat()


def test_composite_as_text():
    text = repr(composites.epsilon_plus_flat(epsilon=0.125))
    assert text.startswith("Composite(") and text.count("Flat") == 1 and "0.125" in text and "ZPlus" in text
