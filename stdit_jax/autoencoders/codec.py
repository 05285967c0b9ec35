"""Clips to normalised latents and back with any of the autoencoders, piece by piece, so that memory does not grow with length.

Pieces are what each autoencoder computes by itself: micro batches of frames (image autoencoders), chunks (Open-Sora 1.2's), or
chunks that carry their past (CogVideoX's). Every piece of one shape is one compiled program, and cutting changes no value.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from stdit_jax.autoencoders import causal3d, image_kl, temporal
from stdit_jax.autoencoders.causal3d import chunk_sizes
from stdit_jax.autoencoders.image_kl import denormalise, normalise, to_float, to_uint8
from stdit_jax.autoencoders.layers import Frames

MODULES = (image_kl, temporal, causal3d)


def find(name):
  """The module of a named autoencoder; ValueError names all."""
  for module in MODULES:
    if name in module.TABLE:
      return module
  raise ValueError(f"unknown autoencoder {name!r}; allowed: {', '.join(name for module in MODULES for name in module.TABLE)}")


def module_of(config):
  """The module of a configuration of an autoencoder."""
  return next(module for module in MODULES if type(config) is type(next(iter(module.TABLE.values()))))


def nearest_lengths(config, num_frames):
  """The lengths nearest to one that the autoencoder does not give back, as text: "9 or 16"."""
  near = [n for n in range(1, 2 * num_frames + 20) if config.keeps(n)]
  lower, upper = max((n for n in near if n < num_frames), default=None), min(n for n in near if n > num_frames)
  return f"{lower} or {upper}" if lower else f"{upper}"


@functools.cache
def jitted(function):
  """A function of a piece as a jitted one: its model and its number of frames are static."""
  static = [name for name in ("model", "num_frames") if name in inspect.signature(function).parameters]
  return jax.jit(function, static_argnames=static)


def run_jitted(function, model, *args, **static):
  """How a codec runs the function of a piece."""
  return jitted(function)(model, *args, **static)


@dataclasses.dataclass(frozen=True, eq=False)
class Codec:
  """An autoencoder with its weights; made by `make_codec`.

  Attributes:
    model: of `image_kl`, `temporal` or `causal3d`; variables: its parameters, or their shapes.
    micro_batch: frames of a piece of an image autoencoder.
    run: `(function, model, variables, *arrays, **static) -> arrays`, by default jitted.
  """

  model: object
  variables: dict
  micro_batch: int = 4
  run: Callable = run_jitted

  def __post_init__(self):
    if self.micro_batch < 1:
      raise ValueError(f"micro_batch must be at least 1, not {self.micro_batch}.")

  @property
  def config(self):
    return self.model.config

  def encode(self, frames):
    """Frames `[T, H, W, 3]` (uint8, or float in [-1, 1]) -> normalised posterior (mean, std), NumPy float32 `[T', h, w, C]`."""
    parts = self.encode_parts(frames)
    return tuple(join(part, self.config.latent_frames(len(frames))) for part in zip(*parts))

  def decode(self, latents, num_frames):
    """Normalised latents `[T', h, w, C]` -> NumPy uint8 `[num_frames, 8h, 8w, 3]`; ValueError for a length that the autoencoder
    does not keep, or of other latents."""
    if not self.config.keeps(num_frames) or self.config.latent_frames(num_frames) != len(latents):
      raise ValueError(f"{len(latents)} latent frames are not those of a clip of {num_frames} frames")
    return join(self.decode_parts(latents, num_frames), num_frames)

  def lower_decoder(self, latent_size, num_frames):
    """The programs of `decode` for latents of this (T', h, w), lowered."""
    lowered = {}

    def lower(function, model, variables, *arrays, **static):
      key = function, str(jax.tree.map(lambda x: (x.shape, x.dtype), arrays)), tuple(static.items())
      if key not in lowered:
        lowered[key] = jitted(function).lower(model, variables, *arrays, **static)
      return jax.tree.map(lambda s: np.broadcast_to(np.zeros((), s.dtype), s.shape), lowered[key].out_info)

    latents = np.zeros((*latent_size, self.config.latent_channels), np.float32)
    dataclasses.replace(self, run=lower).decode_parts(latents, num_frames)
    return list(lowered.values())

  def encode_parts(self, frames):
    """The pieces of `encode`, (mean, std) each, on the device: nothing is waited for."""
    raise NotImplementedError

  def decode_parts(self, latents, num_frames):
    """The pieces of `decode`, on the device."""
    raise NotImplementedError

  def _call(self, function, *arrays, **static):
    return self.run(function, self.model, self.variables, *arrays, **static)


def join(parts, length):
  """Pieces as one NumPy array of the first `length` frames."""
  return np.concatenate([np.asarray(part) for part in parts])[:length]


def micro_batches(values, size):
  """Pieces of `size` along the first axis; the last one is filled up with its last element."""
  for start in range(0, len(values), size):
    part = values[start : start + size]
    yield np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)]) if len(part) < size else part


