"""Scenes of a video, by the detectors of PySceneDetect.

Frames are downscaled as in its `SceneManager`, so that its own command finds the same cuts. Open-Sora 1.2 uses
AdaptiveDetector with its defaults (`tools/scene_cut/scene_detect.py`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import polars as pl
from av.video.reformatter import VideoReformatter

from data.prepare import decode
from data.prepare.collect import clip_id
from data.prepare.steps import Context, RowStep
from data.video import BadVideo, is_image

_DETECT_WIDTH = 256  # PySceneDetect's own choice of width (scene_manager.compute_downscale_factor)
_NEAR = 0.25  # seconds: a wanted cut nearer to a detected one is the same cut
_THRESHOLDS = {"adaptive": 3.0, "content": 27.0}  # PySceneDetect's defaults


@dataclasses.dataclass(frozen=True)
class Scenes(RowStep):
  """Turns each video into one row per scene, with the frames `start` and `end` (excluded). Images stay as they are.

  detector: "adaptive", "content", or "none" (the whole video is one scene).
  threshold: what makes a cut. adaptive: ratio of a frame's change to the mean change around it; content: change (0 to 255).
    None: PySceneDetect's default, 3.0 for adaptive and 27.0 for content.
  min_content: least change (0 to 255) of a cut, for adaptive. Open-Sora 1.3 uses adaptive, threshold 2.0, min_content 10.
  min_scene_frames: least number of frames between two cuts, by default as in PySceneDetect's library (its command: 0.6 s).
  min_seconds: shorter scenes are dropped. Open-Sora's function drops scenes below 2 s, its command drops none.
  max_seconds: longer scenes are split; 0: never.
  long: "split" makes equal parts of at most max_seconds. If equal parts are shorter than min_seconds, the parts get
    max_seconds and the scene's end is dropped.
    "first" keeps only the first max_seconds, as Open-Sora does.
  cuts_at: column with a list of further cuts in seconds. A cut within 0.25 s of a detected one is the same cut.
  """

  title: ClassVar[str] = "scenes"
  unit: ClassVar[str] = "files"
  needs: ClassVar[tuple[str, ...]] = ("path", "num_frames", "fps")
  columns: ClassVar[dict[str, Any]] = {
    "source_id": pl.String, "scene": pl.Int64, "start": pl.Int64, "end": pl.Int64, "num_frames": pl.Int64,
    "duration": pl.Float64, "id": pl.String,
  }  # fmt: skip

  detector: str = "adaptive"
  threshold: float | None = None
  min_content: float = 15.0
  min_scene_frames: int = 15
  min_seconds: float = 2.0
  max_seconds: float = 15.0
  long: str = "split"
  cuts_at: str = ""

  @property
  def version(self) -> int:
    """2 for settings with which version 1 made too short parts of long scenes. Else 1, so that existing shards stay valid."""
    return 2 if self.min_seconds >= self.max_seconds / 2 > 0 else 1

  def check(self) -> None:
    if self.detector not in (*_THRESHOLDS, "none"):
      raise ValueError(f"detector = {self.detector!r}; allowed: {', '.join(_THRESHOLDS)}, none")
    if self.long not in ("split", "first"):
      raise ValueError(f"long = {self.long!r} is neither 'split' nor 'first'")
    if self.min_seconds < 0 or self.max_seconds < 0 or (self.max_seconds and self.max_seconds < self.min_seconds):
      raise ValueError("max_seconds must be 0 or at least min_seconds, and min_seconds at least 0")
    if (self.threshold is not None and self.threshold <= 0) or self.min_content < 0 or self.min_scene_frames < 1:
      raise ValueError("threshold must be more than 0, min_content at least 0, min_scene_frames at least 1")

  def rows(self, group: list[dict], context: Context, report: Callable) -> list[list[dict]]:
    (row,) = group
    if is_image(row["path"]):
      return [[{"source_id": row.get("id")}]]
    begin, rate = row.get("start") or 0, row["fps"]
    if self.detector == "none" or row.get("start") is not None:
      found = [(begin, begin + row["num_frames"])]
    else:
      found = self.detect(row["path"], progress=lambda n: report(n / row["num_frames"]))
    if self.cuts_at:
      found = add_cuts(found, row.get(self.cuts_at) or (), rate)
    parts = [part for scene in found for part in self._parts(*scene, rate)]
    return [[
      {"source_id": row.get("id"), "scene": i, "start": start, "end": end, "num_frames": end - start,
       "duration": (end - start) / rate, "id": clip_id(row.get("id") or row["path"], start, end)}
      for i, (start, end) in enumerate(parts)
    ]]  # fmt: skip

  def detect(self, path: str | Path, progress: Callable[[int], None] = lambda frames: None) -> list[tuple[int, int]]:
    """Scenes [(start, end)] of a video in frames, end excluded. They cover the video without gaps.

    progress: called with the number of decoded frames, now and then. Raises BadVideo if the file can't be decoded.
    """
    from scenedetect import AdaptiveDetector, ContentDetector, FrameTimecode

    threshold = _THRESHOLDS[self.detector] if self.threshold is None else self.threshold
    if self.detector == "adaptive":
      found = AdaptiveDetector(threshold, self.min_scene_frames, min_content_val=self.min_content)
    else:
      found = ContentDetector(threshold, self.min_scene_frames)
    reformatter, cuts, count = VideoReformatter(), [], 0
    with decode.open_video(path, threads=2) as (container, stream):
      for frame in container.decode(stream):
        image = reformatter.reformat(frame, format="bgr24", threads=1).to_ndarray()
        if (factor := frame.width / _DETECT_WIDTH) > 1:
          size = max(1, round(frame.width / factor)), max(1, round(frame.height / factor))
          image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        # The detector only compares frame numbers, so the rate is arbitrary.
        cuts += found.process_frame(FrameTimecode(count, fps=24.0), image)
        count += 1
        if count % 32 == 0:
          progress(count)
    if not count:
      raise BadVideo("has no frames")
    cuts += found.post_process(FrameTimecode(count - 1, fps=24.0))
    return list(itertools.pairwise(sorted({0, count, *(cut.frame_num for cut in cuts)})))

  def _parts(self, start: int, end: int, rate: float) -> list[tuple[int, int]]:
    """Splits a scene into clips of allowed lengths."""
    if end - start < self.min_seconds * rate:
      return []
    most = math.floor(self.max_seconds * rate)
    if not most or end - start <= most:
      return [(start, end)]
    if self.long == "first":
      return [(start, start + most)]
    count = math.ceil((end - start) / most)
    if (end - start) // count < self.min_seconds * rate:  # fewer parts, of the full length; the rest is dropped
      count, end = count - 1, start + (count - 1) * most
    return list(itertools.pairwise(np.linspace(start, end, count + 1).astype(int).tolist()))


def add_cuts(found: list[tuple[int, int]], wanted: Sequence[float], rate: float) -> list[tuple[int, int]]:
  """Scenes [(start, end)] in frames, also cut at the seconds `wanted`. A cut within 0.25 s of an edge is that edge."""
  edges = {start for start, _ in found} | {found[-1][1]}
  for second in wanted:
    nearest = min(edges, key=lambda edge, at=second * rate: abs(edge - at))
    if abs(nearest - second * rate) > _NEAR * rate and found[0][0] < second * rate < found[-1][1]:
      edges.add(round(second * rate))
  return list(itertools.pairwise(sorted(edges)))
