"""Shards of tables: the parquet files of a step, one for each shard of the previous step. The metadata hold the provenance.

* `key`: digest of all that decides the shard, see data/prepare/chain.py.
* `identity`: stands for this shard in keys of the next step. It is `key`, or with rows to retry a digest of `key` and these
  rows. If the step gathers facts, it is a digest of the shard's rows. `Collect` uses such a digest as key and identity.

A failed row keeps its place, with the reason in `error`, and later steps pass it on unchanged. `retry` is true if the reason is
temporary (no answer, no file).
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
from data.shards import digest
from data.sources import FORMATS

_META = "stdit_jax.prepare"
_TEXTS = ("path", "text", "id", "source_id", "video", "crop", "hash", "picture_hash", "text_features", "error")
FAILED = {"error": pl.String, "retry": pl.Boolean}  # columns of every table of the pipeline


def part_name(number: int) -> str:
  return f"part-{number:05}.parquet"


def part_number(name: str) -> int:
  return int(name.removeprefix("part-").removesuffix(".parquet"))


def parts(folder: str) -> list[str]:
  """File names of the shards in a folder, in order."""
  return sorted((n for n in paths.names(folder) if re.fullmatch(r"part-\d{5,}\.parquet", n)), key=part_number)


def read_meta(path: str) -> dict[str, Any] | None:
  """Metadata of a shard; {} for a parquet file of another program, None for a missing or damaged file."""
  try:
    return json.loads(pl.read_parquet_metadata(local(path)).get(_META, "{}"))
  except (FileNotFoundError, pl.exceptions.PolarsError, ValueError):
    return None


def identity(path: str) -> str:
  """Identity of a shard; for a table of another program a digest of its name, size and modification time."""
  meta = read_meta(path) if path.endswith(".parquet") else {}
  if meta is None:
    raise ValueError(f"{path} is no readable parquet file")
  return meta.get("identity") or digest([os.path.basename(path), *map(str, paths.stat(path))])


def scan(path: str) -> pl.LazyFrame:
  """A table file, lazily. All cells of a csv or jsonl column decide its type. In csv files the columns in `_TEXTS` are text."""
  path = local(path)
  if path.endswith(".csv"):
    return pl.scan_csv(path, infer_schema_length=None, schema_overrides=dict.fromkeys(_TEXTS, pl.String))
  return pl.scan_ndjson(path, infer_schema_length=None) if path.endswith(".jsonl") else pl.scan_parquet(path)


def local(path: str) -> str:
  """A local name of a table. A table in a bucket is copied once per version."""
  return _copied(path, paths.stat(path)[1]) if paths.is_remote(path) else path


@functools.cache
def _copies() -> tempfile.TemporaryDirectory:
  return tempfile.TemporaryDirectory(prefix="stdit_jax-")  # deleted when the process ends


@functools.lru_cache(100_000)
def _copied(path: str, version: Any) -> str:
  """Copies a table from a bucket with gcsfs: polars would look for other credentials."""
  with paths.local_copy(path) as copy:
    target = os.path.join(_copies().name, f"{digest([path, str(version)])}{os.path.splitext(path)[1]}")
    shutil.copy(copy, target)
  return target


def content(table: pl.LazyFrame) -> str:
  """Digest of a table's rows."""
  found = hashlib.sha256(str(table.collect_schema()).encode())
  # JSON can't hold bytes, infinities and NaN.
  plain = table.with_columns(selectors.binary().bin.encode("hex"), selectors.float().cast(pl.String))
  for batch in plain.collect_batches(maintain_order=True):
    found.update(batch.write_ndjson().encode())
  return found.hexdigest()[:32]


def failed_in(title: str) -> pl.Expr:
  """Whether a row failed in a step with this title."""
  return pl.col("error").str.starts_with(f"{title}:").fill_null(False)


def tables_in(source: str) -> list[str]:
  """The table itself, or the parquet files of a folder, without temporary files of killed writes. Raises ValueError if none."""
  if paths.is_folder(source):
    found = [paths.join(source, n) for n in paths.names(source) if n.endswith(".parquet") and not n.startswith(".")]
  else:
    found = [source] if source.endswith(FORMATS) and paths.exists(source) else []
  if not found:
    raise ValueError(f"{source} is no table ({', '.join(FORMATS)}) and no folder of parquet shards")
  return found


def refuse_overwriting(target: str, read: Iterable[str]) -> None:
  """Raises ValueError if the output is one of the inputs."""
  if os.path.realpath(target) in map(os.path.realpath, read):
    raise ValueError(f"{target} is an input of this command: give another name for the output")


def with_failures(table: pl.LazyFrame) -> pl.LazyFrame:
  """The table with the columns `error` and `retry`."""
  present = table.collect_schema().names()
  return table.with_columns(pl.lit(None, kind).alias(name) for name, kind in FAILED.items() if name not in present)


def scan_all(files: list[str]) -> pl.LazyFrame:
  """Several tables as one, with the columns `error` and `retry`."""
  return with_failures(pl.concat([scan(file) for file in files], how="diagonal_relaxed"))


def write_shard(path: str, table: pl.LazyFrame, meta: dict[str, Any]) -> None:
  """Writes a table, with metadata if it is parquet."""
  try:
    with paths.whole(path) as temporary:
      if path.endswith(".csv"):
        table.sink_csv(temporary)
      else:
        table.sink_parquet(temporary, metadata={_META: json.dumps(meta)}, compression="zstd")
  except pl.exceptions.PolarsError as error:
    raise ValueError(polars_line(error)) from None


def polars_line(error: Exception) -> str:
  """First line of an error of polars; the others repeat the query."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0]


def row_count(table: pl.LazyFrame) -> int:
  return table.select(pl.len()).collect(engine="streaming").item()


def height(path: str) -> int:
  """Number of rows of a table file."""
  return row_count(scan(path))
