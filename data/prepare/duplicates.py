"""The step `duplicates`: finds files with the same content and videos with the same frames in another encoding."""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar

import numpy as np
import polars as pl

from data.prepare.steps import Context, Step

_BANDS = 6  # bands of 32 bits in a hash of 192 bits
_CROWD = 20  # if more rows share a band's value, only the best 20 are compared with all of them
_PLAIN = 4  # a band with fewer ones, or fewer zeros, is of a plain image (black, white) and is not compared


@dataclasses.dataclass(frozen=True)
class Duplicates(Step):
  """Gives all copies but the best an `error`, so that no later step spends time on them.

  The best copy has the most pixels, then the most bytes, then the first path.

  content: whether to compare the SHA-256 of the files (column `hash`).
  pictures: whether to compare the difference hashes of three frames (column `picture_hash`) of rows with a similar duration.
  max_bits: largest number of different bits (of 192), at most 5. So few differences leave one of six bands of 32 bits equal,
    which finds every pair. Plain images (black, white) are not compared.
  """

  title: ClassVar[str] = "duplicates"
  needs: ClassVar[tuple[str, ...]] = ("path", "hash", "picture_hash")

  content: bool = True
  pictures: bool = True
  max_bits: int = 5

  def check(self) -> None:
    if not 0 <= self.max_bits < _BANDS:
      raise ValueError(f"max_bits = {self.max_bits} must be 0 to {_BANDS - 1}")

  def gather(self, table: pl.LazyFrame) -> pl.DataFrame:
    """(path, duplicate_of, how) of the copies."""
    kinds = {
      "path": pl.String, "hash": pl.String, "picture_hash": pl.String, "duration": pl.Float64, "resolution": pl.Int64,
      "bytes": pl.Int64,
    }  # fmt: skip
    present = table.collect_schema().names()
    filled = [(pl.col(n) if n in present else pl.lit(None)).cast(kind).alias(n) for n, kind in kinds.items()]
    rows = table.filter(pl.col("error").is_null()).select(filled).collect(engine="streaming").unique("path", keep="first")
    # The best row first: later rows are its copies.
    rows = rows.sort("resolution", "bytes", "path", descending=[True, True, False], nulls_last=True)
    copy_of = _content_copies(rows) if self.content else {}
    how = dict.fromkeys(copy_of, "content")
    if self.pictures:
      for later, earlier in _picture_copies(rows, self.max_bits, set(copy_of)).items():
        copy_of[later], how[later] = earlier, "pictures"
    paths, schema = rows["path"], {"path": pl.String, "duplicate_of": pl.String, "how": pl.String}
    found = [(paths[i], paths[best], how[i]) for i, best in copy_of.items()]
    return pl.DataFrame(found, schema=schema, orient="row").sort("path")

  def transform(self, table: pl.LazyFrame, context: Context) -> pl.LazyFrame:
    reason = pl.format("duplicates: the same {} as {}", pl.col("how"), pl.col("duplicate_of"))
    found = pl.col("duplicate_of").is_not_null() & pl.col("error").is_null()
    marked = table.join(context.facts.lazy(), on="path", how="left", maintain_order="left")
    return marked.with_columns(
      error=pl.when(found).then(reason).otherwise(pl.col("error")), retry=pl.when(found).then(False).otherwise(pl.col("retry"))
    ).drop("how", "duplicate_of")


def _content_copies(rows: pl.DataFrame) -> dict[int, int]:
  """{row: the first row with the same hash} for all later rows."""
  numbered = rows.lazy().select("hash").with_row_index("i").filter(pl.col("hash").is_not_null())
  first = numbered.with_columns(first=pl.col("i").min().over("hash")).filter(pl.col("i") != pl.col("first")).collect()
  return dict(first.select("i", "first").iter_rows())


def _picture_copies(rows: pl.DataFrame, max_bits: int, without: set[int]) -> dict[int, int]:
  """{row: an earlier row that stays and shows nearly the same frames}."""
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
      # The stable sort keeps the best rows first. Comparing only these with all others keeps the cost of a crowd linear.
      pairs |= {(a, b) for n, a in enumerate(order[begin:end][:_CROWD]) for b in order[begin + n + 1 : end]}
  copy_of: dict[int, int] = {}
  for a, b in sorted((min(p), max(p)) for p in pairs):
    near = abs(seconds[a] - seconds[b]) <= max(0.5, 0.02 * seconds[a])
    if index[a] in copy_of or index[b] in copy_of or not near:
      continue
    if int(np.bitwise_count(raw[a] ^ raw[b]).sum()) <= max_bits:
      copy_of[int(index[b])] = int(index[a])
  return copy_of
