"""The engine: a declared chain of steps over a table in shards, one parquet file of output per file of input.

A step's settings are the fields of a dataclass. Every output file carries, in its own metadata, the key of what it was made
from: the step, its settings, the identity of the input file and of what the step gathered over the whole table. A file whose
key is the wanted one is left alone, anything else is made again under a temporary name and renamed; so a run may be ended at
any time, by any means, and the same command goes on.

A row that fails keeps its place, with the reason in `error`; later steps pass it on untouched. `retry` says that the reason
may pass (no answer, no file); a file with such rows is made again by the next run.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import polars as pl

from data import paths
from data.prepare.workers import DEFAULT_LIMITS, Failure, Limits, Pool, Progress, clock

_META = "stdit_jax.prepare"
_FRAME_BYTES = 5000  # that a frame counts for at least, in time limits: a day of a still camera is a small file
_POLL = 2.0  # seconds between looks at what other machines have done
FAILED = {"error": pl.String, "retry": pl.Boolean}  # columns of every table of the pipeline


# --------------------------------------------------------------------------------------------------------------- steps


@dataclasses.dataclass(frozen=True)
class Step:
  """Base of all steps: `transform` makes one shard of output from one of input. The fields of a subclass are its settings."""

  title: ClassVar[str]  # what a config calls it
  version: ClassVar[int] = 1  # counted up when the same settings give something else
  unit: ClassVar[str] = "rows"
  silent: ClassVar[tuple[str, ...]] = ()  # settings that don't change the result
  needs: ClassVar[tuple[str, ...]] = ()  # columns without which it makes no sense
  fails: ClassVar[bool] = False  # whether its rows may fail, or be tried again

  def check(self) -> None:
    """Raises ValueError about a setting, in one line."""

  def gather(self, table: pl.LazyFrame) -> Any:
    """What `transform` has to know about the whole table, JSON-able or a DataFrame; None: nothing."""
    return None

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

  def recipe(self) -> dict[str, Any]:
    """What decides the step's result, JSON-able."""
    settings = {k: v for k, v in dataclasses.asdict(self).items() if k not in self.silent}
    return {"step": self.title, "version": self.version, "settings": json.loads(json.dumps(settings, default=str))}


@dataclasses.dataclass(frozen=True)
class Source(Step):
  """The first step: lists what there is as shards of a table. Shards keep their rows, new ones are added behind."""

  def list(self, folder: str) -> None:
    """Writes folder/part-00000.parquet, ...; leaves those alone in which nothing changed."""
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


def create(cls: type, settings: Mapping[str, Any], where: str) -> Any:
  """A dataclass from a mapping of a config. ValueError for unknown keys, wrong types and values, naming the allowed ones."""
  fields = {f.name: f for f in dataclasses.fields(cls)}
  values = {}
  for key, value in settings.items():
    if key not in fields:
      near = difflib.get_close_matches(key, fields, 1)
      hint = f", did you mean {near[0]!r}?" if near else f"; it has: {', '.join(fields)}"
      raise ValueError(f"{where}: there is no setting {key!r}{hint}")
    values[key] = _typed(f"{where}.{key}", plain(value), fields[key])
  made = cls(**values)
  try:
    if hasattr(made, "check"):
      made.check()
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from None
  return made


def plain(value: Any) -> Any:
  """Containers of ml_collections -> tuples and dicts."""
  if isinstance(value, (list, tuple)):
    return tuple(plain(v) for v in value)
  if isinstance(value, Mapping) or hasattr(value, "to_dict"):
    return {k: plain(v) for k, v in value.items()}
  return value


