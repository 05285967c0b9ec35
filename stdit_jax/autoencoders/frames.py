"""Frames of a clip in chunks and on devices, for autoencoders that are causal in time."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from stdit_jax.autoencoders.latents import AnyArray


def half(frames: int) -> int:
  """Frames after time was halved. The first of an odd number is not paired."""
  return frames // 2 + frames % 2


def double(frames: int) -> int:
  """Frames after time was doubled. The first of an odd number is not repeated."""
  return 2 * frames - frames % 2


def chunk_sizes(frames: int, chunk: int) -> tuple[int, ...]:
  """Frames of the chunks of a clip. The first chunk also takes the remainder (diffusers, `_encode` and `_decode`)."""
  count = max(frames // chunk, 1)
  return frames - (count - 1) * chunk, *[chunk] * (count - 1)


def in_pieces(function: Callable, x: AnyArray, size: int) -> Any:
  """`function` of the elements of `x` `[N, ...]`, `size` of them at a time in a loop. Joins the results `[N, ...]`."""
  if len(x) <= size:
    return function(x)
  x, number = jnp.concatenate([x, jnp.repeat(x[-1:], -len(x) % size, axis=0)]), len(x)
  made = jax.lax.map(function, x.reshape(-1, size, *x.shape[1:]))
  return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:number], made)


def in_chunks(function: Callable, x: AnyArray, num_frames: int, chunk: int, length: int) -> Any:
  """Applies `function(part of x, frames)` to all full chunks as one batch, then to the shorter last chunk. Joins the results.

  A chunk has `chunk` frames of the clip, which are `length` elements of `x` `[N, T, h, w, C]`.
  """
  whole, rest = divmod(num_frames, chunk)
  parts = []
  if whole:
    batch = einops.rearrange(x[:, : whole * length], "n (k t) h w c -> (n k) t h w c", k=whole)
    together = lambda y: einops.rearrange(y, "(n k) t h w c -> n (k t) h w c", k=whole)  # noqa: E731
    parts.append(jax.tree.map(together, function(batch, chunk)))
  if rest:
    parts.append(function(x[:, whole * length :], rest))
  return jax.tree.map(lambda *of_parts: jnp.concatenate(of_parts, axis=1), *parts)


@dataclasses.dataclass(frozen=True)
class Frames:
  """Which frames of a clip an array `[N, T, ...]` holds, for autoencoders that pair frames (CogVideoX's).

  A clip may be split over a mesh (inside `shard_map`). All devices then hold equally many frames. If the clip has an odd number
  of frames, every array has an extra place in front. Device 0 holds frame 0 there. The other devices hold any value there
  (`-`), and no result depends on it. Nine frames on two devices:

                  array `x`        `with_past(x, 2)`    convolution of 3 frames over it
      device 0    0 | 1 2 3 4      0 0 0 | 1 2 3 4      0 | 1 2 3 4
      device 1    - | 5 6 7 8      - 3 4 | 5 6 7 8      - | 5 6 7 8

  Attributes:
    count: frames of the whole clip.
    chunks: frames of each chunk over which norms take their statistics; None: over the whole clip.
    axis_name: mesh axis over which the clip is split; None: the array is the whole clip.
    devices: size of this axis.
  """

  count: int
  chunks: tuple[int, ...] | None = None
  axis_name: str | None = None
  devices: int = 1

  @property
  def first(self) -> bool:
    """Whether the first frame stays alone when time is halved or doubled."""
    return self.count % 2 == 1

  @property
  def local(self) -> int:
    """Frames of the array of one device."""
    return (self.count - self.first) // self.devices + self.first

  def scaled(self, change: Callable[[int], int]) -> "Frames":
    """The frames after time was halved or doubled (`change` is `half` or `double`)."""
    chunks = None if self.chunks is None else tuple(map(change, self.chunks))
    return dataclasses.replace(self, count=change(self.count), chunks=chunks)

  def levels(self, halvings: int, change: Callable[[int], int]) -> "list[Frames]":
    """The `Frames` of each level of a network that applies `change` `halvings` times."""
    return list(itertools.accumulate([change] * halvings, Frames.scaled, initial=self))

  def membership(self) -> tuple[AnyArray, AnyArray]:
    """-> (`[T, chunks]`, 1 if the frame belongs to the chunk; `[T]`, 1 for own frames, 0 for the extra place `-`)."""
    chunks = self.chunks or (self.count,)
    belongs, own = np.repeat(np.eye(len(chunks), dtype=np.float32), chunks, axis=0), np.ones(self.local, np.float32)
    if self.axis_name is None:
      return belongs, own
    device, rest = jax.lax.axis_index(self.axis_name), self.local - self.first
    here = jax.lax.dynamic_slice_in_dim(jnp.asarray(belongs[self.first :]), device * rest, rest)
    if not self.first:
      return here, own
    return jnp.concatenate([belongs[:1], here]), jnp.where((jnp.arange(self.local) == 0) & (device > 0), 0.0, own)

  def sum(self, x: AnyArray) -> AnyArray:
    """The sum over the devices that split the clip."""
    return x if self.axis_name is None else jax.lax.psum(x, self.axis_name)

  def with_past(self, x: AnyArray, count: int) -> jax.Array:
    """`x` with the `count` previous frames in front: copies of frame 0 before the clip. Needs `count` frames per device."""
    start = jnp.concatenate([jnp.repeat(x[:, :1], count, axis=1), x], axis=1)
    if self.axis_name is None:
      return start
    past = jax.lax.ppermute(x[:, -count:], self.axis_name, [(i, i + 1) for i in range(self.devices - 1)])
    # Devices other than 0 fill the extra place with a past frame, only to get the same shape.
    later = [past[:, :1], past, x[:, 1:]] if self.first else [past, x]
    return jnp.where(jax.lax.axis_index(self.axis_name) == 0, start, jnp.concatenate(later, axis=1))


def _divides(frames, level):
  """Whether a level can be split: after the first frame of an odd number, each device gets equally many frames, at least two.

  The number of frames must be odd in all levels or in none.
  """
  rest = level.count - level.first
  return rest % level.devices == 0 and rest >= 2 * level.devices and level.first == frames.first


def splits(config: Any, num_frames: int, devices: int) -> bool:
  """Whether a clip can be split in time over so many devices."""
  frames = Frames(num_frames, devices=devices)
  return all(_divides(frames, level) for level in frames.levels(config.halvings, half))


def over_devices(model: Any, mesh: Mesh, axis_name: str, method: str, batch_axes: tuple[str, ...] = ()) -> Callable:
  """`encode` or `decode` of clips that are split in time over a mesh axis (context parallelism).

  Returns a function `(variables, x)` to jit. It computes `model.apply(variables, x, method=method)`. Convolutions get their
  past from the previous device, and norms sum their statistics over all devices. Device 0 holds the first of an odd number of
  frames, and the other frames are divided evenly (as CogVideoX's SAT code does).

  Args:
    batch_axes: mesh axes that split the batch.

  Raises (when it is called):
    ValueError: the frames of a level cannot be divided, or a device gets fewer than two.
  """
  devices, config = mesh.shape[axis_name], model.config
  change, chunk = (half, config.encode_chunk) if method == "encode" else (double, config.decode_chunk)

  def apply(variables, x):
    chunks = chunk_sizes(x.shape[1], chunk) if config.statistics == "chunks" else None
    frames = Frames(x.shape[1], chunks, axis_name, devices)
    for level in frames.levels(config.halvings, change):
      if not _divides(frames, level):
        raise ValueError(
          f"a clip of {x.shape[1]} {'frames' if method == 'encode' else 'latents'} can't be split over the {devices} devices "
          f"of mesh axis {axis_name!r}: one of its levels has {level.count} frames. Levels must be all odd or all even. After "
          "the first frame of an odd level, each device needs equally many, at least two. Use fewer devices or another length"
        )

    def local(variables, first, rest):
      y = model.apply(variables, jnp.concatenate([first, rest], axis=1), frames, method=method)
      is_first = jax.lax.axis_index(axis_name) == 0
      # The first frame of device 0, on all devices.
      share = lambda part: jax.lax.psum(jnp.where(is_first, part[:, : frames.first], 0), axis_name)  # noqa: E731
      return jax.tree.map(share, y), jax.tree.map(lambda part: part[:, frames.first :], y)

    whole, split = PartitionSpec(batch_axes or None), PartitionSpec(batch_axes or None, axis_name)
    shards = jax.shard_map(
      local, mesh=mesh, in_specs=(PartitionSpec(), whole, split), out_specs=(whole, split), check_vma=False
    )
    first, rest = shards(variables, x[:, : frames.first], x[:, frames.first :])
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), first, rest)

  return apply
