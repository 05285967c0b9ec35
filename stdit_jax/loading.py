"""Opens trained models for sampling and measuring: from a run folder, or from a configuration and converted weights."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from configs import base
from stdit_jax import components
from stdit_jax.autoencoders.registry import autoencoder_model, make_codec
from stdit_jax.cli import parse_mesh, read_config
from stdit_jax.config import Config
from stdit_jax.diffusion.guidance import Guidance
from stdit_jax.generation.pipeline import Pipeline
from stdit_jax.generation.settings import ModelSettings, PipelineSettings
from stdit_jax.interop import open_checkpoint, open_source
from stdit_jax.interop.models import described
from stdit_jax.models import step_cache, t5
from stdit_jax.parallel.mesh import make_mesh
from stdit_jax.parallel.shardings import with_shardings
from stdit_jax.training import checkpoints
from stdit_jax.training.objectives import part_of
from stdit_jax.training.stages import make_stages


def open_config(model: ModelSettings) -> tuple[Config, int | None]:
  """(configuration, step of the checkpoint or None) of --run or --config. Raises ValueError unless exactly one is given."""
  if bool(model.run) == bool(model.config):
    raise ValueError("give either --run FOLDER (a training run) or --config FILE with the files of the weights")
  if model.run:
    return checkpoints.stage_config(model.run, model.step)
  return make_stages(read_config(model.config, model.changes))[-1].config, None


def read_model(settings: PipelineSettings) -> tuple[Config, int | None]:
  """(configuration, step of the checkpoint or None). The flags replace keys of the configuration. Reads no weights.

  Raises ValueError for flags that exclude each other, or that this model does not have.
  """
  config, step = open_config(settings)
  if settings.run and (settings.weights or settings.changes):
    what = settings.changes[0] if settings.changes else "--weights"
    raise ValueError(f"{what} needs --config FILE; a --run has its own weights and configuration. Leave {what} out")
  if (part := part_of(config)) != "denoiser":
    raise ValueError(f"{settings.run or settings.config} trains an {part}; sampling needs a denoiser; give another")
  given: dict[str, Any] = {"autoencoder.weights": settings.autoencoder, "text_encoder.weights": settings.text_encoder}
  if config.text_encoder.where == "disk":
    if not settings.text_encoder:
      raise ValueError("the run read its text embeddings from disk, and new prompts need a text encoder; give --text-encoder")
    given["text_encoder.where"] = "ahead"
  given |= sampler_changes(config.diffusion.name, settings)
  config = config.replace({key: value for key, value in given.items() if value not in (None, "")})
  if not math.isfinite(scale := config.sample.guidance_scale):
    raise ValueError(f"--guidance-scale is {scale}; give a number, 1 for no guidance")
  guidance_of(settings)
  return config, step


def sampler_changes(trained: str, settings: PipelineSettings) -> dict[str, Any]:
  """The keys of `diffusion` and `sample` that flags replace. Raises ValueError for flags that the diffusion `trained` lacks."""
  needed = {"open-sora-1.1": "iddpm", "open-sora-1.2": "rectified-flow", None: trained}[settings.compat]
  if trained != needed:
    raise ValueError(f"--compat {settings.compat} is for {needed}; the model was trained with {trained}. Leave it out")
  if settings.timestep_shift is not None and trained != "rectified-flow":
    raise ValueError(f"--timestep-shift is for rectified-flow; the model was trained with {trained}. Leave it out")
  fields = {"compat": settings.compat, "sampler": settings.sampler, "sampling_shift": settings.timestep_shift}
  sample = {"sample.steps": settings.steps, "sample.guidance_scale": settings.guidance_scale}
  return {f"diffusion.fields.{name}": value for name, value in fields.items()} | sample


def guidance_of(settings: PipelineSettings) -> Guidance:
  """The guidance of the flags. Raises ValueError for values that are not allowed."""
  channels = 3 if settings.guidance_channels is None and settings.compat == "open-sora-1.1" else settings.guidance_channels
  interval = (pair[0], pair[1]) if (pair := settings.guidance_interval) else None
  return Guidance(channels=channels, interval=interval, rescale=settings.guidance_rescale, sequential=settings.guidance_in_turn)


def describe(model: ModelSettings, step: int | None) -> str:
  """The weights that the flags name, in words."""
  return f"{model.run}, step {step}, {model.item}" if model.run else str(model.weights)


def load_pipeline(settings: PipelineSettings, config: Config, step: int | None, check: Callable = lambda _: None) -> Pipeline:
  """The pipeline of the model of `read_model`.

  Calls `check(pipeline)` while all weights are shapes, before any array is allocated. `check` may set tiles of the codec.
  """
  sizes = parse_mesh(settings.mesh) if settings.mesh else {"data": -1} if jax.process_count() > 1 else None
  mesh = make_mesh(sizes) if sizes else None
  parts = components.Components.of(config)
  encoder, model = parts.conditioner.encoder, parts.model.config
  params, frozen = with_shardings(jax.eval_shape(parts.init, jax.random.key(0)), mesh, parts.rules)
  components.need_file(config.autoencoder.weights, "autoencoder.weights (--autoencoder)")
  if not settings.run:
    path = components.need_file(settings.weights, "--weights")
    open_source(path, parts.family.layouts, parts.family.init_shapes(model), model).check()
  in_run = settings.run and "text_encoder" in params and not settings.text_encoder
  reads_encoder = encoder is not None and not in_run
  if reads_encoder:
    components.need_file(config.text_encoder.weights, "text_encoder.weights (--text-encoder)")
  weights = parts.weights(params, frozen)  # shapes of (denoiser, text encoder or None)
  if weights[1] is None and encoder is not None:
    # The encoder ran before the training step, so the run has no parameters of it.
    weights = weights[0], with_shardings(t5.init_shapes(encoder.config), mesh, t5.RULES)["params"]
  cache = step_cache.parse(settings.step_cache) if settings.step_cache else None
  pieces = components.local_devices_mesh() if mesh else None
  codec = components.codec_of_shapes(config.autoencoder, pieces)
  pipeline = Pipeline(parts, weights, codec, guidance_of(settings), mesh, cache)
  check(pipeline)
  if settings.run:
    weights = parts.weights(*checkpoints.load_weights(settings.run, settings.item, step, mesh, parts.rules)[:2])
  else:
    weights = components.load_denoiser(parts, str(settings.weights), mesh), None
  if reads_encoder:
    weights = weights[0], components.load_text_encoder(config.text_encoder, parts.conditioner.encoder, mesh)
  pipeline.set_weights(weights if mesh else jax.device_put(weights, jax.local_devices()[0]))
  # `check` may have changed tiles and micro batch to fit the memory.
  fitted = {"tiles": pipeline.codec.tiles, "micro_batch": pipeline.codec.micro_batch}
  pipeline.codec = dataclasses.replace(components.load_codec(config.autoencoder, pieces), **fitted)
  return pipeline


def load_autoencoder(model: ModelSettings, name: str | None = None) -> tuple[Any, str, Any]:
  """(codec, description of its weights, configuration or None) of an autoencoder.

  --run selects the autoencoder that the run trains, or the one that its denoiser uses. --config selects the one that it names.
  --autoencoder replaces the weights. If only --autoencoder is given, `name` or the file's metadata names the model.
  """
  if name and (model.run or model.config):
    raise ValueError(f"--model {name} goes with --autoencoder alone; a --run or --config names its model. Leave --model out")
  if not (model.run or model.config or model.autoencoder):
    raise ValueError("give --run FOLDER, --config FILE or --autoencoder FILE")
  config, step = open_config(model) if model.run or model.config else (None, None)
  own = (config or Config.of(base.get_config())).autoencoder
  if config and model.run and part_of(config) == "autoencoder" and not model.autoencoder:
    params, _, _ = checkpoints.load_weights(model.run, model.item, step)
    codec = make_codec(autoencoder_model(own), {"params": params["autoencoder"]}, own.micro_batch)
    return codec, describe(model, step), config
  if model.autoencoder:
    own = dataclasses.replace(own, weights=components.need_file(model.autoencoder, "--autoencoder"))
  if not config:
    metadata = open_checkpoint(own.weights).metadata
    # The file's fields hold for the model that it names, not for another `name`.
    said, fields = (None, {}) if name not in (None, metadata.get("model")) else described(metadata, own.weights)
    if not (name or said):
      raise ValueError(f"{own.weights} doesn't say which autoencoder it is; give --model NAME")
    own = dataclasses.replace(own, name=name or said, fields=fields)
  return components.load_codec(own), own.weights, config
