"""`check`: reads every clip of a table as the training's loader would, and says which buckets they fill.

Exit code 0: all can be read; 1: some can't, or no row fits a stage; 2: the command is wrong.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import os
import tempfile
from typing import Any

import numpy as np

from data import config as data_config
from data import loader, paths, plan, sources
from data.command_line import OneLineParser
from data.prepare import config as configs
from data.prepare.messages import Progress, shown
from data.prepare.shards import refuse_overwriting
from data.prepare.workers import DEFAULT_LIMITS, Failure, Pool

_LISTED = 20  # broken rows that are printed


def stages(values: dict[str, Any], table: str) -> dict[str, data_config.DataConfig]:
  """{name: data settings} of the stages of a training config, with `table` for their tables; those with equal ones once."""
  if not isinstance(values.get("data"), dict):
    raise ValueError("--config is no training config: it has no `data`")
  found: dict[str, data_config.DataConfig] = {}
  for i, stage in enumerate(values.get("stages") or ({},)):
    own = {k.removeprefix("data."): v for k, v in stage.items() if k.startswith("data.")}
    settings = data_config.DataConfig.create({**values["data"], **own, "tables": (table,)})
    if settings not in found.values():
      found[stage.get("name", f"stage {i + 1}")] = settings
  return found


def preview(settings: data_config.DataConfig, folder: str) -> plan.BucketReport:
  """Rows per bucket, steps of the first epoch, what is dropped and why. ValueError if no row fits."""
  return plan.PlanSequence(sources.open_table(settings, folder), settings, folder).report(0)


def _all_rows(settings: data_config.DataConfig) -> data_config.DataConfig:
  """The same with every row that fits: whatever probabilities leave out of one epoch comes in another."""
  buckets = [dataclasses.replace(b, keep_prob=1.0, duration_prob=None, batch_size=1) for b in settings.parsed_buckets()]
  return dataclasses.replace(settings, buckets=tuple(buckets), reference_devices=1, drop_last=False)


def _read(decoder: loader.RowDecoder, element: tuple, report: Any) -> str:
  """In a worker: why the clip can't be read, "" if it can."""
  return str(decoder(element).get("error") or "")


def broken_rows(
  settings: data_config.DataConfig, folder: str, *, sample: int, pool: Pool
) -> tuple[list[tuple[int, str, str]], int]:
  """([(row, path, reason)], clips read): reads all clips that fit a bucket, or `sample` of them, in worker processes."""
  settings = _all_rows(settings)
  table = sources.open_table(settings, folder)
  epoch = plan.PlanSequence(table, settings, folder).plan(0)
  slots = np.arange(epoch.num_slots)
  if sample and sample < len(slots):
    slots = np.sort(np.random.default_rng(0).choice(slots, sample, replace=False))
  progress, found, read = Progress("check", len(slots), "clips"), [], 0
  function = functools.partial(_read, loader.RowDecoder(settings, table, None))
  for begin in range(0, len(slots), 10_000):  # ten million elements are not made at once
    part = [(slot, *epoch.slot(int(slot))[:3]) for slot in slots[begin : begin + 10_000]]
    elements = [(0, int(slot), slot_row, key, bucket) for slot, slot_row, key, bucket in part]
    results = pool.map(function, elements, progress=lambda done, read=read: progress(read + done))
    for (_, slot_row, _, _), result in zip(part, results):
      reason = result.reason if isinstance(result, Failure) else result
      if reason:
        found.append((table.locate(slot_row)[1], table.row(slot_row).path, reason))
    read += len(part)
  return found, read


def main(arguments: list[str]) -> int:
  """The command; returns its exit code."""
  parser = OneLineParser(
    prog="python -m data.prepare check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("table", help="training table (.parquet, .csv, .jsonl)")
  parser.add_argument("--config", required=True, help="training config, such as configs/film.py")
  parser.add_argument("--stage", help="of that config (default: all whose data differ)")
  parser.add_argument("--sample", type=int, default=0, help="read only so many clips, drawn at random (default: all)")
  parser.add_argument("--buckets-only", action="store_true", help="read no clip")
  parser.add_argument("--bad", help="csv file for the broken rows: row, path, reason")
  parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
  options = parser.parse_args(arguments)
  broken: dict[int, tuple[str, str]] = {}
  empty = False
  with tempfile.TemporaryDirectory() as folder, Pool(options.workers, DEFAULT_LIMITS) as pool:
    sources.check_table(options.table)
    refuse_overwriting(options.bad or "", [options.table, options.config])
    found = stages(configs.load(options.config), options.table)
    if options.stage and options.stage not in found:
      raise ValueError(f"--stage {options.stage}: stages with data of their own are {', '.join(found)}")
    for name, settings in found.items():
      if options.stage and name != options.stage:
        continue
      try:
        print(f"{name}:\n{preview(settings, folder)}\n", flush=True)
      except ValueError as error:
        print(f"{name}: {error}\n", flush=True)
        empty = True
        continue
      if not options.buckets_only:
        bad, read = broken_rows(settings, folder, sample=options.sample, pool=pool)
        broken |= {row: (path, reason) for row, path, reason in bad}
        print(f"{name}: {read:,} clips read, {len(bad):,} broken", flush=True)
  for row, (path, reason) in sorted(broken.items())[:_LISTED]:
    print(f"  row {row + 1}: {shown(path)}: {shown(reason)}")
  if len(broken) > _LISTED:
    print(f"  and {len(broken) - _LISTED:,} more" + ("" if options.bad else "; --bad FILE lists all"))
  if options.bad:
    with paths.whole(options.bad) as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
      csv.writer(f).writerows([("row", "path", "reason"), *((r + 1, *broken[r]) for r in sorted(broken))])
  return 1 if broken or empty else 0
