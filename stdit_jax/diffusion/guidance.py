"""Classifier-free guidance on tokens or latents, for every formulation.

    guided = unconditional + scale * (conditional - unconditional)

applies to the first `guided_channels` channels of every patch position. All other channels, variances included, come from the
conditional branch. Open-Sora 1.1 samples with `guided_channels=3` of four latent channels (its `cfg_channel`); 1.2 guides all.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Bool, Float

from stdit_jax.arrays import ArrayLike, Latents, Valid
from stdit_jax.diffusion.elements import Denoise, expand


@dataclasses.dataclass(frozen=True)
class Guidance:
  """Settings of guidance, static under jit.

  Attributes:
    scale: 1 is no guidance.
    channels: guided latent channels, from the first; None = all.
    interval: (low, high), timesteps outside which the scale is 1 (Kynkaanniemi et al. 2024, arXiv 2404.07724); None = all.
    rescale: 0 to 1, how far the guided prediction returns to the standard deviation of the conditional one. It prevents frames
      that are too bright (Lin et al. 2023, arXiv 2305.08891, section 3.4).
    sequential: one branch after the other, which needs less memory than both as one batch.
  """

  scale: float = 7.0
  channels: int | None = None
  interval: tuple[float, float] | None = None
  rescale: float = 0.0
  sequential: bool = False

  def __post_init__(self):
    if not 0 <= self.rescale <= 1:
      raise ValueError(f"guidance: rescale is {self.rescale}; allowed: 0 to 1")
    if self.interval is not None and not self.interval[0] <= self.interval[1]:
      raise ValueError(f"guidance: interval is {self.interval}; the first timestep must not be above the second")


def rescaled(
  prediction: Latents, conditional: Latents, amount: float, *, positions: int, channels: int,
  valid: Bool[ArrayLike, "B T *S Q"] | None = None,
) -> Latents:  # fmt: skip
  """Rescales the first `channels` per patch position towards the standard deviation of `conditional`, by `amount`, per sample.

  Only `valid` elements count (arXiv 2305.08891, eq. 15 and 16).
  """
  features = prediction.shape[-1]
  first = jnp.arange(features) % (features // positions) < channels  # [features], False for variance channels
  counted = jnp.broadcast_to(first, prediction.shape)
  if valid is not None:  # repeated if each position also has variance channels
    elements = jnp.repeat(valid.reshape(*valid.shape[:-1], positions, 1, channels), features // positions // channels, -2)
    counted = counted & elements.reshape(prediction.shape)
  axes = tuple(range(1, prediction.ndim))
  spread = lambda x: jnp.std(x.astype(jnp.float32), axis=axes, where=counted)  # noqa: E731
  factor = amount * spread(conditional) / spread(prediction) + (1 - amount)
  return jnp.where(first, prediction * expand(factor, prediction), prediction)


def guided(
  denoise: Denoise | tuple[Any, ...], scale: float | Float[ArrayLike, " B"], *, num_channels: int,
  guided_channels: int | None = None, interval: tuple[float, float] | None = None, rescale: float = 0.0,
  valid: Valid | None = None,
) -> Denoise:  # fmt: skip
  """Turns one or two model calls into one guided `denoise(x, t, x_mask)`.

  Args:
    denoise: a callable that takes a doubled batch, conditional rows first (it holds the doubled conditions). Or a pair
      (conditional, unconditional) of callables, which run one after the other. Both compute the same numbers.
    scale: one number, or one per sample. If it is the Python number 1, a pair runs the conditional branch alone.
    num_channels, guided_channels: latent channels, and how many of them are guided, from the first; None = all.
    interval, rescale: as in `Guidance`; `valid` is for `rescale`.

  Raises:
    ValueError: `guided_channels` outside 1..num_channels.
  """
  count = num_channels if guided_channels is None else guided_channels
  if not 1 <= count <= num_channels:
    raise ValueError(f"guided_channels is {count}, allowed: 1 to {num_channels} (latent channels) or None for all")

  def apply(x, t, x_mask=None):
    positions = x.shape[-1] // num_channels
    if callable(denoise):
      twice = [None if a is None else jnp.concatenate([a, a]) for a in (x, t, x_mask)]
      conditional, unconditional = jnp.split(denoise(*twice), 2)
    elif isinstance(scale, (int, float)) and scale == 1:
      return denoise[0](x, t, x_mask)
    else:
      conditional, unconditional = (branch(x, t, x_mask) for branch in denoise)
    now = scale if interval is None else jnp.where((interval[0] <= t) & (t <= interval[1]), scale, 1.0)
    now = expand(jnp.asarray(now), conditional) if jnp.ndim(now) else now
    y = unconditional + now * (conditional - unconditional)
    channels = y.shape[-1] // positions  # of the output, variances included
    if count < channels:
      y = jnp.where(jnp.arange(y.shape[-1]) % channels < count, y, conditional)
    if not rescale:
      return y
    return rescaled(y, conditional, rescale, positions=positions, channels=num_channels, valid=valid)

  return apply
