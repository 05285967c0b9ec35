"""PyTorch safetensors in and out, one tensor at a time.

python -m stdit_jax.convert --input model.safetensors --output open_sora/ --model STDiT3-XL/2 --to native
python -m stdit_jax.convert --input runs/film --output film.safetensors --to open-sora
python -m stdit_jax.convert --check --model STDiT3-XL/2
"""

import argparse
import json
import os
import pathlib
import sys
import time

import numpy as np

from data import paths
from stdit_jax.cli import OneLineParser, one_line_errors
from stdit_jax.interop import mapping, models, weights
from stdit_jax.interop.safetensors_io import CheckpointError, open_checkpoint, refuse_pickle, write_checkpoint
from stdit_jax.models.layers import DTYPES

RUN_PARTS = {"denoiser": "model", "text_encoder": "text_encoder", "autoencoder": "autoencoder"}  # key in the run's config
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "": 1}

EPILOG = """layouts:
  open-sora      the PyTorch denoisers of Open-Sora 1.0, 1.1 and 1.2
  open-sora-vae  the video autoencoder of Open-Sora 1.2, its image autoencoder included
  diffusers      diffusers' AutoencoderKL; old names of its attention are read
  ldm            the original latent-diffusion code, with or without 'first_stage_model.'
  cogvideox-vae  diffusers' AutoencoderKLCogVideoX
  t5             Hugging Face T5EncoderModel (v1.1; t5-v1.0 the older one)
  native         our own names, one tensor per layer
--check without --input compares the model's names and shapes with the key table of the real size. With --input it reports
what the file has against the model, and proves that import and export give the file back, bit for bit.
Pickles (.pt, .pth, .bin, .ckpt) are never opened; naming one prints the lines of Python that make a safetensors file of it."""


def size_in_bytes(text: str) -> int:
  number = text.upper().rstrip("BKMG")
  unit = text.upper()[len(number) :]
  if unit not in UNITS or not number.isdigit() or not int(number):
    raise argparse.ArgumentTypeError(f"{text!r} is no size; write 500MB or 5GB")
  return int(number) * UNITS[unit]


