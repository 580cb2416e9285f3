"""Every `raise` is run once: its type, and that the message names the value or layer, the user's line, and the way out.

A new `raise` needs one row in CASES; `test_every_raise_is_run` finds those that have none.
"""

import ast
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from jax.extend.core import primitives
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxlrp
import nets
from jaxlrp import (
    Composite,
    bilrp,
    composites,
    functional,
    gradients,
    kinds,
    logits,
    lrp,
    patterns,
    per_target,
    plan,
    rewrite,
    rules,
    select,
    value_and_lrp,
)
from jaxlrp.errors import InputError, NoRuleError, SelectorError, TargetError, UnknownPrimitiveError
from jaxlrp.evaluate import conservation
from jaxlrp.nn import local_response_norm
from nets import close, draw, linear, quick_compilation  # noqa: F401

EPSILON, ZERO = composites.epsilon(), linear(rules.Zero())
X, W, IMAGE, KERNEL = draw(1, 3, 4), draw(2, 4, 3), draw(3, 2, 2, 4, 4), draw(4, 2, 2, 3, 3)
SQUARE = draw(6, 4, 4)
PARAMETERS, HEAD = nets.mlp_parameters(4, 6, 3), {"head": {"kernel": W}}
MLP = partial(nets.mlp, PARAMETERS)


# ---------------------------------------------------------------------------------------------------- the user's code


def dense(x):
    return x @ W  # the dense line


def head(p, x):
    return x @ p["head"]["kernel"]  # the head line


def convolution(x):
    x = jax.nn.relu(lax.conv(x, KERNEL, (1, 1), "SAME"))  # the conv line
    return lax.reduce_window(x, -np.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")  # the pool line


turn_p = nets.primitive("turn", lambda x: x[:, ::-1])
bend_p = nets.primitive("bend", jnp.sin)
mix_p = nets.primitive("mix", lambda x: x @ SQUARE)


def turning(x):
    y = jax.nn.relu(x @ W)
    return turn_p.bind(y) @ W.T  # the turn line


def turning_in_loop(x):
    step = jax.jit(lambda x, _: (turn_p.bind(x), None))  # the inner turn line
    return lax.scan(step, x, None, length=2)[0]


def bending(x):
    return bend_p.bind(jax.nn.relu(x @ W) + 1.0)  # the bend line


def decomposing(x):
    return jnp.linalg.svd(x @ W)[1]  # the svd line


def referring(x):
    sums = jax.new_ref(x)  # the reference line
    sums[...] += x
    return sums[...] @ W


def complex_exponential(x):
    return jnp.exp(1j * x).real  # the exp line


def until_large(x):
    return lax.while_loop(lambda y: y.sum() < 9, lambda y: 2 * jnp.abs(y), x) @ W  # the while line


def activation(x):
    return jnp.tanh(x @ W)  # the tanh line


def summing(x):
    return lax.psum(x @ W, "d")  # the psum line


def on_devices(f, check_vma=True):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
    return jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=check_vma)


