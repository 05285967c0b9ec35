"""Open-Sora 1.2's video autoencoder: the image autoencoder frame by frame, then a causal one in time.

Open-Sora v1.2.0, `models/vae/vae_temporal.py` and `vae.py`. Four frames of 8 x 8 pixels are one latent of 4 channels:

    clip [N,T,H,W,3] --image autoencoder--> image latents [N,T,h,w,4] --in time, 17 frames at a time--> [N,T',h,w,4]

Chunks of 17 frames give 5 latents and are independent, also in the statistics of norms. The last chunk of a clip may be
shorter. The encoder pads a chunk in front with zeros to a multiple of 4 frames, and the decoder drops as many frames.
Convolutions in time see only the past, with zeros before the chunk. Image latents are SDXL's, but with SD's factor 0.18215.
"""

import dataclasses
import functools
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from stdit_jax.autoencoders import image_kl
from stdit_jax.autoencoders.codec import Codec, Parts, filled, join, micro_batches, pixels_of
from stdit_jax.autoencoders.family import Autoencoder, AutoencoderConfig
from stdit_jax.autoencoders.frames import in_chunks, in_pieces
from stdit_jax.autoencoders.latents import AnyArray, Moments, denormalise, draw, normalised_posterior, posterior, to_float
from stdit_jax.autoencoders.layers import Conv3D, GroupNorm, block_of

FIRST_LOGVAR = -8.0  # initial log-variance of an autoencoder with a shortcut


