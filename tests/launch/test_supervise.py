"""Tests of the supervisor, with a real program that ends with scripted exit codes."""

import signal
import subprocess

import pytest

from tests.launch.stand_ins import wait_for

PROGRAM = """
record(started=sys.argv[1:])
code = take("codes")
if code < 0:
  os.kill(os.getpid(), -code)
sys.exit(code)
"""

# Saves after SIGTERM as a training does: once, however many signals it gets.
WAITING = """
import signal, time
def save(*_):
  time.sleep(0.3)
  record(saved=True)
  sys.exit(75)
signal.signal(signal.SIGTERM, save)
record(started=True)
time.sleep(30)
"""


@pytest.mark.parametrize(
  ("codes", "starts", "code"),
  [
    ([75, 75, 0], 3, 0),  # saved and restarted twice, then finished
    ([2], 1, 2),  # an error of the user
    ([1], 1, 1),  # a crash of Python
    ([75, 2], 2, 2),
    ([-signal.SIGKILL, -signal.SIGABRT, 0], 3, 0),  # out of memory; JAX's runtime lost another process
    ([75], 10, 75),  # gives up after ten starts without progress
  ],
)
def test_the_exit_code_decides_about_a_restart(stand_ins, codes, starts, code):
  program = stand_ins.program("train", PROGRAM)
  stand_ins.script(codes=codes)
  stand_ins.environment["STDIT_JAX_RESTART_WAIT"] = "0"
  stand_ins.run("supervise.sh", str(program), "a b", "c'd", code=code)
  assert stand_ins.calls == [{"started": ["a b", "c'd"]}] * starts


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_program_save_and_ends_the_supervision(stand_ins, how):
  program = stand_ins.program("train", WAITING)
  supervisor = stand_ins.start("supervise.sh", str(program))
  wait_for(lambda: stand_ins.calls)
  supervisor.send_signal(how)
  assert supervisor.wait(10) == 143
  assert stand_ins.calls == [{"started": True}, {"saved": True}]  # one start, which ends before the supervisor


def test_a_signal_between_two_starts_ends_the_supervision(stand_ins):
  program = stand_ins.program("train", PROGRAM)
  stand_ins.script(codes=[75])
  stand_ins.environment["STDIT_JAX_RESTART_WAIT"] = "30"
  supervisor = stand_ins.start("supervise.sh", str(program), stderr=subprocess.PIPE)
  assert supervisor.stderr.readline() == "ended with exit code 75: starting again\n"
  supervisor.send_signal(signal.SIGTERM)
  assert supervisor.wait(5) == 143
  assert len(stand_ins.calls) == 1
