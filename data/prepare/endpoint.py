"""Requests to an OpenAI-compatible chat endpoint (vLLM, SGLang, Ollama, hosted ones): retried, slowed down, cached, counted."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2

from data.prepare.workers import Passing

_RETRY = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_REFUSES_ONE = {400, 413, 415, 422}  # this question; any other status would meet all of them
_MOST_BYTES = 1 << 20  # of an answer
_LONGEST_WAIT = 60.0  # seconds
_CONNECT = 20.0  # seconds for a connection


@dataclasses.dataclass
class Usage:
  """What was asked so far: calls, those answered from the cache, tokens in and out as the endpoint counts them."""

  calls: int = 0
  cached: int = 0
  retries: int = 0
  prompt_tokens: int = 0
  completion_tokens: int = 0

  def cost(self, prices: tuple[float, float]) -> float:
    """In the currency of `prices`, which are for a million tokens in and out."""
    return (self.prompt_tokens * prices[0] + self.completion_tokens * prices[1]) / 1e6


class Cache:
  """Answers by the content of their question, in an SQLite file on this machine: what was paid for is never asked again.

  ValueError where that can't be: better no further question than one whose answer is lost.
  """

  def __init__(self, path: str):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    self._path, self._lock = path, threading.Lock()
    with self._errors():
      self._file = sqlite3.connect(path, timeout=60, check_same_thread=False)
      self._file.execute("PRAGMA journal_mode=WAL")  # a killed process loses at most its last answer
      self._file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")

  @contextlib.contextmanager
  def _errors(self) -> Iterator[None]:
    try:
      yield
    except sqlite3.Error as error:
      reason = f"answers can't be kept in {self._path} ({error})"
      raise ValueError(f"caption: {reason}: make room there, or give another file with caption.cache") from None

  def get(self, key: str) -> str | None:
    with self._lock, self._errors():
      row = self._file.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
    return row and row[0]

  def put(self, key: str, answer: str) -> None:
    with self._lock, self._errors(), self._file:
      self._file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, answer))

  def close(self) -> None:
    self._file.close()


class Pace:
  """At most so many calls per minute, over all threads; 0: no limit."""

  def __init__(self, per_minute: float):
    self._gap = 60.0 / per_minute if per_minute else 0.0
    self._lock, self._next = threading.Lock(), 0.0

  def wait(self) -> None:
    with self._lock:
      now = time.monotonic()
      begin = max(now, self._next)
      self._next = begin + self._gap
    time.sleep(begin - now)

  def pause(self, seconds: float) -> None:
    """Everybody waits: the endpoint asked for it."""
    with self._lock:
      self._next = max(self._next, time.monotonic() + seconds)


class Endpoint:
  """A chat endpoint; thread-safe.

  Args:
    url: up to and with /v1, as http://localhost:8000/v1.
    model: name the endpoint knows.
    key_variable: environment variable that holds the key; the key itself is never written anywhere.
    timeout: seconds for an answer. attempts: of one question. per_minute: calls, 0: no limit.
    cache: file of answers.
  """

  def __init__(
    self, url: str, model: str, *, key_variable: str = "OPENAI_API_KEY", timeout: float = 120.0, attempts: int = 5,
    per_minute: float = 0.0, cache: str, connections: int = 16,
  ):  # fmt: skip
    self.model, self.usage, self._attempts = model, Usage(), attempts
    key = os.environ.get(key_variable, "")
    try:
      httpx2.URL(url)
    except httpx2.InvalidURL as error:
      raise ValueError(f"url {url!r} is none: {error}") from None
    self._client = httpx2.Client(
      base_url=url.rstrip("/") + "/", timeout=httpx2.Timeout(timeout, connect=min(timeout, _CONNECT)),
      headers={"authorization": f"Bearer {key}"} if key else {}, limits=httpx2.Limits(max_connections=connections),
      follow_redirects=False, trust_env=False,
    )  # fmt: skip
    self._reached = False  # whether a question ever got through
    self._timeout, self._pace, self._cache, self._lock = timeout, Pace(per_minute), Cache(cache), threading.Lock()

  def close(self) -> None:
    self._client.close()
    self._cache.close()

  def ask(self, prompt: str, images: list[bytes], *, max_tokens: int, temperature: float, check=lambda text: text) -> str:
    """The answer to a prompt with JPEG pictures.

    `check(text)` returns the usable part or raises `ValueError`; then the question is asked again, with another seed.
    Raises Passing when all attempts failed, Refused when it makes no sense to ask again, or when nobody is there: no question
    ever reached the endpoint.
    """
    addresses = [f"data:image/jpeg;base64,{base64.b64encode(image).decode()}" for image in images]
    content = [{"type": "text", "text": prompt}, *({"type": "image_url", "image_url": {"url": a}} for a in addresses)]
    body = {"model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens,
            "temperature": temperature}  # fmt: skip
    key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    cached = self._cache.get(key)
    if cached is not None:
      with contextlib.suppress(ValueError):
        answer = check(cached)
        self._count(cached=1)
        return answer
    reason, seed = "", 0
    for attempt in range(self._attempts):
      if attempt:
        self._count(retries=1)
        # Full jitter, so that those who failed together don't come back together.
        time.sleep(random.uniform(0, min(_LONGEST_WAIT, 0.25 * 2**attempt)))
      self._pace.wait()
      try:
        answer = self._call({**body, "seed": seed})
        useful = check(answer)
      except _TryAgain as error:
        reason = str(error)
      except ValueError as error:
        reason, seed = f"a useless answer ({error})", seed + 1  # only then: a lost answer must come as it would have come
      else:
        self._cache.put(key, answer)
        return useful
    if not self._reached:
      raise Refused(f"nobody is at {self._client.base_url} ({reason}): is the endpoint running?", True)
    raise Passing(f"the endpoint failed {self._attempts} times, last: {reason}")

  def _call(self, body: dict[str, Any]) -> str:
    begin, received = time.monotonic(), bytearray()
    try:
      with self._client.stream("POST", "chat/completions", json=body) as response:
        for block in response.iter_bytes():
          received += block
          if len(received) > _MOST_BYTES:
            raise _TryAgain("an endless answer")
          if time.monotonic() - begin > self._timeout:  # one that drips is late, too
            raise _TryAgain(f"no whole answer in {self._timeout:g} s")
    except httpx2.ConnectTimeout:
      raise _TryAgain(f"no connection in {min(self._timeout, _CONNECT):g} s") from None
    except httpx2.ConnectError as error:
      raise _TryAgain(f"no connection: {' '.join(str(error).split())[:100]}") from None
    except httpx2.TimeoutException:
      self._reached = True
      raise _TryAgain(f"no answer in {self._timeout:g} s") from None
    except httpx2.HTTPError as error:
      self._reached = True
      raise _TryAgain(f"no connection ({type(error).__name__}: {' '.join(str(error).split())[:100]})") from None
    self._reached = True
    self._count(calls=1)
    if response.status_code in _RETRY:
      with contextlib.suppress(ValueError):
        self._pace.pause(min(float(response.headers.get("retry-after", 0)), _LONGEST_WAIT))
      raise _TryAgain(f"status {response.status_code}")
    if response.status_code != 200:
      words = " ".join(bytes(received[:300]).decode("utf-8", "replace").split())
      raise Refused(f"the endpoint refuses: status {response.status_code} {words}", response.status_code not in _REFUSES_ONE)
    try:
      answer = json.loads(received)
      text = answer["choices"][0]["message"]["content"]
      usage = answer.get("usage") or {}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
      raise _TryAgain("an answer of another form than chat completions have") from None
    if not isinstance(text, str):
      raise _TryAgain("an answer without text")
    tokens = [usage.get(k) for k in ("prompt_tokens", "completion_tokens")]
    self._count(**{k: v for k, v in zip(("prompt_tokens", "completion_tokens"), tokens) if isinstance(v, int)})
    return text

  def _count(self, **numbers: int) -> None:
    with self._lock:
      for name, value in numbers.items():
        setattr(self.usage, name, getattr(self.usage, name) + value)


class Refused(Exception):  # noqa: N818
  """The endpoint will not take this question however often it is asked, or (`all`) none at all: wrong key, address or model."""

  def __init__(self, reason: str, for_all: bool):
    super().__init__(reason)
    self.all = for_all


class _TryAgain(Exception):  # noqa: N818
  """A failure of one attempt."""