@dataclasses.dataclass(frozen=True)
class TemporalConfig(AutoencoderConfig):
  """One video autoencoder.

  Attributes:
    image: its image autoencoder, a name of `image_kl.TABLE`.
    latent_channels: of the image latents and of its own.
    filters: channels of the first level; channel_multipliers: of all levels, relative to it.
    temporal_downsample: for each level but the last, whether time is halved after it.
    chunk: frames that are encoded together, 0: the whole clip.
    shortcut: adds a linear map beside the encoder and one beside the decoder. They start as the average of the frames of a
      latent, and as its repetition, so that the network learns the residual (DC-AE, Chen et al. 2024, section 3.2; DC-AE's
      shortcut has no parameters). The original has no shortcut, so it cannot load weights trained with one.
  """

  image: str = "sd-kl-f8"
  latent_channels: int = 4
  filters: int = 128
  num_res_blocks: int = 4
  channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
  temporal_downsample: tuple[bool, ...] = (False, True, True)
  num_groups: int = 32
  chunk: int = 17
  shortcut: bool = False
  remat: bool = False
  shift: float | tuple[float, ...] = (-0.10, 0.34, 0.27, 0.98)
  scale: float | tuple[float, ...] = (3.85, 2.32, 2.33, 3.06)
  scaling_factor = 1.0

  def __post_init__(self):
    channels, halvings = self.image_config.latent_channels, len(self.channel_multipliers) - 1
    text = f"temporal_downsample needs {halvings} values, one less than channel_multipliers"
    self.require(len(self.temporal_downsample) == halvings, text)
    for multiplier in self.channel_multipliers:
      text = f"channels (filters={self.filters} times {multiplier}) must be a multiple of num_groups={self.num_groups}"
      self.require(self.num_groups > 0 and self.filters * multiplier % self.num_groups == 0, text)
    text = f"latent_channels is {self.latent_channels}; those of the image autoencoder {self.image!r} are {channels}"
    self.require(self.latent_channels == channels, text)
    self.require(self.chunk >= 0, f"chunk is {self.chunk}; allowed: frames of a chunk, or 0 for the whole clip")
    self.check_latents()

  @property
  def image_config(self) -> image_kl.ImageKLConfig:
    return image_kl.get_config(self.image, remat=self.remat)

  @property
  def downsampling(self) -> int:
    return self.image_config.downsampling

  @property
  def factor(self) -> int:
    """Frames per latent frame."""
    return 2 ** sum(self.temporal_downsample)

  def latent_frames(self, num_frames: int) -> int:
    chunks, rest = divmod(num_frames, self.chunk) if self.chunk else (0, num_frames)
    return chunks * -(-self.chunk // self.factor) + -(-rest // self.factor)

  @property
  def unit(self) -> int:
    return self.chunk

  @property
  def group(self) -> int:
    return self.latent_frames(self.chunk) if self.chunk else 1

  def frame_starts(self, num_frames: int) -> np.ndarray:
    size, starts = self.chunk or num_frames, []
    for begin in range(0, num_frames, size):
      end = min(begin + size, num_frames)
      padding = (begin - end) % self.factor  # zeros in front of the chunk, so its first latent has fewer frames
      starts += [begin, *range(begin + self.factor - padding, end, self.factor)]
    return np.asarray([*starts, num_frames])


TABLE = {
  "open-sora-1.2": TemporalConfig(),
  # Small enough to train on two cores: configs/film_video_autoencoder.py.
  "small-temporal": TemporalConfig(
    image="small-kl-f8", filters=24, num_res_blocks=1, channel_multipliers=(1, 1, 2, 2), num_groups=4, shift=0.0, scale=1.0
  ),
  "tiny-temporal": TemporalConfig(image="tiny-kl-f8", filters=8, num_res_blocks=1, num_groups=4),
}


class CausalConv(nn.Module):
  """Convolution over time and space that sees no future frames, with `stride` in time and zeros before the clip."""

  features: int
  size: int = 3
  stride: int = 1
  bias: bool = True
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: AnyArray) -> Array:
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
  def __call__(self, x: Array) -> Array:
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
  def __call__(self, x: Array) -> Array:
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
  def __call__(self, z: Array) -> Array:
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

  def setup(self) -> None:
    self.encoder, self.decoder = Encoder(self.config, self.dtype), Decoder(self.config, self.dtype)
    self.quant_conv = CausalConv(2 * self.config.latent_channels, 1, dtype=self.dtype)
    self.post_quant_conv = CausalConv(self.config.latent_channels, 1, dtype=self.dtype)
    if self.config.shortcut:
      self.shortcut_encoder = nn.Dense(self.config.latent_channels, use_bias=False, dtype=jnp.float32)
      self.shortcut_decoder = nn.Dense(self.config.factor * self.config.latent_channels, use_bias=False, dtype=jnp.float32)

  def encode(self, x: Float[AnyArray, "N T h w C"]) -> Moments:
    """Image latents of one chunk -> posterior (mean, logvar), float32, t = ceil(T / 4)."""
    front = (0, 0), (-x.shape[1] % self.config.factor, 0), (0, 0), (0, 0), (0, 0)
    mean, logvar = posterior(self.quant_conv(self.encoder(jnp.pad(x, front))))
    if self.config.shortcut:
      groups = einops.rearrange(jnp.pad(x, front, "edge"), "n (t s) h w c -> n t h w (s c)", s=self.config.factor)
      mean += self.shortcut_encoder(groups)
    return mean, logvar

  def decode(self, z: Float[AnyArray, "N t h w C"], num_frames: int) -> Float[Array, "N T h w C"]:
    """Latents of one chunk -> its `num_frames` image latents, float32."""
    x = self.decoder(self.post_quant_conv(z)).astype(jnp.float32)
    if self.config.shortcut:
      x += einops.rearrange(self.shortcut_decoder(z), "n t h w (s c) -> n (t s) h w c", s=self.config.factor)
    return x[:, -num_frames % self.config.factor :]


