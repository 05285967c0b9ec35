"""The plan: which rows form which global step, a function of (seed, table, config) alone.

Every process computes the same plan and reads its own rows of it. The plan of an epoch has three steps:

1. Each row goes to a bucket (`buckets.assign`).
2. The rows of a bucket are shuffled and laid out in batches of the bucket's global size.
3. The batches of all buckets are shuffled.

A *micro step* is one batch of one bucket. Its global number counts over all epochs. A *slot* is a place in an epoch's plan.
All random numbers follow from (seed, epoch), so one number describes the position in the data: the next micro step.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Sequence

import numpy as np

from data import aspect_ratios, buckets, sources
from data.buckets import Bucket
from data.config import DataConfig

_VERSION = 2  # of the plan files and of the algorithm: part of the digest
_RATIOS = 64  # a slot's value is slot row * _RATIOS + index of the aspect ratio
assert max(map(len, aspect_ratios.SIZES.values())) <= _RATIOS


def describe(config: DataConfig, table: sources.Table) -> dict:
  """Everything that the plan depends on, as a JSON-able dict. A checkpoint stores it."""
  tables = [{"fingerprint": p.fingerprint, "weight": p.weight} for p in table.parts]
  parsed = [[b.resolution, b.num_frames, b.keep_prob, b.duration_prob, b.batch_size] for b in config.parsed_buckets()]
  plain = {k: getattr(config, k) for k in ("seed", "frame_interval", "drop_last", "captions", "max_caption_length")}
  given = {k: getattr(config, k) for k in ("rows_per_bucket", "num_classes") if getattr(config, k) is not None}
  return {"version": _VERSION, "tables": tables, "buckets": parsed, **plain, **given}


def digest(description: dict) -> str:
  """sha256 of a description."""
  return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def place(count: int, skip: Iterable[int]) -> int:
  """The next global micro step after `count` steps were taken, when those in `skip` are skipped."""
  for position in sorted(skip):
    if position > count:
      break
    count += 1
  return count


def changed_keys(old: dict, new: dict) -> list[str]:
  """The differences between two descriptions, one text per key: ["seed: 42 -> 43", ...]."""
  changes = []
  for key in sorted({*old, *new}):
    # A checkpoint stores JSON, which has lists for tuples.
    a, b = (json.loads(json.dumps(d.get(key))) for d in (old, new))
    if a == b:
      continue
    if key == "tables" and isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
      parts = [f"[{i}].{k}" for i, (x, y) in enumerate(zip(a, b)) for k in ("fingerprint", "weight") if x.get(k) != y.get(k)]
      changes.append("tables" + ", ".join(parts) + " (contents of the table)" * any("finger" in p for p in parts))
    elif key == "buckets" and a and b:
      named = [{f"{r[0]} x {r[1]}": r for r in rows} for rows in (a, b)]
      changes.append("buckets: " + ", ".join(n for n in {**named[0], **named[1]} if named[0].get(n) != named[1].get(n)))
    else:
      why = " (another release, which draws the rows of buckets otherwise)" if key == "version" else ""
      changes.append(f"{key}: {json.dumps(a)} -> {json.dumps(b)}{why}")
  return changes


@dataclasses.dataclass(frozen=True)
class BucketReport:
  """Where the rows of an epoch went. `str(report)` is a table.

  rows: number of rows of all tables.
  buckets: a dict for each bucket: name, rows, batch_size, steps, refused (rows that fitted, but its keep probability sent
    them on), incomplete (rows dropped because they fill no batch; negative: rows repeated to fill one. The table shows "-3"
    and "+1").
  dropped: {reason: rows}.
  examples: {reason: the first such row, as text}.
  """

  rows: int
  buckets: tuple[dict, ...]
  dropped: dict[str, int]
  examples: dict[str, str]

  @property
  def steps(self) -> int:
    return sum(b["steps"] for b in self.buckets)

  def __str__(self):
    lines = [f"{'bucket':>12} {'rows':>10} {'batch':>6} {'steps':>8} {'refused':>10} {'last batch':>10}"]
    for b in self.buckets:
      batch = "-" if b["batch_size"] is None else b["batch_size"]
      rest = f"{-b['incomplete']:+,}" if b["incomplete"] else "0"
      lines.append(f"{b['name']:>12} {b['rows']:>10,} {batch:>6} {b['steps']:>8,} {b['refused']:>10,} {rest:>10}")
    used = sum(b["rows"] for b in self.buckets)
    lines.append(
      f"{self.rows:,} rows: {used:,} in buckets, {self.steps:,} steps" + (f"; {self.losses()}" if self.losses() else "")
    )
    lines += [f"  {reason}: first {example}" for reason, example in self.examples.items()]
    return "\n".join(lines)

  def losses(self) -> str:
    """The dropped rows in one line."""
    return "dropped: " + ", ".join(f"{n:,} {reason}" for reason, n in self.dropped.items()) if self.dropped else ""


def build_epoch(table: sources.Table, config: DataConfig, epoch: int) -> tuple[np.ndarray, BucketReport]:
  """The plan of one epoch: (int64 array as `Plan` reads it, report). Raises ValueError if it has no step."""
  parsed = config.parsed_buckets()
  frames, height, width, problem = (table.column(k) for k in ("num_frames", "height", "width", "problem"))
  left_out = table.left_out(config.seed, epoch)
  unusable = (problem > 0) | left_out
  frames, height, width = (np.where(unusable, 0, x).astype(np.int32) for x in (frames, height, width))
  members, reason, refused = _members((frames, height, width), config, epoch)
  dropped = {}
  for code in (buckets.TOO_SMALL, buckets.TOO_SHORT, buckets.NOT_KEPT):
    dropped[buckets.REASONS[code]] = int(((reason == code) & ~unusable).sum())
  dropped["left out this epoch (table weight)"] = int(left_out.sum())
  for code in np.unique(problem[problem > 0]):
    dropped[sources.PROBLEMS[code]] = int(((problem == code) & ~left_out).sum())
  lines, steps, begins, slots, begin, incomplete = [], [], [], [], 0, 0
  for i, b in enumerate(parsed):
    rows, ratio = members[i]
    count, line_rows = 0, len(rows)
    if len(rows):
      # The seed of a fixed set leaves the bucket's number out: the other buckets must not change the set.
      order = np.random.default_rng([config.seed, epoch, 0 if config.rows_per_bucket else i, 1]).permutation(len(rows))
      order = order[: config.rows_per_bucket]
      rows, ratio, line_rows = rows[order], ratio[order], len(order)
      count = len(rows) // b.batch_size if config.drop_last else -(-len(rows) // b.batch_size)
      slots.append(np.resize(rows * _RATIOS + ratio, count * b.batch_size))  # drops the last rows, or repeats the first
      steps.append(np.full(count, i))
      begins.append(begin + np.arange(count) * b.batch_size)
      begin += len(slots[-1])
    over = line_rows - count * (b.batch_size or 0)
    incomplete += max(over, 0)
    lines.append({"name": b.name, "rows": line_rows, "batch_size": b.batch_size, "steps": count,
                  "refused": int(refused[i]), "incomplete": over})  # fmt: skip
  dropped["incomplete batch"] = incomplete
  report = BucketReport(len(frames), tuple(lines), {k: v for k, v in dropped.items() if v}, table.problem_examples())
  if not report.steps:
    raise ValueError(_nothing_fits(report, parsed, epoch, height, width, frames))
  steps, begins, slots = np.concatenate(steps), np.concatenate(begins), np.concatenate(slots)
  order = np.random.default_rng([config.seed, epoch, 2]).permutation(len(steps))
  return _laid_out(steps[order], begins[order], slots, np.array([b.batch_size or 0 for b in parsed])), report


def _members(sizes, config, epoch):
  """The rows of every bucket. `sizes`: (num_frames, height, width) of all rows.

  Returns:
    For each bucket (rows, index of the aspect ratio of each); the reason [N] why a row has no bucket, or 0; the number of
    refused rows of each bucket.
  """
  parsed, seed = config.parsed_buckets(), (config.seed, epoch, 0)
  if not config.rows_per_bucket:
    bucket, ratio, reason, refused = buckets.assign(*sizes, seed, parsed, config.frame_interval)
    rows = [np.flatnonzero(bucket == i) for i in range(len(parsed))]
    return [(r, ratio[r]) for r in rows], reason, refused
  members, reasons = [], []
  for b in parsed:
    alone = dataclasses.replace(b, keep_prob=1.0, duration_prob=None)
    bucket, ratio, reason, _ = buckets.assign(*sizes, seed, (alone,), config.frame_interval)
    rows = np.flatnonzero(bucket == 0)
    members.append((rows, ratio[rows]))
    reasons.append(reason)
  reasons = np.stack(reasons)
  return members, np.where((reasons == buckets.FITS).any(0), buckets.FITS, reasons.max(0)), np.zeros(len(parsed), int)


def _laid_out(steps, begins, slots, sizes):
  """[number of steps, number of slots, bucket of each step, first slot of each step and the end, slots in step order]."""
  lengths = sizes[steps]
  ends = np.cumsum(lengths)
  source = np.repeat(begins - (ends - lengths), lengths) + np.arange(ends[-1])
  return np.concatenate([[len(steps), ends[-1]], steps, [0], ends, slots[source]]).astype(np.int64)


def _nothing_fits(report, parsed, epoch, height, width, frames):
  """The error of an epoch without a step."""
  text = f"epoch {epoch} has no step: {report.rows:,} rows, {report.losses() or 'none fits a bucket'}"
  smallest = min(parsed, key=lambda b: aspect_ratios.NUM_PIXELS[b.resolution])
  least = int(np.ceil(buckets.PIXEL_TOLERANCE * aspect_ratios.NUM_PIXELS[smallest.resolution]))
  largest, longest = int((height.astype(np.int64) * width).max()), int(frames.max())
  shortest = min(b.num_frames for b in parsed)
  if largest < least:
    text += f"; {smallest.resolution} needs {least:,} pixels, the largest row has {largest:,}"
  if 1 < longest <= shortest:
    text += f"; the shortest bucket has {shortest} frames, the longest row {longest} (it needs more than the bucket)"
  if "incomplete batch" in report.dropped:
    text += "; lower batch_size (or reference_devices) or set drop_last=False"
  return text


class Plan:
  """The plan of one epoch, memory-mapped. Steps and slots count from 0 in the epoch."""

  def __init__(self, path, parsed):
    data = np.load(path, mmap_mode="r")
    self.num_steps, self.num_slots = int(data[0]), int(data[1])
    self._bucket = data[2 : 2 + self.num_steps]
    self._begin = data[2 + self.num_steps : 3 + 2 * self.num_steps]
    self._slots = data[3 + 2 * self.num_steps :]
    self._buckets = parsed

  def bucket(self, step: int) -> Bucket:
    return self._buckets[self._bucket[step]]

  def ends(self, rows_per_step: Sequence[int]) -> np.ndarray:
    """Number of rows up to the end of every step, int64 [steps], if a step of bucket i has `rows_per_step[i]` rows."""
    return np.cumsum(np.asarray(rows_per_step, np.int64)[self._bucket])

  def bucket_index(self, step: int) -> int:
    return int(self._bucket[step])

  def buckets(self, step, count):
    """The buckets of the next `count` steps from `step` on, each once, in the order of need.

    After the end of the epoch its first steps stand for those of the next epoch, which may not be planned yet.
    """
    ahead = np.concatenate([self._bucket[step : step + count], self._bucket[: max(0, step + count - self.num_steps)]])
    return [self._buckets[ahead[i]] for i in np.sort(np.unique(ahead, return_index=True)[1])]

  def slots(self, step: int) -> tuple[int, int]:
    """(first slot, end) of a step."""
    return int(self._begin[step]), int(self._begin[step + 1])

  def slot(self, slot: int) -> tuple[int, str, Bucket, int]:
    """(slot row of the table, aspect-ratio key, bucket, step) of a slot."""
    step = int(np.searchsorted(self._begin, slot, "right")) - 1
    value, bucket = int(self._slots[slot]), self.bucket(step)
    return value // _RATIOS, list(aspect_ratios.SIZES[bucket.resolution])[value % _RATIOS], bucket, step

  def all_slots(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(bucket index, slot row, index of the aspect ratio) of all slots, int64 [slots] each."""
    return np.repeat(self._bucket, np.diff(self._begin)), self._slots // _RATIOS, self._slots % _RATIOS

  def rows(self, step: int) -> np.ndarray:
    """Slot rows of a step, int64 [batch size]."""
    begin, end = self.slots(step)
    return np.asarray(self._slots[begin:end]) // _RATIOS


