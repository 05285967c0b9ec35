"""Makes sample videos during training, with the averaged weights and the prompts of `config.sample`, in `<output>/samples`.

Between two samples the devices hold only the encoded prompts (2.3 MiB each for T5-XXL and bfloat16). If the text encoder runs
before the step, the first sample of a stage encodes the prompts, with the weights that the training holds or else with weights
that are freed at once. The autoencoder lies in the host memory of the first process. It lies on the devices while they decode.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from data import aspect_ratios, paths
from data.captions import clean_caption
from stdit_jax.autoencoders.registry import check_length
from stdit_jax.components import codec_of_shapes, load_codec, load_text_encoder, local_devices_mesh, need_file
from stdit_jax.generation.media import contact_sheet, write_media
from stdit_jax.generation.pipeline import Pipeline, Request
from stdit_jax.parallel.shardings import Tree
from stdit_jax.training.run import StageParts


class Sampler:
  """The loop calls a `Sampler` on all processes; the first one decodes and writes. ValueError if a stage can't be sampled."""

  def __init__(self, run):
    sample = run.config.sample
    if not sample.prompts:
      raise ValueError("config: sample.prompts is empty; give prompts or set sample_every=0")
    for parts in run.parts:
      check(parts, sample.num_frames)
    self.run = run
    self.stage: Any = None  # `StageParts` of the last sample
    self.pipeline: Any = None  # of the stage
    self.autoencoder: Any = None  # its weights for the stage, in host memory
    how = *aspect_ratios.size(sample.resolution, sample.aspect_ratio), sample.num_frames, sample.fps, sample.seed
    self.requests = [Request(clean_caption(prompt), *how) for prompt in sample.prompts]

  def __call__(self, step: int, state: Tree, frozen: Tree) -> None:
    latents = self.latents(step, state, frozen)
    if jax.process_index():
      return
    settings = self.run.config.sample
    videos = self._decode(latents)
    stem = paths.join(self.run.config.output, "samples", f"step{step:07d}")
    for i, (prompt, frames) in enumerate(zip(settings.prompts, videos)):
      written = {"prompt": prompt, "step": step, **dataclasses.asdict(settings)}
      written.pop("prompts")
      write_media(f"{stem}-{i}.{'png' if len(frames) == 1 else 'mp4'}", frames, settings.fps, written)
    with paths.whole(f"{stem}.png") as sheet:
      contact_sheet(videos, min(8, len(videos[0]))).save(sheet)
    print(f"samples of step {step}: {stem}.png", flush=True)

  def latents(self, step: int, state: Tree, frozen: Tree) -> np.ndarray:
    """Normalised latents of all prompts, as `Pipeline.sample_latents` returns them. All processes call it together."""
    made, settings = self.run.parts_that_made(step), self.run.config.sample
    components = made.objective.components
    variables, _ = weights = components.weights(state["ema"], frozen)
    if made is not self.stage:
      self.pipeline = Pipeline(components, weights, codec_of_shapes(made.stage.config.autoencoder), mesh=self.run.mesh)
      self.stage, self.autoencoder = made, None
      if components.conditioner.ahead:
        self.pipeline.set_weights((variables, self._text_encoder(components.conditioner)))
        self.pipeline.encode_prompts(self.requests)
    self.pipeline.set_weights(weights)
    latents = self.pipeline.sample_latents(self.requests, settings.steps, settings.guidance_scale)
    self.pipeline.set_weights((None, None))  # else a run that goes back to a checkpoint would have two states in memory
    return latents

  def _text_encoder(self, conditioner):
    """The weights of the encoder before the step. A training that reads features from a cache has not loaded them."""
    held = self.run.encoders.text_encoder
    return load_text_encoder(conditioner.config, conditioner.encoder, self.run.mesh) if held is None else held

  def _decode(self, latents):
    """Videos, uint8. The autoencoder lies on the devices only during this call."""
    config = self.stage.stage.config.autoencoder
    codec = codec_of_shapes(config, local_devices_mesh())
    if self.autoencoder is None:
      self.autoencoder = jax.device_get(load_codec(config).variables)
    places = jax.tree.map(lambda shape: shape.sharding, codec.variables)
    codec = dataclasses.replace(codec, variables=jax.device_put(self.autoencoder, places))
    return [codec.decode(z, self.run.config.sample.num_frames) for z in latents]


def check(made: StageParts, num_frames: int) -> None:
  """Raises ValueError if a stage (`StageParts`) can't be sampled with clips of so many frames."""
  if made.objective.part != "denoiser":
    raise ValueError("config: sample_every needs task='denoiser'; set sample_every=0")
  config, parts = made.stage.config, made.objective.components
  if parts.conditioner.name == "captions" and parts.conditioner.encoder is None:
    raise ValueError("config: sample_every needs a text encoder, but text_encoder.where is 'disk'; set sample_every=0")
  # Sampling needs these files also if training reads latents and features from disk.
  need_file(config.autoencoder.weights, "autoencoder.weights")
  if parts.conditioner.ahead:
    need_file(config.text_encoder.weights, "text_encoder.weights")
  what = f"config: sample.num_frames is {num_frames} in stage {made.stage.name!r} with autoencoder {config.autoencoder.name!r}"
  check_length(parts.autoencoder.config, num_frames, what)
