"""A small convolutional network on Fashion-MNIST, with its trained weights and twelve test images.

Images are uint8 (n, 28, 28, 1), 0 is the black background; the network reads `normalise(images)`, float32 in [-1, 1].
`python -m jaxlrp.demo.train` made the weights in data/fashion_cnn.npz; data/README.md says where the images come from.
"""

from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict

CLASS_NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
BUNDLED = files("jaxlrp.demo") / "data" / "fashion_cnn.npz"


class FashionCNN(nn.Module):
    """Float32 (n, 28, 28, 1) in [-1, 1] -> logits (n, 10). 128,842 parameters, and 128 numbers of BatchNorm statistics.

    With train=False, the default, BatchNorm uses its running statistics: that is the network to explain.
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(nn.Conv(32, (3, 3), name="conv1")(x))
        x = nn.relu(nn.Conv(32, (3, 3), name="conv2")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.Conv(64, (3, 3), use_bias=False, name="conv3")(x)  # no bias: BatchNorm has one
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm3")(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(32, name="dense1")(x))
        return nn.Dense(10, name="logits")(x)


def normalise(images: np.ndarray | jax.Array) -> jax.Array:
    """Pixels 0..255 of any shape and dtype -> float32 in [-1, 1]."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1


def load(path: Traversable = BUNDLED) -> tuple[FashionCNN, dict[str, Any], np.ndarray, np.ndarray, list[str]]:
    """(model, variables, images, labels, class names) from a file that `jaxlrp.demo.train` wrote.

    variables: {"params": ..., "batch_stats": ...} of float32, stored as float16; images: uint8 (n, 28, 28, 1);
    labels: uint8 (n,). FileNotFoundError if there is no such file, ValueError if it is another file.
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
    return FashionCNN(), variables, images, labels, list(CLASS_NAMES)
