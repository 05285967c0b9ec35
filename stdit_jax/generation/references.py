"""Pictures and videos that a request gives: read as the clip to be made has them, in size and frame rate."""

import numpy as np

from data import video
from stdit_jax.cli import InputError

MAX_BYTES = 8 << 30


def count_frames(path, fps, every_frame=False):
  """Frames that `read_reference` gives of a file; ValueError when it can't be used."""
  return _numbers(path, fps, every_frame).size


def _numbers(path, fps, every_frame):
  """Which frames of a file are taken."""
  info = _probe(path)
  if every_frame or video.is_image(path):
    return np.arange(info.num_frames)
  count = max(1, round(info.num_frames * fps / info.fps))
  return np.minimum((np.arange(count) * info.fps / fps + 0.5).astype(np.int64), info.num_frames - 1)


def _probe(path):
  try:
    return video.probe(path)
  except video.BadVideo as error:
    raise ValueError(f"{path} can't be used: {error}") from None


def read_reference(path, size, fps, every_frame=False):
  """Frames uint8 `[T, H, W, 3]` of an image (T = 1) or a video, resized to cover `size` and cropped at the centre.

  Args:
    size: (height, width) in pixels.
    fps: frame rate of the clip: frames of the video are taken at the same times, so that its motion keeps its speed.
    every_frame: take all of them, whatever their rate, as the original does.

  Raises:
    InputError: a file that can't be used, or too long.
  """
  numbers = _numbers(path, fps, every_frame)
  if len(numbers) * size[0] * size[1] * 3 > MAX_BYTES:
    raise InputError(
      f"{path}: {len(numbers)} frames of {size[0]} x {size[1]} are more than {MAX_BYTES >> 30} GiB; cut the video"
    )
  try:
    return video.read_frames(path, numbers, size=size)
  except video.BadVideo as error:
    raise InputError(f"{path} can't be used: {error}") from None


def picture_size(path):
  """(height, width) of a file as displayed; ValueError when it can't be used."""
  info = _probe(path)
  return info.height, info.width
