"""A run: a chain of steps over a table in shards, on one machine or several.

A step's *recipe* is its name, version and settings. Its *facts* are what it gathers from the whole table. A shard's *identity*
is a digest that stands for its rows. Its *key* is a digest of all that decides the shard: recipe, facts, the input shard's
identity, and the size and modification time of files beside the sources (`states_beside`).

Each shard stores its key and identity. A run keeps a shard if it has the expected key and no rows to retry, and makes all
others. So the same command resumes a killed run. Size and modification time of the sources are part of the rows (`Collect`).
Weights, tokenizers and models count by name only, and an endpoint's address does not count. If the contents behind a name
change, delete the step's folder to repeat the step.
"""

from __future__ import annotations

import collections
import json
import os
import time
import uuid
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import polars as pl

from data import paths, plan
from data.prepare import shards
from data.prepare.collect import Collect
from data.prepare.messages import say, shown
from data.prepare.steps import Context, Job, Made, Step, run_shard, states_beside
from data.prepare.workers import DEFAULT_LIMITS, Limits, Pool
from data.shards import Progress, Share, digest, duration
from data.sources import FORMATS

_POLL = 2.0  # seconds between looks at the shards of other machines


class Counts(NamedTuple):
  """State of a step."""

  shards: int  # that are expected
  done: int  # finished shards
  rows_in: int
  rows: int
  errors: int  # failed rows
  retry: int  # failed rows that the next run repeats
  seconds: float  # of work
  counted: dict[str, int]  # sums of `Context.counts`


class _Outdated(Exception):  # noqa: N818 - it restarts the chain
  """A shard that this machine has used was made again."""


