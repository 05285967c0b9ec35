"""Resolution names, aspect ratios and clip lengths of Open-Sora, from `tables/aspect_ratios.json`, and the resolution 64p.

A resolution name ("240p") stands for a number of pixels and a table {aspect-ratio key: (height, width)}. A key is
height / width rounded to two decimals, as text ("0.56"). Names such as "9:16" are height:width, so 9:16 is landscape.
"""

import difflib
import functools
import json
import math
import pathlib
from typing import Any

import numpy as np

_TABLE = json.loads((pathlib.Path(__file__).parent / "tables" / "aspect_ratios.json").read_text())

# {name: {key: (height, width)}}, in the order of the original's tables (ties of the closest ratio go to the first).
SIZES = {n: {k: tuple(hw) for k, hw in r["sizes"].items()} for n, r in _TABLE["resolutions"].items()}
NUM_PIXELS = {n: r["num_pixels"] for n, r in _TABLE["resolutions"].items()}
# For models that learn on a laptop. All sides are multiples of 8, so the keys are the nearest ratios.
SIZES["64p"] = {"0.56": (48, 80), "0.75": (56, 72), "1.00": (64, 64), "1.33": (72, 56), "1.78": (80, 48)}
NUM_PIXELS["64p"] = 64 * 64
RATIO_NAMES = _TABLE["ratio_names"]
DURATIONS = _TABLE["durations"]


def check_resolution(resolution: Any) -> str:
  """The resolution's name as text. Raises ValueError, with the known names, for an unknown name."""
  name = str(resolution)
  if name not in SIZES:
    close = difflib.get_close_matches(name, SIZES, 1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"unknown resolution {name!r}{hint}; there are {', '.join(SIZES)}")
  return name


def num_pixels(resolution: str) -> int:
  """Nominal number of pixels of a resolution name."""
  return NUM_PIXELS[check_resolution(resolution)]


def size(resolution: str, key: str) -> tuple[int, int]:
  """(height, width) of an aspect-ratio key ("0.56") or name ("9:16", height:width) of a resolution."""
  sizes = SIZES[check_resolution(resolution)]
  found = RATIO_NAMES.get(key, key)
  if found not in sizes:
    names = [n for n, k in RATIO_NAMES.items() if k in sizes]
    raise ValueError(
      f"{resolution} has no aspect ratio {key!r}; its keys (height / width) are {', '.join(sizes)}"
      + (f", its names {', '.join(names)}" if names else "")
    )
  return sizes[found]


def closest_ratio(height: int, width: int, resolution: str) -> str:
  """Key of the ratio nearest to height / width: argmin |float(key) - height / width|, the first of equal ones."""
  return list(SIZES[check_resolution(resolution)])[int(closest_ratios(height, width, resolution))]


def closest_ratios(height: np.ndarray, width: np.ndarray, resolution: str) -> np.ndarray:
  """As `closest_ratio`, for arrays of heights and widths: indices into `list(SIZES[resolution])`."""
  values, order = _sorted_keys(check_resolution(resolution))
  ratio = np.asarray(height, np.float64) / np.asarray(width, np.float64)
  above = np.clip(np.searchsorted(values, ratio), 1, len(values) - 1)
  below_distance, above_distance = np.abs(values[above - 1] - ratio), np.abs(values[above] - ratio)
  # Of two keys at the same distance, the first in the table wins.
  lower = (below_distance < above_distance) | ((below_distance == above_distance) & (order[above - 1] < order[above]))
  return order[np.where(lower, above - 1, above)]


@functools.cache
def _sorted_keys(resolution):
  keys = np.array([float(k) for k in SIZES[resolution]])
  order = np.argsort(keys, kind="stable")
  return keys[order], order


def get_num_frames(name: int | str) -> int:
  """Pixel frames of a clip length: a number, or a name from "1x" (51) to "16x", from "2s" (51) to "32s"."""
  text = str(name)
  if text in DURATIONS:
    return DURATIONS[text]
  if text.isdigit() and int(text) > 0:
    return int(text)
  raise ValueError(f"{name!r} is no clip length: give a number of frames or one of {', '.join(DURATIONS)}")


def sizes_for_pixels(pixels: int, compat: str = "1.2") -> dict[str, tuple[int, int]]:
  """Even sizes {key: (height, width)} of about `pixels` pixels for all named ratios (`get_aspect_ratios_dict`).

  The last ratio of 1.2 is named 50:27 (1.85), although its tables mean 25:12 (2.08); compat="1.1" gives the sizes of 1.1.
  """
  table = {}
  for name in RATIO_NAMES:
    if compat == "1.1":  # names that reproduce 1.1's sizes
      name = {"27:50": "20:37", "50:27": "25:12"}.get(name, name)
    h, w = map(int, name.split(":"))
    height = 2 * round(math.sqrt(pixels * h / w) / 2)
    table[f"{h / w:.2f}"] = (height, 2 * round(height * w / h / 2))
  return table


def max_tokens(resolution: str, spatial_factor: int = 8, patch: tuple[int, int] = (2, 2)) -> int:
  """Largest number of tokens per frame over the ratios of a resolution.

  A latent side is floor(pixels / spatial_factor), a side of the token grid ceil(latent / patch), `patch` being (height, width).
  """
  sizes = SIZES[check_resolution(resolution)].values()
  return max(math.prod(-(-(side // spatial_factor) // p) for side, p in zip(hw, patch)) for hw in sizes)
