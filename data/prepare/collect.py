"""The first two steps. `Collect` lists the files of folders, patterns and tables. `Probe` reads size, frames and hashes."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import glob
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import cv2
import numpy as np
import polars as pl
from PIL import Image

from data import paths, sources, video
from data.prepare import decode
from data.prepare.messages import say, shown
from data.prepare.shards import FAILED, part_name, part_number, parts, polars_line, read_meta, scan, write_shard
from data.prepare.steps import Context, RowStep, Step, at_least

_KINDS = {"video": video.VIDEO_EXTENSIONS, "image": video.IMAGE_EXTENSIONS}
LISTED = {"path": pl.String, "bytes": pl.Int64, "changed": pl.Int64, **FAILED}
_KEY = ("path", "start", "end", "crop")  # columns that identify a row
_BATCH = 10_000  # files that are Python objects at a time
_TOGETHER = 1000  # shards that are compared with the list at a time
_HASH_SIDE = 8  # bits along one side of a difference hash
_HASH_AT = (0.25, 0.5, 0.75)  # places of the hashed frames, as shares of the video


@dataclasses.dataclass(frozen=True)
class Collect(Step):
  """Lists files. Shards keep their files from run to run, and new files make new shards. A deleted file stays listed.

  If a file's size or modification time changes, all steps make its shard again. For the files of a table, only the time counts.
  For such files in a bucket not even the time counts, since each file would cost a request.

  sources: folders (searched recursively), patterns ("clips/**/*.mp4") and tables (.parquet, .csv, .jsonl), local or gs://. A
    table needs a column `path`, relative to the table's folder, and keeps its other columns. If the output lies below a
    source, files in the folders of the run's steps are skipped. Files in `cut.clips_folder` are listed.
  kinds: which files to list from folders and patterns: "video", "image".
  rows_per_shard: rows of a shard. A killed run loses the work on one shard.
  forget: whether rows leave the table when they are no longer listed. An unmounted disk then empties the table.

  The list needs 0.4 GB of memory per million files.
  """

  title: ClassVar[str] = "collect"
  silent: ClassVar[tuple[str, ...]] = ("rows_per_shard", "forget")

  sources: tuple[str, ...] = ()
  kinds: tuple[str, ...] = ("video", "image")
  rows_per_shard: int = 200
  forget: bool = False

  def check(self) -> None:
    if not self.sources:
      raise ValueError("sources needs at least one folder, pattern or table")
    if wrong := set(self.kinds) - set(_KINDS) or not self.kinds:
      raise ValueError(f"kinds has {wrong or 'nothing'}; allowed: {', '.join(_KINDS)}")
    at_least(self, 1, "rows_per_shard")

  def reach(self) -> None:
    """Raises ValueError if this machine can't see one of the sources."""
    for source in self.sources:
      paths.check(source, "collect.sources")
      if source.endswith(sources.FORMATS):
        sources.check_table(source)
      elif not _is_pattern(source) and not paths.is_folder(source):
        kinds = f"folder, pattern or table ({', '.join(sources.FORMATS)})"
        raise ValueError(f"collect.sources: {source!r} is no {kinds} that exists")

  def list(self, folder: str, own: Sequence[str] = ()) -> None:
    """Writes folder/part-00000.parquet, ... if they change. It skips files in the run's folders `own`."""
    self.reach()
    listed = pl.concat([self._listed(source, own) for source in self.sources], how="diagonal_relaxed")
    key = [name for name in _KEY if name in listed.columns]
    found = listed.unique(key, keep="first", maintain_order=True)
    if repeated := listed.height - found.height:
      say(f"collect: {repeated:,} rows are skipped: the same {', '.join(key)} as an earlier row")
    names = parts(folder)
    for i in range(0, len(names), _TOGETHER):
      found = self._refresh(folder, names[i : i + _TOGETHER], found)
    begin = part_number(names[-1]) + 1 if names else 0
    for i, offset in enumerate(range(0, found.height, self.rows_per_shard)):
      self._write(paths.join(folder, part_name(begin + i)), found.slice(offset, self.rows_per_shard))
    if not names and not found.height:
      raise ValueError(f"collect.sources: no file there ends in {' '.join(self._endings())}")

  def _refresh(self, folder: str, names: list[str], found: pl.DataFrame) -> pl.DataFrame:
    """Updates existing shards from the list `found`. Returns the listed rows that are in none of these shards."""
    shards = [_plain_crops(scan(paths.join(folder, name))).with_columns(_part=pl.lit(i)) for i, name in enumerate(names)]
    old = pl.concat(shards, how="diagonal_relaxed").collect().with_row_index("_row")
    # A column that only the list or only the shards have is null in the other: a row without `start` is the whole file.
    key = [name for name in _KEY if name in found.columns or name in old.columns]
    found = found.with_columns(pl.lit(None, old.schema[k]).alias(k) for k in key if k not in found.columns)
    old = old.with_columns(pl.lit(None, found.schema[k]).alias(k) for k in key if k not in old.columns)
    was = pl.col("changed") if "changed" in old.columns else pl.lit(None, pl.Int64)  # older versions have no such column
    rows = old.select("_part", "_row", *key, was.alias("_was")).join(found, on=key, how="inner", nulls_equal=True)
    rows = rows.with_columns(pl.coalesce("changed", "_was").alias("changed")).drop("_was")  # a missing file keeps its time
    if not self.forget:  # a deleted file keeps its row and fails in the step that reads it
      rows = pl.concat([rows, old.join(found, on=key, how="anti", nulls_equal=True)], how="diagonal_relaxed")
    # Columns and rows have the order of the first run: another order would change the digest of a shard.
    rows = rows.select(*found.columns, *(c for c in rows.columns if c not in found.columns))
    by_part = rows.sort("_row").partition_by("_part", as_dict=True)
    for i, name in enumerate(names):
      self._write(paths.join(folder, name), by_part.get((i,), rows.clear()).drop("_part", "_row"))
    return found.join(old, on=key, how="anti", nulls_equal=True, maintain_order="left")

  def _write(self, path: str, table: pl.DataFrame) -> None:
    rows = hashlib.sha256(table.write_ndjson().encode()).hexdigest()[:32]
    old, recipe = read_meta(path) or {}, self.recipe()
    if old.get("key") != rows or old.get("recipe") != recipe:
      write_shard(path, table.lazy(), {"key": rows, "identity": rows, "retry": 0, "seconds": 0.0, "recipe": recipe})

  def _listed(self, source: str, own: Sequence[str]) -> pl.DataFrame:
    """The files of one source as a table, in an order that does not depend on the file system."""
    if source.endswith(sources.FORMATS):
      return _table(source)
    unread: list[str] = []
    files = _matching(source, unread.append) if _is_pattern(source) else paths.states_below(source, unread.append)
    skipped, own = 0, tuple(_real(folder) for folder in own)

    def rows() -> Iterator[dict[str, Any]]:
      nonlocal skipped
      for path, state in files:
        if path.lower().endswith(self._endings()):
          if _real(os.path.dirname(path)).startswith(own):
            skipped += 1
          else:
            yield _file_row(path, state)

    listed = rows()
    batches = iter(lambda: list(itertools.islice(listed, _BATCH)), [])
    found = pl.concat(pl.DataFrame(batch, schema=LISTED, orient="row") for batch in itertools.chain([[]], batches))
    if unread:
      say(f"collect: {len(unread):,} folders below {shown(source)} can't be read (no permission), such as {shown(unread[0])}")
    if skipped:
      say(f"collect: {skipped:,} files below {shown(source)} are skipped: this run made them")
    return found

  def _endings(self) -> tuple[str, ...]:
    return tuple(itertools.chain.from_iterable(_KINDS[kind] for kind in self.kinds))


