"""Rectified flow as in Open-Sora 1.2 (`schedulers/rf`), on tokens `[B, T, S, P]` or latents `[B, T, H, W, C]`.

Time runs from 0 (clean) to `num_timesteps` (noise): x_t = (1 - t/1000) x0 + (t/1000) noise; the model predicts x0 - noise
and sampling moves along +v. A model is any `denoise(x_t, t [B], x_mask [B, T] or None) -> output`, whose channels per
patch position are the velocity, then (ignored) the variance of `pred_sigma` models.

Where the original goes wrong we mend by default; `compat="open-sora-1.2"` restores it:
  * timestep transform: latent frames taken as floor(num_frames / 17) * 5, which is 0 for clips of 2 to 16 frames and too
    few for most lengths; a batch whose first sample has one frame counts as images throughout.
  * sampling ignores `transform_scale`.
  * in float32 the first transformed timestep can be 1000.0001, and frames to generate then stay out of the first step.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from stdit_jax.diffusion.elements import expand, masked_mean, per_sample, prediction_of, second_order, zero_invalid

SAMPLERS = ("euler", "adams-bashforth")
SAMPLE_METHODS = ("uniform", "logit-normal")
COMPAT = (None, "open-sora-1.2")


def compat_latent_frames(num_frames):
  """Latent frames `[B]` as the original's timestep transform counts them (`num_frames`: pixel frames `[B]`)."""
  xp = _namespace(num_frames)
  return xp.where(num_frames[:1] == 1, xp.ones_like(num_frames), xp.floor_divide(num_frames, 17) * 5)


def timestep_transform(
  t, height, width, latent_frames, *, scale=1.0, num_timesteps=1000, base_resolution=512 * 512, base_num_frames=1
):
  """Shifts timesteps towards noise for large and long videos, `t` in [0, num_timesteps] -> same range.

  t' = r s / (1 + (r - 1) s) with s = t / num_timesteps and r = scale * sqrt(pixels / base) * sqrt(latent frames / base);
  `height`, `width` in pixels, all arguments broadcast. NumPy arrays are computed with NumPy, operation by operation in
  their own precision (as PyTorch does, bfloat16 conditioning included), JAX arrays with JAX. (Open-Sora 1.2,
  `schedulers/rf/rectified_flow.py`; the idea is from Stable Diffusion 3.)
  """
  xp = _namespace(t, height, width, latent_frames)
  s = t / num_timesteps
  r = xp.sqrt(height * width / base_resolution) * xp.sqrt(latent_frames / base_num_frames) * scale
  return r * s / (1 + (r - 1) * s) * num_timesteps


def _namespace(*arrays):
  return jnp if any(isinstance(a, jax.Array) for a in arrays) else np


