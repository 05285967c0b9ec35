"""The shipped model of moving shapes loads and follows its prompts."""

import pytest

from data import shapes, shapes_vision
from stdit_jax import components, evaluate, loading, sample
from stdit_jax.generation import production
from stdit_jax.generation.pipeline import Request
from tests.tiny_run import ROOT

FOLDER = ROOT / "data" / "moving_shapes"
MODEL = [
  "--config", str(ROOT / "configs" / "shapes.py"), "--weights", str(FOLDER / "denoiser.safetensors"),
  "--text-encoder", str(FOLDER / "text_encoder.safetensors"),
]  # fmt: skip


def test_the_shipped_model_follows_its_prompts():
  """Six prompts with six colours. Few steps and four frames keep the test short; a small motion may be misread."""
  settings = sample.parse([*MODEL, "--sampler", "adams-bashforth"])
  pipeline = loading.load_pipeline(settings, *loading.read_model(settings))
  words = zip(shapes.COLORS, [*shapes.GROUNDS] * 2, [*shapes.SHAPES] * 2, shapes.DIRECTIONS)
  scenes = [
    shapes.Scene((shapes.Object(shape, color, direction, "quickly", (0, 0)),), ground, False, 96, 96, 9)
    for color, ground, shape, direction in words
  ]
  requests = [Request(shapes.captions(one)[0], 64, 64, 4, float(shapes.FPS), seed) for seed, one in enumerate(scenes)]
  videos = pipeline.decode(pipeline.sample_latents(requests, 10, 3.0), 4)
  judged = [shapes_vision.judge(video, one) for one, video in zip(scenes, videos, strict=True)]
  for what, least in (("color", 6), ("ground", 6), ("shape", 6), ("direction", 4)):
    assert sum(each[what] for each in judged) >= least, (what, judged)


def test_too_little_memory_for_the_examination_is_an_error_before_weights_are_read(monkeypatch, capsys):
  monkeypatch.setattr(production, "free_memory", lambda: 100_000)
  monkeypatch.setattr(components, "load_denoiser", None)
  with pytest.raises(SystemExit) as stopped:
    evaluate.main([*MODEL, "--task", "shapes", "--batch-size", "1", "--steps", "2"])
  assert stopped.value.code == 2
  *_, error = capsys.readouterr().err.splitlines()
  assert error.startswith("error: memory of each device: 0.0")
  assert error.endswith("GiB are free: lower --batch-size, use --guidance-in-turn, or more devices with --mesh")
