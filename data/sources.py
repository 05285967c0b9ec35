"""Turns metadata tables (parquet, csv, jsonl) into memory-mapped Arrow files, which every worker opens by path.

Needed columns, as in Open-Sora: `path`, `text`, `num_frames`, `height`, `width`. Optional columns:

  fps, aes, flow, cmotion   as in Open-Sora
  start, end                the clip is frames [start, end) of the file; num_frames may be the length of the file or of the clip
  crop                      "x,y,width,height" or a list, in pixels of the displayed frame
  text_2, text_3...         more captions; `text` may also be a list
  text_features             a safetensors file with the caption's embedding `y` [L, C]
  label                     a class, a whole number from 0

Tables and their files may lie in gs://, or be drawn (`data.shapes`). Rows with network addresses are refused, unless the
environment variable STDIT_JAX_SCHEMES allows their scheme. Relative paths start at the table's folder. The Arrow file
contains unusable rows, too, with the reason, so that rows keep their numbers.
"""

import csv
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pa_parquet

from data import paths, shapes, video
from data.config import DataConfig

NEEDED = ("path", "text", "num_frames", "height", "width")
PROBED = ("num_frames", "height", "width")
FORMATS = (".parquet", ".csv", ".jsonl")
PROBLEMS = (  # plan folders store these texts
  "", "no path", "num_frames missing or no positive whole number", "height or width missing or no positive whole number",
  "start and end don't fit num_frames", "crop is unreadable or leaves the picture", "caption is not UTF-8", "caption is empty",
  "caption is too long", "label missing or outside 0 to N - 1",
)  # fmt: skip
_NO_PATH, _FRAMES, _SIZE, _RANGE, _CROP, _UTF8, _EMPTY, _LONG, _LABEL = range(1, 10)
pc: Any = pyarrow.compute  # pyarrow makes these functions at run time
_VERSION = 2  # in the names of Arrow files: raise it when the columns change
_CONTENTS_VERSION = 1  # in the fingerprint: with a new number, no existing run or cache fits its table
_BATCH = 1 << 16  # rows
_BLOCK = 1 << 24  # bytes; pyarrow needs a whole row in one block
_SCHEMA = pa.schema(
  [
    ("path", pa.string()), ("text", pa.list_(pa.string())), ("num_frames", pa.int32()), ("height", pa.int32()),
    ("width", pa.int32()), ("fps", pa.float32()), ("start", pa.int32()), ("crop", pa.list_(pa.int32())), ("aes", pa.float32()),
    ("flow", pa.float32()), ("cmotion", pa.string()), ("text_features", pa.string()), ("label", pa.int32()),
    ("problem", pa.int8()),
  ]
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
  """One usable clip: frames [start, start + num_frames) of a file, cropped to `crop` (x, y, width, height).

  `height` and `width` are sizes after the crop.
  """

  path: str
  captions: tuple[str, ...]
  num_frames: int
  height: int
  width: int
  fps: float | None
  start: int
  crop: tuple | None
  scores: dict
  text_features: str | None
  label: int | None = None


@dataclasses.dataclass(frozen=True)
class Part:
  """One table: its Arrow file, its weight, a fingerprint of its contents."""

  source: str
  arrow: str
  weight: float
  fingerprint: str

  @property
  def folder(self) -> str:
    """The folder at which relative paths start."""
    return os.path.dirname(paths.absolute(self.source))


def open_table(config: DataConfig, folder: str) -> "Table":
  """Returns the tables of a configuration as one `Table`. Writes their Arrow files to `folder` unless they exist."""
  parts = []
  for source, weight in config.table_weights():
    check_table(source)
    fingerprint = _fingerprint(source, config)
    arrow = os.path.join(folder, f"table-{fingerprint[:16]}-v{_VERSION}.arrow")
    if not os.path.exists(arrow):
      _build(source, arrow, config)
    parts.append(Part(source, arrow, weight, fingerprint))
  return Table(tuple(parts))


class Table:
  """Rows of several tables as one table.

  A table of weight 3 counts as three copies. *Slot rows* number the rows of all copies: table by table, copy by copy, row by
  row. If all weights are 1, slot rows equal the numbers of the rows. The table is picklable: workers open its files by path.
  """

  def __init__(self, parts):
    self.parts = parts

  def __getstate__(self):
    return {"parts": self.parts}  # without the opened files

  @functools.cached_property
  def _files(self):
    return [pa.ipc.open_file(pa.memory_map(p.arrow)).read_all() for p in self.parts]

  @functools.cached_property
  def _bases(self):
    """First slot row of each table, then the number of all slot rows."""
    return np.cumsum([0] + [f.num_rows * math.ceil(p.weight) for f, p in zip(self._files, self.parts)])

  def __len__(self):
    """Number of slot rows."""
    return int(self._bases[-1])

  @property
  def num_rows(self) -> int:
    return sum(f.num_rows for f in self._files)

  def captions_change(self, scores: Iterable[str]) -> bool:
    """Whether a row's caption may differ between epochs: some row has several captions, or a score that captions show."""
    return any(
      (pc.max(pc.list_value_length(f["text"])).as_py() or 0) > 1 or any(f[s].null_count < f.num_rows for s in scores)
      for f in self._files
    )

  def column(self, name: str) -> np.ndarray:
    """Values of a numeric column for all slot rows."""
    return np.concatenate([np.tile(f[name].to_numpy(), math.ceil(p.weight)) for f, p in zip(self._files, self.parts)])

  def left_out(self, draws: Sequence[int], epoch: int) -> np.ndarray:
    """bool [slot rows]: True where a fractional weight leaves a row out of this epoch. `draws`: seed of the draws."""
    out = np.zeros(len(self), bool)
    for i, (file, part) in enumerate(zip(self._files, self.parts)):
      share = part.weight - math.floor(part.weight)
      if share:
        end = self._bases[i + 1]
        out[end - file.num_rows : end] = np.random.default_rng([*draws, epoch, i, 77]).random(file.num_rows) >= share
    return out

  def locate(self, slot_row: int) -> tuple[int, int]:
    """Returns (number of the table, row of the table) for a slot row."""
    part = int(np.searchsorted(self._bases, slot_row, "right")) - 1
    return part, int(slot_row - self._bases[part]) % self._files[part].num_rows

  def first_copies(self, slot_rows: np.ndarray) -> np.ndarray:
    """For each slot row (an array or a number): the slot row of the same row's first copy."""
    part = np.searchsorted(self._bases, slot_rows, "right") - 1
    rows = np.array([f.num_rows for f in self._files])[part]
    return self._bases[part] + (slot_rows - self._bases[part]) % rows

  def row(self, slot_row: int) -> Row:
    part, i = self.locate(slot_row)
    (values,), folder = self._files[part].slice(i, 1).to_pylist(), self.parts[part].folder
    return Row(
      path=resolve(values["path"], folder),
      captions=tuple(values["text"]),
      **{k: values[k] for k in ("num_frames", "height", "width", "fps", "start", "label")},
      crop=values["crop"] and tuple(values["crop"]),
      scores={k: values[k] for k in ("aes", "flow", "cmotion") if values[k] is not None},
      text_features=values["text_features"] and resolve(values["text_features"], folder),
    )

  def problem_examples(self) -> dict[str, str]:
    """Returns {reason: the first row that is unusable for this reason, as text}."""
    examples = {}
    for file, part in zip(self._files, self.parts):
      for code, first in zip(*np.unique(file["problem"].to_numpy(), return_index=True)):
        if code:
          examples.setdefault(PROBLEMS[code], f"{part.source} row {first + 1} ({file['path'][int(first)].as_py()})")
    return examples


def resolve(path: str, folder: str) -> str:
  """Resolves a path of a table, which may be relative to the table's folder. Addresses do not change."""
  return path if "://" in path else paths.join(folder, path)


def check_table(source: str) -> None:
  """Raises ValueError for a table that does not exist or has an unknown format."""
  if video.is_drawn(source):
    shapes.parse(source)
    return
  paths.check(source, "table")
  if not paths.exists(source) or paths.is_folder(source):
    raise ValueError(f"table {source} does not exist. Correct the path in data.tables.")
  if not source.endswith(FORMATS):
    raise ValueError(f"table {source}: its name must end in {', '.join(FORMATS)}. Convert or rename it.")


def _fingerprint(source, config):
  """sha256 of the table's contents and of the settings that decide how the rows are read. Folders and dates do not count."""
  kind = f"{source} {shapes.VERSION}" if video.is_drawn(source) else pathlib.Path(source).suffix
  rules = [_CONTENTS_VERSION, config.captions, config.max_caption_length, kind]
  rules += [] if config.num_classes is None else [config.num_classes]
  digest = hashlib.sha256(json.dumps(rules).encode())
  if not video.is_drawn(source):
    with paths.errors(source), paths.open_file(source) as f:
      while block := f.read(1 << 22):
        digest.update(block)
  return digest.hexdigest()


def _build(source, arrow, config):
  """Reads a table in batches of rows and writes the Arrow file."""
  needed = [c for c in NEEDED if c != "text" or config.captions == "required"]
  needed += ["label"] * (config.num_classes is not None)
  rows = 0
  try:
    with paths.whole(arrow) as temporary:
      with pa.OSFile(temporary, "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        for batch in read_table(source, needed):
          writer.write_batch(_normalised(batch, config))
          rows += batch.num_rows
      if not rows:
        raise ValueError(f"table {source} has no rows. Add rows, or remove it from data.tables.")
  except pa.ArrowException as e:
    raise ValueError(f"table {source} cannot be read: {str(e).splitlines()[0]}") from None


def read_table(source: str, needed: Sequence[str] = NEEDED) -> Iterator[pa.RecordBatch]:
  """Yields batches of rows of a table. Cells of csv tables are bytes. Raises ValueError if a needed column is missing."""
  if video.is_drawn(source):
    yield from pa.table(shapes.rows(source)).to_batches(_BATCH)
    return
  with paths.local_copy(source) as copy:
    if source.endswith(".parquet"):
      file = pa_parquet.ParquetFile(copy)
      _check_columns(source, file.schema_arrow.names, needed)
      yield from file.iter_batches(_BATCH)
    elif source.endswith(".csv"):
      with open(copy, encoding="utf-8-sig", errors="replace", newline="") as f:
        names = next(csv.reader(f), [])
      _check_columns(source, names, needed)
      parse = pa_csv.ParseOptions(newlines_in_values=True)
      # The cells are read as bytes, since one odd cell must not change the guessed type of its column.
      convert = pa_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.binary()), strings_can_be_null=False)
      yield from pa_csv.open_csv(copy, pa_csv.ReadOptions(block_size=_BLOCK), parse, convert)
    else:
      table = pa_json.read_json(copy, pa_json.ReadOptions(block_size=_BLOCK))
      _check_columns(source, table.column_names, needed)
      yield from table.to_batches(_BATCH)


