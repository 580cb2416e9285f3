"""Convolutions of every form, for the tests of the passes that are written anew."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def convolution(spec, strides, padding, dilation=None, groups=1):
    return lambda x, w: lax.conv_general_dilated(
        x, w, strides, padding, rhs_dilation=dilation, dimension_numbers=spec, feature_group_count=groups
    )


IMAGES = ("NHWC", "HWIO", "NHWC")
CASES = {
    "plain": (convolution(IMAGES, (1, 1), "SAME"), (2, 7, 6, 3), (3, 3, 3, 4)),
    "one wide": (convolution(IMAGES, (1, 1), "VALID"), (2, 7, 6, 3), (1, 1, 3, 4)),
    "one wide, strided": (convolution(IMAGES, (2, 2), "VALID"), (2, 7, 6, 3), (1, 1, 3, 4)),
    "strides and edges": (convolution(IMAGES, (2, 3), ((2, 1), (0, 3))), (2, 8, 9, 3), (3, 4, 3, 4)),
    "cropped": (convolution(IMAGES, (1, 1), ((-1, 2), (0, -2))), (2, 8, 9, 3), (3, 3, 3, 4)),
    "dilated": (convolution(IMAGES, (1, 2), "SAME", (2, 3)), (2, 9, 9, 3), (3, 3, 3, 4)),
    "channels first": (convolution(("NCHW", "OIHW", "NCHW"), (2, 1), "SAME"), (2, 3, 8, 7), (4, 3, 3, 3)),
    "mixed": (convolution(("NHWC", "OIHW", "HNCW"), (1, 1), "SAME"), (2, 5, 6, 3), (4, 3, 3, 2)),
    "depthwise": (convolution(IMAGES, (2, 2), "SAME", None, 3), (2, 7, 6, 3), (3, 3, 1, 3)),
    "depthwise, uneven": (convolution(IMAGES, (3, 2), ((2, 0), (-1, 3)), (1, 2), 3), (2, 8, 9, 3), (3, 4, 1, 3)),
    "depthwise, channels first": (
        convolution(("NCHW", "OIHW", "NCHW"), (1, 2), "SAME", None, 3),
        (2, 3, 8, 7),
        (6, 1, 3, 2),
    ),
    "depthwise, two each": (convolution(IMAGES, (1, 1), "SAME", None, 3), (2, 7, 6, 3), (3, 3, 1, 6)),
    "groups": (convolution(IMAGES, (2, 1), ((1, 2), (-1, 3)), (1, 2), 2), (2, 7, 8, 6), (3, 2, 3, 10)),
    "smaller than its window": (convolution(IMAGES, (1, 1), "SAME"), (2, 2, 2, 3), (3, 3, 3, 4)),
    "side by side": (convolution(("NHWC", "OIHW", "NCHW"), (3, 2), "VALID"), (2, 6, 8, 3), (4, 3, 3, 2)),
    "a line": (convolution(("NWC", "WIO", "NWC"), (2,), "SAME"), (2, 9, 3), (4, 3, 5)),
    "a volume": (convolution(("NDHWC", "DHWIO", "NDHWC"), (1, 2, 1), "SAME"), (2, 3, 4, 5, 2), (2, 3, 2, 2, 3)),
}


def convolutions(jaxpr: Any) -> Iterator[Any]:
    """The equations of all convolutions of a program, those within others included."""
    for e in jaxpr.eqns:
        if e.primitive.name == "conv_general_dilated":
            yield e
        for inner in jax.tree.leaves(list(e.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            if hasattr(inner, "eqns"):
                yield from convolutions(inner)