def _typed(where: str, value: Any, field: dataclasses.Field) -> Any:
  """The value, if its type is that of the field's annotation."""
  kinds = {"int": int, "float": (int, float), "str": str, "bool": bool, "tuple": tuple, "dict": dict, "None": type(None)}
  names = [part.split("[")[0].strip() for part in str(field.type).split("|")]
  allowed = tuple(kinds[name] for name in names if name in kinds)
  if isinstance(value, str) and "tuple" in names and "str" not in names:
    value = (value,)
  right = isinstance(value, sum(((a,) if isinstance(a, type) else a for a in allowed), ()))
  if not right or (isinstance(value, bool) and "bool" not in names):
    raise ValueError(f"{where} = {value!r} is no {' or '.join(names)}")
  return value


# ------------------------------------------------------------------------------------------------------------- context


@dataclasses.dataclass
class Context:
  """What a step may use besides its shard.

  folder: the step's own folder, for files that it makes beside the table.
  part: name of the shard.
  facts: what `gather` returned.
  limits: of a file.
  pool, progress: None in a worker process.
  counts: what `transform` counted; `Step.tell` says the sums over all shards.
  history: (step, rows in, rows, failed, seconds of work) of the steps before, for `write`.
  """

  folder: str
  part: str
  facts: Any = None
  limits: Limits = DEFAULT_LIMITS
  pool: Pool | None = None
  progress: Callable[[float], None] | None = None
  counts: dict[str, int] = dataclasses.field(default_factory=dict)
  history: tuple = ()

  def bare(self) -> Context:
    """What is sent to workers."""
    return Context(self.folder, self.part, limits=self.limits)

  def map(self, function: Callable, groups: list, finished: Callable[[int, Any], None] = lambda i, r: None) -> list[Any]:
    """`Pool.map` over groups of rows, with progress and with time limits from the size of each group's file."""
    sizes = [max(group[0].get("bytes") or 0, _FRAME_BYTES * sum(r.get("num_frames") or 0 for r in group)) for group in groups]
    share = sum(map(len, groups)) / max(len(groups), 1)

    def progress(done: float) -> None:
      if self.progress:
        self.progress(done * share)

    return self.pool.map(function, groups, sizes=sizes, progress=progress, finished=finished)


# ------------------------------------------------------------------------------------------------------------ one shard


def digest(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def read_meta(path: str) -> dict[str, Any] | None:
  """What the engine wrote into a shard, {} for a foreign parquet file, None for one that is missing or damaged."""
  try:
    with paths.local_copy(path) as copy:
      return json.loads(pl.read_parquet_metadata(copy).get(_META, "{}"))
  except (OSError, pl.exceptions.PolarsError, ValueError):
    return None


def identity(path: str) -> str:
  """What a shard holds: of ours the key of its recipe, with what failed; of a foreign file its size and time of change."""
  meta = read_meta(path) if path.endswith(".parquet") else {}
  if meta is None:
    raise ValueError(f"{path} is no readable parquet file")
  return meta.get("identity") or digest([os.path.basename(path), *map(str, paths.stat(path))])


def scan(path: str) -> pl.LazyFrame:
  """A table file; one in a bucket is copied to the local disk. Cells of csv files stay text where their type isn't clear."""
  if paths.is_remote(path):
    path = _copied(path, paths.stat(path)[1])
  if path.endswith(".csv"):
    return pl.scan_csv(path, infer_schema_length=10_000)
  return pl.scan_ndjson(path) if path.endswith(".jsonl") else pl.scan_parquet(path)


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


def write_shard(path: str, table: pl.LazyFrame, meta: dict[str, Any]) -> None:
  """Under a temporary name, then renamed."""
  try:
    with paths.whole(path) as temporary:
      if path.endswith(".csv"):
        table.sink_csv(temporary)
      else:
        table.sink_parquet(temporary, metadata={_META: json.dumps(meta)}, compression="zstd")
  except pl.exceptions.PolarsError as error:
    raise ValueError(_polars_line(error)) from None


def _polars_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0]


