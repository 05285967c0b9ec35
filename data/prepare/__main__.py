"""Raw videos -> scenes, scores, captions -> a training table: one chain of steps, resumable, on one machine or many.

  python -m data.prepare run    --config configs/data/local.py [--config.output=... --config.scenes.min_seconds=1]
  python -m data.prepare status --config configs/data/local.py
  python -m data.prepare table  FOLDER -o table.csv                what a training needs to know of files, and no more
  python -m data.prepare check  TABLE --config configs/film.py     read every clip as the training would
  python -m data.prepare report TABLE -o report.html               look at any table
  python -m data.prepare STEP INPUT -o OUTPUT [--KEY=VALUE ...]    one step alone, on a table or a folder of them

`run --shard 0/2` here and `run --shard 1/2` elsewhere share the work over a common folder; `run --ray auto` uses a Ray cluster.
Steps: {steps}
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

import polars as pl

from data.command_line import OneLineParser
from data.prepare import config as configs
from data.prepare.chain import run_alone
from data.prepare.messages import shown
from data.prepare.steps import Source

OTHERS = ("table", "check", "report")  # modules with a `main`
COMMANDS = ("run", "status", *OTHERS)


def main(arguments: list[str] | None = None) -> int:
  """Returns 0, 1 (`check` found broken files), or 2 for a mistake in what was given, which is one line on stderr."""
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  try:
    return _main(arguments)
  except (ValueError, OSError, pl.exceptions.PolarsError) as error:
    if os.environ.get("STDIT_JAX_TRACEBACK"):
      raise
    text = str(error).splitlines()[0] if isinstance(error, pl.exceptions.PolarsError) else " ".join(str(error).split())
    print(f"error: {shown(text) or type(error).__name__}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("interrupted; the same command goes on where it was", file=sys.stderr)
    return 130


def _main(arguments: list[str]) -> int:
  if not arguments or arguments[0] in ("-h", "--help"):
    print(__doc__.format(steps=", ".join(configs.STEPS)))
    return 0 if arguments else 2
  command, rest = arguments[0], arguments[1:]
  if command in ("run", "status"):
    return _chain(command, rest)
  if command in OTHERS:  # loaded when needed: each has imports of its own
    return importlib.import_module(f"data.prepare.{command}").main(rest)
  if command in configs.STEPS:
    return _alone(command, rest)
  raise ValueError(f"unknown command {command!r}; known: {', '.join((*COMMANDS, *configs.STEPS))}")


def _parser(name: str, **kwargs):
  parser = OneLineParser(prog=f"python -m data.prepare {name}", **kwargs)
  parser.add_argument(
    "--workers", type=int, default=0, help="processes on this machine (default: the config's, else all cores)"
  )
  return parser


def _chain(command: str, arguments: list[str]) -> int:
  parser = _parser(command, description="the chain of a config" if command == "run" else "what is done, failed, left")
  parser.add_argument("--config", required=True, help="a file with get_config(), such as configs/data/local.py")
  parser.add_argument("--until", help="end after this step")
  parser.add_argument("--shard", default="0/1", help="I/N: take every N-th shard from the I-th on (default %(default)s)")
  parser.add_argument("--ray", help="address of a Ray cluster, 'auto' for the one that this machine belongs to, 'local'")
  options, overrides = parser.parse_known_args(arguments)
  values = configs.load(options.config, overrides)
  chain = configs.chain(values, workers=options.workers, shard=_shard(options.shard))
  if command == "status":
    print(chain.status())
    return 0
  if options.until and options.until not in chain.steps:
    raise ValueError(f"--until {options.until}: the steps are {', '.join(chain.steps)}")
  if options.ray:
    from data.prepare import cluster

    chain.cluster = cluster.connect(options.ray)
  chain.run(options.until)
  return 0


def _shard(text: str) -> tuple[int, int]:
  index, _, count = text.partition("/")
  if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
    raise ValueError(f"--shard {text}: give I/N with I from 0 to N - 1, such as 0/2")
  return int(index), int(count)


def _alone(title: str, arguments: list[str]) -> int:
  cls = configs.step_class(title)
  defaults = "\n".join(f"  --{name}={value!r}" for name, value in configs.defaults(cls).items())
  parser = _parser(
    title, description=cls.__doc__, epilog=f"settings and their defaults:\n{defaults}",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  parser.add_argument("input", help="a table (.parquet, .csv, .jsonl) or a folder of parquet shards")
  parser.add_argument("-o", "--output", required=True, help="table or folder to write")
  options, rest = parser.parse_known_args(arguments)
  if issubclass(cls, Source):
    raise ValueError(f"{title} begins a chain: use it in a config; `table FOLDER -o TABLE` lists the files of a folder")
  settings = {}
  for argument in rest:
    key, sign, value = argument.removeprefix("--").partition("=")
    if not argument.startswith("--") or not sign:
      raise ValueError(f"unexpected argument {argument!r}; give settings as --KEY=VALUE")
    settings[key] = configs.literal(value)
  workers = options.workers or os.cpu_count() or 1
  print(run_alone(title, configs.create(cls, settings, title), options.input, options.output, workers=workers))
  return 0


if __name__ == "__main__":
  sys.exit(main())
