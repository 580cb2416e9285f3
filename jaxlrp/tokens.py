"""Integer inputs: the relevance of a token id, at the table row that it selects.

An id has no derivative, so a `Token` carries a float twin of its shape, the carrier, whose cotangent is the relevance:
zeros that are moved wherever the ids are. Index arithmetic (x + size for negative ids, clamps) keeps it, comparisons
drop it. Where ids become numbers, in an embedding, the carrier receives the relevance of the row.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as p

from . import _compat
from .program import Equation


class Token(NamedTuple):
    """ids: integers. carrier: floats of the same shape, zero."""

    ids: Any
    carrier: Any


# each output element is an element of one of these operands (none given: of any)
_MOVES: dict[Any, tuple[int, ...]] = {
    **dict.fromkeys(
        (
            p.reshape_p, p.transpose_p, p.broadcast_in_dim_p, p.squeeze_p, p.slice_p, p.rev_p, p.copy_p,
            p.sharding_constraint_p, p.device_put_p, p.name_p, lax.split_p, p.concatenate_p, p.pad_p, p.select_n_p,
            p.all_gather_p, p.all_to_all_p, p.ppermute_p, _compat.pvary_p, _compat.all_gather_invariant_p,
            *_compat.MOVES,
        ),
        (),
    ),
    p.dynamic_slice_p: (0,),
    p.gather_p: (0,),
    p.dynamic_update_slice_p: (0, 1),
    p.scatter_p: (0, 2),
}  # fmt: skip
# index arithmetic, element by element
_SHIFTS = frozenset((
    p.add_p, p.sub_p, p.mul_p, p.div_p, p.rem_p, p.neg_p, p.max_p, p.min_p, p.clamp_p, p.convert_element_type_p,
    p.and_p, p.or_p, p.xor_p, p.not_p, p.shift_left_p, p.shift_right_logical_p, p.shift_right_arithmetic_p, p.abs_p,
    p.integer_pow_p,
))  # fmt: skip
# where integers select numbers: which operands say what is selected; of a one-hot vector, the comparison
_SELECTS = {
    p.gather_p: slice(1, None), p.dynamic_slice_p: slice(1, None),
    p.convert_element_type_p: slice(None), p.select_n_p: slice(1),
}  # fmt: skip


def carrier_of(value: Any) -> Any:
    """What is differentiated for an explained argument: itself, or the carrier of its ids."""
    value = jnp.asarray(value)
    return jnp.zeros_like(value, float) if jnp.issubdtype(value.dtype, jnp.integer) else value


def carrying(value: Any, carrier: Any) -> Any:
    """The explained argument with what `carrier_of` gave in its place."""
    return Token(value, carrier) if jnp.issubdtype(jnp.result_type(value), jnp.integer) else carrier


def plain(value: Any) -> Any:
    return value.ids if isinstance(value, Token) else value


def tokenise(value: Any, wanted: bool) -> Any:
    """`value` as a token if that is wanted, else as plain ids; both ends of a loop must agree."""
    if wanted and not isinstance(value, Token):
        return Token(value, jnp.zeros_like(value, float))
    return value if wanted else plain(value)


def makes_token(e: Equation, tokens: Sequence[bool]) -> bool:
    """Whether what `e` gives stands for the ids among its operands, of which `tokens` says which they are."""
    if not all(jnp.issubdtype(v.aval.dtype, jnp.integer) for v in e.outputs):
        return False
    return any(tokens[i] for i in _moved(e)) if e.primitive in _MOVES else e.primitive in _SHIFTS and any(tokens)


def _moved(e: Equation) -> Sequence[int]:
    if e.primitive is p.select_n_p:  # the first says which
        return range(1, len(e.inputs))
    return _MOVES[e.primitive] or range(len(e.inputs))


def joins(e: Equation, tokens: Sequence[bool]) -> bool:
    """Whether `e` puts constant ids among the explained ones: a start token, a pad."""
    return e.primitive in _MOVES and makes_token(e, tokens) and not all(tokens[i] for i in _moved(e))


def compares_with_all(e: Equation, tokens: Sequence[bool], counts: Collection[Any]) -> bool:
    """Whether `e` is the comparison of a one-hot encoding: ids == 0, 1, 2 ... (`counts`: values that count so)."""
    return e.primitive is p.eq_p and sum(tokens) == 1 and e.inputs[1 - tokens.index(True)] in counts


def embeds(e: Equation, tokens: Sequence[bool]) -> bool:
    """Whether ids become numbers here: a row of a table, a one-hot vector, the id itself as a number."""
    becomes = all(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in e.outputs)
    if not becomes or e.primitive not in _SELECTS:
        return False
    onehot = e.primitive in (p.convert_element_type_p, p.select_n_p)  # an id as a number, a mask, is no embedding
    compared = e.inputs[0].aval.dtype == bool
    return any(tokens[_SELECTS[e.primitive]]) and (compared or not onehot)


def evaluate(e: Equation, values: list[Any]) -> list[Any]:
    """The equation on values some of which are tokens."""
    outputs = e.evaluate(*map(plain, values))
    compared = e.primitive is p.eq_p  # perhaps with all ids there are; where it is a mask, nothing asks for the carrier
    if not compared and not makes_token(e, [isinstance(v, Token) for v in values]):
        return outputs
    if compared or e.primitive in _SHIFTS:
        carriers = [v.carrier for v in values if isinstance(v, Token)]
        carrier = sum(carriers[1:], carriers[0]) / len(carriers)  # of several ids in one index, each has its part
        return [Token(y, jnp.broadcast_to(carrier, y.shape)) for y in outputs]
    operands = list(map(plain, values))
    for i in _moved(e):
        operands[i] = tokenise(values[i], True).carrier
    return [Token(y, c) for y, c in zip(outputs, e.evaluate(*operands), strict=True)]
