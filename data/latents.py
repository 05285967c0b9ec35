"""Caches of latents and of caption embeddings, which `python -m stdit_jax.encode` writes: keys, shards, reader, writer.

  FOLDER/latents-0123456789ab/made_from.json   provenance: tables, places of clips, autoencoder, ...
                              part-0/          a TFDS data set of ArrayRecord shards, one record per clip
                                keys.npy       its index: the sorted keys; record i belongs to key i
                                part.json      first record of every shard, and the plans that the part was made for
                                dataset_info.json   written last: a part with this file is complete
  FOLDER/text-0123456789ab/...                 the same with one record per caption

A part is the output of one command. The plans decide the keys, and the keys decide the shards. So all processes agree without
communication.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from data import aspect_ratios, paths, plan
from data.buckets import Bucket
from data.config import DataConfig
from data.shards import digest
from data.sources import Row, Table

DTYPES = ("float32", "float16", "bfloat16")
_VERSION = 1  # of keys and records
_MADE_FROM, _PART, _KEYS, _INFO = "made_from.json", "part.json", "keys.npy", "dataset_info.json"
_RESOLUTIONS = list(aspect_ratios.SIZES)
# Fields of a clip's key, highest bits first. Sorted keys put clips of one size together, so that one batch encodes them.
_BITS = {"resolution": 5, "num_frames": 12, "ratio": 6, "row": 29, "window": 11}
_DESCRIPTIONS = {
  "latents": "Latents of clips: mean and, if stored, log-variance of the last posterior of the autoencoder, both normalised, "
  "[time, height, width, channels]. `fps` is the file's own frame rate, 0 if unknown. If a row cannot be decoded, "
  "`error` is the reason, and the latents are those of a black clip.",
  "text": "Embeddings of captions by the text encoder, [valid tokens, channels].",
}


# ----------------------------------------------------------------------------------------------------------------- keys


def pack(**fields: int | np.ndarray) -> Any:
  """Packs the fields in `_BITS`, whole numbers or arrays, into int64 keys. Raises ValueError for a value that is too large."""
  key = np.int64(0)
  for name, bits in _BITS.items():
    value = np.asarray(fields[name], np.int64)
    if value.size and value.max() >> bits:
      raise ValueError(f"clips with a {name} of {value.max()} cannot be cached. Allowed: below {1 << bits}. Train from videos.")
    key = key << bits | value
  return key


def unpack(keys: np.ndarray | int) -> dict:
  """Unpacks keys into {field: values}. The inverse of `pack`."""
  fields = {}
  for name, bits in reversed(_BITS.items()):
    fields[name], keys = keys & ((1 << bits) - 1), keys >> bits
  return fields


def size_of(resolution: int, ratio: int) -> tuple[str, str, tuple[int, int]]:
  """Returns (resolution, aspect-ratio key, (height, width)) for two fields of a key."""
  name = _RESOLUTIONS[resolution]
  key = list(aspect_ratios.SIZES[name])[ratio]
  return name, key, aspect_ratios.size(name, key)


def clip_keys(
  table: Table, config: DataConfig, bucket: Bucket, ratio: Any, slot_rows: Any, rows_frames: Any, window: int
) -> Any:
  """Keys of clips of one bucket. `ratio`, `slot_rows` and `rows_frames` may be arrays.

  Some rows, such as images, have only one place in time for a clip. All windows and copies of such a row share one key.
  """
  # For so few frames `video.clip_indices` has only one start.
  one_place = rows_frames <= bucket.num_frames * config.frame_interval + 1
  return pack(
    resolution=_RESOLUTIONS.index(bucket.resolution), num_frames=bucket.num_frames, ratio=ratio,
    row=np.where(one_place, table.first_copies(slot_rows), slot_rows), window=np.where(one_place, 0, window),
  )  # fmt: skip


def plan_keys(current: plan.Plan, table: Table, config: DataConfig, epoch: int) -> np.ndarray:
  """Sorted keys of the clips of an epoch's `Plan`, without repetitions."""
  bucket, rows, ratio = current.all_slots()
  parsed, frames, window, found = config.parsed_buckets(), table.column("num_frames"), config.window(epoch), []
  for i in np.unique(bucket):
    at = bucket == i
    found.append(clip_keys(table, config, parsed[i], ratio[at], rows[at], frames[rows[at]], window))
  return np.unique(np.concatenate(found))


