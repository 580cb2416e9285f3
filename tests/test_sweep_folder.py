"""The folder of a sweep: another sweep is not mixed in, and nothing is lost or counted twice, whatever happens."""

import errno
import os
import resource
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import sweeping
from jaxlrp import composites, evaluate
from jaxlrp.errors import InputError, SweepError
from sweep_runs import BATCHES, EPSILON, PREDICT, Source, compiled_once, measured  # noqa: F401

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


def test_pandas(finished):
    pandas = pytest.importorskip("pandas")
    frame = evaluate.read_sweep(finished).to_pandas()
    assert isinstance(frame, pandas.DataFrame) and len(frame) == 14 * 2
