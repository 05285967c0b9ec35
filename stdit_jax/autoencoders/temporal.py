"""Open-Sora 1.2's video autoencoder: the image autoencoder frame by frame, then a causal one in time.

Open-Sora v1.2.0, `models/vae/vae_temporal.py` and `vae.py`. Four frames of 8 x 8 pixels are one latent of 4 channels:

    clip [N,T,H,W,3] --image autoencoder--> latents [N,T,h,w,4] --temporal, 17 frames at a time--> [N,T',h,w,4]

Chunks of 17 frames give 5 latents and know nothing of each other; norms take their statistics over one chunk. What is left
over is padded in front, with zeros, to a multiple of 4, and so many frames of what is decoded are dropped. Convolutions in time
see the past only, with zeros before the chunk.

The image latents in between are scaled by 0.18215 although they are SDXL's, as the original does; it trained in that space.
"""

import dataclasses
import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from stdit_jax import fields
from stdit_jax.autoencoders import image_kl
from stdit_jax.autoencoders.layers import Conv3D, GroupNorm, block_of, check_latents, init_like_torch

CHUNK = 17
FIRST_LOGVAR = -8.0  # of an autoencoder with a shortcut


@dataclasses.dataclass(frozen=True)
class TemporalConfig:
  """One video autoencoder.

  Attributes:
    image: its image autoencoder, a name of `image_kl.TABLE`.
    latent_channels: of the image latents and of its own; filters: channels of the first level.
    channel_multipliers: of the levels; temporal_downsample: whether time is halved after a level.
    chunk: frames that are encoded together, 0: the whole clip.
    shortcut: two linear maps beside the network, of the frames of a latent to its mean and back, which begin as the average
      and its repetition: the network learns what these leave over (residual autoencoding: DC-AE, Chen et al. 2024, section
      3.2, there without weights). The original has none: its code could not read what is exported, names of ours among its own.
    remat: whether the backward pass keeps of a block what it gives, and computes the rest again.
    shift, scale: one number or one per channel: what denoisers see is (z - shift) / scale.
  """

  image: str = "sd-kl-f8"
  latent_channels: int = 4
  filters: int = 128
  num_res_blocks: int = 4
  channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
  temporal_downsample: tuple[bool, ...] = (False, True, True)
  num_groups: int = 32
  chunk: int = CHUNK
  shortcut: bool = False
  remat: bool = False
  shift: float | tuple[float, ...] = (-0.10, 0.34, 0.27, 0.98)
  scale: float | tuple[float, ...] = (3.85, 2.32, 2.33, 3.06)
  scaling_factor = 1.0

  def __post_init__(self):
    image_kl.get_config(self.image)
    levels = len(self.channel_multipliers)
    if len(self.temporal_downsample) != levels - 1:
      raise ValueError(f"TemporalConfig: temporal_downsample needs {levels - 1} values, one less than channel_multipliers")
    for multiplier in self.channel_multipliers:
      if self.num_groups < 1 or self.filters * multiplier % self.num_groups:
        raise ValueError(
          f"TemporalConfig: {self.filters} filters times {multiplier} do not divide by num_groups={self.num_groups}"
        )
    if self.latent_channels != self.image_config.latent_channels:
      raise ValueError(
        f"TemporalConfig: latent_channels is {self.latent_channels}; those of the image autoencoder {self.image!r} are "
        f"{self.image_config.latent_channels}"
      )
    if self.chunk < 0:
      raise ValueError(f"TemporalConfig: chunk is {self.chunk}; allowed: frames of a chunk, or 0 for the whole clip")
    check_latents(self)

  @property
  def image_config(self):
    return image_kl.get_config(self.image, remat=self.remat)

  @property
  def downsampling(self):
    """Pixels per latent along a side."""
    return self.image_config.downsampling

  @property
  def factor(self):
    """Frames per latent frame."""
    return 2 ** sum(self.temporal_downsample)

  def latent_size(self, height, width):
    """(height, width) of the latents of a picture of this size in pixels."""
    return self.image_config.latent_size(height, width)

  def latent_frames(self, num_frames):
    """Latent frames of a clip (`VideoAutoencoderPipeline.get_latent_size`)."""
    chunks, rest = divmod(num_frames, self.chunk) if self.chunk else (0, num_frames)
    return chunks * -(-self.chunk // self.factor) + -(-rest // self.factor)

  @property
  def group(self):
    """Latent frames of a chunk: those of any chunk lie in time as the first ones of a clip do."""
    return self.latent_frames(self.chunk) if self.chunk else 1

  def keeps(self, num_frames):
    """Whether a clip of so many frames comes back as long as it was: here always."""
    return True

  def frame_starts(self, num_frames):
    """Where each latent frame of a clip begins, and the last one ends, int `[T' + 1]`; the first of a chunk is shorter."""
    size, starts = self.chunk or num_frames, []
    for begin in range(0, num_frames, size):
      count = min(size, num_frames - begin)
      starts += [max(begin, begin + i) for i in range(-(-count % self.factor), count, self.factor)]
    return np.asarray([*starts, num_frames])


TABLE = {
  "open-sora-1.2": TemporalConfig(),
  # Small enough to train on two cores: configs/film_video_autoencoder.py.
  "small-temporal": TemporalConfig(
    image="small-kl-f8", filters=24, num_res_blocks=1, channel_multipliers=(1, 1, 2, 2), num_groups=4, shift=0.0, scale=1.0
  ),
  "tiny-temporal": TemporalConfig(image="tiny-kl-f8", filters=8, num_res_blocks=1, num_groups=4),
}


def get_config(name, **overrides):
  """The named configuration with some fields replaced; ValueError names the allowed ones."""
  return fields.replace(fields.choose(TABLE, name, "video autoencoder"), overrides, f"video autoencoder {name}")


class CausalConv(nn.Module):
  """Convolution over time and space, `stride` in time, that sees the present and the past; zeros stand before the clip."""

  features: int
  size: int = 3
  stride: int = 1
  bias: bool = True
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    side = self.size // 2
    padding = ((self.size - self.stride if self.size > 1 else 0, 0), (side, side), (side, side))
    size, strides = (self.size,) * 3, (self.stride, 1, 1)
    return Conv3D(self.features, size, strides, padding, use_bias=self.bias, dtype=self.dtype, name="conv")(x)


class ResBlock(nn.Module):
  """x + conv(silu(norm(conv(silu(norm(x)))))), with a linear function of x where the channels change."""

  features: int
  groups: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    norm = functools.partial(GroupNorm, self.groups, self.dtype, 1e-5)
    conv = functools.partial(CausalConv, self.features, bias=False, dtype=self.dtype)
    h = conv(name="conv1")(nn.silu(norm(name="norm1")(x)))
    h = conv(name="conv2")(nn.silu(norm(name="norm2")(h)))
    if x.shape[-1] != self.features:
      x = conv(1, name="conv3")(x)
    return x + h


class Encoder(nn.Module):
  config: TemporalConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    c, block = self.config, block_of(ResBlock, self.config.remat)
    x = CausalConv(c.filters, bias=False, dtype=self.dtype, name="conv_in")(x)
    for level, multiplier in enumerate(c.channel_multipliers):
      for i in range(c.num_res_blocks):
        x = block(c.filters * multiplier, c.num_groups, self.dtype, name=f"block_res_blocks_{level}_{i}")(x)
      if level < len(c.temporal_downsample) and c.temporal_downsample[level]:
        x = CausalConv(x.shape[-1], stride=2, dtype=self.dtype, name=f"conv_blocks_{level}")(x)
    for i in range(c.num_res_blocks):
      x = block(x.shape[-1], c.num_groups, self.dtype, name=f"res_blocks_{i}")(x)
    x = nn.silu(GroupNorm(c.num_groups, self.dtype, 1e-5, name="norm1")(x))
    return CausalConv(2 * c.latent_channels, 1, dtype=self.dtype, name="conv2")(x)


class Decoder(nn.Module):
  config: TemporalConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, z):
    c, levels, block = self.config, list(enumerate(self.config.channel_multipliers)), block_of(ResBlock, self.config.remat)
    x = CausalConv(c.filters * c.channel_multipliers[-1], dtype=self.dtype, name="conv1")(z)
    for i in range(c.num_res_blocks):
      x = block(x.shape[-1], c.num_groups, self.dtype, name=f"res_blocks_{i}")(x)
    for level, multiplier in reversed(levels):
      for i in range(c.num_res_blocks):
        x = block(c.filters * multiplier, c.num_groups, self.dtype, name=f"block_res_blocks_{level}_{i}")(x)
      if level and c.temporal_downsample[level - 1]:
        x = CausalConv(2 * x.shape[-1], dtype=self.dtype, name=f"conv_blocks_{level - 1}")(x)
        x = einops.rearrange(x, "n t h w (c s) -> n (t s) h w c", s=2)
    x = nn.silu(GroupNorm(c.num_groups, self.dtype, 1e-5, name="norm1")(x))
    return CausalConv(c.latent_channels, dtype=self.dtype, name="conv_out")(x)


