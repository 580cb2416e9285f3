"""What every test runs under."""

import os

os.environ["MPLBACKEND"] = "Agg"  # figures are drawn to files, on machines without a screen too

import jax

# Four CPU devices, for what is spread over several; everything else runs on the first.
jax.config.update("jax_num_cpu_devices", 4)

# The references are dense float64 matrices. Dtype and rank promotion stay JAX's own: Flax relies on the first, and
# a model written by hand says `x @ w + b`, which the second, set to "raise", would keep out of the tests.
jax.config.update("jax_enable_x64", True)
