"""Metadata tables (parquet, csv, jsonl) -> memory-mapped Arrow files, which every worker opens by path.

Needed columns, as in the original: `path`, `text`, `num_frames`, `height`, `width`. Optional ones:

  fps, aes, flow, cmotion   as in the original
  start, end                the clip is the frames [start, end) of a file; num_frames counts the file or the clip
  crop                      "x,y,width,height" or a list, in pixels of the displayed frame
  text_2, text_3...         more captions; `text` may also be a list
  text_features             a safetensors file with the caption's embedding `y` [L, C]
  label                     a class, a whole number from 0

Tables and their files may lie in gs://, or be drawn (`data.shapes`). Relative paths start at the table's folder. Unusable rows
stay in the Arrow file, with the reason, so that rows keep their numbers.
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
import tempfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.ipc
import pyarrow.json
import pyarrow.parquet

from data import paths, shapes, video
from data.config import DataConfig

NEEDED = ("path", "text", "num_frames", "height", "width")
PROBED = ("num_frames", "height", "width")
FORMATS = (".parquet", ".csv", ".jsonl")
PROBLEMS = (
  "", "no path", "num_frames missing or no positive whole number", "height or width missing or no positive whole number",
  "start and end don't fit num_frames", "crop is unreadable or leaves the picture", "caption is not UTF-8", "caption is empty",
  "caption is too long", "label missing or outside 0 to N - 1",
)  # fmt: skip
_NO_PATH, _FRAMES, _SIZE, _RANGE, _CROP, _UTF8, _EMPTY, _LONG, _LABEL = range(1, 10)
_VERSION = 2  # in the names of Arrow files: raise it when the columns change
_CONTENTS_VERSION = 1  # in the fingerprint: raising it refuses all existing runs and caches
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

  height, width: after the crop.
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
  """The tables of a configuration as one. Writes their Arrow files to `folder` unless they exist."""
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

  A table of weight 3 is there three times. *Slot rows* number the rows of all copies: table by table, copy by copy, row by
  row. With all weights 1, slot rows are the rows themselves. Picklable: workers open the files by path.
  """

  def __init__(self, parts):
    self.parts = parts

  def __getstate__(self):
    return {"parts": self.parts}  # without the opened files

  @functools.cached_property
  def _files(self):
    return [_ArrowFile(p.arrow) for p in self.parts]

  @functools.cached_property
  def _bases(self):
    """First slot row of each table, then the number of all slot rows."""
    return np.cumsum([0] + [f.num_rows * math.ceil(p.weight) for f, p in zip(self._files, self.parts)])

  def __len__(self):
    """Number of slot rows."""
    return int(self._bases[-1])

  @property
  def num_rows(self):
    return sum(f.num_rows for f in self._files)

  def captions_change(self, scores: Iterable[str]) -> bool:
    """Whether a row's caption may differ between epochs: some row has several captions, or one of these scores."""
    return any(file.longest("text") > 1 or any(map(file.has, scores)) for file in self._files)

  def column(self, name: str) -> np.ndarray:
    """A numeric column, for all slot rows."""
    return np.concatenate([np.tile(f.column(name), math.ceil(p.weight)) for f, p in zip(self._files, self.parts)])

  def left_out(self, seed: int, epoch: int) -> np.ndarray:
    """bool [slot rows]: True where a fractional weight leaves a row out of this epoch."""
    out = np.zeros(len(self), bool)
    for i, (file, part) in enumerate(zip(self._files, self.parts)):
      share = part.weight - math.floor(part.weight)
      if share:
        end = self._bases[i + 1]
        out[end - file.num_rows : end] = np.random.default_rng([seed, epoch, i, 77]).random(file.num_rows) >= share
    return out

  def locate(self, slot_row: int) -> tuple[int, int]:
    """(number of the table, row in it) of a slot row."""
    part = int(np.searchsorted(self._bases, slot_row, "right")) - 1
    return part, int(slot_row - self._bases[part]) % self._files[part].num_rows

  def first_copies(self, slot_rows: np.ndarray) -> np.ndarray:
    """The slot row of the first copy of the same row, for each of these slot rows (an array or a number)."""
    part = np.searchsorted(self._bases, slot_rows, "right") - 1
    rows = np.array([f.num_rows for f in self._files])[part]
    return self._bases[part] + (slot_rows - self._bases[part]) % rows

  def row(self, slot_row: int) -> Row:
    part, i = self.locate(slot_row)
    values, folder = self._files[part].row(i), self.parts[part].folder
    return Row(
      path=resolve(values["path"], folder),
      captions=tuple(values["text"]),
      **{k: values[k] for k in ("num_frames", "height", "width", "fps", "start", "label")},
      crop=values["crop"] and tuple(values["crop"]),
      scores={k: values[k] for k in ("aes", "flow", "cmotion") if values[k] is not None},
      text_features=values["text_features"] and resolve(values["text_features"], folder),
    )

  def problem_examples(self) -> dict[str, str]:
    """{reason: the first row that is unusable for this reason, as text}."""
    examples = {}
    for file, part in zip(self._files, self.parts):
      codes = file.column("problem")
      for code in np.unique(codes[codes > 0]):
        first = int(np.argmax(codes == code))
        examples.setdefault(PROBLEMS[code], f"{part.source} row {first + 1} ({file.row(first)['path']})")
    return examples


