"""CogVideoX's 3D causal autoencoder: four frames of 8 x 8 pixels are one latent of 16 channels.

CogVideoX (Yang et al. 2024, arXiv 2408.06072, section 2.1), as `diffusers.AutoencoderKLCogVideoX` 0.42. Convolutions see the
past only; before the clip its first frame is repeated. Time is halved by means of pairs, and doubled by repetition; the first
of an odd number of frames stands alone in both, so that a picture is a clip of one frame. Norms of the decoder are scaled and
shifted by the latents.

The original encodes 8 frames at a time and decodes 2 latents, what is left over with the first: convolutions carry their past
from chunk to chunk, but norms take their statistics over one chunk. So the chunks are part of what it computes, whatever the
memory. Here `Frames.chunks` says over what norms take them: the original's chunks, or the whole clip (`statistics`). Whether a
clip then runs whole, chunk by chunk or over several devices changes no number.

Only lengths of 8k and 8k + 1 frames come back as long as they were; 4k + 1 with an even number of latents becomes longer.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec

from stdit_jax import fields
from stdit_jax.autoencoders.layers import Conv3D, Frames, GroupNorm, block_of, check_latents, double, half, init_like_torch

STATISTICS = ("chunks", "clip")


@dataclasses.dataclass(frozen=True)
class Causal3DConfig:
  """Sizes; field names are those of diffusers' `config.json` where both have the field.

  Attributes:
    statistics: of the norms, "chunks" as the original, or "clip": over the whole clip.
    encode_chunk, decode_chunk: frames, and latents, of a chunk; whole ones of what the strides in time pair.
    remat: whether the backward pass keeps of a block what it gives, and computes the rest again.
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
    for channels in self.block_out_channels:
      if self.norm_num_groups < 1 or channels % self.norm_num_groups:
        raise ValueError(
          f"Causal3DConfig: block_out_channels {self.block_out_channels} must be multiples of norm_num_groups="
          f"{self.norm_num_groups}; {channels} is not."
        )
    if self.statistics not in STATISTICS:
      raise ValueError(f"Causal3DConfig: statistics is {self.statistics!r}; allowed: {', '.join(STATISTICS)}")
    if self.temporal_compression_ratio not in (1, 2, 4, 8)[: len(self.block_out_channels)]:
      raise ValueError(f"Causal3DConfig: temporal_compression_ratio is {self.temporal_compression_ratio}; allowed: 1, 2, 4, 8")
    pairs = 2 if self.halvings else 1
    for name, unit in (("encode_chunk", self.temporal_compression_ratio), ("decode_chunk", pairs)):
      if (size := getattr(self, name)) < 1 or size % unit:
        raise ValueError(f"Causal3DConfig: {name} is {size}; allowed: multiples of {unit}")
    check_latents(self)

  @property
  def downsampling(self):
    """Pixels per latent along a side."""
    return 2 ** (len(self.block_out_channels) - 1)

  @property
  def halvings(self):
    """How often time is halved: in the first so many levels."""
    return self.temporal_compression_ratio.bit_length() - 1

  def latent_size(self, height, width):
    """(height, width) of the latents of a picture of this size in pixels."""
    return height // self.downsampling, width // self.downsampling

  def latent_frames(self, num_frames):
    """Latent frames of a clip."""
    for _ in range(self.halvings):
      num_frames = half(num_frames)
    return num_frames

  @property
  def group(self):
    """Latent frames that lie in time as the first ones of a clip do: only the first holds one frame, which no group keeps."""
    return 1

  def keeps(self, num_frames):
    """Whether a clip of so many frames comes back as long as it was: of 8k and 8k + 1 frames, when time is halved twice."""
    return self.pixel_frames(self.latent_frames(num_frames)) == num_frames

  def frame_starts(self, num_frames):
    """Where each latent frame of a clip begins, and the last one ends, int `[T' + 1]`: a first frame stands alone."""
    frames = [[i] for i in range(num_frames)]
    for _ in range(self.halvings):
      first = len(frames) % 2
      frames = frames[:first] + [frames[i] + frames[i + 1] for i in range(first, len(frames), 2)]
    return np.asarray([*(group[0] for group in frames), num_frames])

  def pixel_frames(self, latent_frames):
    """Frames that so many latent frames are decoded to."""
    for _ in range(self.halvings):
      latent_frames = double(latent_frames)
    return latent_frames


