"""A small sweep, run in processes of its own by test_sweep_processes.py: python tests/sweeping.py '{"folder": ...}'.

It sets what has to be set before JAX starts (devices, processes), and can be told to kill itself within a write.
"""

import json
import os
import random
import signal
import sys
import time

CLASSES, SIDE = 3, 8


def setting(count=24, sleep=0.0, seed=0):
    """(predict, explainers, batches, options): a dense net on 8 x 8 images; some batches are bad, one is short."""
    import jax.numpy as jnp
    import numpy as np
    from jax.tree_util import Partial

    from jaxlrp import Composite, composites, rules, select

    rng = np.random.default_rng(seed)
    first, last = rng.normal(size=(SIDE * SIDE, 12)) / SIDE, rng.normal(size=(12, CLASSES))
    parameters = {"first": {"kernel": first.astype(np.float32)}, "last": {"kernel": last.astype(np.float32)}}
    gamma = (select.named("first/kernel"), rules.GeneralizedGamma(jnp.geomspace(0.01, 1, 2, dtype=jnp.float32)))
    explainers = {"epsilon": composites.epsilon(), "gamma": Composite([gamma]) + composites.epsilon()}

    def batch(i):
        def read():
            time.sleep(sleep)
            rng = np.random.default_rng(i)
            if i % 7 == 3:
                raise OSError(f"cannot read image {i}")
            x = rng.normal(size=(2 if i == count - 1 else 4, SIDE, SIDE, 1)).astype(np.float32)
            if i % 7 == 5:
                x[1, 0, 0] = np.nan
            return x, rng.integers(0, CLASSES, len(x))

        return read

    options = {"fills": {"noise": "gaussian"}, "region": 4, "group": 2}
    return Partial(network, parameters), explainers, [batch(i) for i in range(count)], options


def network(parameters, x):
    import jax

    return jax.nn.relu(x.reshape(len(x), -1) @ parameters["first"]["kernel"]) @ parameters["last"]["kernel"]


def suicidal(calls):
    """The process kills itself at one of its calls that write, before or after it: calls says at which, from 0 on."""
    left = [calls]

    def deadly(name):
        function = getattr(os, name)

        def wrapped(*args):
            left[0] -= 1
            if left[0] == -1 and random.random() < 0.5:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args)
            if left[0] == -1:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(os, name, wrapped)

    for name in ("fsync", "replace"):
        deadly(name)


def main(folder, devices=1, process=None, port=0, kill=None, group=2, compiled=None, **of_setting):
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    if compiled:  # so that not every process compiles the same
        jax.config.update("jax_compilation_cache_dir", compiled)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if process is not None:
        jax.distributed.initialize(f"localhost:{port}", 2, process)
    from jaxlrp.evaluate import sweep

    predict, explainers, batches, options = setting(**of_setting)
    mesh = jax.sharding.Mesh(jax.devices(), ("batch",)) if devices > 1 or process is not None else None
    if kill is not None:
        suicidal(kill)
    print("begun", flush=True)
    sweep(predict, explainers, batches, folder, mesh=mesh, progress=False, **{**options, "group": group})
    print("done", flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
