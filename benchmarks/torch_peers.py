"""PyTorch's LRP libraries on the networks of `peers.py`: what is timed, with each number of threads."""

import importlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np

from jaxlrp.demo.efficientnet import STAGES

TARGET = 0
Runs = dict[tuple[str, str], Callable[[], Any]]  # (library, composite) -> what is timed
ZENNIT = {
    "epsilon_plus": "EpsilonPlus",
    "epsilon_plus_flat": "EpsilonPlusFlat",
    "epsilon_gamma_box": "EpsilonGammaBox",
    "epsilon_alpha2_beta1": "EpsilonAlpha2Beta1",
}


def efficientnet() -> Any:
    """EfficientNet-Lite0 (Tan & Le 2019, without squeeze and swish), as torchvision has none."""
    from torch import nn

    def conv_norm(
        c: int, features: int, size: int = 1, stride: int = 1, groups: int = 1, active: bool = True
    ) -> list[Any]:
        conv = nn.Conv2d(c, features, size, stride, size // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(features, eps=1e-3), *([nn.ReLU6()] if active else [])]

    class Block(nn.Module):
        def __init__(self, c: int, features: int, size: int, stride: int, expansion: int) -> None:
            super().__init__()
            wide = c * expansion
            first = conv_norm(c, wide) if expansion > 1 else []
            depthwise = conv_norm(wide, wide, size, stride, groups=wide)
            self.body = nn.Sequential(*first, *depthwise, *conv_norm(wide, features, active=False))
            self.residual = c == features and stride == 1

        def forward(self, x: Any) -> Any:
            return x + self.body(x) if self.residual else self.body(x)

    channels, parts = 32, conv_norm(3, 32, 3, 2)
    for blocks, size, stride, expansion, features in STAGES:
        for first in [True] + [False] * (blocks - 1):
            parts.append(Block(channels, features, size, stride if first else 1, expansion))
            channels = features
    parts += [*conv_norm(channels, 1280), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    return nn.Sequential(*parts)


def network(name: str) -> Any:
    """torchvision's, or transformers', with ReLUs of their own where libraries hook them."""
    import torch

    torch.manual_seed(0)
    if name == "decoder":
        from transformers import GPT2Config
        from transformers.models.gpt2 import modeling_gpt2

        config = GPT2Config(attn_implementation="eager")
        return modeling_gpt2.GPT2LMHeadModel(config).eval()
    import torchvision

    names = {"vit": "vit_b_16"}
    model = efficientnet() if name == "efficientnet" else getattr(torchvision.models, names.get(name, name))()
    model = model.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = False
    return model.requires_grad_(False)


def logits(model: Any, x: Any) -> Any:
    """Those of the last token, of a language model, whose input is embedded."""
    if hasattr(model, "lm_head"):
        hidden = model.transformer(inputs_embeds=x).last_hidden_state
        return model.lm_head(hidden[:, -1])
    return model(x)


def pulled(model: Any, x: Any) -> Any:
    import torch

    given = x.clone().requires_grad_()
    out = logits(model, given)
    (gradient,) = torch.autograd.grad(out[:, TARGET].sum(), given)
    return gradient


def of_zennit(name: str, x: Any, chosen: list[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    import torch
    from zennit import composites as presets
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.torchvision import ResNetCanonizer, VGGCanonizer

    canonizer = {"vgg16": VGGCanonizer, "resnet50": ResNetCanonizer, "efficientnet": SequentialMergeBatchNorm}[name]
    canonizers = [canonizer()]
    for title in chosen:
        if title in ZENNIT:
            bounds = {"low": torch.full_like(x, -3), "high": torch.full_like(x, 3)} if "box" in title else {}
            model, preset = network(name), getattr(presets, ZENNIT[title])(canonizers=canonizers, **bounds)

            def run(model: Any = model, preset: Any = preset) -> Any:
                with preset.context(model) as modified:
                    given = x.clone().requires_grad_()
                    out = modified(given)
                    start = torch.zeros_like(out)
                    start[:, TARGET] = out[:, TARGET].detach()
                    return torch.autograd.grad(out, given, start)[0]

            yield title, run


def of_captum(name: str, x: Any, chosen: list[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    import torch
    from captum.attr import LRP
    from captum.attr._utils import lrp_rules as captum_rules

    if name != "vgg16":
        raise NotImplementedError("captum's LRP has no rule for the residual sum")
    # its rule for z+ clamps weights in place of contributions, which is the same but for biases and signed inputs
    rules = {"epsilon": captum_rules.EpsilonRule, "epsilon_plus": captum_rules.Alpha1_Beta0_Rule}
    for title in chosen:
        if title in rules:
            model = network(name)

            def run(model: Any = model, rule: Any = rules[title]) -> Any:
                for module in model.modules():  # an attribution takes the rules off
                    if isinstance(module, torch.nn.Conv2d):
                        module.rule = rule()
                    elif isinstance(module, (torch.nn.Linear, torch.nn.MaxPool2d, torch.nn.AdaptiveAvgPool2d)):
                        module.rule = captum_rules.EpsilonRule()
                return LRP(model).attribute(x.clone().requires_grad_(), target=TARGET)

            yield title, run


def of_autolrp(name: str, x: Any, chosen: list[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    import autolrp

    tables = {
        "epsilon": autolrp.BASE,
        "epsilon_plus": {**autolrp.BASE, "ConvolutionBackward": "zplus"},
        "epsilon_alpha2_beta1": {**autolrp.BASE, "ConvolutionBackward": ("alpha_beta", {"alpha": 2.0, "beta": 1.0})},
        "attnlrp": {**autolrp.BASE, **autolrp.ATTNLRP},
    }
    for title in chosen:
        if title in tables:
            model, config = network(name), autolrp.LRPConfig(rule=tables[title])

            def run(model: Any = model, config: Any = config) -> Any:
                given = autolrp.tensor(x.clone())
                logits(model, given)[:, TARGET].sum().lrp(config=config)
                return given.relevance

            yield title, run


def of_lxt(name: str, x: Any, chosen: list[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """lxt patches modules of PyTorch, torchvision and transformers; the gradient then times the input is relevance.

    Its patches of torchvision's transformer hold attention and norms constant.
    """
    from lxt.efficient import monkey_patch

    family = "torchvision.models.vision_transformer" if name == "vit" else "transformers.models.gpt2.modeling_gpt2"
    monkey_patch(importlib.import_module(family), verbose=False)
    model = network(name).requires_grad_(False)
    yield "cp_lrp" if name == "vit" else "attnlrp", lambda: x * pulled(model, x)


LIBRARIES: dict[str, Callable[..., Iterator[tuple[str, Callable[[], Any]]]]] = {
    "zennit": of_zennit,
    "captum": of_captum,
    "autolrp": of_autolrp,
    "lxt": of_lxt,
}


def of_torch(name: str, images: np.ndarray, chosen: list[str], options: Namespace, missing: dict[str, str]) -> Runs:
    import torch

    x = torch.from_numpy(images if name == "decoder" else np.ascontiguousarray(np.moveaxis(images, -1, 1)))
    plain = network(name).requires_grad_(False)
    found: dict[tuple[str, str], Callable[[], Any]] = {("PyTorch", "own gradient"): lambda: pulled(plain, x)}
    for library in options.libraries:
        if library != "autolrp" and (library == "lxt") != (name in ("vit", "decoder")):
            continue
        if find_spec(library) is None:
            missing[library] = "not installed"
            continue
        try:
            for title, run in LIBRARIES[library](name, x, chosen):
                try:
                    assert torch.isfinite(run()).all(), "not finite"
                    found[library, title] = run
                except Exception as error:
                    missing[f"{library}, {title}"] = f"{type(error).__name__}: {error}".partition("\n")[0]
        except Exception as error:
            missing[library] = f"{type(error).__name__}: {error}".partition("\n")[0]

    def threaded(run: Callable[[], Any], count: int) -> None:
        torch.set_num_threads(count)
        run()

    return {
        (f"{library}, {count} thread{'s' * (count > 1)}", title): lambda run=run, count=count: threaded(run, count)
        for (library, title), run in found.items()
        for count in options.threads
    }
