"""Every primitive that JAX can differentiate has a kind, or is an exception with a reason; and what the rules make of
those that no network of the other tests contains, against sums, loops and Jacobians written out in float64."""

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

from jaxlrp import Composite, composites, kinds, lrp, plan, rules, select, value_and_lrp
from jaxlrp.errors import InputError, UnknownPrimitiveError
from jaxlrp.evaluate import conservation
from nets import close, draw, linear, quick_compilation, same  # noqa: F401

EPSILON = composites.epsilon()
X, W = draw(1, 3, 4), draw(2, 4, 3)
WHERE = np.asarray([2, 0, 2])

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
    assert f"{name!r} (test_primitives.py:{line} " in message and reason in message
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
UNIT = np.random.default_rng(3).uniform(0.15, 0.85, (3, 4))
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


# ---------------------------------------------------------------------------------------------------- references


def stab(z, eps=1e-9):
    return z + np.where(z >= 0, eps, -eps)


def in_proportion(f, x, R):
    """R_j = sum_k J_kj x_j / stab(f_k) R_k, on the dense Jacobian: for f linear, or of the first degree."""
    jacobian = np.asarray(jax.jacobian(lambda v: f(v.reshape(x.shape)).ravel())(x.ravel()))
    share = np.asarray(R).ravel() / stab(np.asarray(f(x)).ravel())
    return (x.ravel() * (share @ jacobian)).reshape(x.shape)


def start(f, x):
    """Start relevance that is not the output's value."""
    return draw(9, *f(x).shape)


def explain(f, x, R, composite=EPSILON):
    return jax.jit(lrp(f, composite, target=lambda y: R))(x)


def kinds_of(f, x=X):
    return [row.kind for row in plan(f, EPSILON)(x)]


# ---------------------------------------------------------------------------------------------------- sums

LOWER, BAND = jnp.tril(draw(5, 4, 4)) + 3 * jnp.eye(4), draw(6, 3, 4)
UPDATES = draw(7, 3, 2)
SUMS = {
    "segment_sum": lambda x: jax.ops.segment_sum(x, WHERE, 4),
    "segment_sum, by an index of the data": lambda x: jax.ops.segment_sum(x, jnp.argmax(x, 1), 4),
    "add to constants": lambda x: UPDATES.at[:, jnp.asarray([0, 1, 0])].add(x[:, :3]),
    "constants added": lambda x: x.at[WHERE, :2].add(UPDATES),
    "both data": lambda x: x.at[:, jnp.asarray([0, 3, 0])].add(2 * x[:, 1:]),
    "subtract": lambda x: x.at[WHERE].subtract(0.4 * x),
    "cumsum": lambda x: jnp.cumsum(x, 1),
    "triangular_solve": lambda x: lax.linalg.triangular_solve(LOWER, x, lower=True),
    "tridiagonal_solve": lambda x: lax.linalg.tridiagonal_solve(BAND[0], BAND[1] + 5, BAND[2], x.T),
    "solve": lambda x: jnp.linalg.solve(LOWER, x.T),
}


@pytest.mark.parametrize("f", SUMS.values(), ids=SUMS)
def test_sums_are_in_proportion(f):
    R = start(f, X)
    close(explain(f, X, R), in_proportion(f, X, R), 1e-6)
    assert "reduce" in kinds_of(f) and not {"unknown", "matmul", "product"} & set(kinds_of(f))


def test_derivative_of_a_max_pool_inside():
    """What is scattered to the winners of a pool is linear in what is scattered; the pool itself decides where."""

    def scattered(x):
        _, pull = jax.vjp(lambda u: lax.reduce_window(u, -jnp.inf, lax.max, (1, 2), (1, 2), "VALID"), UNIT)
        return pull(x[:, :2])[0]

    R = start(scattered, X)
    close(explain(scattered, X, R), in_proportion(scattered, X, R), 1e-6)


