"""Many frames of a video in order, for scene detection and cutting. `data.video.read_frames` gives single frames.

Frame numbers count frames in presentation order from 0, also in files with a variable frame rate.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.stream import VideoStream

from data import paths
from data.paths import PASSING
from data.prepare.workers import FULL
from data.video import DEFAULT_FPS, BadVideo, frame_times, open_stream, read_through

_SEEK_GAP = 250  # frames. The reader seeks over a larger gap, and decodes through a smaller one


@contextlib.contextmanager
def open_video(path: str | Path, threads: int) -> Iterator[tuple[InputContainer, VideoStream]]:
  """Yields (container, video stream), decoded by a number of threads.

  Raises BadVideo if the file is no video or damaged, also for errors of the decoder in the block. Raises OSError if the file
  can't be read.
  """
  try:
    with paths.local_copy(str(path)) as name:
      container, stream = open_stream(str(name))
      with container:
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = threads
        yield container, stream
  except FFmpegError as error:
    if error.errno in FULL:  # raised by a write in the block
      raise OSError(error.errno, os.strerror(error.errno)) from error
    if error.errno in PASSING:  # FFmpeg reports EIO for damaged files too
      read_through(str(path))
    raise BadVideo(f"not a video, or damaged or cut short ({error.strerror})") from error


def spread(num_frames: int, count: int) -> np.ndarray:
  """Frame numbers in the middles of `count` equal parts of a clip, each once."""
  return np.unique(((np.arange(count) + 0.5) * num_frames / count).astype(np.int64))


def at_shares(num_frames: int, shares: Sequence[float]) -> np.ndarray:
  """Frame numbers at `shares` (0 to 1) of a clip, each once."""
  return np.unique([min(num_frames - 1, int(share * num_frames)) for share in shares])


def frame_rate(stream: VideoStream) -> Fraction:
  """Mean frames per second of a stream. DEFAULT_FPS if the file has no rate."""
  return Fraction(stream.average_rate or stream.guessed_rate or DEFAULT_FPS).limit_denominator(1001)


class Reader:
  """Reads ranges of frames of one open video. Consecutive ranges are decoded once."""

  def __init__(self, path: str | Path, container: InputContainer, stream: VideoStream):
    self.times = frame_times(str(path))  # int64, None: `Reader` counts frames, as `data.video` does
    self._container, self._stream = container, stream
    self._frames: Iterator | None = None
    self._next, self._held = 0, None  # number of the decoder's next frame; a frame that belongs to the next range

  def frames(self, start: int, end: int) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yields (frame number, frame) for all frames of [start, end). Raises BadVideo if one can't be decoded."""
    expected = start
    for begin in self._begins(start):
      if begin is not None:
        self._seek(begin)
      for number, frame in self._forward():
        if number > expected or number >= end:
          self._held = (number, frame)
          break
        if number == expected:
          yield number, frame
          expected += 1
          if expected == end:
            return
      if expected > start or self.times is None:
        break  # frames were yielded already, or there is no other start
    if expected < end:
      raise BadVideo(f"frame {expected} can't be decoded (damaged or cut short)")

  def _begins(self, start: int) -> list[int | None]:
    """Frames to seek to, best first; None: no seek. An earlier key frame helps if frames lack references."""
    here = self._frames is not None and self._next <= start and (self.times is None or start - self._next <= _SEEK_GAP)
    if self.times is None:
      return [None if here else 0]
    return [None] * here + sorted({start, max(0, start - _SEEK_GAP), 0}, reverse=True)

  def _seek(self, number: int) -> None:
    if self.times is not None or self._frames is not None:
      self._container.seek(int(self.times[number]) if number and self.times is not None else 0, stream=self._stream)
    self._frames, self._next, self._held = self._container.decode(self._stream), 0, None

  def _forward(self) -> Iterator[tuple[int, av.VideoFrame]]:
    if self._held:
      held, self._held = self._held, None
      yield held
    for frame in self._frames or ():
      if self.times is None:
        number = self._next
      else:
        number = int(np.searchsorted(self.times, -1 if frame.pts is None else frame.pts))
      self._next = number + 1
      yield number, frame
