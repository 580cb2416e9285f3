"""Streams of batches: all give the same table, what is done is not read again, bad batches are recorded."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlrp import evaluate
from jaxlrp.errors import InputError, SweepError, TargetError
from sweep_runs import BATCHES, Source, batches_of, compiled_once, measured  # noqa: F401


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
