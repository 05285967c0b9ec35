"""The engine behind the layout tables: rows of (our path, foreign name, kind), read in both directions.

A table is data. One row maps one of our paths to one foreign name:

* `*` in both stands for the layer: our parameters are stacked over depth, foreign ones are one tensor per layer;
* `{name}` in ours matches a word or number and is filled into theirs; `{-name}` counts from the other end;
* the kind names the leaves of a module (MODULES) or the axes of one tensor (AXES).

The axes of a tensor are written `foreign -> ours`, a bracket being one axis of the array, as in einops. Such a line only
moves values, so it is exactly invertible and serves import and export alike.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping

import jax
import numpy as np

from stdit_jax.interop.safetensors_io import CheckpointError

AXES = {
  "same": "",
  "rows": "",  # as same; on a non-strict load the number of rows is adapted
  "linear": "o i -> i o",
  "qkv": "(n h d) i -> i n h d",  # n: query, key, value or key, value
  "qkv_bias": "(n h d) -> n h d",
  "heads": "(h d) i -> i h d",
  "heads_bias": "(h d) -> h d",
  "heads_out": "o (h d) -> h d o",
  "conv": "o i y x -> y x i o",
  "conv1x1": "o i 1 1 -> i o",
  "conv3d": "o i t y x -> t y x i o",
  "conv_frame": "o i y x -> 1 y x i o",
  "patch": "o c t y x -> (t y x c) o",
  "patch2d": "o c y x -> (y x c) o",
}

# Kind of a module -> (our leaf, their leaf, axes). Leaves that a model doesn't have (biases of T5) are never asked for.
MODULES = {
  "linear": (("kernel", "weight", "linear"), ("bias", "bias", "same")),
  "qkv": (("kernel", "weight", "qkv"), ("bias", "bias", "qkv_bias")),
  "heads": (("kernel", "weight", "heads"), ("bias", "bias", "heads_bias")),
  "heads_out": (("kernel", "weight", "heads_out"), ("bias", "bias", "same")),
  "conv": (("kernel", "weight", "conv"), ("bias", "bias", "same")),
  "conv1x1": (("kernel", "weight", "conv1x1"), ("bias", "bias", "same")),
  "conv3d": (("kernel", "weight", "conv3d"), ("bias", "bias", "same")),
  "conv_frame": (("kernel", "weight", "conv_frame"), ("bias", "bias", "same")),
  "patch": (("kernel", "weight", "patch"), ("bias", "bias", "same")),
  "patch2d": (("kernel", "weight", "patch2d"), ("bias", "bias", "same")),
  "norm": (("scale", "weight", "same"), ("bias", "bias", "same")),
}


@dataclasses.dataclass(frozen=True)
class CheckpointLayout:
  """One foreign layout.

  Attributes:
    rows: the table: (our path, foreign name or names, kind). Of several names the first is written, all are read.
      Without rows the names are our own paths.
    stacks: names of our modules whose leaves carry the depth as their first axis.
    prefixes: tried in this order on a file's names; those without the chosen prefix belong to another model.
    ignored: regular expressions of names that may be there and are not read.
    sizes: config -> lengths of axes that our shapes don't tell (the sides of a patch).
    computed: config -> {name: function that makes the array}, for buffers that we don't store.
  """

  name: str
  rows: tuple[tuple, ...]
  stacks: tuple[str, ...] = ("blocks",)
  prefixes: tuple[str, ...] = ("",)
  ignored: tuple[str, ...] = ()
  sizes: Callable[..., dict[str, int]] = lambda config: {}
  computed: Callable[..., dict[str, Callable]] = lambda config: {}

  @functools.cached_property
  def rules(self) -> list[tuple[re.Pattern, str, tuple[str, ...], str]]:
    """(pattern of our paths, the row's own path, foreign templates, axes), one per tensor."""
    rules = []
    for ours, theirs, kind in self.rows:
      theirs = (theirs,) if isinstance(theirs, str) else theirs
      for our_leaf, their_leaf, axes in MODULES.get(kind, ((None, None, kind),)):
        path = f"{ours}/{our_leaf}" if our_leaf else ours
        names = tuple(f"{t}.{their_leaf}" if their_leaf else t for t in theirs)
        parts = re.split(r"\{(\w+)\}", path)
        pattern = "".join(f"(?P<{part}>\\w+)" if i % 2 else re.escape(part) for i, part in enumerate(parts))
        rules.append((re.compile(pattern), path, names, axes))
    return rules


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of a file and where it goes: `path`, at index `layer` if stacked; `shape` and `dtype` are ours, per layer."""

  path: str
  layer: int | None
  names: tuple[str, ...]
  axes: str
  shape: tuple[int, ...]
  dtype: np.dtype


def flatten(tree) -> dict[str, object]:
  """{'params/blocks/mlp/fc1/kernel': leaf}."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {"/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path): leaf for path, leaf in leaves}


