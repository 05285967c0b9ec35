"""Encodes clips to latents on the devices of this process, with one program per size of clips."""

import collections
import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stdit_jax.autoencoders.codec import Codec, filled, join, micro_batches
from stdit_jax.autoencoders.frames import Sharers
from stdit_jax.autoencoders.registry import family_of
from stdit_jax.components import load_codec
from stdit_jax.config import Autoencoder
from stdit_jax.training.compilation import AheadOfTime, OwnProgram

Size = tuple[int, int, int]  # frames, height, width


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


def encode_program(codec: Codec, size: Size) -> tuple[Callable, int, jax.ShapeDtypeStruct]:
  """How clips of a size are encoded by one program on all devices of `codec.mesh`.

  Returns:
    `(variables, frames) -> (mean, std)` `[N, T', h, w, C]`, to jit.
    N, the number of clips of one call.
    The shape of `frames`, which holds the frames of N clips and padding.
  """
  mesh, family, num_frames = codec.mesh, family_of(codec.config), size[0]
  (axis,), count = mesh.axis_names, family.clips_at_once(num_frames, codec.micro_batch, mesh.size)
  sharers = Sharers(axis, mesh.size, codec.micro_batch)

  def encode(variables, frames):
    return family.encode_clips(codec.model, variables, frames, (count, num_frames), sharers)

  shared = jax.shard_map(encode, mesh=mesh, in_specs=(P(), P(axis)), out_specs=P(), check_vma=False)
  shape = sharers.padded(count * num_frames, codec.micro_batch), *size[1:], 3
  return shared, count, jax.ShapeDtypeStruct(shape, np.uint8, sharding=NamedSharding(mesh, P(axis)))


def lower_program(codec: Codec, size: Size) -> jax.stages.Lowered:
  """The lowered program of `encode_program`. The variables of `codec` may be shapes."""
  function, _, frames = encode_program(codec, program_size(codec, size))
  return jax.jit(function).lower(codec.variables, frames)


def program_size(codec: Codec, size: Sequence[int]) -> Size:
  """The size of the program that encodes clips of a size (frames, height, width). An image autoencoder takes single frames."""
  return (1 if codec.single_frames else size[0], size[1], size[2])


def devices_of_process() -> Mesh:
  """The mesh of all devices of this process, which share the encoding of clips."""
  return Mesh(np.asarray(jax.local_devices()), ("pieces",))


def load_encoder(config: Autoencoder, compiler: AheadOfTime, stage: str) -> "ClipEncoder":
  """The `ClipEncoder` of the group `autoencoder` on all devices of this process, with its weights."""
  return ClipEncoder(load_codec(config, devices_of_process()), config, compiler, stage)


class ClipEncoder:
  """Encodes clips to normalised posterior means and deviations on all local devices.

  Args:
    codec: an `autoencoders.codec.Codec` with a mesh.
    config: the group `autoencoder`.
    compiler: makes the programs.
    stage: its name, for the names of programs.
  """

  def __init__(self, codec: Codec, config: Autoencoder, compiler: AheadOfTime, stage: str):
    self.config, self.codec, self._stage = codec.config, codec, stage
    self._compiler, self._programs = compiler, {}  # {size: (future of the program, shape of its clips)}
    self.cache = LatentCache(config.cache_gb * 2**30)

  def prepare(self, sizes: Iterable[Size]) -> None:
    """Starts to load or compile the programs of these sizes of clips, in this order."""
    sizes = [size for size in dict.fromkeys(program_size(self.codec, size) for size in sizes) if size not in self._programs]
    made = [self._program(size) for size in sizes]
    futures = self._compiler.add_own([program for program, _, _ in made])
    self._programs |= {size: (future, *rest) for size, future, (_, *rest) in zip(sizes, futures, made)}

  def clips_at_once(self, num_frames: int) -> int:
    """Number of clips that give work to all devices."""
    return family_of(self.config).clips_at_once(num_frames, self.codec.micro_batch, self.codec.devices)

  def _program(self, size):
    """(`OwnProgram`, number of clips, shape of their frames), see `encode_program`."""
    name, variables = f"{self._stage}: encode {'x'.join(map(str, size))}", self.codec.variables
    function, count, frames = encode_program(self.codec, size)
    jitted = jax.jit(self._compiler.counter.counted(name, function))
    fields = dataclasses.asdict(self.config) | {"class": type(self.config).__name__, "dtype": str(self.codec.model.dtype)}
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(variables)]
    what = ["encode", fields, names, size, count, frames.shape, self.codec.micro_batch]
    program = OwnProgram(name, "encode", what, lambda: jitted.lower(variables, frames), ((variables, frames), {}), (0, 0))
    return program, count, frames

  def __call__(self, clips: Sequence[np.ndarray]) -> list[Any]:
    """uint8 clips `[T, H, W, 3]` -> list of (mean, std), float32 NumPy `[T', h, w, C]`."""
    return self.start(clips)()

  def start(self, clips: Sequence[np.ndarray]) -> Callable[[], list[Any]]:
    """Starts to encode. Returns a function that waits for the devices and returns the latents."""
    keys = [self.cache.key(clip) if self.cache.limit else None for clip in clips]
    latents = [self.cache.get(key) for key in keys]
    by_size = collections.defaultdict(list)
    for i, clip in enumerate(clips):
      if latents[i] is None:
        by_size[program_size(self.codec, clip.shape)].append(i)
    self.prepare(by_size)
    begun = [(members, self._begin(size, [clips[i] for i in members])) for size, members in by_size.items()]

    def finish():
      for members, (parts, count) in begun:
        lengths = [self.config.latent_frames(len(clips[i])) for i in members]
        moments = [m.reshape(-1, *m.shape[2:]) for m in join(parts, count)]  # of all members, joined in time
        ends = np.cumsum(lengths)[:-1]
        for i, *own in zip(members, *(np.split(moment, ends) for moment in moments)):
          latents[i] = [part.copy() for part in own]
          self.cache.put(keys[i], latents[i])
      return latents

    return finish

  def _begin(self, size, clips):
    """(pieces of (mean, std) `[n, T', h, w, C]` that the devices compute, number of valid clips in them)."""
    units = np.concatenate([clip.reshape(-1, *size, 3) for clip in clips])
    program, count, shape = self._programs[size]
    if not program.done():
      self._compiler.alive(True)
      concurrent.futures.wait([program])
    parts = []
    for batch in micro_batches(units, count):
      self._compiler.alive(False)
      frames = filled(batch.reshape(-1, *size[1:], 3), shape.shape[0])
      parts.append(program.result()(self.codec.variables, jax.device_put(frames, shape.sharding)))
    return parts, len(units)
