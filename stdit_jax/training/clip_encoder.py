"""Encodes clips to latents on the devices of this process, with one program per size of units: images, chunks or clips."""

import collections
import dataclasses
import functools
import hashlib
import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from stdit_jax.autoencoders.codec import Codec, join, micro_batches
from stdit_jax.autoencoders.family import encoder_only
from stdit_jax.autoencoders.registry import family_of
from stdit_jax.components import load_codec
from stdit_jax.config import Autoencoder
from stdit_jax.training.compilation import AheadOfTime
from stdit_jax.training.executables import OwnProgram

Size = tuple[int, int, int]  # frames, height, width
_AHEAD = 2  # calls of programs that a device has in its queue


class LatentCache:
  """Caches the latents of clips, up to `limit` bytes. Drops the least recently used latents first. Threads may share it."""

  def __init__(self, limit):
    self.limit, self.bytes, self.hits, self._entries = limit, 0, 0, collections.OrderedDict()
    self._lock = threading.Lock()

  @staticmethod
  def key(clip: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    """Key of the pixels, whatever row, window or crop they come from."""
    return clip.shape, hashlib.blake2b(np.ascontiguousarray(clip).data, digest_size=16).digest()

  def get(self, key: Any) -> Sequence[np.ndarray] | None:
    """(mean, std) `[T, h, w, C]`, or None."""
    with self._lock:
      if key in self._entries:
        self.hits += 1
        self._entries.move_to_end(key)
      return self._entries.get(key)

  def put(self, key: Any, latents: Sequence[np.ndarray]) -> None:
    size = sum(part.nbytes for part in latents)
    with self._lock:
      if key in self._entries or size > self.limit:
        return
      self._entries[key] = latents
      self.bytes += size
      while self.bytes > self.limit:
        self.bytes -= sum(part.nbytes for part in self._entries.popitem(last=False)[1])


def lower_program(codec: Codec, size: Size, device: Any, name: str = "encode") -> jax.stages.Lowered:
  """The program `(variables, clips) -> (mean, std)` `[N, T', h, w, C]` of one device, lowered.

  Args:
    codec: its variables may be shapes; their devices do not matter.
    size: (frames, height, width) of the N = `clips_at_once` units.
    name: JAX reports the program by this name.
  """
  place, family = SingleDeviceSharding(device), family_of(codec.config)

  def encode(variables, clips):
    return family.encode_clips(codec.model, variables, clips, codec.micro_batch)

  encode.__name__ = name
  variables = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), codec.variables)
  clips = jax.ShapeDtypeStruct((clips_at_once(codec, size[0]), *size, 3), np.uint8, sharding=place)
  return jax.jit(encode, keep_unused=True).lower(variables, clips)


def clips_at_once(codec: Codec, num_frames: int) -> int:
  """Number of clips of one call of a program: as many as fit into a micro batch of frames, at least one."""
  return max(1, codec.micro_batch // num_frames)


def program_sizes(config: Any, size: Sequence[int]) -> list[Size]:
  """Sizes (frames, height, width) of the units of a clip, in order. Each size has one program.

  `config`: of the autoencoder.
  """
  return [(frames, size[1], size[2]) for frames in config.units(size[0])]


def load_encoder(config: Autoencoder, compiler: AheadOfTime, stage: str) -> "ClipEncoder":
  """The `ClipEncoder` of the group `autoencoder`, with the weights that encode."""
  codec = load_codec(config)
  return ClipEncoder(dataclasses.replace(codec, variables=encoder_only(codec.variables)), config, compiler, stage)


class ClipEncoder:
  """Encodes clips to normalised posterior means and deviations on all local devices. Threads may share it.

  Args:
    codec: an `autoencoders.codec.Codec`.
    config: the group `autoencoder`.
    compiler: makes the programs.
    stage: its name, for the names of programs.
  """

  def __init__(self, codec: Codec, config: Autoencoder, compiler: AheadOfTime, stage: str):
    self.config, self.codec, self._compiler, self._stage = codec.config, codec, compiler, stage
    self._variables = [jax.device_put(codec.variables, device) for device in jax.local_devices()]
    self._begun = [collections.deque(maxlen=_AHEAD) for _ in self._variables]  # the last results of each device
    self._programs, self._lock = {}, threading.Lock()  # {size: future of the `executables.Loaded`}
    self.cache = LatentCache(config.cache_gb * 2**30)

  def prepare(self, sizes: Iterable[Size]) -> None:
    """Starts to load or compile the programs of these sizes of clips, in this order."""
    found = dict.fromkeys(unit for size in sizes for unit in program_sizes(self.config, size))
    with self._lock:
      sizes = [size for size in found if size not in self._programs]
      self._programs |= zip(sizes, self._compiler.add_own([self._program(size) for size in sizes]))

  def _program(self, size):
    codec, name = self.codec, f"{self._stage}: encode {'x'.join(map(str, size))}"
    self._compiler.counter.expect(name)
    fields = dataclasses.asdict(self.config) | {"class": type(self.config).__name__, "dtype": str(codec.model.dtype)}
    leaves = jax.tree.leaves_with_path(codec.variables)
    parameters = [(jax.tree_util.keystr(path), x.shape, str(x.dtype)) for path, x in leaves]
    what = ["encode", fields, parameters, size, codec.micro_batch]
    return OwnProgram(name, "encode", what, functools.partial(lower_program, codec, size), (0, 0))

  def __call__(self, clips: Sequence[np.ndarray]) -> list[Any]:
    """uint8 clips `[T, H, W, 3]` -> list of (mean, std), float32 NumPy `[T', h, w, C]`."""
    return self.start(clips)()

  def start(self, clips: Sequence[np.ndarray]) -> Callable[[], list[Any]]:
    """Starts to encode. Returns a function that waits for the devices and returns the latents."""
    keys = [self.cache.key(clip) if self.cache.limit else None for clip in clips]
    latents = [self.cache.get(key) for key in keys]
    missing = [i for i, known in enumerate(latents) if known is None]
    by_size = collections.defaultdict(list)  # {size: [(number of the clip, first frame) of each unit]}
    for i in missing:
      begin = 0
      for size in program_sizes(self.config, clips[i].shape):
        by_size[size].append((i, begin))
        begin += size[0]
    self.prepare(by_size)
    devices, begun = itertools.cycle(range(len(self._variables))), []  # the devices take micro batches in turn
    for size, units in by_size.items():
      begun.append((units, self._begin(size, [clips[i][begin : begin + size[0]] for i, begin in units], devices)))

    def finish():
      made = {i: {} for i in missing}  # {first frame of a unit: (mean, std)}
      for units, parts in begun:
        for (i, begin), *moments in zip(units, *join(parts, len(units))):
          made[i][begin] = moments
      for i, of_units in made.items():
        latents[i] = own = [np.concatenate(moments) for moments in zip(*(of_units[begin] for begin in sorted(of_units)))]
        self.cache.put(keys[i], own)
      return latents

    return finish

  def _begin(self, size, units, devices):
    """Pieces of (mean, std) `[n, T', h, w, C]` of the units, which the devices compute. The last piece has some padding."""
    program, parts = self._compiler.wait_for(self._programs[size]), []
    for batch, number in zip(micro_batches(np.stack(units), clips_at_once(self.codec, size[0])), devices):
      self._compiler.alive()
      if len(begun := self._begun[number]) == _AHEAD:  # else the pixels of a whole batch would lie on the devices
        jax.block_until_ready(begun[0])
      parts.append(program(number, self._variables[number], jax.device_put(batch, jax.local_devices()[number])))
      begun.append(parts[-1])
    return parts
