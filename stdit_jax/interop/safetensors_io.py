"""Reads and writes safetensors files and sharded folders, one tensor at a time.

A file is an unsigned 64-bit little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}` and the
raw little-endian data (https://github.com/huggingface/safetensors, "Format"). Files come from strangers. The safetensors
library checks every value of a header against the size of the file. This module does the rest, for these reasons:

  * The library accepts names with control characters, names that occur twice, and shapes beyond the limits of NumPy.
  * It reads no cloud storage (gs://), and reads data at a quarter of the speed of `Checkpoint.read` (measured with safetensors
    0.8 and 8 bfloat16 tensors of 32 MiB in the page cache, 2 CPU cores).
  * Its writer needs all tensors of a file in memory at once. The writer here needs one.
"""

import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import ml_dtypes
import numpy as np
import safetensors

from data import paths

DTYPES = {
  "BOOL": np.dtype(bool), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype("<f4"), "F64": np.dtype("<f8"),
  "U8": np.dtype("u1"), "U16": np.dtype("<u2"), "U32": np.dtype("<u4"), "U64": np.dtype("<u8"),
  "I8": np.dtype("i1"), "I16": np.dtype("<i2"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8"),
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
INDEX_SUFFIX = ".safetensors.index.json"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
_FLOATS = {DTYPES[name] for name in ("F16", "BF16", "F32", "F64")}

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


def refuse_pickle(path: paths.Path) -> None:
  """Raises CheckpointError if `path` is named like a pickle; the message has the lines of Python that convert it."""
  name = os.path.basename(str(path))
  stem, ending = os.path.splitext(name)
  if ending.lower() in PICKLES:
    raise CheckpointError(_PICKLE_HELP.format(path=path, name=name, target=f"{stem}.safetensors"))


# Reading.


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  result = dict(pairs)
  if len(result) < len(pairs):
    raise CheckpointError("the JSON names a tensor more than once")
  return result


@contextlib.contextmanager
def _local(path: str, head: bytes, size: int) -> Iterator[str]:
  """A local file for the library's checks: `path`, or for cloud storage a sparse file of its size that starts with `head`."""
  if not paths.is_remote(path):
    yield path
    return
  with tempfile.NamedTemporaryFile() as file:
    file.write(head)
    file.truncate(size)
    yield file.name


def _open_file(path: str) -> "Checkpoint":
  head = b""
  try:
    size = paths.stat(path)[0]
    with paths.errors(path), paths.open_file(path) as file:
      head = file.read(8)
      head += file.read(min(int.from_bytes(head, "little"), MAX_HEADER_BYTES))
    with _local(path, head, size) as place, safetensors.safe_open(place, "numpy") as file:
      metadata = file.metadata() or {}
    header = json.loads(head[8:], object_pairs_hook=_unique)
    header.pop("__metadata__", None)
    return Checkpoint(path, {name: _tensor_info(path, name, entry, len(head)) for name, entry in header.items()}, metadata)
  except CheckpointError as error:
    raise CheckpointError(f"{path}: {error}") from None
  except OSError as error:
    if error.errno in paths.PASSING:
      raise
    raise CheckpointError(f"{path}: {error.strerror}") from None
  except (safetensors.SafetensorError, ValueError) as error:
    problem = repr(str(error).removeprefix("Error while deserializing header: "))[:200]  # repr: it may quote the file
    hint = "It looks like a pickle or zip file" if head[:2] in (b"PK", b"\x80\x02") else "It may be damaged or cut short"
    raise CheckpointError(f"{path}: not a valid safetensors file: {problem}. {hint}; download or convert it again") from None


def _tensor_info(file: str, name: str, entry: dict[str, Any], data_start: int) -> TensorInfo:
  """One entry of a header that the library accepts. Raises CheckpointError."""
  dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
  if not name.isprintable():  # messages print names on terminals
    raise CheckpointError(f"tensor {name!r}: the name has characters that can't be printed; rename the tensor")
  if dtype not in DTYPES:
    raise CheckpointError(f"tensor {name!r}: its dtype is {dtype}; allowed: {', '.join(DTYPES)}")
  if len(shape) > 32 or math.prod(max(side, 1) for side in shape) * DTYPES[dtype].itemsize >= 1 << 63:
    raise CheckpointError(f"tensor {name!r}: its shape is {str(shape)[:60]}; allowed: at most 32 sides and 2^63 bytes")
  return TensorInfo(dtype, shape, file, data_start + start, data_start + stop)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """The tensors of one file, or of all files of an index. Made by `open_checkpoint`.

  Attributes:
    tensors: {name: TensorInfo}.
    metadata: that of the first file with metadata.
  """

  path: str
  tensors: dict[str, TensorInfo]
  metadata: dict[str, str]

  def read(self, name: str, allow_non_finite: bool = False) -> np.ndarray:
    """A fresh array in the stored dtype. Raises CheckpointError for NaN and infinite values unless they are allowed."""
    info = self.tensors[name]
    # A plain read: pages of a memory map count as resident memory, and a map of a file that is cut short kills the process.
    # NumPy allocates large pages, so this is several times as fast as reading into new `bytes`.
    array = np.empty(info.shape, DTYPES[info.dtype])
    with paths.errors(info.file), cast(io.BufferedIOBase, paths.open_file(info.file)) as file:
      file.seek(info.start)
      if file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
        raise CheckpointError(f"{info.file}: tensor {name!r} could not be read to its end; was the file cut short meanwhile?")
    if not allow_non_finite and (bad := count_non_finite(array)):
      raise CheckpointError(
        f"{info.file}: tensor {name!r} holds {bad:,} NaN or infinite values of {array.size:,}. Weights must be finite; "
        "only python -m stdit_jax.convert --allow-non-finite reads such a file"
      )
    return array


def count_non_finite(array: np.ndarray) -> int:
  """The number of NaN and infinite values, counted in pieces so that the temporary stays small."""
  if array.dtype not in _FLOATS:
    return 0
  # Only NaN and infinite values have all bits of the exponent set. The mask, the bits of infinity, has just these bits. On
  # bfloat16, comparing bits is 12 times as fast as isfinite (measured).
  mask, piece = np.array(np.inf, array.dtype).view(f"u{array.itemsize}"), 1 << 22
  bits = np.ascontiguousarray(array).reshape(-1).view(mask.dtype)
  return sum(int(np.count_nonzero((bits[i : i + piece] & mask) == mask)) for i in range(0, bits.size, piece))


def open_checkpoint(path: paths.Path) -> Checkpoint:
  """Opens a `.safetensors` file, a `*.safetensors.index.json`, or a folder that holds one of either.

  Raises CheckpointError if the path does not exist, is a pickle, is a folder with several candidates, or holds a broken file.
  """
  path = str(path)
  refuse_pickle(path)
  if paths.is_folder(path):
    return open_checkpoint(_file_of_folder(path))
  if not paths.exists(path):
    raise CheckpointError(f"{path}: no such file or folder")
  return _open_index(path) if path.endswith(".json") else _open_file(path)


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
    index = json.loads(paths.read_bytes(path), object_pairs_hook=_unique)
  except (ValueError, RecursionError, OSError) as error:
    if isinstance(error, OSError) and error.errno in paths.PASSING:
      raise
    raise CheckpointError(f"{path}: {error}") from None
  weight_map = index.get("weight_map") if isinstance(index, dict) else None
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
  entries: dict[str, Any] = {"__metadata__": {str(k): str(v) for k, v in metadata.items()}} if metadata else {}
  starts, position = {}, 0
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


def _split(spec: Spec, max_shard_bytes: int | None) -> Sequence[Spec]:
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
  """Makes the folder. Returns existing files of this name, whole or in shards. Raises CheckpointError, OSError."""
  pattern = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
  folder.mkdir(parents=True, exist_ok=True)
  existing = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
  if existing and not overwrite:
    raise CheckpointError(f"{existing[0]} exists already; name another output or allow overwriting")
  if (free := shutil.disk_usage(folder).free) < total:
    raise CheckpointError(f"{folder}: {total / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
  return existing


def write_checkpoint(
  path: paths.Path, spec: Spec, tensors: Iterable[tuple[str, np.ndarray]], *, metadata: Mapping[str, str] | None = None,
  max_shard_bytes: int | None = None, overwrite: bool = False,
) -> list[pathlib.Path]:  # fmt: skip
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
  place = pathlib.Path(path)
  folder, stem = (place.parent, place.stem) if place.suffix == ".safetensors" else (place, "model")
  shards, total = _split(spec, max_shard_bytes), sum(_bytes(*entry) for entry in spec.values())
  targets = [folder / f"{stem}.safetensors"]
  if len(shards) > 1:
    targets = [folder / f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    targets.append(folder / f"{stem}{INDEX_SUFFIX}")
  try:
    existing = _prepare_output(folder, stem, total, overwrite)
    with contextlib.ExitStack() as stack:  # its end renames the files, last opened first: shards, then the index
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


def _write_shards(names: Sequence[str], shards: Sequence[Spec], tensors: Iterable, metadata: Mapping[str, str]) -> None:
  with contextlib.ExitStack() as stack:
    files = [stack.enter_context(open(name, "wb")) for name, _ in zip(names, shards)]
    places = {}
    for file, shard in zip(files, shards):
      header, starts = _header(shard, metadata)
      file.write(header)
      places |= {name: (file, start, *shard[name]) for name, start in starts.items()}
    for name, array in tensors:
      if name not in places:
        raise CheckpointError(f"tensor {name!r} was written twice or is not in `spec`")
      file, start, shape, dtype = places.pop(name)
      if array.shape != tuple(shape) or array.dtype != dtype:
        raise CheckpointError(f"tensor {name!r}: {array.dtype} {array.shape} was written, `spec` has {np.dtype(dtype)} {shape}")
      file.seek(start)
      file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    if places:
      raise CheckpointError(f"{len(places)} tensors of `spec` were not written, first {min(places)!r}")
    for file in files:
      file.flush()
      os.fsync(file.fileno())
