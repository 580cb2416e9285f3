"""What several explanations of the same inputs share: many targets in one call, sixteen gammas in one call.

    python benchmarks/sharing.py --json sharing.json       # jaxlrp installed, or PYTHONPATH=.

Beside one call (`jaxlrp.per_target`; `jax.vmap` over the gammas) stand as many calls of the compiled function for one.
Gammas are explained in three more ways: by `jax.vmap` over a stacked composite, which has sixteen of every number; by
`jax.lax.map`, four at a time, as `evaluate.sweep` does it; and one after the other under one `jit`. A ratio is to the
separate calls of the same round.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxlrp
import models
import rounds
from jaxlrp import composites

ALONE, TOGETHER, STACKED = "separate calls", "one call", "vmap over a stack"
FOURS, UNROLLED = "four at a time", "unrolled"


def gamma_box(gamma: float) -> jaxlrp.Composite:
    return composites.epsilon_gamma_box(-3.0, 3.0, gamma=gamma)


def of_gammas(apply: models.Apply, params: Any, x: jax.Array, count: int) -> dict[str, Callable]:
    gammas = np.geomspace(0.01, 1, count, dtype=np.float32)
    several = [gamma_box(float(g)) for g in gammas]
    stacked = jax.tree.map(lambda *v: jnp.stack([jnp.asarray(n, jnp.float32) for n in v]), *several)
    explain = jax.jit(lambda c, p, x: jaxlrp.lrp(apply, c, argnums=1, target=0)(p, x))
    together = jax.jit(jax.vmap(lambda g, p, x: explain(gamma_box(g), p, x), (0, None, None)))
    fours = jax.jit(lambda cs, p, x: jax.lax.map(lambda c: explain(c, p, x), cs, batch_size=4))
    unrolled = jax.jit(lambda cs, p, x: jnp.stack([explain(c, p, x) for c in cs]))
    mapped = jax.jit(jax.vmap(explain, (0, None, None)))
    return {
        ALONE: lambda: jnp.stack([explain(c, params, x) for c in several]),
        TOGETHER: lambda: together(gammas, params, x),
        FOURS: lambda: fours(stacked, params, x),
        UNROLLED: lambda: unrolled(several, params, x),
        STACKED: lambda: mapped(stacked, params, x),
    }


def of_targets(
    apply: models.Apply, params: Any, x: jax.Array, count: int, composite: jaxlrp.Composite
) -> dict[str, Callable]:
    targets = list(range(count))
    one = jax.jit(lambda p, x, t: jaxlrp.lrp(apply, composite, argnums=1, target=t)(p, x))
    each = jax.jit(lambda p, x: jaxlrp.per_target(apply, composite, 1, targets, batch_size=10)(p, x))
    return {
        ALONE: lambda: jnp.stack([one(params, x, t) for t in targets]),
        TOGETHER: lambda: each(params, x),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "vgg16"], choices=models.IMAGES)
    parser.add_argument("--gammas", type=int, default=16)
    parser.add_argument("--targets", type=int, nargs="*", default=[10, 100])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = {**rounds.record("sharing.py"), "batch": options.batch, "size": options.size, "models": {}}
    for name in options.models:
        apply, params, shape = models.build(name, options.size)
        x = jnp.asarray(np.random.default_rng(0).standard_normal((options.batch, *shape), np.float32).clip(-3, 3))
        cases = {f"{options.gammas} gammas": of_gammas(apply, params, x, options.gammas)} if options.gammas else {}
        for count in options.targets:
            for title, composite in (("epsilon", composites.epsilon()), ("gamma_box", gamma_box(0.25))):
                cases[f"{count} targets, {title}"] = of_targets(apply, params, x, count, composite)
        for case, runs in cases.items():
            first = {key: np.asarray(run()) for key, run in runs.items()}
            for key, found in first.items():
                assert np.abs(found - first[ALONE]).max() < 1e-3 * np.abs(first[ALONE]).max(), (case, key)
            seconds = rounds.measure(runs, options.rounds)
            rows = rounds.ratios(seconds, ALONE)
            report["models"].setdefault(name, {})[case] = {"rows": rows, "seconds": seconds}
            for key, row in rows.items():
                print(f"{name:10}{case:24}{key:20}{row['median_s']:9.3f} s{row['ratio']:8.2f}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
