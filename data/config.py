"""`DataConfig`: all settings that decide what the loader yields. They are checked before anything runs."""

import dataclasses
import difflib
import zlib
from collections.abc import Mapping
from typing import Any

from data import buckets, paths, video
from data.buckets import Bucket

CAPTION_RULES = ("required", "optional")
FPS_RULES = ("exact", "1.2", "1.1")
SCORES = ("aes", "flow", "cmotion")
# The smallest allowed value of each key that is a whole number.
_LEAST = {"seed": 0, "workers": 0, "windows_per_row": 0, "reference_devices": 1, "frame_interval": 1, "max_caption_length": 1,
          "read_ahead": 1, "rows_per_bucket": 1, "num_classes": 1, "aspect_ratios": 1}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Settings of the training data. The first group, `num_classes` and `stage` decide the plan. A resumed run refuses changes
  of them (`plan.changed_keys`).

  Attributes:
    tables: metadata tables (.parquet, .csv, .jsonl): a path, or a tuple of paths and of (path, weight) pairs. With weight 3
      an epoch contains every row three times. With weight 0.25 an epoch contains a new quarter of the rows. Weight 2.5 means
      two and a half copies.
    buckets: rows (resolution, num_frames, keep_prob or (keep_prob, duration_prob), batch_size); see `buckets.parse_buckets`.
    reference_devices: number of devices for which `batch_size` in the table of buckets is given. The global batch size is
      batch_size * reference_devices. 1 = batch sizes are global.
    seed: seed of bucket draws, shuffling, clip positions and the choice of captions.
    frame_interval: stride in time. One of `frame_interval` source frames is used (Open-Sora 1.1: 3, 1.2: 1).
    drop_last: True drops the rows that fill no batch at the end of an epoch. False repeats other rows to fill the batch.
    captions: "required" skips rows without a caption. "optional" gives such rows an empty caption (autoencoders, labels).
    max_caption_length: the loader skips rows with longer captions (characters). The tokenizer cuts captions at far fewer
      characters.
    aspect_ratios: number of aspect ratios of each resolution that are used; None = all. A training from videos compiles a
      program for each size of clips. Fewer ratios mean fewer programs, and a little more cropping.
    rows_per_bucket: a number selects at most this many rows per bucket, for measurements. The selection does not depend on
      probabilities or on other buckets, and a row may be in several buckets. None = all rows, by the probabilities.

    windows_per_row: number of different clips (places in time) per row. The epochs cycle through them, so that a cache can hold
      their latents. 0 = a new place in every epoch, as in Open-Sora.
    resize: "area" or "original" (`video.read_frames`).
    scores: names of the score columns that the loader writes behind captions ("aesthetic score: 6.5."), if a table has them.
      () = none.
    score_drop: probability of dropping each score.
    fps_rule: frame rate that the model is told. "exact": file rate / frame_interval. "1.2": the same, rounded down. "1.1":
      file rate.
    latents: a folder that `python -m stdit_jax.encode` wrote. The loader reads the same clips, in the same order, as latents.
      It reads captions as embeddings if the folder has them. "" = read videos.
    workers: number of decoding processes; 0 = threads of this process. None = seven eighths of the CPUs that this process may
      use, at most 16 for cached latents. If several processes of a run share a machine, set it: they do not know each other.
    read_ahead: number of rows to decode in advance. None = by their bytes: eight steps of the bucket with the most bytes, at
      most 4 GiB, but at least two steps; at most a quarter of the free memory. `train` prints the result.
    row_timeout: seconds after which a row that is still being read counts as undecodable; 0 = never. Keep it below
      `watchdog.timeout`, which ends a training that waits too long for data. If four rows, one after the other, take longer,
      the loader raises OSError, because then the disk or the network is at fault.
    max_bad_rows: files that may fail to decode before the run stops: a number, or (a float) a share of the usable rows.
    stage: name of the stage of a training, which decides bucket draws, shuffling and sample ids together with `seed`. So no
      stage repeats the order of another one, or its noise. None = no stage. The program sets this value.
    num_classes: every row needs a label from 0 to num_classes - 1; None = rows need no label. The model's conditioner sets this
      value. A configuration cannot set it.
  """

  tables: tuple | str = ()
  buckets: tuple | Mapping = ()
  reference_devices: int = 1
  seed: int = 42
  frame_interval: int = 1
  drop_last: bool = True
  captions: str = "required"
  max_caption_length: int = 20_000
  aspect_ratios: int | None = None
  rows_per_bucket: int | None = None

  windows_per_row: int = 0
  resize: str = "area"
  scores: tuple = SCORES
  score_drop: float = 0.2
  fps_rule: str = "exact"
  latents: str = ""
  workers: int | None = None
  read_ahead: int | None = None
  row_timeout: float = 240.0
  max_bad_rows: int | float = 0.1
  num_classes: int | None = None
  stage: str | None = None

  @classmethod
  def create(cls, values: Mapping) -> "DataConfig":
    """Makes a checked configuration from a dict or ConfigDict. Raises ValueError for an unknown key or a wrong value."""
    names = [f.name for f in dataclasses.fields(cls) if f.name not in ("num_classes", "stage")]
    for key in values:
      if key not in names:
        close = difflib.get_close_matches(key, names, 1)
        hint = f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"
        raise ValueError(f"unknown data key {key!r}{hint}")
    config = cls(**{k: plain(v) for k, v in values.items()})
    config.validate()
    return config

  @property
  def draws(self) -> tuple[int, ...]:
    """Seed of the draws that differ between stages."""
    return (self.seed,) if self.stage is None else (self.seed, zlib.crc32(self.stage.encode()))

  def sample_epoch(self, epoch: int) -> int:
    """The epoch in the ids of samples: other numbers in every stage."""
    return (epoch + sum(self.draws[1:])) % 2**32

  def validate(self) -> None:
    """Raises ValueError if a value is wrong. The error is one line: the key, the value, what is allowed."""
    self.table_weights()
    self.parsed_buckets()
    for key, least in _LEAST.items():
      value = getattr(self, key)
      if value is None and key in ("workers", "read_ahead", "rows_per_bucket", "num_classes", "aspect_ratios"):
        continue
      if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"data.{key} = {value!r} is no whole number from {least} up")
    for key, allowed in (("resize", video.RESIZE_MODES), ("captions", CAPTION_RULES), ("fps_rule", FPS_RULES)):
      if getattr(self, key) not in allowed:
        raise ValueError(f"data.{key} = {getattr(self, key)!r} is none of {', '.join(map(repr, allowed))}")
    if not isinstance(self.latents, str) or paths.is_remote(self.latents):
      reason = "is no folder of this machine. ArrayRecord reads local files only: copy the folder."
      raise ValueError(f"data.latents = {self.latents!r} {reason}")
    for score in self.scores:
      if score not in SCORES:
        raise ValueError(f"data.scores has {score!r}, which is none of {', '.join(SCORES)}")
    if not _is_number(self.row_timeout) or self.row_timeout < 0:
      raise ValueError(f"data.row_timeout = {self.row_timeout!r} is no number of seconds from 0 up")
    if not _is_number(self.score_drop) or not 0 <= self.score_drop <= 1:
      raise ValueError(f"data.score_drop = {self.score_drop!r} is no number from 0 to 1")
    bad = self.max_bad_rows
    if not _is_number(bad) or bad < 0 or (isinstance(bad, float) and bad > 1):
      raise ValueError(f"data.max_bad_rows = {bad!r} is neither a number of rows nor a share (a float) from 0.0 to 1.0")

  def window(self, epoch: int) -> int:
    """Number of the window (place in time) at which an epoch reads every row."""
    return epoch % self.windows_per_row if self.windows_per_row else epoch

  def table_weights(self) -> list[tuple[str, float]]:
    """Returns [(path, weight)] of the tables."""
    if not self.tables:
      raise ValueError("data.tables needs at least one table: a tuple of paths or of (path, weight) pairs")
    pairs = []
    for entry in (self.tables,) if isinstance(self.tables, str) else self.tables:
      path, weight = entry if isinstance(entry, (tuple, list)) and len(entry) == 2 else (entry, 1)
      if not isinstance(path, str) or not _is_number(weight) or not 0 < weight <= 10_000:
        raise ValueError(f"data.tables has {entry!r}: give a path or (path, weight) with a weight above 0")
      pairs.append((path, weight))
    return pairs

  def parsed_buckets(self) -> tuple[Bucket, ...]:
    """Returns the buckets in the order of search. Their batch sizes are global."""
    parsed, scale = buckets.parse_buckets(self.buckets), self.reference_devices
    return tuple(dataclasses.replace(b, batch_size=b.batch_size and b.batch_size * scale) for b in parsed)


def plain(value: Any) -> Any:
  """Turns the containers of ml_collections into tuples and dicts."""
  if isinstance(value, (list, tuple)):
    return tuple(plain(v) for v in value)
  if isinstance(value, Mapping) or hasattr(value, "to_dict"):
    return {k: plain(v) for k, v in value.items()}
  return value


def _is_number(value):
  return isinstance(value, (int, float)) and not isinstance(value, bool)
