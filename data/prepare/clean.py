"""The step `clean`: removes the openings that language models write, cleans text as Open-Sora does, counts words and tokens."""

from __future__ import annotations

import dataclasses
import re
from typing import ClassVar

import polars as pl

from data import captions
from data.prepare.measures import CLASSES
from data.prepare.steps import Context, Step

# Typical openings of captioners: forms of the 17 phrases in Open-Sora's `refine_llm_caption`.
_SUBJECT = (
  r"(?:the|this|an?)\s+(?:short\s+|brief\s+)?(?:video|clip|image|picture|photo(?:graph)?|scene|footage|frames?)(?:\s+clip)?"
)
_VERB = (
  r"(?:shows?|depicts?|features?|captures?|portrays?|presents?|displays?|illustrates?|showcases?|begins?\s+with|opens?\s+with|"
  r"starts?\s+with|is\s+(?:about|of)|consists?\s+of|contains?)"
)
_OPENINGS = re.compile(
  rf"^(?:(?:sure|certainly|of course)[,!.]\s*)?(?:here(?:'s| is) (?:a|the) (?:\w+ )*(?:caption|description)[^:]*:\s*)?"
  rf"(?:(?:in|throughout)\s+{_SUBJECT}\s*,\s*(?:we\s+(?:can\s+)?see\s+|there\s+(?:is|are)\s+)?|{_SUBJECT}\s+{_VERB}\s+"
  rf"|we\s+(?:can\s+)?see\s+|(?:caption|description)\s*:\s*)?",
  re.IGNORECASE,
)


def without_opening(text: str) -> str:
  """'The video shows a cat.' -> 'A cat.', with a capital first letter."""
  rest = _OPENINGS.sub("", text).lstrip(" ,:;-")
  return rest[:1].upper() + rest[1:]


@dataclasses.dataclass(frozen=True)
class Clean(Step):
  """Cleans `text` and counts its words and tokens. A row without text gets an `error`.

  openings: whether to remove phrases such as "The video shows" (`without_opening`).
  t5: whether to apply the two passes of Open-Sora's `clean_caption`: lower case, no markup, addresses or ids.
  camera: whether to append Open-Sora's sentence (" Camera motion: pan left.") to rows whose `cmotion` is one class. The step
    renames the column to `camera`, because the loader would append `cmotion` again.
  tokenizer: folder of a tokenizer for `text_len`; "byt5" counts bytes (T5 has about a quarter as many tokens); "": no count.
  """

  title: ClassVar[str] = "clean"
  needs: ClassVar[tuple[str, ...]] = ("text",)

  openings: bool = True
  t5: bool = False
  camera: bool = False
  tokenizer: str = ""

  def check(self) -> None:
    if self.tokenizer:
      captions.load_tokenizer(self.tokenizer)

  def transform(self, table: pl.LazyFrame, context: Context) -> pl.LazyFrame:
    cleaned = pl.col("text").map_elements(self._clean, return_dtype=pl.String, skip_nulls=True)
    table = table.with_columns(text=pl.when(pl.col("error").is_null()).then(cleaned).otherwise("text"))
    empty = pl.col("error").is_null() & (pl.col("text").is_null() | (pl.col("text") == ""))
    table = table.with_columns(
      error=pl.when(empty).then(pl.lit("clean: no caption")).otherwise("error"),
      retry=pl.when(empty).then(False).otherwise("retry"),
    )
    if self.camera and "cmotion" in table.collect_schema().names():
      known = pl.col("cmotion").is_in(list(CLASSES)).fill_null(False)
      sentence = pl.format(" Camera motion: {}.", pl.col("cmotion").str.replace_all("_", " ", literal=True))
      spoken = pl.when(known).then(pl.col("text") + sentence).otherwise("text")
      table = table.with_columns(text=spoken).rename({"cmotion": "camera"})
    if self.tokenizer:
      count = pl.col("text").map_elements(self._tokens, return_dtype=pl.Int64, skip_nulls=True)
      table = table.with_columns(text_len=count)
    return table.with_columns(words=pl.col("text").str.count_matches(r"\S+"))

  def _clean(self, text: str) -> str:
    text = " ".join(text.split())
    if self.openings:
      text = without_opening(text)
    return captions.clean_caption(text) if self.t5 else text

  def _tokens(self, text: str) -> int:
    return len(captions.load_tokenizer(self.tokenizer)(text)["input_ids"])