def caption_key(caption: str) -> int:
  """The first 63 bits of a caption's sha256."""
  return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "big") >> 1


# ----------------------------------------------------------------------------------------------------------- provenance


def made_from_clips(config: DataConfig, table: Table) -> dict:
  """The provenance of clips: everything that decides the pixels of a key."""
  return {**_made_from(config, table, "seed", "frame_interval", "resize"), "resolutions": _RESOLUTIONS}


def made_from_captions(config: DataConfig, table: Table) -> dict:
  """The provenance of captions: everything that decides the captions of rows."""
  return _made_from(config, table, "seed", "scores", "score_drop")


def _made_from(config, table, *keys):
  tables = [{"fingerprint": p.fingerprint, "weight": int(np.ceil(p.weight))} for p in table.parts]
  return {"version": _VERSION, "tables": tables, **{key: getattr(config, key) for key in keys}}


def plan_identity(config: DataConfig, table: Table) -> dict:
  """Everything that decides which clips each epoch needs. A part stores it in `made_for`."""
  return json.loads(json.dumps({**plan.describe(config, table), "windows_per_row": config.windows_per_row}))


def _flat(values, prefix=""):
  flat = {}
  for key, value in values.items():
    flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
  return flat


def differences(made: dict, wanted: dict) -> list[str]:
  """The differences between two provenances in the keys of `wanted`, one text per key."""
  old, new = _flat(made), _flat(wanted)
  return plan.changed_keys({key: old.get(key) for key in new}, new)


def find(folder: str, kind: str, wanted: dict) -> "Encoded":
  """Finds the `Encoded` of a kind ("latents", "text") with provenance `wanted`. Raises ValueError if none exists."""
  found = _sets(folder, kind)
  if not found:
    raise ValueError(f"data.latents={folder!r} has no {kind}; python -m stdit_jax.encode writes them")
  changes = [differences(e.made_from, wanted) for e in found]
  if fits := [e for e, changed in zip(found, changes) if not changed]:
    if len(fits) > 1:
      raise ValueError(f"data.latents={folder!r} has several encoders' {kind}. Set autoencoder.weights or text_encoder.weights")
    if not fits[0].parts:
      raise ValueError(f"the {kind} in data.latents={folder!r} are not complete. Start python -m stdit_jax.encode again.")
    return fits[0]
  changed = "; ".join(min(changes, key=len))
  raise ValueError(
    f"the {kind} in data.latents={folder!r} have another provenance: {changed}. Encode again, or restore these keys."
  )


def _sets(folder, kind):
  places = [paths.join(folder, name) for name in paths.names(folder) if name.startswith(f"{kind}-")]
  return [Encoded(place) for place in places if paths.exists(paths.join(place, _MADE_FROM))]


def has_text(folder: str) -> bool:
  """Whether a folder has embeddings of captions."""
  return not paths.is_remote(folder) and bool(_sets(folder, "text"))


# -------------------------------------------------------------------------------------------------------------- reading


class Part:
  """The output of one command.

  Attributes:
    keys: the sorted keys of the records, memory-mapped.
    starts: first record of every shard, then the number of records.
    made_for: [{"stage", "epochs", "plan"}], the plans that need the records.
  """

  def __init__(self, folder):
    self.folder = folder
    self.kind = os.path.basename(os.path.dirname(folder)).split("-")[0]
    self.keys = np.load(paths.join(folder, _KEYS), mmap_mode="r")
    values = json.loads(paths.read_text(paths.join(folder, _PART)))
    self.starts, self.made_for = np.asarray(values["starts"]), values["made_for"]

  @property
  def num_shards(self) -> int:
    return len(self.starts) - 1

  @property
  def is_whole(self) -> bool:
    return paths.exists(paths.join(self.folder, _INFO))

  def shard(self, number: int) -> str:
    """Path of a shard, named as TFDS does."""
    return paths.join(self.folder, f"{self.kind}-train.array_record-{number:05}-of-{self.num_shards:05}")

  def missing(self) -> list[int]:
    """Numbers of the shards that do not exist."""
    return [number for number in range(self.num_shards) if not paths.exists(self.shard(number))]

  def drop(self, keys: Any) -> None:
    """Deletes the existing shards that hold these keys."""
    for number in np.unique(np.searchsorted(self.starts, self.position(np.asarray(keys, np.int64))[0], "right") - 1):
      pathlib.Path(self.shard(number)).unlink(missing_ok=True)

  def position(self, keys: Any) -> tuple[Any, Any]:
    """Returns (number of the record, whether the record exists) of each key."""
    at = np.searchsorted(self.keys, keys)
    return at, self.keys[np.minimum(at, len(self.keys) - 1)] == keys

  @functools.cached_property
  def features(self) -> Any:
    return _tfds().features.FeatureConnector.from_config(self.folder)

  def read(self, number: int) -> dict:
    shard = int(np.searchsorted(self.starts, number, "right")) - 1
    (record,) = _reader(self.shard(shard)).read([int(number - self.starts[shard])])
    return self.features.deserialize_example_np(record)


