"""Samples during training: no weights are loaded twice, and between samples the devices hold only the encoded prompts."""

import gc
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from stdit_jax.components import load_codec, load_text_encoder
from stdit_jax.generation.pipeline import Pipeline
from stdit_jax.run_samples import Sampler
from tests.runs import Run
from tests.tiny_run import frozen_text, tiny_config


def live_bytes():
  gc.collect()
  return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize("held", [True, False], ids=["held by the training", "only for samples"])
def test_a_sample_leaves_only_the_encoded_prompts_on_the_devices(assets, tmp_path, held):
  """The text encoder runs before the step. A training from cached features does not load it."""
  files = {name: shutil.copy(assets / name, tmp_path) for name in ("t5.safetensors", "autoencoder.safetensors")}
  changes = {"sample__num_frames": 1, "sample__resolution": "64p", "sample__prompts": ("a cat", "a dog")}
  changes |= {"autoencoder__weights": files["autoencoder.safetensors"], "model__fields__dtype": "bfloat16"}
  run = Run(tiny_config(assets, tmp_path / "run", **frozen_text(tmp_path, "ahead"), **changes))
  state, frozen, _ = run.start()
  parts, settings = run.parts[0].objective.components, run.config.sample
  if held:
    run.maker()
  sampler = Sampler(run)

  encoder = load_text_encoder(parts.conditioner.config, parts.conditioner.encoder, run.mesh)
  weights = parts.weights(state["ema"], frozen)[0], encoder
  pipeline = Pipeline(parts, weights, load_codec(run.config.autoencoder), mesh=run.mesh)
  expected = pipeline.decode(pipeline.sample_latents(sampler.requests, settings.steps, settings.guidance_scale), 1)
  del pipeline, weights, encoder

  if held:
    (tmp_path / "t5.safetensors").unlink()  # the sampler takes the weights that the training has loaded
  before = live_bytes()
  for number in range(2):
    sampler(number, state, frozen)
    length, channels = parts.conditioner.length, parts.conditioner.channels
    assert live_bytes() - before <= 2 * length * (2 * channels + 1) + 64  # two prompts in bfloat16, their masks
    for path in files.values():  # the second sample reads no file
      pathlib.Path(path).unlink(missing_ok=True)
  for i, frames in enumerate(expected):
    for number in range(2):
      np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"run/samples/step{number:07d}-{i}.png")), frames[0])
