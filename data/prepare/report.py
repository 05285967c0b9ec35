"""The report: one HTML file without any address in it, for a look at a table before and after filtering.

Counts per step, failures, histograms, what thresholds would remove, contact sheets of the best, worst and random clips of each
score: of the rows that came into the filter. Hours and the buckets of a training config: of those that it kept.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import importlib.util
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl

from data import paths, video
from data.command_line import OneLineParser
from data.prepare import caption, check
from data.prepare import config as configs
from data.prepare.cut import part_of, small_size
from data.prepare.selection import draw
from data.prepare.shards import digest, failed_in, refuse_overwriting, scan_all, tables_in
from data.prepare.steps import Context, Step, sizes_of
from data.prepare.workers import DEFAULT_LIMITS, Failure, Pool

_NEEDED = "the page needs `pip install -c constraints.txt -r requirements-prepare.txt` (jinja2)"
_BINS = 40
# Column -> (title, whether high values are the good ones, or None if there is no better). Numbers that have no place here, such
# as those of a user's scorer, are shown behind them.
MEASURES = {
  "duration": ("duration, seconds", None), "num_frames": ("frames", None), "fps": ("frames per second", None),
  "height": ("height, pixels", None), "width": ("width, pixels", None), "aspect_ratio": ("aspect ratio, height / width", None),
  "flow": ("motion (optical flow)", True), "sharpness": ("sharpness", True), "brightness": ("brightness", None),
  "black": ("share of black frames", False), "frozen": ("share of frozen frames", False),
  "letterbox": ("share of black bars", False), "text_area": ("share of text", False),
  "ocr": ("text boxes", False), "aes": ("aesthetic score", True),
  "match": ("text-video matching", True), "camera_x": ("how the picture moves, to the right", None),
  "camera_y": ("how the picture moves, down", None), "camera_zoom": ("camera zoom", None),
  "words": ("words of a caption", None), "text_len": ("tokens of a caption", None),
}  # fmt: skip
# Numbers of the pipeline that are no measures, and measures of files, which no sheet has to show.
_NO_MEASURES = ("bytes", "changed", "start", "end", "scene", "resolution", "rotation", "focus")
_NO_SHEETS = (
  "duration", "num_frames", "fps", "height", "width", "aspect_ratio", "camera_x", "camera_y", "camera_zoom", "words", "text_len"
)  # fmt: skip
_WORDS = 80  # frequent ones that are shown
_THRESHOLDS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9)  # shares of the rows that a threshold would remove
_SHOWN = 6  # clips of a contact sheet
_STRIP = 3  # frames of a clip in it
_SIDE = 90  # pixels


@dataclasses.dataclass(frozen=True)
class Report(Step):
  """Writes report.html.

  file: its name, in the run's folder unless it is a path. training: a training config whose buckets are shown.
  sheets: contact sheets of scores (clips are read again).
  """

  title: ClassVar[str] = "report"
  version: ClassVar[int] = 3
  needs: ClassVar[tuple[str, ...]] = ("path",)

  file: str = "report.html"
  training: str = ""
  sheets: bool = True

  def check(self) -> None:
    if importlib.util.find_spec("jinja2") is None:
      raise ValueError(_NEEDED)
    self._stages()

  def _stages(self) -> dict[str, Any]:
    """Data settings of the training's stages."""
    return check.stages(configs.load(self.training), "table") if self.training else {}

  def recipe(self) -> dict[str, Any]:
    settings = {name: dataclasses.asdict(stage) for name, stage in self._stages().items()}
    return {**super().recipe(), "training": digest(json.loads(json.dumps(settings, default=str)))}

  def write(self, tables: list[str], context: Context) -> tuple[str, list[str]]:
    target = paths.join(os.path.dirname(context.folder) if context.folder else "", self.file)
    page = build(
      tables, unselected=context.unselected, history=context.history, training=self.training,
      pool=context.pool if self.sheets else None,
    )  # fmt: skip
    paths.write_text(target, page)
    return target, [target]


