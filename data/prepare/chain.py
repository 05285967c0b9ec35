"""A run: a declared chain of steps over a table in shards, on one machine or several.

A shard whose key is the wanted one is left alone, anything else is made again, and so is one with rows that may not
fail another time. So a run may be ended at any time, by any means, and the same command goes on.

What is noticed between runs, for all rows of a shard: other settings, rows, sources of another size or time of change
(`Collect`) and captions in files beside them (`states_beside`). What is not: other weights, tokenizers or answers of an
endpoint under the same name; remove the step's folder to have it made again.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import time
import uuid
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import polars as pl

from data import paths
from data.prepare.messages import Progress, clock, say, shown
from data.prepare.shards import (
  digest,
  failed_in,
  height,
  identity,
  part_number,
  parts,
  read_meta,
  refuse_overwriting,
  scan,
  scan_all,
  tables_in,
  with_failures,
)
from data.prepare.steps import Context, Source, Step, run_shard, states_beside
from data.prepare.workers import DEFAULT_LIMITS, Limits, Pool

_POLL = 2.0  # seconds between looks at what other machines have done


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


class _Outdated(Exception):  # noqa: N818 - it says where to go on
  """What this machine made shards of is another now."""


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
    self.output = paths.absolute(output)  # clips are named in tables, which may be read from elsewhere
    self.steps, self.workers, self.limits = steps, workers, limits
    self.shard, self.patience, self.cluster = shard, patience, cluster
    self._pool = Pool(workers, limits)
    self._metas: dict[str, dict[str, Any] | None] = {}
    self._facts: dict[str, tuple] = {}
    self._states: dict[tuple[str, str], list] = {}

  def folder(self, name: str) -> str:
    return paths.join(self.output, name)

  def parts(self, name: str) -> list[str]:
    """Names of a source's or a step's shards."""
    return parts(self.folder(name))

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
      (first, source), *rest = self.steps.items()
      self._list(first, source)
      say(self._summary(first))
      while first != until:
        try:
          return self._make(first, rest, until)
        except _Outdated as error:
          say(f"{error}: other machines listed files or tried again what had failed since; from the first step on")

  def _make(self, before: str, rest: list[tuple[str, Step]], until: str | None) -> None:
    """The steps behind the source. Raises `_Outdated`."""
    for name, step in rest:
      if step.writes:
        self._write(name, step, before)
      else:
        self._run_step(name, step, before)
        before = name
        say(self._summary(name))
      if name == until:
        break
    if self.shard[1] > 1:
      self._missing(before)

  def _list(self, name: str, source: Source) -> None:
    """Of several machines the first one lists, and each other one begins with its list, if that is whole: their own would
    differ where files come meanwhile, or times of change are others. Who has begun with a list before begins another run: it
    lists again. Machines that begin while nobody is done with it all list; what then differs is made again (`_missing`)."""
    index, count = self.shard
    if count == 1:
      return source.list(self.folder(name), self._own())
    record, mine = (paths.join(self.folder(name), file) for file in ("listed.json", f"listed-{index}.json"))
    listed, begun = (json.loads(paths.read_text(file)) if paths.exists(file) else {} for file in (record, mine))
    if listed.get("recipe") == source.recipe() and listed["list"] != begun.get("list"):
      source.reach()
      say(f"{name}: the list of another machine is there")
    else:
      source.list(self.folder(name), self._own())
      listed = {"list": uuid.uuid4().hex, "recipe": source.recipe()}
      paths.write_text(record, json.dumps(listed))
    paths.write_text(mine, json.dumps({"list": listed["list"]}))

  def _own(self) -> list[str]:
    """Folders of the steps that there are and, by their shards, of those that an earlier config had."""
    folders = ((name, self.folder(name)) for name in paths.names(self.output))
    return [folder for name, folder in folders if name in self.steps or (paths.is_folder(folder) and parts(folder))]

  def scan(self, name: str) -> pl.LazyFrame:
    """All shards of a step as one lazy table."""
    return scan_all(self.tables(name))

  def _meta(self, path: str) -> dict[str, Any] | None:
    """`read_meta`, once for shards that no other machine writes."""
    if path not in self._metas or not self._is_mine(os.path.basename(path)):
      self._metas[path] = read_meta(path)
    return self._metas[path]

  def _is_mine(self, part: str) -> bool:
    index, count = self.shard
    return part_number(part) % count == index

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
    if not sources or (step.gathers and len(sources) < len(self.parts(next(iter(self.steps))))):
      return {}  # of what they have to be made is not known yet
    facts = self._gathered(name, sources)[1] if step.gathers else None
    path = functools.partial(paths.join, self.folder(before))
    return {part: digest([step.recipe(), mark, facts, *self._beside(step, path(part), mark)]) for part, mark in sources.items()}

  def _beside(self, step: Step, source: str, mark: str) -> list:
    """`states_beside`, looked at once in a run: what changes later is seen by the next one."""
    key = step.beside, mark  # shards of two steps may have one mark, where the second changes nothing
    if key not in self._states:
      self._states[key] = states_beside(step, source)
    return self._states[key]

  def _before(self, name: str) -> str:
    names = list(self.steps)
    return names[names.index(name) - 1]

  def _gathered(self, name: str, sources: dict[str, str]) -> tuple[Any, str]:
    """(facts of a step about the whole table, their digest)."""
    mark = digest(sources)
    if self._facts.get(name, ("", None, ""))[0] != mark:
      facts = self.steps[name].gather(self.scan(self._before(name)))
      self._facts[name] = (mark, facts, digest(_plain(facts)))
    return self._facts[name][1:]

  def _run_step(self, name: str, step: Step, before: str) -> None:
    if step.gathers:
      self._wait(before)
    path = functools.partial(paths.join, self.folder(name))
    todo = {}
    for part, key in self._keys(name).items():
      if self._is_mine(part):
        meta = self._meta(path(part)) or {}
        if meta.get("key") != key or meta["retry"] or not step.complete(scan(path(part))):
          todo[part] = key
    if not todo:
      return
    self._tell_changes(name, step, todo)
    facts = self._gathered(name, self._identities(before))[0] if step.gathers else None
    sizes = {part: height(paths.join(self.folder(before), part)) for part in todo}
    progress, done = Progress(name, sum(sizes.values()), step.unit), 0
    jobs = [
      (step, paths.join(self.folder(before), part), path(part), key, Context(self.folder(name), part, facts, self.limits))
      for part, key in todo.items()
    ]
    if self.cluster and step.fails:  # that is, looks at files or asks somebody, row by row
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

  def _tell_changes(self, name: str, step: Step, todo: dict[str, str]) -> None:
    """Nothing is overwritten without a word: says which settings changed."""
    for part in todo:
      old = (self._meta(paths.join(self.folder(name), part)) or {}).get("recipe")
      if old and old != step.recipe():
        new = step.recipe()["settings"]
        changed = [f"{k}: {old['settings'].get(k)!r} -> {new.get(k)!r}" for k in sorted({*new, *old["settings"]})
                   if old["settings"].get(k) != new.get(k)]  # fmt: skip
        say(f"{name}: {len(todo)} shards are made again ({'; '.join(changed) or 'another version of the step'})")
        return

  def _wait(self, name: str) -> None:
    """Until the other machines have made their shards of a step, from the source on."""
    since, seen = time.monotonic(), -1
    while missing := self._missing(name):
      if self.shard[1] == 1:
        raise ValueError(f"{name}: {missing} shards are missing: run the same command again")
      if missing != seen:
        say(f"{name}: waiting for {missing} shards of other machines")
        seen, since = missing, time.monotonic()
      if time.monotonic() - since > self.patience:
        raise ValueError(f"{name}: {missing} shards of other machines did not come in {clock(self.patience)}: do they run?")
      time.sleep(_POLL)

  def _missing(self, name: str) -> int:
    """How many shards of a step are not there or out of date. Raises `_Outdated` where one of them is of this machine, of
    several: it has been there already, and nobody else makes it."""
    missing = set(self.parts(next(iter(self.steps)))) - set(self._identities(name))
    if self.shard[1] > 1 and (mine := sum(map(self._is_mine, missing))):
      raise _Outdated(f"{name}: {mine} shards of this machine are missing or out of date")
    return len(missing)

  def _write(self, name: str, step: Step, before: str) -> None:
    if self.shard[0] != 0:
      return
    self._wait(before)
    key, old, done = self._written(name, before)
    if not done:
      context = Context(self.folder(name), "", limits=self.limits, pool=self._pool)
      context.history, context.unselected = self._history(before), self._unselected(before)
      said, files = step.write(self.tables(before), context)
      # Archives of an earlier run would lie among these, and be read with them; a table of another name stays.
      folders = {os.path.dirname(file) for file in files}
      for file in {*old.get("files", ())} - {*files}:
        if file.endswith(".tar") and os.path.dirname(file) in folders and paths.exists(file):
          paths.remove(file)
      old = {"key": key, "said": said, "files": files}
      paths.write_text(paths.join(self.folder(name), "done.json"), json.dumps(old))
    say(f"{name}: {old['said']}")

  def _written(self, name: str, before: str) -> tuple[str, dict[str, Any], bool]:
    """Of a step that ends the chain: the key that its result has to have, its record of the last one ({}: there is none), and
    whether that one is up to date."""
    record = paths.join(self.folder(name), "done.json")
    old = json.loads(paths.read_text(record)) if paths.exists(record) else {}
    key = digest([self.steps[name].recipe(), self._identities(before)])
    return key, old, old.get("key") == key and all(paths.exists(f) for f in old["files"])

  def _history(self, last: str) -> tuple:
    names = list(self.steps)
    named = [(name, self.counts(name)) for name in names[: names.index(last) + 1]]
    return tuple((n, c.rows_in, c.rows, c.errors, c.seconds, self.steps[n].tell(c.counted)) for n, c in named)

  def _unselected(self, last: str) -> tuple[list[str], ...]:
    names = list(self.steps)
    return tuple(self.tables(self._before(n)) for n in names[: names.index(last) + 1] if self.steps[n].selects)

  def _summary(self, name: str) -> str:
    """One line about a step that ran, and the first failures."""
    counts = self.counts(name)
    text = f"{name}: {counts.rows:,} rows" + (f" of {counts.rows_in:,}" if counts.rows_in != counts.rows else "")
    text += f", {clock(counts.seconds)} of work" if counts.seconds >= 1 else ""
    if told := self.steps[name].tell(counts.counted):
      text += f"\n{told}"
    if counts.errors:
      complete = counts.done == counts.shards
      text += _told_failures(self.steps[name].title, counts.errors, counts.retry, self.tables(name) if complete else [])
    return text

  def counts(self, name: str, of: Collection[str] | None = None) -> Counts:
    """Of some shards; None: those that were made with the present settings of the step."""
    names, steps = list(self.steps), self.steps
    first, before = names[0], names[max(0, names.index(name) - 1)]
    wanted = self.parts(first)
    there, recipe = set(self.parts(name)), steps[name].recipe()
    metas = {p: self._meta(paths.join(self.folder(name), p)) or {} for p in wanted if p in there}
    done = [p for p, meta in metas.items() if isinstance(steps[name], Source) or meta.get("recipe") == recipe]
    had = set(self.parts(before))  # of several machines one may not have made again yet what another one's shard is made of
    done = [p for p in (done if of is None else metas) if p in had and (of is None or p in of)]
    rows = errors = retry = rows_in = 0
    seconds, counted = 0.0, collections.Counter()
    for part in done:
      path, meta = paths.join(self.folder(name), part), metas[part]
      retry += meta.get("retry", 0)
      seconds += meta.get("seconds", 0.0)
      counted.update(meta.get("counts", {}))
      there_rows, failed = _failed(path, steps[name].title)
      rows, errors = rows + there_rows, errors + failed
      rows_before, failed = _failed(paths.join(self.folder(before), part), steps[name].title)
      rows_in += rows_before
      errors -= failed if before != name else 0  # of an earlier step of this kind
    return Counts(len(wanted), len(done), rows_in, rows, errors, retry, seconds, dict(counted))

  def _current(self, name: str) -> list[str]:
    """Shards of a step that the next run leaves alone, if nothing new is listed and nothing succeeds that failed before."""
    step, path = self.steps[name], functools.partial(paths.join, self.folder(name))
    if isinstance(step, Source):
      return [part for part in self.parts(name) if (self._meta(path(part)) or {}).get("recipe") == step.recipe()]
    return [part for part in self._identities(name) if step.complete(scan(path(part)))]

  def status(self) -> str:
    """A table: what is done, failed, left, made again, and how long that takes, by the work so far.

    "again": shards that are there and not up to date. A step that looks at the whole table has all of its shards among them
    until the table is up to date; what it then finds may leave them as they are. It goes by the files that were listed last.
    """
    lines = [f"{'step':<16} {'shards':>11} {'rows':>12} {'failed':>8} {'to retry':>8} {'again':>8} {'left':>8}"]
    before, whole = None, True
    total_left, known = 0.0, bool(self.parts(next(iter(self.steps))))
    for name, step in self.steps.items():
      if step.writes:
        _, old, done = self._written(name, before)
        state = "done" if done and whole else "again" if old.get("key") else "waiting"
        lines.append(f"{name:<16} {state:>11}")
        continue
      counts = self.counts(name, self._current(name))
      there = [meta for p in self.parts(name) if (meta := self._meta(paths.join(self.folder(name), p)))]
      left, whole = "-", counts.done == counts.shards
      if before is not None and not whole:
        if there:
          rest = sum(meta["seconds"] for meta in there) / len(there) * (counts.shards - counts.done)
          total_left, left = total_left + rest, clock(rest)
        else:
          known, left = False, "?"
      columns = f"{counts.errors:>8,} {counts.retry:>8,} {len(there) - counts.done:>8,} {left:>8}"
      lines.append(f"{name:<16} {f'{counts.done}/{counts.shards}':>11} {counts.rows:>12,} {columns}")
      before = name
    lines.append(f"time left: {clock(total_left)}" + ("" if known else " and steps that have not begun") + " on one machine")
    return "\n".join(lines)


def _plain(facts: Any) -> Any:
  """What a step gathered, JSON-able."""
  return facts.write_csv() if isinstance(facts, pl.DataFrame) else facts


def _failed(table: str, title: str) -> tuple[int, int]:
  """(rows, those of them that failed in a step of this title) of a shard."""
  return with_failures(scan(table)).select(pl.len(), failed_in(title).sum().alias("failed")).collect().row(0)


def _told_failures(title: str, errors: int, retry: int, tables: list[str]) -> str:
  """How many rows failed, how many of them are tried again, and the first ones."""
  text = f", {errors:,} failed" + (f", {retry:,} of them are tried again by the next run" * bool(retry))
  if tables:
    for row in scan_all(tables).filter(failed_in(title)).select("path", "error").head(3).collect().to_dicts():
      text += f"\n  {shown(row['path'])}: {shown(row['error'])}"
  return text


def run_alone(name: str, step: Step, source: str, target: str, *, workers: int = 2, limits: Limits = DEFAULT_LIMITS) -> str:
  """One step on a table file, or on a folder of shards -> the same under `target`; what is done is skipped. Returns what to
  say about it."""
  folder = paths.is_folder(source)
  found = tables_in(source) if folder else []
  pairs = [(a, paths.join(target, os.path.basename(a))) for a in found] if folder else [(source, target)]
  if not pairs:
    raise ValueError(f"{source} has no .parquet files")
  tables = [a for a, _ in pairs]
  for a in tables:
    if not paths.exists(a) or not a.endswith((".parquet", ".csv", ".jsonl")):
      raise ValueError(f"{a} is no table (.parquet, .csv, .jsonl) that is there")
  with Pool(workers, limits) as pool:
    if step.writes:
      if target.endswith((".parquet", ".csv", ".jsonl")):
        raise ValueError(f"-o {target}: {name} may write several files: give a folder")
      return step.write(tables, Context(paths.join(paths.absolute(target), name), "", limits=limits, pool=pool))[0]
    facts = None
    if step.gathers:
      facts = step.gather(scan_all(tables))
    sizes = [height(a) for a in tables]
    progress, done, counted, retry = Progress(name, sum(sizes), step.unit), 0, collections.Counter(), 0
    for (a, b), size in zip(pairs, sizes):
      refuse_overwriting(b, [a])
      if not b.endswith((".parquet", ".csv")):
        raise ValueError(f"{b}: the output's name must end in .parquet or .csv")
      key = digest([step.recipe(), identity(a), _plain(facts), *states_beside(step, a)])
      meta = read_meta(b) if b.endswith(".parquet") and paths.exists(b) else None
      if meta == {}:
        raise ValueError(f"{b} is there and was not written by this program: give another output")
      if not meta or meta["key"] != key or meta["retry"]:
        context = Context(os.path.splitext(paths.absolute(target))[0], Path(b).name, facts, limits, pool)
        context.progress = lambda rows, done=done: progress(done + rows)
        meta = run_shard(step, a, b, key, context)
      counted.update(meta["counts"])
      done, retry = done + size, retry + meta["retry"]
    made = [b for _, b in pairs]
    rows = sum(height(b) for b in made)
    errors = sum(_failed(b, step.title)[1] - _failed(a, step.title)[1] for a, b in pairs) if step.fails else 0
    text = f"{name}: {rows:,} rows of {sum(sizes):,}: {target}"
    text += f"\n{told}" if (told := step.tell(dict(counted))) else ""
    return text + (_told_failures(step.title, errors, retry, made) if errors else "")
