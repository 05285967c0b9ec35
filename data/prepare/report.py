"""The report: one HTML file, without links, about a table before and after filtering.

For the rows before the filter it shows counts per step, failures, histograms, the effect of thresholds, and contact sheets of
the best, worst and random clips of each score. For the rows after the filter, it shows hours and the buckets of a training
config.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import itertools
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
from data.command_line import flag, parse
from data.prepare import caption, check
from data.prepare import config as configs
from data.prepare.cut import part_of, small_size
from data.prepare.decode import spread
from data.prepare.selection import draw
from data.prepare.shards import failed_in, refuse_overwriting, row_count, scan_all, tables_in
from data.prepare.steps import Context, Step, sizes_of
from data.prepare.workers import CORES, Failure, Pool
from data.shards import digest

_NEEDED = "the report needs `pip install -c constraints.txt -r requirements-prepare.txt` (jinja2)"
_BINS = 40
# Column -> (title, True: high values are good, False: low values are good, None: neither). Other columns of numbers, such as
# those of a user's scorer, follow.
MEASURES = {
  "duration": ("duration, seconds", None), "num_frames": ("frames", None), "fps": ("frames per second", None),
  "height": ("height, pixels", None), "width": ("width, pixels", None), "aspect_ratio": ("aspect ratio, height / width", None),
  "flow": ("motion (optical flow)", True), "sharpness": ("sharpness", True), "brightness": ("brightness", None),
  "black": ("share of black frames", False), "frozen": ("share of frozen frames", False),
  "letterbox": ("share of black bars", False), "text_area": ("share of text", False),
  "ocr": ("text boxes", False), "aes": ("aesthetic score", True),
  "match": ("text-video matching", True), "camera_x": ("motion of the image to the right", None),
  "camera_y": ("motion of the image down", None), "camera_zoom": ("camera zoom", None),
  "words": ("words of a caption", None), "text_len": ("tokens of a caption", None),
}  # fmt: skip
# Numbers that are no measures, and measures without a contact sheet.
_NO_MEASURES = ("bytes", "changed", "start", "end", "scene", "resolution", "rotation", "focus")
_NO_SHEETS = (
  "duration", "num_frames", "fps", "height", "width", "aspect_ratio", "camera_x", "camera_y", "camera_zoom", "words", "text_len"
)  # fmt: skip
_WORDS = 80  # frequent words that are shown
_THRESHOLDS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9)  # shares of the rows that a threshold would remove
_SHOWN = 6  # clips per row of a contact sheet
_STRIP = 3  # frames of each clip
_SIDE = 90  # pixels of a frame's shorter side
_CLIP = ("path", "text", "num_frames", "height", "width", "start", "crop")  # columns that a clip is read by


@dataclasses.dataclass(frozen=True)
class Report(Step):
  """Writes report.html.

  file: path of the report, relative to the run's folder. training: training config whose buckets the report shows.
  sheets: whether it has contact sheets of the scores, for which clips are read again.
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
    """Data settings of the stages of the training config."""
    return check.stages(configs.load(self.training), "table") if self.training else {}

  def recipe(self) -> dict[str, Any]:
    settings = {name: dataclasses.asdict(stage) for name, stage in self._stages().items()}
    return {**super().recipe(), "training": digest(json.loads(json.dumps(settings, default=str)))}

  def write(self, tables: list[str], context: Context) -> tuple[str, list[str]]:
    target = paths.join(os.path.dirname(context.folder) if context.folder else "", self.file)
    paths.write_text(target, build(self, tables, context))
    return target, [target]


def build(step: Report, tables: list[str], context: Context) -> str:
  """The page as HTML. It takes each column from the earliest table in which the column has values.

  The tables are the inputs of the filters in order, then `tables`. So the page shows scores and captions also of rows that a
  later filter removes.
  """
  import jinja2

  unselected, training, pool = context.unselected, step.training, context.pool if step.sheets else None
  stages = [scan_all(files) for files in (*unselected, tables)]
  fine = [stage.filter(pl.col("error").is_null()) for stage in stages]
  numbers = (name for table in fine for name, kind in table.collect_schema().items() if kind.is_numeric())
  names = [name for name in dict.fromkeys((*MEASURES, *numbers)) if name not in _NO_MEASURES]
  measured = []
  for name in names:
    with_values = ((found, table) for table in _having(fine, name) if (found := measure(table, name)))
    measured += itertools.islice(with_values, 1)
  sheets = [_sheet(rows, m, pool) for m, rows in measured if m["name"] not in _NO_SHEETS] if pool else []
  if unselected:
    _add_captions(sheets, fine[-1])
  seconds = [table.select(pl.col("duration").cast(pl.Float64).sum()) for table in _having(fine[-1:], "duration")]
  hours = seconds[0].collect(engine="streaming").item() / 3600 if seconds else None
  environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
  environment.filters |= {"number": number, "seconds": lambda s: f"{s:,.0f} s"}
  return environment.from_string(Path(__file__).with_name("report.html").read_text()).render(
    title=_title(tables[0]), rows=row_count(stages[0]),
    copies=sum(row_count(s.filter(failed_in("duplicates"))) for s in stages),
    failed=sum(row_count(s.filter(pl.col("error").is_not_null() & ~failed_in("duplicates"))) for s in stages),
    kept=row_count(fine[-1]) if unselected else None, history=context.history, measures=[m for m, _ in measured],
    failures=_failures(stages), classes=_classes(fine), words=_words(fine), sheets=[s for s in sheets if s["rows"]],
    hours=hours, buckets=_buckets(tables, training) if training else [], training=training,
  )  # fmt: skip


