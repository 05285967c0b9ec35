"""Measures a trained model.

--task loss    the loss on fixed samples at fixed timesteps, bucket by bucket (training/validation.py); the buckets are those of
               the stage that the checkpoint comes from
--task shapes  what a model of moving shapes makes of prompts and given frames, measured in the pixels
               (generation/shapes_exam.py)

  python -m stdit_jax.evaluate --run runs/film --tables held_out.csv
  python -m stdit_jax.evaluate --run runs/film --step 2000 --item params --output loss.json
  python -m stdit_jax.evaluate --run runs/shapes --task shapes

Nothing is written into the run. Of several processes (`cli.connect_processes`) all run the same command.
"""

import argparse
import json
import tempfile

from absl import logging

from data import paths
from stdit_jax.cli import (
  OneLineParser,
  connect_processes,
  keep_freed_memory,
  one_line_errors,
  parse_mesh,
  use_compilation_cache,
)
from stdit_jax.generation.shapes_exam import PARTS
from stdit_jax.training import loading


def make_parser():
  parser = OneLineParser(
    "python -m stdit_jax.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )  # fmt: skip
  parser.add_argument("--task", default="loss", choices=("loss", "shapes"), help="what is measured (default: loss)")
  parser.add_argument("--output", help="writes the result as JSON")
  loading.add_model_arguments(parser)
  loss = parser.add_argument_group("loss (of a --run, by default on its own mesh)")
  loss.add_argument("--tables", nargs="+", help="metadata tables to measure on (default: validation.tables of the run)")
  loss.add_argument("--samples-per-bucket", type=int, help="rows of a bucket (default: the run's)")
  loss.add_argument("--timesteps", type=int, help="timesteps, evenly spaced (default: the run's)")
  how = parser.add_argument_group("shapes")
  how.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of the examination (default: all)")
  how.add_argument("--count", type=int, default=200, help="scenes of each part (default: %(default)s)")
  how.add_argument("--batch-size", type=int, default=20, help="videos made together (default: %(default)s)")
  loading.add_sampler_arguments(how)
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
  if config.task == "denoiser" and config.text_encoder.where == "step" and not config.text_encoder.train:
    frozen["text_encoder"] = weights.load_text_encoder(config, objective.text, mesh)
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

  for name in ("count", "batch_size"):
    if getattr(args, name) < 1:
      raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; allowed: at least 1")
  config, step = loading.read_model(args)
  pipeline, described = loading.load_pipeline(args, config, step)
  steps, scale = loading.steps_and_scale(args, config)
  writes = jax.process_index() == 0

  def progress(batches, name):
    return tqdm(batches, name, unit="batch", leave=False, disable=None if writes else True)

  exam = Exam(count=args.count, steps=steps, scale=scale, batch=args.batch_size)
  return described, examine(pipeline, exam, args.parts, progress)


def print_nested(values):
  for part, measures in values.items():
    print(f"{part}:")
    for name, value in measures.items():
      print(f"  {name:<42} {value:>8.1%}" if 0 <= value <= 1 and "dB" not in name else f"  {name:<42} {value:>8.2f}")


def main(argv=None):
  args = make_parser().parse_args(argv)
  logging.set_verbosity(logging.ERROR)  # orbax reports what it reads
  with one_line_errors(), tempfile.TemporaryDirectory() as folder:
    connect_processes()
    use_compilation_cache()
    keep_freed_memory()
    if args.task == "shapes":
      described, values = evaluate_shapes(args)
    else:
      stage, step = read_stage(args)
      described, values = f"{args.run}, step {step}, {args.item}", evaluate_loss(stage, step, args, folder)
  import jax

  if jax.process_index():
    return
  print(f"{described}:")
  if args.task == "shapes":
    print_nested(values)
  else:
    for name, value in values.items():
      print(f"{name.removeprefix('validation/'):>16}  {value:.5g}")
  if args.output:
    with one_line_errors((OSError,)):
      paths.write_text(args.output, json.dumps({"model": described, "task": args.task, **values}, indent=1) + "\n")


if __name__ == "__main__":
  main()
