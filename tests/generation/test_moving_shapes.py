"""The model of moving shapes that the repository ships loads, and makes what it is told."""

import pytest

from data import shapes, shapes_vision
from stdit_jax import sample
from stdit_jax.generation.pipeline import Request
from stdit_jax.training import loading
from tests.tiny_run import ROOT

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_colours_and_grounds_are_those_of_the_prompt():
  """Of six prompts one may fail: in so few steps."""
  folder = ROOT / "data" / "moving_shapes"
  files = ["--weights", str(folder / "denoiser.safetensors"), "--text-encoder", str(folder / "text_encoder.safetensors")]
  args = sample.make_parser().parse_args(["--config", str(ROOT / "configs" / "shapes.py"), *files])
  pipeline = loading.load_pipeline(args, *loading.read_model(args))
  scenes = [
    shapes.Scene((shapes.Object("circle", color, "right", "slowly", (0, 0)),), ground, False, 96, 96, 9)
    for color, ground in zip(shapes.COLORS, [*shapes.GROUNDS] * 2)
  ]
  requests = [Request(shapes.captions(one)[0], 64, 64, 4, float(shapes.FPS), seed) for seed, one in enumerate(scenes)]
  videos = pipeline.decode(pipeline.sample_latents(requests, 12, 4.0), 4)
  judged = [shapes_vision.judge(video, one) for one, video in zip(scenes, videos, strict=True)]
  for what in ("color", "ground"):
    assert sum(each[what] for each in judged) >= 5, (what, judged)
