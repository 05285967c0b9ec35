"""Metrics in cases with a known answer."""

import jax
import numpy as np
import pytest

from stdit_jax.autoencoders import i3d, metrics
from tests.helpers import relative_error


def test_psnr_of_a_constant_error_is_known():
  a = np.full((2, 16, 16, 3), 100, np.uint8)
  assert metrics.psnr(a, a) == 99
  assert metrics.psnr(a, a + 10) == pytest.approx(20 * np.log10(255 / 10))


def test_flicker_ignores_constant_errors():
  video = np.random.default_rng(0).integers(50, 200, (6, 8, 8, 3)).astype(np.uint8)
  assert metrics.flicker(video, video + np.arange(8, dtype=np.uint8)[:, None]) == 0
  assert metrics.flicker(video, video + (np.arange(6) % 2 * 7).astype(np.uint8)[:, None, None, None]) == 7
  with pytest.raises(ValueError, match="two frames or more"):
    metrics.flicker(video[:1], video[:1])


def test_ssim_matches_the_formula():
  """Wang et al. 2004, equation 13: local means and covariances in a Gaussian window, over whole windows only."""
  convolve2d = pytest.importorskip("scipy.signal").convolve2d
  rng = np.random.default_rng(5)
  a = rng.integers(0, 256, (2, 20, 24, 3)).astype(np.uint8)
  b = np.clip(a + rng.normal(0, 30, a.shape), 0, 255).astype(np.uint8)
  line = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
  window = np.outer(line, line) / line.sum() ** 2
  c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
  values = []
  for x, y in zip(np.moveaxis(a, -1, 1).reshape(-1, 20, 24), np.moveaxis(b, -1, 1).reshape(-1, 20, 24)):
    x, y = x.astype(np.float64), y.astype(np.float64)
    mx, my, xx, yy, xy = (convolve2d(z, window, "valid") for z in (x, y, x * x, y * y, x * y))
    of_means = (2 * mx * my + c1) / (mx**2 + my**2 + c1)
    values.append(of_means * (2 * (xy - mx * my) + c2) / (xx - mx**2 + yy - my**2 + c2))
  assert metrics.ssim(a, b) == pytest.approx(np.mean(values), abs=1e-4)
  assert metrics.ssim(a, a) == pytest.approx(1)


def gaussian(mean, covariance, count, seed=0):
  """Features with exactly this mean and covariance."""
  x = np.random.default_rng(seed).standard_normal((count, len(mean)))
  x -= x.mean(0)
  x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
  return x @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_commuting_covariances():
  """It is the squared distance of the means and of the standard deviations along the common axes."""
  turn = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))[0]
  a = gaussian([1.0, 2.0, 3.0], turn @ np.diag([1.0, 4.0, 9.0]) @ turn.T, 50)
  b = gaussian([1.0, 0.0, 3.0], turn @ np.diag([4.0, 4.0, 0.25]) @ turn.T, 20, seed=2)
  assert metrics.frechet_distance(a, b) == pytest.approx(2**2 + 1**2 + 2.5**2)
  assert metrics.frechet_distance(b, a) == pytest.approx(metrics.frechet_distance(a, b))
  assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_matches_the_formula():
  scipy = pytest.importorskip("scipy.linalg")
  rng = np.random.default_rng(3)
  a, b = rng.standard_normal((40, 5)) @ rng.standard_normal((5, 5)), rng.standard_normal((60, 5)) + 1
  covariances = [np.cov(x, rowvar=False) for x in (a, b)]
  root = scipy.sqrtm(covariances[0] @ covariances[1]).real
  expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
  assert metrics.frechet_distance(a, b) == pytest.approx(expected)


def test_frechet_distance_of_fewer_features_than_dimensions():
  """The features vary along one axis only, and the means are 20 apart."""
  a, b = np.zeros((2, 400)), np.zeros((3, 400))
  a[:, 0], b[:, 0] = (1, -1), (3, 0, -3)
  assert metrics.frechet_distance(a, b + 1) == pytest.approx(400 + (2**0.5 - 3) ** 2)
  with pytest.raises(ValueError, match="two features or more"):
    metrics.frechet_distance(a[:1], b)


def test_i3d_has_the_parameters_of_the_original():
  """12.7 M parameters in 58 convolutions: three at the start, six in each of nine blocks, and the linear layer."""
  leaves = jax.tree.leaves(i3d.init_shapes())
  assert len(leaves) == 2 * (3 + 6 * 9 + 1)
  assert sum(leaf.size for leaf in leaves) == 12_689_984


def test_i3d_matches_pytorch():
  """The reference is the network of the figure in Carreira & Zisserman, in PyTorch with random weights."""
  torch = pytest.importorskip("torch")
  functional = torch.nn.functional
  rng = np.random.default_rng(0)

  def draw(shape):
    fan_in = np.prod(shape.shape[:-1])
    return (rng.standard_normal(shape.shape) * (2 / fan_in) ** 0.5 if fan_in > 1 else rng.normal(0, 0.1, shape.shape)).astype(
      np.float32
    )

  variables = jax.tree.map(draw, i3d.init_shapes())

  def same(x, window, stride, value=0.0):
    pads = []
    for n, k, s in reversed(list(zip(x.shape[2:], window, stride))):
      total = max((-(-n // s) - 1) * s + k - n, 0)
      pads += [total // 2, total - total // 2]
    return functional.pad(x, pads, value=value)

  def unit(params, x, stride=1, linear=False):
    kernel = torch.from_numpy(params["kernel"].transpose(4, 3, 0, 1, 2).copy())
    padded = same(x, kernel.shape[2:], (stride,) * 3)
    y = functional.conv3d(padded, kernel, torch.from_numpy(params["bias"]), stride)
    return y if linear else functional.relu(y)

  def pool(x, window, stride):
    return functional.max_pool3d(same(x, window, stride, -torch.inf), window, stride)

  clip = rng.uniform(-1, 1, (1, 9, 224, 224, 3)).astype(np.float32)
  p = variables["params"]
  with torch.no_grad():
    x = unit(p["Conv3d_1a_7x7"], torch.from_numpy(clip.transpose(0, 4, 1, 2, 3).copy()), 2)
    x = unit(p["Conv3d_2b_1x1"], pool(x, (1, 3, 3), (1, 2, 2)))
    x = pool(unit(p["Conv3d_2c_3x3"], x), (1, 3, 3), (1, 2, 2))
    for block in ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c"):
      if block in ("4b", "5b"):
        x = pool(x, *((3, 3, 3), (2, 2, 2)) if block == "4b" else ((2, 2, 2), (2, 2, 2)))
      q = p[f"Mixed_{block}"]
      second, third = (unit(q[f"Branch_{i}_Conv3d_0b_3x3"], unit(q[f"Branch_{i}_Conv3d_0a_1x1"], x)) for i in (1, 2))
      last = unit(q["Branch_3_Conv3d_0b_1x1"], pool(x, (3, 3, 3), (1, 1, 1)))
      x = torch.cat([unit(q["Branch_0_Conv3d_0a_1x1"], x), second, third, last], 1)
    x = functional.avg_pool3d(x, (2, 7, 7), 1)
    expected = unit(p["Logits_Conv3d_0c_1x1"], x, linear=True).mean((2, 3, 4)).numpy()
  ours = jax.jit(i3d.I3D().apply)(variables, clip)
  assert expected.std() > 0.1
  assert relative_error(ours, expected) < 1e-4
