"""Caches of latents and of caption embeddings, which `python -m stdit_jax.encode` writes: keys, shards, reader, writer.

  FOLDER/latents-0123456789ab/made_from.json   provenance: tables, places of clips, autoencoder, ...
                              part-0/          a TFDS data set of ArrayRecord shards, one record per clip
                                keys.npy       its index: the sorted keys; record i belongs to key i
                                part.json      first record of every shard, and the plans that the part was made for
                                dataset_info.json   written last: a part with this file is complete
  FOLDER/text-0123456789ab/...                 the same with one record per caption

A part is the output of one command. Keys follow from the plans, and shards from the keys. So all processes agree on them
without communication.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Generator, Sequence

import numpy as np

from data import aspect_ratios, paths, plan
from data.config import DataConfig
from data.shards import digest
from data.sources import Table

DTYPES = ("float32", "float16", "bfloat16")
_VERSION = 1  # of keys and records
_MADE_FROM, _PART, _KEYS, _INFO = "made_from.json", "part.json", "keys.npy", "dataset_info.json"
_RESOLUTIONS = list(aspect_ratios.SIZES)
# Fields of a clip's key, highest bits first. Sorted keys put clips of one size together, so that they are encoded together.
_BITS = {"resolution": 5, "num_frames": 12, "ratio": 6, "row": 29, "window": 11}
_DESCRIPTIONS = {
  "latents": "Latents of clips: mean and, if kept, log-variance of each value of the autoencoder's last posterior, both "
  "of normalised latents, [time, height, width, channels]; `fps` is the file's own, 0 if unknown; a row that could not "
  "be decoded has the reason in `error` and the latents of a black clip.",
  "text": "Embeddings of captions by the text encoder, [valid tokens, channels].",
}


# ----------------------------------------------------------------------------------------------------------------- keys


def pack(**fields: int | np.ndarray) -> np.ndarray:
  """int64 keys of the fields in `_BITS`, which are whole numbers or arrays. Raises ValueError for a value that is too large."""
  key = np.int64(0)
  for name, bits in _BITS.items():
    value = np.asarray(fields[name], np.int64)
    if value.size and value.max() >> bits:
      raise ValueError(f"clips with a {name} of {value.max()} cannot be cached. Allowed: below {1 << bits}. Train from videos.")
    key = key << bits | value
  return key


def unpack(keys: np.ndarray | int) -> dict:
  """{field: values} of keys, the inverse of `pack`."""
  fields = {}
  for name, bits in reversed(_BITS.items()):
    fields[name], keys = keys & ((1 << bits) - 1), keys >> bits
  return fields


def size_of(resolution: int, ratio: int) -> tuple[str, str, tuple[int, int]]:
  """(resolution, aspect-ratio key, (height, width)) of two fields of a key."""
  name = _RESOLUTIONS[resolution]
  key = list(aspect_ratios.SIZES[name])[ratio]
  return name, key, aspect_ratios.size(name, key)


def clip_keys(table, config, bucket, ratio, slot_rows, rows_frames, window):
  """Keys of clips of one bucket; ratio, rows and their numbers of frames may be arrays.

  A row may have only one place for the clip (images). All windows and copies of such a row share one key.
  """
  # The condition of `video.clip_indices`.
  one_place = rows_frames <= bucket.num_frames * config.frame_interval + 1
  return pack(
    resolution=_RESOLUTIONS.index(bucket.resolution), num_frames=bucket.num_frames, ratio=ratio,
    row=np.where(one_place, table.first_copies(slot_rows), slot_rows), window=np.where(one_place, 0, window),
  )  # fmt: skip


def plan_keys(current: plan.Plan, table: Table, config: DataConfig, epoch: int) -> np.ndarray:
  """Sorted keys of the clips of an epoch's `Plan`, each once."""
  bucket, rows, ratio = current.all_slots()
  frames, found = table.column("num_frames"), []
  for i in np.unique(bucket):
    own = bucket == i
    args = config.parsed_buckets()[i], ratio[own], rows[own], frames[rows[own]], config.window(epoch)
    found.append(clip_keys(table, config, *args))
  return np.unique(np.concatenate(found))


def caption_key(caption: str) -> int:
  """63 bits of the hash of a caption."""
  return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "big") >> 1


# ----------------------------------------------------------------------------------------------------------- provenance


def made_from_clips(config: DataConfig, table: Table) -> dict:
  """The provenance of clips: everything but their keys that decides their pixels."""
  tables = [{"fingerprint": p.fingerprint, "weight": int(np.ceil(p.weight))} for p in table.parts]
  plain = {key: getattr(config, key) for key in ("seed", "frame_interval", "resize")}
  return {"version": _VERSION, "resolutions": _RESOLUTIONS, "tables": tables, **plain}


