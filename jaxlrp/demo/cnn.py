"""A small convolutional network on Fashion-MNIST in two forms, with trained weights and twelve test images each.

Images are uint8 (n, 28, 28, 1), 0 is the black background; the network reads `normalise(images)`, float32 in [-1, 1].
`python -m jaxlrp.demo.train` made the weights in data/fashion_cnn.npz, and with --response those in
data/fashion_response.npz; data/README.md says where the images come from.
"""

from functools import partial
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from ..nn import local_response_norm

CLASS_NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
BUNDLED = files("jaxlrp.demo") / "data" / "fashion_cnn.npz"
BUNDLED_RESPONSE = files("jaxlrp.demo") / "data" / "fashion_response.npz"


class FashionCNN(nn.Module):
    """Float32 (n, 28, 28, 1) in [-1, 1] -> logits (n, 10). 128,842 parameters, and 128 numbers of BatchNorm statistics.

    With train=False, the default, BatchNorm uses its running statistics: that is the network to explain.
    response: local response normalisation after each ReLU of a convolution (as in Krizhevsky et al. 2012, but with
    alpha 1 instead of 1e-4, for activations here are small), and no BatchNorm.
    """

    response: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        normalised = partial(local_response_norm, size=5, k=1.0, alpha=1.0, beta=0.75) if self.response else lambda x: x
        x = normalised(nn.relu(nn.Conv(32, (3, 3), name="conv1")(x)))
        x = normalised(nn.relu(nn.Conv(32, (3, 3), name="conv2")(x)))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.Conv(64, (3, 3), use_bias=self.response, name="conv3")(x)  # BatchNorm has a bias of its own
        if not self.response:
            x = nn.BatchNorm(use_running_average=not train, name="norm3")(x)
        x = normalised(nn.relu(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(32, name="dense1")(x))
        return nn.Dense(10, name="logits")(x)


def normalise(images: np.ndarray | jax.Array) -> jax.Array:
    """Pixels 0..255 of any shape and dtype -> float32 in [-1, 1]."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1


def load(path: Traversable = BUNDLED) -> tuple[FashionCNN, dict[str, Any], np.ndarray, np.ndarray, list[str]]:
    """(model, variables, images, labels, class names) from a file that `jaxlrp.demo.train` wrote.

    variables: {"params": ..., "batch_stats": ...} of float32, stored as float16, without "batch_stats" where the model
    has none; images: uint8 (n, 28, 28, 1); labels: uint8 (n,). FileNotFoundError if there is no such file, ValueError
    if it is another file.
    """
    with path.open("rb") as file:
        try:
            arrays = dict(np.load(file))  # allow_pickle=False, numpy's default, refuses programs in the file
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not an .npz file written by jaxlrp.demo.train") from error
    try:
        images, labels = arrays.pop("images"), arrays.pop("labels")
    except KeyError as error:
        raise ValueError(f"{path} has no {error}: it was not written by jaxlrp.demo.train") from error
    variables = unflatten_dict({name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}, sep="/")
    return FashionCNN(response="batch_stats" not in variables), variables, images, labels, list(CLASS_NAMES)