def _check_columns(source, names, needed):
  missing = [c for c in needed if c not in names and not (c == "text" and "text_1" in names)]
  if not missing:
    return
  text = f"table {source} has no column {', '.join(repr(m) for m in missing)} (it has {', '.join(map(repr, names)) or 'none'})"
  if any(m in PROBED for m in missing) and "path" in names:
    text += f"; `python -m data.prepare table {source} -o NEW.csv` fills num_frames, height, width and fps"
  raise ValueError(text)


def _normalised(batch, config):
  """Turns a batch with the table's own columns into one with `_SCHEMA`."""
  n, columns = batch.num_rows, dict(zip(batch.schema.names, batch.columns))
  missing, problem = pa.nulls(n), np.zeros(n, np.int8)

  def mark(rows, code):
    problem[rows & (problem == 0)] = code

  path, cmotion, text_features = (
    _without_blanks(_decoded(columns.get(k, missing))) for k in ("path", "cmotion", "text_features")
  )
  mark(np.asarray(path.is_null()), _NO_PATH)
  frames, height, width, start, end, fps, aes, flow, label = (
    _numbers(columns.get(k, missing)) for k in (*PROBED, "start", "end", "fps", "aes", "flow", "label")
  )
  mark(~_positive(frames), _FRAMES)
  mark(~(_positive(height) & _positive(width)), _SIZE)
  start, frames, outside = _frame_range(start, end, frames)
  mark(outside, _RANGE)
  crop, height, width, wrong = _crops(columns.get("crop", missing), height, width)
  mark(wrong, _CROP)
  text, not_utf8, count, longest = _captions(columns, n)
  mark(not_utf8, _UTF8)
  if config.captions == "required":
    mark(count == 0, _EMPTY)
  mark(longest > config.max_caption_length, _LONG)
  label = np.where(_positive(label + 1), label, -1).astype(np.int32)
  if config.num_classes is not None:
    mark((label < 0) | (label >= config.num_classes), _LABEL)
  whole = {"num_frames": frames, "height": height, "width": width, "start": start}
  numbers = {"fps": np.where(fps > 0, fps, np.nan), "aes": aes, "flow": flow}
  values = {
    **{name: np.where(problem > 0, 0, x).astype(np.int32) for name, x in whole.items()},
    **{name: pa.array(x.astype(np.float32), from_pandas=True) for name, x in numbers.items()},
    **{"path": path.fill_null(""), "text": text, "crop": crop, "cmotion": cmotion, "text_features": text_features},
    **{"label": pa.array(label, mask=label < 0), "problem": problem},
  }
  return pa.RecordBatch.from_pydict(values, schema=_SCHEMA)