class Chain:
  """Named steps in order, with their folder.

  Args:
    output: folder of the run, local or gs://. Shards are OUTPUT/STEP/part-00000.parquet, ...
    steps: {name: step}. The first one is the source; steps with `write` end the chain.
    workers: processes on this machine.
    shard: the `Share` of this machine, as (index, count).
    patience: the run ends with an error if it waits for other machines and they finish no shard for this many seconds.

  The attribute `cluster` may be set to a function that makes shards elsewhere (`cluster.connect`).
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
  ):
    self.output = paths.absolute(output)  # tables name clips below it and may be read from another folder
    self.steps, self.workers, self.limits = steps, workers, limits
    self.share, self.patience = Share(*shard), patience
    self.cluster: Callable[[list[Job], int], Made] | None = None
    self._source = next(iter(steps))
    self._pool = Pool(workers, limits)
    self._metas: dict[str, dict[str, Any]] = {}
    self._facts: dict[str, tuple] = {}
    self._states: dict[tuple[str, str], list] = {}

  def parts(self, name: str) -> list[str]:
    """File names of the shards of a step."""
    return shards.parts(self._path(name))

  def tables(self, name: str) -> list[str]:
    """Shards of a step. Raises ValueError if one is missing."""
    wanted = self.parts(self._source)
    if missing := len(set(wanted) - set(self.parts(name))):
      raise ValueError(f"step {name} has not made {missing} of {len(wanted)} shards: run the pipeline to its end first")
    return [self._path(name, part) for part in wanted]

  def run(self, until: str | None = None) -> None:
    """Runs all steps in order, up to `until`. Finished shards are skipped."""
    with self._pool:
      self._list(self._source)
      say(self._summary(self._source))
      while self._source != until:
        try:
          return self._make(until)
        except _Outdated as error:
          say(f"{error}: meanwhile another machine listed files or retried failed rows; starting again at the first step")

  def scan(self, name: str) -> pl.LazyFrame:
    """All shards of a step as one lazy table."""
    return shards.scan_all(self.tables(name))

  def _path(self, name: str, *file: str) -> str:
    """The folder of a step, or a file in it."""
    return paths.join(self.output, name, *file)

  def _make(self, until: str | None) -> None:
    """Runs the steps after the source. Raises `_Outdated`."""
    before, *rest = self.steps
    for name in rest:
      if self.steps[name].writes:
        self._write(name, self.steps[name], before)
      else:
        self._run_step(name, self.steps[name], before)
        before = name
        say(self._summary(name))
      if name == until:
        break
    if self.share.count > 1:
      self._missing(before)

  def _list(self, name: str) -> None:
    """Lists the files, or takes the list of another machine.

    All machines of a run need one list, although files may appear meanwhile. So a machine takes the newest list. It makes a
    new list if its earlier run already used the newest one, or if no list has its recipe. If several machines list at the same
    moment, `_missing` finds the differences.
    """
    source = self.steps[name]
    assert isinstance(source, Collect)
    if self.share.count == 1:
      return source.list(self._path(name), self._made())
    record, mine = (self._path(name, file) for file in ("listed.json", f"listed-{self.share.index}.json"))
    listed, used = (json.loads(paths.read_text(file)) if paths.exists(file) else {} for file in (record, mine))
    if listed.get("recipe") == source.recipe() and listed["list"] != used.get("list"):
      source.reach()
      say(f"{name}: using the file list of another machine")
    else:
      source.list(self._path(name), self._made())
      listed = {"list": uuid.uuid4().hex, "recipe": source.recipe()}
      paths.write_text(record, json.dumps(listed))
    paths.write_text(mine, json.dumps({"list": listed["list"]}))

  def _made(self) -> list[str]:
    """Folders in the output that a step of this config or of an earlier config made."""
    folders = [name for name in paths.names(self.output) if name in self.steps or paths.is_folder(self._path(name))]
    return [self._path(name) for name in folders if name in self.steps or self.parts(name)]

  def _meta(self, name: str, part: str) -> dict[str, Any]:
    """Metadata of a shard, {} if there are none. This machine's shards are read once: no other machine writes them."""
    path = self._path(name, part)
    if path not in self._metas or not self._is_mine(part):
      self._metas[path] = shards.read_meta(path) or {}
    return self._metas[path]

  def _is_mine(self, part: str) -> bool:
    return self.share.owns(shards.part_number(part))

  def _identities(self, name: str) -> dict[str, str]:
    """{shard: identity} of the shards of a step that are up to date with all earlier steps."""
    if isinstance(self.steps[name], Collect):
      return {part: shards.identity(self._path(name, part)) for part in self.parts(name)}
    keys = self._expected_keys(name).items()
    return {part: meta["identity"] for part, key in keys if (meta := self._meta(name, part)).get("key") == key}

  def _expected_keys(self, name: str) -> dict[str, str]:
    """{shard: key that the step must give it}, for the shards that are up to date in the previous step."""
    step, before = self.steps[name], self._before(name)
    inputs = self._identities(before)
    if not inputs or (step.gathers and len(inputs) < len(self.parts(self._source))):
      return {}  # the facts are not known yet
    facts, keys = self._gathered(name, inputs)[1] if step.gathers else None, {}
    for part, identity in inputs.items():
      place = step.beside, identity  # shards of one identity have the same rows, so the same files
      if place not in self._states:  # read once per run: the next run notices later changes
        self._states[place] = states_beside(step, self._path(before, part))
      keys[part] = digest([step.recipe(), identity, facts, *self._states[place]])
    return keys

  def _through(self, last: str) -> list[str]:
    """Names of the steps up to `last`."""
    names = list(self.steps)
    return names[: names.index(last) + 1]

  def _before(self, name: str) -> str:
    """The step before `name`. The first step has none: the result is this step itself."""
    return self._through(name)[-2:][0]

  def _gathered(self, name: str, inputs: dict[str, str]) -> tuple[Any, str]:
    """(facts that a step gathers from the whole table, their digest). `inputs`: identities of the previous step's shards."""
    table = digest(inputs)
    if self._facts.get(name, ("", None, ""))[0] != table:
      facts = self.steps[name].gather(self.scan(self._before(name)))
      self._facts[name] = (table, facts, digest(_plain(facts)))
    return self._facts[name][1:]

  def _run_step(self, name: str, step: Step, before: str) -> None:
    if step.gathers:
      self._wait(before)
    todo = {
      part: key for part, key in self._expected_keys(name).items()
      if self._is_mine(part)
      and not (_is_current(self._meta(name, part), key) and step.complete(shards.scan(self._path(name, part))))
    }  # fmt: skip
    if not todo:
      return
    self._tell_changes(name, step, todo)
    facts = self._gathered(name, self._identities(before))[0] if step.gathers else None
    jobs = [
      Job(step, self._path(before, part), self._path(name, part), key, Context(self._path(name), part, facts, self.limits))
      for part, key in todo.items()
    ]
    # A step whose rows can fail reads files or sends requests: only such a step is worth the cluster.
    elsewhere = self.cluster(jobs, self.workers) if self.cluster and step.fails else None
    for part, meta in _run_jobs(name, jobs, self._pool, elsewhere):
      self._metas[self._path(name, part)] = meta

  def _tell_changes(self, name: str, step: Step, todo: dict[str, str]) -> None:
    """Prints which settings changed, before anything is overwritten."""
    recipe = step.recipe()
    olds = (self._meta(name, part).get("recipe") for part in todo)
    if old := next((old for old in olds if old and old != recipe), None):
      changes = "; ".join(plan.changed_keys(old["settings"], recipe["settings"]))
      say(f"{name}: {len(todo)} shards are made again ({changes or 'another version of the step'})")

  def _wait(self, name: str) -> None:
    """Waits until other machines finish their shards of a step."""
    since, seen = time.monotonic(), -1
    while missing := self._missing(name):
      if self.share.count == 1:
        raise ValueError(f"{name}: {missing} shards are missing: run the same command again")
      if missing != seen:
        say(f"{name}: waiting for {missing} shards of other machines")
        seen, since = missing, time.monotonic()
      if time.monotonic() - since > self.patience:
        waited = duration(self.patience)
        raise ValueError(f"{name}: {missing} shards of other machines are missing after {waited}. Check that they run")
      time.sleep(_POLL)

  def _missing(self, name: str) -> int:
    """Number of missing or outdated shards of a step.

    On several machines, raises `_Outdated` if this machine's own shards are missing or outdated. Only this machine can make
    them, so it would wait for ever.
    """
    missing = set(self.parts(self._source)) - set(self._identities(name))
    if self.share.count > 1 and (mine := sum(map(self._is_mine, missing))):
      raise _Outdated(f"{name}: {mine} shards of this machine are missing or out of date")
    return len(missing)

  def _write(self, name: str, step: Step, before: str) -> None:
    if self.share.index:
      return
    self._wait(before)
    key, result, done = self._written(name, before)
    if not done:
      context = Context(self._path(name), "", limits=self.limits, pool=self._pool)
      counted = [(n, self.counts(n)) for n in self._through(before)]
      context.history = tuple((n, c.rows_in, c.rows, c.errors, c.seconds, self.steps[n].tell(c.counted)) for n, c in counted)
      context.unselected = tuple(self.tables(self._before(n)) for n, _ in counted if self.steps[n].selects)
      said, files = step.write(self.tables(before), context)
      # Deletes old archives in these folders: readers would mix them with the new ones. Other old files stay.
      folders = {os.path.dirname(file) for file in files}
      for file in {*result.get("files", ())} - {*files}:
        if file.endswith(".tar") and os.path.dirname(file) in folders and paths.exists(file):
          paths.remove(file)
      result = {"key": key, "said": said, "files": files}
      paths.write_text(self._path(name, "done.json"), json.dumps(result))
    say(f"{name}: {result['said']}")

  def _written(self, name: str, before: str) -> tuple[str, dict[str, Any], bool]:
    """Returns, for a step that writes: (expected key, record of the last result or {}, whether that result is up to date)."""
    record = self._path(name, "done.json")
    old = json.loads(paths.read_text(record)) if paths.exists(record) else {}
    key = digest([self.steps[name].recipe(), self._identities(before)])
    return key, old, old.get("key") == key and all(paths.exists(f) for f in old["files"])

  def _summary(self, name: str) -> str:
    counts, step = self.counts(name), self.steps[name]
    text = f"{name}: {counts.rows:,} rows" + (f" of {counts.rows_in:,}" if counts.rows_in != counts.rows else "")
    text += f", {duration(counts.seconds)} of work" if counts.seconds >= 1 else ""
    text += f"\n{told}" if (told := step.tell(counts.counted)) else ""
    return text + _told_failures(step, counts.errors, counts.retry, self.tables(name) if counts.done == counts.shards else [])

  def counts(self, name: str, of: Collection[str] | None = None) -> Counts:
    """State of a step, counted over the shards in `of`. None: over all shards that the present settings made."""
    step, before, wanted = self.steps[name], self._before(name), self.parts(self._source)
    if of is None:
      recipe = step.recipe()
      of = [p for p in self.parts(name) if isinstance(step, Collect) or self._meta(name, p).get("recipe") == recipe]
    # Only shards whose input exists: another machine may still have to make the input again.
    present = {*wanted} & {*of} & {*self.parts(name)} & {*self.parts(before)}
    rows = errors = retry = rows_in = 0
    seconds, counted = 0.0, collections.Counter()
    for part in sorted(present):
      meta = self._meta(name, part)
      retry, seconds = retry + meta.get("retry", 0), seconds + meta.get("seconds", 0.0)
      counted.update(meta.get("counts", {}))
      rows_now, failed_now = _failed(self._path(name, part), step.title)
      rows_before, failed_before = _failed(self._path(before, part), step.title)
      rows, rows_in = rows + rows_now, rows_in + rows_before
      errors += failed_now - (failed_before if before != name else 0)  # an earlier step may have the same title
    return Counts(len(wanted), len(present), rows_in, rows, errors, retry, seconds, dict(counted))

  def _reusable_shards(self, name: str) -> list[str]:
    """Shards of a step that are up to date, by their settings and input. They may have rows to retry."""
    step = self.steps[name]
    if isinstance(step, Collect):
      return [part for part in self.parts(name) if self._meta(name, part).get("recipe") == step.recipe()]
    return [part for part in self._identities(name) if step.complete(shards.scan(self._path(name, part)))]

  def status(self) -> str:
    """A table of the steps: finished, failed and remaining work, and the time left at the speed so far.

    "again" counts outdated shards. All shards of a step that gathers facts are outdated until the previous step is finished.
    """
    lines = [f"{'step':<16} {'shards':>11} {'rows':>12} {'failed':>8} {'to retry':>8} {'again':>8} {'left':>8}"]
    before, whole = "", True
    total_left, known = 0.0, bool(self.parts(self._source))
    for name, step in self.steps.items():
      if step.writes:
        _, old, done = self._written(name, before)
        state = "done" if done and whole else "again" if old.get("key") else "waiting"
        lines.append(f"{name:<16} {state:>11}")
        continue
      counts = self.counts(name, self._reusable_shards(name))
      made = [meta for part in self.parts(name) if (meta := self._meta(name, part))]
      left, whole = "-", counts.done == counts.shards
      if before and not whole:
        if made:
          rest = sum(meta["seconds"] for meta in made) / len(made) * (counts.shards - counts.done)
          total_left, left = total_left + rest, duration(rest)
        else:
          known, left = False, "?"
      columns = f"{counts.errors:>8,} {counts.retry:>8,} {len(made) - counts.done:>8,} {left:>8}"
      lines.append(f"{name:<16} {f'{counts.done}/{counts.shards}':>11} {counts.rows:>12,} {columns}")
      before = name
    lines.append(f"time left: {duration(total_left)}" + ("" if known else " and of unstarted steps") + " on one machine")
    return "\n".join(lines)


