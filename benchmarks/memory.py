"""Memory of explanations beside that of the gradient, under both of XLA's orders of execution on CPU.

    python benchmarks/memory.py --json memory.json       # jaxlrp installed, or PYTHONPATH=.

XLA on CPU orders a program for concurrency unless told otherwise: what does not depend on relevance, such as the
denominators of z+, is then computed as soon as it can be, and kept until relevance arrives. `memory` is the order that
`jax.jit(f, compiler_options=LESS)` asks for. MiB are XLA's plan of temporaries; ratios are to value_and_grad in the
same order; `time` is that of a run beside the same run in the other order.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxlrp
import models
import rounds
from jaxlrp import composites

LESS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
ORDERS: dict[str, dict[str, str]] = {"default": {}, "memory": LESS}
COMPOSITES = {
    "epsilon": composites.epsilon,
    "epsilon_plus_flat": composites.epsilon_plus_flat,
    "epsilon_gamma_box": lambda: composites.epsilon_gamma_box(-3.0, 3.0),
    "epsilon_alpha2_beta1": composites.epsilon_alpha2_beta1,
}
BASE = "value_and_grad"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vgg16", "resnet50", "efficientnet"], choices=models.IMAGES)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = rounds.record("memory.py") | {"options": LESS, "rows": []}
    print(f"{'':42}{'default MiB':>12}{'ratio':>7}{'memory MiB':>12}{'ratio':>7}{'time':>7}")
    for name in options.models:
        apply, params, shape = models.build(name)
        functions = {BASE: models.gradient(apply)} | {
            c: jaxlrp.value_and_lrp(apply, f(), 1, 0) for c, f in COMPOSITES.items()
        }
        for batch in options.batches:
            x = jax.numpy.asarray(np.random.default_rng(0).standard_normal((batch, *shape), np.float32).clip(-3, 3))
            base: dict[str, float] = {}
            for title, f in functions.items():
                compiled = {k: jax.jit(f).lower(params, x).compile(compiler_options=o) for k, o in ORDERS.items()}
                mib = {k: c.memory_analysis().temp_size_in_bytes / 2**20 for k, c in compiled.items()}
                base = base or mib
                runs = {k: lambda c=c, x=x, params=params: c(params, x) for k, c in compiled.items()}
                ratio = rounds.ratios(rounds.measure(runs, options.rounds), "default")["memory"]["ratio"]
                row = {"model": name, "batch": batch, "function": title, "MiB": mib, "time": ratio}
                report["rows"].append(row | {"ratio": {k: mib[k] / base[k] for k in mib}})
                cells = "".join(f"{mib[k]:12.0f}{mib[k] / base[k]:7.2f}" for k in ORDERS)
                print(f"{name:14}{batch:4}  {title:22}{cells}{ratio:7.2f}", flush=True)
                if options.json:
                    options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
