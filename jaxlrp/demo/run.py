"""What `jaxlrp demo` shows of three trained networks: plan, prediction, whether relevance adds up, heatmaps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import Composite, composites, gradients, plan, plot, rules, select, value_and_lrp
from . import cnn, efficientnet
from . import photos as pictures

Methods = dict[str, Composite | None]  # None: sensitivity, which needs no composite


def fashion(file: Path, whole_plan: bool) -> None:
    """A small CNN on Fashion-MNIST; inputs in [-1, 1]."""
    model, variables, images, _, names = cnn.load()
    chosen = images[:6]
    print("== A small CNN on Fashion-MNIST (28 x 28, trained by jaxlrp/demo/train.py)\n")
    _explain(model.apply, variables, cnn.normalise(chosen), names, _methods(), file, chosen / 255, whole_plan)


def response(file: Path, whole_plan: bool) -> None:
    """The same CNN with local response normalisation: explained as the identity, and by its Taylor expansion."""
    model, variables, images, _, names = cnn.load(cnn.BUNDLED_RESPONSE)
    chosen = images[:6]
    taylor = Composite([(select.kind("local_response_norm"), rules.LocalResponseTaylor())])
    bases = {"epsilon": composites.epsilon(), "alpha2_beta1": composites.epsilon_alpha2_beta1()}
    methods: Methods = {"sensitivity": None}
    for name, base in bases.items():
        methods |= {f"{name}, identity": base, f"{name}, Taylor": taylor + base}
    print("\n== The CNN with local response normalisation: the identity beside the Taylor expansion\n")
    _explain(model.apply, variables, cnn.normalise(chosen), names, methods, file, chosen / 255, whole_plan)


def photos(file: Path, whole_plan: bool) -> None:
    """EfficientNet-Lite0 with its ImageNet weights, on two photos."""
    model, variables, names = efficientnet.load()
    images = np.stack(list(pictures.load().values()))
    print("\n== EfficientNet-Lite0 on two photos (224 x 224, ImageNet weights)\n")
    _explain(model.apply, variables, pictures.normalise(images), names, _methods(), file, images, whole_plan)


def _methods() -> Methods:
    return {
        "sensitivity": None,
        "epsilon": composites.epsilon(),
        "epsilon_plus_flat": composites.epsilon_plus_flat(),
        "epsilon_gamma_box": _box(),
    }


def _box() -> Composite:
    return composites.epsilon_gamma_box(low=-1.0, high=1.0)  # both networks read pixels in [-1, 1]


def _explain(
    apply: Callable,
    variables: Any,
    x: Any,
    names: Sequence[str],
    methods: Methods,
    file: Path,
    images: np.ndarray,
    whole_plan: bool,
) -> None:
    x = jnp.asarray(x)
    scores = np.asarray(jax.nn.softmax(apply(variables, x)))
    target = jnp.asarray(scores.argmax(-1))
    name, shown_composite = [(n, c) for n, c in methods.items() if c is not None][-1]
    shown = str(plan(apply, shown_composite, argnums=1)(variables, x)).splitlines()
    if not whole_plan and len(shown) > 16:
        shown[14:-1] = [f"... {len(shown) - 15} more layers (--plan shows them all)"]
    print(f"The plan of {name}:", *shown, sep="\n")

    print("\nTop classes:")
    for i, row in enumerate(scores):
        top = ", ".join(f"{names[c]} {row[c]:.2f}" for c in row.argsort()[::-1][:3])
        print(f"  image {i}: {top}")

    print("\nConservation: the explained logit, and the sum of the relevance that reached the input. Biases keep their")
    print("share of it; in the same network with its biases set to zero, all of it must arrive.")
    print("  " + "".ljust(36) + "".join(f"image {i}".rjust(11) for i in range(len(x))))
    maps = []
    bare = jax.tree_util.tree_map_with_path(lambda path, v: 0 * v if path[-1].key in ("bias", "mean") else v, variables)
    for name, composite in methods.items():
        if composite is None:
            maps.append(np.asarray(gradients.sensitivity(apply, argnums=1, target=target)(variables, x)))
            continue
        explain = jax.jit(value_and_lrp(apply, composite, argnums=1, target=target))
        for title, parameters in ((name, variables), (f"{name}, no biases", bare)):
            value, relevance = (np.asarray(a) for a in explain(parameters, x))
            logit, arrived = value[np.arange(len(x)), target], relevance.reshape(len(x), -1).sum(1)
            print("  " + f"{title}: logit".ljust(36) + "".join(f"{v:11.4f}" for v in logit))
            print("  " + "relevance".rjust(36) + "".join(f"{v:11.4f}" for v in arrived))
            if parameters is variables:
                maps.append(relevance)

    plot.grid(
        np.stack(maps, axis=1),
        images=images,
        column_labels=list(methods),
        row_labels=[names[c] for c in np.asarray(target)],
        percentile=99.5,
        save=file,
    )
    print(f"\nheatmaps: {file}")
