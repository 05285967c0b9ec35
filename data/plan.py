"""The plan: which rows form which global step, a function of (seed, table, config) alone.

Every process computes the same plan and reads its own rows of it. The plan of an epoch has three steps:

1. `buckets.assign` gives each row a bucket.
2. The plan shuffles the rows of each bucket and forms batches of the bucket's global size.
3. The plan shuffles the batches of all buckets.

A *micro step* is one batch of one bucket. Its global number counts the micro steps of all epochs. A *slot* is one sample of an
epoch's plan. All random numbers follow from (seed, epoch). So one number, the next micro step, is the position in the data.
"""

import contextlib
import dataclasses
import json
import os
import threading
from collections.abc import Iterable, Sequence

import numpy as np

from data import aspect_ratios, buckets, paths, sources
from data.buckets import Bucket
from data.config import DataConfig
from data.shards import digest

_VERSION = 2  # of the plan files and of the algorithm: part of the digest
_RATIOS = 64  # a slot's value is slot row * _RATIOS + index of the aspect ratio
assert max(map(len, aspect_ratios.SIZES.values())) <= _RATIOS


def describe(config: DataConfig, table: sources.Table) -> dict:
  """Everything that the plan depends on, as a dict for JSON. A checkpoint stores it."""
  tables = [{"fingerprint": p.fingerprint, "weight": p.weight} for p in table.parts]
  parsed = [[b.resolution, b.num_frames, b.keep_prob, b.duration_prob, b.batch_size] for b in config.parsed_buckets()]
  plain = {k: getattr(config, k) for k in ("seed", "frame_interval", "drop_last", "captions", "max_caption_length")}
  optional = ("rows_per_bucket", "num_classes", "aspect_ratios", "stage")
  given = {k: getattr(config, k) for k in optional if getattr(config, k) is not None}
  return {"version": _VERSION, "tables": tables, "buckets": parsed, **plain, **given}


def place(count: int, skip: Iterable[int]) -> int:
  """The next global micro step of a training that has done `count` steps and skips the steps in `skip`."""
  for position in sorted(skip):
    count += position <= count
  return count


def changed_keys(old: dict, new: dict) -> list[str]:
  """The differences between two descriptions, one text per key: ["seed: 42 -> 43", ...]."""
  changes = []
  for key in sorted({*old, *new}):
    # JSON turns the tuples of a new description into the lists that a checkpoint stores.
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
      why = {"version": " (another release, which assigns rows to buckets differently)",
             "stage": " (an earlier release gave all stages one order)" if a is None else ""}.get(key, "")  # fmt: skip
      changes.append(f"{key}: {json.dumps(a)} -> {json.dumps(b)}{why}")
  return changes


@dataclasses.dataclass(frozen=True)
class BucketReport:
  """Numbers of an epoch's rows: how many each bucket has, and how many the plan drops. `str(report)` is a table.

  `buckets` has a dict for each bucket with the keys name, rows, batch_size, steps, refused (rows that fit, but the keep
  probability refused them) and incomplete (rows that the plan drops because they fill no batch; negative if it repeats rows to
  fill a batch). The table prints a dropped row as -1, a repeated row as +1.
  """

  rows: int  # of all tables
  buckets: Sequence[dict]
  dropped: dict[str, int]  # {reason: number of rows}
  examples: dict[str, str]  # {reason: the first row that is unusable for this reason, as text}

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
    total = f"{self.rows:,} rows: {used:,} in buckets, {self.steps:,} steps"
    lines.append(f"{total}; {self.losses()}" if self.dropped else total)
    lines += [f"  {reason}: first {example}" for reason, example in self.examples.items()]
    return "\n".join(lines)

  def losses(self) -> str:
    """The numbers of dropped rows in one line."""
    return "dropped: " + ", ".join(f"{n:,} {reason}" for reason, n in self.dropped.items()) if self.dropped else ""


def build_epoch(table: sources.Table, config: DataConfig, epoch: int) -> tuple[np.ndarray, BucketReport]:
  """Builds the plan of one epoch: (int64 array as `Plan` reads it, report). Raises ValueError if the plan has no step."""
  parsed = config.parsed_buckets()
  problem, left_out = table.column("problem"), table.left_out(config.draws, epoch)
  unusable = (problem > 0) | left_out
  sizes = [np.where(unusable, 0, table.column(name)).astype(np.int32) for name in ("num_frames", "height", "width")]
  members, reason, refused = _members(sizes, config, epoch)
  lines, steps, slots = [], [], []
  for i, (b, (rows, ratio)) in enumerate(zip(parsed, members)):
    # With `rows_per_bucket` the seed does not depend on i: other buckets must not change the selected rows.
    rng = np.random.default_rng([*config.draws, epoch, 0 if config.rows_per_bucket else i, 1])
    order = rng.permutation(len(rows))[: config.rows_per_bucket]
    size = b.batch_size or 1  # a bucket without a batch size has no rows
    count = len(order) // size if config.drop_last else -(-len(order) // size)
    slots.append(np.resize(rows[order] * _RATIOS + ratio[order], count * size))  # drops the last rows, or repeats the first
    steps.append(np.full(count, i))
    lines.append({"name": b.name, "rows": len(order), "batch_size": b.batch_size, "steps": count,
                  "refused": int(refused[i]), "incomplete": len(order) - count * size})  # fmt: skip
  dropped = {text: int(((reason == code) & ~unusable).sum()) for code, text in enumerate(buckets.REASONS) if code}
  dropped["left out this epoch (table weight)"] = int(left_out.sum())
  for code in np.unique(problem[problem > 0]):
    dropped[sources.PROBLEMS[code]] = int(((problem == code) & ~left_out).sum())
  dropped["incomplete batch"] = sum(max(line["incomplete"], 0) for line in lines)
  report = BucketReport(len(problem), lines, {k: v for k, v in dropped.items() if v}, table.problem_examples())
  if not report.steps:
    raise ValueError(_nothing_fits(report, parsed, epoch, *sizes))
  rng = np.random.default_rng([*config.draws, epoch, 2])
  return _shuffled(np.concatenate(steps), np.concatenate(slots), np.array([b.batch_size or 0 for b in parsed]), rng), report


