"""Local response normalisation, the layer: its numbers, its modules, and what it says of wrong arguments."""

import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlrp import rules
from jaxlrp.errors import InputError
from jaxlrp.nn import LocalResponseNorm, NNXLocalResponseNorm, local_response_norm
from nets import close, quick_compilation  # noqa: F401
from responses import X

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9, 30])
@pytest.mark.parametrize("alpha_per", ["window", "element"])
def test_layer(size: int, alpha_per: str):
    got = local_response_norm(X, size, 2.0, 0.7, 0.6, alpha_per=alpha_per)
    right = np.empty_like(X)
    for channel in range(X.shape[-1]):
        window = X[..., max(0, channel - size // 2) : channel + (size - 1) // 2 + 1]
        b = 0.7 / size if alpha_per == "window" else 0.7
        right[..., channel] = X[..., channel] / (2.0 + b * (window**2).sum(-1)) ** 0.6
    close(got, right, 1e-12)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_layer_within_channels(size: int):
    low, high = size // 2, (size - 1) // 2
    padded = np.pad(X**2, ((0, 0), (low, high), (low, high), (0, 0)))
    total = sum(padded[:, i : i + 3, j : j + 4] for i in range(size) for j in range(size))
    right = X / (1.0 + 0.3 / size**2 * total) ** 0.75
    close(local_response_norm(X, size, alpha=0.3, axis=(1, 2)), right, 1e-12)


def test_layer_axis_and_dtype():
    moved = local_response_norm(jnp.moveaxis(X, -1, 1), alpha=1.0, axis=1)
    close(jnp.moveaxis(moved, 1, -1), local_response_norm(X, alpha=1.0), 1e-12)
    assert local_response_norm(X.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    for beta in (0.75, 0.5, 1, 2):  # the roots that stand for 0.75 agree with a power
        close(local_response_norm(X, beta=beta), local_response_norm(X, beta=jnp.asarray(float(beta))), 1e-12)


@pytest.mark.parametrize("options", [{}, {"size": 3, "axis": (1, 2)}, {"alpha_per": "element", "k": 2.0}])
def test_modules(options):
    right = local_response_norm(X, **options)
    module = LocalResponseNorm(**options)
    assert not module.init(jax.random.key(0), X)
    close(module.apply({}, X), right, 0)
    close(NNXLocalResponseNorm(**options)(X), right, 0)


def test_without_flax():
    """The function needs none, and a module says what is missing."""
    code = """
        import sys; sys.modules["flax"] = None
        import numpy, jaxlrp.nn
        assert jaxlrp.nn.local_response_norm(numpy.ones(3, "float32")).shape == (3,)
        try: jaxlrp.nn.LocalResponseNorm
        except ModuleNotFoundError as error: assert "flax" in str(error)
        else: raise AssertionError
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    "options, says",
    [
        ({"size": 0}, "size=0"),
        ({"size": 2.0}, "size=2.0"),
        ({"size": True}, "size=True"),
        ({"alpha_per": "channel"}, 'alpha_per=\'channel\'.*"window" or "element"'),
        ({"k": 0.0}, "k=0.0.*> 0"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"beta": np.nan}, "beta=nan"),
        ({"axis": 4}, "axis=4.*0 to 3"),
        ({"axis": (1, -3)}, "once"),
        ({"axis": ()}, "at least one"),
    ],
)
def test_layer_errors(options, says):
    with pytest.raises(InputError, match=says):
        local_response_norm(X, **options)


def test_integers_are_an_error():
    with pytest.raises(InputError, match="int64.*floating point"):
        local_response_norm(np.arange(5))


def test_messages_are_checked():
    with pytest.raises(InputError, match='messages=\'raw\'.*"normalised" or "over_y" or "unnormalised"'):
        rules.LocalResponseTaylor("raw")
