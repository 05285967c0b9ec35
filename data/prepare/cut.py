"""Writes clips as files: frame exact, small, quick to decode. One decoding of a video gives several clips."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import av
import numpy as np
import polars as pl
from av.video.reformatter import Colorspace, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image

from data import paths
from data.prepare import decode
from data.prepare.steps import Context, RowStep, at_least
from data.prepare.workers import Failure
from data.shards import digest
from data.video import IMAGE_FPS, BadVideo, VideoInfo, cut_out, is_image, probe

_DARK = 24.0  # mean luma (16 black, 235 white) below which a frame at either end of a scene belongs to a fade
_KNOWN_COLORS = (1, 4, 5, 6, 7, 9, 10)
_ITU601 = 6  # of `VideoFrame.colorspace`, whose numbers differ from those of `Colorspace`
_GROUP_SECONDS = 60.0  # of video per call. Long calls decode once for many clips, short calls use all processes
# Key frames at most 24 frames apart, no B-frames and no loop filter make clips quick to decode.
# x264's macroblock tree is off: with it, one clip in fifty had other bits in every run.
_ENCODER = {
  "crf": "18", "preset": "veryfast", "tune": "fastdecode", "g": "24", "bf": "0", "threads": "1", "x264-params": "no-mbtree=1"
}  # fmt: skip
Crop = tuple[int, int, int, int]  # x, y, width, height in the upright frame


@dataclasses.dataclass(frozen=True)
class Clip:
  """Frames [start, end) of a video as the file `output` (mp4). picture: file for the middle frame (PNG), or None."""

  start: int
  end: int
  output: str
  picture: str | None = None
  crop: Crop | None = None


def cut_clips(path: str | Path, clips: list[Clip], step: Cut) -> list[VideoInfo | BadVideo]:
  """Writes clips of one video, in order of time, as h264 with a constant frame rate. Nearby clips share one decoding.

  Rotation is applied, so clips have no rotation flag. A variable frame rate becomes the file's mean rate. Returns for each clip
  its size and rate, or why there is no clip. Raises BadVideo if the video can't be read, OSError if the disk is full.
  """
  with decode.open_video(path, threads=1) as (container, stream):
    reader = decode.Reader(path, container, stream)
    found: list[VideoInfo | BadVideo] = []
    for clip in clips:
      try:
        found.append(_cut(reader, stream, clip, step))
      except BadVideo as error:
        found.append(error)
    return found


def _cut(reader: decode.Reader, stream: VideoStream, clip: Clip, step: Cut) -> VideoInfo:
  rate, times = decode.frame_rate(stream), reader.times
  fps = rate / math.ceil(rate / Fraction(step.max_fps).limit_denominator(1001)) if step.max_fps else rate
  if times is not None and clip.end > len(times):
    raise BadVideo(f"has {len(times)} frames; the clip needs frames {clip.start} to {clip.end}")
  known = np.arange(clip.end) if times is None else times
  time_base = float(stream.time_base if times is not None and stream.time_base else 1 / rate)
  repeats = _resample(known, clip.start, clip.end, time_base, (rate, fps))
  middle_at = min(int(np.searchsorted(np.cumsum(repeats), repeats.sum() // 2, side="right")), clip.end - clip.start - 1)
  reformatter, middle = VideoReformatter(), []

  def frames() -> Iterator[av.VideoFrame]:
    for number, frame in reader.frames(clip.start, clip.end):
      for _ in range(repeats[number - clip.start]):
        small = _upright(frame, reformatter, step.short_side, clip.crop)
        if number - clip.start == middle_at and not middle:
          middle.append(small.to_ndarray(format="rgb24"))
        yield small

  count, height, width = _encode(_without_fades(frames()) if step.trim_dark else frames(), clip.output, fps)
  if not count:
    raise BadVideo(f"frames {clip.start} to {clip.end} can't be decoded, or are all black")
  if clip.picture is not None:
    with paths.whole(clip.picture) as temporary:
      Image.fromarray(middle[0]).save(temporary, format="png")
  return VideoInfo(count, height, width, float(fps))


def _resample(times: np.ndarray, start: int, end: int, time_base: float, rates: tuple[Fraction, Fraction]) -> np.ndarray:
  """How often each frame of [start, end) appears in a clip with the constant rate `rates[1]`, int64 [end - start].

  `rates[0]` is the file's rate. Each tick of the clip takes the nearest frame.
  """
  seconds = (times[start:end] - times[start]) * time_base
  stop = (times[end] - times[start]) * time_base if end < len(times) else seconds[-1] + 1.0 / float(rates[0])
  ticks = np.arange(max(1, round(stop * float(rates[1])))) / float(rates[1])
  nearest = np.searchsorted((seconds[1:] + seconds[:-1]) / 2, ticks, side="right")
  return np.bincount(nearest, minlength=end - start)


def small_size(height: int, width: int, short_side: int) -> tuple[int, int]:
  """(height, width), both even, with the shorter side at most `short_side` (0: any) and about the same aspect ratio."""
  scale = min(1.0, short_side / min(height, width)) if short_side else 1.0
  return max(2, round(height * scale / 2) * 2), max(2, round(width * scale / 2) * 2)


def part_of(row: dict[str, Any]) -> tuple[Crop | None, int, int]:
  """The part of the frames that a row shows: (`crop` as (x, y, width, height) or None, its height, its width)."""
  if not row.get("crop"):
    return None, row["height"], row["width"]
  crop = tuple(int(v) for v in re.findall(r"-?\d+", str(row["crop"])))
  if len(crop) != 4:
    raise BadVideo(f"crop {row['crop']!r} is not x,y,width,height")
  return crop, crop[3], crop[2]


def _upright(frame: av.VideoFrame, reformatter: VideoReformatter, short_side: int, crop: Crop | None) -> av.VideoFrame:
  """The frame or its crop, upright and downscaled, as yuv420p."""
  if crop or frame.rotation % 360:
    image = _shown(frame, reformatter, short_side, crop)
    height, width = small_size(image.shape[0], image.shape[1], short_side)
    small = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
      width, height, format="yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG", interpolation="AREA"
    )
    small.colorspace = _ITU601  # matches dst_colorspace
    return small
  height, width = small_size(frame.height, frame.width, short_side)
  small = reformatter.reformat(frame, width, height, "yuv420p", dst_color_range="MPEG", interpolation="AREA", threads=1)
  if _is_unnamed_hd(frame):
    small.colorspace = 1  # players and data/video.py read large frames without a colour tag as BT.709
  return small


def _is_unnamed_hd(frame: av.VideoFrame) -> bool:
  return frame.colorspace not in _KNOWN_COLORS and frame.height >= 720


def _shown(frame: av.VideoFrame, reformatter: VideoReformatter, short_side: int, crop: Crop | None) -> np.ndarray:
  """A rotated or cropped frame, uint8 [H, W, 3]. RGB, because a crop of subsampled colours can't begin at every pixel."""
  size = (frame.height, frame.width) if crop else small_size(frame.height, frame.width, short_side)
  source = Colorspace.ITU709 if _is_unnamed_hd(frame) else None
  small = reformatter.reformat(frame, *size[::-1], format="rgb24", src_colorspace=source, interpolation="AREA", threads=1)
  image = np.rot90(small.to_ndarray(), round(frame.rotation / 90))  # rotation is counter-clockwise, like rot90
  return np.ascontiguousarray(cut_out(image, crop))


