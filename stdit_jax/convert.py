"""Converts weights between PyTorch's layouts and ours, one tensor at a time.

python -m stdit_jax.convert --input model.safetensors --output open_sora/ --model STDiT3-XL/2 --to native
python -m stdit_jax.convert --input runs/film --output film.safetensors --to open-sora
python -m stdit_jax.convert --check --model STDiT3-XL/2
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data import paths
from data.command_line import flag, make_parser
from data.shards import Progress
from stdit_jax.cli import one_line_errors
from stdit_jax.interop import mapping, models, weights
from stdit_jax.interop.safetensors_io import CheckpointError, open_checkpoint, refuse_pickle, write_checkpoint
from stdit_jax.models.layers import DTYPES

RUN_PARTS = {"denoiser": "model", "text_encoder": "text_encoder", "autoencoder": "autoencoder"}  # key in the run's config
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "": 1}

EPILOG = """layouts:
  open-sora      the PyTorch denoisers of Open-Sora 1.0, 1.1 and 1.2
  open-sora-vae  the video autoencoder of Open-Sora 1.2, with its image autoencoder
  diffusers      AutoencoderKL of diffusers, also with the old names of its attention
  ldm            the original latent-diffusion code, with or without 'first_stage_model.'
  cogvideox-vae  AutoencoderKLCogVideoX of diffusers
  t5             T5EncoderModel of Hugging Face (v1.1; t5-v1.0 is the older model)
  native         our own names, one tensor per layer
--check without --input compares names and shapes of the model with the original's key table. With --input it reports
how the file differs from the model. It also proves that import and export reproduce the file bit for bit.
The command never opens pickles (.pt, .pth, .bin, .ckpt). For a pickle it prints the Python lines that convert it."""


def size_in_bytes(text: str) -> int:
  number = text.upper().rstrip("BKMG")
  unit = text.upper()[len(number) :]
  if unit not in UNITS or not number.isdigit() or not int(number):
    raise argparse.ArgumentTypeError(f"{text!r} is no size; write a size like 500MB or 5GB")
  return int(number) * UNITS[unit]


@dataclasses.dataclass(frozen=True)
class Settings:
  """The flags of one call."""

  input: str = flag("safetensors file, its index, a folder with one of them, or a training run", "", metavar="PATH")
  output: str = flag("NAME.safetensors, or a folder", "", metavar="PATH")
  source: str = flag("layout of the input (default: detected)", "auto", "--from", metavar="LAYOUT")
  target: str = flag("layout of the output (default: native; for native input the original one)", "", "--to", metavar="LAYOUT")
  model: str = flag("named model, like STDiT3-XL/2 (default: the model that the input names)", "", metavar="NAME")
  config: str = flag("fields that differ from the named model: a JSON object, or a file with one", "", metavar="JSON")
  dtype: str = flag("type of all floating-point tensors in the output (default: unchanged)", "", choices=tuple(DTYPES))
  max_shard_size: int | None = flag("split larger outputs into several files, like 5GB", type=size_in_bytes, metavar="SIZE")
  overwrite: bool = flag("replace existing output files", False)
  item: str = flag("which weights of a training run (default: ema)", "ema", choices=("ema", "params"))
  part: str = flag("which model of a training run (default: the model that it trains)", "", choices=tuple(RUN_PARTS))
  check: bool = flag("compare names and shapes, and prove the round trip", False)
  keys: str = flag("key table for --check instead of the table in this package", "", metavar="JSON")
  allow_unexpected: bool = flag("skip tensors that the model does not have", False)
  allow_non_finite: bool = flag("accept NaN and infinite values", False)


def read_overrides(text: str) -> dict:
  """Fields from --config. Raises ValueError if the text is no JSON object and no file with one."""
  if not text:
    return {}
  try:
    result = json.loads(text if text.lstrip().startswith("{") else pathlib.Path(text).read_text())
    if isinstance(result, dict):
      return result
    raise ValueError("not an object")
  except (OSError, ValueError) as error:
    raise ValueError(f"--config {text}: give a JSON object, or a file with one: {error}") from None


def find_model(settings: Settings, metadata: dict) -> tuple[str, models.NamedModel]:
  """(name, model) from the flags, or else from the metadata that our own files have."""
  name, overrides = settings.model, read_overrides(settings.config)
  if not name:
    name, own = models.described(metadata, settings.input)
    overrides = own | overrides
  if not name:
    raise ValueError("--model is missing, and the input does not name its model; give --model NAME")
  layouts = [layout for layout in (settings.source, settings.target) if layout not in ("", "auto")]
  return name, models.find_model(name, overrides, layouts)


def progress(tensors: Iterable[tuple[str, np.ndarray]], spec: Mapping[str, tuple]) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the tensors. `Progress` prints the rate and the time left."""
  total = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in spec.values())
  show, done = Progress("tensors", total / 1e9, "GB"), 0
  for name, array in tensors:
    yield name, array
    done += array.nbytes
    show(done / 1e9)


