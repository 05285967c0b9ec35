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


def read_stage(args):
  """(the stage that made the checkpoint, with the changes of the command line; the checkpoint's step)."""
  import ml_collections

  from stdit_jax.training.checkpoints import stage_config
  from stdit_jax.training.stages import make_stages

  config, step = stage_config(args.checkpoint, args.step)
  config = ml_collections.ConfigDict(config.to_dict())
  given = {"tables": args.tables, "samples_per_bucket": args.samples_per_bucket, "timesteps": args.timesteps}
  config.validation.update({name: value for name, value in given.items() if value is not None})
  if not config.validation.tables:
    raise ValueError(f"{args.checkpoint} has no validation.tables; give the tables to measure the loss on: --tables TABLE ...")
  if args.mesh:
    config.mesh = parse_mesh(args.mesh)
  config.stages = ({"name": f"of step {step}", "steps": 1},)
  return make_stages(config)[0], step


def evaluate(stage, step, args, folder):
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
  params, frozen, _ = load_weights(args.checkpoint, args.item, step, mesh)
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


def main(argv=None):
  args = make_parser().parse_args(argv)
  logging.set_verbosity(logging.ERROR)  # orbax reports what it reads
  with one_line_errors(), tempfile.TemporaryDirectory() as folder:
    connect_processes()
    use_compilation_cache()
    keep_freed_memory()
    stage, step = read_stage(args)
    values = evaluate(stage, step, args, folder)
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
