"""The step `caption`: captions from an endpoint, from existing texts, or from a model on this machine.

A captioner is a class that takes the step as its argument. It has `make(rows, pictures) -> list of texts`, or
`one(row, pictures) -> text`. Many threads call `one`. The argument `pictures` holds JPEG files. The class may have methods
`say_estimate(rows)` and `close()`. Its attribute `pictures`, of the class `Pictures`, chooses the frames to decode.
Without it no frame is decoded. `BACKENDS` lists the captioners of this project; others have an import path "module:Class".
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import os
import re
from collections.abc import Callable
from concurrent import futures
from typing import Any, ClassVar

import einops
import numpy as np
import polars as pl
from PIL import Image

from data import paths, video
from data.prepare import prompts
from data.prepare.config import import_class
from data.prepare.cut import part_of, small_size
from data.prepare.decode import at_shares, spread
from data.prepare.messages import say
from data.prepare.shards import FAILED
from data.prepare.steps import Context, Step, at_least, beside, sizes_of
from data.prepare.workers import Failure, Passing, failure_of

_NEAR = 0.25  # largest distance in seconds between the starts of a caption and its clip
_LARGEST_SIDECAR = 100_000  # bytes
_TOGETHER = 1000  # rows whose images may be in memory
_MOST_FRAMES = 16  # frames that a chain describes one by one
_TOKEN_SIDE = 28  # pixels of a token's side, for estimates (Qwen2-VL: patches of 14, merged 2 x 2)
# Characters of scripts without spaces (Thai to Khmer, kana, Chinese). Each one counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_REFUSALS = re.compile(r"^(i'?m (sorry|unable)|sorry|i can(no|')t|as an ai|unfortunately)|\bas an ai (language )?model\b", re.I)


@dataclasses.dataclass(frozen=True)
class Caption(Step):
  """Adds the column `text`, or the column that `into` names.

  backend: "endpoint" (OpenAI-compatible), "existing", "local" (transformers), or "module:Class".
  only_missing: whether rows with a text keep it. into: column of the answers, such as "tags".

  Images: frames: number per clip. One frame is the middle one, three lie at 10, 50 and 90 %, others are spread evenly.
    side: pixels of a frame's shorter side (Open-Sora: 336). grid: whether the frames form one image, row by row.
  Questions: prompt: a name in `prompts.PROMPTS`, or a text in which {what} and {text} are filled in. chain: "" asks one
    question. "cogvideox" asks for a short caption of the clip, for captions of single frames (one every `frame_seconds`), and
    for one text of both in at most 100 words (CogVideoX, section on captions).

  Endpoint: url (with /v1), model, key_variable (environment variable with the key), timeout (seconds), attempts, per_minute
    (calls, 0: no limit), concurrency (simultaneous calls), max_tokens, temperature, prices (per million tokens in and out),
    cache (SQLite file of answers; "": in the user's cache folder). On a cluster all machines must reach url. Each machine has
    its own cache, concurrency and per_minute.
  Existing: the step takes the first text that a row has, in this order. A row without any keeps its text. timeline: column of
    records (start in seconds, text, focus); the clip that begins at start gets text and focus. column: column with the text.
    sidecar: ending of a text file beside the video. The next run reads a changed file again, except in a bucket. name: whether
    to use the words of the file name.
  Local: model (folder of an image-text-to-text model of transformers with its processor), batch (clips at a time).
  """

  title: ClassVar[str] = "caption"
  version: ClassVar[int] = 2
  unit: ClassVar[str] = "clips"
  fails: ClassVar[bool] = True
  needs: ClassVar[tuple[str, ...]] = ("path", "num_frames", "height", "width")
  silent: ClassVar[tuple[str, ...]] = (
    "url", "key_variable", "timeout", "attempts", "per_minute", "concurrency", "prices", "cache", "batch"
  )  # fmt: skip

  backend: str = "endpoint"
  only_missing: bool = False
  into: str = "text"
  frames: int = 4
  side: int = 336
  grid: bool = True
  prompt: str = "dense"
  chain: str = ""
  frame_seconds: float = 2.0

  url: str = ""
  model: str = ""
  key_variable: str = "OPENAI_API_KEY"
  timeout: float = 120.0
  attempts: int = 5
  per_minute: float = 0.0
  concurrency: int = 16
  max_tokens: int = 300
  temperature: float = 0.0
  prices: tuple[float, ...] = (0.0, 0.0)
  cache: str = ""

  column: str = ""
  sidecar: str = ""
  timeline: str = ""
  name: bool = False

  batch: int = 4

  @property
  def beside(self) -> str:
    return self.sidecar if self.backend == "existing" else ""

  def check(self) -> None:
    if self.backend not in BACKENDS and ":" not in self.backend:
      raise ValueError(f"backend = {self.backend!r} is neither one of {', '.join(BACKENDS)} nor 'module:Class'")
    if self.backend == "endpoint" and not (self.url.startswith(("http://", "https://")) and self.model):
      raise ValueError("backend 'endpoint' needs url = 'http://HOST:PORT/v1' and model")
    if self.backend == "existing" and not (self.column or self.sidecar or self.timeline or self.name):
      raise ValueError("backend 'existing' needs column, sidecar, timeline or name")
    if self.backend == "local":
      from data.prepare import caption_local

      caption_local.check(self.model)
    elif self.backend not in BACKENDS:
      _captioner_class(self.backend)
    if self.prompt not in prompts.PROMPTS and len(self.prompt.split()) < 2:
      raise ValueError(f"prompt = {self.prompt!r} is neither a text nor one of {', '.join(prompts.PROMPTS)}")
    if self.sidecar and not self.sidecar.startswith("."):
      raise ValueError(f"sidecar = {self.sidecar!r} is no ending, such as '.txt'")
    if self.chain not in ("", "cogvideox"):
      raise ValueError(f"chain = {self.chain!r} is neither '' nor 'cogvideox'")
    at_least(self, 1, "frames", "attempts", "concurrency", "max_tokens", "batch")
    at_least(self, 16, "side")
    at_least(self, 0, "per_minute", "temperature")
    if self.timeout <= 0 or self.frame_seconds <= 0:
      raise ValueError(f"timeout = {self.timeout} and frame_seconds = {self.frame_seconds} must be more than 0")
    if len(self.prices) != 2 or min(self.prices) < 0:
      raise ValueError(f"prices = {self.prices} must be two numbers from 0 up")

  def transform(self, table: pl.LazyFrame, context: Context) -> pl.LazyFrame:
    frame = table.collect()
    rows = [{self.into: None, "focus": None, **dict.fromkeys(FAILED), **row} for row in frame.iter_rows(named=True)]
    todo = [row for row in rows if row["error"] is None and not (self.only_missing and row[self.into])]
    captioner = _captioner_class(self.backend)(self)
    try:
      if todo and hasattr(captioner, "say_estimate"):
        captioner.say_estimate(todo)
      for begin in range(0, len(todo), _TOGETHER):
        part = todo[begin : begin + _TOGETHER]
        for row, result in zip(part, self._captions(captioner, part, context, begin)):
          result = result.columns(self.title) if isinstance(result, Failure) else result
          if result is not None:
            row |= result if isinstance(result, dict) else {self.into: result}
    finally:
      if hasattr(captioner, "close"):
        captioner.close()
    added = {self.into: pl.String, **({"focus": pl.Float64} if self.timeline else {}), **FAILED}
    return pl.DataFrame(rows, schema={**frame.schema, **added}, orient="row").lazy()

  def _captions(self, captioner: Any, rows: list[dict], context: Context, done: int) -> list[Any]:
    """For each row a text, a dict of columns, None or a `Failure`. `done`: number of earlier rows."""
    if not hasattr(captioner, "pictures"):
      return [_guarded(captioner.one, row, []) for row in rows]
    results: list[Any] = [None] * len(rows)

    def finish(i: int, result: Any) -> None:
      nonlocal done
      results[i], done = result, done + 1
      if context.progress:
        context.progress(done)

    assert context.pool is not None
    decode = functools.partial(context.pool.map, functools.partial(_pictures, captioner.pictures), rows, sizes=sizes_of(rows))
    how = self._in_threads if hasattr(captioner, "one") else self._in_batches
    how(captioner, rows, decode, finish)
    return results

  def _in_threads(self, captioner: Any, rows: list[dict], decode: Callable, finish: Callable[[int, Any], None]) -> None:
    """Captions rows one by one in threads, while worker processes decode the next ones."""
    asked: dict[futures.Future, int] = {}
    fatal: list[BaseException] = []  # an error that every question would raise; further questions may cost money

    def ask(row: dict, pictures: list[bytes]) -> Any:
      try:
        return None if fatal else _guarded(captioner.one, row, pictures)
      except BaseException as error:
        fatal.append(error)
        raise

    def decoded(i: int, found: Any) -> None:
      if fatal:
        raise fatal[0]
      if isinstance(found, Failure):
        finish(i, found)
      else:
        asked[threads.submit(ask, rows[i], found)] = i

    with futures.ThreadPoolExecutor(self.concurrency) as threads:
      try:
        decode(finished=decoded)
        for future in futures.as_completed(asked):
          finish(asked[future], future.result())
      except BaseException:
        threads.shutdown(wait=False, cancel_futures=True)
        raise

  def _in_batches(self, captioner: Any, rows: list[dict], decode: Callable, finish: Callable[[int, Any], None]) -> None:
    """Decodes all rows, then captions them in batches."""
    shown = decode(finished=lambda i, found: finish(i, found) if isinstance(found, Failure) else None)
    todo = [i for i, found in enumerate(shown) if not isinstance(found, Failure)]
    for part in (todo[begin : begin + self.batch] for begin in range(0, len(todo), self.batch)):
      found = _guarded(captioner.make, [rows[i] for i in part], [shown[i] for i in part])
      for i, result in zip(part, [found] * len(part) if isinstance(found, Failure) else found):
        finish(i, result)


def _guarded(function: Callable, *arguments: Any) -> Any:
  """function(*arguments), or a `Failure` if the file or a temporary error is the cause."""
  try:
    return function(*arguments)
  except (Passing, video.BadVideo, OSError) as error:
    return failure_of(error)


def _captioner_class(backend: str) -> type:
  return import_class(BACKENDS.get(backend, backend), f"backend {backend!r}")


BACKENDS = {
  "endpoint": "data.prepare.caption:EndpointCaptioner",
  "existing": "data.prepare.caption:ExistingCaptioner",
  "local": "data.prepare.caption_local:LocalCaptioner",
}


# ---------------------------------------------------------------------------------------------------------------- images


@dataclasses.dataclass(frozen=True)
class Pictures:
  """Which frames of a clip a captioner gets: `frames` of the whole clip, and single frames every `frame_seconds` (0: none)."""

  frames: int
  side: int
  grid: bool
  frame_seconds: float

  def places(self, num_frames: int) -> list[int]:
    """Numbers of the frames that show the whole clip. Three frames have the places of Open-Sora's captioners."""
    middles = [(i + 0.5) / self.frames for i in range(self.frames)]
    return at_shares(num_frames, (0.1, 0.5, 0.9) if self.frames == 3 else middles).tolist()

  def single(self, row: dict) -> list[int]:
    """Numbers of the frames that the captioner describes one by one."""
    if not self.frame_seconds:
      return []
    seconds = row["num_frames"] / (row.get("fps") or video.DEFAULT_FPS)
    return spread(row["num_frames"], min(_MOST_FRAMES, max(1, round(seconds / self.frame_seconds)))).tolist()


def _pictures(how: Pictures, row: dict, report: Callable) -> list[bytes]:
  """In a worker: JPEG files of a clip. The grid or the frames of the whole clip come first, then the single frames."""
  whole, single = how.places(row["num_frames"]), how.single(row)
  numbers = np.unique(whole + single)
  crop, height, width = part_of(row)
  size = small_size(height, width, how.side)
  read = video.read_frames(row["path"], numbers + (row.get("start") or 0), size=size, crop=crop)
  images = dict(zip(numbers.tolist(), read))
  shown = [images[i] for i in whole]
  if how.grid and len(shown) > 1:
    shown = [as_grid(shown)]
  return [as_jpeg(image) for image in [*shown, *(images[i] for i in single)]]


def as_grid(images: list[np.ndarray]) -> np.ndarray:
  """Images [H, W, 3], row by row in the most square grid. Empty places are black."""
  columns = math.ceil(math.sqrt(len(images)))
  places = [*images, *[np.zeros_like(images[0])] * (-len(images) % columns)]
  return einops.rearrange(places, "(r c) h w rgb -> (r h) (c w) rgb", c=columns)


def as_jpeg(image: np.ndarray) -> bytes:
  """uint8 [H, W, 3] -> a JPEG file."""
  out = io.BytesIO()
  Image.fromarray(image).save(out, format="jpeg", quality=90)
  return out.getvalue()


# ---------------------------------------------------------------------------------------------------------------- answers


def usable(text: str) -> str:
  """A captioner's answer without fences and quotes.

  Raises ValueError for an answer that is no caption: empty, a refusal, data, endless repetition.
  """
  text = re.sub(r"^```\w*\n|\n?```$", "", text.strip()).strip().strip('"').strip()
  words = _WORD.findall(text.lower())
  if len(words) < 3:
    raise ValueError("fewer than three words")
  if _REFUSALS.search(text):
    raise ValueError("a refusal")
  if text[0] in "{[<" or "\ufffd" in text or any(ord(c) < 32 and c not in "\n\t\r" for c in text):
    raise ValueError("no plain text")
  if len(text) > 8000 or max(map(len, words)) > 60:
    raise ValueError("too long")
  fours = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
  if len(fours) > 12 and len(set(fours)) < 0.5 * len(fours):
    raise ValueError("it repeats itself")
  return " ".join(text.split())


class EndpointCaptioner:
  def __init__(self, step: Caption):
    from data.prepare.endpoint import Endpoint

    self.step, self._endpoint = step, Endpoint(step, usable)
    self.pictures = Pictures(step.frames, step.side, step.grid, step.frame_seconds if step.chain else 0.0)

  def close(self) -> None:
    """Prints the numbers of calls and tokens and their price. Closes the connection and the cache."""
    usage = self._endpoint.usage
    if usage["calls"] or usage["cached"]:
      tokens = usage["prompt_tokens"], usage["completion_tokens"]
      counts = f"{usage['calls']:,} calls, {usage['cached']:,} answers from the cache, {usage['retries']:,} repeated"
      say(f"caption: {counts}, {tokens[0]:,} tokens in, {tokens[1]:,} out{self._cost(', cost {:.4g}', *tokens)}")
    self._endpoint.close()

  def _cost(self, text: str, tokens_in: int, tokens_out: int) -> str:
    """`text` with the price of these tokens. "" if the user gave no prices."""
    prices = self.step.prices
    return text.format((tokens_in * prices[0] + tokens_out * prices[1]) / 1e6) if any(prices) else ""

  def say_estimate(self, rows: list[dict]) -> None:
    """Prints the number of questions and tokens before the first question. It assumes answers of the full length."""
    calls = tokens = 0
    for row in rows:
      height, width = small_size(*part_of(row)[1:], self.step.side)
      image = math.ceil(height / _TOKEN_SIDE) * math.ceil(width / _TOKEN_SIDE)
      whole, single = len(self.pictures.places(row["num_frames"])), len(self.pictures.single(row))
      calls += 1 + single + bool(single)  # of the clip, of single frames, of the summary
      tokens += (whole + single) * image + 120 * (1 + single) + single * self.step.max_tokens
    out = calls * self.step.max_tokens
    price = self._cost(", at most about {:.3g}", tokens, out)
    say(f"caption: {calls:,} questions, about {tokens:,} tokens in, at most {out:,} out{price}")

  def one(self, row: dict, pictures: list[bytes]) -> str:
    """The caption of a clip. Raises BadVideo if the endpoint refuses it, Passing if it does not answer."""
    ask = self._endpoint.ask
    if not self.step.chain:
      return ask(question(self.step, self.pictures, row), pictures)
    whole = len(pictures) - len(self.pictures.single(row))  # number of images of the whole clip, which come first
    what = prompts.what(len(self.pictures.places(row["num_frames"])), self.step.grid)
    short = ask(prompts.fill(prompts.PROMPTS["short"], what=what), pictures[:whole])
    described = [ask(prompts.PROMPTS["frame"], [frame]) for frame in pictures[whole:]]
    listed = "\n".join(f"{i}. {text}" for i, text in enumerate(described, 1))
    return ask(prompts.fill(prompts.PROMPTS["summary"], short=short, frames=listed), [])


def question(step: Caption, pictures: Pictures, row: dict) -> str:
  """The step's prompt for a clip."""
  what = prompts.what(len(pictures.places(row["num_frames"])), step.grid)
  return prompts.fill(prompts.PROMPTS.get(step.prompt, step.prompt), what=what, text=row.get("text") or "")


@dataclasses.dataclass(frozen=True)
class ExistingCaptioner:
  """Takes existing texts: from a timeline, a column, a file beside the video, or the file's name."""

  step: Caption

  def one(self, row: dict, pictures: list[bytes]) -> str | dict[str, Any] | None:
    """The text of a row, a dict of columns, or None. Raises BadVideo for a text file that can't be used."""
    step, source = self.step, row.get("video") or row["path"]
    if step.timeline and (entries := row.get(step.timeline)):
      begin, rate = row.get("start") or 0, row["fps"]
      nearest = min(entries, key=lambda c: abs(c["start"] * rate - begin))
      near = abs(nearest["start"] * rate - begin) <= _NEAR * rate
      return {step.into: nearest["text"], "focus": nearest.get("focus")} if near else None
    if step.column and (text := row.get(step.column)):
      return str(text).strip() or None
    if step.sidecar and paths.exists(file := beside(source, step.sidecar)):
      return _sidecar_text(file)
    return words_of_name(source) or None if step.name else None


def _sidecar_text(file: str) -> str:
  """The caption in a file beside a video. Raises BadVideo if the file is empty, too large or not UTF-8."""
  name, (size, _) = f"its caption file {os.path.basename(file)}", paths.stat(file)
  if size > _LARGEST_SIDECAR:
    raise video.BadVideo(f"{name} has {size:,} bytes, more than {_LARGEST_SIDECAR:,}")
  try:
    # A file without a size may be a pipe or a device, whose content may never end.
    text = " ".join(paths.read_bytes(file).decode("utf-8-sig").split()) if size else ""
  except UnicodeDecodeError as error:
    raise video.BadVideo(f"{name} is not UTF-8 (byte {error.start})") from None
  if not text:
    raise video.BadVideo(f"{name} is empty")
  return text


def words_of_name(path: str) -> str:
  """Words of a file name: "red_ball-01.mp4" -> "red ball 01"."""
  return " ".join(re.findall(r"[^\W_]+", os.path.splitext(os.path.basename(path))[0]))
