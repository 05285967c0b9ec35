"""Classifier-free guidance on tokens or latents, for every formulation.

    guided = unconditional + scale * (conditional - unconditional)

on the first `guided_channels` channels of every patch position; all others, the variances among them, come from the
conditional branch. Open-Sora 1.1 samples with `guided_channels=3` of four latent channels (its `cfg_channel`, an accident of
the code it grew from, but what its weights are sampled with); 1.2 guides all.
"""

import jax.numpy as jnp

from stdit_jax.diffusion.elements import expand


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


def guided(denoise, scale, *, num_channels, guided_channels=None):
  """Turns one or two model calls into one guided `denoise(x, t, x_mask)`.

  Args:
    denoise: either one callable that takes a doubled batch, conditional rows first, then unconditional ones (it holds the
      doubled conditions), or a pair (conditional, unconditional) of callables that are run one after the other, which
      needs less memory. Both give the same numbers.
    scale: number or `[B]`. A float of 1 runs the conditional branch alone if `denoise` is a pair.
    num_channels: latent channels.
    guided_channels: guided ones of them, from the first; None = all.

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
    return combine(conditional, unconditional, scale, positions=positions, guided_channels=count)

  return apply