def _tfds() -> Any:
  """Imports tensorflow_datasets, which takes seconds. Only processes that read or write records need it."""
  import ml_dtypes  # noqa: F401 - registers bfloat16 with NumPy
  import tensorflow_datasets

  return tensorflow_datasets


@functools.lru_cache(256)  # the number of open files is limited
def _reader(path):
  from array_record.python.array_record_module import ArrayRecordReader

  return ArrayRecordReader(path, options="readahead_buffer_size:0")


class Encoded:
  """The latents or embeddings of one provenance, in parts. Picklable: workers open the files by path."""

  def __init__(self, folder):
    self.folder = folder
    self.made_from = json.loads(paths.read_text(paths.join(folder, _MADE_FROM)))

  def __getstate__(self):
    return {"folder": self.folder, "made_from": self.made_from}

  def part_numbers(self) -> list[int]:
    """Numbers in the names of the parts' folders. A number may be missing, since a user may delete a part."""
    return sorted(int(name[5:]) for name in paths.names(self.folder) if re.fullmatch(r"part-\d+", name))

  @functools.cached_property
  def all_parts(self) -> list[Part]:
    folders = [paths.join(self.folder, f"part-{i}") for i in self.part_numbers()]
    return [Part(folder) for folder in folders if paths.exists(paths.join(folder, _PART))]

  @functools.cached_property
  def parts(self) -> list[Part]:
    return [part for part in self.all_parts if part.is_whole]

  def epochs(self, identity: dict) -> int:
    """Number of first epochs of a plan that are cached completely, according to `made_for` of the parts."""
    return max((m["epochs"] for part in self.parts for m in part.made_for if m["plan"] == identity), default=0)

  def holds(self, keys: Any) -> np.ndarray:
    """Whether each key has a record, bool."""
    return np.any([np.zeros(np.shape(keys), bool), *(part.position(keys)[1] for part in self.parts)], axis=0)

  def read(self, key: int) -> dict:
    """Reads the record of a key, a dict. Raises KeyError if the key has no record."""
    for part in self.parts:
      at, exists = part.position(key)
      if exists:
        return part.read(int(at))
    raise KeyError(key)


