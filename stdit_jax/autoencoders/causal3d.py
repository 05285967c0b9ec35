"""CogVideoX's 3D causal autoencoder: four frames of 8 x 8 pixels are one latent of 16 channels.

CogVideoX (Yang et al. 2024, arXiv 2408.06072, section 2.1), as `diffusers.AutoencoderKLCogVideoX` 0.42. Convolutions see only
the past, and the first frame repeats before the clip. Averaging pairs of frames halves time, and repeating frames doubles it.
If the number of frames is odd, the first frame is neither paired nor repeated, so an image is a clip of one frame. Latents
scale and shift the norms of the decoder.

    clip [N,T,H,W,3] in [-1,1] --Encoder--> moments --> mean, logvar [N,T',H/8,W/8,16] --draw--> z --Decoder--> [N,T,H,W,3]

The original encodes 8 frames at a time and decodes 2 latents at a time. Convolutions carry their past from chunk to chunk, but
norms take their statistics over one chunk. The chunks therefore change the result, and `statistics` chooses between them and
the whole clip. For either choice, one device and several compute the same numbers. With "chunks", one call on the whole clip
computes the same numbers as one call per chunk.

Decoding restores only lengths of 8k and 8k + 1 frames. A clip of 8k + 5 frames, for instance, becomes three frames longer.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float

from stdit_jax.autoencoders.codec import Codec, Parts, pixels_of
from stdit_jax.autoencoders.family import Autoencoder, AutoencoderConfig
from stdit_jax.autoencoders.frames import Frames, chunk_sizes, double, half, in_pieces, over_devices, splits
from stdit_jax.autoencoders.latents import AnyArray, Moments, denormalise, normalised_posterior, posterior, to_float
from stdit_jax.autoencoders.layers import Conv3D, GroupNorm, block_of

STATISTICS = ("chunks", "clip")


@dataclasses.dataclass(frozen=True)
class Causal3DConfig(AutoencoderConfig):
  """Sizes. The field names are those of diffusers' `config.json` where both have the field.

  Attributes:
    statistics: of the norms, "chunks" as the original, or "clip": over the whole clip.
    encode_chunk: frames per chunk, a multiple of `temporal_compression_ratio`.
    decode_chunk: latent frames per chunk, an even number (any number for ratio 1).
  """

  block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
  layers_per_block: int = 3
  in_channels: int = 3
  out_channels: int = 3
  latent_channels: int = 16
  norm_num_groups: int = 32
  temporal_compression_ratio: int = 4
  scaling_factor: float = 0.7
  shift: float | tuple[float, ...] = 0.0
  scale: float | tuple[float, ...] = 1.0
  statistics: str = "chunks"
  encode_chunk: int = 8
  decode_chunk: int = 2
  remat: bool = False

  def __post_init__(self):
    self.check_groups()
    self.require(self.statistics in STATISTICS, f"statistics is {self.statistics!r}; allowed: {', '.join(STATISTICS)}")
    ratio, ratios = self.temporal_compression_ratio, (1, 2, 4, 8)[: len(self.block_out_channels)]
    self.require(ratio in ratios, f"temporal_compression_ratio is {ratio}; allowed: 1, 2, 4, 8")
    for name, unit in (("encode_chunk", ratio), ("decode_chunk", min(ratio, 2))):
      size = getattr(self, name)
      self.require(size > 0 and size % unit == 0, f"{name} is {size}; allowed: multiples of {unit}")
    self.check_latents()

  @property
  def halvings(self) -> int:
    """Number of halvings of time: one in each of the first levels."""
    return self.temporal_compression_ratio.bit_length() - 1

  def latent_frames(self, num_frames: int) -> int:
    return -(-num_frames // self.temporal_compression_ratio)

  def pixel_frames(self, latent_frames: int) -> int:
    """Frames that the decoder makes of `latent_frames`. If their number is odd, the first becomes one frame."""
    return latent_frames * self.temporal_compression_ratio - latent_frames % 2 * (self.temporal_compression_ratio - 1)

  def keeps(self, num_frames: int) -> bool:
    return self.pixel_frames(self.latent_frames(num_frames)) == num_frames

  def frame_starts(self, num_frames: int) -> np.ndarray:
    ends = num_frames - self.temporal_compression_ratio * np.arange(self.latent_frames(num_frames), -1, -1)
    return np.maximum(ends, 0)  # only the first latent frame may have fewer frames than the ratio


TABLE = {
  "cogvideox-2b": Causal3DConfig(scaling_factor=1.15258426),
  "cogvideox-5b": Causal3DConfig(scaling_factor=0.7),
  "tiny-causal3d": Causal3DConfig(
    block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, scaling_factor=1.0
  ),
}


class CausalConv(nn.Module):
  """Convolution over time and space that sees no future frames. Space is padded with zeros.

  The past comes from the clip, from the previous chunk (collection "past"), or from the previous device.
  """

  features: int
  size: int = 3
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: AnyArray, frames: Frames) -> Array:
    if past := self.size - 1:
      if self.has_variable("past", "frames"):
        x = jnp.concatenate([self.get_variable("past", "frames"), x], axis=1)
      else:
        x = frames.with_past(x, past)
      if self.is_mutable_collection("past"):
        self.put_variable("past", "frames", x[:, -past:])
    side = self.size // 2
    padding = ((0, 0), (side, side), (side, side))
    return Conv3D(self.features, (self.size,) * 3, padding=padding, dtype=self.dtype, name="conv")(x)


class SpatialNorm(nn.Module):
  """Group norm, scaled and shifted by linear functions of the nearest latent (the decoder's norm)."""

  groups: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, z: AnyArray, frames: Frames) -> Array:
    first = int(frames.first and x.shape[1] > 1)  # 1: the first latent belongs to the first frame alone
    for axis in (2, 3):
      z = jnp.repeat(z, x.shape[axis] // z.shape[axis], axis)
    rest = jnp.repeat(z[:, first:], (x.shape[1] - first) // (z.shape[1] - first), axis=1)
    z = jnp.concatenate([z[:, :first], rest], axis=1)
    y = GroupNorm(self.groups, self.dtype, name="norm_layer")(x, frames)
    conv = lambda name: CausalConv(x.shape[-1], 1, self.dtype, name=name)(z, frames)  # noqa: E731
    return y * conv("conv_y") + conv("conv_b")


class ResnetBlock(nn.Module):
  """x + conv(silu(norm(conv(silu(norm(x)))))), with a linear function of x where the channels change."""

  config: Causal3DConfig
  features: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, frames: Frames, z: AnyArray | None = None) -> Array:
    def norm(name, h):
      if z is None:
        return GroupNorm(self.config.norm_num_groups, self.dtype, name=name)(h, frames)
      return SpatialNorm(self.config.norm_num_groups, self.dtype, name=name)(h, z, frames)

    h = CausalConv(self.features, dtype=self.dtype, name="conv1")(nn.silu(norm("norm1", x)), frames)
    h = CausalConv(self.features, dtype=self.dtype, name="conv2")(nn.silu(norm("norm2", h)), frames)
    if x.shape[-1] != self.features:
      x = Conv3D(self.features, (1, 1, 1), dtype=self.dtype, name="conv_shortcut")(x)
    return x + h


class Sampler(nn.Module):
  """Halves time (means of pairs) and space (strided convolution), or doubles both by repetition, then a convolution."""

  up: bool
  time: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, frames: Frames) -> tuple[Array, Frames]:
    first = int(frames.first)
    if self.time and self.up:
      x, frames = jnp.concatenate([x[:, :first], jnp.repeat(x[:, first:], 2, axis=1)], axis=1), frames.scaled(double)
    elif self.time:
      pairs = x[:, first:].reshape(x.shape[0], -1, 2, *x.shape[2:])
      x, frames = jnp.concatenate([x[:, :first], pairs.mean(2).astype(x.dtype)], axis=1), frames.scaled(half)
    if self.up:
      x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
    stride, side = (1, (1, 1)) if self.up else (2, (0, 1))  # padded below and on the right, as the original pads
    conv = Conv3D(x.shape[-1], (1, 3, 3), (1, stride, stride), ((0, 0), side, side), dtype=self.dtype, name="conv")
    return conv(x), frames


