"""Losses for training autoencoders: pure functions with one value per sample.

Scale: the original (latent diffusion, Open-Sora 1.2 section 5.3) adds the sum of the error over all pixels of a sample to the
KL sum times 1e-6. The reconstruction error here is a mean, so a trainer divides the KL by the number of pixel values of the
sample. A `kl_weight` then means the same as in the original, and the numbers do not depend on the size of the frames.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from stdit_jax.autoencoders.latents import AnyArray

KINDS = ("l1", "l2")


def reconstruction_error(
  prediction: Float[AnyArray, " N *shape"], target: Float[AnyArray, " N *shape"], kind: str = "l1"
) -> Float[Array, " N"]:
  """Mean absolute ("l1") or squared ("l2") error per sample."""
  if kind not in KINDS:
    raise ValueError(f"Unknown reconstruction loss {kind!r}; allowed: {', '.join(KINDS)}.")
  error = (prediction - target).astype(jnp.float32)
  error = jnp.abs(error) if kind == "l1" else error * error
  return error.mean(tuple(range(1, error.ndim)))


def kl_divergence(mean: Float[AnyArray, " N *shape"], logvar: Float[AnyArray, " N *shape"]) -> Float[Array, " N"]:
  """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, summed over the latents of a sample."""
  terms = mean * mean + jnp.exp(logvar) - 1.0 - logvar
  return 0.5 * terms.sum(tuple(range(1, terms.ndim)))
