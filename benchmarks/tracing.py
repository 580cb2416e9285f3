"""What rewriting costs before anything runs: tracing, program size, compilation, relative to `jax.value_and_grad`.

    python benchmarks/tracing.py --json tracing.json       # jaxlrp installed, or PYTHONPATH=.

Nothing is computed: parameters are shapes. A round traces every function once, in an order that rotates; a ratio
compares two times of the same round, and the table shows the median ratio, the least and the greatest. Size is the
number of operations in the StableHLO that tracing and lowering give, before XLA, which compiles it once. For token
models the gradient is that of the embedding's output, which costs the same passes.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

import attention_models
import jaxlrp

MODELS: dict[str, tuple[Any, Any]] = {
    "ViT-B/16": (attention_models.ViT(), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)),
    "ViT-B/16, scanned": (attention_models.ViT(scanned=True), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)),
    "GPT-2, 24 layers": (
        attention_models.Decoder(depth=24, width=1024, heads=16),
        jax.ShapeDtypeStruct((1, 128), jnp.int32),
    ),
    "GPT-2, 24 layers, scanned": (
        attention_models.Decoder(depth=24, width=1024, heads=16, scanned=True),
        jax.ShapeDtypeStruct((1, 128), jnp.int32),
    ),
}
COMPOSITES = {"attnlrp": jaxlrp.composites.attnlrp, "cp_lrp": jaxlrp.composites.cp_lrp}


def functions(model: Any, x: Any) -> tuple[dict[str, Callable], Any]:
    """The functions of one model, each of (params, x), by name."""
    params = jax.eval_shape(model.init, jax.random.key(0), x)

    def gradient(params: Any, x: Any) -> Any:
        if jnp.issubdtype(x.dtype, jnp.integer):  # with respect to a copy of the table: all that depends on the ids
            return jax.value_and_grad(partial(logit_of_table, model, params, x))(table_of(params))
        return jax.value_and_grad(lambda x: model.apply(params, x)[:, 0].sum())(x)

    found: dict[str, Callable] = {"value_and_grad": gradient}
    for name, composite in COMPOSITES.items():
        explain = jaxlrp.value_and_lrp(model.apply, composite(), argnums=1, target=0)
        found[name] = explain
    return found, params


def logit_of_table(model: Any, params: Any, x: Any, table: Any) -> Any:
    return model.apply(with_table(params, table), x)[:, 0].sum()


def table_of(params: Any) -> Any:
    return params["params"]["tokens"]["embedding"]


def with_table(params: Any, table: Any) -> Any:
    return {"params": {**params["params"], "tokens": {"embedding": table}}}


def operations(lowered: Any) -> int:
    return sum(" = " in line for line in lowered.as_text().splitlines())


def measure(name: str, rounds: int) -> dict[str, Any]:
    model, x = MODELS[name]
    found, params = functions(model, x)
    rows: dict[str, Any] = {}
    for key, f in found.items():
        jax.clear_caches()
        lowered = jax.jit(f).lower(params, x)
        start = time.perf_counter()
        lowered.compile()
        rows[key] = {"operations": operations(lowered), "compile_s": time.perf_counter() - start, "seconds": []}
    order = list(found)
    for _ in range(rounds):
        for key in order:
            jax.clear_caches()
            f = found[key]
            start = time.perf_counter()
            jax.jit(lambda *args, f=f: f(*args)).trace(params, x)
            rows[key]["seconds"].append(time.perf_counter() - start)
        order = order[1:] + order[:1]
    base = rows["value_and_grad"]
    for row in rows.values():
        ratios = [a / b for a, b in zip(row["seconds"], base["seconds"], strict=True)]
        row |= {
            "median_s": median(row["seconds"]),
            "ratio": median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "size_ratio": row["operations"] / base["operations"],
            "compile_ratio": row["compile_s"] / base["compile_s"],
        }
    return {"model": name, "rows": rows}


def table(result: dict[str, Any]) -> str:
    titles = ("trace s", "ratio", "min", "max", "operations", "ratio", "compile s", "ratio")
    lines = [result["model"], f"  {'':16}" + "".join(f"{t:>12}" for t in titles)]
    for key, row in result["rows"].items():
        cells = [f"{row[k]:.2f}" for k in ("median_s", "ratio", "ratio_min", "ratio_max")]
        cells += [str(row["operations"]), f"{row['size_ratio']:.2f}"]
        cells += [f"{row[k]:.2f}" for k in ("compile_s", "compile_ratio")]
        lines.append(f"  {key:16}" + "".join(f"{c:>12}" for c in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu_count": os.cpu_count(),
        "load_average": os.getloadavg(),
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version(package) for package in ("jax", "flax")},
        "rounds": args.rounds,
        "models": [],
    }
    for name in args.models:
        report["models"].append(measure(name, args.rounds))
        print(table(report["models"][-1]), end="\n\n", flush=True)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
