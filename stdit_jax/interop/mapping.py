"""Checkpoint layouts as tables of rows (our path, foreign name, kind), which serve import and export.

One row maps one of our paths to one foreign name:

* `*` stands for the layer. Our parameters are stacked over depth; a foreign file has one tensor per layer.
* `{name}` in our path matches a word or number and is filled into the foreign name. `{-name}` is its index from the end.
* The kind names the leaves of a module (MODULES) or the axes of one tensor (AXES).

Axes are einops patterns, `foreign -> ours`. They only move values, so each one is exactly invertible.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import einops
import jax
import numpy as np

from stdit_jax.interop.safetensors_io import CheckpointError
from stdit_jax.parallel.shardings import path_name

AXES = {
  "same": "",
  "rows": "",  # like same, but a non-strict load adapts the number of rows
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

# Kind of a module -> (our leaf, foreign leaf, axes). A model may lack leaves: T5 has no biases.
MODULES = {
  kind: (("kernel", "weight", kind), ("bias", "bias", f"{kind}_bias" if f"{kind}_bias" in AXES else "same"))
  for kind in AXES.keys() - {"same", "rows", "qkv_bias", "heads_bias"}
} | {"norm": (("scale", "weight", "same"), ("bias", "bias", "same"))}


@dataclasses.dataclass(frozen=True)
class CheckpointLayout:
  """The names and axes of one kind of checkpoint file.

  Attributes:
    rows: the table. A row may list several foreign names: the first is written, all are read. Without rows a file has
      our own names.
    stacks: names of our modules whose leaves have the depth as their first axis.
    prefixes: prefixes of the names in a file, tried in this order. Names with another prefix belong to another model.
    ignored: regular expressions of names that a file may have and that are not read.
    sizes: config -> {axis: length} for foreign axes that we merge into one axis, such as the sides of a patch.
    computed: config -> {name: array}, buffers that we do not store.
    droppable: computed buffers that may be skipped. A load skips them if it has no config, or is not strict.
  """

  name: str
  rows: tuple[tuple, ...]
  stacks: tuple[str, ...] = ("blocks",)
  prefixes: tuple[str, ...] = ("",)
  ignored: tuple[str, ...] = ()
  sizes: Callable[..., dict[str, int]] = lambda config: {}
  computed: Callable[..., dict[str, np.ndarray]] = lambda config: {}
  droppable: tuple[str, ...] = ()

  @functools.cached_property
  def rules(self) -> list[tuple[re.Pattern[str], str, tuple[str, ...], str]]:
    """(pattern of our paths, our path, foreign templates, axes) of each tensor."""
    rules = []
    for ours, theirs, kind in self.rows:
      theirs = (theirs,) if isinstance(theirs, str) else theirs
      for our_leaf, their_leaf, axes in MODULES.get(kind, (("", "", kind),)):
        path = f"{ours}/{our_leaf}".rstrip("/")
        names = tuple(f"{name}.{their_leaf}".rstrip(".") for name in theirs)
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\w+)", re.escape(path))
        rules.append((re.compile(pattern), path, names, axes))
    return rules


def same_path(name: str) -> str:
  """Our path for a name of a model whose hierarchy we share: `up_blocks.0.conv` -> `up_blocks_0/conv`."""
  return re.sub(r"\.(?=[{\d])", "_", name).replace(".", "/")


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of a file and its place in our tree."""

  path: str  # our parameter
  layer: int | None  # index into its first axis, None if it is not stacked
  names: tuple[str, ...]  # in the file
  axes: str  # key of AXES
  shape: tuple[int, ...]  # of our parameter, without the depth
  dtype: np.dtype  # of our parameter


def flatten(tree: Any) -> dict[str, Any]:
  """Leaves by path: `{"params/blocks/mlp/fc1/kernel": leaf}`."""
  return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def plan(layout: CheckpointLayout, tree: Any) -> list[Entry]:
  """The tensors that a file of this layout has for a tree of arrays or shapes.

  Raises CheckpointError for a path without a row.
  """
  leaves = flatten(tree)
  counts = _counts(leaves)
  entries = []
  for path, leaf in leaves.items():
    starred = re.sub(rf"(^|/)({'|'.join(layout.stacks)})/", r"\1\2/*/", path, count=1)
    names, axes = _foreign(layout, starred, counts)
    stacked = "*" in starred
    for layer in range(leaf.shape[0]) if stacked else (None,):
      shape = tuple(leaf.shape[1:] if stacked else leaf.shape)
      entries.append(Entry(path, layer, tuple(n.replace("*", str(layer)) for n in names), axes, shape, np.dtype(leaf.dtype)))
  return entries


