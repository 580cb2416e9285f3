"""The ledger: where relevance went, Op by Op, from one backward pass.

For every Op and every example

    arrived + created = passed + bias + stabiliser + dropped + ended

and over the whole program: start = arrived at the explained inputs + what all Ops kept - what they created. Each rule
enters bias, stabiliser and dropped in the layer's books by its own formula; `created` is non-zero only for rules that
are documented not to conserve. What the equation leaves open is `gap`: rounding, or a rule that keeps no books.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._compat import over_devices
from ..analysis import analyse
from ..assign import assign
from ..attribute import Target, check_nan, start
from ..composites import Composite
from ..errors import InputError
from ..facts import infer, joins_constants
from ..interpret import Interpreter, Settings, lead, loops
from ..program import Body
from ..rules import Layer, Rule, summed
from ..tokens import carrier_of, carrying
from ..trace import check_argnums

COLUMNS = ("arrived", "passed", "bias", "stabiliser", "dropped", "created", "ended", "size")


@dataclasses.dataclass(frozen=True)
class LedgerRow:
    """One Op (one iteration of it, in a scan). Every number is an array over the examples, float64.

    arrived: sum of R_out. passed: sum of R_in. bias, stabiliser: what they absorbed. dropped: at zero denominators.
    ended: at constants (padding, a token, a loop's constants, `stop_gradient`). created: by a rule that does not
    conserve. size: sum of |R_out|.
    """

    name: str
    kind: str
    rule: str
    arrived: np.ndarray
    passed: np.ndarray
    bias: np.ndarray
    stabiliser: np.ndarray
    dropped: np.ndarray
    created: np.ndarray
    ended: np.ndarray
    size: np.ndarray

    @property
    def gap(self) -> np.ndarray:
        """What the row leaves unexplained."""
        kept = self.bias + self.stabiliser + self.dropped + self.ended
        return self.arrived + self.created - self.passed - kept


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Rows in program order; iterable, printable (means over the examples), `to_dict()` for JSON.

    start: relevance at the explained output. received: relevance at the explained inputs. Arrays over the examples.
    """

    rows: tuple[LedgerRow, ...]
    start: np.ndarray
    received: np.ndarray

    def __iter__(self) -> Iterator[LedgerRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> LedgerRow:
        return self.rows[i]

    @property
    def gap(self) -> np.ndarray:
        """start - received - everything the Ops kept + everything they created: zero up to rounding."""
        kept = sum(r.bias + r.stabiliser + r.dropped + r.ended - r.created for r in self.rows)
        return self.start - self.received - kept

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and strings, ready for JSON."""
        rows = [
            {"name": r.name, "kind": r.kind, "rule": r.rule, **{c: getattr(r, c).tolist() for c in COLUMNS}}
            for r in self.rows
        ]
        return {"start": self.start.tolist(), "received": self.received.tolist(), "rows": rows}

    def __str__(self) -> str:
        shown = COLUMNS[:-1]
        table: list[tuple[str, ...]] = [("name", "kind", "rule", *shown)]
        for r in self.rows:
            table.append((r.name, r.kind, r.rule, *(_cell(getattr(r, c)) for c in shown)))
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines = [
            "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in table
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        lines.append(
            f"start {self.start.mean():.6g} = received {self.received.mean():.6g} + kept "
            f"{(self.start - self.received - self.gap).mean():.6g} + gap {self.gap.mean():.2g}   (means over examples)"
        )
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__


def _cell(values: np.ndarray) -> str:
    mean = values.mean()
    return f"{mean:.4g}" if mean else "."


def conservation(
    fun: Callable,
    composite: Composite,
    argnums: int | Sequence[int] = 0,
    target: Target = None,
    *,
    batched: bool = True,
    on_unknown: str = "error",
) -> Callable:
    """A function of `fun`'s arguments that returns the `Ledger` of one explanation, from one compiled pass.

    Args: as `jaxlrp.lrp`, and
      batched: the explained arguments have a leading axis of examples, and so do an array target and what `fun`
        returns; the ledger then has one number per example. False: one ledger over everything.

    Raises: as `jaxlrp.lrp`; InputError if explained arguments disagree on the number of examples.
    """

    @functools.wraps(fun, updated=())
    def audited(*args: Any, **kwargs: Any) -> Ledger:
        wanted = check_argnums(fun, argnums, len(args))
        explained = [args[i] for i in wanted]
        if batched:
            _check_examples(explained)
            # the program is that of one example, mapped over all of them
            one = [jax.tree.map(lambda x: x[:1], a) if i in wanted else a for i, a in enumerate(args)]
        else:
            one = list(args)
        try:
            traced, body = analyse(fun, tuple(one), kwargs, argnums)
        except TypeError as error:  # a shape that is written into the function, for one
            if not batched:
                raise
            raise InputError(f"{_DEPENDENT}; on one example it fails: {error}") from error
        check_nan(traced, body)
        if not callable(target):  # an index is checked before it becomes a tracer
            jax.eval_shape(lambda: start(fun(*args, **kwargs), target))
        ops = list(body.ops())
        rules, _ = assign(ops, composite, on_unknown)
        titles, probes = _probes(body, rules)
        settings = Settings({i: rules[i] for i in titles if i >= 0})
        interpreter = Interpreter(body, _row, total=True)

        def books(xs: list[Any], target: Target, arrays: list[Any]) -> tuple[Any, Any]:
            arrays = list(arrays)
            for i, x in zip(traced.explained, xs, strict=True):
                arrays[i] = x[None] if batched else x

            def forward(xs: list[Any], probes: dict[int, Any]) -> Any:
                for i, x in zip(traced.explained, xs, strict=True):
                    arrays[i] = carrying(arrays[i], x[None] if batched else x)
                outputs = interpreter(dataclasses.replace(settings, probes=probes), *arrays)
                return jax.tree.unflatten(traced.out_tree, outputs)

            value, pull = jax.vjp(forward, [carrier_of(x) for x in xs], probes)
            begun = start(value, target)
            received, rows = pull(begun)
            nowhere = [r for r, carries in zip(jax.tree.leaves(begun), body.carries, strict=True) if not carries]
            ids = [r for r, x in zip(received, xs, strict=True) if not jnp.issubdtype(x.dtype, jnp.inexact)]
            return (_sum(begun), _sum(received), _sum(nowhere), _sum(_inexact(value)), _sum(ids)), rows

        xs = jax.tree.leaves(explained)
        mapped = target is not None and not callable(target) and jnp.ndim(target) == 1
        axes = (0, 0 if mapped else None, None)
        function = jax.vmap(books, in_axes=axes, out_axes=-1) if batched else books
        run = jax.jit(function) if not callable(target) else jax.jit(lambda xs, _, arrays: function(xs, target, arrays))
        sums, rows = run(xs, None if callable(target) else target, list(traced.arrays))
        found = [row for i, title in titles.items() for row in _rows(title, np.asarray(rows[i], np.float64), batched)]
        begun, received, nowhere, values, ids = (np.atleast_1d(np.asarray(a, np.float64)) for a in sums)
        if batched:
            _check_independent(fun(*args, **kwargs), values)
        if not all(body.carries):
            found.append(_ended("outputs without relevance", nowhere))
        facts = dict(traced.facts)
        infer(traced.block, facts)
        if joins_constants(traced.block, facts):  # a start token is embedded as the ids are, and not explained
            found.append(_ended("constant ids", sum(row.passed for row in found if row.kind == "embedding") - ids))
        return Ledger(tuple(found), begun, received)

    return audited


def _probes(body: Body, rules: Sequence[Rule]) -> tuple[dict[int, tuple[str, str, str]], dict[int, jax.Array]]:
    """A title and a dummy input for every Op that keeps books, and for every loop that starts from constants."""
    lengths = lead(body, total=True)
    titles: dict[int, tuple[str, str, str]] = {}
    probes: dict[int, jax.Array] = {}
    for i, (op, rule) in enumerate(zip(body.ops(), rules, strict=True)):
        if op.kind != "blocked" and not op.splits:
            titles[i] = (op.name, op.kind, type(rule).__name__)
            probes[i] = jnp.zeros((*lengths[op], len(COLUMNS)))
    for k, loop in enumerate(loops(body)):
        if loop.ends:
            titles[-1 - k] = (f"constants of {loop.equation.primitive}", "constant", "")
            probes[-1 - k] = jnp.zeros((*lengths[loop], loop.ends))
    return titles, probes


def _row(layer: Layer, rule: Rule, relevance: jax.Array, received: Sequence[jax.Array]) -> jax.Array:
    """The report of one Op, in the order of COLUMNS."""
    books = layer.books or {}
    own = [books.get(c, jnp.zeros((), layer.dtype)) for c in ("bias", "stabiliser", "dropped", "ended")]
    # in a shard_map summed over the devices, where they differ
    arrived, size, *kept, ended = map(over_devices, (summed(relevance), jnp.abs(relevance).sum(), *own))
    passed = sum((over_devices(_sum(r)) for r in received), jnp.zeros((), arrived.dtype))
    created = jnp.zeros((), arrived.dtype) if rule.conserves else passed + sum(kept) + ended - arrived
    return jnp.stack([arrived, passed, *kept, created, ended, size]).astype(jnp.zeros(()).dtype)


def _rows(title: tuple[str, str, str], numbers: np.ndarray, batched: bool) -> list[LedgerRow]:
    """One row, or one per iteration of the scans around it."""
    if not batched:
        numbers = numbers[..., None]
    name, kind, rule = title
    found = []
    for index in np.ndindex(*numbers.shape[:-2]):
        where = "".join(f"[{i}]" for i in index)
        if kind == "constant":
            found.append(_ended(name + where, numbers[index].sum(0)))
        else:
            found.append(LedgerRow(name + where, kind, rule, *numbers[index]))
    return found


def _ended(name: str, amount: np.ndarray) -> LedgerRow:
    """Relevance that ends where no Op is."""
    zero = np.zeros_like(amount)
    return LedgerRow(name, "constant", "", amount, zero, zero, zero, zero, zero, amount, np.abs(amount))


def _sum(tree: Any) -> jax.Array:
    leaves = [x for x in jax.tree.leaves(tree) if x.dtype != jax.dtypes.float0]
    return sum((summed(x.astype(jnp.promote_types(x.dtype, jnp.float32))) for x in leaves), jnp.zeros(()))


_DEPENDENT = "the function does not treat examples one by one; write batched=False for one ledger over all of them"


def _check_independent(value: Any, alone: np.ndarray) -> None:
    """Raises InputError where the function gives other values for all examples together than for each alone."""
    leaves = [np.asarray(y, np.float64) for y in _inexact(value)]
    if any(y.shape[:1] != alone.shape for y in leaves):
        raise InputError(f"{_DEPENDENT}; its outputs have shapes {[y.shape for y in leaves]}")
    together = sum(y.reshape(len(alone), -1).sum(1) for y in leaves)
    size = sum(np.abs(y).reshape(len(alone), -1).sum(1) for y in leaves)
    if not np.allclose(alone, together, rtol=0, atol=1e-2 * np.max(size, initial=0), equal_nan=True):
        raise InputError(f"{_DEPENDENT}; its outputs sum to {together}, for each example alone to {alone}")


def _inexact(value: Any) -> list[jax.Array]:
    return [y for y in jax.tree.leaves(value) if jnp.issubdtype(y.dtype, jnp.inexact)]


def _check_examples(explained: list[Any]) -> None:
    counts = {jnp.shape(x)[:1] for x in jax.tree.leaves(explained)}
    if len(counts) != 1 or () in counts:
        raise InputError(
            f"the explained arguments have the leading axes {sorted(counts)}: give all of them the same number of "
            f"examples, or write batched=False"
        )
