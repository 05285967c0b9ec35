"""Faults that may pass end a training with code 75, and the same command resumes it. Faults of the user end it with code 2."""

import errno
import gc
import itertools
import multiprocessing
import re
import resource
import threading

import jax
import pytest

from data import video
from stdit_jax import train
from stdit_jax.errors import may_pass
from stdit_jax.training import restarts
from stdit_jax.training.checkpoints import Checkpoints
from stdit_jax.training.metrics import Metrics
from stdit_jax.training.stage_programs import StagePrograms
from tests.tiny_run import small_autoencoder, write_config
from tests.training.test_resume import assert_same_bits

STEPS = 8
SETTINGS = {**small_autoencoder(), "stages": ({"name": "eight", "steps": STEPS},), "checkpoint_every": 1}


@pytest.fixture(scope="module")
def alone(assets, tmp_path_factory):
  """Folder of an undisturbed run."""
  folder = tmp_path_factory.mktemp("faults")
  assert end_of(write_config(folder / "config.py", assets, folder / "run", **SETTINGS)) == 0
  return folder / "run"


def end_of(config, *changes):
  """Exit code of `train`, which runs in this process."""
  try:
    train.main(["--config", str(config), *changes])
  except SystemExit as stop:
    return stop.code
  return 0


def fail(patch, owner, name, error, good):
  """Makes a method raise `error` after `good` calls."""
  original, calls = getattr(owner, name), itertools.count()

  def method(*args, **kwargs):
    if next(calls) >= good:
      raise error
    return original(*args, **kwargs)

  patch.setattr(owner, name, method)


HALTED = jax.errors.JaxRuntimeError("INTERNAL: Core halted unexpectedly")


# (class or module, its function, error, calls without an error)
PASSING = [
  (StagePrograms, "update", HALTED, 1),
  (video, "read_frames", OSError(errno.EIO, "Input/output error"), 4),
  (train.Watchdog, "beat", OSError(errno.ETIMEDOUT, "the bucket gives no answer in time"), 12),  # anywhere in the loop
  (Checkpoints, "latest", OSError(errno.EIO, "Input/output error"), 2),
]


def test_passing_faults_ask_for_new_starts(assets, alone, tmp_path, monkeypatch, capsys):
  """Each start meets another fault. The last fault is a killed worker, as by the kernel if memory is full."""
  config, update = write_config(tmp_path / "config.py", assets, tmp_path / "run", **SETTINGS), StagePrograms.update
  monkeypatch.setattr(video, "RETRY_DELAYS", ())
  resumed = []
  for owner, name, error, good in PASSING:
    with monkeypatch.context() as patch:
      fail(patch, owner, name, error, good)
      assert end_of(config) == 75, name
    out, text = capsys.readouterr()
    assert str(error.strerror if isinstance(error, OSError) else error) in text
    assert ("Traceback" in text) == (error is HALTED)  # JAX's own errors may be bugs
    resumed.append(int(re.search(r"steps (\d+) to 8", out)[1]))
  assert resumed[:2] == [0, 1]
  assert sorted(resumed) == resumed

  def killing(programs):
    for worker in multiprocessing.active_children():
      worker.kill()
    return update(programs)

  with monkeypatch.context() as patch:
    patch.setattr(StagePrograms, "update", killing)
    assert end_of(config, "--config.data.workers=1", "--config.data.read_ahead=1") == 75
  text = capsys.readouterr().err
  assert "Worker process was terminated unexpectedly with exit code -9" in text
  assert "Traceback" not in text
  assert end_of(config) == 0
  assert_same_bits(alone, tmp_path / "run", STEPS, least=20)


def test_a_fault_of_the_user_is_an_error(assets, tmp_path, monkeypatch, capsys):
  config = write_config(tmp_path / "config.py", assets, tmp_path / "run", **SETTINGS)
  full, small = OSError(errno.ENOSPC, "No space left on device"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB")
  for error, words in ((full, "No space left"), (small, "a device has too little memory")):
    with monkeypatch.context() as patch:
      fail(patch, StagePrograms, "update", error, good=1)
      assert end_of(config) == 2
    assert words in capsys.readouterr().err
  assert not any(may_pass(error) for error in (full, small, ValueError("x"), RuntimeError("x"), OSError("no number")))


def test_a_checkpoint_on_a_full_disk_is_one_line(assets, alone, tmp_path, monkeypatch, capsys, caplog):
  """A limit on file sizes stands for the full disk. Orbax and asyncio log nothing, so the error is one line."""
  config, update = write_config(tmp_path / "config.py", assets, tmp_path / "run", **SETTINGS), StagePrograms.update
  limit = resource.getrlimit(resource.RLIMIT_FSIZE)

  def fill(programs):
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit[1]))
    return update(programs)

  try:
    with monkeypatch.context() as patch:
      patch.setattr(StagePrograms, "update", fill)
      assert end_of(config) == 2
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
  gc.collect()  # asyncio reports the errors of its tasks when they are deleted
  (line,) = capsys.readouterr().err.splitlines()
  assert re.fullmatch(r"error: a checkpoint could not be written to .*File too large.*then resumes from .*", line)
  assert not caplog.records
  assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
  assert end_of(config) == 0
  assert_same_bits(alone, tmp_path / "run", STEPS, least=20)


def test_metrics_on_a_full_disk_are_an_error_and_no_hang(tmp_path):
  """A limit on file sizes stands for the full disk. TensorBoard's file reaches it first."""
  metrics, errors = Metrics(str(tmp_path), 0, 1000), []

  def record():
    try:
      for step in range(1000):
        metrics.record(step, dict.fromkeys("abcdefgh", 1))
    except OSError as error:
      errors.append(error.errno)

  thread, limit = threading.Thread(target=record, daemon=True), resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
  try:
    thread.start()
    thread.join(30)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
  assert errors == [errno.EFBIG]
  assert (tmp_path / "metrics.jsonl").stat().st_size < 20_000
  metrics.close()


def test_a_fault_that_stays_ends_the_restarts(assets, tmp_path, monkeypatch, capsys):
  config = write_config(tmp_path / "config.py", assets, tmp_path / "run", **SETTINGS)
  monkeypatch.setattr(restarts, "MOST_STARTS", 2)
  codes = []
  for _ in range(4):
    with monkeypatch.context() as patch:
      fail(patch, StagePrograms, "update", HALTED, good=1 if not codes else 0)
      codes.append(end_of(config))
  # The first start makes a checkpoint. The next two start from it. The last one is refused.
  assert codes == [75, 75, 75, 2]
  assert "the run started 2 times in a row from step 1 and made no new checkpoint" in capsys.readouterr().err
  assert end_of(config) == 0
