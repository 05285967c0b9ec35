"""Reads weights straight into device arrays and writes them as safetensors, one tensor at a time."""

import contextlib
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from data import paths
from stdit_jax import fields
from stdit_jax.interop import mapping, safetensors_io
from stdit_jax.interop.causal3d import COGVIDEOX_VAE
from stdit_jax.interop.image_kl import DIFFUSERS, LDM
from stdit_jax.interop.mapping import CheckpointLayout, Entry, Report
from stdit_jax.interop.open_sora import OPEN_SORA, STACKS
from stdit_jax.interop.safetensors_io import Checkpoint, CheckpointError, Spec, open_checkpoint, write_checkpoint
from stdit_jax.interop.t5 import T5, T5_V1_0
from stdit_jax.interop.temporal import OPEN_SORA_VAE

NATIVE = CheckpointLayout("native", rows=(), stacks=STACKS)  # our own names, one tensor per layer
LAYOUTS = {layout.name: layout for layout in (NATIVE, OPEN_SORA, DIFFUSERS, LDM, COGVIDEOX_VAE, OPEN_SORA_VAE, T5, T5_V1_0)}

LayoutLike = str | CheckpointLayout  # a layout or its name in LAYOUTS
Contents = tuple[Spec, Iterator[tuple[str, np.ndarray]]]  # of a file: what `write_checkpoint` takes


def get_layout(layout: LayoutLike) -> CheckpointLayout:
  """A layout by its name; a layout object is returned as it is. Raises ValueError for an unknown name."""
  return layout if isinstance(layout, CheckpointLayout) else fields.choose(LAYOUTS, layout, "layout")


def cast(name: str, array: np.ndarray, dtype: DTypeLike | None) -> np.ndarray:
  """Floats in another float type, other types unchanged. Raises CheckpointError if float16 makes finite values infinite."""
  if dtype is None or array.dtype == np.dtype(dtype) or not jnp.issubdtype(array.dtype, jnp.floating):
    return array
  with np.errstate(over="ignore", invalid="ignore"):
    result = array.astype(dtype)
  if result.dtype == np.float16 and safetensors_io.count_non_finite(result) > safetensors_io.count_non_finite(array):
    raise CheckpointError(f"tensor {name!r} has values beyond the range of {np.dtype(dtype).name}; choose bfloat16 or float32")
  return result


