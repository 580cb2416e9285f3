"""Read the tensors of a PyTorch checkpoint without PyTorch, and without running what a pickle may ask to run.

The format is torch.save's before PyTorch 1.6: five pickles (magic number, protocol, machine, state dict, storage keys),
then each storage as an int64 count and its elements, little-endian. In the state dict a tensor is a call of
_rebuild_tensor_v2(storage, offset, shape, strides, ...), and a storage is a persistent id.
"""

import pickle
from collections import OrderedDict
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from typing import IO, Any

import numpy as np

HEADER = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    size: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, storages: dict[str, np.ndarray]) -> np.ndarray:
        # Strides from a file may point anywhere in memory; an index that numpy checks cannot.
        index = np.asarray(self.offset)
        for size, stride in zip(self.shape, self.strides, strict=True):
            index = index[..., None] + stride * np.arange(size)
        return storages[self.storage.key][index]


def _rebuild_tensor(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


# All that the pickles may name. A state dict of float32 weights and int64 counters needs no more.
ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch", "FloatStorage"): np.dtype("<f4"),
    ("torch", "LongStorage"): np.dtype("<i8"),
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes]):
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}  # those that were named so far

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return ALLOWED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"the checkpoint names {module_name}.{global_name}: not allowed") from None

    def persistent_load(self, pid: Any) -> _Storage:
        tag, dtype, key, _device, size, _view = pid
        if tag != "storage":
            raise pickle.UnpicklingError(f"unknown persistent id {tag!r}")
        self.storages[key] = _Storage(key, dtype, size)
        return self.storages[key]


def _read_storages(file: IO[bytes], declared: dict[str, _Storage]) -> dict[str, np.ndarray]:
    storages = {}
    for key in _Unpickler(file).load():
        storage = declared[key]
        count = int.from_bytes(file.read(8), "little")
        data = file.read(count * storage.dtype.itemsize) if count == storage.size else b""
        if len(data) != storage.size * storage.dtype.itemsize:
            raise ValueError(f"storage {key} is not the {storage.size} numbers it should be: is the file complete?")
        storages[key] = np.frombuffer(data, storage.dtype)
    return storages


def _arrays(state: Any, storages: dict[str, np.ndarray]) -> Any:
    """The object with arrays in place of its tensors, in dictionaries however deep."""
    if isinstance(state, dict):
        return {name: _arrays(value, storages) for name, value in state.items()}
    return state.array(storages) if isinstance(state, _Tensor) else state


def load(path: Traversable) -> dict[str, Any]:
    """The state dict, {name: array}, or what else was saved in dictionaries: state dicts, numbers, strings.

    path: a pathlib.Path or an importlib.resources file. ValueError if it is not such a checkpoint or is cut short,
    IndexError if a tensor reaches outside its storage, pickle.UnpicklingError if the file names anything but
    ordered dictionaries and tensors of float32 and int64.
    """
    with path.open("rb") as file:
        if file.read(len(HEADER)) != HEADER:
            raise ValueError(f"{path} is not a PyTorch checkpoint in the format before PyTorch 1.6")
        for _ in ("protocol", "machine"):
            _Unpickler(file).load()
        reader = _Unpickler(file)
        state = reader.load()
        storages = _read_storages(file, reader.storages)
    return _arrays(state, storages)
