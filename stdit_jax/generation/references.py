"""Reads the images and videos of --task and --reference, in the size and frame rate of the clip."""

from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from data import video
from stdit_jax.errors import InputError

MAX_BYTES = 8 << 30


def frame_numbers(path: Any, fps: float, every_frame: bool = False) -> Int[np.ndarray, " T"]:
  """Numbers of the frames that `read_reference` reads. Raises ValueError if the file can't be used."""
  info = probe(path)
  if every_frame or video.is_image(path):
    return np.arange(info.num_frames)
  count = max(1, round(info.num_frames * fps / info.fps))
  return np.minimum((np.arange(count) * info.fps / fps + 0.5).astype(np.int64), info.num_frames - 1)


def probe(path: Any) -> video.VideoInfo:
  """`data.video.probe`. Raises ValueError if the file can't be used."""
  try:
    return video.probe(path)
  except video.BadVideo as error:
    raise ValueError(f"{path} can't be used: {error}") from None


def read_reference(path: Any, size: tuple[int, int], fps: float, every_frame: bool = False) -> UInt8[np.ndarray, "T H W 3"]:
  """Reads an image (T = 1) or a video. The frames are resized to cover `size`, and the centre is cropped.

  Args:
    size: (height, width) in pixels.
    fps: frame rate of the clip. Frames are read at this rate, so the motion of a video keeps its speed.
    every_frame: read all frames at whatever rate, as the original code does.

  Raises InputError if the file can't be used or is too long.
  """
  numbers = frame_numbers(path, fps, every_frame)
  if len(numbers) * size[0] * size[1] * 3 > MAX_BYTES:
    raise InputError(f"{path}: {len(numbers)} frames of {size[0]} x {size[1]} exceed {MAX_BYTES >> 30} GiB; cut the video")
  try:
    return video.read_frames(path, numbers, size=size)
  except video.BadVideo as error:
    raise InputError(f"{path} can't be used: {error}") from None
