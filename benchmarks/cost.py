"""The cost of relevance in units of the gradient: time and memory of each composite relative to `jax.value_and_grad`.

    python benchmarks/cost.py --models vgg16 resnet50 cnn --json cost.json       # jaxlrp installed, or PYTHONPATH=.

The baseline is the value and the gradient of one logit with respect to the input. Everything is jitted, with the
composite, the parameters and the input as arguments. A round runs each function once, in an order that rotates from
round to round; a ratio compares two times of the same round, so that slow drifts of the machine cancel, and the table
shows the median ratio, the least and the greatest. Trace time is that of one call without caches, compile time that of
lowering and XLA together. Transformers are explained by `attnlrp` and `cp_lrp`, the decoder at its embedded tokens; the
pattern methods, whose patterns must be fitted first, are left out.

Memory is XLA's plan for the compiled program: `temp` is all that is neither argument nor output, without what a
convolution library allocates at run time. Each model runs in a process of its own, whose peak resident memory, over
all functions and their compilation, is reported once. What fails is recorded in its place; a process that the system
kills takes its own model's times with it, and no other's.
"""

import argparse
import itertools
import json
import multiprocessing
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

import jaxlrp
import models
import rounds

BASELINE = "value_and_grad"
COMPOSITES: dict[str, Callable[[], jaxlrp.Composite]] = {
    "epsilon": jaxlrp.composites.epsilon,
    "epsilon_plus": jaxlrp.composites.epsilon_plus,
    "epsilon_plus_flat": jaxlrp.composites.epsilon_plus_flat,
    "epsilon_gamma_box": lambda: jaxlrp.composites.epsilon_gamma_box(low=-3.0, high=3.0),
    "epsilon_alpha2_beta1": jaxlrp.composites.epsilon_alpha2_beta1,
    "epsilon_alpha2_beta1_flat": jaxlrp.composites.epsilon_alpha2_beta1_flat,
    "deep_taylor": jaxlrp.composites.deep_taylor,
    "excitation_backprop": jaxlrp.composites.excitation_backprop,
    "guided_backprop": jaxlrp.composites.guided_backprop,
    "deconvnet": jaxlrp.composites.deconvnet,
    "beta_smooth": jaxlrp.composites.beta_smooth,
    "attnlrp": jaxlrp.composites.attnlrp,
    "cp_lrp": jaxlrp.composites.cp_lrp,
}
TRANSFORMERS = ("vit", "decoder")
MEMORY = ("temp_size_in_bytes", "argument_size_in_bytes", "output_size_in_bytes")
MIB = 2**20
COLUMNS = (  # of the table: title, key of the row, scale
    ("time ms", "median_s", 1e3),
    ("ratio", "ratio", 1),
    ("min", "ratio_min", 1),
    ("max", "ratio_max", 1),
    ("trace s", "trace_s", 1),
    ("ratio", "trace_ratio", 1),
    ("compile s", "compile_s", 1),
    ("ratio", "compile_ratio", 1),
    ("temp MiB", "temp_size_in_bytes", 1 / MIB),
    ("ratio", "temp_ratio", 1),
    ("args MiB", "argument_size_in_bytes", 1 / MIB),
    ("out MiB", "output_size_in_bytes", 1 / MIB),
)


