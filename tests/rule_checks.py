"""What the tests of single rules share: every case is explained plainly, compiled and mapped over its examples."""

import jax
import numpy as np

from jaxlrp import Composite, lrp, rules, select


def equal(got, right, where=""):
    np.testing.assert_allclose(got, right, rtol=0, atol=1e-8, err_msg=where)


def on(kind: str, rule: rules.Rule) -> Composite:
    return Composite([(select.kind(kind), rule)])


def check(cases, xs, Rs):
    """Each case is (f, composite, right): f's relevance must be right(x, R). All are compiled together."""

    def explain(x, R, cases=cases):
        return [lrp(f, composite, target=lambda y: R)(x) for f, composite, _ in cases]

    compiled = jax.jit(explain)
    ways = {
        "plain": [explain(xs[0], Rs[0], cases[:1])],  # step by step, which takes longest
        "jit": [compiled(x, R) for x, R in zip(xs, Rs, strict=True)],
        "vmap": list(zip(*jax.jit(jax.vmap(explain))(xs, Rs), strict=True)),
    }
    xs, Rs = np.asarray(xs), np.asarray(Rs)
    rights = [[right(x, R) for *_, right in cases] for x, R in zip(xs, Rs, strict=True)]
    for how, results in ways.items():
        for i, (got, right) in enumerate(zip(results, rights, strict=False)):
            for k, (one, other) in enumerate(zip(got, right, strict=False)):
                equal(one, other, f"{how}, example {i}, case {k}")
