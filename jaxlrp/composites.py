"""Composites: ordered tables of (selector, rule); the first row that fits an Op gives its rule.

A composite is a pytree whose leaves are its rules' hyper-parameters: stack two with `jax.tree.map` and `jax.vmap` over
them, differentiate with respect to one, or pass it to a jitted function, which then never recompiles for new numbers.
Default numbers are zennit's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from . import select
from .errors import InputError
from .program import Op
from .rules import (
    AlphaBeta,
    Attention,
    BetaSmooth,
    ConstantStatistics,
    DeconvNet,
    EmbeddingSum,
    Epsilon,
    Flat,
    GeneralizedGamma,
    Gradient,
    GuidedBackprop,
    Pass,
    PatternAttribution,
    PatternNet,
    Rule,
    SignalTakesAll,
    SoftmaxTaylor,
    Stop,
    Uniform,
    UniformEpsilon,
    Winner,
    WSquare,
    ZBox,
    ZPlus,
)
from .select import Selector, everything, exactly, first, kind

Row = tuple[Selector, Rule]


@jax.tree_util.register_pytree_with_keys_class
class Composite:
    """Rows of (selector, rule), tried from the top; what they leave open falls to `base()`.

        Composite([(select.first("conv"), rules.Flat()), (select.kind("dense", "conv"), rules.Epsilon(1e-6))])

    `a + b` puts a's rows before b's. Raises SelectorError for what is no selector, InputError for what is no rule.
    """

    def __init__(self, rows: Iterable[Row] = ()):
        self.rows: tuple[Row, ...] = tuple(self._row(r) for r in rows)

    @staticmethod
    def _row(row: Any) -> Row:
        try:
            selector, rule = row
        except (TypeError, ValueError):
            raise InputError(f"a row of a composite is a pair (selector, rule), not {row!r}") from None
        if isinstance(rule, type) and issubclass(rule, Rule):
            raise InputError(f"{rule.__name__} is a class; write {rule.__name__}()")
        if isinstance(rule, Rule) and jax.tree_util.all_leaves([rule]):
            raise InputError(f"{type(rule).__name__} is no pytree; write @jaxlrp.rules.rule above its class")
        if not isinstance(rule, Rule):
            raise InputError(f"{rule!r} is no rule; write one of jaxlrp.rules, for example rules.Epsilon(1e-6)")
        return select._selector(selector), rule

    def __add__(self, other: Composite) -> Composite:
        if not isinstance(other, Composite):
            return NotImplemented
        return Composite(self.rows + other.rows)

    def __repr__(self) -> str:
        return "Composite([\n" + "".join(f"    ({s!r}, {r!r}),\n" for s, r in self.rows) + "])"

    def find(self, op: Op) -> int | None:
        """The index of the first row that fits this Op and whose rule can be applied to it."""
        for i, (selector, rule) in enumerate(self.rows):
            if selector.matches(op) and rule.supports(op) and (not op.splits or _left_to_jax(op, rule)):
                return i
        return None

    def tree_flatten_with_keys(self) -> tuple[tuple[Any, ...], tuple[Selector, ...]]:
        keys = (jax.tree_util.SequenceKey(i) for i in range(len(self.rows)))
        children = tuple((k, rule) for k, (_, rule) in zip(keys, self.rows, strict=True))
        return children, tuple(s for s, _ in self.rows)

    def tree_flatten(self) -> tuple[tuple[Rule, ...], tuple[Selector, ...]]:
        return tuple(r for _, r in self.rows), tuple(s for s, _ in self.rows)

    @classmethod
    def tree_unflatten(cls, selectors: tuple[Selector, ...], rules: Iterable[Any]) -> Composite:
        new = object.__new__(cls)  # children may be placeholders: no checks
        new.rows = tuple(zip(selectors, rules, strict=True))
        return new


def _left_to_jax(op: Op, rule: Rule) -> bool:
    """Whether the derivative of the Op is JAX's own, which is all there is where it has several outputs."""
    return op.kind in ("structural", "blocked") or type(rule) is Gradient


