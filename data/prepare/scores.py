"""The step `scores`: numbers about each clip, by scorers that share one decoding of its frames.

A scorer is a frozen dataclass whose fields are its settings, with

  columns: {name: polars type} that it adds,
  side: pixels of the shorter side of the pictures that it wants,
  frames(num_frames, fps): the numbers, ascending, of the frames of a clip that it wants, none if it has nothing to say,
  __call__(images, row): uint8 [T, H, W, 3] and the row of the table, with height and width of what `crop` leaves -> {column:
    value}.

`SCORERS` has ours; any other is named by its import path: scorers = {"mine": {"scorer": "package.module:Class", ...}}.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
from collections.abc import Callable
from typing import Any, ClassVar

import cv2
import numpy as np

from data import video
from data.prepare.config import create
from data.prepare.cut import part_of, small_size
from data.prepare.steps import Context, RowStep

SCORERS = {
  "motion": "measures:Motion",
  "quality": "measures:Quality",
  "camera": "measures:Camera",
  "text": "measures:Text",
  "aesthetic": "clip:Aesthetic",
  "matching": "clip:Matching",
}


@dataclasses.dataclass(frozen=True)
class Scores(RowStep):
  """Adds the columns of its scorers.

  scorers: {name: settings}, or a tuple of names. Ours, with their settings: motion (count, every, preset), quality (count),
    camera (threshold, seconds, most), text (at, confidence, letters), aesthetic (model, head, at), matching (image_model,
    text_model, tokenizer, scale); see data/prepare/measures.py and clip.py. One of yours: {name: {"scorer": "module:Class"}}.
  """

  title: ClassVar[str] = "scores"
  version: ClassVar[int] = 2
  unit: ClassVar[str] = "clips"
  needs: ClassVar[tuple[str, ...]] = ("path", "num_frames", "height", "width")

  scorers: dict[str, Any] | tuple[str, ...] = ("motion", "quality", "camera")

  def check(self) -> None:
    if not self.scorers:
      raise ValueError(f"scorers needs at least one of {', '.join(SCORERS)}")
    _ = self.columns  # makes them all

  @property
  def columns(self) -> dict[str, Any]:
    return {name: kind for scorer in self._made() for name, kind in scorer.columns.items()}

  def _made(self) -> list[Any]:
    named = self.scorers if isinstance(self.scorers, dict) else {key: {} for key in self.scorers}
    if wrong := next((name for name, settings in named.items() if not isinstance(settings, dict)), None):
      raise ValueError(f"scorers.{wrong} = {named[wrong]!r} is none: it holds settings, such as {{}}")
    return [make_scorer(name, json.dumps(settings)) for name, settings in named.items()]

  def rows(self, group: list[dict], context: Context, report: Callable) -> list[dict]:
    (row,) = group
    fps = row.get("fps") or video.DEFAULT_FPS
    wanted = [(scorer, np.asarray(scorer.frames(row["num_frames"], fps), np.int64)) for scorer in self._made()]
    numbers = np.unique(np.concatenate([frames for _, frames in wanted]))
    if not len(numbers):
      return [{}]
    side = max(scorer.side for scorer, frames in wanted if len(frames))
    crop, height, width = part_of(row)
    row = {**row, "crop": crop, "height": height, "width": width}
    size = small_size(height, width, side)
    pictures = video.read_frames(row["path"], numbers + (row.get("start") or 0), size=size, crop=crop)
    values: dict[str, Any] = {}
    for scorer, frames in wanted:
      if len(frames):
        images = pictures[np.searchsorted(numbers, frames)]
        values |= scorer(_smaller(images, small_size(*size, scorer.side)), row)
    return [values]


@functools.lru_cache(32)
def make_scorer(name: str, settings: str) -> Any:
  """A scorer by its name and settings (JSON), one per process. ValueError in one line if there is none."""
  values = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(settings).items()}
  path = values.pop("scorer", None) or (f"data.prepare.{SCORERS[name]}" if name in SCORERS else "")
  module, _, attribute = path.partition(":")
  if not attribute:
    raise ValueError(f"scorers has {name!r}, which is none of {', '.join(SCORERS)} and has no 'scorer' = 'module:Class'")
  try:
    cls = getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError) as error:
    raise ValueError(f"scorers.{name}: {path} cannot be imported ({error})") from None
  try:  # the settings of a dataclass are checked as those of a step
    made = create(cls, values, f"scorers.{name}") if dataclasses.is_dataclass(cls) else cls(**values)
  except TypeError as error:
    raise ValueError(f"scorers.{name}: {error}") from None
  if missing := [part for part in ("columns", "side", "frames", "__call__") if not hasattr(made, part)]:
    raise ValueError(f"scorers.{name}: {path} is no scorer: it has no {missing[0]}")
  return made


def _smaller(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  if images.shape[1:3] == size:
    return images
  return np.stack([cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA) for image in images])