class _ArrowFile:
  def __init__(self, path):
    self._reader = pa.ipc.open_file(pa.memory_map(path))
    self._table = self._reader.read_all()
    self.num_rows = self._table.num_rows

  def column(self, name):
    return self._table[name].to_numpy()

  def longest(self, name):
    """Length of the longest list in a column."""
    return pc.max(pc.list_value_length(self._table[name])).as_py() or 0

  def has(self, name):
    """Whether a column has any value."""
    return self._table[name].null_count < self.num_rows

  def row(self, i):
    return self._table.slice(i, 1).to_pylist()[0]


def resolve(path: str, folder: str) -> str:
  """A path of a table, which may be relative to the table's folder. Addresses do not change."""
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
  """sha256 of the table's contents and of the settings that decide how they are read. Folders and dates do not count."""
  kind = f"{source} {shapes.VERSION}" if video.is_drawn(source) else pathlib.Path(source).suffix
  rules = [_CONTENTS_VERSION, config.captions, config.max_caption_length, kind]
  rules += [] if config.num_classes is None else [config.num_classes]
  digest = hashlib.sha256(json.dumps(rules).encode())
  if video.is_drawn(source):
    return digest.hexdigest()
  with paths.errors(source), paths.open_file(source) as f:
    while block := f.read(1 << 22):
      digest.update(block)
  return digest.hexdigest()