def test_gather_at_the_winners_of_a_pool_inside():
    pool = lambda u: lax.reduce_window(u, -jnp.inf, lax.max, (1, 2), (1, 2), "VALID")
    gathered = lambda x: jax.jvp(pool, (UNIT.astype(np.float32),), (x,))[1]
    x = X.astype(np.float32)
    R = start(gathered, x).astype(np.float32)
    left = UNIT.reshape(3, 2, 2)[..., 0] >= UNIT.reshape(3, 2, 2)[..., 1]
    right = np.stack([np.where(left, R, 0), np.where(left, 0, R)], -1).reshape(3, 4)
    close(explain(gathered, x, R), right, 1e-6)


def test_scatter_in_half_precision():
    f = lambda x: x.at[WHERE].add(x * 2).at[:, WHERE].subtract(x[:, 1:]).at[WHERE].multiply(x).at[WHERE].max(x)
    x = jnp.asarray([[1.0, 2.0, 1.5, 3.0], [2.0, 0.5, 1.0, 1.0], [0.5, 1.0, 3.0, 2.0]])
    exact = explain(f, x, jnp.ones((3, 4)))
    got = explain(f, x.astype(jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    close(got, exact, 0.03)


# ---------------------------------------------------------------------------------------------------- grouped products

ROWS = jnp.asarray([2, 0, 3])
A, GROUPS = draw(10, 6, 4), draw(11, 3, 4, 5)


def ragged(x):
    return lax.ragged_dot(x, GROUPS, ROWS) + 0.1


def apart(x):
    return jnp.concatenate([x[:2] @ GROUPS[0] + 0.1, x[2:5] @ GROUPS[2] + 0.1])


RULES = (
    rules.Epsilon(0.1),
    rules.Zero("distribute"),
    rules.Gamma(0.3),
    rules.GeneralizedGamma(0.3),
    rules.AlphaBeta(2.0, 1.0),
    rules.WSquare(),
    rules.Flat(),
    rules.ZBox(-3.0, 3.0),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_ragged_dot_is_a_dense_layer_for_each_group(rule):
    within = lambda x: ragged(x)[:5]  # the last row is in no group
    R = start(within, A)
    assert kinds_of(within, A) == ["dense", "structural"]
    close(explain(within, A, R, linear(rule)), explain(apart, A, R, linear(rule)))


def test_a_mixture_of_experts():
    """The router sorts the rows by expert: sizes of the groups and places depend on the data, the kernels do not."""
    router = draw(12, 4, 3)

    def experts(x):
        chosen = jnp.argmax(x @ router, 1)
        order = jnp.argsort(chosen)
        y = lax.ragged_dot(x[order], GROUPS, jnp.bincount(chosen, length=3))
        return jnp.zeros_like(y).at[order].set(y)

    expected = np.stack([x @ GROUPS[k] for x, k in zip(A, np.argmax(A @ router, 1), strict=True)])
    np.testing.assert_allclose(experts(A), expected)
    R = start(experts, A)
    each = lambda x, k, r: in_proportion(lambda v: v @ GROUPS[k], x, r)
    right = np.stack([each(x, k, r) for x, k, r in zip(A, np.argmax(A @ router, 1), R, strict=True)])
    close(explain(experts, A, R, linear(rules.Epsilon(1e-9))), right, 1e-7)
    assert kinds_of(experts, A).count("dense") == 1


def test_groups_of_matrices_from_the_data():
    f = lambda w: lax.ragged_dot(A, w, ROWS)[:5]
    R = start(f, GROUPS)
    written = lambda w: jnp.concatenate([A[:2] @ w[0], A[2:5] @ w[2]])
    close(explain(f, GROUPS, R), in_proportion(written, GROUPS, R), 1e-6)


# ---------------------------------------------------------------------------------------------------- moved values


def moved(places, values, shape=X.shape):
    """An array with each value added at its place."""
    found = np.zeros(shape)
    np.add.at(found, places, values)
    return found


def test_sort_carries_relevance_with_the_value():
    R = start(jnp.sort, X)
    order = np.argsort(X, 1)
    close(explain(jnp.sort, X, R), np.take_along_axis(np.asarray(R), np.argsort(order, 1), 1))


def test_sort_carries_what_comes_along():
    """Two operands sorted by the first, and integers: relevance of each goes to its own operand."""

    def f(x):
        keys, values, _ = lax.sort((x, x[:, ::-1] * 1.0, lax.broadcasted_iota(jnp.int32, x.shape, 1)), num_keys=1)
        return jnp.concatenate([keys, values])

    R = start(f, X)
    back = np.argsort(np.argsort(X, 1), 1)
    right = np.take_along_axis(np.asarray(R[:3]), back, 1) + np.take_along_axis(np.asarray(R[3:]), back, 1)[:, ::-1]
    close(explain(f, X, R), right, 1e-6)


def test_a_parameter_sorted_by_the_data_stays_a_parameter():
    """It is a scale, not a product of two data values, and keeps no relevance."""

    def f(x):
        _, weights = lax.sort((x, jnp.arange(1.0, 13).reshape(3, 4)), num_keys=1)
        return x * weights

    assert "product" not in kinds_of(f)
    close(explain(f, X, jnp.ones((3, 4))), np.ones((3, 4)), 1e-6)


def test_top_k():
    for top_k in (lax.top_k, lax.approx_max_k):
        f = lambda x, top_k=top_k: top_k(x, 2)[0]
        R = start(f, X)
        places = np.argsort(-X, 1)[:, :2]
        close(explain(f, X, R), moved((np.arange(3)[:, None], places), R))
    both = lambda x: lax.top_k(x, 2)
    (values, places), relevance = value_and_lrp(both, EPSILON)(X)
    close(relevance, moved((np.arange(3)[:, None], places), values))


def test_scatter_overwrites():
    """What is written gets the relevance of its place, what was there before gets none."""
    columns = np.asarray([3, 0])

    def f(x):
        return x.at[:, columns].set(x[:, 1:3])

    R = np.asarray(start(f, X))
    right = np.zeros((3, 4))
    right[:, 1:3] += R[:, 1:3] + R[:, columns]
    close(explain(f, X, R), right)
    into_constants = lambda x: jnp.ones((3, 6)).at[:, 1:5].set(x)
    R = start(into_constants, X)
    close(explain(into_constants, X, R), R[:, 1:5])


def test_barrier_keeps_operands_apart():
    """A kernel that goes through a barrier together with the data is still a kernel."""

    def f(x):
        y, w = lax.optimization_barrier((x, W))
        return y @ w

    assert kinds_of(f).count("dense") == 1 and "matmul" not in kinds_of(f)
    close(lrp(f, EPSILON)(X), lrp(lambda x: x @ W, EPSILON)(X))


def test_layers_with_several_outputs_have_no_one_relevance():
    f = lambda x: lax.top_k(x @ W @ W.T, 2)[0]
    _, _, seen = value_and_lrp(f, EPSILON, layers=select.everything())(X)
    assert "top_k" not in seen and "dense[1]" in seen
    with pytest.raises(InputError, match="no one output"):
        lrp(f, EPSILON, masks={"top_k": 1.0})(X)


def test_transformations_of_what_moves():
    f = lambda x: lax.top_k(jnp.sort(x) @ W, 2)[0] @ W[:2]
    each = jax.vmap(lambda x: lrp(lambda v: f(v[None])[0], EPSILON)(x))(X)
    close(each, lrp(f, EPSILON)(X))
    same(jax.jit(value_and_lrp(f, EPSILON))(X)[0], jax.jit(f)(X))


# ---------------------------------------------------------------------------------------------------- maxima

TIED = jnp.asarray([[1.0, 3.0, 2.0, 3.0, 4.0, 4.0], [5.0, 1.0, 5.0, 2.0, 2.0, 0.0]])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("smallest", [False, True])
def test_cumulative_maxima_go_to_the_record(smallest, reverse):
    """Each output's relevance goes to the element that first became the largest so far."""
    f = lambda x: (lax.cummin if smallest else lax.cummax)(x, 1, reverse)
    R, right = np.asarray(start(f, TIED)), np.zeros(TIED.shape)
    n = TIED.shape[1]
    for i, row in enumerate(np.asarray(TIED) * (-1 if smallest else 1)):
        best = None
        for j in range(n)[::-1] if reverse else range(n):
            best = j if best is None or row[j] > row[best] else best
            right[i, best] += R[i, j]
    close(explain(f, TIED, R), right)


def test_cumlogsumexp_is_a_smooth_maximum():
    f = lambda x: lax.cumlogsumexp(x, 1)
    R, e = np.asarray(start(f, X)), np.exp(X)
    weights = e[:, :, None] * np.tri(4).T / np.cumsum(e, 1)[:, None, :]
    close(explain(f, X, R), (weights * R[:, None, :]).sum(2))


def test_scattered_maxima():
    x = jnp.asarray([[1.0, 2.0, 5.0], [4.0, 0.0, 3.0], [2.0, 2.0, 9.0]])
    f = lambda x: jnp.full((2, 3), 3.0).at[jnp.asarray([0, 1, 0])].max(x)
    R = np.asarray(start(f, x))
    right = np.zeros((3, 3))
    right[2, 2], right[1, 0], right[1, 2] = R[0, 2], R[1, 0], R[1, 2] / 2  # the 3 that was there ties
    close(explain(f, x, R), right)


def test_clip_between_values_of_the_data():
    x = jnp.asarray([[0.0, 2.0, 1.0], [0.5, 1.0, 3.0], [-1.0, 2.0, 5.0]])
    f = lambda x: lax.clamp(x[:, 0], x[:, 2], x[:, 1])
    close(explain(f, x, R := np.asarray([1.0, -2.0, 3.0])), moved(([0, 1, 2], [2, 1, 1]), R, x.shape))


@pytest.mark.parametrize("ties", ["first", "split"])
def test_maxima_that_start_from_a_number(ties):
    """A max-pool that starts from 0: where 0 is the largest, relevance ends there; JAX has no derivative of it."""
    winner = Composite([(select.kind("max_pool"), rules.Winner(ties))]) + EPSILON
    pool = lambda x: lax.reduce_window(x, 0.0, lax.max, (1, 2), (1, 2), "VALID")
    plain = lambda x: lax.reduce_window(x, -np.inf, lax.max, (1, 2), (1, 2), "VALID")
    rows = lambda x: lax.reduce(x, 0.0, lax.max, (1,))
    R = start(pool, TIED)
    above = np.asarray(plain(TIED)) > 0
    close(explain(pool, TIED, R, winner), explain(plain, TIED, R * above, winner))
    x = TIED - 4.5
    R = start(rows, x)
    got = explain(rows, x, R, winner)
    assert not np.any(got[0])
    close(got[1], explain(lambda x: x.max(1), x, R, winner)[1])


# ---------------------------------------------------------------------------------------------------- products


def test_a_product_over_an_axis_is_shared_equally():
    f = lambda x: jnp.prod(x, 1)
    R = np.asarray(start(f, X))
    close(explain(f, X, R), np.repeat(R[:, None] / 4, 4, 1))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_cumulative_product_is_shared_equally(reverse):
    f = lambda x: lax.cumprod(x, 1, reverse)
    R = np.asarray(start(f, X))
    right = np.zeros((3, 4))
    for k in range(4):
        factors = range(k, 4) if reverse else range(k + 1)
        for j in factors:
            right[:, j] += R[:, k] / len(factors)
    close(explain(f, X, R), right)


def test_scattered_products_are_shared_equally():
    """Of what was there and the factors of each place; a constant that was there is no factor of the data."""
    R = np.asarray(draw(13, 3, 4))
    both = lambda x: x.at[WHERE].multiply(x)
    right = np.stack([R[0] / 2, R[1], R[2] / 3])
    for i, place in enumerate(WHERE):
        right[i] += R[place] / {0: 2, 2: 3}[place]
    close(explain(both, X, R), right)
    constant = lambda x: jnp.full((3, 4), 2.0).at[WHERE].multiply(x)
    close(explain(constant, X, R), np.stack([R[2] / 2, R[0], R[2] / 2]))
    by_constants = lambda x: x.at[WHERE].multiply(2.0)
    close(explain(by_constants, X, R), R, 1e-6)


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


# ---------------------------------------------------------------------------------------------------- complex numbers

SIGNAL, HEAD = draw(20, 2, 8), draw(21, 5, 3)
FILTER = draw(22, 5) + 1j * draw(23, 5)


def parts(z):
    return jnp.stack([z.real, z.imag])


def on_parts(f):
    """A function of complex numbers as one of pairs of real ones."""
    return lambda v: parts(f(lax.complex(v[0], v[1])))


def modulus(v):
    return jnp.sqrt(v[0] ** 2 + v[1] ** 2)


def spectrum(x):
    return parts(jnp.fft.rfft(x))


def test_a_spectrum_of_magnitudes():
    """|z| = sqrt(u^2 + v^2) shares its relevance as u^2 to v^2, and the transform as a linear layer of both."""
    f = lambda x: jnp.abs(jnp.fft.rfft(x)) @ HEAD
    z = spectrum(SIGNAL)
    R = np.asarray(start(f, SIGNAL))
    right = in_proportion(lambda a: a @ HEAD, np.asarray(modulus(z)), R)
    squares = np.asarray(z) ** 2
    right = squares / squares.sum(0) * right
    right = in_proportion(spectrum, SIGNAL, right)
    close(explain(f, SIGNAL, R, linear(rules.Epsilon(1e-9))), right, 1e-6)
    assert kinds_of(f, SIGNAL) == ["complex", "complex", "dense"]


POWERS = {
    "of the modulus": lambda z: jnp.abs(z) ** 2,
    "of the parts": lambda z: z.real**2 + z.imag**2,
    "with the conjugate": lambda z: (z * z.conj()).real,
    "with the conjugate first": lambda z: jnp.real(jnp.conj(z) * z),
}


@pytest.mark.parametrize("power", POWERS.values(), ids=POWERS)
def test_a_power_spectrum_however_it_is_written(power):
    f = lambda x: power(jnp.fft.rfft(x))
    R = np.asarray(start(f, SIGNAL))
    squares = np.asarray(spectrum(SIGNAL)) ** 2
    right = in_proportion(spectrum, SIGNAL, squares / squares.sum(0) * R)
    close(explain(f, SIGNAL, R), right, 1e-6)


LINEAR_IN_PARTS = {
    "filter": lambda z: z * FILTER,
    "filter left": lambda z: FILTER * z,
    "divided": lambda z: z / FILTER,
    "bias": lambda z: z + FILTER,
    "less": lambda z: FILTER - z,
    "negative": lambda z: -z,
    "conjugate": jnp.conj,
    "sum": lambda z: z.sum(1),
    "dense": lambda z: z @ (HEAD + 1j * HEAD[::-1]),
    "transform": lambda z: jnp.fft.fft2(z),
    "moved": lambda z: jnp.concatenate([z[:, ::-1], z[:, :2]], 1).T,
    "segments": lambda z: jax.ops.segment_sum(z.T, jnp.asarray([0, 1, 0, 2, 1]), 3),
}


@pytest.mark.parametrize("g", LINEAR_IN_PARTS.values(), ids=LINEAR_IN_PARTS)
def test_linear_steps_treat_a_complex_number_as_two(g):
    def f(x):
        z = g(jnp.fft.rfft(x))
        return jnp.stack([z.real, z.imag])

    R = np.asarray(start(f, SIGNAL))
    right = in_proportion(on_parts(g), np.asarray(spectrum(SIGNAL)), R)
    close(explain(f, SIGNAL, R), in_proportion(spectrum, SIGNAL, right), 1e-5)


def test_there_and_back():
    f = lambda x: jnp.fft.irfft(jnp.fft.rfft(x) * FILTER, 8)
    R = np.asarray(start(f, SIGNAL))
    back = lambda v: jnp.fft.irfft(lax.complex(v[0], v[1]), 8)
    z = np.asarray(spectrum(SIGNAL))
    filtered = np.asarray(on_parts(lambda z: z * FILTER)(z))
    right = in_proportion(back, filtered, R)
    right = in_proportion(on_parts(lambda z: z * FILTER), z, right)
    close(explain(f, SIGNAL, R), in_proportion(spectrum, SIGNAL, right), 1e-5)


def test_a_recurrence_of_complex_numbers():
    """As in linear recurrent units: h = a h + b x, in a scan; the same as unrolled by hand."""
    a, b = FILTER[:4] / 3, FILTER[1:]

    def scanned(x):
        return lax.scan(lambda h, v: (a * h + b * v, None), jnp.zeros(4, complex), x)[0].real

    def unrolled(x):
        h = jnp.zeros(4, complex)
        for v in x:
            h = a * h + b * v
        return h.real

    R = start(scanned, X)
    close(explain(scanned, X, R), explain(unrolled, X, R), 1e-9)
    close(lrp(scanned, EPSILON)(X).sum(), scanned(X).sum(), 1e-6)


def test_relevance_at_a_complex_layer_is_that_of_its_parts():
    f = lambda x: jnp.abs(jnp.fft.rfft(x))
    value, _, seen = value_and_lrp(f, EPSILON, layers=select.kind("complex"))(SIGNAL)
    squares = np.asarray(spectrum(SIGNAL)) ** 2
    right = squares / squares.sum(0) * np.asarray(value)
    close(parts(seen["fft"]), right, 1e-6)
    z, relevance = value_and_lrp(jnp.fft.rfft, EPSILON)(SIGNAL)  # each part starts with its own value
    close(relevance, in_proportion(spectrum, SIGNAL, np.asarray(parts(z))), 1e-6)
    close(lrp(jnp.fft.rfft, EPSILON, target=lambda z: z)(SIGNAL), relevance)
    close(lrp(jnp.fft.rfft, EPSILON, target=2)(SIGNAL), lrp(lambda x: parts(jnp.fft.rfft(x)[:, 2]), EPSILON)(SIGNAL))


# ---------------------------------------------------------------------------------------------------- the ledger

LEDGERS = {
    "scatter": lambda x: (x.at[:, jnp.asarray([0, 3])].add(x[:, 1:3]) + 0.1) @ W,
    "constants": lambda x: jnp.ones_like(x).at[:, 1:3].add(x[:, 1:3]) @ W,
    "products": lambda x: jnp.cumprod(x, 1) @ W,
    "scattered products": lambda x: jnp.ones((len(x), 6)).at[:, 1:5].multiply(x) @ jnp.ones((6, 2)),
    "maxima": lambda x: lax.cummax(x, 1) @ W,
    "maxima from 0": lambda x: lax.reduce_window(x, 0.0, lax.max, (1, 2), (1, 2), "VALID") @ W[:2],
    "sorted": lambda x: jnp.sort(x, 1) @ W,
    "magnitudes": lambda x: (jnp.abs(jnp.fft.rfft(x, axis=1) + 0.1)) @ W[:3],
    "filter": lambda x: jnp.fft.irfft(jnp.fft.rfft(x, axis=1) * FILTER[:3] + FILTER[2:], 4, axis=1) @ W,
}


@pytest.mark.parametrize("f", LEDGERS.values(), ids=LEDGERS)
def test_the_ledger_closes(f):
    books = conservation(f, EPSILON)(X)
    size = sum(row.size for row in books)
    assert (abs(books.gap) < 1e-4 * size).all(), str(books)
    for row in books:
        assert (abs(row.gap) <= 1e-4 * (row.size + abs(row.passed) + abs(row.bias))).all(), f"{row.name}\n{books}"
