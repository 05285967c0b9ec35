"""Metrics in cases with a known answer."""

import jax
import numpy as np
import pytest

from stdit_jax.autoencoders import i3d, metrics


def test_psnr():
  a = np.full((2, 16, 16, 3), 100, np.uint8)
  assert metrics.psnr(a, a) == 99
  assert metrics.psnr(a, a + 10) == pytest.approx(20 * np.log10(255 / 10))


def test_flicker_is_blind_to_what_stands_still():
  video = np.random.default_rng(0).integers(50, 200, (6, 8, 8, 3)).astype(np.uint8)
  assert metrics.flicker(video, video + np.arange(8, dtype=np.uint8)[:, None]) == 0
  assert metrics.flicker(video, video + (np.arange(6) % 2 * 7).astype(np.uint8)[:, None, None, None]) == 7
  with pytest.raises(ValueError, match="two frames or more"):
    metrics.flicker(video[:1], video[:1])


def gaussian(mean, covariance, count, seed=0):
  """Features whose mean and covariance are these exactly."""
  x = np.random.default_rng(seed).standard_normal((count, len(mean)))
  x -= x.mean(0)
  x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
  return x @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_gaussians():
  """Of covariances that commute it is the squared distance of means and of standard deviations along the common axes."""
  turn = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))[0]
  a = gaussian([1.0, 2.0, 3.0], turn @ np.diag([1.0, 4.0, 9.0]) @ turn.T, 50)
  b = gaussian([1.0, 0.0, 3.0], turn @ np.diag([4.0, 4.0, 0.25]) @ turn.T, 20, seed=2)
  assert metrics.frechet_distance(a, b) == pytest.approx(2**2 + 1**2 + 2.5**2)
  assert metrics.frechet_distance(b, a) == pytest.approx(metrics.frechet_distance(a, b))
  assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_others_is_the_formula():
  scipy = pytest.importorskip("scipy.linalg")
  rng = np.random.default_rng(3)
  a, b = rng.standard_normal((40, 5)) @ rng.standard_normal((5, 5)), rng.standard_normal((60, 5)) + 1
  covariances = [np.cov(x, rowvar=False) for x in (a, b)]
  root = scipy.sqrtm(covariances[0] @ covariances[1]).real
  expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
  assert metrics.frechet_distance(a, b) == pytest.approx(expected)


def test_frechet_distance_of_few_features():
  """Fewer than dimensions: along one axis only, 400 apart."""
  a, b = np.zeros((2, 400)), np.zeros((3, 400))
  a[:, 0], b[:, 0] = (1, -1), (3, 0, -3)
  assert metrics.frechet_distance(a, b + 1) == pytest.approx(400 + (2**0.5 - 3) ** 2)
  with pytest.raises(ValueError, match="two features or more"):
    metrics.frechet_distance(a[:1], b)


def test_i3d_has_the_parameters_of_the_original():
  """12.7 M in 58 convolutions: three, six of each of nine blocks, and the linear layer."""
  leaves = jax.tree.leaves(i3d.init_shapes())
  assert len(leaves) == 2 * (3 + 6 * 9 + 1)
  assert sum(leaf.size for leaf in leaves) == 12_689_984
