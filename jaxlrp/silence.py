"""Where no relevance can arrive: at units that a ReLU turned off, if all that reads the ReLU gives zeros nothing.

Most rules give an input a multiple of its value, so what a ReLU set to zero receives none, and passes none on to the
negative sum it came from. A rule with messages of its own for such units (`GeneralizedGamma`) can leave them out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import jax.numpy as jnp
from jax.extend.core import primitives as p

from .program import Body, Equation, Group, Loop, Op, Step, Value, leaves
from .rules import Pass, Rule, Winner
from .rules.activation import is_relu

_SELECTS = frozenset((p.reduce_max_p, p.reduce_window_max_p))  # the winner of a window is its output


def rectified(body: Body, rules: Sequence[Rule]) -> frozenset[Op]:
    """The Ops at whose output no relevance arrives where it is not positive, under these rules, one for each Op."""
    found: set[Op] = set()
    given = dict(zip(body.ops(), rules, strict=True))
    for block in _bodies(body):
        readers: dict[Value, list[Op | None]] = defaultdict(list)  # None: what has no rule
        steps = list(_flat(block.steps))
        for v in block.outputs:
            if isinstance(v, Value):
                readers[v].append(None)  # where relevance may start
        for s in steps:
            if isinstance(s, Op):
                for v in s.inputs:
                    readers[v].append(s)
            else:
                for v in (s.equation if isinstance(s, Loop) else s).values:
                    readers[v].append(None)
        silent: dict[Value, bool] = {}  # whether a zero receives nothing
        for s in reversed(steps):
            if isinstance(s, Op):
                read = readers[s.output]
                silent[s.output] = all(r is not None and _silent(r, s.output, given[r], silent) for r in read)
                if read and all(r is not None and _turns_off(r, given[r]) and silent[r.output] for r in read):
                    found.add(s)
    return frozenset(found)


def _silent(op: Op, value: Value, rule: Rule, silent: dict[Value, bool]) -> bool:
    """Whether the Op's input `value` receives nothing where it is zero."""
    if rule.proportional(op):  # zeros of either sign are no zeros in half precision: see `Layer`
        return jnp.finfo(value.aval.dtype).bits >= 32 or op.nonneg[op.inputs.index(value)]
    moves = op.kind == "structural" and not op.splits and type(rule) is Pass
    wins = type(rule) is Winner and leaves(op.steps)[-1].primitive in _SELECTS
    return (moves or wins or _turns_off(op, rule)) and silent[op.output]


def _turns_off(op: Op, rule: Rule) -> bool:
    """Whether the Op is a ReLU that relevance passes."""
    return is_relu(op) and type(rule) is Pass


def _flat(steps: Sequence[Step]) -> list[Equation | Op | Loop]:
    return [f for s in steps for f in (_flat(s.steps) if isinstance(s, Group) else [s])]


def _bodies(body: Body) -> list[Body]:
    loops = [s for s in _flat(body.steps) if isinstance(s, Loop)]
    return [body, *(b for loop in loops for inner in loop.bodies for b in _bodies(inner))]
