"""Classifier-free guidance on tokens or latents, for every formulation.

    guided = unconditional + scale * (conditional - unconditional)

on the first `guided_channels` channels of every patch position; all others, the variances among them, come from the
conditional branch. Open-Sora 1.1 samples with `guided_channels=3` of four latent channels (its `cfg_channel`, an accident of
the code it grew from, but what its weights are sampled with); 1.2 guides all.
"""

import dataclasses

import jax.numpy as jnp

from stdit_jax.diffusion.elements import expand


@dataclasses.dataclass(frozen=True)
class Guidance:
  """How strongly the prompt is followed, and where; static under jit.

  Attributes:
    scale: 1 is no guidance.
    channels: guided latent channels, from the first; None = all.
    interval: (low, high), timesteps outside which the scale is 1 (Kynkaanniemi et al. 2024, arXiv 2404.07724); None = all.
    rescale: 0 to 1, how far the prediction is brought back to the spread of the conditional one, against pictures that are too
      bright (Lin et al. 2023, arXiv 2305.08891, section 3.4).
    together: both branches as one batch; False: one after the other, in less memory.
  """

  scale: float = 7.0
  channels: int | None = None
  interval: tuple[float, float] | None = None
  rescale: float = 0.0
  together: bool = True

  def __post_init__(self):
    if not 0 <= self.rescale <= 1:
      raise ValueError(f"guidance: rescale is {self.rescale}; allowed: 0 to 1")
    if self.interval is not None and not self.interval[0] <= self.interval[1]:
      raise ValueError(f"guidance: interval is {self.interval}; the first timestep must not be above the second")


def combine(conditional, unconditional, scale, *, positions, guided_channels):
  """Guided output; all arrays `[B, T, ..., positions * channels]`, `scale` a number or `[B]`.

  `positions` = patch positions per token (1 for latents), `guided_channels` = how many of the channels are guided.
  """
  features = conditional.shape[-1]
  channels = features // positions
  scale = expand(scale, conditional) if jnp.ndim(scale) else scale
  mixed = unconditional + scale * (conditional - unconditional)
  if guided_channels >= channels:
    return mixed
  first = jnp.arange(features) % channels < guided_channels
  return jnp.where(first, mixed, conditional)


def rescaled(prediction, conditional, amount, *, positions, channels, valid=None):
  """`prediction` with its first `channels` per patch position brought, by `amount`, to the standard deviation that they have in
  `conditional`, per sample (arXiv 2305.08891, eq. 15 and 16); only `valid` elements count."""
  features = prediction.shape[-1]
  first = jnp.arange(features) % (features // positions) < channels
  counted = jnp.broadcast_to(first, prediction.shape)
  if valid is not None:
    elements = jnp.repeat(valid.reshape(*valid.shape[:-1], positions, 1, channels), features // positions // channels, -2)
    counted = counted & elements.reshape(prediction.shape)
  axes = tuple(range(1, prediction.ndim))
  spread = lambda x: jnp.std(x.astype(jnp.float32), axis=axes, where=counted)  # noqa: E731
  factor = amount * spread(conditional) / spread(prediction) + (1 - amount)
  return jnp.where(first, prediction * expand(factor, prediction), prediction)


def guided(denoise, scale, *, num_channels, guided_channels=None, interval=None, rescale=0.0, valid=None):
  """Turns one or two model calls into one guided `denoise(x, t, x_mask)`.

  Args:
    denoise: either one callable that takes a doubled batch, conditional rows first, then unconditional ones (it holds the
      doubled conditions), or a pair (conditional, unconditional) of callables that are run one after the other, which
      needs less memory. Both give the same numbers.
    scale: number or `[B]`. A float of 1 runs the conditional branch alone if `denoise` is a pair.
    num_channels: latent channels.
    guided_channels: guided ones of them, from the first; None = all.
    interval, rescale: as in `Guidance`; valid: bool like `x`, for `rescale`.

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
    y = combine(conditional, unconditional, now, positions=positions, guided_channels=count)
    if not rescale:
      return y
    return rescaled(y, conditional, rescale, positions=positions, channels=num_channels, valid=valid)

  return apply
