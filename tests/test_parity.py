"""Parity with zennit 0.5.1 and captum, in float64 and with the same weights: `pip install -e ".[test,parity]"`.

zennit adds a stabiliser of 1e-6 to every denominator; jaxlrp's rules but Epsilon drop what has a denominator of zero,
and its sums and average pools use Epsilon(1e-9). So each network is explained twice by zennit: by its presets as they
come, which must agree to 1e-4 of the largest relevance, and with jaxlrp's stabilisers, which must agree to rounding.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlrp import Composite, composites, gradients, lrp, rules, select

missing = [name for name in ("torch", "zennit", "captum") if importlib.util.find_spec(name) is None]
if missing:
    pytest.skip(f"no {', '.join(missing)}: pip install -e '.[test,parity]'", allow_module_level=True)

import parity_models  # noqa: E402  first: it sees to it that torchvision, which zennit imports, can be imported

# isort: split

import captum.attr  # noqa: E402
import torch  # noqa: E402
import zennit.attribution  # noqa: E402
import zennit.composites  # noqa: E402
import zennit.core  # noqa: E402
import zennit.layer  # noqa: E402
import zennit.rules  # noqa: E402
import zennit.torchvision  # noqa: E402
import zennit.types  # noqa: E402
from captum.attr._utils import lrp_rules  # noqa: E402

ROUNDING = 1e-10  # of the largest relevance


def to_torch(x: Any) -> torch.Tensor:
    """NHWC -> NCHW."""
    x = np.asarray(x)
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy() if x.ndim > 2 else x.copy())


def from_torch(x: torch.Tensor) -> np.ndarray:
    x = x.detach().numpy()
    return np.moveaxis(x, 1, -1) if x.ndim > 2 else x


def drop(z: torch.Tensor) -> torch.Tensor:
    """As a zennit stabiliser: messages of a unit whose denominator is 0 are 0, since their numerators are."""
    return torch.where(z == 0, 1.0, z)


def theirs(model: torch.nn.Module, composite: Any, x: np.ndarray, begin: Callable) -> np.ndarray:
    """zennit's relevance of x, where `begin` makes the start relevance from the output."""
    with zennit.attribution.Gradient(model=model, composite=composite) as attributor:
        _, relevance = attributor(to_torch(x), begin)
    return from_torch(relevance)


def deviation(ours: Any, right: np.ndarray) -> float:
    assert np.abs(right).max() > 0
    return float(np.abs(np.asarray(ours) - right).max() / np.abs(right).max())


# ---------------------------------------------------------------------------------------------------- networks

LOW, HIGH = np.array([-2.2, -2.1, -2.3]), np.array([2.4, 2.2, 2.3])


def box(**options: Any) -> Any:
    low, high = (torch.from_numpy(b).reshape(1, 3, 1, 1) for b in (LOW, HIGH))
    return zennit.composites.EpsilonGammaBox(low, high, **options)


PRESETS = {
    "EpsilonGammaBox": (box, composites.epsilon_gamma_box(LOW, HIGH)),
    "EpsilonPlus": (zennit.composites.EpsilonPlus, composites.epsilon_plus()),
    "EpsilonAlpha2Beta1": (zennit.composites.EpsilonAlpha2Beta1, composites.epsilon_alpha2_beta1()),
    "EpsilonPlusFlat": (zennit.composites.EpsilonPlusFlat, composites.epsilon_plus_flat()),
    "EpsilonAlpha2Beta1Flat": (zennit.composites.EpsilonAlpha2Beta1Flat, composites.epsilon_alpha2_beta1_flat()),
    "ExcitationBackprop": (zennit.composites.ExcitationBackprop, composites.excitation_backprop()),
    "DeconvNet": (zennit.composites.DeconvNet, composites.deconvnet()),
    "GuidedBackprop": (zennit.composites.GuidedBackprop, composites.guided_backprop()),
    "BetaSmooth": (zennit.composites.BetaSmooth, composites.beta_smooth()),
}
GRADIENTS = ("DeconvNet", "GuidedBackprop", "BetaSmooth")  # they divide by nothing

pair = cache(parity_models.build)


def images(size: int, count: int = 2) -> np.ndarray:
    return np.random.default_rng(1).uniform(-2, 2, (count, size, size, 3))


