"""Measures how well an autoencoder reconstructs clips and images, per bucket, and draws a picture of examples."""

import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw

from data import aspect_ratios, buckets, paths, sources, video
from data.config import DataConfig
from stdit_jax.autoencoders import i3d, metrics, perceptual
from stdit_jax.autoencoders.codec import micro_batches
from stdit_jax.autoencoders.latents import denormalise, to_float
from stdit_jax.autoencoders.registry import check_length

ERROR_FACTOR = 4  # the picture shows the error times this
HEAD = 26  # pixels of the two title lines in the picture
FEWEST_CLIPS = 16  # of 16 frames each, for a Frechet video distance. Papers use 2048; fewer clips give larger distances
MEDIA = video.IMAGE_EXTENSIONS + video.VIDEO_EXTENSIONS

Rows = list[tuple[sources.Row, tuple[int, int]]]  # with the (height, width) in which each row is read


def open_rows(tables: Sequence[str], rows: Iterable[Sequence], folder: str) -> tuple[sources.Table, Sequence]:
  """-> (`sources.Table`, buckets).

  Args:
    tables: tables of videos and images, folders of them, or single files.
    rows: (resolution, frames) of each bucket.
    folder: for temporary files.
  """
  tables = tuple(_listed(source, i, folder) for i, source in enumerate(tables))
  bucket_rows = tuple((resolution, frames, 1.0, 1) for resolution, frames in rows)
  config = DataConfig.create({"tables": tables, "buckets": bucket_rows, "captions": "optional"})
  return sources.open_table(config, folder), config.parsed_buckets()


def _listed(source, number, folder):
  """The table itself, or a new table of the files in a folder."""
  if video.is_drawn(source) or source.lower().endswith(sources.FORMATS):
    return source
  files = paths.files_below(source) if paths.is_folder(source) else [source] if paths.exists(source) else []
  files = [path for path in files if path.lower().endswith(MEDIA)]
  if not files:
    raise ValueError(f"{source} is no table ({', '.join(sources.FORMATS)}), no image or video, and no folder of them")
  table = os.path.join(folder, f"files{number}.jsonl")
  lines = []
  for path in files:
    try:
      lines.append({"path": paths.absolute(path), "text": "", **dataclasses.asdict(video.probe(path))})
    except video.BadVideo as error:
      print(f"skipped {path}: {error}", file=sys.stderr)
  if not lines:
    raise ValueError(f"{source} has no file that can be read")
  paths.write_text(table, "".join(json.dumps(line) + "\n" for line in lines))
  return table


def choose(table: sources.Table, bucket: buckets.Bucket, count: int, interval: int) -> Rows:
  """[(row, (height, width) of the bucket's nearest aspect ratio)] of at most `count` rows, spread over the table.

  Only rows that are large and long enough are chosen.
  """
  height, width = (table.column(side).astype(np.int64) for side in ("height", "width"))
  fits = (table.column("problem") == 0) & (table.column("num_frames") > (bucket.num_frames - 1) * interval)
  fits &= height * width >= buckets.PIXEL_TOLERANCE * aspect_ratios.NUM_PIXELS[bucket.resolution]
  found = np.nonzero(fits)[0]
  found = found[np.unique(np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int))]
  sizes = list(aspect_ratios.SIZES[bucket.resolution].values())
  ratios = aspect_ratios.closest_ratios(height[found], width[found], bucket.resolution)
  return [(table.row(i), sizes[ratio]) for i, ratio in zip(found, ratios)]


