"""Ends a run of several processes, with a message, if one of them hangs or dies.

XLA's collectives wait for every process for ever. The heartbeat of the runtime continues while Python hangs. So every process
reports the progress of its loop to the others, through the key-value store of `jax.distributed`, and watches all reports.

The process that finds no progress prints which process hangs, its host, its last activity and the time since then. It dumps its
own stacks and exits with `RESTART`, on which a supervisor starts the run again. The other processes exit with the same code.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from stdit_jax.errors import may_pass

RESTART = 75  # EX_TEMPFAIL of sysexits.h: the same command resumes from the newest checkpoint

_PREFIX = "stdit_jax/watchdog/"
_VERDICT = f"{_PREFIX}verdict"


class StartAgain(Exception):  # noqa: N818 - a request to restart, not an error of the run
  """Asks all processes to restart, for a reason that perhaps only this process has seen."""


@contextlib.contextmanager
def start_again() -> Iterator[None]:
  """Raises StartAgain for an I/O error that may pass."""
  try:
    yield
  except OSError as error:
    if not may_pass(error):
      raise
    raise StartAgain(f"{' '.join(str(error).split())}. The same command resumes") from error


@contextlib.contextmanager
def exit_to_start_again() -> Iterator[None]:
  """Exits with RESTART, and one line, after StartAgain and other errors that may pass. Prints the traceback of the latter."""
  try:
    yield
  except Exception as error:
    if not isinstance(error, StartAgain):
      if not may_pass(error):
        raise
      traceback.print_exc()
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(RESTART) from None


class Watchdog:
  """Watches the loop of this process. With a key-value store it watches the loops of the other processes as well.

  Args:
    timeout: seconds without progress after which the run ends; 0 watches nothing.
    slow_timeout: `timeout` for slow activities: reading a checkpoint, compiling, sampling.
    client: of `jax.distributed`, None in a run of one process.
    index, count: of this process, and of all processes.
  """

  def __init__(self, timeout: float, slow_timeout: float, client: Any = None, index: int = 0, count: int = 1):
    self.timeout, self.slow_timeout = timeout, max(timeout, slow_timeout)
    self.client, self.index, self.count = client, index, count
    self.period = min(10.0, max(0.2, timeout / 10))
    self.host = socket.gethostname()
    self._beats, self._what, self._slow, self._last_beat = 0, "starting", True, time.monotonic()
    self._loop_waits = False  # whether the loop waits for a thread beside it
    self._waiting, self._last_alive, self._lock = 0, 0.0, threading.Lock()  # _waiting: threads that wait for the compiler
    self._peers = {}  # index -> (report, time of its arrival)
    self._answered = self._started = time.monotonic()  # when the key-value store last answered
    self._ending = threading.Lock()
    self._stopped = threading.Event()
    self._abort_handler = None

  # Called by the loop.

  def beat(self, what: str, slow: bool = False, waits: bool = False) -> None:
    """Notes progress of the loop, which begins the activity `what`. `waits`: for threads, whose progress then counts too."""
    self._what, self._slow, self._loop_waits, self._last_beat = what, slow, waits, time.monotonic()
    self._beats += 1

  def alive(self, waits: int = 0) -> None:
    """Notes progress of a thread beside the loop. It restarts the timeout of a loop that waits. The number of beats stays.

    Args:
      waits: 1: the thread begins to wait for the compiler, so that `slow_timeout` holds; -1: it ends to wait.
    """
    with self._lock:
      self._waiting, self._last_alive = self._waiting + waits, time.monotonic()

  def _is_slow(self):
    return self._slow or (self._loop_waits and self._waiting > 0)

  def _progress(self):
    """Time of the last progress."""
    return max(self._last_beat, self._last_alive) if self._loop_waits else self._last_beat

  def __enter__(self) -> "Watchdog":
    if self.timeout:
      self._last_beat = self._answered = self._started = time.monotonic()
      threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
      if self.client is not None:
        threading.Thread(target=self._report, name="watchdog reports", daemon=True).start()
        self._catch_abort()
    return self

  def __exit__(self, *_):
    self._stopped.set()
    if self.timeout and self.client is not None:
      ctypes.CDLL(None).signal(signal.SIGABRT, None)
      self._in_time(lambda: self._tell(f"{_PREFIX}{self.index}", {"done": True}))

  def leave(self, reason: str, code: int) -> NoReturn:
    """Ends this process after an error of its own. The other processes end with the same code."""
    self._end(f"{self._name(self.index)} ended with an error: {reason}", code, dump=False)

  def connection_lost(self) -> None:
    """Called after a failed collective. Ends this process with a message if another process stops its reports.

    Returns if all processes still report, or if nothing is watched.
    """
    if not self.timeout:
      return
    end = time.monotonic() + 6 * self.period
    while time.monotonic() < end:
      if silent := self._silent(3 * self.period):
        self._end(silent, RESTART)
      time.sleep(self.period / 2)

  # Reports.

  def _report(self):
    number = 0
    while not self._stopped.wait(self.period):
      number += 1
      report = {
        "number": number,
        "host": self.host,
        "beats": self._beats,
        "what": self._what,
        "slow": self._is_slow(),
      }
      try:
        self._tell(f"{_PREFIX}{self.index}", report)
        found = dict(self.client.key_value_dir_get(_PREFIX))
      except Exception:  # the runtime raises many types; `_watch` notices the missing answer
        continue
      self._answered = time.monotonic()
      verdict = found.pop(_VERDICT, None)
      for key, value in found.items():
        index, report = int(key.rsplit("/", 1)[1]), json.loads(value)
        if report != self._peers.get(index, (None,))[0]:
          self._peers[index] = report, time.monotonic()
      if verdict is not None and not self._stopped.is_set():
        told = json.loads(verdict)
        self._end(told["text"], told["code"], tell=False)

  def _tell(self, key: str, value: dict) -> None:
    self.client.key_value_set(key, json.dumps(value), allow_overwrite=True)

  def _in_time(self, call: Callable, seconds: float = 2.0) -> bool:
    """Whether `call` returned within `seconds`. The key-value store of a dead or stopped process may never answer."""
    done = threading.Event()

    def target():
      try:
        call()
        done.set()
      except Exception:  # the store is unreachable: `done` stays unset
        pass

    threading.Thread(target=target, daemon=True).start()
    return done.wait(seconds)

  # Watching.

  def _watch(self):
    while not self._stopped.wait(self.period / 2):
      # A process that waits for a slower process needs the longer timeout as well.
      reports = [report for report, _ in list(self._peers.values())]
      slow = self._is_slow() or any(r.get("slow") and r["beats"] <= self._beats for r in reports)
      allowed = self.slow_timeout if slow else self.timeout
      if time.monotonic() - self._progress() > allowed:
        self._end(self._silent(3 * self.period) or self._slowest(), RESTART)
      elif silent := self._silent(self.timeout):
        self._end(silent, RESTART)

  def _name(self, index):
    host = self.host if index == self.index else self._peers.get(index, ({},))[0].get("host", "unknown")
    return f"process {index} of {self.count} (host {host})"

  def _silent(self, seconds):
    """Describes the processes without a report for `seconds`; "" if every process has reported."""
    if self.client is None:
      return ""
    lines = []
    for index in range(self.count):
      report, when = self._peers.get(index, ({}, self._started))
      # A process without any report may still be importing.
      allowed = seconds if report else max(seconds, self.slow_timeout)
      if index != self.index and not report.get("done") and time.monotonic() - when > allowed:
        what = f"; it was last at: {report['what']}" if report else ""
        lines.append(f"{self._name(index)} has sent no report for {time.monotonic() - when:.0f} s{what}")
    # Process 0 holds the store. Without an answer of the store no report arrives, so the message names process 0 alone.
    if self.index and time.monotonic() - self._answered > seconds:
      return f"{self._name(0)}, which holds the reports of all, has not answered for {time.monotonic() - self._answered:.0f} s"
    return "; ".join(lines)

  def _slowest(self):
    """Describes the processes with the least progress, if all processes report and none makes progress."""
    places = {self.index: (self._beats, self._what)}
    places |= {i: (r["beats"], r["what"]) for i, (r, _) in self._peers.items() if i != self.index and not r.get("done")}
    least = min(beats for beats, _ in places.values())
    names = ", ".join(f"{self._name(i)}, at: {what}" for i, (beats, what) in sorted(places.items()) if beats == least)
    return f"no progress for {time.monotonic() - self._progress():.0f} s in {names}"

  # The end.

  def _end(self, text: str, code: int, tell: bool = True, dump: bool = True) -> NoReturn:
    """Prints the reason, tells the other processes and ends this process. Never returns."""
    self._ending.acquire()  # never released: only one thread ends the process
    print(f"watchdog: {text}; {self._name(self.index)} ends with exit code {code}", file=sys.stderr, flush=True)
    if dump:
      faulthandler.dump_traceback(sys.stderr, all_threads=True)
    if self.client is not None:
      if tell:
        self._in_time(lambda: self._tell(_VERDICT, {"text": text, "code": code}))
      if self.index == 0:
        time.sleep(3 * self.period)  # it holds the store; the others must read the verdict first
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

  def _catch_abort(self):
    """Turns the runtime's abort after the death of process 0 into a message and our exit code. Other aborts stay aborts."""

    def aborted(_):
      answers = self._in_time(lambda: self.client.key_value_set(f"{_PREFIX}abort/{self.index}", "", allow_overwrite=True))
      silent = self._silent(3 * self.period)
      if silent or not answers:  # else abort() continues
        self._end(silent or f"{self._name(0)}, which holds the reports of all, died", RESTART, tell=False)

    # Python's handlers run in the main thread, which waits for the device. A C handler runs in the thread that aborts.
    self._abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    ctypes.CDLL(None).signal(signal.SIGABRT, self._abort_handler)
