"""Composite x Ops -> the rule of each Op, and the table that shows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .composites import Composite, base
from .errors import InputError, NoRuleError, SelectorError, UnknownPrimitiveError
from .kinds import EXCEPTIONS, UNDIFFERENTIABLE
from .program import Op
from .rules import Flat, Gradient, Pass, Rule, WSquare, ZBox


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """One Op and its rule. `base`: the rule came from `composites.base()`, not from the user's rows."""

    name: str
    kind: str
    in_shapes: tuple[tuple[int, ...], ...]
    out_shape: tuple[int, ...]
    rule: Rule
    base: bool
    source: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "in_shapes": [list(s) for s in self.in_shapes],
            "out_shape": list(self.out_shape),
            "rule": type(self.rule).__name__,
            "numbers": {name: _plain(value) for name, value in _numbers(self.rule).items()},
            "base": self.base,
            "source": self.source,
        }


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which rule runs where: iterable of rows, printed as a table, serialised by `to_dict()`.

    unused: rows of the composite that fit no Op. notes: what a person should know before trusting the heatmap.
    """

    rows: tuple[PlanRow, ...]
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[PlanRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> PlanRow:
        return self.rows[i]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers, ready for JSON."""
        return {"rows": [r.to_dict() for r in self.rows], "unused": list(self.unused), "notes": list(self.notes)}

    def __str__(self) -> str:
        table = [("name", "kind", "input", "output", "rule", "source")]
        for r in self.rows:
            inputs = " ".join(_shape(s) for s in r.in_shapes)
            table.append((r.name, r.kind, inputs, _shape(r.out_shape), _show(r.rule) + " *" * r.base, r.source))
        widths = [max(len(row[i]) for row in table) for i in range(6)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        lines.insert(1, "  ".join("-" * w for w in widths))
        if any(r.base for r in self.rows):
            lines.append("* from composites.base(): the composite's own rows left it open")
        lines += [f"unused row: {u}" for u in self.unused] + [f"note: {n}" for n in self.notes]
        return "\n".join(lines)

    __repr__ = __str__


def assign(ops: Sequence[Op], composite: Composite, on_unknown: str = "error") -> tuple[tuple[Rule, ...], Plan]:
    """The rule of each Op, in order, and the plan.

    Raises:
      SelectorError: a `named` pattern without a match, or a row that selects Ops its rule cannot be applied to.
      NoRuleError: a dense or conv Op that no row fits.
      UnknownPrimitiveError: relevance arrives at a primitive without a kind, unless on_unknown is "gradient".
      InputError: `composite` is no Composite, or a rule's numbers do not fit the layer.
    """
    if not isinstance(composite, Composite):
        hint = "write jaxlrp.composites.epsilon()" if not callable(composite) else "call it: composites.epsilon()"
        raise InputError(f"expected a Composite, got {composite!r}; {hint}")
    if on_unknown not in ("error", "gradient"):
        raise InputError(f'on_unknown={on_unknown!r}: write "error" or "gradient"')
    for selector, _ in composite.rows:
        selector.check(ops)
    fallback = base()
    rules, rows, used = [], [], set()
    for op in ops:
        i = composite.find(op)
        if i is not None:
            rule, own = composite.rows[i][1], True
            used.add(i)
        elif op.kind == "unknown":
            rule, own = _unknown(op, on_unknown), False
        else:
            j = fallback.find(op)
            if j is None:
                raise NoRuleError(_no_rule(op))
            rule, own = fallback.rows[j][1], False
        check = getattr(rule, "check", None)
        if check is not None:
            check(op)
        rules.append(rule)
        rows.append(PlanRow(op.name, op.kind, op.in_shapes, op.out_shape, rule, not own, op.source))
    notes = _notes(ops)
    for op, rule in zip(ops, rules, strict=True):
        note = rule.note(op)
        where = f" ({op.source})" if op.source else ""
        notes += (f"{op.name}{where}: {note}",) if note else ()
    for i, j in _preprocessing(ops, rules):
        if rows[j].base:  # see composites.base
            rules[j] = Pass()
            rows[j] = dataclasses.replace(rows[j], rule=rules[j])
        if isinstance(rules[i], ZBox):
            notes += (
                f"{ops[i].name} ({ops[i].source}): its box is in the units of what enters it, after {ops[j].name} "
                f"({ops[j].source}), which it shares with others or cannot join",
            )
    unused = tuple(_unused(ops, *row) for i, row in enumerate(composite.rows) if i not in used)
    return tuple(rules), Plan(tuple(rows), unused, notes)


def _unused(ops: Sequence[Op], selector: Any, rule: Rule) -> str:
    selected = [op for op in ops if selector.matches(op)]
    if selected and not any(rule.supports(op) for op in selected):
        op = selected[0]
        raise SelectorError(
            f"({selector!r}, {_show(rule)}) selects only Ops that {type(rule).__name__} cannot be applied to, such as "
            f"{op.name} ({op.kind}, {op.in_shapes} -> {op.out_shape}, {op.source}); it is for: "
            f"{', '.join(sorted(rule.kinds))}"
        )
    return f"({selector!r}, {_show(rule)})"


def _unknown(op: Op, on_unknown: str) -> Rule:
    if on_unknown == "gradient":
        return Gradient()
    where = f"relevance arrives at the primitive {op.primitive!r} ({op.source})"
    round_it = 'to let the gradient through, pass on_unknown="gradient"'
    if op.primitive in EXCEPTIONS:
        hint = "" if op.primitive in UNDIFFERENTIABLE else f"; {round_it}"
        raise UnknownPrimitiveError(f"{where}: {EXCEPTIONS[op.primitive]}{hint}")
    if op.primitive in ("custom_jvp_call", "custom_vjp_call"):
        raise UnknownPrimitiveError(
            f"{where}: a function with a derivative of its own, around something that relevance cannot pass (a loop of "
            f'unknown length, a callback); to use that derivative, pass on_unknown="gradient"'
        )
    if any(np.issubdtype(v.aval.dtype, np.complexfloating) for v in (*op.inputs, op.output)):
        raise UnknownPrimitiveError(
            f"{where}, which is no sum, product or modulus of complex numbers; write it with their .real and .imag, or "
            f"{round_it}"
        )
    if op.label == "embedding":
        raise UnknownPrimitiveError(
            f"{op.primitive} at {op.source}: an explained id is one of several indices, whose share of the relevance "
            f"is unclear; index one axis at a time, table[i][arange, j], or table.reshape(-1, width)[i * columns + j]"
        )
    if len(op.inputs) > 1:
        raise UnknownPrimitiveError(
            f"{where}, which combines {len(op.inputs)} values of the data by no rule that is known; hold all but one "
            f"constant by lax.stop_gradient, or {round_it}"
        )
    raise UnknownPrimitiveError(
        f"{where}, which has no kind. If it acts element "
        f'by element, write jaxlrp.kinds.register({op.primitive.replace("-", "_")}_p, "activation"); if it moves '
        f'elements, "structural"; if it is linear, "reduce"; {round_it}'
    )


def _no_rule(op: Op) -> str:
    return (
        f"no rule for {op.name} ({op.kind}: {op.primitive}, {op.source}); add a row to the composite: "
        f'(jaxlrp.select.kind("{op.kind}"), jaxlrp.rules.Epsilon(1e-6))'
    )


def is_end(op: Op) -> bool:
    """Whether the Op is a softmax that nothing but reshapes and casts follows."""
    return op.kind == "softmax" and op.kinds_after <= {"structural"}


def _notes(ops: Sequence[Op]) -> tuple[str, ...]:
    ends = [op for op in ops if is_end(op)]
    return tuple(
        f"{op.name} ({op.source}) ends the function: relevance should start at the logits; explain jaxlrp.logits(fun)"
        for op in ends
    )


def _preprocessing(ops: Sequence[Op], rules: Sequence[Rule]) -> Iterator[tuple[int, int]]:
    """Pairs of a first layer whose rule looks at its input's domain, and the preprocessing before it that is no part
    of it, by their positions."""
    changed: dict[Any, int] = {}
    for i, op in enumerate(ops):
        before = [changed[v] for v in op.inputs if v in changed]
        if isinstance(rules[i], (Flat, WSquare, ZBox)):
            yield from ((i, j) for j in before)
        if op.first and op.kind in ("scale", "batch_norm", "resize"):
            changed[op.output] = i
        elif op.first and op.kind == "structural" and before:
            changed |= {v: before[0] for e in op.steps for v in e.outputs}


def _show(rule: Rule) -> str:
    return f"{type(rule).__name__}({', '.join(f'{k}={_number(v)}' for k, v in _numbers(rule).items())})"


def _numbers(rule: Rule) -> dict[str, Any]:
    """The rule's numbers, and those of its choices that are not the default ones."""
    fields = dataclasses.fields(rule)  # type: ignore[arg-type]
    values = {f.name: (getattr(rule, f.name), f.default) for f in fields}
    return {name: v for name, (v, default) in values.items() if not (isinstance(v, (str, bool)) and v == default)}


def _number(value: Any) -> str:
    plain = _plain(value)
    return f"{plain:g}" if isinstance(plain, float) else str(plain)


def _plain(value: Any) -> Any:
    """A number as Python has it; an array as nested lists if it is small, else its shape; a tracer as its type."""
    if isinstance(value, (bool, int, float, str)):
        return value
    import jax

    if isinstance(value, jax.core.Tracer) or not hasattr(value, "tolist"):
        return str(getattr(value, "aval", value))
    return value.tolist() if value.size <= 16 else f"array{_shape(value.shape)}"


def _shape(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
