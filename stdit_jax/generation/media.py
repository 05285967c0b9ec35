"""Videos and pictures to files, with the settings that made them inside and beside them."""

import json
import os
import shutil
from fractions import Fraction

import av
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data import paths

VIDEO_FORMATS = ("mp4", "gif", "webp")
FRAMES = "frames"  # a folder of pictures, its name without an ending
IMAGE_FORMATS = ("png",)


def settings_file(path):
  """The JSON file of a video or picture; of those that differ in their endings it is the same."""
  return f"{os.path.splitext(str(path))[0]}.json"


def write_media(path, frames, fps, settings):
  """Writes frames uint8 `[T, H, W, 3]` to `path` by its ending, and `settings` into it and into a JSON file beside it.

  mp4 is H.264 (crf 17), gif and webp loop for ever, png needs one frame, without an ending it is a folder of a png per frame
  (settings in the JSON file only). Whole or not there.

  Raises ValueError for an unknown ending or several frames as png.
  """
  kind = os.path.splitext(str(path))[1][1:].lower()
  text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
  if not kind:
    _write_folder(path, frames)
    return paths.write_text(settings_file(path), text)
  if kind not in VIDEO_FORMATS + IMAGE_FORMATS:
    raise ValueError(f"{path}: unknown ending; allowed: {', '.join(VIDEO_FORMATS + IMAGE_FORMATS)}")
  if kind in IMAGE_FORMATS and len(frames) != 1:
    raise ValueError(f"{path}: {len(frames)} frames don't fit into a {kind}; choose one of {', '.join(VIDEO_FORMATS)}")
  comment = json.dumps(settings, ensure_ascii=False)
  with paths.whole(path) as temporary:
    if kind == "mp4":
      _write_mp4(temporary, frames, fps, comment)
    else:
      pictures = [Image.fromarray(frame) for frame in frames]
      if kind == "png":
        info = PngInfo()
        info.add_itxt("Comment", comment)
        pictures[0].save(temporary, pnginfo=info)
      else:
        own = {"comment": comment.encode()} if kind == "gif" else {"quality": 90, "method": 4, "xmp": comment.encode()}
        pictures[0].save(temporary, save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0, **own)
  paths.write_text(settings_file(path), text)


def _write_folder(path, frames):
  """00000.png, 00001.png, ..."""
  temporary = None if paths.is_remote(path) else f"{os.path.dirname(path) or '.'}/.{os.path.basename(path)}.tmp{os.getpid()}"
  with paths.local_folder(temporary or path) as folder:
    os.makedirs(folder, exist_ok=True)
    for i, frame in enumerate(frames):
      Image.fromarray(frame).save(os.path.join(folder, f"{i:05d}.png"))
  if temporary:
    shutil.rmtree(path, ignore_errors=True)
    os.rename(temporary, path)


def _write_mp4(path, frames, fps, comment):
  rate = Fraction(fps).limit_denominator(1001)
  with av.open(path, "w", options={"movflags": "use_metadata_tags+faststart"}) as container:
    container.metadata["comment"] = comment
    stream = container.add_stream("libx264", rate=rate, options={"crf": "17"})
    stream.height, stream.width = (side - side % 2 for side in frames.shape[1:3])  # 4:2:0 needs even sides
    stream.pix_fmt = "yuv420p"
    for i, frame in enumerate(frames[:, : stream.height, : stream.width]):
      picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
      picture.pts, picture.time_base = i, 1 / rate
      container.mux(stream.encode(picture))
    container.mux(stream.encode())


def contact_sheet(videos, columns=8):
  """One picture of several videos uint8 `[T, H, W, 3]` of equal size: a row each, `columns` frames spread over its time."""
  rows = [frames[np.linspace(0, len(frames) - 1, columns).round().astype(int)] for frames in videos]
  return Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows]))