class Cache:
  """The latents that a training reads instead of videos, and the embeddings that it reads instead of captions. Picklable.

  Attributes:
    latents, text: the `Encoded` of the clips, and of the captions or None.
    epochs: number of first epochs of this plan that are cached completely.
    followed: {epoch: source} that a resumed training used before, see `source`. The training keeps these sources, even if
      `encode` has cached more epochs since.
  """

  def __init__(self, latents, text, table, config):
    self.latents, self.text, self.table, self.config, self.followed = latents, text, table, config, {}
    identity = plan_identity(config, table)
    self.epochs = min(e.epochs(identity) for e in (latents, text) if e is not None)
    made_for = [m for part in latents.parts for m in part.made_for]
    self._most_epochs = max((m["epochs"] for m in made_for), default=0)  # that were encoded for any plan
    changes = [plan.changed_keys(m["plan"], identity) for m in made_for if m["plan"] != identity]
    self._changes = min(changes, key=len, default=[])  # from the most similar encoded plan to this plan
    self._captions_change = text is not None and table.captions_change(config.scores)

  def source(self, epoch: int, plan_of: Callable[[int], plan.Plan]) -> int:
    """The source of an epoch: the epoch itself, or a cached epoch whose plan it repeats since clips are missing.

    `plan_of` returns the `Plan` of an epoch. Raises ValueError if no epoch is cached.
    """
    if epoch in self.followed:
      return self.followed[epoch]
    if self._holds(epoch, plan_of):
      return epoch
    if not self.epochs:  # no part names this plan, for instance after a change of batch sizes: check epochs 0, 1, ...
      self.epochs = next((e for e in range(self._most_epochs) if not self._holds(e, plan_of)), self._most_epochs)
    if self.epochs:
      return epoch % self.epochs
    folder, why = os.path.dirname(self.latents.folder), "; ".join(self._changes) or "encode has not finished"
    text = f"data.latents={folder!r} lacks clips that the plan of epoch {epoch} asks for ({why})"
    raise ValueError(f"{text}. Run python -m stdit_jax.encode with this configuration.")

  def _holds(self, epoch, plan_of):
    """Whether all clips of an epoch are cached."""
    if epoch < self.epochs:
      return True
    return self._has_key(epoch) and self.latents.holds(plan_keys(plan_of(epoch), self.table, self.config, epoch)).all()

  def _has_key(self, epoch):
    """Whether a key has enough bits for the window of an epoch. No cache holds later windows."""
    return not self.config.window(epoch) >> _BITS["window"]

  def _epochs_like(self, epoch):
    """Epochs to look up for `epoch`, best first: `epoch`, the epoch that `epoch` repeats, then all encoded epochs."""
    most = self._most_epochs
    return filter(self._has_key, dict.fromkeys([epoch, epoch % (self.epochs or most or 1), *range(most)]))

  def other_captions(self, epoch: int) -> bool:
    """Whether the cache may lack captions of an epoch. Rows then keep the caption of an earlier epoch."""
    return epoch >= self.epochs and self._captions_change

  def clip(self, epoch: int, slot_row: int, row: Row, bucket: Bucket, ratio: int) -> dict[str, Any]:
    """Reads {latents_mean, latents_std, rate, error} of a row in a bucket. `latents_std` is None if only means were stored."""
    for own in self._epochs_like(epoch):
      key = clip_keys(self.table, self.config, bucket, ratio, slot_row, row.num_frames, self.config.window(own))
      with contextlib.suppress(KeyError):
        record = self.latents.read(key)
        std = np.exp(0.5 * record["log_variance"].astype(np.float32)) if "log_variance" in record else None
        clip = {"latents_mean": record["mean"].astype(np.float32), "latents_std": std}
        return clip | {"rate": float(record["fps"]) or None, "error": record["error"].decode()}
    raise RuntimeError(f"{row.path}: no latents of {bucket.name} in {self.latents.folder}")

  def caption(self, epoch: int, caption_of: Callable[[int], str]) -> tuple[str, np.ndarray]:
    """Reads (caption, embedding `[L, C]` float32). `caption_of` returns the row's caption in an epoch."""
    for own in self._epochs_like(epoch):
      caption = caption_of(own)
      with contextlib.suppress(KeyError):
        return caption, self.text.read(caption_key(caption))["embedding"].astype(np.float32)
    raise RuntimeError(f"no embedding of the caption {caption_of(epoch)[:60]!r} in {self.text.folder}")


# -------------------------------------------------------------------------------------------------------------- writing


def prepare(
  folder: str, kind: str, made_from: dict, keys: np.ndarray, made_for: list[dict], size_of_records: Callable, shard_bytes: int
) -> Part | None:
  """Finds the unfinished `Part` of a folder, or begins one for the missing `keys`. None if no key is missing.

  Args:
    kind: "latents" or "text".
    made_from: provenance of the records.
    keys: sorted int64.
    made_for: [{"stage", "epochs", "plan"}] that need the keys.
    size_of_records: function of keys, returns the bytes of each record.
    shard_bytes: approximate size of a shard.

  Raises ValueError if an unfinished part has other keys, or if the folder has a set with another dtype or `log_variance`.
  """
  same = _set_with(folder, kind, made_from)
  wanted = keys[~same.holds(keys)]
  for part in same.all_parts:
    if not part.is_whole:
      if not np.array_equal(part.keys, wanted):
        made = ", ".join(f"--stage {m['stage']} --epochs {m['epochs']}" for m in part.made_for)
        raise ValueError(f"{part.folder} is unfinished. Finish it with {made}, or remove it.")
      return part
  if not len(wanted):
    for part in same.parts[-1:]:
      if new := [m for m in made_for if m not in part.made_for]:  # all clips exist: record that these plans use them, too
        values = {"starts": part.starts.tolist(), "made_for": part.made_for + new}
        paths.write_text(paths.join(part.folder, _PART), json.dumps(values))
    return None
  shard_of = (np.cumsum(size_of_records(wanted)) - 1) // shard_bytes
  starts = [*np.flatnonzero(np.diff(shard_of, prepend=-1)).tolist(), len(wanted)]
  part = paths.join(same.folder, f"part-{max(same.part_numbers(), default=-1) + 1}")
  with paths.whole(paths.join(part, _KEYS)) as temporary:
    np.save(temporary, wanted)
  paths.write_text(paths.join(part, _PART), json.dumps({"starts": starts, "made_for": made_for}))
  return Part(part)