def made_from_captions(config: DataConfig, table: Table) -> dict:
  """The provenance of captions: everything that decides the captions of rows."""
  plain = {key: getattr(config, key) for key in ("seed", "scores", "score_drop")}
  return {"version": _VERSION, "tables": made_from_clips(config, table)["tables"], **plain}


def plan_identity(config: DataConfig, table: Table) -> dict:
  """Everything that decides which clips the first epochs need."""
  return json.loads(json.dumps({**plan.describe(config, table), "windows_per_row": config.windows_per_row}))


def _flat(values, prefix=""):
  flat = {}
  for key, value in values.items():
    flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
  return flat


def differences(made: dict, wanted: dict) -> list[str]:
  """The keys in which `made` differs from `wanted`, one text per key."""
  old, new = _flat(made), _flat(wanted)
  return plan.changed_keys({key: old.get(key) for key in new}, new)


def find(folder: str, kind: str, wanted: dict) -> "Encoded":
  """The `Encoded` of a kind ("latents", "text") with provenance `wanted`. Raises ValueError if none exists."""
  there = [Encoded(paths.join(folder, name)) for name in _sets(folder, kind)]
  if not there:
    raise ValueError(f"data.latents={folder!r} has no {kind}; python -m stdit_jax.encode writes them")
  changes = [differences(e.made_from, wanted) for e in there]
  if fits := [e for e, changed in zip(there, changes) if not changed]:
    if len(fits) > 1:
      raise ValueError(f"data.latents={folder!r} has {kind} of several encoders. Name one by its weights.")
    if not fits[0].parts:
      raise ValueError(f"the {kind} in data.latents={folder!r} are not complete. Start python -m stdit_jax.encode again.")
    return fits[0]
  changed = "; ".join(min(changes, key=len))
  raise ValueError(
    f"the {kind} in data.latents={folder!r} have another provenance: {changed}. Encode again, or restore these keys."
  )


def _sets(folder, kind):
  names = [name for name in paths.names(folder) if name.startswith(f"{kind}-")]
  return [name for name in names if paths.exists(paths.join(folder, name, _MADE_FROM))]


def has_text(folder: str) -> bool:
  """Whether the folder has embeddings of captions beside latents."""
  return not paths.is_remote(folder) and bool(_sets(folder, "text"))


# -------------------------------------------------------------------------------------------------------------- reading


class Part:
  """The output of one command. keys: memory-mapped; starts: first record of every shard, then the number of records."""

  def __init__(self, folder):
    self.folder = folder
    self.kind = os.path.basename(os.path.dirname(folder)).split("-")[0]
    self.keys = np.load(paths.join(folder, _KEYS), mmap_mode="r")
    values = json.loads(paths.read_text(paths.join(folder, _PART)))
    self.starts, self.made_for = np.asarray(values["starts"]), values["made_for"]

  @property
  def num_shards(self):
    return len(self.starts) - 1

  @property
  def is_whole(self):
    return paths.exists(paths.join(self.folder, _INFO))

  def shard(self, number):
    """Path of a shard, named as TFDS does."""
    return paths.join(self.folder, f"{self.kind}-train.array_record-{number:05}-of-{self.num_shards:05}")

  def missing(self):
    """Numbers of the shards that do not exist."""
    return [number for number in range(self.num_shards) if not paths.exists(self.shard(number))]

  def drop(self, keys):
    """Deletes the shards that hold these keys, as far as they exist."""
    for number in np.unique(np.searchsorted(self.starts, self.position(np.asarray(keys, np.int64))[0], "right") - 1):
      with contextlib.suppress(FileNotFoundError):
        os.unlink(self.shard(number))

  def position(self, keys):
    """(number of the record, whether it exists) of each key."""
    at = np.searchsorted(self.keys, keys)
    return at, self.keys[np.minimum(at, len(self.keys) - 1)] == keys

  @functools.cached_property
  def features(self):
    # Imported here, so that only workers that read records pay for it. ml_dtypes registers bfloat16 with NumPy.
    import ml_dtypes  # noqa: F401
    import tensorflow_datasets as tfds

    return tfds.features.FeatureConnector.from_config(self.folder)

  def read(self, number):
    """Record `number` as a dict."""
    shard = int(np.searchsorted(self.starts, number, "right")) - 1
    (record,) = _reader(self.shard(shard)).read([int(number - self.starts[shard])])
    return self.features.deserialize_example_np(record)


@functools.lru_cache(256)  # the number of open files is limited
def _reader(path):
  from array_record.python.array_record_module import ArrayRecordReader

  return ArrayRecordReader(path, options="readahead_buffer_size:0")