def run_shard(step: Step, source: str, target: str, key: str, context: Context) -> dict[str, Any]:
  """Makes one shard -> its metadata. Raises ValueError for a table that the step can't take."""
  begin = time.monotonic()
  with paths.local_copy(source) as copy:
    table = with_failures(scan(copy))
    missing = [name for name in step.needs if name not in table.collect_schema().names()]
    if missing:
      raise ValueError(f"{step.title} needs the column {' and '.join(missing)}, which {source} doesn't have")
    try:
      result = step.transform(table, context)
      failed: list[int] = []
      if step.fails:
        result = result.collect()
        passing = pl.col("retry") & pl.col("error").str.starts_with(f"{step.title}:")
        failed = result.with_row_index("_i").filter(passing)["_i"].to_list()
        result = result.lazy()
    except pl.exceptions.PolarsError as error:
      raise ValueError(f"{step.title}: {_polars_line(error)}") from None
    meta = {
      "key": key,
      "identity": digest([key, failed]) if failed else key,
      "retry": len(failed),
      "seconds": round(time.monotonic() - begin, 3),
      "recipe": step.recipe(),
      "counts": context.counts,
    }
    write_shard(target, result, meta)
  return meta


# ----------------------------------------------------------------------------------------------------------------- chain


@dataclasses.dataclass(frozen=True)
class Counts:
  """Where a step stands: shards wanted and done, rows in and out, rows that failed in it, those to be tried again, work."""

  shards: int
  done: int
  rows_in: int
  rows: int
  errors: int
  retry: int
  seconds: float
  counted: dict[str, int]


