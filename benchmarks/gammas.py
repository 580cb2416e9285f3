"""Sixteen gammas: one compiled call, as `evaluate.sweep` makes it, beside sixteen calls, and `jax.vmap` over a stack.

    python benchmarks/gammas.py --json gammas.json       # jaxlrp installed, or PYTHONPATH=.

All are jitted, with composites, parameters and images as arguments. A round runs each once, in an order that rotates;
ratios compare times of the same round.
"""

import argparse
import json
import os
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxlrp
import models
from jaxlrp import composites

ONE, MANY, MAPPED = "one call, unrolled", "one call for each", "one call, vmap"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "vgg16"], choices=models.MODELS)
    parser.add_argument("--gammas", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-vmap", action="store_true", help="leave the slowest out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python benchmarks/gammas.py", *sys.argv[1:]]),
        "device": jax.devices()[0].device_kind,
        "cpu_count": os.cpu_count(),
        "jax": version("jax"),
        "models": {},
    }
    for name in options.models:
        apply, params, shape = models.build(name, options.size)
        x = jnp.asarray(np.random.default_rng(0).standard_normal((options.batch, *shape), np.float32).clip(-3, 3))
        several = [
            composites.epsilon_gamma_box(-3.0, 3.0, gamma=float(g)) for g in np.geomspace(0.01, 1, options.gammas)
        ]
        explain = jax.jit(lambda c, p, x, f=apply: jaxlrp.lrp(f, c, argnums=1, target=0)(p, x))
        unrolled = jax.jit(lambda cs, p, x, explain=explain: [explain(c, p, x) for c in cs])
        mapped = jax.jit(jax.vmap(explain, (0, None, None)))
        stacked = jax.tree.map(lambda *v: jnp.stack([jnp.asarray(n, jnp.float32) for n in v]), *several)
        runs = {
            MANY: lambda a=(several, params, x), f=explain: [f(c, *a[1:]) for c in a[0]],
            ONE: lambda a=(several, params, x), f=unrolled: f(*a),
            MAPPED: lambda a=(stacked, params, x), f=mapped: f(*a),
        }
        if options.no_vmap:
            del runs[MAPPED]
        first = {key: np.stack(jax.block_until_ready(run())) for key, run in runs.items()}
        for key, found in first.items():
            scale = np.abs(first[MANY]).max()
            assert np.abs(found - first[MANY]).max() < 1e-3 * scale, key
        seconds: dict[str, list[float]] = {key: [] for key in runs}
        order = list(runs)
        for _ in range(options.rounds):
            for key in order:
                begun = time.perf_counter()
                jax.block_until_ready(runs[key]())
                seconds[key].append(time.perf_counter() - begun)
            order = order[1:] + order[:1]
        ratios = {k: median(a / b for a, b in zip(seconds[k], seconds[MANY], strict=True)) for k in runs}
        report["models"][name] = {"ratios": ratios, "seconds": seconds}
        for key, ratio in ratios.items():
            print(f"{name:10}{key:22}{median(seconds[key]):8.2f} s{ratio:8.2f}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
