"""Sweeps: the numbers are those of separate calls, and nothing is lost or counted twice, whatever happens."""

import errno
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import sweeping
from jaxlrp import Composite, composites, evaluate, gradients, lrp, rules, select
from jaxlrp.errors import InputError, SweepError, TargetError

pytest.importorskip("pyarrow")
pytest.importorskip("tqdm")

QUICK = {"region": 4, "fills": {"zero": 0.0}, "progress": False}
EPSILON = {"epsilon": composites.epsilon()}
PLAIN = {"plain": lambda x, t: x}  # quick to compile, where numbers do not matter


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """What is compiled is kept, for the processes too; a resumed sweep compiles the same again."""
    folder = tmp_path_factory.mktemp("compiled")
    options = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    jax.tree.map(jax.config.update, list(options), list(options.values()))
    yield folder
    jax.tree.map(jax.config.update, list(before), list(before.values()), is_leaf=lambda v: v is None)


def batches_of(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(n, 8, 8, 1)).astype(np.float32), rng.integers(0, 3, n)) for n in sizes]


PREDICT = sweeping.setting()[0]
BATCHES = batches_of(4, 4, 4, 2)


def measured(folder, batches=BATCHES, predict=PREDICT, explainers=PLAIN, **options):
    return evaluate.sweep(predict, explainers, batches, folder, **QUICK | options)


def rows_of(sweep, **wanted):
    return [row for row in sweep.table.to_pylist() if all(row[k] == v for k, v in wanted.items())]


# ------------------------------------------------------------------------------------------------------- the numbers


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


def same(one, other, tolerance=1e-6):
    """Tables that agree in every row, in numbers up to rounding."""
    assert one.schema == other.schema and one.num_rows == other.num_rows
    for name in one.column_names:
        a, b = (t[name].to_pylist() for t in (one, other))
        if name in ("score", "auc", "aopc", "scores"):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)
        else:
            assert a == b, name


# ------------------------------------------------------------------------------------------------------- the streams


class Source:
    """Random access, as Grain's data sources and PyTorch's data sets: nothing but a length and items."""

    def __init__(self, items):
        self.items, self.read = items, []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        self.read.append(i)
        return self.items[i]


class Iterator:
    """As Grain's iterators: an item that fails raises, and the next call goes on."""

    def __init__(self, items):
        self.items = iter(items)

    def __iter__(self):
        return self

    def __next__(self):
        item = next(self.items)
        if isinstance(item, Exception):
            raise item
        return item


def test_all_streams_give_the_same(tmp_path):
    x = np.concatenate([x for x, _ in BATCHES])
    np.save(tmp_path / "images.npy", x)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap)
    starts = [0, 4, 8, 12]
    targets = np.concatenate([t for _, t in BATCHES])
    streams = {
        "list": BATCHES,
        "source": Source(BATCHES),
        "iterator": Iterator(BATCHES),
        "generator": (batch for batch in BATCHES),
        "functions": [lambda b=b: b for b in BATCHES],
        "generator of functions": ((lambda b=b: b) for b in BATCHES),
        "memmap": ((mapped[i : i + 4], targets[i : i + 4]) for i in starts),
        "jax arrays": [(jnp.asarray(x), jnp.asarray(t)) for x, t in BATCHES],
    }
    tables = {name: measured(tmp_path / name, stream).table for name, stream in streams.items()}
    assert [name for name, table in tables.items() if not table.equals(tables["list"])] == []


def test_what_is_done_is_not_read_again(tmp_path):
    source = Source(BATCHES)
    whole = measured(tmp_path, source, group=3)
    assert source.read == [0, 1, 2, 3]
    assert sorted(p.name for p in tmp_path.glob("part-*")) == ["part-0-000000.parquet", "part-0-000003.parquet"]
    (tmp_path / "part-0-000003.parquet").unlink()
    assert measured(tmp_path, source, group=3).table.equals(whole.table)
    assert source.read == [0, 1, 2, 3, 0, 3]  # one that is done is read, to see that it is the same
    calls = []
    stream = ((lambda i=i: calls.append(i) or BATCHES[i]) for i in range(4))
    assert measured(tmp_path, stream).table.equals(whole.table) and calls == [0]
    assert evaluate.read_sweep(tmp_path).table.equals(whole.table)


