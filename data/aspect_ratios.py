"""Resolution names, aspect ratios and clip lengths of Open-Sora, from `tables/aspect_ratios.json`, and the resolution 64p.

A resolution name ("240p") stands for a number of pixels and a table {aspect-ratio key: (height, width)}. A key is
about height / width, as text ("0.56"). Names such as "9:16" are height:width, so 9:16 is landscape.
"""

import difflib
import functools
import json
import math
import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt

_TABLE = json.loads((pathlib.Path(__file__).parent / "tables" / "aspect_ratios.json").read_text())

# {name: {key: (height, width)}}, in the order of Open-Sora's tables. The first of two equally close ratios wins.
SIZES = {n: {k: tuple(hw) for k, hw in r["sizes"].items()} for n, r in _TABLE["resolutions"].items()}
NUM_PIXELS = {n: r["num_pixels"] for n, r in _TABLE["resolutions"].items()}
# 64p is for models that train on a laptop. Its sides are multiples of 8, so a key can differ from their ratio by up to 0.12.
SIZES["64p"] = {"0.56": (48, 80), "0.75": (56, 72), "1.00": (64, 64), "1.33": (72, 56), "1.78": (80, 48)}
NUM_PIXELS["64p"] = 64 * 64
RATIO_NAMES: dict[str, str] = _TABLE["ratio_names"]
DURATIONS: dict[str, int] = _TABLE["durations"]


def check_resolution(resolution: Any) -> str:
  """The resolution's name as text. Raises ValueError, with the known names, for an unknown name."""
  name = str(resolution)
  if name not in SIZES:
    close = difflib.get_close_matches(name, SIZES, 1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"unknown resolution {name!r}{hint}; there are {', '.join(SIZES)}")
  return name


def size(resolution: str, key: str) -> tuple[int, int]:
  """(height, width) of an aspect-ratio key ("0.56") or name ("9:16", height:width) of a resolution."""
  sizes = SIZES[check_resolution(resolution)]
  found = RATIO_NAMES.get(key, key)
  if found not in sizes:
    names = ", ".join(n for n, k in RATIO_NAMES.items() if k in sizes)
    keys = f"its keys (height / width) are {', '.join(sizes)}" + (f", its names {names}" if names else "")
    raise ValueError(f"{resolution} has no aspect ratio {key!r}; {keys}")
  return sizes[found]


def closest_ratio(height: int, width: int, resolution: str) -> str:
  """Key of the ratio nearest to height / width: argmin |float(key) - height / width|. The first of equally near keys wins."""
  return list(SIZES[check_resolution(resolution)])[int(closest_ratios(height, width, resolution))]


def closest_ratios(height: npt.ArrayLike, width: npt.ArrayLike, resolution: str, count: int | None = None) -> np.ndarray:
  """Does the same as `closest_ratio` for arrays of heights and widths. Returns indices into `list(SIZES[resolution])`.

  `count`: number of ratios to choose from (`used_ratios`); None: all.
  """
  used = np.array(used_ratios(check_resolution(resolution), count))
  keys = np.array([float(key) for key in SIZES[resolution]])[used]
  ratio = np.asarray(height, np.float64) / np.asarray(width, np.float64)
  return used[np.abs(keys - ratio[..., None]).argmin(-1)]


@functools.cache
def used_ratios(resolution: str, count: int | None) -> tuple[int, ...]:
  """The `count` ratios of a resolution that `data.aspect_ratios` keeps, as ascending indices; None: all.

  The common ratios come first: those nearest to 16:9, 9:16, 1:1, 4:3 and 3:4. Then always comes the ratio whose logarithm is
  farthest from all chosen ones.
  """
  keys = np.log([float(key) for key in SIZES[resolution]])
  if count is None or count >= len(keys):
    return tuple(range(len(keys)))
  chosen = list(dict.fromkeys(int(np.abs(keys - np.log(ratio)).argmin()) for ratio in (9 / 16, 16 / 9, 1, 3 / 4, 4 / 3)))
  while len(chosen) < count:
    chosen.append(int(np.abs(keys[:, None] - keys[chosen]).min(1).argmax()))
  return tuple(sorted(chosen[:count]))


def get_num_frames(name: int | str) -> int:
  """Pixel frames of a clip length: a number of frames, or one of the names "1x" (51) to "16x" and "2s" (51) to "32s"."""
  text = str(name)
  if text in DURATIONS:
    return DURATIONS[text]
  if text.isdigit() and int(text) > 0:
    return int(text)
  raise ValueError(f"{name!r} is no clip length: give a number of frames or one of {', '.join(DURATIONS)}")


def max_tokens(resolution: str, spatial_factor: int = 8, patch: tuple[int, int] = (2, 2)) -> int:
  """Largest number of tokens per frame over the ratios of a resolution.

  A latent side is floor(pixels / spatial_factor). A side of the token grid is ceil(latent side / patch side).
  """
  sizes = SIZES[check_resolution(resolution)].values()
  return max(math.prod(-(-(side // spatial_factor) // p) for side, p in zip(hw, patch)) for hw in sizes)
