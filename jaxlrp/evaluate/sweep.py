"""Sweeps: images x explainers x variants x orders x fills, streamed, spread over devices, and kept on the disk.

One compiled call measures a batch by everything at once: all explanations share the forward pass, all curves are drawn
by one compiled loop per fill, and only scores leave the device. What is random depends on the key, the batch's index
and the example's place in it alone; so neither devices, processes nor a new start change a number.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial

from ..attribute import lrp
from ..composites import Composite
from ..errors import InputError, SweepError, TargetError
from ..rules import PatternAttribution, PatternNet, ZBox
from ..tiles import Tiles, keys_of, tiles_of
from .fills import Fill, as_fill
from .fingerprint import described, digest, named
from .flipping import (
    ORDERS,
    Curves,
    Flipping,
    as_partial,
    check_fill,
    counts_of,
    ranks_of,
    relevance_of,
)
from .results import Bar, Sweep, joined, judged, labels_of, read_sweep, rows
from .store import VERSIONS, Store, package
from .stream import Batch, Layout, digest_of, items, length_of, mismatch, read, reason

MINUTE = 60.0  # what a kill may cost: a part is written after so many seconds, or `group` batches

TOGETHER = 4  # variants at a time: sixteen take as long, and several times the memory

log = logging.getLogger(__name__)


def sweep(
    predict: Callable,
    explainers: Mapping[str, Any],
    batches: Any,
    folder: Any,
    *,
    orders: Sequence[str] = ("morf", "lerf"),
    fills: Mapping[str, Any] | None = None,
    region: int | Sequence[int] = 1,
    steps: int | Sequence[float] | None = None,
    channels: int | None = -1,
    key: Any = None,
    mesh: Mesh | None = None,
    group: int = 16,
    total: int | None = None,
    shape: tuple[int, ...] | None = None,
    retry: bool = False,
    progress: bool = True,
) -> Sweep:
    """`pixel_flipping` of every image by every explainer, order and fill. Started again, it goes on where it was.

    Args:
      predict: inputs -> scores (N, classes). A `jax.tree_util.Partial(apply, params)` passes its parameters as
        arguments; what a function closes over becomes part of the compiled program.
      explainers: {name: composite, list of composites, or function (inputs, targets) -> relevance}. A composite is
        `lrp(predict, composite, target=targets)`; a list of them makes variants 0, 1, ... . So does a composite with
        numbers of shape (K,), as epsilon_gamma_box(-1, 1, gamma=jnp.geomspace(0.01, 1, 16)): bounds and patterns are
        shared by its variants, unless all its leaves are stacked. `lambda x, t: jnp.zeros_like(x)`, all of whose ties
        are broken at random, is the random order.
      batches: pairs (inputs, targets) of arrays, targets one class per example (or one for all): a sequence, which is
        read by index, so that what is done costs nothing but a look at one batch, whether it is still the same; or
        any iterable (Grain, a generator). An item may also be a function that returns the pair. A last, smaller batch
        is filled up and cut again.
      folder: for the results, a new one or that of the same sweep, in a file system that all processes see.
      orders, fills, region, steps, channels: as in `pixel_flipping`; fills: {name: fill}, by default {"mean": "mean"}.
      key: a `jax.random.key`; a batch is measured as by pixel_flipping(..., key=jax.random.fold_in(key, its index)).
      mesh: examples are spread over all its devices, predict's parameters are copied to each unless they are on all
        of them already. None: the default device. Of several processes (`jax.distributed`) each takes every count-th
        batch on its own devices; all must be given the same stream.
      group: batches per file; a file is also written when a minute has passed since the last one.
      total: the number of batches, for the estimate of the time, where `batches` has no length.
      shape: of one input, without the axis of examples, which every batch must have. None: as the first good batch.
      retry: whether batches that failed in an earlier run are tried again.
      progress: whether to show a bar.

    A batch that cannot be read, holds NaN or infinity, has another shape or dtype than the first good one, or targets
    out of range is recorded with the reason and passed over; it is not tried again without `retry`. Where an
    explainer's relevance has NaN, the scores are NaN.

    Returns `Sweep`, everything in the folder by now; when other processes still work, `read_sweep` afterwards has all.

    Raises SweepError for a folder that cannot be written or that holds another sweep (it names what differs; the code
    of functions cannot be compared, the numbers they hold are) or other batches, for a generator that raised, and at
    the end if no batch was good, or only one and others are unlike it; InputError and
    TargetError for arguments that do not fit; whatever `predict` and the explainers raise.
    """
    package("pyarrow.parquet")
    variants = {name: _variants(name, e) for name, e in sorted(_named("explainers", explainers).items())}
    filled = {
        name: as_fill(f) for name, f in sorted(_named("fills", {"mean": "mean"} if fills is None else fills).items())
    }
    if not orders or not set(orders) <= set(ORDERS) or isinstance(orders, str) or len(set(orders)) < len(orders):
        raise InputError(f"orders={orders!r}; write some of {', '.join(map(repr, ORDERS))}, each once")
    if isinstance(group, bool) or not isinstance(group, int) or group < 1:
        raise InputError(f"group={group!r}: write how many batches a file holds, at least 1")
    if isinstance(batches, Mapping) or not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise InputError(f"batches={batches!r}: write a sequence or an iterable of pairs (inputs, targets)")
    if isinstance(batches, tuple | list) and len(batches) == 2 and all(hasattr(v, "shape") for v in batches):
        raise InputError(
            "batches is one pair of arrays (inputs, targets), not a sequence of pairs: write [(inputs, targets)]"
        )
    if shape is not None and not (isinstance(shape, tuple | list) and all(isinstance(n, int) and n > 0 for n in shape)):
        raise InputError(f"shape={shape!r}: write the shape of one input, without the axis of examples")
    shape = None if shape is None else tuple(shape)
    key = jax.random.key(0) if key is None else key
    manifest = {
        "predict": {"function": named(predict), "numbers": digest(predict)},
        "explainers": {
            name: {"variants": len(each), "rules": [described(e) for e in each]} for name, each in variants.items()
        },
        "orders": sorted(orders),
        "fills": {name: described(fill) for name, fill in filled.items()},
        "region": region if isinstance(region, int) else list(region),
        "steps": steps if steps is None or isinstance(steps, int) else np.asarray(steps, float).tolist(),
        "channels": channels,
        "key": [str(jax.random.key_impl(key)), *np.asarray(jax.random.key_data(key)).tolist()],
        "float": jnp.result_type(float).name,
        VERSIONS: {name: package(name).__version__ for name in ("jaxlrp", "jax", "pyarrow")},
    }
    process, count = jax.process_index(), jax.process_count()
    store = Store(folder, manifest, process, count, retry)
    work = Work(predict, variants, filled, tuple(sorted(orders)), region, steps, channels, key, mesh)
    labels = list(labels_of(manifest))
    layout = store.layout
    if layout is not None and shape not in (None, layout.shape):
        raise SweepError(f"{folder} holds batches of inputs {layout.shape}, not shape={shape}: write to another folder")
    known = store.digests  # of batches that are done; empty again when one was compared
    length = total if total is not None else length_of(batches)
    own = None if length is None else len(range(process, length, count))
    bar = Bar(own, sum(i % count == process for i in store.done), progress and process == 0)
    tables: dict[int, Any] = {}
    failures: list[tuple[int, str]] = []
    digests: dict[int, str] = {}
    seen = 0
    written = time.monotonic()
    pending: Any = None  # what the devices work on while the next batch is read

    def collect() -> None:
        nonlocal pending
        if pending is not None:
            index, targets, digests[index], results = pending
            tables[index] = rows(index, targets, joined(results, len(targets)), labels)
            pending = None
            bar.step()

    def append() -> None:
        nonlocal written
        if tables or failures:
            store.append(tables, failures, layout, digests)
        for each in (tables, failures, digests):
            each.clear()
        written = time.monotonic()

    with bar:
        for index, item in items(batches, min(known, default=None)):
            if isinstance(item, SweepError):
                collect()
                append()
                raise item
            seen += 1
            mine = index % count == process and index not in store.done
            if not mine and layout is not None and index not in known:
                continue
            batch, flaw = None, None
            try:
                batch = read(item, shape)
            except Exception as error:
                flaw = reason(error)
            if batch is not None and index in known:
                if digest_of(batch) != known[index]:
                    raise SweepError(
                        f"batch {index} is not the one that {store.folder} holds results of. Give the same batches in "
                        f"the same order, or write to another folder"
                    )
                known.clear()
            if batch is not None:
                like = layout or work.layout_of(batch)  # what predict raises here is no fault of the batch
                flaw = mismatch(batch, like)
                layout = layout or (None if flaw else like)
            if mine and flaw is not None:
                failures.append((index, flaw))
                log.warning("batch %d is left out: %s", index, flaw)
                bar.step()
            elif mine and batch is not None and layout is not None:
                results = work.start(index, batch, layout)
                bar.tell(work.seconds)
                collect()
                pending = (index, batch[1], digest_of(batch), results)
            if not known and (len(tables) + len(failures) >= group or time.monotonic() - written > MINUTE):
                append()  # nothing is written before a batch was compared
        collect()
        append()
    return judged(read_sweep(store.folder), seen, store.folder)


class Work:
    """The computation: what it measures, where, and how long its compilation and its first batch took."""

    def __init__(
        self,
        predict: Callable,
        explainers: dict[str, list[Any]],
        fills: dict[str, Fill],
        orders: tuple[str, ...],
        region: int | Sequence[int],
        steps: int | Sequence[float] | None,
        channels: int | None,
        key: jax.Array,
        mesh: Mesh | None,
    ):
        self.orders, self.region, self.steps, self.channels = orders, region, steps, channels
        self.each: NamedSharding | None = None
        self.whole: NamedSharding | None = None
        if mesh is not None:
            # The axes of one's own mesh may be typed; here only the compiler is to see that there are several devices.
            flat = Mesh(mesh.local_mesh.devices.ravel(), ("examples",))
            self.each, self.whole = NamedSharding(flat, P("examples")), NamedSharding(flat, P())
        predict = as_partial(predict)
        self.predict, self.explainers, self.fills, self.key = self._everywhere((predict, explainers, fills, key))
        self.compiled: Any = None
        self.seconds = (0.0, 0.0)

    def _everywhere(self, tree: Any) -> Any:
        if (whole := self.whole) is None:
            return tree

        def put(leaf: Any) -> Any:
            there = isinstance(leaf, jax.Array) and leaf.sharding.device_set == whole.device_set
            return leaf if there else jax.device_put(leaf, whole)

        return jax.tree.map(put, tree)

    def layout_of(self, batch: Batch) -> Layout:
        """The Layout of a first batch, or whatever is wrong with the arguments."""
        inputs = jax.ShapeDtypeStruct(batch[0].shape, batch[0].dtype)
        for fill in self.fills.values():
            check_fill(fill, inputs.dtype)
        tiles = tiles_of(inputs, self.region, self.channels)
        fractions = counts_of(self.steps, tiles.count) / tiles.count
        value = jax.eval_shape(self.predict, inputs)
        if getattr(value, "ndim", None) != 2 or len(inputs) != len(value):
            shapes = [leaf.shape for leaf in jax.tree.leaves(value)]
            raise TargetError(
                f"predict made {shapes} of inputs {inputs.shape}: write a function to (examples, classes)"
            )
        shape = tuple(inputs.shape[1:])
        return Layout(shape, inputs.dtype.name, len(inputs), value.shape[1], tuple(fractions.tolist()))

    def start(self, index: int, batch: Batch, layout: Layout) -> list[dict[str, jax.Array]]:
        """The measurements of a batch, in calls of the layout's size, not waited for but the first time."""
        devices = 1 if self.each is None else len(self.each.device_set)
        size = -(-layout.size // devices) * devices
        results = []
        for at in range(0, len(batch[0]), size):
            inputs, targets = (v[at : at + size] for v in batch)
            inputs, targets = (np.concatenate([v, np.repeat(v[-1:], size - len(v), 0)]) for v in (inputs, targets))
            data = (inputs, targets.astype(np.int32), np.arange(at, at + size, dtype=np.int32))
            number = self._everywhere(np.uint32(index))
            args = (self.predict, self.explainers, self.fills, self.key, number, *jax.device_put(data, self.each))
            if self.compiled is None:
                begun = time.monotonic()
                tiles = tiles_of(inputs, self.region, self.channels)
                counts = tuple(counts_of(self.steps, tiles.count).tolist())
                self.compiled = measure.lower(*args, orders=self.orders, tiles=tiles, counts=counts).compile()
                middle = time.monotonic()
                results.append(jax.block_until_ready(self.compiled(*args)))
                self.seconds = (middle - begun, time.monotonic() - middle)
            else:
                results.append(self.compiled(*args))
        return results


@functools.partial(jax.jit, static_argnames=("orders", "tiles", "counts"))
def measure(
    predict: Partial,
    explainers: dict[str, list[Any]],
    fills: dict[str, Fill],
    key: jax.Array,
    index: jax.Array,
    inputs: jax.Array,
    targets: jax.Array,
    places: jax.Array,
    *,
    orders: tuple[str, ...],
    tiles: Tiles,
    counts: tuple[int, ...],
) -> dict[str, jax.Array]:
    """score, auc, aopc (N, labels) and scores (N, labels, steps + 1), labels as `results.labels_of` has them."""
    keys = keys_of(jax.random.fold_in(key, index), places)
    maps = _explained(predict, [e for each in explainers.values() for e in each], inputs, targets)
    sums = jnp.stack([relevance_of(tiles, inputs, r) for r in maps])
    ranks = jax.lax.map(lambda s: jnp.stack([ranks_of(o, s, keys) for o in orders]), sums)
    ranks = ranks.reshape(-1, *ranks.shape[2:])  # (maps and orders, N, tiles)
    steps = jnp.asarray(counts)
    curves = [
        jax.lax.map(lambda r, f=f: Flipping(predict, inputs, None, targets, f, keys).curves(r, steps, tiles), ranks)
        for f in fills.values()
    ]
    scores = jnp.moveaxis(jnp.stack(curves, 1), 2, 0)  # (N, maps and orders, fills, steps + 1)
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32)).reshape(len(inputs), -1, len(counts))
    score = scores[..., 0]
    unsound = jnp.repeat(jnp.isnan(sums).any(-1).T, len(orders) * len(fills), axis=1)
    scores = jnp.where(unsound[..., None], jnp.nan, scores)
    found = Curves(scores.reshape(-1, len(counts)), jnp.asarray(np.array(counts) / tiles.count, scores.dtype))
    return {
        "score": score,
        "auc": found.auc().reshape(score.shape),
        "aopc": found.aopc().reshape(score.shape),
        "scores": scores,
    }


