"""Base classes of a chain's steps. The fields of a step are its settings. A step turns one shard of a table into another."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, ClassVar, NamedTuple

import polars as pl

from data import paths
from data.prepare.shards import FAILED, content, failed_in, polars_line, row_count, scan, with_failures, write_shard
from data.prepare.workers import DEFAULT_LIMITS, Failure, Limits, Pool
from data.shards import digest

_STAT_THREADS = 16  # file sizes that are asked for at a time
_FRAME_BYTES = 5000  # time limits count at least this many bytes per frame: a day of a still camera is a small file


@dataclasses.dataclass(frozen=True)
class Step:
  """Base of all steps. A subclass has `transform`, or `write` if it ends a chain."""

  title: ClassVar[str]  # name in configs
  version: ClassVar[int] = 1  # increased when the same settings give another result
  unit: ClassVar[str] = "rows"
  silent: ClassVar[tuple[str, ...]] = ()  # settings that don't change the result
  needs: ClassVar[tuple[str, ...]] = ()  # columns that the table must have
  fails: ClassVar[bool] = False  # whether its rows can fail
  selects: ClassVar[bool] = False  # whether it removes rows by their values; the report also shows the removed rows

  def check(self) -> None:
    """Raises ValueError, in one line, for a setting that is not allowed."""

  def gather(self, table: pl.LazyFrame) -> Any:
    """Facts about the whole table that `transform` needs, JSON-able or a DataFrame."""
    raise NotImplementedError

  def transform(self, table: pl.LazyFrame, context: Context) -> pl.LazyFrame:
    """One shard of the table -> the same shard after the step. Memory is constant or bounded by the shard."""
    raise NotImplementedError

  def complete(self, table: pl.LazyFrame) -> bool:
    """Whether the files that an output shard names exist."""
    return True

  def tell(self, counts: dict[str, int]) -> str:
    """Lines to print about the counts of all shards."""
    return ""

  def write(self, tables: list[str], context: Context) -> tuple[str, list[str]]:
    """For a step that ends a chain: writes its result for all shards -> (one line about it, its files)."""
    raise NotImplementedError

  @property
  def beside(self) -> str:
    """Ending, such as ".txt", of a file that the step reads beside the file of each row. "": no such file."""
    return ""

  @property
  def gathers(self) -> bool:
    """Whether it needs the whole table before its first shard."""
    return type(self).gather is not Step.gather

  @property
  def writes(self) -> bool:
    """Whether it ends a chain and makes no shards."""
    return type(self).write is not Step.write

  def recipe(self) -> dict[str, Any]:
    """What decides the step's result, JSON-able."""
    settings = {k: v for k, v in dataclasses.asdict(self).items() if k not in self.silent}
    return {"step": self.title, "version": self.version, "settings": json.loads(json.dumps(settings, default=str))}