def test_bad_batches_are_recorded(tmp_path):
    x, t = BATCHES[0]

    def missing():
        raise FileNotFoundError("no image 17.png")

    nan, far = x.copy(), x.copy()
    nan[2, 0, 0], far[1, 3, 3] = np.nan, np.inf
    bad = {
        "FileNotFoundError: no image 17.png": missing,
        "inputs have NaN or infinity in 1 examples, first in 2": (nan, t),
        "inputs have NaN or infinity in 1 examples, first in 1": (far, t),
        "inputs of shape (4, 8, 7, 1) and dtype float32": (x[:, :, :7], t),
        "inputs of shape (4, 8, 8, 1) and dtype float16": (x.astype(np.float16), t),
        "inputs of shape (0, 8, 8, 1)": (x[:0], t[:0]),
        "inputs of dtype complex64": (x + 0j, t),
        "ValueError: setting an array element with a sequence": ([[1.0], [1.0, 2.0]], [0, 0]),
        "inputs of dtype <U": (x.astype(str), t),
        "targets of shape (3,) and dtype int64": (x, t[:3]),
        "targets of shape (4,) and dtype float32": (x, t.astype(np.float32)),
        "target 3 is out of range": (x, t * 0 + 3),
        "target -1 is out of range": (x, t * 0 - 1),
        "a batch is a pair (inputs, targets), not ndarray": x,
        "KeyError: 5": KeyError(5),
    }
    items = list(bad.values())
    stream = [*items[:2], *BATCHES[:1], *items[2:], *BATCHES[1:]]
    sweep = measured(tmp_path, Iterator(stream), group=4)
    reasons = dict(sweep.failures)
    assert list(reasons) == [0, 1, *range(3, len(bad) + 1)]
    for (index, why), wanted in zip(reasons.items(), bad, strict=True):
        assert why.startswith(wanted), (index, why)
    good = measured(tmp_path / "good", BATCHES)
    shifted = {0: 2, 1: len(bad) + 1, 2: len(bad) + 2, 3: len(bad) + 3}
    assert [shifted[i] for i in good.table["batch"].to_pylist()] == sweep.table["batch"].to_pylist()
    assert good.table["place"].equals(sweep.table["place"])
    read = evaluate.read_sweep(tmp_path)
    assert read.failures == sweep.failures and read.table.equals(sweep.table)


def test_other_batches_are_not_mixed_in(tmp_path):
    """The batch that is done is read before the others; from an iterator nothing is written before it passed by."""
    first, other = batches_of(4, 4), batches_of(2, 3, 2, seed=5)
    measured(tmp_path, first, group=1)
    same_images = [(x, (t + 1) % 3) for x, t in first]
    (tmp_path / "part-0-000000.parquet").unlink()
    for stream in (other, iter(other), same_images):
        with pytest.raises(SweepError, match="batch 1 is not the one that .*same order, or write to another folder"):
            measured(tmp_path, stream, group=1)
    assert [p.name for p in tmp_path.glob("part-*")] == ["part-0-000001.parquet"]
    again = measured(tmp_path, iter([(jnp.asarray(x), t.astype(np.int32)) for x, t in first]), group=1)
    assert again.table.equals(measured(tmp_path / "other", first).table)


@pytest.mark.parametrize("side", [6, 4])
def test_a_first_batch_that_is_odd(tmp_path, side):
    """predict raises for the one, and takes the other."""
    predict = lambda x: x[:, :4, :4].reshape(len(x), -1) @ np.ones((16, 3)) if x.shape[1] != 6 else len(x) + "a"
    stream = [(BATCHES[0][0][:, :side, :side], BATCHES[0][1]), *BATCHES[1:]]
    error, says = {
        6: (TypeError, ""),
        4: (SweepError, "one good batch, 0, and 3 unlike it, .*another folder with shape="),
    }[side]
    with pytest.raises(error, match=says):
        measured(tmp_path, stream, predict=predict)
    if side == 4:
        assert evaluate.read_sweep(tmp_path).table["batch"].unique().to_pylist() == [0]
        with pytest.raises(SweepError, match=r"holds batches of inputs \(4, 4, 1\), not shape=\(8, 8, 1\)"):
            measured(tmp_path, stream, predict=predict, shape=(8, 8, 1))
    sweep = measured(tmp_path if side == 6 else tmp_path / "b", stream, predict=predict, shape=(8, 8, 1))
    assert sweep.table["batch"].unique().to_pylist() == [1, 2, 3]
    ((index, why),) = sweep.failures
    assert index == 0 and f"shape (4, {side}, {side}, 1): shape=(8, 8, 1) asks for" in why