def _is_current(meta: dict[str, Any] | None, key: str) -> bool:
  return bool(meta) and meta.get("key") == key and not meta["retry"]


def _run_jobs(name: str, jobs: list[Job], pool: Pool, elsewhere: Made | None = None) -> Made:
  """Makes shards, or takes them from `elsewhere` (a cluster), and prints progress."""
  sizes = {job.context.part: shards.height(job.source) for job in jobs}
  progress, done = Progress(name, sum(sizes.values()), jobs[0].step.unit if jobs else ""), 0

  def here() -> Made:
    for job in jobs:
      job.context.pool, job.context.progress = pool, lambda rows: progress(done + rows)
      yield job.context.part, run_shard(*job)

  for part, meta in here() if elsewhere is None else elsewhere:
    done += sizes[part]
    progress(done)
    yield part, meta


def _plain(facts: Any) -> Any:
  return facts.write_csv() if isinstance(facts, pl.DataFrame) else facts


def _failed(table: str, title: str) -> tuple[int, int]:
  """(rows, rows that failed in a step with this title) of a shard."""
  counts = pl.len(), shards.failed_in(title).sum().alias("failed")
  return shards.with_failures(shards.scan(table)).select(counts).collect().row(0)


def _told_failures(step: Step, errors: int, retry: int, tables: list[str]) -> str:
  if not errors:
    return ""
  text = f", {errors:,} failed" + (f", {retry:,} of them are tried again by the next run" * bool(retry))
  if tables:
    failed = shards.scan_all(tables).filter(shards.failed_in(step.title)).select("path", "error").head(3)
    for path, error in failed.collect().iter_rows():
      text += f"\n  {shown(path)}: {shown(error)}"
  return text


