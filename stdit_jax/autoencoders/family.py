"""The interface of an autoencoder. Each file of this folder with a FAMILY defines one, and registry.py lists them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from stdit_jax import fields
from stdit_jax.autoencoders.latents import AnyArray, Moments
from stdit_jax.autoencoders.layers import init_like_torch
from stdit_jax.parallel.shardings import Layout


class AutoencoderConfig:
  """Methods and defaults of all configurations of autoencoders.

  A subclass defines `latent_frames(num_frames)`, the latent frames of a clip, and `frame_starts(num_frames)`, int `[T' + 1]`:
  where each latent frame starts, and where the last one ends.

  Attributes:
    latent_channels: channels C of the latents.
    scaling_factor, shift, scale: normalisation (latents.py). `shift` and `scale` are one number or one per latent channel.
    in_channels: channels of a frame.
    remat: whether only the inputs of blocks are stored for the backward pass, which recomputes the rest.
    group: latent frames of one independently encoded chunk, the period of `frame_starts`. 1 without such chunks.
    unit: frames that are encoded independently of all others; 0: the whole clip.
  """

  latent_channels: int
  block_out_channels: tuple[int, ...]
  norm_num_groups: int
  in_channels = 3
  group = 1
  unit = 0

  def require(self, holds: bool, text: str) -> None:
    """Raises ValueError with the text unless the condition holds."""
    if not holds:
      raise ValueError(f"{type(self).__name__}: {text}")

  def check_latents(self) -> None:
    """Raises ValueError unless `shift` and `scale` are one number or one per latent channel."""
    for name in ("shift", "scale"):
      value, count = getattr(self, name), self.latent_channels
      fits = isinstance(value, (int, float)) or len(value) == count
      self.require(fits, f"{name} needs one number or {count} (latent_channels), not {value}.")

  def check_groups(self) -> None:
    """Raises ValueError unless group norms divide the channels of each level."""
    for channels in self.block_out_channels:
      text = f"block_out_channels {self.block_out_channels} must be multiples of norm_num_groups={self.norm_num_groups}"
      self.require(self.norm_num_groups > 0 and channels % self.norm_num_groups == 0, f"{text}; {channels} is not.")

  @property
  def downsampling(self) -> int:
    """Pixels per latent along a side: 8 for four levels."""
    return 2 ** (len(self.block_out_channels) - 1)

  def latent_size(self, height: int, width: int) -> tuple[int, int]:
    """(height, width) of the latents of frames of this size in pixels."""
    return height // self.downsampling, width // self.downsampling

  def units(self, num_frames: int) -> list[int]:
    """Frames of the units of a clip, in order. The last unit may be shorter."""
    size = self.unit or num_frames
    return [min(size, num_frames - begin) for begin in range(0, num_frames, size)]

  def keeps(self, num_frames: int) -> bool:
    """Whether a decoded clip has as many frames as the encoded one."""
    return True


DECODING = ("decoder", "post_quant_conv", "shortcut_decoder")  # names of the modules that only `decode` uses


def encoder_only(variables: dict) -> dict:
  """The tree without the parameters of its decoder, from arrays or shapes of any autoencoder. `encode` needs no others."""
  return {
    name: encoder_only(value) if isinstance(value, dict) else value for name, value in variables.items() if name not in DECODING
  }


@functools.cache
def _init_shapes(model, shape):
  return {"params": jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))["params"]}


class Autoencoder:
  """One published autoencoder in all its sizes.

  Attributes:
    kind: its name in error messages.
    table: {name: configuration}.
    config, model, codec: classes of its configurations, linen modules and `codec.Codec`.
    layouts: names of the layouts of its files (interop), the usual one first.
    last_layer: path in the parameters to the decoder's last layer. Its gradients weight the adversarial term.
    image_autoencoder: the image `Autoencoder` (parameters "image"), or None. It runs first; other layers take its latents.
  """

  kind: str
  table: dict
  config: type
  model: type
  codec: type
  layouts: tuple[str, ...]
  last_layer: tuple[str, ...]
  image_autoencoder: "Autoencoder | None" = None

  def get_config(self, name: str, **overrides) -> Any:
    """The named configuration with some fields replaced. Raises ValueError with the allowed names or fields."""
    return fields.replace(fields.choose(self.table, name, self.kind), overrides, f"{self.kind} {name}")

  def build(self, config: Any, dtype: DTypeLike = jnp.float32) -> Any:
    """The model of a configuration. The convolutions compute in `dtype`. Parameters, norms and results are float32."""
    return self.model(config, dtype)

  def init_shapes(self, config: Any) -> dict:
    """The tree of `init` as shapes, without allocation. All callers share the tree: do not change it."""
    return _init_shapes(self.model(config), self.example_shape(config))

  def init(self, model: Any, key: Array) -> dict:
    """Fresh variables {"params": ...} with the original initialisation."""
    return init_like_torch(self.init_shapes(model.config), key)

  def example_shape(self, config: Any) -> tuple[int, ...]:
    """Shape of a small input of the model: a clip of one frame."""
    side = 2 * config.downsampling
    return 1, 1, side, side, config.in_channels

  def splits(self, config: Any, num_frames: int, devices: int) -> bool:
    """Whether a clip can be split in time over so many devices."""
    return False

  # `training/clip_encoder.py` encodes clips of one size by one program. `Codec.encode` gives the same values by several
  # programs, which serve clips of all lengths.

  def encode_clips(self, model: Any, variables: dict, clips: Num[AnyArray, "N T H W 3"], frames: int) -> Moments:
    """Units of one size -> normalised posterior (mean, std) `[N, T', h, w, C]`.

    Args:
      clips: units of clips, uint8 or float in [-1, 1].
      frames: number of frames that the image autoencoder takes at a time.
    """
    raise NotImplementedError

  # Training calls the functions below with batches of whole clips. `layout` is a `parallel.shardings.Layout` or None.

  def encode(
    self, model: Any, params: dict, clips: Float[Array, "B T H W 3"], image_noise: Any = None, layout: Layout | None = None
  ) -> tuple[Array, Array, Array | None]:
    """-> (mean, logvar, image latents); the raw posterior `[B, T', h, w, C]`.

    The image latents `[B, T, h, w, C]` are those of `image_autoencoder`, drawn with `image_noise` or else means. They are
    None if there is no image autoencoder.
    """
    raise NotImplementedError

  def frame_latents(self, model: Any, params: dict, latents: Float[Array, "B t h w C"], num_frames: int) -> Array:
    """Raw latents -> what `decode` takes: image latents `[B, T, h, w, C]`, or the latents if there is no image autoencoder."""
    return latents

  def decode(self, model: Any, params: dict, frame_latents: Float[Array, "B t h w C"], layout: Layout | None = None) -> Array:
    """-> pixels `[B, T, H, W, 3]`, about [-1, 1], not clipped."""
    raise NotImplementedError