def posterior(config, mean, logvar):
  """Raw mean and log-variance -> normalised mean and deviation."""
  return normalise(config, mean), jnp.exp(0.5 * logvar) * (config.scaling_factor / jnp.asarray(config.scale))


# ----------------------------------------------------------------------------------------------------- image autoencoders


def encode_frames(model, variables, frames):
  """Frames `[N, H, W, 3]` -> normalised (mean, std) `[N, h, w, C]`."""
  return posterior(model.config, *model.apply(variables, to_float(frames), method="encode"))


def decode_frames(model, variables, latents):
  """Normalised latents `[N, h, w, C]` -> uint8 `[N, 8h, 8w, 3]`."""
  return to_uint8(model.apply(variables, denormalise(model.config, latents), method="decode"))


class ImageCodec(Codec):
  def encode_parts(self, frames):
    return [self._call(encode_frames, part) for part in micro_batches(frames, self.micro_batch)]

  def decode_parts(self, latents, num_frames):
    return [self._call(decode_frames, part) for part in micro_batches(latents, self.micro_batch)]


# --------------------------------------------------------------------------------------------------------- Open-Sora 1.2


def image_latents(model, variables, frames):
  """Frames `[N, H, W, 3]` -> image latents `[N, h, w, C]`: means, so that the same clip always gives the same latents (the
  original draws a sample)."""
  return model.apply(variables, to_float(frames)[None], method="image_latents")[0]


def encode_chunk(model, variables, latents):
  """Image latents `[T, h, w, C]` of a chunk -> normalised (mean, std) `[T', h, w, C]`."""
  mean, logvar = model.apply(variables, latents[None], method="encode_latents")
  return posterior(model.config, mean[0], logvar[0])


def decode_chunk(model, variables, latents, *, num_frames):
  """Normalised latents `[T', h, w, C]` of a chunk -> its image latents `[num_frames, h, w, C]`."""
  return model.apply(variables, denormalise(model.config, latents)[None], num_frames, method="decode_latents")[0]


def decode_image_latents(model, variables, latents):
  """Image latents `[N, h, w, C]` -> uint8 `[N, 8h, 8w, 3]`."""
  return to_uint8(model.apply(variables, latents[None], method="pixels")[0])


class TemporalCodec(Codec):
  def encode_parts(self, frames):
    size, parts = self.config.chunk or len(frames), []
    for start in range(0, len(frames), size):
      chunk = frames[start : start + size]
      latents = join([self._call(image_latents, part) for part in micro_batches(chunk, self.micro_batch)], len(chunk))
      parts.append(self._call(encode_chunk, latents))
    return parts

  def decode_parts(self, latents, num_frames):
    size, parts, begin = self.config.chunk or num_frames, [], 0
    for start in range(0, num_frames, size):
      count = min(size, num_frames - start)
      end = begin + -(-count // self.config.factor)
      decoded = np.asarray(self._call(decode_chunk, latents[begin:end], num_frames=count))
      pixels = [self._call(decode_image_latents, part) for part in micro_batches(decoded, self.micro_batch)]
      parts.append(join(pixels, count))
      begin = end
    return parts


# ------------------------------------------------------------------------------------------------------------- CogVideoX


def encode_causal(model, variables, past, frames):
  """Frames `[T, H, W, 3]` of a chunk, and the past that the chunk before left (None: there is none) -> (mean, std), past."""
  return _causal(model, variables, past, to_float(frames), "encode", lambda m: posterior(model.config, *m))


def decode_causal(model, variables, past, latents):
  """Normalised latents `[T', h, w, C]` of a chunk and the past -> uint8 pixels, past."""
  return _causal(model, variables, past, denormalise(model.config, latents), "decode", to_uint8)


def _causal(model, variables, past, x, method, finish):
  variables = variables if past is None else {**variables, "past": past}
  y, state = model.apply(variables, x[None], Frames(len(x)), method=method, mutable="past")
  return jax.tree.map(lambda part: part[0], finish(y)), state["past"]


class CausalCodec(Codec):
  """Whole clips when norms take their statistics over the clip: then memory grows with its length."""

  def encode_parts(self, frames):
    return self._chunks(encode_causal, frames, self.config.encode_chunk)

  def decode_parts(self, latents, num_frames):
    return self._chunks(decode_causal, latents, self.config.decode_chunk)

  def _chunks(self, function, values, chunk):
    sizes = chunk_sizes(len(values), chunk) if self.config.statistics == "chunks" else (len(values),)
    parts, past, start = [], None, 0
    for size in sizes:
      part, past = self._call(function, past, values[start : start + size])
      parts.append(part)
      start += size
    return parts


CODECS = {image_kl: ImageCodec, temporal: TemporalCodec, causal3d: CausalCodec}


def make_codec(model, variables, micro_batch=4, run=run_jitted):
  """The `Codec` of an autoencoder and its variables."""
  return CODECS[module_of(model.config)](model, variables, micro_batch, run)
