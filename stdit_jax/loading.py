"""A pipeline from a training run's folder, or from a configuration and converted weights: for entry points that sample."""

import dataclasses
import math
import pathlib

import ml_collections

from stdit_jax.cli import parse_mesh, read_config
from stdit_jax.generation.conditions import COMPAT


def add_model_arguments(parser):
  """The arguments that `read_model` and `load_pipeline` read, but for `changes`, which `cli.parse_with_changes` sets."""
  parser.set_defaults(changes=())
  model = parser.add_argument_group("model")
  model.add_argument("--run", help="folder of a training run (its `output`)")
  model.add_argument("--item", default="ema", choices=("ema", "params"), help="which of the run's weights (default: ema)")
  model.add_argument("--step", type=int, help="which checkpoint of the run (default: the newest)")
  model.add_argument("--config", help="instead of --run: configuration file of the model; --config.KEY=VALUE changes it")
  model.add_argument("--weights", help="with --config: safetensors of the denoiser, original names")
  model.add_argument("--text-encoder", help="safetensors file or folder of the T5 encoder, if not the config's")
  model.add_argument("--autoencoder", help="safetensors of the image autoencoder, if not the config's")
  model.add_argument(
    "--mesh", nargs="+", metavar="AXIS=DEVICES",
    help="over all devices, e.g. data=-1 fsdp=4; sequence=4 splits each video (default: one device; processes: data=-1)",
  )  # fmt: skip


def add_sampler_arguments(how):
  """The arguments that `steps_and_scale` and `guidance_of` read."""
  how.add_argument("--steps", type=int, help="sampler steps")
  how.add_argument("--guidance-scale", type=float, help="classifier-free guidance; 1 is none")
  how.add_argument("--sampler", help="euler (default) or adams-bashforth; of iddpm ancestral (default), ddim, dpm++")
  how.add_argument(
    "--timestep-shift", type=float, metavar="A", help="of rectified flow: timesteps nearer to noise, e.g. 3 with few steps "
    "(default: 1, none)",
  )  # fmt: skip
  how.add_argument(
    "--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="timesteps that are guided (default: all)"
  )
  how.add_argument("--guidance-rescale", type=float, default=0.0, help="0 to 1: less contrast at large scales (default: 0)")
  how.add_argument("--guidance-in-turn", action="store_true", help="prompt and null caption one after the other: less memory")
  how.add_argument(
    "--step-cache", metavar="NAME", help="faster, and a little different (models/step_cache.py): pyramid, attention serves "
    "several steps (pyramid:2,4,6: over space, over time, to text), or residual:0.1, the larger the faster",
  )  # fmt: skip
  how.add_argument("--guidance-channels", type=int, help="guide only so many latent channels; Open-Sora 1.1: 3 (default: all)")
  how.add_argument("--compat", choices=COMPAT[1:], help="do what the original does where it is mended here (README)")


def read_model(args):
  """(configuration, checkpoint's step or None) of a run folder, or of a configuration file; no weights are read yet."""
  from stdit_jax.training import checkpoints
  from stdit_jax.training.objectives import part_of
  from stdit_jax.training.stages import make_stages

  if bool(args.run) == bool(args.config):
    raise ValueError("give either --run FOLDER (a training run) or --config FILE with --weights FILE")
  if args.run and (args.weights or args.changes):
    raise ValueError(f"{args.changes[0] if args.changes else '--weights'} goes with --config FILE; a --run has its own")
  if args.run:
    config, step = checkpoints.stage_config(args.run, args.step)
  else:
    config, step = make_stages(read_config(args.config, args.changes))[-1].config, None
  for key, value in (("autoencoder", args.autoencoder), ("text_encoder", args.text_encoder)):
    if value:
      config[key].weights = value
  if (part := part_of(config)) != "denoiser":
    raise ValueError(f"{args.run or args.config} trains an {part}; sampling needs a denoiser")
  config = ml_collections.ConfigDict(config.to_dict())
  if config.text_encoder.where == "disk":
    if not args.text_encoder:
      raise ValueError("the run took its text embeddings from disk; give --text-encoder")
    config.text_encoder.where = "ahead"
  own = {"open-sora-1.1": "iddpm", "open-sora-1.2": "rectified-flow", None: config.diffusion.name}[args.compat]
  if config.diffusion.name != own:
    raise ValueError(f"--compat {args.compat} is of {own}; the model was trained with {config.diffusion.name}")
  given = {"compat": args.compat, "sampler": args.sampler, "sampling_shift": args.timestep_shift}
  if args.timestep_shift is not None and config.diffusion.name != "rectified-flow":
    raise ValueError(f"--timestep-shift is of rectified-flow; the model was trained with {config.diffusion.name}")
  with config.ignore_type():
    config.diffusion.fields.update({name: value for name, value in given.items() if value is not None})
  return config, step


def steps_and_scale(args, config):
  """(sampler steps, guidance scale) of the command line, else of the configuration; ValueError for a scale that is none."""
  scale = config.sample.guidance_scale if args.guidance_scale is None else args.guidance_scale
  if not math.isfinite(scale):
    raise ValueError(f"--guidance-scale is {scale}; give a number, 1 for none")
  return config.sample.steps if args.steps is None else args.steps, scale


def describe(args, step):
  """Which weights the arguments name."""
  return f"{args.run}, step {step}, {args.item}" if args.run else args.weights


