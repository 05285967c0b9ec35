"""IDDPM as in Open-Sora 1.0 and 1.1 (`schedulers/iddpm`), on tokens `[B, T, S, P]` or latents `[B, T, H, W, C]`.

Noise prediction, learned variance range with the hybrid loss (Nichol & Dhariwal 2021) or fixed variance, respaced sampling.
`index` is always the position in the (respaced) schedule, 0 = least noise. Models see the original timestep,
`timestep_map[index]`. A model is any `denoise(x_t, t [B] float32, x_mask [B, T] or None) -> output`. Its channels per patch
position are the predicted noise, then, for a learned variance, the interpolation v.

Two properties of the original stay, because released weights were trained with them:
  * Tables are computed in float32, which shifts some entries near t = 0 by up to 6e-4. `tables="float64"` computes exact ones.
  * In masked training, clean frames are q_sample at index 0 (noise of standard deviation 0.01), not the clean latents.
Two errors of the original are corrected; `compat="open-sora-1.1"` restores them:
  * On the last step, the original adds noise to frames with edit ratio 0 and denoises them.
  * In the step that adds noise to a frame, the original tells the model that the frame is clean. The step then uses a
    prediction that was never trained, since the loss excludes clean frames.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Integer, Key

from stdit_jax import fields
from stdit_jax.arrays import ArrayLike, FrameMask, Latents, PerSample, Time, Valid
from stdit_jax.diffusion import elements
from stdit_jax.diffusion.elements import NO_NOISES, Denoise, Noises, StepState, expand, masked_mean, per_sample, zero_invalid

Table = Float[np.ndarray, " n"]

# name: betas `[n]` in float64
SCHEDULES = {
  "linear": lambda n: np.linspace(0.1 / n, 20 / n, n, dtype=np.float64),  # Ho et al. 2020, scaled from n = 1000
  "cosine": lambda n: np.minimum(1 - _cosine(np.arange(1, n + 1) / n) / _cosine(np.arange(n) / n), 0.999),
}
VARIANCES = ("learned-range", "fixed-large", "fixed-small")
SAMPLERS = ("ancestral", "ddim", "dpm++")
COMPAT = (None, "open-sora-1.1")


def _cosine(s):
  """Cumulative product of alphas, up to a factor, at s from 0 to 1 (Nichol & Dhariwal 2021, eq. 17)."""
  return np.cos((s + 0.008) / 1.008 * np.pi / 2) ** 2


def space_timesteps(num_timesteps: int, respacing: str | int | None) -> list[int]:
  """Original timesteps, sorted, that a respaced schedule uses.

  `respacing` is a number of steps (50 or "50"). "10,15,20" divides the timesteps into three equal sections with so many steps.
  "ddim50" takes 50 steps with a constant integer stride. None or "" = all timesteps.

  Raises:
    ValueError: more steps than timesteps, no integer stride gives the number, or the text has none of these forms.
  """
  if respacing in (None, ""):
    return list(range(num_timesteps))
  text = str(respacing)
  try:
    counts = [int(part) for part in text.removeprefix("ddim").split(",")]
  except ValueError:
    counts = []
  if not counts or min(counts) < 1 or (text.startswith("ddim") and len(counts) > 1):
    raise ValueError(f"timestep respacing {respacing!r} is not understood; allowed: '100', '10,15,20', 'ddim50'")
  if text.startswith("ddim"):
    for stride in range(1, num_timesteps + 1):
      steps = list(range(0, num_timesteps, stride))
      if len(steps) == counts[0]:
        return steps
    raise ValueError(f"timestep respacing {respacing!r}: no integer stride gives {counts[0]} of {num_timesteps} timesteps")
  size, extra = divmod(num_timesteps, len(counts))
  steps, start = set(), 0
  for section, count in enumerate(counts):
    length = size + (section < extra)
    if length < count:
      raise ValueError(f"timestep respacing {respacing!r}: {count} steps in a section of {length} timesteps")
    stride = (length - 1) / (count - 1) if count > 1 else 1
    # Sums and rounds (half to even) as the original: the lists depend on it.
    steps.update(start + round(position) for position in itertools.accumulate([stride] * (count - 1), initial=0.0))
    start += length
  return sorted(steps)


@dataclasses.dataclass(frozen=True)
class IDDPM:
  """Settings of an IDDPM schedule, static under jit, and its pure functions.

  Attributes:
    num_timesteps: length n of the original schedule.
    betas: "linear" (from 0.1 / n to 20 / n) or "cosine".
    variance: of x_{t-1}. "learned-range": the model has variance channels, and the loss adds the variational bound.
      "fixed-large" (beta) or "fixed-small" (posterior variance): the loss is the mean squared error, and variance channels of
      the model, if any, are ignored.
    respacing: see `space_timesteps`; `for_sampling` sets it.
    tables: "float32" (the original's, default) or "float64" (computed exactly, then rounded to float32 on the device).
    sampler: "ancestral" (the original's); without noise "ddim" (eta = 0, Song et al. 2020) and "dpm++" (DPM-Solver++ 2M, Lu et
      al. 2022, arXiv 2211.01095: second order, one evaluation a step).
    compat: None, or "open-sora-1.1" (see the module).
  """

  num_timesteps: int = 1000
  betas: str = "linear"
  variance: str = "learned-range"
  respacing: str | int | None = None
  tables: str = "float32"
  sampler: str = "ancestral"
  compat: str | None = None

  def __post_init__(self):
    tables = ("float32", "float64")
    fields.check_choices(self, "iddpm", betas=SCHEDULES, variance=VARIANCES, tables=tables, sampler=SAMPLERS, compat=COMPAT)
    space_timesteps(self.num_timesteps, self.respacing)

  @functools.cached_property
  def timestep_map(self) -> Int32[np.ndarray, " n"]:
    """Original timesteps, ascending."""
    return np.asarray(space_timesteps(self.num_timesteps, self.respacing), np.int32)

  @property
  def num_steps(self) -> int:
    """Length n of the respaced schedule."""
    return len(self.timestep_map)

  @functools.cached_property
  def schedule(self) -> dict[str, Table]:
    """Tables by the original's names, in the precision of `tables`."""
    betas = SCHEDULES[self.betas](self.num_timesteps)
    if self.num_steps != self.num_timesteps:
      kept = np.cumprod(1 - betas)[self.timestep_map]
      betas = 1 - kept / np.concatenate([[1.0], kept[:-1]])
    betas = betas.astype(self.tables)
    alphas = 1 - betas
    cumulative = np.cumprod(alphas.astype(np.float64)).astype(self.tables)  # as PyTorch does for float32
    previous = np.concatenate([np.ones(1, self.tables), cumulative[:-1]])
    variance = betas * (1 - previous) / (1 - cumulative)
    return {
      "betas": betas,
      "alphas_cumprod": cumulative,
      "alphas_cumprod_prev": previous,
      "sqrt_alphas_cumprod": np.sqrt(cumulative),
      "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - cumulative),
      "log_one_minus_alphas_cumprod": np.log(1 - cumulative),
      "sqrt_recip_alphas_cumprod": np.sqrt(1 / cumulative),
      "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / cumulative - 1),
      "posterior_variance": variance,
      # The first variance is 0. The next variance replaces it in the logarithm, or beta if there is a single step.
      "posterior_log_variance_clipped": np.log(np.append(variance[1:2] if len(betas) > 1 else betas[:1], variance[1:])),
      "posterior_mean_coef1": betas * np.sqrt(previous) / (1 - cumulative),
      "posterior_mean_coef2": (1 - previous) * np.sqrt(alphas) / (1 - cumulative),
    }

  def _at(self, name, index, like):
    """Entries `index` `[B]` of a table (float32), broadcastable against `like`."""
    return expand(jnp.asarray(self.schedule[name], jnp.float32)[index], like)

  def sample_timesteps(self, keys: Key[Array, " B"], *sizes: Any) -> Int32[Array, " B"]:
    """Training indices, uniform, from one random key per sample. The sizes are not used."""
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, self.num_steps))(keys)

  def fixed_timesteps(self, count: int) -> Int32[np.ndarray, " count"]:
    """Schedule indices to measure the loss at, evenly inside the schedule."""
    return np.linspace(0, self.num_steps - 1, count + 2)[1:-1].round().astype(np.int32)

  def add_noise(self, x0: Latents, noise: Latents, index: Time) -> Latents:
    """A draw from q(x_t | x_0) at `index`: sqrt(abar) x0 + sqrt(1 - abar) noise."""
    index = per_sample(index, x0)
    return self._at("sqrt_alphas_cumprod", index, x0) * x0 + self._at("sqrt_one_minus_alphas_cumprod", index, x0) * noise

  def posterior(self, x0: Latents, x_t: Latents, index: PerSample) -> tuple[Latents, Array]:
    """Mean and clipped log variance of q(x_{t-1} | x_t, x_0). The log variance broadcasts against `x_t`."""
    mean = self._at("posterior_mean_coef1", index, x_t) * x0 + self._at("posterior_mean_coef2", index, x_t) * x_t
    return mean, self._at("posterior_log_variance_clipped", index, x_t)

  def split(self, output: Array, x: Latents, num_channels: int) -> tuple[Latents, Latents | None]:
    """(predicted noise, v) of a model output; v is None for a fixed variance."""
    if self.variance != "learned-range":
      return elements.prediction_of(output, x, num_channels), None
    if output.shape != (*x.shape[:-1], 2 * x.shape[-1]):
      raise ValueError(
        f"iddpm: variance 'learned-range' needs variance channels, but the model output has shape {output.shape} for an input "
        f"of shape {x.shape}; use a model with pred_sigma, or set variance='fixed-large'"
      )
    return elements.split_channels(output.astype(jnp.float32), num_channels)

  def predict_x0(self, noise: Latents, x: Latents, index: PerSample) -> Latents:
    """The x0 that follows from the predicted noise."""
    return self._at("sqrt_recip_alphas_cumprod", index, x) * x - self._at("sqrt_recipm1_alphas_cumprod", index, x) * noise

  def p_mean_variance(self, noise: Latents, v: Latents | None, x: Latents, index: PerSample) -> tuple[Latents, Latents]:
    """Mean and log variance of x_{t-1}, by the predicted noise and v.

    A learned log variance is frac log beta + (1 - frac) log posterior variance with frac = (v + 1) / 2.
    """
    low, high = self._at("posterior_log_variance_clipped", index, x), jnp.log(self._at("betas", index, x))
    if v is not None:
      fraction = (v + 1) / 2
      log_variance = fraction * high + (1 - fraction) * low
    else:  # at index 0, "fixed-large" takes the posterior variance, as in the original
      fixed = low if self.variance == "fixed-small" else jnp.where(expand(index == 0, x), low, high)
      log_variance = jnp.broadcast_to(fixed, x.shape)
    mean, _ = self.posterior(self.predict_x0(noise, x, index), x, index)
    return mean, log_variance

  def loss_terms(
    self, denoise: Denoise, x0: Latents, noise: Latents, index: PerSample, *, num_channels: int,
    frame_mask: FrameMask | None = None, valid: Valid | None = None,
  ) -> dict:  # fmt: skip
    """Terms of the loss per sample: "mse", with a learned variance "vb" (bits), and "loss", their sum. Arguments as `loss`."""
    x_t = self.add_noise(x0, noise, index)
    if frame_mask is not None:
      x_t = jnp.where(expand(frame_mask, x0), x_t, self.add_noise(x0, noise, 0))
    x_t = zero_invalid(x_t, valid)
    output = denoise(x_t, self.model_timesteps(index), frame_mask)
    predicted, v = self.split(output, x_t, num_channels)
    mse = masked_mean(jnp.square(noise - predicted), frame_mask, valid)
    if v is None:
      return {"loss": mse, "mse": mse}
    # The variational bound trains the variance only.
    model = self.p_mean_variance(jax.lax.stop_gradient(predicted), v, x_t, index)
    kl = _normal_kl(*self.posterior(x0, x_t, index), *model)
    likelihood = _discretized_log_likelihood(x0, model[0], 0.5 * model[1])
    bits = jnp.where(expand(index == 0, x0), -likelihood, kl) / np.log(2.0)
    vb = masked_mean(bits, frame_mask, valid)
    return {"loss": mse + vb, "mse": mse, "vb": vb}

  def loss(
    self, denoise: Denoise, x0: Latents, noise: Latents, t: PerSample, *, num_channels: int,
    frame_mask: FrameMask | None = None, valid: Valid | None = None,
  ) -> Float[Array, " B"]:  # fmt: skip
    """Loss per sample over the valid elements of the frames to generate.

    `noise` is standard normal, `t` are schedule indices. The model sees zeros in place of invalid elements.
    """
    terms = self.loss_terms(denoise, x0, noise, t, num_channels=num_channels, frame_mask=frame_mask, valid=valid)
    return terms["loss"]

  def model_timesteps(self, index: Integer[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """Timesteps that the model sees: the original ones."""
    return jnp.asarray(self.timestep_map, jnp.float32)[index]

  def for_sampling(self, num_steps: int | str) -> "IDDPM":
    """The schedule respaced to `num_steps` (an int, or another respacing)."""
    if isinstance(num_steps, int) and num_steps > self.num_timesteps:
      raise ValueError(f"{num_steps} sampler steps; iddpm allows at most its {self.num_timesteps} timesteps")
    return dataclasses.replace(self, respacing=num_steps)

  def sampling_timesteps(self, num_steps: int, height: Any, *sizes: Any) -> np.ndarray:
    """Schedule indices `[num_steps + 1, B]` int32 (NumPy), from noise down to a last row of -1. `height` sets B."""
    if num_steps != self.num_steps:
      raise ValueError(f"iddpm: schedule has {self.num_steps} steps, not {num_steps}: respace it with for_sampling first")
    return np.repeat(np.arange(num_steps - 1, -2, -1, dtype=np.int32)[:, None], np.shape(height)[0], axis=1)

  @property
  def stochastic(self) -> bool:
    """Whether `step` needs noise."""
    return self.sampler == "ancestral"

  @property
  def multistep(self) -> bool:
    """Whether `step` needs the previous prediction (`elements.no_previous` before the first step)."""
    return self.sampler == "dpm++"

  def step(
    self, denoise: Denoise, state: StepState, t: Time, t_next: Time | None = None, *, num_channels: int,
    noises: Noises = NO_NOISES, valid: Valid | None = None,
  ) -> StepState:  # fmt: skip
    """One step at schedule index `t`, to be jitted with the loop outside.

    With frame masks, a frame starts at index m = trunc(ratio * steps). At higher indices the model sees it as clean and the
    step restores it. At index m it gets `noises.frames` and takes part (with `compat` the model still sees it as clean). A
    frame of ratio 0 never starts, except with `compat`, where m is 0.

    Args:
      state: what the previous step returned. Invalid elements of `x` become zeros.
      t_next: not used. All formulations take it.
      noises: `step` if the sampler is `stochastic` (unused at index 0), `frames` with `state.edit`.
    """
    x, edit, previous = state
    index, before, x_mask, active = per_sample(t, x), x, None, None
    if self.stochastic and noises.step is None:
      raise ValueError("iddpm: an ancestral step needs noises.step")
    if edit is not None:
      if noises.frames is None:
        raise ValueError("iddpm: a step with frame masks needs noises.frames")
      ratio, _ = edit
      start = (ratio * self.num_steps).astype(jnp.int32)
      start = start if self.compat else jnp.where(ratio > 0, start, -1)
      active = start >= index[:, None]  # [B, T]
      x_mask = start > index[:, None] if self.compat else active
      x = jnp.where(expand(start == index[:, None], x), self.add_noise(x, noises.frames, index), x)
    x = zero_invalid(x, valid)
    predicted, v = self.split(denoise(x, self.model_timesteps(index), x_mask), x, num_channels)
    if self.sampler == "ancestral":
      sample = self.ancestral(predicted, v, x, index, noises.step)
    elif self.sampler == "ddim":
      sample = self.ddim(predicted, x, index)
    else:
      sample, previous = self.dpm(predicted, x, index, previous, active)
    if active is not None:
      sample = jnp.where(expand(active, x), sample, before)
    return StepState(zero_invalid(sample, valid), edit, previous)

  def ancestral(self, predicted: Latents, v: Latents | None, x: Latents, index: PerSample, noise: Latents) -> Latents:
    """A draw of x_{t-1} ~ p(x_{t-1} | x_t) at `index` `[B]`."""
    mean, log_variance = self.p_mean_variance(predicted, v, x, index)
    return mean + jnp.where(expand(index > 0, x), jnp.exp(0.5 * log_variance), 0) * noise

  def ddim(self, predicted: Latents, x: Latents, index: PerSample) -> Latents:
    """One DDIM step without noise (Song et al. 2020, eq. 12 with sigma = 0)."""
    x0, previous = self.predict_x0(predicted, x, index), self._at("alphas_cumprod_prev", index, x)
    return x0 * jnp.sqrt(previous) + jnp.sqrt(1 - previous) * predicted

  def dpm(self, predicted: Latents, x: Latents, index: PerSample, previous: Any, active: FrameMask | None = None) -> tuple:
    """One step of DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2) from `index` to the next lower index.

    The last step is first order. Returns (sample, previous prediction for the next step).
    """
    x0 = self.predict_x0(predicted, x, index)
    # Cumulative alphas before and after the step, [B]. After the last step the sample has no noise.
    before, after = (jnp.asarray(self.schedule[name], jnp.float32)[index] for name in ("alphas_cumprod", "alphas_cumprod_prev"))
    size = 0.5 * (jnp.log(after) - jnp.log1p(-after) - jnp.log(before) + jnp.log1p(-before))  # in log(signal / noise)
    x0, previous = elements.second_order(x0, size, previous, active)
    noise = jnp.sqrt((1 - after) / (1 - before))
    return expand(noise, x) * x + expand(jnp.sqrt(after) - jnp.sqrt(before) * noise, x) * x0, previous


def _normal_kl(mean1, log_variance1, mean2, log_variance2):
  """KL divergence between two normal distributions, elementwise, nats."""
  difference = log_variance1 - log_variance2
  return 0.5 * (-1 - difference + jnp.exp(difference) + jnp.square(mean1 - mean2) * jnp.exp(-log_variance2))


def _discretized_log_likelihood(x, mean, log_scale):
  """Log likelihood of 8-bit data scaled to [-1, 1] under a normal distribution, elementwise, nats."""

  def cdf(z):  # the tanh approximation and the clamp at 1e-12 are the original's
    return 0.5 * (1 + _tanh(np.float32(np.sqrt(2 / np.pi)) * (z + 0.044715 * z**3)))

  def log(p):
    return jnp.log(jnp.maximum(p, 1e-12))

  precision = jnp.exp(-log_scale)
  above, below = cdf(precision * (x - mean + 1 / 255)), cdf(precision * (x - mean - 1 / 255))
  return jnp.where(x < -0.999, log(above), jnp.where(x > 0.999, log(1 - below), log(above - below)))


def _tanh(z):
  """tanh, correctly rounded near 1 and -1, which XLA's own is not.

  Far from the mean, the log likelihood is the logarithm of a tiny difference, a few units in the last place of float32. With
  `jnp.tanh` a quarter of random t = 0 terms differed from PyTorch's by 1e-4 to 4e-2 (measured), with this function none.
  """
  size = jnp.abs(z)
  return jnp.where(size > 0.55, jnp.sign(z) * (1 - 2 / (jnp.exp(2 * jnp.minimum(size, 20)) + 1)), jnp.tanh(z))
