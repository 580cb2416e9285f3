"""What a sweep is recognised by when it is started again: the numbers it depends on, as far as they can be seen."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..composites import Composite


def digest(thing: Any) -> str:
    """Of all numbers in it: leaves of a pytree, and what functions hold, in arguments, closures and globals."""
    total = hashlib.sha256()
    for value in _numbers(thing, set()):
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            total.update(f"{value.shape} {value.dtype}".encode())  # parts are elsewhere: its numbers are not seen
        elif isinstance(value, jax.Array | np.ndarray | np.generic):
            array = np.asarray(value)
            total.update(f"{array.shape} {array.dtype}".encode() + np.ascontiguousarray(array).tobytes())
        else:
            total.update(repr(value).encode())
    return total.hexdigest()[:16]


def _numbers(thing: Any, seen: set[int]) -> Iterator[Any]:
    if isinstance(thing, jax.Array | np.ndarray | np.generic | bool | int | float | complex | str | bytes):
        yield thing
        return
    if id(thing) in seen:
        return
    seen.add(id(thing))
    inside: list[Any]
    if isinstance(thing, functools.partial):  # Partial too, before it is taken for a pytree
        inside = [thing.func, thing.args, thing.keywords]
    elif isinstance(thing, types.MethodType):
        inside = [thing.__func__, thing.__self__]
    elif isinstance(thing, types.FunctionType):
        named = [thing.__globals__.get(name) for name in thing.__code__.co_names]
        own = [v for v in named if getattr(v, "__module__", None) == thing.__module__ or _is_data(v)]
        inside = [*_cells(thing), thing.__defaults__, thing.__kwdefaults__, *own]
    elif hasattr(thing, "__wrapped__"):  # what jax.jit made
        inside = [thing.__wrapped__]
    elif isinstance(thing, type | types.ModuleType):
        inside = []
    else:
        leaves = jax.tree.leaves(thing)
        inside = [] if len(leaves) == 1 and leaves[0] is thing else leaves
    for value in inside:
        yield from _numbers(value, seen)


def _cells(function: types.FunctionType) -> list[Any]:
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    return found


def _is_data(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | float | int | dict | list | tuple)


def named(function: Any) -> str:
    """A function's name, without what changes from run to run."""
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    return getattr(inner, "__qualname__", None) or shown(inner)


def shown(thing: Any) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", repr(thing))


def described(thing: Any) -> Any:
    """A composite, rule, fill or function as text: its numbers, or their digest where they are many."""
    if isinstance(thing, Composite):
        return [f"{shown(selector)}: {described(rule)}" for selector, rule in thing.rows]
    if callable(thing):
        return f"{named(thing)} {digest(thing)}"
    if dataclasses.is_dataclass(thing):
        fields = {f.name: getattr(thing, f.name) for f in dataclasses.fields(thing)}
        return f"{type(thing).__name__}({', '.join(f'{k}={described(v)}' for k, v in fields.items())})"
    if isinstance(thing, str | bool | None):
        return repr(thing)
    array = np.asarray(thing)
    return str(array.tolist()) if array.size <= 16 else f"{array.shape} {digest(array)}"
