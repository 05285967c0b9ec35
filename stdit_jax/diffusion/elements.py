"""What all formulations share: the state of a sampler, and operations on tokens or latents (stdit_jax/arrays.py)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from stdit_jax.arrays import ArrayLike, FrameMask, Latents, PerSample, Time, Valid

Denoise = Callable[..., Array]  # a model: (x_t, t, x_mask or None) -> output
Edit = tuple[Float[Array, "B T"], FrameMask]  # (ratio, whether the frame has got its noise)
Previous = tuple[Latents, Float[Array, " B"], FrameMask]  # previous step's prediction, step size, active frames


class StepState(NamedTuple):
  """What a sampler carries from step to step: arrays, or their shapes or shardings."""

  x: Any  # present latents (`Latents`)
  edit: Any = None  # state of `start_edit` (`Edit`), None if no frames are given
  previous: Any = None  # multistep samplers: a `Previous` (`no_previous` before the first step). Others: None


class Noises(NamedTuple):
  """Standard normal noise of a step: `step` for stochastic samplers, `frames` for frames that become active."""

  step: Any = None
  frames: Any = None


NO_NOISES = Noises()


def expand(values: Shaped[ArrayLike, "*lead"], like: Shaped[ArrayLike, "..."]) -> Shaped[Array, "..."]:
  """`[B]` or `[B, T]` with axes of size 1 appended up to the rank of `like`."""
  values = jnp.asarray(values)
  return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def zero_invalid(x: Latents, valid: Valid | None) -> Latents:
  """Sets invalid elements of `x` to zero, as the original pads. None = all elements are valid."""
  return x if valid is None else jnp.where(valid, x, jnp.zeros((), x.dtype))


def masked_mean(values: Latents, frame_mask: FrameMask | None = None, valid: Valid | None = None) -> Float[Array, " B"]:
  """Mean per sample over the valid elements of the frames to generate.

  A sample without any such element returns 0 (the original divides by zero).
  """
  axes = tuple(range(1, values.ndim))
  if frame_mask is None and valid is None:
    return values.mean(axes)
  counted = jnp.ones(values.shape, bool) if valid is None else jnp.broadcast_to(valid, values.shape)
  if frame_mask is not None:
    counted = counted & expand(frame_mask, values)
  total = jnp.where(counted, values, 0).sum(axes)
  return total / jnp.maximum(counted.sum(axes, dtype=values.dtype), 1)


def split_channels(
  output: Shaped[ArrayLike, "... two_P"], channels: int
) -> tuple[Shaped[Array, "... P"], Shaped[Array, "... P"]]:
  """Splits `[..., positions * 2 * channels]` into prediction and variance, `[..., positions * channels]` each.

  For every position of a patch, models write the `channels` of the prediction, then those of the variance (Open-Sora
  `pred_sigma`, `learn_sigma`).

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


def prediction_of(output: Shaped[ArrayLike, "B T *S Q"], x: Latents, channels: int) -> Latents:
  """Prediction channels (float32) of a model output with or without variance channels.

  Raises:
    ValueError: the output has neither the shape of `x` nor twice as many values per token.
  """
  output = output.astype(jnp.float32)
  if output.shape != x.shape:
    output, _ = split_channels(output, channels)
  if output.shape != x.shape:
    raise ValueError(f"model output gives a prediction of shape {output.shape}, its input has shape {x.shape}")
  return output


def start_edit(ratio: Shaped[ArrayLike | np.ndarray, "B T"]) -> Edit:
  """State of a sampling run with frame masks, which `step` of a formulation takes and returns.

  `ratio`: 1 = generate the frame from noise, 0 = keep it. A value between keeps the frame until the noise level has fallen to
  that fraction; then the frame is noised and generated (edit strength).
  """
  ratio = jnp.asarray(ratio, jnp.float32)
  return ratio, ratio == 1


def no_previous(x: Latents) -> Previous:
  """Previous prediction of a multistep sampler before its first step, which `step` takes and returns."""
  return jnp.zeros(x.shape, jnp.float32), jnp.ones(x.shape[:1], jnp.float32), jnp.zeros(x.shape[:2], bool)


def second_order(
  value: Latents, size: Float[Array, " B"], previous: Previous, active: FrameMask | None = None
) -> tuple[Latents, Previous]:
  """Extrapolates to the middle of a step of `size`, along the line through the previous and the present prediction.

  value + size / (2 * previous size) * (value - previous value): Adams-Bashforth 2, or DPM-Solver++ 2M in log-SNR. The
  prediction stays unchanged if either step size is infinite, and in frames that skipped the previous step.

  Args:
    active: frames that take part in this step, None = all.

  Returns:
    (prediction to step with, previous prediction for the next step)
  """
  old_value, old_size, known = previous
  finite = jnp.isfinite(size) & jnp.isfinite(old_size)
  ratio = jnp.where(finite, size / (2 * old_size), 0)
  extrapolated = jnp.where(expand(known, value), value + expand(ratio, value) * (value - old_value), value)
  return extrapolated, (value, size, jnp.ones_like(known) if active is None else active)


def per_sample(t: Time, x: Latents) -> PerSample:
  """Timesteps as `[B]`, from `[B]` or a scalar."""
  return jnp.broadcast_to(jnp.asarray(t), x.shape[:1])
