"""The loader: decoded samples of this process, step by step, in the order of the plan.

`read_ahead.py` decodes rows in advance. The loader groups the rows into steps. Its whole state is the next global micro step.
This state is the same for any number of processes: n processes split each step's rows into n equal parts.
"""

import contextlib
import dataclasses
import errno
import logging
import math
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from data import aspect_ratios, groups, latents, paths, plan, read_ahead, sources, video
from data.config import DataConfig

log = logging.getLogger("data")
log.setLevel(logging.WARNING)  # reports skipped rows, although entry points silence libraries at the root logger

_LATE = "reading took longer than data.row_timeout"
_MOST_LATE = 4  # after so many late files, one after the other, the disk or the network is at fault
_LATE_AGAIN = 8  # a row after a late one has this part of the time, so that two of them do not look like a loop that hangs
_CAPTION, _CLIP, _SCORES = 3, 4, 5  # purposes of a row's random numbers

Shard = tuple[int | Sequence[int], int]
Condition = Callable[[str, int | None], dict[str, np.ndarray]]


@dataclasses.dataclass
class Sample:
  """One decoded row. If the row cannot be decoded, the weight is 0, `error` is the reason and all pixels are 0.

  A process that reads no row of a step gets one sample of weight 0 instead, which gives its arrays their shapes.
  """

  pixels: np.ndarray | None  # uint8 [T, H, W, 3]; None if the loader reads latents
  caption: str
  num_frames: int
  height: int
  width: int
  fps: float  # the frame rate that the model is told
  weight: float
  sample_id: tuple[int, int]  # `DataConfig.sample_epoch`, slot in the epoch's plan
  row: int  # number of the row in its table
  path: str
  error: str = ""
  label: int | None = None  # the row's class
  cond: dict[str, np.ndarray] | None = None  # the result of `condition` for caption and label
  text_features: np.ndarray | None = None  # float [L, C]
  latents_mean: np.ndarray | None = None  # normalised latents from a cache, float32 [T', h, w, C]
  latents_std: np.ndarray | None = None  # the same shape; None if the cache has only means


@dataclasses.dataclass
class LoadedStep:
  """One micro step."""

  bucket: tuple[str, int]  # resolution, frames
  step: int  # global number of the micro step
  epoch: int
  batch_size: int  # global
  samples: list[Sample]  # of this process


def make_loader(
  config: DataConfig, folder: str, *, shard: Shard | dict[tuple[str, int], Shard] = (0, 1), start: int = 0,
  skip: Iterable[int] = (), condition: Condition | None = None, epochs: int | None = None, cache: latents.Cache | None = None,
) -> "Loader":  # fmt: skip
  """Makes the loader, an iterator of `LoadedStep`.

  Args:
    config: settings of the data.
    folder: folder for tables and plans. Processes may share it.
    shard: the share of every batch that this process reads: (parts, n). The batch is split into n parts. `parts` is the
      number of one part, or several in order, or none. A dict {(resolution, frames): (parts, n)} splits each bucket in its own
      way.
    start: the first global micro step.
    skip: global micro steps to skip.
    condition: makes `Sample.cond` from caption and label. Workers call it for every row, also for rows that they cannot decode.
      It must be picklable. None = no `cond`.
    epochs: the loader ends after this many epochs. None = never.
    cache: latents to read instead of videos.

  Raises ValueError if no row fits a bucket, if a batch cannot be split, or if none of the first files exists.
  """
  config.validate()
  try:
    os.makedirs(folder, exist_ok=True)
    table = sources.open_table(config, folder)
    sequence = plan.PlanSequence(table, config, folder, cache)
    first = sequence.plan(0)
  except OSError as e:
    if e.errno in paths.PASSING:
      raise
    raise ValueError(f"data folder {folder} or a table cannot be used: {e.filename or ''} {e.strerror or e}") from None
  shares = _shares(config.parsed_buckets(), shard)
  if cache is None:
    check_files(table, [first.slot(i)[0] for i in range(min(64, first.num_slots))])
  return Loader(sequence, shares, start, skip, condition, epochs)


