"""function + arguments -> Block: the program, its parameters' names, and what is explained.

`jax.make_jaxpr` is the only way in. Every `jit`, `remat`, `custom_jvp` and `custom_vjp` is opened into one flat list of
equations (the wrapper stays at hand, `program.Wrapper`); loops keep their bodies as blocks of their own.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jax.extend.core import primitives as p

from . import _compat
from .counted import as_scan
from .errors import InputError
from .kinds import CUSTOM, EXCEPTIONS, LOOPS, WRAPPERS
from .program import Atom, Block, Constant, Equation, Fact, Value, Wrapper, leaves


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """A traced call: its program, what each of its inputs is, and how to put arguments and results together.

    arrays: the program's inputs; names: what each is called. explained: positions, among them, of the explained
    argument's leaves; titles: what messages call these. everything: whether it is all that can be. custom: as in
    `trace`.
    """

    jaxpr: Any
    arrays: tuple[Any, ...]
    names: tuple[str, ...]
    explained: tuple[int, ...]
    titles: tuple[str, ...]
    explained_tree: Any
    out_tree: Any
    everything: bool
    custom: bool

    @cached_property
    def block(self) -> Block:
        """The program, opened."""
        return _open_block(self.jaxpr, self.custom)

    @cached_property
    def facts(self) -> dict[Value, Fact]:
        """Those of the inputs."""
        found = {}
        for i, (value, name) in enumerate(zip(self.block.inputs, self.names, strict=True)):
            mark = i in self.explained
            ids = jnp.issubdtype(value.aval.dtype, jnp.integer)
            found[value] = Fact(data=mark and not ids, derived=mark, names=() if mark else (name,), token=mark and ids)
        return found

    @property
    def repeats(self) -> Hashable | None:
        """Equal for calls that run the same program on other arrays, as far as JAX can tell; None where it cannot.

        It can of a call of a jitted function: JAX keeps what it traced, by shapes, dtypes and settings of its own.
        What the program closes over (`jaxpr.consts`) is not compared.
        """
        body = self.jaxpr.jaxpr
        if len(body.eqns) != 1 or body.eqns[0].primitive is not p.jit_p:
            return None
        if any(isinstance(a, jax.core.Tracer) for a in self.jaxpr.consts):
            return None
        (call,) = body.eqns
        place = {v: i for i, v in enumerate((*body.invars, *body.constvars, *call.outvars))}
        wires = tuple(
            (str(v.aval), np.asarray(v.val).tobytes()) if isinstance(v, jex.Literal) else place[v]
            for v in (*call.invars, *body.outvars)
        )
        avals = tuple(v.aval for v in (*body.invars, *body.constvars))
        names = (self.names, self.explained, self.titles, self.explained_tree, self.out_tree)
        return (*call.params.items(), wires, avals, *names)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def check_argnums(fun: Callable, argnums: int | Sequence[int], count: int) -> tuple[int, ...]:
    if not isinstance(argnums, (int, Sequence)):
        raise InputError(f"argnums={argnums!r} is a {type(argnums).__name__}: write an integer or a tuple of integers")
    wanted = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    for i in wanted:
        if isinstance(i, bool) or not isinstance(i, int) or not -count <= i < count:
            name = getattr(fun, "__name__", repr(fun))
            raise InputError(
                f"argnums={argnums!r} does not exist: {name} was called with {count} positional argument(s); "
                + (f"write an integer from 0 to {count - 1} " if count else "")
                + "(the explained argument must be passed by position)"
            )
    places = tuple(i % count for i in wanted)
    if len(set(places)) != len(places):
        raise InputError(f"argnums={argnums!r} names an argument twice; write each once")
    return places


def _names(fun: Callable, args: tuple, kwargs: dict[str, Any]) -> list[str]:
    """A key path for every leaf of (args, kwargs): relative to its argument, prefixed by its name only on collision."""
    try:
        parameters = list(inspect.signature(fun).parameters.values())
        signature = [q.name for q in parameters if q.kind in (q.POSITIONAL_ONLY, q.POSITIONAL_OR_KEYWORD)]
    except (TypeError, ValueError):  # builtins and some callables have no signature
        signature = []
    titles = [signature[i] if i < len(signature) else f"arg{i}" for i in range(len(args))]
    pairs = []
    for title, arg in [*zip(titles, args, strict=True), *((k, kwargs[k]) for k in sorted(kwargs))]:
        for path, _ in jax.tree_util.tree_flatten_with_path(arg)[0]:
            key = jax.tree_util.keystr(path, simple=True, separator="/")
            # nnx keeps a parameter's array one level below its name
            pairs.append((title, key.removesuffix("/value").removesuffix("/raw_value")))
    seen = Counter(key for _, key in pairs)
    return [title if not key else key if seen[key] == 1 else f"{title}/{key}" for title, key in pairs]


def trace(
    fun: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    argnums: int | Sequence[int] | None,
    tokens: bool = True,
    custom: bool = True,
) -> Traced:
    """Traces `fun(*args, **kwargs)`, with relevance to arrive at the arguments `argnums` (None: at all that can).

    tokens: whether integers may be explained. custom: whether to open functions with a derivative of their own; False:
    only those that read integers, where an embedding may be. Arguments that are not arrays stay Python values, as under
    `jax.grad`; leaves may be `jax.ShapeDtypeStruct`.

    Raises:
      InputError: no function, an argnum that does not exist, an explained argument of another dtype, or that is empty.
    """
    if not callable(fun):
        raise InputError(f"the first argument must be a function, got {fun!r}")
    wanted = () if argnums is None else check_argnums(fun, argnums, len(args))
    names = _names(fun, args, kwargs)
    owners = [i for i, a in enumerate(args) for _ in jax.tree.leaves(a)]
    leaves, tree = jax.tree.flatten((args, kwargs))
    owners += [-1] * (len(leaves) - len(owners))

    dynamic: list[int] = []
    explained: list[int] = []
    for i, (leaf, owner) in enumerate(zip(leaves, owners, strict=True)):
        if owner in wanted:
            explained.append(len(dynamic))
            dynamic.append(i)
            leaves[i] = explainable(leaf, names[i], owner, tokens)
        elif _is_array(leaf):
            dynamic.append(i)
            if argnums is None and jnp.issubdtype(leaf.dtype, jnp.number):
                explained.append(len(dynamic) - 1)
    if not explained:
        raise InputError(f"argnums={argnums!r} holds no array to explain")

    def flat(*arrays: Any) -> Any:
        filled = list(leaves)
        for i, a in zip(dynamic, arrays, strict=True):
            filled[i] = a
        a, k = jax.tree.unflatten(tree, filled)
        return fun(*a, **k)

    arrays = tuple(leaves[i] for i in dynamic)
    jaxpr, out = jax.make_jaxpr(flat, return_shape=True)(*arrays)
    explained_tree = jax.tree.structure(args[wanted[0]] if isinstance(argnums, int) else tuple(args[i] for i in wanted))
    order = explained if argnums is None else sorted(explained, key=lambda j: wanted.index(owners[dynamic[j]]))
    return Traced(
        jaxpr=_compat.closed(jaxpr),
        arrays=arrays,
        names=tuple(names[i] for i in dynamic),
        explained=tuple(order),
        titles=tuple(f"{owners[dynamic[j]]} ({names[dynamic[j]]})" for j in order),
        explained_tree=explained_tree,
        out_tree=jax.tree.structure(out),
        everything=argnums is None,
        custom=custom,
    )


def explainable(leaf: Any, name: str, argnum: int, tokens: bool = False) -> Any:
    """`leaf` as an array, if relevance can arrive there: it is floating point, or integer ids where those will do."""
    if not _is_array(leaf) and not isinstance(leaf, (bool, int, float, complex)):
        raise InputError(f"the explained argument {argnum} ({name}) is a {type(leaf).__name__}: it must be an array")
    array = leaf if _is_array(leaf) else jnp.asarray(leaf)
    ids = tokens and _is_array(leaf) and jnp.issubdtype(array.dtype, jnp.integer)
    if not ids and not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputError(
            f"the explained argument {argnum} ({name}) has dtype {array.dtype}: relevance needs a floating-point "
            f"input; convert it with .astype(jnp.float32) (integers that index an embedding are explained by lrp)"
        )
    return array


def _open_block(jaxpr: Any, custom: bool) -> Block:
    jaxpr = _compat.closed(jaxpr)
    inputs = tuple(Value(v.aval) for v in jaxpr.jaxpr.invars)
    constants: dict[Value, Any] = {}
    nodes, outputs = _open(jaxpr, inputs, constants, (), custom)
    return Block(inputs, tuple(outputs), constants, nodes)


def _open(
    jaxpr: Any, inputs: Sequence[Atom], constants: dict[Value, Any], scopes: tuple[object, ...], custom: bool
) -> tuple[list[Equation], list[Atom]]:
    body = jaxpr.jaxpr
    env: dict[Any, Atom] = dict(zip(body.invars, inputs, strict=True))
    for var, const in zip(body.constvars, jaxpr.consts, strict=True):
        env[var] = value = Value(var.aval)
        constants[value] = const

    def read(v: Any) -> Atom:
        return Constant(v.val, v.aval) if isinstance(v, jex.Literal) else env[v]

    nodes: list[Equation] = []
    for eqn in map(_compat.differentiable, body.eqns):
        operands = tuple(read(v) for v in eqn.invars)
        scan = as_scan(eqn, [_known(a, constants) for a in operands]) if eqn.primitive is p.while_p else None
        if scan is not None:
            children, results = _open(scan, operands, constants, scopes, custom)
            env.update(zip(eqn.outvars, results, strict=True))
            nodes += children
            continue
        if eqn.primitive in WRAPPERS:
            inner = _compat.closed(next(eqn.params[name] for name in _compat.BODIES if name in eqn.params))
            key = object()
            children, results = _open(inner, operands, constants, (*scopes, key), custom)
            numbers = not any(jnp.issubdtype(a.aval.dtype, jnp.integer) for a in operands)
            closed = any(str(e.primitive) in EXCEPTIONS for e in leaves(children)) or (numbers and not custom)
            if eqn.primitive in CUSTOM and closed:
                # relevance cannot pass what is inside, but the derivative that the user wrote can
                made = tuple(Value(v.aval) for v in eqn.outvars)
                env.update(zip(eqn.outvars, made, strict=True))
                nodes.append(Equation(eqn, body, operands, made, scopes))
                continue
            # a wrapper's results are the very values of its body, so that data flow sees through it
            env.update(zip(eqn.outvars, results, strict=True))
            outputs = cast("tuple[Value, ...]", tuple(results))
            nodes.append(Wrapper(eqn, body, operands, outputs, scopes, (), key, tuple(children)))
        else:
            made = tuple(Value(v.aval) for v in eqn.outvars)
            env.update(zip(eqn.outvars, made, strict=True))
            nodes.append(Equation(eqn, body, operands, made, scopes, _bodies(eqn, custom)))
    return nodes, [read(v) for v in body.outvars]


def _known(atom: Atom, constants: dict[Value, Any]) -> Any:
    """The value of a constant that is there while tracing; None for anything else."""
    value = atom.value if isinstance(atom, Constant) else constants.get(atom)
    return None if isinstance(value, jax.core.Tracer) else value


def _bodies(eqn: Any, custom: bool) -> tuple[Block, ...]:
    if eqn.primitive not in LOOPS:
        return ()
    if eqn.primitive is p.cond_p:
        return tuple(_open_block(b, custom) for b in eqn.params["branches"])
    return (_open_block(eqn.params["jaxpr"], custom),)
