"""Shards: one parquet file of a step's output for each one of its input, which says itself what it was made from.

A shard carries, in the metadata of its file, the key of its recipe: the step, its settings, the identity of the input
shard and of what the step gathered over the whole table. It is written under a temporary name and renamed, so that it is
there whole or not at all, whenever and however a run ends.

A row that fails keeps its place, with the reason in `error`; later steps pass it on untouched. `retry` says that the
reason may pass (no answer, no file).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from typing import Any

import polars as pl

from data import paths

_META = "stdit_jax.prepare"
_TEXTS = ("path", "text", "id", "source_id", "video", "crop", "hash", "picture_hash", "text_features", "error")
FAILED = {"error": pl.String, "retry": pl.Boolean}  # columns of every table of the pipeline


def part_name(number: int) -> str:
  return f"part-{number:05}.parquet"


def part_number(name: str) -> int:
  return int(name.removeprefix("part-").removesuffix(".parquet"))


def parts(folder: str) -> list[str]:
  """Names of the shards in a folder, in order."""
  return sorted((n for n in paths.names(folder) if re.fullmatch(r"part-\d{5,}\.parquet", n)), key=part_number)


def digest(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def read_meta(path: str) -> dict[str, Any] | None:
  """What `write_shard` wrote into a shard, {} for a foreign parquet file, None for one that is missing or damaged."""
  try:
    with paths.local_copy(path) as copy:
      return json.loads(pl.read_parquet_metadata(copy).get(_META, "{}"))
  except (FileNotFoundError, pl.exceptions.PolarsError, ValueError):
    return None


def identity(path: str) -> str:
  """What a shard holds: of ours the key of its recipe, with what failed; of a foreign file its size and time of change."""
  meta = read_meta(path) if path.endswith(".parquet") else {}
  if meta is None:
    raise ValueError(f"{path} is no readable parquet file")
  return meta.get("identity") or digest([os.path.basename(path), *map(str, paths.stat(path))])


def scan(path: str) -> pl.LazyFrame:
  """A table file; one in a bucket is copied to the local disk. A column of a csv or jsonl file has the type that suits
  all its cells; those that we know as text stay text, whatever it looks like."""
  if paths.is_remote(path):
    path = _copied(path, paths.stat(path)[1])
  if path.endswith(".csv"):
    return pl.scan_csv(path, infer_schema_length=None, schema_overrides=dict.fromkeys(_TEXTS, pl.String))
  return pl.scan_ndjson(path, infer_schema_length=None) if path.endswith(".jsonl") else pl.scan_parquet(path)


@functools.cache
def _copies() -> tempfile.TemporaryDirectory:
  return tempfile.TemporaryDirectory(prefix="stdit_jax-")  # goes with the process


@functools.lru_cache(100_000)
def _copied(path: str, version: Any) -> str:
  """A local copy of a version of a table in a bucket, by our own client: that of polars has other credentials."""
  with paths.local_copy(path) as copy:
    target = os.path.join(_copies().name, f"{digest([path, str(version)])}{os.path.splitext(path)[1]}")
    shutil.copy(copy, target)
  return target


def with_failures(table: pl.LazyFrame) -> pl.LazyFrame:
  """The table with the columns `error` and `retry`."""
  there = table.collect_schema().names()
  return table.with_columns(pl.lit(None, kind).alias(name) for name, kind in FAILED.items() if name not in there)


def scan_all(files: list[str]) -> pl.LazyFrame:
  """Several tables as one, with the columns `error` and `retry`."""
  return with_failures(pl.concat([scan(file) for file in files], how="diagonal_relaxed"))


def write_shard(path: str, table: pl.LazyFrame, meta: dict[str, Any]) -> None:
  """Under a temporary name, then renamed."""
  try:
    with paths.whole(path) as temporary:
      if path.endswith(".csv"):
        table.sink_csv(temporary)
      else:
        table.sink_parquet(temporary, metadata={_META: json.dumps(meta)}, compression="zstd")
  except pl.exceptions.PolarsError as error:
    raise ValueError(polars_line(error)) from None


def polars_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0]


def height(path: str) -> int:
  with paths.local_copy(path) as copy:
    return scan(copy).select(pl.len()).collect().item()
