"""The step `export`: writes training data as a table for this project's loader, a TFDS data set or WebDataset archives."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from typing import Any, ClassVar

import polars as pl

from data import paths
from data.prepare.shards import height, read_meta, row_count, scan_all, write_shard
from data.prepare.steps import Context, Step, at_least

FORMATS = ("table", "tfds", "webdataset")
TFDS = "tfds/clips/1.0.0"  # folder, name and version of the data set
# Columns that data/sources.py reads, then columns for people.
COLUMNS = (
  "path", "text", "num_frames", "height", "width", "fps", "start", "end", "crop", "aes", "flow", "cmotion", "text_features",
  "label", "duration", "match", "id",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Export(Step):
  """Writes the rows without an `error`. Each value of a column `split` becomes a table, a group of archives or a TFDS split.

  formats: any of "table", "tfds", "webdataset". folder: output folder; "": the run's folder.
  name: name of the table, .parquet or .csv; with `split` the names are train.parquet, validation.parquet, ... Paths below the
    folder are relative to it, so the folder may be moved.
  columns: columns of the table; (): duration, match, id and those that `data/sources.py` reads, if they exist.
  samples: samples per WebDataset archive. A sample's name is its id, with a number if several rows have the same id.
  """

  title: ClassVar[str] = "export"
  needs: ClassVar[tuple[str, ...]] = ("path",)

  formats: tuple[str, ...] = ("table",)
  folder: str = ""
  name: str = "table.parquet"
  columns: tuple[str, ...] = ()
  samples: int = 1000

  def check(self) -> None:
    if not self.formats or set(self.formats) - set(FORMATS):
      raise ValueError(f"formats = {self.formats} must have at least one of {', '.join(FORMATS)}, and no other")
    at_least(self, 1, "samples")
    if not self.name.endswith((".parquet", ".csv")) or "/" in self.name:
      raise ValueError(f"name = {self.name!r} must be a file name that ends in .parquet or .csv")

  def write(self, tables: list[str], context: Context) -> tuple[str, list[str]]:
    folder = paths.absolute(self.folder or os.path.dirname(context.folder))
    table = scan_all(tables).filter(pl.col("error").is_null())
    names = table.collect_schema().names()
    if unknown := [c for c in self.columns if c not in names]:
      raise ValueError(f"export.columns has {', '.join(unknown)}; the table has {', '.join(names)}")
    if not row_count(table):
      last = next((name for name, rows_in, rows, *_ in context.history if rows_in and not rows), "")
      why = f": {last} removed the last one, look at its settings" if last else ""
      raise ValueError(f"export: no row without an error is left{why}")
    files, said = [], []
    splits = _splits(table) if "split" in names else {"": table}
    for split, part in splits.items():
      if "table" in self.formats:
        files.append(paths.join(folder, f"{split}{os.path.splitext(self.name)[1]}" if split else self.name))
        self._claim(files[-1], context)
        chosen = relative_to(part, os.path.dirname(files[-1])).select(self.columns or known_columns(names))
        write_shard(files[-1], chosen, {"key": "", "identity": "", "retry": 0})
        said.append(f"{height(files[-1]):,} rows in {files[-1]}")
      if "webdataset" in self.formats:
        made = write_webdataset(part, paths.join(folder, "webdataset"), split or "train", self.samples)
        files += made
        said.append(f"{len(made)} archives {os.path.dirname(made[0])}/{split or 'train'}-*.tar" if made else "no archive")
    if "tfds" in self.formats:
      place = paths.join(folder, TFDS)
      files.append(paths.join(place, "dataset_info.json"))
      self._claim(files[-1], context)
      write_tfds({split or "train": part for split, part in splits.items()}, folder)
      said.append(f"TFDS data set in {place}")
    return ", ".join(said), files

  def _claim(self, target: str, context: Context) -> None:
    """Raises ValueError if another program wrote a file that this step is about to write."""
    record = paths.join(context.folder, "done.json")
    mine = json.loads(paths.read_text(record))["files"] if paths.exists(record) else []
    if paths.exists(target) and target not in mine and not (target.endswith(".parquet") and read_meta(target)):
      raise ValueError(f"{target} exists and was not written by this program: choose another export.folder or export.name")
    if target not in mine:  # recorded first, in case the export is killed
      paths.write_text(record, json.dumps({"key": "", "said": "", "files": [*mine, target]}))


def known_columns(names: list[str]) -> list[str]:
  """The columns of a table that are exported by default."""
  texts = sorted((n for n in names if re.fullmatch(r"text_\d+", n)), key=lambda n: int(n.removeprefix("text_")))
  return [c for column in COLUMNS for c in ((column, *texts) if column == "text" else (column,)) if c in names]


def _splits(table: pl.LazyFrame) -> dict[str, pl.LazyFrame]:
  """{split: its rows}. Raises ValueError for a split that can't be a file name."""
  column = pl.col("split").cast(pl.String)
  found = table.select(column.unique().sort()).collect(engine="streaming")["split"].to_list()
  for split in found:
    if not re.fullmatch(r"[\w-]+", split or ""):
      raise ValueError(f"export: the column split has {split!r}: only letters, digits, _ and - can name a file")
  return {split: table.filter(column == split) for split in found}


