"""Convolutions and their transposes on this device, as XLA has them and by taps (jaxlrp/rules/passes.py).

    python benchmarks/convolutions.py --json convolutions.json       # jaxlrp installed, or PYTHONPATH=.

A row: images x height x width x channels, window, outputs, stride. The last columns say where jaxlrp takes taps.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

import rounds
from jaxlrp.rules import passes

# images, size, channels, outputs, window, stride, groups
SHAPES = [
    *((1, n, c, k, 3, 1, 1) for n, c, k in ((224, 64, 64), (112, 128, 128), (56, 256, 256), (28, 512, 512))),
    *((1, n, c, c, 3, 1, 1) for n, c in ((56, 64), (28, 128), (14, 256), (14, 512), (7, 512))),
    *((16, n, c, c, 3, 1, 1) for n, c in ((28, 128), (14, 256), (7, 512), (2, 512))),
    *((1, n, c, k, 1, 1, 1) for n, c, k in ((56, 64, 256), (28, 512, 128), (14, 256, 1024), (7, 2048, 512))),
    *(
        (1, n, c, k, w, 2, 1)
        for n, c, k, w in ((224, 3, 64, 7), (28, 256, 256, 3), (14, 512, 512, 3), (14, 1024, 2048, 1))
    ),
    *((1, n, c, c, w, s, c) for n, c, w, s in ((112, 32, 3, 1), (112, 96, 3, 2), (28, 240, 3, 2), (14, 480, 5, 1))),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = rounds.record("convolutions.py") | {"rows": []}
    print(f"{'':34}{'xla ms':>9}{'taps ms':>9}{'ratio':>7}{'xla^T ms':>10}{'taps^T ms':>10}{'ratio':>7}  taken")
    for images, size, channels, outputs, window, stride, groups in SHAPES:
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.standard_normal((images, size, size, channels), np.float32))
        w = jnp.asarray(rng.standard_normal((window, window, channels // groups, outputs), np.float32))

        def conv(x, w, stride=stride, groups=groups):
            spec = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": groups}
            return jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", **spec)

        (eqn,) = jax.make_jaxpr(conv)(x, w).eqns
        core = SimpleNamespace(primitive=eqn.primitive, params=eqn.params, inputs=eqn.invars, outputs=eqn.outvars)

        def taps(x, w, core=core):
            return passes.by_taps(core, x, w)

        r = jnp.asarray(rng.standard_normal(conv(x, w).shape, np.float32))

        def back(f, r, w, x):
            return jax.linear_transpose(lambda x: f(x, w), x)(r)[0]

        def back_by_taps(r, w, x, core=core):
            return (
                passes.back_by_taps(core, r, w) if passes.own_windows(core) else back(partial(taps, core=core), r, w, x)
            )

        own, forward, transposed = jax.jit(conv), jax.jit(taps), jax.jit(back_by_taps)
        own_transposed = jax.jit(partial(back, conv))
        runs = {
            "xla": partial(own, x, w),
            "taps": partial(forward, x, w),
            "xla^T": partial(own_transposed, r, w, x),
            "taps^T": partial(transposed, r, w, x),
        }
        seconds = rounds.measure(runs, options.rounds)
        one, other = rounds.ratios(seconds, "xla"), rounds.ratios(seconds, "xla^T")
        taken = [passes.faster(core, transposed) for transposed in (False, True)]
        title = f"{images}x{size}x{size}x{channels}, {window}x{window}, {outputs}, {stride}" + ", own" * (groups > 1)
        cells = [
            one["xla"]["median_s"],
            one["taps"]["median_s"],
            other["xla^T"]["median_s"],
            other["taps^T"]["median_s"],
        ]
        a, b, c, d = (1e3 * s for s in cells)
        ratios = one["taps"]["ratio"], other["taps^T"]["ratio"]
        chosen = ", ".join(n for n, t in zip(("forward", "transposed"), taken, strict=True) if t) or "-"
        print(f"{title:34}{a:9.2f}{b:9.2f}{ratios[0]:7.2f}{c:10.2f}{d:10.2f}{ratios[1]:7.2f}  {chosen}", flush=True)
        report["rows"].append({"shape": title, "ms": [a, b, c, d], "ratios": ratios, "taken": taken})
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
