"""Families outside the package train, resume, sample, convert and plan, with the ordinary commands.

Each family is one file under tests/new_families.
"""

import csv
import importlib.util
import json
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from stdit_jax import convert, sample
from stdit_jax.training.checkpoints import load_weights
from tests import QUICK_FLAGS
from tests.data import files
from tests.tiny_run import ROOT, environment, run_module

CONFIG = """
import ml_collections

from tests.tiny_run import tiny_config


def get_config():
  config = tiny_config({assets!r}, {output!r})
  config.model = ml_collections.ConfigDict(dict(name={name!r}, fields=dict(dtype="float32", remat="none")))
  config.mask_ratios = ml_collections.ConfigDict()
  config.data.tables = (({table!r}, 1),)
  config.data.buckets = (("64p", 1, 1.0, 2),)
  config.checkpoint_every = 4
  config.stages = (
    dict(name="first", steps=8),
    dict(name="second", steps=12, **{changes!r}),
  )
  return config
"""
# What the second stage changes, and arguments of sample.
CLIPS = {"data.buckets": (("64p", 1, 1.0, 2), ("64p", 4, 1.0, 2)), "model.fields": {"depth": 3}}
FAMILIES = {
  "joint": (CLIPS, ("--prompt", "a clip of columns", "--num-frames", "3")),
  "labelled": ({"optimizer.learning_rate": 5e-4}, ("--prompt", "2", "--num-frames", "1")),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, assets, tmp_path_factory):
  """(name, configuration file, run folder) of a family. The run was not interrupted."""
  folder = tmp_path_factory.mktemp(request.param)
  table = assets / "table.csv"
  if request.param == "labelled":  # images with a label, and no text
    rows = [row for row in csv.DictReader(table.open()) if row["num_frames"] == "1"]
    table = folder / "labels.csv"
    columns = "num_frames", "height", "width"
    files.write_csv(
      table, [{"path": str(assets / row["path"]), "label": i % 3} | {c: row[c] for c in columns} for i, row in enumerate(rows)]
    )
  changes, _ = FAMILIES[request.param]
  config, output = folder / "config.py", folder / "run"
  name = f"tests.new_families.{request.param}:tiny"
  config.write_text(CONFIG.format(assets=str(assets), output=str(output), name=name, table=str(table), changes=changes))
  done = run_module("stdit_jax.train", "--config", config, XLA_FLAGS=QUICK_FLAGS)
  assert done.returncode == 0, done.stderr[-3000:]
  assert "finished: 20 steps" in done.stdout
  return request.param, config, output


def export(folder, path, *more):
  """The file of averaged weights that `convert` writes from a run's newest checkpoint."""
  convert.main(list(map(str, ("--input", folder, "--output", path, *more))))
  return path


def test_a_killed_run_resumes_bit_for_bit(family, tmp_path):
  _, config, output = family
  again = tmp_path / "again"
  command = [sys.executable, "-m", "stdit_jax.train", "--config", str(config), f"--config.output={again}"]
  with (tmp_path / "log").open("w") as log:
    killed = subprocess.Popen(command, cwd=ROOT, env=environment(XLA_FLAGS=QUICK_FLAGS), stdout=log, stderr=log)
    while killed.poll() is None and not list(again.glob("checkpoints/4/_CHECKPOINT_METADATA")):
      time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
  done = run_module("stdit_jax.train", "--config", config, f"--config.output={again}", XLA_FLAGS=QUICK_FLAGS)
  assert done.returncode == 0, done.stderr[-3000:]
  assert re.search(r"resumed from step (4|8|12|16) of", done.stdout)
  for item in ("params", "ema"):
    jax.tree.map(np.testing.assert_array_equal, *(load_weights(run, item)[0] for run in (output, again)))
  losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (output, again)]
  assert losses[0] == losses[1]
  assert len(losses[0]) == 20


def test_exported_weights_give_the_same_samples(family, tmp_path, capsys):
  """The averaged weights of the run and their export give the same pixels."""
  name, config, output = family
  _, arguments = FAMILIES[name]
  arguments = (*arguments, "--image-size", "48", "64", "--steps", "2", "--seed", "1", "--format", "frames")
  exported = export(output, tmp_path / "denoiser.safetensors")
  convert.main(["--check", "--input", str(exported)])  # the file says which model it holds
  assert "imported and exported: bit-exact" in capsys.readouterr().out
  text = export(output, tmp_path / "text.safetensors", "--part", "text_encoder") if name == "joint" else None
  more = ("--text-encoder", text) if text else ()
  made = []
  for kind, model in (("run", ("--run", output)), ("file", ("--config", config, "--weights", exported, *more))):
    sample.main(list(map(str, (*model, *arguments, "--output", tmp_path / kind))))
    made.append([np.asarray(Image.open(path)) for path in sorted((tmp_path / kind).rglob("*.png"))])
  assert [frame.shape for frame in made[0]] == [(48, 64, 3)] * len(made[0])
  assert len(made[0]) == (3 if name == "joint" else 1)
  for ours, theirs in zip(*made, strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_an_error_in_prompt_or_task_is_one_line(family, tmp_path, assets, capsys):
  name, _, output = family
  model = ("--run", output, "--output", tmp_path, "--num-frames", "1", "--image-size", "48", "64", "--steps", "1")
  prompt, words = ("x", "takes the number of a class, 0 to 2") if name == "labelled" else ("x", "can't be given frames")
  task = ("--task", "animate", assets / "0.png", "--num-frames", "4") if name == "joint" else ()
  with pytest.raises(SystemExit) as exit:
    sample.main([*map(str, model), "--prompt", prompt, *map(str, task)])
  assert exit.value.code == 2
  assert words in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU's compiler")
def test_plan_compiles_the_family_for_a_tpu(family, tmp_path):
  _, config, _ = family
  mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=4")
  done = run_module(
    "stdit_jax.plan", "--config", config, *mesh, "--topology", "v5e:2x4", "--stage", "first", "--bucket", "64p:1:8",
    "--cache", tmp_path, "--output", tmp_path / "plan.json", XLA_FLAGS="",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  (result,) = json.loads((tmp_path / "plan.json").read_text())
  assert result["fits"]
  assert result["model_flops"] > 0
  assert result["chips"] == 8
