"""The step `caption`: from an endpoint, from what is there already, or by a model on this machine.

A captioner is a class with `make(rows, pictures) -> list of texts` or, to be asked from many threads, `one(row, pictures) ->
text`; it may have `pictures` (a `Pictures`; without it none are decoded), `say_estimate(rows)` and `close()`. `BACKENDS` has
ours, any other is named by its import path "module:Class" and gets the step as its argument.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import io
import math
import os
import re
from collections.abc import Callable
from concurrent import futures
from typing import Any, ClassVar

import numpy as np
import polars as pl
from PIL import Image

from data import paths, video
from data.prepare import prompts
from data.prepare.cut import part_of, small_size
from data.prepare.messages import say
from data.prepare.shards import FAILED
from data.prepare.steps import Context, Step, beside, sizes_of
from data.prepare.workers import Failure, Passing

_LARGEST_SIDECAR = 100_000  # bytes
_TOGETHER = 1000  # rows whose pictures may be in memory
_MOST_FRAMES = 16  # that a chain describes one by one
_TOKEN_SIDE = 28  # pixels of a picture's side that one token stands for (Qwen2-VL's patches of 14, merged 2 x 2): for estimates
# Characters of writing without spaces (Thai to Khmer, kana, Chinese), each of which counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_REFUSALS = re.compile(r"^(i'?m (sorry|unable)|sorry|i can(no|')t|as an ai|unfortunately)|\bas an ai (language )?model\b", re.I)


@dataclasses.dataclass(frozen=True)
class Caption(Step):
  """Adds `text`, or another column that `into` names.

  backend: "endpoint" (OpenAI-compatible), "existing", "local" (transformers), or "module:Class".
  only_missing: rows that have a text keep it. into: the column of the answers; other than "text" for tags and the like.

  What is shown: frames: pictures of a clip: 1 is the middle one, 3 are at 10, 50 and 90 %, others spread evenly. side: pixels
  of their shorter side (the original: 336). grid: joined to one picture, row by row.
  What is asked: prompt: a name of `prompts.PROMPTS` or a text ({what} and {text} are filled in). chain: "" one question, or
  "cogvideox": a short caption of the whole, captions of single frames, one every `frame_seconds`, then one text of both in at
  most 100 words (CogVideoX, section on captions).

  Endpoint: url (with /v1), model, key_variable (environment variable with the key), timeout (seconds), attempts, per_minute
  (calls, 0: no limit), concurrency (calls at a time), max_tokens, temperature, prices (for a million tokens in and out),
  cache (SQLite file of answers; "": in the user's cache folder). On a cluster url has to be known to all machines, and each one
  has its own cache, concurrency and per_minute.
  Existing: column, then sidecar (ending of a text file beside the video; one that changed, came or went since is read again,
    on disks), else words of the file's name (name = True). Where there is none, a row keeps what it has.
    timeline: column of (start in seconds, text, focus) records; text and focus go to the clip that begins there.
  Local: model is a folder of transformers' image-text-to-text models with its processor; batch: clips at a time.
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
      raise ValueError(f"backend = {self.backend!r} is none of {', '.join(BACKENDS)} and no 'module:Class'")
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
      raise ValueError(f"prompt = {self.prompt!r} is no text, and none of {', '.join(prompts.PROMPTS)}")
    if self.sidecar and not self.sidecar.startswith("."):
      raise ValueError(f"sidecar = {self.sidecar!r} is no ending, as '.txt'")
    if self.chain not in ("", "cogvideox"):
      raise ValueError(f"chain = {self.chain!r} is neither '' nor 'cogvideox'")
    if self.frames < 1 or self.side < 16 or self.attempts < 1 or self.concurrency < 1 or len(self.prices) != 2:
      raise ValueError("frames, attempts and concurrency must be at least 1, side at least 16, prices two numbers")
    if self.max_tokens < 1 or self.batch < 1 or self.timeout <= 0 or self.frame_seconds <= 0:
      raise ValueError("max_tokens and batch must be at least 1, timeout and frame_seconds more than 0")
    if self.per_minute < 0 or self.temperature < 0 or min(self.prices) < 0:
      raise ValueError("per_minute, temperature and prices must be 0 or more")

  def transform(self, table: pl.LazyFrame, context: Context) -> pl.LazyFrame:
    frame = table.collect()
    rows = [{self.into: None, "focus": None, **dict.fromkeys(FAILED), **row} for row in frame.iter_rows(named=True)]
    todo = [i for i, row in enumerate(rows) if row["error"] is None and not (self.only_missing and row[self.into])]
    captioner = make_captioner(self)
    try:
      if todo and hasattr(captioner, "say_estimate"):
        captioner.say_estimate([rows[i] for i in todo])
      for begin in range(0, len(todo), _TOGETHER):
        part = todo[begin : begin + _TOGETHER]
        for i, result in zip(part, self._captions(captioner, [rows[i] for i in part], context, begin)):
          failed = isinstance(result, Failure)
          rows[i] |= {"error": f"caption: {result.reason}", "retry": result.retry} if failed else self._columns(result)
    finally:
      if hasattr(captioner, "close"):
        captioner.close()
    added = {self.into: pl.String, **({"focus": pl.Float64} if self.timeline else {}), **FAILED}
    return pl.DataFrame(rows, schema={**frame.schema, **added}, orient="row").lazy()

  def _columns(self, result: Any) -> dict[str, Any]:
    """A text, several columns, or nothing."""
    if result is None:
      return {}
    return result if isinstance(result, dict) else {self.into: result}

  def _captions(self, captioner: Any, rows: list[dict], context: Context, done: int) -> list[Any]:
    """For each row a text (or None), or why there is none; `done` rows came before. Decoding and asking go on together."""
    if not hasattr(captioner, "pictures"):
      return [_guarded(captioner.one, row, []) for row in rows]
    results: list[Any] = [None] * len(rows)
    shown: dict[int, list[bytes]] = {}

    def advance(count: int) -> None:
      nonlocal done
      done += count
      if context.progress:
        context.progress(done)

    hopeless: list[BaseException] = []  # what no further question would be spared: none is asked that may have its price

    def ask(row: dict, pictures: list[bytes]) -> Any:
      try:
        return None if hopeless else _guarded(captioner.one, row, pictures)
      except BaseException as error:
        hopeless.append(error)
        raise

    with futures.ThreadPoolExecutor(self.concurrency) as threads:
      asked: dict[futures.Future, int] = {}

      def finished(i: int, found: Any) -> None:
        if hopeless:
          raise hopeless[0]
        if isinstance(found, Failure):
          results[i] = found
          advance(1)
        elif hasattr(captioner, "one"):
          asked[threads.submit(ask, rows[i], found)] = i
        else:
          shown[i] = found

      try:
        look = functools.partial(_pictures, captioner.pictures)
        context.pool.map(look, rows, sizes=sizes_of(rows), finished=finished)
        for future in futures.as_completed(asked):
          results[asked[future]] = future.result()
          advance(1)
      except BaseException:
        threads.shutdown(wait=False, cancel_futures=True)
        raise
    for begin in range(0, len(shown), self.batch):
      part = sorted(shown)[begin : begin + self.batch]
      found = _guarded(captioner.make, [rows[i] for i in part], [shown[i] for i in part])
      for i, result in zip(part, [found] * len(part) if isinstance(found, Failure) else found):
        results[i] = result
      advance(len(part))
    return results


def _guarded(function: Callable, *arguments: Any) -> Any:
  try:
    return function(*arguments)
  except Passing as error:
    return Failure(str(error), retry=True)
  except video.BadVideo as error:
    return Failure(str(error), retry=isinstance(error, video.Away))
  except OSError as error:
    return Failure(" ".join(str(error).split()), retry=True)


def make_captioner(step: Caption) -> Any:
  """The step's backend."""
  return _captioner_class(step.backend)(step)


def _captioner_class(backend: str) -> type:
  """ValueError in one line if there is none."""
  module, _, name = BACKENDS.get(backend, backend).partition(":")
  try:
    return getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError) as error:
    raise ValueError(f"backend {backend!r} can't be used ({error})") from None


