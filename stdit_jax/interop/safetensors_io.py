"""Safetensors files and sharded folders, read and written one tensor at a time.

A file is an unsigned 64-bit little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}` and the
raw little-endian data (https://github.com/huggingface/safetensors, "Format"). Files come from elsewhere, so nothing in
a header is believed before it has been checked against the file's own size. Tensors are read with plain reads rather
than through a memory map: mapped pages count as resident memory of the process, and a mapped file that another process
cuts short kills the reader with SIGBUS.
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


class CheckpointError(ValueError):
  """A weights file that is broken, of a kind that is not read, or that doesn't fit the model."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
  """Where one tensor lies: `start`, `stop` are absolute byte positions in the file."""

  dtype: str
  shape: tuple[int, ...]
  start: int
  stop: int


def refuse_pickle(path) -> None:
  """Raises CheckpointError with the lines that convert it if `path` is named like a pickle."""
  name = os.path.basename(str(path))
  stem, ending = os.path.splitext(name)
  if ending.lower() in PICKLES:
    raise CheckpointError(_PICKLE_HELP.format(path=path, name=name, target=f"{stem}.safetensors"))


def _unique(pairs):
  result = dict(pairs)
  if len(result) != len(pairs):
    names = [name for name, _ in pairs]
    raise CheckpointError(f"the header names {next(n for n in names if names.count(n) > 1)!r} more than once")
  return result


def _parse_json(raw: bytes):
  try:
    return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
  except CheckpointError:
    raise
  except (ValueError, RecursionError) as error:  # ValueError covers bad UTF-8, bad JSON and integers of absurd length
    raise CheckpointError(f"the header is not valid JSON ({str(error)[:80]})") from None


def _is_count(value) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _size(shape: list) -> int:
  """Values of a shape, an empty side counted as 1 (NumPy refuses an empty array with absurd other sides); -1 if it is none."""
  return math.prod(max(side, 1) for side in shape) if all(map(_is_count, shape)) else -1


