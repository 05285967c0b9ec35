"""`table`: the files of a folder or a table, with what a training needs: path, num_frames, height, width, fps.

  python -m data.prepare table FOLDER -o table.csv      all videos and images below a folder
  python -m data.prepare table TABLE -o new.parquet     a table's own files; its other columns are kept

Files that can't be used are listed on stderr and left out. It is the steps `collect` and `probe` of a chain.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile

import polars as pl

from data import paths
from data.command_line import OneLineParser
from data.prepare.chain import Chain
from data.prepare.collect import LISTED, Collect, Probe
from data.prepare.export import relative_to
from data.prepare.messages import shown
from data.prepare.shards import refuse_overwriting, write_shard

_PROBED = ("num_frames", "height", "width", "fps")


def main(arguments: list[str]) -> int:
  """The command; returns its exit code."""
  parser = OneLineParser(
    prog="python -m data.prepare table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("source", help="a folder, a pattern, or a table (.csv, .parquet, .jsonl) with a column `path`")
  parser.add_argument("-o", "--output", required=True, help="table to write (.csv or .parquet)")
  parser.add_argument("--decode", action="store_true", help="decode every frame (slow, finds damage in the middle of files)")
  parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
  options = parser.parse_args(arguments)
  target = paths.absolute(options.output)
  if not target.endswith((".csv", ".parquet")):
    raise ValueError(f"-o {options.output}: the output's name must end in .csv or .parquet")
  refuse_overwriting(target, [options.source])
  steps = {
    "collect": Collect(sources=(options.source,)),
    "probe": Probe(decode=options.decode, content_hash=False, picture_hash=False),
  }
  with tempfile.TemporaryDirectory(prefix="stdit_jax-") as folder:
    chain = Chain(folder, steps, workers=options.workers)
    chain.run()
    table = chain.scan("probe")
    failed = pl.col("error").is_not_null()
    bad = table.filter(failed).select("path", "error").collect().rows()
    for path, error in bad:
      print(f"left out {shown(path)}: {shown(error)}", file=sys.stderr)
    own = [name for name in chain.scan("collect").collect_schema().names() if name == "path" or name not in LISTED]
    kept = table.filter(~failed).select(list(dict.fromkeys((*own, *_PROBED))))
    rows = kept.select(pl.len()).collect().item()
    if not rows:
      raise ValueError(f"none of {len(bad)} files of {options.source} can be used")
    write_shard(target, relative_to(kept, os.path.dirname(target)), {})
  print(f"{rows:,} files, {len(bad):,} left out: {options.output}")
  return 0
