"""Whether an explanation grows as its network does: depth, width, batch, image size doubled, in units of the gradient.

    python benchmarks/scaling.py --json scaling.json       # jaxlrp installed, or PYTHONPATH=.

A line is one network: the seconds of its value and gradient, and the ratios of the composites to it in the same rounds.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxlrp
import models
import rounds
from attention_models import ViT
from jaxlrp import composites

NETWORKS: dict[str, tuple[list[Any], list[str]]] = {
    "ResNet": (
        [
            *(("blocks a stage", n, models.ResNet((n,) * 4, bottleneck=False), 1, 64) for n in (1, 2, 4, 8)),
            *(("batch", n, models.ResNet((2,) * 4, bottleneck=False), n, 64) for n in (1, 2, 4, 8)),
            *(("size", n, models.ResNet((2,) * 4, bottleneck=False), 1, n) for n in (64, 128, 256)),
        ],
        ["epsilon", "epsilon_plus", "epsilon_alpha2_beta1"],
    ),
    "ViT": (
        [
            *(("depth", n, ViT(n, 192, 3, 768), 1, 224) for n in (3, 6, 12, 24)),
            *(("width", 64 * n, ViT(6, 64 * n, n, 256 * n), 1, 224) for n in (2, 4, 8)),
            *(("batch", n, ViT(6, 192, 3, 768), n, 224) for n in (1, 2, 4, 8)),
            *(("size", n, ViT(6, 192, 3, 768), 1, n) for n in (112, 224, 448)),
        ],
        ["attnlrp", "cp_lrp"],
    ),
}
BASE = "value_and_grad"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = {**rounds.record("scaling.py"), "rows": []}
    for title in options.networks:
        cases, chosen = NETWORKS[title]
        for what, n, model, batch, size in cases:
            x = jnp.asarray(np.random.default_rng(0).standard_normal((batch, size, size, 3), np.float32))
            params = models.randomise(jax.eval_shape(model.init, jax.random.key(0), x))
            runs = {BASE: lambda f=jax.jit(models.gradient(model.apply)), a=(params, x): f(*a)}  # noqa: B008
            for name in chosen:
                explain = jax.jit(jaxlrp.value_and_lrp(model.apply, getattr(composites, name)(), 1, 0))
                runs[name] = lambda f=explain, a=(params, x): f(*a)
            found = rounds.ratios(rounds.measure(runs, options.rounds), BASE)
            report["rows"].append({"network": title, "doubled": what, "at": n, "runs": found})
            ratios = "".join(f"  {name} {found[name]['ratio']:.2f}" for name in chosen)
            print(f"{title:8}{what:16}{n:5}{1e3 * found[BASE]['median_s']:10.1f} ms{ratios}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
