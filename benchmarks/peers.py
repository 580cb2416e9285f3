"""The same composite on the same network here and in PyTorch's LRP libraries, in images per second.

    python benchmarks/peers.py --json peers.json       # with .[bench,parity] and autolrp; PyTorch on this device

VGG-16, ResNet-50, ViT-B/16 and a decoder of GPT-2's size with random weights. Everything explains the same class of
every image of the batch, round by round in one process (lxt, which patches PyTorch, in one of its own): jaxlrp
compiled, on all cores; PyTorch's libraries with each number of threads of `--threads`, of which the best counts.
`own gradient` is that framework's value and gradient of the explained logits with respect to the input. A library that
is not installed, or that cannot explain a network, is named with the reason.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxlrp
import models
import rounds
from jaxlrp import composites

TARGET = 0
IMAGES = ("vgg16", "resnet50")
COMPOSITES = {
    "epsilon": composites.epsilon,
    "epsilon_plus": composites.epsilon_plus,
    "epsilon_plus_flat": composites.epsilon_plus_flat,
    "epsilon_gamma_box": lambda: composites.epsilon_gamma_box(-3.0, 3.0),
    "epsilon_alpha2_beta1": composites.epsilon_alpha2_beta1,
    "attnlrp": composites.attnlrp,
    "cp_lrp": composites.cp_lrp,
}
TRANSFORMERS = ("attnlrp", "cp_lrp")
ZENNIT = {
    "epsilon_plus": "EpsilonPlus",
    "epsilon_plus_flat": "EpsilonPlusFlat",
    "epsilon_gamma_box": "EpsilonGammaBox",
    "epsilon_alpha2_beta1": "EpsilonAlpha2Beta1",
}
Runs = dict[tuple[str, str], Callable[[], Any]]  # (library, composite) -> what is timed


def of_jaxlrp(name: str, x: np.ndarray, chosen: list[str]) -> Runs:
    apply, params, _ = models.build(name)
    given = jnp.asarray(x)
    gradient = jax.jit(lambda p, x: jax.value_and_grad(lambda x: apply(p, x)[:, TARGET].sum())(x))
    runs: Runs = {("jaxlrp", "own gradient"): lambda: gradient(params, given)}
    for title in chosen:
        explain = jax.jit(lambda c, p, x: jaxlrp.value_and_lrp(apply, c, argnums=1, target=TARGET)(p, x))
        composite = COMPOSITES[title]()
        runs["jaxlrp", title] = lambda f=explain, c=composite: f(c, params, given)
    return runs


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

    model = getattr(torchvision.models, "vit_b_16" if name == "vit" else name)().eval()
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
    from zennit.torchvision import ResNetCanonizer, VGGCanonizer

    canonizers = {"vgg16": [VGGCanonizer()], "resnet50": [ResNetCanonizer()]}[name]
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

    if name == "resnet50":
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
    import importlib

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


def of_torch(name: str, images: np.ndarray, chosen: list[str], options: Any, missing: dict[str, str]) -> Runs:
    import torch

    x = torch.from_numpy(images if name == "decoder" else np.ascontiguousarray(np.moveaxis(images, -1, 1)))
    plain = network(name).requires_grad_(False)
    found: dict[tuple[str, str], Callable[[], Any]] = {("PyTorch", "own gradient"): lambda: pulled(plain, x)}
    for library in options.libraries:
        if library != "autolrp" and (library == "lxt") == (name in IMAGES):
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


def measure(name: str, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, str]]:
    chosen = [c for c in COMPOSITES if (c in TRANSFORMERS) == (name not in IMAGES)]
    shape = models.build(name)[2]
    x = np.random.default_rng(0).standard_normal((options.batch, *shape), np.float32).clip(-3, 3)
    missing: dict[str, str] = {}
    runs = of_jaxlrp(name, x, chosen) | of_torch(name, x, chosen, options, missing)
    seconds = rounds.measure({" | ".join(k): run for k, run in runs.items()}, options.rounds)
    rows = []
    for library, title in runs:
        key, same = f"{library} | {title}", f"jaxlrp | {title}"
        own = "jaxlrp" if library == "jaxlrp" else library.replace(library.split(",")[0], "PyTorch")
        rows.append(
            {
                "library": library,
                "composite": title,
                "images_per_second": options.batch / median(seconds[key]),
                "own_gradients": rounds.ratios(seconds, f"{own} | own gradient")[key]["ratio"],
                "times_slower_than_jaxlrp": rounds.ratios(seconds, same)[key]["ratio"],
                "seconds": seconds[key],
            }
        )
    return rows, missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*IMAGES, "vit", "decoder"]
    parser.add_argument("--models", nargs="+", default=names, choices=names)
    parser.add_argument("--libraries", nargs="+", default=list(LIBRARIES), choices=LIBRARIES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    record = rounds.record("peers.py", "torch", "zennit", "captum", "autolrp", "lxt", "transformers", "torchvision")
    report: dict[str, Any] = {**record, "batch": options.batch, "rounds": options.rounds, "models": {}}
    report["not tried"] = {"iNNvestigate": "needs TensorFlow 2 without eager execution, and networks written in Keras"}
    for name in options.models:
        groups = [[lib for lib in options.libraries if (lib == "lxt") == apart] for apart in (False, True)]
        for group in filter(None, groups):
            if group == ["lxt"] and name in IMAGES:
                continue
            chosen = argparse.Namespace(**{**vars(options), "libraries": group})
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
                rows, missing = apart.submit(measure, name, chosen).result()
            for row in sorted(rows, key=lambda row: row["composite"]):
                library, title, *numbers, _ = row.values()
                print(f"{name:10}{title:24}{library:22}" + "".join(f"{n:9.2f}" for n in numbers), flush=True)
            for what, why in missing.items():
                print(f"{name:10}{what}: {why}", flush=True)
            report["models"][f"{name}, {' '.join(group)}"] = {"rows": rows, "missing": missing}
            if options.json:
                options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
