"""Selectors say which Ops a row of a composite is for; combine them with & | ~.

A selector is a hashable value, so that composites can be arguments of a jitted function; `where` compares its
predicate by identity.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from . import kinds as _kinds
from .errors import SelectorError
from .program import Op

_WEIGHTED = ("dense", "conv")


@dataclasses.dataclass(frozen=True)
class Selector:
    """Base of selectors: `matches(op)`, and `check(ops)`, which raises where nothing can ever match."""

    def matches(self, op: Op) -> bool:
        raise NotImplementedError(f"{type(self).__name__} does not define matches(op)")

    def check(self, ops: Sequence[Op]) -> None:
        """Raises SelectorError if the selector cannot be meant for these Ops."""

    def __and__(self, other: Selector) -> Selector:
        return _Both(self, _selector(other))

    def __or__(self, other: Selector) -> Selector:
        return _Either(self, _selector(other))

    def __invert__(self) -> Selector:
        return _Not(self)


def _selector(value: object) -> Selector:
    if not isinstance(value, Selector):
        raise SelectorError(f"{value!r} is no selector; write jaxlrp.select.kind(...), named(...), first(...) or so")
    return value


@dataclasses.dataclass(frozen=True)
class _Both(Selector):
    left: Selector
    right: Selector

    def matches(self, op: Op) -> bool:
        return self.left.matches(op) and self.right.matches(op)

    def check(self, ops: Sequence[Op]) -> None:
        self.left.check(ops)
        self.right.check(ops)


@dataclasses.dataclass(frozen=True)
class _Either(_Both):
    def matches(self, op: Op) -> bool:
        return self.left.matches(op) or self.right.matches(op)


@dataclasses.dataclass(frozen=True)
class _Not(Selector):
    inner: Selector

    def matches(self, op: Op) -> bool:
        return not self.inner.matches(op)

    def check(self, ops: Sequence[Op]) -> None:
        self.inner.check(ops)


@dataclasses.dataclass(frozen=True)
class _Kind(Selector):
    kinds: tuple[str, ...]

    def matches(self, op: Op) -> bool:
        return op.kind in self.kinds


@dataclasses.dataclass(frozen=True)
class _First(_Kind):
    def matches(self, op: Op) -> bool:
        return op.first and op.kind in self.kinds


@dataclasses.dataclass(frozen=True)
class _Last(_Kind):
    def matches(self, op: Op) -> bool:
        return op.kind in self.kinds and not op.kinds_after.intersection(self.kinds)


@dataclasses.dataclass(frozen=True)
class _Named(Selector):
    pattern: str | re.Pattern[str]

    def matches(self, op: Op) -> bool:
        return any(self._fits(name) for name in (op.name, op.name.partition("#")[0], *op.paths))

    def _fits(self, name: str) -> bool:
        if isinstance(self.pattern, re.Pattern):
            return self.pattern.search(name) is not None
        return fnmatchcase(name, self.pattern)

    def check(self, ops: Sequence[Op]) -> None:
        if not any(self.matches(op) for op in ops):
            pattern = self.pattern.pattern if isinstance(self.pattern, re.Pattern) else self.pattern
            raise SelectorError(f"named({pattern!r}) matches no layer; the layers are: {_shown(ops)}")


@dataclasses.dataclass(frozen=True)
class _Exactly(Selector):
    name: str

    def matches(self, op: Op) -> bool:
        return op.name == self.name

    def check(self, ops: Sequence[Op]) -> None:
        if not any(self.matches(op) for op in ops):
            raise SelectorError(f"exactly({self.name!r}) matches no layer; the layers are: {_shown(ops)}")


def _shown(ops: Sequence[Op]) -> str:
    """The names that a person may have meant."""
    known = list(dict.fromkeys(op.name for op in ops if op.paths or op.kind in _WEIGHTED))
    return ", ".join(known[:12]) + (", ..." if len(known) > 12 else "") or "none has a name"


@dataclasses.dataclass(frozen=True)
class _Depth(Selector):
    low: int | None
    high: int | None

    def matches(self, op: Op) -> bool:
        return self._at_least(op, self.low, True) and not self._at_least(op, self.high, False)

    @staticmethod
    def _at_least(op: Op, bound: int | None, default: bool) -> bool:
        if bound is None:
            return default
        # -1 is the last dense or conv Op: no other comes after it
        return op.depth >= bound if bound >= 0 else -1 - op.height >= bound


@dataclasses.dataclass(frozen=True, eq=False)
class _Where(Selector):
    predicate: Callable[[Op], bool]

    def matches(self, op: Op) -> bool:
        return bool(self.predicate(op))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Where) and self.predicate is other.predicate

    def __hash__(self) -> int:
        return hash(id(self.predicate))


@dataclasses.dataclass(frozen=True)
class _Everything(Selector):
    def matches(self, op: Op) -> bool:
        return True


def _known(kinds: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_kinds.check(k) for k in kinds)


def kind(*kinds: str) -> Selector:
    """Ops of these kinds, for example kind("dense", "conv"). Raises SelectorError for an unknown kind."""
    if not kinds:
        raise SelectorError('kind() needs at least one kind, for example kind("dense", "conv")')
    return _Kind(_known(kinds))


def named(pattern: str | re.Pattern[str]) -> Selector:
    """Ops whose name or parameter path fits: a glob on the '/'-joined path ("params/Conv_*"), or a compiled regex.

    A pattern that fits no layer of the explained function is a SelectorError.
    """
    if not isinstance(pattern, (str, re.Pattern)):
        raise SelectorError(f"named({pattern!r}): the pattern must be a string or a compiled regular expression")
    return _Named(pattern)


def exactly(name: str) -> Selector:
    """The one Op of this name in the plan, taken literally: of two Ops that share weights, only the one meant.

    A name that no layer of the explained function has is a SelectorError.
    """
    if not isinstance(name, str):
        raise SelectorError(f"exactly({name!r}): the name must be a string, as the plan shows it")
    return _Exactly(name)


def first(*kinds: str) -> Selector:
    """Ops with only structural steps or preprocessing between them and the explained input (dense and conv if empty).

    Decided by data flow: a network with two stems has two first layers, a loop's body that reads its own carry none.
    """
    return _First(_known(kinds or _WEIGHTED))


def last(*kinds: str) -> Selector:
    """Ops from whose output no other Op of these kinds (dense and conv if empty) can be reached."""
    return _Last(_known(kinds or _WEIGHTED))


def depth(low: int | None = None, high: int | None = None) -> Selector:
    """Ops with low <= d < high, d the number of dense and conv Ops on the longest path before; None is unbounded.

    Negative numbers count from the output: depth(-1) is what has no dense or conv Op after it.
    """
    for bound in (low, high):
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int)):
            raise SelectorError(f"depth({low!r}, {high!r}): bounds must be integers or None")
    return _Depth(low, high)


def where(predicate: Callable[[Op], bool]) -> Selector:
    """Ops for which predicate(op) is true; op has .kind .name .paths .first .depth .in_shapes .out_shape."""
    if not callable(predicate):
        raise SelectorError(f"where({predicate!r}): the predicate must be callable")
    return _Where(predicate)


def everything() -> Selector:
    """Every Op that the row's rule can be applied to."""
    return _Everything()
