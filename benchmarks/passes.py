"""The passes of rules on this device as XLA has them and as jaxlrp/rules/passes.py writes them: which are faster.

    python benchmarks/passes.py --json passes.json       # jaxlrp installed, or PYTHONPATH=.

Four tables. Convolutions and their transposes by taps; at the end of a line, where jaxlrp takes those. Transposed
convolutions with channels last, alone and of eight images one after another in the body of a loop. Max-pooling and its
derivative by slices. A dense layer's positive part by rows: z+ forward and back in one program, for several numbers of
examples. Images are images x height x width x channels; then window, outputs, stride; `own`: depthwise, `groups`: 32.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import rounds
from jaxlrp.rules import passes
from jaxlrp.rules.linear import positive

# images, size, channels, outputs, window, stride, groups
TAPS = [
    *((1, n, c, k, 3, 1, 1) for n, c, k in ((224, 64, 64), (112, 128, 128), (56, 256, 256), (28, 512, 512))),
    *((1, n, c, c, 3, 1, 1) for n, c in ((56, 64), (28, 128), (14, 256), (14, 512), (7, 512))),
    *((16, n, c, c, 3, 1, 1) for n, c in ((28, 128), (14, 256), (7, 512), (2, 512))),
    *((1, n, c, k, 1, 1, 1) for n, c, k in ((56, 64, 256), (28, 512, 128), (14, 256, 1024), (7, 2048, 512))),
    *(
        (1, n, c, k, w, 2, 1)
        for n, c, k, w in ((224, 3, 64, 7), (28, 256, 256, 3), (14, 512, 512, 3), (14, 1024, 2048, 1))
    ),
    *((n, 224, 3, 768, w, w, 1) for n, w in ((1, 16), (4, 16), (1, 32))),
    *((1, n, c, c, w, s, c) for n, c, w, s in ((112, 32, 3, 1), (112, 96, 3, 2), (28, 240, 3, 2), (14, 480, 5, 1))),
]
LAST = [
    *((1, n, c, c, 3, s, g) for n, c, s, g in ((112, 64, 1, 1), (56, 128, 1, 1), (56, 128, 2, 1), (56, 128, 1, 32))),
    (1, 224, 3, 64, 7, 2, 1),
]
# images, size, channels, window, stride
POOLS = [
    *((1, n, c, 2, 2) for n, c in ((224, 64), (112, 128), (28, 512))),
    *((n, 112, 64, 3, 2) for n in (1, 8)),
    *((1, n, 256, w, 1) for n, w in ((56, 3), (28, 5), (28, 7), (28, 9))),
]
DENSE = [(n, *shape) for shape in ((25088, 4096), (4096, 4096), (4096, 11008)) for n in (1, 16, 64, 256)]


def core_of(f: Callable, *arrays: jax.Array) -> Any:
    (eqn,) = jax.make_jaxpr(f)(*arrays).eqns
    return SimpleNamespace(primitive=eqn.primitive, params=eqn.params, inputs=eqn.invars, outputs=eqn.outvars)


def transposed(f: Callable, r: jax.Array, w: jax.Array, x: jax.Array) -> jax.Array:
    return jax.linear_transpose(lambda x: f(x, w), x)(r)[0]


def convolution(images: int, size: int, channels: int, outputs: int, window: int, stride: int, groups: int) -> Any:
    """Its title, function, equation and arrays: x, w, and r for the way back."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((images, size, size, channels), np.float32))
    w = jnp.asarray(rng.standard_normal((window, window, channels // groups, outputs), np.float32))

    def conv(x: jax.Array, w: jax.Array) -> jax.Array:
        spec = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": groups}
        return jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", **spec)

    r = jnp.asarray(rng.standard_normal(conv(x, w).shape, np.float32))
    title = f"{images}x{size}x{size}x{channels}, {window}x{window}, {outputs}, {stride}" + ", own" * (
        groups == channels
    )
    title += f", {groups} groups" * (1 < groups < channels)
    return title, conv, core_of(conv, x, w), (x, w, r)


def in_a_program(choice: Callable[[Any], bool], core: Any) -> bool:
    """What jaxlrp chooses where the pass is compiled."""
    found: list[bool] = []
    jax.make_jaxpr(lambda: found.append(choice(core)))()
    return found[0]


def of_taps(*shape: int) -> tuple[str, dict[str, Callable], str]:
    title, conv, core, (x, w, r) = convolution(*shape)
    taps = partial(passes.by_taps, core)
    back = partial(passes.back_by_taps, core) if passes.own_windows(core) else partial(transposed, taps)
    runs = {
        "xla": partial(jax.jit(conv), x, w),
        "taps": partial(jax.jit(taps), x, w),
        "xla^T": partial(jax.jit(partial(transposed, conv)), r, w, x),
        "taps^T": partial(jax.jit(back), r, w, *([] if passes.own_windows(core) else [x])),
    }
    taken = (name for name, back in (("forward", False), ("transposed", True)) if passes.faster(core, back))
    return title, runs, ", ".join(taken) or "-"


def of_last(*shape: int) -> tuple[str, dict[str, Callable], str]:
    title, conv, core, (x, w, r) = convolution(*shape)
    several = jnp.stack([r] * 8)

    def loop(back: Callable) -> Callable:
        return partial(jax.jit(lambda rs, w, x: jax.lax.map(lambda r: back(r, w, x), rs)), several, w, x)

    own, last = partial(transposed, conv), lambda r, w, x: passes.back_convolved(core, r, w)
    runs = {"xla^T": partial(jax.jit(own), r, w, x), "last^T": partial(jax.jit(last), r, w, x)}
    return (
        title,
        runs | {"xla, loop": loop(own), "last, loop": loop(last)},
        "taken" if in_a_program(passes.channels_last, core) else "-",
    )


def of_pools(images: int, size: int, channels: int, window: int, stride: int) -> tuple[str, dict[str, Callable], str]:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((images, size, size, channels), np.float32)).clip(0)
    pool = partial(nn.max_pool, window_shape=(window, window), strides=(stride, stride), padding="SAME")
    core = core_of(pool, x)
    r = jnp.asarray(rng.standard_normal(pool(x).shape, np.float32))
    runs = {
        "xla": partial(jax.jit(lambda x: pool(x)), x),
        "slices": partial(jax.jit(partial(passes.extremes, core)), x),
        "xla^T": partial(jax.jit(lambda x, r: jax.vjp(pool, x)[1](r)), x, r),
        "slices^T": partial(jax.jit(partial(passes.back_extremes, core)), x, r),
    }
    title = f"{images}x{size}x{size}x{channels}, {window}x{window}, {stride}"
    return title, runs, "taken" if passes.windowed(core) else "-"


def of_dense(examples: int, inputs: int, outputs: int) -> tuple[str, dict[str, Callable], str]:
    rng = np.random.default_rng(0)
    x, r = (jnp.asarray(rng.uniform(0.1, 1, (examples, n)).astype(np.float32)) for n in (inputs, outputs))
    w = jnp.asarray(rng.standard_normal((inputs, outputs), np.float32))
    core = core_of(jnp.matmul, x, w)

    def whole(x: jax.Array, w: jax.Array, r: jax.Array) -> jax.Array:
        kernel = positive(w)
        return x * transposed(jnp.matmul, r / (x @ kernel), kernel, x)

    def by_rows(x: jax.Array, w: jax.Array, r: jax.Array) -> jax.Array:
        return x * passes.back_by_rows(core, r / passes.by_rows(core, x, w, positive), w, positive)

    runs = {"xla": partial(jax.jit(whole), x, w, r), "rows": partial(jax.jit(by_rows), x, w, r)}
    return (
        f"{examples} x {inputs}, {outputs}",
        runs,
        "taken" if in_a_program(passes.large, core) else "-",
    )


TABLES: dict[str, tuple[Callable[..., tuple[str, dict[str, Callable], str]], list[Any]]] = {
    "taps": (of_taps, TAPS),
    "channels last": (of_last, LAST),
    "max-pooling": (of_pools, POOLS),
    "dense": (of_dense, DENSE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tables", nargs="+", default=[*TABLES], choices=TABLES)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = rounds.record("passes.py") | {"tables": {}}
    for name in options.tables:
        make, shapes = TABLES[name]
        rows = report["tables"][name] = []
        for shape in shapes:
            title, runs, note = make(*shape)
            seconds = rounds.measure(runs, options.rounds)
            pairs = [(a, b) for a, b in zip(runs, [*runs][1:], strict=False) if a.startswith("xla")]
            ratios = {b: rounds.ratios(seconds, a)[b]["ratio"] for a, b in pairs}
            ms = {key: 1e3 * rounds.ratios(seconds, key)[key]["median_s"] for key in runs}
            if not rows:
                print(f"{name:34}" + "".join(f"{f'{a} ms':>14}{f'{b} ms':>14}{'ratio':>7}" for a, b in pairs))
            print(
                f"{title:34}" + "".join(f"{ms[a]:14.2f}{ms[b]:14.2f}{ratios[b]:7.2f}" for a, b in pairs),
                note,
                flush=True,
            )
            rows.append({"shape": title, "ms": ms, "ratios": ratios, "taken": note})
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
