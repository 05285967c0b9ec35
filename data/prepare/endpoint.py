"""Requests to an OpenAI-compatible chat endpoint (vLLM, SGLang, Ollama, hosted): with retries, rate limit, cache and counts."""

from __future__ import annotations

import base64
import collections
import contextlib
import hashlib
import json
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import httpx2

from data import paths
from data.prepare.messages import one_line
from data.prepare.workers import Passing
from data.video import BadVideo

if TYPE_CHECKING:
  from data.prepare.caption import Caption

_RETRY = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_REFUSES_ONE = {400, 413, 415, 422}  # these statuses refuse one question, others refuse all
_MOST_BYTES = 1 << 20  # largest answer
_LONGEST_WAIT = 60.0  # seconds
_CONNECT = 20.0  # seconds to connect


class Cache:
  """Answers by the content of their question, in an SQLite file on this machine, so that no answer is paid for twice.

  Raises ValueError if the file can't be used, because answers would be lost.
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
      reason = f"answers can't be stored in {self._path} ({error})"
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
  """Limits the calls per minute of all threads; 0: no limit."""

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
    """Makes all threads wait."""
    with self._lock:
      self._next = max(self._next, time.monotonic() + seconds)


class Endpoint:
  """A chat endpoint with the settings of the step; thread-safe.

  `check(text)` returns the usable part of an answer, or raises ValueError. The key is never written anywhere.
  `usage` counts calls, cached answers and retries, and sums the prompt_tokens and completion_tokens of the endpoint.
  """

  def __init__(self, step: Caption, check: Callable[[str], str]):
    self.usage, self._step, self._check = collections.Counter(), step, check
    key = os.environ.get(step.key_variable, "")
    try:
      httpx2.URL(step.url)
    except httpx2.InvalidURL as error:
      raise ValueError(f"url {step.url!r} is no address: {error}") from None
    self._client = httpx2.Client(
      base_url=step.url.rstrip("/") + "/", timeout=httpx2.Timeout(step.timeout, connect=min(step.timeout, _CONNECT)),
      headers={"authorization": f"Bearer {key}"} if key else {}, limits=httpx2.Limits(max_connections=step.concurrency),
      follow_redirects=False, trust_env=False,
    )  # fmt: skip
    self._reached = False  # whether a question ever reached the endpoint
    self._cache = Cache(step.cache or os.path.join(paths.user_cache("captions"), "answers.sqlite"))
    self._pace, self._lock = Pace(step.per_minute), threading.Lock()

  def close(self) -> None:
    self._client.close()
    self._cache.close()

  def ask(self, prompt: str, images: list[bytes]) -> str:
    """The answer to a prompt with JPEG images. After a useless answer, the question is repeated with another seed.

    Raises Passing if all attempts failed, BadVideo if the endpoint refuses this question, and ValueError if it refuses all
    questions or was never reached.
    """
    addresses = [f"data:image/jpeg;base64,{base64.b64encode(image).decode()}" for image in images]
    content = [{"type": "text", "text": prompt}, *({"type": "image_url", "image_url": {"url": a}} for a in addresses)]
    body = {"model": self._step.model, "messages": [{"role": "user", "content": content}],
            "max_tokens": self._step.max_tokens, "temperature": self._step.temperature}  # fmt: skip
    key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    if (cached := self._cache.get(key)) is not None:
      with contextlib.suppress(ValueError):
        answer = self._check(cached)
        self._count(cached=1)
        return answer
    reason, seed = "", 0
    for attempt in range(self._step.attempts):
      if attempt:
        self._count(retries=1)
        # Full jitter: threads that failed together must not return together.
        time.sleep(random.uniform(0, min(_LONGEST_WAIT, 0.25 * 2**attempt)))
      self._pace.wait()
      try:
        answer = self._call({**body, "seed": seed})
      except _TryAgain as error:
        reason = str(error)
        continue
      try:
        useful = self._check(answer)
      except ValueError as error:
        reason, seed = f"a useless answer ({error})", seed + 1  # a request without an answer keeps its seed
      else:
        self._cache.put(key, answer)
        return useful
    if not self._reached:
      raise ValueError(f"caption: no answer from {self._client.base_url} ({reason}): is the endpoint running?")
    raise Passing(f"the endpoint failed {self._step.attempts} times, last: {reason}")

  def _call(self, body: dict[str, Any]) -> str:
    begin, received = time.monotonic(), bytearray()
    try:
      with self._client.stream("POST", "chat/completions", json=body) as response:
        for block in response.iter_bytes():
          received += block
          if len(received) > _MOST_BYTES:
            raise _TryAgain("an endless answer")
          if time.monotonic() - begin > self._step.timeout:  # a slow stream is late too
            raise _TryAgain(f"no whole answer in {self._step.timeout:g} s")
    except httpx2.ConnectTimeout:
      raise _TryAgain(f"no connection in {min(self._step.timeout, _CONNECT):g} s") from None
    except httpx2.ConnectError as error:
      raise _TryAgain(f"no connection: {one_line(error)[:100]}") from None
    except httpx2.TimeoutException:
      self._reached = True
      raise _TryAgain(f"no answer in {self._step.timeout:g} s") from None
    except httpx2.HTTPError as error:
      self._reached = True
      raise _TryAgain(f"no connection ({type(error).__name__}: {one_line(error)[:100]})") from None
    self._reached = True
    self._count(calls=1)
    if response.status_code in _RETRY:
      with contextlib.suppress(ValueError):
        self._pace.pause(min(float(response.headers.get("retry-after", 0)), _LONGEST_WAIT))
      raise _TryAgain(f"status {response.status_code}")
    if response.status_code != 200:
      words = " ".join(bytes(received[:300]).decode("utf-8", "replace").split())
      reason = f"the endpoint refuses: status {response.status_code} {words}"
      raise BadVideo(reason) if response.status_code in _REFUSES_ONE else ValueError(f"caption: {reason}")
    try:
      answer = json.loads(received)
      text = answer["choices"][0]["message"]["content"]
      usage = answer.get("usage") or {}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
      raise _TryAgain("an answer of another form than chat completions have") from None
    if not isinstance(text, str):
      raise _TryAgain("an answer without text")
    self._count(**{k: usage[k] for k in ("prompt_tokens", "completion_tokens") if isinstance(usage.get(k), int)})
    return text

  def _count(self, **numbers: int) -> None:
    with self._lock:
      self.usage.update(numbers)


class _TryAgain(Exception):  # noqa: N818
  """A failure of one attempt."""