class Temporal(nn.Module):
  """The causal autoencoder in time, of one chunk of image latents."""

  config: TemporalConfig
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    self.encoder, self.decoder = Encoder(self.config, self.dtype), Decoder(self.config, self.dtype)
    self.quant_conv = CausalConv(2 * self.config.latent_channels, 1, dtype=self.dtype)
    self.post_quant_conv = CausalConv(self.config.latent_channels, 1, dtype=self.dtype)
    if self.config.shortcut:
      self.shortcut_encoder = nn.Dense(self.config.latent_channels, use_bias=False, dtype=jnp.float32)
      self.shortcut_decoder = nn.Dense(self.config.factor * self.config.latent_channels, use_bias=False, dtype=jnp.float32)

  def encode(self, x):
    """Image latents `[N, T, h, w, C]` -> posterior (mean, logvar), float32 `[N, ceil(T / 4), h, w, C]`; logvar is clipped to
    [-30, 20]."""
    front = (0, 0), (-x.shape[1] % self.config.factor, 0), (0, 0), (0, 0), (0, 0)
    mean, logvar = jnp.split(self.quant_conv(self.encoder(jnp.pad(x, front))).astype(jnp.float32), 2, axis=-1)
    if self.config.shortcut:
      groups = einops.rearrange(jnp.pad(x, front, "edge"), "n (t s) h w c -> n t h w (s c)", s=self.config.factor)
      mean += self.shortcut_encoder(groups)
    return mean, jnp.clip(logvar, -30.0, 20.0)

  def decode(self, z, num_frames):
    """Latents `[N, T', h, w, C]` -> image latents, float32 `[N, num_frames, h, w, C]`."""
    x = self.decoder(self.post_quant_conv(z)).astype(jnp.float32)
    if self.config.shortcut:
      x += einops.rearrange(self.shortcut_decoder(z), "n t h w (s c) -> n (t s) h w c", s=self.config.factor)
    return x[:, -num_frames % self.config.factor :]


