"""Clips to normalised latents and back with any of the autoencoders, piece by piece, so that memory does not grow with length.

Pieces are what each autoencoder computes by itself: micro batches of frames (image autoencoders), chunks (Open-Sora 1.2's), or
chunks that carry their past (CogVideoX's). Every piece of one shape is one compiled program, and cutting changes no value.

Weights that lie whole on all devices of a mesh of one axis put them all to work: on as many pieces at a time, or, where a clip
is one piece, on parts of it (`causal3d.over_devices`). That changes no value either. `tiles` does: see tiles.py.
"""

import collections
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stdit_jax.autoencoders import causal3d, image_kl, temporal
from stdit_jax.autoencoders.causal3d import chunk_sizes
from stdit_jax.autoencoders.image_kl import denormalise, normalise, to_float, to_uint8
from stdit_jax.autoencoders.layers import Frames
from stdit_jax.autoencoders.tiles import Tiles, decode_in_tiles, encode_in_tiles, sizes_for, tile_sizes

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
  """A function of a piece as a jitted one: all but weights and arrays is static."""
  static = [name for name in ("model", "num_frames", "as_uint8", "mesh") if name in inspect.signature(function).parameters]
  # All weights stay arguments, also of a function that needs a part of them: `memory_beside` takes them off.
  return jax.jit(function, static_argnames=static, keep_unused=True)


def run_jitted(function, model, *args, **static):
  """How a codec runs the function of a piece."""
  return jitted(function)(model, *args, **static)


def mesh_of(variables):
  """The mesh of one axis over which weights lie whole, None for those of one device."""
  sharding = getattr(jax.tree.leaves(variables)[0], "sharding", None) if variables else None
  return sharding.mesh if isinstance(sharding, NamedSharding) else None


