"""Two processes with two CPU devices each: they train like one process with four, stop together, and end if one dies."""

import collections
import contextlib
import csv
import itertools
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from stdit_jax.training.checkpoints import Checkpoints
from stdit_jax.training.watchdog import Watchdog
from tests import QUICK_FLAGS
from tests.data import files
from tests.object_store import BUCKET
from tests.tiny_run import ROOT, environment, frozen_text, small_autoencoder, start_processes, text_from_disk, write_config

STEPS = 10
SETTINGS = {"data__buckets": (("64p", 1, 1.0, 8),), "data__drop_last": False, "mesh": {"data": 2, "fsdp": 2}}
WATCHDOG = {"watchdog": {"timeout": 10.0, "slow_timeout": 120.0}}  # during other tests, a step has taken six seconds


def lines(output):
  try:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
  except (FileNotFoundError, json.JSONDecodeError):
    return []


def wait_for(condition, processes, folder, seconds=150):
  end = time.monotonic() + seconds
  while not condition():
    text = [log.read_text()[-3000:] for log in sorted(folder.glob("*.log"))]
    assert time.monotonic() < end, text
    assert all(p.poll() is None for p in processes), text
    time.sleep(0.05)


@contextlib.contextmanager
def two(assets, folder, **settings):
  """Two processes with one device each, in an endless run that has reached step 2."""
  folder.mkdir()
  settings = {**small_autoencoder(), "stages": ({"name": "long", "steps": 10**6},), "checkpoint_every": 10**5, **settings}
  config = write_config(folder / "config.py", assets, folder / "run", **settings)
  processes = start_processes(config, folder, devices=1)
  try:
    wait_for(lambda: len(lines(folder / "run")) >= 2, processes, folder)
    yield processes
  finally:
    for process in processes:
      process.kill()
      process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("processes")


def long_config(assets, folder, name, output):
  """Configuration file of a run of STEPS steps with a checkpoint every four steps and a validation at its end."""
  (folder / name).mkdir()
  settings = {**SETTINGS, **text_from_disk(assets), "stages": ({"name": "same", "steps": STEPS},), "checkpoint_every": 4}
  settings["watchdog"] = {"timeout": 30.0, "slow_timeout": 300.0}  # before it ends, process 0 waits for a part of `timeout`
  validation = {"tables": (str(assets / "features.csv"),), "every": STEPS, "samples_per_bucket": 5, "timesteps": 3}
  return write_config(folder / name / "config.py", assets, output, **settings, validation=validation)


@pytest.fixture(scope="module")
def one(assets, folder):
  """Folder of a run of `long_config` with one process."""
  config = long_config(assets, folder, "one", folder / "one" / "run")
  command = [sys.executable, "-m", "stdit_jax.train", "--config", str(config)]
  own = environment(XLA_FLAGS=f"--xla_force_host_platform_device_count=4 {QUICK_FLAGS}", NPROC="64")
  result = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=300)
  assert result.returncode == 0, result.stderr[-3000:]
  return folder / "one" / "run"


@pytest.fixture(scope="module")
def both(assets, folder, store):
  """Configuration file of a run of two processes with its output in a bucket. They were killed and started again."""
  config = long_config(assets, folder, "both", f"gs://{BUCKET}/both")
  processes = start_processes(config, folder / "both")
  try:
    wait_for(lambda: "both/checkpoints/4/commit_success.txt" in store.objects, processes, folder / "both")
  finally:
    for process in processes:
      process.kill()
      process.wait()
  codes = [p.wait(300) for p in start_processes(config, folder / "both")]
  texts = [(folder / "both" / f"{i}.log").read_text() for i in (0, 1)]
  assert codes == [0, 0], [text[-3000:] for text in texts]
  assert re.search(r"resumed from step (4|8) ", texts[0]), texts[0][-3000:]
  return config


def test_two_processes_killed_and_resumed_in_a_bucket_have_the_losses_of_one(one, both, store, tmp_path):
  store.copy_out("both", tmp_path / "run")
  losses = [[line.get("loss", line.get("validation/loss")) for line in lines(output)] for output in (one, tmp_path / "run")]
  assert len(losses[0]) == STEPS + 1
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_both_processes_restart_when_one_finds_a_damaged_checkpoint(both, store):
  """The file that the second process wrote is cut. Perhaps only this process notices, while the first one waits for it."""
  own = [name for name in store.names(f"both/checkpoints/{STEPS}/params/") if "process_1" in name]
  largest = max(own, key=lambda name: len(store.read(name)))
  store.write(largest, store.read(largest)[:100])
  codes = [p.wait(120) for p in start_processes(both, both.parent)]
  texts = [(both.parent / f"{i}.log").read_text() for i in (0, 1)]
  assert codes == [75, 75], [text[-3000:] for text in texts]
  assert any("is damaged" in text for text in texts)
  assert Checkpoints(f"gs://{BUCKET}/both").is_marked(STEPS)  # test_resume.py tests the next start


