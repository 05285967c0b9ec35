"""Reads frames of video and image files by number, resized and cropped.

Frame numbers follow the order of presentation, for any time stamps (variable frame rates, edit lists, B-frames). All sizes
are those of the displayed frame: the reader applies a rotation flag or the Exif orientation. It treats all pixels as square, as
Open-Sora does. For an unusable file it raises `BadVideo` with one reason. It retries after transient I/O errors.
"""

import contextlib
import dataclasses
import functools
import io
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar, cast

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError, InvalidDataError
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, ImageOps

from data import paths, shapes
from data.paths import PASSING

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
IMAGE_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")  # Pillow reads no other format: some of them start programs
VIDEO_EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".ogv", ".ts", ".gif")
IMAGE_FPS = 120.0  # the frame rate that models are told for images
DEFAULT_FPS = 24.0  # the frame rate of files that name none
RESIZE_MODES = ("area", "original")

_SEEK_GAP = 250  # frames; the reader seeks if two wanted frames are further apart
_HD_HEIGHT = 720  # frames of at least this height have BT.709 colours if the file names no colour space
RETRY_DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between the attempts

# Without the two flags, frames that are converted but not scaled are about one level (of 255) too dark.
_SCALER = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT

# The containers that FFmpeg may open. FFmpeg's other formats hold no video, or are playlists: FFmpeg would open the
# files and addresses in them.
_FORMATS = "mov,matroska,webm,avi,mpeg,mpegvideo,mpegts,m4v,ogg,gif,flv,asf,mxf,dv,h264,hevc,ivf,nut,rm,yuv4mpegpipe"
# Environment variable: schemes of network addresses that rows may name, such as "https,http". By default none: a table of a
# stranger could otherwise make workers send requests to addresses inside of their network.
SCHEMES = "STDIT_JAX_SCHEMES"
_IN_MEMORY = 32 << 20  # bytes; a smaller file in a bucket is downloaded as a whole, once
_BLOCK = 4 << 20  # bytes per request for a larger file

_local = threading.local()
T = TypeVar("T")


class BadVideo(Exception):  # noqa: N818 - the fault is the file's, not the program's
  """A file is unusable, for one reason: missing, empty, no video, cut short..."""


class Away(BadVideo):
  """A file is missing or may not be read. A later run may find it, for instance if its disk is mounted again."""


@dataclasses.dataclass(frozen=True)
class VideoInfo:
  """The result of `probe`: number of frames, displayed height and width, frames per second (IMAGE_FPS for images)."""

  num_frames: int
  height: int
  width: int
  fps: float


class _Index(NamedTuple):
  num_frames: int
  fps: float
  times: np.ndarray | None  # sorted time stamps of all frames; None = the reader counts frames, since some have no time stamp
  cut_short: str  # "", or the reason why the file is incomplete


def is_image(path: str) -> bool:
  return str(path).lower().endswith(IMAGE_EXTENSIONS)


def is_address(path: str) -> bool:
  """Whether FFmpeg itself opens a path, such as http://..."""
  return "://" in path and not paths.is_remote(path) and not is_drawn(path)


def is_drawn(path: str) -> bool:
  """Whether a path names a video of `data.shapes`, which is drawn when it is read."""
  return str(path).startswith(shapes.SCHEME)


def retry(function: Callable[..., T], *args, **kwargs) -> T:
  """Calls `function`, and retries after transient I/O errors (network file systems). Raises OSError if they persist."""
  for delay in RETRY_DELAYS:
    try:
      return function(*args, **kwargs)
    except OSError as e:
      if e.errno not in PASSING:
        raise
    time.sleep(delay)
  return function(*args, **kwargs)


