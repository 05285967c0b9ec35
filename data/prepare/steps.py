"""Steps: what a chain is made of. A step's settings are the fields of a dataclass; it makes one shard of another."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, ClassVar

import polars as pl

from data import paths
from data.prepare.shards import FAILED, content, digest, failed_in, polars_line, scan, with_failures, write_shard
from data.prepare.workers import DEFAULT_LIMITS, Failure, Limits, Pool

_ASKED_TOGETHER = 16  # sizes of files
_FRAME_BYTES = 5000  # that a frame counts for at least, in time limits: a day of a still camera is a small file


@dataclasses.dataclass(frozen=True)
class Step:
  """Base of all steps. The fields of a subclass are its settings; it has `transform`, or `write` if it ends a chain."""

  title: ClassVar[str]  # what a config calls it
  version: ClassVar[int] = 1  # counted up when the same settings give something else
  unit: ClassVar[str] = "rows"
  silent: ClassVar[tuple[str, ...]] = ()  # settings that don't change the result
  needs: ClassVar[tuple[str, ...]] = ()  # columns without which it makes no sense
  fails: ClassVar[bool] = False  # whether its rows may fail, or be tried again
  selects: ClassVar[bool] = False  # whether it leaves rows out for what they are: the report shows those, too

  def check(self) -> None:
    """Raises ValueError about a setting, in one line."""

  def gather(self, table: pl.LazyFrame) -> Any:
    """What `transform` has to know about the whole table, JSON-able or a DataFrame."""
    raise NotImplementedError

  def transform(self, table: pl.LazyFrame, context: Context) -> pl.LazyFrame:
    """One shard of the table -> the same shard after the step; constant memory, or bounded by the shard."""
    raise NotImplementedError

  def complete(self, table: pl.LazyFrame) -> bool:
    """Whether the files that a shard of output names are there."""
    return True

  def tell(self, counts: dict[str, int]) -> str:
    """Lines about what was counted over all shards."""
    return ""

  def write(self, tables: list[str], context: Context) -> tuple[str, list[str]]:
    """For a step that ends a chain (an export): writes what it makes of all shards -> (one line about it, its files)."""
    raise NotImplementedError

  @property
  def beside(self) -> str:
    """Ending of the files beside those of the rows that it reads as well, such as ".txt"; "": none."""
    return ""

  @property
  def gathers(self) -> bool:
    """Whether it has to see the whole table before its first shard."""
    return type(self).gather is not Step.gather

  @property
  def writes(self) -> bool:
    """Whether it ends a chain, and makes no shards."""
    return type(self).write is not Step.write

  def recipe(self) -> dict[str, Any]:
    """What decides the step's result, JSON-able."""
    settings = {k: v for k, v in dataclasses.asdict(self).items() if k not in self.silent}
    return {"step": self.title, "version": self.version, "settings": json.loads(json.dumps(settings, default=str))}


@dataclasses.dataclass(frozen=True)
class Source(Step):
  """The first step: lists what there is as shards of a table. Shards keep their rows, new ones are added behind."""

  def reach(self) -> None:
    """Raises ValueError where something that it lists is not there, seen from this machine."""

  def list(self, folder: str, own: Sequence[str] = ()) -> None:
    """Writes folder/part-00000.parquet, ...; leaves those alone in which nothing changed. What lies in the folders `own` is no
    source: the run made it."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class RowStep(Step):
  """A step that looks at files: `rows(items)` of each group of rows, in worker processes with limits."""

  columns: ClassVar[dict[str, Any]] = {}  # what it adds, with polars types
  fails: ClassVar[bool] = True

  def rows(self, group: list[dict[str, Any]], context: Context, report: Callable[[float], None]) -> list[Any]:
    """Called in a worker for a group of rows: for each of them a dict of new values, a list of such dicts (several rows, or
    none), or a `Failure`."""
    raise NotImplementedError

  def groups(self, rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Rows (the same objects) that one call takes together: one by one."""
    return ([row] for row in rows)

  def transform(self, table: pl.LazyFrame, context: Context) -> pl.LazyFrame:
    frame = table.collect()
    schema = {**frame.schema, **self.columns, **FAILED}
    rows = [{**dict.fromkeys(FAILED), **row} for row in frame.iter_rows(named=True)]
    places = [i for i, row in enumerate(rows) if row["error"] is None]
    number = {id(rows[i]): i for i in places}
    groups = list(self.groups([rows[i] for i in places]))
    done = context.map(functools.partial(_rows_of, self, context.bare()), groups)
    results: dict[int, Any] = {}
    for group, found in zip(groups, done):
      for row, result in zip(group, [found] * len(group) if isinstance(found, Failure) else found):
        results[number[id(row)]] = result
    out = []
    for i, row in enumerate(rows):
      result = results.get(i, {})
      if isinstance(result, Failure):
        out.append({**row, "error": f"{self.title}: {result.reason}", "retry": result.retry})
      else:
        out += [{**row, **values} for values in (result if isinstance(result, list) else [result])]
    return pl.DataFrame(out, schema=schema, orient="row", strict=False).lazy()


