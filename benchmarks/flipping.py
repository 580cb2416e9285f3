"""Pixel flipping in units of the network's own forward pass, beside Quantus on the same network in PyTorch.

    python benchmarks/flipping.py --json flipping.json   # with torch and quantus

ResNet-18 with random weights, `--batch` images, at most `--steps` steps: beside Quantus, which flips the channels of a
pixel one by one and wants equal steps, as many as it can. The forward pass is the jitted (in PyTorch: no-grad) network
on the same batch, as often as the run calls it: Quantus has no step 0. A round runs everything once, in an order that
rotates from round to round; ratios compare times of the same round. PyTorch runs with each number of threads of
`--threads`; XLA takes all cores.
"""

import argparse
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

import models
import rounds
from jaxlrp import evaluate

Runs = dict[str, Callable[[], Any]]


def of_jaxlrp(images: np.ndarray, relevance: np.ndarray, targets: np.ndarray, steps: int) -> Runs:
    apply, params, _ = models.build("resnet18", images.shape[1])
    forward = jax.jit(apply)
    predict = jax.tree_util.Partial(apply, params)
    x = jax.numpy.asarray(images)

    def passes() -> None:
        for _ in range(steps + 1):
            scores = forward(params, x)
        scores.block_until_ready()

    def flipping() -> None:
        options = {"steps": steps, "fill": evaluate.fills.Constant(0.0)}
        evaluate.pixel_flipping(predict, x, relevance, targets, **options).scores.block_until_ready()

    return {"jaxlrp: forward passes": passes, "jaxlrp: pixel_flipping": flipping}


def torch_resnet18() -> Any:
    """models.ResNet18 in PyTorch."""
    from torch import nn

    def conv_bn(width: int, wide: int, size: int, stride: int = 1) -> nn.Sequential:
        conv = nn.Conv2d(width, wide, size, stride, padding=size // 2, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(wide))

    class Block(nn.Module):
        def __init__(self, width: int, wide: int, stride: int):
            super().__init__()
            self.branch = nn.Sequential(conv_bn(width, wide, 3, stride), nn.ReLU(inplace=True), conv_bn(wide, wide, 3))
            self.shortcut = conv_bn(width, wide, 1, stride) if stride > 1 else nn.Identity()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Any) -> Any:
            return self.relu(self.branch(x) + self.shortcut(x))

    layers: list[Any] = [conv_bn(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)]
    for stage in range(4):
        wide = 64 * 2**stage
        layers += [Block(wide // 2 if stage else 64, wide, 2 if stage else 1), Block(wide, wide, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def of_quantus(images: np.ndarray, relevance: np.ndarray, targets: np.ndarray, steps: int, threads: list[int]) -> Runs:
    import quantus
    import torch

    model = torch_resnet18().eval()
    channels_first = np.ascontiguousarray(np.moveaxis(images, -1, 1))
    x, maps = torch.from_numpy(channels_first), np.ascontiguousarray(np.moveaxis(relevance, -1, 1))
    features = channels_first[0].size // steps

    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))

    def passes(count: int) -> None:
        torch.set_num_threads(count)
        with torch.no_grad():
            for _ in range(steps):
                model(x)

    def flipping(count: int) -> None:
        torch.set_num_threads(count)
        calls.clear()
        metric = quantus.PixelFlipping(features_in_step=features, perturb_baseline="black", disable_warnings=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            metric(
                model=model, x_batch=channels_first, y_batch=targets, a_batch=maps, device="cpu", batch_size=len(images)
            )
        assert len(calls) == steps, calls

    runs: Runs = {}
    for count in threads:
        runs[f"PyTorch, threads {count}: forward passes"] = lambda count=count: passes(count)
        runs[f"Quantus, threads {count}: pixel flipping"] = lambda count=count: flipping(count)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--size", type=int, default=112, help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, nargs="*", default=[1, os.cpu_count() or 1], help="of PyTorch; none: no Quantus"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    shape = (options.batch, options.size, options.size, 3)
    images, relevance = (rng.standard_normal(shape, np.float32) for _ in range(2))
    targets = rng.integers(0, 1000, options.batch)
    if options.threads:  # Quantus takes numbers one by one, as many a step as divide the pixels
        options.steps = 3 * max(d for d in range(1, options.steps // 3 + 1) if options.size**2 % d == 0)
    runs = of_jaxlrp(images, relevance, targets, options.steps)
    if options.threads:
        runs |= of_quantus(images, relevance, targets, options.steps, options.threads)
    seconds = rounds.measure(runs, options.rounds)
    names = list(runs)
    rows = {}
    for forward, flipped in zip(names[::2], names[1::2], strict=True):
        own = median(a / b for a, b in zip(seconds[forward], seconds[flipped], strict=True))
        rows[flipped] = {
            "images per second": options.batch / median(seconds[flipped]),
            "of its own forward throughput": own,
            "jaxlrp's throughput relative to it": median(
                a / b for a, b in zip(seconds[flipped], seconds[names[1]], strict=True)
            ),
        }
        images_per_second, own, faster = rows[flipped].values()
        print(f"{flipped:40}{images_per_second:8.2f} images/s, {own:.3f} of its own passes; jaxlrp {faster:.2f} times")

    report = {
        **rounds.record("flipping.py", "torch", "quantus"),
        **{name: getattr(options, name) for name in ("batch", "steps", "size", "rounds")},
        "rows": rows,
        "seconds": seconds,
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
