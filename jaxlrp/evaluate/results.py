"""What a sweep found: one table of all images, and its means."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .store import manifest_of, package, parts_of
from .stream import Layout

LABEL = ("explainer", "variant", "order", "fill")
MEASURES = ("srg", "auc", "aopc", "score", "scores")


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


def _nothing() -> dict[str, np.ndarray]:
    return {k: np.zeros((0, 1), np.float32) for k in ("score", "auc", "aopc")} | {"scores": np.zeros((0, 1, 1), "f4")}