def _tensor_info(name: str, entry, data_start: int, data_bytes: int) -> TensorInfo:
  if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
    raise CheckpointError(f"tensor {name!r}: the entry needs exactly dtype, shape and data_offsets")
  if not name.isprintable():  # names end up in messages on terminals
    raise CheckpointError(f"tensor {name!r}: the name holds characters that can't be printed")
  dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
  if not isinstance(dtype, str) or dtype not in DTYPES:
    raise CheckpointError(f"tensor {name!r}: unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
  if not isinstance(shape, list) or len(shape) > 32 or not _is_count(_size(shape)):
    raise CheckpointError(f"tensor {name!r}: the shape {str(shape)[:60]} is not a short list of whole numbers")
  if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)) or offsets[0] > offsets[1]:
    raise CheckpointError(f"tensor {name!r}: the offsets {str(offsets)[:60]} are not [start, stop]")
  if offsets[1] > data_bytes:
    raise CheckpointError(
      f"tensor {name!r}: its data would end at byte {offsets[1]:,} but there are only {data_bytes:,}; is the file cut short?"
    )
  needed = math.prod(shape) * DTYPES[dtype].itemsize
  if needed != offsets[1] - offsets[0]:
    raise CheckpointError(
      f"tensor {name!r}: {dtype} {shape} needs {needed:,} bytes, the header gives {offsets[1] - offsets[0]:,}"
    )
  return TensorInfo(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _parse_header(file, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
  """The tensors and the metadata of an open file of `size` bytes, everything checked."""
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
  raw = file.read(length)
  if raw[:1] != b"{":
    raise CheckpointError("the header is not valid JSON (it must start with '{')")
  header = _parse_json(raw)
  metadata = header.pop("__metadata__", {})
  if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
    raise CheckpointError("__metadata__ must map strings to strings")
  data_start, data_bytes = 8 + length, size - 8 - length
  tensors = {name: _tensor_info(name, entry, data_start, data_bytes) for name, entry in header.items()}
  position = data_start
  for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
    if info.start != position:
      raise CheckpointError(f"tensor {name!r}: its data {'overlaps another' if info.start < position else 'leaves a hole'}")
    position = info.stop
  if position != size:
    raise CheckpointError(f"{size - position:,} bytes at the end belong to no tensor")
  return tensors, metadata


class SafetensorsFile:
  """One checked file: `tensors` {name: TensorInfo}, `metadata` {str: str}, `read(name)`.

  Raises CheckpointError, naming the file, for anything wrong in it.
  """

  def __init__(self, path):
    self.path = str(path)
    refuse_pickle(self.path)
    try:
      with paths.errors(self.path), paths.open_file(self.path) as file:
        self.tensors, self.metadata = _parse_header(file, paths.stat(self.path)[0])
    except CheckpointError as error:
      raise CheckpointError(f"{self.path}: {error}") from None
    except OSError as error:
      raise CheckpointError(f"{self.path}: {error.strerror}") from None

  def read(self, name: str, allow_non_finite: bool = False) -> np.ndarray:
    """The tensor in its stored dtype; a fresh array. Raises if it holds NaN or Inf and they aren't allowed."""
    info = self.tensors[name]
    array = np.empty(info.shape, DTYPES[info.dtype])
    buffer = memoryview(array.reshape(-1).view(np.uint8))
    with paths.errors(self.path), paths.open_file(self.path) as file:
      file.seek(info.start)
      if file.readinto(buffer) != len(buffer):
        raise CheckpointError(f"{self.path}: tensor {name!r} could not be read to its end; was the file cut short meanwhile?")
    if not allow_non_finite and (bad := count_non_finite(array)):
      raise CheckpointError(
        f"{self.path}: tensor {name!r} holds {bad:,} NaN or infinite values of {array.size:,}; allow them by allow_non_finite"
      )
    return array


def count_non_finite(array: np.ndarray) -> int:
  """How many values are NaN or infinite; in pieces, so that the temporary stays small."""
  if DTYPE_NAMES.get(array.dtype) not in _EXPONENT_BITS:
    return 0
  kind, mask = _EXPONENT_BITS[DTYPE_NAMES[array.dtype]]
  bits, mask, piece = np.ascontiguousarray(array).reshape(-1).view(kind), np.dtype(kind).type(mask), 1 << 22
  return sum(int(np.count_nonzero((bits[i : i + piece] & mask) == mask)) for i in range(0, bits.size, piece))


class Checkpoint:
  """The tensors of one file or of all files of an index as one mapping. Made by `open_checkpoint`."""

  def __init__(self, path: str, files: Mapping[str, SafetensorsFile]):
    self.path = path
    self._files = dict(files)  # tensor name -> file
    first = next(iter(self._files.values()), None)
    self.metadata = dict(first.metadata) if first else {}

  @property
  def tensors(self) -> dict[str, TensorInfo]:
    return {name: file.tensors[name] for name, file in self._files.items()}

  def read(self, name: str, allow_non_finite: bool = False) -> np.ndarray:
    return self._files[name].read(name, allow_non_finite)


def open_checkpoint(path) -> Checkpoint:
  """Opens a `.safetensors` file, a `*.safetensors.index.json`, or a folder that holds one of either.

  Raises CheckpointError: missing, pickles (with the lines that convert them), several candidates, any broken file.
  """
  path = str(path)
  refuse_pickle(path)
  if paths.is_folder(path):
    return open_checkpoint(_file_of_folder(path))
  if not paths.exists(path):
    raise CheckpointError(f"{path}: no such file or folder")
  if path.endswith(".json"):
    return _open_index(path)
  file = SafetensorsFile(path)
  return Checkpoint(path, dict.fromkeys(file.tensors, file))


def _file_of_folder(folder: str) -> str:
  names = paths.names(folder)
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
    index = _parse_json(paths.read_bytes(path))
  except (CheckpointError, OSError) as error:
    raise CheckpointError(f"{path}: {error}") from None
  weight_map = index.get("weight_map") if isinstance(index, dict) else None
  if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
    raise CheckpointError(f"{path}: needs a weight_map of tensor names to file names")
  files = {}
  for name in sorted(set(weight_map.values())):
    # Only plain names: an index from elsewhere must not reach outside its own folder.
    if name != os.path.basename(name) or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
      raise CheckpointError(f"{path}: file {name!r} is refused; the index may only name *.safetensors files beside it")
    files[name] = SafetensorsFile(paths.join(os.path.dirname(path), name))
  for name, file in files.items():
    listed = {tensor for tensor, holder in weight_map.items() if holder == name}
    if wrong := sorted(listed ^ set(file.tensors)):
      where = "is not in that file" if wrong[0] in listed else "is in that file but not listed"
      raise CheckpointError(f"{path}: the index and {name} disagree on {len(wrong)} tensors; {wrong[0]!r} {where}")
  return Checkpoint(path, {tensor: files[holder] for tensor, holder in weight_map.items()})


def _header(spec: Mapping[str, tuple[tuple[int, ...], np.dtype]], metadata) -> tuple[bytes, dict[str, TensorInfo]]:
  """Header bytes and absolute positions. Wide types lie first, so that every tensor is aligned to its own item size."""
  entries, position, infos = {}, 0, {}
  if metadata:
    entries["__metadata__"] = {str(k): str(v) for k, v in metadata.items()}
  for name, (shape, dtype) in sorted(spec.items(), key=lambda item: -np.dtype(item[1][1]).itemsize):
    code = DTYPE_NAMES.get(np.dtype(dtype))
    if code is None:
      raise CheckpointError(f"tensor {name!r}: {dtype} can't be stored; known are {', '.join(map(str, DTYPE_NAMES))}")
    stop = position + math.prod(shape) * np.dtype(dtype).itemsize
    entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, stop]}
    infos[name] = TensorInfo(code, tuple(shape), position, stop)
    position = stop
  raw = json.dumps(entries, separators=(",", ":")).encode()
  raw += b" " * (-len(raw) % 8)
  if len(raw) > MAX_HEADER_BYTES:
    raise CheckpointError(f"a header of {len(raw):,} bytes is over the limit of the format, {MAX_HEADER_BYTES:,}")
  start = 8 + len(raw)
  moved = {k: dataclasses.replace(v, start=v.start + start, stop=v.stop + start) for k, v in infos.items()}
  return len(raw).to_bytes(8, "little") + raw, moved


