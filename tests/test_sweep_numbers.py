"""The numbers of a sweep are those of separate calls, and its means those of its rows."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlrp import Composite, composites, evaluate, gradients, lrp, rules, select
from jaxlrp.errors import InputError
from sweep_runs import BATCHES, EPSILON, PLAIN, PREDICT, batches_of, compiled_once, measured, rows_of, same  # noqa: F401

# ---------------------------------------------------------------------------------------------------- each row


def test_every_row_is_what_separate_calls_give(tmp_path):
    """Batches of other sizes too: the first has 2 examples, so the second is measured in two calls."""
    batches, key = batches_of(2, 3), jax.random.key(7)
    gammas = np.geomspace(0.1, 1, 2)
    of_gamma = lambda gamma: Composite([(select.kind("dense"), rules.Gamma(gamma))])
    explainers = {
        "gamma": of_gamma(gammas),
        "epsilon": composites.epsilon(),
        "gradient": lambda x, t: gradients.gradient_x_input(PREDICT, target=t)(x),
    }
    explain = jax.jit(lambda c, x, t: lrp(PREDICT, c, target=t)(x))
    options = {"region": (2, 4), "steps": 3}
    orders, fills = ("lerf", "random"), {"noise": "gaussian", "around": "inpaint"}
    sweep = measured(tmp_path, batches, explainers=explainers, orders=orders, fills=fills, key=key, **options)
    columns = ["batch", "place", "explainer", "variant", "order", "fill"]
    told = [tuple(row[c] for c in columns) for row in sweep.table.to_pylist()]
    assert told == sorted(told) and len(set(told)) == len(told) == 5 * 4 * 2 * 2
    assert sweep.table.column_names == [*columns, "target", "score", "auc", "aopc", "scores"]
    for i, (x, targets) in enumerate(batches):
        maps = {("gamma", k): explain(of_gamma(gamma), x, targets) for k, gamma in enumerate(gammas.tolist())}
        maps["epsilon", 0] = explain(explainers["epsilon"], x, targets)
        maps["gradient", 0] = jax.jit(explainers["gradient"])(x, targets)
        for (name, variant), relevance in maps.items():
            for order, (title, fill) in [(o, f) for o in orders for f in fills.items()]:
                one = {"order": order, "fill": fill, "key": jax.random.fold_in(key, i), **options}
                curves = evaluate.pixel_flipping(PREDICT, x, relevance, targets, **one)
                rows = rows_of(sweep, batch=i, explainer=name, variant=variant, order=order, fill=title)
                wanted = {"auc": curves.auc(), "aopc": curves.aopc(), "scores": curves.scores}
                wanted |= {"score": curves.scores[:, 0], "target": targets}
                for column, values in wanted.items():
                    np.testing.assert_allclose([row[column] for row in rows], values, atol=1e-5, err_msg=column)
    np.testing.assert_allclose(sweep.fractions, curves.fractions, rtol=1e-6)


def test_sixteen_gammas_are_one_compiled_call(tmp_path, caplog):
    explainers = {"gamma": Composite([(select.kind("dense"), rules.Gamma(jnp.ones(16)))])}
    with jax.log_compiles():
        sweep = measured(tmp_path, explainers=explainers)
    compilations = [r for r in caplog.messages if r.startswith("Compiling") and "measure" in r]
    assert len(compilations) == 1, compilations
    assert set(sweep.table["variant"].to_pylist()) == set(range(16))
    assert len({tuple(row["scores"]) for row in rows_of(sweep, batch=0, place=0, order="morf")}) == 1


def test_the_ways_to_write_variants(tmp_path):
    """Numbers with a leading axis, all leaves stacked, a list: the same. Bounds are shared, unless all is stacked."""
    box = lambda low, high, gamma: Composite([
        (select.first("dense"), rules.ZBox(low, high)), (select.kind("dense"), rules.Gamma(gamma))
    ])  # fmt: skip
    each = [box(-1.0, 1.0, g) for g in (0.1, 0.5, 2.0)]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *each)
    bounds = np.full((1, 8, 8, 1), 1.0)
    explainers = {"list": each, "numbers": box(-1.0, 1.0, np.array([0.1, 0.5, 2.0])), "stacked": stacked}
    explainers["arrays"] = box(-bounds, bounds, np.array([0.1, 0.5, 2.0]))
    sweep = measured(tmp_path, BATCHES[:1], explainers=explainers)
    tables = {
        name: [(r["variant"], r["order"], *r["scores"]) for r in rows_of(sweep, explainer=name)] for name in explainers
    }
    assert {len(t) for t in tables.values()} == {4 * 3 * 2}
    for name, table in tables.items():
        assert table == tables["list"], name
    with pytest.raises(
        InputError, match=r"'b'\] has numbers and bounds, maybe of channels, of 3 variants: write a list"
    ):
        low = np.array([-1.0, -2.0, -3.0])
        measured(tmp_path / "other", explainers={"b": box(low, -low, np.array([0.1, 0.5, 2.0]))})
    with pytest.raises(InputError, match=r"'b'\] has numbers of \[2, 3\] variants: write a list"):
        two = Composite(
            [(select.first("dense"), rules.Epsilon(np.ones(2))), (select.kind("dense"), rules.Gamma(np.ones(3)))]
        )
        measured(tmp_path / "other", explainers={"b": two})


def test_relevance_with_nan_is_not_ranked(tmp_path):
    bad = lambda x, t: jnp.where(jnp.arange(len(x))[:, None, None, None] == 1, jnp.nan, x)
    sweep = measured(tmp_path, BATCHES[:1], explainers={"bad": bad})
    for row in sweep.table.to_pylist():
        assert np.isnan(row["scores"]).all() == np.isnan(row["auc"]) == (row["place"] == 1)
        assert np.isfinite(row["score"])


def test_devices_do_not_change_the_table(tmp_path):
    """Batches of 4, 4, 4, 2 on three devices."""
    options = {"explainers": EPSILON | {"gradient": lambda x, t: x}, "fills": {"noise": "uniform"}, "region": 2}
    mesh = jax.make_mesh((3,), ("data",), devices=jax.devices()[:3])
    one, three = (measured(tmp_path / str(bool(m)), mesh=m, **options) for m in (None, mesh))
    same(one.table, three.table)


# ---------------------------------------------------------------------------------------------------- the results


def test_means_and_their_errors(tmp_path):
    explainers = PLAIN | {"x": lambda x, t: x**2}
    sweep = measured(tmp_path, explainers=explainers, fills={"zero": 0.0, "one": 1.0})
    table = sweep.srg().to_pylist()
    assert [(r["explainer"], r["fill"]) for r in table] == [(e, f) for e in ("plain", "x") for f in ("one", "zero")]
    for row in table:
        lerf, morf = (
            np.array([r["auc"] for r in rows_of(sweep, explainer=row["explainer"], fill=row["fill"], order=o)])
            for o in ("lerf", "morf")
        )
        gain = lerf - morf
        assert row["images"] == len(gain) == 14
        np.testing.assert_allclose([row["mean"], row["error"]], [gain.mean(), gain.std(ddof=1) / 14**0.5], rtol=1e-5)
    for measure in ("aopc", "score", "scores"):
        for row in sweep.means(measure).to_pylist():
            wanted = rows_of(sweep, **{k: row[k] for k in ("explainer", "variant", "order", "fill")})
            np.testing.assert_allclose(row["mean"], np.mean([r[measure] for r in wanted], 0), rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="measure='sgr'; write one of 'srg'"):
        sweep.means("sgr")
    one = measured(tmp_path / "one", [(BATCHES[0][0][:1], 1)], orders=["morf"])
    assert np.isnan(one.means("auc").to_pylist()[0]["error"])
    with pytest.raises(InputError, match='"srg" needs the orders'):
        one.srg()


def test_the_time_it_will_take_is_told_after_the_first_batch(tmp_path, capsys):
    measured(tmp_path, progress=True)
    told = capsys.readouterr().err
    assert "compiled in " in told and " s a batch: about 00:0" in told and "for the 3 batches left" in told
    assert "4/4" in told
    measured(tmp_path / "b", iter(BATCHES), progress=True)
    told = capsys.readouterr().err
    assert " s a batch" in told and "batches left" not in told
    measured(tmp_path / "c", iter(BATCHES), progress=True, total=4)
    assert "for the 3 batches left" in capsys.readouterr().err
    measured(tmp_path / "d")
    assert capsys.readouterr().err == ""


def test_a_part_is_written_every_minute(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["jaxlrp.evaluate.sweep"], "MINUTE", 0.0)
    measured(tmp_path, group=100)
    assert len(list(tmp_path.glob("part-*"))) >= 3
