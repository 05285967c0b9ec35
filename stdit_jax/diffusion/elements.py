"""What all formulations share: arrays whose first two axes are batch and time, and what happens per element of them.

Everything here works on tokens `[B, T, S, P]` (P = patch positions * channels) and as well on latents `[B, T, H, W, C]`:
only the axes 0 (batch), 1 (time) and the last one (channels, possibly of several patch positions) have a meaning.
"""

import jax.numpy as jnp


def expand(values, like):
  """`[B]` or `[B, T]` with ones appended up to the rank of `like`, so that it broadcasts against it."""
  values = jnp.asarray(values)
  return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def zero_invalid(x, valid):
  """`x` with zeros, the padding of the original, where `valid` (bool, shape of `x`; None = everywhere valid) is False."""
  return x if valid is None else jnp.where(valid, x, jnp.zeros((), x.dtype))


def masked_mean(values, frame_mask=None, valid=None):
  """Mean per sample `[B]` over the valid elements of the frames to generate (`frame_mask` `[B, T]`, True = generate).

  A sample without any such element gives 0 (the original divides by zero there).
  """
  axes = tuple(range(1, values.ndim))
  if frame_mask is None and valid is None:
    return values.mean(axes)
  counted = jnp.ones(values.shape, bool) if valid is None else jnp.broadcast_to(valid, values.shape)
  if frame_mask is not None:
    counted = counted & expand(frame_mask, values)
  total = jnp.where(counted, values, 0).sum(axes)
  return total / jnp.maximum(counted.sum(axes, dtype=values.dtype), 1)


def split_channels(output, channels):
  """Splits `[..., positions * 2 * channels]` into prediction and variance, `[..., positions * channels]` each.

  The models write, for every position of a patch, first the `channels` of the prediction, then those of the variance
  (Open-Sora `pred_sigma`, `learn_sigma`).

  Raises:
    ValueError: the last axis is no multiple of `2 * channels`.
  """
  *leading, features = output.shape
  if features % (2 * channels):
    raise ValueError(
      f"model output: {features} values per token are no multiple of 2 x {channels} channels (prediction, variance)"
    )
  pairs = output.reshape(*leading, -1, 2, channels)
  return pairs[..., 0, :].reshape(*leading, -1), pairs[..., 1, :].reshape(*leading, -1)


def prediction_of(output, x, channels):
  """Prediction channels (float32, shape of `x`) of a model output with or without variance channels.

  Raises:
    ValueError: the output fits neither `x` nor twice `x`.
  """
  output = output.astype(jnp.float32)
  if output.shape != x.shape:
    output, _ = split_channels(output, channels)
  if output.shape != x.shape:
    raise ValueError(f"model output gives a prediction of shape {output.shape}, its input has shape {x.shape}")
  return output


def start_edit(ratio):
  """State `(ratio, added)` of a sampling run with frame masks, threaded through the `step` of a formulation.

  `ratio` `[B, T]`: 1 = generate the frame from noise, 0 = keep it, in between = keep it until the noise level of the run
  has come down to that fraction, then noise it and generate on (edit strength). `added`: frames that carry noise already.
  """
  ratio = jnp.asarray(ratio, jnp.float32)
  return ratio, ratio == 1


def start_memory(x):
  """What a multistep sampler remembers of the step before, threaded through `step` like the state of `start_edit`:
  (the prediction, like `x`; the size of the step `[B]`; which frames took part, bool `[B, T]`)."""
  return jnp.zeros(x.shape, jnp.float32), jnp.ones(x.shape[:1], jnp.float32), jnp.zeros(x.shape[:2], bool)


def second_order(value, size, memory, active=None):
  """A prediction, led on to the middle of a step of `size` `[B]` by the one before (Adams-Bashforth 2; DPM-Solver++ 2M in
  log-SNR): value + size / (2 size before) (value - value before), in frames that took part then and unless a size is infinite.

  Returns:
    (prediction to step with, memory for the next step); `active` `[B, T]`: frames that take part now, None = all.
  """
  before, size_before, known = memory
  finite = jnp.isfinite(size) & jnp.isfinite(size_before)
  ratio = jnp.where(finite, size / (2 * size_before), 0)
  led = jnp.where(expand(known, value), value + expand(ratio, value) * (value - before), value)
  return led, (value, size, jnp.ones_like(known) if active is None else active)


def per_sample(t, x):
  """Timesteps as `[B]`, from `[B]` or a scalar."""
  return jnp.broadcast_to(jnp.asarray(t), x.shape[:1])
