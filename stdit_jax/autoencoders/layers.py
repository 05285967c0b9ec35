"""Layers that several autoencoders share, over images `[N, H, W, C]` and clips `[N, T, H, W, C]`."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from stdit_jax.autoencoders.frames import Frames


def block_of(cls: type, remat: bool, static: tuple[int, ...] = ()) -> type:
  """The class of a block, or the same block recomputed in the backward pass.

  Args:
    static: positions of the arguments of its call that are no arrays; the module itself is at 0.
  """
  return nn.remat(cls, static_argnums=static) if remat else cls


def conv3d(
  x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: str | Sequence[tuple[int, int]], *_, **__
) -> jax.Array:
  """Convolution of clips `[N, T, H, W, C]` in time and space, for `nn.Conv`, without dilation and groups.

  On CPUs it is a sum of convolutions of frames, one for each place of the kernel in time. XLA's convolution in three dimensions
  takes 1.3 to 8 times as long there, and 2 to 15 times with gradients (measured: tests/benchmarks/convolution.py, two cores).
  """
  if isinstance(padding, str):
    padding = jax.lax.padtype_to_pads(x.shape[1:-1], kernel.shape[:3], strides, padding)
  return _conv3d(x, kernel, tuple(strides), tuple(map(tuple, padding)))


def _whole(x, kernel, strides, padding):
  return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))


def _frame_by_frame(x, kernel, strides, padding):
  dtype, (x, kernel) = x.dtype, (value.astype(jnp.float32) for value in (x, kernel))  # round only the sum
  if any(padding[0]):
    x = jnp.pad(x, ((0, 0), padding[0], (0, 0), (0, 0), (0, 0)))
  last = x.shape[1] - len(kernel)
  of_frames = functools.partial(
    jax.lax.conv_general_dilated, window_strides=strides[1:], padding=padding[1:], dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  parts = []
  for i, place in enumerate(kernel):
    frames = x[:, i : i + last + 1 : strides[0]]
    parts.append(of_frames(frames.reshape(-1, *frames.shape[2:]), place))
  return functools.reduce(jnp.add, parts).astype(dtype).reshape(*frames.shape[:2], *parts[0].shape[1:])


# The backward pass chooses the convolution again: the derivative of a choice would store the residuals of both branches.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv3d(x, kernel, *how):
  return _by_platform(lambda conv: lambda *args: conv(*args, *how), x, kernel)


def _conv3d_forward(x, kernel, *how):
  return _conv3d(x, kernel, *how), (x, kernel)


def _conv3d_backward(*args):
  *how, inputs, gradient = args

  def gradients_of(conv):
    def gradients(gradient, *inputs):
      _, pull_back = jax.vjp(lambda *xs: conv(*xs, *how), *inputs)
      return pull_back(gradient)

    return gradients

  return _by_platform(gradients_of, gradient, *inputs)


_conv3d.defvjp(_conv3d_forward, _conv3d_backward)


def _by_platform(make, *args):
  """`make(conv)(*args)` with the faster convolution on the platform of the program."""
  return jax.lax.platform_dependent(*args, cpu=make(_frame_by_frame), default=make(_whole))


Conv3D = functools.partial(nn.Conv, conv_general_dilated=conv3d)


class GroupNorm(nn.Module):
  """Group normalisation in float32 over all of a sample, or over the frames of each of its chunks.

  Sums run first over space per channel and then over the few channels of a group. Reshaping [.., C] to [.., groups, C/groups]
  at full resolution is far slower on CPUs.
  """

  groups: int
  dtype: jnp.dtype = jnp.float32
  eps: float = 1e-6

  @nn.compact
  def __call__(self, x: jax.Array, frames: Frames | None = None) -> jax.Array:
    """`frames`: `frames.Frames` of a clip that is split over a mesh, or whose chunks have separate statistics."""
    channels = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
    membership: Any = None if frames is None else frames.membership()

    def group_mean(values):
      """The mean over each group, and over each chunk, in a shape that broadcasts against `values`."""
      if frames is None:
        mean = values.mean(tuple(range(1, x.ndim - 1)), keepdims=True)
        return jnp.repeat(mean.reshape(*mean.shape[:-1], self.groups, -1).mean(-1), channels // self.groups, axis=-1)
      belongs, own = membership  # [T, chunks], [T]
      of_frames = values.mean((2, 3)).reshape(*x.shape[:2], self.groups, -1).mean(-1)  # [N, T, groups]
      of_chunks = frames.sum(jnp.einsum("ntg,tk,t->nkg", of_frames, belongs, own)) / frames.sum(own @ belongs)[:, None]
      mean = jnp.einsum("nkg,tk->ntg", of_chunks, belongs)  # of the chunk of each frame
      return jnp.repeat(mean, channels // self.groups, axis=-1)[:, :, None, None]

    x = x.astype(jnp.float32)
    x = x - group_mean(x)
    return (x * (jax.lax.rsqrt(group_mean(x * x) + self.eps) * scale) + bias).astype(self.dtype)


def init_like_torch(shapes: Any, key: jax.Array) -> dict:
  """Fresh variables of these shapes: kernels and biases U(+-1/sqrt(fan in)), as PyTorch's default; norms 1 and 0.

  All values come from one draw. One key per tensor would take XLA on CPUs a quarter of a minute to compile.
  """
  leaves: dict[Any, Any] = flatten_dict(shapes)
  draw = jax.random.uniform(key, (sum(leaf.size for leaf in leaves.values()),), jnp.float32, -1.0, 1.0)
  values, start = {}, 0
  for path, leaf in leaves.items():
    kernel = leaves.get((*path[:-1], "kernel"))
    if kernel is None:  # a norm
      values[path] = jnp.full(leaf.shape, float(path[-1] == "scale"))
    else:
      fan_in = kernel.size // kernel.shape[-1]
      values[path] = draw[start : start + leaf.size].reshape(leaf.shape) * fan_in**-0.5
    start += leaf.size
  return unflatten_dict(values)