def base() -> Composite:
    """What serves every composite where its own rows leave an Op open.

    Activations, reshapes, norms and a BatchNorm without a linear neighbour pass; sums, scales, average pools and what
    is computed in complex numbers are in proportion; maxima to the winner; a token gets the sum over its embedding;
    softmax, products, matrix products and attention as AttnLRP. Dense and conv have no default: none given is an error.
    Preprocessing of the explained input that did not join its first layers passes where one of them has Flat, WSquare
    or ZBox: in proportion to x / (x - mean) their relevance would explode.
    """
    return Composite([
        (kind("activation", "structural", "blocked"), Pass()),
        (kind("batch_norm", "layer_norm", "rms_norm", "group_norm", "local_response_norm"), Pass()),
        (kind("scale", "add", "reduce", "avg_pool", "resize", "complex"), Epsilon(1e-9)),
        (kind("max_pool"), Winner()),
        (kind("embedding"), EmbeddingSum()),
        (kind("softmax"), SoftmaxTaylor()),
        (kind("product"), Uniform()),
        (kind("matmul"), UniformEpsilon(1e-9)),
        (kind("attention"), Attention()),
    ])  # fmt: skip


def epsilon(epsilon: Any = 1e-6) -> Composite:
    """Epsilon for every dense and conv layer."""
    return Composite([(kind("dense", "conv"), Epsilon(epsilon))])


def epsilon_plus(epsilon: Any = 1e-6) -> Composite:
    """Epsilon for dense, z+ for conv layers."""
    return Composite([(kind("conv"), ZPlus()), (kind("dense"), Epsilon(epsilon))])


def epsilon_plus_flat(epsilon: Any = 1e-6) -> Composite:
    """`epsilon_plus` with Flat in the first layer (Kohlbrenner et al. 2020)."""
    return Composite([(first("dense", "conv"), Flat())]) + epsilon_plus(epsilon)


def epsilon_gamma_box(low: Any, high: Any, epsilon: Any = 1e-6, gamma: Any = 0.25) -> Composite:
    """z^B in a first conv layer, generalised gamma for conv, Epsilon for dense layers.

    low, high: the box of the explained input, in its own units, floats or arrays that broadcast to it.
    """
    return Composite([
        (first("conv"), ZBox(low, high)),
        (kind("conv"), GeneralizedGamma(gamma)),
        (kind("dense"), Epsilon(epsilon)),
    ])  # fmt: skip


def epsilon_alpha2_beta1(epsilon: Any = 1e-6) -> Composite:
    """alpha 2, beta 1 for conv, Epsilon for dense layers."""
    return Composite([(kind("conv"), AlphaBeta(2.0, 1.0)), (kind("dense"), Epsilon(epsilon))])


def epsilon_alpha2_beta1_flat(epsilon: Any = 1e-6) -> Composite:
    """`epsilon_alpha2_beta1` with Flat in the first layer (Kohlbrenner et al. 2020)."""
    return Composite([(first("dense", "conv"), Flat())]) + epsilon_alpha2_beta1(epsilon)


def deep_taylor(domain: str = "unbounded", low: Any = None, high: Any = None) -> Composite:
    """Deep Taylor decomposition (Montavon et al. 2017): z+, and in the first layer the rule of its input's domain.

    domain: "unbounded" (w^2), "nonnegative" (z+) or "box" (z^B between low and high; implied where they are given).
    Raises InputError for another domain, or for a box without bounds.
    """
    if low is not None or high is not None:
        domain = "box"
    if domain not in ("unbounded", "nonnegative", "box"):
        raise InputError(f'deep_taylor(domain={domain!r}): write "unbounded", "nonnegative" or "box"')
    if domain == "box" and (low is None or high is None):
        raise InputError(f"deep_taylor: a box needs both bounds, got low={low!r}, high={high!r}")
    entrance: Rule = {"unbounded": WSquare(), "nonnegative": ZPlus()}.get(domain) or ZBox(low, high)
    return Composite([(first("dense", "conv"), entrance), (kind("dense", "conv"), ZPlus())])


def excitation_backprop() -> Composite:
    """z+ for every dense and conv layer (Zhang et al. 2016)."""
    return Composite([(kind("dense", "conv"), ZPlus())])


