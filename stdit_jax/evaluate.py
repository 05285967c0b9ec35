"""Measures a trained model.

--task loss         the loss on fixed samples at fixed timesteps, for each bucket of the stage that wrote the checkpoint
                    (training/validation.py)
--task shapes       how a model of moving shapes follows prompts and given frames, measured in the pixels
                    (generation/shapes_exam.py)
--task autoencoder  reconstruction errors, speed and latent statistics of an autoencoder (autoencoders/reconstruction.py).
                    Put the reported `shift` and `scale` into `autoencoder.fields`: the denoiser then sees latents of unit
                    variance.

  python -m stdit_jax.evaluate --run runs/film --tables held_out.csv
  python -m stdit_jax.evaluate --run runs/film --tables held_out.csv --item params --output loss.json
  python -m stdit_jax.evaluate --run runs/shapes --task shapes
  python -m stdit_jax.evaluate --task autoencoder --autoencoder data/film/autoencoder.safetensors \\
      --tables data/film/prepared/table.csv --buckets 144p:1 144p:17 --picture film.png

The tasks shapes and autoencoder print the memory that each device needs. If a bucket of --task autoencoder needs too much, the
autoencoder works in tiles, which changes the values a little, and the output names these buckets. The flags of the sampler are
for --task shapes. The command writes nothing into the run. On several hosts, every process runs the same command
(`cli.connect_processes`).
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from data import paths
from data.buckets import Bucket, parse_buckets
from data.command_line import flag
from data.config import DataConfig
from stdit_jax import cli, loading
from stdit_jax.autoencoders import i3d, reconstruction
from stdit_jax.autoencoders.codec import Codec, fit_tiles
from stdit_jax.autoencoders.memory import GIB, free_memory, tile_pixels
from stdit_jax.config import Config
from stdit_jax.generation import production
from stdit_jax.generation.settings import PipelineSettings
from stdit_jax.generation.shapes_exam import PARTS, Exam, examine, largest_request
from stdit_jax.interop import load_variables, measures
from stdit_jax.parallel.mesh import make_mesh
from stdit_jax.training.batches import Encoders
from stdit_jax.training.checkpoints import load_weights
from stdit_jax.training.compilation import AheadOfTime
from stdit_jax.training.objectives import make_objective
from stdit_jax.training.run import say
from stdit_jax.training.stages import make_stages
from stdit_jax.training.validation import Validation

TASKS = ("loss", "shapes", "autoencoder")


_loss = functools.partial(flag, group="loss (of a --run, by default on the mesh of the run)")
_shapes = functools.partial(flag, group="shapes")
_autoencoder = functools.partial(flag, group="autoencoder (of --run, of --config, or of --autoencoder alone)")


@dataclasses.dataclass(frozen=True)
class Settings(PipelineSettings):
  """The flags of one call. The flags of the sampler are for --task shapes."""

  task: str = flag("what is measured (default: loss)", "loss", choices=TASKS)
  output: str | None = flag("file that gets the result as JSON")

  tables: Sequence[str] | None = _loss(
    "tables (default: validation.tables). For --task autoencoder also folders or files of clips (default: validation.tables, "
    "else data.tables)",
    nargs="+",
  )
  samples_per_bucket: int | None = _loss("rows per bucket (default: the run's)")
  timesteps: int | None = _loss("number of timesteps, evenly spaced (default: the run's)")

  parts: Sequence[str] = _shapes("parts of the examination (default: all)", PARTS, nargs="+", choices=PARTS)
  count: int | None = _shapes("scenes per part (default: 200). For --task autoencoder: clips per bucket (default: 16)")
  batch_size: int = _shapes("videos per batch (default: %(default)s)", 20)

  model: str | None = _autoencoder("model of --autoencoder, if its file does not name it: sd-kl-f8...", metavar="NAME")
  buckets: Sequence[str] | None = _autoencoder(
    "like 144p:17 (default: the configuration's)", nargs="+", metavar="RESOLUTION:FRAMES"
  )
  frame_interval: int | None = _autoencoder("use every N-th frame (default: the configuration's, or 1)", metavar="N")
  repeat: int = _autoencoder("baseline of an image autoencoder: encode every N-th frame, repeat it in between", 1, metavar="N")
  perceptual: Sequence[str] | None = _autoencoder(
    "perceptual distance by vgg16-lpips or hed-vgg16 (autoencoders/perceptual.py)", nargs=2, metavar=("TRUNK", "FILE")
  )
  i3d: str | None = _autoencoder(
    "weights of I3D (interop.fetch): also measures the Frechet video distance, for clips of 16 frames or more", metavar="FILE"
  )
  picture: str | None = _autoencoder("writes original, reconstruction and error of one clip per bucket", metavar="FILE.png")


def read_stage(settings: Settings) -> tuple[Any, int | None]:
  """(stage that wrote the checkpoint, step of the checkpoint). The flags replace keys of the stage."""
  if not settings.run:
    raise ValueError("--task loss needs --run FOLDER, a training run")
  config, step = loading.open_config(settings)
  given = {name: getattr(settings, name) for name in ("tables", "samples_per_bucket", "timesteps")}
  changes: dict[str, Any] = {f"validation.{name}": value for name, value in given.items() if value is not None}
  if settings.mesh:
    changes["mesh"] = cli.parse_mesh(settings.mesh)
  # A cache of latents holds the clips of the training only.
  changes |= {"data.latents": "", "stages": ({"name": f"of step {step}", "steps": 1},)}
  config = config.replace(changes)
  if not config.validation.tables:
    raise ValueError(f"{settings.run} has no validation.tables; give the tables to measure the loss on: --tables TABLE ...")
  return make_stages(config)[0], step


def evaluate_loss(settings: Settings, folder: str) -> tuple[str, dict[str, float]]:
  """(description of the weights, {"validation/...": loss}). Tables and plans are written to `folder`."""
  stage, step = read_stage(settings)
  config = stage.config
  mesh, objective = make_mesh(config.mesh, slices=config.slices), make_objective(config)
  params, frozen, _ = load_weights(settings.run, settings.item, step, mesh, objective.rules)
  frozen |= objective.read_frozen(mesh)
  validation = Validation(stage, folder, mesh, objective)
  with contextlib.closing(AheadOfTime(config.compile_threads, say)) as compiler:
    make_batch = objective.batch_maker(Encoders(compiler, mesh), stage.name)
    validation.compile_ahead(compiler, *objective.shapes)
    return loading.describe(settings, step), validation(params, frozen, make_batch)


def evaluate_shapes(settings: Settings, folder: str) -> tuple[str, dict[str, dict[str, float]]]:
  """(description of the weights, {part: {measure: value}})."""
  config, step = loading.read_model(settings)
  exam = Exam(config.sample.steps, config.sample.guidance_scale, settings.count or 200, batch=settings.batch_size)

  def check(pipeline):
    advice = "lower --batch-size, use --guidance-in-turn, or more devices with --mesh"
    encoded, limit = {exam.frames}, settings.autoencoder_memory
    production.fit_memory(pipeline, largest_request(exam), exam.batch, limit, advice, encoded=encoded, given=True)

  pipeline, described = loading.load_pipeline(settings, config, step, check), loading.describe(settings, step)
  progress = functools.partial(tqdm, unit="batch", leave=False, disable=True if jax.process_index() else None)
  how = f"{exam.count} scenes of each part, {config.diffusion.fields.get('sampler', 'euler')}, {exam.steps} steps, "
  how += f"guidance scale {exam.scale:g}" + (f", step cache {settings.step_cache}" if settings.step_cache else "")
  how += f", timestep shift {settings.timestep_shift:g}" if settings.timestep_shift else ""
  return f"{described}, {how}", examine(pipeline, exam, settings.parts, progress)


def evaluate_autoencoder(settings: Settings, folder: str) -> tuple[str, dict[str, Any]]:
  """(description of the weights, {"buckets": {name: {measure: value}}, "shift": [...], "scale": [...]})."""
  if settings.picture and not settings.picture.endswith(".png"):
    raise ValueError(f"--picture is {settings.picture}; allowed: names that end in .png")
  codec, described, config = loading.load_autoencoder(settings, settings.model)
  interval = settings.frame_interval or (config.data.frame_interval if config else 1)
  if interval > 1:
    described = f"{described}, one of {interval} frames"
  if settings.repeat > 1:
    if codec.config.unit != 1:
      raise ValueError("--repeat is a baseline for image autoencoders, and this model encodes videos; leave --repeat out")
    described += f", each frame replaced by the nearest of every {settings.repeat} frames"
  table, buckets = reconstruction.open_rows(*what_to_measure(settings, config), folder)
  trunk, file = settings.perceptual or ("", "")
  perceptual = measures.load_perceptual(trunk, file) if trunk else None
  i3d_weights = load_variables(settings.i3d, "native", i3d.init_shapes()) if settings.i3d else None
  judges = reconstruction.Judges(trunk, perceptual, i3d_weights)
  exam, found, shown = reconstruction.Exam(codec, judges, settings.repeat), {}, []
  for bucket in buckets:
    exam.check(bucket)
  chosen = {bucket: reconstruction.choose(table, bucket, settings.count or 16, interval) for bucket in reversed(buckets)}
  codecs = fit_buckets(exam, chosen, settings.autoencoder_memory)
  for bucket, picked in chosen.items():  # from few pixels and frames to many
    rows = tqdm(picked, bucket.name, unit="clip", leave=False, disable=None)
    clips = reconstruction.read(rows, bucket.num_frames, interval)
    exam.codec = codecs.get(bucket, codec)
    found[bucket.name], seen = exam(clips, show=(len(picked) - 1) // 2)  # the first clips of a film are often black
    shown += [(bucket.name, *seen)] if seen else []
  if not shown:
    raise ValueError(f"no row of --tables is large and long enough for {', '.join(found)}; give smaller --buckets")
  if settings.picture and not jax.process_index():
    with paths.whole(settings.picture) as temporary:
      reconstruction.picture(shown).save(temporary)
  values: dict[str, Any] = {"buckets": found, "shift": np.ravel(exam.shift).tolist(), "scale": exam.scale.tolist()}
  tiles = {bucket.name: dataclasses.asdict(one.tiles) for bucket, one in codecs.items() if one.tiles}
  return described, values | ({"tiles": tiles} if tiles else {})


def fit_buckets(exam: reconstruction.Exam, chosen: Mapping[Bucket, Any], limit: float | None) -> dict[Bucket, Codec]:
  """For each bucket with rows, the codec that fits into the memory of a device: with fewer frames at a time, or with tiles.

  Prints the memory of each device. Raises ValueError if a device has too little.

  Args:
    chosen: rows of `reconstruction.choose`; limit: GiB beside the weights. None: the free memory.
  """
  free = free_memory()
  budget = limit * GIB if limit else math.inf if free is None else free
  codecs, needed, shows = {}, {}, jax.process_index() == 0
  for bucket, rows in chosen.items():
    if not rows:
      continue
    size = exam.codec.config.latent_size(*max((size for _, size in rows), key=math.prod))
    frames = {-(-bucket.num_frames // exam.repeat)}
    codecs[bucket], needs = fit_tiles(exam.codec, size, {"encode": frames, "decode": frames}, budget)
    needed[bucket.name] = max(needs.values())
    if shows and codecs[bucket].tiles:
      print(f"{bucket.name} in tiles of {tile_pixels(codecs[bucket], size)} pixels, to need less memory", flush=True)
  if not needed:
    return {}
  parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in needed.items())
  text = f"memory of each device beside the weights: {max(needed.values()) / GIB:.2f} GiB (the largest of {parts})"
  if free is not None and max(needed.values()) > free:
    raise ValueError(f"{text}, but only {free / GIB:.2f} GiB are free: give --buckets with fewer pixels or frames")
  if shows:
    print(text + ("" if free is None else f" of {free / GIB:.2f} GiB free"), flush=True)
  return codecs


def what_to_measure(settings: Settings, config: Config | None) -> tuple[Sequence[str], list[list[str]]]:
  """(tables, [[resolution, frames]]) of the flags, or else of the configuration."""
  tables, names = settings.tables, settings.buckets
  if config and not tables:
    tables = [path for path, _ in DataConfig(config.validation.tables or config.data.tables).table_weights()]
  if config and not names:
    names = [f"{bucket.resolution}:{bucket.num_frames}" for bucket in parse_buckets(config.data.buckets)]
  if not tables or not names:
    raise ValueError("give the tables and buckets to measure on: --tables TABLE ... --buckets 144p:17 ...")
  if wrong := [name for name in names if name.count(":") != 1]:
    raise ValueError(f"--buckets {wrong[0]}: write RESOLUTION:FRAMES, like 144p:17")
  return tables, [name.split(":") for name in names]


def check_settings(settings: Settings) -> None:
  """Raises ValueError for flags that the task does not use, and for outputs that can't be written."""
  cli.check_positive(settings, "count", "batch_size", "repeat", "frame_interval", "autoencoder_memory")
  if settings.changes and not settings.config:
    raise ValueError(f"{settings.changes[0]}: changes need --config FILE; a --run is measured as it was trained")
  unused = {
    "loss": (
      "config", "weights", "autoencoder", "model", "buckets", "picture", "perceptual", "i3d", "count", "autoencoder_memory",
    ),
    "shapes": ("tables", "model", "buckets", "picture", "perceptual", "i3d"),
    "autoencoder": ("mesh", "weights", "samples_per_bucket", "timesteps"),
  }  # fmt: skip
  for name in unused[settings.task]:
    if getattr(settings, name):
      raise ValueError(f"--{name.replace('_', '-')} has no effect on --task {settings.task}; leave it out")
  for path in filter(None, (settings.output, settings.picture)):
    paths.check_writable(os.path.dirname(path) or ".", "folder of the output")


