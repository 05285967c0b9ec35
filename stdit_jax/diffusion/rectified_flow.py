"""Rectified flow as in Open-Sora 1.2 (`schedulers/rf`), on tokens `[B, T, S, P]` or latents `[B, T, H, W, C]`.

Time runs from 0 (clean) to `num_timesteps` (noise): x_t = (1 - t/1000) x0 + (t/1000) noise. The model predicts the velocity
v = x0 - noise, and sampling moves along +v. A model is any `denoise(x_t, t [B], x_mask [B, T] or None) -> output`. Its channels
per patch position are the velocity, then the variance of `pred_sigma` models, which is ignored.

Errors of the original are corrected; `compat="open-sora-1.2"` restores them:
  * The timestep transform takes floor(num_frames / 17) * 5 latent frames: 0 for clips of 2 to 16 frames, too few for most
    lengths. If the first sample of a batch has one frame, all samples count as images.
  * Sampling ignores `transform_scale`.
  * In float32 the first transformed timestep can be 1000.0001. Frames to generate then do not take part in the first step.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Num

from stdit_jax import fields
from stdit_jax.arrays import ArrayLike, FrameMask, Latents, PerSample, Time, Valid
from stdit_jax.diffusion import elements
from stdit_jax.diffusion.elements import NO_NOISES, Denoise, Noises, StepState, expand, masked_mean, per_sample, zero_invalid

SAMPLERS = ("euler", "adams-bashforth")
SAMPLE_METHODS = ("uniform", "logit-normal")
COMPAT = (None, "open-sora-1.2")


def compat_latent_frames(num_frames: PerSample) -> PerSample:
  """Latent frames as the original's timestep transform counts them, from pixel frames."""
  xp = _namespace(num_frames)
  return xp.where(num_frames[:1] == 1, xp.ones_like(num_frames), xp.floor_divide(num_frames, 17) * 5)


def timestep_transform(
  t: Num[ArrayLike, "..."], height: Num[ArrayLike, "..."], width: Num[ArrayLike, "..."],
  latent_frames: Num[ArrayLike, "..."], *, scale: float = 1.0, num_timesteps: int = 1000,
  base_resolution: int = 512 * 512, base_num_frames: int = 1,
) -> Num[ArrayLike, "..."]:  # fmt: skip
  """Shifts timesteps towards noise for large and long videos, `t` in [0, num_timesteps] -> same range.

  t' = r s / (1 + (r - 1) s), s = t / num_timesteps, r = scale sqrt(pixels / base_resolution * latent_frames / base_num_frames).
  `height` and `width` are in pixels, and all arguments broadcast. NumPy arguments run in NumPy, which rounds after each
  operation in their dtype (also bfloat16), as PyTorch does. JAX arguments run in JAX. (Open-Sora 1.2,
  `schedulers/rf/rectified_flow.py`; the idea is from Stable Diffusion 3.)
  """
  xp = _namespace(t, height, width, latent_frames)
  s = t / num_timesteps
  r = xp.sqrt(height * width / base_resolution) * xp.sqrt(latent_frames / base_num_frames) * scale
  return r * s / (1 + (r - 1) * s) * num_timesteps


def _namespace(*arrays) -> Any:
  return jnp if any(isinstance(a, jax.Array) for a in arrays) else np