BACKENDS = {
  "endpoint": "data.prepare.caption:EndpointCaptioner",
  "existing": "data.prepare.caption:ExistingCaptioner",
  "local": "data.prepare.caption_local:LocalCaptioner",
}


# --------------------------------------------------------------------------------------------------------------- pictures


@dataclasses.dataclass(frozen=True)
class Pictures:
  """Which pictures of a clip are shown; in a worker: row -> list of JPEG files, the grid (or the frames) first, then those that
  are described one by one."""

  frames: int
  side: int
  grid: bool
  frame_seconds: float  # 0: none

  def places(self, num_frames: int) -> list[int]:
    if self.frames == 3:
      at = [0.1, 0.5, 0.9]  # of Open-Sora's captioners
    else:
      at = [(i + 0.5) / self.frames for i in range(self.frames)]
    return sorted({min(num_frames - 1, int(share * num_frames)) for share in at})

  def single(self, num_frames: int, fps: float) -> list[int]:
    if not self.frame_seconds:
      return []
    count = min(_MOST_FRAMES, max(1, round(num_frames / fps / self.frame_seconds)))
    return sorted({int((i + 0.5) * num_frames / count) for i in range(count)})


def _pictures(how: Pictures, row: dict, report: Callable) -> list[bytes]:
  whole = how.places(row["num_frames"])
  single = how.single(row["num_frames"], row.get("fps") or video.DEFAULT_FPS)
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
  """Pictures [H, W, 3] row by row in the squarest grid; what is left over is black."""
  columns = math.ceil(math.sqrt(len(images)))
  rows = math.ceil(len(images) / columns)
  images = [*images, *[np.zeros_like(images[0])] * (rows * columns - len(images))]
  return np.concatenate([np.concatenate(images[r * columns : (r + 1) * columns], 1) for r in range(rows)])