def guidance_of(args):
  """`Guidance` of the command line; ValueError for values that can't be."""
  from stdit_jax.diffusion.guidance import Guidance

  interval = tuple(args.guidance_interval) if args.guidance_interval else None
  channels = args.guidance_channels
  if channels is None and args.compat == "open-sora-1.1":
    channels = 3
  options = {"channels": channels, "interval": interval, "rescale": args.guidance_rescale}
  return Guidance(**options, sequential=args.guidance_in_turn)


def load_pipeline(args, config, step, check=lambda pipeline: None):
  """The pipeline of what `read_model` read; `check` sees it while its weights are shapes only."""
  import jax

  from stdit_jax import components
  from stdit_jax.generation.pipeline import Pipeline
  from stdit_jax.interop import open_source
  from stdit_jax.models import step_cache, t5
  from stdit_jax.parallel.mesh import make_mesh
  from stdit_jax.training import checkpoints

  sizes = parse_mesh(args.mesh) if args.mesh else {"data": -1} if jax.process_count() > 1 else None
  mesh = make_mesh(sizes) if sizes else None
  parts = components.Components.of(config)
  family, conditioner = parts.family, parts.conditioner
  params, frozen = placed_shapes(jax.eval_shape(parts.init, jax.random.key(0)), mesh, parts.rules)
  components.need_file(config.autoencoder.weights, "autoencoder.weights (--autoencoder)")
  if not args.run:
    shapes = family.init_shapes(parts.model.config)
    open_source(components.need_file(args.weights, "--weights"), family.layouts, shapes, parts.model.config).check()
  reads_encoder = conditioner.encoder is not None and (not args.run or "text_encoder" not in params or args.text_encoder)
  if reads_encoder:
    components.need_file(config.text_encoder.weights, "text_encoder.weights (--text-encoder)")
  weights = parts.weights(params, frozen)
  if weights[1] is None and conditioner.encoder is not None:
    weights = weights[0], placed_shapes(t5.init_shapes(conditioner.encoder.config), mesh, t5.RULES)["params"]
  cache = step_cache.parse(args.step_cache) if args.step_cache else None
  pieces = components.local_devices_mesh() if mesh and jax.local_device_count() > 1 else None
  codec = components.codec_of_shapes(config.autoencoder, pieces)
  pipeline = Pipeline(parts, weights, codec, guidance_of(args), mesh, cache)
  check(pipeline)
  if args.run:
    params, frozen, _ = checkpoints.load_weights(args.run, args.item, step, mesh, parts.rules)
    weights = parts.weights(params, frozen)
  else:
    weights = components.load_denoiser(parts, args.weights, mesh), None
  if reads_encoder:
    weights = weights[0], components.load_text_encoder(config.text_encoder, conditioner.encoder, mesh)
  if not mesh:
    weights = jax.device_put(weights, jax.local_devices()[0])
  pipeline.set_weights(weights)
  fitted = {"tiles": pipeline.codec.tiles, "micro_batch": pipeline.codec.micro_batch}
  pipeline.codec = dataclasses.replace(components.load_codec(config.autoencoder, pieces), **fitted)
  return pipeline


def load_autoencoder(args):
  """(codec, description of its weights, configuration or None): the autoencoder of --run or of --config, one that it trains
  or one that it uses, or with --autoencoder that file, of --model or of the model that it names itself."""
  from stdit_jax.autoencoders.registry import autoencoder_model, make_codec
  from stdit_jax.components import load_codec, need_file
  from stdit_jax.interop import open_checkpoint
  from stdit_jax.interop.models import described
  from stdit_jax.training import checkpoints
  from stdit_jax.training.objectives import part_of
  from stdit_jax.training.stages import make_stages

  if args.run and args.config:
    raise ValueError("give either --run FOLDER (a training run) or --config FILE")
  if args.model and (args.run or args.config):
    raise ValueError("--model is of --autoencoder alone; which one a run or a configuration has, it says itself")
  step, config = None, None
  if args.run:
    config, step = checkpoints.stage_config(args.run, args.step)
  elif args.config:
    config = make_stages(read_config(args.config, args.changes))[-1].config
  elif not args.autoencoder:
    raise ValueError("give --run FOLDER, --config FILE or --autoencoder FILE")
  if args.run and part_of(config) == "autoencoder" and not args.autoencoder:
    model = autoencoder_model(config.autoencoder)
    params, _, _ = checkpoints.load_weights(args.run, args.item, step)
    variables = {"params": params["autoencoder"]}
    return make_codec(model, variables, config.autoencoder.micro_batch), f"{args.run}, step {step}, {args.item}", config
  own = ml_collections.ConfigDict(config.autoencoder.to_dict() if config else {"micro_batch": 4, "dtype": "float32"})
  if args.autoencoder:
    own.weights = need_file(args.autoencoder, "--autoencoder")
  if not config:
    metadata = open_checkpoint(own.weights).metadata
    said, fields = (None, {}) if args.model not in (None, metadata.get("model")) else described(metadata, own.weights)
    if not (args.model or said):
      raise ValueError(f"{own.weights} doesn't say which autoencoder it is; give --model NAME")
    own.name, own.fields = args.model or said, fields
  return load_codec(own), own.weights, config


def placed_shapes(shapes, mesh, rules):
  """Shapes with the shardings that the weights will have."""
  import jax

  from stdit_jax.parallel.shardings import tree_shardings

  one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  places = tree_shardings(shapes, mesh, rules) if mesh else jax.tree.map(lambda _: one, shapes)
  return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places)


def free_memory():
  """Bytes that one device has left for programs, None where it does not say."""
  import jax

  device = jax.local_devices()[0]
  stats = device.memory_stats() if device.platform != "cpu" else None
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
  try:
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
  except (OSError, StopIteration):
    return None
