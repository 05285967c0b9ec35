"""Training and sampling with an autoencoder that compresses time."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from stdit_jax import loading, sample
from stdit_jax.autoencoders import causal3d, temporal
from stdit_jax.generation import clips, tasks
from stdit_jax.generation.references import read_reference
from stdit_jax.interop import save_variables
from tests.runs import Run
from tests.tiny_run import tiny_config, write_config


@pytest.fixture(scope="module")
def trained(assets, tmp_path_factory):
  """A run of two steps on clips of 9 frames (3 latent frames)."""
  folder = tmp_path_factory.mktemp("video-autoencoder")
  config = temporal.TABLE["tiny-temporal"]
  variables = temporal.init(temporal.build(config), jax.random.key(0))
  save_variables(folder / "autoencoder.safetensors", "open-sora-vae", variables, config=config)
  more = {"autoencoder__name": "tiny-temporal", "autoencoder__weights": str(folder / "autoencoder.safetensors")}
  more |= {"data__buckets": (("64p", 9, 1.0, 2),), "stages": ({"name": "tiny", "steps": 2},)}
  run = Run(tiny_config(assets, folder / "run", **more))
  run.train()
  encodes = {name: n for name, n in run.counter.counts.items() if "encode" in name}
  assert max(encodes.values()) <= 1  # 0: from a file of an earlier test
  assert {name.split()[2].split("x")[0] for name in encodes} == {"9"}
  return folder / "run"


def test_training_with_a_video_autoencoder_has_finite_losses(trained):
  losses = [line["loss"] for line in map(json.loads, (trained / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
  assert len(losses) == 2
  assert np.isfinite(losses).all()


def made_frames(trained, folder, *arguments):
  what = ["--run", trained, "--image-size", 48, 64, "--steps", 2, "--fps", 8, "--format", "frames", "--prompt", "columns"]
  sample.main([*map(str, what), "--output", str(folder), *map(str, arguments)])
  (found,) = (p for p in folder.iterdir() if p.is_dir())
  return np.stack([np.asarray(Image.open(path)) for path in sorted(found.iterdir())])


def test_tasks_count_latent_frames(assets, trained, tmp_path, capsys):
  """20 frames are 6 latent frames: one chunk of 1, 4, 4, 4 and 4 frames, and one chunk of 3."""
  animated = made_frames(trained, tmp_path / "a", "--num-frames", 20, "--task", "animate", assets / "0.png")
  assert animated.shape == (20, 48, 64, 3)
  video = assets / "0.mp4"
  known = read_reference(video, (48, 64), 8)
  assert len(known) == 16  # 4 latent frames
  extended = made_frames(trained, tmp_path / "e", "--num-frames", 20, "--task", "extend-forward", video)
  np.testing.assert_array_equal(extended[:16], known)
  assert len(extended) == 16 + 20 - 13
  endless = made_frames(trained, tmp_path / "l", "--num-frames", 34, "--task", "endless", "--loops", 2)
  assert len(endless) == 34 + 17  # a whole chunk of the previous clip is given
  settings = json.loads(next((tmp_path / "l").glob("*.json")).read_text())
  assert settings["rules"] == [[1, 0, -5, 0, 5, 0.0]]
  capsys.readouterr()
  arguments = ["--num-frames", "20", "--prompt", "x", "--explain", "--task", "animate", str(assets / "0.png")]
  sample.main(["--run", str(trained), *arguments])
  text = capsys.readouterr().out
  assert "reference 0: " in text
  assert "1 latent frame\n" in text
  assert "(6 latent frames)" in text


def test_the_end_of_a_video_is_encoded_like_the_start_of_a_clip(trained):
  """The last 17 of 20 frames become latents of 1, 4, 4, 4 and 4 frames, like the start of the clip that continues them."""
  settings = sample.parse(["--run", str(trained), "--prompt", "x"])
  pipeline = loading.load_pipeline(settings, *loading.read_model(settings))
  frames = np.random.default_rng(0).integers(0, 256, (20, 16, 24, 3), np.uint8)
  job = tasks.make_job("extend-forward", 10, [6], group=5)
  placements = clips.placements_of(job, [20], pipeline.codec.config, 34)
  (known,) = clips.encode_used(pipeline, [frames], placements, 34)
  np.testing.assert_array_equal(list(known.values()), pipeline.encode(frames[-17:]))
  assert list(known) == [1, 2, 3, 4, 5]
  (whole,) = clips.encode_used(pipeline, [frames], placements)
  np.testing.assert_array_equal(list(whole.values()), pipeline.encode(frames)[1:])


def test_lengths_that_split_a_chunk_are_refused(trained, capsys):
  arguments = ["--run", str(trained), "--prompt", "x", "--num-frames", "20", "--task"]
  for task, words in (
    (["loop"], "--num-frames is 20; for --task loop the last latent frames of a clip must cover as many frames as its first "
     "ones, and some must be left to generate. Give 51 or 68\n"),
    (["endless", "--loops", "2"], "--num-frames is 20; for --loops the last latent frames of a clip must cover as many"),
    (["endless", "--loops", "2", "--num-frames", "34", "--condition-frames", "3"],
     "--condition-frames is 3; for --loops the given latent frames must be whole chunks, and some must be left to generate. "
     "Allowed: 5\n"),
  ):  # fmt: skip
    with pytest.raises(SystemExit):
      sample.main([*arguments, *task])
    assert words in capsys.readouterr().err
  with pytest.raises(SystemExit):
    sample.main([*arguments[:-1], "--loops", "2"])  # without a task, too
  assert "to generate. Give 34 or 51\n" in capsys.readouterr().err


def test_cogvideox_clips_with_a_single_first_frame_are_not_continued():
  config = causal3d.get_config("tiny-causal3d")
  tasks.check_length("endless", 2, 16, None, config)
  tasks.check_length("animate", 1, 17, None, config)
  with pytest.raises(ValueError, match=r"--num-frames is 17; .* be left to generate. Give 16 or 24$"):
    tasks.check_length("endless", 2, 17, None, config)


def test_a_length_that_does_not_round_trip_is_refused(assets, tmp_path, capsys):
  config = write_config(tmp_path / "config.py", assets, tmp_path / "unused", autoencoder__name="tiny-causal3d")
  with pytest.raises(SystemExit):
    sample.main(["--config", str(config), "--weights", "w", "--prompt", "x", "--image-size", "48", "64", "--num-frames", "12"])
  error = capsys.readouterr().err
  assert error == "error: --num-frames is 12, but the autoencoder changes this length; give 9 or 16\n"