def same_stabilisers() -> dict[str, Any]:
    norm = zennit.rules.Norm(1e-9)
    return {"stabilizer": drop, "layer_map": [(zennit.layer.Sum, norm), (zennit.types.AvgPool, norm)]}


every_model = pytest.mark.parametrize(
    "model", [m if m == "small" else pytest.param(m, marks=pytest.mark.slow) for m in parity_models.MODELS]
)


@pytest.mark.parametrize("preset", PRESETS)
@every_model
def test_preset(model: str, preset: str, record_property: Callable):
    """Two images, each with a class of its own; both start with that class's logit."""
    network, (make, composite) = pair(model), PRESETS[preset]
    x, target = images(network.size), np.array([3, 7])
    ours = jax.jit(lrp(network.apply, composite, argnums=1, target=target))(network.variables, x)
    merge = zennit.torchvision.ResNetCanonizer if "resnet" in model else zennit.torchvision.VGGCanonizer

    def right(**options: Any) -> np.ndarray:
        chosen = torch.eye(parity_models.CLASSES, dtype=torch.float64)[target]
        return theirs(network.torch, make(canonizers=[merge()], **options), x, lambda y: y * chosen)

    as_it_comes = deviation(ours, right())
    stabilised = as_it_comes if preset in GRADIENTS else deviation(ours, right(**same_stabilisers()))
    record_property("deviation", (as_it_comes, stabilised))
    assert as_it_comes <= 1e-4
    assert stabilised <= ROUNDING


@every_model
def test_network_is_the_same(model: str):
    network = pair(model)
    x = images(network.size)
    with torch.no_grad():
        right = network.torch(to_torch(x)).numpy()
    assert deviation(jax.jit(network.apply)(network.variables, x), right) <= 1e-12


# ---------------------------------------------------------------------------------------------------- single layers


@dataclass(frozen=True)
class Linear:
    """A layer of torch and the Flax layer that shares its weights."""

    name: str
    torch: Callable[..., torch.nn.Module]
    flax: nn.Module
    input: tuple[int, ...]

    def __str__(self) -> str:
        return self.name

    def build(self) -> tuple[torch.nn.Module, Callable]:
        """With weights and biases of either sign, and one weight of zero."""
        rng = np.random.default_rng(len(self.name))
        layer = self.torch().double()
        for weights in layer.parameters():
            weights.data = torch.from_numpy(rng.standard_normal(tuple(weights.shape)))
        layer.weight.data.flatten()[0] = 0.0
        kernel = layer.weight.detach().numpy()
        parameters = {"kernel": kernel.transpose(*range(2, kernel.ndim), 1, 0)}
        if layer.bias is not None:
            parameters["bias"] = layer.bias.detach().numpy()
        return layer, lambda x: self.flax.apply({"params": parameters}, x)


def conv(name: str, features: int = 4, bias: bool = True, *, size: Any = 3, padding: Any = 0, **options: Any) -> Linear:
    size, padding = (v if isinstance(v, tuple) else (v, v) for v in (size, padding))
    stride, dilation, groups = options.get("stride", 1), options.get("dilation", 1), options.get("groups", 1)
    pads = [(p, p) for p in padding]
    flax = nn.Conv(features, size, stride, pads, 1, dilation, feature_group_count=groups, use_bias=bias)
    return Linear(
        name, lambda: torch.nn.Conv2d(4, features, size, padding=padding, bias=bias, **options), flax, (2, 7, 6, 4)
    )


LAYERS = [
    Linear("dense", lambda: torch.nn.Linear(6, 5), nn.Dense(5), (3, 6)),
    Linear("dense, no bias", lambda: torch.nn.Linear(6, 5, bias=False), nn.Dense(5, use_bias=False), (3, 6)),
    conv("conv", padding=1),
    conv("conv, no bias", bias=False),
    conv("conv, strided", stride=2, padding=1),
    conv("conv, strided past the edge", stride=3),
    conv("conv, grouped", features=6, groups=2, padding=1),
    conv("conv, depthwise", features=8, groups=4),
    conv("conv, dilated", dilation=2, padding=2),
    conv("conv, oblong", size=(3, 2), padding=(1, 0)),
    Linear("conv, 1d", lambda: torch.nn.Conv1d(4, 3, 3, padding=1), nn.Conv(3, (3,), padding=[(1, 1)]), (2, 7, 4)),
    Linear(
        "conv, transposed",
        lambda: torch.nn.ConvTranspose2d(4, 3, 3, stride=2),
        nn.ConvTranspose(3, (3, 3), (2, 2), padding="VALID", transpose_kernel=True),
        (2, 4, 3, 4),
    ),
]