def relative_to(table: pl.LazyFrame, folder: str) -> pl.LazyFrame:
  """The table, with paths below `folder` relative to it."""
  here = folder + "/"
  inside = pl.col("path").str.starts_with(here)
  return table.with_columns(path=pl.when(inside).then(pl.col("path").str.strip_prefix(here)).otherwise("path"))


def _samples(table: pl.LazyFrame) -> Iterator[tuple[str, str, dict[str, Any]]]:
  """Yields (key, file, other columns) of each row. Raises ValueError for a row that is a part of a file."""
  names = table.collect_schema().names()
  columns = [c for c in known_columns(names) if c != "path"]
  name = pl.col("path").cast(pl.String)
  if "id" in names:
    name = pl.coalesce(pl.col("id").cast(pl.String).replace("", None), name)
  several = table.group_by(name.alias("name")).len().filter(pl.col("len") > 1).collect(engine="streaming")["name"]
  seen = dict.fromkeys(several, 0)  # readers would merge two samples with one name
  for batch in table.with_columns(_name=name).collect_batches(maintain_order=True):
    for row in batch.iter_rows(named=True):
      if row.get("start") is not None or row.get("crop"):
        raise ValueError("rows with a range or a crop can't be exported as files: put the step cut before, and omit crops")
      key = _key(row["_name"])
      if row["_name"] in seen:
        seen[row["_name"]] += 1
        key += f"_{seen[row['_name']]}"
      yield key, row["path"], {k: row[k] for k in columns}


def _key(name: str) -> str:
  """Name of a sample: the row's id if it is a plain word, or else a safe name made from it."""
  if re.fullmatch(r"[\w-]+", name):
    return name
  plain = re.sub(r"\W+", "_", os.path.splitext(os.path.basename(name))[0])
  return f"{plain[:60]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def write_webdataset(table: pl.LazyFrame, folder: str, split: str, samples: int) -> list[str]:
  """Writes folder/SPLIT-000000.tar, ... with KEY.mp4 (or the file's own ending), KEY.txt (caption), KEY.json -> their paths."""
  made: list[str] = []
  found = _samples(table)
  while first := next(found, None):
    target = paths.join(folder, f"{split}-{len(made):06}.tar")
    with paths.whole(target) as temporary, tarfile.open(temporary, "w") as archive:
      for key, file, values in itertools.chain([first], itertools.islice(found, samples - 1)):
        with paths.local_copy(file) as copy, open(copy, "rb") as f:
          _add(archive, f"{key}{os.path.splitext(file)[1].lower()}", f, os.path.getsize(copy))
        for ending, content in (("txt", values.get("text") or ""), ("json", json.dumps(values))):
          _add(archive, f"{key}.{ending}", io.BytesIO(content.encode()), len(content.encode()))
    made.append(target)
  # Readers would mix these archives with further ones of an earlier export.
  numbers = (paths.join(folder, f"{split}-{i:06}.tar") for i in itertools.count(len(made)))
  for old in itertools.takewhile(paths.exists, numbers):
    paths.remove(old)
  return made


def _add(archive: tarfile.TarFile, name: str, content: Any, size: int) -> None:
  info = tarfile.TarInfo(name)  # without dates and owners the same rows give the same archive
  info.size = size
  archive.addfile(info, content)


def write_tfds(splits: dict[str, pl.LazyFrame], folder: str) -> None:
  """Writes the TFDS data set `clips` to folder/TFDS and replaces an earlier one.

  The format is array_record, which `tfds.data_source` reads without TensorFlow.

  Features: id, video (the encoded file), text, num_frames, height, width, fps.
  """
  import numpy as np
  import tensorflow_datasets as tfds

  numbers = {"num_frames": np.int64, "height": np.int64, "width": np.int64, "fps": np.float64}

  class Clips(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # one process may export twice
    """Clips with captions, written by data.prepare."""

    VERSION = tfds.core.Version("1.0.0")
    name = "clips"
    url_infos: ClassVar = {}  # else TFDS looks for a list of addresses beside this file

    def _info(self) -> tfds.core.DatasetInfo:
      text = {"id": tfds.features.Text(), "text": tfds.features.Text()}
      file = {"video": tfds.features.Tensor(shape=(), dtype=np.object_)}
      scalars = {k: tfds.features.Scalar(dtype=kind) for k, kind in numbers.items()}
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({**text, **file, **scalars}))

    def _split_generators(self, _: Any) -> dict[str, Iterator]:
      return {split: self._generate_examples(table) for split, table in splits.items()}

    def _generate_examples(self, table: pl.LazyFrame) -> Iterator[tuple[str, dict]]:
      for key, file, values in _samples(table):
        scalars = {k: kind(values.get(k) or 0) for k, kind in numbers.items()}
        yield key, {"id": key, "video": paths.read_bytes(file), "text": values.get("text") or "", **scalars}

  remote, target = paths.is_remote(folder), paths.join(folder, TFDS)
  if not remote:
    os.makedirs(folder, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=None if remote else folder, prefix=".tfds-") as place:
    builder = Clips(data_dir=place, file_format="array_record")
    builder.download_and_prepare()
    if remote:
      paths.upload(builder.data_dir, target)
    else:
      if os.path.exists(target):
        shutil.rmtree(target)
      paths.move(str(builder.data_dir), target)
