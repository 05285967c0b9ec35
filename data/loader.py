"""The loader: decoded samples of this process, step by step, in the order of the plan.

grain decodes rows in advance, in worker processes. The loader groups the rows into steps. Its whole state is one number, the
next global micro step, which means the same on any number of processes: part i of n is the i-th n-th of every step's rows.
"""

import bisect
import contextlib
import dataclasses
import functools
import logging
import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from data import aspect_ratios, latents, paths, plan, sources, video
from data.config import DataConfig

log = logging.getLogger("data")
log.setLevel(logging.WARNING)  # entry points silence libraries at the root logger; skipped rows are reported nevertheless

_ENDLESS = 1 << 40  # elements of a source without an end; grain requires a length
_AHEAD_BYTES = 2 << 30  # at most, of rows decoded in advance
_CAPTION, _CLIP, _SCORES = 3, 4, 5  # purposes of a row's random numbers

Shard = tuple[int | Sequence[int], int]
Condition = Callable[[str, int | None], dict[str, np.ndarray]]


@dataclasses.dataclass
class Sample:
  """One row, decoded.

  pixels: uint8 [T, H, W, 3]. None if `latents_mean` is given.
  num_frames, height, width: sizes of the pixels.
  fps: the frame rate that the model is told.
  weight, error: 1 and "". A row that could not be decoded has weight 0, the reason as `error` and zeros as pixels.
  sample_id: (epoch, slot in the epoch's plan).
  row: number of the row in its table.
  label: the row's class, or None.
  cond: {name: array}, what `condition` made of caption and label, or None.
  text_features: float [L, C], or None.
  latents_mean, latents_std: normalised, float32 [T', h, w, C], from a cache. The second is None if only means were stored.
  """

  pixels: np.ndarray | None
  caption: str
  num_frames: int
  height: int
  width: int
  fps: float
  weight: float
  sample_id: tuple[int, int]
  row: int
  path: str
  error: str = ""
  label: int | None = None
  cond: dict[str, np.ndarray] | None = None
  text_features: np.ndarray | None = None
  latents_mean: np.ndarray | None = None
  latents_std: np.ndarray | None = None


@dataclasses.dataclass
class LoadedStep:
  """One micro step.

  bucket: (resolution, frames).
  step: its global number.
  batch_size: global, over all shards.
  samples: those of this shard.
  """

  bucket: tuple[str, int]
  step: int
  epoch: int
  batch_size: int
  samples: list[Sample]


def make_loader(
  config: DataConfig,
  folder: str,
  *,
  shard: Shard | dict[tuple[str, int], Shard] = (0, 1),
  start: int = 0,
  skip: Iterable[int] = (),
  condition: Condition | None = None,
  epochs: int | None = None,
  cache: latents.Cache | None = None,
) -> "Loader":
  """An iterator of `LoadedStep`.

  Args:
    config: a `DataConfig`.
    folder: where tables and plans are kept; processes may share it.
    shard: the rows of every batch that this process reads: (parts, number of parts), where `parts` is one number or several in
      order. A dict {(resolution, frames): such a pair} splits each bucket in its own way.
    start: global micro step to begin with.
    skip: global micro steps to skip.
    condition: makes `Sample.cond` of caption and label, in the workers. It must be picklable. It is called for rows that cannot
      be decoded, too. None = no `cond`.
    epochs: the loader ends after this many epochs, None = never.
    cache: latents to read instead of videos.

  Raises ValueError if no row fits a bucket, a batch cannot be split, or none of the first files exists.
  """
  config.validate()
  try:
    os.makedirs(folder, exist_ok=True)
    table = sources.open_table(config, folder)
    sequence = plan.PlanSequence(table, config, folder, cache)
    first = sequence.plan(0)
  except OSError as e:
    raise ValueError(f"data folder {folder} or a table cannot be used: {e.filename or ''} {e.strerror or e}") from None
  shares = _shares(config.parsed_buckets(), shard)
  if cache is None:
    check_files(table, [first.slot(i)[0] for i in range(min(64, first.num_slots))])
  return Loader(sequence, shares, start, skip, condition, epochs)


