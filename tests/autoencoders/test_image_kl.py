"""The image autoencoder against diffusers.AutoencoderKL."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stdit_jax.autoencoders import image_kl, losses, registry
from tests.helpers import SHIPPED

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CONFIGS = {
  "two levels, two layers": image_kl.ImageKLConfig(block_out_channels=(8, 24), layers_per_block=2, norm_num_groups=4),
  "three levels, no quant, no attention, 6 channels": image_kl.ImageKLConfig(
    block_out_channels=(8, 12, 16),
    layers_per_block=1,
    norm_num_groups=4,
    latent_channels=6,
    use_quant_conv=False,
    use_post_quant_conv=False,
    mid_block_add_attention=False,
  ),
  "small": image_kl.TABLE["small-kl-f8"],
}
SIZES = {"two levels, two layers": (29, 42), "three levels, no quant, no attention, 6 channels": (43, 29), "small": (48, 75)}


def convert(name, value):
  """One diffusers tensor -> (path, array), by the rule in image_kl's docstring."""
  path = re.sub(r"\.(\d+)(?=\.)", r"_\1", name).split(".")
  if path[-1] == "weight":
    path[-1] = "scale" if value.ndim == 1 else "kernel"
  return tuple(path), value.transpose({1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[value.ndim])


def to_tree(named):
  tree = {}
  for name, value in named:
    path, value = convert(name, np.asarray(value.detach()))
    node = tree
    for word in path[:-1]:
      node = node.setdefault(word, {})
    node[path[-1]] = value
  return tree


def reference(config):
  """diffusers' autoencoder with every tensor random and not zero, and our variables with the same values."""
  levels = len(config.block_out_channels)
  names = ("layers_per_block", "in_channels", "out_channels", "latent_channels", "norm_num_groups", "mid_block_add_attention")
  theirs = diffusers.AutoencoderKL(
    block_out_channels=config.block_out_channels,
    down_block_types=["DownEncoderBlock2D"] * levels,
    up_block_types=["UpDecoderBlock2D"] * levels,
    use_quant_conv=config.use_quant_conv,
    use_post_quant_conv=config.use_post_quant_conv,
    **{name: getattr(config, name) for name in names},
  ).eval()
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for name, value in theirs.named_parameters():
      draw = torch.randn(value.shape, generator=generator)
      norm_weight = value.ndim == 1 and name.endswith("weight")
      value.copy_(1 + 0.15 * draw if norm_weight else 0.1 * draw if value.ndim == 1 else draw / value[0].numel() ** 0.5)
  return theirs, {"params": to_tree(theirs.named_parameters())}


def error(ours, theirs):
  theirs = np.asarray(theirs.detach())
  return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def nchw(x):
  return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


@pytest.mark.parametrize("name", CONFIGS)
def test_matches_diffusers(name):
  config = CONFIGS[name]
  theirs, variables = reference(config)
  model = image_kl.ImageKL(config)
  fresh = image_kl.init_shapes(model.config)
  assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, variables)

  rng = np.random.default_rng(0)
  height, width = SIZES[name]
  x = rng.uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
  cotangent = rng.normal(size=(2, *config.latent_size(height, width), 2 * config.latent_channels)).astype(np.float32)
  pixels = nchw(x).requires_grad_()
  posterior = theirs.encode(pixels).latent_dist
  decoded = theirs.decode(posterior.mean).sample
  ((posterior.parameters * nchw(cotangent)).mean() + (decoded**2).mean()).backward()

  def loss(variables, x):
    reconstruction, mean, logvar = model.apply(variables, x)
    moments = jnp.concatenate([mean, logvar], -1)
    return (moments * cotangent).mean() + (reconstruction**2).mean(), (reconstruction, mean, logvar)

  gradients = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
  (grads, pixel_grads), outputs = gradients(variables, x)
  expected = (decoded, posterior.mean, posterior.logvar)
  for ours, other in zip(outputs, expected):
    assert error(np.moveaxis(np.asarray(ours), -1, 1), other) < 2e-5
  assert error(np.moveaxis(np.asarray(pixel_grads), -1, 1), pixels.grad) < 1e-4
  expected_grads = to_tree((n, p.grad) for n, p in theirs.named_parameters())["encoder"]
  largest = max(np.abs(g).max() for g in jax.tree.leaves(expected_grads))
  for path, expected in jax.tree.leaves_with_path(expected_grads):
    ours = grads["params"]["encoder"]
    for key in path:
      ours = ours[key.key]
    # A key bias moves all logits of a query alike: its gradient is rounding noise on both sides.
    scale = largest if "to_k" in str(path) else max(np.abs(expected).max(), 1e-3 * largest)
    assert np.abs(ours - expected).max() < 1e-4 * scale, path


