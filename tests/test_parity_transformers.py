"""Parity with lxt 2.1, AttnLRP's authors' package, in float64: `pip install -e ".[test,parity]"`.

lxt's efficient mode is gradient x input with another backward pass, and stabilises nothing but the slope of an
activation, f(x) / (x + 1e-10). So each network is explained with jaxlrp's stabilisers, and with none on either side:
the latter must agree to rounding, which leaves the stabilisers as the only difference. Further differences, on purpose:

- lxt holds a norm's statistics constant, and has no other rule for norms; `attnlrp` passes relevance unless told.
- lxt's Gamma (zennit's) does not reach the projections of an attention, which torch does not call as layers;
  `attnlrp(gamma=...)` and `cp_lrp(gamma=...)` hold for every dense layer.
- lxt's slope has a pole at x = -1e-10.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlrp import Composite, composites, lrp, rules, select
from nets import quick_compilation  # noqa: F401

needed = ("torch", "torchvision", "zennit", "transformers", "lxt")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    pytest.skip(f"no {', '.join(missing)}: pip install -e '.[test,parity]'", allow_module_level=True)

import parity_transformers as twins  # noqa: E402  first: it sees to it that torchvision can be imported

# isort: split

import lxt.efficient.zennit_patches  # noqa: E402
import torch  # noqa: E402
import zennit.composites  # noqa: E402
import zennit.rules  # noqa: E402
from lxt.efficient.rules import identity_rule_implicit, identity_rule_implicit_fn  # noqa: E402

ROUNDING = 1e-10  # of the largest relevance
SEEDS = range(3)
TARGET = np.array([1, 3])  # of the two examples
MASK = np.array([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])  # the first sentence is padded


@dataclass(frozen=True, eq=False)
class Case:
    """A network, what lxt patches in it, and the composite that should agree."""

    network: str
    torch: Callable[[int], torch.nn.Module]
    module: ModuleType
    patch_map: dict[Any, Callable] | None  # None: lxt's own for this module
    composite: Callable[..., Composite]

    def theirs(self, model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        if self.network == "vit":
            return model(x)
        return model(inputs_embeds=x, attention_mask=torch.from_numpy(MASK)).logits

    def input(self, seed: int) -> np.ndarray:
        """Images, or the embeddings of token ids."""
        if self.network == "vit":
            return np.random.default_rng(seed).uniform(-2, 2, (2, 3, twins.SIZE, twins.SIZE))
        return self.torch(seed).bert.embeddings.word_embeddings.weight.numpy()[ids(seed)]


def ids(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, twins.VOCABULARY, MASK.shape) * MASK


bert, vit = twins.modeling_bert, twins.vision_transformer
CASES = {
    "bert, attnlrp": Case("bert", twins.torch_bert, bert, None, composites.attnlrp),
    "bert, attnlrp, sdpa": Case("bert", partial(twins.torch_bert, attention="sdpa"), bert, None, composites.attnlrp),
    "bert, cp_lrp": Case(
        "bert", partial(twins.torch_bert, attention="sdpa"), bert, twins.CP_BERT, composites.cp_lrp
    ),
    "vit, attnlrp": Case("vit", twins.torch_vit, vit, twins.ATTNLRP_VIT, composites.attnlrp),
    "vit, cp_lrp": Case("vit", twins.torch_vit, vit, None, composites.cp_lrp),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """More would wait for one another far longer than these small networks take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def drop(z: torch.Tensor, epsilon: float = 0.0) -> torch.Tensor:
    """A stabiliser that leaves all but zeros as they are."""
    return torch.where(z == 0, 1.0, z)