def _explained(predict: Partial, explainers: Sequence[Any], inputs: jax.Array, targets: jax.Array) -> list[jax.Array]:
    """The relevance by each explainer. Composites that differ in numbers alone share what does not depend on them."""
    # The parameters stay arguments: they name the layers. Composites of one form are traced once.
    explain = jax.jit(lambda c, a, k, x, t: lrp(predict.func, c, argnums=len(a), target=t)(*a, x, **k))
    rest = predict.args, predict.keywords, inputs, targets
    maps: dict[int, jax.Array] = {}
    alike: dict[Any, list[int]] = {}
    for i, e in enumerate(explainers):
        if isinstance(e, Composite):
            numbers, form = jax.tree.flatten(e)
            alike.setdefault((form, *map(jax.typeof, numbers)), []).append(i)
        else:
            maps[i] = e(inputs, targets)
    for places in alike.values():
        group = [explainers[i] for i in places]
        fitted = any(isinstance(rule, _FITTED) for _, rule in group[0].rows)  # whose arrays are kept once
        if len(group) == 1 or fitted or not jax.tree.leaves(group[0]):
            maps |= {i: explain(c, *rest) for i, c in zip(places, group, strict=True)}
        else:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *group)
            mapped = jax.lax.map(lambda c: explain(c, *rest), stacked, batch_size=TOGETHER)
            maps |= dict(zip(places, mapped, strict=True))
    return [maps[i] for i in range(len(explainers))]


