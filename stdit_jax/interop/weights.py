"""Loads weights straight into device arrays, and writes them; both one tensor at a time."""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from stdit_jax.interop import mapping
from stdit_jax.interop.causal3d import COGVIDEOX_VAE
from stdit_jax.interop.image_kl import DIFFUSERS, LDM
from stdit_jax.interop.mapping import CheckpointLayout, Entry, Mismatch, Report
from stdit_jax.interop.open_sora import OPEN_SORA, POSITION_TABLES, STACKS
from stdit_jax.interop.safetensors_io import (
  DTYPES,
  Checkpoint,
  CheckpointError,
  count_non_finite,
  open_checkpoint,
  write_checkpoint,
)
from stdit_jax.interop.t5 import T5, T5_V1_0
from stdit_jax.interop.temporal import OPEN_SORA_VAE

# Our own names, one tensor per layer.
NATIVE = CheckpointLayout("native", rows=(), stacks=STACKS)
LAYOUTS = {layout.name: layout for layout in (NATIVE, OPEN_SORA, DIFFUSERS, LDM, COGVIDEOX_VAE, OPEN_SORA_VAE, T5, T5_V1_0)}


def get_layout(layout: str | CheckpointLayout) -> CheckpointLayout:
  """A layout by its name; ValueError names the allowed ones."""
  if isinstance(layout, CheckpointLayout):
    return layout
  if layout not in LAYOUTS:
    raise ValueError(f"unknown layout {layout!r}; allowed: {', '.join(LAYOUTS)}")
  return LAYOUTS[layout]


def cast(name: str, array: np.ndarray, dtype) -> np.ndarray:
  """Floats in another float type, everything else as it is; CheckpointError if finite values become infinite."""
  if dtype is None or array.dtype == np.dtype(dtype) or not jnp.issubdtype(array.dtype, jnp.floating):
    return array
  with np.errstate(over="ignore", invalid="ignore"):
    result = array.astype(dtype)
  if result.dtype == np.float16 and count_non_finite(result) > count_non_finite(array):
    raise CheckpointError(f"tensor {name!r} has values beyond the range of {np.dtype(dtype).name}; choose bfloat16 or float32")
  return result


