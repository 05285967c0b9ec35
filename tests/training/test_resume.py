"""A killed or stopped run that resumes ends with the same bits as an undisturbed run, over stages, buckets and epochs.

`python -m tests.long.kills` kills trainings and other programs at 200 random moments.
"""

import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from stdit_jax import convert, sample
from stdit_jax.errors import InputError
from stdit_jax.training.checkpoints import Checkpoints, DamagedCheckpointError, load_weights
from stdit_jax.training.watchdog import StartAgain
from tests.object_store import BUCKET
from tests.runs import Run
from tests.tiny_run import ROOT, environment, small_autoencoder, text_from_disk, tiny_config, write_config

STEPS = 20
STAGES = (
  {"name": "first", "steps": 12, "optimizer.accumulate": 2},
  {"name": "second", "steps": 8, "keep_optimizer": False, "optimizer.learning_rate": 2e-3, "optimizer.b1": 0.8,
   "data.buckets": (("64p", 4, 1.0, 2),), "mask_ratios": {"quarter_tail": 0.5}},
)  # fmt: skip
VIDEO = ("0000-columns-seed0.mp4", "0000-columns-seed0.json")


def start(config, log, **more):
  command = [sys.executable, "-m", "stdit_jax.train", "--config", str(config)]
  return subprocess.Popen(command, cwd=ROOT, env=environment(**more), stdout=log.open("a"), stderr=subprocess.STDOUT)


def finish(config, log, **more):
  assert start(config, log, **more).wait(240) == 0, log.read_text()[-3000:]


def kill_when(config, log, condition, what, how=signal.SIGKILL, **more):
  """Starts the run and kills it as soon as `condition()` holds. Fails if the run ends before. Returns its exit code."""
  process = start(config, log, **more)
  try:
    end = time.monotonic() + 240
    while not condition():
      assert process.poll() is None, f"ended before {what}: {log.read_text()[-3000:]}"
      assert time.monotonic() < end, f"never {what}"
      time.sleep(0.001)
    process.send_signal(how)
    return process.wait(60)
  finally:
    process.kill()
    process.wait()


def items(output, step=STEPS):
  """The items params, ema and opt of a checkpoint, as NumPy trees."""
  folder = pathlib.Path(output) / "checkpoints" / str(step)
  with ocp.StandardCheckpointer() as checkpointer:
    return {name: jax.tree.map(np.asarray, checkpointer.restore(folder / name)) for name in ("params", "ema", "opt")}


def metrics(output):
  lines = [json.loads(line) for line in (pathlib.Path(output) / "metrics.jsonl").read_text().splitlines()]
  return [line["step"] for line in lines], [
    {k: v for k, v in line.items() if k != "time" and not k.startswith("speed/")} for line in lines
  ]


@pytest.fixture(scope="module")
def left_alone(assets, tmp_path_factory):
  folder = tmp_path_factory.mktemp("resume")
  settings = {"stages": STAGES, "checkpoint_every": 3, "keep_checkpoints": 20, **text_from_disk(assets)}
  config = write_config(folder / "config.py", assets, folder / "alone", **settings)
  finish(config, folder / "alone.log")
  return folder, settings


def writes_a_checkpoint(output):
  checkpoints = output / "checkpoints"
  return checkpoints.is_dir() and any("tmp" in p.name for p in checkpoints.iterdir())


def assert_same_bits(alone, other, step=STEPS, least=100):
  alone, other = items(alone, step), items(other, step)
  paths = jax.tree_util.tree_flatten_with_path(alone)[0]
  assert len(paths) > least
  for (path, a), b in zip(paths, jax.tree.leaves(other), strict=True):
    assert a.tobytes() == b.tobytes(), f"{jax.tree_util.keystr(path)} differs by {np.abs(a - b).max()}"