def _named(name: str, given: Any) -> Mapping[str, Any]:
    if not isinstance(given, Mapping) or not given or not all(isinstance(k, str) for k in given):
        raise InputError(f"{name}={given!r}: write a dictionary from names to {name}, not empty")
    return given


def _variants(name: str, explainer: Any) -> list[Any]:
    """The composites that an explainer stands for, or the function, as a Partial."""
    if isinstance(explainer, Composite):
        return unstacked(name, explainer)
    if isinstance(explainer, list | tuple) and explainer and all(isinstance(e, Composite) for e in explainer):
        return list(explainer)
    if callable(explainer):
        return [as_partial(explainer)]
    raise InputError(f"explainers[{name!r}]={explainer!r}: write a composite, a list of them, or a function")


def unstacked(name: str, composite: Composite) -> list[Composite]:
    """One composite for each of the K entries that its numbers have, or itself."""
    per_rule = [(rule, [np.asarray(v) for v in jax.tree.leaves(rule)]) for _, rule in composite.rows]
    bounds = [v for rule, leaves in per_rule for v in leaves if isinstance(rule, _ARRAYS)]
    numbers = [v for rule, leaves in per_rule for v in leaves if not isinstance(rule, _ARRAYS)]
    sizes = sorted({len(v) for v in numbers if v.ndim == 1})
    if not sizes:
        return [composite]
    every = all(v.ndim and len(v) == sizes[0] for v in bounds + numbers)
    if len(sizes) > 1 or every and any(v.ndim == 1 and np.ptp(v) > 0 for v in bounds):
        why = f"numbers of {sizes}" if len(sizes) > 1 else f"numbers and bounds, maybe of channels, of {sizes[0]}"
        raise InputError(f"explainers[{name!r}] has {why} variants: write a list of composites")

    def part(k: int, rule: Any) -> Any:
        def entry(leaf: Any) -> Any:
            if not np.ndim(leaf) or isinstance(rule, _ARRAYS) and not every:
                return leaf
            found = np.asarray(leaf)[k]
            return found if found.ndim else found.item()  # as a person writes a number: it has no dtype

        return jax.tree.map(entry, rule)

    return [Composite([(s, part(k, r)) for s, r in composite.rows]) for k in range(sizes[0])]


_FITTED = (PatternNet, PatternAttribution)  # rules with arrays as large as the parameters
_ARRAYS = (ZBox, *_FITTED)  # rules of which one variant has arrays
