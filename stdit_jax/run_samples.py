"""Sample videos while training: the averaged weights, the prompts of `config.sample`, files in `<output>/samples`."""

import dataclasses

import jax

from data import aspect_ratios, paths
from data.captions import clean_caption
from stdit_jax.autoencoders.registry import nearest_lengths
from stdit_jax.components import load_codec, load_text_encoder, local_devices_mesh, need_file
from stdit_jax.generation.media import contact_sheet, write_media
from stdit_jax.generation.pipeline import Pipeline, Request


class Sampler:
  """Called by the loop with (step, state, frozen), on all processes; the first one decodes and writes.

  It builds its programs once per stage. Raises ValueError if a stage can't be sampled.
  """

  def __init__(self, run):
    config = run.config
    if not config.sample.prompts:
      raise ValueError("config: sample.prompts is empty; give prompts or set sample_every=0")
    for parts in run.parts:
      check(parts, config.sample.num_frames)
    self.config, self.run, self.pipeline, self.stage = config, run, None, None
    height, width = aspect_ratios.size(config.sample.resolution, config.sample.aspect_ratio)
    self.requests = [
      Request(clean_caption(prompt), height, width, config.sample.num_frames, config.sample.fps, config.sample.seed)
      for prompt in config.sample.prompts
    ]

  def __call__(self, step, state, frozen):
    made = self.run.parts_that_made(step)
    own = made.objective.components.weights(state["ema"], frozen)
    if made is not self.stage:
      self.stage, self.pipeline = made, self._build(made, own)
    if own[1] is None:  # an encoder that runs before the step is in no state
      own = own[0], self.pipeline.encoder_weights
    self.pipeline.set_weights(own)
    settings = self.config.sample
    latents = self.pipeline.sample_latents(self.requests, settings.steps, settings.guidance_scale)
    if jax.process_index():
      return
    videos = self.pipeline.decode(latents, settings.num_frames)
    stem = paths.join(self.config.output, "samples", f"step{step:07d}")
    for i, (prompt, frames) in enumerate(zip(settings.prompts, videos)):
      written = {"prompt": prompt, "step": step, **dataclasses.asdict(settings)}
      written.pop("prompts")
      ending = "png" if len(frames) == 1 else "mp4"
      write_media(f"{stem}-{i}.{ending}", frames, settings.fps, written)
    with paths.whole(f"{stem}.png") as sheet:
      contact_sheet(videos, min(8, len(videos[0]))).save(sheet)
    print(f"samples of step {step}: {stem}.png", flush=True)

  def _build(self, made, weights):
    """The pipeline of a stage (`StageParts`) with these weights."""
    config, conditioner = made.stage.config, made.objective.components.conditioner
    if conditioner.ahead:
      weights = weights[0], load_text_encoder(conditioner.config, conditioner.encoder, self.run.mesh)
    pieces = local_devices_mesh() if jax.local_device_count() > 1 else None
    return Pipeline(made.objective.components, weights, load_codec(config.autoencoder, pieces), mesh=self.run.mesh)


def check(made, num_frames):
  """Raises ValueError if a stage (`StageParts`) can't be sampled with clips of so many frames."""
  if made.objective.part != "denoiser":
    raise ValueError("config: sample_every needs task='denoiser'; set sample_every=0")
  config, parts = made.stage.config, made.objective.components
  if parts.conditioner.name == "captions" and parts.conditioner.encoder is None:
    raise ValueError("config: sample_every needs a text encoder, but text_encoder.where is 'disk'; set sample_every=0")
  # Also where a training reads latents and features from disk.
  need_file(config.autoencoder.weights, "autoencoder.weights")
  if parts.conditioner.ahead:
    need_file(config.text_encoder.weights, "text_encoder.weights")
  if not parts.autoencoder.config.keeps(num_frames):
    raise ValueError(
      f"config: sample.num_frames is {num_frames}, which the autoencoder of stage {made.stage.name!r}, "
      f"{config.autoencoder.name}, does not give back; nearest: {nearest_lengths(parts.autoencoder.config, num_frames)}"
    )