def _shares(parsed, shard):
  """Returns (parts, number of parts) of every bucket. Raises ValueError if a batch cannot be split into equal parts."""
  shares = []
  for b in parsed:
    if isinstance(shard, dict):
      parts, count = shard[b.resolution, b.num_frames] if b.batch_size else ((), 1)
    else:
      parts, count = shard
    parts = (parts,) if isinstance(parts, int) else tuple(parts)
    if not all(0 <= part < count for part in parts):
      raise ValueError(f"shard {(parts, count)}: parts are counted from 0 to {count - 1}")
    if b.batch_size and b.batch_size % count:
      raise ValueError(f"batch size {b.batch_size} of bucket {b.name} cannot be split into {count} equal parts")
    shares.append((parts, count))
  return shares


def check_files(table: sources.Table, slot_rows: Iterable[int]) -> None:
  """Raises ValueError if none of these rows' files exists, as for the table of another machine or a missing disk."""
  found = {table.row(slot_row).path for slot_row in slot_rows}
  if not any(video.is_address(p) or video.is_drawn(p) or paths.exists(p) for p in found):
    raise ValueError(
      f"data.tables: none of the first {len(found)} files exists, such as {min(found)}. Relative paths start at the table's "
      "folder. Correct the column `path`, or move the files there."
    )


class Loader(contextlib.AbstractContextManager["Loader"], Iterator[LoadedStep]):
  """Iterator of `LoadedStep`. Close the loader, or use it in a `with` block.

  Attributes:
    state: the next global micro step.
    ahead: how far it reads ahead.
    bad_rows: {path: reason} of the files that cannot be decoded.
  """

  def __init__(self, sequence, shares, start, skip, condition, epochs):
    self.plans, self.state, self.skip, self.epochs = sequence, start, frozenset(skip), epochs
    self._reported = {""}  # kinds of gaps, each logged once
    config, table = sequence.config, sequence.table
    # Samples of a step for this process, for every bucket. At least one, so that reading ahead stays close to this step.
    self.rows_per_step = [
      b.batch_size // n * len(parts) or 1 if b.batch_size else 0 for b, (parts, n) in zip(config.parsed_buckets(), shares)
    ]
    report = sequence.report(0)
    usable = report.rows - sum(n for reason, n in report.dropped.items() if reason in sources.PROBLEMS)
    self._limit = BadRows(config.max_bad_rows, min(usable, table.num_rows))
    self.bad_rows = self._limit.found
    epoch, step = sequence.locate(start)
    self._prepare(epoch + 1)
    decode = RowDecoder(config, table, condition, sequence.cache)
    names = [b.name for b in config.parsed_buckets()]
    row_bytes = bytes_of_rows(decode, sequence.plan(0))
    self.ahead = read_ahead.Ahead.of(config, row_bytes, self.rows_per_step, names, cached=bool(sequence.cache))
    source = groups.RowSource(sequence, shares, self.rows_per_step, self.ahead, (epoch, step), epochs)
    self._reading = read_ahead.Rows(source, decode, self.ahead)
    self._rows = _steady(self._reading)

  def __next__(self) -> LoadedStep:
    while self.state in self.skip:
      self._load()  # the workers have already read the step
    return self._load()

  def _load(self):
    epoch, index = self.plans.locate(self.state)
    if self._rows is None or (self.epochs is not None and epoch >= self.epochs):
      raise StopIteration
    current = self.plans.plan(epoch)
    if not index:
      self._prepare(epoch + 1)
    if self.plans.cache:
      self._report_gaps(self.plans.cache, epoch)
    bucket, samples = current.bucket(index), []
    for _ in range(self.rows_per_step[current.bucket_index(index)]):
      row = next(self._rows)
      sample = Sample(**{"pixels": None, **row, "sample_id": tuple(row["sample_id"])})
      # An error in the order of rows would mix buckets in one batch.
      assert (sample.sample_id[0], sample.num_frames) == (self.plans.config.sample_epoch(epoch), bucket.num_frames)
      self._limit.add(sample.path, sample.error)
      samples.append(sample)
    self.state += 1
    return LoadedStep((bucket.resolution, bucket.num_frames), self.state - 1, epoch, bucket.batch_size, samples)

  def _report_gaps(self, cache, epoch):
    """Logs once that an epoch repeats an earlier epoch, and once that rows keep the captions of an earlier epoch."""
    folder, source = os.path.dirname(cache.latents.folder), self.plans.source(epoch)
    if source != epoch:
      kind, text = "clips", f"epoch {epoch} repeats epoch {source}: {folder} lacks its own clips"
    else:
      kind = "captions" if cache.other_captions(epoch) else ""
      text = f"epoch {epoch}: {folder} may lack captions of this epoch; rows then keep the caption of an earlier epoch"
    if kind not in self._reported:
      self._reported.add(kind)
      log.warning(text)

  def _prepare(self, epoch):
    if self.epochs is None or epoch < self.epochs:
      self.plans.prepare(epoch)

  def close(self) -> None:
    if self._rows is not None:
      self._reading.close()
    self._rows = None

  def __exit__(self, *_):
    self.close()