def text_of(error: Exception) -> str:
    """The error as the record keeps it; the table shows its first line, stderr the traceback."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


def prepare(name: str, apply: models.Apply, params: Any, x: jax.Array) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
    """The jitted function of one row of the table, and its arguments."""
    if name == "forward":
        return jax.jit(apply), (params, x)
    if name == BASELINE:
        return jax.jit(models.gradient(apply)), (params, x)
    lrp = jax.jit(lambda c, p, x: jaxlrp.value_and_lrp(apply, c, argnums=1, target=0)(p, x))
    return lrp, (COMPOSITES[name](), params, x)


def defaults(model: str) -> list[str]:
    """The composites that are meant for a model."""
    attention = ("attnlrp", "cp_lrp")
    return [c for c in COMPOSITES if (c in attention) == (model in TRANSFORMERS)]


def measure(model: str, batch: int, args: argparse.Namespace, out: Path) -> None:
    """Measure one model; write its result to `out` after every step, so that a killed process leaves a record."""
    repeats = args.rounds if batch == 1 else min(args.rounds, 3)
    result: dict[str, Any] = {"model": model, "batch": batch, "rounds": repeats, "size": args.size, "rows": {}}
    rows: dict[str, dict[str, Any]] = result["rows"]

    def save() -> None:
        result["peak_rss_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        out.write_text(json.dumps(result))

    try:
        jax.config.update("jax_enable_compilation_cache", False)  # or compile times would be those of reading a file
        device = jax.devices()[0]
        result |= {"platform": device.platform, "device_kind": device.device_kind}
        apply, params, shape = models.build(model, args.size)
        result["shape"] = shape
        images = np.random.default_rng(1).standard_normal((batch, *shape), np.float32)
        x = jax.numpy.asarray(images.clip(-3, 3))
        run = {}
        for name in ("forward", BASELINE, *(args.composites or defaults(model))):
            row: dict[str, Any] = {}
            rows[name] = row
            save()  # should this row kill the process, the record ends with it
            jax.clear_caches()
            try:
                function, arguments = prepare(name, apply, params, x)
                start = time.perf_counter()
                traced = function.trace(*arguments)
                row["trace_s"] = time.perf_counter() - start
                compiled = traced.lower().compile()
                row["compile_s"] = time.perf_counter() - start - row["trace_s"]
                memory = compiled.memory_analysis()  # None where the platform has none
                row |= {key: getattr(memory, key) for key in MEMORY if hasattr(memory, key)}
                outputs = jax.block_until_ready(compiled(*arguments))  # the warm-up
                row["finite"] = all(bool(jax.numpy.isfinite(leaf).all()) for leaf in jax.tree.leaves(outputs))
                row["seconds"] = []
                run[name] = (compiled, arguments)
            except Exception as error:
                row["error"] = text_of(error)
        order = list(run)
        for _ in range(repeats):
            for name in order:
                compiled, arguments = run[name]
                start = time.perf_counter()
                jax.block_until_ready(compiled(*arguments))
                rows[name]["seconds"].append(time.perf_counter() - start)
            order = order[1:] + order[:1]
            save()
    except Exception as error:
        result["error"] = text_of(error)
    save()


def summarise(result: dict[str, Any]) -> None:
    """Add to each row its median time, and its ratios to the baseline."""
    rows = result["rows"]
    baseline = rows.get(BASELINE, {})
    for row in rows.values():
        if row.get("seconds"):
            row["median_s"] = median(row["seconds"])
            if ratios := [a / b for a, b in zip(row["seconds"], baseline.get("seconds", []), strict=False)]:
                row |= {"ratio": median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
        for key in ("temp_size_in_bytes", "trace_s", "compile_s"):
            if row.get(key) and baseline.get(key):
                row[key.split("_")[0] + "_ratio"] = row[key] / baseline[key]


def table(result: dict[str, Any]) -> str:
    """One model's result as aligned text."""
    rss = result.get("peak_rss_bytes", 0) / MIB
    shape = "x".join(map(str, (result["batch"], *result.get("shape", ()))))
    title = f"{result['model']}, {shape}, {result.get('device_kind', 'no device')}"
    lines = [f"{title}, peak RSS {rss:.0f} MiB", f"  {'':26}" + "".join(f"{column:>10}" for column, *_ in COLUMNS)]
    for name, row in result["rows"].items():
        cells = (f"{row[key] * scale:.2f}" if key in row else "-" for _, key, scale in COLUMNS)
        note = row.get("error", "" if row.get("finite", True) else "not finite").partition("\n")[0]
        lines.append(f"  {name:26}" + "".join(f"{cell:>10}" for cell in cells) + f"  {note}".rstrip())
    if "error" in result:
        lines.append(f"  stopped: {result['error']}".partition("\n")[0])
    return "\n".join(lines)


def isolated(model: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a fresh process, which the system may kill without harm to the others."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(model, batch, args, out))
        process.start()
        process.join()
        result: dict[str, Any] = {"model": model, "batch": batch, "size": args.size, "rows": {}}
        if out.exists():
            result = json.loads(out.read_text())
    if process.exitcode:
        result["error"] = f"the process ended with exit code {process.exitcode}"
    summarise(result)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(models.MODELS), choices=models.MODELS)
    parser.add_argument("--composites", nargs="+", choices=COMPOSITES, help="else those meant for each model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1], help="those above 1 are measured in 3 rounds")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, default=224, help="height and width of the input")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()

    report = {**rounds.record("cost.py", "jaxlib", "numpy", device=False), "size": args.size, "models": []}
    for model, batch in itertools.product(args.models, args.batches):
        report["models"].append(isolated(model, batch, args))
        print(table(report["models"][-1]), end="\n\n", flush=True)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    failed = [m for m in report["models"] if "error" in m or any("error" in row for row in m["rows"].values())]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