def test_a_killed_run_resumes_with_the_same_bits(assets, left_alone):
  folder, settings = left_alone
  output, log = folder / "killed", folder / "killed.log"
  config = write_config(folder / "killed.py", assets, output, **settings)
  checkpoints = output / "checkpoints"

  # On SIGTERM the run saves its current step.
  code = kill_when(config, log, lambda: max(metrics_steps(output), default=0) >= 7, "came to 7", signal.SIGTERM)
  assert code == 75, log.read_text()[-3000:]
  saved = max(int(p.name) for p in checkpoints.iterdir())
  assert f"stopped by SIGTERM after step {saved}, which is saved" in log.read_text()
  assert metrics_steps(output) == list(range(1, saved + 1))
  # Killed in the second stage while it writes a checkpoint, the run repeats the lost steps.
  kill_when(config, log, lambda: (checkpoints / "15").is_dir() and writes_a_checkpoint(output), "wrote checkpoint 18")
  finish(config, log)
  assert re.search(r"resumed from step 1[58]", log.read_text())

  assert_same_bits(folder / "alone", output)
  steps, lines = metrics(output)
  assert steps == list(range(1, STEPS + 1))
  assert lines == metrics(folder / "alone")[1]
  assert sorted(p.name for p in checkpoints.iterdir()) == sorted(str(s) for s in {3, 6, 9, 12, 15, 18, 20, saved})


def test_a_killed_run_in_a_bucket_has_the_bits_of_a_run_on_disk(assets, left_alone, store, tmp_path, monkeypatch):
  """Table, clips, weights, compiled programs and output are in gs://."""
  folder, settings = left_alone
  store.copy_in(assets, "assets")
  settings = {**settings, "data__workers": 1, **text_from_disk(f"gs://{BUCKET}/assets")}
  config = write_config(tmp_path / "config.py", f"gs://{BUCKET}/assets", f"gs://{BUCKET}/runs/there", **settings)
  log, prefix = tmp_path / "log", "runs/there/"
  own = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_COMPILATION_CACHE_DIR": ""}

  def half_written():
    """Whether a checkpoint after the first one exists without the mark of completion."""
    there = {name.split("/")[3] for name in store.names(f"{prefix}checkpoints/")}
    return any(int(step) > 3 and f"{prefix}checkpoints/{step}/commit_success.txt" not in store.objects for step in there)

  kill_when(config, log, half_written, "wrote a second checkpoint", **own)
  assert "metrics.jsonl" in {name.removeprefix(prefix) for name in store.names(prefix)}  # before the first checkpoint
  compiled = [f"/o/{name}" for name in store.names(f"{prefix}compilation_cache/")]
  before = len(store.requests)
  finish(config, log, **own)
  assert "resumed from step" in log.read_text()
  assert sum(method == "GET" and path.endswith(tuple(compiled)) for method, path in store.requests[before:]) > 5

  store.copy_out("runs/there", tmp_path / "there")
  for step in (6, STEPS):  # the second checkpoint, whose writing was interrupted, and the last
    assert_same_bits(folder / "alone", tmp_path / "there", step)
  assert metrics(tmp_path / "there") == metrics(folder / "alone")
  written = {path.name for path in (tmp_path / "there").iterdir()}
  assert written == {"checkpoints", "compilation_cache", "config.json", "metrics.jsonl", "starts.json", "tensorboard"}
  assert len(list((tmp_path / "there" / "tensorboard").iterdir())) == 2  # one per start
  assert list((tmp_path / "cache" / "stdit_jax" / "data").glob("table-*.arrow"))
  weights, _, step = load_weights(f"gs://{BUCKET}/runs/there")
  assert step == STEPS
  jax.tree.map(np.testing.assert_array_equal, weights, items(folder / "alone")["ema"])

  convert.main(["--input", f"gs://{BUCKET}/runs/there", "--output", f"gs://{BUCKET}/out/denoiser.safetensors"])
  convert.main(["--input", str(folder / "alone"), "--output", str(tmp_path / "denoiser.safetensors")])
  assert store.objects["out/denoiser.safetensors"][0] == (tmp_path / "denoiser.safetensors").read_bytes()
  text, out = f"gs://{BUCKET}/assets/t5.safetensors", f"gs://{BUCKET}/out"
  sample.main(["--run", f"gs://{BUCKET}/runs/there", "--prompt", "columns", "--text-encoder", text, "--output", out])
  assert set(store.names("out/")) == {f"out/{name}" for name in ("denoiser.safetensors", *VIDEO)}

  # A read error is no damage. A damaged checkpoint is moved away, and the run resumes from an older one.
  config = tiny_config(f"gs://{BUCKET}/assets", f"gs://{BUCKET}/runs/there", **settings)
  monkeypatch.setenv("XDG_CACHE_HOME", own["XDG_CACHE_HOME"])
  with monkeypatch.context() as patch:
    patch.setattr(store, "refuse", lambda method, path, query: 403 if "/params/" in path else None)
    with pytest.raises((OSError, ValueError), match=r"403|ermission") as error:
      Run(config).start()
  assert not isinstance(error.value, DamagedCheckpointError)
  assert not store.names(f"{prefix}set-aside")
  kept = set(store.names(f"{prefix}checkpoints/{STEPS}/"))
  lost = f"{prefix}checkpoints/{STEPS}/params/manifest.ocdbt"
  del store.objects[lost]
  assert Run(config).start()[2] == 18
  assert not store.names(f"{prefix}checkpoints/{STEPS}/")
  moved = {name.replace("set-aside", "checkpoints") for name in store.names(f"{prefix}set-aside/{STEPS}/")}
  assert moved == kept - {lost}