Z = zennit.rules
RULES = {
    # so large that no test can pass without it
    "Epsilon": (Z.Epsilon(0.3), rules.Epsilon(0.3)),
    "Epsilon, relative": (
        Z.Epsilon(zennit.core.Stabilizer(0.2, norm_scale=True)),
        rules.Epsilon(0.2, stabiliser="relative"),
    ),
    "Epsilon, no bias": (Z.Epsilon(0.3, zero_params="bias"), rules.Epsilon(0.3, bias="ignore")),
    "Gamma 0.25": (Z.Gamma(0.25, stabilizer=drop), rules.GeneralizedGamma(0.25)),
    "Gamma 2": (Z.Gamma(2.0, stabilizer=drop), rules.GeneralizedGamma(2.0)),
    "ZPlus": (Z.ZPlus(stabilizer=drop), rules.ZPlus()),
    "ZPlus, no bias": (Z.ZPlus(stabilizer=drop, zero_params="bias"), rules.ZPlus(bias="ignore")),
    "AlphaBeta 2, 1": (Z.AlphaBeta(2.0, 1.0, stabilizer=drop), rules.AlphaBeta(2.0, 1.0)),
    "AlphaBeta 1, 0": (Z.AlphaBeta(1.0, 0.0, stabilizer=drop), rules.AlphaBeta(1.0, 0.0)),
    "AlphaBeta 1.5, 0.5": (Z.AlphaBeta(1.5, 0.5, stabilizer=drop), rules.AlphaBeta(1.5, 0.5)),
    "AlphaBeta 4, 3": (Z.AlphaBeta(4.0, 3.0, stabilizer=drop), rules.AlphaBeta(4.0, 3.0)),
    "AlphaBeta, no bias": (
        Z.AlphaBeta(2.0, 1.0, stabilizer=drop, zero_params="bias"),
        rules.AlphaBeta(2.0, 1.0, bias="ignore"),
    ),
    "ZBox": (Z.ZBox(-3.0, 4.0, stabilizer=drop), rules.ZBox(-3.0, 4.0)),
    # jaxlrp's WSquare leaves the bias out, as the paper does; see test_wsquare_with_bias
    "WSquare": (Z.WSquare(stabilizer=drop, zero_params="bias"), rules.WSquare()),
    "Flat": (Z.Flat(stabilizer=drop), rules.Flat()),
}


def linear(rule: rules.Rule) -> Composite:
    return Composite([(select.kind("dense", "conv"), rule)])


def signed(shape: tuple[int, ...], salt: int = 0) -> np.ndarray:
    """Numbers of either sign, with a zero among them."""
    x = np.random.default_rng(salt).standard_normal(shape)
    x.flat[1] = 0.0
    return x


def compare(layer: torch.nn.Module, function: Callable, rule: Any, composite: Composite, x: np.ndarray) -> float:
    """The deviation of one layer's relevance, from a start relevance of either sign."""
    R = signed(function(x).shape, salt=5)
    composed = zennit.composites.LayerMapComposite([(type(layer), rule)])
    right = theirs(layer, composed, x, lambda y: to_torch(R))
    return deviation(lrp(function, composite, target=lambda y: R)(x), right)


QUICK = ("dense", "conv, strided", "conv, grouped")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "layer", [v if v.name in QUICK else pytest.param(v, marks=pytest.mark.slow) for v in LAYERS], ids=str
)
def test_rule(layer: Linear, rule: str, record_property: Callable):
    module, function = layer.build()
    their_rule, our_rule = RULES[rule]
    x = signed(layer.input)
    np.testing.assert_allclose(function(x), from_torch(module(to_torch(x))), rtol=0, atol=1e-12)
    found = compare(module, function, their_rule, linear(our_rule), x)
    record_property("deviation", found)
    assert found <= ROUNDING