def at(marker: str) -> str:
    """The place of the line of this file that ends in a comment with `marker`."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines, 1) if line.endswith(f"# the {marker} line"))
    return f"test_errors.py:{number} "


class Undecorated(rules.Rule):
    pass


@rules.rule
class Books(rules.Rule):
    def propagate(self, layer, relevance):
        layer.book("biass", lambda: relevance)
        return (layer.inputs[0],)


@rules.rule
class Scalar(rules.Rule):
    def propagate(self, layer, relevance):
        return 0.0


@rules.rule
class Unfinished(rules.Rule):
    """A rule without `propagate`."""


@rules.rule
class ReadsKernel(rules.Rule):
    """A rule for anything, that reads what only dense and conv layers have."""

    def supports(self, op):
        return True

    def propagate(self, layer, relevance):
        return (layer.kernel,)


class Unmatched(select.Selector):
    """A selector without `matches`."""


def run(f, composite=EPSILON, *args, **options):
    return lrp(f, composite, **options)(*(args or (X,)))


def run_head(composite=EPSILON, p=HEAD, x=X):
    return lrp(head, composite, argnums=1)(p, x)


def row(selector, rule):
    """A row, before those of a composite that serves all."""
    return Composite([(selector, rule)]) + EPSILON


def nan(tree):
    """The tree with a NaN in its first array."""
    (first, *others), structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [first.at[0].set(np.nan), *others])


# ---------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Case:
    error: type[Exception]
    act: Callable[[], object]
    says: str

    def __str__(self) -> str:
        return re.sub(r"[^\w.()=-]+", "-", self.says)[:60].strip("-")


CASES: list[Case] = []


def case(error: type[Exception], act: Callable[[], object], says: str) -> None:
    """says: what the message holds, in this order, with " .. " for anything."""
    CASES.append(Case(error, act, says))


# functions and arguments
case(InputError, lambda: run(3), "first argument must be a function .. got 3")
case(InputError, lambda: run(dense, argnums=1), "argnums=1 .. dense .. 1 positional .. integer from 0 to 0")
case(InputError, lambda: run(dense, argnums=-2), "argnums=-2 .. dense .. write an integer")
case(InputError, lambda: run(dense, argnums=(0, 3)), "argnums=(0, 3) .. dense .. write an integer")
case(InputError, lambda: run(dense, argnums=True), "argnums=True .. write an integer")
case(InputError, lambda: run(dense, argnums="x"), "argnums='x' .. write an integer")
case(InputError, lambda: run(head, EPSILON, HEAD, X, argnums=(1, 1)), "argnums=(1, 1)")
case(InputError, lambda: lrp(dense, EPSILON)(x=X), "argnums=0 .. by position")
case(InputError, lambda: run(lambda x: 1.0, EPSILON, ()), "argnums=0 .. no array to explain")
for value, dtype in ((np.arange(4), "int64"), (X > 0, "bool"), (X + 1j, "complex128"), (3, "int")):
    for verb in (lrp, rewrite, value_and_lrp, plan):
        case(
            InputError,
            lambda value=value, verb=verb: verb(dense, EPSILON)(value),
            f"explained argument 0 (x) .. {dtype} .. floating-point .. .astype(jnp.float32)",
        )
case(
    UnknownPrimitiveError,
    lambda: run(lambda x: jax.scipy.special.expi(x), EPSILON, X),
    "custom_jvp_call .. test_errors.py .. derivative of its own .. on_unknown",
)
case(
    UnknownPrimitiveError,
    lambda: lrp(lambda i, j: jnp.ones((4, 3, 2))[i, j], EPSILON, (0, 1))(np.arange(2), np.arange(2)),
    "gather at test_errors.py .. several indices .. table[i]",
)
case(InputError, lambda: run(lambda x: 1.0, EPSILON, "text"), "explained argument 0 (x) is a str .. an array")
case(InputError, lambda: run(lambda x: x["a"] @ W, EPSILON, {"a": X, "ids": np.arange(3)}), "(ids) .. int64")
case(InputError, lambda: gradients.gradient(lambda x: 2.0 * x)(np.arange(3)), "int64 .. floating-point")
case(InputError, lambda: logits(lambda x: (x, x))(X), "one array as output .. 2")
TWO_ENDS = lambda x: jnp.concatenate([jax.nn.softmax(x), jax.nn.softmax(2 * x)])
case(InputError, lambda: logits(TWO_ENDS)(X), "ends in softmax .. softmax#2 .. returns what enters it")
case(InputError, lambda: logits(lambda x: lax.map(jax.nn.softmax, x))(X), "ends in softmax .. returns what enters it")
case(InputError, lambda: run(dense, argnums=np.int64(0)), "argnums= .. int64 .. an integer or a tuple")
SPLIT = lambda x: sum(jnp.split(jax.nn.relu(x @ W), [1, 2], -1)[1:2])
case(InputError, lambda: run(SPLIT, masks={"split": 1.0}), "masks: 'split' has no one output .. layers that read it")
case(UnknownPrimitiveError, lambda: run(lambda x: lax.atan2(x, x[::-1])), "'atan2' .. combines 2 values .. on_unknown")
case(InputError, lambda: gradients.simple_taylor(dense, root="zero"), "root='zero' .. write \"gradient\"")
case(InputError, lambda: gradients.simple_taylor(dense, reach=0.0), "reach=0.0 .. positive")
case(InputError, lambda: gradients.simple_taylor(dense, root=np.ones(3))(X), "reference has shapes .. (3,) .. (3, 4)")
case(
    InputError, lambda: gradients.integrated_gradients(dense, steps=0), "integrated_gradients(steps=0) .. positive int"
)
case(InputError, lambda: gradients.integrated_gradients(dense, baseline=W)(X), "reference has shapes (4, 3) .. (3, 4)")
case(InputError, lambda: gradients.smoothgrad(dense, deviation=-1.0), "deviation=-1.0 .. samples=16 .. a number >= 0")
case(InputError, lambda: gradients.smoothgrad(dense, of="gradient"), "of='gradient' .. gradients.gradient_x_input")
case(InputError, lambda: gradients.occlusion(dense, region=2, stride=3)(X), "stride=3 .. from 1 to the region (2,)")
case(InputError, lambda: gradients.occlusion(dense, region=0)(X), "region=0 .. a size >= 1")
case(
    InputError, lambda: gradients.occlusion(jnp.sum, channels=7)(IMAGE), "channels=8 .. write the axis of the channels"
)
case(InputError, lambda: gradients.occlusion(jnp.sin)(1.0), "inputs of shape (1,): write (examples, positions)")
case(
    InputError, lambda: gradients.occlusion(lambda i: W[i])(np.arange(3)), "occlusion of ids .. 0.0 .. of a mask token"
)
case(
    InputError,
    lambda: gradients.gradient_x_input(lambda i: i > 1)(np.arange(3)),
    "int64 and selects nothing .. embedding",
)
case(InputError, lambda: run(MLP, masks=[("relu", 1.0)]), "masks=[('relu', 1.0)] .. dictionary")
case(InputError, lambda: row(select.kind("dense"), Undecorated()), "Undecorated is no pytree .. @jaxlrp.rules.rule")
case(InputError, lambda: rules.rule(type("R", (rules.Rule,), {"uses": {"input"}})), "R: uses={'input'} .. \"inputs\"")
case(SelectorError, lambda: rules.rule(type("R", (rules.Rule,), {"kinds": {"denses"}})), "unknown kind 'denses'")
case(InputError, lambda: conservation(dense, linear(Books()))(X), "book('biass') .. \"bias\"")

# pairs of features
case(InputError, lambda: per_target(dense, ZERO, batch_size=0), "batch_size=0 .. write a positive integer, or None")
case(TargetError, lambda: per_target(lambda x: (x, x), ZERO)(X), "every class of one output, got outputs of shapes [(3")
case(TargetError, lambda: per_target(dense, ZERO, targets=3)(X), "of shape () .. for a single target, jaxlrp.lrp")
case(TargetError, lambda: per_target(dense, ZERO, targets=[])(X), "of shape (0,) .. at least one")
case(TargetError, lambda: per_target(dense, ZERO, targets=[0.0, 1.0])(X), "dtype float64: write integers (k,)")
case(TargetError, lambda: per_target(dense, ZERO, targets=[0, 99])(X), "target 99 is out of range")
case(TargetError, lambda: per_target(dense, ZERO, targets=[-1, 0])(X), "target -1 is out of range")
case(TargetError, lambda: per_target(dense, ZERO, targets=[[0, 1, 2, 0]])(X), "target of shape (4,) does not fit")
case(InputError, lambda: bilrp(dense, ZERO, batch_size=0), "batch_size=0 .. write a positive integer")
case(InputError, lambda: bilrp(dense, ZERO, (0, 1))(X, X), "one argument, given twice .. argnums=(0, 1) and 2 argum")
case(
    InputError,
    lambda: bilrp(dense, ZERO)(X),
    "one argument, given twice .. 1 argument(s): write bilrp(f, composite, ar",
)
case(InputError, lambda: bilrp(lambda p: dense(p["x"]), ZERO)({"x": X}, {"x": X}), "bilrp explains arrays, got .. {'x'")
case(
    InputError,
    lambda: bilrp(lambda x: [dense(x)], ZERO)(X, X),
    "an embedding must be one array of shape (m,) or (n, m)",
)
case(InputError, lambda: bilrp(dense, ZERO)(X, X[:2]), "shapes [(3, .. (2, .. of as many examples as its argument has")
case(InputError, lambda: bilrp(dense, ZERO, pool=jnp.sum)(X, X), "with relevance of shapes [(), ()]")

# models
Haikus = type("Transformed", (), {"__module__": "haiku._src.transform"})
case(InputError, lambda: functional(linen.Dense(3)), "Dense is a linen module .. jaxlrp.lrp(model.apply, composite")
case(InputError, lambda: functional(Haikus()), "Transformed is Haiku's .. jaxlrp.lrp(transformed.apply, composite, ar")
case(InputError, lambda: functional(dense), "a model that can be called .. got function .. argnums=1")
case(InputError, lambda: functional(nnx.Linear), "a model that can be called .. got")
case(InputError, lambda: functional({"w": W}), "a model that can be called .. got dict .. argnums=1")
case(InputError, lambda: functional(nnx.Module()), "a model that can be called .. got Module .. argnums=1")
case(
    InputError,
    lambda: functional(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))[0]({"kernel": W}, X),
    "parameters of Linear must have the structure .. missing: ['bias']; too many: nothing",
)

case(AttributeError, lambda: jaxlrp.nothing, "'jaxlrp' has no attribute 'nothing'")

# NaN
case(InputError, lambda: run_head(p=nan(HEAD)), "parameter 'head/kernel' of shape (4, 3) contains NaN")
case(InputError, lambda: lrp(lambda x, *, w: x @ w, EPSILON)(X, w=nan(W)), "parameter 'w' of shape (4, 3) contains NaN")
case(InputError, lambda: run(partial(nets.mlp, nan(PARAMETERS))), "shape (4, 6) .. closes over contains NaN")

# targets
case(TargetError, lambda: run(MLP, target=3), "target 3 is out of range .. 3 classes, 0 to 2")
case(TargetError, lambda: run(MLP, target=-1), "target -1 is out of range .. 3 classes, 0 to 2")
case(TargetError, lambda: run(MLP, target=np.int64(7)), "target 7 is out of range .. 3 classes, 0 to 2")
case(TargetError, lambda: run(MLP, target=[0, 1, 9]), "target 9 is out of range .. 3 classes, 0 to 2")
case(TargetError, lambda: run(MLP, target=jnp.asarray([0, -2, 1])), "target -2 is out of range .. 3 classes")
for wrong in (1.5, "cat", True, np.asarray([0.0, 1.0, 2.0]), np.asarray([True, False, True])):
    case(TargetError, lambda wrong=wrong: run(MLP, target=wrong), f"target={wrong!r} .. an integer .. a callable")
case(TargetError, lambda: run(MLP, target=[0, 1]), "shape (2,) .. shape (3, 3) .. one per example, shape (3,)")
case(TargetError, lambda: run(MLP, EPSILON, X[0], target=[1]), "shape (1,) .. shape (3,) .. a scalar")
case(TargetError, lambda: run(MLP, target=np.zeros((3, 3), int)), "shape (3, 3) .. write one integer")
case(TargetError, lambda: run(jnp.tanh, EPSILON, IMAGE, target=1), "target=1 .. (2, 2, 4, 4) .. pass a callable")
case(TargetError, lambda: run(jnp.sum, target=0), "target=0 .. () .. pass a callable")
case(TargetError, lambda: run(lambda x: (x, x), target=0), "target=0 .. (3, 4), (3, 4) .. pass a callable")
case(TargetError, lambda: run(lambda x: {"y": x}, target=lambda y: y["y"]), "structure .. 'y'")
case(TargetError, lambda: run(MLP, target=lambda y: y[0]), "shape (3,) .. (3, 3)")

# composites
case(InputError, lambda: run(MLP, composites.epsilon_plus), "expected a Composite .. epsilon_plus .. call it")
case(InputError, lambda: run(MLP, rules.Epsilon()), "expected a Composite, got Epsilon(epsilon=1e-06 .. write")
case(InputError, lambda: run(MLP, []), "expected a Composite, got [] .. write")
case(InputError, lambda: run(MLP, on_unknown="ignore"), 'on_unknown=\'ignore\' .. "error" or "gradient"')
case(InputError, lambda: Composite([rules.Epsilon()]), "pair (selector, rule) .. Epsilon(")
case(InputError, lambda: row(select.kind("dense"), rules.ZPlus), "ZPlus is a class; write ZPlus()")
case(InputError, lambda: row(select.kind("dense"), "epsilon"), "'epsilon' is no rule .. rules.Epsilon(")
case(SelectorError, lambda: row("dense", rules.ZPlus()), "'dense' is no selector .. select.kind(")
case(InputError, lambda: composites.attnlrp(norm="passed"), "attnlrp(norm='passed') .. \"identity\"")
case(InputError, lambda: composites.deep_taylor("positive"), "'positive' .. \"nonnegative\"")
case(InputError, lambda: composites.deep_taylor(low=0.0), "both bounds .. low=0.0, high=None")

# assignment
case(
    NoRuleError,
    lambda: run(dense, Composite()),
    f'no rule for dense[0] (dense: dot_general .. {at("dense")} .. add a row .. select.kind("dense") .. rules.Epsilon(',
)
case(
    NoRuleError,
    lambda: run(convolution, composites.base(), IMAGE),
    f'no rule for conv[0] (conv: conv_general_dilated .. {at("conv")} .. select.kind("conv")',
)
case(NoRuleError, lambda: run_head(Composite()), f"no rule for head (dense .. {at('head')}")
case(
    SelectorError,
    lambda: run(convolution, row(select.kind("max_pool"), rules.ZPlus()), IMAGE),
    f"ZPlus .. cannot be applied to .. (max_pool .. {at('pool')} .. it is for: conv, dense",
)
case(
    SelectorError,
    lambda: run_head(row(select.named("head"), rules.Winner())),
    f"Winner .. cannot be applied to .. head (dense .. {at('head')} .. it is for: max_pool",
)
case(
    InputError,
    lambda: run(dense, linear(rules.ZBox(np.zeros(3), 1.0))),
    f"ZBox .. low .. (3,) does not broadcast to the input (3, 4) of dense[0] .. {at('dense')}",
)
case(InputError, lambda: run(dense, linear(rules.ZBox(0.0, np.ones((1, 3, 4))))), "ZBox .. high .. (1, 3, 4) .. (3, 4)")

# primitives without a kind
for function, name, marker in (
    (turning, "turn", "turn"),
    (turning_in_loop, "turn", "inner turn"),
    (bending, "bend", "bend"),
):
    way_out = f'kinds.register(test_{name}_p, "activation") .. "structural" .. on_unknown="gradient"'
    case(UnknownPrimitiveError, partial(run, function), f"{at(marker)} .. {way_out}")
case(UnknownPrimitiveError, lambda: run(until_large), f"while .. {at('while')[:-1]} .. lax.fori_loop .. lax.scan")
case(UnknownPrimitiveError, lambda: run(decomposing), f"'svd' ({at('svd')} .. decomposition .. on_unknown=\"gradient\"")
case(UnknownPrimitiveError, lambda: run(referring), f"'new_ref' ({at('reference')} .. (jax.Ref) .. x.at[...].set(...)")
case(
    UnknownPrimitiveError,
    lambda: run(complex_exponential),
    f"'exp' ({at('exp')} .. complex numbers .. .real and .imag .. on_unknown=\"gradient\"",
)

# selectors
case(SelectorError, lambda: select.kind("dense", "fc"), "'fc' .. dense, conv, scale")
case(SelectorError, lambda: select.first("convolution"), "'convolution' .. dense, conv, scale")
case(SelectorError, lambda: select.last("linear"), "'linear' .. dense, conv, scale")
case(SelectorError, lambda: select.kind(), 'at least one .. kind("dense", "conv")')
case(SelectorError, lambda: select.named(3), "named(3) .. string")
case(SelectorError, lambda: run_head(row(select.named("tail*"), rules.Zero())), "named('tail*') .. no layer .. head")
case(SelectorError, lambda: run(MLP, row(select.named(re.compile("^t")), rules.Zero())), "'^t' .. dense[0], dense[1]")
case(SelectorError, lambda: run_head(row(~select.named("a") & select.kind("dense"), rules.Zero())), "named('a')")
case(SelectorError, lambda: select.exactly(3), "exactly(3) .. string")
case(SelectorError, lambda: run_head(row(select.exactly("he*"), rules.Zero())), "exactly('he*') .. no layer .. head")
case(SelectorError, lambda: select.depth(0, 1.5), "depth(0, 1.5) .. integers")
case(SelectorError, lambda: select.where("dense"), "where('dense') .. callable")
case(SelectorError, lambda: select.kind("dense") & "conv", "'conv' is no selector .. select.kind(")
case(NotImplementedError, lambda: run(dense, row(Unmatched(), rules.Zero())), "Unmatched .. matches(op)")
case(SelectorError, lambda: value_and_lrp(MLP, EPSILON, layers="dense")(X), "'dense' is no selector .. select.named(")
case(SelectorError, lambda: value_and_lrp(MLP, EPSILON, layers=select.named("tail"))(X), "named('tail') .. dense[0]")
case(SelectorError, lambda: run(MLP, masks={"tail": 1.0}), "no layer 'tail' .. dense[0], relu, dense[1]")
case(InputError, lambda: run(MLP, masks={"relu": np.ones(5)}), "masks['relu'] .. (5,) .. (3, 6)")
case(InputError, lambda: run(MLP, masks={"relu": np.ones((1, 3, 6))}), "masks['relu'] .. (1, 3, 6) .. (3, 6)")

# devices
case(
    InputError,
    lambda: on_devices(lrp(summing, EPSILON), False)(X),
    f"psum over d ({at('psum')[:-1]} .. lrp(shard_map(f))",
)
case(InputError, lambda: jax.vmap(lrp(summing, EPSILON), axis_name="d")(IMAGE[0]), "psum over d .. (or vmap for")
case(
    InputError,
    lambda: run(on_devices(MLP, False), composites.guided_backprop()),
    "GuidedBackprop at relu .. check_vma=False .. write shard_map(..., check_vma=True)",
)
case(
    InputError, lambda: run(on_devices(MLP), masks={"relu": np.ones((2, 3, 6))}), "(2, 3, 6) .. (3, 6) .. (1,) devices"
)
case(InputError, lambda: patterns.fit(on_devices(MLP), [X]), "dense[0] .. inside a shard_map .. without shard_map")
case(UnknownPrimitiveError, lambda: run(on_devices(until_large)), "while .. stands in a shard_map .. lax.fori_loop")

# kinds and rules
case(InputError, lambda: kinds.register(primitives.sort_p, "dense"), "sort .. 'dense' .. activation, structural")
case(InputError, lambda: run(dense, linear(Scalar())), f"Scalar at dense[0] (dense, {at('dense')} .. (3, 4) .. a float")
case(NotImplementedError, lambda: run(dense, linear(Unfinished())), "Unfinished .. propagate(layer, relevance)")
case(
    InputError,
    lambda: run(activation, row(select.kind("activation"), ReadsKernel())),
    f"tanh (activation, {at('tanh')} .. no kernel",
)
for rule, field in (
    (rules.Epsilon, "epsilon"),
    (rules.UniformEpsilon, "epsilon"),
    (rules.SignalTakesAll, "epsilon"),
    (rules.Gamma, "gamma"),
    (rules.GeneralizedGamma, "gamma"),
):
    for wrong in (-1e-3, np.float32(-1), jnp.asarray(-2.0), np.asarray([0.5, -0.5])):
        case(
            InputError,
            partial(rule, **{field: wrong}),
            f"{rule.__name__}({field}={wrong!r}) .. {field} must be at least 0",
        )
    for wrong in (np.nan, True, np.inf):
        case(InputError, partial(rule, **{field: wrong}), f"{rule.__name__}({field}={wrong!r}) .. {field} must be")
case(InputError, lambda: composites.epsilon(-1.0), "Epsilon(epsilon=-1.0) .. at least 0")
case(InputError, lambda: rules.AlphaBeta(0.0, -1.0), "AlphaBeta(beta=-1.0) .. at least 0")
for wrong in ((2.0, 2.0), (1, 1), (np.float32(3), 1.0), (jnp.asarray(2.0), 0.5)):
    case(
        InputError,
        partial(rules.AlphaBeta, *wrong),
        f"(alpha={wrong[0]!r}, beta={wrong[1]!r}) .. alpha - beta must be 1 .. AlphaBeta.from_beta({wrong[1]!r})",
    )
case(InputError, lambda: rules.FourQuadrant(1.0, 1.0, 0.0, 0.0), "FourQuadrant( .. sum 1")
case(InputError, lambda: rules.SignalTakesAll("third"), "SignalTakesAll(signal='third') .. \"second\"")
case(InputError, lambda: rules.ZPlus(bias="keep"), "ZPlus(bias='keep') .. \"absorb\"")
case(InputError, lambda: rules.ZBox(1.0, 0.0), "ZBox(low=1.0, high=0.0) .. low must not exceed high")
case(InputError, lambda: rules.ZBox(np.asarray([0.0, 2.0]), 1.0), "ZBox( .. low must not exceed high")
case(InputError, lambda: rules.ZBox(np.zeros(3), np.ones(4)), "ZBox( .. (3,) .. (4,)")
case(InputError, lambda: rules.ZBox(-1.0, np.nan), "ZBox(high=nan) .. must be a finite number")
case(InputError, lambda: rules.ZBox(-np.inf, 1.0), "ZBox(low=-inf) .. must be")

# patterns
for rule in (rules.PatternNet, rules.PatternAttribution):
    case(
        InputError,
        lambda rule=rule: run(dense, linear(rule(W.T))),
        f"{rule.__name__} .. (3, 4) is not of the kernel's shape (4, 3) of dense[0] ({at('dense')}",
    )
    case(InputError, lambda rule=rule: rule(nan(W)), f"{rule.__name__}: the pattern of shape (4, 3) holds NaN")
case(SelectorError, lambda: run(MLP, composites.pattern_net({"tail": W})), "exactly('tail') .. no layer .. dense[0]")
case(NoRuleError, lambda: run(MLP, composites.pattern_net({"dense[1]": PARAMETERS[1][0]})), "dense[0]")
case(InputError, lambda: patterns.fit(dense, [X], estimator="ridge"), "estimator='ridge' .. 'auto' or 'two_component'")
case(InputError, lambda: patterns.fit(dense, X), "batches is one array of shape (3, 4) .. write [array]")
case(InputError, lambda: patterns.fit(dense, iter(())), "batches is empty")
case(InputError, lambda: patterns.fit(dense, [X, nan(X)]), "dense[0] .. not finite")
case(InputError, lambda: patterns.fit(lambda x: x @ nan(W), [X]), "dense[0] .. not finite")
case(InputError, lambda: patterns.fit(lambda w: lax.conv(IMAGE, w, (1, 1), "SAME"), [KERNEL]), "conv[0] .. is the data")
case(
    InputError,
    lambda: patterns.fit(lambda x: lax.scan(lambda x, w: (x @ w, None), x, draw(5, 2, 4, 4))[0], [X]),
    "other weights in other iterations of a scan .. loop over layers in Python",
)
RAGGED = lambda x: lax.ragged_dot(x, SQUARE[None], jnp.asarray([3]))
case(InputError, lambda: patterns.fit(RAGGED, [X]), "dense[0] (test_errors.py: .. ragged product's groups .. loop over")
case(InputError, lambda: patterns.fit(head, [(HEAD, X), ({"head": {"kernel": -W}}, X)], 1), "head .. in other batches")
case(
    InputError,
    lambda: patterns.fit(lambda x: lax.cond(x.sum() > 1e9, dense, lambda x: x[:, :3], x), [X]),
    "was not run by any batch .. cond",
)

# local response normalisation
case(InputError, lambda: rules.LocalResponseTaylor("raw"), "LocalResponseTaylor(messages='raw') .. \"normalised\" or")
case(InputError, lambda: local_response_norm(np.arange(4)), "dtype int64 .. floating point")
case(InputError, lambda: local_response_norm(X, size=0), "size=0 .. an integer >= 1")
case(InputError, lambda: local_response_norm(X, alpha_per="unit"), "alpha_per='unit' .. \"window\" or")
case(InputError, lambda: local_response_norm(X, k=0.0), "k=0.0 .. finite number > 0")
case(InputError, lambda: local_response_norm(X, alpha=np.inf), "alpha=inf .. finite number >= 0")
case(InputError, lambda: local_response_norm(X, axis=2), "axis=2 .. 2 axes .. 0 to 1")
case(InputError, lambda: local_response_norm(X, axis=(0, -2)), "axis=(0, -2) .. each axis once")
case(AttributeError, lambda: jaxlrp.nn.LayerNorm, "'LayerNorm' .. LocalResponseNorm")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error(case: Case):
    with pytest.raises(case.error) as caught:
        case.act()
    assert type(caught.value) is case.error
    message = str(caught.value)
    assert re.search(".*".join(map(re.escape, case.says.split(" .. "))), message), message


# ---------------------------------------------------------------------------------------------------- none forgotten

PACKAGE = Path(jaxlrp.__file__).parent
ELSEWHERE = ("plot.py", "plot_curves.py", "demo", "evaluate", "__main__.py")  # their own tests run theirs


def statements() -> set[tuple[str, int]]:
    """(file, last line) of every `raise` in the package."""
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE)
        if name.parts[0] not in ELSEWHERE:
            tree = ast.parse(path.read_text())
            found |= {(str(name), node.end_lineno) for node in ast.walk(tree) if isinstance(node, ast.Raise)}
    return found


def test_every_raise_is_run():
    missing, reached = statements(), set()
    for case in CASES:
        try:
            case.act()
        except Exception as error:
            own = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(PACKAGE)]
            if own:
                reached.add((str(Path(own[-1].filename).relative_to(PACKAGE)), own[-1].end_lineno))
    missing -= reached
    assert not missing, "no case in this file runs the raise at " + ", ".join(f"{f}:{n}" for f, n in sorted(missing))


# ---------------------------------------------------------------------------------------------------- the ways round


@pytest.fixture
def registry(monkeypatch):
    """A copy of the table, so that what a test teaches is forgotten."""
    monkeypatch.setattr(kinds, "_TABLE", dict(kinds._TABLE))


def test_gradient_lets_the_unknown_through():
    """What moves values has a derivative that gives, on a piecewise linear network, gradient x input."""
    right = gradients.gradient_x_input(turning)(X)
    close(lrp(turning, ZERO, on_unknown="gradient")(X), right, 1e-8)
    value, relevance = value_and_lrp(turning, ZERO, on_unknown="gradient")(X)
    close((value, relevance), (turning(X), right), 1e-8)
    _, pull = jax.vjp(rewrite(turning, ZERO, on_unknown="gradient"), X)
    close(pull(value)[0], right, 1e-8)
    (unknown,) = (row for row in plan(turning, ZERO, on_unknown="gradient")(X) if row.kind == "unknown")
    assert type(unknown.rule).__name__ == "Gradient" and at("turn") in unknown.source + " "


def test_register_as_structural(registry):
    kinds.register(turn_p, "structural")
    close(lrp(turning, ZERO)(X), gradients.gradient_x_input(turning)(X), 1e-8)


def test_register_as_activation(registry):
    kinds.register(bend_p, "activation")
    start = lambda y: y
    plain = lrp(lambda x: jax.nn.relu(x @ W) + 1.0, ZERO, target=lambda y: bending(X))
    close(lrp(bending, ZERO, target=start)(X), plain(X))


def test_register_as_linear(registry):
    with pytest.raises(UnknownPrimitiveError, match="test_mix"):
        lrp(mix_p.bind, ZERO)(X)
    kinds.register(mix_p, "reduce")
    close(lrp(mix_p.bind, ZERO)(X), lrp(lambda x: x @ SQUARE, ZERO)(X), 1e-6)


def test_register_as_blocked(registry):
    kinds.register(turn_p, "blocked")
    assert not np.any(lrp(turn_p.bind, ZERO)(X))
    got, right = (
        lrp(lambda x, stop=stop: dense(x) + turn_p.bind(stop(dense(x))), ZERO)
        for stop in (jnp.array, lax.stop_gradient)
    )
    close(got(X), right(X))


def test_row_for_the_unknown():
    """A row of the composite serves what has no kind, too."""
    composite = Composite([(select.kind("unknown"), rules.Pass())]) + ZERO
    plain = lrp(lambda x: jax.nn.relu(x @ W) + 1.0, ZERO, target=lambda y: bending(X))
    close(lrp(bending, composite)(X), plain(X))


def test_unknown_among_parameters():
    right = lrp(lambda x, w: jax.nn.relu(x @ w), ZERO)(X, turn_p.bind(W))
    close(lrp(lambda x, w: jax.nn.relu(x @ turn_p.bind(w)), ZERO)(X, W), right)


BLOCKED = {
    "stop_gradient": lambda y: y + lax.stop_gradient(turn_p.bind(y)),
    "comparison": lambda y: jnp.where(y >= turn_p.bind(y)[:, 1:2], y, 0.0),
    "integers": lambda y: y * jnp.ceil(turn_p.bind(y)).astype(int),
}


@pytest.mark.parametrize("end", BLOCKED.values(), ids=BLOCKED)
def test_unknown_where_no_relevance_arrives(end):
    """On the way to a dead end any primitive will do, and so will a layer without a rule."""
    f = lambda x: end(jax.nn.relu(x @ W))
    close(lrp(f, ZERO)(X), lrp(f, ZERO, on_unknown="gradient")(X))


# ------------------------------------------------------------------------------- what is checked only where it can be


COMPOSITES = {
    "epsilon": composites.epsilon(),
    "epsilon_plus_flat": composites.epsilon_plus_flat(),
    "epsilon_gamma_box": composites.epsilon_gamma_box(-1.0, 1.0),
    "epsilon_alpha2_beta1_flat": composites.epsilon_alpha2_beta1_flat(),
    "deep_taylor": composites.deep_taylor(low=np.zeros(3), high=np.ones(3)),
    "base": composites.base(),
    "four": linear(rules.FourQuadrant(1.0, 0.0, 0.5, -0.5)),
}


@pytest.mark.parametrize("composite", COMPOSITES.values(), ids=COMPOSITES)
def test_composites_are_trees_of_anything(composite):
    """Placeholders, shapes, None, other dtypes and wrong numbers on the way: a tree is not checked as a rule is."""
    leaves, structure = jax.tree.flatten(composite)
    for fill in (object(), None, "name", jax.ShapeDtypeStruct((), np.float32), (1, 2)):
        jax.tree.unflatten(structure, [fill] * len(leaves))
        jax.tree.map(lambda _, fill=fill: fill, composite)
    assert repr(jax.tree.map(lambda _: object(), composite)).startswith("Composite([")
    for dtype in (np.float32, np.float16, jnp.bfloat16, np.float64):
        half = jax.tree.map(lambda v, dtype=dtype: jnp.asarray(v, dtype), composite)
        assert {v.dtype for v in jax.tree.leaves(half)} <= {np.dtype(dtype)}
    assert jax.tree.structure(jax.jit(lambda c: c)(composite)) == structure
    jax.jit(lambda c: jax.tree.map(lambda v: v - 100.0, c))  # tracing alone
    jax.eval_shape(lambda c: jax.tree.map(lambda v: v - 100.0, c), composite)
    jax.vmap(lambda c: jax.tree.map(jnp.sum, c))(jax.tree.map(lambda v: jnp.stack([jnp.asarray(v)] * 2), composite))


def test_traced_numbers_are_not_checked():
    """Alpha and beta stand for themselves under jit, vmap and grad."""

    def score(alpha, beta):
        return (lrp(dense, linear(rules.AlphaBeta(alpha, beta)))(X) ** 2).sum()

    assert jax.jit(score)(2.0, 2.0) > 0
    assert jax.vmap(score)(jnp.arange(3.0), jnp.arange(3.0)).shape == (3,)
    assert all(np.isfinite(g) for g in jax.grad(score, (0, 1))(2.0, 1.0))
    assert np.isfinite(jax.jit(jax.grad(lambda beta: score(*jax.tree.leaves(rules.AlphaBeta.from_beta(beta)))))(1.0))
    assert np.isfinite(jax.jit(lambda e: lrp(dense, composites.epsilon(e))(X))(-1.0)).all()


def test_nan_is_checked_where_it_is_concrete():
    """Under jit a NaN goes its way; in the explained input it is the user's own."""
    bad = nan(PARAMETERS)
    explain = lrp(nets.mlp, EPSILON, argnums=1)
    assert np.isnan(jax.jit(explain)(bad, X)).any()
    assert np.isnan(explain(PARAMETERS, X.at[0, 0].set(np.nan))).any()
    with pytest.raises(InputError, match="closes over"):
        jax.jit(lambda x: lrp(partial(nets.mlp, bad), EPSILON)(x))(X)


def test_row_that_matches_nothing_is_shown():
    """Kinds, first, last and depth may fit no layer: a composite serves many networks."""
    rows = [select.kind("conv"), select.first("conv"), select.last("conv"), select.depth(7)]
    composite = Composite([(s, rules.ZPlus()) for s in rows]) + EPSILON
    table = plan(MLP, composite)(X)
    assert len(table.unused) == len(rows) and all(line in str(table) for line in table.unused)