def chunk_sizes(frames, chunk):
  """Frames of the chunks of a clip: what is left over is with the first (diffusers, `_encode` and `_decode`)."""
  count = max(frames // chunk, 1)
  return frames - (count - 1) * chunk, *[chunk] * (count - 1)


TABLE = {
  "cogvideox-2b": Causal3DConfig(scaling_factor=1.15258426),
  "cogvideox-5b": Causal3DConfig(scaling_factor=0.7),
  "tiny-causal3d": Causal3DConfig(
    block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, scaling_factor=1.0
  ),
}


def get_config(name, **overrides):
  """The named configuration with some fields replaced; ValueError names the allowed ones."""
  return fields.replace(fields.choose(TABLE, name, "video autoencoder"), overrides, f"video autoencoder {name}")


class CausalConv(nn.Module):
  """Convolution over time and space that sees the present and the past: of the clip, of the chunk before (collection
  "past"), or of the device before. Space is padded with zeros."""

  features: int
  size: int = 3
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, frames):
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
  def __call__(self, x, z, frames):
    z = self.nearest(z, x.shape, frames)
    y = GroupNorm(self.groups, self.dtype, name="norm_layer")(x, frames)
    conv = lambda name: CausalConv(x.shape[-1], 1, self.dtype, name=name)(z, frames)  # noqa: E731
    return y * conv("conv_y") + conv("conv_b")

  @staticmethod
  def nearest(z, shape, frames):
    """The latents `z` repeated to the frames and the size of `shape`; a first frame has the first latent."""
    t, height, width = shape[1:4]
    first = int(frames.first and t > 1)
    z = jnp.repeat(z, height // z.shape[2], axis=2) if height > z.shape[2] else z
    z = jnp.repeat(z, width // z.shape[3], axis=3) if width > z.shape[3] else z
    rest = jnp.repeat(z[:, first:], (t - first) // (z.shape[1] - first), axis=1)
    return jnp.concatenate([z[:, :first], rest], axis=1)


class ResnetBlock(nn.Module):
  """x + conv(silu(norm(conv(silu(norm(x)))))), with a linear function of x where the channels change."""

  config: Causal3DConfig
  features: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, frames, z=None):
    def norm(name, h):
      if z is None:
        return GroupNorm(self.config.norm_num_groups, self.dtype, name=name)(h, frames)
      return SpatialNorm(self.config.norm_num_groups, self.dtype, name=name)(h, z, frames)

    h = CausalConv(self.features, dtype=self.dtype, name="conv1")(nn.silu(norm("norm1", x)), frames)
    h = CausalConv(self.features, dtype=self.dtype, name="conv2")(nn.silu(norm("norm2", h)), frames)
    if x.shape[-1] != self.features:
      x = Conv3D(self.features, (1, 1, 1), dtype=self.dtype, name="conv_shortcut")(x)
    return x + h


class Downsampler(nn.Module):
  """Halves time (means of pairs) and space (a convolution of each frame, padded below and on the right)."""

  time: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, frames):
    if self.time:
      first = int(frames.first)
      pairs = x[:, first:].reshape(x.shape[0], -1, 2, *x.shape[2:])
      x = jnp.concatenate([x[:, :first], pairs.mean(2).astype(x.dtype)], axis=1)
      frames = frames.scaled(half)
    padding = ((0, 0), (0, 1), (0, 1))
    return Conv3D(x.shape[-1], (1, 3, 3), (1, 2, 2), padding, dtype=self.dtype, name="conv")(x), frames


class Upsampler(nn.Module):
  """Doubles time and space by repetition, then a convolution of each frame."""

  time: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, frames):
    if self.time:
      first = int(frames.first)
      x = jnp.concatenate([x[:, :first], jnp.repeat(x[:, first:], 2, axis=1)], axis=1)
      frames = frames.scaled(double)
    x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
    return Conv3D(x.shape[-1], (1, 3, 3), padding=((0, 0), (1, 1), (1, 1)), dtype=self.dtype, name="conv")(x), frames