def plan(layout: CheckpointLayout, tree) -> list[Entry]:
  """What a file of this layout holds for a tree of arrays or shapes. Raises CheckpointError for a path without a row."""
  leaves = flatten(tree)
  counts = _counts(leaves)
  entries = []
  for path, leaf in leaves.items():
    starred = re.sub(rf"(^|/)({'|'.join(layout.stacks)})/", r"\1\2/*/", path, count=1)
    names, axes = _foreign(layout, starred, counts)
    if "*" not in starred:
      entries.append(Entry(path, None, names, axes, tuple(leaf.shape), np.dtype(leaf.dtype)))
      continue
    for i in range(leaf.shape[0]):
      layer_names = tuple(name.replace("*", str(i)) for name in names)
      entries.append(Entry(path, i, layer_names, axes, tuple(leaf.shape[1:]), np.dtype(leaf.dtype)))
  return entries


def _foreign(layout, path, counts):
  if not layout.rows:
    return (path,), "same"
  for pattern, own, templates, axes in layout.rules:
    if match := pattern.fullmatch(path):
      values = match.groupdict()
      for name, value in match.groupdict().items():
        if value.isdigit():
          siblings = counts[_fill(own[: own.index("{" + name + "}")], values)]
          values["-" + name] = str(siblings - 1 - int(value))
      return tuple(_fill(template, values) for template in templates), axes
  raise CheckpointError(f"the layout {layout.name!r} has no name for our parameter {path!r}; is it a layout of this model?")


def _fill(template, values):
  return re.sub(r"\{(-?\w+)\}", lambda m: values[m[1]], template)


def _counts(paths) -> dict[str, int]:
  """{'params/decoder/up_blocks_': 4}: how many siblings are numbered, for names that count from the other end."""
  counts = {}
  for path in paths:
    for match in re.finditer(r"\d+", path):
      counts[path[: match.start()]] = max(counts.get(path[: match.start()], 0), int(match[0]) + 1)
  return counts


# Axes: a line of AXES bound to shapes and applied to arrays.


class Mismatch(Exception):  # noqa: N818 (never leaves this package)
  """A shape doesn't fit its axes."""


@functools.cache
def _sides(axes: str):
  def groups(text):
    found = re.findall(r"\(([^)]*)\)|(\S+)", text)
    return tuple(tuple(a for a in (inner or single).split() if a != "1") for inner, single in found)

  foreign, ours = AXES[axes].split("->")
  return groups(foreign), groups(ours)


def _bind(groups, shape, lengths):
  """Adds to `lengths` what `shape` tells about the axes; raises Mismatch."""
  if len(groups) != len(shape):
    raise Mismatch
  for group, size in zip(groups, shape):
    unknown = [axis for axis in group if axis not in lengths]
    known = math.prod(lengths[axis] for axis in group if axis in lengths)
    if len(unknown) == 1 and known and size % known == 0:
      lengths[unknown[0]] = size // known
    elif unknown and len(unknown) > 1:
      continue  # not decided yet: the other side's shape tells
    elif unknown or known != size:
      raise Mismatch


def _move(array, source, target, lengths):
  order = [axis for group in source for axis in group]
  array = array.reshape([lengths[axis] for axis in order])
  array = array.transpose([order.index(axis) for group in target for axis in group])
  return array.reshape([math.prod(lengths[axis] for axis in group) for group in target])


def to_ours(entry: Entry, array: np.ndarray) -> np.ndarray:
  """A foreign tensor in our layout (a view where possible). Raises Mismatch."""
  if not AXES[entry.axes]:
    if array.shape != entry.shape:
      raise Mismatch
    return array
  foreign, ours = _sides(entry.axes)
  lengths = {}
  _bind(ours, entry.shape, lengths)
  _bind(foreign, array.shape, lengths)
  _bind(ours, entry.shape, lengths)
  return _move(array, foreign, ours, lengths)


