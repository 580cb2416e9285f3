"""Hyper-parameter search on the Fashion-MNIST CNN: gamma and epsilon by depth, for the symmetric relevance gain.

    python benchmarks/experiments/search.py --data FOLDER          # jaxlrp installed, or PYTHONPATH=.; needs optax

FOLDER holds the IDX files of Fashion-MNIST (jaxlrp/demo/train.py names them). The network is the one bundled with the
demo, the preset `epsilon_gamma_box(-1, 1)`, gamma 0.25 and epsilon 1e-6 everywhere. Each seed draws images for the
search from the training split and others to judge on from the test split, which nothing but the last figures sees:

    grid     SRG itself at every combination of GAMMAS (twice: second and third convolution) and EPSILONS
    ascent   Adam on the soft SRG of the same images, from the preset's gammas and from the epsilon of the grid's best

SRG: tiles of 4 x 4 pixels replaced by uniform noise in [-1, 1], the probability of the predicted class, area between
the least and the most relevant first. Differences are paired, image by image.
"""

import argparse
import itertools
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jaxlrp import Composite, evaluate, lrp, rules, select
from jaxlrp.demo.cnn import load, normalise
from jaxlrp.demo.train import read_split

GAMMAS = (0.001, 0.25, 2.0)
EPSILONS = (1e-6, 0.3)
PRESET = {"conv2": 0.25, "conv3": 0.25, "dense": 1e-6}
MODEL, VARIABLES, *_ = load()


def by_depth(conv2: float, conv3: float, dense: float) -> Composite:
    """`epsilon_gamma_box` with a gamma for each convolution."""
    return Composite([
        (select.first("conv"), rules.ZBox(-1.0, 1.0)),
        (select.kind("conv") & select.depth(1, 2), rules.GeneralizedGamma(conv2)),
        (select.kind("conv") & select.depth(2, 3), rules.GeneralizedGamma(conv3)),
        (select.kind("dense"), rules.Epsilon(dense)),
    ])  # fmt: skip


def numbers(composite: Composite) -> dict[str, float]:
    _, (_, conv2), (_, conv3), (_, dense) = composite.rows
    found: Any = (conv2.gamma, conv3.gamma, dense.epsilon)  # type: ignore[attr-defined]
    return dict(zip(PRESET, (float(v) for v in found), strict=True))


def logits(variables: Any, x: jax.Array) -> jax.Array:
    return MODEL.apply(variables, x)


PROBABILITY = jax.tree_util.Partial(lambda variables, x: jax.nn.softmax(logits(variables, x)), VARIABLES)


