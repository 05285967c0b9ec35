"""The shipped model of moving shapes loads and follows its prompts."""

from data import shapes, shapes_vision
from stdit_jax import loading, sample
from stdit_jax.generation.pipeline import Request
from tests.tiny_run import ROOT


def test_the_shipped_model_follows_its_prompts():
  """Six prompts with six colours. Few steps and four frames keep the test short; a small motion may be misread."""
  folder = ROOT / "data" / "moving_shapes"
  files = ["--weights", str(folder / "denoiser.safetensors"), "--text-encoder", str(folder / "text_encoder.safetensors")]
  more = ["--config", str(ROOT / "configs" / "shapes.py"), "--sampler", "adams-bashforth"]
  settings = sample.parse([*files, *more])
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
