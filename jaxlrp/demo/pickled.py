"""Read a regression that joblib wrote, without joblib and scikit-learn, and without running what a pickle may ask for.

The format, uncompressed: one pickle, in which each `NumpyArrayWrapper` is followed by the numbers of the array that it
describes; where they are objects, by another pickle.
"""

import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np


class _Array:
    """Stands for the wrapper of an array, and for the array until its owner is complete."""

    file: IO[bytes]
    value: np.ndarray

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["dtype"].hasobject:
            self.value = _Unpickler(self.file).load()
            return
        self.file.read(self.file.read(1)[0])  # padding, after its length
        count = math.prod(state["shape"])
        data = self.file.read(count * state["dtype"].itemsize)
        self.value = np.frombuffer(data, state["dtype"], count).reshape(state["shape"], order=state["order"])


class _Regression:
    """Stands for a LogisticRegression, whose attributes it has."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({name: v.value if isinstance(v, _Array) else v for name, v in state.items()})


_reconstruct = np.empty(0).__reduce__()[0]

# All that the pickles may name. (NumPy's functions have moved since, and bytes are stored as Latin text.)
ALLOWED: dict[tuple[str, str], Any] = {
    ("sklearn.linear_model._logistic", "LogisticRegression"): _Regression,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes]):
        # What can only read and readline is not read ahead: after a wrapper the file stands at its numbers.
        super().__init__(SimpleNamespace(read=file.read, readline=file.readline))
        self._wrapper = type("NumpyArrayWrapper", (_Array,), {"file": file})

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) == ("joblib.numpy_pickle", "NumpyArrayWrapper"):
            return self._wrapper
        try:
            return ALLOWED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"the file names {module_name}.{global_name}: not allowed") from None


def load(path: Path) -> Any:
    """The object in the file: a logistic regression, as an object with its attributes, or dictionaries and the like.

    ValueError or EOFError if it is cut short,
    pickle.UnpicklingError if it is compressed, or names anything but a logistic regression and arrays.
    """
    with path.open("rb") as file:
        return _Unpickler(file).load()
