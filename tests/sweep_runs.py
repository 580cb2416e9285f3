"""What the tests of sweeps share: batches and explainers that are quick to compile, and how tables agree."""

import jax
import numpy as np
import pytest

import sweeping
from jaxlrp import composites, evaluate

pytest.importorskip("pyarrow")
pytest.importorskip("tqdm")

QUICK = {"region": 4, "fills": {"zero": 0.0}, "progress": False}
EPSILON = {"epsilon": composites.epsilon()}
PLAIN = {"plain": lambda x, t: x}  # quick to compile, where numbers do not matter


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """What is compiled is kept, for the processes too; a resumed sweep compiles the same again."""
    folder = tmp_path_factory.mktemp("compiled")
    options = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    jax.tree.map(jax.config.update, list(options), list(options.values()))
    yield folder
    jax.tree.map(jax.config.update, list(before), list(before.values()), is_leaf=lambda v: v is None)


def batches_of(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(n, 8, 8, 1)).astype(np.float32), rng.integers(0, 3, n)) for n in sizes]


PREDICT = sweeping.setting()[0]
BATCHES = batches_of(4, 4, 4, 2)


def measured(folder, batches=BATCHES, predict=PREDICT, explainers=PLAIN, **options):
    return evaluate.sweep(predict, explainers, batches, folder, **QUICK | options)


def rows_of(sweep, **wanted):
    return [row for row in sweep.table.to_pylist() if all(row[k] == v for k, v in wanted.items())]


def same(one, other, tolerance=1e-6):
    """Tables that agree in every row, in numbers up to rounding."""
    assert one.schema == other.schema and one.num_rows == other.num_rows
    for name in one.column_names:
        a, b = (t[name].to_pylist() for t in (one, other))
        if name in ("score", "auc", "aopc", "scores"):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)
        else:
            assert a == b, name


class Source:
    """Random access, as Grain's data sources and PyTorch's data sets: nothing but a length and items."""

    def __init__(self, items):
        self.items, self.read = items, []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        self.read.append(i)
        return self.items[i]
