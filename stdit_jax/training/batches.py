"""From the loader's rows to the arrays that cross the jit boundary.

Each process encodes the pixels of its rows with the autoencoder, on its own devices. It turns latents into tokens and pads them
to the length of their (resolution, frames) bucket. The rows of all processes form one global array.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from data.loader import LoadedStep, Sample
from data.tokens import patchify
from stdit_jax.autoencoders.codec import join, micro_batches
from stdit_jax.autoencoders.registry import autoencoder_model
from stdit_jax.components import Components, load_codec, load_text_encoder
from stdit_jax.config import Autoencoder
from stdit_jax.models.family import SCALARS, token_grid
from stdit_jax.parallel.exchange import crosses_processes, exchange, row_places
from stdit_jax.parallel.shardings import ArraySpec, Layout, Tree

log = logging.getLogger("data")  # where data/loader.py reports skipped rows
ROWS = ArraySpec(())  # any array whose first axis is the rows


def to_global(batch: Any, specs: Any, layout: Layout, count: int | None = None) -> Any:
  """Global arrays over the mesh from the rows of this process. If processes share parts of the batch, they exchange rows.

  Args:
    batch: tree of NumPy arrays. Their rows are `exchange.process_rows`, in this order.
    specs: tree of `ArraySpec`. Only the axes matter.
    count: rows of the global batch. Needed if the devices of `layout` belong to several processes.
  """
  if crosses_processes(layout):
    assert count, "processes share parts of the batch, so they need the number of its rows"
    return exchange(batch, specs, layout, row_places(layout, count))
  parts, count = layout.process_parts(), layout.batch_parts

  def lay_out(spec, value):
    rows = len(value) // len(parts)

    def piece(index):
      start, stop, _ = index[0].indices(rows * count)  # rows of the global array
      here = parts.index(start // rows) * rows + start % rows  # `start` among the rows of this process
      return value[(slice(here, here + stop - start), *index[1:])]

    return jax.make_array_from_callback((rows * count, *value.shape[1:]), layout.sharding(*spec.axes), piece)

  return jax.tree.map(lay_out, specs, batch)


def sample_fields(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
  """The arrays that every batch has: weight and number of each sample."""
  return {
    "weight": np.asarray([s.weight for s in samples], np.float32),
    "sample_id": np.asarray([s.sample_id for s in samples], np.uint32),
  }


class LatentCache:
  """Caches the latents of clips, up to `limit` bytes. Drops the least recently used latents first."""

  def __init__(self, limit):
    self.limit, self.bytes, self.hits, self._entries = limit, 0, 0, collections.OrderedDict()

  @staticmethod
  def key(clip: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    """Key of the pixels, whatever row, window or crop they come from."""
    return clip.shape, hashlib.blake2b(np.ascontiguousarray(clip).data, digest_size=16).digest()

  def get(self, key: Any) -> Sequence[np.ndarray] | None:
    """(mean, std) `[T, h, w, C]`, or None."""
    if key in self._entries:
      self.hits += 1
      self._entries.move_to_end(key)
    return self._entries.get(key)

  def put(self, key: Any, latents: Sequence[np.ndarray]) -> None:
    size = sum(part.nbytes for part in latents)
    if key in self._entries or size > self.limit:
      return
    self._entries[key] = latents
    self.bytes += size
    while self.bytes > self.limit:
      self.bytes -= sum(part.nbytes for part in self._entries.popitem(last=False)[1])


class ClipEncoder:
  """Encodes clips to normalised posterior means and deviations on all local devices. `codec.py` cuts clips into pieces."""

  def __init__(self, codec, config, counter, name):
    """`codec`: an `autoencoders.codec.Codec`; `config`: the group `autoencoder`; `name`: the stage's, for program names."""
    self.config, self._counter, self._name = codec.config, counter, name
    self._codecs = [
      dataclasses.replace(codec, variables=jax.device_put(codec.variables, device), run=self._run)
      for device in jax.local_devices()
    ]
    self._programs = {}
    self.cache = LatentCache(config.cache_gb * 2**30)

  def __call__(self, clips: Sequence[np.ndarray]) -> list[Any]:
    """uint8 clips `[T, H, W, 3]` -> list of (mean, std), float32 NumPy `[T', h, w, C]`.

    In image autoencoders, frames of the same size share micro batches.
    """
    return self.start(clips)()

  def start(self, clips: Sequence[np.ndarray]) -> Callable[[], list[Any]]:
    """Starts to encode. Returns a function that waits for the devices and returns the latents."""
    keys = [self.cache.key(clip) if self.cache.limit else None for clip in clips]
    latents = [self.cache.get(key) for key in keys]
    missing = [i for i, known in enumerate(latents) if known is None]
    begin = self._begin_frames if self._codecs[0].single_frames else self._begin_clips
    begun = list(begin(clips, missing))

    def finish():
      for members, parts in begun:
        lengths = [self.config.latent_frames(len(clips[i])) for i in members]
        moments = join(parts, sum(lengths))  # mean and std of all members, joined in time
        ends = np.cumsum(lengths)[:-1]
        for i, *own in zip(members, *(np.split(moment, ends) for moment in moments)):
          latents[i] = [part.copy() for part in own]
          self.cache.put(keys[i], latents[i])
      return latents

    return finish

  def _begin_frames(self, clips, missing):
    """Yields (numbers of clips, their pieces) of an autoencoder of frames. The devices take micro batches in turn."""
    by_size = collections.defaultdict(list)
    for i in missing:
      by_size[clips[i].shape[1:3]].append(i)
    for members in by_size.values():
      batches = micro_batches(np.concatenate([clips[i] for i in members]), self._codecs[0].micro_batch)
      yield members, [p for codec, batch in zip(itertools.cycle(self._codecs), batches) for p in codec.encode_parts(batch)]

  def _begin_clips(self, clips, missing):
    """Yields ([number of a clip], its pieces) of an autoencoder of clips. The devices take clips in turn."""
    for codec, i in zip(itertools.cycle(self._codecs), missing):
      yield [i], list(codec.encode_parts(clips[i]))

  def _run(self, function, model, variables, *arrays):
    """Encodes a piece. Counts the traces of its program: "encode 144x256" for frames, "encode_chunks 1x17x18x32" for clips."""
    shape = jax.tree.leaves(arrays)[-1].shape
    follows = len(arrays) > 1 and arrays[0] is not None  # arrays[0]: state after the previous piece of a causal autoencoder
    key = function, shape, follows
    if key not in self._programs:
      alone = self._codecs[0].single_frames
      name = "encode" if alone else function.__name__
      name += " " + "x".join(map(str, shape[1:3] if alone else shape[:-1])) + " after another" * follows
      counted = self._counter.counted(f"{self._name}: {name}", functools.partial(function, model))
      self._programs[key] = jax.jit(counted)
    return self._programs[key](variables, *arrays)


