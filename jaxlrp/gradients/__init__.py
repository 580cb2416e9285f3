"""The gradient family and occlusion: the baselines that LRP is measured against. Called as `lrp`, without a composite.

They start with 1 at the target (at every output for None), where `lrp` starts with its value, and differentiate the
function itself, custom derivatives included.
"""

from .call import Root
from .derivative import gradient, gradient_x_input, sensitivity
from .occluding import occlusion
from .paths import integrated_gradients, smoothgrad
from .taylor import simple_taylor

__all__ = [
    "Root",
    "gradient",
    "gradient_x_input",
    "integrated_gradients",
    "occlusion",
    "sensitivity",
    "simple_taylor",
    "smoothgrad",
]