class Chain:
  """Named steps in order, with their folder.

  Args:
    output: folder of the run, local or gs://; shards lie in OUTPUT/NAME/part-00000.parquet.
    steps: {name: step}; the first one is the source, those with `write` end the chain.
    workers: processes on this machine.
    shard: (i, n): this machine takes every n-th shard from the i-th on.
    patience: seconds without any progress of other machines after which waiting for them ends.
  """

  def __init__(
    self,
    output: str,
    steps: dict[str, Step],
    *,
    workers: int = 2,
    limits: Limits = DEFAULT_LIMITS,
    shard: tuple[int, int] = (0, 1),
    patience: float = 3600.0,
    cluster: Callable | None = None,
  ):
    self.output, self.steps, self.workers, self.limits = str(output), steps, workers, limits
    self.shard, self.patience, self.cluster = shard, patience, cluster
    self._pool = Pool(workers, limits)
    self._metas: dict[str, dict[str, Any] | None] = {}
    self._facts: dict[str, tuple] = {}

  def folder(self, name: str) -> str:
    return paths.join(self.output, name)

  def parts(self, name: str) -> list[str]:
    """Names of a source's or a step's shards."""
    return [n for n in paths.names(self.folder(name)) if n.startswith("part-") and n.endswith(".parquet")]

  def tables(self, name: str) -> list[str]:
    """Shards of a step, of all that the source has; ValueError if one is missing."""
    first = next(iter(self.steps))
    found = [paths.join(self.folder(name), part) for part in self.parts(first)]
    there = set(self.parts(name))
    if missing := [p for p in found if os.path.basename(p) not in there]:
      raise ValueError(f"step {name} has not made {len(missing)} of {len(found)} shards: run the pipeline to its end first")
    return found

  def run(self, until: str | None = None) -> None:
    """All steps in order, up to `until`; what is done is skipped."""
    with self._pool:
      before = None
      for name, step in self.steps.items():
        if isinstance(step, Source):
          step.list(self.folder(name))
        elif type(step).write is not Step.write:
          self._write(name, step, before)
          continue
        else:
          self._run_step(name, step, before)
        before = name
        say(self._summary(name))
        if name == until:
          break

  def scan(self, name: str) -> pl.LazyFrame:
    """All shards of a step as one lazy table."""
    return with_failures(pl.concat([scan(path) for path in self.tables(name)], how="diagonal_relaxed"))

  def _meta(self, path: str) -> dict[str, Any] | None:
    """`read_meta`, once for shards that no other machine writes."""
    index, count = self.shard
    if path not in self._metas or int(os.path.basename(path)[5:10]) % count != index:
      self._metas[path] = read_meta(path)
    return self._metas[path]

  def _identities(self, name: str) -> dict[str, str]:
    """{shard: identity} of a step's shards that are up to date, down from the source on."""
    path = functools.partial(paths.join, self.folder(name))
    if isinstance(self.steps[name], Source):
      return {part: identity(path(part)) for part in self.parts(name)}
    keys = {part: key for part, key in self._keys(name).items() if (self._meta(path(part)) or {}).get("key") == key}
    return {part: self._meta(path(part))["identity"] for part in keys}

  def _keys(self, name: str) -> dict[str, str]:
    """{shard: key that its output has to have} for all shards of the step before that are up to date."""
    step, before = self.steps[name], self._before(name)
    sources = self._identities(before)
    facts = self._gathered(name, sources)[1] if type(step).gather is not Step.gather else None
    return {part: digest([step.recipe(), mark, facts]) for part, mark in sources.items()}

  def _before(self, name: str) -> str:
    names = list(self.steps)
    return names[names.index(name) - 1]

  def _gathered(self, name: str, sources: dict[str, str]) -> tuple[Any, str]:
    """(facts of a step about the whole table, their digest)."""
    mark = digest(sources)
    if self._facts.get(name, ("", None, ""))[0] != mark:
      facts = self.steps[name].gather(self.scan(self._before(name)))
      content = facts.write_csv() if isinstance(facts, pl.DataFrame) else facts
      self._facts[name] = (mark, facts, digest(content))
    return self._facts[name][1:]

  def _run_step(self, name: str, step: Step, before: str) -> None:
    gathers = type(step).gather is not Step.gather
    if gathers:
      self._wait(before)
    index, count = self.shard
    path = functools.partial(paths.join, self.folder(name))
    mine = {part: key for part, key in self._keys(name).items() if int(part[5:10]) % count == index}
    metas = {part: self._meta(path(part)) or {} for part in mine}
    mine = {
      part: key for part, key in mine.items()
      if metas[part].get("key") != key or metas[part]["retry"] or not step.complete(scan(path(part)))
    }  # fmt: skip
    if not mine:
      return
    self._tell_changes(name, step, mine)
    facts = self._gathered(name, self._identities(before))[0] if gathers else None
    sizes = {part: _height(paths.join(self.folder(before), part)) for part in mine}
    progress, done = Progress(name, sum(sizes.values()), step.unit), 0
    jobs = [
      (step, paths.join(self.folder(before), part), path(part), key, Context(self.folder(name), part, facts, self.limits))
      for part, key in mine.items()
    ]
    if self.cluster and isinstance(step, RowStep):
      for part, meta in self.cluster(jobs, self.workers):
        self._metas[path(part)] = meta
        done += sizes[part]
        progress(done)
      return
    for job in jobs:
      context = job[-1]
      context.pool, context.progress = self._pool, lambda rows, done=done: progress(done + rows)
      self._metas[path(context.part)] = run_shard(*job)
      done += sizes[context.part]
      progress(done)

  def _tell_changes(self, name: str, step: Step, mine: dict[str, str]) -> None:
    """Nothing is overwritten without a word: says which settings changed."""
    for part in mine:
      old = (self._meta(paths.join(self.folder(name), part)) or {}).get("recipe")
      if old and old != step.recipe():
        new = step.recipe()["settings"]
        changed = [f"{k}: {old['settings'].get(k)!r} -> {new.get(k)!r}" for k in sorted({*new, *old["settings"]})
                   if old["settings"].get(k) != new.get(k)]  # fmt: skip
        say(f"{name}: {len(mine)} shards are made again ({'; '.join(changed) or 'another version of the step'})")
        return

  def _wait(self, name: str) -> None:
    """Until the other machines have made their shards of a step, from the source on."""
    since, seen = time.monotonic(), -1
    wanted = set(self.parts(next(iter(self.steps))))
    while missing := len(wanted - set(self._identities(name))):
      if self.shard[1] == 1:
        raise ValueError(f"{name}: {missing} shards are missing")
      if missing != seen:
        say(f"{name}: waiting for {missing} shards of other machines")
        seen, since = missing, time.monotonic()
      if time.monotonic() - since > self.patience:
        raise ValueError(f"{name}: {missing} shards of other machines did not come in {clock(self.patience)}: do they run?")
      time.sleep(_POLL)

  def _write(self, name: str, step: Step, before: str) -> None:
    if self.shard[0] != 0:
      return
    self._wait(before)
    key = digest([step.recipe(), self._identities(before)])
    record = paths.join(self.folder(name), "done.json")
    old = json.loads(paths.read_text(record)) if paths.exists(record) else {}
    if old.get("key") != key or not all(paths.exists(f) for f in old["files"]):
      context = Context(self.folder(name), "", limits=self.limits, pool=self._pool, history=self._history(before))
      said, files = step.write(self.tables(before), context)
      old = {"key": key, "said": said, "files": files}
      paths.write_text(record, json.dumps(old))
    say(f"{name}: {old['said']}")

  def _history(self, last: str) -> tuple:
    names = list(self.steps)
    named = [(name, self.counts(name)) for name in names[: names.index(last) + 1]]
    return tuple((name, c.rows_in, c.rows, c.errors, c.seconds) for name, c in named)

  def _summary(self, name: str) -> str:
    """One line about a step that ran, and the first failures."""
    counts = self.counts(name)
    text = f"{name}: {counts.rows:,} rows" + (f" of {counts.rows_in:,}" if counts.rows_in != counts.rows else "")
    text += f", {clock(counts.seconds)} of work" if counts.seconds >= 1 else ""
    if told := self.steps[name].tell(counts.counted):
      text += f"\n{told}"
    if not counts.errors:
      return text
    text += f", {counts.errors:,} failed" + (f", {counts.retry:,} of them are tried again by the next run" * bool(counts.retry))
    if counts.done == counts.shards:
      mine = pl.col("error").str.starts_with(f"{self.steps[name].title}:")
      for row in self.scan(name).filter(mine).select("path", "error").head(3).collect().to_dicts():
        text += f"\n  {shown(row['path'])}: {shown(row['error'])}"
    return text

  def counts(self, name: str) -> Counts:
    """Of the shards that were made with the present settings of the step."""
    names, steps = list(self.steps), self.steps
    first, before = names[0], names[max(0, names.index(name) - 1)]
    wanted = self.parts(first)
    there, recipe = set(self.parts(name)), steps[name].recipe()
    metas = {p: read_meta(paths.join(self.folder(name), p)) or {} for p in wanted if p in there}
    done = [p for p, meta in metas.items() if isinstance(steps[name], Source) or meta.get("recipe") == recipe]
    rows = errors = retry = rows_in = 0
    seconds, counted = 0.0, collections.Counter()
    for part in done:
      path, meta = paths.join(self.folder(name), part), metas[part]
      retry += meta.get("retry", 0)
      seconds += meta.get("seconds", 0.0)
      counted.update(meta.get("counts", {}))
      with paths.local_copy(path) as copy:
        mine = pl.col("error").str.starts_with(f"{steps[name].title}:")
        found = with_failures(scan(copy)).select(pl.len(), mine.sum().alias("errors")).collect().row(0)
      rows, errors = rows + found[0], errors + (found[1] or 0)
      rows_in += _height(paths.join(self.folder(before), part))
    return Counts(len(wanted), len(done), rows_in, rows, errors, retry, seconds, dict(counted))

  def status(self) -> str:
    """A table: what is done, failed and left, and how long that takes, by the work so far."""
    lines = [f"{'step':<16} {'shards':>11} {'rows':>12} {'failed':>8} {'to retry':>8} {'left':>8}"]
    before = None
    total_left, known = 0.0, bool(self.parts(next(iter(self.steps))))
    for name, step in self.steps.items():
      if type(step).write is not Step.write:
        state = "done" if paths.exists(paths.join(self.folder(name), "done.json")) else "waiting"
        lines.append(f"{name:<16} {state:>11}")
        continue
      counts = self.counts(name)
      left = "-"
      if before is not None and counts.shards > counts.done:
        if counts.done and counts.rows_in:
          rest = counts.seconds / counts.done * (counts.shards - counts.done)
          total_left, left = total_left + rest, clock(rest)
        else:
          known, left = False, "?"
      lines.append(
        f"{name:<16} {f'{counts.done}/{counts.shards}':>11} {counts.rows:>12,} {counts.errors:>8,} {counts.retry:>8,} {left:>8}"
      )
      before = name
    lines.append(f"time left: {clock(total_left)}" + ("" if known else " and steps that have not begun") + " on one machine")
    return "\n".join(lines)