def attnlrp(
    norm: str = "constant_statistics", epsilon: Any = 1e-9, gamma: Any = None, conv_gamma: Any = None
) -> Composite:
    """AttnLRP (Achtibat et al. 2024): attention and products share relevance equally between their operands.

    norm: LayerNorm and its kin with "constant_statistics", as in the authors' gradient x input implementation, or as
    "identity", as in their Prop. 3.4: then relevance can explode at residual sums, where it meets units near zero.
    Dense and conv layers have Epsilon(epsilon), or GeneralizedGamma where gamma (dense) or conv_gamma is a number, as
    vision transformers want it. Raises InputError for another norm.
    """
    return _transformer("attnlrp", norm, epsilon, gamma, conv_gamma)


def cp_lrp(
    norm: str = "constant_statistics", epsilon: Any = 1e-9, gamma: Any = None, conv_gamma: Any = None
) -> Composite:
    """CP-LRP (Ali et al. 2022): attention weights, and the gates of products, are constants.

    Relevance passes attention through its values alone, a gated unit through its ungated branch
    (`rules.SignalTakesAll`), and ends at a softmax that is no part of attention. Arguments as in `attnlrp`.
    """
    constant: list[Row] = [
        (kind("attention"), Attention("constant")),
        (kind("softmax"), Stop()),
        (kind("product", "matmul"), SignalTakesAll("linear")),
    ]
    return Composite(constant) + _transformer("cp_lrp", norm, epsilon, gamma, conv_gamma)


def _transformer(name: str, norm: str, epsilon: Any, gamma: Any, conv_gamma: Any) -> Composite:
    rules: dict[str, Rule] = {"identity": Pass(), "constant_statistics": ConstantStatistics(1e-9)}
    if norm not in rules:
        raise InputError(f'{name}(norm={norm!r}): write "identity" or "constant_statistics"')
    linear = [Epsilon(epsilon) if g is None else GeneralizedGamma(g) for g in (gamma, conv_gamma)]
    norms = kind("layer_norm", "rms_norm", "group_norm")
    return Composite([(norms, rules[norm]), (kind("dense"), linear[0]), (kind("conv"), linear[1])])


def _gradient_with(relu: Rule) -> Composite:
    return Composite([(kind("activation"), relu), (everything(), Gradient())])


def guided_backprop() -> Composite:
    """The gradient, its negative parts cut off at every ReLU (Springenberg et al. 2015); starts as lrp does."""
    return _gradient_with(GuidedBackprop())


def deconvnet() -> Composite:
    """The gradient with ReLUs that only look at its sign (Zeiler and Fergus 2014); starts as lrp does."""
    return _gradient_with(DeconvNet())


def beta_smooth(beta: Any = 10.0) -> Composite:
    """The gradient with softplus derivatives in place of the ReLUs' (Dombrowski et al. 2019); starts as lrp does."""
    return _gradient_with(BetaSmooth(beta))


def pattern_net(patterns: Mapping[str, Any]) -> Composite:
    """The signal (Kindermans et al. 2018): patterns in place of the weights, the gradient through all other layers.

    patterns: {layer's name: pattern}, as `jaxlrp.patterns.fit` gives them. A dense or conv layer without one is a
    NoRuleError, a name without a layer a SelectorError.
    """
    return _gradient_but(patterns, PatternNet)


def pattern_attribution(patterns: Mapping[str, Any]) -> Composite:
    """The signal's contributions (Kindermans et al. 2018): weights times patterns; otherwise as `pattern_net`."""
    return _gradient_but(patterns, PatternAttribution)


def _gradient_but(patterns: Mapping[str, Any], rule: type[PatternNet]) -> Composite:
    rows: list[Row] = [(exactly(name), rule(pattern)) for name, pattern in patterns.items()]
    return Composite([*rows, (~kind("dense", "conv"), Gradient())])


__all__ = [
    "Composite", "attnlrp", "base", "beta_smooth", "cp_lrp", "deconvnet", "deep_taylor", "epsilon",
    "epsilon_alpha2_beta1", "epsilon_alpha2_beta1_flat", "epsilon_gamma_box", "epsilon_plus", "epsilon_plus_flat",
    "excitation_backprop", "guided_backprop", "pattern_attribution", "pattern_net",
]  # fmt: skip