def as_jpeg(image: np.ndarray) -> bytes:
  """uint8 [H, W, 3] as a file."""
  out = io.BytesIO()
  Image.fromarray(image).save(out, format="jpeg", quality=90)
  return out.getvalue()


# ---------------------------------------------------------------------------------------------------------------- answers


def usable(text: str) -> str:
  """A captioner's answer without fences and quotes. ValueError for what is none: empty, a refusal, data, endless repetition."""
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
  """One clip's caption by questions to an endpoint."""

  def __init__(self, step: Caption):
    from data.prepare import endpoint

    self.step = step
    self.pictures = Pictures(step.frames, step.side, step.grid, step.frame_seconds if step.chain else 0.0)
    cache = step.cache or os.path.join(paths.user_cache("captions"), "answers.sqlite")
    self._endpoint = endpoint.Endpoint(
      step.url, step.model, key_variable=step.key_variable, timeout=step.timeout, attempts=step.attempts,
      per_minute=step.per_minute, cache=cache, connections=step.concurrency,
    )  # fmt: skip

  def close(self) -> None:
    usage = self._endpoint.usage
    cost = f", cost {usage.cost(self.step.prices):.4g}" if any(self.step.prices) else ""
    if usage.calls or usage.cached:
      say(
        f"caption: {usage.calls:,} calls, {usage.cached:,} answers from the cache, {usage.retries:,} repeated, "
        f"{usage.prompt_tokens:,} tokens in, {usage.completion_tokens:,} out{cost}"
      )
    self._endpoint.close()

  def say_estimate(self, rows: list[dict]) -> None:
    """What is about to be asked, before anything is: pictures as tokens of 28 x 28 pixels, answers of the full length."""
    calls = tokens = 0
    for row in rows:
      height, width = small_size(*part_of(row)[1:], self.step.side)
      picture = math.ceil(height / _TOKEN_SIDE) * math.ceil(width / _TOKEN_SIDE)
      whole = len(self.pictures.places(row["num_frames"]))
      single = len(self.pictures.single(row["num_frames"], row.get("fps") or video.DEFAULT_FPS))
      calls += 1 + single + bool(single)
      tokens += (whole + single) * picture + 120 * (1 + single) + single * self.step.max_tokens
    cost = (tokens * self.step.prices[0] + calls * self.step.max_tokens * self.step.prices[1]) / 1e6
    price = f", at most about {cost:.3g}" if any(self.step.prices) else ""
    say(f"caption: {calls:,} questions, about {tokens:,} tokens in, at most {calls * self.step.max_tokens:,} out{price}")

  def one(self, row: dict, pictures: list[bytes]) -> str:
    step = self.step
    single = len(self.pictures.single(row["num_frames"], row.get("fps") or video.DEFAULT_FPS)) if step.chain else 0
    whole, frames = pictures[: len(pictures) - single], pictures[len(pictures) - single :]
    shown = prompts.what(len(self.pictures.places(row["num_frames"])), step.grid)
    if not step.chain:
      template = prompts.PROMPTS.get(step.prompt, step.prompt)
      return self._ask(_fill(template, what=shown, text=row.get("text") or ""), whole)
    short = self._ask(_fill(prompts.PROMPTS["short"], what=shown), whole)
    described = [self._ask(prompts.PROMPTS["frame"], [frame]) for frame in frames]
    listed = "\n".join(f"{i}. {text}" for i, text in enumerate(described, 1))
    return self._ask(_fill(prompts.PROMPTS["summary"], short=short, frames=listed), [])

  def _ask(self, prompt: str, images: list[bytes]) -> str:
    from data.prepare.endpoint import Refused

    how = {"max_tokens": self.step.max_tokens, "temperature": self.step.temperature}
    try:
      return self._endpoint.ask(prompt, images, check=usable, **how)
    except Refused as error:
      if error.all:
        raise ValueError(f"caption: {error}") from None
      raise video.BadVideo(str(error)) from None