def _having(stages: list[pl.LazyFrame], name: str) -> list[pl.LazyFrame]:
  return [table for table in stages if name in table.collect_schema()]


def _add_captions(sheets: list[dict[str, Any]], kept: pl.LazyFrame) -> None:
  """Adds the later captions, by `id`, to clips that were read from a table before captioning."""
  clips = [clip for sheet in sheets for row in sheet["rows"] for clip in row["clips"]]
  if clips and {"id", "text"} <= {*kept.collect_schema()}:
    of_these = kept.filter(pl.col("id").is_in([clip.get("id") for clip in clips])).select("id", "text")
    texts = dict(of_these.collect(engine="streaming").iter_rows())
    for clip in clips:
      clip["text"] = texts.get(clip.get("id"), clip.get("text"))


def _title(table: str) -> str:
  """Title of the page: the table, or the run's folder if the table is a shard of a step."""
  folder, name = os.path.split(paths.absolute(table))
  return os.path.basename(os.path.dirname(folder)) if name.startswith("part-") else name


def number(value: float | int | None) -> str:
  """A number with three significant digits and thousands separators, "-" for none."""
  if value is None or (isinstance(value, float) and not math.isfinite(value)):
    return "-"
  return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"


def measure(table: pl.LazyFrame, name: str) -> dict[str, Any] | None:
  """Histogram and thresholds of a column, None if it has no values.

  The bins lie between the 0.1 and 99.9 percentiles, and the outer bins also hold the values beyond. Each share in
  `_THRESHOLDS` gives a threshold that removes about this share of the values. The exact share is counted.
  """
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
  cut_low = better is not False  # thresholds remove low values, or high ones if low values are good
  # If many rows have one value, one threshold stands for several shares. So the removed rows are counted.
  values = list(dict.fromkeys(facts[f"q{q if cut_low else round(1 - q, 3)}"] for q in _THRESHOLDS))
  kept = table.select((column >= v if cut_low else column <= v).sum().alias(str(i)) for i, v in enumerate(values))
  rows = facts["count"] + facts["missing"]
  shares = [1 - k / rows for k in kept.collect(engine="streaming").row(0)]
  cuts = [{"share": share, "value": value} for share, value in zip(shares, values)]
  return {
    "name": name, "title": title, "better": better, "count": facts["count"], "missing": facts["missing"], "mean": facts["mean"],
    "least": facts["least"], "most": facts["most"], "low": low, "high": high, "sign": ">=" if cut_low else "<=", "cuts": cuts,
    "bars": [{"x": i, "h": 100 * h / max(heights), "count": h, "from": low + (high - low) * i / _BINS,
              "to": low + (high - low) * (i + 1) / _BINS}
             for i, h in enumerate(heights)],
  }  # fmt: skip


def _failures(stages: list[pl.LazyFrame]) -> list[dict[str, Any]]:
  """Reasons with counts and an example, the most frequent first. A row fails in one table only, since filters remove it."""
  # The same reason may come with different file names and numbers.
  reason = pl.col("error").str.replace(r"(^|\s)(gs:/)?/.*", "${1}...").str.replace(r"(caption file) .* (is|has) ", "$1 ... $2 ")
  reason = reason.str.replace_all(r"\d+", "N").str.slice(0, 80).alias("reason")
  failed = pl.concat(s.filter(pl.col("error").is_not_null()).select(reason, "path", "retry") for s in stages)
  found = failed.group_by("reason").agg(pl.len().alias("count"), pl.col("path").first(), pl.col("retry").any())
  return found.sort("count", "reason", descending=True).head(30).collect().to_dicts()