class Level(nn.Module):
  """The blocks of one level, then the way to the next (`sampler`: "downsamplers_0", "upsamplers_0" or "")."""

  config: Causal3DConfig
  features: int
  layers: int
  sampler: str
  time: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, frames: Frames, z: AnyArray | None = None) -> tuple[Array, Frames]:
    block = block_of(ResnetBlock, self.config.remat, static=(2,))
    for i in range(self.layers):
      x = block(self.config, self.features, self.dtype, name=f"resnets_{i}")(x, frames, z)
    if self.sampler:
      x, frames = Sampler(self.sampler == "upsamplers_0", self.time, self.dtype, name=self.sampler)(x, frames)
    return x, frames


class Encoder(nn.Module):
  config: Causal3DConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: AnyArray, frames: Frames) -> Array:
    c, last = self.config, len(self.config.block_out_channels) - 1
    x = CausalConv(c.block_out_channels[0], dtype=self.dtype, name="conv_in")(x, frames)
    for i, features in enumerate(c.block_out_channels):
      sampler = "downsamplers_0" if i < last else ""
      level = Level(c, features, c.layers_per_block, sampler, i < c.halvings, self.dtype, name=f"down_blocks_{i}")
      x, frames = level(x, frames)
    x, frames = Level(c, c.block_out_channels[-1], 2, "", False, self.dtype, name="mid_block")(x, frames)
    x = nn.silu(GroupNorm(c.norm_num_groups, self.dtype, name="norm_out")(x, frames))
    return CausalConv(2 * c.latent_channels, dtype=self.dtype, name="conv_out")(x, frames)