def build(
  tables: list[str], *, unselected: tuple = (), history: tuple = (), training: str = "", pool: Pool | None = None
) -> str:
  """The page.

  Args:
    tables: of what is kept.
    unselected: tables that came into each filter. A column is shown of the first ones in which it has values: scores of all
      rows that were scored, captions of those that were captioned.
    history: (step, rows in, rows, failed, seconds, what it tells) of each step.
    training: a training config whose buckets are shown.
    pool: who reads clips, None for no sheets.
  """
  try:
    import jinja2
  except ImportError:
    raise ValueError(_NEEDED) from None
  stages = [scan_all(files) for files in (*unselected, tables)]
  fine = [stage.filter(pl.col("error").is_null()) for stage in stages]
  numbers = (name for table in fine for name, kind in table.collect_schema().items() if kind.is_numeric())
  names = [name for name in dict.fromkeys((*MEASURES, *numbers)) if name not in _NO_MEASURES]
  measured = [found for name in names if (found := _measured(fine, name))]
  sheets = [_sheet(rows, m, pool) for m, rows in measured if m["name"] not in _NO_SHEETS] if pool else []
  if unselected:
    _add_captions(sheets, fine[-1])
  environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
  environment.filters |= {"number": number, "seconds": lambda s: f"{s:,.0f} s"}
  return environment.from_string(Path(__file__).with_name("report.html").read_text()).render(
    title=_title(tables[0]), rows=_height(stages[0]), copies=sum(_height(s.filter(failed_in("duplicates"))) for s in stages),
    failed=sum(_height(s.filter(pl.col("error").is_not_null() & ~failed_in("duplicates"))) for s in stages),
    kept=_height(fine[-1]) if unselected else None, history=history, measures=[m for m, _ in measured],
    failures=_failures(stages), classes=_classes(fine), words=_words(fine), sheets=[s for s in sheets if s["rows"]],
    hours=_hours(fine[-1]), buckets=_buckets(tables, training) if training else [], training=training,
  )  # fmt: skip


def _height(table: pl.LazyFrame) -> int:
  return table.select(pl.len()).collect(engine="streaming").item()


def _measured(stages: list[pl.LazyFrame], name: str) -> tuple[dict[str, Any], pl.LazyFrame] | None:
  """`measure` of the first of some tables in which the column has values, and that table; None if there is none."""
  for table in stages:
    if name in table.collect_schema() and (found := measure(table, name)):
      return found, table
  return None


def _add_captions(sheets: list[dict[str, Any]], kept: pl.LazyFrame) -> None:
  """To clips of a table of before they were captioned, those that came later, by `id`."""
  clips = [clip for sheet in sheets for row in sheet["rows"] for clip in row["clips"]]
  if clips and {"id", "text"} <= {*kept.collect_schema()}:
    of_these = kept.filter(pl.col("id").is_in([clip.get("id") for clip in clips])).select("id", "text")
    texts = dict(of_these.collect(engine="streaming").iter_rows())
    for clip in clips:
      clip["text"] = texts.get(clip.get("id"), clip.get("text"))


def _title(table: str) -> str:
  """What the page is called: a table, or the folder of the run whose step has the shards."""
  folder, name = os.path.split(paths.absolute(table))
  return os.path.basename(os.path.dirname(folder)) if name.startswith("part-") else name


def number(value: float | int | None) -> str:
  """Three significant digits, thousands marked."""
  if value is None or (isinstance(value, float) and not math.isfinite(value)):
    return "-"
  return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"


