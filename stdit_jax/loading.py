"""Opens trained models for sampling and measuring: from a run folder, or from a configuration and converted weights."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

from configs import base
from data.command_line import flag
from stdit_jax.cli import parse_mesh, read_config
from stdit_jax.config import Config
from stdit_jax.generation.settings import SamplerSettings
from stdit_jax.generation.work import fingerprints

_model = functools.partial(flag, group="model")


@dataclasses.dataclass(frozen=True)
class ModelSettings:
  """The flags that name a trained model and its files."""

  run: str | None = _model("folder of a training run (its `output`)")
  item: str = _model("which weights of the run (default: %(default)s)", "ema", choices=("ema", "params"))
  step: int | None = _model("which checkpoint of the run (default: the newest)")
  config: str | None = _model("configuration file of the model, instead of --run", metavar="FILE")
  changes: Sequence[str] = _model("replaces one key of --config", (), "--config.KEY", metavar="VALUE")
  weights: str | None = _model("for --config: safetensors of the denoiser with its original names")
  text_encoder: str | None = _model("safetensors file or folder of the T5 encoder (default: that of the configuration)")
  autoencoder: str | None = _model("safetensors of the autoencoder (default: that of the configuration)")
  mesh: Sequence[str] | None = _model(
    "mesh of all devices, e.g. data=-1 fsdp=4; sequence=4 splits each video (default: one device; several processes: data=-1)",
    nargs="+", metavar="AXIS=DEVICES",
  )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PipelineSettings(SamplerSettings, ModelSettings):
  """The flags of a model and of its sampler."""


def open_config(model: ModelSettings) -> tuple[Config, int | None]:
  """(configuration, step of the checkpoint or None) of --run or --config. Raises ValueError if not one of them is given."""
  from stdit_jax.training import checkpoints
  from stdit_jax.training.stages import make_stages

  if bool(model.run) == bool(model.config):
    raise ValueError("give either --run FOLDER (a training run) or --config FILE with the files of the weights")
  if model.run:
    return checkpoints.stage_config(model.run, model.step)
  return make_stages(read_config(model.config, model.changes))[-1].config, None


def read_model(settings: PipelineSettings) -> tuple[Config, int | None]:
  """(configuration, step of the checkpoint or None), with the choices of the sampler. Reads no weights.

  Raises:
    ValueError: flags that exclude each other, or that this model does not have.
  """
  from stdit_jax.training.objectives import part_of

  config, step = open_config(settings)
  if settings.run and (settings.weights or settings.changes):
    what = settings.changes[0] if settings.changes else "--weights"
    raise ValueError(f"{what} goes with --config FILE; a --run has its own. Leave it out")
  given = {"autoencoder.weights": settings.autoencoder, "text_encoder.weights": settings.text_encoder}
  changes: dict[str, Any] = {key: value for key, value in given.items() if value}
  if (part := part_of(config)) != "denoiser":
    raise ValueError(f"{settings.run or settings.config} trains an {part}; sampling needs a denoiser; give another")
  if config.text_encoder.where == "disk":
    if not settings.text_encoder:
      raise ValueError("the run read its text embeddings from disk, and new prompts need a text encoder; give --text-encoder")
    changes["text_encoder.where"] = "ahead"
  return config.replace(changes | sampler_changes(config, settings)), step


def sampler_changes(config: Config, sampler: SamplerSettings) -> dict[str, Any]:
  """The keys of `config` that the flags change: fields of the diffusion. Raises ValueError for flags that it does not have."""
  trained = config.diffusion.name
  own = {"open-sora-1.1": "iddpm", "open-sora-1.2": "rectified-flow", None: trained}[sampler.compat]
  if trained != own:
    raise ValueError(f"--compat {sampler.compat} is of {own}; the model was trained with {trained}. Leave it out")
  if sampler.timestep_shift is not None and trained != "rectified-flow":
    raise ValueError(f"--timestep-shift is of rectified-flow; the model was trained with {trained}. Leave it out")
  given = {"compat": sampler.compat, "sampler": sampler.sampler, "sampling_shift": sampler.timestep_shift}
  return {f"diffusion.fields.{name}": value for name, value in given.items() if value is not None}


def steps_and_scale(sampler: SamplerSettings, config: Any) -> tuple[int, float]:
  """(sampler steps, guidance scale) of the flags, or else of the configuration. Raises ValueError for an infinite scale."""
  scale = config.sample.guidance_scale if sampler.guidance_scale is None else sampler.guidance_scale
  if not math.isfinite(scale):
    raise ValueError(f"--guidance-scale is {scale}; give a number, 1 for no guidance")
  return config.sample.steps if sampler.steps is None else sampler.steps, scale


def describe(model: ModelSettings, step: int | None) -> str:
  """The weights that the flags name, in words."""
  return f"{model.run}, step {step}, {model.item}" if model.run else str(model.weights)


def provenance(model: ModelSettings, step: int | None) -> dict[str, Any]:
  """The settings and files of the model that are stored beside what it makes."""
  given = {name: getattr(model, name) for name in ("config", "changes", "autoencoder", "text_encoder")}
  given = {name: value for name, value in given.items() if value}
  files = fingerprints(filter(None, (model.weights, model.autoencoder, model.text_encoder)))
  return {"model": describe(model, step), **given, "files": files}


def guidance_of(sampler: SamplerSettings):
  """`Guidance` of the flags. Raises ValueError for values that are not allowed."""
  from stdit_jax.diffusion.guidance import Guidance

  interval = tuple(sampler.guidance_interval) if sampler.guidance_interval else None
  channels = sampler.guidance_channels
  if channels is None and sampler.compat == "open-sora-1.1":
    channels = 3
  options = {"channels": channels, "interval": interval, "rescale": sampler.guidance_rescale}
  return Guidance(**options, sequential=sampler.guidance_in_turn)


def load_pipeline(settings: PipelineSettings, config: Any, step: int | None, check=lambda pipeline: None):
  """The pipeline of the model that `read_model` returned.

  Args:
    check: called with the pipeline while its weights are shapes only, before anything is allocated.
  """
  import jax

  from stdit_jax import components
  from stdit_jax.generation.pipeline import Pipeline
  from stdit_jax.interop import open_source
  from stdit_jax.models import step_cache, t5
  from stdit_jax.parallel.mesh import make_mesh
  from stdit_jax.training import checkpoints

  sizes = parse_mesh(settings.mesh) if settings.mesh else {"data": -1} if jax.process_count() > 1 else None
  mesh = make_mesh(sizes) if sizes else None
  parts = components.Components.of(config)
  family, conditioner = parts.family, parts.conditioner
  params, frozen = placed_shapes(jax.eval_shape(parts.init, jax.random.key(0)), mesh, parts.rules)
  components.need_file(config.autoencoder.weights, "autoencoder.weights (--autoencoder)")
  if not settings.run:
    shapes = family.init_shapes(parts.model.config)
    open_source(components.need_file(settings.weights, "--weights"), family.layouts, shapes, parts.model.config).check()
  in_run = settings.run and "text_encoder" in params and not settings.text_encoder
  reads_encoder = conditioner.encoder is not None and not in_run
  if reads_encoder:
    components.need_file(config.text_encoder.weights, "text_encoder.weights (--text-encoder)")
  weights = parts.weights(params, frozen)
  if weights[1] is None and conditioner.encoder is not None:
    weights = weights[0], placed_shapes(t5.init_shapes(conditioner.encoder.config), mesh, t5.RULES)["params"]
  cache = step_cache.parse(settings.step_cache) if settings.step_cache else None
  pieces = components.local_devices_mesh() if mesh and jax.local_device_count() > 1 else None
  codec = components.codec_of_shapes(config.autoencoder, pieces)
  pipeline = Pipeline(parts, weights, codec, guidance_of(settings), mesh, cache)
  check(pipeline)
  if settings.run:
    params, frozen, _ = checkpoints.load_weights(settings.run, settings.item, step, mesh, parts.rules)
    weights = parts.weights(params, frozen)
  else:
    weights = components.load_denoiser(parts, settings.weights, mesh), None
  if reads_encoder:
    weights = weights[0], components.load_text_encoder(config.text_encoder, conditioner.encoder, mesh)
  if not mesh:
    weights = jax.device_put(weights, jax.local_devices()[0])
  pipeline.set_weights(weights)
  fitted = {"tiles": pipeline.codec.tiles, "micro_batch": pipeline.codec.micro_batch}
  pipeline.codec = dataclasses.replace(components.load_codec(config.autoencoder, pieces), **fitted)
  return pipeline


def load_autoencoder(model: ModelSettings, name: str | None = None):
  """(codec, description of its weights, configuration or None) of an autoencoder.

  A run that trains an autoencoder gives it. Any other run, or a configuration, gives the autoencoder that it uses.
  --autoencoder replaces their weights. --autoencoder alone is the model `name`, or the model that the file names.
  """
  from stdit_jax.autoencoders.registry import autoencoder_model, make_codec
  from stdit_jax.components import load_codec, need_file
  from stdit_jax.interop import open_checkpoint
  from stdit_jax.interop.models import described
  from stdit_jax.training import checkpoints
  from stdit_jax.training.objectives import part_of

  if name and (model.run or model.config):
    raise ValueError(f"--model {name} goes with --autoencoder alone; a --run or --config names its model. Leave --model out")
  if not (model.run or model.config or model.autoencoder):
    raise ValueError("give --run FOLDER, --config FILE or --autoencoder FILE")
  config, step = open_config(model) if model.run or model.config else (None, None)
  if model.run and part_of(config) == "autoencoder" and not model.autoencoder:
    own = autoencoder_model(config.autoencoder)
    params, _, _ = checkpoints.load_weights(model.run, model.item, step)
    variables = {"params": params["autoencoder"]}
    return make_codec(own, variables, config.autoencoder.micro_batch), describe(model, step), config
  own = (config or Config.of(base.get_config())).autoencoder
  if model.autoencoder:
    own = dataclasses.replace(own, weights=need_file(model.autoencoder, "--autoencoder"))
  if not config:
    metadata = open_checkpoint(own.weights).metadata
    said, fields = (None, {}) if name not in (None, metadata.get("model")) else described(metadata, own.weights)
    if not (name or said):
      raise ValueError(f"{own.weights} doesn't say which autoencoder it is; give --model NAME")
    own = dataclasses.replace(own, name=name or said, fields=fields)
  return load_codec(own), own.weights, config


def placed_shapes(shapes, mesh, rules):
  """Shapes with the shardings that the weights will have."""
  import jax

  from stdit_jax.parallel.shardings import tree_shardings

  one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  places = tree_shardings(shapes, mesh, rules) if mesh else jax.tree.map(lambda _: one, shapes)
  return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places)
