"""Relevance of bfloat16 networks: how far it is from that of the same network in float32.

    python benchmarks/precision.py --json precision.json       # jaxlrp installed, or PYTHONPATH=.

Parameters and inputs are rounded to bfloat16 first, so that both networks are the same but for the arithmetic. The
deviation is max|R16 - R32| / max|R32| per image; the table shows its mean and its greatest value. The yardstick is
gradient x input, which has no rules at all.
"""

import argparse
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import attention_models
import jaxlrp
import models
from jaxlrp import composites, gradients

COMPOSITES: dict[str, dict[str, jaxlrp.Composite]] = {
    "resnet50": {
        "epsilon": composites.epsilon(),
        "epsilon_plus": composites.epsilon_plus(),
        "epsilon_plus_flat": composites.epsilon_plus_flat(),
        "excitation_backprop": composites.excitation_backprop(),
        "epsilon_alpha2_beta1": composites.epsilon_alpha2_beta1(),
        "epsilon_gamma_box": composites.epsilon_gamma_box(-3.0, 3.0),
    },
    "vit": {
        "epsilon": composites.epsilon(),
        "attnlrp": composites.attnlrp(),
        "cp_lrp": composites.cp_lrp(),
    },
}


def build(name: str, size: int) -> tuple[Callable, Any, tuple[int, int, int]]:
    if name == "resnet50":
        return models.build(name, size)
    model = attention_models.ViT(depth=12, width=192, heads=3, mlp=768)  # ViT-Ti/16
    params = model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)))
    return model.apply, params, (size, size, 3)


def measure(name: str, size: int, images: int) -> dict[str, Any]:
    apply, params, shape = build(name, size)
    x = np.random.default_rng(1).standard_normal((images, *shape), np.float32).clip(-3, 3)
    half = jax.tree.map(lambda v: jnp.asarray(v, jnp.bfloat16), (params, x))
    full = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), half)
    target = np.asarray(jax.jit(apply)(*full)).argmax(-1)

    def deviation(explain: Callable) -> dict[str, float]:
        r32, r16 = (np.asarray(jax.jit(explain)(*args), np.float32) for args in (full, half))
        axes = tuple(range(1, r32.ndim))
        found = np.abs(r16 - r32).max(axes) / np.abs(r32).max(axes)
        return {"mean": float(found.mean()), "greatest": float(found.max())}

    rows = {"gradient x input": deviation(gradients.gradient_x_input(apply, argnums=1, target=target))}
    for key, composite in COMPOSITES[name].items():
        rows[key] = deviation(jaxlrp.lrp(apply, composite, argnums=1, target=target))
    return {"model": name, "size": size, "images": images, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(COMPOSITES), choices=COMPOSITES)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    platform = jax.devices()[0]
    report: dict[str, Any] = {"jax": version("jax"), "device": platform.device_kind, "models": []}
    for name in args.models:
        report["models"].append(result := measure(name, args.size, args.images))
        print(f"{name}, {args.images} images of {args.size}x{args.size}\n  {'':32}{'mean':>10}{'greatest':>10}")
        for key, row in result["rows"].items():
            print(f"  {key:32}{row['mean']:>10.4f}{row['greatest']:>10.4f}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