def probe(path: str, decode: bool = False) -> VideoInfo:
  """Finds size, number of frames and frame rate of a file. Raises BadVideo if the file is unusable for training.

  The function counts the packets of a video and decodes its first frame. `decode=True` decodes all frames.
  """
  path = str(path)
  if is_drawn(path):
    drawn = shapes.scene(path)
    return VideoInfo(drawn.frames, drawn.height, drawn.width, shapes.FPS)
  if is_image(path):
    image = _read_image(path)
    return VideoInfo(1, image.shape[0], image.shape[1], IMAGE_FPS)
  index = _index(path)
  if index.cut_short:
    raise BadVideo(index.cut_short)
  height, width = read_frames(path, [0]).shape[1:3]
  if decode:
    read_frames(path, size=(16, 16))  # small, so that a whole film fits in memory
  return VideoInfo(index.num_frames, height, width, index.fps)


def clip_indices(total: int, num_frames: int, frame_interval: int, rng: np.random.Generator) -> np.ndarray:
  """Chooses `num_frames` frames of a random clip out of `total` frames, as Open-Sora does (`TemporalRandomCrop`).

  A window of num_frames * frame_interval frames starts uniformly in [0, max(0, total - window - 1)]. The frame numbers are
  linspace over the window, rounded down. So a short file repeats frames. Interval 1 in a long file gives consecutive frames.
  """
  window = num_frames * frame_interval
  start = int(rng.integers(0, max(0, total - window - 1) + 1))
  return np.linspace(start, min(start + window, total) - 1, num_frames).astype(np.int64)


def read_clip(path: str, start: int, num_frames: int, frame_interval: int = 1, **how) -> np.ndarray:
  """Reads every `frame_interval`-th frame from `start` on, uint8 [num_frames, H, W, 3]. `how`: see `read_frames`."""
  return read_frames(path, start + frame_interval * np.arange(num_frames), **how)


def read_frames(
  path: str, indices: Sequence[int] | np.ndarray | None = None, *, size: tuple[int, int] | None = None, resize: str = "area",
  crop: tuple[int, int, int, int] | None = None,
) -> np.ndarray:  # fmt: skip
  """Reads frames by number. Resizes them to cover `size` and crops the centre.

  Args:
    path: video or image file.
    indices: ascending frame numbers, which may repeat; None = all frames. Images have frame 0 only.
    size: (height, width) of the result, None = as in the file.
    resize: "area" averages over pixels (fast, no aliasing). "original" resizes as Open-Sora does: bilinear without
      antialiasing for videos, bicubic for images.
    crop: (x, y, width, height), the part of the displayed frame to use; None = the whole frame.

  Returns:
    uint8 [T, height, width, 3].

  Raises:
    BadVideo: the file is unusable.
    OSError: I/O errors persist.
  """
  if resize not in RESIZE_MODES:
    raise ValueError(f"resize {resize!r} is none of {', '.join(RESIZE_MODES)}")
  path = str(path)
  if is_image(path):
    wanted = np.zeros(1, np.int64) if indices is None else np.asarray(indices, np.int64)
    if wanted.any():
      raise BadVideo("an image has one frame only")
    image = _fit_image(cut_out(_read_image(path), crop), size, resize)
    return np.repeat(image[None], len(wanted), 0)
  index = None if is_drawn(path) else _index(path)
  total = index.num_frames if index else shapes.scene(path).frames
  wanted = np.arange(total) if indices is None else np.asarray(indices, np.int64)
  if len(wanted) and (wanted[0] < 0 or wanted[-1] >= total):
    cut_short = f" ({index.cut_short})" if index and index.cut_short else ""
    raise BadVideo(f"frame {wanted[-1]} is asked for, the file has {total}{cut_short}")
  if not index:
    return shapes.draw(shapes.scene(path), wanted, size)
  fit = functools.partial(_fit_frame, size=size, resize=resize, crop=crop)
  runs = np.split(wanted, np.nonzero(np.diff(wanted) > _SEEK_GAP)[0] + 1)
  return np.concatenate([retry(_translating_errors, _read_run, path, index.times, run, fit) for run in runs])