def _split(spec, max_shard_bytes: int | None) -> list[dict]:
  shards, room = [{}], max_shard_bytes
  for name, (shape, dtype) in spec.items():
    needed = math.prod(shape) * np.dtype(dtype).itemsize
    if max_shard_bytes and shards[-1] and needed > room:
      shards.append({})
      room = max_shard_bytes
    shards[-1][name] = (shape, dtype)
    room = room - needed if max_shard_bytes else None
  return shards


def _target_paths(folder: pathlib.Path, stem: str, count: int) -> list[pathlib.Path]:
  if count == 1:
    return [folder / f"{stem}.safetensors"]
  return [folder / f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _existing(folder: pathlib.Path, stem: str) -> list[pathlib.Path]:
  """Weights files of this name, whole or in shards: a stale index beside a new file would be read in its place."""
  pattern = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
  return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name)) if folder.is_dir() else []


def _prepare_output(folder: pathlib.Path, existing, total: int, overwrite: bool) -> None:
  if existing and not overwrite:
    raise CheckpointError(f"{existing[0]} exists already; name another output or allow overwriting")
  folder.mkdir(parents=True, exist_ok=True)
  if (free := shutil.disk_usage(folder).free) < total:
    raise CheckpointError(f"{folder}: {total / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")


def write_checkpoint(
  path,
  spec: Mapping[str, tuple[tuple[int, ...], np.dtype]],
  tensors: Iterable[tuple[str, np.ndarray]],
  *,
  metadata: Mapping[str, str] | None = None,
  max_shard_bytes: int | None = None,
  overwrite: bool = False,
  stem: str = "model",
) -> list[pathlib.Path]:
  """Writes tensors, in any order, one at a time, into a file or, over `max_shard_bytes`, into shards with an index.

  Args:
    path: a name ending in `.safetensors`, or a folder (then the files are called after `stem`).
    spec: {name: (shape, dtype)} of everything that will come, so that the headers can be written first.
    tensors: (name, array) pairs; every name of `spec` once, with its shape and dtype.
  Returns:
    The files written (the index last). They appear under their names only when all are complete.
  Raises:
    CheckpointError: an output exists and `overwrite` is off, tensors that don't fit `spec`, no room, not writable.
  """
  path = pathlib.Path(path)
  folder, stem = (path.parent, path.stem) if path.suffix == ".safetensors" else (path, stem)
  shards = _split(spec, max_shard_bytes)
  targets = _target_paths(folder, stem, len(shards))
  index = folder / f"{stem}{INDEX_SUFFIX}"
  total = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in spec.values())
  temporary = [target.with_name(f".{target.name}.{os.getpid()}.tmp") for target in (*targets, index)]
  try:
    existing = _existing(folder, stem)
    _prepare_output(folder, existing, total, overwrite)
    _write_shards(temporary, shards, tensors, metadata or {})
    if len(shards) > 1:
      weight_map = {name: target.name for target, shard in zip(targets, shards) for name in shard}
      text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
      temporary[-1].write_text(text + "\n")
      targets.append(index)
    for source, target in zip(temporary, targets):
      os.replace(source, target)
    for stale in set(existing) - set(targets):
      stale.unlink()
  except OSError as error:
    reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
    raise CheckpointError(f"{path}: can't be written: {reason}") from None
  finally:
    for leftover in temporary:
      with contextlib.suppress(OSError):
        leftover.unlink(missing_ok=True)
  return targets


def _write_shards(paths, shards, tensors, metadata) -> None:
  with contextlib.ExitStack() as stack:
    places = {}
    for path, shard in zip(paths, shards):
      header, infos = _header(shard, metadata)
      file = stack.enter_context(path.open("wb"))
      file.write(header)
      places.update({name: (file, info) for name, info in infos.items()})
    missing = set(places)
    for name, array in tensors:
      if name not in missing:
        raise CheckpointError(f"tensor {name!r} came twice or was not announced")
      missing.remove(name)
      file, info = places[name]
      if tuple(array.shape) != info.shape or array.dtype != DTYPES[info.dtype]:
        raise CheckpointError(
          f"tensor {name!r}: {array.dtype} {list(array.shape)} came, {info.dtype} {list(info.shape)} was announced"
        )
      file.seek(info.start)
      file.write(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
    if missing:
      raise CheckpointError(f"{len(missing)} announced tensors never came, the first is {min(missing)!r}")
    for file in {id(f): f for f, _ in places.values()}.values():
      file.flush()
      os.fsync(file.fileno())