def shown(text: str | None) -> str:
  """A stranger's file name, on one line of a terminal and without its control characters."""
  return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text or "")[:300]


def say(text: str) -> None:
  print(text, flush=True)


def _height(path: str) -> int:
  with paths.local_copy(path) as copy:
    return scan(copy).select(pl.len()).collect().item()


def run_alone(name: str, step: Step, source: str, target: str, *, workers: int = 2, limits: Limits = DEFAULT_LIMITS) -> str:
  """One step on a table file, or on a folder of shards -> the same under `target`; what is done is skipped. Returns what to
  say about it."""
  if isinstance(step, Source):
    raise ValueError(f"{name} is the source of a chain: use it in a config")
  folder = paths.is_folder(source)
  names = [n for n in paths.names(source) if n.endswith(".parquet")] if folder else []
  pairs = [(paths.join(source, n), paths.join(target, n)) for n in names] if folder else [(source, target)]
  if not pairs:
    raise ValueError(f"{source} has no .parquet files")
  tables = [a for a, _ in pairs]
  for a in tables:
    if not paths.exists(a) or not a.endswith((".parquet", ".csv", ".jsonl")):
      raise ValueError(f"{a} is no table (.parquet, .csv, .jsonl) that is there")
  with Pool(workers, limits) as pool:
    if type(step).write is not Step.write:
      return step.write(tables, Context(target, "", limits=limits, pool=pool))[0]
    facts = None
    if type(step).gather is not Step.gather:
      facts = step.gather(with_failures(pl.concat([scan(a) for a in tables], how="diagonal_relaxed")))
    sizes = [_height(a) for a in tables]
    progress, done, counted = Progress(name, sum(sizes), step.unit), 0, collections.Counter()
    for (a, b), size in zip(pairs, sizes):
      if paths.absolute(a) == paths.absolute(b):
        raise ValueError(f"{b} is the input: give another output")
      if not b.endswith((".parquet", ".csv")):
        raise ValueError(f"{b}: the output's name must end in .parquet or .csv")
      key = digest([step.recipe(), identity(a), facts.write_csv() if isinstance(facts, pl.DataFrame) else facts])
      meta = read_meta(b) if b.endswith(".parquet") and paths.exists(b) else None
      if meta == {}:
        raise ValueError(f"{b} is there and was not written by this program: give another output")
      if not meta or meta["key"] != key or meta["retry"]:
        context = Context(os.path.splitext(str(target))[0], Path(b).name, facts, limits, pool)
        context.progress = lambda rows, done=done: progress(done + rows)
        meta = run_shard(step, a, b, key, context)
      counted.update(meta["counts"])
      done += size
    told = step.tell(dict(counted))
    return f"{name}: {sum(_height(b) for _, b in pairs):,} rows of {sum(sizes):,}: {target}" + (f"\n{told}" if told else "")
