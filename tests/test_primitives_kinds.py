"""Every primitive that JAX can differentiate has a kind, or is an exception with a reason that the error names."""

import subprocess
import sys
from functools import partial

import jax
import jax.experimental.checkify
import jax.experimental.pallas as pallas
import jax.experimental.sparse as sparse
import jax.numpy as jnp
import jax.scipy.special as special
import numpy as np
import pytest
from jax import lax
from jax._src.interpreters import ad

from jaxlrp import Composite, kinds, lrp, plan, rules, select, value_and_lrp
from jaxlrp.errors import UnknownPrimitiveError
from nets import close, quick_compilation  # noqa: F401
from proportions import EPSILON, UNIT, WHERE, W, X, explain, in_proportion, kinds_of, start

# ---------------------------------------------------------------------------------------------------- the registries

# mutable arrays: refused by their effects, wherever they stand
REFERENCES = "accum_grad_in_ref addupdate empty_ref free_ref freeze get new_ref run_state swap".split()
# without outputs, or with outputs that are keys: nothing that relevance could arrive at
CARRY_NOTHING = "check dce_sink debug_callback debug_print inspect_sharding random_unwrap random_wrap".split()
# steps of JAX's own, which no function is traced to
NEVER_TRACED = "call_hi_primitive_linearized custom_lin eval_jaxpr".split()
# inside a kernel for the device, and never in the program around it
IN_KERNELS = "get_global masked_load masked_swap".split()
LISTS = (REFERENCES, CARRY_NOTHING, NEVER_TRACED, IN_KERNELS)


def differentiable() -> set:
    """Every primitive that JAX itself gives a derivative or a transpose; other packages, and tests, may add theirs."""

    def home(rule) -> str:
        return home(rule.func) if isinstance(rule, partial) else rule.__module__

    tables = (ad.primitive_jvps, ad.primitive_transposes, ad.fancy_transposes, ad.primitive_linearizations)
    return {p for table in tables for p, rule in table.items() if home(rule).split(".")[0] == "jax"}


def test_every_differentiable_primitive_has_a_place():
    elsewhere = {name for names in LISTS for name in names} | kinds.EXCEPTIONS.keys()
    known = kinds._TABLE.keys() | kinds.WRAPPERS | kinds.LOOPS
    lost = sorted(str(p) for p in differentiable() if p not in known and str(p) not in elsewhere)
    assert not lost, f"new in jax {jax.__version__}: give each a kind, or a line among the exceptions, in kinds.py"


def test_no_name_is_in_two_places():
    """What the table knows is no exception, but for what is linear in some of its operands alone."""
    both = {str(p) for p in kinds._TABLE} & kinds.EXCEPTIONS.keys()
    assert both == {"triangular_solve", "tridiagonal_solve", "custom_linear_solve"}
    assert not kinds.EXCEPTIONS.keys() & {name for names in LISTS for name in names}


