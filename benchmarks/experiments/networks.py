"""Small convolutional networks with local response normalisation, trained here: no package ships weights of one.

    python benchmarks/experiments/networks.py cifar --data data --seeds 0 1 2 3 4        # needs optax

writes networks/cifar-0.npz and so on below --data: float32 weights and the test accuracy.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from data import DATA, Split
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

BATCH = 128
PEAK = 3e-3
# (data, features, alpha, epochs). How much the normalisation does depends on alpha and on the size of the activations:
# at AlexNet's 1e-4 it does nothing to activations of order one; with 0.1, on CIFAR-10, it divides by 1.005 on average.
NETWORKS: dict[str, tuple[str, tuple[int, ...], float, int]] = {
    "mnist": ("mnist", (16, 32), 1.0, 3),
    "cifar": ("cifar", (32, 64, 64), 10.0, 6),
    "cifar-weak": ("cifar", (32, 64, 64), 0.1, 8),
}


class ResponseCNN(nn.Module):
    """Images (n, h, w, c) in [-1, 1] -> logits (n, 10): convolution 3x3, ReLU, LRN, max-pooling, for each of
    `features` (the last without LRN where there are three), then a dense layer of 64 units and the logits.

    LRN: size 5 across channels, k 1, exponent 3/4, alpha per window. Written as a banded matrix product, and pooling
    as a reshape: on a CPU both train about twice as fast as a `reduce_window`.
    """

    features: tuple[int, ...]
    alpha: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, features in enumerate(self.features):
            x = nn.relu(nn.Conv(features, (3, 3), name=f"conv{i + 1}")(x))
            if i < 2:
                x = response_norm(x, self.alpha)
            n, h, w, c = x.shape
            x = x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))
        x = nn.relu(nn.Dense(64, name="dense")(x.reshape(len(x), -1)))
        return nn.Dense(10, name="logits")(x)


def response_norm(x: jax.Array, alpha: float) -> jax.Array:
    """x / (1 + alpha/5 sum over 5 channels of x^2)^(3/4)."""
    at = np.arange(x.shape[-1])
    band = (abs(at[:, None] - at) <= 2).astype(np.float32)
    return x * (1 + alpha / 5 * ((x * x) @ band)) ** -0.75


def network(name: str) -> ResponseCNN:
    return ResponseCNN(*NETWORKS[name][1:3])


def load(path: Path) -> tuple[Any, float]:
    """(parameters, test accuracy)."""
    arrays = dict(np.load(path))
    accuracy = float(arrays.pop("accuracy"))
    return {"params": unflatten_dict({k: jnp.asarray(v) for k, v in arrays.items()}, sep="/")}, accuracy


def augmented(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrored at random and shifted by up to two pixels."""
    n, h, w, _ = images.shape
    wide = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    top, left = rng.integers(0, 5, (2, n))
    rows, columns = top[:, None] + np.arange(h), left[:, None] + np.arange(w)
    columns = np.where(rng.random(n)[:, None] < 0.5, columns, columns[:, ::-1])
    return wide[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def fit(name: str, train: Split, seed: int) -> Any:
    model, (images, labels) = network(name), train
    params = model.init(jax.random.key(seed), images[:1])
    epochs = NETWORKS[name][3]
    steps = len(images) // BATCH * epochs
    optimiser = optax.adamw(optax.cosine_onecycle_schedule(steps, PEAK), weight_decay=1e-3)

    @jax.jit
    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, rng = optimiser.init(params), np.random.default_rng(seed)
    for epoch in range(epochs):
        begun, losses = time.perf_counter(), []
        for rows in rng.permutation(len(images))[: len(images) // BATCH * BATCH].reshape(-1, BATCH):
            x = augmented(images[rows], rng) if NETWORKS[name][0] == "cifar" else images[rows]
            params, state, value = step(params, state, x, labels[rows])
            losses.append(value)
        print(
            f"{name}-{seed} epoch {epoch + 1}: {np.mean(losses):.4f}, {time.perf_counter() - begun:.0f} s", flush=True
        )
    return params


def accuracy(name: str, params: Any, test: Split) -> float:
    logits = jax.jit(network(name).apply)
    parts = [logits(params, x).argmax(-1) for x in np.split(test[0], range(1000, len(test[0]), 1000))]
    return float(np.mean(np.concatenate(parts) == test[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=NETWORKS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    train, test = DATA[NETWORKS[options.name][0]](options.data)
    folder = options.data / "networks"
    folder.mkdir(exist_ok=True)
    for seed in options.seeds:
        params = fit(options.name, train, seed)
        right = accuracy(options.name, params, test)
        print(f"{options.name}-{seed}: test accuracy {right:.4f}", flush=True)
        arrays = {k: np.asarray(v) for k, v in flatten_dict(params["params"], sep="/").items()}
        np.savez(folder / f"{options.name}-{seed}.npz", accuracy=right, **arrays)


if __name__ == "__main__":
    main()
