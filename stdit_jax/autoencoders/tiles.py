"""Large frames in tiles that overlap and are blended, so that memory does not grow with the size of the picture.

As diffusers 0.42 tiles (`AutoencoderKLCogVideoX.tiled_encode`, `tiled_decode`): tiles begin every (1 - overlap) of their side;
where two have pixels in common the weight goes over linearly from the upper or left one to the other, first from above, then
from the left, with the neighbours as they already are. What is computed per picture (norms' statistics, attention) is computed
per tile: the numbers change a little, and the less the larger the tiles are.
"""

import dataclasses
import itertools
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Attributes: height, width: of a tile, in latents; overlap: the share of each side, vertical and horizontal, that a tile has
  in common with the next one."""

  height: int
  width: int
  overlap: tuple[float, float] = (1 / 6, 1 / 5)

  def __post_init__(self):
    if min(self.height, self.width, *self.steps) < 1:
      raise ValueError(f"tiles of {self.height} x {self.width} latents are too small")

  @property
  def steps(self):
    """Latents from a tile to the next, vertically and horizontally."""
    return int(self.height * (1 - self.overlap[0])), int(self.width * (1 - self.overlap[1]))

  def cut(self, size):
    """Whether latents of this (height, width) are larger than a tile."""
    return size[0] > self.height or size[1] > self.width

  def count(self, size):
    """How many tiles latents of this (height, width) are cut into."""
    return sum(map(len, self.places(size)))

  def places(self, size):
    """[[(top, left) in latents]], row after row, for latents of this (height, width)."""
    rows, columns = self.starts(size)
    return [[(top, left) for left in columns] for top in rows]

  def starts(self, size):
    """Where tiles begin, of rows and of columns."""
    return [range(0, side, step) for side, step in zip(size, self.steps)]

  def repeats(self, size):
    """Whether a tile begins where another one already reaches the border."""
    sides = zip(self.starts(size), (self.height, self.width), size)
    return any(len(starts) > 1 and starts[-2] + tile >= side for starts, tile, side in sides)


def tile_sizes(tiles, size):
  """The different (height, width) of the tiles of latents of this size: the last of a row or column are smaller."""
  places = itertools.chain(*tiles.places(size))
  return sorted({(min(tiles.height, size[0] - top), min(tiles.width, size[1] - left)) for top, left in places}, reverse=True)


def sizes_for(size, smallest=8):
  """Tiles for latents of this (height, width), larger ones first: ever more of them, along a tile's longer side. None of them
  repeats what another one has, as those of diffusers may: a strip of its own at the border would only have other statistics. So
  a side that is not cut has a longer tile than itself."""
  parts, sides = [1, 1], list(size)
  overlap = Tiles(2, 2).overlap
  while True:
    parts[int(sides[1] > sides[0])] += 1
    steps = [math.ceil(length / n) for length, n in zip(size, parts)]
    tile = [next(n for n in itertools.count(step) if int(n * (1 - o)) >= step) for step, o in zip(steps, overlap)]
    sides = [min(pair) for pair in zip(tile, size)]
    if min(sides) < smallest:
      return
    if not (tiles := Tiles(*tile)).repeats(size):
      yield tiles


def encode_in_tiles(encode, frames, tiles, factor, size):
  """Frames `[T, H, W, 3]` -> (mean, std) of latents of this (height, width), by `encode` of tiles; log-variances are what is
  blended. `factor`: pixels per latent."""

  def piece(top, left):
    top, left = top * factor, left * factor
    mean, std = encode(frames[:, top : top + tiles.height * factor, left : left + tiles.width * factor])
    return np.concatenate([mean, np.log(np.maximum(std, np.finfo(np.float32).tiny))], axis=-1)

  mean, log_std = np.split(_blended(piece, tiles, size, 1, None), 2, axis=-1)
  return mean, np.exp(log_std)


def decode_in_tiles(decode, latents, tiles, factor, finish=None):
  """Latents `[T', h, w, C]` -> pixels by `decode` of tiles, each row through `finish` when it is done."""

  def piece(top, left):
    return np.array(decode(latents[:, top : top + tiles.height, left : left + tiles.width]))

  return _blended(piece, tiles, latents.shape[1:3], factor, finish)


def _blended(piece, tiles, size, scale, finish):
  """All pieces as one array; `scale`: their pixels per latent. Two rows of them are kept at a time."""
  keep = [step * scale for step in tiles.steps]
  blend = tiles.height * scale - keep[0], tiles.width * scale - keep[1]
  above, rows = None, []
  for places in tiles.places(size):
    row = []
    for column, place in enumerate(places):
      part = piece(*place)
      if above is not None:
        _blend(above[column], part, blend[0], axis=1)
      if row:
        _blend(row[-1], part, blend[1], axis=2)
      row.append(part)
    whole = np.concatenate([part[:, : keep[0], : keep[1]] for part in row], axis=2)
    rows.append(finish(whole) if finish else whole)
    above = row
  return np.concatenate(rows, axis=1)


def _blend(before, part, extent, axis):
  """Lets the last of `before` go over into the first of `part`, in place."""
  extent = min(before.shape[axis], part.shape[axis], extent)
  if not extent:
    return
  shape = [1] * part.ndim
  shape[axis] = extent
  weight = (np.arange(extent, dtype=np.float32) / extent).reshape(shape)
  first = tuple(slice(extent) if i == axis else slice(None) for i in range(part.ndim))
  last = tuple(slice(before.shape[axis] - extent, None) if i == axis else slice(None) for i in range(part.ndim))
  part[first] = before[last] * (1 - weight) + part[first] * weight
