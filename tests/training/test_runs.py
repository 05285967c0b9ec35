"""Whole runs in this process: traces, places of the text encoder, IDDPM, initial weights, bad rows, the autoencoder."""

import json
import pathlib
import re
import time

import jax
import numpy as np
import pytest
from PIL import Image

from data.read_ahead import Ahead
from stdit_jax import evaluate
from stdit_jax.errors import InputError
from stdit_jax.interop import CheckpointError, save_variables
from stdit_jax.run_samples import Sampler
from stdit_jax.training.checkpoints import load_weights
from stdit_jax.training.metrics import Averages, Metrics, Speed, stage_note
from tests.runs import Run
from tests.tiny_run import text_from_disk, tiny_config

ONE_STEP = {"stages": ({"name": "one", "steps": 1},), "data__buckets": (("64p", 1, 1.0, 2),)}


def metrics_of(run):
  return [json.loads(line) for line in (pathlib.Path(run.config.output) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def first(assets, tmp_path_factory):
  """(run, final state) of the tiny configuration."""
  run = Run(tiny_config(assets, tmp_path_factory.mktemp("runs") / "first"))
  return run, jax.tree.map(np.asarray, run.train())


def test_metrics_of_a_step(first, capsys):
  """The loss of the bucket and of the quarters of the timesteps, the speed, and the share of waiting for data."""
  run, _ = first
  for line in metrics_of(run):
    assert {"loss", "gradient_norm", "learning_rate", "stepped", "nonfinite", "speed/step_seconds"} <= line.keys()
    quarters = [value for name, value in line.items() if name.startswith("loss/t ")]
    (bucket,) = (value for name, value in line.items() if name.startswith("loss/64p"))
    assert not any("share" in name and name.startswith("loss") for name in line)
    np.testing.assert_allclose(bucket, line["loss"], rtol=1e-6)
    assert 1 <= len(quarters) <= 2  # two samples fall into at most two quarters
    assert min(quarters) * (1 - 1e-6) <= line["loss"] <= max(quarters) * (1 + 1e-6)
    assert 0 <= line["speed/data_share"] < 1
    np.testing.assert_allclose(line["speed/data_seconds"] / line["speed/step_seconds"], line["speed/data_share"], rtol=1e-6)
    assert line["speed/tokens_per_second"] > 0
    assert "speed/mfu" not in line  # a CPU has no published peak
    frames = 1 if "loss/64p x 1" in line else 4
    batch = run.parts[0].objective.batch(("64p", frames), 2)
    tokens, work = run.parts[0].objective.work(batch)
    assert tokens == 2 * frames * batch["latents_mean"].shape[2]
    ratio = line["speed/tflops_per_device"] * 1e12 / line["speed/tokens_per_second"]
    np.testing.assert_allclose(ratio, work / tokens, rtol=1e-6)


def test_averages_skip_nonfinite_and_weightless_values():
  log = Averages()
  for value, share, weight in ((6.0, 0.5, 2.0), (3.0, 1.0, 1.0), (0.0, 0.0, 5.0)):
    log.add({"q": value, "q/share": share}, weight)
  log.add({"never": 0.0, "never/share": 0.0})
  log.add({"loss": float("nan"), "q": float("nan"), "q/share": 0.5})
  log.add({"loss": 2.0})
  assert log.take() == {"q": (12 + 3) / 2.0, "loss": 2.0}
  assert log.take() == {}


def test_speed_measures_the_wait_for_data_of_a_stage():
  """The time before the first step and the time of checkpoints and samples do not count."""
  speed, ahead = Speed(jax.devices()), Ahead(2, 2, 3 * 10**9, False, (10**6,), (1,), ("144p x 1",))
  with speed.waiting_for_data():
    time.sleep(0.05)
  speed.start_stage()
  with speed.paused():
    time.sleep(0.05)
  for wait in (0.02, 0.0):
    with speed.waiting_for_data():
      time.sleep(wait)
    speed.step()
    speed.take()
  steps, seconds, share = speed.stage_data()
  assert steps == 2
  assert 0.01 <= seconds < 0.03
  assert share > 0.8
  note = stage_note(steps, seconds, share, ahead)
  assert "or raise data.workers (now 2) or data.read_ahead (now 3 GB)" in note
  assert "raise" not in stage_note(steps, seconds, 0.019, ahead)


def test_time_left_follows_the_steps_of_the_stage(tmp_path, monkeypatch, capsys):
  """The compilation before the stage and the steps of another stage do not count."""
  now = 0.0
  monkeypatch.setattr("stdit_jax.training.metrics.time.monotonic", lambda: now)
  metrics = Metrics(str(tmp_path), 0, 200)
  for at, step, started in ((1000, 0, True), (1010, 100, False), (1030, 100, True), (1130, 150, False)):
    now = at
    metrics.start_stage(step) if started else metrics.write(step, {"loss": 1.0})
  metrics.close()
  assert [line.split("  ", 2)[2] for line in capsys.readouterr().out.splitlines()] == [
    "10.00 steps/s  10 s left", "0.50 steps/s  1:40 left"
  ]  # fmt: skip


def test_every_program_is_compiled_once(first):
  run, _ = first
  counts = run.counter.counts
  encodes = {f"tiny: encode 1x{h}x{w}" for h, w in ((48, 80), (80, 48), (64, 64))}
  assert counts.keys() == {"gradient 64p x 1", "gradient 64p x 4", "update", *encodes}
  # Encode programs come from files if an earlier test has made them.
  assert all(n == 1 or (n == 0 and name in encodes) for name, n in counts.items())


def test_a_run_writes_its_configuration_metrics_and_checkpoints(first):
  run, state = first
  folder = pathlib.Path(run.config.output)
  assert [line["step"] for line in metrics_of(run)] == [1, 2, 3, 4]
  assert {"loss", "gradient_norm", "learning_rate", "stepped"} <= set(metrics_of(run)[0])
  assert json.loads((folder / "config.json").read_text())["model"]["fields"]["hidden_size"] == 48
  assert list((folder / "tensorboard").iterdir())
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves((state["params"], state["ema"])))
  for item, step in (("params", 4), ("ema", 4), ("params", 2)):
    loaded, constants, found = load_weights(folder, item, step)
    assert found == step
    assert list(constants) == ["denoiser"]
    if step == 4:
      jax.tree.map(np.testing.assert_array_equal, loaded, state[item])
  with pytest.raises(ValueError, match=r"no checkpoint of step 3; there are \[2, 4\]"):
    load_weights(folder, "ema", 3)


def test_bfloat16_compute_over_float32_state(first, assets, tmp_path):
  """The losses agree to the precision of bfloat16. Parameters, average and moments stay float32."""
  half = {"model__fields__dtype": "bfloat16", "autoencoder__dtype": "bfloat16", "text_encoder__fields": {"dtype": "bfloat16"}}
  run = Run(tiny_config(assets, tmp_path / "half", **half))
  state = run.train()
  assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} == {np.dtype(np.float32)}
  ours, theirs = ([line["loss"] for line in metrics_of(r)] for r in (run, first[0]))
  np.testing.assert_allclose(ours, theirs, rtol=2e-2)
  assert ours != theirs