class PlanSequence:
  """The plans of all epochs, as files in `folder`. The first process that needs a plan writes it. Picklable.

  With a `cache` (`latents.Cache`) an epoch may follow the plan of another epoch, `source(epoch)`.
  """

  def __init__(self, table, config, folder, cache=None):
    self.table, self.config, self.cache = table, config, cache
    self.description = describe(config, table)
    self.digest = digest(self.description)
    self.folder = os.path.join(folder, f"plan-{self.digest[:16]}")
    self._reset()

  def _reset(self):
    self.lock = threading.RLock()
    self._plans, self._starts, self._threads, self._sources = {}, [0], {}, {}
    self._parsed = self.config.parsed_buckets()

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if not k.startswith("_") and k != "lock"}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._reset()

  def _path(self, epoch, suffix):
    return os.path.join(self.folder, f"epoch-{epoch:04d}{suffix}")

  def source(self, epoch: int) -> int:
    """The epoch whose plan this epoch follows: itself, unless the cache lacks its clips."""
    if self.cache is None:
      return epoch
    with self.lock:
      if epoch not in self._sources:
        self._sources[epoch] = self.cache.source(epoch, self._plan)
      return self._sources[epoch]

  def plan(self, epoch: int) -> Plan:
    """The plan that an epoch follows. Builds it if no process has."""
    return self._plan(self.source(epoch))

  def _plan(self, epoch):
    with self.lock:
      if epoch not in self._plans:
        thread = self._threads.pop(epoch, None)
        if thread:
          thread.join()
        while epoch not in self._plans:  # another process may have deleted the file, see below
          try:
            self._plans[epoch] = Plan(self._path(epoch, ".npy"), self._parsed)
          except FileNotFoundError:
            self._build(epoch)
        for old in [e for e in self._plans if e < epoch - 1]:
          del self._plans[old]
          with contextlib.suppress(OSError):  # a process that still needs the file builds it again
            os.unlink(self._path(old, ".npy"))
      return self._plans[epoch]

  def report(self, epoch: int = 0) -> BucketReport:
    """Where the rows of the epoch went."""
    epoch = self.source(epoch)
    path = self._path(epoch, ".json")
    if not os.path.exists(path):
      self._build(epoch)
    with open(path) as f:
      values = json.load(f)
    return BucketReport(values["rows"], tuple(values["buckets"]), values["dropped"], values["examples"])

  def prepare(self, epoch: int) -> None:
    """Starts to build an epoch's plan in the background. `plan` raises its errors."""
    with self.lock:
      if epoch not in self._plans and epoch not in self._threads and not os.path.exists(self._path(epoch, ".npy")):
        self._threads[epoch] = threading.Thread(target=self._build_quietly, args=(epoch,), daemon=True)
        self._threads[epoch].start()

  def first_step(self, epoch: int) -> int:
    """Global number of the epoch's first step."""
    with self.lock:
      while len(self._starts) <= epoch:
        done = len(self._starts) - 1
        self._starts.append(self._starts[-1] + self.report(done).steps)
      return self._starts[epoch]

  def locate(self, step: int) -> tuple[int, int]:
    """(epoch, step in it) of a global micro step."""
    epoch = max(0, int(np.searchsorted(self._starts, step, "right")) - 1)
    while self.first_step(epoch + 1) <= step:
      epoch += 1
    return epoch, step - self.first_step(epoch)

  def _build_quietly(self, epoch):
    with contextlib.suppress(Exception):  # `plan` builds again, in a thread that can report the error
      self._build(epoch)

  def _build(self, epoch):
    data, report = build_epoch(self.table, self.config, epoch)
    os.makedirs(self.folder, exist_ok=True)
    text = json.dumps(dataclasses.asdict(report))
    # The report first, so that every plan has one.
    _write(self._path(epoch, ".json"), lambda f: f.write(text.encode()))
    _write(self._path(epoch, ".npy"), lambda f: np.save(f, data, allow_pickle=False))


def _write(path, write):
  """Writes a temporary file, then renames it: readers find the whole file or none."""
  temporary = f"{path}.{os.getpid()}.{threading.get_ident()}.tmp"
  try:
    with open(temporary, "wb") as f:
      write(f)
    os.replace(temporary, path)
  finally:
    if os.path.exists(temporary):
      os.unlink(temporary)
