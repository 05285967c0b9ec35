"""Runs any autoencoder over clips, piece by piece: clips to normalised latents and back.

A piece is what one call of a program computes: a micro batch of frames, or a chunk, perhaps with the state of the previous
chunk. Memory therefore does not grow with the length of a clip. Pieces of one shape share one compiled program.
Cutting into pieces changes no value.

If the weights lie whole on all devices of a one-dimensional mesh, the devices share each piece: its frames, its chunks, or the
parts of a whole clip (`frames.over_devices`). This changes no value either. Tiles do (tiles.py).
"""

import collections
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Num

from stdit_jax.autoencoders.latents import AnyArray, to_uint8
from stdit_jax.autoencoders.tiles import Tiles, decode_in_tiles, encode_in_tiles, sizes_for, tile_sizes

Parts = Iterator[Any]  # arrays or tuples of arrays, on the device or in NumPy


@functools.cache
def jitted(function: Callable) -> jax.stages.Wrapped:
  """The jitted function of a piece. Only weights and arrays are traced."""
  static = [name for name in ("model", "num_frames", "as_uint8", "mesh") if name in inspect.signature(function).parameters]
  # Unused weights stay arguments of the program, because `memory_beside` subtracts all weights.
  return jax.jit(function, static_argnames=static, keep_unused=True)


def run_jitted(function: Callable, model: Any, *args, **static) -> Any:
  """Runs the function of a piece. This is the default `Codec.run`."""
  return jitted(function)(model, *args, **static)


