"""A small run of the chain, for tests of several files."""

import polars as pl
from PIL import Image

from tests.data.prepare.videos import picture

CONFIG = """
def get_config():
  return dict(
    output={output!r}, steps=("collect", "probe", "duplicates", "scenes", "cut"), workers=2, patience=60.0,
    collect=dict(sources=({sources!r},), rows_per_shard=2), scenes=dict(min_seconds=1.0), cut=dict(short_side=36),
    duplicates=dict(pictures=False),
  )
"""


def config_file(tmp_path, sources, name="out"):
  path = tmp_path / f"{name}.py"
  path.write_text(CONFIG.format(output=str(tmp_path / name), sources=str(sources)))
  return str(path)


def table(folder, step="cut"):
  """The step's table without the run's folder in its paths."""
  frame = pl.concat([pl.read_parquet(p) for p in sorted((folder / step).glob("part-*.parquet"))])
  return frame.with_columns(pl.col("path").str.split("/").list.last())


def times(folder):
  return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def unopened(folder):
  """A folder of two files that are named like images, for runs that open no file."""
  folder.mkdir()
  for name in ("a", "b"):
    (folder / f"{name}.png").write_text(name)
  return folder


def pictures(folder, names):
  folder.mkdir(exist_ok=True)
  for name in names:
    Image.fromarray(picture(ord(name), 0)).save(folder / f"{name}.png")
  return folder