def _floats(values):
  """As an array: floating point kept as it is, anything else float32."""
  array = values if isinstance(values, jax.Array) else np.asarray(values)
  return array if jnp.issubdtype(array.dtype, jnp.floating) and array.dtype != np.float64 else array.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class RectifiedFlow:
  """Settings of a rectified flow; pure functions, static under jit.

  Attributes:
    num_timesteps: timestep of pure noise.
    sample_method: distribution of training timesteps, "uniform" or "logit-normal" (sigmoid of N(loc, scale)).
    use_discrete_timesteps: integer timesteps (only "uniform"); in sampling rounded before the transform.
    use_timestep_transform: apply `timestep_transform`, with `transform_scale`.
    sampler: "euler" (the original's) or "adams-bashforth": of second order, also with one evaluation a step.
    sampling_shift: moves the sampler's timesteps towards noise, on top of the transform: a t / (1 + (a - 1) t) for t from 0
      to 1 (Esser et al. 2024, arXiv 2403.03206, eq. 23); 1 is none. Of few steps the first ones make most of the error.
    compat: None, or "open-sora-1.2" for the original's accidents (see the module).
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
    if self.sample_method not in SAMPLE_METHODS:
      raise ValueError(f"rectified flow: unknown sample_method {self.sample_method!r}, allowed: {', '.join(SAMPLE_METHODS)}")
    if self.use_discrete_timesteps and self.sample_method != "uniform":
      raise ValueError("rectified flow: use_discrete_timesteps needs sample_method 'uniform'")
    if self.sampler not in SAMPLERS:
      raise ValueError(f"rectified flow: unknown sampler {self.sampler!r}, allowed: {', '.join(SAMPLERS)}")
    if not 0 < self.sampling_shift < np.inf:
      raise ValueError(f"rectified flow: sampling_shift is {self.sampling_shift}, allowed: above 0, 1 for none")
    if self.compat not in COMPAT:
      raise ValueError(f"rectified flow: unknown compat {self.compat!r}, allowed: None, 'open-sora-1.2'")

  def sample_timesteps(self, keys, height=None, width=None, num_frames=None, latent_frames=None):
    """Training timesteps float32 `[B]` from one random key per sample.

    `height`, `width`, `num_frames` in pixels and pixel frames `[B]`, `latent_frames` `[B]` (what the autoencoder makes of
    the clip, 1 for images): only read with `use_timestep_transform`; `num_frames` only with compat, else `latent_frames`.
    """
    if self.sample_method == "logit-normal":
      normal = jax.vmap(lambda key: jax.random.normal(key, ()))(keys)
      t = jax.nn.sigmoid(self.loc + self.scale * normal) * self.num_timesteps
    elif self.use_discrete_timesteps:
      t = jax.vmap(lambda key: jax.random.randint(key, (), 0, self.num_timesteps))(keys).astype(jnp.float32)
    else:
      t = jax.vmap(lambda key: jax.random.uniform(key, ()))(keys) * self.num_timesteps
    return self._transform(t, (height, width, num_frames, latent_frames), self.transform_scale)

  def fixed_timesteps(self, count):
    """`count` timesteps float32 (NumPy) evenly inside (0, num_timesteps), not transformed, to measure the loss at: those of
    Open-Sora 1.2's `eval_loss`."""
    t = np.linspace(0, self.num_timesteps, count + 2)[1:-1].astype(np.float32)
    return np.round(t) if self.use_discrete_timesteps else t

  def _transform(self, t, conditions, scale):
    if not self.use_timestep_transform:
      return t
    height, width, num_frames, latent_frames = conditions
    frames = num_frames if self.compat else latent_frames
    if height is None or width is None or frames is None:
      needed = "num_frames" if self.compat else "latent_frames"
      raise ValueError(f"rectified flow: the timestep transform needs height, width and {needed} of every sample")
    frames = _floats(frames)
    frames = compat_latent_frames(frames) if self.compat else frames
    t = timestep_transform(t, _floats(height), _floats(width), frames, scale=scale, num_timesteps=self.num_timesteps)
    return t if self.compat else _namespace(t).clip(t, 0, self.num_timesteps)

  def add_noise(self, x0, noise, t):
    """x_t at timesteps `t` `[B]` (or a scalar), float32."""
    clean = expand(1 - per_sample(t, x0).astype(jnp.float32) / self.num_timesteps, x0)
    return clean * x0 + (1 - clean) * noise

  def loss(self, denoise, x0, noise, t, *, num_channels, frame_mask=None, valid=None):
    """Loss per sample `[B]`: squared error of the velocity over the valid elements of the frames to generate.

    Args:
      denoise: `(x_t, t, x_mask) -> output`.
      x0, noise: clean latents and standard normal noise, same shape.
      t: `[B]` in [0, num_timesteps].
      num_channels: latent channels.
      frame_mask: `[B, T]` True = frame to generate; the others enter the model exactly clean and bear no loss.
      valid: bool like `x0`; elsewhere the model sees zeros.
    """
    x_t = self.add_noise(x0, noise, t)
    if frame_mask is not None:
      x_t = jnp.where(expand(frame_mask, x0), x_t, x0)
    output = denoise(zero_invalid(x_t, valid), t, frame_mask)
    error = prediction_of(output, x0, num_channels) - (x0 - noise)
    return masked_mean(jnp.square(error), frame_mask, valid)

  def model_timesteps(self, t):
    """What the model is shown for timesteps of this formulation: the same."""
    return t

  def for_sampling(self, num_steps):
    """The formulation to sample with (the same here; IDDPM respaces its schedule)."""
    if num_steps < 1:
      raise ValueError(f"sampling needs at least one step, got {num_steps}")
    return self

  def sampling_timesteps(self, num_steps, height, width=None, num_frames=None, latent_frames=None):
    """Timesteps float32 `[num_steps + 1, B]` (NumPy, on the host), from noise down to a last row of zeros.

    Step i goes from row i to row i + 1. Arguments as in `sample_timesteps`; `height` gives B.
    """
    self.for_sampling(num_steps)
    batch = np.shape(height)[0]
    # The base list in float64, then float32, as the original: the transform itself is evaluated in float32.
    base = [(1.0 - i / num_steps) * self.num_timesteps for i in range(num_steps)]
    if self.use_discrete_timesteps:
      base = [round(t) for t in base]
    base = np.repeat(np.asarray(base, np.float32)[:, None], batch, axis=1)
    sizes = [None if v is None else np.asarray(v) for v in (height, width, num_frames, latent_frames)]
    with np.errstate(invalid="ignore"):  # compat: clips below 17 frames give 0 / 0, as in the original
      t = self._transform(base, sizes, 1.0 if self.compat else self.transform_scale)
    if self.sampling_shift != 1:
      t = self.sampling_shift * t / (1 + (self.sampling_shift - 1) * t / self.num_timesteps)
    return np.concatenate([np.asarray(t, np.float32), np.zeros((1, batch), np.float32)])

  @property
  def remembers(self):
    """Whether `step` takes `elements.start_memory` and gives what follows it."""
    return self.sampler == "adams-bashforth"

  def step(self, denoise, x, t, t_next, *, num_channels, noise=None, frame_noise=None, edit=None, memory=None, valid=None):
    """One step from `t` to `t_next` `[B]`; pure, to be jitted with the loop outside.

    Frame masks: a frame is active when ratio * num_timesteps >= t. It is noised once, with `frame_noise`, when it becomes
    active, unless its ratio is 1; frames that are not active are shown as clean (x_mask False) and restored afterwards.

    Args:
      denoise: `(x, t, x_mask) -> output`, guidance included.
      x: present latents. Invalid elements come back as zeros.
      noise: not used (the step is deterministic); here so that all formulations are called alike.
      frame_noise: standard normal, like `x`; needed with `edit`.
      edit: None or the state of `elements.start_edit`; memory: that of `elements.start_memory`, if the sampler `remembers`.

    Returns:
      x, edit state and memory after the step.
    """
    del noise
    t, before, active = per_sample(t, x), x, None
    if edit is not None:
      if frame_noise is None:
        raise ValueError("rectified flow: a step with frame masks needs frame_noise for frames that become active")
      ratio, added = edit
      active = ratio * self.num_timesteps >= t[:, None]
      x = jnp.where(expand(active & ~added, x), self.add_noise(x, frame_noise, t), x)
      edit = (ratio, active)
    x = zero_invalid(x, valid)
    velocity = prediction_of(denoise(x, t, active), x, num_channels)
    size = (t - per_sample(t_next, x)) / self.num_timesteps
    if self.remembers:
      velocity, memory = second_order(velocity, size, memory, active)
    x = x + velocity * expand(size, x)
    if active is not None:
      x = jnp.where(expand(active, x), x, before)
    return zero_invalid(x, valid), edit, memory
