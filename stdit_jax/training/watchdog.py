"""A run of several processes ends with a message when one of them hangs or dies, instead of waiting for it for ever.

XLA's collectives wait for every process, and the runtime's own heartbeat goes on while Python hangs: so every process notes
what its loop does, reports that to the others through the key-value store of `jax.distributed`, and watches itself and
them. Whoever sees that one makes no progress says which process, on which host, since when and at what, dumps the stacks and
ends with `RESTART`, the code on which a supervisor starts the run again; the others follow.
"""

import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time

RESTART = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on from the newest checkpoint

_PREFIX = "stdit_jax/watchdog/"
_VERDICT = f"{_PREFIX}verdict"


class StartAgain(Exception):  # noqa: N818 - the others may be well
  """Something that this process alone has seen: all of them are to start again."""


def _now():
  return time.monotonic()


class Watchdog:
  """Watches the loop of this process, and those of the others when there is a key-value store.

  Args:
    timeout: seconds without progress after which the run ends; 0 watches nothing.
    slow_timeout: the same for what takes long by nature: reading a checkpoint, compiling, sampling.
    client: of `jax.distributed`, None in a run of one process; index, count: which process of how many.
  """

  def __init__(self, timeout, slow_timeout, client=None, index=0, count=1):
    self.timeout, self.slow_timeout = timeout, max(timeout, slow_timeout)
    self.client, self.index, self.count = client, index, count
    self.period = min(10.0, max(0.2, timeout / 10))
    self.host = socket.gethostname()
    self._beats, self._what, self._slow, self._last_beat = 0, "starting", True, _now()
    self._peers = {}  # index -> (report, when it was new here)
    self._answered = self._started = _now()  # when the key-value store last answered
    self._ending = threading.Lock()
    self._stopped = threading.Event()
    self._abort_handler = None

  # The loop's side.

  def beat(self, what, slow=False):
    """The loop makes progress: from now on it does `what`."""
    self._what, self._slow, self._last_beat = what, slow, _now()
    self._beats += 1

  def __enter__(self):
    if self.timeout:
      self._last_beat = self._answered = self._started = _now()
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

  def leave(self, reason, code):
    """Ends this process because of an error of its own; the others are told and end with the same code."""
    self._end(f"{self._name(self.index)} ended with an error: {reason}", code, dump=False)

  def connection_lost(self):
    """After a collective failed: waits until it is clear which process is gone and ends; returns when none is, or none is
    watched."""
    if not self.timeout:
      return
    end = _now() + 6 * self.period
    while _now() < end:
      if silent := self._silent(3 * self.period):
        self._end(silent, RESTART)
      time.sleep(self.period / 2)

  # Reports.

  def _report(self):
    number = 0
    while not self._stopped.wait(self.period):
      number += 1
      report = {"number": number, "host": self.host, "beats": self._beats, "what": self._what, "slow": self._slow}
      try:
        self._tell(f"{_PREFIX}{self.index}", report)
        found = dict(self.client.key_value_dir_get(_PREFIX))
      except Exception:  # whatever the runtime raises: `_watch` sees that no answer comes
        continue
      self._answered = _now()
      verdict = found.pop(_VERDICT, None)
      for key, value in found.items():
        index, report = int(key.rsplit("/", 1)[1]), json.loads(value)
        if report != self._peers.get(index, (None,))[0]:
          self._peers[index] = report, _now()
      if verdict is not None and not self._stopped.is_set():
        told = json.loads(verdict)
        self._end(told["text"], told["code"], tell=False)

  def _tell(self, key, value):
    self.client.key_value_set(key, json.dumps(value), allow_overwrite=True)

  def _in_time(self, call, seconds=2.0):
    """Whether `call` returned within so many seconds; the key-value store of a dead or stopped process may never answer."""
    done = threading.Event()

    def target():
      try:
        call()
        done.set()
      except Exception:  # unreachable is the answer
        pass

    threading.Thread(target=target, daemon=True).start()
    return done.wait(seconds)

  # Watching.

  def _watch(self):
    while not self._stopped.wait(self.period / 2):
      # Whoever waits for one that does what takes long, and is not further, takes as long.
      reports = [report for report, _ in list(self._peers.values())]
      slow = self._slow or any(r.get("slow") and r["beats"] <= self._beats for r in reports)
      allowed = self.slow_timeout if slow else self.timeout
      if _now() - self._last_beat > allowed:
        self._end(self._silent(3 * self.period) or self._slowest(), RESTART)
      elif silent := self._silent(self.timeout):
        self._end(silent, RESTART)

  def _name(self, index):
    host = self.host if index == self.index else self._peers.get(index, ({},))[0].get("host", "unknown")
    return f"process {index} of {self.count} (host {host})"

  def _silent(self, seconds):
    """Says which processes have sent no report for so long; "" when all have."""
    if self.client is None:
      return ""
    lines = []
    for index in range(self.count):
      report, when = self._peers.get(index, ({}, self._started))
      # One that has not begun may still be importing.
      allowed = seconds if report else max(seconds, self.slow_timeout)
      if index != self.index and not report.get("done") and _now() - when > allowed:
        what = f"; it was last at: {report['what']}" if report else ""
        lines.append(f"{self._name(index)} has sent no report for {_now() - when:.0f} s{what}")
    # Nobody's reports come any more when the process that holds them is gone: that one, then.
    if self.index and _now() - self._answered > seconds:
      return f"{self._name(0)}, which keeps the reports of all, has not answered for {_now() - self._answered:.0f} s"
    return "; ".join(lines)

  def _slowest(self):
    """Says which processes came least far, of those that all report, and that nothing goes on."""
    places = {self.index: (self._beats, self._what)}
    places |= {i: (r["beats"], r["what"]) for i, (r, _) in self._peers.items() if i != self.index and not r.get("done")}
    least = min(beats for beats, _ in places.values())
    names = ", ".join(f"{self._name(i)}, at: {what}" for i, (beats, what) in sorted(places.items()) if beats == least)
    return f"no progress for {_now() - self._last_beat:.0f} s in {names}"

  # The end.

  def _end(self, text, code, tell=True, dump=True):
    """Says why, tells the others and ends this process. Never returns."""
    self._ending.acquire()  # for good: only one thread ends it
    print(f"watchdog: {text}; {self._name(self.index)} ends with exit code {code}", file=sys.stderr, flush=True)
    if dump:
      faulthandler.dump_traceback(sys.stderr, all_threads=True)
    if self.client is not None:
      if tell:
        self._in_time(lambda: self._tell(_VERDICT, {"text": text, "code": code}))
      if self.index == 0:
        time.sleep(3 * self.period)  # it keeps the reports: the others read them first
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

  def _catch_abort(self):
    """The runtime aborts the process as soon as the one with the key-value store is gone: its reason is given here, and our
    exit code. An abort for any other reason stays one."""

    def aborted(_):
      probe = f"{_PREFIX}abort/{self.index}"
      if self._in_time(lambda: self.client.key_value_set(probe, "", allow_overwrite=True)) and not self._silent(
        3 * self.period
      ):
        return  # and abort() goes on
      text = self._silent(3 * self.period) or f"{self._name(0)}, which keeps the reports of all, is gone"
      self._end(text, RESTART, tell=False)

    # Python's own handlers run in the main thread, which waits for the device: this one runs where the abort is raised.
    self._abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    ctypes.CDLL(None).signal(signal.SIGABRT, self._abort_handler)
