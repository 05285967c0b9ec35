"""Videos and pictures to files, with the settings that made them inside and beside them."""

import contextlib
import itertools
import json
import os
import shutil
import uuid
from fractions import Fraction

import av
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data import paths

VIDEO_FORMATS = ("mp4", "gif", "webp")
FRAMES = "frames"  # a folder of pictures, its name without an ending
IMAGE_FORMATS = ("png",)
MAX_GIF_FPS = 50
BT_709, LIMITED_RANGE = 1, 1  # of FFmpeg: AVCOL_SPC_BT709, _PRI_ and _TRC_ alike; AVCOL_RANGE_MPEG


def check_rate(kind, fps):
  """Raises ValueError for more frames per second than a format shows: players take shorter times of a gif for 100 ms."""
  if kind == "gif" and fps > MAX_GIF_FPS:
    raise ValueError(f"--fps is {fps:g}; a gif shows at most {MAX_GIF_FPS} frames per second")


def settings_file(path):
  """The JSON file of a video or picture; of those that differ in their endings it is the same."""
  return f"{os.path.splitext(str(path))[0]}.json"


def write_media(path, frames, fps, settings):
  """Writes all frames uint8 `[T, H, W, 3]` of a file, see `open_media`."""
  with open_media(path, len(frames), fps, settings) as write:
    write(frames)


@contextlib.contextmanager
def open_media(path, num_frames, fps, settings):
  """Gives a function that takes the `num_frames` frames of a file, uint8 `[T, H, W, 3]`, part after part. The file is at `path`
  when the block ends, with `settings` in it and in a JSON file beside it, or not at all when it raises.

  By the ending of `path`: mp4 is H.264 (crf 17), gif and webp loop for ever, png has one frame, and without one it is a folder
  of a png per frame (settings in the JSON file only). mp4 and folders are written as the frames come.

  Raises ValueError for an unknown ending, several frames as png, or more or fewer frames than were promised.
  """
  kind = os.path.splitext(str(path))[1][1:].lower()
  if kind and kind not in VIDEO_FORMATS + IMAGE_FORMATS:
    raise ValueError(f"{path}: unknown ending; allowed: {', '.join(VIDEO_FORMATS + IMAGE_FORMATS)}")
  if kind in IMAGE_FORMATS and num_frames != 1:
    raise ValueError(f"{path}: {num_frames} frames don't fit into a {kind}; choose one of {', '.join(VIDEO_FORMATS)}")
  comment = json.dumps(settings, ensure_ascii=False)
  written = 0
  with _open_file(path, kind, fps, comment) if kind else _open_folder(path) as write:

    def count_and_write(frames):
      nonlocal written
      written += len(frames)
      write(frames)

    yield count_and_write
    if written != num_frames:
      raise ValueError(f"{path}: {written} frames were given, not {num_frames}")
  paths.write_text(settings_file(path), json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _open_folder(path):
  """00000.png, 00001.png, ..."""
  remote, numbers = paths.is_remote(path), itertools.count()
  unique = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"  # as `paths.whole`
  temporary = path if remote else os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.tmp{unique}")
  try:
    with paths.local_folder(temporary) as folder:
      os.makedirs(folder, exist_ok=True)

      def write(frames):
        for frame in frames:
          Image.fromarray(frame).save(os.path.join(folder, f"{next(numbers):05d}.png"))

      yield write
    if not remote:
      shutil.rmtree(path, ignore_errors=True)
      os.rename(temporary, path)
  finally:
    if not remote:
      shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _open_file(path, kind, fps, comment):
  with paths.whole(path) as temporary:
    opened = _open_mp4(temporary, fps, comment) if kind == "mp4" else _open_pictures(temporary, kind, fps, comment)
    with opened as write:
      yield write


@contextlib.contextmanager
def _open_mp4(path, fps, comment):
  rate, numbers = Fraction(fps).limit_denominator(1001), itertools.count()
  with av.open(path, "w", options={"movflags": "use_metadata_tags+faststart"}) as container:
    container.metadata["comment"] = comment
    stream = container.add_stream("libx264", rate=rate, options={"crf": "17"})
    stream.pix_fmt, codec = "yuv420p", stream.codec_context
    # Said in the file, or players would guess by the height: BT.601 of small pictures, BT.709 from 720 lines on.
    codec.colorspace = codec.color_primaries = codec.color_trc = BT_709
    codec.color_range = LIMITED_RANGE

    def write(frames):
      if not stream.codec_context.is_open:
        stream.height, stream.width = (side - side % 2 for side in frames.shape[1:3])  # 4:2:0 needs even sides
      for frame in frames[:, : stream.height, : stream.width]:
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p", dst_colorspace="ITU709")
        picture.colorspace = BT_709
        picture.pts, picture.time_base = next(numbers), 1 / rate
        container.mux(stream.encode(picture))

    yield write
    container.mux(stream.encode())


@contextlib.contextmanager
def _open_pictures(path, kind, fps, comment):
  """gif, webp and png: Pillow wants all frames at once."""
  pictures = []
  yield lambda frames: pictures.extend(Image.fromarray(frame) for frame in frames)
  if kind == "png":
    info = PngInfo()
    info.add_itxt("Comment", comment)
    own = {"pnginfo": info}
  else:
    unit = 10 if kind == "gif" else 1  # milliseconds that the file counts in: rounded times, so that the rate stays the same
    ends = np.round(np.arange(len(pictures) + 1) * 1000 / fps / unit).astype(int) * unit
    own = {"save_all": True, "append_images": pictures[1:], "duration": np.diff(ends).tolist(), "loop": 0}
    own |= {"comment": comment.encode()} if kind == "gif" else {"quality": 90, "method": 4, "xmp": comment.encode()}
  pictures[0].save(path, **own)


def contact_sheet(videos, columns=8):
  """One picture of several videos uint8 `[T, H, W, 3]` of equal size: a row each, `columns` frames spread over its time."""
  rows = [frames[np.linspace(0, len(frames) - 1, columns).round().astype(int)] for frames in videos]
  return Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows]))
