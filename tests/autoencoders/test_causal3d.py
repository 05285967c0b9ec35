"""CogVideoX's autoencoder against diffusers.AutoencoderKLCogVideoX: values, names and tiles."""

import dataclasses

import jax
import numpy as np
import pytest

from stdit_jax.autoencoders import causal3d
from stdit_jax.autoencoders.registry import make_codec
from stdit_jax.autoencoders.tiles import Tiles
from stdit_jax.interop import load_variables
from tests.helpers import relative_error

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CONFIGS = {
  "four levels": causal3d.TABLE["tiny-causal3d"],
  "three levels, two layers": causal3d.Causal3DConfig(
    block_out_channels=(6, 12, 6), layers_per_block=2, latent_channels=6, norm_num_groups=3
  ),
  "time by two": causal3d.Causal3DConfig(
    block_out_channels=(8, 16, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2, temporal_compression_ratio=2
  ),
}


def reference(config, **fields):
  """diffusers' autoencoder with every tensor random and not zero."""
  levels = len(config.block_out_channels)
  names = ("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups", "temporal_compression_ratio")
  torch.manual_seed(0)
  theirs = diffusers.AutoencoderKLCogVideoX(
    down_block_types=["CogVideoXDownBlock3D"] * levels, up_block_types=["CogVideoXUpBlock3D"] * levels,
    **{name: getattr(config, name) for name in names}, **fields,
  )  # fmt: skip
  with torch.no_grad():
    for name, p in theirs.named_parameters():
      p.add_(0.1 * torch.randn(p.shape) + (1.0 if name.endswith("conv_y.conv.bias") else 0.0))
  return theirs.eval()


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
  """(configuration, theirs, our model, our variables). Our weights come from their file."""
  config = CONFIGS[request.param]
  theirs, folder = reference(config), tmp_path_factory.mktemp("vae")
  theirs.save_pretrained(folder)
  file = folder / "diffusion_pytorch_model.safetensors"
  variables = load_variables(file, "cogvideox-vae", causal3d.init_shapes(config), config=config)
  return config, theirs, causal3d.Causal3D(config), variables


def clip(frames, height, width, channels=3, batch=2):
  return np.random.default_rng(frames).standard_normal((batch, frames, height, width, channels), np.float32)


def to_torch(x):
  return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def run(model, method):
  return jax.jit(lambda variables, x: model.apply(variables, x, method=method))


@pytest.mark.parametrize("frames", [1, 8, 12, 17])
def test_encoder_matches_diffusers(pair, frames):
  config, theirs, model, variables = pair
  if config.halvings == 1 and frames == 12:
    pytest.skip("one length less")
  x = clip(frames, 16, 24)
  with torch.no_grad():
    posterior = theirs.encode(to_torch(x)).latent_dist
  mean, logvar = run(model, "encode")(variables, x)
  assert mean.shape[1] == config.latent_frames(frames)
  for ours, other in ((mean, posterior.mean), (logvar, posterior.logvar)):
    assert relative_error(ours, np.moveaxis(other.numpy(), 1, -1)) < 5e-5


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_decoder_matches_diffusers(pair, frames):
  config, theirs, model, variables = pair
  z = clip(frames, 3, 4, config.latent_channels)
  with torch.no_grad():
    expected = theirs.decode(to_torch(z)).sample.numpy()
  pixels = run(model, "decode")(variables, z)
  assert pixels.shape[1] == config.pixel_frames(frames)
  assert relative_error(pixels, np.moveaxis(expected, 1, -1)) < 5e-5


def test_tiles_match_diffusers(pair):
  config, theirs, model, variables = pair
  if config is not CONFIGS["four levels"]:
    pytest.skip("one is enough")
  made = dataclasses.replace(make_codec(model, variables), tiles=Tiles(6, 10), as_uint8=False)
  theirs.enable_tiling(48, 80, 1 / 6, 1 / 5)
  try:
    x = np.tanh(clip(9, 72, 120, batch=1))
    with torch.no_grad():
      posterior = theirs.encode(to_torch(x)).latent_dist
    mean, std = made.encode(x[0])
    for ours, other in ((mean, posterior.mean), (std, posterior.std)):
      assert relative_error(ours[None], np.moveaxis(other.numpy(), 1, -1)) < 5e-5
    z = clip(3, 9, 15, config.latent_channels, batch=1)
    with torch.no_grad():
      expected = theirs.decode(to_torch(z)).sample.numpy()
    assert relative_error(made.decode(z[0], 9)[None], np.moveaxis(expected, 1, -1)) < 5e-5
  finally:
    theirs.disable_tiling()