def _translating_errors(function, path, *args):
  """Calls function(path, ...). Raises BadVideo for an unusable file, OSError for transient I/O errors."""
  try:
    with paths.errors(path):
      return function(path, *args)
  except FileNotFoundError:
    raise Away("no such file") from None
  except PermissionError:
    raise Away("no permission to read the file") from None
  except IsADirectoryError:
    raise BadVideo("is a folder") from None
  except FFmpegError as e:
    if e.errno in PASSING:  # FFmpeg reports EIO for damaged files, too; a plain read distinguishes them from I/O errors
      read_through(path)
    raise BadVideo(f"not a video, or damaged or cut short ({e.strerror})") from None
  except (Image.DecompressionBombError, Image.UnidentifiedImageError, SyntaxError, ValueError) as e:
    raise BadVideo(f"cannot be read ({(str(e) or type(e).__name__).splitlines()[0]})") from None
  except OSError as e:
    if e.errno is None:  # Pillow reports damaged files this way
      raise BadVideo(f"damaged or cut short ({e})") from None
    raise


def read_through(path: str) -> None:
  """Raises OSError if a plain read of the file fails."""
  if not is_address(path):
    with paths.open_file(path) as f:
      while f.read(1 << 24):
        pass


def _check_file(path):
  """Returns (size, version) of a file. Raises BadVideo for an empty file, OSError for a missing file."""
  if is_address(path):
    if (scheme := path.partition("://")[0].lower()) not in _schemes():
      raise BadVideo(f"a network address. To allow {scheme}:// set {SCHEMES}={scheme} in the environment")
    return 0, 0
  size, version = _bucket_stat(path) if paths.is_remote(path) else paths.stat(path)
  if not size:
    raise BadVideo("the file is empty (0 bytes)")
  return size, version


def _schemes():
  return [scheme for scheme in os.environ.get(SCHEMES, "").lower().split(",") if scheme]


def _readable(path):
  """A path or file object that PyAV and Pillow can open."""
  size, _ = _check_file(path)
  if not paths.is_remote(path):
    return path
  if size <= _IN_MEMORY:
    return io.BytesIO(_bucket_content(path))
  return io.BufferedReader(cast(io.RawIOBase, paths.open_file(path)), _BLOCK)


# Reading a row looks at its file three times, and every request to a bucket costs time and money.
_bucket_stat = functools.lru_cache(4)(paths.stat)
_bucket_content = functools.lru_cache(4)(paths.read_bytes)


def open_stream(path: str) -> tuple[InputContainer, VideoStream]:
  """Opens (container, its video stream). Raises `BadVideo` or OSError, and FFmpegError for damaged files."""
  # An address may redirect to another address, and a file may name other files. FFmpeg opens them by these protocols only.
  protocols = ",".join([*_schemes(), "tcp", "tls"]) if is_address(path) else "file"
  options = {"format_whitelist": _FORMATS, "protocol_whitelist": protocols}
  container = av.open(_readable(path), "r", metadata_errors="replace", options=options)
  for stream in container.streams.video:
    if not stream.disposition & Disposition.attached_pic:
      # The loader has parallel worker processes. More decoder threads would only decode frames that the clip does not use.
      stream.codec_context.thread_count = 1
      return container, stream
  audio = bool(container.streams.audio)
  container.close()
  raise BadVideo("has no video stream" + (" (audio only)" if audio else ""))


def _index(path):
  return _cached_index(path, *retry(_translating_errors, _check_file, path))


@functools.lru_cache(512)
def _cached_index(path, _size, _changed):
  return retry(_translating_errors, _build_index, path)


def _build_index(path):
  """Reads the time stamps of all frames from the packets, without decoding."""
  container, stream = open_stream(path)
  with container:
    packets = [(packet.pts, packet.is_discard) for packet in container.demux(stream) if packet.size]
    times = [pts for pts, discarded in packets if not discarded]
    fps = float(stream.average_rate or stream.guessed_rate or DEFAULT_FPS)
    cut_short = ""
    if container.format.name.startswith("mov") and len(packets) < stream.frames:
      cut_short = f"cut short: {len(packets)} of {stream.frames} frames exist"
  if not times:
    raise BadVideo("has no frames" + (f" ({cut_short})" if cut_short else ""))
  if None in times or len(set(times)) < len(times):
    container, stream = open_stream(path)
    with container:
      times = [frame.pts for frame in container.decode(stream)]
  usable = None not in times and len(set(times)) == len(times)
  return _Index(len(times), fps, np.sort(np.array(times, np.int64)) if usable else None, cut_short)


