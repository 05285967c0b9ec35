"""Lists the files of a folder or a table with path, num_frames, height, width and fps. Training also needs `text`.

  python -m data.prepare table FOLDER -o table.csv      all videos and images below a folder
  python -m data.prepare table TABLE -o new.parquet     the files of a table, which keeps its other columns

Unusable files are skipped and listed on stderr. The command runs the steps `collect` and `probe`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile

import polars as pl

from data import paths
from data.command_line import flag, parse
from data.prepare.chain import Chain
from data.prepare.collect import LISTED, Collect, Probe
from data.prepare.export import relative_to
from data.prepare.messages import shown
from data.prepare.shards import refuse_overwriting, row_count, write_shard
from data.prepare.workers import CORES

_PROBED = ("num_frames", "height", "width", "fps")


@dataclasses.dataclass(frozen=True)
class Settings:
  source: str = flag("a folder, a pattern, or a table (.csv, .parquet, .jsonl) with a column `path`", None, "source")
  output: str = flag("table to write (.csv or .parquet)", None, "-o", "--output", required=True)
  decode: bool = flag("decode every frame (slow; finds damage in the middle of files)", False)
  workers: int = flag("processes (default: all cores)", CORES)


def main(arguments: list[str]) -> int:
  settings = parse(Settings, "python -m data.prepare table", arguments, __doc__)
  target = paths.absolute(settings.output)
  if not target.endswith((".csv", ".parquet")):
    raise ValueError(f"-o {settings.output}: the output's name must end in .csv or .parquet")
  refuse_overwriting(target, [settings.source])
  steps = {
    "collect": Collect(sources=(settings.source,)),
    "probe": Probe(decode=settings.decode, content_hash=False, picture_hash=False),
  }
  with tempfile.TemporaryDirectory(prefix="stdit_jax-") as folder:
    chain = Chain(folder, steps, workers=settings.workers)
    chain.run()
    table = chain.scan("probe")
    failed = pl.col("error").is_not_null()
    bad = table.filter(failed).select("path", "error").collect().rows()
    for path, error in bad:
      print(f"skipped {shown(path)}: {shown(error)}", file=sys.stderr)
    own = [name for name in chain.scan("collect").collect_schema().names() if name == "path" or name not in LISTED]
    usable = table.filter(~failed).select(list(dict.fromkeys((*own, *_PROBED))))
    rows = row_count(usable)
    if not rows:
      raise ValueError(f"{settings.source} has no usable file: all {len(bad)} failed, for the reasons above")
    write_shard(target, relative_to(usable, os.path.dirname(target)), {})
  print(f"{rows:,} files, {len(bad):,} skipped: {settings.output}")
  return 0