def _members(sizes, config, epoch):
  """Finds the rows of every bucket. `sizes`: (num_frames, height, width) of all rows.

  Returns [(rows, index of the aspect ratio of each row)] of the buckets, and `reason` and `refused` as `buckets.assign`.
  """
  parsed, seed = config.parsed_buckets(), (*config.draws, epoch, 0)

  def assign(own):
    bucket, ratio, reason, refused = buckets.assign(
      *sizes, seed=seed, buckets=own, interval=config.frame_interval, ratios=config.aspect_ratios
    )
    rows = [np.flatnonzero(bucket == i) for i in range(len(own))]
    return [(r, ratio[r]) for r in rows], reason, refused

  if not config.rows_per_bucket:
    return assign(parsed)
  # Every bucket alone, without its probabilities. A bucket without a batch size has no rows.
  alone = [assign([dataclasses.replace(b, keep_prob=float(b.batch_size is not None), duration_prob=None)]) for b in parsed]
  reasons = np.stack([reason for _, reason, _ in alone])
  reason = np.where((reasons == buckets.FITS).any(0), buckets.FITS, reasons.max(0))
  return [rows for (rows,), _, _ in alone], reason, np.zeros(len(parsed), int)


def _shuffled(steps, slots, sizes, rng):
  """Shuffles the steps of an epoch, given the bucket of each step, the slots of all steps and the batch size of each bucket.

  Returns one array: number of steps, number of slots, bucket of each step, first slot of each step and the end, slots.
  """
  order = rng.permutation(len(steps))
  begins = (np.cumsum(sizes[steps]) - sizes[steps])[order]
  steps = steps[order]
  lengths = sizes[steps]
  ends = np.cumsum(lengths)
  source = np.repeat(begins - (ends - lengths), lengths) + np.arange(len(slots))  # old place of each shuffled slot
  return np.concatenate([[len(steps), len(slots)], steps, [0], ends, slots[source]]).astype(np.int64)


def _nothing_fits(report, parsed, epoch, frames, height, width):
  """The error message for an epoch without a step, with the reasons."""
  text = f"epoch {epoch} has no step: {report.rows:,} rows, {report.losses() or 'none fits a bucket'}"
  smallest = min(parsed, key=lambda b: aspect_ratios.NUM_PIXELS[b.resolution])
  least = int(np.ceil(buckets.PIXEL_TOLERANCE * aspect_ratios.NUM_PIXELS[smallest.resolution]))
  largest, longest = int((height.astype(np.int64) * width).max()), int(frames.max())
  shortest = min(b.num_frames for b in parsed)
  if largest < least:
    text += f"; {smallest.resolution} needs {least:,} pixels, the largest row has {largest:,}"
  if 1 < longest <= shortest:
    text += f"; the shortest bucket has {shortest} frames, the longest row {longest} (a row needs more frames than its bucket)"
  if "incomplete batch" in report.dropped:
    text += "; lower batch_size (or reference_devices) or set drop_last=False"
  return text


