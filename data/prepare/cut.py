"""Clips as files of their own: frame exact, small, quick to decode; several from one decoding of their video."""

from __future__ import annotations

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
from av.video.reformatter import VideoReformatter
from PIL import Image

from data import paths
from data.prepare import decode
from data.prepare.shards import digest
from data.prepare.steps import Context, RowStep
from data.prepare.workers import Failure
from data.video import IMAGE_FPS, BadVideo, VideoInfo, is_image, probe

_DARK = 24.0  # mean luma, of 16 (black) to 235 (white), below which a frame at the end of a scene belongs to a fade
_KNOWN_COLORS = (1, 4, 5, 6, 7, 9, 10)
_ITU601 = 6
_GROUP_SECONDS = 60.0  # of video that one call cuts: some clips per decoding, and work for all processes
# Key frames are at most 24 frames apart, no B-frames and no loop filter: made to be decoded often, not to be small.
# Without x264's macroblock tree: with it one clip in fifty came out with other bits from one run to the next.
_ENCODER = {
  "crf": "18", "preset": "veryfast", "tune": "fastdecode", "g": "24", "bf": "0", "threads": "1", "x264-params": "no-mbtree=1"
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Clip:
  """Frames [start, end) of a video as `output` (mp4), its middle frame as `picture` (PNG) if wanted; `crop`: (x, y, width,
  height) of the pictures as they are shown, None for all."""

  start: int
  end: int
  output: str
  picture: str | None = None
  crop: tuple[int, int, int, int] | None = None


def cut_clips(
  path: str | Path, clips: list[Clip], *, short_side: int = 0, max_fps: float = 0.0, trim_dark: bool = False
) -> list[VideoInfo | BadVideo]:
  """Writes clips of one video as h264 of constant frame rate, decoding it once as far as they lie near each other.

  Frame exact. Rotation is applied, so the clips carry no rotation flag. Files of more than `max_fps` frames per second are
  thinned to a whole fraction of their rate; a variable rate becomes the file's mean rate.

  Args:
    path: the video.
    clips: in the order of time, written under temporary names first.
    short_side: pixels of a clip's shorter side; smaller videos keep their size (rounded to even), 0: all do.
    max_fps: see above; 0: no limit.
    trim_dark: leave out black frames at both ends (fades).

  Returns:
    for each clip its size and rate as the metadata table gives them, or why there is none.

  Raises:
    BadVideo: an unreadable video. OSError: no room on the disk.
  """
  with decode.open_video(path, threads=1) as (container, stream):
    reader = decode.Reader(path, container, stream)
    found: list[VideoInfo | BadVideo] = []
    for clip in clips:
      try:
        found.append(_cut(reader, stream, clip, short_side, max_fps, trim_dark))
      except BadVideo as error:
        found.append(error)
    return found


def _cut(reader: decode.Reader, stream, clip: Clip, short_side: int, max_fps: float, trim_dark: bool) -> VideoInfo:
  rate, times = decode.frame_rate(stream), reader.times
  fps = rate / math.ceil(rate / Fraction(max_fps).limit_denominator(1001)) if max_fps else rate
  if times is not None and clip.end > len(times):
    raise BadVideo(f"has {len(times)} frames, frames {clip.start} to {clip.end} are asked for")
  known = np.arange(clip.end) if times is None else times
  time_base = float(1 / rate if times is None else stream.time_base)
  repeats = _resample(known, clip.start, clip.end, time_base, (rate, fps))
  half = min(int(np.searchsorted(np.cumsum(repeats), repeats.sum() // 2, side="right")), clip.end - clip.start - 1)
  reformatter, middle = VideoReformatter(), []

  def frames() -> Iterator[av.VideoFrame]:
    for number, frame in reader.frames(clip.start, clip.end):
      for _ in range(repeats[number - clip.start]):
        small = _upright(frame, reformatter, short_side, clip.crop)
        if number - clip.start == half and not middle:
          middle.append(small.to_ndarray(format="rgb24"))
        yield small

  count, height, width = _encode(_without_fades(frames()) if trim_dark else frames(), clip.output, fps)
  if not count:
    raise BadVideo(f"frames {clip.start} to {clip.end} can't be decoded, or are all black")
  if clip.picture is not None:
    with paths.whole(clip.picture) as temporary:
      Image.fromarray(middle[0]).save(temporary, format="png")
  return VideoInfo(count, height, width, float(fps))


def _resample(times: np.ndarray, start: int, end: int, time_base: float, rates: tuple[Fraction, Fraction]) -> np.ndarray:
  """How often each frame of [start, end) is written to a clip of constant rate `rates[1]`: the frame nearest to each tick.

  Returns int64 [end - start]; all ones for a file that has this rate already.
  """
  seconds = (times[start:end] - times[start]) * time_base
  stop = (times[end] - times[start]) * time_base if end < len(times) else seconds[-1] + 1.0 / float(rates[0])
  ticks = np.arange(max(1, round(stop * float(rates[1])))) / float(rates[1])
  nearest = np.searchsorted((seconds[1:] + seconds[:-1]) / 2, ticks, side="right")
  return np.bincount(nearest, minlength=end - start)


def small_size(height: int, width: int, short_side: int) -> tuple[int, int]:
  """(height, width) with the shorter side at most `short_side` (0: any), both even, of about the same shape."""
  scale = min(1.0, short_side / min(height, width)) if short_side else 1.0
  return max(2, round(height * scale / 2) * 2), max(2, round(width * scale / 2) * 2)


def part_of(row: dict[str, Any]) -> tuple[tuple[int, int, int, int] | None, int, int]:
  """What a row shows of its file's pictures: (`crop` as (x, y, width, height) or None, height and width of that)."""
  if not row.get("crop"):
    return None, row["height"], row["width"]
  crop = tuple(int(v) for v in re.findall(r"-?\d+", str(row["crop"])))
  if len(crop) != 4:
    raise BadVideo(f"crop {row['crop']!r} is not x,y,width,height")
  return crop, crop[3], crop[2]


def _upright(
  frame: av.VideoFrame, reformatter: VideoReformatter, short_side: int, crop: tuple[int, int, int, int] | None = None
) -> av.VideoFrame:
  """The frame, or a part of it, as it is shown, small, yuv420p."""
  if crop or frame.rotation % 360:
    image = _shown(frame, reformatter, short_side, crop)
    height, width = small_size(*image.shape[:2], short_side)
    small = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
      width, height, "yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG", interpolation="AREA"
    )
    small.colorspace = _ITU601  # of the new colours, not of the file's
    return small
  height, width = small_size(frame.height, frame.width, short_side)
  small = reformatter.reformat(frame, width, height, "yuv420p", dst_color_range="MPEG", interpolation="AREA", threads=1)
  if _is_unnamed_hd(frame):
    small.colorspace = 1  # players, and data/video.py, take unnamed colours of large pictures for BT.709
  return small


def _is_unnamed_hd(frame: av.VideoFrame) -> bool:
  return frame.colorspace not in _KNOWN_COLORS and frame.height >= 720


def _shown(
  frame: av.VideoFrame, reformatter: VideoReformatter, short_side: int, crop: tuple[int, int, int, int] | None
) -> np.ndarray:
  """A turned frame, small, or a part of one, uint8 [H, W, 3]: in the file's own format a part can't begin at every pixel."""
  size = (frame.height, frame.width) if crop else small_size(frame.height, frame.width, short_side)
  source = "ITU709" if _is_unnamed_hd(frame) else None
  small = reformatter.reformat(frame, *size[::-1], "rgb24", src_colorspace=source, interpolation="AREA", threads=1)
  image = np.rot90(small.to_ndarray(), round(frame.rotation / 90))  # rotation is counter-clockwise, like rot90
  if crop:
    x, y, width, height = crop
    if min(x, y) < 0 or min(width, height) < 1 or x + width > image.shape[1] or y + height > image.shape[0]:
      raise BadVideo(f"crop {crop} leaves the picture of {image.shape[1]} x {image.shape[0]}")
    image = image[y : y + height, x : x + width]
  return np.ascontiguousarray(image)


def _is_dark(frame: av.VideoFrame) -> bool:
  plane = frame.planes[0]
  luma = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
  return float(luma[::4, ::4].mean()) < _DARK


def _without_fades(frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
  """Leaves out dark frames at the beginning and the end; dark ones in between wait until a bright one follows."""
  waiting, started = [], False
  for frame in frames:
    if not _is_dark(frame):
      yield from waiting
      yield frame
      waiting, started = [], True
    elif started:
      waiting.append(frame)


def _encode(frames: Iterator[av.VideoFrame], output: str, rate: Fraction) -> tuple[int, int, int]:
  """Writes an mp4 under a temporary name, then renames it -> (frames, height, width); without frames no file is left."""
  count = height = width = 0

  def write(container) -> None:
    nonlocal count, height, width
    stream = None
    for frame in frames:
      if stream is None:
        height, width = frame.height, frame.width
        stream = container.add_stream("libx264", rate=rate, options=_ENCODER)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        # Without these tags a reader would guess the colour matrix from the new, smaller size.
        context = stream.codec_context
        context.colorspace, context.color_range = frame.colorspace, frame.color_range
      # A fresh object, because a frame that is shown twice needs two times; pts must be set or the muxer refuses.
      frame.pts, frame.time_base, count = count, 1 / rate, count + 1
      frame.pict_type = 0
      container.mux(stream.encode(frame))
    if stream is not None:
      container.mux(stream.encode(None))

  try:
    with paths.whole(output) as temporary:
      with av.open(temporary, "w", format="mp4") as container:
        write(container)
      if not count:
        raise _NoFrames
  except _NoFrames:
    pass
  return count, height, width


class _NoFrames(Exception):  # noqa: N818
  """Ends `paths.whole` without a file."""


def crop_boxes(height: int, width: int, focus: float = 0.5) -> list[tuple[int, int, int, int]]:
  """The largest square and the largest box of the other orientation (9:16 or 16:9) in a picture, as even (x, y, w, h).

  `focus` in [0, 1] is where along the longer side the subject is; a box is centred there as far as the border allows.
  """

  def box(length: int) -> tuple[int, int, int, int]:
    long_side = max(height, width)
    length = min(length // 2 * 2, long_side)
    offset = min(max(round(focus * long_side - length / 2), 0), long_side - length) // 2 * 2
    return (offset, 0, length, height) if width >= height else (0, offset, width, length)

  short = min(height, width)
  sizes = [short, round(short * 9 / 16)]
  return [box(length) for length in sizes if length < max(height, width) and length >= 2]


# ----------------------------------------------------------------------------------------------------------------- steps


@dataclasses.dataclass(frozen=True)
class Cut(RowStep):
  """Each row's frames [start, end), of them its `crop`, as a file; `path` is then the clip, `video` the file that it is from.
  Without this step the table keeps `start`, `end` and `crop`, and the loader reads that part.

  short_side, max_fps, trim_dark: see `cut_clips`. The original has 1080 and no limit, 1.1 had 720 and 30.
  pictures: also the clip's middle frame, as a row of its own (an image).
  clips_folder, pictures_folder: where the files go, all into one folder; "": beside the step's table, in many.
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
      raise ValueError("short_side must be 0 (as the video) or at least 16 pixels")
    if self.max_fps < 0:
      raise ValueError("max_fps must be 0 (no limit) or more")

  def groups(self, rows: list[dict]) -> Iterator[list[dict]]:
    for _, same in itertools.groupby(rows, lambda row: row["path"]):
      group, seconds = [], 0.0
      for row in same:
        # Every group opens the file: one in a bucket is copied for that.
        if group and seconds >= _GROUP_SECONDS and not paths.is_remote(row["path"]):
          yield group
          group, seconds = [], 0.0
        group.append(row)
        seconds += row.get("duration") or 0.0
      yield group

  def rows(self, group: list[dict], context: Context, report: Callable) -> list[Any]:
    mark = digest(self.recipe())[:6]  # other settings, other files
    results: dict[int, Any] = {}
    clips: dict[int, Clip] = {}
    for i, row in enumerate(group):
      if is_image(row["path"]) or row["start"] is None:
        results[i] = {}
        continue
      if not re.fullmatch(r"[\w-]+", str(row["id"] or "")):  # of a foreign table
        results[i] = Failure(f"its id {row['id']!r} can't be part of a file name: only letters, digits, _ and - can")
        continue
      stem = re.sub(r"[^A-Za-z0-9-]+", "-", Path(row["path"]).stem)[:40]
      try:
        crop, _, _ = part_of({"height": 0, "width": 0, **row})
      except BadVideo as error:
        results[i] = Failure(str(error))
        continue
      part = "".join(f"-{v}" for v in crop or ())  # rows that show other parts of a picture may have one id
      name = f"{stem}_{row['start']:06d}-{row['end']:06d}{part}_{row['id']}-{mark}"
      own = paths.join(context.folder, f"clips-{mark}", row["id"][:2])
      picture = paths.join(self.pictures_folder or own, f"{name}.png") if self.pictures else None
      clips[i] = Clip(row["start"], row["end"], paths.join(self.clips_folder or own, f"{name}.mp4"), picture, crop)
    settings = {"short_side": self.short_side, "max_fps": self.max_fps, "trim_dark": self.trim_dark}
    infos = {i: info for i, clip in clips.items() if (info := _there(clip))}
    todo = [i for i in clips if i not in infos]
    infos |= dict(zip(todo, cut_clips(group[0]["path"], [clips[i] for i in todo], **settings) if todo else []))
    for i, info in infos.items():
      results[i] = Failure(str(info)) if isinstance(info, BadVideo) else self._cut_rows(group[i], clips[i], info)
    return [results[i] for i in range(len(group))]

  def complete(self, table: pl.LazyFrame) -> bool:
    made = table.filter(pl.col("video").is_not_null()).select("path").collect()["path"]
    return all(paths.is_remote(path) or paths.exists(path) for path in made)

  def _cut_rows(self, row: dict, clip: Clip, info: VideoInfo) -> list[dict]:
    values = {
      "video": row["path"], "start": None, "end": None, "crop": None, "num_frames": info.num_frames, "height": info.height,
      "width": info.width, "resolution": info.height * info.width, "aspect_ratio": info.height / info.width, "rotation": 0,
    }  # fmt: skip
    moving = {
      "path": clip.output,
      "fps": info.fps,
      "duration": info.num_frames / info.fps,
      "bytes": paths.stat(clip.output)[0],
    }
    still = {"path": clip.picture, "fps": IMAGE_FPS, "duration": None, "num_frames": 1, "id": f"{row['id'][:-1]}i"}
    return [{**values, **moving, "codec": "h264"}] + [{**values, **still, "codec": None}] * self.pictures


def _there(clip: Clip) -> VideoInfo | None:
  """What a clip that was made before holds; None where it, or its picture, is not there or was damaged since."""
  if not paths.exists(clip.output) or (clip.picture and not paths.exists(clip.picture)):
    return None
  try:
    return probe(clip.output)
  except BadVideo:
    return None


@dataclasses.dataclass(frozen=True)
class Crops(RowStep):
  """Adds to each row the largest square and the other orientation of its pictures, as rows with a `crop` of the same file.

  focus: column that says where along the longer side the subject is, 0 to 1; without it the middle.
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