@functools.lru_cache(1000)
def _real(folder: str) -> str:
  """A folder without symbolic links in its path, with a final slash."""
  return (folder if paths.is_remote(folder) else os.path.realpath(folder)).rstrip("/") + "/"


def _is_pattern(source: str) -> bool:
  return glob.has_magic(source) and not paths.exists(source)


def _matching(pattern: str, unread: Callable[[str], None]) -> Iterator[tuple[str, tuple | None]]:
  """Yields (file, its `paths.stat` or None if it was deleted) for the files that match a pattern."""
  if not paths.is_remote(pattern):
    return ((p, paths.state_of(p)) for p in sorted(glob.iglob(pattern, recursive=True)) if os.path.isfile(p))
  folder = pattern[: min(pattern.find(c) for c in "*?[" if c in pattern)].rpartition("/")[0]
  return (found for found in paths.states_below(folder, unread) if fnmatch.fnmatchcase(found[0], pattern.replace("**/", "*")))


def _file_row(path: str, state: tuple | None) -> dict[str, Any]:
  path = paths.absolute(path)
  try:
    path.encode()
  except UnicodeEncodeError:
    shown = os.fsencode(path).decode("utf-8", "backslashreplace")
    return {"path": shown, "error": "collect: the name is not UTF-8: rename the file", "retry": False}
  if state is None:
    return {"path": path}  # deleted since it was listed
  return {"path": path, "bytes": state[0], "changed": int(state[1] or 0)}