class Level(nn.Module):
  """The blocks of one level, then the way to the next (`sampler`: Downsampler, Upsampler or None)."""

  config: Causal3DConfig
  features: int
  layers: int
  sampler: type[nn.Module] | None
  time: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, frames, z=None):
    block = block_of(ResnetBlock, self.config.remat, static=(2,))
    for i in range(self.layers):
      x = block(self.config, self.features, self.dtype, name=f"resnets_{i}")(x, frames, z)
    if self.sampler is None:
      return x, frames
    name = "downsamplers_0" if self.sampler is Downsampler else "upsamplers_0"
    return self.sampler(self.time, self.dtype, name=name)(x, frames)


class Encoder(nn.Module):
  config: Causal3DConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, frames):
    c, last = self.config, len(self.config.block_out_channels) - 1
    x = CausalConv(c.block_out_channels[0], dtype=self.dtype, name="conv_in")(x, frames)
    for i, features in enumerate(c.block_out_channels):
      sampler = Downsampler if i < last else None
      level = Level(c, features, c.layers_per_block, sampler, i < c.halvings, self.dtype, name=f"down_blocks_{i}")
      x, frames = level(x, frames)
    x, frames = Level(c, c.block_out_channels[-1], 2, None, False, self.dtype, name="mid_block")(x, frames)
    x = nn.silu(GroupNorm(c.norm_num_groups, self.dtype, name="norm_out")(x, frames))
    return CausalConv(2 * c.latent_channels, dtype=self.dtype, name="conv_out")(x, frames)


class Decoder(nn.Module):
  config: Causal3DConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, z, frames):
    c, last = self.config, len(self.config.block_out_channels) - 1
    x = CausalConv(c.block_out_channels[-1], dtype=self.dtype, name="conv_in")(z, frames)
    x, frames = Level(c, c.block_out_channels[-1], 2, None, False, self.dtype, name="mid_block")(x, frames, z)
    for i, features in enumerate(reversed(c.block_out_channels)):
      sampler = Upsampler if i < last else None
      level = Level(c, features, c.layers_per_block + 1, sampler, i < c.halvings, self.dtype, name=f"up_blocks_{i}")
      x, frames = level(x, frames, z)
    x = nn.silu(SpatialNorm(c.norm_num_groups, self.dtype, name="norm_out")(x, z, frames))
    return CausalConv(c.out_channels, dtype=self.dtype, name="conv_out")(x, frames)


class Causal3D(nn.Module):
  """The autoencoder: `model.apply(variables, clip, method="encode")`, `method="decode"`, or both in one call.

  Parameters are float32; `dtype` is that of the convolutions (norms and results are float32).
  """

  config: Causal3DConfig
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    self.encoder = Encoder(self.config, self.dtype)
    self.decoder = Decoder(self.config, self.dtype)

  def encode(self, x, frames=None):
    """Clips `[N, T, H, W, 3]` in [-1, 1] -> raw posterior (mean, logvar), float32 `[N, T', H/8, W/8, C]`; logvar is clipped to
    [-30, 20]. `frames`: how they lie in their clip, by default the whole with the configuration's statistics."""
    mean, logvar = jnp.split(
      self.encoder(x, frames or self.frames(x, self.config.encode_chunk)).astype(jnp.float32), 2, axis=-1
    )
    return mean, jnp.clip(logvar, -30.0, 20.0)

  def decode(self, z, frames=None):
    """Raw latents `[N, T', h, w, C]` -> pixels, float32 `[N, T, 8h, 8w, 3]`, about [-1, 1], not clipped; `frames` of the
    latents."""
    return self.decoder(z, frames or self.frames(z, self.config.decode_chunk)).astype(jnp.float32)

  def frames(self, x, chunk):
    count = x.shape[1]
    return Frames(count, chunk_sizes(count, chunk) if self.config.statistics == "chunks" else None)

  def __call__(self, x, noise=None):
    """-> (reconstruction, mean, logvar) from mean + std * noise, from the mean alone without noise."""
    mean, logvar = self.encode(x)
    z = mean if noise is None else mean + jnp.exp(0.5 * logvar) * noise
    return self.decode(z), mean, logvar