def test_importing_starts_no_backend():
    """Some primitives are found by tracing: JAX must still be configurable afterwards."""
    code = "import jaxlrp; from jax._src import xla_bridge; assert not xla_bridge._backends"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_where_a_program_is_traced():
    """Under a mesh, in a shard_map, in a function that is compiled."""
    code = """
import jax
jax.config.update("jax_num_cpu_devices", 2)
mesh = jax.make_mesh((2,), ("d",))

@jax.jit
@jax.shard_map(mesh=mesh, out_specs=jax.P("d"))
def f(x):
    import jaxlrp
    return jaxlrp.lrp(jax.nn.relu, jaxlrp.composites.epsilon())(x)

with jax.set_mesh(mesh):
    assert f(jax.device_put(jax.numpy.ones(2), jax.NamedSharding(mesh, jax.P("d")))).sum() == 2
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------------------------------- exceptions


SPARSE = sparse.BCOO.fromdense(W)
SQUARE = lambda x: x[:, :3] @ x[:, :3].T + 4 * jnp.eye(3)


def _double(x, y):
    y[...] = 2 * x[...]


REFUSED = {  # function: (primitive, what the message says of it)
    lambda x: jnp.linalg.cholesky(SQUARE(x)): ("cholesky", "decomposition"),
    lambda x: jnp.linalg.eigh(SQUARE(x))[0]: ("eigh", "decomposition"),
    lambda x: jnp.linalg.eigvals(x[:, :3]).real: ("eig", "decomposition"),
    lambda x: jnp.linalg.svd(x)[1]: ("svd", "decomposition"),
    lambda x: jnp.linalg.qr(x)[0]: ("qr", "decomposition"),
    lambda x: lax.linalg.lu(SQUARE(x))[0]: ("lu", "decomposition"),
    lambda x: lax.linalg.triangular_solve(x[:, :3], W.T, left_side=True): ("triangular_solve", "matrix"),
    lambda x: lax.linalg.tridiagonal_solve(x[0], x[1] + 5, x[2], W): ("tridiagonal_solve", "matrix"),
    lambda x: jax.pure_callback(np.sin, x, x): ("pure_callback", "outside JAX"),
    lambda x: jax.ffi.ffi_call("any", x)(x): ("ffi_call", "outside JAX"),
    lambda x: pallas.pallas_call(_double, out_shape=x, interpret=True)(x): ("pallas_call", "kernel"),
    lambda x: lax.while_loop(lambda y: y.sum() < 9, lambda y: 2 * jnp.abs(y), x): ("while", "lax.fori_loop"),
    lambda x: lax.reduce(x, 0.0, lambda a, b: jnp.hypot(a, b), (1,)): ("reduce", "jnp.sum"),
    lambda x: lax.reduce_window(x, 0.0, lambda a, b: a + b, (1, 2), (1, 2), "VALID"): ("reduce_window", "jnp.sum"),
    lambda x: SPARSE @ x[:, :3]: ("bcoo_dot_general", ".todense()"),
    lambda x: jnp.arctan2(x, x[::-1]): ("atan2", "2 values of the data"),
    lambda x: jnp.abs(x) ** jnp.abs(x[::-1]): ("pow", "2 values of the data"),
    lambda x: jnp.exp(1j * x).real: ("exp", "complex numbers"),
    lambda x: jnp.linalg.norm(1 / (x + 1j)): ("div", "complex numbers"),
}


@pytest.mark.parametrize("f", REFUSED, ids=[name for name, _ in REFUSED.values()])
def test_exceptions_say_where_and_why(f):
    name, reason = REFUSED[f]
    with pytest.raises(UnknownPrimitiveError) as caught:
        lrp(f, EPSILON)(X)
    message = str(caught.value)
    line = f.__code__.co_firstlineno
    assert f"{name!r} (test_primitives_kinds.py:{line} " in message and reason in message
    # where JAX has a derivative
    assert message.endswith('pass on_unknown="gradient"') == (name not in kinds.UNDIFFERENTIABLE)
    shown = [row for row in plan(f, EPSILON, on_unknown="gradient")(X) if row.kind == "unknown"]
    assert shown and all(isinstance(row.rule, rules.Gradient) for row in shown)


def test_a_rule_for_one_output_is_no_rule_for_several():
    composite = Composite([(select.kind("unknown"), rules.Pass())]) + EPSILON
    f = lambda x: sum(lax.linalg.lu(SQUARE(x))[:1])
    with pytest.raises(UnknownPrimitiveError, match="'lu'"):
        lrp(f, composite)(X)


def test_a_constant_sparse_matrix_can_be_registered(monkeypatch):
    monkeypatch.setattr(kinds, "_TABLE", {**kinds._TABLE})
    kinds.register(sparse.bcoo_dot_general_p, "reduce")
    f = lambda x: SPARSE @ x[:, :3].T
    R = start(f, X)
    close(explain(f, X, R), in_proportion(lambda x: W @ x[:, :3].T, X, R), 1e-6)
    with pytest.raises(UnknownPrimitiveError, match=r"\.todense\(\)"):
        lrp(lambda x: sparse.BCOO((x[0], SPARSE.indices[:4]), shape=(4, 3)) @ x[:, :3].T, EPSILON)(X)


# ---------------------------------------------------------------------------------------------------- whole modules

# outside these, or for these arguments, no relevance can be finite, or nothing is differentiable
NN = {
    name: getattr(jax.nn, name)
    for name in """celu elu gelu glu hard_sigmoid hard_silu hard_swish hard_tanh leaky_relu log_sigmoid log_softmax
    logsumexp logmeanexp mish relu relu6 selu sigmoid silu soft_sign softmax softplus sparse_plus sparse_sigmoid
    squareplus standardize swish tanh""".split()
}
SPECIAL = {
    "betainc": lambda x: special.betainc(2.0, 3.0, x),
    "gammainc": lambda x: special.gammainc(2.0, x),
    "gammaincc": lambda x: special.gammaincc(x, 2.0),
    "kl_div": lambda x: special.kl_div(x, 0.4),
    "rel_entr": lambda x: special.rel_entr(x, 0.4),
    "beta": lambda x: special.beta(x, 2.0),
    "betaln": lambda x: special.betaln(x, 2.0),
    "multigammaln": lambda x: special.multigammaln(x + 2, 3),
    "poch": lambda x: special.poch(x, 2.0),
    "polygamma": lambda x: special.polygamma(2, x),
    "xlogy": lambda x: special.xlogy(x, 2.0),
    "xlog1py": lambda x: special.xlog1py(2.0, x),
    "zeta": lambda x: special.zeta(x + 1, 2.0),
    "bessel_jn": lambda x: special.bessel_jn(x, v=2),
    **{
        name: getattr(special, name)
        for name in """digamma entr erf erfc erfinv expit factorial gamma gammaln gammasgn i0 i0e i1 i1e log_ndtr
        log_softmax logit logsumexp ndtr ndtri sici softmax spence""".split()
    },
}
NUMPY = {
    "arctan2": lambda x: jnp.arctan2(x, 2.0),
    "average": lambda x: jnp.average(x, 1, weights=jnp.arange(4.0)),
    "convolve": lambda x: jnp.convolve(x[0], W[:, 0]),
    "correlate": lambda x: jnp.correlate(W[:, 0], x[0]),
    "corrcoef": jnp.corrcoef,
    "cov": jnp.cov,
    "cross": lambda x: jnp.cross(x[:, :3], W.T[:, :3]),
    "divide": lambda x: jnp.divide(2.0, x),
    "einsum": lambda x: jnp.einsum("ij,jk->k", x, W),
    "fmod": lambda x: jnp.fmod(x, 0.3),
    "heaviside": lambda x: x + jnp.heaviside(x, 0.5),
    "hypot": lambda x: jnp.hypot(x, 2.0),
    "insert": lambda x: jnp.insert(x, 1, 5.0, axis=1),
    "interp": lambda x: jnp.interp(x, jnp.arange(3.0), jnp.asarray([1.0, 3.0, 2.0])),
    "inv": lambda x: jnp.linalg.inv(jnp.eye(4) + np.ones((4, 4))) @ x.T,
    "kron": lambda x: jnp.kron(x, W),
    "logaddexp": lambda x: jnp.logaddexp(x, 0.5),
    "matrix_power": lambda x: jnp.linalg.matrix_power(x[:, :3], 3),
    "max_pool": lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2), (1, 2), "VALID"),
    "mod": lambda x: jnp.mod(x, 0.3),
    "nextafter": lambda x: jnp.nextafter(x, 2.0),
    "norm": lambda x: jnp.linalg.norm(x, axis=1),
    "percentile": lambda x: jnp.percentile(x, 30.0, axis=1),
    "place": lambda x: jnp.place(x, x > 0.5, jnp.asarray([2.0]), inplace=False),
    "polyval": lambda x: jnp.polyval(jnp.asarray([1.0, 2.0, 3.0, 4.0]), x),
    "polyval, coefficients": lambda x: jnp.polyval(x, 2.0),
    "power": lambda x: jnp.power(x, 2.5),
    "power of": lambda x: jnp.power(2.5, x),
    "random.gamma": lambda x: jax.random.gamma(jax.random.key(0), x),
    "select": lambda x: jnp.select([x > 0.6, x > 0.3], [x, 2 * x], 0.0),
    "solve": lambda x: jnp.linalg.solve(jnp.eye(3) + np.ones((3, 3)), x),
    "take": lambda x: jnp.take(x, WHERE, axis=1),
    "take_along_axis": lambda x: jnp.take_along_axis(x, jnp.argsort(x, 1), 1),
    "tensordot": lambda x: jnp.tensordot(x, x, 2),
    "trapezoid": jnp.trapezoid,
    "vander": lambda x: jnp.vander(x[0]),
    "where": lambda x: jnp.where(x > 0.5, x, 0.1),
    **{
        name: getattr(jnp, name)
        for name in """abs amax arccos arcsin arctan arcsinh arctanh cbrt cos cosh cumprod cumsum deg2rad
        diff exp exp2 expm1 flip gradient i0 log log10 log1p log2 max mean median min nan_to_num nanmax nancumprod
        nancumsum nanmean nanmedian nanprod nanstd nansum nanvar negative prod ptp ravel reciprocal rint
        rot90 sin sinc sinh sort sqrt square squeeze std sum tan tanh trace tril unwrap var""".split()
    },
}


@pytest.mark.parametrize("functions", [NN, SPECIAL, NUMPY], ids=["nn", "special", "numpy"])
def test_functions_of_one_argument(functions):
    """All primitives have a kind, the value does not change, and relevance is finite."""

    def run(x):
        return {name: (value_and_lrp(f, EPSILON)(x), f(x)) for name, f in functions.items()}

    for name, ((value, relevance), right) in jax.jit(run)(UNIT).items():
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12, err_msg=name), value, right)
        assert relevance.shape == UNIT.shape and np.isfinite(relevance).all(), name


# ---------------------------------------------------------------------------------------------------- functions within

TWICE = jax.custom_batching.custom_vmap(lambda x: 2 * (x @ W))
TWICE.def_vmap(lambda size, batched, x: (2 * (x @ W), batched[0]))
CHEAP = jax.custom_vjp(lambda x: 2 * (x @ W))
CHEAP.defvjp(lambda x: (2 * (x @ W), None), lambda _, g: (-7 * (g @ W.T),), optimize_remat=True)
WITHIN = {
    "optimize_remat": lambda x: jax.vjp(CHEAP, x)[0],
    "composite": lambda x: lax.composite(lambda x: 2 * (x @ W), name="test.twice")(x),
    "custom_vmap": TWICE,
    "linear_call": lambda x: jax.custom_derivatives.linear_call(
        lambda w, x: 2 * (x @ w), lambda w, y: -7 * (y @ w.T), W, x
    ),
}


@pytest.mark.parametrize("f", WITHIN.values(), ids=WITHIN)
def test_functions_within_are_looked_into(f):
    """Their layers are found, and a derivative of the user's own is not followed."""
    close(lrp(f, EPSILON)(X), lrp(lambda x: 2 * (x @ W), EPSILON)(X))
    assert kinds_of(f) == ["dense"]
    silu = lambda x: lax.composite(lambda x: x * jax.nn.sigmoid(x), name="test.silu")(x)
    close(lrp(silu, EPSILON)(X), silu(X))


def test_mutable_arrays_are_refused_wherever_they_stand():
    def in_a_loop(x):
        sums = jax.new_ref(jnp.zeros(4))

        def add(i, _):
            sums[...] += x[i]

        lax.fori_loop(0, 3, add, None)
        return sums[...]

    for f in (in_a_loop, jax.jit(in_a_loop), lambda x: lax.scan(lambda c, v: (c, in_a_loop(x) + v), 0.0, x)[1]):
        for on_unknown in ("error", "gradient"):
            with pytest.raises(UnknownPrimitiveError, match=r"jax\.Ref.*\.at\["):
                lrp(f, EPSILON, on_unknown=on_unknown)(X)
