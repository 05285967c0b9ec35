"""Validation does not depend on batch, mesh and step, does not change training, and equals `evaluate`."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from stdit_jax import evaluate
from stdit_jax.parallel.shardings import path_name
from tests import QUICK_FLAGS
from tests.runs import Run
from tests.tiny_run import run_module, text_from_disk, tiny_config

BUCKETS = (("144p", 1, 1.0, 2), ("144p", 4, 1.0, 2))  # many latents, so the mean square of their noise is near 1


def settings(assets, **changes):
  """Validation on five of the six rows of each bucket, after every second step."""
  validation = {"tables": (str(assets / "features.csv"),), "every": 2, "samples_per_bucket": 5, "timesteps": 5}
  return {"data__buckets": BUCKETS, "validation": validation | changes, "checkpoint_every": 2, **text_from_disk(assets)}


def lines_of(run):
  lines = [json.loads(line) for line in (pathlib.Path(run.config.output) / "metrics.jsonl").read_text().splitlines()]
  validation = {line["step"]: {k: v for k, v in line.items() if "/" in k} for line in lines if "validation/loss" in line}
  training = [
    {k: v for k, v in line.items() if k != "time" and not k.startswith("speed/")}
    for line in lines
    if "validation/loss" not in line
  ]
  return validation, training


@pytest.fixture(scope="module")
def validated(assets, tmp_path_factory):
  """(run, final state, frozen) with validation after steps 2 and 4."""
  run = Run(tiny_config(assets, tmp_path_factory.mktemp("validation") / "run", **settings(assets)))
  started = run.start()
  return run, jax.tree.map(np.asarray, run.train(started=started)), started[1]


def test_validation_does_not_change_training(assets, validated, tmp_path):
  run, state, _ = validated
  plain = Run(tiny_config(assets, tmp_path / "plain", data__buckets=BUCKETS, checkpoint_every=2, **text_from_disk(assets)))
  jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, plain.train()), state)
  assert lines_of(run)[1] == lines_of(plain)[1]
  own = {f"validation 144p x {frames}": 1 for frames in (1, 4)}
  assert run.counter.counts.keys() == {**plain.counter.counts, **own}.keys()


def test_the_loss_is_the_mean_over_buckets_and_quarters(validated):
  values, _ = lines_of(validated[0])
  assert list(values) == [2, 4]
  for line in values.values():
    of_buckets = [line[f"validation/144p x {frames}"] for frames in (1, 4)]
    of_quarters = [line[f"validation/t {q}"] for q in ("0-25%", "25-50%", "50-75%", "75-100%")]
    np.testing.assert_allclose(np.mean(of_buckets), line["validation/loss"], rtol=1e-9)
    # The quarters contain one, one, two and one of the timesteps 1/6, 2/6, ... 5/6.
    np.testing.assert_allclose(np.dot(of_quarters, [1, 1, 2, 1]) / 5, line["validation/loss"], rtol=1e-9)
  assert values[2]["validation/loss"] != values[4]["validation/loss"]


def test_the_loss_of_a_zero_model(validated):
  """The target is latents minus noise. So the loss of a zero output is the mean square of the latents plus 1."""
  run, state, frozen = validated
  silent = jax.tree_util.tree_map_with_path(lambda p, x: 0 * x if "final_layer/linear" in path_name(p) else x, state["ema"])
  make_batch, squares = run.parts[0].objective.batch_maker(run.encoders, "tiny"), {1: [], 4: []}
  values = run.parts[0].validation(silent, frozen, make_batch)
  for step in run.parts[0].validation._steps():
    for mean, std in run.encoders.clip_encoder([s.pixels for s in step.samples if s.weight]):
      squares[step.bucket[1]].append((np.square(mean) + np.square(std)).mean())
  assert [len(parts) for parts in squares.values()] == [5, 5]
  for frames, parts in squares.items():
    np.testing.assert_allclose(values[f"validation/144p x {frames}"], np.mean(parts) + 1, rtol=0.02)


def test_other_batches_change_only_rounding(assets, validated, tmp_path):
  """Batches of three instead of two, and other keep probabilities."""
  run, state, frozen = validated
  buckets = (("144p", 1, 0.3, 3), ("144p", 4, (1.0, 0.5), 3))
  changes = {**settings(assets), "data__buckets": buckets, "data__drop_last": False}
  other = Run(tiny_config(assets, tmp_path / "run", **changes))
  validation = other.parts[0].validation
  assert validation.data.report.steps == 4
  validation.compile_ahead(other.compiler, other.parts[0].programs.shapes[0]["ema"], frozen)
  values = validation(state["ema"], frozen, other.parts[0].objective.batch_maker(other.encoders, "tiny"))
  first = lines_of(run)[0][4]
  assert values.keys() == first.keys()
  for name, value in values.items():
    np.testing.assert_allclose(value, first[name], rtol=1e-5, err_msg=name)


def test_a_resumed_run_measures_the_same_bits(assets, validated, tmp_path):
  run, _, _ = validated
  shutil.copytree(run.config.output, tmp_path / "run")
  resumed = Run(tiny_config(assets, tmp_path / "run", resume="2", **settings(assets)))
  resumed.train()
  assert lines_of(resumed) == lines_of(run)


def test_evaluate_agrees_on_eight_devices(assets, validated, tmp_path):
  run, _, _ = validated
  result = run_module(
    "stdit_jax.evaluate", "--run", run.config.output, "--mesh", "data=2", "fsdp=4", "--output", tmp_path / "loss.json",
    XLA_FLAGS=f"--xla_force_host_platform_device_count=8 {QUICK_FLAGS}", NPROC="64",
  )  # fmt: skip
  assert result.returncode == 0, result.stderr[-3000:]
  values = json.loads((tmp_path / "loss.json").read_text())
  assert values["model"].endswith("step 4, ema")
  for name, value in lines_of(run)[0][4].items():
    np.testing.assert_allclose(values[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--tables", "none.csv"], "table none.csv does not exist"),
    (["--timesteps", "0"], "validation.timesteps is 0; allowed: a whole number of at least 1"),
    (["--mesh", "data"], "--mesh data: give AXIS=DEVICES"),
    (["--step", "3"], "has no checkpoint of step 3; there are [2, 4]"),
  ],
)
def test_wrong_arguments_of_evaluate_are_one_line(validated, capsys, arguments, words):
  with pytest.raises(SystemExit) as stop:
    evaluate.main(["--run", validated[0].config.output, *arguments])
  assert stop.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ")
  assert words in line
