"""Scenes of a video: find the cuts, write each scene as a small clip that decodes quickly.

Frame numbers count frames in presentation order from 0, so they also hold for files with a variable frame rate. The detector
is PySceneDetect's AdaptiveDetector with its defaults, as in Open-Sora's `tools/scene_cut/scene_detect.py`; it is fed with
frames that PyAV has already made small, because converting full-size frames to NumPy costs more than detecting.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from data.video import DEFAULT_FPS, BadVideo, VideoInfo, probe

logging.getLogger("libav").setLevel(logging.CRITICAL)  # a broken file gives one line of ours, not pages of the decoder's

_DETECT_WIDTH = 256  # PySceneDetect's own choice of width
_DARK = 24.0  # mean luma, of 16 (black) to 235 (white), below which a frame at the end of a scene belongs to a fade
_KNOWN_COLORS = (1, 4, 5, 6, 7, 9, 10)
# Key frames are at most 24 frames apart, no B-frames and no loop filter: made to be decoded often, not to be small.
_ENCODER = {"crf": "18", "preset": "veryfast", "tune": "fastdecode", "g": "24", "bf": "0", "threads": "1"}


@contextlib.contextmanager
def open_video(path: str | Path, threads: int = 0) -> Iterator[tuple]:
  """Yields (container, video stream); a failure of the decoder inside becomes BadVideo. `threads` 0: as many as cores."""
  try:
    with av.open(str(path), metadata_errors="replace") as container:
      if not container.streams.video:
        raise BadVideo("has no video stream")
      stream = container.streams.video[0]
      stream.thread_type = "AUTO"
      stream.codec_context.thread_count = threads
      yield container, stream
  except av.FFmpegError as error:
    raise BadVideo(f"not a video, or damaged or cut short ({error.strerror})") from error


def frame_rate(stream) -> Fraction:
  """Mean frames per second of a stream, DEFAULT_FPS where the file doesn't say."""
  return Fraction(stream.average_rate or stream.guessed_rate or DEFAULT_FPS).limit_denominator(1001)


def detect_scenes(
  path: str | Path,
  *,
  threshold: float = 3.0,
  min_frames: int = 15,
  threads: int = 0,
  progress: Callable[[int], None] = lambda frames: None,
) -> list[tuple[int, int]]:
  """Cuts of a video.

  Args:
    path: any file PyAV decodes.
    threshold: ratio of a frame's change to the mean change around it that makes a cut.
    min_frames: frames between two cuts.
    threads: decoder threads, 0 for as many as cores.
    progress: called with the number of frames done, now and then.

  Returns:
    [(start, end)] in frames, end excluded; they cover the video without gaps, one scene if there is no cut.

  Raises:
    BadVideo: not a video, cut short, or unreadable at any place.
  """
  from scenedetect import AdaptiveDetector, FrameTimecode  # imports OpenCV: only where it's needed

  probe(path)  # finds what is wrong with a file without reading all of it
  detector = AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=min_frames)
  reformatter, cuts, count = VideoReformatter(), [], 0
  with open_video(path, threads) as (container, stream):
    for frame in container.decode(stream):
      width = min(frame.width, _DETECT_WIDTH)
      height = max(1, round(frame.height * width / frame.width))
      # Steady frame numbers at an arbitrary rate: the detector only compares numbers.
      image = reformatter.reformat(frame, width=width, height=height, format="bgr24", interpolation="AREA").to_ndarray()
      cuts += detector.process_frame(FrameTimecode(count, fps=24.0), image)
      count += 1
      if count % 64 == 0:
        progress(count)
  if not count:
    raise BadVideo("has no frames")
  edges = sorted({0, count, *(cut.frame_num for cut in cuts)})
  return list(itertools.pairwise(edges))


@functools.lru_cache(8)
def _frame_times(path: str, _size: int, _changed: int) -> np.ndarray | None:
  """Presentation times (int64, in units of the stream's time base) of all frames from the packets alone; None if not stored."""
  with open_video(path) as (container, stream):
    times = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
  if not times or None in times:
    return None
  return np.unique(np.asarray(times, np.int64))


def _resample(times: np.ndarray, start: int, end: int, time_base: float, rates: tuple[Fraction, Fraction]) -> np.ndarray:
  """How often each frame of [start, end) is written to a clip of constant rate `rates[1]`: the frame nearest to each tick.

  Returns int64 [end - start]; all ones for a file that has this rate already.
  """
  seconds = (times[start:end] - times[start]) * time_base
  stop = (times[end] - times[start]) * time_base if end < len(times) else seconds[-1] + 1.0 / float(rates[0])
  ticks = np.arange(max(1, round(stop * float(rates[1])))) / float(rates[1])
  nearest = np.searchsorted((seconds[1:] + seconds[:-1]) / 2, ticks, side="right")
  return np.bincount(nearest, minlength=end - start)