@dataclasses.dataclass(frozen=True, eq=False)
class Codec:
  """An autoencoder with its weights; made by `make_codec`.

  Attributes:
    model: of `image_kl`, `temporal` or `causal3d`; variables: its parameters, or their shapes.
    micro_batch: frames of a piece of an image autoencoder, on each device.
    run: `(function, model, variables, *arrays, **static) -> arrays`, by default jitted; place: what lays an array out.
    tiles: how larger frames are cut, None: not at all.
    as_uint8: whether pixels are uint8; False: float32, about [-1, 1], not clipped.
  """

  model: object
  variables: dict
  micro_batch: int = 4
  run: Callable = run_jitted
  place: Callable = jax.device_put
  tiles: Tiles | None = None
  as_uint8: bool = True

  def __post_init__(self):
    if self.micro_batch < 1:
      raise ValueError(f"micro_batch must be at least 1, not {self.micro_batch}.")

  @property
  def config(self):
    return self.model.config

  @functools.cached_property
  def mesh(self):
    return mesh_of(self.variables)

  @property
  def devices(self):
    """How many work at a time."""
    return self.mesh.size if self.mesh else 1

  def encode(self, frames):
    """Frames `[T, H, W, 3]` (uint8, or float in [-1, 1]) -> normalised posterior (mean, std), NumPy float32 `[T', h, w, C]`."""
    size = self.config.latent_size(*frames.shape[1:3])
    if self.tiles and self.tiles.cut(size):
      return encode_in_tiles(dataclasses.replace(self, tiles=None).encode, frames, self.tiles, self.config.downsampling, size)
    return join(self.encode_parts(frames), self.config.latent_frames(len(frames)))

  def decode(self, latents, num_frames, done=lambda frames: None):
    """Normalised latents `[T', h, w, C]` -> NumPy pixels `[num_frames, 8h, 8w, 3]`; ValueError for a length that the
    autoencoder does not keep, or of other latents. `done` is called with how many more frames are finished, of tiles with as
    many as they amount to."""
    if not self.config.keeps(num_frames) or self.config.latent_frames(num_frames) != len(latents):
      raise ValueError(f"{len(latents)} latent frames are not those of a clip of {num_frames} frames")
    if self.tiles and self.tiles.cut(latents.shape[1:3]):
      whole = dataclasses.replace(self, tiles=None, as_uint8=False)
      finish = to_uint8 if self.as_uint8 else None
      share = num_frames / self.tiles.count(latents.shape[1:3])

      def decode_tile(z):
        pixels = whole.decode(z, num_frames)
        done(share)
        return pixels

      return decode_in_tiles(decode_tile, latents, self.tiles, self.config.downsampling, finish)
    return join(self.decode_parts(latents, num_frames), num_frames, done)

  def lower(self, method, size, num_frames):
    """The programs of `method`, "encode" (of uint8) or "decode", for a clip with latents of this (h, w), lowered:
    {program: how often it runs}."""
    lowered, times = {}, collections.Counter()

    def shape(x, sharding=None):
      if isinstance(x, jax.ShapeDtypeStruct) and sharding is None:
        return x
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def lower(function, model, variables, *arrays, **static):
      key = function, str(jax.tree.map(lambda x: (x.shape, x.dtype), arrays)), tuple(static.items())
      if key not in lowered:
        lowered[key] = jitted(function).lower(model, variables, *jax.tree.map(shape, arrays), **static)
      times[lowered[key]] += 1
      return jax.tree.map(lambda s: np.broadcast_to(np.zeros((), s.dtype), s.shape), lowered[key].out_info)

    cut, config = self.tiles and self.tiles.cut(size), self.config
    plain = dataclasses.replace(self, run=lower, place=shape, tiles=None, as_uint8=self.as_uint8 and not cut)
    for height, width in tile_sizes(self.tiles, size) if cut else [size]:
      if method == "encode":
        pixels = num_frames, height * config.downsampling, width * config.downsampling, 3
        parts = plain.encode_parts(np.broadcast_to(np.zeros((), np.uint8), pixels))
      else:
        latents = config.latent_frames(num_frames), height, width, config.latent_channels
        parts = plain.decode_parts(np.broadcast_to(np.zeros((), np.float32), latents), num_frames)
      for _ in parts:
        pass
    return times

  def memory(self, method, size, num_frames):
    """Bytes on one device, beside the weights, while `method` of `lower` runs, as the compiler counts them; inf where it says
    itself that the device has too few."""
    try:
      programs = [program.compile() for program in self.lower(method, size, num_frames)]
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      return math.inf
    return max(memory_beside(program, self.variables) for program in programs)

  def flops(self, method, size, num_frames):
    """FLOPs of `method` of `lower`, as XLA counts them in programs that are not compiled."""
    return sum(times * program.cost_analysis()["flops"] for program, times in self.lower(method, size, num_frames).items())

  def encode_parts(self, frames):
    """The pieces of `encode`, (mean, std) each, one after the other, on the device: nothing is waited for."""
    raise NotImplementedError

  def decode_parts(self, latents, num_frames):
    """The pieces of `decode`, one after the other, on the device: nothing is waited for."""
    raise NotImplementedError

  def _call(self, function, *arrays, **static):
    return self.run(function, self.model, self.variables, *arrays, **static)

  def _frames_at_a_time(self, num_frames):
    """As many as all devices take, none in vain where a clip has fewer: one number, so one program, for the whole clip."""
    return min(self.micro_batch, -(-num_frames // self.devices)) * self.devices

  def _spread(self, array):
    """An array that is split along its first axis over the devices, which divide it."""
    return self.place(array, NamedSharding(self.mesh, PartitionSpec(*self.mesh.axis_names))) if self.mesh else array


def join(parts, length, done=lambda frames: None, ahead=2):
  """Pieces, arrays or tuples of them, as one NumPy array (a tuple) of the first `length` frames; at most `ahead` of them are
  computed before the first is waited for. `done` is called with how many frames each of them finishes."""
  waiting, arrays, left = collections.deque(), [], length

  def finish():
    nonlocal left
    arrays.append(jax.tree.map(np.asarray, waiting.popleft()))
    count = min(left, len(jax.tree.leaves(arrays[-1])[0]))
    left -= count
    done(count)

  for part in parts:
    waiting.append(part)
    while waiting and (len(waiting) > ahead or _is_there(waiting[0])):
      finish()
  while waiting:
    finish()
  return jax.tree.map(lambda *pieces: np.concatenate(pieces)[:length], *arrays)


def _is_there(part):
  """Whether nothing has to be waited for."""
  return all(not isinstance(x, jax.Array) or x.is_ready() for x in jax.tree.leaves(part))


def micro_batches(values, size):
  """Pieces of `size` along the first axis; the last one is filled up with its last element."""
  for start in range(0, len(values), size):
    yield filled(values[start : start + size], size)


def filled(values, size):
  """`values` with its last element repeated up to `size`."""
  return np.concatenate([values, np.repeat(values[-1:], size - len(values), axis=0)]) if len(values) < size else values


def finished(pixels, as_uint8):
  """Pixels, about [-1, 1], as a codec gives them."""
  return to_uint8(pixels) if as_uint8 else pixels


def posterior(config, mean, logvar):
  """Raw mean and log-variance -> normalised mean and deviation."""
  return normalise(config, mean), jnp.exp(0.5 * logvar) * (config.scaling_factor / jnp.asarray(config.scale))


# ----------------------------------------------------------------------------------------------------- image autoencoders


def encode_frames(model, variables, frames):
  """Frames `[N, H, W, 3]` -> normalised (mean, std) `[N, h, w, C]`."""
  return posterior(model.config, *model.apply(variables, to_float(frames), method="encode"))


def decode_frames(model, variables, latents, *, as_uint8):
  """Normalised latents `[N, h, w, C]` -> pixels `[N, 8h, 8w, 3]`."""
  return finished(model.apply(variables, denormalise(model.config, latents), method="decode"), as_uint8)


class ImageCodec(Codec):
  def encode_parts(self, frames):
    for part in micro_batches(frames, self._frames_at_a_time(len(frames))):
      yield self._call(encode_frames, self._spread(part))

  def decode_parts(self, latents, num_frames):
    for part in micro_batches(latents, self._frames_at_a_time(num_frames)):
      yield self._call(decode_frames, self._spread(part), as_uint8=self.as_uint8)


# --------------------------------------------------------------------------------------------------------- Open-Sora 1.2


def image_latents(model, variables, frames):
  """Frames `[N, H, W, 3]` -> image latents `[N, h, w, C]`: means, so that the same clip always gives the same latents (the
  original draws a sample)."""
  return model.apply(variables, to_float(frames)[None], method="image_latents")[0]


def encode_chunks(model, variables, latents):
  """Image latents `[N, T, h, w, C]` of chunks -> normalised (mean, std) `[N, T', h, w, C]`."""
  return posterior(model.config, *model.apply(variables, latents, method="encode_latents"))


def decode_chunks(model, variables, latents, *, num_frames):
  """Normalised latents `[N, T', h, w, C]` of chunks -> their image latents `[N, num_frames, h, w, C]`."""
  return model.apply(variables, denormalise(model.config, latents), num_frames, method="decode_latents")


def decode_image_latents(model, variables, latents, *, as_uint8):
  """Image latents `[N, h, w, C]` -> pixels `[N, 8h, 8w, 3]`."""
  return finished(model.apply(variables, latents[None], method="pixels")[0], as_uint8)


class TemporalCodec(Codec):
  """As many chunks at a time as there are devices; of the chunk that is left over each computes a copy."""

  def encode_parts(self, frames):
    size = self._frames_at_a_time(len(frames))
    for start, count, number in self._chunks(len(frames)):
      chunk = frames[start : start + count * number]
      pieces = (self._call(image_latents, self._spread(part)) for part in micro_batches(chunk, size))
      if self.devices == 1:
        pieces = [*pieces]
        latents = (jnp if isinstance(pieces[0], jax.Array) else np).concatenate(pieces)[: len(chunk)]
      else:  # pieces and chunks are split differently: on the way through the host
        latents = join(pieces, len(chunk))
      latents = latents.reshape(number, count, *latents.shape[1:])
      moments = self._call(encode_chunks, self._spread(filled(latents, self.devices)))
      yield tuple(m[:number].reshape(-1, *m.shape[2:]) for m in moments)

  def decode_parts(self, latents, num_frames):
    size, begin = self._frames_at_a_time(num_frames), 0
    for _, count, number in self._chunks(num_frames):
      length = -(-count // self.config.factor)
      chunks = latents[begin : begin + length * number].reshape(number, length, *latents.shape[1:])
      decoded = self._call(decode_chunks, self._spread(filled(chunks, self.devices)), num_frames=count)
      decoded = np.asarray(decoded)[:number].reshape(-1, *decoded.shape[2:])
      pixels = (
        self._call(decode_image_latents, self._spread(part), as_uint8=self.as_uint8) for part in micro_batches(decoded, size)
      )
      yield join(pixels, len(decoded))
      begin += length * number

  def _chunks(self, num_frames):
    """(first frame, frames of each, how many) of the chunks that are computed at a time."""
    size, start = self.config.chunk or num_frames, 0
    while start < num_frames:
      number = max(1, min((num_frames - start) // size, self.devices))
      count = min(size, num_frames - start)
      yield start, count, number
      start += count * number


# ------------------------------------------------------------------------------------------------------------- CogVideoX


def encode_causal(model, variables, past, frames):
  """Frames `[T, H, W, 3]` of a chunk, and the past that the chunk before left (None: there is none) -> (mean, std), past."""
  return _causal(model, variables, past, to_float(frames), "encode", lambda m: posterior(model.config, *m))


def decode_causal(model, variables, past, latents, *, as_uint8):
  """Normalised latents `[T', h, w, C]` of a chunk and the past -> pixels, past."""
  return _causal(model, variables, past, denormalise(model.config, latents), "decode", lambda x: finished(x, as_uint8))


def _causal(model, variables, past, x, method, finish):
  variables = variables if past is None else {**variables, "past": past}
  y, state = model.apply(variables, x[None], Frames(len(x)), method=method, mutable="past")
  return jax.tree.map(lambda part: part[0], finish(y)), state["past"]


def encode_split(model, variables, frames, *, mesh):
  """Frames `[T, H, W, 3]` of a clip that is split in time over the last axis of a mesh -> normalised (mean, std)."""
  moments = causal3d.over_devices(model, mesh, mesh.axis_names[-1], "encode")(variables, to_float(frames)[None])
  return tuple(m[0] for m in posterior(model.config, *moments))


def decode_split(model, variables, latents, *, mesh, as_uint8):
  """Normalised latents `[T', h, w, C]` of a clip that is split in time over the last axis of a mesh -> pixels."""
  latents = denormalise(model.config, latents)[None]
  return finished(causal3d.over_devices(model, mesh, mesh.axis_names[-1], "decode")(variables, latents)[0], as_uint8)


class CausalCodec(Codec):
  """Whole clips when norms take their statistics over the clip, and over several devices: then memory grows with its length. As
  many devices split a clip as can, of those that divide all of them; the others compute the same."""

  def encode_parts(self, frames):
    if mesh := self._split(len(frames)):
      yield self._call(encode_split, frames, mesh=mesh)
    else:
      yield from self._chunks(encode_causal, frames, self.config.encode_chunk)

  def decode_parts(self, latents, num_frames):
    if mesh := self._split(num_frames):
      yield self._call(decode_split, latents, mesh=mesh, as_uint8=self.as_uint8)
    else:
      yield from self._chunks(decode_causal, latents, self.config.decode_chunk, as_uint8=self.as_uint8)

  def _split(self, num_frames):
    """The mesh over whose last axis a clip of so many frames is split, None where it is computed whole."""
    for count in range(self.devices, 1, -1):
      if self.devices % count == 0 and causal3d.splits(self.config, num_frames, count):
        return Mesh(self.mesh.devices.reshape(-1, count), ("copies", *self.mesh.axis_names))
    return None

  def _chunks(self, function, values, chunk, **static):
    sizes = chunk_sizes(len(values), chunk) if self.config.statistics == "chunks" else (len(values),)
    past, start = None, 0
    for size in sizes:
      part, past = self._call(function, past, values[start : start + size], **static)
      yield part
      start += size


CODECS = {image_kl: ImageCodec, temporal: TemporalCodec, causal3d: CausalCodec}


def bytes_on_device(tree):
  """Bytes of arrays, or of shapes, on one device."""
  leaves = jax.tree.leaves(tree)
  whole = lambda x: x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)  # noqa: E731
  return sum(math.prod(whole(x)) * x.dtype.itemsize for x in leaves)


def memory_beside(compiled, weights):
  """Bytes on one device while a compiled program runs, without those of its weights (arrays or shapes with shardings)."""
  memory = compiled.memory_analysis()
  kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return kept + memory.temp_size_in_bytes - bytes_on_device(weights)


def fit_tiles(codec, size, lengths, budget):
  """(`codec` as it is, or as so many bytes are enough for it; {method: its bytes}): first with fewer frames at a time, which
  changes nothing but speed, and, with one, in the largest tiles that fit.

  Compiles, allocates nothing. If not even the smallest tiles fit they are what is returned.

  Args:
    size: (h, w) of the latents; lengths: {method, as in `Codec.lower`: frames of its clips}; budget: bytes on one device beside
      the weights.
  """
  choices = sizes_for(size)
  while True:
    needed = {method: max(codec.memory(method, size, frames) for frames in clips) for method, clips in lengths.items()}
    if max(needed.values()) <= budget:
      return codec, needed
    if codec.micro_batch > 1 and not isinstance(codec, CausalCodec):
      codec = dataclasses.replace(codec, micro_batch=codec.micro_batch // 2)
    elif tiles := next(choices, None):
      codec = dataclasses.replace(codec, tiles=tiles)
    else:
      return codec, needed


def make_codec(model, variables, micro_batch=4, run=run_jitted):
  """The `Codec` of an autoencoder and its variables."""
  return CODECS[module_of(model.config)](model, variables, micro_batch, run)