def metrics_steps(output):
  try:
    return [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
  except (FileNotFoundError, json.JSONDecodeError):
    return []


def largest_file(folder):
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize(
  ("kind", "text", "raised"),
  [
    (ValueError, "UNAVAILABLE: connection reset", StartAgain),
    (OSError, "the bucket gives no answer or an error (503)", StartAgain),
    (PermissionError, "no permission, or not signed in", InputError),
  ],
)
def test_temporary_errors_of_a_bucket_restart_the_run(store, tmp_path, kind, text, raised):
  """A write error ends the run for good if only a person can remove its cause. This applies to all write errors of a disk."""
  for folder, expected in ((f"gs://{BUCKET}/passing", raised), (tmp_path, InputError)):
    checkpoints = Checkpoints(folder)
    with pytest.raises(expected, match=re.escape(text)), checkpoints._writing():
      raise kind(text)
    checkpoints.close()


def test_a_damaged_checkpoint_is_set_aside_with_a_warning(assets, left_alone, capfd):
  folder, settings = left_alone
  output = folder / "damaged"
  shutil.copytree(folder / "alone", output)
  checkpoints = output / "checkpoints"
  cut = largest_file(checkpoints / "20" / "params")
  cut.write_bytes(cut.read_bytes()[:1000])
  shutil.rmtree(checkpoints / "18" / "opt")
  for path in (checkpoints / "15" / "position").iterdir():
    path.write_text("{")
  _, _, step = Run(tiny_config(assets, output, **settings)).start()
  assert step == 12
  said = capfd.readouterr()
  for damaged in (20, 18, 15):
    assert f"warning: checkpoint {checkpoints / str(damaged)} is damaged" in said.err
    assert (output / "set-aside" / str(damaged)).is_dir()
    assert not (checkpoints / str(damaged)).exists()
  assert "resumed from step 12" in said.out

  with pytest.raises(ValueError, match=r"resume='15', but .* has only checkpoints \[3, 6, 9, 12\]"):
    Run(tiny_config(assets, output, **settings, resume="15")).start()
  _, _, step = Run(tiny_config(assets, output, **settings, resume="9")).start()
  assert step == 9
  assert (output / "set-aside" / "12").is_dir()
  Checkpoints(output).mark(9)  # as one of several processes does if it alone sees the damage
  _, _, step = Run(tiny_config(assets, output, **settings)).start()
  assert step == 6
  assert "a process could not read checkpoint 9; trying an older one" in capfd.readouterr().err
  assert (output / "set-aside" / "9").is_dir()
  assert not Checkpoints(output).is_marked(9)
  for step in (3, 6):
    shutil.rmtree(checkpoints / str(step) / "params")
  with pytest.raises(ValueError, match=r"no checkpoint in .* can be read; move them away to start anew"):
    Run(tiny_config(assets, output, **settings)).start()
  with pytest.raises(ValueError, match=r"resume='6', but this checkpoint cannot be read; give another step of \[3, 6\]"):
    Run(tiny_config(assets, output, **settings, resume="6")).start()
  assert sorted(p.name for p in checkpoints.iterdir()) == ["3", "6"]
  with pytest.raises(ValueError, match=r"resume='required', but .* has no checkpoint"):
    Run(tiny_config(assets, folder / "empty", resume="required")).start()


def test_a_run_goes_back_to_a_step_only_once(assets, left_alone, capfd):
  """A supervisor repeats the same command. It then resumes from the newest checkpoint, also if another process wrote it."""
  folder, settings = left_alone
  output = folder / "back"
  shutil.copytree(folder / "alone", output)
  first, second = (Run(tiny_config(assets, output, **settings, resume="15")) for _ in range(2))
  state, frozen, step = first.start()
  assert step == 15
  first.save(16, state, frozen)
  first.checkpoints.wait()
  _, _, step = second.start()
  assert step == 16
  assert "the run already went back to step 15" in capfd.readouterr().out


def test_a_finished_run_does_not_change(assets, left_alone):
  folder, settings = left_alone
  before = items(folder / "alone")
  state = Run(tiny_config(assets, folder / "alone", **settings)).train()
  assert all(a.tobytes() == np.asarray(b).tobytes() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state)))
  jax.tree.map(np.testing.assert_array_equal, items(folder / "alone"), before)
  assert metrics(folder / "alone")[0] == list(range(1, STEPS + 1))


