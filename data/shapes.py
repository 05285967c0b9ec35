"""Moving shapes: videos that are drawn when they are read, with captions that describe them exactly.

A scene has one or two objects (shape, colour, direction, speed) on a gray background, plain or striped. The scene is a function
of its address, `shapes://SPLIT/SEED/NUMBER`. `shapes://SPLIT/SEED/ROWS` is the table of the first ROWS scenes. A configuration
names this table in `data.tables` like a file. `data.shapes_vision` measures what a video of a trained model shows.

Splits: "train" lacks some combinations of shape, colour and direction. It also lacks long clips of one size. "held_out" has
only the missing combinations. "sizes" is like "train", but has the missing long clips.

Positions are (x right, y down) from the frame's centre. Their unit is the shorter side of the frame.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np

from data import aspect_ratios

SCHEME = "shapes://"
SPLITS = ("train", "held_out", "sizes")
SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
  "red": (225, 40, 40), "green": (40, 180, 60), "blue": (45, 75, 230), "yellow": (235, 210, 40), "purple": (160, 50, 200),
  "cyan": (40, 200, 215),
}  # fmt: skip
DIRECTIONS = {
  "right": (1, 0), "down and to the right": (1, 1), "down": (0, 1), "down and to the left": (-1, 1), "left": (-1, 0),
  "up and to the left": (-1, -1), "up": (0, -1), "up and to the right": (1, -1),
}  # fmt: skip
SPEEDS = {"slowly": 0.025, "quickly": 0.055}  # short sides per frame
GROUNDS = {"black": 25, "gray": 110, "white": 235}
LENGTHS = (5, 9)  # frames, for buckets of 4 and 8 frames: a clip must be longer than its bucket
FPS = 8
SIDES = tuple((2 * height, 2 * width) for height, width in aspect_ratios.SIZES["64p"].values())  # height, width
NOT_LONG = (160, 96)  # "train" has only short clips of this size
# Half a side of an object that is alone (SIZE) or one of two (SMALL). To stay inside the frame, a large object starts at the
# edge that it moves away from, so its first frame shows its direction. With SIZE 0.15, a model without frame positions learned
# no direction in two hours.
SIZE, SMALL = 0.24, 0.13
HELD_OUT = 9  # "train" lacks one combination in 9
VERSION = 4  # of tables and drawings: raise it when they change
_SAMPLES = 3  # per pixel and axis, for smooth edges


@dataclasses.dataclass(frozen=True)
class Object:
  """An object of a scene, in words of the tables above."""

  shape: str
  color: str
  direction: str
  speed: str
  start: tuple[float, float]  # (x, y) of the centre in frame 0
  size: float = SIZE  # half a side

  @property
  def step(self) -> tuple[float, float]:
    """Motion of the object per frame, (x, y)."""
    x, y = DIRECTIONS[self.direction]
    length = SPEEDS[self.speed] / np.hypot(x, y)
    return x * length, y * length


@dataclasses.dataclass(frozen=True)
class Scene:
  """The contents of a video."""

  objects: tuple[Object, ...]
  ground: str  # the background, a word of GROUNDS
  striped: bool  # whether the background has stripes
  height: int  # in pixels
  width: int
  frames: int


def is_held_out(shape: str, color: str, direction: str) -> bool:
  """Whether the split "train" lacks a combination."""
  number = (SHAPES.index(shape) * len(COLORS) + list(COLORS).index(color)) * len(DIRECTIONS) + list(DIRECTIONS).index(direction)
  return number * 7 % HELD_OUT == 0


def parse(address: str) -> tuple[str, int, int]:
  """Parses 'shapes://train/0/17' into ("train", 0, 17). Raises ValueError for any other text."""
  match = re.fullmatch(rf"{SCHEME}(\w+)/(\d{{1,9}})/(\d{{1,9}})", str(address))
  if not match or match[1] not in SPLITS:
    raise ValueError(f"{address} is no address of shapes: {SCHEME}SPLIT/SEED/NUMBER, SPLIT one of {', '.join(SPLITS)}")
  return match[1], int(match[2]), int(match[3])


@functools.lru_cache(1024)
def scene(address: str) -> Scene:
  """Makes the `Scene` of an address. Raises ValueError for any other text."""
  split, seed, number = parse(address)
  rng = np.random.default_rng([seed, number, SPLITS.index(split)])
  height, width = SIDES[rng.integers(len(SIDES))]
  frames = int(LENGTHS[rng.integers(len(LENGTHS))])
  if split == "train" and (height, width) == NOT_LONG:
    frames = LENGTHS[0]
  count = 1 if split == "held_out" or rng.random() < 0.7 else 2
  size = SIZE if count == 1 else SMALL
  while True:
    objects = tuple(
      _object(rng, split, frames, (width / min(height, width), height / min(height, width)), size) for _ in range(count)
    )
    if count == 1 or (objects[0].color != objects[1].color and _apart(objects[0], objects[1], frames)):
      break
  return Scene(objects, list(GROUNDS)[rng.integers(len(GROUNDS))], bool(rng.random() < 0.5), height, width, frames)


def _object(rng, split, frames, sides, size):
  """Draws an object that stays inside the frame during all frames. `sides`: (width, height) in short sides."""
  while True:
    shape, color, direction, speed = (list(t)[rng.integers(len(t))] for t in (SHAPES, COLORS, DIRECTIONS, SPEEDS))
    if is_held_out(shape, color, direction) != (split == "held_out"):
      continue
    drawn = Object(shape, color, direction, speed, (0, 0), size)
    moved = np.array(drawn.step) * (frames - 1)
    room = np.array(sides) / 2 - 1.1 * size
    low, high = -room - np.minimum(moved, 0), room - np.maximum(moved, 0)
    if (low <= high).all():
      return dataclasses.replace(drawn, start=tuple(rng.uniform(low, high).round(4).tolist()))


def _apart(a, b, frames):
  """Whether two objects never touch."""
  way = np.arange(frames)[:, None] * (np.subtract(a.step, b.step)) + np.subtract(a.start, b.start)
  return np.abs(way).max(1).min() > 1.15 * (a.size + b.size)


def captions(one: Scene) -> list[str]:
  ground = f"{'striped ' if one.striped else ''}{one.ground}"
  thing = [f"{o.color} {o.shape}" for o in one.objects]
  moves = [f"{o.speed} {o.direction}" for o in one.objects]
  if len(one.objects) == 1:
    return [
      f"a {thing[0]} moves {moves[0]} on a {ground} ground",
      f"A {thing[0]} is moving {moves[0]}. The background is {ground}.",
      f"on a {ground} background, a {thing[0]} goes {moves[0]}",
      f"{thing[0]}, moving {moves[0]}, {ground} ground",
    ]
  return [
    f"a {thing[0]} moves {moves[0]} and a {thing[1]} moves {moves[1]} on a {ground} ground",
    f"A {thing[0]} is moving {moves[0]}, a {thing[1]} {moves[1]}. The background is {ground}.",
    f"on a {ground} background, a {thing[1]} goes {moves[1]} while a {thing[0]} goes {moves[0]}",
    f"two shapes on a {ground} ground: {thing[0]}, moving {moves[0]}; {thing[1]}, moving {moves[1]}",
  ]


def inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Whether points lie in a shape. `x` and `y` count from the centre of the shape, in half sides of the object."""
  if shape == "circle":
    return x**2 + y**2 <= 1
  if shape == "square":
    return np.maximum(np.abs(x), np.abs(y)) <= 0.9
  if shape == "triangle":
    return (y <= 0.85) & (np.abs(x) <= (y + 1) / 1.85)
  arm, length = 0.36, 1.0
  return (np.minimum(np.abs(x), np.abs(y)) <= arm) & (np.maximum(np.abs(x), np.abs(y)) <= length)