class BadRows:
  """The files that cannot be decoded.

  Args:
    limit: the largest allowed number of such files, or (a float) their largest share of `rows`.
    rows: number of usable rows.

  Attributes:
    found: {path: reason}.
  """

  def __init__(self, limit: float, rows: int):
    self.found: dict[str, str] = {}
    self._limit = math.ceil(limit * rows) if isinstance(limit, float) else limit

  def add(self, path: str, error: str) -> None:
    """Adds a file whose decoding ended with `error` ("" = no error). Raises ValueError above the limit."""
    if not error or path in self.found:
      return
    self.found[path] = error
    log.warning("skipped %s: %s", path, error)
    if len(self.found) > self._limit:
      path, error = next(iter(self.found.items()))
      number = f"{len(self.found)} files cannot be decoded, more than data.max_bad_rows allows ({self._limit})"
      raise ValueError(f"{number}; first: {path}: {error}. Repair or remove the files, or raise data.max_bad_rows.")


def read_clips(
  config: DataConfig, table: sources.Table, keys: np.ndarray, clip_bytes: np.ndarray, together: int
) -> Iterator[tuple[int, dict]]:
  """Yields (key, {pixels, path, fps, error, away}) of decoded clips, see `ClipDecoder`. Close the iterator after use.

  Args:
    keys: keys of `latents.clip_keys`, in the order of the result; clip_bytes: bytes of each clip.
    together: number of clips that the caller takes at a time.

  Raises OSError if I/O errors persist.
  """
  ahead = read_ahead.Ahead.of(config, [int(clip_bytes.max())], [together], ["clips"])
  weights, most = np.ones(len(keys), np.int64) if ahead.in_rows else clip_bytes, ahead.groups[0] * ahead.weights[0]
  rows = read_ahead.Rows(groups.ListSource(keys, weights, most), ClipDecoder(config, table, None), ahead)
  with contextlib.closing(rows):
    yield from zip(keys, _steady(rows))


def _steady(rows):
  """Yields the rows. Raises OSError for a fault that is not the rows': a worker that ended, or no row that is read in time.

  Holds late rows until a row is read in time, so that a broken disk does not produce steps without rows.
  """
  late = []
  while True:
    try:
      row = next(rows)
    except StopIteration:
      yield from late
      return
    except RuntimeError as error:
      if not str(error).startswith("Worker process was terminated"):
        raise
      raise OSError(errno.EPIPE, f"data.workers: {error}") from error
    late.append(row)
    if not row.get("error", "").startswith(_LATE):
      yield from late
      late = []
    elif len({row["path"] for row in late}) == _MOST_LATE:  # clips of one film may be late for a reason of their own
      raise OSError(errno.ETIMEDOUT, f"{_MOST_LATE} files, one after the other: {row['error']}", row["path"])


