"""What every test runs under."""

import os
from importlib.metadata import version

os.environ["MPLBACKEND"] = "Agg"  # figures are drawn to files, on machines without a screen too

# Thousands of small programs are compiled, once each: with the older code generator in half the time. jaxlib 0.10 still
# has it, later ones refuse the flag. Set before JAX is imported, and for the processes that tests start.
if version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"

import jax

# Four CPU devices, for what is spread over several; everything else runs on the first.
jax.config.update("jax_num_cpu_devices", 4)

# The references are dense float64 matrices. Dtype and rank promotion stay JAX's own: Flax relies on the first, and
# a model written by hand says `x @ w + b`, which the second, set to "raise", would keep out of the tests.
jax.config.update("jax_enable_x64", True)
