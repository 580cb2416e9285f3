"""Which explanation of an ImageNet network finds the pixels that its score depends on: pixel flipping on photos.

    pip install jaxlrp[demo] && pip download --no-deps foolbox==3.3.4 && unzip foolbox-3.3.4*.whl -d data/foolbox
    python benchmarks/experiments/photos.py --data data --json benchmarks/experiments/results/photos.json

EfficientNet-Lite0 on the 20 labelled photos of that package (imagenet_NN_LABEL.jpg). Every method explains the logit of
the true label, also where the network predicts another; tiles of 8 x 8 pixels are flipped in the order of a map's sum
over them, and the score is the softmax probability of the label. Two fills, for a ranking depends on them. All methods
meet the same noise on a photo. SmoothGrad averages the squared gradient, for it is ranked beside the sensitivity.
The JSON is written after every photo, and a run that was stopped goes on where it was; a table (.md) and a figure come
beside it at the end.
"""

import argparse
import json
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from jax.tree_util import Partial
from PIL import Image

import jaxlrp
from jaxlrp import composites, gradients, lrp
from jaxlrp.demo import efficientnet, photos
from jaxlrp.evaluate import fills, pixel_flipping

matplotlib.use("Agg")
from matplotlib import pyplot as plt

REGION = 8
FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
FILLS = {"uniform": fills.Uniform(-1.0, 1.0), "blur": fills.Blur(8.0)}
COMPOSITES = {
    "LRP epsilon": composites.epsilon(),
    "LRP epsilon_plus": composites.epsilon_plus(),
    "LRP epsilon_plus_flat": composites.epsilon_plus_flat(),
    "LRP epsilon_alpha2_beta1": composites.epsilon_alpha2_beta1(),
    "LRP epsilon_gamma_box": composites.epsilon_gamma_box(low=-1.0, high=1.0),
}
REFERENCE = "sensitivity"


def methods(apply: Callable) -> dict[str, Callable]:
    """{name: function of (variables, x, label, key) -> relevance}, jitted."""
    g = gradients
    made: dict[str, Callable] = {
        "random": lambda v, x, c, key: jax.random.normal(key, x.shape),
        "sensitivity": lambda v, x, c, key: g.sensitivity(apply, 1, c)(v, x),
        "gradient x input": lambda v, x, c, key: g.gradient_x_input(apply, 1, c)(v, x),
        # the grey of 0 is a baseline inside the range of pixels
        "integrated gradients": lambda v, x, c, key: g.integrated_gradients(apply, 1, c, baseline=0.0, steps=32)(v, x),
        "smoothgrad squared": lambda v, x, c, key: g.smoothgrad(apply, 1, c, key=key, of=g.sensitivity)(v, x),
        "occlusion": lambda v, x, c, key: g.occlusion(apply, 1, c, region=32, stride=16, fill=0.0)(v, x),
    }
    for name, composite in COMPOSITES.items():
        made[name] = lambda v, x, c, key, composite=composite: lrp(apply, composite, 1, c)(v, x)
    return {name: jax.jit(method) for name, method in made.items()}


def read(folder: Path) -> list[tuple[str, int, np.ndarray]]:
    """[(file name, label, pixels)]."""
    found = sorted(folder.rglob("imagenet_*_*.jpg"))
    if not found:
        raise FileNotFoundError(f"no imagenet_NN_LABEL.jpg below {folder}: see the head of this file")
    pictures = []
    for file in found:
        with Image.open(file) as image:
            pictures.append((file.name, int(re.findall(r"_(\d+)\.jpg", file.name)[0]), photos.prepare(image)))
    return pictures


