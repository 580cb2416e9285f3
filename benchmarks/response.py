"""The cost of explaining local response normalisation: the Taylor rule in units of the identity rule.

    python benchmarks/response.py --channels 32 128 512 --json response.json       # jaxlrp installed, or PYTHONPATH=.

The network is a convolution, a ReLU, the normalisation and a convolution, `--depth` times over; the layer alone is
measured too. Everything is jitted, with parameters and input as arguments. A round runs each function once, in an order
that rotates from round to round; a ratio compares two times of the same round, so that slow drifts of the machine
cancel. Memory is XLA's plan for the compiled program: all that is neither argument nor output.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxlrp
from jaxlrp import rules, select
from jaxlrp.nn import local_response_norm

BASELINE = "identity"
RULES: dict[str, rules.Rule] = {
    BASELINE: rules.Pass(),
    "taylor": rules.LocalResponseTaylor(),
    "taylor over y": rules.LocalResponseTaylor("over_y"),
    "taylor unnormalised": rules.LocalResponseTaylor("unnormalised"),
}
MIB = 2**20
Function = Callable[[Any, jax.Array], Any]


def layer(kernels: Any, x: jax.Array) -> jax.Array:
    return local_response_norm(x, alpha=1.0)


def network(kernels: Any, x: jax.Array) -> jax.Array:
    for kernel in kernels:
        x = local_response_norm(jax.nn.relu(convolve(x, kernel)), alpha=1.0)
    return convolve(x, kernels[0])


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def functions(model: Function) -> dict[str, Function]:
    """What is measured: the value, its gradient, and the relevance by each rule; all but the first with the value."""

    def explained(rule: rules.Rule) -> Function:
        rows = [(select.kind("local_response_norm"), rule)]
        composite = jaxlrp.Composite(rows) + jaxlrp.composites.epsilon()
        return jaxlrp.value_and_lrp(model, composite, argnums=1)

    def gradient(kernels: Any, x: jax.Array) -> Any:
        value, pull = jax.vjp(lambda x: model(kernels, x), x)
        return value, pull(value)

    return {"value": model, "value and gradient": gradient} | {name: explained(rule) for name, rule in RULES.items()}


def measure(model: Function, channels: int, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """One row per function: times of all rounds, memory, and ratios to the identity rule."""
    rng = np.random.default_rng(0)
    shape = (args.depth, 3, 3, channels, channels)
    kernels = jnp.asarray(rng.standard_normal(shape, np.float32) * np.float32((2 / (9 * channels)) ** 0.5))
    x = jnp.asarray(rng.standard_normal((args.batch, args.size, args.size, channels), np.float32))
    rows: dict[str, dict[str, Any]] = {}
    run = {}
    for name, function in functions(model).items():
        start = time.perf_counter()
        run[name] = jax.jit(function).lower(kernels, x).compile()
        rows[name] = {"compile_s": time.perf_counter() - start, "seconds": []}
        memory = run[name].memory_analysis()  # None where the platform has none
        rows[name]["temp_bytes"] = getattr(memory, "temp_size_in_bytes", None)
        outputs = jax.block_until_ready(run[name](kernels, x))  # the warm-up
        rows[name]["finite"] = all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(outputs))
    order = list(run)
    for _ in range(args.rounds):
        for name in order:
            start = time.perf_counter()
            jax.block_until_ready(run[name](kernels, x))
            rows[name]["seconds"].append(time.perf_counter() - start)
        order = order[1:] + order[:1]
    for row in rows.values():
        ratios = [a / b for a, b in zip(row["seconds"], rows[BASELINE]["seconds"], strict=True)]
        row |= {"median_s": median(row["seconds"]), "ratio": median(ratios)}
        row |= {"ratio_min": min(ratios), "ratio_max": max(ratios)}
    return rows


def table(title: str, rows: dict[str, dict[str, Any]]) -> str:
    heads = ("time ms", "ratio", "min", "max", "compile s", "temp MiB")
    lines = [title, f"  {'':22}" + "".join(f"{head:>11}" for head in heads)]
    for name, row in rows.items():
        temp = "-" if row["temp_bytes"] is None else f"{row['temp_bytes'] / MIB:.2f}"
        numbers = (row["median_s"] * 1e3, row["ratio"], row["ratio_min"], row["ratio_max"], row["compile_s"])
        cells = [*(f"{number:.2f}" for number in numbers), temp]
        note = "" if row["finite"] else "  not finite"
        lines.append(f"  {name:22}" + "".join(f"{cell:>11}" for cell in cells) + note)
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--size", type=int, default=28, help="height and width of the input")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()

    device = jax.devices()[0]
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": device.platform,
        "device_kind": device.device_kind,
        **{package: version(package) for package in ("jax", "jaxlib", "numpy")},
        **{name: getattr(args, name) for name in ("size", "depth", "batch", "rounds")},
        "results": [],
    }
    for channels in args.channels:
        for model in (layer, network):
            rows = measure(model, channels, args)
            report["results"].append({"model": model.__name__, "channels": channels, "rows": rows})
            shape = f"batch {args.batch}, {args.size}x{args.size}x{channels}"
            print(table(f"{model.__name__}, {shape}, {device.device_kind}", rows), end="\n\n", flush=True)
            if args.json:
                args.json.write_text(json.dumps(report, indent=1) + "\n")
    finite = all(row["finite"] for result in report["results"] for row in result["rows"].values())
    return 0 if finite else 1


if __name__ == "__main__":
    sys.exit(main())
