"""Measures a training run: its loss on fixed samples at fixed timesteps, bucket by bucket (training/validation.py).

  python -m stdit_jax.evaluate --checkpoint runs/film --tables held_out.csv
  python -m stdit_jax.evaluate --checkpoint runs/film --step 2000 --item params --output loss.json

Nothing is written into the run. The buckets are those of the stage that the checkpoint comes from. Of several processes
(`cli.connect_processes`) all run the same command.
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


def make_parser():
  parser = OneLineParser(
    "python -m stdit_jax.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )  # fmt: skip
  parser.add_argument("--checkpoint", required=True, help="folder of a training run (its `output`)")
  parser.add_argument("--item", default="ema", choices=("ema", "params"), help="which of the run's weights (default: ema)")
  parser.add_argument("--step", type=int, help="which checkpoint of the run (default: the newest)")
  parser.add_argument("--tables", nargs="+", help="metadata tables to measure on (default: validation.tables of the run)")
  parser.add_argument("--samples-per-bucket", type=int, help="rows of a bucket (default: the run's)")
  parser.add_argument("--timesteps", type=int, help="timesteps, evenly spaced (default: the run's)")
  parser.add_argument(
    "--mesh", nargs="+", metavar="AXIS=DEVICES", help="sizes of the mesh, e.g. data=-1 fsdp=4 (default: the run's)"
  )
  parser.add_argument("--output", help="writes the result as JSON")
  return parser


def read_run(args):
  """The run's configuration with the changes of the command line."""
  from stdit_jax.training.checkpoints import read_config

  config = read_config(args.checkpoint)
  given = {"tables": args.tables, "samples_per_bucket": args.samples_per_bucket, "timesteps": args.timesteps}
  given = {name: value for name, value in given.items() if value is not None}
  config.validation.update(given)
  if not config.validation.tables:
    raise ValueError(f"{args.checkpoint} has no validation.tables; give the tables to measure the loss on: --tables TABLE ...")
  stages = (
    {key: value for key, value in stage.items() if key.removeprefix("validation.") not in given} for stage in config.stages
  )
  config.stages = tuple(stages)  # nor does a stage's own value come before the command line's
  if args.mesh:
    config.mesh = parse_mesh(args.mesh)
  return config


def evaluate(config, args, folder):
  """-> (checkpoint's step, {"validation/...": loss}); tables and plans are kept in `folder`."""
  import jax

  from stdit_jax.parallel.mesh import make_mesh
  from stdit_jax.training import batches, weights
  from stdit_jax.training.checkpoints import load_weights
  from stdit_jax.training.compilation import AheadOfTime
  from stdit_jax.training.loop import say
  from stdit_jax.training.objectives import OBJECTIVES
  from stdit_jax.training.stages import make_stages, stage_that_made
  from stdit_jax.training.step import TraceCounter
  from stdit_jax.training.validation import Validation

  stages, counter = make_stages(config), TraceCounter()
  mesh = make_mesh(config.mesh, slices=config.slices)
  params, frozen, step = load_weights(args.checkpoint, args.item, args.step, mesh)
  stage = stage_that_made(stages, step)
  config, objective = stage.config, OBJECTIVES[config.task](stage.config)
  if config.task == "denoiser" and config.text_encoder.where == "step" and not config.text_encoder.train:
    frozen["text_encoder"] = weights.load_text_encoder(config, objective.text, mesh)
  validation = Validation(stage, folder, mesh, objective)
  encoder = batches.load_encoder(config, counter, stage.name) if config.task == "denoiser" else None
  compiled = AheadOfTime(config.compile_threads, say)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, frozen))
  validation.compile_ahead(compiled, counter, *shapes)
  make_batch = batches.batch_maker(config, objective, validation.data.layouts, mesh, encoder)
  try:
    return step, validation(params, frozen, make_batch, compiled.get)
  finally:
    compiled.close()


def main(argv=None):
  args = make_parser().parse_args(argv)
  logging.set_verbosity(logging.ERROR)  # orbax reports what it reads
  with one_line_errors(), tempfile.TemporaryDirectory() as folder:
    config = read_run(args)
    connect_processes()
    use_compilation_cache()
    keep_freed_memory()
    step, values = evaluate(config, args, folder)
  import jax

  if jax.process_index():
    return
  print(f"{args.checkpoint}, step {step}, {args.item}:")
  for name, value in values.items():
    print(f"{name.removeprefix('validation/'):>16}  {value:.5g}")
  if args.output:
    with one_line_errors((OSError,)):
      result = {"checkpoint": args.checkpoint, "step": step, "item": args.item, **values}
      paths.write_text(args.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
  main()