def test_large_frames_keep_precision():
  """Group statistics over 200k values per group, far from zero mean."""
  config = CONFIGS["small"]
  theirs, variables = reference(config)
  model = image_kl.ImageKL(config)
  x = np.random.default_rng(0).uniform(0.7, 0.8, (1, 328, 304, 3)).astype(np.float32)
  with torch.no_grad():
    expected = theirs.encode(nchw(x)).latent_dist.parameters
  moments = np.concatenate(jax.jit(lambda v, x: model.apply(v, x, method="encode"), compiler_options=SHIPPED)(variables, x), -1)
  assert error(np.moveaxis(moments, -1, 1), expected) < 2e-5


def test_full_size_has_the_published_shapes():
  model = image_kl.ImageKL(image_kl.get_config("sd-kl-f8"))
  shapes = image_kl.init_shapes(model.config)
  with torch.device("meta"):
    theirs = diffusers.AutoencoderKL(
      block_out_channels=(128, 256, 512, 512),
      down_block_types=["DownEncoderBlock2D"] * 4,
      up_block_types=["UpDecoderBlock2D"] * 4,
      layers_per_block=2,
      latent_channels=4,
    )
  ours = {tuple(key.key for key in path[1:]): leaf.shape for path, leaf in jax.tree.leaves_with_path(shapes)}
  expected = {}
  for name, value in theirs.state_dict().items():
    path, view = convert(name, np.broadcast_to(np.float32(0), value.shape))
    expected[path] = view.shape
  assert ours == expected
  assert sum(np.prod(shape) for shape in ours.values()) == 83_653_863


def test_small_kl_f8_takes_less_than_4_mb_in_float16():
  model = image_kl.ImageKL(image_kl.get_config("small-kl-f8"))
  shapes = image_kl.init_shapes(model.config)
  assert 2 * sum(leaf.size for leaf in jax.tree.leaves(shapes)) < 3.9e6  # bytes in float16


def test_logvar_is_clipped():
  config = image_kl.get_config("tiny-kl-f8")
  model = image_kl.ImageKL(config)
  variables = image_kl.init(model, jax.random.key(0))
  bias = np.zeros(8, np.float32)
  bias[4:] = [-1e3, 1e3, 0, 0]
  variables["params"]["quant_conv"]["bias"] = bias
  _, logvar = jax.jit(functools.partial(model.apply, method="encode"))(variables, jnp.zeros((1, 16, 16, 3)))
  assert (logvar[..., 0] == -30).all()
  assert (logvar[..., 1] == 20).all()


def test_bfloat16_stays_near_float32():
  config = image_kl.get_config("tiny-kl-f8", block_out_channels=(8, 16))
  variables = image_kl.init(image_kl.ImageKL(config), jax.random.key(0))
  x = np.random.default_rng(0).uniform(-1, 1, (1, 32, 32, 3)).astype(np.float32)
  exact, mean, _ = jax.jit(image_kl.ImageKL(config).apply)(variables, x)
  rough, rough_mean, _ = jax.jit(image_kl.ImageKL(config, dtype=jnp.bfloat16).apply)(variables, x)
  assert rough.dtype == rough_mean.dtype == jnp.float32
  for ours, expected in ((rough, exact), (rough_mean, mean)):
    assert np.linalg.norm(ours - expected) < 0.05 * np.linalg.norm(expected)


