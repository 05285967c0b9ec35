"""Which bucket (resolution, number of frames, aspect ratio) each row of a table belongs to, for millions of rows at once.

The rules are those of Open-Sora 1.2 (`Bucket.get_bucket_id`), which contain those of 1.1:

* A row tries the resolutions from most to fewest pixels. It skips a resolution if height * width < 0.8 * (pixels of the
  resolution).
* Within a resolution the row takes the longest length f with num_frames > f * frame_interval. The row skips a length with a
  duration probability if a first random draw is above this probability. Images (num_frames 1) fit only buckets of 1 frame.
* The row enters the bucket if a second draw is below the keep probability. Otherwise the row tries the next smaller
  resolution, not a shorter length.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from data import aspect_ratios

# The smallest share of a resolution's pixels that a frame may have.
PIXEL_TOLERANCE = 0.8
# Codes of `assign`: the reason why a row has no bucket.
FITS, TOO_SMALL, TOO_SHORT, NOT_KEPT = 0, 1, 2, 3
REASONS = ("", "too small", "too short", "keep probability")
_CHUNK = 1 << 16  # rows per pass; bounds the memory of the draws and does not change the result


@dataclasses.dataclass(frozen=True)
class Bucket:
  """One row of a bucket table: clips of `num_frames` frames (1 = images) at a resolution name.

  `batch_size`, the global number of samples per micro step, may be None if keep_prob is 0. Such a bucket stays empty: clips
  that fit it go to smaller resolutions.
  """

  resolution: str
  num_frames: int
  keep_prob: float  # probability that a fitting row stays
  batch_size: int | None
  duration_prob: float | None = None  # probability that a row considers this length; None = 1

  @property
  def name(self) -> str:
    return f"{self.resolution} x {self.num_frames}"


def parse_buckets(rows: Iterable | Mapping) -> tuple[Bucket, ...]:
  """Parses a bucket table. Returns its buckets in the order of search: most pixels first, then most frames.

  Rows are `(resolution, num_frames, keep_prob | (keep_prob, duration_prob), batch_size)`. The nested form of Open-Sora,
  `{resolution: {num_frames: (keep_prob, batch_size)}}`, is allowed, too. Raises ValueError, one line, for a wrong table.
  """
  if isinstance(rows, Mapping):
    rows = [(name, frames, *entry) for name, lengths in rows.items() for frames, entry in lengths.items()]
  buckets = [_parse_row(row) for row in rows]
  if not buckets:
    raise ValueError("the bucket table is empty: give rows such as ('144p', 51, 1.0, 6)")
  names = [b.name for b in buckets]
  if twice := [name for name in names if names.count(name) > 1]:
    raise ValueError(f"bucket {twice[0]} stands twice in the bucket table. Remove one row.")
  # Two stable sorts: resolutions of equal pixels (2880, 4k) keep the order of the table, as in Open-Sora.
  names = sorted(dict.fromkeys(b.resolution for b in buckets), key=lambda n: -aspect_ratios.NUM_PIXELS[n])
  return tuple(sorted(buckets, key=lambda b: (names.index(b.resolution), -b.num_frames)))


def _parse_row(row):
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
  batch, duration = None if batch is None else int(batch), None if duration is None else float(duration)
  return Bucket(resolution, frames, float(keep), batch, duration)


def assign(
  num_frames: np.ndarray,
  height: np.ndarray,
  width: np.ndarray,
  seed: Sequence[int],
  buckets: Sequence[Bucket],
  interval: int,
  ratios: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Chooses the bucket of every row.

  Args:
    num_frames, height, width: integers [N], sizes of the source clips (1 frame = image).
    seed: whole numbers, the seed of the random draws.
    buckets: the result of `parse_buckets`.
    interval: stride in time. One of `interval` source frames is used.
    ratios: number of aspect ratios of each resolution that are used; None: all.

  Returns:
    bucket int16 [N]: index into `buckets`, -1 = none.
    ratio int8 [N]: index into the resolution's aspect ratios, -1 = none.
    reason int8 [N]: FITS, or the reason why the row has no bucket (TOO_SMALL, TOO_SHORT, NOT_KEPT).
    refused int64 [len(buckets)]: number of rows that fit a bucket, but that the bucket's keep probability refused.
  """
  rng = np.random.default_rng(seed)
  parts = []
  for begin in range(0, len(num_frames), _CHUNK):
    sizes = [np.asarray(a[begin : begin + _CHUNK], np.int64) for a in (num_frames, height, width)]
    draws = rng.random((len(sizes[0]), len(buckets), 2), np.float32)
    parts.append(choose(*sizes, draws=draws, buckets=buckets, interval=interval, ratios=ratios))
  bucket, ratio, reason, refused = zip(*parts)
  return np.concatenate(bucket), np.concatenate(ratio), np.concatenate(reason), np.sum(refused, 0)


def choose(
  frames: np.ndarray,
  height: np.ndarray,
  width: np.ndarray,
  draws: np.ndarray,
  buckets: Sequence[Bucket],
  interval: int,
  ratios: int | None = None,
) -> tuple[np.ndarray, ...]:
  """Applies the rules of `assign` to `draws`, random numbers in [0, 1), [N, buckets, 2].

  A row's first draw in a bucket is compared with the duration probability, the second with the keep probability.
  """
  n = len(frames)
  pixels, image = height * width, frames == 1
  bucket, ratio = np.full(n, -1, np.int16), np.full(n, -1, np.int8)
  reason = np.full(n, TOO_SMALL, np.int8)
  refused = np.zeros(len(buckets), np.int64)
  undecided = np.arange(n)
  for name in dict.fromkeys(b.resolution for b in buckets):
    here = undecided[pixels[undecided] >= PIXEL_TOLERANCE * aspect_ratios.NUM_PIXELS[name]]
    reason[here] = np.maximum(reason[here], TOO_SHORT)
    for index, b in enumerate(buckets):
      if b.resolution != name:
        continue
      fits = image[here] if b.num_frames == 1 else frames[here] > b.num_frames * interval
      if b.duration_prob is not None:
        fits &= draws[here, index, 0] <= b.duration_prob
      rows, here = here[fits], here[~fits]
      chosen = rows[draws[rows, index, 1] < b.keep_prob]
      refused[index] = len(rows) - len(chosen)
      reason[rows] = NOT_KEPT
      bucket[chosen], reason[chosen] = index, FITS
      ratio[chosen] = aspect_ratios.closest_ratios(height[chosen], width[chosen], name, ratios)
    undecided = undecided[bucket[undecided] < 0]
  return bucket, ratio, reason, refused
