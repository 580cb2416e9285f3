"""The same composite on the same network here and in PyTorch's LRP libraries, in images per second.

    python benchmarks/peers.py --json peers.json       # with .[bench,parity] and autolrp; PyTorch on this device

VGG-16, ResNet-50, EfficientNet-Lite0, ViT-B/16 and a decoder of GPT-2's size with random weights. Everything explains
the same class of every image of the batch, round by round in one process (lxt, which patches PyTorch, in one of its
own): jaxlrp compiled, on all cores; the libraries with each number of threads of `--threads`, of which the best counts.
Half a second passes before each run, as the threads of the library that ran last keep looking for work for a while.
`own gradient` is that framework's value and gradient of the explained logits with respect to the input (of TensorFlow
the gradient alone, by iNNvestigate). A library that
is not installed, or that cannot explain a network, is named with the reason. iNNvestigate needs other versions of what
jaxlrp needs: `--innvestigate` names a Python that has it (`keras_peer.py`).
"""

import argparse
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
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
from torch_peers import LIBRARIES, TARGET, Runs, of_torch

IMAGES = ("vgg16", "resnet50", "efficientnet")
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


def of_jaxlrp(name: str, x: np.ndarray, chosen: list[str]) -> Runs:
    apply, params, _ = models.build(name)
    given = jnp.asarray(x)
    gradient = jax.jit(models.gradient(apply, TARGET))
    runs: Runs = {("jaxlrp", "own gradient"): lambda: gradient(params, given)}
    for title in chosen:
        explain = jax.jit(lambda c, p, x: jaxlrp.value_and_lrp(apply, c, argnums=1, target=TARGET)(p, x))
        composite = COMPOSITES[title]()
        runs["jaxlrp", title] = lambda f=explain, c=composite: f(c, params, given)
    return runs


def of_keras(name: str, x: np.ndarray, options: argparse.Namespace, missing: dict[str, str]) -> Runs:
    """iNNvestigate, one process for each number of threads."""
    if name not in IMAGES or "lxt" in options.libraries:
        return {}
    if options.innvestigate is None:
        missing["iNNvestigate"] = "no --innvestigate"
        return {}
    if name == "efficientnet":
        missing["iNNvestigate"] = "Keras has no EfficientNet-Lite0"
        return {}
    if name == "resnet50" and len(x) > 1:
        missing["iNNvestigate"] = "only at batch 1: it takes half an hour to build its graphs of ResNet-50"
        return {}
    file = Path(tempfile.mkdtemp()) / "x.npy"
    np.save(file, x)
    runs: Runs = {}
    for count in options.threads:
        command = [options.innvestigate, str(Path(__file__).with_name("keras_peer.py")), name, str(file), str(TARGET)]
        threads = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS")
        environment = {**os.environ, **dict.fromkeys(threads, str(count)), "TF_CPP_MIN_LOG_LEVEL": "3"}
        environment.pop("PYTHONPATH", None)
        worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr, text=True, env=environment
        )
        assert worker.stdin is not None and worker.stdout is not None
        answer = worker.stdout.readline()
        if not answer:
            missing[f"iNNvestigate, {count}"] = f"its process ended with status {worker.wait()}"
            continue

        def run(title: str, worker: Any = worker) -> None:
            print(title, file=worker.stdin, flush=True)
            assert worker.stdout.readline() == f"{title}\n"

        titles, versions = json.loads(answer)
        missing["iNNvestigate runs on"] = versions
        for title in titles:
            library = "TensorFlow" if title == "own gradient" else "iNNvestigate"
            runs[f"{library}, {count} thread{'s' * (count > 1)}", title] = lambda run=run, title=title: run(title)
    return runs


def measure(name: str, batch: int, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, str]]:
    chosen = [c for c in COMPOSITES if (c in TRANSFORMERS) == (name not in IMAGES)]
    shape = models.build(name)[2]
    x = np.random.default_rng(0).standard_normal((batch, *shape), np.float32).clip(-3, 3)
    missing: dict[str, str] = {}
    runs = of_jaxlrp(name, x, chosen) | of_torch(name, x, chosen, options, missing)
    runs |= of_keras(name, x, options, missing)
    seconds = rounds.measure({" | ".join(k): run for k, run in runs.items()}, options.rounds, pause=0.5)
    rows = []
    for library, title in runs:
        key, same = f"{library} | {title}", f"jaxlrp | {title}"
        package, _, threads = library.partition(", ")
        framework = {"jaxlrp": "jaxlrp", "iNNvestigate": "TensorFlow", "TensorFlow": "TensorFlow"}.get(
            package, "PyTorch"
        )
        own = f"{framework}, {threads}" if threads else framework
        rows.append(
            {
                "library": library,
                "composite": title,
                "images_per_second": batch / median(seconds[key]),
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
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--innvestigate", metavar="PYTHON", help="an interpreter that has iNNvestigate")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    record = rounds.record("peers.py", "torch", "zennit", "captum", "autolrp", "lxt", "transformers", "torchvision")
    report: dict[str, Any] = {**record, "rounds": options.rounds, "models": {}}
    if options.innvestigate:
        report["command"] = report["command"].replace(options.innvestigate, "PYTHON")
    for name, batch in itertools.product(options.models, options.batches):
        groups = [[lib for lib in options.libraries if (lib == "lxt") == apart] for apart in (False, True)]
        for group in filter(None, groups):
            if group == ["lxt"] and name in IMAGES:
                continue
            chosen = argparse.Namespace(**{**vars(options), "libraries": group})
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
                rows, missing = apart.submit(measure, name, batch, chosen).result()
            for row in sorted(rows, key=lambda row: row["composite"]):
                library, title, *numbers, _ = row.values()
                print(f"{name:14}{batch:<4}{title:24}{library:26}" + "".join(f"{n:9.2f}" for n in numbers), flush=True)
            for what, why in missing.items():
                print(f"{name:14}{batch:<4}{what}: {why}", flush=True)
            report["models"][f"{name}, {batch}, {' '.join(group)}"] = {"rows": rows, "missing": missing}
            if options.json:
                options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
