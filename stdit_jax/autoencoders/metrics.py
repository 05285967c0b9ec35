"""How near two videos are, in their pixels."""

import dm_pix
import jax
import numpy as np


def psnr(a, b):
  """Decibels between two arrays of uint8; 99 where they are equal."""
  error = np.mean(np.square(a.astype(np.float64) - b.astype(np.float64)))
  return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(a, b):
  """Structural similarity of two videos uint8 `[T, H, W, 3]`, sides of 11 pixels or more: the mean over frames and channels,
  in a Gaussian window of 11 pixels with deviation 1.5 (Wang et al. 2004; the settings of Open-Sora 1.2's evaluation)."""
  return float(np.mean(_ssim(a, b)))


_ssim = jax.jit(lambda a, b: dm_pix.ssim(a.astype(np.float32) / 255, b.astype(np.float32) / 255))