class Source:
  """A checkpoint seen through a layout: which name holds which entry, and what doesn't fit (`report`)."""

  def __init__(self, path, layout: CheckpointLayout, tree, config=None, allow_non_finite: bool = False):
    self.checkpoint: Checkpoint = open_checkpoint(path)
    self.layout, self.config, self.allow_non_finite = layout, config, allow_non_finite
    self.entries = mapping.plan(layout, tree)
    infos = self.checkpoint.tensors
    self.prefix = mapping.find_prefix(layout, self.entries, infos)
    self.shapes = {n.removeprefix(self.prefix): i.shape for n, i in infos.items() if n.startswith(self.prefix)}
    self.report = self._compare()

  def name_of(self, entry: Entry) -> str | None:
    return next((name for name in entry.names if name in self.shapes), None)

  def _compare(self) -> Report:
    computed = layout_computed(self.layout, self.config)
    report = Report(len(self.entries))
    known = set(computed)
    for entry in self.entries:
      name = self.name_of(entry)
      known.update(entry.names)
      if name is None:
        report.missing.append(entry.names[0])
      elif (needed := self._needed(entry, self.shapes[name])) is not None:
        report.mis_shaped[name] = (self.shapes[name], needed)
    for name in set(computed) & set(self.shapes) if self.config else ():
      if (needed := computed[name]().shape) != self.shapes[name]:
        report.mis_shaped[name] = (self.shapes[name], needed)
    ignored = [*self.layout.ignored, *(map(re.escape, POSITION_TABLES) if not self.config else ())]
    report.unexpected = [n for n in self.shapes if n not in known and not any(re.fullmatch(p, n) for p in ignored)]
    return report

  def _needed(self, entry: Entry, shape):
    """None if a tensor of this shape fits, otherwise the shape that would."""
    sizes = self.layout.sizes(self.config) if self.config else {}
    try:
      needed = mapping.foreign_shape(entry, sizes)
      return None if needed == shape else needed
    except CheckpointError:  # the axes of a patch are only known with a config; its shape may fit all the same
      try:
        mapping.to_ours(entry, np.broadcast_to(np.zeros((), np.uint8), shape))
        return None
      except Mismatch:
        return entry.shape

  def read(self, entry: Entry) -> np.ndarray:
    """The foreign tensor of an entry. Tied tensors that a file holds twice must be equal."""
    names = [name for name in entry.names if name in self.shapes]
    array = self.checkpoint.read(self.prefix + names[0], self.allow_non_finite)
    for other in names[1:]:
      if self.checkpoint.read(self.prefix + other, True).tobytes() != array.tobytes():
        raise CheckpointError(f"{self.checkpoint.path}: {names[0]!r} and {other!r} should be one tensor but differ")
    return array

  def check(self, strict: bool = True, unexpected: bool = True, numbers: bool = True) -> None:
    """Raises CheckpointError with the whole report unless everything fits, or anything at all where it need not be `strict`;
    and unless `numbers` that follow from the config and stand in the file as well are the same."""
    report = self.report
    nothing = len(report.missing) + len(report.mis_shaped) == report.expected
    if len(report.missing) == report.expected:
      raise CheckpointError(
        f"{self.checkpoint.path} is no file of this model (layout {self.layout.name}): it has none of its {report.expected} "
        f"tensors, the first of which is {report.missing[0]!r}, but {len(self.shapes)} like {next(iter(self.shapes), 'none')!r}"
      )
    if nothing or (strict and (report.missing or report.mis_shaped or (unexpected and report.unexpected))):
      raise CheckpointError(f"{self.checkpoint.path} (layout {self.layout.name}) doesn't fit the model: {report}")
    for name, make in layout_computed(self.layout, self.config).items() if strict and numbers else ():
      if name in self.shapes:
        stored = self.checkpoint.read(self.prefix + name, self.allow_non_finite).astype(np.float32)
        # 1e-2: the tables may have been stored in bfloat16; another scale changes them by far more
        if np.abs(stored - make()).max() > 1e-2:
          there = f" ({', '.join(f'{x:.4g}' for x in stored.flat)})" if stored.size <= 16 else ""
          raise CheckpointError(
            f"{self.checkpoint.path}: {name!r} was made with other numbers{there} than the config's; give the model the same "
            f"(fields.{name} of a configuration, --config of python -m stdit_jax.convert)"
          )


def open_source(path, layouts, tree, config=None, allow_non_finite: bool = False) -> Source:
  """The checkpoint through one layout, by name, or through that of several that fits best."""
  names = layouts if isinstance(layouts, (tuple, list)) else (layouts,)
  sources = [Source(path, get_layout(name), tree, config, allow_non_finite) for name in names]
  return min(sources, key=lambda s: len(s.report.missing) + len(s.report.mis_shaped) + 1e-6 * len(s.report.unexpected))


def layout_computed(layout: CheckpointLayout, config) -> dict:
  return layout.computed(config) if config is not None else {}


def load_variables(
  path,
  layout: str | CheckpointLayout | tuple[str, ...],
  target,
  *,
  config=None,
  strict: bool = True,
  numbers: bool = True,
  shardings=None,
  dtype=None,
  allow_non_finite: bool = False,
  log=print,
):
  """Loads a checkpoint into a tree of device arrays, stacking and sharding each parameter as it is read.

  Host memory beyond the result: one stacked parameter (this process's part of it) and one tensor of the file.

  Args:
    path: file, index or folder.
    layout: name of the layout of the file, see LAYOUTS; of several names, the one that fits best.
    target: tree of jax.ShapeDtypeStruct (our stacked shapes), or of initialised arrays, which a non-strict load keeps
      where the file has nothing that fits.
    config: the model's; only for the sides of a patch and the position tables of STDiT 1.0 to be checked, too.
    strict: raise unless names and shapes agree exactly. Otherwise load what fits, as Open-Sora's `ckpt_utils`: a null
      caption that is too short is filled up with its last row, a longer one is cut, position tables are dropped, and
      the report goes to `log`.
    numbers: raise, too, unless numbers of the config that stand in the file (shift, scale, position tables) are the same.
    shardings: tree like `target` of jax.sharding.Sharding; None: the default device (or each array's own sharding).
    dtype: of all floating-point arrays of the result; None: as in `target`.
    allow_non_finite: accept NaN and infinite values.
  Raises:
    CheckpointError: broken file, or one that doesn't fit (the message lists every name).
  """
  source = open_source(path, layout, target, config, allow_non_finite)
  if not strict:
    _adapt(source)
  source.check(strict, numbers=numbers)
  if not source.report.clean or source.report.adapted:
    log(f"{path}: {source.report}")
  groups = {}
  for entry in source.entries:
    groups.setdefault(entry.path, []).append(entry)
  leaves, treedef = jax.tree.flatten(target)
  placed = treedef.flatten_up_to(shardings) if shardings is not None else [getattr(leaf, "sharding", None) for leaf in leaves]
  result = [_load_leaf(source, leaf, groups[name], s, dtype) for name, leaf, s in zip(mapping.flatten(target), leaves, placed)]
  return treedef.unflatten(result)