def shape_of(x: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
  """A ShapeDtypeStruct of `x` with the sharding. `Codec.lower` uses it as `place`, to lay out shapes in place of arrays."""
  placed = isinstance(x, jax.ShapeDtypeStruct) and sharding is None
  return x if placed else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _empty(shape, dtype):
  """An array of zeros that takes no memory."""
  return np.broadcast_to(np.zeros((), dtype), shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Codec:
  """An autoencoder with its weights, made by `registry.make_codec`. A subclass cuts clips for one autoencoder.

  Attributes:
    model: a linen module of an autoencoder.
    variables: its parameters, or their shapes.
    micro_batch: frames per piece and device, if the pieces are frames.
    run: `(function, model, variables, *arrays, **static) -> arrays`, which runs the function of a piece.
    place: `(array, sharding) -> array`, which lays an array out over devices.
    tiles: how larger frames are cut; None: they are not cut.
    as_uint8: True: decoded pixels are uint8. False: they are float32, about [-1, 1], not clipped.
    uses_micro_batch: whether `micro_batch` matters.
  """

  model: Any
  variables: dict
  micro_batch: int = 4
  run: Callable = run_jitted
  place: Callable = jax.device_put
  tiles: Tiles | None = None
  as_uint8: bool = True

  uses_micro_batch = True

  def __post_init__(self):
    if self.micro_batch < 1:
      raise ValueError(f"micro_batch must be at least 1, not {self.micro_batch}.")

  @property
  def config(self) -> Any:
    return self.model.config

  @functools.cached_property
  def mesh(self) -> Any:
    """The mesh whose devices hold whole copies of the weights; None for weights on a single device."""
    sharding = getattr(next(iter(jax.tree.leaves(self.variables)), None), "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) else None

  @property
  def devices(self) -> int:
    """Number of devices that work at the same time."""
    return self.mesh.size if self.mesh else 1

  def encode(self, frames: Num[np.ndarray, "T H W 3"]) -> tuple[Float[np.ndarray, "t h w C"], Float[np.ndarray, "t h w C"]]:
    """Frames, uint8 or float in [-1, 1] -> normalised posterior (mean, std), float32."""
    size = self.config.latent_size(*frames.shape[1:3])
    if self.tiles and self.tiles.cut(size):
      return encode_in_tiles(dataclasses.replace(self, tiles=None).encode, frames, self.tiles, self.config.downsampling, size)
    return join(self.encode_parts(frames), self.config.latent_frames(len(frames)))

  def decode(self, latents: Float[np.ndarray, "t h w C"], num_frames: int, done: Callable = lambda frames: None) -> np.ndarray:
    """Normalised latents -> pixels `[num_frames, H, W, 3]`.

    Raises ValueError if the number of latents does not fit `num_frames`, or if the autoencoder changes a clip of this length.

    Args:
      done: called with the number of frames that each piece finishes. A tile counts as its share of all frames.
    """
    if not self.config.keeps(num_frames) or self.config.latent_frames(num_frames) != len(latents):
      raise ValueError(
        f"{len(latents)} latent frames do not decode to {num_frames} frames; encode a clip whose length the autoencoder keeps"
      )
    if self.tiles and self.tiles.cut(latents.shape[1:3]):
      whole = dataclasses.replace(self, tiles=None, as_uint8=False)
      finish = to_uint8 if self.as_uint8 else None
      share = num_frames / sum(map(len, self.tiles.places(latents.shape[1:3])))

      def decode_tile(z):
        pixels = whole.decode(z, num_frames)
        done(share)
        return pixels

      return decode_in_tiles(decode_tile, latents, self.tiles, self.config.downsampling, finish)
    return join(self.decode_parts(latents, num_frames), num_frames, done)

  def lower(self, method: str, size: Sequence[int], num_frames: int) -> collections.Counter:
    """The lowered programs of a clip: {program: number of runs}.

    Args:
      method: "encode" (of uint8) or "decode".
      size: (h, w) of the latents.
    """
    lowered, times = {}, collections.Counter()

    def count(function, model, variables, *arrays, **static):  # takes the place of `run`, and computes nothing
      key = function, str(jax.tree.map(lambda x: (x.shape, x.dtype), arrays)), tuple(static.items())
      if key not in lowered:
        lowered[key] = jitted(function).lower(model, variables, *jax.tree.map(shape_of, arrays), **static)
      times[lowered[key]] += 1
      return jax.tree.map(lambda s: _empty(s.shape, s.dtype), lowered[key].out_info)

    cut, config = self.tiles and self.tiles.cut(size), self.config
    plain = dataclasses.replace(self, run=count, place=shape_of, tiles=None, as_uint8=self.as_uint8 and not cut)
    for height, width in tile_sizes(self.tiles, size) if self.tiles and cut else [size]:
      if method == "encode":
        pixels = num_frames, height * config.downsampling, width * config.downsampling, 3
        parts = plain.encode_parts(_empty(pixels, np.uint8))
      else:
        latents = config.latent_frames(num_frames), height, width, config.latent_channels
        parts = plain.decode_parts(_empty(latents, np.float32), num_frames)
      collections.deque(parts, maxlen=0)  # runs the generator to its end
    return times

  def memory(self, method: str, size: Sequence[int], num_frames: int) -> float:
    """Bytes that `method` takes on one device beside the weights, as the compiler counts them. Arguments as `lower`.

    They are infinite if the compiler reports that the device has too little memory.
    """
    return max(needed_memory(program, self.variables) for program in self.lower(method, size, num_frames))

  def flops(self, method: str, size: Sequence[int], num_frames: int) -> float:
    """FLOPs of `method` as XLA counts them, without compilation. Arguments as `lower`."""
    return sum(times * program.cost_analysis()["flops"] for program, times in self.lower(method, size, num_frames).items())

  def encode_parts(self, frames: np.ndarray) -> Parts:
    """Yields the pieces of `encode`, (mean, std) each. Arrays on the device may still be computing."""
    raise NotImplementedError

  def decode_parts(self, latents: np.ndarray, num_frames: int) -> Parts:
    """Yields the pieces of `decode`. Arrays on the device may still be computing."""
    raise NotImplementedError

  def _call(self, function, *arrays, **static):
    return self.run(function, self.model, self.variables, *arrays, **static)

  def _frames_at_a_time(self, num_frames):
    """Frames of one piece on all devices together. All devices share a short clip, fewer than `micro_batch` frames each."""
    return min(self.micro_batch, -(-num_frames // self.devices)) * self.devices

  def _spread(self, array):
    """The array, split along its first axis over the devices. The axis must be a multiple of their number."""
    return self.place(array, NamedSharding(self.mesh, PartitionSpec(*self.mesh.axis_names))) if self.mesh else array


def join(parts: Iterable, length: int, done: Callable[[int], Any] = lambda frames: None, ahead: int = 2) -> Any:
  """Concatenates pieces, arrays or tuples of arrays, to NumPy arrays of the first `length` frames.

  Args:
    done: called with the number of frames that each piece finishes.
    ahead: number of pieces that may be computed before the function waits for the first one.
  """
  waiting, arrays, left = collections.deque(), [], length

  def finish():
    nonlocal left
    arrays.append(jax.tree.map(np.asarray, waiting.popleft()))
    count = min(left, len(jax.tree.leaves(arrays[-1])[0]))
    left -= count
    done(count)

  for part in parts:
    waiting.append(part)
    while waiting and (len(waiting) > ahead or _is_ready(waiting[0])):
      finish()
  while waiting:
    finish()
  return jax.tree.map(lambda *pieces: np.concatenate(pieces)[:length], *arrays)


def _is_ready(part):
  return all(x.is_ready() for x in jax.tree.leaves(part) if hasattr(x, "is_ready"))  # NumPy arrays have no such method


def micro_batches(values: AnyArray, size: int) -> Iterator[AnyArray]:
  """Yields pieces of `size` along the first axis. The last one repeats its last element up to `size`."""
  for start in range(0, len(values), size):
    yield filled(values[start : start + size], size)


def filled(values: AnyArray, size: int) -> AnyArray:
  """`values` with its last element repeated up to `size`."""
  return np.concatenate([values, np.repeat(values[-1:], size - len(values), axis=0)]) if len(values) < size else values


def pixels_of(pixels: AnyArray, as_uint8: bool) -> AnyArray:
  """Decoded pixels in the type that a codec returns."""
  return to_uint8(pixels) if as_uint8 else pixels


def bytes_on_device(tree: Any) -> int:
  """Bytes of arrays, or of shapes, on one device."""
  leaves = jax.tree.leaves(tree)
  local = lambda x: x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)  # noqa: E731
  return sum(math.prod(local(x)) * x.dtype.itemsize for x in leaves)


def memory_beside(compiled: Any, weights: Any) -> int:
  """Bytes that a compiled program takes on one device beside its weights (arrays, or shapes with shardings)."""
  memory = compiled.memory_analysis()
  kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return kept + memory.temp_size_in_bytes - bytes_on_device(weights)


def needed_memory(lowered: jax.stages.Lowered, weights: Any) -> float:
  """`memory_beside` of a lowered program. Infinite if the compiler reports that the device has too little memory."""
  try:
    return memory_beside(lowered.compile(), weights)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return math.inf


def fit_tiles(codec: Codec, size: Sequence[int], lengths: Mapping[str, Iterable[int]], budget: float) -> tuple[Codec, dict]:
  """-> (`codec` changed until it fits into the budget, {method: bytes that it needs}).

  First it halves the micro batch, which changes only the speed. Then it takes the largest tiles that fit, or the smallest if
  none fit. It compiles programs, but allocates nothing.

  Args:
    size: (h, w) of the latents.
    lengths: {method, as in `Codec.lower`: numbers of frames of its clips}.
    budget: bytes on one device beside the weights.
  """
  choices = sizes_for(size)
  while True:
    needed = {method: max(codec.memory(method, size, frames) for frames in clips) for method, clips in lengths.items()}
    if max(needed.values()) <= budget:
      return codec, needed
    if codec.micro_batch > 1 and codec.uses_micro_batch:
      codec = dataclasses.replace(codec, micro_batch=codec.micro_batch // 2)
    elif tiles := next(choices, None):
      codec = dataclasses.replace(codec, tiles=tiles)
    else:
      return codec, needed