@pytest.fixture(scope="module")
def sharing(assets, folder, one):
  """What shared_rows.py wrote for two processes whose devices split the tokens of the rows: first the run `one`, then a stage.

  Its batches have one row, which the first process owns. Of three files one exists only for the first process, one only for
  the second process.
  """
  places = [folder / "sharing" / str(i) for i in (0, 1)]
  for i, place in enumerate(places):
    place.mkdir(parents=True)
    shutil.copy(assets / f"{i}.png", place / f"only{i}.png")
  shutil.copy(assets / "2.png", folder / "sharing" / "both.png")
  with (assets / "features.csv").open() as file:
    rows = [{**row, "text_features": assets / row["text_features"]} for row in csv.DictReader(file)][6:9]
  for row, path in zip(rows, ("/proc/self/cwd/only0.png", "/proc/self/cwd/only1.png", folder / "sharing" / "both.png")):
    row["path"] = path
  files.write_csv(folder / "sharing" / "table.csv", rows)
  data = {"tables": str(folder / "sharing" / "table.csv"), "buckets": (("64p", 1, 1.0, 1),), "max_bad_rows": 1}
  stages = {"name": "same", "steps": STEPS}, {"name": "few", "steps": 3, **{f"data.{key}": data[key] for key in data}}
  settings = {**SETTINGS, **text_from_disk(assets), "mesh": {"sequence": 4}, "split_tokens": "always"}
  config = write_config(folder / "sharing" / "config.py", assets, folder / "sharing" / "run", **settings, stages=stages)
  processes = start_processes(config, folder / "sharing", module="tests.training.shared_rows", places=places)
  codes = [p.wait(300) for p in processes]
  assert codes == [0, 0], [(folder / "sharing" / f"{i}.log").read_text()[-3000:] for i in (0, 1)]
  return [json.loads((folder / "sharing" / "run" / f"{i}.json").read_text()) for i in (0, 1)]


def test_processes_that_share_rows_read_each_row_once_and_train_like_one(folder, one, sharing):
  decoded, used = collections.Counter(tuple(clip) for record in sharing for clip in record["decoded"]), collections.Counter()
  for ours, theirs in itertools.islice(zip(*(record["steps"] for record in sharing), strict=True), STEPS):
    assert ours["ids"] == theirs["ids"]
    assert [len(step["samples"]) for step in (ours, theirs)] == [4, 4]
    both = ours["samples"] + theirs["samples"]
    assert sorted(ids for ids, _ in both) == sorted(ours["ids"][0])
    used.update((path, ours["epoch"]) for _, path in both)  # an epoch of six images reads two of them twice
  assert {clip: decoded[clip] for clip in used} == used  # without what was read ahead for later steps
  losses = [[line["loss"] for line in lines(output) if "loss" in line][:STEPS] for output in (one, folder / "sharing" / "run")]
  assert len(losses[0]) == STEPS
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_a_row_that_one_process_cannot_read_has_one_weight_on_both(folder, sharing):
  """The owner decides: a file that only the owner has is read, a file that the owner lacks is masked."""
  weights = {}
  for ours, theirs in zip(*(record["steps"][STEPS:] for record in sharing), strict=True):
    assert ours["ids"] == theirs["ids"]
    ((_, path),) = ours["samples"]
    weights[pathlib.Path(path).name] = ours["weights"] + theirs["weights"]  # of all devices
  assert weights == {"only0.png": [[1.0]] * 4, "only1.png": [[0.0]] * 4, "both.png": [[1.0]] * 4}
  ours, theirs = (np.load(folder / "sharing" / "run" / f"{i}.npz") for i in (0, 1))
  for name in ours:
    assert len({x.tobytes() for x in (*ours[name], *theirs[name])}) == 1, name