def _foreign(layout: CheckpointLayout, path: str, counts: Mapping[str, int]) -> tuple[tuple[str, ...], str]:
  """(foreign names, axes) of one of our paths."""
  if not layout.rows:
    return (path,), "same"
  for pattern, own, templates, axes in layout.rules:
    if match := pattern.fullmatch(path):
      values = match.groupdict()
      for name, value in match.groupdict().items():
        if value.isdigit():
          # The text before the number is the key of `_counts`.
          siblings = counts[_fill(own[: own.index("{" + name + "}")], values)]
          values["-" + name] = str(siblings - 1 - int(value))
      return tuple(_fill(template, values) for template in templates), axes
  raise CheckpointError(f"the layout {layout.name!r} has no name for our parameter {path!r}. Choose a layout of this model.")


def _fill(template, values):
  return re.sub(r"\{(-?\w+)\}", lambda m: values[m[1]], template)


def _counts(paths) -> dict[str, int]:
  """Number of siblings for each numbered name: `{"params/decoder/up_blocks_": 4}`. `{-name}` needs this number."""
  counts = {}
  for path in paths:
    for match in re.finditer(r"\d+", path):
      counts[path[: match.start()]] = max(counts.get(path[: match.start()], 0), int(match[0]) + 1)
  return counts


# Functions that move the axes of an array as AXES says.


def to_ours(entry: Entry, array: np.ndarray) -> np.ndarray:
  """A foreign tensor in our layout, a view where possible. Raises CheckpointError if the shapes do not agree."""
  if pattern := AXES[entry.axes]:
    groups = re.findall(r"\(.*?\)|\w+", pattern.split("->")[1])
    lengths = {axis: size for axis, size in zip(groups, entry.shape) if axis.isalpha()}
    try:
      array = einops.rearrange(array, pattern, **lengths)
    except einops.EinopsError:
      raise CheckpointError(f"{entry.names[0]!r}: {list(array.shape)} does not fit the axes '{pattern}'") from None
  if array.shape != entry.shape:
    raise CheckpointError(f"{entry.names[0]!r}: {list(array.shape)} in our layout, but the model needs {list(entry.shape)}")
  return array


def to_foreign(entry: Entry, array: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
  """The inverse of `to_ours`.

  Args:
    sizes: {axis: length} for foreign axes that we merge into one axis, from `CheckpointLayout.sizes`.
  """
  if not (pattern := AXES[entry.axes]):
    return array
  foreign, ours = pattern.split(" -> ")
  combined = re.findall(r"\w+", "".join(re.findall(r"\(.*?\)", ours)))
  try:
    return einops.rearrange(array, f"{ours} -> {foreign}", **{axis: sizes[axis] for axis in combined if axis in sizes})
  except einops.EinopsError:
    raise CheckpointError(
      f"{entry.path} {list(array.shape)} can't be split into the axes '{pattern}'. Give the config of the model."
    ) from None


def foreign_shape(entry: Entry, sizes: Mapping[str, int]) -> tuple[int, ...]:
  """The shape of the foreign tensor; nothing is allocated."""
  return to_foreign(entry, np.broadcast_to(np.uint8(0), entry.shape), sizes).shape


def transpose_into(target: np.ndarray, source: np.ndarray) -> None:
  """target[...] = source, 4 times as fast (measured): bands of 64 columns use whole cache lines."""
  if source.ndim < 2 or source.size < 1 << 16 or source.strides[-1] == source.itemsize:
    target[...] = source
  elif source.ndim > 2:
    axis = 1 if source.strides[0] == source.itemsize else 0  # an axis along which the source is not contiguous
    for target_part, source_part in zip(np.moveaxis(target, axis, 0), np.moveaxis(source, axis, 0)):
      transpose_into(target_part, source_part)
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


# Reports: differences between a file and a model.


def collapse(names: Iterable[str]) -> list[str]:
  """Joins names that differ only in their first number: `blocks.{0..27}.attn.qkv.weight`."""
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
  """The differences between a file and a model."""

  expected: int  # number of tensors of the model
  missing: list[str] = dataclasses.field(default_factory=list)  # names that only the model has
  unexpected: list[str] = dataclasses.field(default_factory=list)  # names that only the file has
  mis_shaped: dict[str, tuple] = dataclasses.field(default_factory=dict)  # {name: (shape in the file, shape of the model)}
  adapted: list[str] = dataclasses.field(default_factory=list)  # changes that a non-strict load made, one line each

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
    differences = {"missing": collapse(self.missing), "unexpected": collapse(self.unexpected), "mis-shaped": mis_shaped}
    for title, names in {**differences, "adapted": self.adapted}.items():
      lines += [f"{title}:", *(f"  {name}" for name in names)] if names else []
    return "\n".join(lines)