def bytes_of_rows(decode: "RowDecoder", current: plan.Plan) -> list[int]:
  """About the bytes of a decoded row of every bucket: its pixels, or its cached latents, and its text features.

  Reads one row of each bucket of the plan, unless it has only pixels. Captions differ in length, so all buckets have the mean
  bytes of the text features.
  """
  parsed = decode.config.parsed_buckets()
  sizes, features = [3 * b.num_frames * aspect_ratios.NUM_PIXELS[b.resolution] for b in parsed], []
  for index, slot in current.first_slots().items():
    row, key, bucket, _ = current.slot(slot)
    if decode.cache:
      fields = decode((0, slot, row, key, bucket, True))
    elif path := decode.table.row(row).text_features:
      fields = {}
      with contextlib.suppress(video.BadVideo, OSError):  # the loader reports a file that it can't read
        fields["text_features"] = in_time(decode.config.row_timeout, sources.text_embedding, path)
    else:
      continue
    arrays = {name: value.nbytes for name, value in fields.items() if isinstance(value, np.ndarray)}
    features.append(arrays.pop("text_features", 0))
    sizes[index] = sum(arrays.values()) if decode.cache else sizes[index]
  return [size + int(np.mean(features or [0])) for size in sizes]


class _Helper:
  """A thread that computes the calls of another thread, and ends with it."""

  def __init__(self):
    self.calls, self.results = queue.SimpleQueue(), queue.SimpleQueue()
    threading.Thread(target=_compute, args=(self.calls, self.results), daemon=True).start()

  def __del__(self):
    self.calls.put(None)


def _compute(calls, results):
  while call := calls.get():
    function, args = call
    try:
      results.put((function(*args), None))
    except Exception as error:
      results.put((None, error))


_helpers = threading.local()  # a helper for each thread that reads rows, since scalers belong to threads


def in_time(seconds: float, function: Callable, *args: Any) -> Any:
  """`function(*args)`. Raises BadVideo if it takes longer than `seconds` (0: never), for instance if a server gives no answer.

  Python can't interrupt such a read, so another thread makes it. That thread stays behind if it takes too long.
  """
  if not seconds:
    return function(*args)
  if not hasattr(_helpers, "own"):
    _helpers.own = _Helper()
  _helpers.own.calls.put((function, args))
  late = getattr(_helpers, "late", False)
  _helpers.late = True
  try:
    result, error = _helpers.own.results.get(timeout=seconds / _LATE_AGAIN if late else seconds)
  except queue.Empty:
    del _helpers.own
    less = f". It had {seconds / _LATE_AGAIN:g} s, because the row before it was late" if late else ""
    raise video.BadVideo(f"{_LATE}={seconds:g} s{less}") from None
  _helpers.late = False
  if error:
    raise error
  return result