def _read_run(path, times, wanted, fit):
  """Reads the fitted frames `wanted` (ascending) [T, H, W, 3]. Seeks once, then decodes forward."""
  if not len(wanted):
    return np.zeros((0, 1, 1, 3), np.uint8)
  wanted = wanted.tolist()
  # A seek may miss frames (an open group of pictures, a wrong index). An earlier start finds them.
  begins = [0] if times is None else [wanted[0], max(0, wanted[0] - _SEEK_GAP), 0]
  found = {}
  for begin in dict.fromkeys(begins):
    found = _decode_range(path, times, begin, set(wanted), fit)
    if found.keys() >= set(wanted):
      return np.stack([found[i] for i in wanted])
  missing = next(i for i in wanted if i not in found)
  raise BadVideo(f"frame {missing} cannot be decoded (damaged or cut short)")


def _decode_range(path, times, begin, wanted, fit):
  """Decodes from the key frame at or before frame `begin` to the last wanted frame. Returns {number: fitted frame}."""
  container, stream = open_stream(path)
  last, found = max(wanted), {}
  with container:
    if begin:
      container.seek(int(times[begin]), stream=stream)
    stop = None if times is None else times[last]
    # Before the first wanted frame the decoder skips frames that no other frame refers to. Only these codecs allow this:
    # in codecs with hidden or layered frames, packets do not show which frames these are.
    can_skip = stream.codec_context.name in ("h264", "mpeg4", "mpeg2video")
    skip_until = None if times is None or not can_skip else times[min(wanted)]
    count = 0
    with contextlib.suppress(InvalidDataError):  # the caller reports the missing frame by number
      for packet in container.demux(stream):
        if skip_until is not None and packet.pts is not None:
          stream.codec_context.skip_frame = "NONREF" if packet.pts < skip_until else "DEFAULT"
        for frame in packet.decode():
          number = count if times is None else _number(times, frame.pts)
          count += 1
          if number in wanted and not frame.is_corrupt:
            found[number] = fit(frame)
          if number >= last or (stop is not None and frame.pts is not None and frame.pts > stop):
            return found
  return found


def _number(times, pts):
  """Number of the frame with a time stamp, -1 if no frame has the time stamp."""
  number = -1 if pts is None else int(np.searchsorted(times, pts))
  return number if 0 <= number < len(times) and times[number] == pts else -1


def _read_image(path):
  """Reads an image file, uint8 [H, W, 3], as displayed. Drops transparency, as Open-Sora does."""

  def read(path):
    with Image.open(_readable(path), formats=IMAGE_FORMATS) as image:
      if getattr(image, "is_animated", False) and image.format == "WEBP":
        frames = getattr(image, "n_frames", 0)
        raise BadVideo(f"an animation of {frames} frames; webp is read as a still only: make an mp4 or a gif of it")
      image = ImageOps.exif_transpose(image)
      if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow's conversion saturates
        return np.repeat((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)[..., None], 3, -1)
      return np.asarray(image.convert("RGB"))

  return retry(_translating_errors, read, path)


def cut_out(image: np.ndarray, crop: Sequence[int] | None) -> np.ndarray:
  """The part (x, y, width, height) of an image [H, W, 3]. Raises BadVideo if the part leaves the image."""
  if crop is None:
    return image
  x, y, w, h = map(int, crop)
  if x < 0 or y < 0 or w < 1 or h < 1 or x + w > image.shape[1] or y + h > image.shape[0]:
    raise BadVideo(f"crop x={x} y={y} width={w} height={h} leaves the frame of {image.shape[1]} x {image.shape[0]}")
  return image[y : y + h, x : x + w]


