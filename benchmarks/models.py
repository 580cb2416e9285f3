"""The networks that the benchmarks measure: Flax linen, with random weights, which cost what trained ones do."""

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from attention_models import Decoder, ViT
from jaxlrp.demo.efficientnet import EfficientNetLite0

Apply = Callable[[Any, jax.Array], jax.Array]


class VGG16(nn.Module):
    """VGG-16 (Simonyan & Zisserman 2015, configuration D), as at inference: no dropout."""

    classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(depth):
                x = nn.relu(nn.Conv(width, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        for width in (4096, 4096):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.classes)(x)


class ResNet(nn.Module):
    """ResNet v1 (He et al. 2016) at inference: `bottleneck` blocks as in ResNet-50, the stride on their 3x3 (often
    called v1.5), or pairs of 3x3 as in ResNet-18.
    """

    blocks: tuple[int, ...]
    bottleneck: bool
    classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def conv_bn(x: jax.Array, width: int, size: int, stride: int = 1) -> jax.Array:
            x = nn.Conv(width, (size, size), (stride, stride), padding=size // 2, use_bias=False)(x)
            return nn.BatchNorm(use_running_average=True)(x)

        def branch(x: jax.Array, width: int, stride: int) -> jax.Array:
            if self.bottleneck:
                x = nn.relu(conv_bn(x, width, size=1))
                return conv_bn(nn.relu(conv_bn(x, width, size=3, stride=stride)), 4 * width, size=1)
            return conv_bn(nn.relu(conv_bn(x, width, size=3, stride=stride)), width, size=3)

        x = nn.relu(conv_bn(x, 64, size=7, stride=2))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                y = branch(x, 64 * 2**stage, stride)
                shortcut = x if x.shape == y.shape else conv_bn(x, y.shape[-1], size=1, stride=stride)
                x = nn.relu(y + shortcut)
        return nn.Dense(self.classes)(x.mean((1, 2)))


class CNN(nn.Module):
    """A small network: four times convolution, BatchNorm, relu, max-pool; then one dense layer."""

    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (32, 64, 128, 256):
            x = nn.Conv(width, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(self.classes)(x.reshape(len(x), -1))


IMAGES: dict[str, nn.Module] = {
    "vgg16": VGG16(),
    "resnet50": ResNet((3, 4, 6, 3), bottleneck=True),
    "resnet18": ResNet((2, 2, 2, 2), bottleneck=False),
    "efficientnet": EfficientNetLite0(),
    "cnn": CNN(),
    "vit": ViT(),
}
MODELS = {**IMAGES, "decoder": Decoder()}
TOKENS = 128  # of the decoder's input, explained as rows of its table


def randomise(shapes: Any, seed: int = 0) -> Any:
    """He-normal kernels, and biases, scales and running statistics that are neither 0 nor 1, for a tree of shapes."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name, shape = path[-1].key, leaf.shape
        if name in ("scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 1.5, shape), leaf.dtype)
        if name in ("bias", "mean"):
            std = 0.1
        elif name in ("embedding", "token", "positions"):
            std = 0.02
        elif name == "kernel":
            # a projection to heads is (width, heads, size), from heads (heads, size, width)
            inputs = shape[0] if path[-2].key in ("query", "key", "value") else np.prod(shape[:-1])
            std = float(np.sqrt(2 / inputs))
        else:
            raise ValueError(f"no random values are defined for a parameter called {name!r}")
        return jnp.asarray(rng.standard_normal(shape, np.float32) * np.float32(std), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def build(name: str, size: int = 224) -> tuple[Apply, Any, tuple[int, ...]]:
    """The model called `name` as (apply(params, x) -> logits, params, shape of one input)."""
    model = MODELS[name]
    input_shape = (TOKENS, model.width) if isinstance(model, Decoder) else (size, size, 3)
    like = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32) if name == "decoder" else jnp.zeros((1, *input_shape))
    shapes = jax.eval_shape(model.init, jax.random.key(0), like)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return cast(jax.Array, model.apply(params, x))

    return apply, randomise(shapes), input_shape


def gradient(apply: Apply, target: int = 0) -> Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]:
    """What explanations are measured by: value and gradient of one class's logit with respect to the input."""
    return lambda params, x: jax.value_and_grad(lambda x: apply(params, x)[:, target].sum())(x)