@dataclasses.dataclass(frozen=True)
class RowStep(Step):
  """A step that reads files: worker processes with limits call `rows` for each group of rows."""

  columns: ClassVar[dict[str, Any]] = {}  # columns that it adds, with polars types
  fails: ClassVar[bool] = True

  def rows(self, group: list[dict[str, Any]], context: Context, report: Callable[[float], None]) -> list[Any]:
    """Called in a worker. Returns for each row a dict of new values, a list of such dicts (any number), or a `Failure`."""
    raise NotImplementedError

  def groups(self, rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Splits the rows, in order, into the groups of one call each."""
    return ([row] for row in rows)

  def transform(self, table: pl.LazyFrame, context: Context) -> pl.LazyFrame:
    frame = table.collect()
    rows = [{**dict.fromkeys(FAILED), **row} for row in frame.iter_rows(named=True)]
    groups = list(self.groups([row for row in rows if row["error"] is None]))
    bare = Context(context.folder, context.part, limits=context.limits)  # picklable
    done = context.map(functools.partial(_rows_of, self, bare), groups)
    results = itertools.chain.from_iterable(
      [found] * len(group) if isinstance(found, Failure) else found for group, found in zip(groups, done)
    )
    out = []
    for row in rows:
      result: Any = next(results) if row["error"] is None else {}
      result = result.columns(self.title) if isinstance(result, Failure) else result
      out += [{**row, **values} for values in (result if isinstance(result, list) else [result])]
    return pl.DataFrame(out, schema={**frame.schema, **self.columns, **FAILED}, orient="row", strict=False).lazy()


def _rows_of(step: RowStep, context: Context, group: list[dict[str, Any]], report: Callable[[float], None]) -> list[Any]:
  return step.rows(group, context, report)


@dataclasses.dataclass
class Context:
  """What a step may use besides its shard. `history` and `unselected` are for `write`."""

  folder: str  # the step's own folder, for files that it makes beside the table
  part: str  # file name of the shard
  facts: Any = None  # the result of `gather`
  limits: Limits = DEFAULT_LIMITS
  pool: Pool | None = None  # None in a worker process
  progress: Callable[[float], None] | None = None  # None in a worker process
  counts: dict[str, int] = dataclasses.field(default_factory=dict)  # of `transform`; `Step.tell` gets the sums over all shards
  # Of each earlier step: name, rows in, rows out, failed rows, seconds of work, text of `Step.tell`.
  history: tuple = ()
  unselected: tuple[list[str], ...] = ()  # the input shards of each earlier step that `selects`, in order

  def map(self, function: Callable, groups: list) -> list[Any]:
    """`Pool.map` over groups of rows. The size of a group's file decides its time limit."""
    frames = (sum(r.get("num_frames") or 0 for r in group) for group in groups)
    files = sizes_of([group[0] for group in groups])
    sizes = [max(size or 0, _FRAME_BYTES * count) for size, count in zip(files, frames)]
    rows_per_group = sum(map(len, groups)) / max(len(groups), 1)

    def progress(done: float) -> None:
      if self.progress:
        self.progress(done * rows_per_group)

    assert self.pool is not None
    return self.pool.map(function, groups, sizes=sizes, progress=progress)


def at_least(settings: Any, low: float, *names: str) -> None:
  """Raises ValueError if one of these fields is smaller than `low`."""
  for name in names:
    if getattr(settings, name) < low:
      raise ValueError(f"{name} = {getattr(settings, name)!r} must be at least {low}")


class Job(NamedTuple):
  """Arguments of `run_shard`."""

  step: Step
  source: str
  target: str
  key: str
  context: Context


Made = Iterator[tuple[str, dict[str, Any]]]  # (part, metadata) of each shard when it is finished


def beside(path: str, ending: str) -> str:
  """The file with the same name and another ending."""
  return os.path.splitext(path)[0] + ending


def states_beside(step: Step, source: str) -> list[tuple | None]:
  """`paths.state_of` the extra files, such as captions, that a step reads beside each row's video.

  Files in a bucket are skipped, because each one would cost a request.
  """
  if not step.beside:
    return []
  table = scan(source)
  names = [name for name in ("video", "path") if name in table.collect_schema()]  # a clip's file lies beside its video
  if not names:
    return []  # `run_shard` reports the missing column
  files = table.select(pl.coalesce(names).unique(maintain_order=True)).collect().to_series()
  return [paths.state_of(beside(file, step.beside)) for file in files.drop_nulls() if not paths.is_remote(file)]


def sizes_of(rows: list[dict[str, Any]]) -> list[int | None]:
  """Bytes of each row's file, for time limits: from the column `bytes`, or else from the file system."""

  def size_of(row: dict[str, Any]) -> int | None:
    return (paths.state_of(str(row["path"])) or (None,))[0] if row.get("bytes") is None else row["bytes"]

  with futures.ThreadPoolExecutor(_STAT_THREADS) as threads:  # in a bucket each unknown size is a request
    return list(threads.map(size_of, rows))


def run_shard(step: Step, source: str, target: str, key: str, context: Context) -> dict[str, Any]:
  """Makes one shard. Returns its metadata. Raises ValueError for a table that the step can't take."""
  begin = time.monotonic()
  table = with_failures(scan(source))
  if missing := [name for name in step.needs if name not in table.collect_schema().names()]:
    raise ValueError(f"{step.title} needs the column {' and '.join(missing)}, which {source} doesn't have")
  identity, retry = key, 0
  try:
    result = step.transform(table, context)
    if step.fails:
      passing = pl.col("retry") & failed_in(step.title)
      result = result.collect().lazy()
      failed = result.with_row_index("_i").filter(passing).collect()["_i"].to_list()
      # An earlier step with the same title has failures of its own.
      retry = len(failed) - row_count(table.filter(passing))
      identity = digest([key, failed]) if retry else key
    if step.gathers:
      # A new row changes the facts, so all keys of this step. Later steps keep the shards whose rows stay the same.
      identity = content(result)
  except pl.exceptions.PolarsError as error:
    raise ValueError(f"{step.title}: {polars_line(error)}") from None
  took = round(time.monotonic() - begin, 3)
  meta = {"key": key, "identity": identity, "retry": retry, "recipe": step.recipe(), "counts": context.counts, "seconds": took}
  write_shard(target, result, meta)
  return meta
