"""Values of pixels and latents: uint8 and [-1, 1], raw and normalised, moments and draws.

Autoencoders work on raw latents z. Denoisers work on normalised latents, (z - shift) * scaling_factor / scale.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, UInt8

AnyArray = Array | np.ndarray
Moments = tuple[Float[Array, "*n h w C"], Float[Array, "*n h w C"]]  # mean, and log-variance or deviation


def to_float(pixels: Num[AnyArray, "..."]) -> Float[AnyArray, "..."]:
  """uint8 pixels -> float32 in [-1, 1]. Floats stay as they are."""
  return pixels.astype(jnp.float32) / 127.5 - 1.0 if pixels.dtype == jnp.uint8 else pixels


def to_uint8(pixels: Float[AnyArray, "..."]) -> UInt8[AnyArray, "..."]:
  """Floats in [-1, 1] -> uint8 pixels, clipped and rounded."""
  xp = np if isinstance(pixels, np.ndarray) else jnp
  return xp.round((xp.clip(pixels, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)


def normalise(config: Any, z: Float[AnyArray, "... C"]) -> Float[Array, "... C"]:
  """Raw latents -> normalised latents."""
  return (z - jnp.asarray(config.shift)) * (config.scaling_factor / jnp.asarray(config.scale))


def denormalise(config: Any, z: Float[AnyArray, "... C"]) -> Float[Array, "... C"]:
  """Normalised latents -> raw latents."""
  return z * (jnp.asarray(config.scale) / config.scaling_factor) + jnp.asarray(config.shift)


def normalised_posterior(config: Any, mean: AnyArray, logvar: AnyArray) -> Moments:
  """Raw mean and log-variance -> normalised mean and standard deviation."""
  return normalise(config, mean), jnp.exp(0.5 * logvar) * (config.scaling_factor / jnp.asarray(config.scale))


def posterior(moments: Float[AnyArray, "*n h w moments"]) -> Moments:
  """Output of an encoder -> raw (mean, logvar), float32. logvar is clipped to [-30, 20]."""
  mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
  return mean, jnp.clip(logvar, -30.0, 20.0)


def draw(mean: Array, logvar: Array, noise: Array | None = None) -> Array:
  """mean + std * noise; the mean without noise."""
  return mean if noise is None else mean + jnp.exp(0.5 * logvar) * noise
