"""Losses for training autoencoders: pure functions with one value per sample, which the training step weights.

Scale: the original (latent diffusion, Open-Sora 1.2 section 5.3) adds sums over all pixels of a sample to the KL sum times
1e-6. The reconstruction here is a mean, so a trainer divides the KL by the number of pixel values of the sample: that keeps
the ratio, and with it the meaning of a `kl_weight`, and the numbers do not depend on the size of the frames.
"""

import jax.numpy as jnp

KINDS = ("l1", "l2")


def reconstruction_error(prediction, target, kind="l1"):
  """Mean absolute ("l1") or squared ("l2") error of `[N, ...]` per sample -> float32 `[N]`."""
  if kind not in KINDS:
    raise ValueError(f"Unknown reconstruction loss {kind!r}; allowed: {', '.join(KINDS)}.")
  error = (prediction - target).astype(jnp.float32)
  error = jnp.abs(error) if kind == "l1" else error * error
  return error.mean(tuple(range(1, error.ndim)))


def kl_divergence(mean, logvar):
  """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, summed over the latents `[N, ...]` of a sample -> `[N]`."""
  terms = mean * mean + jnp.exp(logvar) - 1.0 - logvar
  return 0.5 * terms.sum(tuple(range(1, terms.ndim)))
