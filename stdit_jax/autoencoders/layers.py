"""Layers that several autoencoders share, over pictures `[N, H, W, C]` and clips `[N, T, H, W, C]`."""

import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn


def check_latents(config):
  """Raises ValueError unless `shift` and `scale` of an autoencoder's configuration are numbers for its latents."""
  for name in ("shift", "scale"):
    value = getattr(config, name)
    if not isinstance(value, (int, float)) and len(value) != config.latent_channels:
      what = f"{type(config).__name__}: {name} needs one number or {config.latent_channels} (latent_channels)"
      raise ValueError(f"{what}, not {value}.")


def block_of(cls, remat, static=()):
  """The class of a block, or one of the same parameters whose backward pass computes it again; `static`: numbers of arguments
  of its call that are no arrays, counted from 0, itself."""
  return nn.remat(cls, static_argnums=static) if remat else cls


def half(frames):
  """Frames after time was halved: the first of an odd number stands alone."""
  return frames // 2 + frames % 2


def double(frames):
  """Frames after time was doubled: the first of an odd number stands alone."""
  return 2 * frames - frames % 2


@dataclasses.dataclass(frozen=True)
class Frames:
  """How the frames `[N, T, ...]` of an array lie in their clip.

  Split over a mesh (inside `shard_map`) every device has equally many: the first frame of an odd number has a place in the
  array of every device, but only device 0 has it there; on the others the place holds the frame before, or anything.

  Attributes:
    count: frames of the whole clip.
    chunks: frames of each of the chunks over which normalisation takes its statistics, None: over the whole clip.
    axis_name: of the mesh over which the clip is split, None: the array is the whole clip. devices: along it.
  """

  count: int
  chunks: tuple[int, ...] | None = None
  axis_name: str | None = None
  devices: int = 1

  @property
  def first(self):
    """Whether the first frame stands alone: it is not paired when time is halved, nor doubled."""
    return self.count % 2 == 1

  @property
  def local(self):
    """Frames of the array of one device."""
    return (self.count - self.first) // self.devices + self.first

  def scaled(self, change):
    """After `half` or `double`."""
    chunks = None if self.chunks is None else tuple(map(change, self.chunks))
    return dataclasses.replace(self, count=change(self.count), chunks=chunks)

  def membership(self):
    """(`[T, chunks]`: 1 where a frame of the array belongs to a chunk, `[T]`: 1 where it is the device's own)."""
    chunks = self.chunks or (self.count,)
    belongs, own = np.repeat(np.eye(len(chunks), dtype=np.float32), chunks, axis=0), np.ones(self.local, np.float32)
    if self.axis_name is None:
      return belongs, own
    device, rest = jax.lax.axis_index(self.axis_name), self.local - self.first
    here = jax.lax.dynamic_slice_in_dim(jnp.asarray(belongs[self.first :]), device * rest, rest)
    if not self.first:
      return here, own
    return jnp.concatenate([belongs[:1], here]), jnp.where((jnp.arange(self.local) == 0) & (device > 0), 0.0, own)

  def sum(self, x):
    """The sum over the devices that split the clip."""
    return x if self.axis_name is None else jax.lax.psum(x, self.axis_name)

  def with_past(self, x, count):
    """`x` and in front of it `count` frames of its past, of which there are at least as many on a device; before the clip its
    first frame is repeated."""
    start = jnp.concatenate([jnp.repeat(x[:, :1], count, axis=1), x], axis=1)
    if self.axis_name is None:
      return start
    past = jax.lax.ppermute(x[:, -count:], self.axis_name, [(i, i + 1) for i in range(self.devices - 1)])
    # The frame before goes where device 0 has the first one.
    later = [past[:, :1], past, x[:, 1:]] if self.first else [past, x]
    return jnp.where(jax.lax.axis_index(self.axis_name) == 0, start, jnp.concatenate(later, axis=1))


def conv3d(x, kernel, strides, padding, *_, **__):
  """Convolution of clips `[N, T, H, W, C]` in time and space, as `nn.Conv` asks for it, without dilation and groups.

  On CPUs it is a sum of convolutions of frames, one for each place of the kernel in time: XLA's convolution in three dimensions
  takes 1.3 to 8 times as long there, and 2 to 15 times with gradients (tests/benchmarks/convolution.py, two cores).
  """
  if isinstance(padding, str):
    padding = jax.lax.padtype_to_pads(x.shape[1:-1], kernel.shape[:3], strides, padding)
  return _conv3d(x, kernel, tuple(strides), tuple(map(tuple, padding)))


