"""Reads and writes safetensors files and sharded folders, one tensor at a time.

A file is an unsigned 64-bit little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}` and the
raw little-endian data (https://github.com/huggingface/safetensors, "Format"). Files come from strangers, so every value
of a header is checked against the size of the file before use.

The safetensors library is not used, for four reasons. It reads no buckets. Its writer needs all tensors in memory at once.
It accepts names with control characters and names that occur twice. It reads at 1 GB/s where this module reads at 4 GB/s
(measured with 8 bfloat16 tensors of 32 MiB in the page cache, 2 CPU cores).
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from data import paths

DTYPES = {
  "BOOL": np.dtype(np.bool_),
  "U8": np.dtype("u1"),
  "I8": np.dtype("i1"),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "U16": np.dtype("<u2"),
  "I16": np.dtype("<i2"),
  "F16": np.dtype("<f2"),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "U32": np.dtype("<u4"),
  "I32": np.dtype("<i4"),
  "F32": np.dtype("<f4"),
  "U64": np.dtype("<u8"),
  "I64": np.dtype("<i8"),
  "F64": np.dtype("<f8"),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
INDEX_SUFFIX = ".safetensors.index.json"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
# A float is infinite or NaN exactly when all exponent bits are set; comparing bits is faster than isfinite on bfloat16.
_EXPONENT_BITS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF << 52)}

_PICKLE_HELP = """{path}: pickle files can run any code when opened and are not read. Make a safetensors file of it in Python:
  import torch
  from safetensors.torch import save_file
  weights = torch.load({name!r}, map_location="cpu", weights_only=True)
  for key in ("state_dict", "model", "module", "ema"):  # some files wrap the weights
    weights = weights[key] if isinstance(weights.get(key), dict) else weights
  # clone() gives tied tensors (one memory, several names) memory of their own
  save_file({{k: v.clone().contiguous() for k, v in weights.items() if torch.is_tensor(v)}}, {target!r})"""

Spec = Mapping[str, tuple[tuple[int, ...], np.dtype]]  # {name: (shape, dtype)}


class CheckpointError(ValueError):
  """A weights file is broken, of a kind that is not read, or of another model."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
  """The place of one tensor: bytes `start` to `stop` of `file`."""

  dtype: str
  shape: tuple[int, ...]
  file: str
  start: int
  stop: int


def refuse_pickle(path) -> None:
  """Raises CheckpointError if `path` is named like a pickle; the message has the lines of Python that convert it."""
  name = os.path.basename(str(path))
  stem, ending = os.path.splitext(name)
  if ending.lower() in PICKLES:
    raise CheckpointError(_PICKLE_HELP.format(path=path, name=name, target=f"{stem}.safetensors"))


# Reading.


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  result = {}
  for name, value in pairs:
    if name in result:
      raise CheckpointError(f"the JSON names {name!r} more than once")
    result[name] = value
  return result


def _parse_json(raw: bytes) -> dict:
  if raw[:1] != b"{":
    raise CheckpointError("not valid JSON: it must start with '{'")
  try:
    return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
  except CheckpointError:
    raise
  except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, integers of absurd length
    raise CheckpointError(f"not valid JSON ({str(error)[:80]})") from None


def _is_count(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _tensor_info(file: str, name: str, entry: Any, data_start: int, data_bytes: int) -> TensorInfo:
  """One entry of a header, checked. Raises CheckpointError."""

  def need(condition, problem):
    if not condition:
      raise CheckpointError(f"tensor {name!r}: {problem}")

  keys = {"dtype", "shape", "data_offsets"}
  need(isinstance(entry, dict) and entry.keys() == keys, "the entry needs exactly dtype, shape and data_offsets")
  need(name.isprintable(), "the name has characters that can't be printed")  # messages print names on terminals
  dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
  need(isinstance(dtype, str) and dtype in DTYPES, f"unknown dtype {repr(dtype)[:60]}; allowed: {', '.join(DTYPES)}")
  size = DTYPES[dtype].itemsize
  # NumPy counts an empty side as 1 when it limits the bytes of an array.
  fits = isinstance(shape, list) and len(shape) <= 32 and all(map(_is_count, shape))
  fits = fits and _is_count(size * math.prod(max(side, 1) for side in shape))
  need(fits, f"the shape {str(shape)[:60]} is not a list of whole numbers of at most 32 sides and 2^63 bytes")
  fits = isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_count, offsets)) and offsets[0] <= offsets[1]
  need(fits, f"the offsets {str(offsets)[:60]} are not [start, stop]")
  start, stop = offsets
  need(stop <= data_bytes, f"its data would end at byte {stop:,} but there are only {data_bytes:,}; is the file cut short?")
  needed = math.prod(shape) * size
  need(needed == stop - start, f"{dtype} {shape} needs {needed:,} bytes, the header gives {stop - start:,}")
  return TensorInfo(dtype, tuple(shape), file, data_start + start, data_start + stop)


