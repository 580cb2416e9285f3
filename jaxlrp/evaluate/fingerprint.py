"""What a sweep is recognised by when it is started again: the numbers it depends on, as far as they can be seen."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..composites import Composite

FOREIGN = sys.stdlib_module_names | {"jax", "jaxlib", "numpy"}  # what their objects hold belongs to no user
MANY = 100_000  # objects that are looked into


def digest(thing: Any) -> str:
    """Of all numbers in it: leaves of a pytree, attributes of an object, and what functions hold, in arguments,
    closures and globals. Private attributes count where they are arrays or hold some: others are counters and ids.
    """
    total = hashlib.sha256()
    for value in _numbers(thing):
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


def _numbers(thing: Any) -> Iterator[Any]:
    left, seen = [thing], dict[int, Any]()  # seen keeps what it has seen, so that no id is used twice
    while left:
        thing = left.pop()
        if isinstance(thing, jax.Array | np.ndarray | np.generic | bool | int | float | complex | str | bytes):
            yield thing
        elif id(thing) not in seen and len(seen) < MANY:
            seen[id(thing)] = thing
            left += reversed(_inside(thing))


def _inside(thing: Any) -> list[Any]:
    if isinstance(thing, functools.partial):  # Partial too, before it is taken for a pytree
        return [thing.func, thing.args, thing.keywords]
    if isinstance(thing, types.MethodType):
        return [thing.__func__, thing.__self__]
    if isinstance(thing, types.FunctionType):
        names = [] if _foreign(thing.__module__) else _names(thing.__code__)
        used = [thing.__globals__.get(name) for name in names]
        own = [v for v in used if getattr(v, "__module__", None) == thing.__module__ or _is_data(v)]
        return [*_cells(thing), thing.__defaults__, thing.__kwdefaults__, *own]
    if hasattr(thing, "__wrapped__"):  # what jax.jit made
        return [thing.__wrapped__]
    if isinstance(thing, type | types.ModuleType):
        return []
    if isinstance(thing, dict):
        return [thing[name] for name in sorted(thing, key=str)]
    if isinstance(thing, list | tuple):
        return list(thing)
    leaves = jax.tree.leaves(thing)
    return _attributes(thing) if len(leaves) == 1 and leaves[0] is thing else leaves


def _attributes(thing: Any) -> list[Any]:
    """What an object holds that is no pytree, and what its call uses."""
    if _foreign(type(thing).__module__) and not isinstance(thing, types.SimpleNamespace):
        return []
    slots = [getattr(kind, "__slots__", ()) for kind in type(thing).__mro__]
    names = {name for s in slots for name in ([s] if isinstance(s, str) else s)} - {"__dict__", "__weakref__"}
    held = {name: getattr(thing, name) for name in names if hasattr(thing, name)} | getattr(thing, "__dict__", {})
    call = next((vars(kind)["__call__"] for kind in type(thing).__mro__ if "__call__" in vars(kind)), None)
    return [
        *(v for name, v in sorted(held.items()) if not (name.startswith("_") and isinstance(v, int | float | str))),
        *([call] if isinstance(call, types.FunctionType) else []),
    ]


def _names(code: types.CodeType) -> list[str]:
    """The globals that a function may use, and the functions and comprehensions within it."""
    within = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return [*code.co_names, *(name for names in within for name in names)]


def _foreign(module: str | None) -> bool:
    return (module or "").partition(".")[0] in FOREIGN


def _cells(function: types.FunctionType) -> list[Any]:
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    return found


def _is_data(value: Any) -> bool:
    """Whether a global is a thing with numbers, rather than another module's function, class or module."""
    known = jax.Array | np.ndarray | np.generic | float | int | dict | list | tuple
    holders = functools.partial | types.MethodType | types.SimpleNamespace
    return isinstance(value, known | holders) or not _foreign(type(value).__module__)


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
