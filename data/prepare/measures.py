"""Scores by classical vision, without weights: motion, quality, camera, text (by the models in rapidocr's package)."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
from typing import Any, ClassVar

import cv2
import numpy as np
import polars as pl

from data.prepare.decode import at_shares, spread
from data.prepare.steps import at_least

_FLOW_SIZE = (576, 320)  # width and height of the frames whose flow Open-Sora measures
_PRESETS = ("ultrafast", "fast", "medium")
CLASSES = ("static", "pan_left", "pan_right", "tilt_up", "tilt_down", "zoom_in", "zoom_out")  # captions name them
_DARK = 16.0  # a frame with a lower mean grey (0 to 255) is black; black bars may be 8 brighter
_SAME = 0.25  # mean difference (0 to 255) below coding noise: the two frames show the same image


@dataclasses.dataclass(frozen=True)
class Motion:
  """`flow`: mean absolute optical flow in pixels of a 320 x 576 frame, over both components, all pixels and pairs of frames.

  As in Open-Sora 1.2 (`tools/scoring/optical_flow`): frames 0, 10, 20, 30, rotated to landscape. Open-Sora uses UniMatch, this
  scorer DIS (Kroeger et al., 2016), so numbers are similar but not equal. The distance counts frames, not seconds: a video
  with 60 frames per second has less flow. Frames of a short clip are a third of its length apart.

  count: number of frames; every: distance between two of them; preset: preset of DIS.
  """

  columns: ClassVar[dict[str, Any]] = {"flow": pl.Float64}
  side: ClassVar[int] = 320

  count: int = 4
  every: int = 10
  preset: str = "fast"

  def check(self) -> None:
    at_least(self, 2, "count")
    at_least(self, 1, "every")
    if self.preset not in _PRESETS:
      raise ValueError(f"preset = {self.preset!r} is none of {', '.join(_PRESETS)}")

  def frames(self, num_frames: int, fps: float) -> np.ndarray:
    if num_frames < 2:
      return np.zeros(0, np.int64)
    places = np.arange(self.count) * min(self.every, (num_frames - 1) / (self.count - 1))
    return np.unique(places.astype(np.int64))  # each frame once: a repeated frame would count as a still pair

  def __call__(self, images: np.ndarray, row: dict) -> dict[str, float]:
    dis: Any = cv2.DISOpticalFlow.create(getattr(cv2, f"DISOPTICAL_FLOW_PRESET_{self.preset.upper()}"))
    images = np.rot90(images, axes=(1, 2)) if images.shape[1] > images.shape[2] else images  # to landscape
    grey = [cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY) for image in images]
    grey = [np.ascontiguousarray(cv2.resize(g, _FLOW_SIZE, interpolation=cv2.INTER_AREA)) for g in grey]
    return {"flow": float(np.mean([np.abs(dis.calc(a, b, None)).mean() for a, b in itertools.pairwise(grey)]))}


@dataclasses.dataclass(frozen=True)
class Quality:
  """Light and detail of grey frames (0 to 255) whose shorter side has 256 pixels:

  sharpness: variance of the Laplacian (Pech-Pacheco et al., 2000), median over frames; low values are blurred or empty.
  brightness: mean grey. black: share of black frames.
  frozen: share of neighbouring frames that show the same image; 1 is a still, high values are slide shows.
  letterbox: share of the frame that black bars cover. content: "x,y,width,height" of the rest, in pixels of the file like the
    table's `crop`; null without bars.

  count: number of places in the clip, with two neighbouring frames each.
  """

  columns: ClassVar[dict[str, Any]] = {
    "sharpness": pl.Float64, "brightness": pl.Float64, "black": pl.Float64, "frozen": pl.Float64, "letterbox": pl.Float64,
    "content": pl.String,
  }  # fmt: skip
  side: ClassVar[int] = 256

  count: int = 8

  def check(self) -> None:
    at_least(self, 1, "count")

  def frames(self, num_frames: int, fps: float) -> np.ndarray:
    places = spread(num_frames, self.count)
    return np.unique(np.concatenate([places, np.minimum(places + 1, num_frames - 1)]))

  def __call__(self, images: np.ndarray, row: dict) -> dict[str, Any]:
    grey = np.stack([cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in images])
    means = grey.mean((1, 2))
    numbers = self.frames(row["num_frames"], 0.0)
    pairs = np.flatnonzero(np.diff(numbers) == 1)
    steps = [np.abs(grey[i + 1].astype(np.int16) - grey[i]).mean() for i in pairs]
    box = _content(grey.max(0))
    x, y, w, h = (round(v * row["height"] / grey.shape[1]) for v in box)
    share = 1 - box[2] * box[3] / grey[0].size
    left, top = row["crop"][:2] if row.get("crop") else (0, 0)
    return {
      "sharpness": float(np.median([cv2.Laplacian(g, cv2.CV_64F).var() for g in grey])),
      "brightness": float(means.mean()),
      "black": float((means < _DARK).mean()),
      "frozen": float((np.array(steps) < _SAME).mean()) if steps else None,
      "letterbox": float(share),
      "content": f"{left + x},{top + y},{min(w, row['width'] - x)},{min(h, row['height'] - y)}" if 0 < share < 1 else None,
    }


def _content(brightest: np.ndarray) -> tuple[int, int, int, int]:
  """(x, y, width, height) of an image [H, W] without black rows and columns at its border; all of it if all is black."""
  rows, columns = (np.flatnonzero(np.percentile(brightest, 99, axis=axis) >= _DARK + 8) for axis in (1, 0))
  if not len(rows) or not len(columns):
    return 0, 0, brightest.shape[1], brightest.shape[0]
  return int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)


@dataclasses.dataclass(frozen=True)
class Camera:
  """`cmotion`: the motion of the camera, by the rule of Open-Sora 1.2 (`tools/caption/camera_motion`).

  The rule measures how far the middles of the four edges move from the first frame to the last. A move counts above
  `threshold` times the shorter side. Edges that move the same way are a pan or a tilt; edges that move apart or together are a
  zoom. Open-Sora tracks a grid of points with CoTracker2. This scorer chains similarity transforms (corners, Lucas-Kanade,
  RANSAC), which a moving subject disturbs less.

  Classes: static, pan_left, pan_right, tilt_up, tilt_down, zoom_in, zoom_out, several joined with "+", or undetermined if
  nothing can be tracked. `camera_x` and `camera_y` (motion of the image in shares of the shorter side) and `camera_zoom` are
  the measured numbers. seconds: distance between two frames; most: largest number of frames.
  """

  columns: ClassVar[dict[str, Any]] = {
    "cmotion": pl.String, "camera_x": pl.Float64, "camera_y": pl.Float64, "camera_zoom": pl.Float64,
  }  # fmt: skip
  side: ClassVar[int] = 240

  threshold: float = 0.25
  seconds: float = 0.2
  most: int = 64

  def check(self) -> None:
    if self.threshold <= 0 or self.seconds <= 0 or self.most < 2:
      raise ValueError("threshold and seconds must be more than 0, most at least 2")

  def frames(self, num_frames: int, fps: float) -> np.ndarray:
    if num_frames < 2:
      return np.zeros(0, np.int64)
    count = min(self.most, max(2, round(num_frames / fps / self.seconds) + 1), num_frames)
    return np.unique(np.linspace(0, num_frames - 1, count).astype(np.int64))

  def __call__(self, images: np.ndarray, row: dict) -> dict[str, Any]:
    grey = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in images]
    height, width = grey[0].shape
    total = np.eye(3)
    for a, b in itertools.pairwise(grey):
      step = _similarity(a, b)
      if step is None:
        return {"cmotion": "undetermined"}
      total = step @ total
    middles = np.array([(width / 2, 0, 1), (width / 2, height, 1), (0, height / 2, 1), (width, height / 2, 1)])
    moved = (middles @ total.T)[:, :2] - middles[:, :2]  # of top, bottom, left, right
    centre = (np.array([width / 2, height / 2, 1]) @ total.T)[:2] - (width / 2, height / 2)
    short = min(height, width)
    return {
      "cmotion": camera_class(moved, self.threshold * short),
      "camera_x": float(centre[0] / short),
      "camera_y": float(centre[1] / short),
      "camera_zoom": float(np.sqrt(abs(np.linalg.det(total[:2, :2])))),
    }


def camera_class(moved: np.ndarray, threshold: float) -> str:
  """Class for the moves [4, 2], (x, y) in pixels, of the middles of the top, bottom, left and right edge."""
  top, bottom, left, right = (np.where(np.abs(m) > threshold, np.sign(m), 0) for m in moved)
  labels = []
  # x, y: sign of the move of top and bottom if they agree, else of left and right if they agree, else 0.
  x, y = ((top[i] if top[i] == bottom[i] else 0) or (left[i] if left[i] == right[i] else 0) for i in (0, 1))
  if x:
    labels.append("pan_right" if x < 0 else "pan_left")  # the image moves left: the camera moves right
  if y:
    labels.append("tilt_up" if y > 0 else "tilt_down")
  apart = (top[1] < 0 < bottom[1]) or (left[0] < 0 < right[0])
  together = (top[1] > 0 > bottom[1]) or (left[0] > 0 > right[0])
  if apart != together:
    labels.append("zoom_in" if apart else "zoom_out")
  if labels:
    return "+".join(labels)
  return "static" if not np.any([top, bottom, left, right]) else "undetermined"


def _similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
  """The similarity transform [3, 3] from grey image `a` to `b` that most corners follow; None if too few do."""
  if np.abs(a.astype(np.int16) - b).mean() < _SAME:
    return np.eye(3)
  corners = cv2.goodFeaturesToTrack(a, 200, 0.01, 8)
  if corners is None or len(corners) < 8:
    return None
  track: Any = cv2.calcOpticalFlowPyrLK  # its annotations and those of `DISOpticalFlow.calc` do not allow None
  found, status, _ = track(a, b, corners, None, winSize=(21, 21), maxLevel=3)
  kept = status.ravel() == 1
  if kept.sum() < 8:
    return None
  cv2.setRNGSeed(0)  # RANSAC is random: the same clip must get the same class
  matrix, _ = cv2.estimateAffinePartial2D(corners[kept], found[kept], method=cv2.RANSAC, ransacReprojThreshold=1.5)
  if matrix is None or not 0.7 < np.sqrt(abs(np.linalg.det(matrix[:, :2]))) < 1.4:  # a cut or noise: no camera zooms so fast
    return None
  return np.vstack([matrix, (0, 0, 1)])


@dataclasses.dataclass(frozen=True)
class Text:
  """`text_area`: share of the frame that is text. `ocr`: number of text boxes. Both are the largest value over the frames.

  Open-Sora counts the boxes of its detector on frame 10. A detector alone takes grass and leaves for text (measured: 50 to 98 %
  of the area of such frames of Big Buck Bunny). So a box counts only if it can be read.

  at: places of the frames, as shares of the clip. confidence, letters: least confidence and characters of a box that counts.
  """

  columns: ClassVar[dict[str, Any]] = {"text_area": pl.Float64, "ocr": pl.Int64}
  side: ClassVar[int] = 720

  at: tuple[float, ...] = (0.5,)
  confidence: float = 0.7
  letters: int = 2

  def check(self) -> None:
    if importlib.util.find_spec("rapidocr") is None:
      raise ValueError("text needs `pip install -c constraints.txt -r requirements-prepare.txt`")
    if not self.at or not all(0 <= place <= 1 for place in self.at):
      raise ValueError("at needs places from 0 to 1")

  def frames(self, num_frames: int, fps: float) -> np.ndarray:
    return at_shares(num_frames, self.at)

  def __call__(self, images: np.ndarray, row: dict) -> dict[str, Any]:
    found = [self._boxes(image) for image in images]
    return {"text_area": max(area for area, _ in found), "ocr": max(count for _, count in found)}

  def _boxes(self, image: np.ndarray) -> tuple[float, int]:
    # All three flags in every call, because the reader keeps them.
    result = _reader()(cv2.cvtColor(image, cv2.COLOR_RGB2BGR), use_det=True, use_cls=False, use_rec=True)
    if getattr(result, "boxes", None) is None or result.txts is None:
      return 0.0, 0
    mask, count = np.zeros(image.shape[:2], np.uint8), 0
    for box, text, score in zip(result.boxes, result.txts, result.scores):
      if score > self.confidence and len(text.strip()) >= self.letters:
        cv2.fillPoly(mask, [np.asarray(box).round().astype(np.int32)], 1)
        count += 1
    return float(mask.mean()), count


@functools.cache
def _reader() -> Any:
  from rapidocr import RapidOCR

  return RapidOCR(params={
    "Global.log_level": "critical", "EngineConfig.onnxruntime.intra_op_num_threads": 1,
    "EngineConfig.onnxruntime.inter_op_num_threads": 1,
  })  # fmt: skip
