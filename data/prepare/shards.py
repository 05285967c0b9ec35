"""Shards: one parquet file of a step's output for each one of its input, which says itself what it was made from.

A shard carries, in the metadata of its file, the key of its recipe: the step, its settings, the identity of the input
shard and of what the step gathered over the whole table. Its own identity is this key, with what failed; of a step that
gathers it is the digest of its rows. It is written under a temporary name and renamed, so that it is
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
from collections.abc import Iterable
from typing import Any

import polars as pl
from polars import selectors

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
    return json.loads(pl.read_parquet_metadata(local(path)).get(_META, "{}"))
  except (FileNotFoundError, pl.exceptions.PolarsError, ValueError):
    return None


def identity(path: str) -> str:
  """What a shard holds: of ours the key of its recipe, with what failed; of a foreign file its size and time of change."""
  meta = read_meta(path) if path.endswith(".parquet") else {}
  if meta is None:
    raise ValueError(f"{path} is no readable parquet file")
  return meta.get("identity") or digest([os.path.basename(path), *map(str, paths.stat(path))])


def scan(path: str) -> pl.LazyFrame:
  """A table file. A column of a csv or jsonl file has the type that suits all its cells; those that we know as text stay
  text, whatever it looks like."""
  path = local(path)
  if path.endswith(".csv"):
    return pl.scan_csv(path, infer_schema_length=None, schema_overrides=dict.fromkeys(_TEXTS, pl.String))
  return pl.scan_ndjson(path, infer_schema_length=None) if path.endswith(".jsonl") else pl.scan_parquet(path)


def local(path: str) -> str:
  """A local name of a table: its own, or that of a copy of what a bucket has now; every version is copied once."""
  return _copied(path, paths.stat(path)[1]) if paths.is_remote(path) else path


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


def content(table: pl.LazyFrame) -> str:
  """Digest of a table's rows."""
  found = hashlib.sha256(str(table.collect_schema()).encode())
  # JSON has no bytes, and no numbers that are none.
  plain = table.with_columns(selectors.binary().bin.encode("hex"), selectors.float().cast(pl.String))
  for batch in plain.collect_batches(maintain_order=True):
    found.update(batch.write_ndjson().encode())
  return found.hexdigest()[:32]


def failed_in(title: str) -> pl.Expr:
  """Whether a row failed in a step that configs call `title`."""
  return pl.col("error").str.starts_with(f"{title}:").fill_null(False)


def tables_in(folder: str) -> list[str]:
  """The parquet files of a folder, without what a killed write left (`paths.whole`)."""
  return [paths.join(folder, n) for n in paths.names(folder) if n.endswith(".parquet") and not n.startswith(".")]


def refuse_overwriting(target: str, read: Iterable[str]) -> None:
  """Raises ValueError where a file to write is one of those that are read."""
  if os.path.realpath(target) in map(os.path.realpath, read):
    raise ValueError(f"{target} is a file that is read: give another name")


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
  return scan(path).select(pl.len()).collect().item()
