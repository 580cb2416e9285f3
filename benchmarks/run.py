"""Every benchmark of speed, one process after another: prints their tables, keeps them and their figures.

    python benchmarks/run.py --out benchmarks/results       # jaxlrp installed, or PYTHONPATH=.

`cost-cpu.json` holds the figures of `cost.py` on a CPU, `cost-cpu.txt` its table; a figure says where it was measured.
Nothing else should run on the machine; with two cores it takes an hour.
"""

import argparse
import subprocess
import sys
from pathlib import Path

NAMES = ("passes", "cost", "sharing", "scaling", "tracing", "response", "flipping", "peers")

BATCHES = ["--batches", "1", "4", "16"]
MORE = {"cost": ["--models", "vgg16", "resnet50", "efficientnet", "vit", "decoder", "cnn", *BATCHES], "peers": BATCHES}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--innvestigate", metavar="PYTHON", help="for peers.py: an interpreter that has iNNvestigate")
    options = parser.parse_args()
    more = {**MORE}
    if options.innvestigate:
        more["peers"] = [*BATCHES, "--innvestigate", options.innvestigate]
    options.out.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    ask = [sys.executable, "-c", "import jax; print(jax.default_backend())"]  # apart: it would hold the device's memory
    device = subprocess.run(ask, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    for name in options.names:
        script, file = Path(__file__).with_name(f"{name}.py"), options.out / f"{name}-{device}"
        command = [sys.executable, str(script), "--json", f"{file}.json", *more.get(name, [])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            lines = []
            for line in process.stdout or ():
                print(line, end="", flush=True)
                lines.append(line)
        Path(f"{file}.txt").write_text("".join(lines))
        failed += [name] if process.returncode else []
    if failed:
        print("failed: " + ", ".join(failed), file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