def _rows_of(step: RowStep, context: Context, group: list[dict[str, Any]], report: Callable[[float], None]) -> list[Any]:
  return step.rows(group, context, report)


@dataclasses.dataclass
class Context:
  """What a step may use besides its shard.

  folder: the step's own folder, for files that it makes beside the table.
  part: name of the shard.
  facts: what `gather` returned.
  limits: of a file.
  pool, progress: None in a worker process.
  counts: what `transform` counted; `Step.tell` says the sums over all shards.
  history: (step, rows in, rows, failed, seconds of work, what `Step.tell` says) of the steps before, for `write`.
  unselected: for `write`: the shards that came into each step before that `selects`, in order.
  """

  folder: str
  part: str
  facts: Any = None
  limits: Limits = DEFAULT_LIMITS
  pool: Pool | None = None
  progress: Callable[[float], None] | None = None
  counts: dict[str, int] = dataclasses.field(default_factory=dict)
  history: tuple = ()
  unselected: tuple[list[str], ...] = ()

  def bare(self) -> Context:
    """What is sent to workers."""
    return Context(self.folder, self.part, limits=self.limits)

  def map(self, function: Callable, groups: list) -> list[Any]:
    """`Pool.map` over groups of rows, with progress and with time limits from the size of each group's file."""
    frames = (sum(r.get("num_frames") or 0 for r in group) for group in groups)
    files = sizes_of([group[0] for group in groups])
    sizes = [max(size or 0, _FRAME_BYTES * count) for size, count in zip(files, frames)]
    share = sum(map(len, groups)) / max(len(groups), 1)

    def progress(done: float) -> None:
      if self.progress:
        self.progress(done * share)

    return self.pool.map(function, groups, sizes=sizes, progress=progress)


def beside(path: str, ending: str) -> str:
  """The file of the same name with another ending."""
  return os.path.splitext(path)[0] + ending


def states_beside(step: Step, source: str) -> list[tuple[int, int] | None]:
  """(bytes, time of change) of each file that a step reads beside those of a table's rows, None where there is none. Files in a
  bucket are left out, since each would be a request; another content of the same size and time is not seen, either."""
  if not step.beside:
    return []
  table = scan(source)
  names = [name for name in ("video", "path") if name in table.collect_schema()]  # clips have theirs beside their video
  if not names:
    return []  # `needs` says so
  files = table.select(pl.coalesce(names).unique(maintain_order=True)).collect().to_series()
  return [state_of(beside(file, step.beside)) for file in files.drop_nulls() if not paths.is_remote(file)]


def state_of(path: str) -> tuple[int, int] | None:
  """(bytes, number that changes with the contents) of a file, None if it can't be had."""
  try:
    return paths.stat(path)
  except OSError:
    return None


def sizes_of(rows: list[dict[str, Any]]) -> list[int | None]:
  """Bytes of each row's file, by which its time limit goes: of tables that don't say it, asked for."""
  sizes = [row.get("bytes") for row in rows]
  unknown = [i for i, size in enumerate(sizes) if size is None]
  if unknown:
    with futures.ThreadPoolExecutor(_ASKED_TOGETHER) as threads:  # in a bucket each one is a request
      found = threads.map(state_of, [str(rows[i]["path"]) for i in unknown])
    for i, state in zip(unknown, found):
      sizes[i] = state and state[0]
  return sizes


def run_shard(step: Step, source: str, target: str, key: str, context: Context) -> dict[str, Any]:
  """Makes one shard -> its metadata. Raises ValueError for a table that the step can't take."""
  begin = time.monotonic()
  table = with_failures(scan(source))
  missing = [name for name in step.needs if name not in table.collect_schema().names()]
  if missing:
    raise ValueError(f"{step.title} needs the column {' and '.join(missing)}, which {source} doesn't have")
  mark, retry = key, 0
  try:
    result = step.transform(table, context)
    if step.fails:
      passing = pl.col("retry") & failed_in(step.title)
      result = result.collect()
      failed = result.with_row_index("_i").filter(passing)["_i"].to_list()
      # A step of the same kind before has failures of its own.
      retry = len(failed) - table.filter(passing).select(pl.len()).collect().item()
      mark = digest([key, failed]) if retry else key
      result = result.lazy()
    if step.gathers:
      mark = content(result)  # the key holds what all shards have: a new row in one changes few of the others
  except pl.exceptions.PolarsError as error:
    raise ValueError(f"{step.title}: {polars_line(error)}") from None
  meta = {
    "key": key,
    "identity": mark,
    "retry": retry,
    "seconds": round(time.monotonic() - begin, 3),
    "recipe": step.recipe(),
    "counts": context.counts,
  }
  write_shard(target, result, meta)
  return meta