def _set_with(folder, kind, made_from):
  """Finds or makes the `Encoded` with a provenance."""
  for found in _sets(folder, kind):
    changed = differences(found.made_from, made_from)
    if not changed:
      return found
    if all(c.startswith(("dtype:", "log_variance:")) for c in changed):
      raise ValueError(f"--output {folder} has {kind} with other settings ({'; '.join(changed)}); give another folder")
  place = paths.join(folder, f"{kind}-{digest(made_from)[:12]}")
  paths.write_text(paths.join(place, _MADE_FROM), json.dumps(made_from, indent=1))
  return Encoded(place)


def features_of(kind: str, channels: int, dtype: Any, log_variance: bool = True) -> Any:
  """TFDS features of records. They store floats as bytes, since a protobuf has no float16 and rounds float64."""
  features = _tfds().features

  def floats(*shape, dtype=dtype):
    return features.Tensor(shape=shape, dtype=np.dtype(dtype), encoding="bytes")

  if kind == "text":
    return features.FeaturesDict({"caption": features.Text(), "embedding": floats(None, channels)})
  values = dict.fromkeys(("mean", "log_variance") if log_variance else ("mean",), floats(None, None, None, channels))
  numbers = dict.fromkeys(("table", "row", "num_frames", "height", "width", "window"), features.Scalar(np.int64))
  texts = dict.fromkeys(("path", "resolution", "error"), features.Text())
  return features.FeaturesDict({**values, **numbers, **texts, "fps": floats(dtype=np.float64)})


def shard_writer(part: Part, numbers: Sequence[int], features: Any) -> Generator[None, tuple[int, dict]]:
  """A generator that writes the shards `numbers`, in order. Call `next` once, then `send((key, record))` for each key.

  A shard appears when it is complete. `close` drops an incomplete shard. Raises OSError if the disk is full or fails.
  """
  from array_record.python.array_record_module import ArrayRecordWriter

  paths.remove_leftovers(part.folder, {os.path.basename(part.shard(number)) for number in numbers})
  for number in numbers:
    try:
      # Groups of one record, since training reads in random order. Compression does not make latents smaller.
      with (
        paths.whole(part.shard(number)) as temporary,
        contextlib.closing(ArrayRecordWriter(temporary, "group_size:1,uncompressed")) as writer,
      ):
        for wanted in part.keys[slice(*part.starts[number : number + 2])]:
          key, record = yield
          # If the caller skipped a record, the following records would get wrong keys without a sign of it.
          assert key == wanted, (key, wanted, temporary)
          writer.write(features.serialize_example(record))
    except RuntimeError as error:  # array_record's error for a disk
      raise OSError(f"{part.shard(number)} cannot be written: {str(error).partition(';')[0]}") from error
  yield


def finish(part: Part, features: Any) -> bool:
  """Registers a part as a TFDS data set if all its shards exist. Returns whether the part is complete."""
  if part.is_whole or part.missing():
    return part.is_whole
  tfds = _tfds()
  info = tfds.core.DatasetInfo(
    builder=tfds.core.dataset_info.DatasetIdentity(part.kind, tfds.core.Version("1.0.0"), part.folder, ""),
    features=features,
    description=_DESCRIPTIONS[part.kind],
  )
  info.set_file_format("array_record")
  template = tfds.core.ShardedFileTemplate(part.folder, dataset_name=part.kind, split="train", filetype_suffix="array_record")
  size = sum(os.path.getsize(part.shard(i)) for i in range(part.num_shards))
  lengths = np.diff(part.starts).tolist()
  split = tfds.core.SplitInfo(name="train", shard_lengths=lengths, num_bytes=size, filename_template=template)
  info.set_splits(tfds.core.splits.SplitDict([split]))
  with tempfile.TemporaryDirectory() as place:
    info.write_to_directory(place)
    for name in sorted(paths.names(place), key=lambda name: name == _INFO):  # last: it marks the part as complete
      paths.write_text(paths.join(part.folder, name), paths.read_text(paths.join(place, name)))
  return True