def open_source(settings: Settings, model: models.NamedModel, config: Any = None) -> weights.Source:
  """The input. Prints its layout, and raises CheckpointError if it does not fit the model.

  `config`: configuration with the file's shift and scale (default: the model's).
  """
  layouts = model.layouts if settings.source == "auto" else model.layout(settings.source)
  source = weights.open_source(settings.input, layouts, model.shapes, config or model.config, settings.allow_non_finite)
  source.check(unexpected=not settings.allow_unexpected)
  print(f"{settings.input}: layout {source.layout.name}, {source.report}")
  return source


def convert(settings: Settings) -> None:
  """Writes the weights of --input to --output."""
  refuse_pickle(settings.output)
  paths.check(settings.output, "--output")
  if pathlib.Path(settings.output).suffix not in ("", ".safetensors") and not pathlib.Path(settings.output).is_dir():
    raise ValueError(f"--output {settings.output}: must end in .safetensors or be a folder")
  options = {"max_shard_bytes": settings.max_shard_size, "overwrite": settings.overwrite}
  is_run = paths.exists(paths.join(settings.input, "checkpoints"))
  folder, name = os.path.split(settings.output) if settings.output.endswith(".safetensors") else (settings.output, "")
  if paths.is_remote(folder) and not settings.overwrite and paths.exists(settings.output):
    raise ValueError(f"{settings.output} exists; --overwrite replaces it")
  with paths.local_folder(folder) as local:  # for a bucket: a temporary folder, uploaded at the end
    report, written = (convert_run if is_run else convert_file)(settings, paths.join(local, name), options)
  print(f"{report}: {', '.join(paths.join(folder, file.name) for file in written)}")


def convert_file(settings: Settings, place: str, options: dict[str, Any]) -> tuple[str, list[pathlib.Path]]:
  """Converts safetensors and writes them to `place`. Returns (report, written files)."""
  metadata = open_checkpoint(settings.input).metadata
  name, model = find_model(settings, metadata)
  # The input's metadata gives the shift and scale of its latents. --config may set others for the output.
  said, own = models.described(metadata, settings.input)
  stored = models.find_model(said, own).config if said and not settings.model else None
  source = open_source(settings, model, stored)
  target = model.layout(settings.target or "native") if settings.target or source.layout.name != "native" else model.layouts[0]
  spec, tensors = weights.conversion(source, target, model.shapes, DTYPES.get(settings.dtype), model.config)
  metadata = weights.model_metadata(name, model.config)
  written = write_checkpoint(place, spec, progress(tensors, spec), metadata=metadata, **options)
  return f"wrote {len(spec)} tensors in layout {getattr(target, 'name', target)}", written


