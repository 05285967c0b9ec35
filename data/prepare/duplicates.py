"""Copies: the same content under another name, and the same pictures in another encoding."""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar

import numpy as np
import polars as pl

from data.prepare.steps import Context, Step

_BANDS = 6  # of 32 bits in a picture hash of 192
_CROWD = 20  # of rows with an equal band
_PLAIN = 4  # bits set, or not set, in a band of a picture without structure (black, white): it says nothing


@dataclasses.dataclass(frozen=True)
class Duplicates(Step):
  """Of rows with the same content or the same pictures all but the best get an `error`, so that no later step spends time on
  them: the most pixels stay, then the most bytes, then the first path.

  content: by SHA-256 of the files (column `hash`).
  pictures: by the difference hashes of three pictures (column `picture_hash`), for rows of about the same duration.
  max_bits: bits of 192 in which these may differ. Up to 5 every pair is found (two such hashes share one of six bands of 32
    bits, pigeonhole); pictures without structure are not compared.
  """

  title: ClassVar[str] = "duplicates"
  needs: ClassVar[tuple[str, ...]] = ("path", "hash", "picture_hash")

  content: bool = True
  pictures: bool = True
  max_bits: int = 5

  def check(self) -> None:
    if not 0 <= self.max_bits < _BANDS:
      raise ValueError(f"max_bits must be 0 to {_BANDS - 1}")

  def gather(self, table: pl.LazyFrame) -> pl.DataFrame:
    """(path, duplicate_of, how) of the rows that go."""
    columns = ["path", "hash", "picture_hash", "duration", "resolution", "bytes"]
    kinds = [pl.String, pl.String, pl.String, pl.Float64, pl.Int64, pl.Int64]
    there = set(table.collect_schema().names())
    filled = [(pl.col(n) if n in there else pl.lit(None)).cast(k).alias(n) for n, k in zip(columns, kinds)]
    # Best first: what comes later is the copy.
    rows = table.filter(pl.col("error").is_null()).select(filled).collect(engine="streaming")
    rows = rows.unique("path", keep="first").sort(
      "resolution", "bytes", "path", descending=[True, True, False], nulls_last=True
    )  # fmt: skip
    copy_of = _content_copies(rows) if self.content else {}
    how = dict.fromkeys(copy_of, "content")
    if self.pictures:
      for later, earlier in _picture_copies(rows, self.max_bits, set(copy_of)).items():
        copy_of[later], how[later] = earlier, "pictures"
    paths = rows["path"]
    gone = sorted(copy_of)
    schema = {"path": pl.String, "duplicate_of": pl.String, "how": pl.String}
    return pl.DataFrame([(paths[i], paths[copy_of[i]], how[i]) for i in gone], schema=schema, orient="row").sort("path")

  def transform(self, table: pl.LazyFrame, context: Context) -> pl.LazyFrame:
    reason = pl.format("duplicates: the same {} as {}", pl.col("how"), pl.col("duplicate_of"))
    found = pl.col("duplicate_of").is_not_null() & pl.col("error").is_null()
    marked = table.join(context.facts.lazy(), on="path", how="left", maintain_order="left")
    return marked.with_columns(
      error=pl.when(found).then(reason).otherwise(pl.col("error")), retry=pl.when(found).then(False).otherwise(pl.col("retry"))
    ).drop("how", "duplicate_of")


def _content_copies(rows: pl.DataFrame) -> dict[int, int]:
  """{row: the first row with its hash} of later rows."""
  numbered = rows.lazy().select("hash").with_row_index("i").filter(pl.col("hash").is_not_null())
  first = numbered.with_columns(first=pl.col("i").min().over("hash")).filter(pl.col("i") != pl.col("first")).collect()
  return dict(first.select("i", "first").iter_rows())


def _picture_copies(rows: pl.DataFrame, max_bits: int, without: set[int]) -> dict[int, int]:
  """{row: an earlier row that stays and has about its pictures}."""
  hashed = rows.with_row_index("i").filter(pl.col("picture_hash").is_not_null() & ~pl.col("i").is_in(list(without)))
  if hashed.height < 2:
    return {}
  raw = np.frombuffer(bytes.fromhex("".join(hashed["picture_hash"])), ">u4").reshape(-1, _BANDS).astype(np.uint32)
  index, seconds = hashed["i"].to_numpy(), hashed["duration"].fill_null(0.0).to_numpy()
  pairs: set[tuple[int, int]] = set()
  for band in range(_BANDS):
    bits = np.bitwise_count(raw[:, band])
    useful = np.flatnonzero((bits >= _PLAIN) & (bits <= 32 - _PLAIN))
    order = useful[np.argsort(raw[useful, band], kind="stable")]
    edges = np.flatnonzero(np.diff(raw[order, band], prepend=0, append=0) if len(order) else [])
    for begin, end in itertools.pairwise(edges):
      # The stable sort leaves the best first. Of a crowd only these are compared with the others: not a square of its size.
      pairs |= {(a, b) for n, a in enumerate(order[begin:end][:_CROWD]) for b in order[begin + n + 1 : end]}
  copy_of: dict[int, int] = {}
  for a, b in sorted((min(p), max(p)) for p in pairs):
    near = abs(seconds[a] - seconds[b]) <= max(0.5, 0.02 * seconds[a])
    if index[a] in copy_of or index[b] in copy_of or not near:
      continue
    if int(np.bitwise_count(raw[a] ^ raw[b]).sum()) <= max_bits:
      copy_of[int(index[b])] = int(index[a])
  return copy_of
