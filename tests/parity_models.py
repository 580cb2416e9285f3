"""The networks of test_parity.py: torchvision's own, and Flax twins that read their weights.

The twins are named as torchvision names its modules, so one state dict serves both.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch

try:
    import torchvision
except RuntimeError:  # one for CUDA beside a torch without: the operators it was compiled with are missing, and unused
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

CLASSES = 10
SIZE = 64  # pixels; VGG-16 and the ResNets divide it by 32
SMALL = 16  # pixels, of the small network's images
EPSILON = 1e-5  # of every BatchNorm


# ---------------------------------------------------------------------------------------------------- torch


class EachCall(torch.nn.Module):
    """A ReLU of its own for every call in a forward pass.

    zennit keeps one input per module, that of the last call; its BetaSmooth would read it for every call.
    """

    def __init__(self, calls: int):
        super().__init__()
        self.calls = torch.nn.ModuleList(torch.nn.ReLU() for _ in range(calls))
        self.count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.calls[(self.count - 1) % len(self.calls)](x)


def torch_resnet(depth: int) -> torch.nn.Module:
    model = getattr(torchvision.models, f"resnet{depth}")(num_classes=CLASSES)
    for module in model.modules():
        if isinstance(module, (torchvision.models.resnet.BasicBlock, torchvision.models.resnet.Bottleneck)):
            module.relu = EachCall(3 if hasattr(module, "conv3") else 2)
    return model


def torch_vgg16_bn() -> torch.nn.Module:
    """torchvision's, with a classifier that fits images of 64 pixels; dropout is there and idle."""
    model = torchvision.models.vgg16_bn(num_classes=CLASSES, init_weights=False)
    model.avgpool = torch.nn.Identity()
    model.classifier[0] = torch.nn.Linear(512 * (SIZE // 32) ** 2, 128)
    model.classifier[3] = torch.nn.Linear(128, 128)
    model.classifier[6] = torch.nn.Linear(128, CLASSES)
    return model


class TorchSmall(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 6, 3, padding=1)
        self.relu1 = torch.nn.ReLU()
        self.max_pool = torch.nn.MaxPool2d(2)
        self.conv2 = torch.nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.relu2 = torch.nn.ReLU()
        self.avg_pool = torch.nn.AvgPool2d(2)
        self.dense1 = torch.nn.Linear(8 * (SMALL // 8) ** 2, 16)
        self.relu3 = torch.nn.ReLU()
        self.dense2 = torch.nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.max_pool(self.relu1(self.conv1(x)))
        x = self.avg_pool(self.relu2(self.conv2(x)))
        return self.dense2(self.relu3(self.dense1(x.flatten(1))))


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """He-normal kernels, biases, and BatchNorms whose scales have either sign and whose statistics are no 0 or 1."""
    rng = np.random.default_rng(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            n = module.num_features
            scale = rng.uniform(0.5, 1.5, n) * rng.choice([1, -1], n, p=[0.8, 0.2])
            drawn = {"weight": scale, "running_var": rng.uniform(0.5, 2.0, n)}
            drawn |= {name: 0.3 * rng.standard_normal(n) for name in ("bias", "running_mean")}
        elif isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            shape = tuple(module.weight.shape)
            drawn = {"weight": rng.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))}
            if module.bias is not None:
                drawn["bias"] = 0.1 * rng.standard_normal(shape[0])
        else:
            continue
        for name, value in drawn.items():
            getattr(module, name).data = torch.from_numpy(value)


def move_epsilon(model: torch.nn.Module) -> None:
    """Adds every BatchNorm's epsilon to its variance, which changes nothing.

    zennit 0.5.1 leaves epsilon behind in a BatchNorm that it has merged, which scales each by (1 + 1e-5) ** -0.5.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var += module.eps
            module.eps = 0.0


# ---------------------------------------------------------------------------------------------------- Flax


def conv(x: jax.Array, name: str, width: int, size: int, stride: int = 1, bias: bool = False) -> jax.Array:
    return nn.Conv(width, (size, size), (stride, stride), size // 2, use_bias=bias, name=name)(x)


def norm(x: jax.Array, name: str) -> jax.Array:
    return nn.BatchNorm(use_running_average=True, epsilon=EPSILON, name=name)(x)


def channels_first(x: jax.Array) -> jax.Array:
    """Flat, in torch's order."""
    return x.transpose(0, 3, 1, 2).reshape(len(x), -1)


class Small(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.max_pool(nn.relu(conv(x, "conv1", 6, 3, bias=True)), (2, 2), (2, 2))
        x = nn.avg_pool(nn.relu(conv(x, "conv2", 8, 3, 2, bias=True)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(16, name="dense1")(channels_first(x)))
        return nn.Dense(CLASSES, name="dense2")(x)


class VGG16(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        at = 0
        for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(depth):
                x = conv(x, f"features_{at}", width, 3, bias=True)
                x = nn.relu(norm(x, f"features_{at + 1}"))
                at += 3
            x = nn.max_pool(x, (2, 2), (2, 2))
            at += 1
        x = channels_first(x)
        for name, width in (("classifier_0", 128), ("classifier_3", 128)):
            x = nn.relu(nn.Dense(width, name=name)(x))
        return nn.Dense(CLASSES, name="classifier_6")(x)


class ResNet(nn.Module):
    blocks: tuple[int, ...]
    bottleneck: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(norm(conv(x, "conv1", 64, 7, 2), "bn1"))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = self.block(x, f"layer{stage + 1}_{block}", 64 * 2**stage, stride)
        return nn.Dense(CLASSES, name="fc")(x.mean((1, 2)))

    def block(self, x: jax.Array, name: str, width: int, stride: int) -> jax.Array:
        convs = [(width, 3, stride), (width, 3, 1)]
        if self.bottleneck:
            convs = [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)]
        y = x
        for i, (features, size, by) in enumerate(convs, start=1):
            y = norm(conv(y, f"{name}_conv{i}", features, size, by), f"{name}_bn{i}")
            y = nn.relu(y) if i < len(convs) else y
        if stride > 1 or x.shape[-1] != features:
            x = norm(conv(x, f"{name}_downsample_0", features, 1, stride), f"{name}_downsample_1")
        return nn.relu(x + y)


def variables(model: torch.nn.Module) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """A torch model's state as Flax variables, by the modules' names."""
    tree: dict[str, dict[str, dict[str, np.ndarray]]] = {"params": {}, "batch_stats": {}}
    for path, value in leaves(model):
        module, _, name = path.rpartition(".")
        part = "batch_stats" if name.startswith("running_") else "params"
        if value.ndim > 1:  # (out, in, height, width) -> (height, width, in, out), and (out, in) -> (in, out)
            name, value = "kernel", value.transpose(*range(2, value.ndim), 1, 0)
        name = {"weight": "scale", "running_mean": "mean", "running_var": "var"}.get(name, name)
        tree[part].setdefault(module.replace(".", "_"), {})[name] = value
    return tree


def leaves(model: torch.nn.Module) -> Iterator[tuple[str, np.ndarray]]:
    for path, value in model.state_dict().items():
        if not path.endswith("num_batches_tracked"):
            yield path, np.array(value)


# ---------------------------------------------------------------------------------------------------- both


@dataclass(frozen=True)
class Pair:
    """The same network twice: `torch(NCHW images)`, and `apply(variables, NHWC images)`."""

    torch: torch.nn.Module
    apply: Callable[[Any, jax.Array], jax.Array]
    variables: Any
    size: int


MODELS: dict[str, Callable[[], tuple[torch.nn.Module, nn.Module]]] = {
    "small": lambda: (TorchSmall(), Small()),
    "vgg16_bn": lambda: (torch_vgg16_bn(), VGG16()),
    "resnet18": lambda: (torch_resnet(18), ResNet((2, 2, 2, 2), bottleneck=False)),
    "resnet50": lambda: (torch_resnet(50), ResNet((3, 4, 6, 3), bottleneck=True)),
}


def build(name: str) -> Pair:
    theirs, ours = MODELS[name]()
    for module in theirs.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = False  # in place, the input that zennit's BetaSmooth reads is already the output
    randomise(theirs.double().eval())
    weights = jax.tree.map(jnp.asarray, variables(theirs))
    move_epsilon(theirs)
    return Pair(theirs, ours.apply, weights, SMALL if name == "small" else SIZE)