def _shares(parsed, shard):
  """(parts, number of parts) of every bucket. Raises ValueError if a batch cannot be split so."""
  shares = []
  for b in parsed:
    parts, count = shard[b.resolution, b.num_frames] if isinstance(shard, dict) and b.batch_size else ((), 1)
    if not isinstance(shard, dict):
      parts, count = shard
    parts = (parts,) if isinstance(parts, int) else tuple(parts)
    if not all(0 <= part < count for part in parts):
      raise ValueError(f"shard {(parts, count)}: parts are counted from 0 to {count - 1}")
    if b.batch_size and b.batch_size % count:
      raise ValueError(f"batch size {b.batch_size} of bucket {b.name} cannot be split into {count} equal parts")
    shares.append((parts, count))
  return shares


def _rows_per_step(parsed, shares):
  """Rows of a step that this process reads, for every bucket."""
  return [(b.batch_size or 0) // count * len(parts) for b, (parts, count) in zip(parsed, shares)]


def check_files(table: sources.Table, slot_rows: Iterable[int]) -> None:
  """Raises ValueError if none of these rows' files exists: the table of another machine, a wrong folder, a missing disk."""
  found = {table.row(slot_row).path for slot_row in slot_rows}
  if not any(video.is_address(p) or video.is_drawn(p) or paths.exists(p) for p in found):
    raise ValueError(
      f"data.tables: none of the first {len(found)} files exists, such as {min(found)}. Relative paths start at the table's "
      "folder. Correct the column `path`, or move the files there."
    )


class Loader:
  """Iterator of `LoadedStep`; `state` is the next micro step. Close it, or use it in a `with` block."""

  def __init__(self, sequence, shares, start, skip, condition, epochs):
    self.plans, self.state, self.skip, self.epochs = sequence, start, frozenset(skip), epochs
    self._reported = set()  # what is logged once
    config, table = sequence.config, sequence.table
    self.rows_per_step = _rows_per_step(config.parsed_buckets(), shares)
    usable = sequence.report(0)
    usable = usable.rows - sum(n for reason, n in usable.dropped.items() if reason in sources.PROBLEMS)
    self._bad_rows = BadRows(config.max_bad_rows, min(usable, table.num_rows))
    epoch, step = sequence.locate(start)
    first = 0
    if step and (epochs is None or epoch < epochs):
      first = int(sequence.plan(epoch).ends(self.rows_per_step)[step - 1])
    self._prepare(epoch + 1)
    source = RowSource(sequence, shares, epoch, first, epochs)
    self._rows = _read_ahead(source, RowDecoder(config, table, condition, sequence.cache), config, self.rows_per_step)

  @property
  def bad_rows(self) -> dict[str, str]:
    """{path: why it could not be decoded}."""
    return self._bad_rows.found

  @property
  def report(self) -> plan.BucketReport:
    return self.plans.report(0)

  def __iter__(self):
    return self

  def __next__(self) -> LoadedStep:
    while self.state in self.skip:
      self._load()  # the workers have read it already
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
    bucket = current.bucket(index)
    samples = []
    for _ in range(self.rows_per_step[current.bucket_index(index)]):
      element = next(self._rows)
      sample = Sample(**{"pixels": None, **element, "sample_id": tuple(element["sample_id"].tolist())})
      # A batch of mixed buckets must not go unnoticed.
      assert (sample.sample_id[0], sample.num_frames) == (epoch, bucket.num_frames), (sample.sample_id, epoch, index)
      self._bad_rows.add(sample.path, sample.error)
      samples.append(sample)
    loaded = LoadedStep((bucket.resolution, bucket.num_frames), self.state, epoch, bucket.batch_size, samples)
    self.state += 1
    return loaded

  def _report_gaps(self, cache, epoch):
    """Logs, each once, that an epoch repeats an earlier one, and that rows keep captions of an earlier epoch."""
    folder, source = os.path.dirname(cache.latents.folder), self.plans.source(epoch)
    if source != epoch:
      gap = "clips", f"epoch {epoch} repeats epoch {source}: {folder} lacks its own clips"
    elif cache.other_captions(epoch):
      gap = (
        "captions",
        f"epoch {epoch}: {folder} may lack captions of this epoch; rows then keep the caption of an earlier epoch",
      )
    else:
      return
    if gap[0] not in self._reported:
      self._reported.add(gap[0])
      log.warning(gap[1])

  def _prepare(self, epoch):
    if self.epochs is None or epoch < self.epochs:
      self.plans.prepare(epoch)

  def close(self) -> None:
    if self._rows is not None:
      self._rows.close()
    self._rows = None

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()


class BadRows:
  """Files that could not be decoded: `found` {path: reason}.

  `limit`: the largest number of them, or (a float) their largest share of `rows`.
  """

  def __init__(self, limit, rows):
    self.found = {}
    self._limit = math.ceil(limit * rows) if isinstance(limit, float) else limit

  def add(self, path, error):
    """`error`: "" for a row that was decoded. Raises ValueError above the limit."""
    if not error or path in self.found:
      return
    self.found[path] = error
    log.warning("skipped %s: %s", path, error)
    if len(self.found) > self._limit:
      path, error = next(iter(self.found.items()))
      number = f"{len(self.found)} files cannot be decoded, more than data.max_bad_rows allows ({self._limit})"
      raise ValueError(f"{number}; first: {path}: {error}. Repair or remove the files, or raise data.max_bad_rows.")


def read_clips(config: DataConfig, table: sources.Table, keys: np.ndarray, ahead: int) -> Iterator[tuple[int, dict]]:
  """Iterates over decoded clips: (key, {pixels, path, fps, error, away}), as `ClipDecoder` returns them. Close it after use.

  keys: from `latents.clip_keys`, in the order of the result.
  ahead: clips that are decoded in advance.
  Raises RuntimeError if I/O errors persist.
  """
  rows = _read_ahead(keys.tolist(), ClipDecoder(config, table, None), dataclasses.replace(config, read_ahead=ahead), [ahead])
  with contextlib.closing(rows):
    yield from zip(keys, rows)


def _read_ahead(source, decode, config, rows_per_step):
  """grain's iterator over decoded rows, with worker processes or threads."""
  import grain  # imports jax if it is installed; only this function pays for that
  from absl import flags

  dataset = grain.MapDataset.source(source).map(decode)
  used = [b for b in config.parsed_buckets() if b.batch_size]
  largest = max(rows_per_step)
  row_bytes = max(b.num_frames * 3 * aspect_ratios.NUM_PIXELS[b.resolution] for b in used)
  ahead = config.read_ahead or max(2, min(2 * largest, _AHEAD_BYTES // row_bytes))
  if not config.workers:
    threads = min(ahead, os.cpu_count() or 1)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)))
  if not flags.FLAGS.is_parsed():  # grain reads absl flags, but a library's user may never call app.run
    flags.FLAGS.mark_as_parsed()
  rows = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  options = grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=-(-ahead // config.workers))
  return iter(rows.mp_prefetch(options, worker_init_fn=_end_with_parent))


class RowSource:
  """The rows that one process reads, in the order of the plan: element number -> what `RowDecoder` takes. Picklable.

  epoch, first: the epoch, and the number of the row in it, of element 0.
  """

  def __init__(self, sequence, shares, epoch, first, epochs):
    self.plans, self.shares, self.epoch, self.epochs = sequence, shares, epoch, epochs
    self._totals, self._first = [], first  # number of elements up to the end of each epoch, from `epoch` on
    self._ends = None, None  # (epoch, number of elements up to the end of each of its steps) of the epoch read last

  def __len__(self):
    return _ENDLESS

  def __repr__(self):
    return f"RowSource(shares={self.shares})"

  def _ends_of(self, epoch):
    if self._ends[0] != epoch:
      rows = _rows_per_step(self.plans.config.parsed_buckets(), self.shares)
      self._ends = epoch, self.plans.plan(epoch).ends(rows)
    return self._ends[1]

  def __getitem__(self, element):
    element += self._first
    with self.plans.lock:
      while not self._totals or element >= self._totals[-1]:
        epoch = self.epoch + len(self._totals)
        if self.epochs is not None and epoch >= self.epochs:
          return ()  # not None: grain skips None and would search for ever
        self._totals.append(int(self._ends_of(epoch)[-1]) + (self._totals[-1] if self._totals else 0))
      number = bisect.bisect_right(self._totals, element)
      current, ends = self.plans.plan(self.epoch + number), self._ends_of(self.epoch + number)
    within = element - (self._totals[number - 1] if number else 0)
    step = int(np.searchsorted(ends, within, "right"))
    within -= int(ends[step - 1]) if step else 0
    begin, end = current.slots(step)
    parts, count = self.shares[current.bucket_index(step)]
    size = (end - begin) // count
    slot = begin + parts[within // size] * size + within % size
    row, key, bucket, _ = current.slot(slot)
    return self.epoch + number, slot, row, key, bucket


def _end_with_parent(*_):
  """Ends this worker process when its parent ends. Otherwise the workers of a killed training keep their memory for ever."""
  parent = multiprocessing.parent_process()

  def watch():
    parent.join()
    os._exit(1)

  if parent is not None:
    threading.Thread(target=watch, daemon=True).start()


class RowDecoder:
  """(epoch, slot, slot row, aspect-ratio key, bucket) -> the fields of a `Sample`. Picklable."""

  def __init__(self, config, table, condition, cache=None):
    self.config, self.table, self.condition, self.cache = config, table, condition, cache

  def __call__(self, element):
    if not element:
      return {"end": np.zeros(1)}
    epoch, slot, slot_row, key, bucket = element
    row = self.table.row(slot_row)
    height, width = aspect_ratios.size(bucket.resolution, key)
    fields = {"caption": "", "num_frames": bucket.num_frames, "height": height, "width": width, "fps": video.DEFAULT_FPS}
    fields |= {"weight": 1.0, "sample_id": np.array([epoch, slot]), "row": self.table.locate(slot_row)[1], "path": row.path}
    fields["label"] = row.label
    try:
      if self.cache:
        self._read_cached(fields, element, row)
      else:
        fields["caption"] = self.caption(row, epoch, slot_row)
        fields["fps"] = self._fps(self._rate(row, bucket.num_frames), bucket.num_frames)
        fields["pixels"] = self._pixels(row, bucket.num_frames, (height, width), self.config.window(epoch), slot_row)
      if row.text_features:
        fields["text_features"] = sources.text_embedding(row.text_features)
    except video.BadVideo as e:
      if not self.cache:
        fields["pixels"] = np.zeros((bucket.num_frames, height, width, 3), np.uint8)
      fields.update(weight=0.0, error=str(e))
    except OSError as e:
      raise _lasting(row, e) from e
    if self.condition:
      fields["cond"] = self.condition(fields["caption"], row.label)
    return fields

  def _read_cached(self, fields, element, row):
    """Adds latents, frame rate, caption and its cached embedding. Raises BadVideo if the row could not be decoded when it was
    encoded."""
    epoch, _, slot_row, key, bucket = element
    clip = self.cache.clip(epoch, slot_row, row, bucket, list(aspect_ratios.SIZES[bucket.resolution]).index(key))
    fields |= {name: clip[name] for name in ("latents_mean", "latents_std") if clip[name] is not None}
    if self.cache.text:
      caption_of = functools.partial(self.caption, row, slot_row=slot_row)
      fields["caption"], fields["text_features"] = self.cache.caption(epoch, caption_of)
    else:
      fields["caption"] = self.caption(row, epoch, slot_row)
    if clip["rate"]:
      fields["fps"] = self._fps(clip["rate"], bucket.num_frames)
    if clip["error"]:
      raise video.BadVideo(clip["error"])

  def _rng(self, epoch, slot_row, purpose):
    return np.random.default_rng([self.config.seed, epoch, slot_row, purpose])

  def caption(self, row: sources.Row, epoch: int, slot_row: int) -> str:
    """The caption of a row in an epoch: one of its captions, with the scores behind it."""
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
    if num_frames == 1:
      return video.IMAGE_FPS
    return {"exact": rate / self.config.frame_interval, "1.2": rate // self.config.frame_interval, "1.1": rate}[
      self.config.fps_rule
    ]

  def _pixels(self, row, num_frames, size, window, slot_row):
    rng = self._rng(window, slot_row, _CLIP)
    indices = row.start + video.clip_indices(row.num_frames, num_frames, self.config.frame_interval, rng)
    return video.read_frames(row.path, indices, size=size, resize=self.config.resize, crop=row.crop)


def _lasting(row, error):
  text = f"{row.path}: reading failed again and again: {error.strerror or error}"
  return RuntimeError(f"{text}. Check the disk or the bucket, then start again.")


class ClipDecoder(RowDecoder):
  """Key of a clip -> {pixels, path, fps (the file's own, 0 if unknown), error, away (the file was not found)}. Picklable."""

  def __call__(self, key):
    clip = latents.unpack(int(key))
    row, num_frames = self.table.row(clip["row"]), clip["num_frames"]
    _, _, size = latents.size_of(clip["resolution"], clip["ratio"])
    fields = {"path": row.path, "fps": 0.0, "error": "", "away": False, "pixels": np.zeros((num_frames, *size, 3), np.uint8)}
    try:
      fields["fps"] = float(self._rate(row, num_frames))
      fields["pixels"] = self._pixels(row, num_frames, size, clip["window"], clip["row"])
    except video.BadVideo as e:
      fields |= {"error": str(e), "away": isinstance(e, video.Away)}
    except OSError as e:
      raise _lasting(row, e) from e
    return fields
