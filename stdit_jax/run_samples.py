"""Makes sample videos during training, with the averaged weights and the prompts of `config.sample`, in `<output>/samples`."""

import dataclasses
from typing import Any

import jax

from data import aspect_ratios, paths
from data.captions import clean_caption
from stdit_jax.autoencoders.registry import check_length
from stdit_jax.components import load_codec, load_text_encoder, local_devices_mesh, need_file
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
    self.run, self.stage = run, None
    self.pipeline: Any = None  # of the stage
    how = *aspect_ratios.size(sample.resolution, sample.aspect_ratio), sample.num_frames, sample.fps, sample.seed
    self.requests = [Request(clean_caption(prompt), *how) for prompt in sample.prompts]

  def __call__(self, step: int, state: Tree, frozen: Tree) -> None:
    made, settings, mesh = self.run.parts_that_made(step), self.run.config.sample, self.run.mesh
    components, config = made.objective.components, made.stage.config
    variables, encoder = components.weights(state["ema"], frozen)
    if made is not self.stage:
      if components.conditioner.ahead:
        encoder = load_text_encoder(components.conditioner.config, components.conditioner.encoder, mesh)
      codec = load_codec(config.autoencoder, local_devices_mesh())
      self.pipeline = Pipeline(components, (variables, encoder), codec, mesh=mesh)
      self.stage = made
    # If the text encoder runs before the step, the state does not hold it, and the pipeline keeps its encoder.
    self.pipeline.set_weights((variables, self.pipeline.encoder_weights if encoder is None else encoder))
    latents = self.pipeline.sample_latents(self.requests, settings.steps, settings.guidance_scale)
    if jax.process_index():
      return
    videos = self.pipeline.decode(latents, settings.num_frames)
    stem = paths.join(self.run.config.output, "samples", f"step{step:07d}")
    for i, (prompt, frames) in enumerate(zip(settings.prompts, videos)):
      written = {"prompt": prompt, "step": step, **dataclasses.asdict(settings)}
      written.pop("prompts")
      write_media(f"{stem}-{i}.{'png' if len(frames) == 1 else 'mp4'}", frames, settings.fps, written)
    with paths.whole(f"{stem}.png") as sheet:
      contact_sheet(videos, min(8, len(videos[0]))).save(sheet)
    print(f"samples of step {step}: {stem}.png", flush=True)


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
