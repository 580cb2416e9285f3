"""MNIST heatmaps: sensitivity beside LRP, for the first correctly classified test image of each digit.

python benchmarks/experiments/heatmaps.py --data data --out benchmarks/experiments/results/heatmaps.png
"""

import argparse
from pathlib import Path

import jax
import numpy as np
from data import mnist
from faithfulness import SHOWN, methods
from networks import load, network

from jaxlrp import plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    params, _ = load(options.data / "networks" / "mnist-0.npz")
    _, (images, labels) = mnist(options.data)
    model = network("mnist").apply
    predicted = np.asarray(jax.jit(model)(params, images[:500])).argmax(-1)
    rows = [int(np.flatnonzero((labels[:500] == digit) & (predicted == digit))[0]) for digit in range(10)]
    chosen = (*SHOWN, "epsilon 0.01, Taylor", "beta 1, Taylor")
    explain = {name: jax.jit(methods(model)[name]) for name in chosen}
    maps = [np.asarray(f(params, images[rows], labels[rows])) for f in explain.values()]
    options.out.parent.mkdir(exist_ok=True)
    plot.grid(
        list(zip(*maps, strict=True)),
        images=(images[rows] + 1) / 2,
        column_labels=[name.replace(", ", "\n") for name in chosen],
        row_labels=[str(digit) for digit in range(10)],
        save=options.out,
    )


if __name__ == "__main__":
    main()