def to_foreign(entry: Entry, array: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
  """The inverse of `to_ours`; `sizes` from `CheckpointLayout.sizes`."""
  if not AXES[entry.axes]:
    return array
  foreign, ours = _sides(entry.axes)
  return _move(array, ours, foreign, _lengths(entry, ours, sizes))


def foreign_shape(entry: Entry, sizes: Mapping[str, int]) -> tuple[int, ...]:
  if not AXES[entry.axes]:
    return entry.shape
  foreign, ours = _sides(entry.axes)
  lengths = _lengths(entry, ours, sizes)
  return tuple(math.prod(lengths[axis] for axis in group) for group in foreign)


def _lengths(entry, ours, sizes):
  lengths = {axis: sizes[axis] for group in ours for axis in group if axis in sizes}
  try:
    _bind(ours, entry.shape, lengths)
    if all(axis in lengths for group in ours for axis in group):
      return lengths
  except Mismatch:
    pass
  raise CheckpointError(f"{entry.path} {list(entry.shape)}: the model's config must tell the axes '{AXES[entry.axes]}'")


def transpose_into(target: np.ndarray, source: np.ndarray) -> None:
  """target[...] = source, in matrices and bands of 64 columns, so that cache lines are used whole: 4 times as fast."""
  if source.ndim < 2 or source.size < 1 << 16 or source.strides[-1] == source.itemsize:
    target[...] = source
  elif source.ndim > 2:
    axis = 1 if source.strides[0] == source.itemsize else 0
    for part, whole in zip(np.moveaxis(source, axis, 0), np.moveaxis(target, axis, 0)):
      transpose_into(whole, part)
  else:
    for start in range(0, source.shape[1], 64):
      target[:, start : start + 64] = source[:, start : start + 64]


def contiguous(array: np.ndarray) -> np.ndarray:
  """The array itself, or a copy in C order."""
  if array.flags.c_contiguous:
    return array
  copy = np.empty(array.shape, array.dtype)
  transpose_into(copy, array)
  return copy


# Reports: what a file has against what a model needs.


def collapse(names) -> list[str]:
  """Names that differ in their first number only, as one line: `blocks.{0..27}.attn.qkv.weight`."""
  groups = {}
  for name in names:
    match = re.search(r"(?<![A-Za-z0-9_])\d+(?=[./])", name)
    key = (name[: match.start()], name[match.end() :]) if match else (name, None)
    groups.setdefault(key, []).append(int(match[0]) if match else -1)
  lines = []
  for (before, after), numbers in groups.items():
    if after is None:
      lines.append(before)
      continue
    numbers = sorted(numbers)
    run = numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 2
    text = f"{numbers[0]}..{numbers[-1]}" if run else ",".join(map(str, numbers))
    lines.append(f"{before}{text if len(numbers) == 1 else '{' + text + '}'}{after}")
  return lines


@dataclasses.dataclass
class Report:
  """What doesn't fit: `missing` and `unexpected` names, `mis_shaped` {name: (shape in the file, shape needed)}.

  `adapted` names what a non-strict load changed to make it fit.
  """

  expected: int
  missing: list[str] = dataclasses.field(default_factory=list)
  unexpected: list[str] = dataclasses.field(default_factory=list)
  mis_shaped: dict[str, tuple] = dataclasses.field(default_factory=dict)
  adapted: list[str] = dataclasses.field(default_factory=list)

  @property
  def clean(self) -> bool:
    return not (self.missing or self.unexpected or self.mis_shaped)

  def __str__(self):
    found = self.expected - len(self.missing) - len(self.mis_shaped)
    counts = f"; {len(self.missing)} missing, {len(self.unexpected)} unexpected, {len(self.mis_shaped)} mis-shaped"
    lines = [f"{found} of {self.expected} tensors fit{'' if self.clean else counts}"]
    shapes = {}
    for name, pair in self.mis_shaped.items():
      shapes.setdefault(pair, []).append(name)
    mis_shaped = [
      f"{line}: {list(found)}, needed {list(needed)}" for (found, needed), names in shapes.items() for line in collapse(names)
    ]
    for title, names in (
      ("missing", collapse(self.missing)),
      ("unexpected", collapse(self.unexpected)),
      ("mis-shaped", mis_shaped),
      ("adapted", self.adapted),
    ):
      lines += [f"{title}:", *(f"  {name}" for name in names)] if names else []
    return "\n".join(lines)


def find_prefix(layout: CheckpointLayout, entries: list[Entry], names) -> str:
  """The first of the layout's prefixes under which the file has any name that is asked for."""
  wanted = [name for entry in entries for name in entry.names]
  return next((p for p in layout.prefixes if any(p + name in names for name in wanted)), layout.prefixes[-1])
