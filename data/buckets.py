"""Which bucket (resolution, number of frames, aspect ratio) each row of a table belongs to, for millions of rows at once.

The rules are those of Open-Sora 1.2 (`Bucket.get_bucket_id`), which contain those of 1.1. Resolutions are tried from most
to fewest pixels. One is passed over when height * width < 0.8 * its pixels. Within it the longest length f with
num_frames > f * frame_interval (strictly) is taken; a length with a duration probability is considered only if a first
random draw does not exceed it. The row stays if the next draw is below the keep probability, else the search goes on with
the next smaller resolution (not with a shorter length). Images (num_frames 1) fit 1-frame entries only.

The draws are those of `np.random.default_rng(seed + bucket number).random()`, bit for bit, computed for many seeds at once.
"""

import dataclasses
import os
from collections.abc import Mapping
from concurrent import futures

import numpy as np

from data import aspect_ratios

# A picture may have as little as this share of a resolution's pixels.
PIXEL_TOLERANCE = 0.8
# Why a row has no bucket (codes of `assign`).
FITS, TOO_SMALL, TOO_SHORT, NOT_KEPT = 0, 1, 2, 3
REASONS = ("", "too small", "too short", "keep probability")
_CHUNK = 1 << 16  # rows per pass: a pass's temporary arrays stay in the processor's cache


@dataclasses.dataclass(frozen=True)
class Bucket:
  """One row of a bucket table: clips of `num_frames` frames (1 = images) at a resolution name.

  `keep_prob` is the probability that a fitting row stays, `duration_prob` that this length is considered at all,
  `batch_size` the global number of samples per micro step (None only with keep_prob 0: such an entry sends clips that are
  long enough for it to smaller resolutions).
  """

  resolution: str
  num_frames: int
  keep_prob: float
  batch_size: int | None
  duration_prob: float | None = None

  @property
  def name(self):
    return f"{self.resolution} x {self.num_frames}"


def parse_buckets(rows):
  """Bucket rows -> tuple of `Bucket` in the order of search (pixels, then frames, descending).

  Rows are `(resolution, num_frames, keep_prob | (keep_prob, duration_prob), batch_size)`; the original's nested form
  `{resolution: {num_frames: (keep_prob, batch_size)}}` is read as well. Raises ValueError with one line per mistake.
  """
  if isinstance(rows, Mapping):
    rows = [(name, frames, *entry) for name, lengths in rows.items() for frames, entry in lengths.items()]
  buckets = [_parse_row(row) for row in rows]
  if not buckets:
    raise ValueError("the bucket table is empty: give rows such as ('144p', 51, 1.0, 6)")
  seen = set()
  for b in buckets:
    if (b.resolution, b.num_frames) in seen:
      raise ValueError(f"bucket {b.name} stands twice in the bucket table")
    seen.add((b.resolution, b.num_frames))
  # Two stable sorts: resolutions of equal pixels (2880, 4k) keep the order of the table, as in the original.
  names = sorted(dict.fromkeys(b.resolution for b in buckets), key=lambda n: -aspect_ratios.NUM_PIXELS[n])
  return tuple(sorted(buckets, key=lambda b: (names.index(b.resolution), -b.num_frames)))


def _parse_row(row):
  if isinstance(row, Bucket):
    keep = row.keep_prob if row.duration_prob is None else (row.keep_prob, row.duration_prob)
    row = (row.resolution, row.num_frames, keep, row.batch_size)
  if isinstance(row, str) or not hasattr(row, "__len__") or len(row) != 4:
    raise ValueError(f"bucket row {row!r} needs 4 values: resolution, num_frames, keep_prob or (keep, duration), batch_size")
  resolution, frames, keep, batch = row
  name = f"bucket row {tuple(row)!r}"
  try:
    resolution, frames = aspect_ratios.check_resolution(resolution), aspect_ratios.get_num_frames(frames)
  except ValueError as e:
    raise ValueError(f"{name}: {e}") from None
  duration = None
  if isinstance(keep, (tuple, list)):
    if len(keep) != 2 or frames == 1:
      why = "images take one probability" if frames == 1 else "a pair is (keep probability, duration probability)"
      raise ValueError(f"{name}: probability {keep!r}: {why}")
    keep, duration = keep
  for value, what in ((keep, "keep"), (duration, "duration")):
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1):
      raise ValueError(f"{name}: {what} probability {value!r} is no number from 0 to 1")
  if batch is None:
    if keep != 0:
      raise ValueError(f"{name}: batch_size None is allowed with keep probability 0 only")
  elif isinstance(batch, bool) or not isinstance(batch, (int, np.integer)) or batch < 1:
    raise ValueError(f"{name}: batch_size {batch!r} is no positive whole number")
  return Bucket(resolution, frames, float(keep), batch, None if duration is None else float(duration))