def test_norm_of_sums_and_average_pools():
    """zennit's Norm is what jaxlrp's base gives sums, average pools and means, with a stabiliser of 1e-9."""
    for size, stride in (((2, 2), (2, 2)), ((4, 2), (2, 1))):
        layer, pool = torch.nn.AvgPool2d(size, stride), partial(nn.avg_pool, window_shape=size, strides=stride)
        assert compare(layer, pool, Z.Norm(1e-9), Composite(), signed((2, 6, 4, 3))) <= ROUNDING
    layer, x = torch.nn.AdaptiveAvgPool2d(1), signed((2, 6, 4, 3))
    assert compare(layer, lambda x: x.mean((1, 2), keepdims=True), Z.Norm(1e-9), Composite(), x) <= ROUNDING

    def added(x):
        return x[..., 0] + x[..., 1]

    R = signed((2, 5), salt=5)
    x = signed((2, 5, 2))
    composed = zennit.composites.LayerMapComposite([(zennit.layer.Sum, Z.Norm(1e-9))])
    with zennit.attribution.Gradient(model=zennit.layer.Sum(-1), composite=composed) as attributor:
        _, right = attributor(torch.from_numpy(x), lambda y: torch.from_numpy(R))
    assert deviation(lrp(added, Composite(), target=lambda y: R)(x), right.numpy()) <= ROUNDING


def test_max_pool_ties():
    """No preset of zennit's has a rule for max-pools: torch's derivative is the first winner, as is jaxlrp's Winner."""
    x = np.random.default_rng(2).integers(-1, 2, (2, 8, 8, 3)).astype(float)
    layer = torch.nn.MaxPool2d(3, 2, padding=1)

    def pool(x):
        return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))

    R = signed(pool(x).shape, salt=5)
    right = theirs(layer, zennit.composites.EpsilonPlus(), x, lambda y: to_torch(R))
    assert deviation(lrp(pool, composites.epsilon_plus(), target=lambda y: R)(x), right) <= ROUNDING


# ---------------------------------------------------------------------------------------------------- meant to differ


def test_wsquare_with_bias():
    """zennit counts the bias as one more weight, b^2 in the denominator: its relevance is ours times its share."""
    module, function = LAYERS[0].build()
    x, R = signed((3, 6)), signed((3, 5), salt=5)
    squares = (module.weight**2).sum(1).detach().numpy()
    share = squares / (squares + module.bias.detach().numpy() ** 2)
    composed = zennit.composites.LayerMapComposite([(torch.nn.Linear, Z.WSquare(stabilizer=drop))])
    right = theirs(module, composed, x, lambda y: to_torch(R))
    ours = lrp(function, linear(rules.WSquare()), target=lambda y: R * share)(x)
    assert deviation(ours, right) <= ROUNDING
    assert deviation(lrp(function, linear(rules.WSquare()), target=lambda y: R)(x), right) > 1e-2


def norm_and_conv() -> tuple[torch.nn.Sequential, Any]:
    """BatchNorm, then convolution without padding, in torch, and the variables of both."""
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 3, 3)).double().eval()
    parity_models.randomise(model)
    return model, parity_models.variables(model)


class NormConv(nn.Module):
    relu: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = parity_models.norm(x, "0")
        return nn.Conv(3, (3, 3), padding="VALID", name="1")(nn.relu(x) if self.relu else x)


def test_batch_norm_that_joins_no_layer():
    """A BatchNorm between no linear layers passes relevance, on both sides: as in a DenseNet, or a ResNet-v2."""
    (norm, conv), variables = norm_and_conv()
    model = torch.nn.Sequential(norm, torch.nn.ReLU(), conv)
    x = signed((2, 6, 6, 4))
    R = signed((2, 4, 4, 3), salt=5)
    right = theirs(model, zennit.composites.EpsilonPlus(stabilizer=drop), x, lambda y: to_torch(R))
    ours = lrp(NormConv(relu=True).apply, composites.epsilon_plus(), argnums=1, target=lambda y: R)(variables, x)
    assert deviation(ours, right) <= ROUNDING


def test_batch_norm_before_a_convolution():
    """jaxlrp folds it into the convolution; zennit's canonizer folds only the other order, and it passes.

    So zennit agrees where the convolution is folded by hand: scaled weights, the shifts in its bias.
    """
    (norm, conv), variables = norm_and_conv()
    x = signed((2, 6, 6, 4))
    R = signed((2, 4, 4, 3), salt=5)
    ours = lrp(NormConv(relu=False).apply, composites.epsilon_plus(), argnums=1, target=lambda y: R)(variables, x)
    composed = zennit.composites.EpsilonPlus(stabilizer=drop)
    assert deviation(ours, theirs(torch.nn.Sequential(norm, conv), composed, x, lambda y: to_torch(R))) > 1e-2
    with torch.no_grad():
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        shift = norm.bias - norm.running_mean * scale
        conv.bias += (conv.weight * shift[None, :, None, None]).sum((1, 2, 3))
        conv.weight *= scale[None, :, None, None]
    assert deviation(ours, theirs(conv, composed, x, lambda y: to_torch(R))) <= ROUNDING