def test_cached_latents_change_nothing(assets, tmp_path):
  states = []
  clips = {"data__buckets": (("64p", 4, 1.0, 2),), "data__windows_per_row": 1}  # six clips, in three steps per epoch
  clips |= text_from_disk(assets)
  for gigabytes in (0.0, 3.2e-5, 1.0):  # the cache holds no clip, four clips, all clips
    steps = {"stages": ({"name": "epochs", "steps": 9},), "checkpoint_every": 9}
    run = Run(tiny_config(assets, tmp_path / str(gigabytes), autoencoder__cache_gb=gigabytes, **clips, **steps))
    states.append(jax.tree.map(np.asarray, run.train()))
    assert (run.encoders.clip_encoder.cache.hits > 0) == (gigabytes > 0)
    assert run.encoders.clip_encoder.cache.bytes <= gigabytes * 2**30
  jax.tree.map(np.testing.assert_array_equal, *states[:2])
  jax.tree.map(np.testing.assert_array_equal, *states[1:])


def test_text_encoders_in_the_step_ahead_and_on_disk_agree(assets, tmp_path):
  losses, states = {}, {}
  for name, where, settings in (
    ("trained from weights", "step", {"text_encoder__train": True}),
    ("frozen", "step", {}),
    ("ahead", "ahead", {}),
    ("disk", "disk", {"data__tables": str(assets / "features.csv")}),
  ):
    weights = {"text_encoder__weights": str(assets / "t5.safetensors"), "text_encoder__train": False}
    run = Run(tiny_config(assets, tmp_path / name, text_encoder__where=where, **{**ONE_STEP, **weights, **settings}))
    states[name] = run.train()
    losses[name] = metrics_of(run)[0]["loss"]
  # The weights of the encoder, the data and the noise are the same in all runs.
  np.testing.assert_allclose(losses["frozen"], losses["ahead"], rtol=1e-6)
  np.testing.assert_allclose(losses["frozen"], losses["trained from weights"], rtol=1e-6)
  assert losses["disk"] != losses["ahead"]
  assert np.isfinite(losses["disk"])
  assert {name for name, state in states.items() if "text_encoder" in state["params"]} == {"trained from weights"}
  resumed, frozen, step = Run(
    tiny_config(assets, tmp_path / "frozen", text_encoder__where="step", **{**ONE_STEP, **weights})
  ).start()
  assert step == 1
  assert "text_encoder" in frozen
  assert "text_encoder" not in resumed["params"]


