"""The tables and figures of the flipping experiments, from what faithfulness.py measured.

    python benchmarks/experiments/tables.py mnist --data data --out benchmarks/experiments/results

An image's curve gives one area (times 100, as the talk prints them); a network's number is the mean over its images;
what is said is said over networks: mean, and the 95 % interval of Student's t over them. Two methods are compared image
by image, then network by network: images of one network are never counted as if they were independent of it.
"""

import argparse
import json
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from faithfulness import FILLS, LAYERS, REGION, SAME, SHOWN, STEPS
from scipy import stats

CHAIN = list(LAYERS)
# The founding talk's figures: AUC(Taylor) - AUC(identity).
TALK = {
    "ImageNet": {"epsilon 1": -35.84, "epsilon 0.01": -26.84, "epsilon 100": 8.47, "beta 1": 0.29, "beta 0": 1.98},
    "MIT Places": {"epsilon 1": -33.13, "epsilon 0.01": -24.59, "epsilon 100": 5.34, "beta 1": -0.39, "beta 0": -1.06},
    "CIFAR-10 (by elimination)": {"epsilon 0.01": 35.47 - 37.10, "beta 1": 53.82 - 56.13},
}
# Its first table, without the name of its data.
TALK_AREAS = {
    "epsilon 0.01, identity": 37.10,
    "epsilon 0.01, Taylor": 35.47,
    "beta 1, identity": 56.13,
    "beta 1, Taylor": 53.82,
}
# Its differences of neighbouring rules. The printed heads do not fit the columns: only as AUC(left) - AUC(right) along
# the chain of rules do they agree, up to a slip in the second column, with its table of Taylor minus identity.
TALK_CHAIN = {
    "ImageNet, identity": (-21.29, 2.75, -42.61, -49.07),
    "ImageNet, Taylor": (-12.29, -41.75, -34.44, -50.76),
    "MIT Places, identity": (-20.19, 12.91, -14.55, -49.37),
    "MIT Places, Taylor": (-11.65, -22.55, -8.82, -48.70),
}
Areas = dict[str, np.ndarray]  # "method|order|fill" -> (networks, images), times 100


def read(folder: Path, name: str) -> tuple[Areas, dict[str, np.ndarray], list[float]]:
    """(areas, curves averaged over images and networks, accuracies)."""
    files = [dict(np.load(path)) for path in sorted((folder / "flipping").glob(f"{name}-[0-9].npz"))]
    accuracies = [float(file.pop("accuracy")) for file in files]
    areas = {key: np.stack([100 * (f[key][:, 1:] + f[key][:, :-1]).mean(1) / 2 for f in files]) for key in files[0]}
    curves = {key: np.mean([file[key].mean(0) for file in files], axis=0) for key in files[0]}
    for method, _, fill in (key.split("|") for key in list(areas) if "|lerf|" in key):
        areas[f"{method}|srg|{fill}"] = areas[f"{method}|lerf|{fill}"] - areas[f"{method}|morf|{fill}"]
    return areas, curves, accuracies


def over_networks(values: np.ndarray) -> dict[str, Any]:
    """Of (networks, images): the mean over networks, its 95 % interval, and how many networks are below zero."""
    each = values.mean(1)
    half = stats.t.ppf(0.975, len(each) - 1) * each.std(ddof=1) / np.sqrt(len(each)) if len(each) > 1 else np.nan
    return {
        "mean": round(float(each.mean()), 3),
        "interval": [round(float(each.mean() - half), 3), round(float(each.mean() + half), 3)],
        "below zero": int((each < 0).sum()),
        "networks": len(each),
    }


def comparisons(areas: Areas, fill: str) -> dict[str, dict[str, Any]]:
    """What is claimed of the areas of most relevant first: each a difference that is negative where it holds."""
    morf = {key.split("|")[0]: values for key, values in areas.items() if key.endswith(f"|morf|{fill}")}
    morf["random"] = areas[f"random|random|{fill}"]
    pairs = [(method, other) for method in SHOWN[1:] for other in ("random", "sensitivity")] + [
        ("sensitivity", "random")
    ]
    if f"{CHAIN[0]}, Taylor" in morf:
        pairs += [(f"{a}, identity", f"{b}, identity") for a, b in pairwise(CHAIN)]
        pairs += [(f"{layer}, Taylor", f"{layer}, identity") for layer in CHAIN]
        pairs += [(f"{a}, unnormalised", f"{a}, identity") for a in ("epsilon 1", "beta 1")]
    found = {f"{a} < {b}": over_networks(morf[a] - morf[b]) for a, b in pairs}
    for method in SHOWN:
        late = areas[f"{method}|lerf|{fill}"]
        found[f"random < {method}, least relevant first"] = over_networks(morf["random"] - late)
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def shown(found: dict[str, Any]) -> str:
    return f"{found['mean']:.2f} [{found['interval'][0]:.2f}, {found['interval'][1]:.2f}]"