class Encoded:
  """One set of latents or embeddings, in parts. Picklable: workers open the files by path."""

  def __init__(self, folder):
    self.folder = folder
    self.made_from = json.loads(paths.read_text(paths.join(folder, _MADE_FROM)))

  def __getstate__(self):
    return {"folder": self.folder, "made_from": self.made_from}

  def part_numbers(self):
    """Numbers in the names of the parts' folders. One may be missing, since a user may delete a part."""
    return sorted(int(found[1]) for found in (re.fullmatch(r"part-(\d+)", name) for name in paths.names(self.folder)) if found)

  @functools.cached_property
  def all_parts(self):
    folders = [paths.join(self.folder, f"part-{i}") for i in self.part_numbers()]
    return [Part(folder) for folder in folders if paths.exists(paths.join(folder, _PART))]

  @functools.cached_property
  def parts(self):
    return [part for part in self.all_parts if part.is_whole]

  def epochs(self, identity):
    """The recorded number of epochs of this plan whose clips all exist."""
    return max((m["epochs"] for part in self.parts for m in part.made_for if m["plan"] == identity), default=0)

  def holds(self, keys):
    """Whether each key has a record, bool."""
    there = np.zeros(np.shape(keys), bool)
    for part in self.parts:
      there |= part.position(keys)[1]
    return there

  def read(self, key):
    """The record of a key as a dict. Raises KeyError if it has none."""
    for part in self.parts:
      at, there = part.position(key)
      if there:
        return part.read(int(at))
    raise KeyError(key)


class Cache:
  """What a training reads instead of videos, and instead of captions if `text` is given. Picklable.

  Attributes:
    epochs: number of first epochs of this plan that are cached completely.
    followed: {epoch: the epoch whose plan it follows} of a resumed training. The training keeps these, although more epochs
      may have been encoded since.
  """

  def __init__(self, latents, text, table, config):
    self.latents, self.text, self.table, self.config, self.followed = latents, text, table, config, {}
    identity = plan_identity(config, table)
    self.epochs = min(e.epochs(identity) for e in (latents, text) if e is not None)
    made_for = [m for part in latents.parts for m in part.made_for]
    self._rounds = max((m["epochs"] for m in made_for), default=0)
    changes = [plan.changed_keys(m["plan"], identity) for m in made_for if m["plan"] != identity]
    self._changes = min(changes, key=len, default=[])

  def source(self, epoch, plan_of):
    """The epoch whose plan an epoch follows: itself, or a cached epoch if the cache lacks its clips.

    `plan_of`: epoch -> `Plan`. Raises ValueError if no epoch is cached.
    """
    if epoch in self.followed:
      return self.followed[epoch]
    if self._holds(epoch, plan_of):
      return epoch
    if not self.epochs:  # another plan, say with other batch sizes: the parts do not record which of its epochs are cached
      self.epochs = next((e for e in range(self._rounds) if not self._holds(e, plan_of)), self._rounds)
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
    """Whether a key can hold the window of an epoch. Later windows are in no cache."""
    return not self.config.window(epoch) >> _BITS["window"]

  def _epochs_like(self, epoch):
    """The epochs that may have cached a row of an epoch: itself, the epoch that it repeats, then all others."""
    return filter(self._has_key, dict.fromkeys([epoch, epoch % (self.epochs or self._rounds or 1), *range(self._rounds)]))

  def other_captions(self, epoch):
    """Whether rows may keep the caption of an earlier epoch in this epoch, since the cache lacks their own."""
    return epoch >= self.epochs and self._captions_change

  @functools.cached_property
  def _captions_change(self):
    return self.text is not None and self.table.captions_change(self.config.scores)

  def clip(self, epoch, slot_row, row, bucket, ratio):
    """{latents_mean, latents_std (None if only means were stored), rate, error} of a row in a bucket."""
    for own in self._epochs_like(epoch):
      key = clip_keys(self.table, self.config, bucket, ratio, slot_row, row.num_frames, self.config.window(own))
      with contextlib.suppress(KeyError):
        record = self.latents.read(key)
        log_variance, std = record.get("log_variance"), None
        if log_variance is not None:
          std = np.exp(0.5 * log_variance.astype(np.float32))
        mean = record["mean"].astype(np.float32)
        rate = float(record["fps"]) or None
        return {"latents_mean": mean, "latents_std": std, "rate": rate, "error": record["error"].decode()}
    raise RuntimeError(f"{row.path}: no latents of {bucket.name} in {self.latents.folder}")

  def caption(self, epoch, caption_of):
    """(caption, embedding `[L, C]` float32). `caption_of`: epoch -> the row's caption."""
    for own in self._epochs_like(epoch):
      caption = caption_of(own)
      with contextlib.suppress(KeyError):
        return caption, self.text.read(caption_key(caption))["embedding"].astype(np.float32)
    raise RuntimeError(f"no embedding of the caption {caption_of(epoch)[:60]!r} in {self.text.folder}")


# -------------------------------------------------------------------------------------------------------------- writing