def measure(table: pl.LazyFrame, name: str) -> dict[str, Any] | None:
  """Histogram and thresholds of a column: bins between its 0.1 and 99.9 percentiles, what lies outside in the outer ones;
  conditions that remove about the shares `_THRESHOLDS` of its values, each with what it removes of all rows."""
  column = pl.col(name).cast(pl.Float64)
  column = pl.when(column.is_finite()).then(column)
  ranks = (0.001, *_THRESHOLDS, 0.999)
  facts = table.select(
    count=column.count(), missing=column.is_null().sum(), mean=column.mean(), least=column.min(), most=column.max(),
    **{f"q{q}": column.quantile(q) for q in sorted({*ranks, *(round(1 - q, 3) for q in _THRESHOLDS)})},
  ).collect(engine="streaming").row(0, named=True)  # fmt: skip
  if not facts["count"]:
    return None
  low, high = facts["q0.001"], facts["q0.999"]
  high = high if high > low else low + 1.0
  place = ((column - low) / (high - low) * _BINS).floor().clip(0, _BINS - 1).cast(pl.Int64)
  found = dict(table.select(b=place).drop_nulls().group_by("b").len().collect(engine="streaming").iter_rows())
  heights = [found.get(i, 0) for i in range(_BINS)]
  title, better = MEASURES.get(name, (name.replace("_", " "), None))
  side = better is not False  # thresholds cut off low values, or, where these are the good ones, high ones
  # Of values that many rows have several shares may be cut off by one threshold, or none: what counts is what it removes.
  values = list(dict.fromkeys(facts[f"q{q if side else round(1 - q, 3)}"] for q in _THRESHOLDS))
  kept = table.select((column >= v if side else column <= v).sum().alias(str(i)) for i, v in enumerate(values))
  rows = facts["count"] + facts["missing"]
  shares = [1 - k / rows for k in kept.collect(engine="streaming").row(0)]
  cuts = [{"share": share, "value": value} for share, value in zip(shares, values)]
  return {
    "name": name, "title": title, "better": better, "count": facts["count"], "missing": facts["missing"], "mean": facts["mean"],
    "least": facts["least"], "most": facts["most"], "low": low, "high": high, "sign": ">=" if side else "<=", "cuts": cuts,
    "bars": [{"x": i, "h": 100 * h / max(heights), "count": h, "from": low + (high - low) * i / _BINS,
              "to": low + (high - low) * (i + 1) / _BINS}
             for i, h in enumerate(heights)],
  }  # fmt: skip


def _failures(stages: list[pl.LazyFrame]) -> list[dict[str, Any]]:
  """Reasons with numbers and an example, the most frequent first. No row fails in two of the tables: a filter takes it away."""
  # Names of files and numbers differ where the reason is the same.
  reason = pl.col("error").str.replace(r"(^|\s)(gs:/)?/.*", "${1}...").str.replace(r"(caption file) .* (is|has) ", "$1 ... $2 ")
  reason = reason.str.replace_all(r"\d+", "N").str.slice(0, 80).alias("reason")
  failed = pl.concat(s.filter(pl.col("error").is_not_null()).select(reason, "path", "retry") for s in stages)
  found = failed.group_by("reason").agg(pl.len().alias("count"), pl.col("path").first(), pl.col("retry").any())
  return found.sort("count", "reason", descending=True).head(30).collect().to_dicts()


def _classes(stages: list[pl.LazyFrame]) -> list[tuple[str, list[dict]]]:
  """(title, values with counts) of columns of words, each in the first of some tables that has it."""
  titles = {"cmotion": "camera motion", "codec": "codec", "split": "split"}
  found = []
  for name, title in titles.items():
    having = [table for table in stages if name in table.collect_schema()]
    if having:
      counted = having[0].group_by(pl.col(name).cast(pl.String).fill_null("-").alias("value")).len()
      ordered = counted.sort("len", "value", descending=[True, False]).head(20)
      found.append((title, ordered.collect(engine="streaming").to_dicts()))
  return found


def _words(stages: list[pl.LazyFrame]) -> list[dict[str, Any]]:
  """The words of at least four letters that most captions of the last table with any have, with how many these are."""
  having = [t for t in stages if t.collect_schema().get("text") == pl.String]
  if not having:
    return []
  words = having[-1].select(word=pl.col("text").str.to_lowercase().str.extract_all(r"\p{L}{4,}").list.unique())
  counted = words.explode("word").drop_nulls().group_by("word").len()
  return counted.sort("len", "word", descending=[True, False]).head(_WORDS).collect(engine="streaming").to_dicts()


