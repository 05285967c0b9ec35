"""The pipeline and its command line: one seed makes one video, whatever the batch; run folder and safetensors agree."""

import dataclasses
import json

import av
import jax
import numpy as np
import pytest
from PIL import Image

from stdit_jax import sample
from stdit_jax.diffusion.noise import Purpose, sample_keys
from stdit_jax.generation import pipeline as pipelines
from stdit_jax.generation.pipeline import Request, latent_noise
from stdit_jax.interop import save_variables
from stdit_jax.training.checkpoints import load_weights
from stdit_jax.training.loop import Run
from tests.tiny_run import run_module, tiny_config, write_config

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def trained(assets, tmp_path_factory):
  """A run folder of one step, every parameter moved, so that prompts matter."""
  folder = tmp_path_factory.mktemp("sampled") / "run"
  run = Run(tiny_config(assets, folder))
  state, frozen, _ = run.start()
  rng = np.random.default_rng(0)
  moved = jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape, np.float32), state["ema"])
  run.save(1, {**state, "ema": moved}, frozen)
  run.checkpoints.wait()
  run.checkpoints.close()
  return folder


@pytest.fixture(scope="module")
def pipeline(trained):
  args = sample.make_parser().parse_args(["--run", str(trained), "--prompt", "x"])
  made, config, described = sample.load_pipeline(args)
  assert described.endswith("step 1, ema")
  assert config.sample.steps == 2
  return made


REQUESTS = [Request(f"clip {i}", 72, 56, 3, 8, seed) for i, seed in enumerate((5, 6, 4_000_000_000))]


def test_one_seed_makes_one_video_whatever_the_batch(pipeline):
  together = pipeline.sample_latents(REQUESTS, 2, 2.0, iter)
  alone = pipeline.sample_latents(REQUESTS[1:2], 2, 2.0, iter)
  assert together.shape == (3, 3, 9, 7, 4)
  scale = float(np.abs(alone).max())
  np.testing.assert_allclose(together[1], alone[0], atol=1e-4 * scale)
  assert np.abs(together[0] - together[1]).max() > 1e-2 * scale
  again = pipeline.sample_latents(REQUESTS[1:2], 2, 2.0, iter)
  assert np.asarray(again).tobytes() == np.asarray(alone).tobytes()


def test_noise_bits_depend_on_the_seed_alone(pipeline):
  config, size = pipeline.model.config, (3, 9, 7)
  keys = lambda seeds: sample_keys(0, np.asarray([(0, s) for s in seeds], np.uint32), Purpose.SAMPLING_START)  # noqa: E731
  three = np.asarray(latent_noise(config, keys((5, 6, 7)), size))
  assert three[1].tobytes() == np.asarray(latent_noise(config, keys((6,)), size))[0].tobytes()
  # 9 x 7 latents fill 5 x 4 patches of 2 x 2: what hangs over is zero.
  inside = pipelines.image_valid(size, config.patch_size, 4)
  assert not three[:, ~inside].any()
  assert three[:, inside].all()


def test_guidance_prompts_and_weights_matter(pipeline, trained):
  request = REQUESTS[:1]
  base = pipeline.sample_latents(request, 2, 2.0, iter)
  for other in ((request, 2, 3.0), ([dataclasses.replace(request[0], prompt="another")], 2, 2.0), (request, 3, 2.0)):
    assert np.abs(pipeline.sample_latents(*other, iter) - base).max() > 1e-5
  with pytest.raises(ValueError, match="same size, frames and fps"):
    pipeline.sample_latents([request[0], dataclasses.replace(request[0], height=64)])
  (frames,) = pipeline.decode(base)
  assert frames.shape == (3, 72, 56, 3)
  assert frames.dtype == np.uint8


# -------------------------------------------------------------------------------------------------------------- command line

SIZE = ["--image-size", "48", "64", "--num-frames", "3", "--fps", "8", "--steps", "2", "--guidance-scale", "2"]


def videos(folder):
  frames = {}
  for path in sorted(folder.glob("*.mp4")):
    with av.open(str(path)) as container:
      frames[path.name] = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
  return frames


def pictures(path):
  """Frames of a gif: unlike x264's, its bytes follow from the frames alone."""
  with Image.open(path) as image:
    return np.stack([np.asarray(image.convert("RGB")) for _ in map(image.seek, range(image.n_frames))])


def test_the_command_line_end_to_end(trained, tmp_path):
  output = tmp_path / "out"
  more = ["--prompt", "A gray rabbit!", "--num-samples", "2", "--batch-size", "2", "--output", str(output)]
  result = run_module("stdit_jax.sample", "--run", trained, *SIZE, *more)
  assert result.returncode == 0, result.stderr[-3000:]
  names = ["0000-a-gray-rabbit-seed0", "0000-a-gray-rabbit-seed1"]
  assert sorted(p.name for p in output.iterdir()) == sorted(f"{n}.{e}" for n in names for e in ("json", "mp4"))
  settings = json.loads((output / f"{names[1]}.json").read_text())
  assert settings["seed"] == 1
  assert (settings["height"], settings["width"], settings["num_frames"]) == (48, 64, 3)
  made = videos(output)
  assert [v.shape for v in made.values()] == [(3, 48, 64, 3)] * 2
  assert all(f"{n}.mp4" in result.stdout for n in names)


