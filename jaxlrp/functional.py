"""model -> (function, parameters): what a model that keeps its parameters inside needs before it can be explained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, all_leaves, keystr, tree_flatten_with_path

from .errors import InputError

Parameters = dict[Any, Any]  # nested, with arrays as leaves


def functional(model: Any) -> tuple[Callable, Parameters]:
    """An nnx or Equinox model as (fun, params), with fun(params, *args, **kwargs) = model(*args, **kwargs).

        fun, params = jaxlrp.functional(model)
        relevance = jax.jit(jaxlrp.lrp(fun, composite, argnums=1))(params, x)

    params holds the model's arrays in nested dictionaries whose keys are the names of its attributes, and positions in
    its lists: params["layers"][0]["kernel"] belongs to the layer that the plan names `layers/0`. Everything else stays
    in `fun`, as the model had it when `functional` was called.

    nnx: parameters and all other state, BatchNorm's mean and var among them, are in params; random number streams stay
    in `fun`. In training mode (before `model.eval()`) every call draws the same dropout mask, and new statistics are
    not kept. A parameter that two layers share has one name, the first.

    Equinox, and any other callable pytree: the arrays among the leaves are in params; activation functions, Python
    numbers and random keys stay in `fun`. A model of one example makes a `fun` of one example: jax.vmap(fun, (None, 0))
    takes a batch. A model with state, such as BatchNorm's, takes and returns it as ever; what is to be explained is its
    output alone: jaxlrp.lrp(lambda params, x: fun(params, x, state)[0], composite, argnums=1).

    Raises InputError for what is neither, with what to write instead, and (when `fun` is called) for parameters of
    another structure.
    """
    libraries = {".".join(c.__module__.split(".")[:2]) for c in type(model).__mro__}
    if "flax.linen" in libraries:
        raise InputError(
            f"functional: {type(model).__name__} is a linen module, whose parameters are apart already; write "
            f"jaxlrp.lrp(model.apply, composite, argnums=1)(variables, x)"
        )
    if any(name.startswith("haiku.") for name in libraries):
        raise InputError(
            f"functional: {type(model).__name__} is Haiku's, whose parameters are apart already; write "
            f"jaxlrp.lrp(transformed.apply, composite, argnums=2)(params, rng, x)"
        )
    nnx = "flax.nnx" in libraries
    if not callable(model) or isinstance(model, type) or (all_leaves([model]) and not nnx):
        raise InputError(
            f"functional takes a model that can be called, an nnx module or a pytree such as an Equinox module, "
            f"got {type(model).__name__}; for anything else write a function f(params, x) and explain argnums=1"
        )
    tree, merge = _split(model) if nnx else (model, lambda tree: tree)
    flat, structure = tree_flatten_with_path(tree)
    places: Parameters = {}  # params, with positions among the leaves instead of arrays
    for i, (path, leaf) in enumerate(flat):
        if _is_parameter(leaf):
            _put(places, _without_variable(path) if nnx else path, i)
    order = jax.tree.leaves(places)
    rest = [None if _is_parameter(leaf) else leaf for _, leaf in flat]

    def fun(params: Parameters, *args: Any, **kwargs: Any) -> Any:
        _check(fun.__name__, params, places)
        leaves = list(rest)
        for i, leaf in zip(order, jax.tree.leaves(params), strict=True):
            leaves[i] = leaf
        return merge(jax.tree.unflatten(structure, leaves))(*args, **kwargs)

    fun.__name__ = fun.__qualname__ = type(model).__name__
    return fun, jax.tree.map(lambda i: flat[i][1], places)


def _split(model: Any) -> tuple[Any, Callable[[Any], Any]]:
    """An nnx model's state, and what makes a model of it: a new one in every call, which keeps `fun` pure."""
    from flax import nnx

    parts: Any = nnx.split(model, nnx.RngState, ...)
    graph, streams, state = parts
    keys, structure = jax.tree.flatten(streams)  # the Variables themselves are the model's, which goes on drawing
    return state, lambda state: nnx.merge(graph, jax.tree.unflatten(structure, keys), state)


def _check(name: str, params: Parameters, places: Parameters) -> None:
    given, right = ({keystr(path) for path, _ in tree_flatten_with_path(tree)[0]} for tree in (params, places))
    if given != right:
        missing, unknown = (", ".join(sorted(keys)[:3]) or "nothing" for keys in (right - given, given - right))
        raise InputError(
            f"the parameters of {name} must have the structure that functional returned; "
            f"missing: {missing}; too many: {unknown}"
        )


def _is_parameter(leaf: Any) -> bool:
    """Whether it is an array. Random keys are left to the model: they are no numbers."""
    return isinstance(leaf, jax.Array | np.ndarray) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_variable(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """nnx keeps a parameter's array one level below its name, as the one attribute on the path."""
    attributes = [k for k in path if isinstance(k, GetAttrKey)]
    return path[:-1] if attributes == [path[-1]] else path


def _put(places: Parameters, path: tuple[Any, ...], position: int) -> None:
    *above, last = [_key(k) for k in path]
    for key in above:
        places = places.setdefault(key, {})
    places[last] = position


def _key(key: Any) -> Any:
    """What stands after the dot or between the brackets: an attribute's name, a position, a dictionary's key."""
    for field in ("name", "idx", "key"):
        if hasattr(key, field):
            return getattr(key, field)
    return str(key)