def denoiser_batch(
  components: Components, clips: ClipEncoder | None, ahead: Callable | None, step: LoadedStep, layout: Layout
) -> Tree:
  """One global batch, as `Components.batch` describes it, from the rows of this process.

  Args:
    clips: encodes rows without cached latents; ahead: encodes captions (`Encoders.conditioner`). None if not needed.
  """
  samples, config = step.samples, components.model.config
  pixels: list[Any] = [s.pixels for s in samples]
  latents: Any = clips(pixels) if clips and pixels[0] is not None else [(s.latents_mean, s.latents_std) for s in samples]
  specs = components.batch(step.bucket, len(samples), layout.token_parts)
  moments = {name: np.zeros(spec.shape, spec.dtype) for name, spec in specs.items() if name.startswith("latents_")}
  for i, of_sample in enumerate(latents):
    for array, values in zip(moments.values(), of_sample):
      tokens = patchify(values, config.patch_size)
      array[i, :, : tokens.shape[1]] = tokens
  sizes = np.asarray([mean.shape[:3] for mean, _ in latents], np.int32)
  grids = np.asarray([token_grid(config, size) for size in sizes], np.int32)
  scalars = {name: np.asarray([getattr(s, name) for s in samples], np.float32) for name in SCALARS}
  arrays = components.conditioner.collate(samples)
  cond = to_global(arrays, dict.fromkeys(arrays, ROWS), layout, step.batch_size)
  batch = {**moments, "latent_size": sizes, "sizes": {"grid": grids, **scalars}, **sample_fields(samples)}
  specs.pop("cond")
  return to_global(batch, specs, layout, step.batch_size) | {"cond": ahead(cond, layout) if ahead else cond}


class AutoencoderBatches:
  """Makes the autoencoder's batches: a random square crop of each clip. The sample alone decides the place of the crop."""

  def __init__(self, config):
    self.config, self._too_small = config, set()

  def __call__(self, step: LoadedStep, layout: Layout) -> Tree:
    """One global batch from this process's `data.loader.LoadedStep`."""
    samples, pixels = zip(*map(self._cropped, step.samples))
    batch = {"pixels": np.stack(pixels)} | sample_fields(samples)
    return to_global(batch, dict.fromkeys(batch, ROWS), layout, step.batch_size)

  def _cropped(self, s):
    """(sample, its pixels). A clip that is too small gets weight 0, since an error would end a run after days.

    When the run starts, `check_plan` refuses such clips in the first epoch.
    """
    crop, (height, width) = self.config.autoencoder.crop, s.pixels.shape[1:3]
    if min(height, width) < crop:
      if s.path not in self._too_small:
        log.warning("skipped %s: autoencoder.crop=%d does not fit into its %d x %d pixels", s.path, crop, height, width)
      self._too_small.add(s.path)
      return dataclasses.replace(s, weight=0.0), np.zeros((len(s.pixels), crop, crop, 3), np.uint8)
    rng = np.random.default_rng([self.config.seed, *map(int, s.sample_id)])
    top, left = rng.integers(height - crop + 1), rng.integers(width - crop + 1)
    return s, s.pixels[:, top : top + crop, left : left + crop]


class Encoders:
  """The frozen encoders of the stages. Stages with the same encoder share its weights."""

  def __init__(self, counter, mesh):
    self._counter, self._mesh = counter, mesh
    self.clip_encoder: Any = None  # a ClipEncoder
    self._source, self._names, self._ahead = None, set(), None

  def clips(self, config: Autoencoder, stage: str) -> ClipEncoder:
    """The `ClipEncoder` of the group `autoencoder`. Its programs count under the name of the stage."""
    source = autoencoder_model(config).config, config.weights
    if source != self._source:
      while stage in self._names:  # the run came back to this stage: the counter needs a new name for new programs
        stage += " again"
      self._names.add(stage)
      self.clip_encoder, self._source = ClipEncoder(load_codec(config), config, self._counter, stage), source
    return self.clip_encoder

  def conditioner(self, parts: Components) -> Callable[[Tree, Layout], Tree]:
    """`(global arrays, layout) -> cond` of a conditioner that encodes before the step. All stages share the weights."""
    conditioner = parts.conditioner
    if self._ahead is None:
      self._ahead = load_text_encoder(conditioner.config, conditioner.encoder, self._mesh)
    return conditioner.program(self._ahead)