def convert_run(settings: Settings, place: str, options: dict[str, Any]) -> tuple[str, list[pathlib.Path]]:
  """Writes weights of a training run to `place`. Returns (report, written files). The run's configuration names the models."""
  from stdit_jax.training import checkpoints  # imports orbax, which only runs need
  from stdit_jax.training.objectives import part_of

  run, step = checkpoints.stage_config(settings.input)
  part = settings.part or part_of(run)
  key = RUN_PARTS[part]
  loaded, constants, _ = checkpoints.load_weights(settings.input, settings.item, step)
  if part not in loaded and part not in constants:
    raise ValueError(f"{settings.input}: the run has no own weights for --part {part}; it has {', '.join(loaded)}")
  own = getattr(run, key)
  name = settings.model or own.name
  overrides = own.fields if name == own.name else {}
  model = models.find_model(name, dict(overrides) | read_overrides(settings.config), part=part)
  variables = {"params": loaded.get(part, constants.get(part))}
  if "constants" in model.shapes:
    variables["constants"] = constants[part]
  needed, found = ({path: tuple(leaf.shape) for path, leaf in mapping.flatten(t).items()} for t in (model.shapes, variables))
  if not (report := compare(found, needed)).clean:
    raise CheckpointError(f"{settings.input}: holds another model than {name}: {report}")
  target = model.layout(settings.target) if settings.target else model.layouts[0]
  options |= {"dtype": DTYPES.get(settings.dtype), "metadata": weights.model_metadata(name, model.config)}
  written = weights.save_variables(place, target, variables, config=model.config, **options)
  layout = getattr(target, "name", target)
  return f"wrote the {settings.item} weights of the {part} at step {step} in layout {layout}", written


def check(settings: Settings) -> None:
  """Compares names and shapes with a key table, and a file with its round trip. Raises CheckpointError for a difference."""
  metadata = open_checkpoint(settings.input).metadata if settings.input else {}
  name, model = find_model(settings, metadata)
  layout = model.layouts[0] if settings.target in ("", "native") else model.layout(settings.target)
  shipped = None if settings.config else models.shipped_key_table(name)
  table = models.read_key_table(settings.keys) if settings.keys else shipped
  if table is not None:
    report = compare(weights.foreign_spec(layout, model.shapes, model.config), table)
    if not report.clean:
      raise CheckpointError(f"{name} exported as {layout} differs from the key table: {report}")
    print(f"{name} exported as {layout}: all {len(table)} names and shapes of the key table")
  elif not settings.input:
    own = f"{name} with --config" if settings.config else name
    raise ValueError(f"this package has no key table for {own}; give a table by --keys, or a file by --input")
  if not settings.input:
    return
  source = open_source(settings, model)
  spec, tensors = weights.conversion(source, source.layout, model.shapes)
  # The file may use another of the names that the layout accepts.
  stored = {entry.names[0]: source.name_of(entry) for entry in source.entries}
  for name, array in progress(tensors, spec):
    name = stored.get(name, name)
    if name in source.shapes and array.tobytes() != source.checkpoint.read(source.prefix + name, True).tobytes():
      raise CheckpointError(f"{settings.input}: {name!r} differs after import and export")
  print(f"{len(spec)} tensors imported and exported: bit-exact")


def compare(found: dict, needed: dict) -> mapping.Report:
  """The differences of two tables {name: shape}."""
  mis_shaped = {name: (found[name], shape) for name, shape in needed.items() if found.get(name, shape) != shape}
  return mapping.Report(len(needed), sorted(needed.keys() - found), sorted(found.keys() - needed), mis_shaped)


def main(argv: Sequence[str] | None = None) -> None:
  parser = make_parser(Settings, "python -m stdit_jax.convert", __doc__, epilog=EPILOG, allow_abbrev=False)
  settings = Settings(**vars(parser.parse_args(argv)))
  if not settings.check and not (settings.input and settings.output):
    parser.error("give --input and --output, or --check")
  with one_line_errors():
    check(settings) if settings.check else convert(settings)


if __name__ == "__main__":
  main()
