"""What a sweep found: one table of all images, and its means; and how far it has come."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..errors import InputError, SweepError
from .store import manifest_of, package, parts_of
from .stream import UNLIKE, Layout

LABEL = ("explainer", "variant", "order", "fill")
MEASURES = ("srg", "auc", "aopc", "score", "scores")

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Every image by every explainer, variant, order and fill.

    table: a pyarrow Table, sorted by its first columns: batch, place (in the batch), explainer, variant, order, fill;
    then target, score (of the untouched input), auc, aopc (see `Curves`) and scores, the curve itself.
    failures: (batch, why it has no rows). manifest: what was measured. layout: of the batches, None where all failed.
    """

    table: Any
    failures: list[tuple[int, str]]
    manifest: dict[str, Any]
    layout: Layout | None

    @property
    def fractions(self) -> np.ndarray:
        """(steps + 1,): the part of the positions that is replaced at each step."""
        return np.array(self.layout.fractions if self.layout else ())

    def to_pandas(self) -> Any:
        return self.table.to_pandas()

    def means(self, measure: str = "srg") -> Any:
        """A Table of explainer, variant, order (except for "srg"), fill, mean, error and images.

        measure: "srg", auc(lerf) - auc(morf) image by image; "auc", "aopc" or "score"; or "scores", whose mean and
        error are curves. error: the standard error of the mean, NaN for a single image.

        Raises InputError for another measure, a table without images, or "srg" without one of its two orders.
        """
        if measure not in MEASURES:
            raise InputError(f"measure={measure!r}; write one of {', '.join(map(repr, MEASURES))}")
        labels = list(labels_of(self.manifest))
        if not self.table.num_rows:
            raise InputError(f"the sweep has no images; {len(self.failures)} batches failed")
        values = self._values("auc" if measure == "srg" else measure).reshape(-1, len(labels), *self._step(measure))
        if measure == "srg":
            if not {"lerf", "morf"} <= set(self.manifest["orders"]):
                raise InputError(f'"srg" needs the orders "lerf" and "morf"; the sweep has {self.manifest["orders"]}')
            lerf, morf = ([i for i, label in enumerate(labels) if label[2] == order] for order in ("lerf", "morf"))
            values, labels = values[:, lerf] - values[:, morf], [labels[i] for i in morf]
        count = len(values)
        spread = values.std(0, ddof=1) if count > 1 else np.full(values.shape[1:], np.nan)
        columns: dict[str, Any] = dict(zip(LABEL, zip(*labels, strict=True), strict=True))
        if measure == "srg":
            del columns["order"]
        found = {"mean": values.mean(0), "error": spread / np.sqrt(count), "images": np.full(len(labels), count)}
        return package("pyarrow").table(columns | {k: list(v) for k, v in found.items()})

    def srg(self) -> Any:
        """The symmetric relevance gain of every explainer, variant and fill: `means("srg")`."""
        return self.means("srg")

    def _step(self, measure: str) -> tuple[int, ...]:
        return (len(self.fractions),) if measure == "scores" else ()

    def _values(self, column: str) -> np.ndarray:
        chunks = self.table[column].chunks
        return np.concatenate([np.asarray(c.flatten() if column == "scores" else c, np.float64) for c in chunks])


def labels_of(manifest: dict[str, Any]) -> Iterator[tuple[str, int, str, str]]:
    """(explainer, variant, order, fill) of the rows of one image, in the order of the table."""
    for explainer in sorted(manifest["explainers"]):
        for variant in range(manifest["explainers"][explainer]["variants"]):
            for order in sorted(manifest["orders"]):
                for fill in sorted(manifest["fills"]):
                    yield explainer, variant, order, fill


def joined(results: list[dict[str, jax.Array]], count: int) -> dict[str, np.ndarray]:
    """The calls of one batch as one, without the rows that only fill up the last."""
    return {name: np.concatenate([np.asarray(r[name]) for r in results])[:count] for name in results[0]}