def page(name: str, areas: Areas, accuracies: list[float], images: int) -> tuple[str, dict[str, Any]]:
    """(Markdown, what goes into the JSON)."""
    methods = list(dict.fromkeys(key.split("|")[0] for key in areas))
    networks = f"{len(accuracies)} networks (test accuracy {min(accuracies):.4f} to {max(accuracies):.4f})"
    text = [
        f"# Pixel flipping: {name}\n",
        f"{networks}, the first {images} images of the test set, tiles of {REGION}x{REGION} pixels, "
        f"{STEPS[name]} steps, the "
        "probability of the true class. Areas times 100; mean over networks [95 % interval over networks].\n",
    ]
    numbers: dict[str, Any] = {"areas": {}, "differences": {}}
    for fill in FILLS[name]:
        rows = []
        for method in methods:
            measured = [order for order in ("random", "morf", "lerf", "srg") if f"{method}|{order}|{fill}" in areas]
            found = {order: over_networks(areas[f"{method}|{order}|{fill}"]) for order in measured}
            numbers["areas"][f"{method}|{fill}"] = found
            rows.append([method, *(shown(found[order]) for order in measured), *([""] * (3 - len(measured)))])
        text += [f"## Fill: {fill}\n", table(["method", "most relevant first", "least first", "SRG"], rows)]
        claims = numbers["differences"][fill] = comparisons(areas, fill)
        rows = [[claim, shown(v), f"{v['below zero']}/{v['networks']}"] for claim, v in claims.items()]
        text.append(table(["difference of areas, negative where it holds", "mean [interval]", "networks"], rows))
    if name.startswith("cifar"):
        fills = list(FILLS[name])
        rows = []
        for layer in CHAIN:
            ours = [shown(numbers["differences"][fill][f"{layer}, Taylor < {layer}, identity"]) for fill in fills]
            rows.append([layer, *ours, *(f"{talk[layer]:.2f}" if layer in talk else "" for talk in TALK.values())])
        text.append("## AUC(Taylor) - AUC(identity), beside the talk's figures\n")
        text.append(table(["rule", *(f"here, {fill}" for fill in fills), *(f"talk, {data}" for data in TALK)], rows))
        rows = []
        for method, talk in TALK_AREAS.items():
            rows.append([method, *(shown(numbers["areas"][f"{method}|{f}"]["morf"]) for f in fills), f"{talk:.2f}"])
        text.append(
            "## The areas themselves, most relevant first. The talk's scale is not stated; only signs compare\n"
        )
        text.append(table(["rules", *(f"here, {fill}" for fill in fills), "talk"], rows))
        heads = [f"{a} minus {b}" for a, b in pairwise(CHAIN)]
        rows = []
        for fill in fills:
            for response in ("identity", "Taylor"):
                morf = [areas[f"{layer}, {response}|morf|{fill}"] for layer in CHAIN]
                rows.append([f"here, {fill}, {response}", *(shown(over_networks(a - b)) for a, b in pairwise(morf))])
        rows += [[f"talk, {name}", *(f"{v:.2f}" for v in values)] for name, values in TALK_CHAIN.items()]
        text.append("## Neighbours in the talk's chain of rules, in the reading that its own two tables share\n")
        text.append(table(["", *heads], rows))
    return "\n".join(text), numbers


def draw(name: str, curves: dict[str, np.ndarray], path: Path) -> None:
    fills = list(FILLS[name])
    figure, axes = plt.subplots(1, len(fills), figsize=(4.6 * len(fills), 3.6), sharey=True, layout="constrained")
    for axis, fill in zip(np.atleast_1d(axes), fills, strict=True):
        axis.plot(np.linspace(0, 1, STEPS[name] + 1), curves[f"random|random|{fill}"], color="grey", label="random")
        for i, method in enumerate(SHOWN):
            for order, style in (("morf", "-"), ("lerf", ":")):
                curve = curves[f"{method}|{order}|{fill}"]
                label = method.removesuffix(", identity") if order == "morf" else None
                axis.plot(np.linspace(0, 1, len(curve)), curve, style, color=f"C{i}", label=label)
        axis.set(title=f"fill: {fill}", xlabel="part of the tiles replaced")
        axis.spines[["top", "right"]].set_visible(False)
    np.atleast_1d(axes)[0].set_ylabel("probability of the true class")
    np.atleast_1d(axes)[0].legend(frameon=False, title="most relevant first\n(dotted: least first)", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=FILLS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    areas, curves, accuracies = read(options.data, options.name)
    images = next(iter(areas.values())).shape[1]
    text, numbers = page(options.name, areas, accuracies, images)
    setting = {
        "commands": [
            f"python benchmarks/experiments/networks.py {SAME.get(options.name, options.name)} --data data",
            f"python benchmarks/experiments/faithfulness.py {options.name} --data data --images {images}",
            f"python benchmarks/experiments/tables.py {options.name} --data data --out results",
        ],
        "seeds": list(range(len(accuracies))),
        "networks": len(accuracies),
        "accuracies": [round(a, 4) for a in accuracies],
        "images": images,
        "region": REGION,
        "steps": STEPS[options.name],
        "versions": {package: version(package) for package in ("jax", "flax", "optax")},
    }
    options.out.mkdir(exist_ok=True)
    (options.out / f"{options.name}.md").write_text(text)
    (options.out / f"{options.name}.json").write_text(json.dumps({"setting": setting, **numbers}, indent=1) + "\n")
    draw(options.name, curves, options.out / f"{options.name}.png")


if __name__ == "__main__":
    main()
