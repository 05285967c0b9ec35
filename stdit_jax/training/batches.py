"""From the loader's rows to the arrays that cross the jit boundary.

Process-local work, on the process's own devices: pixels are encoded by the autoencoder in micro batches of frames of equal
size (one program per pixel size), turned into tokens, padded to the one length of their (resolution, frames) bucket and
joined over processes.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np

from data.aspect_ratios import max_tokens
from data.tokens import grid_size, patchify
from stdit_jax.autoencoders.codec import join, micro_batches
from stdit_jax.cli import InputError
from stdit_jax.training import weights
from stdit_jax.training.autoencoding import autoencoder_model

log = logging.getLogger("data")  # as data/loader.py says what it skips


def array_axes(name):
  """Names (of `Layout.axes`) of the leading dimensions of an array of a batch; the others are not split."""
  return ("batch", None, "tokens") if name.startswith("latents_") else ("batch",)


def to_global(batch, layout):
  """This process's rows of every array, those of `layout.process_parts()` in order -> global arrays over the mesh."""
  parts, count = layout.process_parts(), layout.batch_parts

  def lay_out(name, value):
    rows = len(value) // len(parts)

    def piece(index):
      start, stop, _ = index[0].indices(rows * count)
      here = parts.index(start // rows) * rows + start % rows
      return value[(slice(here, here + stop - start), *index[1:])]

    sharding = layout.sharding(*array_axes(name))
    return jax.make_array_from_callback((rows * count, *value.shape[1:]), sharding, piece)

  return {name: lay_out(name, value) for name, value in batch.items()}


def sample_fields(samples):
  """What every batch holds of its samples: weight and identity."""
  return {
    "weight": np.asarray([s.weight for s in samples], np.float32),
    "sample_id": np.asarray([s.sample_id for s in samples], np.uint32),
  }


class LatentCache:
  """Latents of clips by their pixels, the least recently used dropped first, within so many bytes."""

  def __init__(self, limit):
    self.limit, self.bytes, self.hits, self._entries = limit, 0, 0, collections.OrderedDict()

  @staticmethod
  def key(clip):
    """Of the pixels themselves: right whatever row, window or crop they come from."""
    return clip.shape, hashlib.blake2b(np.ascontiguousarray(clip), digest_size=16).digest()

  def get(self, key):
    """(mean, std) `[T, h, w, C]`, or None."""
    if key not in self._entries:
      return None
    self.hits += 1
    self._entries.move_to_end(key)
    return self._entries[key]

  def put(self, key, latents):
    size = sum(part.nbytes for part in latents)
    if key in self._entries or size > self.limit:
      return
    self._entries[key] = latents
    self.bytes += size
    while self.bytes > self.limit:
      self.bytes -= sum(part.nbytes for part in self._entries.popitem(last=False)[1])


class ClipEncoder:
  """Encodes clips to normalised posterior means and deviations, on all local devices, one program per shape of a piece."""

  def __init__(self, codec, config, counter, name):
    """`codec`: of `autoencoders.codec`; `config`: `autoencoder` of a configuration; `name`: of the stage that it is made for,
    to count its programs under."""
    self.config, self._counter, self._name = codec.config, counter, name
    self._codecs = [
      dataclasses.replace(codec, variables=jax.device_put(codec.variables, device), run=self._run)
      for device in jax.local_devices()
    ]
    self._programs = {}
    self.cache = LatentCache(config.cache_gb * 2**30)

  def __call__(self, clips):
    """uint8 `[T, H, W, 3]` each -> list of (mean, std), float32 NumPy `[T', h, w, C]`. Frames of image autoencoders share micro
    batches when they have one size."""
    return self.start(clips)()

  def start(self, clips):
    """Begins what a call does -> function that waits for it and returns it: devices work while the host does other things."""
    keys = [self.cache.key(clip) if self.cache.limit else None for clip in clips]
    latents = [self.cache.get(key) for key in keys]
    missing = [i for i, known in enumerate(latents) if known is None]
    begin = self._begin_frames if self._codecs[0].single_frames else self._begin_clips
    begun = list(begin(clips, missing))

    def finish():
      for members, parts in begun:
        lengths = [self.config.latent_frames(len(clips[i])) for i in members]
        moments = join(parts, sum(lengths))
        for i, *own in zip(members, *(np.split(m, np.cumsum(lengths)[:-1]) for m in moments)):
          latents[i] = [part.copy() for part in own]
          self.cache.put(keys[i], latents[i])
      return latents

    return finish

  def _begin_frames(self, clips, missing):
    """(numbers of clips, their pieces) of clips whose frames are encoded alone, micro batches on device after device."""
    by_size = collections.defaultdict(list)
    for i in missing:
      by_size[clips[i].shape[1:3]].append(i)
    for members in by_size.values():
      batches = micro_batches(np.concatenate([clips[i] for i in members]), self._codecs[0].micro_batch)
      yield (
        members,
        [part for codec, batch in zip(itertools.cycle(self._codecs), batches) for part in codec.encode_parts(batch)],
      )

  def _begin_clips(self, clips, missing):
    """The same of clips that are encoded as a whole, clip after clip on device after device."""
    for codec, i in zip(itertools.cycle(self._codecs), missing):
      yield [i], list(codec.encode_parts(clips[i]))

  def _run(self, function, model, variables, *arrays):
    """Runs a piece by a program that is counted: "encode 144x256" of micro batches, "encode_chunks 1x17x18x32" of others."""
    shape, follows = jax.tree.leaves(arrays)[-1].shape, len(arrays) > 1 and arrays[0] is not None
    key = function, shape, follows
    if key not in self._programs:
      alone = self._codecs[0].single_frames
      name = "encode" if alone else function.__name__
      name += " " + "x".join(map(str, shape[1:3] if alone else shape[:-1])) + " after another" * follows
      counted = self._counter.counted(f"{self._name}: {name}", functools.partial(function, model))
      self._programs[key] = jax.jit(counted)
    return self._programs[key](variables, *arrays)


def denoiser_shapes(config, model, autoencoder, bucket, rows, token_parts=1):
  """Shapes of the arrays of one batch of a denoiser, from which programs are compiled before any data is there.

  Args:
    config: of the stage; model: configuration of the denoiser.
    autoencoder: its configuration.
    bucket: (resolution, frames); rows: samples in the batch.
    token_parts: tokens per frame are padded to a multiple of it.

  Returns:
    {name: ShapeDtypeStruct}; text as features, unless the encoder runs in the step.
  """
  resolution, frames = bucket
  space = max_tokens(resolution, autoencoder.downsampling, model.patch_size[1])
  tokens = (rows, autoencoder.latent_frames(frames), space + -space % token_parts, model.patch_values)
  length = model.model_max_length
  text = {"text_ids": ((rows, length), jnp.int32)}
  if config.text_encoder.where != "step":
    text = {"text": ((rows, length, model.caption_channels), jnp.float32)}
  means = ("latents_mean", "latents_std")[: 2 if config.autoencoder.sample_posterior else 1]
  shapes = {
    **dict.fromkeys(means, (tokens, jnp.float32)),
    "latent_size": ((rows, 3), jnp.int32),
    "grid": ((rows, 3), jnp.int32),
    **dict.fromkeys(("height", "width", "num_frames", "fps", "weight"), ((rows,), jnp.float32)),
    **text,
    "text_mask": ((rows, length), jnp.bool_),
    "sample_id": ((rows, 2), jnp.uint32),
  }
  return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def autoencoder_shapes(config, bucket, rows):
  """Shapes of the arrays of one batch of an autoencoder, as `denoiser_shapes`."""
  crop = config.autoencoder.crop
  shapes = {
    "pixels": ((rows, bucket[1], crop, crop, 3), jnp.uint8),
    "weight": ((rows,), jnp.float32),
    "sample_id": ((rows, 2), jnp.uint32),
  }
  return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def batch_shapes(config, objective, bucket, rows, token_parts=1):
  """`denoiser_shapes` or `autoencoder_shapes`, by the task of the stage."""
  if config.task == "autoencoder":
    return autoencoder_shapes(config, bucket, rows)
  autoencoder = autoencoder_model(config.autoencoder).config
  return denoiser_shapes(config, objective.model.config, autoencoder, bucket, rows, token_parts)


class DenoiserBatches:
  """Makes the denoiser's batches: latents as tokens with their sizes, conditions, text."""

  def __init__(self, config, model_config, encoder, layouts, embed=None):
    """`encoder`, `embed`: None where latents and embeddings are cached."""
    self.config, self.model, self.encoder, self.layouts = config, model_config, encoder, layouts
    self._embed = embed  # text encoder ahead of the step: global ids and mask -> global features
    self._autoencoder = autoencoder_model(config.autoencoder).config

  def __call__(self, step):
    """One global batch from this process's `data.loader.LoadedStep`."""
    samples, layout = step.samples, self.layouts[step.bucket]
    if samples[0].pixels is None:
      latents = [(s.latents_mean, s.latents_std) for s in samples]
    else:
      latents = self.encoder([s.pixels for s in samples])
    shapes = denoiser_shapes(self.config, self.model, self._autoencoder, step.bucket, len(samples), layout.token_parts)
    batch = {name: np.zeros(s.shape, s.dtype) for name, s in shapes.items() if name.startswith("latents")}
    sizes = np.asarray([mean.shape[:3] for mean, _ in latents], np.int32)
    for i, moments in enumerate(latents):
      for latents_part, values in zip(batch.values(), moments):
        tokens = patchify(values, self.model.patch_size)
        latents_part[i, :, : tokens.shape[1]] = tokens
    batch["latent_size"] = sizes
    batch["grid"] = np.asarray([grid_size(size, self.model.patch_size) for size in sizes], np.int32)
    for name in ("height", "width", "num_frames", "fps"):
      batch[name] = np.asarray([getattr(s, name) for s in samples], np.float32)
    batch = to_global(batch | self._text(samples) | sample_fields(samples), layout)
    if self.config.text_encoder.where == "ahead" and "text_ids" in batch:
      batch["text"] = self._embed(batch.pop("text_ids"), batch["text_mask"], layout)
    return batch

  def _text(self, samples):
    if samples[0].text_ids is None:
      return self._text_of_disk(samples)
    return {name: np.stack([getattr(s, name) for s in samples]) for name in ("text_ids", "text_mask")}

  def _text_of_disk(self, samples):
    """Embeddings `[length, C]` of every sample, cut or padded to the one length; none for rows that could not be read."""
    length, channels = self.model.model_max_length, self.model.caption_channels
    text = np.zeros((len(samples), length, channels), np.float32)
    mask = np.zeros((len(samples), length), bool)
    for i, s in enumerate(samples):
      if s.text_features is None:
        if s.weight:
          raise InputError(f"{s.path}: the table has no text_features for this row; text_encoder.where='disk' needs the column")
        continue
      if s.text_features.shape[1] != channels:
        raise InputError(
          f"{s.path}: its text_features have {s.text_features.shape[1]} channels, but the denoiser takes "
          f"caption_channels={channels}; set model.fields.caption_channels"
        )
      rows = s.text_features[:length]
      text[i, : len(rows)], mask[i, : len(rows)] = rows, True
    return {"text": text, "text_mask": mask}


class AutoencoderBatches:
  """Makes the autoencoder's batches: a random square crop of every clip, at a place that is the sample's own."""

  def __init__(self, config, layouts):
    self.config, self.layouts, self._too_small = config, layouts, set()

  def __call__(self, step):
    samples, pixels = zip(*map(self._cropped, step.samples))
    return to_global({"pixels": np.stack(pixels)} | sample_fields(samples), self.layouts[step.bucket])

  def _cropped(self, s):
    """(sample, its pixels). One that is too small has no weight: those of the first epoch are refused at the start
    (stage_data.py), and the first that comes later must not end the run, again and again."""
    crop, (height, width) = self.config.autoencoder.crop, s.pixels.shape[1:3]
    if min(height, width) < crop:
      if s.path not in self._too_small:
        log.warning("skipped %s: autoencoder.crop=%d does not fit into its %d x %d pixels", s.path, crop, height, width)
      self._too_small.add(s.path)
      return dataclasses.replace(s, weight=0.0), np.zeros((len(s.pixels), crop, crop, 3), np.uint8)
    rng = np.random.default_rng([self.config.seed, *map(int, s.sample_id)])
    top, left = rng.integers(height - crop + 1), rng.integers(width - crop + 1)
    return s, s.pixels[:, top : top + crop, left : left + crop]


TEXT_ROWS = 16  # captions per device that the text encoder works on at a time: its memory does not grow with the batch


def text_ahead(model, params):
  """The text encoder as a program of its own, one per layout: global `(ids, mask, layout) -> features`, float32, some rows of
  every device after the other."""

  @functools.cache
  def program(layout):
    encoder, parts = model.clone(layout=layout), layout.batch_parts

    def embed(params, ids, mask):
      apply = lambda rows: encoder.apply({"params": params}, *rows).astype(jnp.float32)  # noqa: E731
      own = len(ids) // parts
      each = max(n for n in range(1, TEXT_ROWS + 1) if own % n == 0)
      if each == own:
        return apply((ids, mask))
      # Rows of a device follow each other: [parts * pieces * each, ...] -> a piece of every device at a time.
      split = lambda x: x.reshape(parts, own // each, each, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731
      merge = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
      piece = lambda rows: apply(tuple(map(merge, rows))).reshape(parts, each, *ids.shape[1:], -1)  # noqa: E731
      made = jax.lax.map(piece, (split(ids), split(mask)))
      return made.swapaxes(0, 1).reshape(len(ids), *ids.shape[1:], -1)

    return jax.jit(embed, out_shardings=layout.sharding("batch"))

  return lambda ids, mask, layout: program(layout)(params, ids, mask)


def load_encoder(config, counter, name):
  """The `ClipEncoder` of a configuration, with its weights; `name` of the stage to count its programs under."""
  return ClipEncoder(weights.load_codec(config.autoencoder), config.autoencoder, counter, name)


def batch_maker(config, objective, layouts, mesh, encoder, text=True):
  """What makes the batches of a stage: `LoadedStep -> global arrays`.

  `encoder`: of `load_encoder`, for a denoiser, unless all its latents are cached; text=False: all embeddings are cached, too.
  """
  if config.task == "autoencoder":
    return AutoencoderBatches(config, layouts)
  embed = None
  if config.text_encoder.where == "ahead" and text:
    embed = text_ahead(objective.text, weights.load_text_encoder(config, objective.text, mesh))
  return DenoiserBatches(config, objective.model.config, encoder, layouts, embed)