class Source:
  """A checkpoint seen through a layout: which name holds which entry, and the differences (`report`)."""

  def __init__(self, path, layout: CheckpointLayout, tree: Any, config: Any = None, allow_non_finite: bool = False):
    self.checkpoint: Checkpoint = open_checkpoint(path)
    self.layout, self.config, self.allow_non_finite = layout, config, allow_non_finite
    self.sizes, self.buffers = _of_config(layout, config)
    self.entries = mapping.plan(layout, tree)
    infos = self.checkpoint.tensors
    wanted = [name for entry in self.entries for name in entry.names]
    self.prefix = next((p for p in layout.prefixes if any(p + name in infos for name in wanted)), layout.prefixes[-1])
    self.shapes = {n.removeprefix(self.prefix): i.shape for n, i in infos.items() if n.startswith(self.prefix)}
    self.report = self._compare()

  def name_of(self, entry: Entry) -> str:
    """The name under which the file has this entry, or ""."""
    return next((name for name in entry.names if name in self.shapes), "")

  def _compare(self) -> Report:
    report, known = Report(len(self.entries)), set(self.buffers)
    for entry in self.entries:
      name = self.name_of(entry)
      known.update(entry.names)
      if not name:
        report.missing.append(entry.names[0])
      elif (needed := self._needed(entry, self.shapes[name])) is not None:
        report.mis_shaped[name] = (self.shapes[name], needed)
    for name, buffer in self.buffers.items():
      if self.shapes.get(name, buffer.shape) != buffer.shape:
        report.mis_shaped[name] = (self.shapes[name], buffer.shape)
    ignored = [*self.layout.ignored, *(map(re.escape, self.layout.droppable) if not self.config else ())]
    report.unexpected = [n for n in self.shapes if n not in known and not any(re.fullmatch(p, n) for p in ignored)]
    return report

  def _needed(self, entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """None if a tensor of this shape fits, otherwise the shape that the file needs. Without a config it may be our shape."""
    with contextlib.suppress(CheckpointError):
      needed = mapping.foreign_shape(entry, self.sizes)
      return None if needed == shape else needed
    with contextlib.suppress(CheckpointError):  # without a config, any sides of a patch fit whose product is ours
      mapping.to_ours(entry, np.broadcast_to(np.uint8(0), shape))
      return None
    return entry.shape

  def read(self, entry: Entry) -> np.ndarray:
    """The foreign tensor of an entry. Raises CheckpointError if the file has it under two names with other values."""
    names = [name for name in entry.names if name in self.shapes]
    array = self.checkpoint.read(self.prefix + names[0], self.allow_non_finite)
    for other in names[1:]:
      if self.checkpoint.read(self.prefix + other, True).tobytes() != array.tobytes():
        raise CheckpointError(f"{self.checkpoint.path}: {names[0]!r} and {other!r} should be one tensor but differ")
    return array

  def check(self, strict: bool = True, unexpected: bool = True, numbers: bool = True) -> None:
    """Compares the file with the model.

    Args:
      strict: every tensor must fit. Otherwise one is enough.
      unexpected: with `strict`, refuse tensors that the model does not have.
      numbers: with `strict`, computed buffers in the file must equal the buffers computed from the config.
    Raises:
      CheckpointError: the file does not fit; the message is the whole report.
    """
    report, path = self.report, self.checkpoint.path
    if len(report.missing) == report.expected:
      raise CheckpointError(
        f"{path} does not fit this model (layout {self.layout.name}). The model needs {report.expected} tensors such as "
        f"{report.missing[0]!r}; the file has {len(self.shapes)} such as {next(iter(self.shapes), 'none')!r}. "
        "Give another layout or model."
      )
    nothing = len(report.missing) + len(report.mis_shaped) == report.expected
    if nothing or (strict and (report.missing or report.mis_shaped or (unexpected and report.unexpected))):
      raise CheckpointError(f"{path} (layout {self.layout.name}) doesn't fit the model: {report}")
    for name in [name for name in self.buffers if strict and numbers and name in self.shapes]:
      stored = self.checkpoint.read(self.prefix + name, self.allow_non_finite).astype(np.float32)
      # 1e-2: a file may store a table in bfloat16. Another scale changes the table by far more.
      if np.abs(stored - self.buffers[name]).max() > 1e-2:
        values = f" ({', '.join(f'{x:.4g}' for x in stored.flat)})" if stored.size <= 16 else ""
        raise CheckpointError(
          f"{self.checkpoint.path}: {name!r}{values} differs from the buffer that the config gives. Give the model the same "
          f"numbers (fields.{name} of a configuration, --config of python -m stdit_jax.convert)."
        )


def open_source(
  path: paths.Path, layouts: LayoutLike | Sequence[LayoutLike], tree: Any, config: Any = None, allow_non_finite: bool = False
) -> Source:
  """Opens a checkpoint with the layout that has the fewest differences, or with the only layout."""
  several = (layouts,) if isinstance(layouts, LayoutLike) else layouts
  sources = [Source(path, get_layout(layout), tree, config, allow_non_finite) for layout in several]
  return min(sources, key=lambda s: len(s.report.missing) + len(s.report.mis_shaped) + 1e-6 * len(s.report.unexpected))


def _of_config(layout: CheckpointLayout, config: Any) -> tuple[dict, dict]:
  """(`sizes`, `computed`) of a layout for a config; both are empty without a config."""
  return ({}, {}) if config is None else (layout.sizes(config), layout.computed(config))


def load_variables(
  path: paths.Path, layout: LayoutLike | Sequence[LayoutLike], target: Any, *, config: Any = None, strict: bool = True,
  numbers: bool = True, shardings: Any = None, log: Callable[[str], None] = print,
) -> Any:  # fmt: skip
  """Loads a checkpoint into a tree of device arrays; each parameter is stacked and sharded as it is read.

  Host memory beyond the result: this process's part of one stacked parameter, and one tensor of the file.

  Args:
    path: file, index or folder.
    layout: the layout of the file, or several of which the best one is chosen.
    target: tree of jax.ShapeDtypeStruct (our stacked shapes), or of initialised arrays. A non-strict load keeps the initial
      array of each parameter that the file lacks.
    config: the config of the model. It tells the sides of a patch and the values of computed buffers.
    strict: raise unless names and shapes agree exactly. A non-strict load loads what fits, like Open-Sora's `ckpt_utils`:
      it repeats the last row of a null caption that is too short, cuts one that is too long, skips the layout's
      `droppable` tensors, and passes the report to `log`.
    numbers: raise if computed buffers of the file (shift, scale, position tables) differ from the config's.
    shardings: tree like `target` of jax.sharding.Sharding. None: the default device, or the sharding of each array.
  Raises:
    CheckpointError: the file is broken or does not fit. The message lists every name.
  """
  source = open_source(path, layout, target, config)
  if not strict:
    _adapt(source)
  source.check(strict, numbers=numbers)
  if not source.report.clean or source.report.adapted:
    log(f"{path}: {source.report}")
  groups = [list(entries) for _, entries in itertools.groupby(source.entries, lambda entry: entry.path)]
  leaves, treedef = jax.tree.flatten(target)
  placed = treedef.flatten_up_to(shardings) if shardings is not None else [getattr(leaf, "sharding", None) for leaf in leaves]
  return treedef.unflatten(_load_leaf(source, *each) for each in zip(leaves, groups, placed, strict=True))


def _adapt(source: Source) -> None:
  """Moves the differences that a non-strict load resolves from `mis_shaped` and `unexpected` to `adapted`."""
  report = source.report
  for entry in source.entries:
    name = source.name_of(entry)
    found, _ = report.mis_shaped.get(name, ((), ()))
    if entry.axes == "rows" and found and found[0] and found[1:] == entry.shape[1:]:
      del report.mis_shaped[name]
      change = "filled up with its last row" if found[0] < entry.shape[0] else "cut"
      report.adapted.append(f"{name}: {found[0]} rows {change} to {entry.shape[0]}")
  report.unexpected = [name for name in report.unexpected if name not in source.layout.droppable]


def _load_leaf(source: Source, leaf: Any, entries: list[Entry], sharding: jax.sharding.Sharding | None) -> jax.Array:
  """One parameter. `entries`: its tensors in the file, one per layer if it is stacked."""
  shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
  readable = [(name := source.name_of(e)) and name not in source.report.mis_shaped for e in entries]
  if not all(readable) and isinstance(leaf, jax.ShapeDtypeStruct):
    problem = f"{entries[0].path} is not in the file, or not whole, or has another shape there"
    raise CheckpointError(f"{problem}; a non-strict load needs initialised arrays to keep their values")
  if not any(readable):
    return leaf if sharding is None else jax.device_put(leaf, sharding)
  sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  regions = {_bounds(index, shape) for index in sharding.addressable_devices_indices_map(shape).values()}
  if all(readable):
    pieces = {region: np.empty([stop - start for start, stop in region], dtype) for region in regions}
  else:
    pieces = {region: np.array(leaf)[_slices(region)] for region in regions}
  for entry, present in zip(entries, readable):
    if present:
      _read_into(pieces, source, entry)
  array = jax.make_array_from_callback(shape, sharding, lambda index: pieces[_bounds(index, shape)])
  return array.block_until_ready()  # otherwise host copies of several parameters would wait for their transfer at once


def _read_into(pieces: dict[tuple, np.ndarray], source: Source, entry: Entry) -> None:
  """Copies the tensor of an entry into the pieces {bounds: array} of its parameter; reads nothing if no piece needs it."""
  stacked = entry.layer is not None
  touched = [bounds for bounds in pieces if not stacked or bounds[0][0] <= entry.layer < bounds[0][1]]
  if not touched:
    return
  array = source.read(entry)
  if entry.axes == "rows":  # repeats the last row, or cuts
    array = array[np.minimum(np.arange(entry.shape[0]), len(array) - 1)]
  array = mapping.to_ours(entry, array)
  for bounds in touched:
    place = pieces[bounds][entry.layer - bounds[0][0]] if stacked else pieces[bounds]
    part = array[_slices(bounds[1:] if stacked else bounds)]
    mapping.transpose_into(place, cast(entry.path, part, place.dtype) if place.dtype == np.float16 else part)


def _bounds(index, shape) -> tuple[tuple[int, int], ...]:
  return tuple(s.indices(size)[:2] for s, size in zip(index, shape))


def _slices(region) -> tuple[slice, ...]:
  return tuple(slice(start, stop) for start, stop in region)


def foreign_spec(layout: LayoutLike, target: Any, config: Any = None) -> dict[str, tuple[int, ...]]:
  """{name: shape} of a file of this layout for a tree of arrays or shapes. Layouts with a patch need the `config`."""
  return {name: shape for name, (shape, _) in _export(layout, target, config, None)[0].items()}


def export_tensors(layout: LayoutLike, variables: Any, config: Any = None) -> Iterator[tuple[str, np.ndarray]]:
  """(foreign name, array) of every tensor of a file; one of our parameters is on the host at a time."""
  return _export(layout, variables, config, None)[1]


def _export(layout: LayoutLike, variables: Any, config: Any, dtype) -> Contents:
  leaves = mapping.flatten(variables)

  @functools.lru_cache(maxsize=1)
  def on_host(path):
    if not getattr(leaves[path], "is_fully_addressable", True):
      raise CheckpointError(f"{path} lies on several processes: gather it, or export from the saved run in one process")
    return np.asarray(leaves[path])

  def read(entry):
    array = on_host(entry.path)
    return array if entry.layer is None else array[entry.layer]

  return _contents(get_layout(layout), variables, config, dtype, lambda entry: entry.dtype, read)


def _contents(
  layout: CheckpointLayout, tree: Any, config: Any, dtype, stored: Callable, read: Callable, computed_dtype: Any = np.float32
) -> Contents:
  """The tensors of a file.

  Args:
    dtype: of all floating-point tensors; None: each has its `stored` dtype.
    stored, read: functions of an entry that return its dtype, and its array in our layout.
    computed_dtype: of the computed buffers if `dtype` is None.
  """
  sizes, computed = _of_config(layout, config)
  entries = mapping.plan(layout, tree)
  spec = {e.names[0]: (mapping.foreign_shape(e, sizes), _float_dtype(stored(e), dtype)) for e in entries}
  spec |= {name: (array.shape, _float_dtype(computed_dtype, dtype)) for name, array in computed.items()}

  def tensors():
    for entry in entries:
      name, array = entry.names[0], mapping.contiguous(mapping.to_foreign(entry, read(entry), sizes))
      yield name, cast(name, array, spec[name][1])
    for name, array in computed.items():
      yield name, cast(name, array, spec[name][1])

  return spec, tensors()


def _float_dtype(stored, dtype) -> np.dtype:
  return np.dtype(dtype if dtype is not None and jnp.issubdtype(stored, jnp.floating) else stored)


def save_variables(
  path: paths.Path, layout: LayoutLike, variables: Any, *, config: Any = None, dtype: DTypeLike | None = None, **options: Any
) -> list[Path]:
  """Streams variables into safetensors. `write_checkpoint` describes path, `options`, the result and errors."""
  return write_checkpoint(path, *_export(layout, variables, config, dtype), **options)


def conversion(source: Source, layout: LayoutLike, tree: Any, dtype: DTypeLike | None = None, config: Any = None) -> Contents:
  """The contents of a file in another layout. Each tensor is converted alone.

  Args:
    config: config of the written model. It must have the shapes of the source. None: the config of the source.
  """
  infos, entries = source.checkpoint.tensors, {(entry.path, entry.layer): entry for entry in source.entries}

  def origin(entry):
    return entries[entry.path, entry.layer]

  def stored(entry):
    return safetensors_io.DTYPES[infos[source.prefix + source.name_of(origin(entry))].dtype]

  def read(entry):
    return mapping.to_ours(origin(entry), source.read(origin(entry)))

  kinds = {_float_dtype(stored(entry), dtype) for entry in source.entries}
  computed_dtype = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
  return _contents(get_layout(layout), tree, config or source.config, dtype, stored, read, computed_dtype)


def model_metadata(name: str | None, config: Any) -> dict[str, str]:
  """The metadata of our files: the model's name and config, so that the file alone is enough to build it."""
  return {"format": "pt", "model": name or "", "config": json.dumps(dataclasses.asdict(config))}