def test_stages_change_rate_buckets_and_optimizer(left_alone):
  folder, _ = left_alone
  _, lines = metrics(folder / "alone")
  rates = [line["learning_rate"] for line in lines]
  np.testing.assert_allclose(rates[:5], 1e-3 * np.array([0.25, 0.5, 0.75, 1, 1]), rtol=1e-6)
  np.testing.assert_allclose(rates[12:17], 2e-3 * np.array([0.25, 0.5, 0.75, 1, 1]), rtol=1e-6)
  assert not any("loss/64p x 1" in line for line in lines[12:])
  assert any("loss/64p x 1" in line for line in lines[:12])
  counts = jax.tree.leaves(items(folder / "alone")["opt"][0]["count"])
  assert set(map(int, counts)) == {8}  # the second stage started with a fresh optimizer


def test_workers_end_with_their_killed_training(assets, tmp_path):
  settings = {**small_autoencoder(), "data__workers": 1, "stages": ({"name": "long", "steps": 10**6},)}
  config = write_config(tmp_path / "config.py", assets, tmp_path / "run", **settings, checkpoint_every=10**5)
  log, worker = tmp_path / "log", []

  def children():
    """The /proc folders of the run's loader workers, which start as `spawn_main`."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*"):
      try:
        command, parent = (path / "cmdline").read_bytes(), int((path / "stat").read_text().rpartition(")")[2].split()[1])
      except OSError:
        continue
      if b"spawn_main" in command and parent == process.pid:
        found.append(path)
    return found

  process = start(config, log)
  try:
    end = time.monotonic() + 120
    while not (worker and (tmp_path / "run" / "metrics.jsonl").exists()):
      assert process.poll() is None, log.read_text()[-3000:]
      assert time.monotonic() < end
      worker = children() or worker
      time.sleep(0.05)
  finally:
    process.kill()
    process.wait()
  end = time.monotonic() + 20
  while any(path.exists() for path in worker):
    assert time.monotonic() < end, "a worker outlives its training"
    time.sleep(0.1)