def draw(split: tuple[np.ndarray, np.ndarray], count: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """Images and their predicted classes."""
    rows = np.random.default_rng(seed).choice(len(split[0]), count, replace=False)
    x = normalise(split[0][rows])
    return x, jax.jit(logits)(VARIABLES, x).argmax(-1)


def gain(composite: Composite, x: jax.Array, classes: jax.Array, key: jax.Array) -> jax.Array:
    """(N,): SRG."""
    relevance = lrp(logits, composite, argnums=1, target=classes)(VARIABLES, x)
    lerf, morf = (
        evaluate.pixel_flipping(
            PROBABILITY, x, relevance, classes, order=order, region=4, steps=7, fill="uniform", key=key
        )
        for order in ("lerf", "morf")
    )
    return evaluate.srg(lerf, morf)


def soft_gain(composite: Composite, x: jax.Array, classes: jax.Array, key: jax.Array, temperature: float) -> jax.Array:
    """(N,): its stand-in, at half of the steps: a gradient costs four times a value."""
    relevance = lrp(logits, composite, argnums=1, target=classes)(VARIABLES, x)
    options: dict[str, Any] = {"region": 4, "steps": 4, "fill": "uniform", "key": key, "temperature": temperature}
    return evaluate.surrogate(PROBABILITY, x, relevance, classes, **options)


def compared(better: np.ndarray, worse: np.ndarray) -> dict[str, float]:
    difference = better - worse
    return {
        "difference": float(difference.mean()),
        "standard_error": float(difference.std(ddof=1) / np.sqrt(len(difference))),
        "images_better": float((difference > 0).mean()),
    }


def run(train: Any, test: Any, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    key = jax.random.key(seed)
    x, classes = draw(train, options.search, seed)
    begun = time.perf_counter()
    tried = [by_depth(a, b, e) for a, b, e in itertools.product(GAMMAS, GAMMAS, EPSILONS)]
    preset = by_depth(**PRESET)
    best = evaluate.grid(lambda c: gain(c, x, classes, key), [preset, *tried])
    seconds = {"grid": time.perf_counter() - begun}
    begun = time.perf_counter()
    ascent = evaluate.ascend(
        lambda c: soft_gain(c, x, classes, key, options.temperature),
        by_depth(**(PRESET | {"dense": numbers(best.composite)["dense"]})),
        optax.adam(options.rate),
        options.steps,
        trainable=("*/gamma",),
    )
    seconds["ascent"] = time.perf_counter() - begun

    chosen = {"preset": preset, "grid": best.composite, "ascent": ascent.composite}
    x, classes = draw(test, options.held_out, seed)
    begun = time.perf_counter()
    judged = evaluate.grid(
        lambda c: gain(c, x, classes, jax.random.key(1000 + seed)),
        [by_depth(**numbers(c)) for c in chosen.values()],
    )
    seconds["held out"] = time.perf_counter() - begun
    values = dict(zip(chosen, np.asarray(judged.values, np.float64), strict=True))
    result = {
        "seed": seed,
        "numbers": {name: numbers(c) for name, c in chosen.items()},
        "search_srg": {"preset": float(best.values[0].mean()), "grid": float(best.values[best.best].mean())},
        "ascent_soft_srg": np.asarray(ascent.values).tolist(),
        "held_out_srg": {name: float(v.mean()) for name, v in values.items()},
        "held_out_against_preset": {n: compared(values[n], values["preset"]) for n in ("grid", "ascent")},
        "seconds": seconds,
    }
    print(json.dumps(result, indent=2), flush=True)
    return result


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| seed | composite | gamma conv2 | gamma conv3 | epsilon | held-out SRG | minus preset |",
        "|" + "---|" * 7,
    ]
    for r in results:
        for name, n in r["numbers"].items():
            row = r["held_out_against_preset"].get(name)
            by = f"{row['difference']:+.4f} ± {row['standard_error']:.4f}" if row else ""
            srg = r["held_out_srg"][name]
            lines.append(
                f"| {r['seed']} | {name} | {n['conv2']:.3g} | {n['conv3']:.3g} | {n['dense']:.3g} | {srg:.4f} | {by} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the Fashion-MNIST IDX files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--search", type=int, default=64, help="images to search on")
    parser.add_argument("--held-out", type=int, default=512, help="images to judge on")
    parser.add_argument("--steps", type=int, default=12, help="of the ascent")
    parser.add_argument("--rate", type=float, default=0.4, help="of the ascent, in logarithms")
    parser.add_argument("--temperature", type=float, default=0.03)
    parser.add_argument("--json", type=Path, help="write the figures here, and the table beside it as .md")
    options = parser.parse_args()
    train, test = (read_split(options.data, split) for split in ("train", "t10k"))
    results = [run(train, test, seed, options) for seed in options.seeds]
    print(table(results))
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k not in ("data", "json")}
        grid_of = {"gammas": GAMMAS, "epsilons": EPSILONS, "region": 4, "fill": "uniform in [-1, 1]", "steps of SRG": 7}
        about = {"jax": version("jax"), "python": platform.python_version(), "optax": version("optax")}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"settings": settings | grid_of, "versions": about, "seeds": results}, indent=1) + "\n"
        )
        options.json.with_suffix(".md").write_text(table(results) + "\n")


if __name__ == "__main__":
    main()