def _adapt(source: Source) -> None:
  """Moves what a non-strict load can mend from `mis_shaped` to `adapted`."""
  for entry in source.entries:
    found = source.report.mis_shaped.get(source.name_of(entry), ((), ()))[0]
    if entry.axes == "rows" and found and found[0] and found[1:] == entry.shape[1:]:
      name = source.name_of(entry)
      del source.report.mis_shaped[name]
      change = "filled up with its last row" if found[0] < entry.shape[0] else "cut"
      source.report.adapted.append(f"{name}: {found[0]} rows {change} to {entry.shape[0]}")
  source.report.unexpected = [name for name in source.report.unexpected if name not in POSITION_TABLES]


def _fit_rows(array: np.ndarray, rows: int) -> np.ndarray:
  short = max(rows - len(array), 0)
  return np.concatenate([array[:rows], np.repeat(array[-1:], short, axis=0)]) if short else array[:rows]


def _load_leaf(source: Source, leaf, entries: list[Entry], sharding, dtype) -> jax.Array:
  shape = tuple(leaf.shape)
  dtype = np.dtype(dtype if dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype)
  readable = [(n := source.name_of(e)) is not None and n not in source.report.mis_shaped for e in entries]
  if not all(readable) and isinstance(leaf, jax.ShapeDtypeStruct):
    raise CheckpointError(f"{entries[0].path} is not in the file; a non-strict load needs initialised arrays to keep")
  if not any(readable):
    return leaf if sharding is None else jax.device_put(leaf, sharding)
  sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  regions = {_bounds(index, shape) for index in sharding.addressable_devices_indices_map(shape).values()}
  if all(readable):
    pieces = {region: np.empty([stop - start for start, stop in region], dtype) for region in regions}
  else:
    pieces = {region: np.asarray(leaf)[_slices(region)].astype(dtype) for region in regions}
  for entry, present in zip(entries, readable):
    touched = [r for r in regions if entry.layer is None or r[0][0] <= entry.layer < r[0][1]]
    if not present or not touched:
      continue
    array = source.read(entry)
    array = mapping.to_ours(entry, _fit_rows(array, entry.shape[0]) if entry.axes == "rows" else array)
    for region in touched:
      if entry.layer is None:
        _copy(entry.path, pieces[region], array[_slices(region)])
      else:
        _copy(entry.path, pieces[region][entry.layer - region[0][0]], array[_slices(region[1:])])
  array = jax.make_array_from_callback(shape, sharding, lambda index: pieces[_bounds(index, shape)])
  return array.block_until_ready()  # or host copies of several parameters would wait for their transfer at once


def _bounds(index, shape) -> tuple[tuple[int, int], ...]:
  return tuple(s.indices(size)[:2] for s, size in zip(index, shape))


def _slices(region):
  return tuple(slice(start, stop) for start, stop in region)


def _copy(name, target: np.ndarray, source: np.ndarray) -> None:
  """target[...] = source with a cast."""
  mapping.transpose_into(target, cast(name, source, target.dtype) if target.dtype == np.float16 else source)