def read(rows: Iterable[tuple], num_frames: int, interval: int) -> Iterator[np.ndarray]:
  """Yields the first frames of each row that `choose` returns, uint8 `[num_frames, *size, 3]`. It skips unreadable files."""
  for row, size in rows:
    try:
      yield video.read_clip(row.path, row.start, num_frames, interval, size=size, crop=row.crop)
    except video.BadVideo as error:
      print(f"\nskipped {row.path}: {error}", file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class Judges:
  """Networks that measure: the name of a trunk of `perceptual` and its parameters, and the variables of `i3d`. All optional."""

  trunk: str = ""
  trunk_params: dict | None = None
  i3d: dict | None = None


@functools.partial(jax.jit, static_argnums=0)
def _distance(trunk, params, a, b):
  return perceptual.distance(trunk, params, to_float(a), to_float(b))


class Exam:
  """Measures a codec on one bucket after the other.

  Args:
    repeat: above 1 for a baseline to compare video autoencoders with. An image autoencoder then reconstructs every
      `repeat`-th frame, and each frame of the clip is replaced by the nearest of these.
  """

  def __init__(self, codec, judges, repeat=1):
    self.codec, self.judges, self.repeat = codec, judges, repeat
    self._warm, self._count, self._sum, self._squares = set(), 0, 0.0, 0.0

  @property
  def shift(self) -> Any:
    """Mean of the raw latents per channel."""
    return self._sum / self._count

  @property
  def scale(self) -> Any:
    """The `scale` that gives normalised latents, the denoiser's input, unit variance."""
    deviation = np.sqrt(np.maximum(self._squares / self._count - self.shift**2, 0))
    return deviation * self.codec.config.scaling_factor

  def check(self, bucket: buckets.Bucket) -> None:
    """Raises ValueError for a length that the autoencoder changes."""
    check_length(self.codec.config, bucket.num_frames, f"bucket {bucket.name} has clips of {bucket.num_frames} frames")

  def __call__(self, clips: Iterable[np.ndarray], show: int = 0) -> tuple[dict[str, Any], tuple | None]:
    """Clips uint8 `[T, H, W, 3]` of one length -> {measure: value or None}, (original, reconstruction) of one clip.

    `show`: index of the clip whose frames are returned; the last clip if there are fewer.
    """
    clip_values, features, shown, sizes = [], [], None, np.zeros(2)
    seconds, frames = np.zeros(2), 0
    for i, clip in enumerate(clips):
      latents, decoded, spent = self._there_and_back(clip)
      original = clip[:, : decoded.shape[1], : decoded.shape[2]]  # decoded sides are multiples of 8
      shown = (original, decoded) if i <= show else shown
      sizes += latents.size, clip.size
      seconds, frames = seconds + spent, frames + len(clip)
      clip_values.append(self._compare(original, decoded))
      features += self._features(original, decoded)
    if not clip_values:
      return {"clips": 0}, None
    values: dict[str, float | None] = {"clips": len(clip_values)}
    for name, value in clip_values[0].items():
      values[name] = None if value is None else float(np.mean([one[name] for one in clip_values]))
    if self.judges.i3d is not None:
      values["FVD"] = metrics.frechet_distance(*zip(*features)) if len(features) >= FEWEST_CLIPS else None
    values["latents per value"] = float(sizes[0] / sizes[1])
    values["encode frames/s"], values["decode frames/s"] = (frames / seconds).tolist()
    return values, shown

  def _there_and_back(self, clip):
    """-> normalised latents, reconstruction, (seconds to encode, seconds to decode)."""
    seen = clip[:: self.repeat]
    if seen.shape not in self._warm:  # compiles
      self.codec.decode(self.codec.encode(seen)[0], len(seen))
      self._warm.add(seen.shape)
    times = [time.perf_counter()]
    latents, _ = self.codec.encode(seen)
    times.append(time.perf_counter())
    decoded = self.codec.decode(latents, len(seen))
    times.append(time.perf_counter())
    raw = np.asarray(denormalise(self.codec.config, latents), np.float64).reshape(-1, latents.shape[-1])
    self._count += len(raw)
    self._sum, self._squares = self._sum + raw.sum(0), self._squares + np.square(raw).sum(0)
    nearest = np.minimum((np.arange(len(clip)) + self.repeat // 2) // self.repeat, len(seen) - 1)
    return latents, decoded[nearest], np.diff(times)

  def _compare(self, original, decoded):
    values = {"PSNR dB": metrics.psnr(original, decoded), "SSIM": metrics.ssim(original, decoded)}
    if self.judges.trunk:
      pairs = zip(micro_batches(original, 4), micro_batches(decoded, 4))
      parts = [np.asarray(_distance(self.judges.trunk, self.judges.trunk_params, a, b)) for a, b in pairs]
      values["perceptual"] = np.concatenate(parts)[: len(original)].mean()
    return values | {"flicker": metrics.flicker(original, decoded) if len(original) > 1 else None}

  def _features(self, original, decoded):
    """[(features of 16 frames, features of their reconstruction)] of the parts of a clip."""
    if self.judges.i3d is None:
      return []
    starts = range(0, len(original) - i3d.FRAMES + 1, i3d.FRAMES)
    both = [[x[None, start : start + i3d.FRAMES] for x in (original, decoded)] for start in starts]
    return [[np.asarray(i3d.features(self.judges.i3d, x))[0] for x in pair] for pair in both]


def picture(shown: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> Image.Image:
  """[(name, original, reconstruction)] -> a picture with up to three frames of each clip in rows, and the error beside them."""
  parts = []
  for name, original, decoded in shown:
    picked = np.unique(np.linspace(0, len(original) - 1, 3).round().astype(int))
    error = np.abs(original.astype(np.int16) - decoded) * ERROR_FACTOR
    columns = original, decoded, np.minimum(error, 255).astype(np.uint8)
    rows = np.concatenate([np.concatenate([column[i] for column in columns], axis=1) for i in picked])
    head = Image.new("RGB", (rows.shape[1], HEAD))
    ImageDraw.Draw(head).text((2, 1), name, "white")
    for i, text in enumerate(("original", "decoded", f"error x {ERROR_FACTOR}")):
      ImageDraw.Draw(head).text((2 + i * original.shape[2], HEAD // 2), text, "white")
    parts.append(np.concatenate([np.asarray(head), rows]))
  width = max(part.shape[1] for part in parts)
  return Image.fromarray(np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]), (0, 0))) for part in parts]))
