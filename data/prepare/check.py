"""Reads every clip of a table as the training's loader does, and shows the rows of each bucket.

Exit code 0: all clips can be read. 1: some can't, or no row fits a stage. 2: the command is wrong.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import tempfile
from typing import Any

import numpy as np

from data import loader, paths, plan, sources
from data.command_line import flag, parse
from data.config import DataConfig
from data.prepare import config as configs
from data.prepare.messages import shown
from data.prepare.shards import refuse_overwriting
from data.prepare.workers import CORES, Failure, Pool
from data.shards import Progress

_LISTED = 20  # broken rows that are printed
_TOGETHER = 10_000  # rows that are in memory as Python objects


@dataclasses.dataclass(frozen=True)
class Settings:
  table: str = flag("training table (.parquet, .csv, .jsonl)", None, "table")
  config: str = flag("training config, such as configs/film.py", required=True)
  stage: str = flag("one stage of the config (default: all stages with different data)", "")
  sample: int = flag("read this number of clips, drawn at random (default: all clips)", 0)
  buckets_only: bool = flag("only show the buckets; read no clip", False)
  bad: str = flag("csv file to write with the broken rows: row, path, reason", "")
  workers: int = flag("processes (default: all cores)", CORES)


def stages(values: dict[str, Any], table: str) -> dict[str, DataConfig]:
  """{stage: data settings} of a training config, with `table` as their table. Skips repeated settings."""
  if not isinstance(values.get("data"), dict):
    raise ValueError("--config: no `data` in this file, so it is no training config. Give one such as configs/film.py")
  found: dict[str, DataConfig] = {}
  for i, stage in enumerate(values.get("stages") or ({},)):
    own = {k.removeprefix("data."): v for k, v in stage.items() if k.startswith("data.")}
    settings = DataConfig.create({**values["data"], **own, "tables": (table,)})
    if settings not in found.values():
      found[stage.get("name", f"stage {i + 1}")] = settings
  return found


def preview(settings: DataConfig, folder: str) -> plan.BucketReport:
  """Rows per bucket, steps of the first epoch, dropped rows with the reasons. Raises ValueError if no row fits."""
  return plan.PlanSequence(sources.open_table(settings, folder), settings, folder).report(0)


def _read(decoder: loader.RowDecoder, element: tuple, report: Any) -> str:
  """In a worker: why the clip can't be read, or ""."""
  return str(decoder(element).get("error") or "")


def broken_rows(settings: DataConfig, folder: str, *, sample: int, pool: Pool) -> tuple[list[tuple[int, str, str]], int]:
  """Reads all clips that fit a bucket, or `sample` of them, in worker processes -> ([(row, path, reason)], clips read)."""
  # Probability 1 in all buckets: a later epoch may use a row that epoch 0 skips.
  buckets = tuple((b.resolution, b.num_frames, 1.0, 1) for b in settings.parsed_buckets())
  settings = dataclasses.replace(settings, buckets=buckets, reference_devices=1, drop_last=False)
  table = sources.open_table(settings, folder)
  epoch = plan.PlanSequence(table, settings, folder).plan(0)
  slots = np.arange(epoch.num_slots)
  if sample and sample < len(slots):
    slots = np.sort(np.random.default_rng(0).choice(slots, sample, replace=False))
  progress, found, read = Progress("check", len(slots), "clips"), [], 0
  function = functools.partial(_read, loader.RowDecoder(settings, table, None))
  for begin in range(0, len(slots), _TOGETHER):
    elements = [(0, int(slot), *epoch.slot(int(slot))[:3]) for slot in slots[begin : begin + _TOGETHER]]
    results = pool.map(function, elements, progress=lambda done, read=read: progress(read + done))
    for (_, _, slot_row, _, _), result in zip(elements, results):
      if reason := result.reason if isinstance(result, Failure) else result:
        found.append((table.locate(slot_row)[1], table.row(slot_row).path, reason))
    read += len(elements)
  return found, read


def main(arguments: list[str]) -> int:
  settings = parse(Settings, "python -m data.prepare check", arguments, __doc__)
  broken, empty = {}, False  # {row: (path, reason)}
  sources.check_table(settings.table)
  refuse_overwriting(settings.bad or "", [settings.table, settings.config])
  found = stages(configs.load(settings.config), settings.table)
  if settings.stage and settings.stage not in found:
    raise ValueError(f"--stage {settings.stage}: the stages with different data are {', '.join(found)}")
  with tempfile.TemporaryDirectory() as folder, Pool(settings.workers) as pool:
    for name in [settings.stage] if settings.stage else found:
      try:
        print(f"{name}:\n{preview(dataclasses.replace(found[name], stage=name), folder)}\n", flush=True)
      except ValueError as error:
        print(f"{name}: {error}\n", flush=True)
        empty = True
        continue
      if not settings.buckets_only:
        bad, read = broken_rows(found[name], folder, sample=settings.sample, pool=pool)
        broken |= {row: (path, reason) for row, path, reason in bad}
        print(f"{name}: {read:,} clips read, {len(bad):,} broken", flush=True)
  for row, (path, reason) in sorted(broken.items())[:_LISTED]:
    print(f"  row {row + 1}: {shown(path)}: {shown(reason)}")
  if len(broken) > _LISTED:
    print(f"  and {len(broken) - _LISTED:,} more" + ("" if settings.bad else "; --bad FILE lists all"))
  if settings.bad:
    with paths.whole(settings.bad) as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
      csv.writer(f).writerows([("row", "path", "reason"), *((r + 1, *broken[r]) for r in sorted(broken))])
  return 1 if broken or empty else 0