def run_alone(name: str, step: Step, source: str, target: str, *, workers: int) -> str:
  """Runs one step on a table file, or on each unfinished shard in a folder. Returns the text to print."""
  tables = shards.tables_in(source)
  made = [target] if tables == [source] else [paths.join(target, os.path.basename(table)) for table in tables]
  with Pool(workers) as pool:
    if step.writes:
      if target.endswith(FORMATS):
        raise ValueError(f"-o {target}: {name} may write several files: give a folder")
      return step.write(tables, Context(paths.join(paths.absolute(target), name), "", pool=pool))[0]
    facts = step.gather(shards.scan_all(tables)) if step.gathers else None
    jobs, metas = [], []
    for a, b in zip(tables, made):
      key = digest([step.recipe(), shards.identity(a), _plain(facts), *states_beside(step, a)])
      old = _old_output(a, b)
      if _is_current(old, key):
        metas.append(old)
      else:
        jobs.append(Job(step, a, b, key, Context(os.path.splitext(paths.absolute(target))[0], os.path.basename(b), facts)))
    metas += [meta for _, meta in _run_jobs(name, jobs, pool)]
  counted = collections.Counter()
  for meta in metas:
    counted.update(meta["counts"])
  errors = sum(_failed(b, step.title)[1] - _failed(a, step.title)[1] for a, b in zip(tables, made)) if step.fails else 0
  text = f"{name}: {sum(map(shards.height, made)):,} rows of {sum(map(shards.height, tables)):,}: {target}"
  text += f"\n{told}" if (told := step.tell(dict(counted))) else ""
  return text + _told_failures(step, errors, sum(meta["retry"] for meta in metas), made)


def _old_output(source: str, target: str) -> dict[str, Any] | None:
  """Metadata of an earlier output, None without one. Raises ValueError if the target must not be written."""
  shards.refuse_overwriting(target, [source])
  if not target.endswith((".parquet", ".csv")):
    raise ValueError(f"{target}: the output's name must end in .parquet or .csv")
  meta = shards.read_meta(target) if target.endswith(".parquet") and paths.exists(target) else None
  if meta == {}:
    raise ValueError(f"{target} exists and was not written by this program: give another output")
  return meta
