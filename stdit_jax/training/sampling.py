"""Sample videos while training: the averaged weights, the prompts of `config.sample`, files in `<output>/samples`."""

import jax

from data import aspect_ratios, paths
from stdit_jax.autoencoders.registry import nearest_lengths
from stdit_jax.generation.media import contact_sheet, write_media
from stdit_jax.generation.pipeline import Pipeline, Request
from stdit_jax.generation.prompts import TokenizeText
from stdit_jax.training import weights
from stdit_jax.training.autoencoding import autoencoder_model
from stdit_jax.training.stages import stage_that_made


class Sampler:
  """Called by the loop with (step, state, frozen), on all processes; the first one decodes and writes. Builds its programs
  once per stage."""

  def __init__(self, run):
    config = run.config
    if config.task != "denoiser":
      raise ValueError("config: sample_every needs task='denoiser'; set sample_every=0")
    if not config.sample.prompts:
      raise ValueError("config: sample.prompts is empty; give prompts or set sample_every=0")
    if config.text_encoder.where == "disk":
      raise ValueError("config: sample_every needs a text encoder, but text_encoder.where is 'disk'; set sample_every=0")
    for stage in run.stages:
      # Also where a training reads latents and embeddings from disk.
      weights.need_file(stage.config.autoencoder.weights, "autoencoder.weights")
      if stage.config.text_encoder.where == "ahead":
        weights.need_file(stage.config.text_encoder.weights, "text_encoder.weights")
      autoencoder, frames = autoencoder_model(stage.config.autoencoder).config, config.sample.num_frames
      if not autoencoder.keeps(frames):
        raise ValueError(
          f"config: sample.num_frames is {frames}, which the autoencoder of stage {stage.name!r}, "
          f"{stage.config.autoencoder.name}, does not give back; nearest: {nearest_lengths(autoencoder, frames)}"
        )
    self.config, self.run, self.pipeline, self.stage = config, run, None, None
    height, width = aspect_ratios.size(config.sample.resolution, config.sample.aspect_ratio)
    self.requests = [
      Request(prompt, height, width, config.sample.num_frames, config.sample.fps, config.sample.seed)
      for prompt in config.sample.prompts
    ]

  def __call__(self, step, state, frozen):
    params = state["ema"]
    stage = stage_that_made(self.run.stages, step)
    if stage is not self.stage:
      self.stage, self.pipeline = stage, self._build(stage, params, frozen)
    self.pipeline.set_weights(params, frozen, self.pipeline.text_params)
    settings = self.config.sample
    latents = self.pipeline.sample_latents(self.requests, settings.steps, settings.guidance_scale)
    if jax.process_index():
      return
    videos = self.pipeline.decode(latents, settings.num_frames)
    stem = paths.join(self.config.output, "samples", f"step{step:07d}")
    for i, (request, frames) in enumerate(zip(self.requests, videos)):
      written = {"prompt": request.prompt, "seed": request.seed, "step": step, **settings.to_dict()}
      written.pop("prompts")
      ending = "png" if len(frames) == 1 else "mp4"
      write_media(f"{stem}-{i}.{ending}", frames, request.fps, written)
    with paths.whole(f"{stem}.png") as sheet:
      contact_sheet(videos, min(8, len(videos[0]))).save(sheet)
    print(f"samples of step {step}: {stem}.png", flush=True)

  def _build(self, stage, params, frozen):
    config, objective = stage.config, self.run.objectives[stage.index]
    text_params = None
    if config.text_encoder.where == "ahead":
      text_params = weights.load_text_encoder(config, objective.text, self.run.mesh)
    tokenize = TokenizeText(config.text_encoder.tokenizer, config.text_encoder.max_length, clean=True)
    pieces = weights.local_devices_mesh() if jax.local_device_count() > 1 else None
    codec = weights.load_codec(config.autoencoder, pieces)
    return Pipeline(objective, params, frozen, codec, tokenize, text_params, mesh=self.run.mesh)