def num_buckets(buckets):
  """Number of (resolution, frames, aspect ratio) triples: the stride between the seeds of two rows in the original."""
  return sum(len(aspect_ratios.SIZES[b.resolution]) for b in buckets)


def row_seeds(seed, epoch, rows, buckets):
  """Seeds of rows as the original's sampler gives them: seed + epoch + row * num_buckets (uint64)."""
  return np.asarray(rows, np.uint64) * np.uint64(num_buckets(buckets)) + np.uint64(seed + epoch)


def assign(num_frames, height, width, seeds, buckets, *, frame_interval=1):
  """Bucket of every row.

  Args:
    num_frames, height, width: integer arrays [N] of the source clips (1 frame = image).
    seeds: uint64 array [N] (`row_seeds`), or (seed, epoch, first row number) from which they follow.
    buckets: what `parse_buckets` returned.
    frame_interval: source frames per frame used, a number or an array [N].

  Returns:
    bucket int16 [N]: index into `buckets`, -1 = none. ratio int8 [N]: index into the resolution's ratios, -1 = none.
    reason int8 [N]: 0, or why there is none (TOO_SMALL, TOO_SHORT, NOT_KEPT).
    refused int64 [len(buckets)]: rows that fitted a bucket but were passed on by its keep probability.
  """
  n = len(num_frames)
  bucket, ratio, reason = np.full(n, -1, np.int16), np.full(n, -1, np.int8), np.zeros(n, np.int8)

  def run(begin):
    part = slice(begin, min(begin + _CHUNK, n))
    if isinstance(seeds, tuple):
      seed, epoch, first = seeds
      part_seeds = row_seeds(seed, epoch, np.arange(first + part.start, first + part.stop), buckets)
    else:
      part_seeds = np.asarray(seeds[part], np.uint64)
    interval = frame_interval[part] if np.ndim(frame_interval) else frame_interval
    rows = (np.asarray(a[part], np.int64) for a in (num_frames, height, width))
    bucket[part], ratio[part], reason[part], refused = _assign_chunk(*rows, part_seeds, buckets, interval)
    return refused

  # NumPy's arithmetic runs outside the interpreter's lock: threads share the work.
  with futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
    refused = sum(pool.map(run, range(0, n, _CHUNK)), np.zeros(len(buckets), np.int64))
  return bucket, ratio, reason, refused


def _assign_chunk(frames, height, width, seeds, buckets, interval):
  """`assign` for one chunk."""
  n = len(frames)
  interval = np.broadcast_to(interval, n)
  pixels, image = height * width, frames == 1
  bucket, ratio = np.full(n, -1, np.int16), np.full(n, -1, np.int8)
  reason = np.full(n, TOO_SMALL, np.int8)
  refused = np.zeros(len(buckets), np.int64)
  todo = np.arange(n)  # rows still undecided
  for name in dict.fromkeys(b.resolution for b in buckets):
    here = todo[pixels[todo] >= PIXEL_TOLERANCE * aspect_ratios.NUM_PIXELS[name]]
    reason[here] = np.maximum(reason[here], TOO_SHORT)
    for index, b in enumerate(buckets):
      if b.resolution != name or not len(here):
        continue
      fits = image[here] if b.num_frames == 1 else frames[here] > b.num_frames * interval[here]
      rows, here = here[fits], here[~fits]
      if not len(rows):
        continue
      certain = b.keep_prob in (0, 1)  # no draw can change the outcome
      test = []
      if b.duration_prob is not None:
        first, *test = draws(seeds[rows] + np.uint64(index), 1 if certain else 2)
        considered = first <= b.duration_prob  # otherwise the row goes to the next shorter length
        here = np.concatenate([here, rows[~considered]])
        rows, test = rows[considered], [t[considered] for t in test]
      elif not certain:
        test = draws(seeds[rows] + np.uint64(index))
      chosen = rows[test[0] < b.keep_prob] if test else rows if b.keep_prob else rows[:0]
      refused[index] += len(rows) - len(chosen)
      reason[rows] = NOT_KEPT
      bucket[chosen], reason[chosen] = index, FITS
      ratio[chosen] = aspect_ratios.closest_ratios(height[chosen], width[chosen], name)
    todo = todo[bucket[todo] < 0]
  return bucket, ratio, reason, refused