def prepare(folder, kind, made_from, keys, made_for, size_of_records, shard_bytes):
  """The `Part` whose shards must be written so that a folder holds all of `keys`. None if it holds them already.

  Args:
    folder: holds all sets.
    kind: "latents" or "text".
    made_from: provenance of the records.
    keys: sorted int64.
    made_for: [{"stage", "epochs", "plan"}] that need the keys.
    size_of_records: keys -> bytes of each record.
    shard_bytes: approximate size of a shard.

  Raises ValueError if another command has begun a part, or if the folder has a set with another dtype or `log_variance`.
  """
  same = None
  for name in _sets(folder, kind):
    there = Encoded(paths.join(folder, name))
    changed = differences(there.made_from, made_from)
    if not changed:
      same = there
    elif not [c for c in changed if not c.startswith(("dtype:", "log_variance:"))]:
      raise ValueError(f"--output {folder} has {kind} of other values ({'; '.join(changed)}); give another folder")
  if same is None:
    place = paths.join(folder, f"{kind}-{digest(made_from)[:12]}")
    os.makedirs(place, exist_ok=True)
    paths.write_text(paths.join(place, _MADE_FROM), json.dumps(made_from, indent=1))
    same = Encoded(place)
  wanted = keys[~same.holds(keys)]
  if unfinished := [part for part in same.all_parts if not part.is_whole]:
    if not np.array_equal(unfinished[0].keys, wanted):
      made = ", ".join(f"--stage {m['stage']} --epochs {m['epochs']}" for m in unfinished[0].made_for)
      raise ValueError(f"{unfinished[0].folder} is unfinished and was begun with {made}: finish it so, or remove it")
    return unfinished[0]
  if not len(wanted):
    if same.parts:
      _record(same.parts[-1], made_for)
    return None
  starts = _starts(size_of_records(wanted), shard_bytes)
  part = paths.join(same.folder, f"part-{max(same.part_numbers(), default=-1) + 1}")
  os.makedirs(part, exist_ok=True)
  with paths.whole(paths.join(part, _KEYS)) as temporary:
    np.save(temporary, wanted)
  paths.write_text(paths.join(part, _PART), json.dumps({"starts": starts, "made_for": made_for}))
  return Part(part)


def _starts(sizes, shard_bytes):
  """First record of every shard, then the number of records."""
  ends = np.cumsum(sizes)
  shard = (ends - 1) // shard_bytes
  return [*np.flatnonzero(np.diff(shard, prepend=-1)).tolist(), len(sizes)]


def _record(part, made_for):
  """Adds further plans to the record of a part that already holds their clips."""
  if new := [m for m in made_for if m not in part.made_for]:
    values = {"starts": part.starts.tolist(), "made_for": part.made_for + new}
    paths.write_text(paths.join(part.folder, _PART), json.dumps(values))


def features_of(kind, channels, dtype, log_variance=True):
  """TFDS features of records. Floats are bytes, since a protobuf has no float16 and rounds float64."""
  import ml_dtypes  # noqa: F401 - registers bfloat16 with NumPy
  import tensorflow_datasets as tfds

  tensor, scalar, text = tfds.features.Tensor, tfds.features.Scalar(np.int64), tfds.features.Text()
  if kind == "text":
    return tfds.features.FeaturesDict(
      {"caption": text, "embedding": tensor(shape=(None, channels), dtype=np.dtype(dtype), encoding="bytes")}
    )
  values = {"mean": tensor(shape=(None, None, None, channels), dtype=np.dtype(dtype), encoding="bytes")}
  values |= {"log_variance": values["mean"]} if log_variance else {}
  numbers = dict.fromkeys(("table", "row", "num_frames", "height", "width", "window"), scalar)
  texts = dict.fromkeys(("path", "resolution", "error"), text)
  fps = tensor(shape=(), dtype=np.float64, encoding="bytes")
  return tfds.features.FeaturesDict({**values, **numbers, **texts, "fps": fps})


def shard_writer(part: Part, numbers: Sequence[int], features) -> Generator[None, tuple[int, dict]]:
  """A generator that writes the shards `numbers`, in order. `send` it (key, record) of each key after a first `next`.

  A shard appears when it is complete. `close` drops an incomplete one. Raises OSError if the disk is full or fails.
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
          # A failed record must not shift the following ones: such a shard would look complete.
          assert key == wanted, (key, wanted, temporary)
          writer.write(features.serialize_example(record))
    except RuntimeError as error:  # array_record's error for a disk
      raise OSError(f"{part.shard(number)} cannot be written: {str(error).partition(';')[0]}") from error
  yield


def finish(part: Part, features) -> bool:
  """Registers a part as a TFDS data set if all its shards exist. Returns whether the part is complete."""
  if part.is_whole or part.missing():
    return part.is_whole
  import tensorflow_datasets as tfds

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
