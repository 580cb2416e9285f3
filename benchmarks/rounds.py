"""How every benchmark here measures: interleaved rounds, ratios within a round, and where and on what it ran."""

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import jax


def measure(runs: Mapping[str, Callable[[], Any]], rounds: int, pause: float = 0) -> dict[str, list[float]]:
    """Seconds of each run in each round, after one run to warm up; the order rotates from round to round.

    A run returns arrays, which are waited for, or nothing. pause: seconds before each, for another library's threads
    look for work for a while after its run.
    """
    for run in runs.values():
        jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(rounds):
        for name in order:
            time.sleep(pause)
            begun = time.perf_counter()
            jax.block_until_ready(runs[name]())
            seconds[name].append(time.perf_counter() - begun)
        order = order[1:] + order[:1]
    return seconds


def ratios(seconds: Mapping[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Of each run the median time, and the median, least and greatest of its ratios to `base` in the same round."""
    found = {}
    for name, own in seconds.items():
        each = [a / b for a, b in zip(own, seconds[base], strict=True)]
        found[name] = {"median_s": median(own), "ratio": median(each), "ratio_min": min(each), "ratio_max": max(each)}
    return found


def record(script: str, *packages: str, device: bool = True) -> dict[str, Any]:
    """When, how and on what a report was made, with the versions of the packages that are installed.

    device: False where processes of their own measure, and this one must leave the device's memory to them.
    """
    installed = {d.name.lower() for d in importlib.metadata.distributions() if d.name}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([f"python benchmarks/{script}", *sys.argv[1:]]),
        **({"device": jax.devices()[0].device_kind} if device else {}),
        "environment": {k: os.environ[k] for k in ("GLIBC_TUNABLES", "XLA_FLAGS") if k in os.environ},
        "cpu_count": os.cpu_count(),
        "load_average": os.getloadavg(),
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "python": platform.python_version(),
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "flax", *packages) if p.lower() in installed},
    }


def processor() -> str:
    """The processor's name, which Python has on some systems only."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