def print_losses(values: dict[str, float]) -> None:
  for name, value in values.items():
    print(f"{name.removeprefix('validation/'):>16}  {value:.5g}")


def print_buckets(values: dict[str, Any]) -> None:
  names = list(max(values["buckets"].values(), key=len))
  widths = [max(len(name), 6) + 2 for name in names]
  print(" " * 12 + "".join(name.rjust(width) for name, width in zip(names, widths)))
  for bucket, found in values["buckets"].items():
    texts = ["-" if found.get(name) is None else f"{found[name]:.4g}" for name in names]
    print(bucket.ljust(12) + "".join(text.rjust(width) for text, width in zip(texts, widths)))
  for name in ("shift", "scale"):
    print(name, tuple(round(value, 3) for value in values[name]))


def print_parts(values: dict[str, dict[str, float]]) -> None:
  for part, found in values.items():
    print(f"{part}:")
    for name, value in found.items():
      print(f"  {name:<42} {value:>8.2f}" if name.endswith(("dB", "ratio")) else f"  {name:<42} {value:>8.1%}")


# {task: (what measures, what prints its values)}
MEASURES = {
  "loss": (evaluate_loss, print_losses), "shapes": (evaluate_shapes, print_parts),
  "autoencoder": (evaluate_autoencoder, print_buckets),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
  settings = cli.parse_settings(Settings, "stdit_jax.evaluate", __doc__, argv)
  logging.set_verbosity(logging.ERROR)  # orbax reports what it reads
  with cli.one_line_errors(), tempfile.TemporaryDirectory() as folder:
    check_settings(settings)
    cli.connect_processes()
    cli.use_compilation_cache()
    cli.keep_freed_memory()
    described, values = MEASURES[settings.task][0](settings, folder)
  if jax.process_index():
    return
  print(f"{described}:")
  MEASURES[settings.task][1](values)
  if settings.output:
    with cli.one_line_errors((OSError,)):
      paths.write_text(settings.output, json.dumps({"model": described, "task": settings.task, **values}, indent=1) + "\n")


if __name__ == "__main__":
  main()