def _decode_range(container, stream, start: int, end: int, times: np.ndarray | None) -> Iterator[tuple[int, av.VideoFrame]]:
  """Yields (frame number - start, frame) for all frames of [start, end), else BadVideo; seeks where the file has times."""
  expected = start
  for begin in sorted({start, max(0, start - 250), 0}, reverse=True):  # after an unclean key frame an earlier one is tried
    if times is not None:
      container.seek(int(times[begin]) if begin else 0, stream=stream)
    for count, frame in enumerate(container.decode(stream)):
      number = count if times is None else int(np.searchsorted(times, -1 if frame.pts is None else frame.pts))
      if number >= end or number > expected:
        break
      if number == expected:
        yield number - start, frame
        expected += 1
    if expected > start or times is None:
      break
  if expected < end:
    raise BadVideo(f"frame {expected} can't be decoded (damaged or cut short)")


def small_size(height: int, width: int, short_side: int) -> tuple[int, int]:
  """(height, width) with the shorter side at most `short_side`, both even, the aspect ratio kept as well as that allows."""
  scale = min(1.0, short_side / min(height, width))
  return max(2, round(height * scale / 2) * 2), max(2, round(width * scale / 2) * 2)


def _upright(frame: av.VideoFrame, reformatter: VideoReformatter, short_side: int) -> av.VideoFrame:
  """The frame as it is shown, small, yuv420p."""
  height, width = small_size(frame.height, frame.width, short_side)
  size = {"width": width, "height": height, "interpolation": "AREA"}
  if frame.rotation % 360 == 0:
    small = reformatter.reformat(frame, format="yuv420p", dst_color_range="MPEG", **size)
    if frame.colorspace not in _KNOWN_COLORS and frame.height >= 720:
      small.colorspace = 1  # players, and data/video.py, take unnamed colours of large pictures for BT.709
    return small
  image = reformatter.reformat(frame, format="rgb24", **size).to_ndarray()
  image = np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))  # rotation is counter-clockwise, like rot90
  return av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")


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


def _encode(frames: Iterator[av.VideoFrame], output: Path, rate: Fraction) -> tuple[int, int, int]:
  """Writes an mp4 under a temporary name, then renames it -> (frames, height, width); without frames no file is left."""
  temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
  count = height = width = 0
  try:
    with av.open(str(temporary), "w", format="mp4") as container:
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
    if count:
      os.replace(temporary, output)
    return count, height, width
  finally:
    temporary.unlink(missing_ok=True)


def _write_png(image: np.ndarray, path: Path) -> None:
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    Image.fromarray(image).save(temporary, format="png")
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def cut_clip(
  path: str | Path,
  start: int,
  end: int,
  output: str | Path,
  *,
  short_side: int = 256,
  max_fps: float = 30.0,
  picture: str | Path | None = None,
  trim_dark: bool = True,
) -> VideoInfo:
  """Writes the frames [start, end) of a video as a small h264 clip of constant frame rate, its middle frame as PNG if wanted.

  Frame exact. Rotation is applied, so the clip carries no rotation flag. Files of more than `max_fps` frames per second are
  thinned to a whole fraction of their rate; a variable rate becomes the file's mean rate.

  Args:
    path: the video.
    start, end: frames, end excluded, as `detect_scenes` gives them.
    output: the clip's mp4 file, written under a temporary name first.
    short_side: pixels of the clip's shorter side; smaller videos keep their size (rounded to even).
    max_fps: see above.
    picture: PNG file for the middle frame, or None.
    trim_dark: leave out black frames at both ends (fades).

  Returns:
    size and rate of the clip as the metadata table gives them.

  Raises:
    BadVideo: an unreadable or too short video, or only black frames.
  """
  output, reformatter, middle = Path(output), VideoReformatter(), []
  with open_video(path, threads=1) as (container, stream):
    rate = frame_rate(stream)
    fps = rate / math.ceil(rate / Fraction(max_fps).limit_denominator(1001))
    times = _frame_times(str(path), os.path.getsize(path), os.stat(path).st_mtime_ns)
    if times is not None and end > len(times):
      raise BadVideo(f"has {len(times)} frames, frames {start} to {end} are asked for")
    known = np.arange(end) if times is None else times
    repeats = _resample(known, start, end, float(1 / rate if times is None else stream.time_base), (rate, fps))
    half = min(int(np.searchsorted(np.cumsum(repeats), repeats.sum() // 2, side="right")), end - start - 1)

    def frames():
      for number, frame in _decode_range(container, stream, start, end, times):
        for _ in range(repeats[number]):
          small = _upright(frame, reformatter, short_side)
          if number == half and not middle:
            middle.append(small.to_ndarray(format="rgb24"))
          yield small

    count, height, width = _encode(_without_fades(frames()) if trim_dark else frames(), output, fps)
  if not count:
    raise BadVideo(f"frames {start} to {end} can't be decoded, or are all black")
  if picture is not None:
    _write_png(middle[0], Path(picture))
  return VideoInfo(count, height, width, float(fps))


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