def _is_dark(frame: av.VideoFrame) -> bool:
  plane = frame.planes[0]
  luma = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
  return float(luma[::4, ::4].mean()) < _DARK


def _without_fades(frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
  """Drops dark frames at both ends. Dark frames in between wait until a bright frame follows."""
  waiting = []
  for frame in itertools.dropwhile(_is_dark, frames):
    waiting.append(frame)
    if not _is_dark(frame):
      yield from waiting
      waiting = []


def _encode(frames: Iterator[av.VideoFrame], output: str, rate: Fraction) -> tuple[int, int, int]:
  """Writes an mp4 -> (frames, height, width). Without frames it writes no file."""
  first = next(frames, None)
  if first is None:
    return 0, 0, 0
  height, width = first.height, first.width
  with paths.whole(output) as temporary, av.open(temporary, "w", format="mp4") as container:
    stream = container.add_stream("libx264", rate=rate, options=_ENCODER)
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    # Without these tags a reader would guess the colour matrix from the new, smaller size.
    stream.codec_context.colorspace, stream.codec_context.color_range = first.colorspace, first.color_range
    for number, frame in enumerate(itertools.chain([first], frames)):
      frame.pts, frame.time_base = number, 1 / rate  # without pts the muxer refuses the frame
      frame.pict_type = 0
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  return number + 1, height, width


def crop_boxes(height: int, width: int, focus: float = 0.5) -> list[Crop]:
  """The largest square and the largest box of the other orientation (9:16 or 16:9) in a frame, as even (x, y, w, h).

  focus: place of the subject along the longer side, 0 to 1. A box is centred there as far as the border allows.
  """

  def box(length: int) -> Crop:
    long_side = max(height, width)
    length = min(length // 2 * 2, long_side)
    offset = min(max(round(focus * long_side - length / 2), 0), long_side - length) // 2 * 2
    return (offset, 0, length, height) if width >= height else (0, offset, width, length)

  short = min(height, width)
  return [box(length) for length in (short, round(short * 9 / 16)) if 2 <= length < max(height, width)]


# ----------------------------------------------------------------------------------------------------------------- steps


@dataclasses.dataclass(frozen=True)
class Cut(RowStep):
  """Writes the frames [start, end) of each row, cropped to its `crop`, to a file: `path` is the clip, `video` its source.

  Without this step the table keeps `start`, `end` and `crop`, and the loader reads that part of the source.

  short_side: pixels of the shorter side, 0: the source's. Smaller videos keep their size, rounded to even.
  max_fps: largest frame rate; 0: no limit. The step divides a higher rate by the smallest whole number that meets the
    limit. Open-Sora 1.2 uses short_side 1080 and no limit, 1.1 used 720 and 30.
  trim_dark: whether to drop black frames at both ends (fades).
  pictures: whether to write the clip's middle frame too, as a row of its own (an image).
  clips_folder, pictures_folder: folder for all files; "": folders beside the step's table.
  """

  title: ClassVar[str] = "cut"
  version: ClassVar[int] = 2
  needs: ClassVar[tuple[str, ...]] = ("path", "start", "end", "id")
  columns: ClassVar[dict[str, Any]] = {"video": pl.String}

  short_side: int = 1080
  max_fps: float = 0.0
  trim_dark: bool = False
  pictures: bool = False
  clips_folder: str = ""
  pictures_folder: str = ""

  def check(self) -> None:
    if self.short_side and self.short_side < 16:
      raise ValueError("short_side must be 0 (as the source) or at least 16 pixels")
    at_least(self, 0, "max_fps")

  def groups(self, rows: list[dict]) -> Iterator[list[dict]]:
    for _, same in itertools.groupby(rows, lambda row: row["path"]):
      group, seconds = [], 0.0
      for row in same:
        # Each group opens its file. Opening a file in a bucket copies it, so such a file stays one group.
        if group and seconds >= _GROUP_SECONDS and not paths.is_remote(row["path"]):
          yield group
          group, seconds = [], 0.0
        group.append(row)
        seconds += row.get("duration") or 0.0
      yield group

  def rows(self, group: list[dict], context: Context, report: Callable) -> list[Any]:
    mark = digest(self.recipe())[:6]  # other settings write other files
    results: list[Any] = [{} for _ in group]
    clips: dict[int, Clip] = {}
    for i, row in enumerate(group):
      if not is_image(row["path"]) and row["start"] is not None:
        try:
          clips[i] = self._clip(row, context.folder, mark)
        except BadVideo as error:
          results[i] = Failure(str(error))
    infos = {i: info for i, clip in clips.items() if (info := _existing(clip))}
    todo = [i for i in clips if i not in infos]
    infos |= dict(zip(todo, cut_clips(group[0]["path"], [clips[i] for i in todo], self) if todo else []))
    for i, info in infos.items():
      results[i] = Failure(str(info)) if isinstance(info, BadVideo) else self._cut_rows(group[i], clips[i], info)
    return results

  def _clip(self, row: dict, folder: str, mark: str) -> Clip:
    """The clip of a row, with the names of its files. Raises BadVideo for an id or a crop that can't be used."""
    if not re.fullmatch(r"[\w-]+", str(row["id"] or "")):  # the table of another program may have any id
      raise BadVideo(f"its id {row['id']!r} can't be part of a file name: only letters, digits, _ and - can")
    crop, _, _ = part_of({"height": 0, "width": 0, **row})
    stem = re.sub(r"[^A-Za-z0-9-]+", "-", Path(row["path"]).stem)[:40]
    part = "".join(f"-{v}" for v in crop or ())  # rows with different crops may have one id
    name = f"{stem}_{row['start']:06d}-{row['end']:06d}{part}_{row['id']}-{mark}"
    own = paths.join(folder, f"clips-{mark}", row["id"][:2])
    picture = paths.join(self.pictures_folder or own, f"{name}.png") if self.pictures else None
    return Clip(row["start"], row["end"], paths.join(self.clips_folder or own, f"{name}.mp4"), picture, crop)

  def complete(self, table: pl.LazyFrame) -> bool:
    made = table.filter(pl.col("video").is_not_null()).select("path").collect()["path"]
    return all(paths.is_remote(path) or paths.exists(path) for path in made)

  def _cut_rows(self, row: dict, clip: Clip, info: VideoInfo) -> list[dict]:
    values = {
      "video": row["path"], "start": None, "end": None, "crop": None, "num_frames": info.num_frames, "height": info.height,
      "width": info.width, "resolution": info.height * info.width, "aspect_ratio": info.height / info.width, "rotation": 0,
    }  # fmt: skip
    moving = {"path": clip.output, "fps": info.fps, "duration": info.num_frames / info.fps, "bytes": paths.stat(clip.output)[0]}
    still = {"path": clip.picture, "fps": IMAGE_FPS, "duration": None, "num_frames": 1, "id": f"{row['id'][:-1]}i"}
    return [{**values, **moving, "codec": "h264"}] + [{**values, **still, "codec": None}] * self.pictures


def _existing(clip: Clip) -> VideoInfo | None:
  """Size and rate of a clip that an earlier run wrote; None if it is missing or damaged, or if its image is missing."""
  with contextlib.suppress(BadVideo):
    return probe(clip.output) if clip.picture is None or paths.exists(clip.picture) else None


@dataclasses.dataclass(frozen=True)
class Crops(RowStep):
  """Adds rows for the largest square and the other orientation of each row, as a `crop` of the same file.

  focus: column with the place of the subject along the longer side, 0 to 1; "": the middle.
  """

  title: ClassVar[str] = "crops"
  needs: ClassVar[tuple[str, ...]] = ("path", "height", "width", "id")
  columns: ClassVar[dict[str, Any]] = {"crop": pl.String}

  focus: str = ""

  def rows(self, group: list[dict], context: Context, report: Callable) -> list[list[dict]]:
    (row,) = group
    focus = row.get(self.focus)
    boxes = crop_boxes(row["height"], row["width"], 0.5 if focus is None else focus)
    return [
      [{"crop": None}] + [{"crop": ",".join(map(str, box)), "id": f"{row['id'][:-1]}{'sp'[i]}"} for i, box in enumerate(boxes)]
    ]