class Decoder(nn.Module):
  config: Causal3DConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, z: AnyArray, frames: Frames) -> Array:
    c, last = self.config, len(self.config.block_out_channels) - 1
    x = CausalConv(c.block_out_channels[-1], dtype=self.dtype, name="conv_in")(z, frames)
    x, frames = Level(c, c.block_out_channels[-1], 2, "", False, self.dtype, name="mid_block")(x, frames, z)
    for i, features in enumerate(reversed(c.block_out_channels)):
      sampler = "upsamplers_0" if i < last else ""
      level = Level(c, features, c.layers_per_block + 1, sampler, i < c.halvings, self.dtype, name=f"up_blocks_{i}")
      x, frames = level(x, frames, z)
    x = nn.silu(SpatialNorm(c.norm_num_groups, self.dtype, name="norm_out")(x, z, frames))
    return CausalConv(c.out_channels, dtype=self.dtype, name="conv_out")(x, frames)


class Causal3D(nn.Module):
  """The autoencoder: `model.apply(variables, clip, method="encode")`, `method="decode"`, or both in one call."""

  config: Causal3DConfig
  dtype: jnp.dtype = jnp.float32

  def setup(self) -> None:
    self.encoder = Encoder(self.config, self.dtype)
    self.decoder = Decoder(self.config, self.dtype)

  def encode(self, x: Float[AnyArray, "N T H W 3"], frames: Frames | None = None) -> Moments:
    """Clips in [-1, 1] -> raw posterior (mean, logvar), float32. `frames`: `Frames` of `x`; None: `x` is the whole clip."""
    return posterior(self.encoder(x, frames or self.frames(x, self.config.encode_chunk)))

  def decode(self, z: Float[AnyArray, "N t h w C"], frames: Frames | None = None) -> Float[Array, "N T H W 3"]:
    """Raw latents -> pixels, float32, about [-1, 1], not clipped. `frames`: `Frames` of the latents, as for `encode`."""
    return self.decoder(z, frames or self.frames(z, self.config.decode_chunk)).astype(jnp.float32)

  def frames(self, x: AnyArray, chunk: int) -> Frames:
    return Frames(x.shape[1], chunk_sizes(x.shape[1], chunk) if self.config.statistics == "chunks" else None)

  def __call__(self, x: AnyArray) -> tuple[Array, Array, Array]:
    """-> (reconstruction from the mean, mean, logvar)."""
    mean, logvar = self.encode(x)
    return self.decode(mean), mean, logvar


def encode_causal(model: nn.Module, variables: dict, past: Any, frames: AnyArray) -> tuple[Moments, Any]:
  """Frames `[T, H, W, 3]` of a chunk and the past that the previous chunk left, or None -> normalised (mean, std), past."""
  moments, past = _apply_chunk(model, variables, past, to_float(frames), "encode")
  return normalised_posterior(model.config, *moments), past


def _encode_clip(model, variables, frames):
  """A whole clip -> normalised (mean, std). The chunks after the first one are a loop, as `CausalCodec` runs them."""
  if model.config.statistics != "chunks":
    return encode_causal(model, variables, None, frames)[0]
  first, *rest = chunk_sizes(len(frames), model.config.encode_chunk)
  moments, past = encode_causal(model, variables, None, frames[:first])
  if not rest:
    return moments

  def encode_next(past, chunk):
    moments, past = encode_causal(model, variables, past, chunk)
    return past, moments

  _, later = jax.lax.scan(encode_next, past, frames[first:].reshape(len(rest), rest[0], *frames.shape[1:]))
  return jax.tree.map(lambda a, b: jnp.concatenate([a, b.reshape(-1, *b.shape[2:])]), moments, later)