def _build(source, arrow, config):
  """Reads a table in batches of rows and writes the Arrow file. A temporary name makes it appear whole or not at all."""
  os.makedirs(os.path.dirname(arrow) or ".", exist_ok=True)
  handle, temporary = tempfile.mkstemp(dir=os.path.dirname(arrow) or ".", suffix=".tmp")
  os.close(handle)
  rows = 0
  try:
    with pa.OSFile(temporary, "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
      for batch in read_table(source, needed=_needed(config)):
        writer.write_batch(_normalised(batch, config))
        rows += batch.num_rows
    if not rows:
      raise ValueError(f"table {source} has no rows. Add rows, or remove it from data.tables.")
    os.chmod(temporary, 0o644)
    os.replace(temporary, arrow)
  except pa.ArrowException as e:
    raise ValueError(f"table {source} cannot be read: {str(e).splitlines()[0]}") from None
  finally:
    if os.path.exists(temporary):
      os.unlink(temporary)


def _needed(config):
  columns = [c for c in NEEDED if c != "text" or config.captions == "required"]
  return columns + ["label"] * (config.num_classes is not None)


def read_table(source: str, needed: Sequence[str] = NEEDED) -> Iterator[pa.RecordBatch]:
  """Batches of rows of a parquet, csv or jsonl table, or of shapes. Cells of csv are bytes.

  Raises ValueError if a needed column is missing.
  """
  if video.is_drawn(source):
    yield from pa.table(shapes.rows(source)).to_batches(_BATCH)
    return
  with paths.local_copy(source) as copy:
    yield from _read_table(source, copy, needed)


def _read_table(source, copy, needed):
  suffix = pathlib.Path(source).suffix
  if suffix == ".parquet":
    file = pa.parquet.ParquetFile(copy)
    _check_columns(source, file.schema_arrow.names, needed)
    yield from file.iter_batches(_BATCH)
  elif suffix == ".csv":
    with open(copy, encoding="utf-8-sig", errors="replace", newline="") as f:
      names = next(csv.reader(f), [])
    _check_columns(source, names, needed)
    parse = pa.csv.ParseOptions(newlines_in_values=True)
    # Bytes instead of guessed types: one odd cell must not change the type of a column.
    convert = pa.csv.ConvertOptions(column_types={n: pa.binary() for n in names}, strings_can_be_null=False)
    blocks = pa.csv.ReadOptions(block_size=_BLOCK)
    yield from pa.csv.open_csv(copy, blocks, parse, convert)
  else:
    table = pa.json.read_json(copy, pa.json.ReadOptions(block_size=_BLOCK))
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
  columns = dict(zip(batch.schema.names, batch.columns))
  n = batch.num_rows
  problem = np.zeros(n, np.int8)

  def mark(rows, code):
    problem[rows & (problem == 0)] = code

  path = _strings(columns.get("path"), n)
  mark(_is_blank(path), _NO_PATH)
  frames, height, width, start, end = (_numbers(columns.get(k), n) for k in ("num_frames", "height", "width", "start", "end"))
  mark(~_positive(frames), _FRAMES)
  mark(~(_positive(height) & _positive(width)), _SIZE)
  start, frames, outside = _frame_range(start, end, frames)
  mark(outside, _RANGE)
  crop, height, width, wrong = _crops(columns.get("crop"), height, width)
  mark(wrong, _CROP)
  text, not_utf8, lengths, longest = _captions(columns, n)
  mark(not_utf8, _UTF8)
  if config.captions == "required":
    mark(lengths == 0, _EMPTY)
  mark(longest > config.max_caption_length, _LONG)
  label = _labels(columns.get("label"), n)
  if config.num_classes is not None:
    mark((label < 0) | (label >= config.num_classes), _LABEL)
  whole = [np.where(problem > 0, 0, x).astype(np.int32) for x in (frames, height, width, start)]
  fps, aes, flow = (_numbers(columns.get(k), n) for k in ("fps", "aes", "flow"))
  fps = np.where(fps > 0, fps, np.nan)
  numbers = [pa.array(x.astype(np.float32), from_pandas=True) for x in (fps, aes, flow)]
  arrays = [path.fill_null(""), text, *whole[:3], numbers[0], whole[3], crop, *numbers[1:],
            _strings(columns.get("cmotion"), n), _strings(columns.get("text_features"), n),
            pa.array(label, mask=label < 0), problem]  # fmt: skip
  arrays = [pa.array(a, f.type) if isinstance(a, np.ndarray) else a.cast(f.type) for a, f in zip(arrays, _SCHEMA)]
  return pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA)


def _positive(values):
  with np.errstate(invalid="ignore"):
    return (values >= 1) & (values == np.floor(values)) & (values < 2**31)


def _labels(column, n):
  """Classes, int32 [n]; -1 where a cell holds no whole number from 0 up."""
  labels = _numbers(column, n)
  return np.where(_positive(labels + 1), labels, -1).astype(np.int32)


def _is_blank(strings):
  return np.asarray(pc.fill_null(pc.equal(strings, ""), True))


def _numbers(column, n):
  """A column of numbers, or of text that holds numbers: float64 [n], NaN where a cell has no number."""
  if column is None or pa.types.is_null(column.type):
    return np.full(n, np.nan)
  if not (pa.types.is_binary(column.type) or pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False)
  try:
    text = column.cast(pa.string())
    return pc.if_else(_is_blank(text), None, text).cast(pa.float64()).to_numpy(zero_copy_only=False)
  except pa.ArrowInvalid:  # some cell is no number: read them one by one
    return np.array([_number(v) for v in column.to_pylist()])


def _number(value):
  try:
    return float(value)
  except (TypeError, ValueError):
    return math.nan


def _strings(column, n):
  """A text column. Cells that are empty or not UTF-8 become null."""
  if column is None or pa.types.is_null(column.type):
    return pa.nulls(n, pa.string())
  try:
    text = column.cast(pa.string())
    text.validate(full=True)
  except pa.ArrowInvalid:
    text = pa.array([_decoded(v) for v in column.cast(pa.binary()).to_pylist()], pa.string())
  return pc.if_else(_is_blank(text), pa.scalar(None, pa.string()), text)


def _decoded(value):
  try:
    return value if value is None or isinstance(value, str) else value.decode()
  except UnicodeDecodeError:
    return None


