"""How near two videos are, in their pixels; how near two sets of videos are, in features."""

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


def flicker(a, b):
  """Mean absolute difference of the changes from frame to frame of two videos uint8 `[T, H, W, 3]`, in gray levels (0 to 255).

  An error that stands still, however large, is no flicker. ValueError for fewer than two frames.
  """
  if len(a) < 2:
    raise ValueError("flicker needs two frames or more")
  return float(np.abs(np.diff(a.astype(np.int16), axis=0) - np.diff(b.astype(np.int16), axis=0)).mean())


def frechet_distance(a, b):
  """Squared Frechet distance of the Gaussians that have the means and covariances of two sets of features `[N, D]`:
  |m - n|^2 + tr(S + T - 2 (S T)^(1/2)) (Dowson & Landau 1982), in float64. ValueError for fewer than two features.

  With S = A'A and T = B'B the eigenvalues of S T are the squared singular values of A B': no matrix root, whose rounding
  would show where covariances are singular, as they are for fewer than D features.
  """
  if min(len(a), len(b)) < 2:
    raise ValueError("the Frechet distance needs two features or more on each side")
  a, b = (np.asarray(x, np.float64) for x in (a, b))
  shift = np.square(a.mean(0) - b.mean(0)).sum()
  # QR leaves at most D rows of each set.
  a, b = (np.linalg.qr((x - x.mean(0)) / np.sqrt(len(x) - 1), mode="r") for x in (a, b))
  product = np.linalg.svd(a @ b.T, compute_uv=False).sum()
  return float(shift + np.square(a).sum() + np.square(b).sum() - 2 * product)