def _classes(stages: list[pl.LazyFrame]) -> list[tuple[str, list[dict]]]:
  """(title, values with counts) of text columns, each in the first table that has it."""
  found = []
  for name, title in (("cmotion", "camera motion"), ("codec", "codec"), ("split", "split")):
    for table in _having(stages, name)[:1]:
      counted = table.group_by(pl.col(name).cast(pl.String).fill_null("-").alias("value")).len()
      ordered = counted.sort("len", "value", descending=[True, False]).head(20)
      found.append((title, ordered.collect(engine="streaming").to_dicts()))
  return found


def _words(stages: list[pl.LazyFrame]) -> list[dict[str, Any]]:
  """The most frequent words with at least four letters, with the number of captions, in the last table with captions."""
  having = [t for t in stages if t.collect_schema().get("text") == pl.String]
  if not having:
    return []
  words = having[-1].select(word=pl.col("text").str.to_lowercase().str.extract_all(r"\p{L}{4,}").list.unique())
  counted = words.explode("word").drop_nulls().group_by("word").len()
  return counted.sort("len", "word", descending=[True, False]).head(_WORDS).collect(engine="streaming").to_dicts()


def _sheet(table: pl.LazyFrame, found: dict[str, Any], pool: Pool) -> dict[str, Any]:
  """Best, worst and random clips of a score, or highest, lowest and random ones, each with a strip of frames."""
  name, high = found["name"], found["better"] is not False
  if not {"num_frames", "height", "width"} <= {*table.collect_schema()}:
    return {"title": found["title"], "rows": []}
  columns = [c for c in (*_CLIP, "id", "bytes") if c in table.collect_schema()]
  scored = table.filter(pl.col(name).is_not_null()).select(pl.col(name).alias("score"), *columns)
  best, worst = ("highest", "lowest") if found["better"] is None else ("best", "worst")
  picks = [
    (best, scored.top_k(_SHOWN, by="score", reverse=not high)),
    (worst, scored.top_k(_SHOWN, by="score", reverse=high)),
    ("random", scored.with_columns(_d=draw(scored, 0)).top_k(_SHOWN, by="_d").drop("_d")),
  ]
  rows = [{"kind": kind, "clips": pick.collect(engine="streaming").to_dicts()} for kind, pick in picks]
  for row in rows:
    for clip, made in zip(row["clips"], pool.map(strip, row["clips"], sizes=sizes_of(row["clips"]))):
      clip["image"] = None if isinstance(made, Failure) else made
  return {"title": found["title"], "rows": [row for row in rows if row["clips"]]}


def strip(row: dict[str, Any], report: Callable) -> str:
  """In a worker: frames of a clip side by side, as a data URL."""
  crop, height, width = part_of(row)
  numbers = spread(row["num_frames"], _STRIP) + (row.get("start") or 0)
  images = video.read_frames(row["path"], numbers, size=small_size(height, width, _SIDE), crop=crop)
  return "data:image/jpeg;base64," + base64.b64encode(caption.as_jpeg(np.concatenate(list(images), 1))).decode()


def _buckets(tables: list[str], training: str) -> list[dict[str, Any]]:
  """[{stage, report, reason}] of a training config on the table; without a report there is a reason."""
  found = []
  with tempfile.TemporaryDirectory() as folder:
    joined = os.path.join(folder, "table.parquet")
    table = scan_all(tables).filter(pl.col("error").is_null())
    needed = [c for c in (*_CLIP, "fps", "end") if c in table.collect_schema()]
    table.select(needed).sink_parquet(joined)
    for name, settings in check.stages(configs.load(training), joined).items():
      try:
        found.append({"stage": name, "report": check.preview(settings, folder), "reason": ""})
      except ValueError as error:
        found.append({"stage": name, "report": None, "reason": str(error).replace(joined, "the table")})
  return found


@dataclasses.dataclass(frozen=True)
class Settings:
  input: str = flag("a table, or a folder of parquet shards", None, "input")
  output: str = flag("file to write (default: %(default)s)", "report.html", "-o", "--output")
  config: str = flag("training config whose buckets the report shows", "")
  no_sheets: bool = flag("no contact sheets; read no clip", False)
  workers: int = flag("processes (default: all cores)", CORES)


def main(arguments: list[str]) -> int:
  settings = parse(Settings, "python -m data.prepare report", arguments, __doc__)
  tables = tables_in(settings.input)
  refuse_overwriting(settings.output, [*tables, settings.config])
  step = Report(training=settings.config, sheets=not settings.no_sheets)
  step.check()
  with Pool(settings.workers) as pool:
    paths.write_text(settings.output, build(step, tables, Context("", "", pool=pool)))
  print(settings.output)
  return 0