class VideoAutoencoder(nn.Module):
  """The two together: `model.apply(variables, clip, method="encode")`, `method="decode"`, or both in one call.

  Parameters are float32; `dtype` is that of the convolutions (norms and results are float32).
  """

  config: TemporalConfig
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    self.image = image_kl.ImageKL(self.config.image_config, self.dtype)
    self.temporal = Temporal(self.config, self.dtype)

  def encode(self, x, image_noise=None):
    """Clips `[N, T, H, W, 3]` in [-1, 1] -> raw posterior (mean, logvar), float32 `[N, T', h, w, C]`.

    `image_noise` `[N, T, h, w, C]`: the image latents are drawn with it, as the original draws them; None: their means.
    """
    return self.encode_latents(self.image_latents(x, image_noise))

  def image_latents(self, x, noise=None):
    """Clips -> image latents `[N, T, h, w, C]`, scaled as the temporal autoencoder takes them."""
    mean, logvar = (m.reshape(*x.shape[:2], *m.shape[1:]) for m in self.image.encode(x.reshape(-1, *x.shape[2:])))
    z = mean if noise is None else mean + jnp.exp(0.5 * logvar) * noise
    return z * self.config.image_config.scaling_factor

  def encode_latents(self, x):
    """Image latents `[N, T, h, w, C]` -> raw posterior (mean, logvar) `[N, T', h, w, C]`, chunk by chunk."""
    return _in_chunks(self.temporal.encode, x, self.config.chunk)

  def decode_latents(self, z, num_frames):
    """Latents `[N, T', h, w, C]` -> image latents `[N, num_frames, h, w, C]`, chunk by chunk."""
    c = self.config
    if not c.chunk:
      return self.temporal.decode(z, num_frames)
    whole, rest = divmod(num_frames, c.chunk)
    length = c.latent_frames(c.chunk)
    parts = []
    if whole:
      parts.append(_in_chunks(lambda z: self.temporal.decode(z, c.chunk), z[:, : whole * length], length))
    if rest:
      parts.append(self.temporal.decode(z[:, whole * length :], rest))
    return jnp.concatenate(parts, axis=1)

  def decode(self, z, num_frames):
    """Raw latents `[N, T', h, w, C]` -> pixels, float32 `[N, num_frames, 8h, 8w, 3]`, about [-1, 1], not clipped."""
    return self.pixels(self.decode_latents(z, num_frames))

  def pixels(self, x):
    """Image latents `[N, T, h, w, C]` -> pixels `[N, T, 8h, 8w, 3]`."""
    pixels = self.image.decode(x.reshape(-1, *x.shape[2:]) / self.config.image_config.scaling_factor)
    return pixels.reshape(*x.shape[:2], *pixels.shape[1:])

  def __call__(self, x, noise=None, image_noise=None):
    """-> (reconstruction, mean, logvar) from mean + std * noise, from the mean alone without noise."""
    mean, logvar = self.encode(x, image_noise)
    z = mean if noise is None else mean + jnp.exp(0.5 * logvar) * noise
    return self.decode(z, x.shape[1]), mean, logvar