def _parse_header(path: str, file, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
  """The tensors and the metadata of an open file of `size` bytes, checked."""
  start = file.read(8)
  if len(start) < 8:
    raise CheckpointError(f"only {size} bytes: not a safetensors file")
  length = int.from_bytes(start, "little")
  if length > min(size - 8, MAX_HEADER_BYTES):
    looks = " (it looks like a pickle or zip file under another name)" if start[:2] in (b"PK", b"\x80\x02") else ""
    raise CheckpointError(
      f"the header should have {length:,} bytes, but the file has {size:,} (limit {MAX_HEADER_BYTES:,}): "
      f"cut short, or not a safetensors file{looks}"
    )
  header = _parse_json(file.read(length))
  metadata = header.pop("__metadata__", {})
  if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
    raise CheckpointError("__metadata__ must map strings to strings")
  position = 8 + length
  tensors = {name: _tensor_info(path, name, entry, position, size - position) for name, entry in header.items()}
  for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
    if info.start != position:
      raise CheckpointError(f"tensor {name!r}: its data {'overlaps another' if info.start < position else 'leaves a hole'}")
    position = info.stop
  if position != size:
    raise CheckpointError(f"{size - position:,} bytes at the end belong to no tensor")
  return tensors, metadata


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """The tensors of one file, or of all files of an index. Made by `open_checkpoint`.

  Attributes:
    tensors: {name: TensorInfo}.
    metadata: of the first file.
  """

  path: str
  tensors: dict[str, TensorInfo]
  metadata: dict[str, str]

  def read(self, name: str, allow_non_finite: bool = False) -> np.ndarray:
    """A fresh array in the stored dtype. Raises CheckpointError for NaN and infinite values unless they are allowed."""
    info = self.tensors[name]
    array = np.empty(info.shape, DTYPES[info.dtype])
    buffer = memoryview(array.reshape(-1).view(np.uint8))
    # A plain read: pages of a memory map count as resident memory, and a map of a file that is cut short kills the process.
    with paths.errors(info.file), paths.open_file(info.file) as file:
      file.seek(info.start)
      if file.readinto(buffer) != len(buffer):
        raise CheckpointError(f"{info.file}: tensor {name!r} could not be read to its end; was the file cut short meanwhile?")
    if not allow_non_finite and (bad := count_non_finite(array)):
      raise CheckpointError(
        f"{info.file}: tensor {name!r} holds {bad:,} NaN or infinite values of {array.size:,}. Weights must be finite; "
        "only python -m stdit_jax.convert --allow-non-finite reads such a file"
      )
    return array


def count_non_finite(array: np.ndarray) -> int:
  """The number of NaN and infinite values, counted in pieces so that the temporary stays small."""
  if DTYPE_NAMES.get(array.dtype) not in _EXPONENT_BITS:
    return 0
  kind, mask = _EXPONENT_BITS[DTYPE_NAMES[array.dtype]]
  bits, mask, piece = np.ascontiguousarray(array).reshape(-1).view(kind), np.dtype(kind).type(mask), 1 << 22
  return sum(int(np.count_nonzero((bits[i : i + piece] & mask) == mask)) for i in range(0, bits.size, piece))


def open_checkpoint(path) -> Checkpoint:
  """Opens a `.safetensors` file, a `*.safetensors.index.json`, or a folder that holds one of either.

  Raises CheckpointError: the path is missing, a pickle, or a folder of several candidates; any file is broken.
  """
  path = str(path)
  refuse_pickle(path)
  if paths.is_folder(path):
    return open_checkpoint(_file_of_folder(path))
  if not paths.exists(path):
    raise CheckpointError(f"{path}: no such file or folder")
  return _open_index(path) if path.endswith(".json") else _open_file(path)


def _open_file(path: str) -> Checkpoint:
  try:
    with paths.errors(path), paths.open_file(path) as file:
      return Checkpoint(path, *_parse_header(path, file, paths.stat(path)[0]))
  except CheckpointError as error:
    raise CheckpointError(f"{path}: {error}") from None
  except OSError as error:
    raise CheckpointError(f"{path}: {error.strerror}") from None


def _file_of_folder(folder: str) -> str:
  names = [name for name in paths.names(folder) if not name.startswith(".")]  # hidden: unfinished files
  for suffix in (INDEX_SUFFIX, ".safetensors"):
    found = [name for name in names if name.endswith(suffix)]
    if len(found) == 1:
      return paths.join(folder, found[0])
    if found:
      raise CheckpointError(f"{folder}: holds several weights files; name one of {', '.join(found)}")
  for name in names:
    refuse_pickle(paths.join(folder, name))
  raise CheckpointError(f"{folder}: no *.safetensors file in it")


def _open_index(path: str) -> Checkpoint:
  try:
    weight_map = _parse_json(paths.read_bytes(path).lstrip()).get("weight_map")
  except (CheckpointError, OSError) as error:
    raise CheckpointError(f"{path}: {error}") from None
  if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
    raise CheckpointError(f"{path}: needs a weight_map of tensor names to file names")
  tensors, metadata = {}, {}
  for name in sorted(set(weight_map.values())):
    # Only plain names: an index from a stranger must not reach outside its own folder.
    if name != os.path.basename(name) or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
      raise CheckpointError(f"{path}: file {name!r} is refused; the index may only name *.safetensors files beside it")
    file = _open_file(paths.join(os.path.dirname(path), name))
    listed = {tensor for tensor, holder in weight_map.items() if holder == name}
    if wrong := sorted(listed ^ file.tensors.keys()):
      where = "is not in that file" if wrong[0] in listed else "is in that file but not listed"
      raise CheckpointError(f"{path}: the index and {name} disagree on {len(wrong)} tensors; {wrong[0]!r} {where}")
    tensors |= file.tensors
    metadata = metadata or file.metadata
  return Checkpoint(path, tensors, metadata)


# Writing.


def _bytes(shape: tuple[int, ...], dtype) -> int:
  return math.prod(shape) * np.dtype(dtype).itemsize


def _header(spec: Spec, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
  """(header, {name: first byte}). Wide types lie first, so that every tensor is aligned to its own item size."""
  entries, starts, position = ({"__metadata__": {str(k): str(v) for k, v in metadata.items()}} if metadata else {}), {}, 0
  for name, (shape, dtype) in sorted(spec.items(), key=lambda item: -np.dtype(item[1][1]).itemsize):
    if np.dtype(dtype) not in DTYPE_NAMES:
      raise CheckpointError(f"tensor {name!r}: {dtype} can't be stored; allowed: {', '.join(map(str, DTYPE_NAMES))}")
    starts[name], position = position, position + _bytes(shape, dtype)
    offsets = [starts[name], position]
    entries[name] = {"dtype": DTYPE_NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": offsets}
  raw = json.dumps(entries, separators=(",", ":")).encode()
  raw += b" " * (-len(raw) % 8)
  if len(raw) > MAX_HEADER_BYTES:
    raise CheckpointError(f"a header of {len(raw):,} bytes is over the limit of the format, {MAX_HEADER_BYTES:,}")
  return len(raw).to_bytes(8, "little") + raw, {name: 8 + len(raw) + start for name, start in starts.items()}


def _split(spec: Spec, max_shard_bytes: int | None) -> list[Spec]:
  """Shards of at most `max_shard_bytes`; a larger tensor has a shard of its own."""
  shards, used = [{}], 0
  for name, (shape, dtype) in spec.items():
    used += _bytes(shape, dtype)
    if max_shard_bytes and shards[-1] and used > max_shard_bytes:
      shards.append({})
      used = _bytes(shape, dtype)
    shards[-1][name] = (shape, dtype)
  return shards


def _prepare_output(folder: pathlib.Path, stem: str, total: int, overwrite: bool) -> list[pathlib.Path]:
  """Makes the folder; returns the weights files of this name, whole or in shards. Raises CheckpointError, OSError."""
  pattern = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
  folder.mkdir(parents=True, exist_ok=True)
  existing = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
  if existing and not overwrite:
    raise CheckpointError(f"{existing[0]} exists already; name another output or allow overwriting")
  if (free := shutil.disk_usage(folder).free) < total:
    raise CheckpointError(f"{folder}: {total / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
  return existing


def write_checkpoint(
  path,
  spec: Spec,
  tensors: Iterable[tuple[str, np.ndarray]],
  *,
  metadata: Mapping[str, str] | None = None,
  max_shard_bytes: int | None = None,
  overwrite: bool = False,
) -> list[pathlib.Path]:
  """Writes tensors, in any order, one at a time, into one file or into shards with an index.

  Args:
    path: a name that ends in `.safetensors`, or a folder, whose file is called `model.safetensors`.
    spec: {name: (shape, dtype)} of all tensors; the headers are written first.
    tensors: (name, array) pairs; every name of `spec` once, with its shape and dtype.
    max_shard_bytes: a larger output is split into shards.
  Returns:
    The files, the index last. They appear under their names when all are complete.
  Raises:
    CheckpointError: an output exists and `overwrite` is off, tensors differ from `spec`, or the disk refuses.
  """
  path = pathlib.Path(path)
  folder, stem = (path.parent, path.stem) if path.suffix == ".safetensors" else (path, "model")
  shards, total = _split(spec, max_shard_bytes), sum(_bytes(*entry) for entry in spec.values())
  targets = [folder / f"{stem}.safetensors"]
  if len(shards) > 1:
    targets = [folder / f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    targets.append(folder / f"{stem}{INDEX_SUFFIX}")
  try:
    existing = _prepare_output(folder, stem, total, overwrite)
    with contextlib.ExitStack() as stack:  # renames the files in reverse: the index last
      temporary = [stack.enter_context(paths.whole(target)) for target in reversed(targets)][::-1]
      _write_shards(temporary, shards, tensors, metadata or {})
      if len(shards) > 1:
        weight_map = {name: target.name for target, shard in zip(targets, shards) for name in shard}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        pathlib.Path(temporary[-1]).write_text(text + "\n")
    for stale in set(existing) - set(targets):  # a stale index beside a new file would be read in its place
      stale.unlink()
  except OSError as error:
    reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
    raise CheckpointError(f"{path}: can't be written: {reason}") from None
  return targets


def _write_shards(names: list[str], shards: list[Spec], tensors: Iterable, metadata: Mapping[str, str]) -> None:
  with contextlib.ExitStack() as stack:
    files = [stack.enter_context(open(name, "wb")) for name, _ in zip(names, shards)]
    places = {}
    for file, shard in zip(files, shards):
      header, starts = _header(shard, metadata)
      file.write(header)
      places |= {name: (file, start, *shard[name]) for name, start in starts.items()}
    for name, array in tensors:
      if name not in places:
        raise CheckpointError(f"tensor {name!r} came twice or was not announced")
      file, start, shape, dtype = places.pop(name)
      if array.shape != tuple(shape) or array.dtype != dtype:
        raise CheckpointError(f"tensor {name!r}: {array.dtype} {array.shape} came, {np.dtype(dtype)} {shape} was announced")
      file.seek(start)
      file.write(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
    if places:
      raise CheckpointError(f"{len(places)} announced tensors never came, the first is {min(places)!r}")
    for file in files:
      file.flush()
      os.fsync(file.fileno())
