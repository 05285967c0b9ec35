"""Non-finite losses: the run skips the step, then goes back and skips the failed micro steps, then stops."""

import json
import pathlib

import jax
import numpy as np
import pytest

from stdit_jax.errors import InputError
from stdit_jax.training.checkpoints import Checkpoints
from tests.runs import Run
from tests.tiny_run import tiny_config

STEPS = 8  # three batches of two images per epoch; one of the six images has a text embedding of NaN


def config(assets, output, table, steps=STEPS, **changes):
  settings = {
    "data__tables": (str(assets / table),), "data__buckets": (("64p", 1, 1.0, 2),), "text_encoder__train": False,
    "text_encoder__where": "disk", "stages": ({"name": "images", "steps": steps},), "checkpoint_every": 2,
    "caption_dropout": 0.0,
  }  # fmt: skip
  return tiny_config(assets, output, **{**settings, **changes})


def trained(*args, **changes):
  """(run, final state, metric lines)."""
  run = Run(config(*args, **changes))
  state = jax.tree.map(np.asarray, run.train())
  return run, state, [json.loads(line) for line in (pathlib.Path(run.config.output) / "metrics.jsonl").read_text().splitlines()]


def failing_positions(run):
  """Plan positions in the first epochs whose batch contains the NaN row."""
  plans = run.parts[0].data._plans
  places = [(i, plans.locate(i)) for i in range(2 * STEPS)]
  return [i for i, (epoch, step) in places if any(plans.table.locate(int(r))[1] == 7 for r in plans.plan(epoch).rows(step))]


def test_a_nonfinite_step_changes_nothing_and_is_counted(assets, tmp_path, capsys):
  run, state, lines = trained(assets, tmp_path / "run", "one_nan.csv")
  bad = [p for p in failing_positions(run) if p < STEPS]
  assert 2 <= len(bad) <= 3
  assert [line["step"] - 1 for line in lines if line["nonfinite"]] == bad
  assert [line["step"] - 1 for line in lines if not line["stepped"]] == bad
  assert all("loss" in line for line in lines if not line["nonfinite"])
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
  assert set(map(int, jax.tree.leaves(state["opt"][0].count))) == {STEPS - len(bad)}
  assert f"{len(bad)} non-finite steps skipped" in capsys.readouterr().out
  assert run.skip == {}


def test_after_the_limit_the_run_goes_back_and_skips_failed_steps(assets, tmp_path, capsys):
  run, state, lines = trained(assets, tmp_path / "alone", "one_nan.csv", max_nonfinite=1)
  assert run.counter.counts["gradient 64p x 1"] == 1
  assert run.counter.counts["update"] == 1
  bad = failing_positions(run)
  skipped = run.skip["images"]
  assert list(skipped) == bad[: len(skipped)]
  assert len(skipped) >= 2
  assert "going back to step" in capsys.readouterr().err
  assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
  assert not any(line["nonfinite"] for line in lines)
  assert set(map(int, jax.tree.leaves(state["opt"][0].count))) == {STEPS}
  assert pathlib.Path(run.checkpoints.folder).is_dir()

  # A run that stops on the way and resumes has the same bits.
  for steps in (5, STEPS):
    again, resumed, again_lines = trained(assets, tmp_path / "resumed", "one_nan.csv", steps, max_nonfinite=1)
  assert again.skip == run.skip
  jax.tree.map(np.testing.assert_array_equal, resumed, state)
  losses = [line["loss"] for line in lines]
  assert [line["loss"] for line in again_lines] == losses
  assert len(set(losses)) == STEPS


def test_the_first_checkpoint_after_a_multiple_of_keep_every_stays(tmp_path):
  """Step 10 was not finite, so the checkpoint waited for step 11."""
  checkpoints = Checkpoints(tmp_path, keep=1, every=10)
  for step in (8, 11, 12, 19, 20, 21, 29):
    checkpoints.save(step, {"params": {"weight": np.zeros(1, np.float32)}}, {}, {"step": step})
    checkpoints.wait()
  assert checkpoints.steps() == [11, 20, 29]
  checkpoints.close()


def test_a_repeated_failure_stops_the_run_with_a_report(assets, tmp_path):
  run = Run(config(assets, tmp_path / "run", "all_nan.csv", max_nonfinite=2))
  with pytest.raises(InputError, match=r"steps 1 to 2: loss or gradient was not finite, although .* back to step 0") as error:
    run.train()
  assert "\n" not in str(error.value)
  assert ".png" in str(error.value)
  assert "loss nan" in str(error.value)
  assert run.checkpoints.steps() == []
