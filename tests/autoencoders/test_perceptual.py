"""The perceptual distance against PyTorch's layers with the same random weights, and the files that hold the weights."""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from stdit_jax.autoencoders import perceptual
from stdit_jax.interop.measures import load_perceptual
from stdit_jax.interop.safetensors_io import write_checkpoint


def pictures(seed, size=(17, 21)):
  return np.random.default_rng(seed).uniform(-1, 1, (2, *size, 3)).astype(np.float32)


@functools.cache
def random_tensors():
  """A small-valued VGG16 under torchvision's names."""
  rng, tensors = np.random.default_rng(0), {}
  for number, layer in zip(perceptual.NUMBERS, perceptual.shapes("hed-vgg16")["trunk"].values()):
    *_, before, after = layer["kernel"].shape
    tensors[f"features.{number}.weight"] = rng.standard_normal((after, before, 3, 3), np.float32) * (2 / 9 / before) ** 0.5
    tensors[f"features.{number}.bias"] = rng.standard_normal(after, np.float32) * 0.1
  return tensors


def write(path, tensors, **metadata):
  spec = {name: (value.shape, value.dtype) for name, value in tensors.items()}
  write_checkpoint(path, spec, tensors.items(), metadata=metadata, overwrite=True)
  return str(path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  return write(tmp_path_factory.mktemp("vgg") / "vgg16.safetensors", random_tensors() | {"classifier.0.bias": np.zeros(3)})


def torch_distance(a, b, prepare, heads, ceil_mode):
  """The formula of LPIPS in PyTorch; heads: weights `[C]` of each block, or None for means over channels."""

  def features(x):
    x, found = torch.from_numpy(prepare(x).transpose(0, 3, 1, 2).copy()), []
    for number in perceptual.NUMBERS:
      if number in (5, 10, 17, 24):
        found.append(x)
        x = torch.nn.functional.max_pool2d(x, 2, ceil_mode=ceil_mode)
      kernel, bias = (torch.from_numpy(random_tensors()[f"features.{number}.{key}"]) for key in ("weight", "bias"))
      x = torch.relu(torch.nn.functional.conv2d(x, kernel, bias, padding=1))
    return [*found, x]

  total = 0
  for i, (x, y) in enumerate(zip(features(a), features(b))):
    x, y = (f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (x, y))
    squared = (x - y).square()
    weighted = squared.mean(1) if heads is None else (squared * torch.from_numpy(heads[i])[:, None, None]).sum(1)
    total += weighted.mean((1, 2))
  return total.numpy()


def test_the_distance_is_lpips(weights):
  params = load_perceptual("vgg16-lpips", weights)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
    lambda x: (x.shape, x.dtype), perceptual.shapes("vgg16-lpips")
  )
  heads = list(params["heads"].values())
  assert all(head.min() >= 0 and head.max() > 0.4 for head in heads)  # the trained heads of LPIPS are not negative
  found = jax.jit(functools.partial(perceptual.distance, "vgg16-lpips"))(params, pictures(1), pictures(2))
  shift, scale = np.float32([-0.030, -0.088, -0.188]), np.float32([0.458, 0.448, 0.450])
  np.testing.assert_allclose(
    found, torch_distance(pictures(1), pictures(2), lambda x: (x - shift) / scale, heads, ceil_mode=False), rtol=1e-4
  )


def test_hed_trunk_matches_pytorch(weights):
  def prepare(x):
    return np.float32((x + 1) * 127.5)[..., ::-1] - np.float32([104.00699, 116.66877, 122.67892])

  params = load_perceptual("hed-vgg16", weights)
  found = jax.jit(functools.partial(perceptual.distance, "hed-vgg16"))(params, pictures(1), pictures(2))
  np.testing.assert_allclose(found, torch_distance(pictures(1), pictures(2), prepare, None, ceil_mode=True), rtol=1e-4)


def test_gradients_are_finite_for_equal_and_for_black_images(weights):
  params = load_perceptual("vgg16-lpips", weights)
  black = jax.tree.map(np.zeros_like, params["trunk"])  # every feature is 0
  value_and_gradient = jax.jit(jax.value_and_grad(lambda a, params, b: perceptual.distance("vgg16-lpips", params, a, b).sum()))
  a, b = pictures(1, (16, 16)), pictures(2, (16, 16))
  for trunk, other, least in ((params["trunk"], a, 0), (black, b, 0), (params["trunk"], b, 1e-3)):
    value, gradient = value_and_gradient(jnp.asarray(a), {**params, "trunk": trunk}, other)
    assert np.isfinite(gradient).all()
    assert value >= least
    assert (np.abs(gradient).max() > 1e-6) == bool(least)


def test_images_of_wrong_shape_are_refused():
  for a, b in (((1, 15, 16, 3), (1, 15, 16, 3)), ((1, 16, 16, 3), (1, 16, 17, 3)), ((2, 1, 16, 16, 3), (2, 1, 16, 16, 3))):
    with pytest.raises(ValueError, match=r"images \[N,H,W,3\] of one size, sides of 16 or more"):
      perceptual.distance("hed-vgg16", {}, np.zeros(a), np.zeros(b))
  with pytest.raises(ValueError, match="unknown trunk 'vgg'; allowed: vgg16-lpips, hed-vgg16"):
    perceptual.shapes("vgg")


def test_wrong_files_are_refused(weights, tmp_path):
  with open(weights, "rb") as file:
    digest = hashlib.sha256(file.read()).hexdigest()
  load_perceptual("hed-vgg16", weights, digest.upper())
  with pytest.raises(ValueError, match=f"has the SHA-256 {digest}, not 1234"):
    load_perceptual("hed-vgg16", weights, "1234")
  tensors = random_tensors()
  few = {name: tensors[name] for name in ("features.0.weight", "features.0.bias")}
  with pytest.raises(ValueError, match=r"no tensor 'features.2.weight'; 'hed-vgg16' needs VGG16 with torchvision's names"):
    load_perceptual("hed-vgg16", write(tmp_path / "few.safetensors", few))
  with pytest.raises(ValueError, match=r"'features.0.bias' is \[63\]; 'hed-vgg16' needs \[64\]"):
    load_perceptual("hed-vgg16", write(tmp_path / "other.safetensors", few | {"features.0.bias": few["features.0.bias"][1:]}))
  with pytest.raises(ValueError, match="holds the trunk 'hed-vgg16', not 'vgg16-lpips'"):
    load_perceptual("vgg16-lpips", write(tmp_path / "hed.safetensors", few, trunk="hed-vgg16"))
