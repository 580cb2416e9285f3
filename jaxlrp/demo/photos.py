"""Two photos, ready for EfficientNet-Lite0: "chelsea", a cat, and "coffee", a cup of espresso. Both are CC0.

data/README.md names the photographers. The files hold what `prepare` made of the originals.
"""

from importlib.resources import files

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

SIZE = 224
NAMES = ("chelsea", "coffee")
DATA = files("jaxlrp.demo") / "data"


def load() -> dict[str, np.ndarray]:
    """{name: uint8 (224, 224, 3)}."""
    photos = {}
    for name in NAMES:
        with (DATA / f"{name}.png").open("rb") as file, Image.open(file) as image:
            photos[name] = np.asarray(image.convert("RGB"))
    return photos


def prepare(image: Image.Image) -> np.ndarray:
    """EfficientNet's evaluation crop of any photo: the central square, 224/256 of the short side, bicubic to 224.

    Returns uint8 (224, 224, 3).
    """
    width, height = image.size
    side = min(width, height) * SIZE // (SIZE + 32)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    return np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def normalise(images: np.ndarray | jax.Array) -> jax.Array:
    """Pixels 0..255 of any shape and dtype -> float32 in [-127/128, 1], what EfficientNet-Lite0 was trained on."""
    return (jnp.asarray(images, jnp.float32) - 127) / 128