def cover_size(height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
  """The smallest (height, width) of about the same aspect ratio that covers `target`, rounded as Open-Sora does."""
  rh, rw = target[0] / height, target[1] / width
  return (target[0], round(width * rh)) if rh > rw else (round(height * rw), target[1])


def _reformat(frame, height, width, **colors):
  """Scales and converts a frame. Each thread has one scaler, since a new scaler per frame costs a third of the speed."""
  if not hasattr(_local, "reformatter"):
    _local.reformatter = VideoReformatter()
  return _local.reformatter.reformat(frame, width, height, "rgb24", interpolation=_SCALER, threads=1, **colors).to_ndarray()


def _fit_frame(frame, size, resize, crop):
  """Turns a decoded frame into uint8 [H, W, 3]: rotates it, cuts `crop`, resizes it to cover `size`, crops the centre."""
  turns = frame.rotation // 90 % 4  # counter-clockwise
  if resize == "original" or size is None or crop is not None:
    image = cut_out(np.rot90(_to_rgb(frame) if resize == "area" else frame.to_ndarray(format="rgb24"), turns), crop)
    if size is None:
      return np.ascontiguousarray(image)
    return resize_crop_bilinear(image, size) if resize == "original" else _area(image, size)
  # The usual case: one call scales and converts the decoder's frame. Then the small frame is rotated.
  target = tuple(size)[::-1] if turns % 2 else tuple(size)
  covered = cover_size(frame.height, frame.width, target)
  return np.ascontiguousarray(np.rot90(_centre(_to_rgb(frame, covered), target), turns))


def _to_rgb(frame, size=None):
  """Converts a frame to uint8 [H, W, 3], averaged to `size`, in the colour space that the file names."""
  source = None
  if frame.format.name.startswith("yuv") and frame.colorspace not in (1, 4, 5, 6, 7, 9, 10):  # no name: choose as players do
    source = "ITU709" if frame.height >= _HD_HEIGHT else "ITU601"
  return _reformat(frame, *(size or (frame.height, frame.width)), src_colorspace=source)


def _area(image, size):
  covered = cover_size(image.shape[0], image.shape[1], size)
  if covered != image.shape[:2]:
    image = _reformat(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"), *covered)
  return np.ascontiguousarray(_centre(image, size))


def _centre(image, size):
  y, x = (image.shape[0] - size[0]) // 2, (image.shape[1] - size[1]) // 2
  return image[y : y + size[0], x : x + size[1]]


def _fit_image(image, size, resize):
  if size is None:
    return image
  if resize == "area":
    return _area(image, size)
  h, w = cover_size(image.shape[0], image.shape[1], size)
  image = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC))
  y, x = round((h - size[0]) / 2), round((w - size[1]) / 2)  # not `_centre`: Open-Sora rounds halves to even numbers
  return np.ascontiguousarray(image[y : y + size[0], x : x + size[1]])


def resize_crop_bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Resizes and crops a video frame as Open-Sora does: bilinear, align_corners=False, no antialiasing. uint8 in and out."""
  covered = cover_size(image.shape[0], image.shape[1], size)
  weights = []
  for axis in range(2):
    offset = (covered[axis] - size[axis]) // 2
    scale = image.shape[axis] / covered[axis]
    at = np.maximum((np.arange(offset, offset + size[axis]) + 0.5) * scale - 0.5, 0)
    low = np.minimum(at.astype(np.int64), image.shape[axis] - 1)
    weights.append((low, np.minimum(low + 1, image.shape[axis] - 1), (at - low).astype(np.float32)))
  (y0, y1, wy), (x0, x1, wx) = weights
  wy, wx = wy[:, None, None], wx[:, None]
  rows = [image[y].astype(np.float32) for y in (y0, y1)]
  top, bottom = (r[:, x0] * (1 - wx) + r[:, x1] * wx for r in rows)
  return np.rint(top * (1 - wy) + bottom * wy).astype(np.uint8)


def frame_times(path: str) -> np.ndarray | None:
  """Sorted time stamps of all frames of a video, int64. None if frames have no time stamps, or equal ones."""
  return _index(path).times


def frame_rate(path: str) -> float:
  """Frames per second of a file (IMAGE_FPS for images)."""
  if is_drawn(path):
    return float(shapes.FPS)
  return IMAGE_FPS if is_image(path) else _index(str(path)).fps
