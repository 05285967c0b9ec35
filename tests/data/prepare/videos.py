"""Videos with distinct scenes, whose frames show their numbers."""

from fractions import Fraction

import av
import numpy as np


def picture(scene, number, height=72, width=128):
  """A smooth image, different for each scene. A bar of 8 blocks at the top shows the frame number in binary."""
  y, x = np.mgrid[0:height, 0:width]
  rng = np.random.default_rng(scene)
  base = np.stack([rng.uniform(60, 200) + 40 * np.sin(x / rng.uniform(8, 20) + y / rng.uniform(8, 20)) for _ in range(3)], -1)
  for bit in range(8):
    base[:16, bit * 16 : bit * 16 + 16] = 230 if number >> bit & 1 else 30
  return base.clip(0, 255).astype(np.uint8)


def number_of(image):
  """The frame number in a decoded frame of any size."""
  height, width = image.shape[:2]
  blocks = [image[height // 9, (2 * bit + 1) * width // 16].mean() > 128 for bit in range(8)]
  return sum(int(b) << i for i, b in enumerate(blocks))


def write_video(path, images, fps=24, pts=None, turned=False):
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=fps, options={"crf": "10", "g": "30"})
    stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], "yuv420p"
    for i, image in enumerate(images):
      frame = av.VideoFrame.from_ndarray(image, format="rgb24")
      frame.pts, frame.time_base = (i if pts is None else pts[i]), Fraction(1, fps)
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  if turned:  # writes a quarter turn over the identity matrix of the track header, the first one after `tkhd`
    content = path.read_bytes()
    unit = lambda *v: b"".join((x & 0xFFFFFFFF).to_bytes(4, "big") for x in v)  # noqa: E731
    identity = unit(1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    at = content.index(identity, content.index(b"tkhd"))
    path.write_bytes(content[:at] + unit(0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30) + content[at + 36 :])
  return path


def two_scenes(first=40, second=50, seeds=(1, 2), **size):
  return [picture(seeds[i >= first], i, **size) for i in range(first + second)]
