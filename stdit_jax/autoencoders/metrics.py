"""Distances between two videos in pixels, and between two sets of videos in features."""

from collections.abc import Sequence

import dm_pix
import jax
import numpy as np
from jaxtyping import UInt8

Clip = UInt8[np.ndarray, "T H W 3"]


def psnr(a: UInt8[np.ndarray, "*shape"], b: UInt8[np.ndarray, "*shape"]) -> float:
  """Peak signal-to-noise ratio in decibels; 99 if the arrays are equal."""
  error = np.mean(np.square(a.astype(np.float64) - b.astype(np.float64)))
  return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(a: Clip, b: Clip) -> float:
  """Structural similarity of two videos with sides of 11 pixels or more, the mean over frames and channels.

  The window is a Gaussian of 11 pixels with deviation 1.5 (Wang et al. 2004; the settings of Open-Sora 1.2's evaluation).
  """
  return float(np.mean(_ssim(a, b)))


_ssim = jax.jit(lambda a, b: dm_pix.ssim(a.astype(np.float32) / 255, b.astype(np.float32) / 255))


def flicker(a: Clip, b: Clip) -> float:
  """Mean absolute difference between the frame-to-frame changes of two videos, in gray levels (0 to 255).

  A constant error is no flicker. Raises ValueError for fewer than two frames.
  """
  if len(a) < 2:
    raise ValueError("flicker needs two frames or more")
  return float(np.abs(np.diff(a.astype(np.int16), axis=0) - np.diff(b.astype(np.int16), axis=0)).mean())


def frechet_distance(a: Sequence | np.ndarray, b: Sequence | np.ndarray) -> float:
  """Squared Frechet distance of two sets of features `[N, D]`, in float64. Raises ValueError for fewer than two features.

  It is the distance of the Gaussians with the same means and covariances, |m - n|^2 + tr(S + T - 2 (S T)^(1/2)) (Dowson &
  Landau 1982). With S = A'A and T = B'B the eigenvalues of S T are the squared singular values of A B'. So no matrix root is
  needed, which would be inaccurate for singular covariances (fewer than D features).
  """
  if min(len(a), len(b)) < 2:
    raise ValueError("the Frechet distance needs two features or more on each side")
  a, b = (np.asarray(x, np.float64) for x in (a, b))
  shift = np.square(a.mean(0) - b.mean(0)).sum()
  # QR reduces each set to at most D rows.
  a, b = (np.asarray(np.linalg.qr((x - x.mean(0)) / np.sqrt(len(x) - 1), mode="r")) for x in (a, b))
  product = np.linalg.svd(a @ b.T, compute_uv=False).sum()
  return float(shift + np.square(a).sum() + np.square(b).sum() - 2 * product)