def range_of(row: dict, info: video.VideoInfo) -> tuple[int, int]:
  """(first frame, number of frames) of a row's clip, from its `start` and `end` in a file that `video.probe` describes.

  Raises `BadVideo` if `start`, `end` or `crop` do not fit the file.
  """
  start, end = (_numbers(pa.array([row.get(k)]), 1) for k in ("start", "end"))
  frames, height, width = (np.array([x], np.float64) for x in (info.num_frames, info.height, info.width))
  begin, count, outside = _frame_range(start, end, frames)
  if outside[0] or end[0] > info.num_frames:
    raise video.BadVideo(PROBLEMS[_RANGE])
  if _crops(pa.array([row.get("crop")]), height, width)[3][0]:
    raise video.BadVideo(PROBLEMS[_CROP])
  return int(begin[0]), int(count[0])


def _frame_range(start, end, frames):
  """(first frame, number of frames, bool: the range does not fit num_frames), arrays."""
  with np.errstate(invalid="ignore"):
    begin = np.where(np.isnan(start), 0, start)
    # If a row has a range, num_frames counts the file or the range.
    counts_range = ~np.isnan(end) & (frames == end - begin)
    stop = np.where(np.isnan(end), frames, end)
    outside = (begin < 0) | (begin != np.floor(begin)) | (stop <= begin) | (stop != np.floor(stop))
    outside |= ~counts_range & (stop > frames)
  return begin, stop - begin, outside


def _crops(column, height, width):
  """(list<int32> or null, height and width after the crop, bool: the crop is unusable)."""
  n = len(height)
  wrong, crops = np.zeros(n, bool), [None] * n
  if column is None or pa.types.is_null(column.type):
    return pa.nulls(n, pa.list_(pa.int32())), height, width, wrong
  height, width = height.copy(), width.copy()
  for i, value in enumerate(column.to_pylist()):
    if isinstance(value, (bytes, str)):
      text = value if isinstance(value, str) else value.decode(errors="replace")
      value = re.split(r"[,;\s]+", text.strip("[]() \t")) if text.strip() else None
    if not value:
      continue
    try:
      x, y, w, h = (int(v) for v in value)
    except (TypeError, ValueError):
      wrong[i] = True
      continue
    wrong[i] = not (x >= 0 and y >= 0 and w >= 1 and h >= 1 and x + w <= width[i] and y + h <= height[i])
    if not wrong[i]:
      crops[i], height[i], width[i] = [x, y, w, h], h, w
  return pa.array(crops, pa.list_(pa.int32())), height, width, wrong


def _captions(columns, n):
  """(list<string>: captions that are not empty, bool: not UTF-8, number of captions, length of the longest)."""
  names = sorted((k for k in columns if re.fullmatch(r"text(_\d+)?", k)), key=lambda k: int(k[5:] or 1))
  zeros = np.zeros(n, np.int64)
  if not names:
    return pa.array([[]] * n, pa.list_(pa.string())), zeros.astype(bool), zeros, zeros
  if len(names) == 1 and not pa.types.is_list(columns[names[0]].type):
    column = columns[names[0]]
    text = pc.utf8_trim_whitespace(_strings(column, n))
    text = pc.if_else(_is_blank(text), pa.scalar(None, pa.string()), text)
    there = np.asarray(text.is_valid())
    lengths = np.asarray(pc.fill_null(pc.utf8_length(text), 0)).astype(np.int64)
    offsets = pa.array(np.concatenate([[0], np.cumsum(there)]).astype(np.int32))
    not_utf8, missing = np.zeros(n, bool), np.nonzero(~there)[0]
    not_utf8[missing] = [v is not None and _decoded(v) is None for v in column.take(pa.array(missing)).to_pylist()]
    return pa.ListArray.from_arrays(offsets, text.drop_null()), not_utf8, there.astype(np.int64), lengths
  rows, not_utf8 = [], np.zeros(n, bool)
  for i, values in enumerate(zip(*(columns[k].to_pylist() for k in names))):
    flat = [v for value in values for v in (value if isinstance(value, list) else [value]) if v]
    decoded = [_decoded(v) for v in flat]
    rows.append([d.strip() for d in decoded if d and d.strip()])
    not_utf8[i] = None in decoded
  counts, longest = np.array([len(r) for r in rows]), np.array([max(map(len, r), default=0) for r in rows])
  return pa.array(rows, pa.list_(pa.string())), not_utf8, counts, longest


def text_embedding(path: str) -> np.ndarray:
  """The embedding `y` [L, C] in a safetensors file. Raises `BadVideo` (the row is unusable) if the file has none."""
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