def decode_causal(model: nn.Module, variables: dict, past: Any, latents: AnyArray, *, as_uint8: bool) -> tuple[AnyArray, Any]:
  """Normalised latents `[T', h, w, C]` of a chunk and the past, or None -> pixels, past."""
  pixels, past = _apply_chunk(model, variables, past, denormalise(model.config, latents), "decode")
  return pixels_of(pixels, as_uint8), past


def _apply_chunk(model, variables, past, x, method):
  variables = variables if past is None else {**variables, "past": past}
  y, state = model.apply(variables, x[None], Frames(len(x)), method=method, mutable="past")
  return jax.tree.map(lambda part: part[0], y), state["past"]


def encode_split(model: nn.Module, variables: dict, frames: AnyArray, *, mesh: Mesh) -> tuple[Array, ...]:
  """Frames `[T, H, W, 3]` of a clip that is split in time over the last axis of a mesh -> normalised (mean, std)."""
  moments = over_devices(model, mesh, mesh.axis_names[-1], "encode")(variables, to_float(frames)[None])
  return tuple(m[0] for m in normalised_posterior(model.config, *moments))


def decode_split(model: nn.Module, variables: dict, latents: AnyArray, *, mesh: Mesh, as_uint8: bool) -> AnyArray:
  """Normalised latents `[T', h, w, C]` of a clip that is split in time over the last axis of a mesh -> pixels."""
  latents = denormalise(model.config, latents)[None]
  return pixels_of(over_devices(model, mesh, mesh.axis_names[-1], "decode")(variables, latents)[0], as_uint8)


class CausalCodec(Codec):
  """A piece is a chunk. With statistics over the clip, or if several devices split the clip, it is the whole clip.

  Memory then grows with its length. A clip is split over the largest divisor of the device count that its frames allow. The
  remaining devices repeat the work.
  """

  uses_micro_batch = False

  def encode_parts(self, frames: np.ndarray) -> Parts:
    return self._parts((encode_split, encode_causal), frames, len(frames), self.config.encode_chunk)

  def decode_parts(self, latents: np.ndarray, num_frames: int) -> Parts:
    return self._parts((decode_split, decode_causal), latents, num_frames, self.config.decode_chunk, as_uint8=self.as_uint8)

  def _parts(self, functions, values, num_frames, chunk, **static):
    of_split_clip, of_chunk = functions
    for count in range(self.devices, 1, -1):
      if (mesh := self.mesh) and self.devices % count == 0 and splits(self.config, num_frames, count):
        mesh = Mesh(np.reshape(np.asarray(mesh.devices), (-1, count)), ("copies", *mesh.axis_names))
        yield self._call(of_split_clip, values, mesh=mesh, **static)
        return
    past, start = None, 0
    for size in chunk_sizes(len(values), chunk) if self.config.statistics == "chunks" else (len(values),):
      part, past = self._call(of_chunk, past, values[start : start + size], **static)
      yield part
      start += size


class _Causal3D(Autoencoder):
  kind, table, config, model, codec = "video autoencoder", TABLE, Causal3DConfig, Causal3D, CausalCodec
  layouts = ("cogvideox-vae", "native")
  last_layer = ("decoder", "conv_out")

  def splits(self, config, num_frames, devices):
    return splits(config, num_frames, devices)

  def encode_clips(self, model, variables, clips, frames):
    encode = jax.vmap(lambda clip: _encode_clip(model, variables, clip))
    return in_pieces(encode, clips, max(1, frames // clips.shape[1]))

  def encode(self, model, params, clips, image_noise=None, layout=None):
    return *self._apply(model, params, clips, "encode", layout), None

  def decode(self, model, params, frame_latents, layout=None):
    return self._apply(model, params, frame_latents, "decode", layout)

  def _apply(self, model, params, x, method, layout):
    """Clips whole, or split in time over the mesh axis `sequence`."""
    if layout is None or not layout.split_tokens:
      return model.apply({"params": params}, x, method=method)
    return over_devices(model, layout.mesh, "sequence", method, layout.axes["batch"])({"params": params}, x)


FAMILY = _Causal3D()
get_config, build, init_shapes, init = FAMILY.get_config, FAMILY.build, FAMILY.init_shapes, FAMILY.init