def test_what_exists_is_kept_unless_overwritten_and_formats(trained, tmp_path, capsys):
  output = tmp_path / "out"
  arguments = ["--run", str(trained), *SIZE, "--prompt", "a rabbit", "--output", str(output)]
  arguments += ["--format", "gif"]
  sample.main(arguments)
  path = output / "0000-a-rabbit-seed0.gif"
  first = pictures(path)
  assert first.shape == (3, 48, 64, 3)
  path.write_bytes(b"mine")
  sample.main([*arguments, "--num-samples", "2"])
  assert path.read_bytes() == b"mine"
  assert "1 of 2 files exist and are kept" in capsys.readouterr().out
  assert len(list(output.glob("*.gif"))) == 2
  sample.main([*arguments, "--overwrite"])
  np.testing.assert_array_equal(pictures(path), first)
  sample.main([*arguments, "--num-frames", "1"])
  with Image.open(path.with_suffix(".png")) as image:
    assert image.size == (64, 48)
    assert json.loads(image.text["Comment"])["num_frames"] == 1


def test_safetensors_give_the_video_of_the_run(assets, trained, tmp_path):
  ema, constants, _ = load_weights(trained)
  config = write_config(tmp_path / "config.py", assets, tmp_path / "unused")
  run = Run(tiny_config(assets, tmp_path / "shapes"))
  variables = {"params": ema["denoiser"], "constants": constants["denoiser"]}
  save_variables(tmp_path / "denoiser.safetensors", "open-sora", variables, config=run.objectives[0].model.config)
  save_variables(tmp_path / "t5.safetensors", "t5", {"params": ema["text_encoder"]}, config=run.objectives[0].text.config)
  what = [*SIZE, "--prompt", "a rabbit", "--format", "gif", "--output"]
  made = lambda name: pictures(tmp_path / name / "0000-a-rabbit-seed0.gif")  # noqa: E731
  files = ["--weights", str(tmp_path / "denoiser.safetensors"), "--text-encoder", str(tmp_path / "t5.safetensors")]
  sample.main(["--run", str(trained), *what, str(tmp_path / "a")])
  sample.main(["--config", str(config), *files, *what, str(tmp_path / "b"), "--mesh", "data=1"])
  np.testing.assert_array_equal(made("a"), made("b"))
  sample.main(["--run", str(trained), "--item", "params", *what, str(tmp_path / "c")])
  assert (made("c") != made("a")).any()


@pytest.mark.parametrize(("arguments", "words"), [
  (["--image-size", "50", "64"], "--image-size: H is 50; it must be a multiple of 8, e.g. 48"),
  (["--image-size", "0", "64"], "H is 0"),
  (["--resolution", "144"], "unknown resolution '144' (did you mean '144p'?)"),
  (["--aspect-ratio", "2:9"], "144p has no aspect ratio '2:9'"),
  (["--num-frames", "none"], "'none' is no clip length"),
  (["--num-frames", "0"], "'0' is no clip length"),
  (["--fps", "0"], "--fps is 0"),
  (["--steps", "0"], "--steps is 0; allowed: at least 1"),
  (["--num-samples", "0"], "--num-samples is 0"),
  (["--seed", "-1"], "seeds are -1 to -1; allowed: 0 to 4294967295"),
  (["--seed", "4294967296"], "allowed: 0 to 4294967295"),
  (["--guidance-channels", "9"], "guided_channels is 9; allowed: 1 to 4"),
  (["--step", "99"], "has no checkpoint of step 99; there are [1]"),
  (["--config", "configs/film.py"], "give either --run FOLDER"),
  (["--prompt-file", "/no/file"], "/no/file"),
  (["--autoencoder", "/no/file"], "'/no/file' does not exist"),
  (["--output", "/proc/x"], "/proc/x"),
  (["--item", "opt"], "invalid choice: 'opt'"),
  (["--promt", "x"], "unrecognized arguments: --promt x"),
])  # fmt: skip
def test_bad_arguments_are_one_line(trained, tmp_path, capsys, arguments, words):
  fixed = ["--run", str(trained), "--prompt", "x", "--output", str(tmp_path / "out")]
  with pytest.raises(SystemExit) as stopped:
    sample.main([*fixed, *arguments])
  assert stopped.value.code == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ")
  assert words in error
  assert error.count("\n") == 1
  assert not list(tmp_path.rglob("*.mp4"))


def test_no_prompt_no_run_and_broken_configurations(tmp_path, capsys):
  (tmp_path / "syntax.py").write_text("def get_config(:\n")
  (tmp_path / "none.py").write_text("x = 1\n")
  (tmp_path / "raises.py").write_text("import nothing_of_this_name\n")
  (tmp_path / "latin.txt").write_bytes("Gr\xfcn".encode("latin-1"))
  prompt = ["--prompt", "x"]
  for arguments, words in (
    (["--run", str(tmp_path)], "no prompt; give --prompt"),
    (["--prompt-file", str(tmp_path / "latin.txt")], "is not UTF-8 text"),
    (["--run", str(tmp_path), *prompt], "is no run folder: it has no config.json"),
    (["--config", str(tmp_path / "syntax.py"), *prompt], "syntax.py is no configuration: SyntaxError"),
    (["--config", str(tmp_path / "none.py"), *prompt], "none.py has no get_config()"),
    (["--config", str(tmp_path / "raises.py"), *prompt], "nothing_of_this_name"),
    (["--config", str(tmp_path / "missing.py"), *prompt], "missing.py can't be read: No such file"),
    (["--config", "configs/quickstart.py", *prompt], "--weights is empty"),
    (prompt, "give either --run FOLDER"),
  ):
    with pytest.raises(SystemExit) as stopped:
      sample.main(arguments)
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1), error
    assert error.startswith("error: ")
    assert words in error