@pytest.fixture
def unstabilised(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and lxt has no stabilisers from there on."""

    def without() -> None:
        monkeypatch.setattr(identity_rule_implicit_fn.forward, "__defaults__", (0.0,))
        monkeypatch.setattr(lxt.efficient.zennit_patches, "stabilize", drop)

    return without


def right(case: Case, seed: int, gammas: dict[Any, zennit.rules.Gamma] | None = None) -> np.ndarray:
    """lxt's relevance of the input, that of TARGET's logits; `gammas`: the rule of each kind of torch layer."""
    x = torch.from_numpy(case.input(seed)).requires_grad_()
    with twins.patched(case.module, case.patch_map):
        model = case.torch(seed)
        with zennit.composites.LayerMapComposite(list((gammas or {}).items())).context(model) as explained:
            case.theirs(explained, x)[range(len(TARGET)), TARGET].sum().backward()
    return (x * x.grad).detach().numpy()


OURS = {"bert": lambda p, x: twins.bert_of(p, x, jnp.asarray(MASK)), "vit": twins.vit}


@cache
def explainer(network: str) -> Callable:
    """One compilation serves every number in a composite."""
    return jax.jit(lambda composite, *arguments: lrp(OURS[network], composite, argnums=1, target=TARGET)(*arguments))


def relevance(case: Case, seed: int, composite: Composite, stabilisers: bool = True) -> np.ndarray:
    """`stabilisers`: else every epsilon is 0, those of the rows that the composite leaves open included."""

    def number(path: tuple[Any, ...], value: Any) -> Any:
        return value if stabilisers or path[-1] != jax.tree_util.GetAttrKey("epsilon") else 0.0

    composite = jax.tree_util.tree_map_with_path(number, composite + composites.base())
    p = twins.parameters(case.torch(seed))
    return np.asarray(explainer(case.network)(composite, p, jnp.asarray(case.input(seed))))


def deviation(ours: np.ndarray, right: np.ndarray) -> float:
    assert np.abs(right).max() > 0
    return float(np.abs(ours - right).max() / np.abs(right).max())


@every_case
def test_network_is_the_same(case: Case):
    """Ours, torch's, and torch's with lxt's patches."""
    for seed in SEEDS:
        x, model = case.input(seed), case.torch(seed)
        values = case.theirs(model, torch.from_numpy(x)).numpy()
        with twins.patched(case.module, case.patch_map):
            changed = case.theirs(case.torch(seed), torch.from_numpy(x)).detach().numpy()
        assert deviation(changed, values) <= 1e-12
        assert deviation(np.asarray(OURS[case.network](twins.parameters(model), x)), values) <= 1e-12


def test_patches_are_undone():
    """Or test_parity.py would compare with another zennit."""
    before = [dict(vars(owner)) for owner in twins.TOUCHED]
    for case in CASES.values():
        with twins.patched(case.module, case.patch_map):
            assert any(dict(vars(o)) != b for o, b in zip(twins.TOUCHED, before, strict=True))
        assert all(dict(vars(o)) == b for o, b in zip(twins.TOUCHED, before, strict=True))


@every_case
def test_relevance(case: Case, unstabilised: Callable, record_property: Callable):
    """At the embeddings, or at the pixels. Epsilon's own default, 1e-6, is not small beside every unit."""
    small, larger = case.composite(), case.composite(epsilon=1e-6)
    expected = [right(case, seed) for seed in SEEDS]
    found = {
        epsilon: [deviation(relevance(case, seed, composite), expected[seed]) for seed in SEEDS]
        for epsilon, composite in (("1e-9", small), ("1e-6", larger))
    }
    unstabilised()
    found["0"] = [deviation(relevance(case, seed, small, stabilisers=False), right(case, seed)) for seed in SEEDS]
    record_property("deviation", found)
    assert max(found["0"]) <= ROUNDING
    assert max(found["1e-9"]) <= 1e-5
    assert max(found["1e-6"]) <= 2e-3


def test_tokens(record_property: Callable):
    """A token's relevance is that of its embedding; padding has none."""
    case = CASES["bert, attnlrp"]
    p, composite = twins.parameters(case.torch(0)), composites.attnlrp()
    ours = jax.jit(lrp(twins.bert, composite, argnums=1, target=TARGET))(p, jnp.asarray(ids(0)), jnp.asarray(MASK))
    expected = right(case, 0).sum(-1)
    record_property("deviation", found := deviation(np.asarray(ours), expected))
    assert found <= 1e-5
    assert not ours[MASK == 0].any() and not expected[MASK == 0].any()


@pytest.mark.parametrize("conv_gamma, gamma", [(0.25, 0.05), (100.0, 1.0), (0.1, 0.0)])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("vit")])
def test_gamma(name: str, conv_gamma: float, gamma: float, unstabilised: Callable, record_property: Callable):
    """At the pixels. The projections of attention have no Gamma: zennit's hooks do not reach them."""
    case = CASES[name]
    everywhere = case.composite(norm="constant_statistics", gamma=gamma, conv_gamma=conv_gamma)
    composite = Composite([(select.named("*self_attention*"), rules.Epsilon(1e-9))]) + everywhere

    def found(stabilisers: bool, stabiliser: Any) -> list[float]:
        expected = [right(case, seed, gammas(conv_gamma, gamma, stabiliser)) for seed in SEEDS]
        return [deviation(relevance(case, seed, composite, stabilisers), expected[seed]) for seed in SEEDS]

    as_it_comes = found(True, 1e-6)
    unstabilised()
    exact = found(False, drop)
    record_property("deviation", (as_it_comes, exact))
    assert max(as_it_comes) <= 1e-4
    assert max(exact) <= ROUNDING


def gammas(conv_gamma: float, gamma: float, stabiliser: Any = 1e-6) -> dict[Any, zennit.rules.Gamma]:
    """As lxt's example has them; zennit's own stabiliser is 1e-6."""
    kinds = {torch.nn.Conv2d: conv_gamma, torch.nn.Linear: gamma}
    return {kind: zennit.rules.Gamma(g, stabilizer=stabiliser) for kind, g in kinds.items()}


@pytest.mark.parametrize("name", ["bert, attnlrp", "vit, cp_lrp"])
def test_other_rules_are_other_explanations(name: str, record_property: Callable):
    """Of norms, the identity, as AttnLRP's paper has it; of attention, the other method's; Gamma, in attention too."""
    case, expected = CASES[name], right(CASES[name], 0)
    other = composites.cp_lrp if case.composite is composites.attnlrp else composites.attnlrp
    found = {
        "identity": deviation(relevance(case, 0, case.composite(norm="identity")), expected),
        other.__name__: deviation(relevance(case, 0, other(norm="constant_statistics")), expected),
    }
    if case.network == "vit":
        everywhere = case.composite(norm="constant_statistics", gamma=0.05, conv_gamma=0.25)
        found["gamma"] = deviation(relevance(case, 0, everywhere), right(case, 0, gammas(0.25, 0.05)))
    record_property("deviation", found)
    assert min(found.values()) > 0.1


def test_pole_of_an_activation():
    """At x = -1e-10 lxt divides by zero; Pass does not divide."""
    x = torch.tensor([-1e-10, 0.0], dtype=torch.float64, requires_grad=True)
    identity_rule_implicit(torch.nn.functional.gelu, x).sum().backward()
    assert (x * x.grad).isinf().tolist() == [True, False]
    gelu = partial(jax.nn.gelu, approximate=False)
    start = lambda y: jnp.ones_like(y)
    ours = lrp(gelu, composites.base(), target=start)(jnp.array([-1e-10, 0.0]))
    assert np.array_equal(ours, [1.0, 1.0])