def make_parser() -> OneLineParser:
  parser = OneLineParser(
    "python -m stdit_jax.convert",
    description=__doc__,
    epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  names = tuple(weights.LAYOUTS)
  parser.add_argument("--input", metavar="PATH", help="safetensors file, its index, a folder of one, or a training run")
  parser.add_argument("--output", metavar="PATH", help="NAME.safetensors, or a folder")
  parser.add_argument(
    "--from", dest="source", choices=("auto", *names), default="auto", help="layout of the input (default: found out)"
  )
  parser.add_argument(
    "--to", dest="target", choices=names, help="layout of the output (default: native, from native the original's)"
  )
  parser.add_argument("--model", metavar="NAME", help="named model, like STDiT3-XL/2 (default: what the input says of itself)")
  parser.add_argument("--config", metavar="JSON", help="fields that differ from the named model's: an object or a file of one")
  parser.add_argument("--dtype", choices=tuple(DTYPES), help="of all floating-point tensors (default: as they are)")
  parser.add_argument(
    "--max-shard-size", type=size_in_bytes, metavar="SIZE", help="split larger outputs into files with an index, like 5GB"
  )
  parser.add_argument("--overwrite", action="store_true", help="replace existing output files")
  parser.add_argument("--item", choices=("ema", "params"), default="ema", help="which weights of a training run (default: ema)")
  parser.add_argument("--part", choices=tuple(RUN_PARTS), help="which model of a training run (default: the one it is about)")
  parser.add_argument("--check", action="store_true", help="compare names and shapes, prove the round trip")
  parser.add_argument("--keys", metavar="JSON", help="key table for --check instead of the shipped one")
  parser.add_argument("--allow-unexpected", action="store_true", help="leave out tensors that the model doesn't have")
  parser.add_argument("--allow-non-finite", action="store_true", help="accept NaN and infinite values")
  return parser


def read_overrides(text: str | None) -> dict:
  """The --config flag. Raises ValueError."""
  if not text:
    return {}
  try:
    result = json.loads(text if text.lstrip().startswith("{") else pathlib.Path(text).read_text())
    if isinstance(result, dict):
      return result
    raise ValueError("not an object")
  except (OSError, ValueError) as error:
    raise ValueError(f"--config {text}: needs a JSON object or a file of one: {error}") from None


def find_model(args, metadata: dict):
  """(name, config, module name) from the flags, or from what one of our own files says of itself."""
  name, overrides = args.model, read_overrides(args.config)
  if not name:
    name, own = models.described(metadata, args.input)
    overrides = own | overrides
  if not name:
    raise ValueError("--model is needed: the input doesn't say which model it is")
  layouts = [layout for layout in (args.source, args.target) if layout not in (None, "auto")]
  return name, *models.find_model(name, overrides, layouts)


def progress(tensors, spec):
  """Passes tensors on; for more than 1 GB, prints the rate and the time left to stderr (every 2 s, in a log file 30 s)."""
  total = sum(int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize for shape, dtype in spec.values())
  start = last = time.monotonic()
  done, shown, every = 0, False, 2 if sys.stderr.isatty() else 30
  for count, (name, array) in enumerate(tensors, 1):
    yield name, array
    done, now = done + array.nbytes, time.monotonic()
    if total > 1e9 and (now - last > every or (shown and count == len(spec))):
      rate = done / (now - start)
      left = (total - done) / rate
      line = f"{count}/{len(spec)} tensors, {done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s, {left:.0f} s left"
      print(
        f"\r{line:<78}" if every == 2 else line,
        end="\n" if every > 2 or count == len(spec) else "",
        file=sys.stderr,
        flush=True,
      )
      last, shown = now, True


def open_source(args, config, module, tree) -> weights.Source:
  """The input, checked and reported."""
  layouts = models.FAMILIES[module] if args.source == "auto" else args.source
  source = weights.open_source(args.input, layouts, tree, config, args.allow_non_finite)
  source.check(unexpected=not args.allow_unexpected)
  print(f"{args.input}: layout {source.layout.name}, {source.report}")
  return source


def convert(args) -> None:
  """--input to --output."""
  refuse_pickle(args.output)
  paths.check(args.output, "--output")
  if pathlib.Path(args.output).suffix not in ("", ".safetensors") and not pathlib.Path(args.output).is_dir():
    raise ValueError(f"--output {args.output}: must end in .safetensors or be a folder")
  options = {"max_shard_bytes": args.max_shard_size, "overwrite": args.overwrite}
  is_run = paths.exists(paths.join(args.input, "checkpoints"))
  folder, name = os.path.split(args.output) if args.output.endswith(".safetensors") else (args.output, "")
  if paths.is_remote(folder) and not args.overwrite and paths.exists(args.output):
    raise ValueError(f"{args.output} exists; --overwrite replaces it")
  with paths.local_folder(folder) as local:  # of a bucket a temporary one, whose files go there when all are made
    report, written = (convert_run if is_run else convert_file)(args, paths.join(local, name), options)
  print(f"{report}: {', '.join(paths.join(folder, file.name) for file in written)}")


def convert_file(args, place, options):
  """Safetensors to `place` -> (what was done, files)."""
  metadata = open_checkpoint(args.input).metadata
  name, config, module = find_model(args, metadata)
  tree = models.shapes(config, module)
  # Numbers that a file holds beside its weights (shift, scale, ...) are those of the model that it says it is; --config may
  # give others to what is written.
  said, own = models.described(metadata, args.input)
  before = models.find_model(said, own)[0] if said and not args.model else config
  source = open_source(args, before, module, tree)
  target = args.target or ("native" if source.layout.name != "native" else models.FAMILIES[module][0])
  spec, tensors = weights.conversion(source, target, tree, DTYPES.get(args.dtype), config)
  metadata = weights.model_metadata(name, config)
  written = write_checkpoint(place, spec, progress(tensors, spec), metadata=metadata, **options)
  return f"wrote {len(spec)} tensors in layout {target}", written


def convert_run(args, place, options):
  """The same from a training run's folder, whose own configuration names its models."""
  from stdit_jax.training import checkpoints  # orbax is only needed here

  run, step = checkpoints.stage_config(args.input)
  part = args.part or ("denoiser" if run.task == "denoiser" else "autoencoder")
  key = RUN_PARTS[part]
  loaded, constants, _ = checkpoints.load_weights(args.input, args.item, step)
  if part not in loaded and part not in constants:
    raise ValueError(f"{args.input}: the run has no weights of its own for --part {part}; it has {', '.join(loaded)}")
  name = args.model or run[key].name
  overrides = run[key].get("fields", {}) if name == run[key].name else {}
  config, module = models.find_model(name, dict(overrides) | read_overrides(args.config), models.LAYOUTS[part])
  variables = {"params": loaded.get(part, constants.get(part))}
  if part == "denoiser":
    variables["constants"] = constants[part]
  needed, found = (
    {path: tuple(leaf.shape) for path, leaf in mapping.flatten(t).items()} for t in (models.shapes(config, module), variables)
  )
  if wrong := sorted(path for path in found | needed if found.get(path) != needed.get(path)):
    path = wrong[0]
    raise CheckpointError(
      f"{args.input}: holds another model than {name}: {len(wrong)} parameters differ, "
      f"{path} is {found.get(path, 'missing')}, needed {needed.get(path, 'nothing')}"
    )
  target = args.target or models.FAMILIES[module][0]
  options |= {"dtype": DTYPES.get(args.dtype), "metadata": weights.model_metadata(name, config)}
  written = weights.save_variables(place, target, variables, config=config, **options)
  return f"wrote the {args.item} weights of the {part} at step {step} in layout {target}", written


def check(args) -> None:
  """Names and shapes against a key table, and the round trip of a file. Raises CheckpointError for any difference."""
  metadata = open_checkpoint(args.input).metadata if args.input else {}
  name, config, module = find_model(args, metadata)
  tree = models.shapes(config, module)
  layout = models.FAMILIES[module][0] if args.target in (None, "native") else args.target
  table = models.read_key_table(args.keys) if args.keys else (None if args.config else models.shipped_key_table(name))
  if table is not None:
    compare(weights.foreign_spec(layout, tree, config), table, f"{name} exported as {layout}")
  elif not args.input:
    raise ValueError(
      f"no key table ships for {name}{' with --config' if args.config else ''}; name one by --keys, or a file by --input"
    )
  if not args.input:
    return
  source = open_source(args, config, module, tree)
  spec, tensors = weights.conversion(source, source.layout, tree)
  stored = {entry.names[0]: source.name_of(entry) for entry in source.entries}
  for name, array in progress(tensors, spec):
    name = stored.get(name, name)
    if name in source.shapes and array.tobytes() != source.checkpoint.read(source.prefix + name, True).tobytes():
      raise CheckpointError(f"{args.input}: {name!r} doesn't come back bit for bit")
  print(f"{len(spec)} tensors imported and exported: bit-exact")


def compare(spec: dict, table: dict, what: str) -> None:
  report = mapping.Report(len(table))
  report.missing = sorted(set(table) - set(spec))
  report.unexpected = sorted(set(spec) - set(table))
  report.mis_shaped = {n: (spec[n], table[n]) for n in table if n in spec and spec[n] != table[n]}
  if not report.clean:
    raise CheckpointError(f"{what} differs from the key table: {report}")
  print(f"{what}: all {len(table)} names and shapes of the key table")


def main(argv=None):
  parser = make_parser()
  args = parser.parse_args(argv)
  if not args.check and not (args.input and args.output):
    parser.error("--input and --output are needed, or --check")
  with one_line_errors():
    check(args) if args.check else convert(args)


if __name__ == "__main__":
  main()
