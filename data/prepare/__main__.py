"""Makes a training table from raw videos: scenes, scores, captions, filters. Resumable, on one machine or many.

  python -m data.prepare run    --config configs/data/local.py [--config.output=... --config.scenes.min_seconds=1]
  python -m data.prepare status --config configs/data/local.py     finished, failed and remaining work of a run
  python -m data.prepare table  FOLDER -o table.csv                only path, frames, size and rate of each file
  python -m data.prepare check  TABLE --config configs/film.py     reads every clip as training does
  python -m data.prepare report TABLE -o report.html               histograms and contact sheets of any table
  python -m data.prepare film   --output FOLDER                    the data of the quick start, see data/prepare/film.py
  python -m data.prepare STEP INPUT -o OUTPUT [--KEY=VALUE ...]    one step alone, on a table or a folder of shards

`run --shard 0/2` on one machine and `run --shard 1/2` on another share the work through a common folder.
`run --ray auto` uses a Ray cluster. `python -m data.prepare COMMAND --help` lists the flags of a command.
Steps: {steps}
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys

import polars as pl

from data.command_line import flag, make_parser
from data.prepare import config as configs
from data.prepare.chain import run_alone
from data.prepare.collect import Collect
from data.prepare.messages import one_line, shown
from data.prepare.shards import polars_line
from data.prepare.workers import CORES
from data.shards import Share

MODULES = ("table", "check", "report", "film")  # commands that are a module with `main`
_PROGRAM = "python -m data.prepare"
_WORKERS = "processes on this machine (default: the config's number, or all cores)"


@dataclasses.dataclass(frozen=True)
class RunSettings:
  """Flags of `run` and `status`."""

  config: str = flag(
    "a Python file with get_config(), such as configs/data/local.py. --config.KEY=VALUE changes a key of it", required=True
  )
  until: str = flag("stop after this step", "")
  shard: str = flag("I/N: make every N-th shard, from the I-th on (default: %(default)s)", "0/1")
  ray: str = flag("address of a Ray cluster; 'auto': the cluster of this machine; 'local': a new one here", "")
  workers: int = flag(_WORKERS, 0)


@dataclasses.dataclass(frozen=True)
class StepSettings:
  input: str = flag("a table (.parquet, .csv, .jsonl) or a folder of parquet shards", None, "input")
  output: str = flag("table or folder to write", None, "-o", "--output", required=True)
  workers: int = flag(_WORKERS, 0)


def main(arguments: list[str] | None = None) -> int:
  """Returns the exit code: 0, 1 (`check` found broken files or an empty stage), 2 (an error, one line on stderr), 130 (^C)."""
  try:
    return _main(list(sys.argv[1:] if arguments is None else arguments))
  except (ValueError, OSError, pl.exceptions.PolarsError) as error:
    if os.environ.get("STDIT_JAX_TRACEBACK"):
      raise
    text = polars_line(error) if isinstance(error, pl.exceptions.PolarsError) else one_line(error)
    print(f"error: {shown(text)}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("interrupted; the same command resumes", file=sys.stderr)
    return 130


def _main(arguments: list[str]) -> int:
  if not arguments or arguments[0] in ("-h", "--help"):
    print((__doc__ or "").format(steps=", ".join(configs.STEPS)))
    return 0 if arguments else 2
  command, *rest = arguments
  if command in ("run", "status"):
    return _chain(command, rest)
  if command in MODULES:  # imported when needed: each one needs other packages
    return importlib.import_module(f"data.prepare.{command}").main(rest)
  if command in configs.STEPS:
    return _alone(command, rest)
  raise configs.unknown("command", command, ("run", "status", *MODULES, *configs.STEPS))


def _chain(command: str, arguments: list[str]) -> int:
  about = "Runs the steps of a config." if command == "run" else "Shows the finished, failed and remaining work of a run."
  settings, overrides = make_parser(RunSettings, f"{_PROGRAM} {command}", about).parse_known_args(arguments)
  values = configs.load(settings.config, overrides)
  chain = configs.chain(values, workers=settings.workers, shard=Share.parse(settings.shard))
  if command == "status":
    print(chain.status())
    return 0
  if settings.until and settings.until not in chain.steps:
    raise ValueError(f"--until {settings.until}: the steps are {', '.join(chain.steps)}")
  if settings.ray:
    from data.prepare import cluster

    chain.cluster = cluster.connect(settings.ray)
  chain.run(settings.until or None)
  return 0


def _alone(title: str, arguments: list[str]) -> int:
  cls = configs.step_class(title)
  defaults = "".join(f"\n  --{field.name}={getattr(cls(), field.name)!r}" for field in dataclasses.fields(cls))
  parser = make_parser(StepSettings, f"{_PROGRAM} {title}", cls.__doc__, epilog=f"settings and their defaults:{defaults}")
  settings, rest = parser.parse_known_args(arguments)
  if issubclass(cls, Collect):
    raise ValueError(f"{title} begins a chain: use it in a config; `table FOLDER -o TABLE` lists the files of a folder")
  step = configs.create(cls, dict(configs.assignments(rest, "--")), title)
  print(run_alone(title, step, settings.input, settings.output, workers=settings.workers or CORES))
  return 0


if __name__ == "__main__":
  sys.exit(main())