def _fill(template: str, **values: str) -> str:
  """Only our own places are filled: a text with braces stays a text."""
  return re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), template)


class ExistingCaptioner:
  """A text that is there already: in a column, on a timeline, in a file beside the video, in the file's name."""

  _NEAR = 0.25  # seconds between a caption's start and that of the clip that it belongs to

  def __init__(self, step: Caption):
    self.step = step

  def one(self, row: dict, pictures: list[bytes]) -> str | dict[str, Any] | None:
    step = self.step
    if step.timeline and row.get(step.timeline):
      return self._on_timeline(row)
    if step.column and row.get(step.column):
      return str(row[step.column]).strip() or None
    source = row.get("video") or row["path"]
    if step.sidecar and paths.exists(file := beside(source, step.sidecar)):
      return sidecar_text(file)
    return words_of_name(source) or None if step.name else None

  def _on_timeline(self, row: dict) -> dict[str, Any] | None:
    begin, rate = row.get("start") or 0, row["fps"]
    nearest = min(row[self.step.timeline], key=lambda c: abs(c["start"] * rate - begin))
    if abs(nearest["start"] * rate - begin) > self._NEAR * rate:
      return None
    return {self.step.into: nearest["text"], "focus": nearest.get("focus")}


def sidecar_text(file: str) -> str:
  """The caption in a file beside a video. BadVideo if there is none in it."""
  name, (size, _) = f"its caption file {os.path.basename(file)}", paths.stat(file)
  if size > _LARGEST_SIDECAR:
    raise video.BadVideo(f"{name} has {size:,} bytes, more than {_LARGEST_SIDECAR:,}")
  try:
    # What has no size (a pipe, a device) may have no end.
    text = " ".join(paths.read_bytes(file).decode("utf-8-sig").split()) if size else ""
  except UnicodeDecodeError as error:
    raise video.BadVideo(f"{name} is not UTF-8 (byte {error.start})") from None
  if not text:
    raise video.BadVideo(f"{name} is empty")
  return text


def words_of_name(path: str) -> str:
  return " ".join(re.findall(r"[^\W_]+", os.path.splitext(os.path.basename(path))[0]))
