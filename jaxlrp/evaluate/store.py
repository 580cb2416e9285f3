"""Where a sweep's results are kept: Parquet files that are there completely or not at all.

A folder holds `manifest.json`, which says what was measured, and `part-<process>-<first batch>.parquet`, each with some
batches. A part is written under another name, brought to the disk and then renamed; in its own metadata it says which
batches it holds, of what data, and which could not be read. So there is no other record that a kill could leave behind
the data. Where failed batches are tried again, the name ends with a count: `part-<process>-<first batch>-1.parquet`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import SweepError
from .stream import Layout

MANIFEST, VERSIONS = "manifest.json", "versions"
KEY = b"jaxlrp"


def package(name: str) -> Any:
    """A package that only sweeps need."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'a sweep needs {name}, which is missing: pip install "jaxlrp[evaluate]"') from error


@dataclasses.dataclass(frozen=True)
class Part:
    """One file: how many rows each of its batches has, in the order of the rows; and (batch, why it has none).

    digests: of the data of each of its batches.
    """

    path: Path
    rows: dict[int, int]
    failures: list[tuple[int, str]]
    layout: Layout | None
    digests: dict[int, str]

    @classmethod
    def read(cls, path: Path) -> Part:
        try:
            told = json.loads(package("pyarrow.parquet").read_schema(path).metadata[KEY])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise _unreadable(path, error) from error
        layout = told["layout"]
        return cls(
            path,
            {int(i): count for i, count in told["rows"].items()},
            [(i, why) for i, why in told["failures"]],
            None if layout is None else Layout.from_dict(layout),
            {int(i): digest for i, digest in told.get("digests", {}).items()},
        )

    def tables(self) -> Iterator[tuple[int, Any]]:
        """(batch, its rows)."""
        try:
            table = package("pyarrow.parquet").ParquetFile(self.path).read().replace_schema_metadata(None)
        except (OSError, ValueError) as error:
            raise _unreadable(self.path, error) from error
        start = 0
        for batch, count in self.rows.items():
            yield batch, table.slice(start, count)
            start += count


def _unreadable(path: Path, error: Exception) -> SweepError:
    return SweepError(f"{path} cannot be read ({error!r}). Move it away, and its batches are measured again")


def parts_of(folder: Path) -> list[Part]:
    """The parts, those of later tries last."""
    return [Part.read(path) for path in sorted(folder.glob("part-*.parquet"), key=lambda p: (_turn(p), p))]


def _turn(path: Path) -> int:
    found = re.fullmatch(r"part-\d+-\d+-(\d+)", path.stem)
    return int(found[1]) if found else 0


def manifest_of(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise SweepError(f"{folder} is no folder of a sweep: {MANIFEST} cannot be read ({error})") from error


def write(path: Path, data: bytes) -> None:
    """The file, complete or not at all, also when the machine loses its power right after."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


class Store:
    """The folder of a running sweep, for one of `count` processes. retry: failed batches are not done.

    Raises SweepError for a folder that cannot be written, or that belongs to another sweep.
    """

    def __init__(self, folder: Any, manifest: dict[str, Any], process: int, count: int, retry: bool = False):
        self.folder, self.process = Path(folder), process
        probe = self.folder / f".probe-{process}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(probe, bytes(1 << 16))
            probe.unlink()
            for left in self.folder.glob("part-*.tmp"):  # by a process that was killed
                if int(left.name.split("-")[1]) % count == process:
                    left.unlink(missing_ok=True)
        except OSError as error:
            raise SweepError(f"cannot write to {self.folder}: {error}") from error
        parts = parts_of(self.folder)
        self.manifest = json.loads(json.dumps(manifest))
        self._keep_manifest(bool(parts))
        self._agree()
        self.done = {i for part in parts for i in (*part.rows, *(i for i, _ in part.failures if not retry))}
        self.digests = {i: digest for part in parts for i, digest in part.digests.items()}
        self.turn = 1 + max((_turn(part.path) for part in parts), default=0) if retry else 0
        self.layout = next((part.layout for part in parts if part.layout is not None), None)

    def _keep_manifest(self, begun: bool) -> None:
        path = self.folder / MANIFEST
        if begun and not path.exists():
            raise SweepError(f"{self.folder} holds parts of a sweep and no {MANIFEST}: write to another folder")
        if not begun:  # nothing is lost if an earlier one had other arguments, and stopped at once
            own = path.with_name(f".{MANIFEST}-{self.process}")  # processes may start at the same moment
            try:
                write(own, json.dumps(self.manifest, indent=1, sort_keys=True).encode())
                os.replace(own, path)
            except OSError as error:
                raise SweepError(f"cannot write {path}: {error}") from error

    def _agree(self) -> None:
        """Raises SweepError if the folder has become, or always was, that of another sweep."""
        old, new = flat(manifest_of(self.folder)), flat(self.manifest)
        differing = [k for k in sorted(old | new) if old.get(k) != new.get(k) and not k.startswith(VERSIONS)]
        if differing:
            shown = "; ".join(f"{k}: {short(old.get(k))} there, {short(new.get(k))} here" for k in differing)
            raise SweepError(f"{self.folder} holds another sweep, which differs in {shown}. Write to another folder")

    def append(
        self,
        tables: Mapping[int, Any],
        failures: Sequence[tuple[int, str]],
        layout: Layout | None,
        digests: Mapping[int, str],
    ) -> None:
        """One more part. SweepError where that is impossible; the earlier parts are as they were."""
        self._agree()
        arrow, parquet = package("pyarrow"), package("pyarrow.parquet")
        table = arrow.concat_tables(tables.values()) if tables else arrow.table({})
        told = {
            "rows": {i: rows.num_rows for i, rows in tables.items()},
            "failures": list(failures),
            "layout": None if layout is None else dataclasses.asdict(layout),
            "digests": {i: digests[i] for i in tables},
        }
        sink = arrow.BufferOutputStream()
        parquet.write_table(table.replace_schema_metadata({KEY: json.dumps(told)}), sink)
        first = min([*tables, *(i for i, _ in failures)])
        turn = f"-{self.turn}" if self.turn else ""
        path = self.folder / f"part-{self.process}-{first:06d}{turn}.parquet"
        if path.exists():
            raise SweepError(f"{path} is there already: does another sweep write to this folder?")
        try:
            write(path, sink.getvalue().to_pybytes())
        except OSError as error:
            raise SweepError(f"cannot write {path}: {error}. The parts before it are complete") from error


def flat(tree: Any, name: str = "") -> dict[str, Any]:
    """{"fills/mean": ...}: the leaves of nested dictionaries."""
    if not isinstance(tree, dict):
        return {name: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{name}/{key}" if name else key)
    return found


def short(value: Any) -> str:
    text = " ".join(str("nothing" if value is None else value).split())
    return text if len(text) <= 120 else f"{text[:80]} ... {text[-36:]}"
