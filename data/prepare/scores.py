"""The step `scores`: numbers about each clip, from scorers that share one decoding of its frames.

A scorer is a frozen dataclass. Its fields are its settings, and it has

  columns: {name: polars type} of the columns that it adds,
  side: pixels of the shorter side of its frames,
  frames(num_frames, fps): ascending numbers of the frames that it needs, none if it can't score the clip,
  __call__(images, row): uint8 [T, H, W, 3] and the table's row -> {column: value}. height and width of the row are those of
    the crop.

`SCORERS` lists the scorers of this project. Others have an import path: {"mine": {"scorer": "package.module:Class", ...}}.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any, ClassVar

import cv2
import numpy as np

from data import video
from data.prepare.config import create, import_class
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

  scorers: {name: settings}, or a tuple of names. Names and settings (data/prepare/measures.py and clip.py): motion (count,
    every, preset), quality (count), camera (threshold, seconds, most), text (at, confidence, letters), aesthetic (model, head,
    at), matching (image_model, text_model, tokenizer, scale). A class of your own: {name: {"scorer": "module:Class"}}.
  """

  title: ClassVar[str] = "scores"
  version: ClassVar[int] = 2
  unit: ClassVar[str] = "clips"
  needs: ClassVar[tuple[str, ...]] = ("path", "num_frames", "height", "width")

  scorers: dict[str, Any] | tuple[str, ...] = ("motion", "quality", "camera")

  def check(self) -> None:
    if not self.scorers:
      raise ValueError(f"scorers needs at least one of {', '.join(SCORERS)}")
    _ = self.columns  # makes and checks all scorers

  @property
  def columns(self) -> dict[str, Any]:
    return {name: kind for scorer in self._made() for name, kind in scorer.columns.items()}

  def _made(self) -> list[Any]:
    named = self.scorers if isinstance(self.scorers, dict) else {key: {} for key in self.scorers}
    if wrong := next((name for name, settings in named.items() if not isinstance(settings, dict)), None):
      raise ValueError(f"scorers.{wrong} = {named[wrong]!r} is no dict of settings, such as {{}}")
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
  """The scorer with this name and these settings (JSON), one per process. Raises ValueError for wrong ones."""
  values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(settings).items()}
  path = values.pop("scorer", None) or (f"data.prepare.{SCORERS[name]}" if name in SCORERS else "")
  if ":" not in path:
    raise ValueError(f"scorers has {name!r}, which is none of {', '.join(SCORERS)} and has no 'scorer' = 'module:Class'")
  cls = import_class(path, f"scorers.{name}")
  try:
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