def draw(one: Scene, indices: Sequence[int] | np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
  """Draws frames of a scene by number, uint8 [T, height, width, 3], at `size` (default: the scene's own).

  A size of another aspect ratio shows the centre, like a file that the reader resizes and crops.
  """
  height, width = size or (one.height, one.width)
  # Pixels per short side, so that the scene covers the size.
  scale = min(one.height, one.width) * max(height / one.height, width / one.width)
  y, x = ((np.arange(n * _SAMPLES) + 0.5) / _SAMPLES - n / 2 for n in (height, width))
  y, x = y[:, None] / scale, x[None] / scale
  ground = np.full((height * _SAMPLES, width * _SAMPLES), float(GROUNDS[one.ground]))
  if one.striped:
    ground += np.where(np.floor((x + y) / 0.125) % 2, 14.0, -14.0)
  result = np.empty((len(indices), height, width, 3), np.uint8)
  for t, number in enumerate(indices):
    frame = np.repeat(ground[..., None], 3, -1)
    for o in one.objects:
      centre = np.add(o.start, np.multiply(o.step, number))
      frame[inside(o.shape, (x - centre[0]) / o.size, (y - centre[1]) / o.size)] = COLORS[o.color]
    result[t] = np.rint(frame.reshape(height, _SAMPLES, width, _SAMPLES, 3).mean((1, 3)))
  return result


def rows(address: str) -> dict[str, list]:
  """The table of an address, as columns. A row for each scene, then an image row for the first frame of each scene.

  First frames show the direction: an object that moves to the right starts on the left. Random frames do not show the
  direction. Models that were trained with random frames ignored the direction for a thousand steps.
  """
  split, seed, count = parse(address)
  addresses = [f"{SCHEME}{split}/{seed}/{i}" for i in range(count)]
  scenes = [scene(a) for a in addresses]
  return {
    "path": addresses * 2,
    "text": [captions(s) for s in scenes] * 2,
    "num_frames": [s.frames for s in scenes] + [1] * count,
    "height": [s.height for s in scenes] * 2,
    "width": [s.width for s in scenes] * 2,
    "fps": [float(FPS)] * (2 * count),
    "start": [0] * (2 * count),
    "end": [s.frames for s in scenes] + [1] * count,
  }