def test_failed_batches_are_tried_again(tmp_path):
    """Their rows win over their failures; the last reason is kept."""

    def stream(*reasons):
        def item(i):
            if i < len(reasons):
                raise OSError(reasons[i])
            return BATCHES[i]

        return [lambda i=i: item(i) for i in range(4)]

    for group in (1, 4):
        folder = tmp_path / str(group)
        assert len(measured(folder, stream("a", "b"), group=group).failures) == 2
        assert len(measured(folder, stream(), group=group).failures) == 2
        for text in "cd":
            sweep = measured(folder, stream(text), group=group, retry=True)
            assert sweep.failures == [(0, f"OSError: {text}")]
        whole = measured(folder, stream(), group=group, retry=True)
        assert whole.failures == [] and whole.table.equals(measured(tmp_path / "other").table)
        source = Source(BATCHES)
        assert measured(folder, source, group=group, retry=True).table.equals(whole.table) and source.read == [0]


def test_only_bad_batches(tmp_path):
    with pytest.raises(SweepError, match="no images: all 1 batches failed, batch 0 by: inputs have NaN .*shape="):
        measured(tmp_path, [(np.full((2, 8, 8, 1), np.nan), [0, 0])])
    with pytest.raises(SweepError, match="no images: there were no batches"):
        measured(tmp_path / "none", [])
    sweep = evaluate.read_sweep(tmp_path)
    assert sweep.table.num_rows == 0 and len(sweep.failures) == 1 and not sweep.fractions.size
    with pytest.raises(InputError, match="no images; 1 batches failed"):
        sweep.srg()
    assert measured(tmp_path, BATCHES).table["batch"].unique().to_pylist() == [1, 2, 3]


def test_a_generator_that_raised_says_how_to_go_on(tmp_path):
    def stream():
        yield from BATCHES[:2]
        raise OSError("cannot read c.png")

    with pytest.raises(SweepError, match=r"batch 2: the stream raised OSError: cannot read c.png; a generator .* func"):
        measured(tmp_path, stream())
    kept = evaluate.read_sweep(tmp_path)
    assert kept.table["batch"].unique().to_pylist() == [0, 1] and kept.failures == []
    source = Source(BATCHES)
    whole = measured(tmp_path, source)
    assert source.read == [0, 2, 3] and whole.table.equals(measured(tmp_path / "other").table)


def test_a_stream_that_always_raises_ends(tmp_path):
    class Broken(Iterator):
        def __next__(self):
            raise ConnectionError("gone")

    with pytest.raises(SweepError, match="batch 99: the stream raised ConnectionError: gone; so did the 99 before"):
        measured(tmp_path, Broken([]))


def test_what_predict_raises_is_raised(tmp_path):
    """It is no fault of the batch; what was measured before is kept."""
    with pytest.raises(ZeroDivisionError):
        measured(tmp_path, predict=lambda x: 1 / 0)
    with pytest.raises(TargetError, match=r"predict made \[\(4,\)\] of inputs .*: write a function to"):
        measured(tmp_path / "a", predict=lambda x: x.sum((1, 2, 3)))
    with pytest.raises(InputError, match="for inputs of int"):
        measured(tmp_path / "b", [(np.ones((2, 8), int), 0)], fills={"mean": "mean"})
    assert evaluate.read_sweep(tmp_path).table.num_rows == 0


# -------------------------------------------------------------------------------------------------------- the folder


