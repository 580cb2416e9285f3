"""Train the demo's CNN on Fashion-MNIST: `python -m jaxlrp.demo.train --data FOLDER --out FILE`.

FOLDER holds the four IDX files as Zalando Research published them (zalandoresearch/fashion-mnist), gzipped or not:
train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte.
Needs optax. Same machine, same versions, same seed: the same file, bit for bit.
"""

import argparse
import gzip
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from jaxlrp.demo.cnn import CLASS_NAMES, FashionCNN, load, normalise

BATCH = 128
PEAK_LEARNING_RATE = 4e-3
EXTRA_IMAGES = 2


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of an IDX file. Header: two zero bytes, 8 for uint8, the rank, each size as big-endian int32."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of uint8 values")
    rank = data[3]
    shape = tuple(int(size) for size in np.frombuffer(data, ">i4", count=rank, offset=4))
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (n, 28, 28, 1) and labels uint8 (n,) of split "train" or "t10k"."""

    def find(name: str) -> Path:
        for path in (folder / f"{split}-{name}-ubyte", folder / f"{split}-{name}-ubyte.gz"):
            if path.exists():
                return path
        raise FileNotFoundError(f"no {split}-{name}-ubyte or {split}-{name}-ubyte.gz in {folder}")

    return read_idx(find("images-idx3"))[..., None], read_idx(find("labels-idx1"))


def fit(model: FashionCNN, images: np.ndarray, labels: np.ndarray, epochs: int, seed: int) -> dict[str, Any]:
    """The variables after `epochs` passes of AdamW with one warm-up and one cosine decay."""
    variables = model.init(jax.random.key(seed), normalise(images[:1]))
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    steps = len(images) // BATCH * epochs
    schedule = optax.cosine_onecycle_schedule(steps, PEAK_LEARNING_RATE)
    optimiser = optax.adamw(schedule, weight_decay=1e-3)

    def loss(params: Any, batch_stats: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        state = {"params": params, "batch_stats": batch_stats}
        logits, updates = model.apply(state, normalise(x), train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), updates.get("batch_stats", {})

    @jax.jit
    def step(params: Any, batch_stats: Any, optimiser_state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, ...]:
        (value, batch_stats), grads = jax.value_and_grad(loss, has_aux=True)(params, batch_stats, x, y)
        updates, optimiser_state = optimiser.update(grads, optimiser_state, params)
        return optax.apply_updates(params, updates), batch_stats, optimiser_state, value

    optimiser_state = optimiser.init(params)
    rng = np.random.default_rng(seed)
    for epoch in range(epochs):
        start, losses = time.perf_counter(), []
        order = rng.permutation(len(images))
        for rows in order[: len(order) // BATCH * BATCH].reshape(-1, BATCH):
            y = labels[rows].astype(np.int32)
            params, batch_stats, optimiser_state, value = step(params, batch_stats, optimiser_state, images[rows], y)
            losses.append(value)
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.4f}, {time.perf_counter() - start:.0f} s", flush=True)
    return {"params": params, **({"batch_stats": batch_stats} if batch_stats else {})}


def predict(model: FashionCNN, variables: dict[str, Any], images: np.ndarray) -> np.ndarray:
    """The class of every image, (n,)."""
    logits: Any = jax.jit(lambda x: model.apply(variables, normalise(x)))
    return np.concatenate([logits(part).argmax(-1) for part in np.split(images, range(1000, len(images), 1000))])


def choose(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """The rows to bundle: each class's first correctly classified image, then the next EXTRA_IMAGES correct ones."""
    correct = np.flatnonzero(predictions == labels)
    firsts = [correct[labels[correct] == label][0] for label in range(len(CLASS_NAMES))]
    others = [row for row in correct if row not in firsts]
    return np.array(firsts + others[:EXTRA_IMAGES])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the Fashion-MNIST IDX files")
    parser.add_argument("--out", type=Path, required=True, help="the .npz file to write")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--response", action="store_true", help="with local response normalisation, without BatchNorm")
    options = parser.parse_args()

    images, labels = read_split(options.data, "train")
    test_images, test_labels = read_split(options.data, "t10k")
    model = FashionCNN(response=options.response)
    variables = fit(model, images, labels, options.epochs, options.seed)
    print(f"test accuracy in float32 {np.mean(predict(model, variables, test_images) == test_labels):.4f}")

    # The file holds float16, half the size, so the images are chosen and the accuracy stated with those numbers.
    rounded = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float16), variables)
    predictions = predict(model, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded), test_images)
    rows = choose(test_labels, predictions)
    arrays: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in flatten_dict(rounded, sep="/").items()}
    np.savez_compressed(options.out, images=test_images[rows], labels=test_labels[rows], **arrays)

    model, stored, *_ = load(options.out)
    print(f"test accuracy of {options.out} {np.mean(predict(model, stored, test_images) == test_labels):.4f}")
    print(f"{options.out.stat().st_size} bytes, test images {rows.tolist()}")


if __name__ == "__main__":
    main()