def _in_chunks(function, x, chunk):
  """`function` of every `chunk` frames, all whole chunks as one batch, and of what is left over; joined in time."""
  whole, rest = divmod(x.shape[1], chunk) if chunk else (0, x.shape[1])
  parts = []
  if whole:
    batch = einops.rearrange(x[:, : whole * chunk], "n (k t) h w c -> (n k) t h w c", k=whole)
    together = lambda y: einops.rearrange(y, "(n k) t h w c -> n (k t) h w c", k=whole)  # noqa: E731
    parts.append(jax.tree.map(together, function(batch)))
  if rest:
    parts.append(function(x[:, x.shape[1] - rest :]))
  return jax.tree.map(lambda *of_parts: jnp.concatenate(of_parts, axis=1), *parts)


@functools.cache
def init_shapes(config):
  """The tree of `init` as shapes: nothing is allocated. Made once per configuration, so not to be changed."""
  side = 2 * config.downsampling
  return jax.eval_shape(VideoAutoencoder(config).init, jax.random.key(0), jnp.zeros((1, 1, side, side, 3)))


def build(config, dtype=jnp.float32):
  """The model of a configuration."""
  return VideoAutoencoder(config, dtype)


def init(model, key):
  """Fresh variables {"params": ...}, as the original starts; beside a shortcut the network's last layers start at zero."""
  variables = init_like_torch(init_shapes(model.config), key)
  if model.config.shortcut:
    own, same = variables["params"]["temporal"], jnp.eye(model.config.latent_channels)
    own["shortcut_encoder"]["kernel"] = jnp.tile(same, (model.config.factor, 1)) / model.config.factor
    own["shortcut_decoder"]["kernel"] = jnp.tile(same, (1, model.config.factor))
    for last in (own["quant_conv"]["conv"], own["decoder"]["conv_out"]["conv"]):
      last.update(jax.tree.map(jnp.zeros_like, last))
    # Of variances of 1 nothing could be decoded.
    own["quant_conv"]["conv"]["bias"] = jnp.repeat(jnp.asarray([0.0, FIRST_LOGVAR]), model.config.latent_channels)
  return variables
