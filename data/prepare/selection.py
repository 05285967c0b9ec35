"""Steps that select rows: filter by expressions, sample, balance, split.

All of them stream. A random draw depends on (seed, row) alone, not on shards, machines or their order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import polars as pl

from data.prepare.shards import polars_line
from data.prepare.steps import Context, Step

# Polars' names for parts of an expression that read several rows.
_SEVERAL = {"Agg", "Over", "Len", "Window", "Rolling", "Quantile", "Rank", "RowIndex", "Any", "All"}


def expression(text: str, where: str) -> pl.Expr:
  """A condition in SQL ("flow >= 0.5 and fps <= 60") as a polars expression.

  Raises ValueError for an error in the SQL, and for an expression over several rows: it would see the rows of one shard only.
  """
  try:
    found = pl.sql_expr(text)
  except (pl.exceptions.PolarsError, TypeError) as error:
    raise ValueError(f"{where} {text!r} is no SQL expression ({polars_line(error)})") from None
  if _SEVERAL & set(_parts(json.loads(found.meta.serialize(format="json")))):
    raise ValueError(f"{where} {text!r} needs more rows than one (avg, max, count, over ...): give a number")
  return found


def _parts(tree: Any) -> Iterator[str]:
  """Names of the nodes of an expression, without names of columns and literal texts."""
  if isinstance(tree, str):
    yield tree
  elif isinstance(tree, list):
    for part in tree:
      yield from _parts(part)
  elif isinstance(tree, dict):
    for name, part in tree.items():
      yield name
      if name not in ("Column", "Literal", "Alias"):
        yield from _parts(part)


def draws(keys: pl.Series, seed: int) -> np.ndarray:
  """Uniform numbers in [0, 1), float64 [N], one for each key (a text).

  They are splitmix64 (Steele et al., 2014) of the key's first 16 hexadecimal digits, or of its SHA-256 if it has other
  characters.
  """
  numbers = keys.str.slice(0, 16).str.to_integer(base=16, dtype=pl.UInt64, strict=False)
  values = numbers.fill_null(0).to_numpy().copy()
  for i in numbers.is_null().arg_true().to_list():
    values[i] = int.from_bytes(hashlib.sha256((keys[i] or "").encode()).digest()[:8])
  with np.errstate(over="ignore"):
    z = values + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
  return (z >> np.uint64(11)) * 2.0**-53


def draw(table: pl.LazyFrame, seed: int, keys: tuple[str, ...] = ("id", "path")) -> pl.Expr:
  """Draws for the rows of a table, by the first of the columns `keys` in which a row has a value."""
  present = [name for name in keys if name in table.collect_schema().names()]
  if not present:
    raise ValueError(f"the table has none of the columns {', '.join(keys)}")
  key = pl.coalesce(pl.col(name).cast(pl.String) for name in present)
  return key.map_batches(lambda s: pl.Series(draws(s, seed)), return_dtype=pl.Float64, is_elementwise=True)


@dataclasses.dataclass(frozen=True)
class Filter(Step):
  """Keeps the rows without an `error` that meet all conditions, and counts the rows that each condition removes.

  where: SQL expressions over the columns, as a tuple or {name: expression}. A missing value makes a condition unknown, which
    removes the row. "fps <= 60 or fps is null" keeps such a row, like Open-Sora's --fpsmax.
  """

  title: ClassVar[str] = "filter"
  selects: ClassVar[bool] = True

  where: tuple[str, ...] | dict[str, Any] = ()

  def check(self) -> None:
    for name, text in self._named().items():
      expression(text, f"where[{name!r}] =")

  def _named(self) -> dict[str, str]:
    return self.where if isinstance(self.where, dict) else {text: text for text in self.where}

  def conditions(self) -> dict[str, pl.Expr]:
    """{name: whether a row meets the condition}, `error` first."""
    named = {name: expression(text, "where").fill_null(False) for name, text in self._named().items()}
    return {"no error": pl.col("error").is_null(), **named}

  def transform(self, table: pl.LazyFrame, context: Context) -> pl.LazyFrame:
    met = self.conditions()
    missing = pl.sum_horizontal([(~c).cast(pl.UInt32) for c in met.values()])
    sums = {"rows": pl.len().cast(pl.Int64), "kept": (missing == 0).sum()}
    for name, condition in met.items():
      sums |= {f"{name}\nalone": (~condition).sum(), f"{name}\nonly": (~condition & (missing == 1)).sum()}
    context.counts = table.select(**sums).collect(engine="streaming").row(0, named=True)
    return table.filter(pl.all_horizontal(list(met.values())))

  def tell(self, counts: dict[str, int]) -> str:
    """A table: rows that each condition removes, and rows that only this condition removes."""
    if not counts or not counts["rows"]:
      return ""
    lines = [f"  {'':>40} {'removes':>12} {'only this':>12}"]
    for name in self.conditions():
      alone, only = counts[f"{name}\nalone"], counts[f"{name}\nonly"]
      lines.append(f"  {name[:40]:>40} {alone:>12,} {only:>12,}")
    together = counts["rows"] - counts["kept"]
    lines.append(f"  {'together':>40} {together:>12,} of {counts['rows']:,} ({100 * together / counts['rows']:.1f} %)")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Sample(Step):
  """Keeps a random part of the rows without an `error`.

  share: share of the rows, 0 to 1; or rows: number of rows. seed: seed of the draws.
  """

  title: ClassVar[str] = "sample"

  share: float | None = None
  rows: int | None = None
  seed: int = 0

  def check(self) -> None:
    if (self.share is None) == (self.rows is None):
      raise ValueError("give either share or rows")
    if (self.share is not None and not 0 < self.share <= 1) or (self.rows is not None and self.rows < 1):
      raise ValueError("share must lie in (0, 1], rows be at least 1")

  def gather(self, table: pl.LazyFrame) -> float:
    """The limit below which a row's draw must lie."""
    if self.share is not None:
      return self.share
    assert self.rows is not None
    usable = table.filter(pl.col("error").is_null())
    found = usable.select(d=draw(table, self.seed)).collect(engine="streaming")["d"].to_numpy()
    return 1.0 if len(found) <= self.rows else float(np.partition(found, self.rows)[self.rows])

  def transform(self, table: pl.LazyFrame, context: Context) -> pl.LazyFrame:
    return table.filter(pl.col("error").is_null() & (draw(table, self.seed) < context.facts))