def _floats(values) -> Any:
  """Converts numbers to an array of float32. Arrays of 16-bit floats stay as they are."""
  array = values if isinstance(values, jax.Array) else np.asarray(values)
  return array if jnp.issubdtype(array.dtype, jnp.floating) and array.dtype != np.float64 else array.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class RectifiedFlow:
  """Settings of a rectified flow, static under jit, and its pure functions.

  Attributes:
    num_timesteps: timestep of pure noise.
    sample_method: distribution of training timesteps, "uniform" or "logit-normal" (sigmoid of N(loc, scale)).
    use_discrete_timesteps: integer timesteps (only "uniform"). Sampling rounds before the transform.
    use_timestep_transform: apply `timestep_transform`, with `transform_scale`.
    sampler: "euler" (the original's) or "adams-bashforth" (second order, also one evaluation a step).
    sampling_shift: moves the sampler's timesteps towards noise, after the transform: a t / (1 + (a - 1) t) for t from 0 to 1
      (Esser et al. 2024, arXiv 2403.03206, eq. 23). 1 is no shift. A larger one shortens the first steps, which err most.
    compat: None, or "open-sora-1.2" for the original's errors (see the module).
  """

  stochastic = False  # whether `step` needs noise

  num_timesteps: int = 1000
  sample_method: str = "uniform"
  loc: float = 0.0
  scale: float = 1.0
  use_discrete_timesteps: bool = False
  use_timestep_transform: bool = False
  transform_scale: float = 1.0
  sampler: str = "euler"
  sampling_shift: float = 1.0
  compat: str | None = None

  def __post_init__(self):
    fields.check_choices(self, "rectified flow", sample_method=SAMPLE_METHODS, sampler=SAMPLERS, compat=COMPAT)
    if self.use_discrete_timesteps and self.sample_method != "uniform":
      raise ValueError("rectified flow: use_discrete_timesteps needs sample_method 'uniform'")
    if not 0 < self.sampling_shift < np.inf:
      raise ValueError(f"rectified flow: sampling_shift is {self.sampling_shift}, allowed: above 0, 1 for none")

  def sample_timesteps(
    self, keys: Key[Array, " B"], height: PerSample | None = None, width: PerSample | None = None,
    num_frames: PerSample | None = None, latent_frames: PerSample | None = None,
  ) -> Float[Array, " B"]:  # fmt: skip
    """Training timesteps, from one random key per sample.

    Only `use_timestep_transform` reads the sizes: `height` and `width` in pixels, and `latent_frames` (1 for images). With
    `compat` it reads pixel frames (`num_frames`) instead of latent frames.
    """
    if self.sample_method == "logit-normal":
      normal = jax.vmap(lambda key: jax.random.normal(key, ()))(keys)
      t = jax.nn.sigmoid(self.loc + self.scale * normal) * self.num_timesteps
    elif self.use_discrete_timesteps:
      t = jax.vmap(lambda key: jax.random.randint(key, (), 0, self.num_timesteps))(keys).astype(jnp.float32)
    else:
      t = jax.vmap(lambda key: jax.random.uniform(key, ()))(keys) * self.num_timesteps
    return self._transform(t, (height, width, num_frames, latent_frames), self.transform_scale)

  def fixed_timesteps(self, count: int) -> Float[np.ndarray, " count"]:
    """Timesteps to measure the loss at, evenly inside (0, num_timesteps), not transformed (`eval_loss` of Open-Sora 1.2)."""
    t = np.linspace(0, self.num_timesteps, count + 2)[1:-1].astype(np.float32)
    return np.round(t) if self.use_discrete_timesteps else t

  def _transform(self, t, conditions, scale):
    if not self.use_timestep_transform:
      return t
    height, width, num_frames, latent_frames = conditions
    frames, needed = (num_frames, "num_frames") if self.compat else (latent_frames, "latent_frames")
    if height is None or width is None or frames is None:
      raise ValueError(f"rectified flow: the timestep transform needs height, width and {needed} of every sample")
    frames = compat_latent_frames(_floats(frames)) if self.compat else _floats(frames)
    t = timestep_transform(t, _floats(height), _floats(width), frames, scale=scale, num_timesteps=self.num_timesteps)
    return t if self.compat else _namespace(t).clip(t, 0, self.num_timesteps)

  def add_noise(self, x0: Latents, noise: Latents, t: Time) -> Latents:
    """x_t at timesteps `t` (`[B]` or a scalar)."""
    clean = expand(1 - per_sample(t, x0).astype(jnp.float32) / self.num_timesteps, x0)
    return clean * x0 + (1 - clean) * noise

  def loss(
    self, denoise: Denoise, x0: Latents, noise: Latents, t: PerSample, *, num_channels: int,
    frame_mask: FrameMask | None = None, valid: Valid | None = None,
  ) -> Float[Array, " B"]:  # fmt: skip
    """Loss per sample: squared error of the velocity over the valid elements of the frames to generate.

    `noise` is standard normal, `t` in [0, num_timesteps]. The model sees the other frames exactly clean, and zeros in place of
    invalid elements.
    """
    x_t = self.add_noise(x0, noise, t)
    if frame_mask is not None:
      x_t = jnp.where(expand(frame_mask, x0), x_t, x0)
    output = denoise(zero_invalid(x_t, valid), t, frame_mask)
    error = elements.prediction_of(output, x0, num_channels) - (x0 - noise)
    return masked_mean(jnp.square(error), frame_mask, valid)

  def model_timesteps(self, t: ArrayLike) -> ArrayLike:
    """Returns `t`: the model sees the timesteps themselves."""
    return t

  def for_sampling(self, num_steps: int) -> "RectifiedFlow":
    """Returns this formulation. (IDDPM respaces its schedule.)"""
    if num_steps < 1:
      raise ValueError(f"sampling needs at least one step, got {num_steps}")
    return self

  def sampling_timesteps(
    self, num_steps: int, height: Any, width: Any = None, num_frames: Any = None, latent_frames: Any = None
  ) -> np.ndarray:
    """Timesteps `[num_steps + 1, B]` float32 (NumPy, on the host), from noise down to a last row of zeros.

    Step i goes from row i to row i + 1. Arguments as in `sample_timesteps`; `height` sets B.
    """
    self.for_sampling(num_steps)
    batch = np.shape(height)[0]
    # As the original: the list in float64, the transform in float32.
    base = [(1.0 - i / num_steps) * self.num_timesteps for i in range(num_steps)]
    if self.use_discrete_timesteps:
      base = [round(t) for t in base]
    base = np.repeat(np.asarray(base, np.float32)[:, None], batch, axis=1)
    sizes = [None if v is None else np.asarray(v) for v in (height, width, num_frames, latent_frames)]
    with np.errstate(invalid="ignore"):  # compat: clips below 17 frames compute 0 / 0
      t = self._transform(base, sizes, 1.0 if self.compat else self.transform_scale)
    if self.sampling_shift != 1:
      t = self.sampling_shift * t / (1 + (self.sampling_shift - 1) * t / self.num_timesteps)
      t = t if self.compat else np.clip(t, 0, self.num_timesteps)  # rounding could make t larger than num_timesteps
    return np.concatenate([np.asarray(t, np.float32), np.zeros((1, batch), np.float32)])

  @property
  def multistep(self) -> bool:
    """Whether `step` needs the previous prediction (`elements.no_previous` before the first step)."""
    return self.sampler == "adams-bashforth"

  def step(
    self, denoise: Denoise, state: StepState, t: Time, t_next: Time, *, num_channels: int, noises: Noises = NO_NOISES,
    valid: Valid | None = None,
  ) -> StepState:  # fmt: skip
    """One step from `t` to `t_next` (`[B]` or scalars), to be jitted with the loop outside.

    Frame masks: a frame is active when ratio * num_timesteps >= t. It gets `noises.frames` once, when it becomes active, unless
    its ratio is 1. The model sees inactive frames as clean (x_mask False); the step restores them. Padding becomes zero.
    """
    x, edit, previous = state
    t, before, active = per_sample(t, x), x, None
    if edit is not None:
      if noises.frames is None:
        raise ValueError("rectified flow: a step with frame masks needs noises.frames")
      ratio, added = edit
      active = ratio * self.num_timesteps >= t[:, None]
      x = jnp.where(expand(active & ~added, x), self.add_noise(x, noises.frames, t), x)
      edit = (ratio, active)
    x = zero_invalid(x, valid)
    velocity = elements.prediction_of(denoise(x, t, active), x, num_channels)
    size = (t - per_sample(t_next, x)) / self.num_timesteps
    if self.multistep:
      velocity, previous = elements.second_order(velocity, size, previous, active)
    x = x + velocity * expand(size, x)
    if active is not None:
      x = jnp.where(expand(active, x), x, before)
    return StepState(zero_invalid(x, valid), edit, previous)