def _plain_crops(table: Any) -> Any:
  """A table, lazy or not, with its crops as texts "x,y,width,height"."""
  if isinstance(table.collect_schema().get("crop"), pl.List):
    return table.with_columns(crop=pl.col("crop").cast(pl.List(pl.String)).list.join(","))
  return table


def _table(source: str) -> pl.DataFrame:
  with paths.local_copy(source) as copy:
    try:
      table = scan(str(copy)).collect()
    except pl.exceptions.PolarsError as error:
      raise ValueError(f"table {source} cannot be read: {polars_line(error)}") from None
  if "path" not in table.columns:
    raise ValueError(f"table {source} has no column 'path' (it has {', '.join(table.columns)})")
  folder = os.path.dirname(paths.absolute(source))
  resolved = pl.col("path").cast(pl.String).map_elements(lambda p: sources.resolve(p, folder), return_dtype=pl.String)
  table = _plain_crops(table)
  missing = pl.when(pl.col("path").is_null()).then(pl.lit("collect: no path"))
  table = table.with_columns(resolved, missing.alias("error"), pl.lit(False).alias("retry"))
  changed = pl.col("path").map_elements(lambda p: None if "://" in p else (paths.state_of(p) or (0, None))[1], pl.Int64)
  return table.with_columns(changed=changed)


# ----------------------------------------------------------------------------------------------------------------- probe