def _positive(values):
  return (values >= 1) & (values == np.floor(values)) & (values < 2**31)


def _numbers(column):
  """Values of a column of numbers or of text, float64 [n]. Cells without a number become NaN."""
  if pa.types.is_primitive(column.type):
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False)
  try:
    return _without_blanks(column.cast(pa.string())).cast(pa.float64()).to_numpy(zero_copy_only=False)
  except pa.ArrowInvalid:  # some cell has no number
    return np.array([_converted(float, v, math.nan) for v in column.to_pylist()])


def _converted(function, value, default):
  try:
    return function(value)
  except (TypeError, ValueError, AttributeError):
    return default


def _without_blanks(text):
  return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)


def _decoded(column):
  """Converts a column to text. Cells that are not UTF-8 become null."""
  try:
    text = column.cast(pa.string())
    text.validate(full=True)
    return text
  except pa.ArrowInvalid:
    return pa.array([_converted(bytes.decode, v, None) for v in column.cast(pa.binary()).to_pylist()], pa.string())


def range_of(row: dict, info: video.VideoInfo) -> tuple[int, int]:
  """Returns (first frame, number of frames) of a row's clip, from `start` and `end` of the row and from `video.probe`.

  Raises `BadVideo` if `start`, `end` or `crop` does not fit the file.
  """
  start, end = (_numbers(pa.array([row.get(k)])) for k in ("start", "end"))
  frames, height, width = (np.array([x], np.float64) for x in (info.num_frames, info.height, info.width))
  begin, count, outside = _frame_range(start, end, frames)
  if outside[0] or end[0] > info.num_frames:
    raise video.BadVideo(PROBLEMS[_RANGE])
  if _crops(pa.array([row.get("crop")]), height, width)[3][0]:
    raise video.BadVideo(PROBLEMS[_CROP])
  return int(begin[0]), int(count[0])