class RowDecoder:
  """Turns a row of `groups.RowSource` into the fields of a `Sample`. Picklable.

  A row is (epoch, slot, slot row, aspect-ratio key, bucket), and may have a sixth entry: whether the process owns the row. If
  not, the sample gets weight 0, and no video is read.
  """

  def __init__(self, config, table, condition, cache=None):
    self.config, self.table, self.condition, self.cache = config, table, condition, cache

  def __call__(self, element: tuple) -> dict:
    (epoch, slot, slot_row, key, bucket), owned = element[:5], all(element[5:])
    row, size = self.table.row(slot_row), aspect_ratios.size(bucket.resolution, key)
    sample_id = self.config.sample_epoch(epoch), slot
    fields = {"caption": "", "num_frames": bucket.num_frames, "height": size[0], "width": size[1], "fps": video.DEFAULT_FPS,
              "weight": float(owned), "sample_id": sample_id, "row": self.table.locate(slot_row)[1], "path": row.path,
              "label": row.label}  # fmt: skip
    try:
      if self.cache:
        self._read_cached(self.cache, fields, element, row)
      elif not owned:
        fields["pixels"] = np.zeros((bucket.num_frames, *size, 3), np.uint8)
      else:
        fields["caption"] = self.caption(row, epoch, slot_row)
        rate, fields["pixels"] = self._read(row, bucket.num_frames, size, self.config.window(epoch), slot_row)
        fields["fps"] = self._fps(rate, bucket.num_frames)
      if row.text_features and owned:
        fields["text_features"] = in_time(self.config.row_timeout, sources.text_embedding, row.text_features)
    except video.BadVideo as e:
      if not self.cache:
        fields["pixels"] = np.zeros((bucket.num_frames, *size, 3), np.uint8)
      fields.update(weight=0.0, error=str(e))
    except OSError as e:
      raise _persistent_error(row, e) from e
    if self.condition:
      fields["cond"] = self.condition(fields["caption"], row.label)
    return fields

  def _read_cached(self, cache, fields, element, row):
    """Adds latents, frame rate, caption and its cached embedding.

    Raises BadVideo if `encode` could not decode the row.
    """
    epoch, _, slot_row, key, bucket = element[:5]
    clip = cache.clip(epoch, slot_row, row, bucket, list(aspect_ratios.SIZES[bucket.resolution]).index(key))
    fields |= {name: clip[name] for name in ("latents_mean", "latents_std") if clip[name] is not None}
    fields["caption"] = self.caption(row, epoch, slot_row)
    if cache.text:
      fields["caption"], fields["text_features"] = cache.caption(epoch, lambda own: self.caption(row, own, slot_row))
    if clip["rate"]:
      fields["fps"] = self._fps(clip["rate"], bucket.num_frames)
    if clip["error"]:
      raise video.BadVideo(clip["error"])

  def _rng(self, epoch, slot_row, purpose):
    return np.random.default_rng([self.config.seed, epoch, slot_row, purpose])

  def caption(self, row: sources.Row, epoch: int, slot_row: int) -> str:
    """The caption of a row in an epoch: one of the row's captions, followed by scores."""
    caption = ""
    if row.captions:
      caption = row.captions[int(self._rng(epoch, slot_row, _CAPTION).integers(len(row.captions)))]
    scores = {k: row.scores[k] for k in self.config.scores if k in row.scores}
    if scores and caption:
      from data import captions

      caption = captions.add_scores(caption, scores, self._rng(epoch, slot_row, _SCORES), self.config.score_drop)
    return caption

  @staticmethod
  def _rate(row, num_frames):
    """The file's own frames per second."""
    return video.IMAGE_FPS if num_frames == 1 else row.fps or video.frame_rate(row.path)

  def _fps(self, rate, num_frames):
    """The frame rate that the model is told: always 120 for images, else by `fps_rule`."""
    interval = self.config.frame_interval
    rules = {"exact": rate / interval, "1.2": rate // interval, "1.1": rate}
    return video.IMAGE_FPS if num_frames == 1 else rules[self.config.fps_rule]

  def _read(self, row, num_frames, size, window, slot_row):
    """(frame rate of the file, pixels) of a row. Raises BadVideo if the file can't be read within `row_timeout`."""

    def read():
      rate, rng = self._rate(row, num_frames), self._rng(window, slot_row, _CLIP)
      indices = row.start + video.clip_indices(row.num_frames, num_frames, self.config.frame_interval, rng)
      return rate, video.read_frames(row.path, indices, size=size, resize=self.config.resize, crop=row.crop)

    return in_time(self.config.row_timeout, read)


def _persistent_error(row, error):
  """The OSError for an I/O error that stays after all attempts."""
  return OSError(error.errno, f"reading failed again and again: {error.strerror or error}", row.path)


class ClipDecoder(RowDecoder):
  """Turns the key of a clip into {pixels, path, fps, error, away}. Picklable.

  `fps` is the file's own frame rate, 0 if unknown. `away` is True if the file is missing or may not be read.
  """

  def __call__(self, key: int) -> dict:
    clip = latents.unpack(int(key))
    row, num_frames = self.table.row(clip["row"]), clip["num_frames"]
    _, _, size = latents.size_of(clip["resolution"], clip["ratio"])
    fields = {"path": row.path, "fps": 0.0, "error": "", "away": False, "pixels": np.zeros((num_frames, *size, 3), np.uint8)}
    try:
      rate, fields["pixels"] = self._read(row, num_frames, size, clip["window"], clip["row"])
      fields["fps"] = float(rate)
    except video.BadVideo as e:
      fields |= {"error": str(e), "away": isinstance(e, video.Away)}
    except OSError as e:
      raise _persistent_error(row, e) from e
    return fields