def rows(batch: int, targets: np.ndarray, measured: dict[str, np.ndarray], labels: list[Any]) -> Any:
    """One batch's part of the table. measured: score, auc, aopc (N, labels) and scores (N, labels, steps + 1)."""
    arrow, count = package("pyarrow"), len(targets)
    explainer, variant, order, fill = (list(column) * count for column in zip(*labels, strict=True))
    scores = measured["scores"]
    real = arrow.from_numpy_dtype(scores.dtype)
    ends = np.arange(count * len(labels) + 1, dtype=np.int32) * scores.shape[-1]
    columns = {
        "batch": arrow.array(np.full(count * len(labels), batch, np.int64)),
        "place": arrow.array(np.repeat(np.arange(count), len(labels))),
        "explainer": arrow.array(explainer, arrow.string()),
        "variant": arrow.array(variant, arrow.int64()),
        "order": arrow.array(order, arrow.string()),
        "fill": arrow.array(fill, arrow.string()),
        "target": arrow.array(np.repeat(targets.astype(np.int64), len(labels))),
        **{name: arrow.array(measured[name].ravel(), real) for name in ("score", "auc", "aopc")},
        "scores": arrow.ListArray.from_arrays(arrow.array(ends), arrow.array(scores.ravel(), real)),
    }
    return arrow.table(columns)


def read_sweep(folder: Any) -> Sweep:
    """What a sweep has written to its folder so far; nothing is computed, and parts still being written are left out.

    Raises SweepError for a folder without a manifest, or with a part that cannot be read.
    """
    arrow, manifest = package("pyarrow"), manifest_of(Path(folder))
    parts = parts_of(Path(folder))
    tables: dict[int, Any] = {}
    for part in parts:
        for batch, table in part.tables():
            tables.setdefault(batch, table)  # the same batch twice: two sweeps wrote to one folder
    failures = {i: why for part in parts for i, why in part.failures if i not in tables}
    empty = rows(0, np.zeros(0, np.int64), _nothing(), list(labels_of(manifest)))
    table = arrow.concat_tables([tables[i] for i in sorted(tables)]) if tables else empty
    layout = next((part.layout for part in parts if part.layout is not None), None)
    return Sweep(table, sorted(failures.items()), manifest, layout)


def judged(sweep: Sweep, count: int, folder: Path) -> Sweep:
    """The sweep, when it has ended, or SweepError where nothing of it can be meant. count: of the batches.

    Of several processes the last sees what all have written.
    """
    good = sweep.table["batch"].unique().to_pylist()
    why = dict(sweep.failures)
    unlike = [i for i in why if UNLIKE in why[i]]
    if not good and len(why) >= count:
        told = (
            f"all {len(why)} batches failed, batch {min(why)} by: {why[min(why)]}" if why else "there were no batches"
        )
        raise SweepError(
            f"the sweep in {folder} has no images: {told}. Give pairs (inputs, targets), with shape= the shape of one "
            f"input; retry=True measures failed batches again"
        )
    if len(good) == 1 and len(unlike) > 1 and len(good) + len(why) >= count:
        raise SweepError(
            f"the sweep in {folder} has one good batch, {good[0]}, and {len(unlike)} unlike it, as batch {unlike[0]}: "
            f"{why[unlike[0]]}. If that one is odd, write to another folder with shape= the shape of one input"
        )
    return sweep


def _nothing() -> dict[str, np.ndarray]:
    return {k: np.zeros((0, 1), np.float32) for k in ("score", "auc", "aopc")} | {"scores": np.zeros((0, 1, 1), "f4")}


class Bar:
    """The progress of one process, on stderr."""

    def __init__(self, total: int | None, done: int, show: bool):
        self.left, self.told = None if total is None else max(total - done, 0), False
        self.bar = package("tqdm").tqdm(total=total, initial=done, unit="batch", disable=not show, file=sys.stderr)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def step(self) -> None:
        self.left = None if self.left is None else self.left - 1
        self.bar.update()

    def tell(self, seconds: tuple[float, float]) -> None:
        """How long it will take, once, after the first batch. seconds: for compiling and for that batch."""
        if self.told:
            return
        self.told, (compiling, batch) = True, seconds
        text = f"compiled in {compiling:.1f} s, then {batch:.3g} s a batch"
        if self.left is not None:
            left = max(self.left - 1, 0)
            text += f": about {self.bar.format_interval(batch * left)} for the {left} batches left"
        log.info(text)
        if not self.bar.disable:
            self.bar.write(text, file=sys.stderr)
            self.bar.unpause()  # compiling is not counted in the bar's own estimate