def levels(frames, config, change):
  """`frames` and what becomes of it where time is halved or doubled (`change`)."""
  result = [frames]
  for _ in range(config.halvings):
    result.append(result[-1].scaled(change))
  return result


def divides(frames, level):
  """Whether a level of a clip can be split as the clip is: evenly but for the first of an odd number, two or more a device."""
  rest = level.count - level.first
  return rest % level.devices == 0 and rest >= 2 * level.devices and level.first == frames.first


def splits(config, num_frames, devices):
  """Whether a clip of so many frames can be split over so many devices."""
  frames = Frames(num_frames, devices=devices)
  return all(divides(frames, level) for level in levels(frames, config, half))


def over_devices(model, mesh, axis_name, method, batch_axes=()):
  """`encode` or `decode` of clips that are split in time over a mesh axis (context parallelism), as a function like
  `model.apply(variables, x, method=method)` with the same numbers, to be jitted.

  Convolutions get their past from the device before, norms sum their statistics over all. The first of an odd number of frames
  is on device 0, the others are divided evenly (CogVideoX: SAT's context parallel autoencoder).

  Args:
    batch_axes: mesh axes that split the batch.

  Raises (when it is called):
    ValueError: frames that do not divide, or fewer than two of them on a device at the lowest level.
  """
  devices, config = mesh.shape[axis_name], model.config
  change, chunk = (half, config.encode_chunk) if method == "encode" else (double, config.decode_chunk)

  def apply(variables, x):
    chunks = chunk_sizes(x.shape[1], chunk) if config.statistics == "chunks" else None
    frames = Frames(x.shape[1], chunks, axis_name, devices)
    for level in levels(frames, config, change):
      if not divides(frames, level):
        raise ValueError(
          f"a clip of {x.shape[1]} {'frames' if method == 'encode' else 'latents'} is not to be split over the {devices} "
          f"devices of mesh axis {axis_name!r}: one of its levels has {level.count} frames, without the first of an odd number "
          "not two or more for each"
        )

    def local(variables, first, rest):
      y = model.apply(variables, jnp.concatenate([first, rest], axis=1), frames, method=method)
      alone = jax.lax.axis_index(axis_name) == 0
      keep = lambda part: jax.lax.psum(jnp.where(alone, part[:, : frames.first], 0), axis_name)  # noqa: E731
      return jax.tree.map(keep, y), jax.tree.map(lambda part: part[:, frames.first :], y)

    whole, split = PartitionSpec(batch_axes or None), PartitionSpec(batch_axes or None, axis_name)
    shards = jax.shard_map(
      local, mesh=mesh, in_specs=(PartitionSpec(), whole, split), out_specs=(whole, split), check_vma=False
    )
    first, rest = shards(variables, x[:, : frames.first], x[:, frames.first :])
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), first, rest)

  return apply


@functools.cache
def init_shapes(config):
  """The tree of `init` as shapes: nothing is allocated. Made once per configuration, so not to be changed."""
  side = 2 * config.downsampling
  made = jax.eval_shape(Causal3D(config).init, jax.random.key(0), jnp.zeros((1, 1, side, side, config.in_channels)))
  return {"params": made["params"]}


def build(config, dtype=jnp.float32):
  """The model of a configuration."""
  return Causal3D(config, dtype)


def init(model, key):
  """Fresh variables {"params": ...}, as the original starts."""
  return init_like_torch(init_shapes(model.config), key)