def _whole(x, kernel, strides, padding):
  return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))


def _frame_by_frame(x, kernel, strides, padding):
  dtype, (x, kernel) = x.dtype, (value.astype(jnp.float32) for value in (x, kernel))  # a sum is rounded once
  x = jnp.pad(x, ((0, 0), padding[0], (0, 0), (0, 0), (0, 0)))
  last = x.shape[1] - len(kernel)
  of_frames = functools.partial(
    jax.lax.conv_general_dilated, window_strides=strides[1:], padding=padding[1:], dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  parts = []
  for i, place in enumerate(kernel):
    frames = x[:, i : i + last + 1 : strides[0]]
    parts.append(of_frames(frames.reshape(-1, *frames.shape[2:]), place))
  return sum(parts).astype(dtype).reshape(*frames.shape[:2], *parts[0].shape[1:])


# Gradients choose for themselves: differentiated, a choice keeps what each of its branches wants to remember.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv3d(x, kernel, *how):
  return _by_platform(lambda conv: lambda *args: conv(*args, *how), x, kernel)


def _conv3d_forward(x, kernel, *how):
  return _conv3d(x, kernel, *how), (x, kernel)


def _conv3d_backward(*args):
  *how, inputs, gradient = args
  return _by_platform(lambda conv: lambda g, *inputs: jax.vjp(lambda *xs: conv(*xs, *how), *inputs)[1](g), gradient, *inputs)


_conv3d.defvjp(_conv3d_forward, _conv3d_backward)


def _by_platform(make, *args):
  """`make(conv)(*args)` with the one of the two that is faster where the program will run."""
  return jax.lax.platform_dependent(*args, cpu=make(_frame_by_frame), default=make(_whole))


Conv3D = functools.partial(nn.Conv, conv_general_dilated=conv3d)


class GroupNorm(nn.Module):
  """Group normalisation in float32 over all of a sample, or over the frames of each of its chunks.

  Sums run over space per channel first and then over the few channels of a group: reshaping [.., C] to [.., groups, C/groups]
  at full resolution is far slower on CPUs.
  """

  groups: int
  dtype: jnp.dtype = jnp.float32
  eps: float = 1e-6

  @nn.compact
  def __call__(self, x, frames=None):
    """`frames`: `Frames` of a clip whose chunks have statistics of their own, or that is split over a mesh."""
    channels = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
    if frames is not None:
      belongs, own = frames.membership()

    def group_mean(values):
      """-> broadcast against `values`, the same for all channels of a group and all frames of a chunk."""
      if frames is None:
        mean = values.mean(tuple(range(1, x.ndim - 1)), keepdims=True)
        return jnp.repeat(mean.reshape(*mean.shape[:-1], self.groups, -1).mean(-1), channels // self.groups, axis=-1)
      of_frames = values.mean((2, 3)).reshape(*x.shape[:2], self.groups, -1).mean(-1)  # [N, T, groups]
      of_chunks = frames.sum(jnp.einsum("ntg,tk,t->nkg", of_frames, belongs, own)) / frames.sum(own @ belongs)[:, None]
      mean = jnp.einsum("nkg,tk->ntg", of_chunks, belongs)
      return jnp.repeat(mean, channels // self.groups, axis=-1)[:, :, None, None]

    x = x.astype(jnp.float32)
    x = x - group_mean(x)
    return (x * (jax.lax.rsqrt(group_mean(x * x) + self.eps) * scale) + bias).astype(self.dtype)


def init_like_torch(shapes, key):
  """Fresh variables of these shapes: kernels and biases U(+-1/sqrt(fan in)), PyTorch's default; norms 1 and 0.

  All values are cut from one draw: the usual key per tensor costs XLA on CPUs a quarter of a minute of compilation.
  """
  shapes = flax.traverse_util.flatten_dict(shapes)
  draw = jax.random.uniform(key, (sum(leaf.size for leaf in shapes.values()),), jnp.float32, -1.0, 1.0)
  values, start = {}, 0
  for path, leaf in shapes.items():
    kernel = shapes.get((*path[:-1], "kernel"))
    if kernel is None:  # a norm
      values[path] = jnp.full(leaf.shape, float(path[-1] == "scale"))
    else:
      fan_in = kernel.size // kernel.shape[-1]
      values[path] = draw[start : start + leaf.size].reshape(leaf.shape) * fan_in**-0.5
    start += leaf.size
  return flax.traverse_util.unflatten_dict(values)