def test_excitation_backprop_at_other_activations():
    """zennit's ExcitationBackprop leaves activations to their gradient, which for a ReLU is the same as passing.

    jaxlrp passes at every activation, as both do in all other presets.
    """
    module, function = LAYERS[0].build()
    model = torch.nn.Sequential(torch.nn.Tanh(), module)
    x, R = signed((3, 6)), signed((3, 5), salt=5)

    def right(make: Callable) -> np.ndarray:
        return theirs(model, make(stabilizer=drop), x, lambda y: to_torch(R))

    def ours(composite: Composite) -> jax.Array:
        return lrp(lambda x: function(jnp.tanh(x)), composite, target=lambda y: R)(x)

    leaves = right(zennit.composites.ExcitationBackprop)
    assert deviation(ours(composites.excitation_backprop()), leaves) > 1e-2
    derived = Composite([(select.kind("activation"), rules.Gradient())]) + composites.excitation_backprop()
    assert deviation(ours(derived), leaves) <= ROUNDING
    assert deviation(ours(composites.epsilon_plus()), right(zennit.composites.EpsilonPlus)) <= ROUNDING


# ---------------------------------------------------------------------------------------------------- captum


def captum_lrp(rule: Callable, x: np.ndarray, target: int) -> np.ndarray:
    """Relevance by captum, with `rule()` in dense and convolution layers and its default everywhere else."""
    model = parity_models.build("small").torch  # a fresh one: captum leaves its rules in the model
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.rule = rule()
    return from_torch(captum.attr.LRP(model).attribute(to_torch(x), target=target))


CAPTUM_RULES = {
    "Epsilon": (lambda: lrp_rules.EpsilonRule(1e-2), rules.Epsilon(1e-2)),
    # captum leaves the bias as it is where the rule changes weights; without it, the rules are the same
    "Gamma": (lambda: lrp_rules.GammaRule(0.25, set_bias_to_zero=True), rules.Gamma(0.25, bias="ignore")),
    "ZPlus": (lambda: lrp_rules.Alpha1_Beta0_Rule(set_bias_to_zero=True), rules.ZPlus(bias="ignore")),
}


@pytest.mark.parametrize("rule", CAPTUM_RULES)
def test_captum_lrp(rule: str, record_property: Callable):
    """captum changes weights and not contributions, so its Gamma and ZPlus are for inputs that are not negative."""
    network, (their_rule, our_rule) = pair("small"), CAPTUM_RULES[rule]
    x = images(network.size)
    x = x if rule == "Epsilon" else abs(x)
    ours = lrp(network.apply, linear(our_rule), argnums=1, target=3)(network.variables, x)
    found = deviation(ours, captum_lrp(their_rule, x, target=3))
    record_property("deviation", found)
    assert found <= 1e-8  # its max-pools have a stabiliser of 1e-9


def test_captum_gradients(record_property: Callable):
    """captum's methods start with 1 at the target, as `gradients` does; `lrp` is told to."""
    network = pair("small")
    x = images(network.size)
    arguments = (network.variables, x)

    def one(y):
        return jnp.zeros_like(y).at[:, 3].set(1.0)

    ours = {
        "Saliency": abs(gradients.gradient(network.apply, argnums=1, target=3)(*arguments)),
        "InputXGradient": gradients.gradient_x_input(network.apply, argnums=1, target=3)(*arguments),
        "GuidedBackprop": lrp(network.apply, composites.guided_backprop(), argnums=1, target=one)(*arguments),
        "Deconvolution": lrp(network.apply, composites.deconvnet(), argnums=1, target=one)(*arguments),
    }
    for name, relevance in ours.items():
        method = getattr(captum.attr, name)(parity_models.build("small").torch)
        found = deviation(relevance, from_torch(method.attribute(to_torch(x).requires_grad_(), target=3)))
        record_property(name, found)
        assert found <= ROUNDING, name
