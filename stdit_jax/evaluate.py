"""Measures a trained model.

--task loss    the loss on fixed samples at fixed timesteps, bucket by bucket (training/validation.py); the buckets are those of
               the stage that the checkpoint comes from
--task shapes  what a model of moving shapes makes of prompts and given frames, measured in the pixels
               (generation/shapes_exam.py)
--task autoencoder  what an autoencoder keeps of clips and pictures, how fast it is, how its latents are distributed
               (autoencoders/reconstruction.py): `shift` and `scale` are what `autoencoder.fields` needs, so that a
               denoiser sees latents of unit variance

  python -m stdit_jax.evaluate --run runs/film --tables held_out.csv
  python -m stdit_jax.evaluate --run runs/film --tables held_out.csv --item params --output loss.json
  python -m stdit_jax.evaluate --run runs/shapes --task shapes
  python -m stdit_jax.evaluate --task autoencoder --autoencoder data/film/autoencoder.safetensors \\
      --tables data/film/prepared/table.csv --buckets 144p:1 144p:17 --picture film.png

Nothing is written into the run. Of several processes (`cli.connect_processes`) all run the same command.
"""

import argparse
import json
import os
import tempfile

from absl import logging

from data import paths
from data.buckets import parse_buckets
from data.config import DataConfig
from stdit_jax.cli import (
  OneLineParser,
  connect_processes,
  keep_freed_memory,
  one_line_errors,
  parse_mesh,
  parse_with_changes,
  use_compilation_cache,
)
from stdit_jax.generation.shapes_exam import PARTS
from stdit_jax.training import loading

TASKS = ("loss", "shapes", "autoencoder")


def make_parser():
  parser = OneLineParser(
    "python -m stdit_jax.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )  # fmt: skip
  parser.add_argument("--task", default="loss", choices=TASKS, help="what is measured (default: loss)")
  parser.add_argument("--output", help="writes the result as JSON")
  loading.add_model_arguments(parser)
  loss = parser.add_argument_group("loss (of a --run, by default on its own mesh)")
  loss.add_argument(
    "--tables", nargs="+", help="metadata tables to measure on (default: validation.tables of the run); autoencoder: also "
    "folders or files of videos and pictures (default: the configuration's)",
  )  # fmt: skip
  loss.add_argument("--samples-per-bucket", type=int, help="rows of a bucket (default: the run's)")
  loss.add_argument("--timesteps", type=int, help="timesteps, evenly spaced (default: the run's)")
  how = parser.add_argument_group("shapes")
  how.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of the examination (default: all)")
  how.add_argument("--count", type=int, help="scenes of each part (default: 200); autoencoder: clips of each bucket (16)")
  how.add_argument("--batch-size", type=int, default=20, help="videos made together (default: %(default)s)")
  loading.add_sampler_arguments(how)
  auto = parser.add_argument_group("autoencoder (of --run, --config, or --autoencoder alone)")
  auto.add_argument(
    "--model", metavar="NAME", help="of --autoencoder alone, unless its file says it: sd-kl-f8, cogvideox-2b..."
  )
  auto.add_argument(
    "--buckets", nargs="+", metavar="RESOLUTION:FRAMES", help="like 144p:1 240p:17 (default: the configuration's)"
  )
  auto.add_argument("--frame-interval", type=int, help="frames of a file per frame used (default: the configuration's, or 1)")
  auto.add_argument(
    "--repeat", type=int, default=1, metavar="N", help="baseline: an image autoencoder keeps every N-th frame, shown until "
    "half way to the next",
  )  # fmt: skip
  auto.add_argument(
    "--perceptual", nargs=2, metavar=("TRUNK", "FILE"), help="perceptual distance: vgg16-lpips or hed-vgg16 (perceptual.py)"
  )
  auto.add_argument(
    "--i3d", metavar="FILE", help="Frechet video distance, by the file of stdit_jax.interop.fetch, of 16 x 16 frames or more"
  )
  auto.add_argument("--picture", metavar="FILE.png", help="original, reconstruction and error of one clip of each bucket")
  return parser


def read_stage(args):
  """(the stage that made the checkpoint, with the changes of the command line; the checkpoint's step)."""
  import ml_collections

  from stdit_jax.training.checkpoints import stage_config
  from stdit_jax.training.stages import make_stages

  if not args.run:
    raise ValueError("--task loss needs --run FOLDER, a training run")
  config, step = stage_config(args.run, args.step)
  config = ml_collections.ConfigDict(config.to_dict())
  given = {"tables": args.tables, "samples_per_bucket": args.samples_per_bucket, "timesteps": args.timesteps}
  config.validation.update({name: value for name, value in given.items() if value is not None})
  if not config.validation.tables:
    raise ValueError(f"{args.run} has no validation.tables; give the tables to measure the loss on: --tables TABLE ...")
  if args.mesh:
    config.mesh = parse_mesh(args.mesh)
  config.data.latents = ""  # cached are the clips of the training, none of these
  config.stages = ({"name": f"of step {step}", "steps": 1},)
  return make_stages(config)[0], step


def evaluate_loss(stage, step, args, folder):
  """-> {"validation/...": loss}; tables and plans are kept in `folder`."""
  import jax

  from stdit_jax.parallel.mesh import make_mesh
  from stdit_jax.training import batches, weights
  from stdit_jax.training.checkpoints import load_weights
  from stdit_jax.training.compilation import AheadOfTime
  from stdit_jax.training.loop import say
  from stdit_jax.training.objectives import OBJECTIVES
  from stdit_jax.training.step import TraceCounter
  from stdit_jax.training.validation import Validation

  config, counter = stage.config, TraceCounter()
  mesh, objective = make_mesh(config.mesh, slices=config.slices), OBJECTIVES[config.task](config)
  params, frozen, _ = load_weights(args.run, args.item, step, mesh)
  frozen |= weights.read_frozen(objective, config, mesh)
  validation = Validation(stage, folder, mesh, objective)
  encoder = batches.load_encoder(config, counter, stage.name) if config.task == "denoiser" else None
  compiled = AheadOfTime(config.compile_threads, say)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, frozen))
  validation.compile_ahead(compiled, counter, *shapes)
  make_batch = batches.batch_maker(config, objective, validation.data.layouts, mesh, encoder)
  try:
    return validation(params, frozen, make_batch, compiled.get)
  finally:
    compiled.close()