def foreign_spec(layout: str | CheckpointLayout, target, config=None) -> dict[str, tuple[int, ...]]:
  """{name: shape} of a file of this layout for a tree of arrays or shapes; open-sora needs the model's `config`, too."""
  layout = get_layout(layout)
  sizes = layout.sizes(config) if config is not None else {}
  spec = {e.names[0]: mapping.foreign_shape(e, sizes) for e in mapping.plan(layout, target)}
  return spec | {name: make().shape for name, make in layout_computed(layout, config).items()}


def export_tensors(layout: str | CheckpointLayout, variables, config=None, dtype=None) -> Iterator[tuple[str, np.ndarray]]:
  """(foreign name, array) for every tensor of a file; one of our parameters is on the host at a time."""
  layout = get_layout(layout)
  sizes = layout.sizes(config) if config is not None else {}
  leaves, path, host = mapping.flatten(variables), None, None
  for entry in mapping.plan(layout, variables):
    if entry.path != path:
      if not getattr(leaves[entry.path], "is_fully_addressable", True):
        raise CheckpointError(f"{entry.path} lies on several processes: gather it, or export from the saved run in one process")
      path, host = entry.path, np.asarray(leaves[entry.path])
    array = host if entry.layer is None else host[entry.layer]
    array = mapping.contiguous(mapping.to_foreign(entry, array, sizes))
    yield entry.names[0], cast(entry.names[0], array, dtype)
  for name, make in layout_computed(layout, config).items():
    yield name, cast(name, make(), dtype)


def _float_dtype(stored, dtype) -> np.dtype:
  return np.dtype(dtype if dtype is not None and jnp.issubdtype(stored, jnp.floating) else stored)


def save_variables(
  path,
  layout: str | CheckpointLayout,
  variables,
  *,
  config=None,
  dtype=None,
  metadata: Mapping[str, str] | None = None,
  max_shard_bytes: int | None = None,
  overwrite: bool = False,
):
  """Writes variables as safetensors in a layout, streamed; see `write_checkpoint` for paths, shards and errors."""
  layout = get_layout(layout)
  shapes = foreign_spec(layout, variables, config)
  stored = {e.names[0]: e.dtype for e in mapping.plan(layout, variables)}
  spec = {name: (shape, _float_dtype(stored.get(name, np.float32), dtype)) for name, shape in shapes.items()}
  tensors = export_tensors(layout, variables, config, dtype)
  options = {"metadata": metadata, "max_shard_bytes": max_shard_bytes, "overwrite": overwrite}
  return write_checkpoint(path, spec, tensors, **options)


def conversion(source: Source, layout: str | CheckpointLayout, tree, dtype=None, config=None):
  """A file in one layout as a file in another, nothing stacked: -> (spec for `write_checkpoint`, iterator of tensors).

  `config`: of the model that is written, which has the shapes of the source's; None: the source's own.
  """
  layout, config = get_layout(layout), config or source.config
  sizes = layout.sizes(config) if config is not None else {}
  pairs = list(zip(source.entries, mapping.plan(layout, tree)))
  infos, spec = source.checkpoint.tensors, {}
  for entry, out in pairs:
    stored = infos[source.prefix + source.name_of(entry)].dtype
    spec[out.names[0]] = mapping.foreign_shape(out, sizes), _float_dtype(DTYPES[stored], dtype)
  computed = layout_computed(layout, config)
  kinds = {kind for _, kind in spec.values()}
  kind = kinds.pop() if len(kinds) == 1 else np.float32  # the file's own precision if it has one
  for name, make in computed.items():
    spec[name] = make().shape, _float_dtype(kind, dtype)

  def tensors():
    for entry, out in pairs:
      array = mapping.contiguous(mapping.to_foreign(out, mapping.to_ours(entry, source.read(entry)), sizes))
      yield out.names[0], cast(out.names[0], array, spec[out.names[0]][1])
    for name, make in computed.items():
      yield name, cast(name, make(), spec[name][1])

  return spec, tensors()


def model_metadata(name: str | None, config) -> dict[str, str]:
  """What our files say about their model, so that it can be built from the file alone."""
  return {"format": "pt", "model": name or "", "config": json.dumps(dataclasses.asdict(config))}
