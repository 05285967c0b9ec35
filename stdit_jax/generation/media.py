"""Writes videos and images to files. The settings that made them are in the file and in a JSON file beside it."""

import contextlib
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data import paths

VIDEO_FORMATS = ("mp4", "gif", "webp")
FRAMES = "frames"  # a folder with one png per frame; its name has no ending
IMAGE_FORMATS = ("png",)
MAX_GIF_FPS = 50
BT_709, LIMITED_RANGE = 1, 1  # FFmpeg: AVCOL_SPC_BT709, AVCOL_PRI_BT709 and AVCOL_TRC_BT709; AVCOL_RANGE_MPEG


def check_rate(kind: str, fps: float) -> None:
  """Raises ValueError if a gif cannot show `fps` frames per second. Players show frame times below 20 ms as 100 ms."""
  if kind == "gif" and fps > MAX_GIF_FPS:
    raise ValueError(f"--fps is {fps:g}; a gif shows at most {MAX_GIF_FPS} frames per second. Lower --fps or change --format")


def settings_file(path: Any) -> str:
  """Path of the JSON file with the settings of a video or image. `a.mp4` and `a.png` share one JSON file."""
  return f"{os.path.splitext(str(path))[0]}.json"


def write_media(path: Any, frames: Any, fps: float, settings: dict) -> None:
  """Writes one file with all of `frames`, uint8 `[T, H, W, 3]`. `open_media` has the formats."""
  with open_media(path, len(frames), fps, settings) as write:
    write(frames)


@contextlib.contextmanager
def open_media(path: Any, num_frames: int, fps: float, settings: dict) -> Iterator[Callable]:
  """Yields a function that writes frames of one file, uint8 `[T, H, W, 3]`, in one or several parts.

  When the block ends, the file and the JSON file of `settings` exist. If the block raises, no file exists.

  The ending of `path` chooses the format: mp4 is H.264 (crf 17), gif and webp loop for ever, png has one frame. A path without
  an ending is a folder with one png per frame; its settings are in the JSON file only. An mp4 file or a folder grows
  with each part; a gif or webp is written after the last part.

  Raises ValueError if the ending is unknown, a png gets several frames, or the number of frames is not `num_frames`.
  """
  kind = os.path.splitext(str(path))[1][1:].lower()
  if kind and kind not in VIDEO_FORMATS + IMAGE_FORMATS:
    raise ValueError(f"{path}: unknown ending; allowed: {', '.join(VIDEO_FORMATS + IMAGE_FORMATS)}")
  if kind in IMAGE_FORMATS and num_frames != 1:
    raise ValueError(f"{path}: {num_frames} frames don't fit into a {kind}; choose one of {', '.join(VIDEO_FORMATS)}")
  comment = json.dumps(settings, ensure_ascii=False)
  written = 0
  with paths.whole(path) if kind else _whole_folder(path) as place:
    opened = _open_mp4(place, fps, comment) if kind == "mp4" else _open_images(place, kind, fps, comment)
    with opened if kind else _open_folder(place) as write:

      def count_and_write(frames):
        nonlocal written
        written += len(frames)
        write(frames)

      yield count_and_write
      if written != num_frames:
        raise ValueError(f"{path}: {written} frames were given, not {num_frames}; write exactly {num_frames}")
    # The settings come before the file that they describe. After a kill in between, the same command makes the file again.
    if kind:  # else an old file could stay beside the new settings
      with contextlib.suppress(FileNotFoundError):
        paths.remove(path)
    elif not paths.is_remote(path):
      shutil.rmtree(path, ignore_errors=True)
    paths.write_text(settings_file(path), json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _whole_folder(path):
  """As `paths.whole`, for a folder."""
  remote = paths.is_remote(path)
  unique = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"  # like `paths.whole`
  temporary = path if remote else os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.tmp{unique}")
  try:
    with paths.local_folder(temporary) as folder:
      os.makedirs(folder, exist_ok=True)
      yield folder
    if not remote:
      os.rename(temporary, path)
  finally:
    if not remote:
      shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _open_folder(folder):
  """00000.png, 00001.png, ... in a folder."""
  numbers = itertools.count()

  def write(frames):
    for frame in frames:
      Image.fromarray(frame).save(os.path.join(folder, f"{next(numbers):05d}.png"))

  yield write


@contextlib.contextmanager
def _open_mp4(path, fps, comment):
  rate, numbers = Fraction(fps).limit_denominator(1001), itertools.count()
  options = {"movflags": "use_metadata_tags+faststart"}
  with av.open(path, "w", options=options) as container:
    container.metadata["comment"] = comment
    stream = container.add_stream("libx264", rate=rate, options={"crf": "17"})
    stream.pix_fmt, codec = "yuv420p", stream.codec_context
    # Without these marks players guess by the height: BT.601 below 720 lines, BT.709 from there.
    codec.colorspace = codec.color_primaries = codec.color_trc = BT_709
    codec.color_range = LIMITED_RANGE

    def write(frames):
      if not stream.codec_context.is_open:
        stream.height, stream.width = (side - side % 2 for side in frames.shape[1:3])  # 4:2:0 needs even sides
      for frame in frames[:, : stream.height, : stream.width]:
        encoded = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p", dst_colorspace="ITU709")
        encoded.colorspace = BT_709
        encoded.pts, encoded.time_base = next(numbers), 1 / rate
        container.mux(stream.encode(encoded))

    yield write
    container.mux(stream.encode())


@contextlib.contextmanager
def _open_images(path, kind, fps, comment):
  """A gif, webp or png file. Pillow wants all frames at once."""
  images = []
  yield lambda frames: images.extend(Image.fromarray(frame) for frame in frames)
  if kind == "png":
    info = PngInfo()
    info.add_itxt("Comment", comment)
    own = {"pnginfo": info}
  else:
    unit = 10 if kind == "gif" else 1  # milliseconds per unit of time in the file; rounding the end times keeps the mean rate
    ends = np.round(np.arange(len(images) + 1) * 1000 / fps / unit).astype(int) * unit
    own = {"save_all": True, "append_images": images[1:], "duration": np.diff(ends).tolist(), "loop": 0}
    own |= {"comment": comment.encode()} if kind == "gif" else {"quality": 90, "method": 4, "xmp": comment.encode()}
  images[0].save(path, **own)


def contact_sheet(videos: Sequence[UInt8[np.ndarray, "T H W 3"]], columns: int = 8) -> Image.Image:
  """One image with a row per video, all of equal size. Each row shows `columns` frames, evenly spaced in time."""
  rows = [frames[np.linspace(0, len(frames) - 1, columns).round().astype(int)] for frames in videos]
  return Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows]))