class VideoAutoencoder(nn.Module):
  """Image and temporal autoencoder: `model.apply(variables, clip, method="encode")`, `method="decode"`, or both in one call."""

  config: TemporalConfig
  dtype: jnp.dtype = jnp.float32

  def setup(self) -> None:
    self.image = image_kl.ImageKL(self.config.image_config, self.dtype)
    self.temporal = Temporal(self.config, self.dtype)

  def encode(self, x: Float[AnyArray, "N T H W 3"], image_noise: Array | None = None) -> Moments:
    """Clips in [-1, 1] -> raw posterior (mean, logvar), float32. Image latents are drawn with `image_noise`, or are means."""
    return self.encode_latents(self.image_latents(x, image_noise))

  def image_latents(self, x: Float[AnyArray, "N T H W 3"], noise: Array | None = None) -> Float[Array, "N T h w C"]:
    """Clips -> image latents, scaled as the temporal autoencoder takes them."""
    moments = self.image.encode(x.reshape(-1, *x.shape[2:]))
    mean, logvar = (m.reshape(*x.shape[:2], *m.shape[1:]) for m in moments)
    return draw(mean, logvar, noise) * self.config.image_config.scaling_factor

  def encode_latents(self, x: Float[AnyArray, "N T h w C"]) -> Moments:
    """Image latents -> raw posterior (mean, logvar), chunk by chunk."""
    chunk = self.config.chunk or x.shape[1]
    return in_chunks(lambda part, _: self.temporal.encode(part), x, x.shape[1], chunk, chunk)

  def decode_latents(self, z: Float[AnyArray, "N t h w C"], num_frames: int) -> Float[Array, "N T h w C"]:
    """Latents -> `num_frames` image latents, chunk by chunk."""
    chunk = self.config.chunk or num_frames
    return in_chunks(self.temporal.decode, z, num_frames, chunk, self.config.latent_frames(chunk))

  def decode(self, z: Float[AnyArray, "N t h w C"], num_frames: int) -> Float[Array, "N T H W 3"]:
    """Raw latents -> `num_frames` frames of pixels, float32, about [-1, 1], not clipped."""
    return self.pixels(self.decode_latents(z, num_frames))

  def pixels(self, x: Float[AnyArray, "N T h w C"]) -> Float[Array, "N T H W 3"]:
    pixels = self.image.decode(x.reshape(-1, *x.shape[2:]) / self.config.image_config.scaling_factor)
    return pixels.reshape(*x.shape[:2], *pixels.shape[1:])

  def __call__(self, x: AnyArray) -> tuple[Array, Array, Array]:
    """-> (reconstruction from the mean, mean, logvar)."""
    mean, logvar = self.encode(x)
    return self.decode(mean, x.shape[1]), mean, logvar


def image_latents(model: Any, variables: dict, frames: AnyArray) -> Array:
  """Frames `[N, H, W, 3]` -> image latents `[N, h, w, C]`. They are means, without randomness; the original draws samples."""
  return model.apply(variables, to_float(frames)[None], method="image_latents")[0]


def encode_chunks(model: Any, variables: dict, latents: AnyArray) -> Moments:
  """Image latents `[N, T, h, w, C]` of chunks -> normalised (mean, std) `[N, T', h, w, C]`."""
  return normalised_posterior(model.config, *model.apply(variables, latents, method="encode_latents"))


def decode_chunks(model: Any, variables: dict, latents: AnyArray, *, num_frames: int) -> Array:
  """Normalised latents `[N, T', h, w, C]` of chunks -> their image latents `[N, num_frames, h, w, C]`."""
  return model.apply(variables, denormalise(model.config, latents), num_frames, method="decode_latents")


def decode_image_latents(model: Any, variables: dict, latents: AnyArray, *, as_uint8: bool) -> AnyArray:
  """Image latents `[N, h, w, C]` -> pixels `[N, 8h, 8w, 3]`."""
  return pixels_of(model.apply(variables, latents[None], method="pixels")[0], as_uint8)


