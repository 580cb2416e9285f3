"""Pixel flipping on networks with local response normalisation: every rule, with the identity and with Taylor.

    python benchmarks/experiments/networks.py mnist --data data
    python benchmarks/experiments/faithfulness.py mnist --data data --images 300
    python benchmarks/experiments/networks.py cifar --data data
    python benchmarks/experiments/faithfulness.py cifar --data data --images 200

explains the true class of the first images of the test set for each network below data/networks, and flips tiles of 4x4
pixels; the score is the softmax probability of that class. Curves and areas of every image go to data/flipping, a file
a network, which a second run reads; tables.py makes the committed tables and figures from them.

`faithfulness.py trap` shows the imputer trap: the MNIST networks, fed images in [0, 1] that a first operation scales to
[-1, 1]. They are the same functions of the same images, but the background is now 0 and has no relevance by
construction, for every rule that multiplies by the input.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from data import DATA
from networks import NETWORKS, load, network

from jaxlrp import Composite, evaluate, gradients, lrp, rules, select
from jaxlrp.evaluate import fills

REGION = 4
STEPS = {"mnist": 49, "trap": 49, "cifar": 32, "cifar-weak": 32}
# What stands in the place of a flipped pixel. Inputs lie in [-1, 1]; MNIST's background is -1.
CIFAR = {"uniform": fills.Uniform(-1, 1), "blur": fills.Blur(4.0)}
FILLS = {
    "mnist": {"uniform": fills.Uniform(-1, 1), "invert": fills.Invert(-1, 1), "background": fills.Constant(-1.0)},
    "trap": {"uniform": fills.Uniform(0, 1), "invert": fills.Invert(0, 1), "background": fills.Constant(0.0)},
    "cifar": CIFAR,
    "cifar-weak": CIFAR,
}
LAYERS: dict[str, rules.Rule] = {
    "epsilon 0.01": rules.Epsilon(0.01),
    "epsilon 1": rules.Epsilon(1.0),
    "epsilon 100": rules.Epsilon(100.0),
    "beta 1": rules.AlphaBeta.from_beta(1.0),
    "beta 0": rules.AlphaBeta.from_beta(0.0),
}
RESPONSE: dict[str, rules.Rule] = {
    "identity": rules.Pass(),
    "Taylor": rules.LocalResponseTaylor(),
    "unnormalised": rules.LocalResponseTaylor("unnormalised"),
}
SAME = {"trap": "mnist"}  # whose networks an experiment has that has none of its own
SHOWN = ("sensitivity", "gradient x input", "epsilon 0.01, identity", "beta 1, identity")  # in figures
Explain = Callable[[Any, jax.Array, jax.Array], jax.Array]


def methods(model: Callable) -> dict[str, Explain]:
    """Functions (parameters, images, classes) -> relevance like the images."""

    def by_rules(layer: rules.Rule, response: rules.Rule) -> Explain:
        rows = [(select.kind("conv", "dense"), layer), (select.kind("local_response_norm"), response)]
        return lambda params, x, y: lrp(model, Composite(rows), argnums=1, target=y)(params, x)

    found: dict[str, Explain] = {
        "sensitivity": lambda params, x, y: gradients.sensitivity(model, 1, y)(params, x),
        "gradient x input": lambda params, x, y: gradients.gradient_x_input(model, 1, y)(params, x),
    }
    for layer in LAYERS:
        for response in RESPONSE:
            if response != "unnormalised" or layer in ("epsilon 1", "beta 1"):
                found[f"{layer}, {response}"] = by_rules(LAYERS[layer], RESPONSE[response])
    return found


def orders(method: str) -> tuple[str, ...]:
    """What is measured: least relevant first only for what the figures show."""
    return ("random",) if method == "random" else ("morf", "lerf") if method in SHOWN else ("morf",)


def unscaled(model: Callable) -> Callable:
    """The model as a function of images in [0, 1]."""
    return lambda params, x: model(params, 2 * x - 1)


def measured(name: str, params: Any, images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """{"method|order|fill": (images, steps + 1) scores}."""
    model = network(SAME.get(name, name)).apply
    if name == "trap":
        model, images = unscaled(model), (images + 1) / 2
    predict = jax.tree_util.Partial(lambda params, x: jax.nn.softmax(model(params, x)), params)
    explanations: dict[str, Explain | None] = {"random": None} | methods(model)
    if name == "trap":
        explanations = {method: explanations[method] for method in ("random", *SHOWN)}
    curves = {}
    for method, explain in explanations.items():
        begun = time.perf_counter()
        relevance = jax.jit(explain)(params, images, labels) if explain else jnp.zeros(images.shape)
        for order in orders(method):
            for fill, replaced in FILLS[name].items():
                found = evaluate.pixel_flipping(
                    predict, images, relevance, labels, order=order, region=REGION, steps=STEPS[name], fill=replaced
                )
                curves[f"{method}|{order}|{fill}"] = np.asarray(found.scores)
        print(f"  {method}: {time.perf_counter() - begun:.0f} s", flush=True)
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=FILLS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    networks = SAME.get(options.name, options.name)
    _, (images, labels) = DATA[NETWORKS[networks][0]](options.data)
    images, labels = images[: options.images], labels[: options.images]
    folder = options.data / "flipping"
    folder.mkdir(exist_ok=True)
    for seed in options.seeds:
        out = folder / f"{options.name}-{seed}.npz"
        if out.exists():
            continue
        params, accuracy = load(options.data / "networks" / f"{networks}-{seed}.npz")
        print(f"{options.name}-{seed}: test accuracy {accuracy:.4f}", flush=True)
        np.savez_compressed(out, accuracy=accuracy, **measured(options.name, params, images, labels))


if __name__ == "__main__":
    main()
