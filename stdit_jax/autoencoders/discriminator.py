"""A discriminator of clips that scores patches, for the adversarial term of autoencoders.

PatchGAN (Isola et al. 2017, arXiv 1611.07004, section 3.2) with a third dimension, as TATS (Ge et al. 2022) and MAGVIT train
video autoencoders: strided convolutions of 4 x 4 pixels, leaky ReLUs of slope 0.2, channels that double up to a factor of
eight. Convolutions see 3 frames and halve time; an image is a clip of one frame. Group normalisation replaces batch
normalisation, so there is no state and no value depends on the rest of the batch.

Losses: hinge loss (Lim and Ye 2017). VQGAN's weight (Esser et al. 2021, arXiv 2012.09841, eq. 7) scales the generator's loss.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from stdit_jax import fields
from stdit_jax.autoencoders.latents import AnyArray
from stdit_jax.autoencoders.layers import Conv3D, GroupNorm
from stdit_jax.parallel.shardings import Layout, constrain

_MOST = 8  # largest number of features, relative to the first layer
# Mesh axes of clips and activations. The autoencoder splits clips in time, the discriminator splits their height: devices can
# share the rows of a crop evenly, but not 8k + 1 frames. Each device needs a row after the last layer. XLA exchanges the rows
# that convolutions need. Decoded clips need one all-to-all of pixels, which is small beside the activations.
_AXES = ("batch", None, "tokens")


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
  """Sizes."""

  features: int = 64  # channels after the first layer
  layers: int = 3  # number of layers that halve the sides
  groups: int = 8  # of the norms

  def __post_init__(self):
    if min(self.features, self.layers, self.groups) < 1 or 2 * self.features % self.groups:
      raise ValueError(
        f"DiscriminatorConfig: features={self.features}, layers={self.layers}, groups={self.groups}; allowed: numbers of at "
        "least 1, where groups divides 2 * features"
      )


def get_config(values: Any) -> DiscriminatorConfig:
  """The configuration with these fields. Raises ValueError with the allowed ones."""
  return fields.replace(DiscriminatorConfig(), values, "config: autoencoder.discriminator")


class Discriminator(nn.Module):
  """Clips in [-1, 1] -> one score per patch, above 0 for real clips.

  Attributes:
    layout: how clips and activations lie on the mesh; None: XLA decides.
  """

  config: DiscriminatorConfig
  dtype: jnp.dtype = jnp.float32
  layout: Layout | None = None

  @nn.compact
  def __call__(self, x: Float[AnyArray, "N T H W 3"]) -> Float[Array, "N t h w"]:
    c = self.config

    def conv(name, x, features, stride, bias=True):
      sides = ((1, 1), (1, 2), (1, 2)) if stride == 1 else ((1, 1), (1, 1), (1, 1))
      x = Conv3D(features, (3, 4, 4), (stride,) * 3, sides, use_bias=bias, dtype=self.dtype, name=name)(x)
      return constrain(x, self.layout, *_AXES)

    x = nn.leaky_relu(conv("conv_0", constrain(x, self.layout, *_AXES), c.features, 2), 0.2)
    for i in range(1, c.layers + 1):
      x = conv(f"conv_{i}", x, c.features * min(2**i, _MOST), 2 if i < c.layers else 1, bias=False)
      x = nn.leaky_relu(GroupNorm(c.groups, self.dtype, 1e-5, name=f"norm_{i}")(x), 0.2)
    return conv("conv_out", x, 1, 1)[..., 0].astype(jnp.float32)


def init(model: Discriminator, key: Array) -> dict:
  """Fresh parameters: kernels N(0, 0.02), biases 0, norms 1 and 0 (pix2pix)."""
  shapes = jax.eval_shape(model.init, key, jnp.zeros((1, 1, 16, 16, 3)))["params"]
  leaves: dict[Any, Any] = flatten_dict(shapes)
  draw, start = jax.random.normal(key, (sum(leaf.size for leaf in leaves.values()),)) * 0.02, 0
  for path, leaf in leaves.items():
    if path[-1] == "kernel":
      leaves[path] = draw[start : start + leaf.size].reshape(leaf.shape)
      start += leaf.size
    else:
      leaves[path] = jnp.full(leaf.shape, float(path[-1] == "scale"))
  return unflatten_dict(leaves)


def _mean(x):
  return x.mean(tuple(range(1, x.ndim)))


def hinge_loss(real: Any, fake: Any) -> Array:
  """Loss of the discriminator per sample `[N]`, from its scores of real and decoded clips."""
  return 0.5 * (_mean(nn.relu(1 - real)) + _mean(nn.relu(1 + fake)))


def generator_loss(fake: Any) -> Array:
  """Loss of the autoencoder per sample `[N]`."""
  return -_mean(fake)


def adaptive_weight(reconstruction_gradient: Any, adversarial_gradient: Any) -> Array:
  """The weight that makes the gradients of both terms equally long: |g_rec| / (|g_adv| + 1e-4), at most 10,000.

  The arguments are trees, the gradients of the terms with respect to the decoder's last layer.
  """
  norm = lambda tree: jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))  # noqa: E731
  return jnp.clip(norm(reconstruction_gradient) / (norm(adversarial_gradient) + 1e-4), 0.0, 1e4)