def _hours(table: pl.LazyFrame) -> float | None:
  if "duration" not in table.collect_schema():
    return None
  return table.select(pl.col("duration").cast(pl.Float64).sum() / 3600).collect(engine="streaming").item()


def _sheet(table: pl.LazyFrame, found: dict[str, Any], pool: Pool) -> dict[str, Any]:
  """Best, worst and random clips of a score (or highest and lowest ones), each with a strip of frames."""
  name, high = found["name"], found["better"] is not False
  if not {"num_frames", "height", "width"} <= {*table.collect_schema()}:
    return {"title": found["title"], "rows": []}
  columns = [c for c in ("path", "text", "num_frames", "height", "width", "start", "crop", "id", "bytes")
             if c in table.collect_schema()]  # fmt: skip
  scored = table.filter(pl.col(name).is_not_null()).select(pl.col(name).alias("score"), *columns)
  best, worst = ("highest", "lowest") if found["better"] is None else ("best", "worst")
  picks = [
    (best, scored.top_k(_SHOWN, by="score", reverse=not high)),
    (worst, scored.top_k(_SHOWN, by="score", reverse=high)),
    ("random", scored.with_columns(_d=draw(scored, 0)).top_k(_SHOWN, by="_d").drop("_d")),
  ]
  rows = []
  for kind, pick in picks:
    clips = pick.collect(engine="streaming").to_dicts()
    strips = pool.map(strip, clips, sizes=sizes_of(clips))
    made = [{**clip, "image": None if isinstance(s, Failure) else s} for clip, s in zip(clips, strips)]
    if made:
      rows.append({"kind": kind, "clips": made})
  return {"title": found["title"], "rows": rows}


def strip(row: dict[str, Any], report: Callable) -> str:
  """In a worker: frames of a clip side by side as a data address."""
  frames = row["num_frames"]
  numbers = sorted({int((i + 0.5) * frames / _STRIP) for i in range(_STRIP)})
  crop, height, width = part_of(row)
  size = small_size(height, width, _SIDE)
  images = video.read_frames(row["path"], np.array(numbers) + (row.get("start") or 0), size=size, crop=crop)
  return "data:image/jpeg;base64," + base64.b64encode(caption.as_jpeg(np.concatenate(list(images), 1))).decode()


def _buckets(tables: list[str], training: str) -> list[dict[str, Any]]:
  """[{stage, report or reason}] of a training config on the table."""
  found = []
  with tempfile.TemporaryDirectory() as folder:
    joined = os.path.join(folder, "table.parquet")
    table = scan_all(tables).filter(pl.col("error").is_null())
    needed = [c for c in ("path", "text", "num_frames", "height", "width", "fps", "start", "end", "crop")
              if c in table.collect_schema()]  # fmt: skip
    table.select(needed).sink_parquet(joined)
    for name, settings in check.stages(configs.load(training), joined).items():
      try:
        found.append({"stage": name, "report": check.preview(settings, folder), "reason": ""})
      except ValueError as error:
        found.append({"stage": name, "report": None, "reason": str(error).replace(joined, "the table")})
  return found


def main(arguments: list[str]) -> int:
  """The command; returns its exit code."""
  parser = OneLineParser(
    prog="python -m data.prepare report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("input", help="a table, or a folder of parquet shards")
  parser.add_argument("-o", "--output", default="report.html")
  parser.add_argument("--config", default="", help="training config whose buckets are shown")
  parser.add_argument("--no-sheets", action="store_true", help="read no clip")
  parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
  options = parser.parse_args(arguments)
  tables = [options.input]
  if paths.is_folder(options.input):
    tables = tables_in(options.input)
  if not tables or not all(paths.exists(t) for t in tables):
    raise ValueError(f"{options.input} is no table and no folder of parquet shards")
  refuse_overwriting(options.output, [*tables, options.config])
  with Pool(options.workers, DEFAULT_LIMITS) as pool:
    paths.write_text(options.output, build(tables, training=options.config, pool=None if options.no_sheets else pool))
  print(options.output)
  return 0