def test_two_processes_sample_the_frames_of_one(assets, folder, one):
  """Eight devices divide neither the three prompts, nor the frames and places of the tokens that two processes split."""
  latents, sheets = [], []
  for name, count, mesh in (("sampled", 1, {"data": 2, "fsdp": 4}), ("sampled-by-two", 2, {"sequence": 8})):
    (folder / name).mkdir()
    settings = {
      **SETTINGS,
      **frozen_text(assets, "ahead"),
      "mesh": mesh,
      "init": str(one),
      "sample__resolution": "64p",
      "sample__aspect_ratio": "3:4",
    }
    settings["sample__prompts"] = ("one", "a picture", "columns")
    settings["diffusion"] = {"name": "rectified-flow", "fields": {"sampler": "adams-bashforth"}}
    config = write_config(folder / name / "config.py", assets, folder / name / "run", **settings)
    processes = start_processes(config, folder / name, count, 8 // count, module="tests.training.sample_latents")
    codes = [p.wait(300) for p in processes]
    assert codes == [0] * count, [(folder / name / f"{i}.log").read_text()[-3000:] for i in range(count)]
    latents += [np.load(folder / name / "run" / f"{i}.npy") for i in range(count)]
    assert len(list((folder / name / "run" / "samples").iterdir())) == 7  # three videos, their settings, a contact sheet
    sheets.append(np.asarray(Image.open(folder / name / "run" / "samples" / "step0000000.png"), np.float32))
  assert latents[0].shape == (3, 4, 7, 9, 4)
  assert len({z.tobytes() for z in latents[0]}) == 3
  np.testing.assert_array_equal(latents[1], latents[2])  # both processes have all latents
  np.testing.assert_allclose(latents[1], latents[0], atol=1e-4)
  assert sheets[0].shape == (3 * 56, 4 * 72, 3)
  assert np.abs(sheets[0] - sheets[1]).max() <= 1  # of 255: rounding


@pytest.mark.parametrize("what", ["output", "data.tables", "configuration"])
def test_hosts_that_do_not_share_a_folder_or_a_configuration_are_refused(assets, tmp_path, what):
  """A relative path means another folder in each process, as a local path does on each host."""
  output, table = tmp_path / "run", assets / "table.csv"
  places = tmp_path / "a", tmp_path / "b"
  for place, name in zip(places, ("table.csv", "other.csv")):
    place.mkdir()
    (place / "table.csv").write_bytes((assets / name).read_bytes())
  output, table = "run" if what == "output" else output, "table.csv" if what == "data.tables" else table
  settings = {**small_autoencoder(), **WATCHDOG, "data__tables": str(table)}
  config = write_config(tmp_path / "config.py", assets, output, **settings)
  if what == "configuration":
    config.write_text(f"import os\n{config.read_text()}".replace("**{", "seed=int(os.environ['STDIT_JAX_PROCESS_ID']), **{"))
  codes = [p.wait(120) for p in start_processes(config, tmp_path, devices=1, places=places)]
  texts = [(tmp_path / f"{i}.log").read_text() for i in (0, 1)]
  assert codes == [2, 2], texts
  for text in texts:
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert what in line
    assert "process 1" in line
    assert "Traceback" not in text
  assert not list(tmp_path.rglob("checkpoints/*"))


def test_both_processes_stop_at_the_same_step_when_one_gets_sigterm(assets, folder):
  with two(assets, folder / "told") as processes:
    processes[1].send_signal(signal.SIGTERM)
    assert [p.wait(60) for p in processes] == [75, 75], (folder / "told" / "0.log").read_text()[-3000:]
  texts = [(folder / "told" / f"{i}.log").read_text() for i in (0, 1)]
  steps = [re.search(r"stopped by SIGTERM after step (\d+), which is saved", text).group(1) for text in texts]
  assert steps[0] == steps[1]
  assert [p.name for p in (folder / "told" / "run" / "checkpoints").iterdir()] == [steps[0]]
  assert lines(folder / "told" / "run")[-1]["step"] == int(steps[0])


@pytest.mark.parametrize(("victim", "how"), [(1, "STOP"), (0, "KILL")])
def test_a_process_names_the_other_one_that_hangs_or_dies(assets, folder, victim, how):
  name = f"{how}-{victim}"
  with two(assets, folder / name, **WATCHDOG) as processes:
    began = time.monotonic()
    processes[victim].send_signal(getattr(signal, f"SIG{how}"))
    code = processes[1 - victim].wait(60)
    took = time.monotonic() - began
  text = (folder / name / f"{1 - victim}.log").read_text()
  assert code == 75, text[-3000:]
  assert took < 30, text[-3000:]
  said = next(line for line in text.splitlines() if line.startswith("watchdog: "))
  assert re.match(rf"watchdog: process {victim} of 2 \(host \S+\)", said), said
  assert f"process {1 - victim} of 2 (host " in said
  assert "ends with exit code 75" in said
  assert "most recent call first" in text  # stacks


def test_threads_keep_alive_only_a_loop_that_waits_for_them(monkeypatch):
  """A loop that hangs elsewhere is noticed although programs compile beside it. A wait for the compiler may take longer."""
  ended = []
  monkeypatch.setattr(Watchdog, "_end", lambda self, text, code: ended.append(text))
  with Watchdog(0.4, 30.0) as watchdog:

    def ends(what, waits, threads=0):
      watchdog.beat(what, waits=waits)
      ended.clear()
      watchdog.alive(threads)
      end = time.monotonic() + 1
      while time.monotonic() < end and not threads:
        watchdog.alive()
        time.sleep(0.05)
      time.sleep(1 if threads else 0)
      return bool(ended)

    assert ends("step 1", waits=False)
    assert not ends("step 2: waiting for data", waits=True)
    assert not ends("step 2: waiting for data", waits=True, threads=1)  # nothing is ready, but a thread waits for a program
    assert ends("step 2: waiting for data", waits=True, threads=-1)
