"""Measures what a video of moving shapes shows, without a model: from colours, positions and outlines."""

import dataclasses
import functools

import numpy as np

from data import shapes

CHROMA = 0.22  # smallest difference between the channels (0 to 1) of an object's pixel; backgrounds are gray
LEAST = 0.5  # smallest area of an object; unit: (half its side)^2. The smallest shape, the triangle, has 1.85


@dataclasses.dataclass(frozen=True)
class Seen:
  """The measured properties of one object, in words of `data.shapes`, or "" if no word fits."""

  shape: str
  color: str
  direction: str
  speed: str
  path: np.ndarray  # float [T, 2], centre relative to the frame's centre, in short sides; NaN in frames without the object
  smooth: float  # largest difference of a step from the fitted step, in short sides; 0 is the smoothest motion


def objects_of(frames: np.ndarray, size: float = shapes.SMALL) -> list[Seen]:
  """Finds the objects of a video uint8 [T, H, W, 3], largest first. `size` is half their side, as `shapes.Object.size`."""
  pixels = frames.astype(np.float32) / 255
  chroma = pixels.max(-1) - pixels.min(-1)
  names = list(shapes.COLORS)
  palette = np.array([hue(np.array(shapes.COLORS[name], np.float32) / 255) for name in names])
  # Hues lie on a circle.
  distance = np.abs((hue(pixels)[..., None] - palette + 0.5) % 1 - 0.5)
  nearest = np.where(chroma > CHROMA, distance.argmin(-1), -1)
  scale = min(frames.shape[1:3])
  found = []
  for i, name in enumerate(names):
    mask = nearest == i
    area = mask.sum((1, 2)) / scale**2 / size**2
    if np.median(area) > LEAST and (area > LEAST).mean() > 0.6:
      found.append((np.median(area), _seen(mask, name, area > LEAST)))
  return [seen for _, seen in sorted(found, key=lambda pair: -pair[0])]


def hue(pixels: np.ndarray) -> np.ndarray:
  """Hues, 0 to 1, of colours [..., 3], 0 to 1."""
  high, low = pixels.max(-1), pixels.min(-1)
  span = np.maximum(high - low, 1e-6)
  red, green, blue = np.moveaxis(pixels, -1, 0)
  sector = np.select([high == red, high == green], [(green - blue) / span, 2 + (blue - red) / span], 4 + (red - green) / span)
  return sector / 6 % 1


def _seen(mask, color, visible):
  height, width = mask.shape[1:]
  scale = min(height, width)
  y = (np.arange(height) + 0.5 - height / 2) / scale
  x = (np.arange(width) + 0.5 - width / 2) / scale
  count = np.maximum(mask.sum((1, 2)), 1)
  path = np.stack([(mask * x).sum((1, 2)), (mask * y[:, None]).sum((1, 2))], -1) / count[:, None]
  path[~visible] = np.nan
  direction, speed, smooth = motion(path)
  return Seen(outline(mask[visible], path[visible], x, y), color, direction, speed, path, smooth)


def motion(path: np.ndarray) -> tuple[str, str, float]:
  """Measures (direction, speed, smooth) of a path [T, 2], see `Seen`. Directions and speeds are the nearest words."""
  times = np.flatnonzero(~np.isnan(path[:, 0]))
  if len(times) < 2:
    return "", "", np.inf
  known = path[times]
  step = np.array([np.polyfit(times, known[:, axis], 1)[0] for axis in (0, 1)])
  steps = np.diff(known, axis=0) / np.diff(times)[:, None]
  smooth = float(np.abs(steps - step).max())
  length = np.hypot(*step)
  slowest = min(shapes.SPEEDS.values())
  if length < slowest / 3:
    return "", "", smooth
  words = list(shapes.DIRECTIONS)
  units = np.array([np.array(shapes.DIRECTIONS[w]) / np.hypot(*shapes.DIRECTIONS[w]) for w in words])
  speeds = list(shapes.SPEEDS)
  nearest = np.abs(np.log(length) - np.log(list(shapes.SPEEDS.values()))).argmin()
  return words[int((units @ step).argmax())], speeds[int(nearest)], smooth


def outline(masks: np.ndarray, centres: np.ndarray, x: np.ndarray, y: np.ndarray) -> str:
  """The shape that matches the masks [T, H, W] best. Each shape is drawn at the centres and with the areas of the masks."""
  scores = dict.fromkeys(shapes.SHAPES, 0.0)
  for mask, (cx, cy) in zip(masks, centres):
    area = mask.sum() * (x[1] - x[0]) * (y[1] - y[0])
    for shape in scores:
      unit, offset = _unit(shape)
      side = np.sqrt(area / unit)
      drawn = shapes.inside(shape, (x[None] - cx) / side + offset[0], (y[:, None] - cy) / side + offset[1])
      scores[shape] += (drawn & mask).sum() / max((drawn | mask).sum(), 1)
  return max(scores, key=lambda shape: scores[shape])


@functools.cache
def _unit(shape):
  """Returns (area, centre) of a shape with half side 1."""
  axis = (np.arange(400) + 0.5) / 200 - 1
  filled = shapes.inside(shape, axis[None], axis[:, None])
  where_y, where_x = np.nonzero(filled)
  return filled.mean() * 4, (axis[where_x].mean(), axis[where_y].mean())


def ground_of(frames: np.ndarray) -> tuple[str, bool]:
  """Returns (word of `shapes.GROUNDS`, whether it is striped) of a video's background, from its gray pixels."""
  pixels = frames.astype(np.float32)
  gray = (pixels.max(-1) - pixels.min(-1)) / 255 < CHROMA / 2
  levels = pixels.mean(-1)[gray]
  if not len(levels):
    return "", False
  words = list(shapes.GROUNDS)
  word = words[int(np.abs(np.array(list(shapes.GROUNDS.values())) - np.median(levels)).argmin())]
  low, high = np.percentile(levels, (15, 85))
  return word, bool(high - low > 14)


def judge(frames: np.ndarray, scene: shapes.Scene) -> dict[str, bool]:
  """Compares a video with a scene. Returns {color, shape, direction, speed, always, count, ground: bool}.

  "color", "shape", "direction" and "speed" must be right for all objects. "always" is True if every frame shows all objects.
  The function compares a single object with the largest measured object. It compares two objects with the two largest measured
  objects, by colour.
  """
  found = objects_of(frames, min(one.size for one in scene.objects))
  largest = found[: len(scene.objects)]
  if len(scene.objects) == 1:
    pairs = [(scene.objects[0], largest[0] if largest else None)]
  else:
    pairs = [(one, next((seen for seen in largest if seen.color == one.color), None)) for one in scene.objects]
  result = {
    name: all(seen is not None and getattr(seen, name) == getattr(one, name) for one, seen in pairs)
    for name in ("color", "shape", "direction", "speed")
  }
  result["always"] = all(seen is not None and not np.isnan(seen.path).any() for _, seen in pairs)
  word, striped = ground_of(frames)
  return result | {"count": len(found) == len(scene.objects), "ground": (word, striped) == (scene.ground, scene.striped)}
