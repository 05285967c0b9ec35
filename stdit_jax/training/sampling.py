"""Sample videos while training: the averaged weights, the prompts of `config.sample`, files in `<output>/samples`."""

import jax

from data import aspect_ratios, paths
from stdit_jax.generation.media import contact_sheet, write_media
from stdit_jax.generation.pipeline import Pipeline, Request
from stdit_jax.generation.prompts import TokenizeText
from stdit_jax.training import weights
from stdit_jax.training.objectives import autoencoder_model


class Sampler:
  """Called by the loop with (step, state, frozen). Builds its programs once."""

  def __init__(self, run):
    config = run.config
    if config.task != "denoiser":
      raise ValueError("config: sample_every needs task='denoiser'; set sample_every=0")
    if not config.sample.prompts:
      raise ValueError("config: sample.prompts is empty; give prompts or set sample_every=0")
    if config.text_encoder.where == "disk":
      raise ValueError("config: sample_every needs a text encoder, but text_encoder.where is 'disk'; set sample_every=0")
    self.config, self.run, self.pipeline = config, run, None
    height, width = aspect_ratios.size(config.sample.resolution, config.sample.aspect_ratio)
    self.requests = [
      Request(prompt, height, width, config.sample.num_frames, config.sample.fps, config.sample.seed)
      for prompt in config.sample.prompts
    ]

  def __call__(self, step, state, frozen):
    if jax.process_count() > 1:
      return  # sampling on a sharded state over processes is not here yet; the checkpoint can be sampled from elsewhere
    device = jax.local_devices()[0]
    params, frozen = jax.device_put((state["ema"], frozen), device)
    if self.pipeline is None:
      self.pipeline = self._build(params, frozen)
    self.pipeline.set_weights(params, frozen, self.pipeline.text_params)
    settings = self.config.sample
    videos = self.pipeline.generate(self.requests, settings.steps, settings.guidance_scale)
    stem = paths.join(self.config.output, "samples", f"step{step:07d}")
    for i, (request, frames) in enumerate(zip(self.requests, videos)):
      written = {"prompt": request.prompt, "seed": request.seed, "step": step, **settings.to_dict()}
      written.pop("prompts")
      ending = "png" if len(frames) == 1 else "mp4"
      write_media(f"{stem}-{i}.{ending}", frames, request.fps, written)
    with paths.whole(f"{stem}.png") as sheet:
      contact_sheet(videos, min(8, len(videos[0]))).save(sheet)
    print(f"samples of step {step}: {stem}.png", flush=True)

  def _build(self, params, frozen):
    config, objective = self.config, self.run.objectives[-1]
    model = autoencoder_model(config.autoencoder)
    text_params = None
    if config.text_encoder.where == "ahead":
      text_params = weights.load_text_encoder(config, objective.text)
    tokenize = TokenizeText(config.text_encoder.tokenizer, config.text_encoder.max_length, clean=True)
    autoencoder = model, weights.load_autoencoder(config, model)
    return Pipeline(objective, params, frozen, autoencoder, tokenize, text_params)
