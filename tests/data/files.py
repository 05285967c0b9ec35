"""Small video files for the tests: every frame shows its number, so that a wrong frame is seen."""

import csv
import fractions
from typing import Any

import av
import numpy as np


def picture(number, height=48, width=64):
  """uint8 [H, W, 3]: six bits of the frame number as bright and dark columns, left to right. The top third has more red."""
  image = np.zeros((height, width, 3), np.uint8)
  for bit in range(6):
    columns = slice(bit * width // 6, (bit + 1) * width // 6)
    image[:, columns] = 200 if number >> bit & 1 else 40
  image[: height // 3, :, 0] += 50
  return image


def number_of(image):
  """Reads the number back from a (resized) picture."""
  columns = np.array_split(image.mean((0, 2)), 6)
  return sum(int(c[len(c) // 4 : -(len(c) // 4) or None].mean() > 120) << bit for bit, c in enumerate(columns))


def write_video(path, frames=40, height=48, width=64, rate=24, *, codec="libx264", pix_fmt="yuv420p", **options):
  """Writes numbered frames. `rotation`: flag in degrees; `times`: time stamps in units of 1 / (rate * 10)."""
  rotation, times = options.pop("rotation", 0), options.pop("times", None)
  muxer = {k: options.pop(k) for k in ("movflags",) if k in options}
  with av.open(str(path), "w", options=muxer) as container:
    stream: Any = container.add_stream(codec, rate=rate)
    stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
    stream.codec_context.time_base = fractions.Fraction(1, rate * 10)
    stream.options = {k: str(v) for k, v in {"g": 12, **options}.items()}
    if rotation:
      stream.set_display_rotation(rotation)
    for i in range(frames):
      frame = av.VideoFrame.from_ndarray(picture(i, height, width), format="rgb24").reformat(format=pix_fmt)
      frame.pts = i * 10 if times is None else times[i]
      frame.time_base = fractions.Fraction(1, rate * 10)
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return str(path)


def write_audio(path):
  with av.open(str(path), "w") as container:
    stream = container.add_stream("aac", rate=16000)
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    frame.sample_rate = 16000
    container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return str(path)


def write_csv(path, rows):
  """A metadata table from dicts, in the order of the first one's keys."""
  names = list(dict.fromkeys(k for row in rows for k in row))
  with open(path, "w", newline="", encoding="utf-8") as f:
    writer = csv.DictWriter(f, names, restval="")
    writer.writeheader()
    writer.writerows(rows)
  return str(path)
