"""Reading a stream of batches: what can be read and what is sound, batch by batch, without stopping at the others."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..errors import InputError, SweepError

PATIENCE = 100  # an iterator that fails so many times in a row will not recover
UNLIKE = "those of the first good batch have"


@dataclasses.dataclass(frozen=True)
class Layout:
    """What every batch of a sweep looks like, as its first good batch says, and what follows from it.

    shape, dtype: of one input. size: the examples of that batch, which all calls have. classes: of the scores.
    fractions: how much is replaced at each step.
    """

    shape: tuple[int, ...]
    dtype: str
    size: int
    classes: int
    fractions: tuple[float, ...]

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Layout:
        whole: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        return cls(**whole)


Batch = tuple[np.ndarray, np.ndarray]
Read = Callable[[], Any]


def length_of(batches: Any) -> int | None:
    return len(batches) if hasattr(batches, "__len__") else None


def items(batches: Any, first: int | None = None) -> Iterator[tuple[int, Read | SweepError]]:
    """(index, a function that reads the batch, or raises why it cannot).

    A sequence is read by index, when asked, that of index `first` before the others; of an iterator each item is
    drawn, and called later if it can be. Where a generator raised there is nothing to continue: the last item is then
    a SweepError in place of the function.
    """
    if hasattr(batches, "__len__") and hasattr(batches, "__getitem__"):
        yield from ((i, lambda i=i: batches[i]) for i in sorted(range(len(batches)), key=lambda i: i != first))
        return
    iterator, failed = iter(batches), 0
    for i in itertools.count():
        try:
            item = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            failed += 1
            if inspect.isgenerator(iterator) or failed == PATIENCE:
                why = "a generator that raised cannot go on" if failed < PATIENCE else f"so did the {failed - 1} before"
                broken = SweepError(
                    f"batch {i}: the stream raised {reason(error)}; {why}. What was computed is written. Let the "
                    f"stream yield functions that return (inputs, targets), or write a sequence: then a batch that "
                    f"cannot be read is recorded, and the others are computed"
                )
                broken.__cause__ = error
                yield i, broken
                return
            yield i, lambda error=error: _raise(error)  # type: ignore[misc]
        else:
            failed = 0
            yield i, lambda item=item: item  # type: ignore[misc]


def _raise(error: Exception) -> None:
    raise error


def reason(error: Exception) -> str:
    """One line, as it is recorded."""
    text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:500]


def read(item: Read, shape: tuple[int, ...] | None = None) -> Batch:
    """The batch as arrays, or whatever the reading raises; InputError for what no batch can be.

    shape: of one input, which the batch must have.
    """
    found = item()
    found = found() if callable(found) else found
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise InputError(f"a batch is a pair (inputs, targets), not {type(found).__name__}")
    inputs, targets = (np.asarray(v) for v in found)
    if inputs.ndim < 2 or not len(inputs):
        raise InputError(f"inputs of shape {inputs.shape}: write (examples, ...), at least one")
    if shape is not None and inputs.shape[1:] != shape:
        raise InputError(f"inputs of shape {inputs.shape}: shape={shape} asks for {('N', *shape)}")
    if not (jnp.issubdtype(inputs.dtype, jnp.floating) or jnp.issubdtype(inputs.dtype, jnp.integer)):
        raise InputError(f"inputs of dtype {inputs.dtype}: write real numbers")
    inputs = inputs.astype(jnp.result_type(inputs.dtype), copy=False)  # float64 is float32 where JAX has no float64
    if jnp.issubdtype(inputs.dtype, jnp.floating) and not (sound := np.isfinite(inputs)).all():
        wrong = ~sound.reshape(len(inputs), -1).all(1)
        raise InputError(f"inputs have NaN or infinity in {wrong.sum()} examples, first in {int(wrong.argmax())}")
    if targets.dtype.kind not in "iu" or targets.shape not in ((), (len(inputs),)):
        raise InputError(
            f"targets of shape {targets.shape} and dtype {targets.dtype}: write one class, or one for each of "
            f"{len(inputs)} examples"
        )
    return inputs, np.broadcast_to(targets, len(inputs))


def digest_of(batch: Batch) -> str:
    """What a batch is recognised by when the sweep is started again."""
    inputs, targets = batch
    total = hashlib.sha256(f"{inputs.shape} {inputs.dtype}".encode())
    total.update(np.ascontiguousarray(inputs).reshape(-1).view(np.uint8).data)
    total.update(targets.astype(np.int64).tobytes())
    return total.hexdigest()[:16]


def mismatch(batch: Batch, layout: Layout) -> str | None:
    """In what a batch is not like the others."""
    inputs, targets = batch
    if inputs.shape[1:] != layout.shape or inputs.dtype.name != layout.dtype:
        wanted = f"{UNLIKE} {('N', *layout.shape)} and {layout.dtype}"
        return f"inputs of shape {inputs.shape} and dtype {inputs.dtype}: {wanted}"
    wrong = targets[(targets < 0) | (targets >= layout.classes)]
    return f"target {wrong[0]} is out of range: there are {layout.classes} classes" if len(wrong) else None