@dataclasses.dataclass(frozen=True)
class Balance(Step):
  """Keeps at most `most` random rows of each group. Rows with an `error` are removed.

  by: SQL expression whose values are the groups, such as "cmotion" or "floor(duration / 4)". seed: seed of the draws.
  """

  title: ClassVar[str] = "balance"

  by: str = ""
  most: int = 0
  seed: int = 0

  def check(self) -> None:
    if not self.by or self.most < 1:
      raise ValueError("give by (an expression) and most (at least 1)")
    expression(self.by, "by =")

  def _group(self) -> pl.Expr:
    return expression(self.by, "by =").cast(pl.String).fill_null("").alias("_group")

  def gather(self, table: pl.LazyFrame) -> pl.DataFrame:
    """(_group, _last): the largest draw that stays, for each group."""
    usable = table.filter(pl.col("error").is_null())
    found = usable.select(self._group(), d=draw(table, self.seed)).collect(engine="streaming")
    return found.group_by("_group").agg(_last=pl.col("d").bottom_k(self.most).max()).sort("_group")

  def transform(self, table: pl.LazyFrame, context: Context) -> pl.LazyFrame:
    drawn = table.filter(pl.col("error").is_null()).with_columns(self._group(), draw(table, self.seed).alias("_draw"))
    kept = drawn.join(context.facts.lazy(), on="_group", how="left", maintain_order="left")
    return kept.filter(pl.col("_draw") <= pl.col("_last")).drop("_group", "_draw", "_last")


@dataclasses.dataclass(frozen=True)
class Split(Step):
  """Adds `split`, the part of the data that a row belongs to. All clips of a file are in the same part.

  shares: {name: share}, normalised. by: column whose equal values stay together; "": the source file. seed: seed of the draws.
  """

  title: ClassVar[str] = "split"

  shares: dict[str, Any] = dataclasses.field(default_factory=lambda: {"train": 0.98, "validation": 0.02})
  by: str = ""
  seed: int = 0

  def check(self) -> None:
    values = list(self.shares.values())
    if not values or not all(isinstance(v, (int, float)) and v >= 0 for v in values) or not sum(values):
      raise ValueError("shares must be {name: number from 0 up}")
    if wrong := [name for name in self.shares if not re.fullmatch(r"[\w-]+", name)]:
      raise ValueError(f"shares has {wrong[0]!r}: only letters, digits, _ and - can name the file of a split")

  def transform(self, table: pl.LazyFrame, context: Context) -> pl.LazyFrame:
    names, shares = list(self.shares), np.array(list(self.shares.values()), float)
    edges = np.cumsum(shares / shares.sum())[:-1]
    values = draw(table, self.seed, (self.by,) if self.by else ("hash", "video", "path"))

    def place(drawn: pl.Series) -> pl.Series:
      return pl.Series([names[i] for i in np.searchsorted(edges, drawn.to_numpy(), side="right")], dtype=pl.String)

    return table.with_columns(split=values.map_batches(place, return_dtype=pl.String, is_elementwise=True))
