"""`DataConfig`: everything that decides what the loader yields, checked before anything runs."""

import dataclasses
import difflib
from collections.abc import Mapping

from data import buckets, paths, video

CAPTION_RULES = ("required", "optional")
FPS_RULES = ("exact", "1.2", "1.1")
SCORES = ("aes", "flow", "cmotion")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Settings of the training data. The first group decides the plan: changing it starts other data (`plan.changed_keys`).

  tables: metadata tables (.parquet, .csv, .jsonl): a path, or a tuple of paths and of (path, weight) pairs. A weight of 3
    puts every row three times into an epoch, 0.25 a quarter of the rows, chosen anew every epoch; 2.5 is two whole copies
    and a half.
  buckets: rows (resolution, num_frames, keep_prob or (keep_prob, duration_prob), batch_size); see `buckets.parse_buckets`.
  reference_devices: the batch sizes are per device of so many devices, as the original writes them; 1 = they are global.
  seed: of bucket draws, shuffling, clip positions, choice of captions.
  frame_interval: source frames per frame used (Open-Sora 1.1: 3, 1.2: 1).
  drop_last: drop what doesn't fill a batch at the end of an epoch; False repeats rows instead.
  captions: "required" leaves out rows without a caption, "optional" takes them with an empty one (autoencoders).
  max_caption_length: rows with longer captions (characters) are left out; far shorter ones are cut by the tokenizer.
  rows_per_bucket: not None makes a fixed set to measure on: at most so many rows of every bucket, out of all that fit it,
    whatever its probabilities and the other buckets; a row may be in several.

  windows_per_row: clips (places in time) that a row is cut into, which come round epoch after epoch, so that their latents
    can be kept; 0 = another place in every epoch, as the original.
  resize: "area" or "original" (`video.read_frames`).
  scores: score columns that are written behind captions ("aesthetic score: 6.5."), those that the tables have; () = none.
  score_drop: probability of leaving out each of them.
  fps_rule: frame rate told to the model: "exact" file rate / frame_interval, "1.2" the same rounded down, "1.1" file rate.
  latents: folder that `python -m stdit_jax.encode` wrote: latents (and embeddings of captions, if there and wanted) are read
    from it in place of videos, the same ones in the same order; "" = videos.
  workers: decoding processes; 0 = threads of this process.
  read_ahead: rows decoded in advance; None = two steps of the largest bucket, within 2 GB.
  max_bad_rows: files that may fail to decode before the run stops, a number or (a float) a share of the usable rows.
  num_classes: N = every row needs a label from 0 to N - 1; None = labels are not needed. The model decides: users can't set it.
  """

  tables: tuple = ()
  buckets: tuple = ()
  reference_devices: int = 1
  seed: int = 42
  frame_interval: int = 1
  drop_last: bool = True
  captions: str = "required"
  max_caption_length: int = 20_000
  rows_per_bucket: int | None = None

  windows_per_row: int = 0
  resize: str = "area"
  scores: tuple = SCORES
  score_drop: float = 0.2
  fps_rule: str = "exact"
  latents: str = ""
  workers: int = 2
  read_ahead: int | None = None
  max_bad_rows: int | float = 0.1
  num_classes: int | None = None

  @classmethod
  def create(cls, values):
    """From a dict or ConfigDict; unknown keys are named with the closest known one. Validated."""
    names = [f.name for f in dataclasses.fields(cls) if f.name != "num_classes"]
    for key in values:
      if key not in names:
        close = difflib.get_close_matches(key, names, 1)
        raise ValueError(
          f"unknown data key {key!r}" + (f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}")
        )
    config = cls(**{k: plain(v) for k, v in values.items()})
    config.validate()
    return config

  def validate(self):
    """Raises ValueError with one line that names the key, what is wrong and what is allowed."""
    self.table_weights()
    self.parsed_buckets()
    whole = {
      "reference_devices": 1,
      "frame_interval": 1,
      "seed": 0,
      "workers": 0,
      "max_caption_length": 1,
      "windows_per_row": 0,
    }
    for key, low in whole.items():
      _check_whole(key, getattr(self, key), low)
    for key in ("read_ahead", "rows_per_bucket", "num_classes"):
      if getattr(self, key) is not None:
        _check_whole(key, getattr(self, key), 1)
    for key, allowed in (("resize", video.RESIZE_MODES), ("captions", CAPTION_RULES), ("fps_rule", FPS_RULES)):
      if getattr(self, key) not in allowed:
        raise ValueError(f"data.{key} = {getattr(self, key)!r} is none of {', '.join(map(repr, allowed))}")
    if not isinstance(self.latents, str) or paths.is_remote(self.latents):
      raise ValueError(f"data.latents = {self.latents!r} is no folder of this machine, which alone ArrayRecord can read")
    for score in self.scores:
      if score not in SCORES:
        raise ValueError(f"data.scores has {score!r}, which is none of {', '.join(SCORES)}")
    if not _is_number(self.score_drop) or not 0 <= self.score_drop <= 1:
      raise ValueError(f"data.score_drop = {self.score_drop!r} is no number from 0 to 1")
    bad = self.max_bad_rows
    if not _is_number(bad) or bad < 0 or (isinstance(bad, float) and bad > 1):
      raise ValueError(f"data.max_bad_rows = {bad!r} is neither a number of rows nor a share (a float) from 0.0 to 1.0")

  def window(self, epoch):
    """Number of the clips' place in time in an epoch."""
    return epoch % self.windows_per_row if self.windows_per_row else epoch

  def table_weights(self):
    """-> [(path, weight)]."""
    if not self.tables:
      raise ValueError("data.tables needs at least one table: a tuple of paths or of (path, weight) pairs")
    pairs = []
    for entry in (self.tables,) if isinstance(self.tables, str) else self.tables:
      path, weight = entry if isinstance(entry, (tuple, list)) and len(entry) == 2 else (entry, 1)
      if not isinstance(path, str) or not _is_number(weight) or not 0 < weight <= 10_000:
        raise ValueError(f"data.tables has {entry!r}: give a path or (path, weight) with a weight above 0")
      pairs.append((path, weight))
    return pairs

  def parsed_buckets(self):
    """Buckets in the order of search, batch sizes global."""
    parsed = buckets.parse_buckets(self.buckets)
    scale = self.reference_devices
    return tuple(dataclasses.replace(b, batch_size=b.batch_size and b.batch_size * scale) for b in parsed)


def plain(value):
  """Containers of ml_collections -> tuples and dicts."""
  if isinstance(value, (list, tuple)):
    return tuple(plain(v) for v in value)
  if isinstance(value, Mapping) or hasattr(value, "to_dict"):
    return {k: plain(v) for k, v in value.items()}
  return value


def _is_number(value):
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_whole(key, value, low):
  if isinstance(value, bool) or not isinstance(value, int) or value < low:
    raise ValueError(f"data.{key} = {value!r} is no whole number from {low} up")