def _frame_range(start, end, frames):
  """Returns arrays: first frame, number of frames, and whether the range does not fit num_frames."""
  with np.errstate(invalid="ignore"):
    begin = np.where(np.isnan(start), 0, start)
    # If a row has a range, its `num_frames` may count the file or the range.
    counts_range = ~np.isnan(end) & (frames == end - begin)
    stop = np.where(np.isnan(end), frames, end)
    outside = (begin < 0) | (begin != np.floor(begin)) | (stop <= begin) | (stop != np.floor(stop))
    outside |= ~counts_range & (stop > frames)
  return begin, stop - begin, outside


def _crops(column, height, width):
  """Returns the crops (list<int32> or null), height and width after the crop, and whether the crop is unusable."""
  if column.null_count == len(column):  # the usual case, and the loop is slow
    return pa.nulls(len(column), pa.list_(pa.int32())), height, width, np.zeros(len(column), bool)
  crops: list[list[int] | None] = [None] * len(column)
  height, width, wrong = height.copy(), width.copy(), np.zeros(len(column), bool)
  for i, value in enumerate(column.to_pylist()):
    value = value.decode(errors="replace") if isinstance(value, bytes) else value
    if isinstance(value, str):
      value = re.split(r"[,;\s]+", value.strip("[]() \t")) if value.strip() else None
    if not value:
      continue
    try:
      x, y, w, h = map(int, value)
    except (TypeError, ValueError):
      wrong[i] = True
      continue
    wrong[i] = not (x >= 0 and y >= 0 and w >= 1 and h >= 1 and x + w <= width[i] and y + h <= height[i])
    if not wrong[i]:
      crops[i], height[i], width[i] = [x, y, w, h], h, w
  return pa.array(crops, pa.list_(pa.int32())), height, width, wrong