def test_iddpm_trains_and_samples(assets, tmp_path):
  config = tiny_config(
    assets, tmp_path / "iddpm", **ONE_STEP, model__name="STDiT2-tiny/2", diffusion={"name": "iddpm", "fields": {}},
    mask_ratios={"mask_no": 0.5, "mask_image_head": 0.5}, sample_every=1, sample__num_frames=1,
    sample__resolution="64p",
  )  # fmt: skip
  run = Run(config)
  run.train(Sampler(run))
  assert np.isfinite(metrics_of(run)[0]["loss"])
  samples = tmp_path / "iddpm" / "samples"
  assert Image.open(samples / "step0000001-0.png").size == (64, 64)
  settings = json.loads((samples / "step0000001-0.json").read_text())
  assert settings["step"] == 1
  assert settings["prompt"] == "a picture"


def start(config):
  params_and_frozen = Run(config).start()
  return jax.tree.map(np.asarray, params_and_frozen[0]), jax.tree.map(np.asarray, params_and_frozen[1])


def test_init_from_a_run_and_from_safetensors(assets, first, tmp_path, capsys):
  run, state = first
  own = start(tiny_config(assets, tmp_path / "own", **ONE_STEP))[0]["params"]
  of_run, frozen = start(tiny_config(assets, tmp_path / "run", init=str(run.config.output), **ONE_STEP))
  for tree in (of_run["params"], of_run["ema"]):
    jax.tree.map(np.testing.assert_array_equal, tree, state["ema"])
  assert not any(jax.tree.leaves(of_run["opt"][0].count))

  model = run.parts[0].objective.model.config
  file = tmp_path / "denoiser.safetensors"
  save_variables(file, "open-sora", {"params": state["params"]["denoiser"], "constants": frozen["denoiser"]}, config=model)
  params, constants = start(tiny_config(assets, tmp_path / "file", init=str(file), **ONE_STEP))
  jax.tree.map(np.testing.assert_array_equal, params["params"]["denoiser"], state["params"]["denoiser"])
  jax.tree.map(np.testing.assert_array_equal, params["params"]["text_encoder"], own["text_encoder"])
  jax.tree.map(np.testing.assert_array_equal, constants["denoiser"], frozen["denoiser"])

  deeper = {"init": str(file), "model__fields__depth": 2, **ONE_STEP}
  with pytest.raises(CheckpointError, match="missing"):
    start(tiny_config(assets, tmp_path / "strict", **deeper))
  capsys.readouterr()
  params, _ = start(tiny_config(assets, tmp_path / "lenient", init_strict=False, **deeper))
  report = capsys.readouterr().out
  assert "missing" in report
  assert "spatial_blocks.1" in report
  blocks = params["params"]["denoiser"]["spatial_blocks"]["mlp"]["fc1"]["kernel"]
  np.testing.assert_array_equal(blocks[:1], state["params"]["denoiser"]["spatial_blocks"]["mlp"]["fc1"]["kernel"])
  assert np.abs(blocks[1]).max() > 0


def test_undecodable_rows_are_counted_and_skipped_up_to_the_limit(assets, tmp_path, capsys):
  table = {**ONE_STEP, "data__tables": str(assets / "broken.csv")}
  run = Run(tiny_config(assets, tmp_path / "some", data__max_bad_rows=1, **table))
  run.train()
  assert metrics_of(run)[0]["stepped"] == 1
  assert np.isfinite(metrics_of(run)[0]["loss"])
  said = capsys.readouterr().out
  assert "1 bad files" in said
  assert re.search(r"stage 'one': 1 steps of \S+ s, \S+% of it waiting for data", said)
  assert re.search(r"stage 'one': up to \d+ threads, at most \S+ MB ahead \(\d+ rows of 64p x 1\)", said)
  with pytest.raises(InputError, match=r"1 files cannot be decoded.*broken.png"):
    Run(tiny_config(assets, tmp_path / "none", data__max_bad_rows=0, **table)).train()


def test_the_autoencoder_trains(assets, first, tmp_path, capsys):
  settings = {"task": "autoencoder", "autoencoder__crop": 16, "data__captions": "optional", "autoencoder__weights": ""}
  settings["autoencoder__fields"] = {"block_out_channels": (8, 8)}
  run = Run(tiny_config(assets, tmp_path / "autoencoder", **settings, **ONE_STEP))
  run.train()
  assert {"loss", "reconstruction", "kl", "squared_error"} <= set(metrics_of(run)[0])
  with pytest.raises(ValueError, match="is a run that trains the autoencoder; this run trains the denoiser"):
    Run(tiny_config(assets, tmp_path / "other", init=str(tmp_path / "autoencoder"), **ONE_STEP)).start()
  capsys.readouterr()
  evaluate.main(["--task", "autoencoder", "--run", run.config.output, "--buckets", "64p:1", "--count", "1"])
  said = capsys.readouterr().out.splitlines()
  assert said[0].startswith("memory of each device beside the weights: ")
  assert said[1] == f"{run.config.output}, step 1, ema, one of 3 frames:"
  assert said[3].startswith("64p x 1 ")
