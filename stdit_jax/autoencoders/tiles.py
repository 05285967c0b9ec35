"""Large frames in tiles that overlap and are blended, so that memory does not grow with the size of the frames.

This is the tiling of diffusers 0.42 (`AutoencoderKLCogVideoX.tiled_encode`, `tiled_decode`). Neighbouring tiles start
(1 - overlap) times the side of a tile apart. In an overlap the weight moves linearly from the upper or left tile to the other
one. A tile is blended with the tile above, then with the tile on the left. Both neighbours are already blended themselves.
Statistics of norms and attention are computed per tile, so tiles change the values a little, and larger tiles change them less.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Sizes of tiles, in latents."""

  height: int
  width: int
  overlap: tuple[float, float] = (1 / 6, 1 / 5)  # share of the height and of the width of a tile that the next tile overlaps

  def __post_init__(self):
    if min(self.height, self.width, *self.steps) < 1:
      raise ValueError(f"tiles of {self.height} x {self.width} latents leave no step between tiles; give larger tiles")

  @property
  def steps(self) -> tuple[int, int]:
    """Latents from the start of a tile to the next start, vertically and horizontally."""
    return int(self.height * (1 - self.overlap[0])), int(self.width * (1 - self.overlap[1]))

  def cut(self, size: Sequence[int]) -> bool:
    """Whether latents of this (height, width) are larger than a tile."""
    return size[0] > self.height or size[1] > self.width

  def places(self, size: Sequence[int]) -> list[list[tuple[int, int]]]:
    """[[(top, left) in latents]], row after row, for latents of this (height, width)."""
    rows, columns = self.starts(size)
    return [[(top, left) for left in columns] for top in rows]

  def starts(self, size: Sequence[int]) -> list[range]:
    """Positions at which the rows and the columns of tiles start."""
    return [range(0, side, step) for side, step in zip(size, self.steps)]

  def repeats(self, size: Sequence[int]) -> bool:
    """Whether a tile starts where another one already reaches the border."""
    sides = zip(self.starts(size), (self.height, self.width), size)
    return any(len(starts) > 1 and starts[-2] + tile >= side for starts, tile, side in sides)


def tile_sizes(tiles: Tiles, size: Sequence[int]) -> list[tuple[int, int]]:
  """The distinct (height, width) of the tiles of latents of this size. The last tile of a row or column may be smaller."""
  places = itertools.chain(*tiles.places(size))
  return sorted({(min(tiles.height, size[0] - top), min(tiles.width, size[1] - left)) for top, left in places}, reverse=True)


def sizes_for(size: Sequence[int], smallest: int = 8) -> Iterator[Tiles]:
  """Yields tiles for latents of this (height, width), from large to small; each step cuts the longer side of a tile.

  No tile lies within another one. diffusers has such tiles at the border. They cover no new latents. A side without
  cuts gets a tile longer than the side, so that no second tile starts inside it.
  """
  parts, sides = [1, 1], list(size)
  overlap = Tiles(2, 2).overlap
  while True:
    parts[int(sides[1] > sides[0])] += 1  # one more part along the longer side of a tile
    steps = [math.ceil(length / n) for length, n in zip(size, parts)]
    # The shortest sides whose steps are at least `steps`.
    tile = [next(n for n in itertools.count(step) if int(n * (1 - o)) >= step) for step, o in zip(steps, overlap)]
    sides = [min(pair) for pair in zip(tile, size)]
    if min(sides) < smallest:
      return
    if not (tiles := Tiles(tile[0], tile[1])).repeats(size):
      yield tiles


def encode_in_tiles(encode: Callable, frames: np.ndarray, tiles: Tiles, factor: int, size: Sequence[int]) -> tuple:
  """Frames `[T, H, W, 3]` -> (mean, std) of latents of this (height, width). Means and log-deviations are blended.

  Args:
    encode: encodes the frames of a tile.
    factor: pixels per latent.
  """

  def piece(top, left):
    top, left = top * factor, left * factor
    mean, std = encode(frames[:, top : top + tiles.height * factor, left : left + tiles.width * factor])
    return np.concatenate([mean, np.log(np.maximum(std, np.finfo(np.float32).tiny))], axis=-1)

  mean, log_std = np.split(_blended(piece, tiles, size, 1, None), 2, axis=-1)
  return mean, np.exp(log_std)


def decode_in_tiles(decode: Callable, latents: np.ndarray, tiles: Tiles, factor: int, finish: Callable | None) -> np.ndarray:
  """Latents `[T', h, w, C]` -> pixels. `decode` decodes a tile, and `finish` converts each finished row of tiles."""

  def piece(top, left):
    return np.array(decode(latents[:, top : top + tiles.height, left : left + tiles.width]))

  return _blended(piece, tiles, latents.shape[1:3], factor, finish)


def _blended(piece, tiles, size, scale, finish):
  """All pieces as one array. `scale`: elements of a piece per latent along a side. At most two rows of pieces are in memory."""
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
  """Blends the end of `before` into the start of `part`, in place."""
  extent = min(before.shape[axis], part.shape[axis], extent)
  before, part = np.moveaxis(before, axis, -1), np.moveaxis(part, axis, -1)  # views
  weight = np.arange(extent, dtype=np.float32) / max(extent, 1)
  first = part[..., :extent]
  first[...] = before[..., before.shape[-1] - extent :] * (1 - weight) + first * weight
