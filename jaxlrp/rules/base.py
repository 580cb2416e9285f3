"""What a rule is.

A rule takes the relevance R_out that arrived at a layer's output and returns R_in for each data input:

    R_j = sum_k (message from k to j),     and, where it conserves,  sum_j R_j = sum_k R_k

A rule is a frozen dataclass made with `@rule`: its numbers are pytree leaves (sweep them with `jax.vmap`, differentiate
with `jax.grad`), its choices (annotated `str` or `bool`) are static.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast, dataclass_transform

import jax
import numpy as np

from ..errors import InputError
from ..kinds import check as check_kind
from ..program import Op

if TYPE_CHECKING:
    from .layer import Layer

T = TypeVar("T", bound=type)

LINEAR = frozenset((
    "dense", "conv", "scale", "batch_norm", "add", "matmul", "avg_pool", "reduce", "resize",
))  # fmt: skip
KERNEL = frozenset(("dense", "conv"))
NORMS = frozenset(("layer_norm", "rms_norm", "group_norm"))  # and batch_norm, where the batch makes the statistics


@dataclass_transform(frozen_default=True)
def rule(cls: T) -> T:
    """Makes a class a frozen dataclass and a pytree: fields annotated `str` or `bool` are static, all others leaves.

    A tree made by JAX may hold anything in the numbers' places (gradients, tracers, placeholders), so rebuilding one
    skips `__post_init__`: numbers are checked where a person writes them.

    Raises SelectorError for an unknown kind in `kinds`, InputError for what `uses` does not know.
    """
    made: Any = dataclasses.dataclass(frozen=True)(cls)
    for name in made.kinds:
        check_kind(name)
    if not set(made.uses) <= {"inputs", "output", "params"}:
        raise InputError(f'{cls.__name__}: uses={set(made.uses)!r}; write some of "inputs", "output", "params"')
    fields = dataclasses.fields(made)
    static = [f.name for f in fields if f.type in (str, bool, "str", "bool")]
    leaves = [f.name for f in fields if f.name not in static]

    def flatten(rule: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        keyed = [(jax.tree_util.GetAttrKey(n), getattr(rule, n)) for n in leaves]
        return keyed, tuple(getattr(rule, n) for n in static)

    def unflatten(choices: tuple[Any, ...], numbers: Iterable[Any]) -> Any:
        new = object.__new__(made)
        for name, value in (*zip(leaves, numbers, strict=True), *zip(static, choices, strict=True)):
            object.__setattr__(new, name, value)
        return new

    jax.tree_util.register_pytree_with_keys(made, flatten, unflatten)
    return cast(T, made)


class Rule:
    """Base of all rules, the user's too.

    A subclass implements `propagate` and says for which kinds of Op it is meant:

        @jaxlrp.rules.rule
        class Damped(jaxlrp.rules.Rule):
            factor: float = 0.5
            kinds = jaxlrp.rules.LINEAR
            conserves = False

            def propagate(self, layer, relevance):
                output, pull = jax.vjp(layer.apply, *layer.inputs)
                return tuple(x * g for x, g in zip(layer.inputs, pull(self.factor * relevance / output)))

    kinds: the kinds of Op it can be assigned to. uses: what of the layer it reads ("inputs", "output", "params"); what
    is not named is not kept from the forward pass. conserves: whether all relevance is passed on but for what the rule
    enters in the layer's books (`Layer.book`); for one that is documented not to, the ledger shows what it creates.
    linear: whether R_in is linear in R_out, as it must be where devices hold parts of it.
    """

    kinds: ClassVar[frozenset[str]] = LINEAR
    conserves: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    uses: ClassVar[frozenset[str]] = frozenset(("inputs", "output", "params"))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # what the base says of its own is not said of it
        if "propagate" in vars(cls) and "proportional" not in vars(cls):
            cls.proportional = Rule.proportional  # type: ignore[method-assign]

    def propagate(self, layer: Layer, relevance: jax.Array) -> tuple[jax.Array, ...]:
        """R_in, one array for each of `layer.inputs`, from R_out, all in the layer's compute dtype (>= float32)."""
        raise NotImplementedError(f"{type(self).__name__} does not define propagate(layer, relevance)")

    def supports(self, op: Op) -> bool:
        """Whether the rule can be applied to this Op."""
        return op.kind in self.kinds

    def note(self, op: Op) -> str:
        """What a person should know about the rule at this Op, for the plan; "" for nothing."""
        return ""

    def proportional(self, op: Op) -> bool:
        """Whether an input's relevance is a multiple of its value, so that a zero receives none.

        Said anew by a subclass with a `propagate` of its own; else it is False there.
        """
        return False

    def needs(self, op: Op) -> frozenset[str]:
        """What of this Op must be kept for `propagate`: `uses`, unless the rule treats some kinds otherwise."""
        return self.uses


def concrete(number: Any) -> np.ndarray | None:
    """A rule's number as NumPy array where it can be checked: not a tracer."""
    if isinstance(number, jax.core.Tracer) or not isinstance(number, (int, float, np.ndarray, np.generic, jax.Array)):
        return None
    return np.asarray(number)


def check_choice(rule: Rule, name: str, *choices: str) -> None:
    """Raises InputError if the rule's choice is none of `choices`."""
    value = getattr(rule, name)
    if value not in choices:
        written = " or ".join(f'"{c}"' for c in choices)
        raise InputError(f"{type(rule).__name__}({name}={value!r}): write {written}")


def check_number(rule: Rule, name: str, *, minimum: float | None = None) -> None:
    """Raises InputError if the rule's number is not finite, or below `minimum`."""
    value = concrete(getattr(rule, name))
    if value is None:
        return
    title = f"{type(rule).__name__}({name}={getattr(rule, name)!r})"
    if not np.issubdtype(value.dtype, np.number) or not np.isfinite(value).all():
        raise InputError(f"{title}: {name} must be a finite number")
    if minimum is not None and (value < minimum).any():
        raise InputError(f"{title}: {name} must be at least {minimum:g}")


def broadcasts(small: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether an array of the first shape broadcasts to the second."""
    return len(small) <= len(shape) and all(b in (1, n) for b, n in zip(small[::-1], shape[::-1], strict=False))