def evaluate_shapes(args):
  """-> (description of the weights, {part: {measure: value}})."""
  import jax
  from tqdm import tqdm

  from stdit_jax.generation.shapes_exam import Exam, examine

  check_counts(args, count=200, batch_size=20)
  config, step = loading.read_model(args)
  pipeline, described = loading.load_pipeline(args, config, step), loading.describe(args, step)
  steps, scale = loading.steps_and_scale(args, config)
  writes = jax.process_index() == 0

  def progress(batches, name):
    return tqdm(batches, name, unit="batch", leave=False, disable=None if writes else True)

  exam = Exam(steps, scale, args.count, batch=args.batch_size)
  described += f", {args.count} scenes of each part, {config.diffusion.fields.get('sampler', 'euler')}, {steps} steps, "
  described += f"guidance scale {scale:g}" + (f", step cache {args.step_cache}" if args.step_cache else "")
  described += f", timestep shift {args.timestep_shift:g}" if args.timestep_shift else ""
  return described, examine(pipeline, exam, args.parts, progress)


def evaluate_autoencoder(args, folder):
  """-> (description of the weights, {"buckets": {name: {measure: value}}, "shift": [...], "scale": [...]})."""
  import jax
  from tqdm import tqdm

  from stdit_jax.autoencoders import i3d, perceptual, reconstruction

  check_counts(args, count=16, repeat=1)
  if args.picture and not args.picture.endswith(".png"):
    raise ValueError(f"--picture {args.picture}: must end in .png")
  codec, described, config = loading.load_autoencoder(args)
  check_counts(args, frame_interval=config.data.frame_interval if config else 1)
  if args.frame_interval > 1:
    described += f", one of {args.frame_interval} frames"
  if args.repeat > 1:
    if not codec.single_frames:
      raise ValueError("--repeat is a baseline of image autoencoders; this one keeps motion by itself")
    described += f", each frame the nearest of every {args.repeat} frames"
  table, buckets = reconstruction.open_rows(*what_to_measure(args, config), folder)
  judges = reconstruction.Judges(
    args.perceptual[0] if args.perceptual else "",
    perceptual.load(*args.perceptual) if args.perceptual else None,
    i3d.load(args.i3d) if args.i3d else None,
  )
  exam, found, shown = reconstruction.Exam(codec, judges, args.repeat), {}, []
  for bucket in buckets:
    exam.check(bucket)
  for bucket in reversed(buckets):  # from few pixels and frames to many
    chosen = reconstruction.choose(table, bucket, args.count, args.frame_interval)
    rows = tqdm(chosen, bucket.name, unit="clip", leave=False, disable=None)
    clips = reconstruction.read(rows, bucket.num_frames, args.frame_interval)
    found[bucket.name], seen = exam(clips, show=(len(chosen) - 1) // 2)  # films begin with black
    shown += [(bucket.name, *seen)] if seen else []
  if not shown:
    raise ValueError(f"no row of the tables is large and long enough for {', '.join(found)}")
  if args.picture and not jax.process_index():
    with paths.whole(args.picture) as temporary:
      reconstruction.picture(shown).save(temporary)
  return described, {"buckets": found, "shift": exam.shift.tolist(), "scale": exam.scale.tolist()}


def what_to_measure(args, config):
  """(tables, [(resolution, frames)]) of the command line, else of the configuration."""
  tables, names = args.tables, args.buckets
  if config and not tables:
    tables = [path for path, _ in DataConfig(config.validation.tables or config.data.tables).table_weights()]
  if config and not names:
    names = [f"{bucket.resolution}:{bucket.num_frames}" for bucket in parse_buckets(config.data.buckets)]
  if not tables or not names:
    raise ValueError("give what to measure on: --tables TABLE ... and --buckets RESOLUTION:FRAMES ..., like 144p:17")
  if wrong := [name for name in names if name.count(":") != 1]:
    raise ValueError(f"--buckets {wrong[0]}: write RESOLUTION:FRAMES, like 144p:17")
  return tables, [name.split(":") for name in names]


def check_arguments(args):
  """Raises ValueError for arguments that nothing would come of, and for files that could not be written in the end."""
  if args.changes and not args.config:
    raise ValueError(f"{args.changes[0]}: changes are of --config FILE; a run is measured as it was trained")
  unused = {
    "loss": ("config", "weights", "autoencoder", "model", "buckets", "picture", "perceptual", "i3d", "count"),
    "shapes": ("tables", "model", "buckets", "picture", "perceptual", "i3d"),
    "autoencoder": ("mesh", "weights", "samples_per_bucket", "timesteps"),
  }
  for name in unused[args.task]:
    if getattr(args, name):
      raise ValueError(f"--{name.replace('_', '-')} says nothing to --task {args.task}")
  for path in filter(None, (args.output, args.picture)):
    paths.check_writable(os.path.dirname(path) or ".", "folder of the output")


def check_counts(args, **defaults):
  """Fills in the defaults; raises ValueError for values below 1."""
  for name, default in defaults.items():
    if getattr(args, name) is None:
      setattr(args, name, default)
    if getattr(args, name) < 1:
      raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; allowed: at least 1")


def print_buckets(values):
  names = list(max(values["buckets"].values(), key=len))
  widths = [max(len(name), 6) + 2 for name in names]
  print(" " * 12 + "".join(name.rjust(width) for name, width in zip(names, widths)))
  for bucket, measures in values["buckets"].items():
    texts = ["-" if measures.get(name) is None else f"{measures[name]:.4g}" for name in names]
    print(bucket.ljust(12) + "".join(text.rjust(width) for text, width in zip(texts, widths)))
  for name in ("shift", "scale"):
    print(name, tuple(round(value, 3) for value in values[name]))


def print_nested(values):
  for part, measures in values.items():
    print(f"{part}:")
    for name, value in measures.items():
      print(f"  {name:<42} {value:>8.2f}" if name.endswith(("dB", "ratio")) else f"  {name:<42} {value:>8.1%}")


def main(argv=None):
  args = parse_with_changes(make_parser(), argv)
  logging.set_verbosity(logging.ERROR)  # orbax reports what it reads
  with one_line_errors(), tempfile.TemporaryDirectory() as folder:
    check_arguments(args)
    connect_processes()
    use_compilation_cache()
    keep_freed_memory()
    if args.task == "shapes":
      described, values = evaluate_shapes(args)
    elif args.task == "autoencoder":
      described, values = evaluate_autoencoder(args, folder)
    else:
      stage, step = read_stage(args)
      described, values = f"{args.run}, step {step}, {args.item}", evaluate_loss(stage, step, args, folder)
  import jax

  if jax.process_index():
    return
  print(f"{described}:")
  if args.task == "shapes":
    print_nested(values)
  elif args.task == "autoencoder":
    print_buckets(values)
  else:
    for name, value in values.items():
      print(f"{name.removeprefix('validation/'):>16}  {value:.5g}")
  if args.output:
    with one_line_errors((OSError,)):
      paths.write_text(args.output, json.dumps({"model": described, "task": args.task, **values}, indent=1) + "\n")


if __name__ == "__main__":
  main()