def measure(options: argparse.Namespace) -> dict[str, Any]:
    model, variables, names = efficientnet.load()
    explain = methods(model.apply)
    predict = Partial(lambda v, x: jax.nn.softmax(model.apply(v, x)), variables)
    settings: dict[str, Any] = {
        "network": "EfficientNet-Lite0",
        "region": REGION,
        "fractions": FRACTIONS,
        "fills": {name: repr(fill) for name, fill in FILLS.items()},
        "seed": options.seed,
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlrp": jaxlrp.__version__,
        },
    }
    result = json.loads(options.json.read_text()) if options.json.exists() else settings | {"photos": []}
    if json.loads(json.dumps(settings)) != {k: v for k, v in result.items() if k != "photos"}:
        raise ValueError(f"{options.json} was made with other settings; remove it")
    done = {row["file"] for row in result["photos"]}
    for n, (file, label, pixels) in enumerate(read(options.data)[: options.photos]):
        if file in done:
            continue
        begun, x = time.perf_counter(), photos.normalise(pixels)[None]
        of_map, of_fill = jax.random.split(jax.random.fold_in(jax.random.key(options.seed), n))
        p = np.asarray(predict(x)[0])
        row: dict[str, Any] = {
            "file": file,
            "label": names[label],
            "predicted": names[int(p.argmax())],
            "right": bool(p.argmax() == label),
            "probability": float(p[label]),
            "scores": {},
        }
        for name, method in explain.items():
            relevance = method(variables, x, label, of_map)
            for fill, replacement in FILLS.items():
                for order in ("morf", "lerf"):
                    curves = pixel_flipping(
                        predict,
                        x,
                        relevance,
                        label,
                        order=order,
                        region=REGION,
                        steps=FRACTIONS,
                        fill=replacement,
                        key=of_fill,
                    )
                    row["scores"].setdefault(name, {}).setdefault(fill, {})[order] = {
                        "auc": float(curves.auc()[0]),
                        "curve": [round(float(s), 5) for s in curves.scores[0]],
                    }
        result["photos"].append(row)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{n + 1}: {file} ({row['label']}), {time.perf_counter() - begun:.0f} s", flush=True)
    return result


def values(result: dict[str, Any], method: str, fill: str) -> dict[str, np.ndarray]:
    """{"morf", "lerf", "srg": (photos,)}."""
    rows = [photo["scores"][method][fill] for photo in result["photos"]]
    morf, lerf = (np.array([row[order]["auc"] for row in rows]) for order in ("morf", "lerf"))
    return {"morf": morf, "lerf": lerf, "srg": lerf - morf}


def with_error(x: np.ndarray, form: str = "+.3f") -> str:
    error = f" ± {x.std(ddof=1) / np.sqrt(len(x)):.3f}" if len(x) > 1 else ""
    return f"{x.mean():{form}}{error}"


def table(result: dict[str, Any]) -> str:
    rows, count = result["photos"], len(result["photos"])
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    lines = [
        "# Pixel flipping on photos",
        "",
        f"{result['network']}, {count} photos, {sum(row['right'] for row in rows)} of them classified as labelled;",
        f"the label is explained in any case. Tiles of {result['region']} x {result['region']} pixels, flipped to the",
        f"fractions {', '.join(map(str, result['fractions']))}; score: the label's softmax probability. SRG =",
        "AUC(LeRF) - AUC(MoRF). Means over photos ± standard error; in the last column the SRG less that of",
        f"{REFERENCE} on the same photo. Seed {result['seed']}; {versions}.",
        "",
        "    python benchmarks/experiments/photos.py --data data --json benchmarks/experiments/results/photos.json",
    ]
    for fill, shown in result["fills"].items():
        lines += ["", f"## Fill: {shown}", "", f"| method | SRG | AUC MoRF | AUC LeRF | SRG - {REFERENCE} |"]
        lines += ["|---|---|---|---|---|"]
        found = {m: values(result, m, fill) for m in rows[0]["scores"]}
        for method in sorted(found, key=lambda m: -found[m]["srg"].mean()):
            v, difference = found[method], found[method]["srg"] - found[REFERENCE]["srg"]
            last = "" if method == REFERENCE else with_error(difference)
            cells = " | ".join([with_error(v["srg"]), with_error(v["morf"], ".3f"), with_error(v["lerf"], ".3f")])
            lines.append(f"| {method} | {cells} | {last} |")
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], file: Path) -> None:
    """Mean curves: a row for each fill, MoRF left, LeRF right."""
    at = [0.0, *result["fractions"]]
    figure, axes = plt.subplots(len(FILLS), 2, figsize=(11, 4 * len(FILLS)), sharex=True, sharey=True)
    for row, fill in zip(axes, result["fills"], strict=True):
        for axis, order in zip(row, ("morf", "lerf"), strict=True):
            for i, method in enumerate(result["photos"][0]["scores"]):
                curves = [photo["scores"][method][fill][order]["curve"] for photo in result["photos"]]
                style = "--" if i >= 10 else ":" if method == "random" else "-"
                axis.plot(at, np.mean(curves, 0), style, color=f"C{i % 10}", label=method)
            axis.set(title=f"{order}, fill {fill}", xlabel="fraction flipped", ylabel="mean probability of the label")
    axes[0, 1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=80, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=None, help="only the first so many")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    result = measure(options)
    options.json.with_suffix(".md").write_text(table(result))
    draw(result, options.json.with_suffix(".png"))
    print(table(result))


if __name__ == "__main__":
    main()
