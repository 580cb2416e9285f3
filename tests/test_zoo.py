"""Whole networks: the value is theirs, relevance is finite and reaches the input, the ledger closes, jit agrees."""

import jax
import numpy as np
import pytest

from jaxlrp import Composite, composites, rules, select, value_and_lrp
from jaxlrp.evaluate import conservation
from nets import close, quick_compilation  # noqa: F401
from zoo import zoo

ZOO = zoo()
GATES = Composite([(select.kind("product"), rules.SignalTakesAll())])
COMPOSITES = {
    "epsilon": composites.epsilon(1e-3),
    "attnlrp": composites.attnlrp(),
    "cp_lrp": composites.cp_lrp(),
    "gates, plus": GATES + composites.epsilon_plus(),
}
# three networks with the composite that one would choose; the others are slow tests
OWN = dict.fromkeys(("CNN", "LSTM seq2seq"), "gates, plus") | {"Transformer LM": "attnlrp"}


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        pytest.param(name, preset, marks=[] if preset == OWN.get(name) else pytest.mark.slow)
        for name in ZOO
        for preset in COMPOSITES
    ],
)
def test_explained(name, preset):
    apply, variables, x = ZOO[name]
    explain = value_and_lrp(apply, COMPOSITES[preset], argnums=1, target=1)
    value, relevance = jax.jit(explain)(variables, x)
    close(value, apply(variables, x))
    assert relevance.shape == x.shape and np.isfinite(relevance).all()
    assert np.abs(relevance).reshape(len(x), -1).max(1).min() > 0
    ledger = conservation(apply, COMPOSITES[preset], argnums=1, target=1)(variables, x)
    size = max(row.size.max() for row in ledger)
    for row in ledger:
        assert (np.abs(row.gap) <= 1e-10 * (row.size + np.abs(row.passed) + np.abs(row.bias) + 1e-300)).all(), row.name
    assert np.abs(ledger.gap).max() <= 1e-10 * size
    close(ledger.start, value[:, 1])