def test_wrong_input_is_refused():
  model = image_kl.ImageKL(image_kl.get_config("tiny-kl-f8"))
  variables = image_kl.init(model, jax.random.key(0))
  for shape in ((1, 7, 16, 3), (1, 16, 16, 4), (16, 16, 3)):
    with pytest.raises(ValueError, match="encode needs frames"):
      model.apply(variables, jnp.zeros(shape), method="encode")
  with pytest.raises(ValueError, match="decode needs latents"):
    model.apply(variables, jnp.zeros((1, 2, 2, 3)), method="decode")
  with pytest.raises(ValueError, match="allowed: sd-kl-f8"):
    image_kl.get_config("kl")
  with pytest.raises(ValueError, match=r"unknown field .width"):
    image_kl.get_config("tiny-kl-f8", width=3)
  with pytest.raises(ValueError, match="multiples of norm_num_groups"):
    image_kl.get_config("tiny-kl-f8", block_out_channels=(6, 12))
  with pytest.raises(ValueError, match="scale needs one number or 4"):
    image_kl.get_config("tiny-kl-f8", scale=(1.0, 2.0))


@pytest.mark.parametrize(
  ("name", "fields", "message"),
  [
    ("cogvideox-2b", {"decode_chunk": 1}, "decode_chunk is 1; allowed: multiples of 2"),
    ("cogvideox-2b", {"encode_chunk": 6}, "encode_chunk is 6; allowed: multiples of 4"),
    ("cogvideox-2b", {"norm_num_groups": 0}, "must be multiples of norm_num_groups=0"),
    ("cogvideox-2b", {"shift": (1.0, 2.0)}, "shift needs one number or 16"),
    ("open-sora-1.2", {"latent_channels": 8}, "those of the image autoencoder 'sd-kl-f8' are 4"),
    ("open-sora-1.2", {"chunk": -1}, "chunk is -1; allowed: frames of a chunk, or 0"),
  ],
)
def test_wrong_fields_of_video_autoencoders_are_refused(name, fields, message):
  with pytest.raises(ValueError, match=message):
    registry.find(name).get_config(name, **fields)


def test_initialisation_is_that_of_pytorch():
  config = image_kl.ImageKLConfig(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4)
  params = image_kl.init(image_kl.ImageKL(config), jax.random.key(0))["params"]
  kernel = params["encoder"]["mid_block"]["resnets_0"]["conv1"]["kernel"]
  assert 0.9 / 72**0.5 < np.abs(kernel).max() <= 1 / 72**0.5
  assert 0.5 / 72**0.5 < np.abs(params["encoder"]["mid_block"]["resnets_0"]["conv1"]["bias"]).max() <= 1 / 72**0.5


def test_losses_match_their_formulas():
  rng = np.random.default_rng(0)
  prediction, target = rng.normal(size=(2, 3, 4, 4, 3))
  mean, logvar = rng.normal(size=(2, 3, 2, 2, 4))
  error = np.abs(prediction - target).mean((1, 2, 3))
  kl = torch.distributions.kl_divergence(
    torch.distributions.Normal(torch.tensor(mean), torch.tensor(logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)
  ).sum((1, 2, 3))
  np.testing.assert_allclose(losses.reconstruction_error(prediction, target), error, rtol=1e-5)
  np.testing.assert_allclose(losses.kl_divergence(mean, logvar), kl, rtol=1e-5)
  squared = losses.reconstruction_error(target + 2.0, target, "l2")
  np.testing.assert_allclose(squared, 4.0, rtol=1e-5)
  with pytest.raises(ValueError, match="l1, l2"):
    losses.reconstruction_error(prediction, target, "huber")
