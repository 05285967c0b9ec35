"""Open-Sora 1.2's video autoencoder against the values of the original modules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stdit_jax.autoencoders import losses, temporal
from stdit_jax.autoencoders.latents import denormalise, normalise
from stdit_jax.interop import CheckpointError, load_variables, open_checkpoint, save_variables
from tests.helpers import REFERENCE, load_golden, load_json, relative_error, to_ours
from tests.interop.test_layouts import random_tree

golden = functools.cache(load_golden)
LENGTHS = golden("vae_temporal_tiny_cases")[1]["cases"]
CLIPS = golden("vae_pipeline_tiny_cases")[1]["cases"]
CLIPS.pop("T17")  # T34 tests two such chunks
TOLERANCE = 1e-5  # the originals' float32 is within 2.5e-6 of their float64


@functools.cache
def temporal_model():
  """(model, variables) of the temporal autoencoder alone."""
  constructor = golden("vae_temporal_tiny")[1]["constructor"]
  config = temporal.TemporalConfig(
    image="tiny-kl-f8", **{n: constructor[n] for n in ("filters", "num_res_blocks", "num_groups")}
  )
  model = temporal.Temporal(config)
  x = jnp.zeros((1, 1, 2, 2, 4))

  def both(module):
    return module.encode(x), module.decode(x, 1)

  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), method=both))
  layout = "open-sora-vae"
  loaded = load_variables(
    REFERENCE / "vae_temporal_tiny.safetensors", temporal_only(layout), {"params": {"temporal": shapes["params"]}}, config=None
  )
  return model, {"params": loaded["params"]["temporal"]}


def temporal_only(layout):
  """The layout of a file that holds the temporal part alone, without prefix."""
  import dataclasses

  from stdit_jax.interop.temporal import OPEN_SORA_VAE

  rows = [(o, t.removeprefix("temporal_vae."), k) for o, t, k in OPEN_SORA_VAE.rows if o.startswith("params/temporal/")]
  return dataclasses.replace(OPEN_SORA_VAE, name=layout + "-temporal", rows=tuple(rows), computed=lambda config: {})


@functools.cache
def pipeline_model():
  config = temporal.TABLE["tiny-temporal"]
  path = REFERENCE / "vae_pipeline_tiny.safetensors"
  return temporal.VideoAutoencoder(config), load_variables(path, "open-sora-vae", temporal.init_shapes(config), config=config)


@functools.partial(jax.jit, static_argnums=(0, 2), static_argnames="num_frames")
def call(model, variables, method, *args, **static):
  return model.apply(variables, *args, method=method, **static)


@pytest.mark.parametrize("name", LENGTHS)
def test_temporal_part_matches_the_original(name):
  data, frames = golden("vae_temporal_tiny_cases")[0], LENGTHS[name]["frames"]
  model, variables = temporal_model()
  mean, logvar = call(model, variables, "encode", to_ours(data[f"{name}/in/x"]))
  assert relative_error(mean, to_ours(data[f"{name}/mean"])) < TOLERANCE
  assert relative_error(logvar, to_ours(data[f"{name}/logvar"])) < TOLERANCE
  np.testing.assert_allclose(losses.kl_divergence(mean, logvar), data[f"{name}/kl"], rtol=1e-4)
  for latents, expected in (("mean", "decode_mean"), ("in/z", "decode_z")):
    decoded = call(model, variables, "decode", to_ours(data[f"{name}/{latents}"]), num_frames=frames)
    assert relative_error(decoded, to_ours(data[f"{name}/{expected}"])) < TOLERANCE


@pytest.mark.parametrize("name", CLIPS)
def test_clips_and_latents_match_the_original(name):
  """The noise is zero, or that of the reference. Expected latents are normalised."""
  data, frames = golden("vae_pipeline_tiny_cases")[0], CLIPS[name]["frames"]
  model, variables = pipeline_model()
  x = to_ours(data[f"{name}/in/x"])
  mean, _ = call(model, variables, "encode", x)
  normalised = normalise(model.config, mean)
  assert relative_error(normalised, to_ours(data[f"{name}/encode_noise0"])) < TOLERANCE
  noise = jnp.moveaxis(jnp.asarray(data[f"{name}/in/noise_2d"]), 1, -1)[None]
  drawn, logvar = call(model, variables, "encode", x, noise)
  z = drawn + jnp.exp(0.5 * logvar) * to_ours(data[f"{name}/in/noise_temporal"])
  assert relative_error(normalise(model.config, z), to_ours(data[f"{name}/encode_noise"])) < TOLERANCE
  pixels = call(model, variables, "decode", mean, num_frames=frames)
  assert relative_error(pixels, to_ours(data[f"{name}/decode"])) < TOLERANCE
  if f"{name}/decode_z" in data:
    raw = denormalise(model.config, to_ours(data[f"{name}/in/z"]))
    pixels = call(model, variables, "decode", raw, num_frames=frames)
    assert relative_error(pixels, to_ours(data[f"{name}/decode_z"])) < TOLERANCE


def test_whole_clip_as_one_chunk_matches_the_original():
  data, (model, variables) = golden("vae_pipeline_tiny_cases")[0], pipeline_model()
  whole = temporal.VideoAutoencoder(temporal.get_config("tiny-temporal", chunk=0))
  for name, case in CLIPS.items():
    mean, _ = call(whole, variables, "encode", to_ours(data[f"{name}/in/x"]))
    expected = to_ours(data[f"{name}/encode_noise0_no_micro"])
    assert relative_error(normalise(model.config, mean), expected) < TOLERANCE
    if f"{name}/decode_no_micro" in data:
      pixels = call(whole, variables, "decode", mean, num_frames=case["frames"])
      assert relative_error(pixels, to_ours(data[f"{name}/decode_no_micro"])) < TOLERANCE


def test_latent_sizes_match_the_original():
  whole = temporal.get_config("open-sora-1.2", chunk=0)
  for row in load_json("vae_latent_sizes.json")["rows"]:
    frames, *size = row["input"]
    for config, expected in ((temporal.TABLE["open-sora-1.2"], row["latent"]), (whole, row["latent_no_micro"])):
      assert [config.latent_frames(frames), *config.latent_size(*size)] == expected


def test_shortcut_starts_as_the_average():
  """Before training, latents are averages of frames and decoding repeats them. All layers get gradients."""
  model = temporal.build(temporal.get_config("tiny-temporal", shortcut=True))
  variables = temporal.init(model, jax.random.key(0))
  x = jax.random.normal(jax.random.key(1), (2, 9, 4, 6, 4))
  mean, logvar = call(model, variables, "encode_latents", x)
  averages = jnp.stack([x[:, 0], x[:, 1:5].mean(1), x[:, 5:].mean(1)], 1)
  np.testing.assert_allclose(mean, averages, atol=1e-6)
  np.testing.assert_array_equal(logvar, temporal.FIRST_LOGVAR)
  again = call(model, variables, "decode_latents", mean, num_frames=9)
  np.testing.assert_allclose(again, averages[:, np.asarray([0, 1, 1, 1, 1, 2, 2, 2, 2])], atol=1e-6)

  def error(variables):
    mean, logvar = model.apply(variables, x, method="encode_latents")
    decoded = model.apply(variables, mean, num_frames=9, method="decode_latents")
    return jnp.square(decoded - x).mean() + 1e-3 * jnp.square(logvar).mean()

  gradients = jax.jit(jax.grad(error))(variables)["params"]["temporal"]
  for path in (("quant_conv", "conv"), ("decoder", "conv_out", "conv"), ("shortcut_encoder",), ("shortcut_decoder",)):
    leaf = functools.reduce(lambda tree, name: tree[name], (*path, "kernel"), gradients)
    assert (np.abs(leaf) > 0).all()


def test_shortcut_round_trips_through_a_file(tmp_path):
  """The shortcut has names that the original lacks. A model without the shortcut refuses the file."""
  config, path = temporal.get_config("tiny-temporal", shortcut=True), tmp_path / "x.safetensors"
  tree = random_tree(temporal.init_shapes(config))
  save_variables(path, "open-sora-vae", tree, config=config)
  own = {name for name in open_checkpoint(path).tensors if name.startswith("temporal_vae.shortcut")}
  assert own == {"temporal_vae.shortcut_encoder.weight", "temporal_vae.shortcut_decoder.weight"}
  loaded = load_variables(path, temporal.FAMILY.layouts, temporal.init_shapes(config), config=config)
  assert all(map(np.array_equal, jax.tree.leaves(loaded), jax.tree.leaves(tree)))
  with pytest.raises(CheckpointError, match="shortcut_encoder"):
    load_variables(path, "open-sora-vae", temporal.init_shapes(temporal.TABLE["tiny-temporal"]))