def _captions(columns, n):
  """Returns the captions that are not empty (list<string>).

  Further arrays: whether a caption is not UTF-8, the number of captions, and the length of the longest caption.
  """
  names = sorted((k for k in columns if re.fullmatch(r"text(_\d+)?", k)), key=lambda k: int(k[5:] or 1))
  texts, rows, not_utf8 = [pa.array([], pa.string())], [np.zeros(0, np.int64)], np.zeros(n, bool)
  for column in map(columns.get, names):
    row = np.arange(n)
    if pa.types.is_nested(column.type):  # lists of captions
      row, column = np.repeat(row, pc.fill_null(pc.list_value_length(column), 0)), pc.list_flatten(column)
    text = pc.utf8_trim_whitespace(_decoded(column))
    not_utf8[row[np.asarray(text.is_null()) & np.asarray(column.is_valid())]] = True
    filled = pc.fill_null(pc.not_equal(text, ""), False)
    texts.append(text.filter(filled))
    rows.append(row[np.asarray(filled)])
  row = np.concatenate(rows)
  order = np.argsort(row, kind="stable")
  text, count = pa.concat_arrays(texts).take(pa.array(order)), np.bincount(row, minlength=n)
  longest = np.zeros(n, np.int64)
  np.maximum.at(longest, row[order], pc.utf8_length(text).to_numpy())
  return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(count)]), text), not_utf8, count, longest


def text_embedding(path: str) -> np.ndarray:
  """Reads the embedding `y` [L, C] from a safetensors file. Raises `BadVideo` if the file has none."""
  from safetensors import SafetensorError
  from safetensors.numpy import load

  try:
    tensors = load(video.retry(paths.read_bytes, path))
  except FileNotFoundError:
    raise video.BadVideo(f"text features: no such file {path}") from None
  except SafetensorError as e:
    raise video.BadVideo(f"text features {path} cannot be read ({e})") from None
  y = tensors.get("y")
  if y is None or y.ndim != 2:
    raise video.BadVideo(f"text features {path} hold no tensor y [L, C]")
  return y