class Plan:
  """The plan of one epoch, a memory-mapped file. Its steps and slots count from 0."""

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
    """Number of rows up to the end of every step, int64 [steps]. A step of bucket i has `rows_per_step[i]` rows."""
    return np.cumsum(np.asarray(rows_per_step, np.int64)[self._bucket])

  def bucket_index(self, step: int) -> int:
    return int(self._bucket[step])

  def buckets(self, step: int, count: int) -> list[Bucket]:
    """The distinct buckets of the `count` steps from `step` on, in the order of their first use.

    This epoch's first steps stand in for the next epoch's steps, since the next epoch may have no plan yet.
    """
    ahead = [*self._bucket[step : step + count], *self._bucket[: max(0, step + count - self.num_steps)]]
    return [self._buckets[i] for i in dict.fromkeys(ahead)]

  def sizes(self, step: int) -> list[tuple[int, int, int]]:
    """(frames, height, width) of the clips of all steps, each once, in the order of first use from `step` on.

    The sizes that only earlier steps have come last.
    """
    bucket, _, ratio = self.all_slots()
    values, first = np.unique(np.roll(bucket * _RATIOS + ratio, -int(self._begin[step])), return_index=True)
    found = ((self._buckets[value // _RATIOS], value % _RATIOS) for value in values[first.argsort()].tolist())
    return [(b.num_frames, *list(aspect_ratios.SIZES[b.resolution].values())[ratio]) for b, ratio in found]

  def slots(self, step: int) -> tuple[int, int]:
    """Returns (first slot, end) of a step."""
    return int(self._begin[step]), int(self._begin[step + 1])

  def slot(self, slot: int) -> tuple[int, str, Bucket, int]:
    """Returns (slot row of the table, aspect-ratio key, bucket, step) of a slot."""
    step = int(np.searchsorted(self._begin, slot, "right")) - 1
    value, bucket = int(self._slots[slot]), self.bucket(step)
    return value // _RATIOS, list(aspect_ratios.SIZES[bucket.resolution])[value % _RATIOS], bucket, step

  def all_slots(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns bucket index, slot row and index of the aspect ratio of all slots, int64 [slots] each."""
    return np.repeat(self._bucket, np.diff(self._begin)), self._slots // _RATIOS, self._slots % _RATIOS

  def rows(self, step: int) -> np.ndarray:
    """Slot rows of a step, int64 [batch size]."""
    begin, end = self.slots(step)
    return np.asarray(self._slots[begin:end]) // _RATIOS


class PlanSequence:
  """The plans of all epochs, as files in `folder`. Picklable. The first process that needs a plan writes its file.

  With a `cache` (`latents.Cache`) an epoch may follow the plan of another epoch, `source(epoch)`.
  """

  def __init__(self, table, config, folder, cache=None):
    self.table, self.config, self.cache = table, config, cache
    self.description = describe(config, table)
    self.folder = os.path.join(folder, f"plan-{digest(self.description)[:16]}")
    self.lock = threading.RLock()
    self._plans, self._starts, self._threads, self._sources = {}, [0], {}, {}

  def __reduce__(self):  # an unpickled sequence opens its own files
    return PlanSequence, (self.table, self.config, os.path.dirname(self.folder), self.cache)

  def _path(self, epoch, suffix):
    return os.path.join(self.folder, f"epoch-{epoch:04d}{suffix}")

  def source(self, epoch: int) -> int:
    """The epoch whose plan an epoch follows, see `latents.Cache.source`."""
    if self.cache is None:
      return epoch
    with self.lock:
      if epoch not in self._sources:
        self._sources[epoch] = self.cache.source(epoch, self._plan)
      return self._sources[epoch]

  def plan(self, epoch: int) -> Plan:
    """The plan that an epoch follows. Builds the plan if its file does not exist."""
    return self._plan(self.source(epoch))

  def _plan(self, epoch):
    with self.lock:
      if epoch not in self._plans:
        if epoch in self._threads:
          self._threads.pop(epoch).join()
        while epoch not in self._plans:  # another process may delete the file at any time, see below
          try:
            self._plans[epoch] = Plan(self._path(epoch, ".npy"), self.config.parsed_buckets())
          except FileNotFoundError:
            self._build(epoch)
        for old in [e for e in self._plans if e < epoch - 1]:
          del self._plans[old]
          with contextlib.suppress(OSError):  # a process that still needs the file builds it again
            os.unlink(self._path(old, ".npy"))
      return self._plans[epoch]

  def report(self, epoch: int = 0) -> BucketReport:
    epoch = self.source(epoch)
    path = self._path(epoch, ".json")
    if not os.path.exists(path):
      self._build(epoch)
    return BucketReport(**json.loads(paths.read_text(path)))

  def prepare(self, epoch: int) -> None:
    """Starts to build an epoch's plan in the background. `plan` builds again, and raises the error, if this fails."""

    def build():
      with contextlib.suppress(Exception):
        self._build(epoch)

    with self.lock:
      if epoch not in self._plans and epoch not in self._threads and not os.path.exists(self._path(epoch, ".npy")):
        self._threads[epoch] = threading.Thread(target=build, daemon=True)
        self._threads[epoch].start()

  def first_step(self, epoch: int) -> int:
    """Global number of the epoch's first step."""
    with self.lock:
      while len(self._starts) <= epoch:
        self._starts.append(self._starts[-1] + self.report(len(self._starts) - 1).steps)
      return self._starts[epoch]

  def locate(self, step: int) -> tuple[int, int]:
    """Returns (epoch, step of the epoch) for a global micro step."""
    epoch = max(0, int(np.searchsorted(self._starts, step, "right")) - 1)
    while self.first_step(epoch + 1) <= step:
      epoch += 1
    return epoch, step - self.first_step(epoch)

  def _build(self, epoch):
    data, report = build_epoch(self.table, self.config, epoch)
    # The report first, so that every plan has one.
    paths.write_text(self._path(epoch, ".json"), json.dumps(dataclasses.asdict(report)))
    with paths.whole(self._path(epoch, ".npy")) as temporary:
      np.save(temporary, data, allow_pickle=False)