# Constants of NumPy's SeedSequence (after M. E. O'Neill's seed_seq_fe) and of PCG64 (XSL-RR 128/64).
_INIT_A, _MULT_A, _INIT_B, _MULT_B = 0x43B0D7E5, 0x931E8875, 0x8B51F9DD, 0x58F38DED
_MIX_L, _MIX_R = 0xCA01F9DD, 0x4973F715
_PCG_HIGH, _PCG_LOW = np.uint64(2549297995355413924), np.uint64(4865540595714422341)
_MASK32 = np.uint64(0xFFFFFFFF)


def draws(seeds, count=1):
  """The first `count` values of `np.random.default_rng(seed).random()` for every seed (uint64 [N]): a list of float64 [N]."""
  state_high, state_low, inc_high, inc_low = _seed_sequence(np.asarray(seeds, np.uint64))
  inc_high = (inc_high << np.uint64(1)) | (inc_low >> np.uint64(63))
  inc_low = (inc_low << np.uint64(1)) | np.uint64(1)
  # Seeding: the state starts as 0, steps (-> inc), takes up the initial state, steps again.
  state = _pcg_step(*_add128(inc_high, inc_low, state_high, state_low), inc_high, inc_low)
  values = []
  for _ in range(count):
    state = _pcg_step(*state, inc_high, inc_low)
    high, low = state
    turn = high >> np.uint64(58)
    word = high ^ low
    word = (word >> turn) | (word << ((np.uint64(64) - turn) & np.uint64(63)))
    values.append((word >> np.uint64(11)) * (1.0 / 9007199254740992.0))
  return values


def _seed_sequence(seeds):
  """`SeedSequence(seed).generate_state(4, uint64)` -> four uint64 arrays."""
  const = _INIT_A

  def hashed(value):
    nonlocal const
    value = value ^ np.uint32(const)
    const = const * _MULT_A & 0xFFFFFFFF
    value *= np.uint32(const)
    value ^= value >> np.uint32(16)
    return value

  # A seed below 2**32 is one word of entropy, but missing words count as zeros: both cases are one.
  zero = np.zeros(seeds.shape, np.uint32)
  words = [(seeds & _MASK32).astype(np.uint32), (seeds >> np.uint64(32)).astype(np.uint32), zero, zero]
  pool = [hashed(w) for w in words]
  for source in range(4):
    for target in range(4):
      if source != target:
        other = hashed(pool[source])
        other *= np.uint32(_MIX_R)
        pool[target] *= np.uint32(_MIX_L)
        pool[target] -= other
        pool[target] ^= pool[target] >> np.uint32(16)
  const, out = _INIT_B, []
  for i in range(8):
    value = pool[i % 4] ^ np.uint32(const)
    const = const * _MULT_B & 0xFFFFFFFF
    value *= np.uint32(const)
    value ^= value >> np.uint32(16)
    out.append(value.astype(np.uint64))
  return [out[i] | (out[i + 1] << np.uint64(32)) for i in range(0, 8, 2)]


def _add128(a_high, a_low, b_high, b_low):
  low = a_low + b_low
  high = a_high + b_high
  high += low < a_low
  return high, low


def _pcg_step(high, low, inc_high, inc_low):
  """state * multiplier + inc modulo 2**128, on pairs of uint64."""
  half = np.uint64(32)
  a, b = low >> half, low & _MASK32
  c, d = _PCG_LOW >> half, _PCG_LOW & _MASK32
  bd, ad, bc = b * d, a * d, b * c
  middle = (bd >> half) + (ad & _MASK32) + (bc & _MASK32)
  carry = a * c + (ad >> half) + (bc >> half) + (middle >> half)
  product_high = carry + high * _PCG_LOW + low * _PCG_HIGH
  return _add128(product_high, (middle << half) | (bd & _MASK32), inc_high, inc_low)
