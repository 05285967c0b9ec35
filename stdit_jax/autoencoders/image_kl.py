"""The KL-f8 image autoencoder of Stable Diffusion and SDXL, frame by frame over videos.

Architecture: Rombach et al. 2022 (latent diffusion), as `diffusers.AutoencoderKL`: residual convolution blocks, four
levels, one attention in the middle, a Gaussian posterior of 4 channels at an eighth of the resolution.

    frames [N,H,W,3] in [-1,1] --Encoder--> moments --> mean, logvar [N,H/8,W/8,4] --sample--> z --Decoder--> [N,H,W,3]

Sides that are no multiple of 8 are floored level by level, as in PyTorch's strided convolutions: 240 x 426 pixels are 30 x 53
latents, which are decoded to 240 x 424 pixels.

Parameter names follow diffusers (interop/image_kl.py). `ImageKL` works on raw latents, `ImageKLCodec` on normalised ones
(latents.py).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from stdit_jax.autoencoders.codec import Codec, Parts, micro_batches, pixels_of
from stdit_jax.autoencoders.family import Autoencoder, AutoencoderConfig
from stdit_jax.autoencoders.frames import in_pieces
from stdit_jax.autoencoders.latents import AnyArray, Moments, denormalise, normalised_posterior, posterior, to_float
from stdit_jax.autoencoders.layers import GroupNorm, block_of


@dataclasses.dataclass(frozen=True)
class ImageKLConfig(AutoencoderConfig):
  """One autoencoder. The field names are those of diffusers' `config.json` where both have the field.

  Attributes:
    shift, scale: diffusers' `shift_factor` or `latents_mean`, and `latents_std`; one number or one per latent channel.
  """

  block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
  layers_per_block: int = 2
  in_channels: int = 3
  out_channels: int = 3
  latent_channels: int = 4
  norm_num_groups: int = 32
  mid_block_add_attention: bool = True
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True
  scaling_factor: float = 0.18215
  shift: float | tuple[float, ...] = 0.0
  scale: float | tuple[float, ...] = 1.0
  remat: bool = False

  def __post_init__(self):
    self.check_groups()
    self.check_latents()

  unit = 1

  def latent_frames(self, num_frames: int) -> int:
    return num_frames

  def frame_starts(self, num_frames: int) -> np.ndarray:
    return np.arange(num_frames + 1)


# Open-Sora 1.2 loads SDXL's weights but scales with 0.18215, so it needs "sd-kl-f8". "sdxl-kl-f8" has SDXL's own factor.
TABLE = {
  "sd-kl-f8": ImageKLConfig(),
  "sdxl-kl-f8": ImageKLConfig(scaling_factor=0.13025),
  "small-kl-f8": ImageKLConfig(block_out_channels=(16, 32, 64, 96), layers_per_block=1, norm_num_groups=2, scaling_factor=1.0),
  "tiny-kl-f8": ImageKLConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4),
}


# ---------------------------------------------------------------------------------------------------------------- layers


def _conv(name, x, features, size=3, stride=1, dtype=None) -> Array:
  """Convolution of [N,H,W,C]. With stride 2 the padding is asymmetric, one row below and one column to the right."""
  before, after = (0, 1) if stride == 2 else (size // 2, size // 2)
  return nn.Conv(features, (size, size), stride, ((before, after), (before, after)), dtype=dtype, name=name)(x)


class ResnetBlock(nn.Module):
  """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1 x 1 convolution of x where the channels change."""

  features: int
  groups: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    h = nn.silu(GroupNorm(self.groups, self.dtype, name="norm1")(x))
    h = _conv("conv1", h, self.features, dtype=self.dtype)
    h = nn.silu(GroupNorm(self.groups, self.dtype, name="norm2")(h))
    h = _conv("conv2", h, self.features, dtype=self.dtype)
    if x.shape[-1] != self.features:
      x = _conv("conv_shortcut", x, self.features, size=1, dtype=self.dtype)
    return x + h


class Attention(nn.Module):
  """One-head self-attention over all H * W positions, softmax in float32, with a residual connection."""

  groups: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    n, height, width, channels = x.shape

    dense = functools.partial(nn.Dense, channels, dtype=self.dtype)
    h = GroupNorm(self.groups, self.dtype, name="group_norm")(x).reshape(n, height * width, channels)
    query, key, value = (dense(name=name)(h) for name in ("to_q", "to_k", "to_v"))
    logits = jnp.einsum("nqc,nkc->nqk", query * channels**-0.5, key, preferred_element_type=jnp.float32)
    h = jnp.einsum("nqk,nkc->nqc", jax.nn.softmax(logits).astype(self.dtype), value)
    return x + dense(name="to_out_0")(h).reshape(x.shape)


class MidBlock(nn.Module):
  config: ImageKLConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    groups, block = self.config.norm_num_groups, block_of(ResnetBlock, self.config.remat)
    x = block(x.shape[-1], groups, self.dtype, name="resnets_0")(x)
    if self.config.mid_block_add_attention:
      x = block_of(Attention, self.config.remat)(groups, self.dtype, name="attentions_0")(x)
    return block(x.shape[-1], groups, self.dtype, name="resnets_1")(x)


class Sampler(nn.Module):
  """Halves both sides by a convolution of stride 2, or repeats pixels to double them before a convolution of stride 1."""

  stride: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    if self.stride == 1:
      x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return _conv("conv", x, x.shape[-1], stride=self.stride, dtype=self.dtype)


class Level(nn.Module):
  """The blocks of one resolution, then the way to the next one (`sampler`: "downsamplers_0", "upsamplers_0" or "")."""

  config: ImageKLConfig
  features: int
  layers: int
  sampler: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    block, groups = block_of(ResnetBlock, self.config.remat), self.config.norm_num_groups
    for i in range(self.layers):
      x = block(self.features, groups, self.dtype, name=f"resnets_{i}")(x)
    if self.sampler:
      x = Sampler(2 if self.sampler == "downsamplers_0" else 1, self.dtype, name=self.sampler)(x)
    return x


class Encoder(nn.Module):
  config: ImageKLConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: AnyArray) -> Array:
    c, levels = self.config, len(self.config.block_out_channels)
    x = _conv("conv_in", x, c.block_out_channels[0], dtype=self.dtype)
    for i, features in enumerate(c.block_out_channels):
      sampler = "downsamplers_0" if i < levels - 1 else ""
      x = Level(c, features, c.layers_per_block, sampler, self.dtype, name=f"down_blocks_{i}")(x)
    x = MidBlock(c, self.dtype, name="mid_block")(x)
    x = nn.silu(GroupNorm(c.norm_num_groups, self.dtype, name="conv_norm_out")(x))
    return _conv("conv_out", x, 2 * c.latent_channels, dtype=self.dtype)


class Decoder(nn.Module):
  config: ImageKLConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, z: AnyArray) -> Array:
    c, levels = self.config, len(self.config.block_out_channels)
    x = _conv("conv_in", z, c.block_out_channels[-1], dtype=self.dtype)
    x = MidBlock(c, self.dtype, name="mid_block")(x)
    for i, features in enumerate(reversed(c.block_out_channels)):
      sampler = "upsamplers_0" if i < levels - 1 else ""
      x = Level(c, features, c.layers_per_block + 1, sampler, self.dtype, name=f"up_blocks_{i}")(x)
    x = nn.silu(GroupNorm(c.norm_num_groups, self.dtype, name="conv_norm_out")(x))
    return _conv("conv_out", x, c.out_channels, dtype=self.dtype)


# ----------------------------------------------------------------------------------------------------------- autoencoder


class ImageKL(nn.Module):
  """The autoencoder: `model.apply(variables, frames, method="encode")`, `method="decode"`, or both in one call.

  Parameters are float32; `dtype` is that of the convolutions (norms, softmax and results are float32).
  """

  config: ImageKLConfig
  dtype: jnp.dtype = jnp.float32

  def setup(self) -> None:
    self.encoder = Encoder(self.config, self.dtype)
    self.decoder = Decoder(self.config, self.dtype)
    latent = self.config.latent_channels
    if self.config.use_quant_conv:
      self.quant_conv = nn.Conv(2 * latent, (1, 1), dtype=self.dtype)
    if self.config.use_post_quant_conv:
      self.post_quant_conv = nn.Conv(latent, (1, 1), dtype=self.dtype)

  def encode(self, x: Float[AnyArray, "..."]) -> Moments:
    """Frames `[N, H, W, 3]` in [-1, 1] -> raw posterior (mean, logvar), float32, h = H // 8 and w = W // 8.

    Raises ValueError for another number of channels, or for sides that are too short for one latent.
    """
    c = self.config
    if x.ndim != 4 or x.shape[-1] != c.in_channels or min(x.shape[1:3]) < c.downsampling:
      raise ValueError(f"encode needs frames [N,H,W,{c.in_channels}] with sides of at least {c.downsampling}, not {x.shape}.")
    moments = self.encoder(x)
    if c.use_quant_conv:
      moments = self.quant_conv(moments)
    return posterior(moments)

  def decode(self, z: Float[AnyArray, "..."]) -> Float[Array, "N H W 3"]:
    """Raw latents `[N, h, w, C]` -> pixels, float32 `[N, 8h, 8w, 3]`, about [-1, 1], not clipped."""
    if z.ndim != 4 or z.shape[-1] != self.config.latent_channels:
      raise ValueError(f"decode needs latents [N,h,w,{self.config.latent_channels}], not {z.shape}.")
    if self.config.use_post_quant_conv:
      z = self.post_quant_conv(z)
    return self.decoder(z).astype(jnp.float32)

  def __call__(self, x: AnyArray) -> tuple[Array, Array, Array]:
    """-> (reconstruction from the mean, mean, logvar)."""
    mean, logvar = self.encode(x)
    return self.decode(mean), mean, logvar


def encode_frames(model: Any, variables: dict, frames: AnyArray) -> Moments:
  """Frames `[N, H, W, 3]` -> normalised (mean, std) `[N, h, w, C]`."""
  return normalised_posterior(model.config, *model.apply(variables, to_float(frames), method="encode"))


def decode_frames(model: Any, variables: dict, latents: AnyArray, *, as_uint8: bool) -> AnyArray:
  """Normalised latents `[N, h, w, C]` -> pixels `[N, 8h, 8w, 3]`."""
  return pixels_of(model.apply(variables, denormalise(model.config, latents), method="decode"), as_uint8)


class ImageKLCodec(Codec):
  """A piece is a micro batch of frames."""

  def encode_parts(self, frames: np.ndarray) -> Parts:
    for part in micro_batches(frames, self._frames_at_a_time(len(frames))):
      yield self._call(encode_frames, self._spread(part))

  def decode_parts(self, latents: np.ndarray, num_frames: int) -> Parts:
    for part in micro_batches(latents, self._frames_at_a_time(num_frames)):
      yield self._call(decode_frames, self._spread(part), as_uint8=self.as_uint8)


class _ImageKL(Autoencoder):
  kind, table, config, model, codec = "image autoencoder", TABLE, ImageKLConfig, ImageKL, ImageKLCodec
  layouts = ("diffusers", "ldm", "native")
  last_layer = ("decoder", "conv_out")

  def example_shape(self, config):
    return super().example_shape(config)[1:]

  def encode_clips(self, model, variables, clips, frames):
    moments = in_pieces(lambda part: encode_frames(model, variables, part), clips.reshape(-1, *clips.shape[2:]), frames)
    return tuple(m.reshape(*clips.shape[:2], *m.shape[1:]) for m in moments)

  def encode(self, model, params, clips, image_noise=None, layout=None):
    moments = model.apply({"params": params}, clips.reshape(-1, *clips.shape[2:]), method="encode")
    return *(m.reshape(*clips.shape[:2], *m.shape[1:]) for m in moments), None

  def decode(self, model, params, frame_latents, layout=None):
    pixels = model.apply({"params": params}, frame_latents.reshape(-1, *frame_latents.shape[2:]), method="decode")
    return pixels.reshape(*frame_latents.shape[:2], *pixels.shape[1:])


FAMILY = _ImageKL()
get_config, build, init_shapes, init = FAMILY.get_config, FAMILY.build, FAMILY.init_shapes, FAMILY.init
