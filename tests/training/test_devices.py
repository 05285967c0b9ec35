"""Eight devices give the losses, gradients and noise of one device. A checkpoint of one mesh resumes on another."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from stdit_jax.parallel.shardings import path_name
from stdit_jax.training.checkpoints import load_weights
from tests import QUICK_FLAGS
from tests.runs import Run
from tests.tiny_run import ROOT, eight_config, environment, frozen_text
from tests.training.on_devices import AUTOENCODER


def by_name(tree):
  return {path_name(path): np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


@pytest.fixture(scope="module")
def folder(assets, tmp_path_factory):
  """Folder of `on_devices`: its results, a run on eight devices, and a run on one device that resumed on eight."""
  folder = tmp_path_factory.mktemp("on_devices")
  (folder / "assets").symlink_to(assets)
  Run(eight_config(folder / "assets", folder / "devices" / "single")).train()
  Run(eight_config(folder / "assets", folder / "devices" / "in_step", steps=1, **frozen_text(assets, "step"))).train()
  command = [sys.executable, "-m", "tests.training.on_devices", str(folder)]
  # NPROC: a waiting collective holds a thread of XLA's pool. With few threads all collectives would wait for ever.
  own = environment(XLA_FLAGS=f"--xla_force_host_platform_device_count=8 {QUICK_FLAGS}", NPROC="64")
  result = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=300)
  assert result.returncode == 0, result.stderr[-3000:]
  return folder


def test_eight_devices_have_the_loss_gradients_and_noise_of_one(folder):
  one, eight = (load_file(folder / "devices" / f"{name}.safetensors") for name in ("one", "eight"))
  assert (one.pop("split"), eight.pop("split")) == (1, 4)
  assert one.pop("noise").tobytes() == eight.pop("noise").tobytes()
  np.testing.assert_allclose(eight.pop("loss"), one.pop("loss"), rtol=1e-5)
  assert one.keys() == eight.keys()
  largest = {}
  for name, g in one.items():
    group = name.rsplit("/", 1)[0]
    largest[group] = max(largest.get(group, 0), np.abs(g).max())
  for name, g in one.items():
    assert np.abs(eight[name] - g).max() <= 1e-5 * largest[name.rsplit("/", 1)[0]], name


def test_a_checkpoint_of_one_mesh_resumes_on_another(folder):
  devices = folder / "devices"
  single, _, _ = load_weights(devices / "single", "params", 2)
  resumed = load_file(devices / "resumed.safetensors")
  assert resumed.keys() == by_name(single).keys()
  for name, value in by_name(single).items():
    assert value.tobytes() == resumed[name].tobytes(), name
  assert load_weights(devices / "single")[2] == 3  # the run on eight devices resumed it

  run = Run(eight_config(folder / "assets", devices / "eight", steps=3))
  state, frozen, step = run.start()
  assert step == 2
  saved, _, _ = load_weights(devices / "eight", "ema", 2)
  jax.tree.map(np.testing.assert_array_equal, state["ema"], saved)
  run.train(started=(state, frozen, step))
  # Both runs made the same steps on different meshes.
  ours, theirs = (by_name(load_weights(devices / name, "params", 3)[0]) for name in ("eight", "single"))
  for name, value in ours.items():
    np.testing.assert_allclose(theirs[name], value, atol=2e-5, err_msg=name)


def test_a_checkpoint_of_a_split_autoencoder_is_read_on_one_device(folder):
  run = Run(eight_config(folder / "assets", folder / "devices" / "autoencoder", steps=2, **AUTOENCODER))
  state, _, step = run.start()
  assert step == 1
  trained = load_file(folder / "devices" / "split_autoencoder.safetensors")
  assert trained.keys() == by_name(state).keys()
  for name, value in by_name(state).items():
    np.testing.assert_array_equal(value, trained[name], err_msg=name)


def test_a_sharded_text_encoder_ahead_of_the_step_has_the_same_loss(folder):
  losses = [
    json.loads((folder / "devices" / name / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    for name in ("in_step", "ahead")
  ]
  np.testing.assert_allclose(*losses, rtol=1e-5)