@dataclasses.dataclass(frozen=True)
class Probe(RowStep):
  """Reads size, frames, rate, codec and hashes of each file. An unusable file gets its `error` here.

  decode: whether to decode every frame (slow; finds damage in the middle of files).
  content_hash: whether to compute the SHA-256 of the file, which finds copies (`Duplicates`) and names clips.
  picture_hash: whether to compute difference hashes of three frames, which find the same video in another encoding.
  max_streams: a file with more streams is refused.
  """

  title: ClassVar[str] = "probe"
  unit: ClassVar[str] = "files"
  needs: ClassVar[tuple[str, ...]] = ("path",)
  columns: ClassVar[dict[str, Any]] = {
    "id": pl.String, "bytes": pl.Int64, "num_frames": pl.Int64, "height": pl.Int64, "width": pl.Int64, "fps": pl.Float64,
    "duration": pl.Float64, "aspect_ratio": pl.Float64, "resolution": pl.Int64, "codec": pl.String, "rotation": pl.Int64,
    "audio": pl.Boolean, "hash": pl.String, "picture_hash": pl.String,
  }  # fmt: skip

  decode: bool = False
  content_hash: bool = True
  picture_hash: bool = True
  max_streams: int = 32

  def check(self) -> None:
    at_least(self, 1, "max_streams")

  def rows(self, group: list[dict], context: Context, report: Callable) -> list[dict]:
    (row,) = group
    path = row["path"]
    size, _ = paths.stat(path) if not video.is_address(path) else (None, None)
    if size == 0:
      raise video.BadVideo("the file is empty (0 bytes)")
    codec, rotation, audio = _look(path, self.max_streams, context.limits.max_pixels)
    info = video.probe(path, decode=self.decode)
    begin, frames = sources.range_of(row, info)
    whole = row.get("start") is None and row.get("end") is None
    cut = {"start": None, "end": None} if whole else {"start": begin, "end": begin + frames}
    content = sha256_of(path) if self.content_hash else None
    known = content or f"{path} {row.get('changed')}"  # a changed file gives its clips other ids
    return [{
      **cut, "id": clip_id(known, **cut), "bytes": size, "num_frames": frames, "height": info.height,
      "width": info.width, "fps": info.fps, "duration": frames / info.fps if codec else None,
      "aspect_ratio": info.height / info.width, "resolution": info.height * info.width, "codec": codec, "rotation": rotation,
      "audio": audio, "hash": content, "picture_hash": _picture_hash(path, info.num_frames) if self.picture_hash else None,
    }]  # fmt: skip


def clip_id(source: str, start: int | None, end: int | None) -> str:
  """16 hexadecimal digits that name the frames [start, end) of a file, by its content hash, id or path."""
  return hashlib.sha256(f"{source} {start} {end}".encode()).hexdigest()[:16]


def sha256_of(path: paths.Path) -> str:
  sha = hashlib.sha256()
  with paths.errors(path), paths.open_file(path) as f:
    while block := f.read(1 << 22):  # a file in a bucket has no `readinto` for `hashlib.file_digest`
      sha.update(block)
  return sha.hexdigest()


def _look(path: str, max_streams: int, max_pixels: int) -> tuple[str | None, int, bool]:
  """(codec or None for an image, rotation in degrees, whether it has sound). Raises BadVideo for too many streams or pixels."""
  if video.is_image(path):
    try:
      with paths.open_file(path) as f, Image.open(f, formats=video.IMAGE_FORMATS) as image:
        _check_pixels(image.height, image.width, max_pixels)
        return None, 0, False
    except Image.DecompressionBombError:
      raise video.BadVideo("declares too large an image: refused") from None
    except (Image.UnidentifiedImageError, SyntaxError, ValueError) as error:
      raise video.BadVideo(f"no image ({' '.join(str(error).split())[:100]})") from None
  with decode.open_video(path, threads=1) as (container, stream):
    if len(container.streams) > max_streams:
      raise video.BadVideo(f"has {len(container.streams)} streams, more than probe.max_streams = {max_streams}")
    _check_pixels(stream.height, stream.width, max_pixels)
    frame = next(iter(container.decode(stream)), None)
    if frame is None:
      raise video.BadVideo("has no frames")
    _check_pixels(frame.height, frame.width, max_pixels)
    return stream.codec_context.name, frame.rotation % 360, bool(container.streams.audio)


def _check_pixels(height: int, width: int, most: int) -> None:
  if height * width > most:
    raise video.BadVideo(f"declares frames of {width} x {height}, more than limits.max_pixels = {most}")


def difference_hash(image: np.ndarray) -> int:
  """64-bit dHash of an image [H, W, 3]: whether grey rises from each pixel to the next, in 8 rows of 9 (N. Krawetz, 2013)."""
  grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (_HASH_SIDE + 1, _HASH_SIDE), interpolation=cv2.INTER_AREA)
  return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes())


def _picture_hash(path: str, frames: int) -> str:
  """48 hexadecimal digits: `difference_hash` of three frames of the file."""
  images = video.read_frames(path, [min(frames - 1, int(share * frames)) for share in _HASH_AT])
  return "".join(f"{difference_hash(image):016x}" for image in images)