OTHER = {
    "orders": {"orders": ["morf"]},
    "fills/zero": {"fills": {"zero": 1.0}},
    "fills/mean: nothing there": {"fills": {"zero": 0.0, "mean": "mean"}},
    "region": {"region": 2},
    "steps": {"steps": 2},
    "key": {"key": jax.random.key(1)},
    "channels": {"channels": 1},
    "explainers/epsilon/rules": {"explainers": {"epsilon": composites.epsilon(1e-3)}},
    "explainers/more": {"explainers": EPSILON | {"more": lambda x, t: x}},
    "predict/numbers": {"predict": Partial(sweeping.network, jax.tree.map(lambda v: v + 1, PREDICT.args[0]))},
    "predict/function": {"predict": lambda x: x.reshape(len(x), -1)},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    measured(folder, explainers=EPSILON)
    return folder


@pytest.mark.parametrize("named", OTHER)
def test_another_sweep_does_not_write_to_the_folder(finished, named):
    with pytest.raises(SweepError, match=f"holds another sweep, which differs in .*{named}.*Write to another folder"):
        measured(finished, **{"explainers": EPSILON} | OTHER[named])


def test_the_same_sweep_is_known_again(finished):
    copied = Partial(sweeping.network, jax.tree.map(jnp.copy, PREDICT.args[0]))
    again = measured(finished, predict=copied, explainers={"epsilon": composites.epsilon(1e-6)}, group=1)
    assert again.table["batch"].unique().to_pylist() == [0, 1, 2, 3]
    told = evaluate.read_sweep(finished).manifest
    assert told["versions"]["jax"] == jax.__version__ and told["explainers"]["epsilon"]["variants"] == 1


@pytest.mark.parametrize(
    "hidden", ["closure", "default", "method", "jit", "global", "within", "object", "slots", "imported"]
)
def test_numbers_that_functions_hold_are_compared(tmp_path, hidden):
    """Training goes on, and the script runs again: its old table is not mistaken for a new one."""

    class Model:
        __call__ = staticmethod(lambda w, x: x.reshape(len(x), -1) @ w)

        def scores(self, x):
            return self(self.w, x)

    jax.tree_util.register_pytree_node(Model, lambda m: ((m.w,), None), lambda _, w: Model())

    class Plain:
        def __init__(self, w):
            self.w, self.me, self._count = w, self, np.random.default_rng().integers(1 << 30).item()

        def __call__(self, x):
            return x.reshape(len(x), -1) @ self.w

    class Slots:
        __slots__ = ("w",)
        __call__ = Plain.__call__

        def __init__(self, w):
            self.w = w

    def predict(w):
        model = Model()
        model.w = w
        of = {}
        exec("def scores(x):\n    return x.reshape(len(x), -1) @ w", of | {"w": w}, of)
        code = "def within(x):\n    return [(lambda: x.reshape(len(x), -1) @ w)() for _ in range(1)][0]"
        exec(code + "\ndef imported(x):\n    return plain(x)", of | {"__name__": "other"}, of)
        of["within"].__globals__.update(w=w, plain=Plain(w))
        return {
            "closure": lambda x: model(w, x),
            "default": lambda x, w=w: model(w, x),
            "method": model.scores,
            "jit": jax.jit(lambda x: model(w, x)),
            "global": of["scores"],
            "within": of["within"],
            "imported": of["imported"],
            "object": Plain(w),
            "slots": Slots(w),
        }[hidden]

    w = np.random.default_rng(0).normal(size=(64, 3))
    first = measured(tmp_path, BATCHES[:1], predict=predict(w))
    assert measured(tmp_path, BATCHES[:1], predict=predict(w.copy())).table.equals(first.table)
    with pytest.raises(SweepError, match="differs in predict/numbers"):
        measured(tmp_path, BATCHES[:1], predict=predict(2 * w))


def test_a_folder_that_cannot_be_written(tmp_path):
    """Before any batch is read."""
    (tmp_path / "file").write_text("")
    source = Source(BATCHES)
    with pytest.raises(SweepError, match=f"cannot write to {tmp_path}/file/folder: .*Not a directory"):
        measured(tmp_path / "file" / "folder", source)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # as a full disk: the folder can be made, not filled
    try:
        with pytest.raises(SweepError, match="cannot write to .*new: .*File too large"):
            measured(tmp_path / "new", source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert source.read == [] and list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fills_up(tmp_path, monkeypatch, call):
    """The append says so; the parts before it are intact; with space again, the sweep goes on."""
    real, full = getattr(os, call), []

    def failing(*args):
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    def last():
        full.append(True)
        return BATCHES[3]

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(SweepError, match="cannot write .*part-0-000002.parquet: .*No space left .* complete"):
        measured(tmp_path, [*BATCHES[:3], last], group=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "part-0-000000.parquet"]
    assert evaluate.read_sweep(tmp_path).table["batch"].unique().to_pylist() == [0, 1]
    full.clear()
    assert measured(tmp_path, group=2).table.equals(measured(tmp_path / "other").table)


def test_a_file_that_grows_too_large(tmp_path):
    """The kernel refuses the write itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def last():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        return BATCHES[2]

    try:
        with pytest.raises(SweepError, match="cannot write .*part-0-000001.parquet: .*File too large"):
            measured(tmp_path, [*BATCHES[:2], last], group=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert evaluate.read_sweep(tmp_path).table["batch"].unique().to_pylist() == [0]
    assert not list(tmp_path.glob("*.tmp"))


def test_folders_that_are_not_what_they_should_be(tmp_path, finished):
    with pytest.raises(SweepError, match="is no folder of a sweep: manifest.json cannot be read"):
        evaluate.read_sweep(tmp_path)
    part = (finished / "part-0-000000.parquet").read_bytes()
    (tmp_path / "part-0-000000.parquet").write_bytes(part)
    with pytest.raises(SweepError, match="holds parts of a sweep and no manifest.json"):
        measured(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(SweepError, match="is no folder of a sweep: manifest.json cannot be read"):
        measured(tmp_path, explainers=EPSILON)
    (tmp_path / "manifest.json").write_bytes((finished / "manifest.json").read_bytes())
    (tmp_path / "part-0-000000.parquet").write_bytes(part[:-100])
    for act in (measured, evaluate.read_sweep):
        with pytest.raises(SweepError, match=r"part-0-000000.parquet cannot be read .* Move it away"):
            act(tmp_path)
    (tmp_path / "part-0-000000.parquet").write_bytes(part[:30] + bytes(200) + part[230:])
    with pytest.raises(SweepError, match=r"part-0-000000.parquet cannot be read .* Move it away"):
        evaluate.read_sweep(tmp_path)
    (tmp_path / "part-0-000000.parquet").unlink()
    (tmp_path / "part-0-000000.parquet.tmp").write_bytes(part[:100])  # of a process that was killed
    again = measured(tmp_path, explainers=EPSILON)
    assert again.table.equals(evaluate.read_sweep(finished).table)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "options, says",
    [({}, "part-0-000000.parquet is there already: does another sweep write"), ({"steps": 2}, "differs in steps")],
)
def test_two_sweeps_at_once_do_not_mix(tmp_path, options, says):
    """A part that is there already was written by someone else."""

    def meanwhile():
        measured(tmp_path, BATCHES, **options)
        return BATCHES[3]

    with pytest.raises(SweepError, match=says):
        measured(tmp_path, [*BATCHES[:3], meanwhile])
    assert evaluate.read_sweep(tmp_path).table["batch"].unique().to_pylist() == [0, 1, 2, 3]


WRONG = {
    "orders='morf'; write some of": {"orders": "morf"},
    r"orders=\['more'\]": {"orders": ["more"]},
    r"orders=\('morf', 'morf'\)": {"orders": ("morf", "morf")},
    "group=0: write how many batches": {"group": 0},
    "batches=3: write a sequence": {"batches": 3},
    "batches={}: write a sequence": {"batches": {}},
    "explainers={}: write": {"explainers": {}},
    "fills={}: write": {"fills": {}},
    r"write \[\(inputs, targets\)\]": {"batches": BATCHES[0]},
    "shape=8: write the shape": {"shape": 8},
    "fills='mean': write a dictionary": {"fills": "mean"},
    r"explainers\['a'\]=3: write a composite": {"explainers": {"a": 3}},
    "steps=9: there are 4 tiles": {"steps": 9},
    "region=0": {"region": 0},
}


@pytest.mark.parametrize("says", WRONG)
def test_arguments_that_do_not_fit(tmp_path, says):
    with pytest.raises(InputError, match=says):
        measured(tmp_path, **WRONG[says])
    if "steps" in says:  # a folder in which nothing was measured is free for what was meant
        assert measured(tmp_path).table.num_rows == 14 * 2


@pytest.mark.parametrize("missing", ["pyarrow.parquet", "tqdm"])
def test_packages_that_are_missing(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf'a sweep needs {missing}, .* pip install "jaxlrp\[evaluate\]"'):
        measured(tmp_path)


# ------------------------------------------------------------------------------------------------------- the results


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


def test_pandas(finished):
    pandas = pytest.importorskip("pandas")
    frame = evaluate.read_sweep(finished).to_pandas()
    assert isinstance(frame, pandas.DataFrame) and len(frame) == 14 * 2


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


# ------------------------------------------------------------------------------------- processes that die, and several


def started(folder, compiled, **options):
    command = [
        sys.executable,
        sweeping.__file__,
        json.dumps({"folder": str(folder), "compiled": str(compiled)} | options),
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(sweeping.__file__).parent.parent), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out.endswith("done\n"), err
    return err


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, compiled_once):
    folder = tmp_path_factory.mktemp("uninterrupted")
    ended(started(folder, compiled_once))
    sweep = evaluate.read_sweep(folder)
    assert sweep.table.num_rows == (17 * 4 + 2) * 3 * 2 and [i for i, _ in sweep.failures] == [3, 5, 10, 12, 17, 19]
    return sweep


def killed_while_it_works(folder, compiled, chance):
    """SIGKILL from outside, when some more parts are written and a little later: anywhere in the next."""
    process = started(folder, compiled, group=1, sleep=0.02)
    goal = len(list(folder.glob("part-*.parquet"))) + chance.randrange(4)
    while process.poll() is None and len(list(folder.glob("part-*.parquet"))) < goal:
        time.sleep(0.005)
    time.sleep(chance.random() * 0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode


def killed_while_it_writes(folder, compiled, chance):
    """SIGKILL by its own hand, right before or after a file is brought to the disk or renamed."""
    process = started(folder, compiled, group=1, kill=chance.randrange(20))
    process.communicate(timeout=120)
    return process.returncode


@pytest.mark.parametrize("kills", [2, pytest.param(14, marks=pytest.mark.slow)])
def test_killed_and_resumed(tmp_path, compiled_once, uninterrupted, kills):
    chance, done, again = random.Random(kills), 0, 0
    while done < kills:
        folder = tmp_path / str(again)
        kill = (killed_while_it_works, killed_while_it_writes)[done % 2]
        if kill(folder, compiled_once, chance) != -signal.SIGKILL:  # it was faster
            same_as(uninterrupted, folder)
            again += 1
            continue
        done += 1
        if (folder / "manifest.json").exists():  # what is there is right, after each kill
            kept = evaluate.read_sweep(folder)
            batches = set(kept.table["batch"].to_pylist())
            assert kept.table.to_pylist() == [r for r in uninterrupted.table.to_pylist() if r["batch"] in batches]
            assert set(kept.failures) <= set(uninterrupted.failures)
    ended(started(folder, compiled_once))
    same_as(uninterrupted, folder)


def same_as(uninterrupted, folder):
    sweep = evaluate.read_sweep(folder)
    assert sweep.table.equals(uninterrupted.table) and sweep.failures == uninterrupted.failures
    left = {p.name for p in folder.iterdir() if not p.name.startswith("part-") or p.suffix != ".parquet"}
    assert left == {"manifest.json"}


@pytest.mark.slow
def test_eight_devices_and_two_processes(tmp_path, compiled_once, uninterrupted):
    """8 devices; 2 processes of 2 devices; and one process that goes on where two were stopped."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ended(started(tmp_path / "eight", compiled_once, devices=8))
    two = [started(tmp_path / "two", compiled_once, devices=2, process=p, port=port) for p in (0, 1)]
    for process in two:
        ended(process)
    for name in ("eight", "two"):
        sweep = evaluate.read_sweep(tmp_path / name)
        same(sweep.table, uninterrupted.table)
        assert sweep.failures == uninterrupted.failures
    parts = sorted((tmp_path / "two").glob("part-1-*.parquet"))
    assert len(parts) == 6
    for part in parts[::2]:
        part.unlink()
    ended(started(tmp_path / "two", compiled_once))
    same(evaluate.read_sweep(tmp_path / "two").table, uninterrupted.table)