class TemporalCodec(Codec):
  """Pieces are micro batches of frames for the image autoencoder, and chunks for the temporal one, one per device."""

  def encode_parts(self, frames: np.ndarray) -> Parts:
    size = self._frames_at_a_time(len(frames))
    for start, count, number in self._chunks(len(frames)):
      chunk = frames[start : start + count * number]
      pieces = (self._call(image_latents, self._spread(part)) for part in micro_batches(chunk, size))
      if self.devices == 1:
        pieces = [*pieces]
        latents = (jnp if isinstance(pieces[0], jax.Array) else np).concatenate(pieces)[: len(chunk)]
      else:  # micro batches and chunks are split differently over devices, so the latents pass through the host
        latents = join(pieces, len(chunk))
      latents = latents.reshape(number, count, *latents.shape[1:])
      # If there are fewer chunks than devices, the other devices compute copies of the last chunk.
      moments = self._call(encode_chunks, self._spread(filled(latents, self.devices)))
      yield tuple(m[:number].reshape(-1, *m.shape[2:]) for m in moments)

  def decode_parts(self, latents: np.ndarray, num_frames: int) -> Parts:
    size, call = self._frames_at_a_time(num_frames), functools.partial(self._call, decode_image_latents, as_uint8=self.as_uint8)
    for start, count, number in self._chunks(num_frames):
      begin, length = self.config.latent_frames(start), self.config.latent_frames(count)
      chunks = latents[begin : begin + length * number].reshape(number, length, *latents.shape[1:])
      decoded = self._call(decode_chunks, self._spread(filled(chunks, self.devices)), num_frames=count)
      decoded = np.asarray(decoded)[:number].reshape(-1, *decoded.shape[2:])
      yield join((call(self._spread(part)) for part in micro_batches(decoded, size)), len(decoded))

  def _chunks(self, num_frames):
    """Yields (first frame, frames of each chunk, number of chunks) of the chunks that are computed together."""
    size, start = self.config.chunk or num_frames, 0
    while start < num_frames:
      count, number = min(size, num_frames - start), max(1, min((num_frames - start) // size, self.devices))
      yield start, count, number
      start += count * number


class _Temporal(Autoencoder):
  kind, table, config, model, codec = "video autoencoder", TABLE, TemporalConfig, VideoAutoencoder, TemporalCodec
  layouts = ("open-sora-vae", "native")
  last_layer = ("image", "decoder", "conv_out")
  image_autoencoder = image_kl.FAMILY

  def init(self, model, key):
    """If the model has a shortcut, the last layers of encoder and decoder start at zero."""
    variables = super().init(model, key)
    if model.config.shortcut:
      own, same = variables["params"]["temporal"], jnp.eye(model.config.latent_channels)
      own["shortcut_encoder"]["kernel"] = jnp.tile(same, (model.config.factor, 1)) / model.config.factor
      own["shortcut_decoder"]["kernel"] = jnp.tile(same, (1, model.config.factor))
      for last in (own["quant_conv"]["conv"], own["decoder"]["conv_out"]["conv"]):
        last.update(jax.tree.map(jnp.zeros_like, last))
      # Latents drawn with a variance of 1 could not be decoded.
      own["quant_conv"]["conv"]["bias"] = jnp.repeat(jnp.asarray([0.0, FIRST_LOGVAR]), model.config.latent_channels)
    return variables

  def encode_clips(self, model, variables, clips, frames):
    latents = in_pieces(lambda part: image_latents(model, variables, part), clips.reshape(-1, *clips.shape[2:]), frames)
    latents = latents.reshape(*clips.shape[:2], *latents.shape[1:])
    # One full chunk at a time, or as many frames of shorter ones.
    size = max(1, model.config.chunk // clips.shape[1])
    return in_pieces(lambda part: encode_chunks(model, variables, part), latents, size)

  def encode(self, model, params, clips, image_noise=None, layout=None):
    image_latents = model.apply({"params": params}, clips, image_noise, method="image_latents")
    return *model.apply({"params": params}, image_latents, method="encode_latents"), image_latents

  def frame_latents(self, model, params, latents, num_frames):
    return model.apply({"params": params}, latents, num_frames, method="decode_latents")

  def decode(self, model, params, frame_latents, layout=None):
    return model.apply({"params": params}, frame_latents, method="pixels")


FAMILY = _Temporal()
get_config, build, init_shapes, init = FAMILY.get_config, FAMILY.build, FAMILY.init_shapes, FAMILY.init
