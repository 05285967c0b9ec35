"""The pipeline and `sample`: a seed makes one video in any batch, and a run folder and its safetensors agree."""

import dataclasses
import json
import shutil

import av
import jax
import numpy as np
import pytest
from PIL import Image

from data.video import read_frames
from stdit_jax import loading, sample
from stdit_jax.autoencoders import codec
from stdit_jax.autoencoders.registry import autoencoder_model
from stdit_jax.diffusion.noise import Purpose, sample_keys
from stdit_jax.generation import media, production, work
from stdit_jax.generation import pipeline as pipelines
from stdit_jax.generation.pipeline import Request, latent_noise
from stdit_jax.generation.references import read_reference
from stdit_jax.interop import save_variables
from stdit_jax.training.checkpoints import load_weights
from tests.runs import Run
from tests.tiny_run import run_module, tiny_config, write_config


@pytest.fixture(scope="module")
def trained(assets, tmp_path_factory):
  """A run folder of one step. Every parameter is moved, so that prompts matter."""
  folder = tmp_path_factory.mktemp("sampled") / "run"
  run = Run(tiny_config(assets, folder))
  state, frozen, _ = run.start()
  rng = np.random.default_rng(0)
  moved = jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape, np.float32), state["ema"])
  run.restarts.save(1, {**state, "ema": moved}, frozen)
  run.checkpoints.wait()
  run.checkpoints.close()
  return folder


@pytest.fixture(scope="module")
def pipeline(trained):
  settings = sample.parse(["--run", str(trained), "--prompt", "x"])
  config, step = loading.read_model(settings)
  made = loading.load_pipeline(settings, config, step)
  assert loading.describe(settings, step).endswith("step 1, ema")
  assert config.sample.steps == 2
  return made


REQUESTS = [Request(f"clip {i}", 72, 56, 3, 8, seed) for i, seed in enumerate((5, 6, 4_000_000_000))]


def test_a_seed_makes_one_video_in_any_batch(pipeline):
  together = pipeline.sample_latents(REQUESTS, 2, 2.0)
  alone = pipeline.sample_latents(REQUESTS[1:2], 2, 2.0)
  assert together.shape == (3, 3, 9, 7, 4)
  scale = float(np.abs(alone).max())
  np.testing.assert_allclose(together[1], alone[0], atol=1e-4 * scale)
  assert np.abs(together[0] - together[1]).max() > 1e-2 * scale
  again = pipeline.sample_latents(REQUESTS[1:2], 2, 2.0)
  assert np.asarray(again).tobytes() == np.asarray(alone).tobytes()


def test_noise_bits_depend_on_the_seed_alone(pipeline):
  config, size = pipeline.model.config, (3, 9, 7)
  keys = lambda seeds: sample_keys(0, np.asarray([(0, s) for s in seeds], np.uint32), Purpose.SAMPLING_START)  # noqa: E731
  three = np.asarray(latent_noise(config, keys((5, 6, 7)), size))
  assert three[1].tobytes() == np.asarray(latent_noise(config, keys((6,)), size))[0].tobytes()
  # 9 x 7 latents fill 5 x 4 patches of 2 x 2; the rest of the patches is zero.
  inside = pipelines.image_valid(config, size)
  assert not three[:, ~inside].any()
  assert three[:, inside].all()


def another(trained, *arguments):
  """The pipeline with other arguments of the command line."""
  settings = sample.parse(["--run", str(trained), *arguments])
  return loading.load_pipeline(settings, *loading.read_model(settings))


def test_sequential_guidance_equals_batched_guidance(pipeline, trained):
  made = [p.sample_latents(REQUESTS, 2, 3.0) for p in (pipeline, another(trained, "--guidance-in-turn"))]
  np.testing.assert_allclose(made[1], made[0], atol=1e-4 * np.abs(made[0]).max())


def test_other_samplers_and_guidance_from_the_command_line(pipeline, trained):
  base = pipeline.sample_latents(REQUESTS[:1], 4, 3.0)
  scale = np.abs(base).max()
  for arguments in (["--sampler", "adams-bashforth"], ["--guidance-interval", "0", "600"], ["--guidance-rescale", "0.7"]):
    made = another(trained, *arguments).sample_latents(REQUESTS[:1], 4, 3.0)
    assert 1e-4 < np.abs(made - base).max() / scale < 1.0, arguments
  with pytest.raises(ValueError, match=r"sampler is 'heun'; allowed: euler, adams-bashforth"):
    another(trained, "--sampler", "heun")


def test_step_caches_from_the_command_line(pipeline, trained):
  """A cache that is never used changes nothing, with both kinds of guidance. A cache in use changes the video a little."""
  base = pipeline.sample_latents(REQUESTS[:1], 8, 3.0)
  scale = np.abs(base).max()
  for arguments in (["residual:0"], ["residual:0", "--guidance-in-turn"], ["pyramid:1,1,1", "--guidance-in-turn"]):
    made = another(trained, "--step-cache", *arguments).sample_latents(REQUESTS[:1], 8, 3.0)
    np.testing.assert_allclose(made, base, atol=1e-4 * scale)
  made = another(trained, "--step-cache", "pyramid").sample_latents(REQUESTS[:1], 8, 3.0)
  assert 1e-4 < np.abs(made - base).max() / scale < 0.5
  with pytest.raises(ValueError, match="step cache 'teacache': allowed: pyramid"):
    another(trained, "--step-cache", "teacache")


def test_prompts_are_embedded_once(pipeline, trained):
  calls, encoder = [], pipeline._encode
  fresh = another(trained)
  fresh._encode = lambda *arguments: calls.append(1) or encoder(*arguments)
  first = fresh.sample_latents(REQUESTS, 1, 2.0)
  again = fresh.sample_latents([dataclasses.replace(r, seed=9, loop=1) for r in REQUESTS], 1, 2.0)
  assert len(calls) == 1
  assert (first != again).any()
  for number in range(pipelines.CACHED_PROMPTS + 1):
    fresh.cond([f"other {number}"])
  fresh.cond([r.prompt for r in REQUESTS])
  assert len(calls) == 1 + pipelines.CACHED_PROMPTS + 1 + 1
  fresh.set_weights(fresh.components.weights(*load_weights(trained, "params")[:2]))
  assert (fresh.sample_latents(REQUESTS, 1, 2.0) != first).any()
  assert len(calls) == 1 + pipelines.CACHED_PROMPTS + 1 + 2


class Recorder:
  """A jitted function that records the text of all programs that it lowers or runs."""

  def __init__(self, function):
    self.function, self.texts = function, []

  def lower(self, *args, **options):
    lowered = self.function.lower(*args, **options)
    self.texts.append(lowered.as_text())
    return lowered

  def __call__(self, *args, **options):
    self.lower(*args, **options)
    return self.function(*args, **options)


@pytest.mark.parametrize(("sampler", "cache", "conditioned"), [("euler", "pyramid", False), ("adams-bashforth", "", True)])
def test_needed_memory_is_measured_on_the_programs_that_run(trained, sampler, cache, conditioned, monkeypatch):
  seen, jitted, recorders = [], codec.jitted, {}
  monkeypatch.setattr(codec, "jitted", lambda f: recorders.setdefault(f, Recorder(jitted(f))))

  def check(pipeline):  # before any weight is read
    assert not any(isinstance(x, jax.Array) for x in jax.tree.leaves((pipeline.variables, pipeline.encoder_weights)))
    pipeline._step, pipeline._encode = Recorder(pipeline._step), Recorder(pipeline._encode)
    seen.append(
      pipeline.needed_memory(
        REQUESTS[0], 3, 2, 3.0, given=conditioned, encoded={3} if conditioned else set(), negative=conditioned
      )
    )

  settings = sample.parse(["--run", str(trained), "--sampler", sampler, "--step-cache", cache])
  made = loading.load_pipeline(settings, *loading.read_model(settings), check)
  given = [(np.array([0, 1, 1], np.float32), random_latents(0), np.array([True, False, False]))] * 3 if conditioned else None
  made.decode(made.sample_latents(REQUESTS, 2, 3.0, given=given, negative_prompt="blur" if conditioned else None), 3)
  if conditioned:
    made.encode(np.zeros((3, 72, 56, 3), np.uint8))
  assert {f.__name__ for f in recorders} == {"decode_frames", *(["encode_frames"] if conditioned else [])}
  for recorder in (made._step, made._encode, *recorders.values()):
    assert len(recorder.texts) >= 2
    assert len(set(recorder.texts)) == 1
  (needed,) = seen
  arrays = jax.tree.leaves((made.variables, made.encoder_weights, made.codec.variables))
  assert needed["weights"] == sum(x.nbytes for x in arrays)
  larger = made.needed_memory(dataclasses.replace(REQUESTS[0], num_frames=30), 3, steps=2)
  assert larger["denoise"] > 3 * needed["denoise"] > 0
  assert all(needed[method] > 8 * 72 * 56 * 3 for method in ("decode", *(["encode"] if conditioned else [])))


@pytest.mark.parametrize("arguments", [["--loops", "2"], ["--task", "animate", "ASSETS/0.png", "--loops", "2"], []])
def test_the_command_measures_the_programs_that_it_runs(assets, trained, tmp_path, monkeypatch, arguments):
  """`needed_memory` lowers the programs of continued clips and of the encoder."""
  jitted, recorders, checked = codec.jitted, {}, []
  monkeypatch.setattr(codec, "jitted", lambda f: recorders.setdefault(f.__name__, Recorder(jitted(f))))
  needed_memory = pipelines.Pipeline.needed_memory

  def record(self, *args, **options):
    self._step = recorders.setdefault("step", Recorder(self._step))
    needed = needed_memory(self, *args, **options)
    checked.extend({name: set(recorder.texts) for name, recorder in recorders.items()}.items())
    return needed

  monkeypatch.setattr(pipelines.Pipeline, "needed_memory", record)
  arguments = [argument.replace("ASSETS", str(assets)) for argument in arguments]
  sample.main(["--run", str(trained), *SIZE, "--prompt", "x", *arguments, "--output", str(tmp_path), "--format", "gif"])
  assert {name for name, _ in checked} == {"step", "decode_frames", *(["encode_frames"] if "--task" in arguments else [])}
  for name, texts in checked:
    assert texts <= set(recorders[name].texts)
    assert recorders[name].texts[-1] in texts


def test_a_failed_write_leaves_the_other_files(trained, tmp_path, monkeypatch):
  """The settings of the second of two videos can't be written."""
  write_text = media.paths.write_text

  def full(path, text):
    if "seed1" in str(path):
      raise OSError(28, "No space left on device")
    write_text(path, text)

  monkeypatch.setattr(media.paths, "write_text", full)
  with pytest.raises(SystemExit):
    sample.main([
      *["--run", str(trained), *SIZE, "--prompt", "x", "--num-samples", "2", "--batch-size", "2"],
      *["--output", str(tmp_path), "--format", "gif"],
    ])  # fmt: skip
  names = sorted(p.name for p in tmp_path.iterdir())
  assert names == ["0000-x-seed0.gif", "0000-x-seed0.json"]


def random_latents(seed, frames=3):
  return np.random.default_rng(seed).standard_normal((frames, 9, 7, 4), np.float32)


def test_given_frames_round_trip(pipeline):
  """Given frames stay the same bit for bit in any batch. Edited frames lie between the given and the generated ones."""
  free = pipeline.sample_latents(REQUESTS, 2, 2.0)
  known = random_latents(1)
  kept = np.array([True, False, True])
  given = [(np.where(kept, 0, 1).astype(np.float32), known, kept), None, (np.full(3, 0.5, np.float32), known, np.ones(3, bool))]
  made = pipeline.sample_latents(REQUESTS, 2, 2.0, given=given)
  np.testing.assert_array_equal(made[0][kept], known[kept])
  scale = np.abs(free).max()
  assert np.abs(made[0][1] - free[0][1]).max() > 1e-3 * scale  # it attends to the given frames
  np.testing.assert_allclose(made[1], free[1], atol=1e-4 * scale)
  for other in (known, free[2]):
    assert np.abs(made[2] - other).max() > 1e-3 * scale
  alone = pipeline.sample_latents(REQUESTS[:1], 2, 2.0, given=given[:1])
  np.testing.assert_allclose(alone[0], made[0], atol=1e-4 * scale)


def test_a_negative_prompt_replaces_the_null_caption(pipeline):
  request = REQUESTS[:1]
  made = {text: pipeline.sample_latents(request, 2, 2.0, negative_prompt=text) for text in (None, "blur", "clip 0")}
  assert np.abs(made["blur"] - made[None]).max() > 1e-5
  # With the prompt as its own negative prompt, guidance has no effect.
  unguided = pipeline.sample_latents(request, 2, 1.0)
  np.testing.assert_allclose(made["clip 0"], unguided, atol=1e-4 * np.abs(unguided).max())


def test_guidance_prompts_and_weights_matter(pipeline, trained):
  request = REQUESTS[:1]
  base = pipeline.sample_latents(request, 2, 2.0)
  for other in ((request, 2, 3.0), ([dataclasses.replace(request[0], prompt="another")], 2, 2.0), (request, 3, 2.0)):
    assert np.abs(pipeline.sample_latents(*other) - base).max() > 1e-5
  with pytest.raises(ValueError, match="same size, frames and fps"):
    pipeline.sample_latents([request[0], dataclasses.replace(request[0], height=64)])
  (frames,) = pipeline.decode(base, len(base[0]))
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
  """Frames of a gif. Its bytes depend on the frames alone, those of x264 do not."""
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


def test_existing_files_are_kept_unless_overwritten(trained, tmp_path, capsys):
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
  # Other settings with the same prompt: both files exist, each with its own settings.
  sample.main([*arguments, "--num-frames", "1"])
  with Image.open(output / "0000-a-rabbit-seed0-2.png") as image:
    assert image.size == (64, 48)
    assert json.loads(image.text["Comment"])["num_frames"] == 1
  np.testing.assert_array_equal(pictures(path), first)
  assert [json.loads((output / f"0000-a-rabbit-seed0{n}.json").read_text())["num_frames"] for n in ("", "-2")] == [3, 1]
  capsys.readouterr()
  sample.main([*arguments, "--num-frames", "1"])
  assert capsys.readouterr().out == "all 1 files exist and are kept (--overwrite makes them again)\n"


def test_another_file_with_the_same_name_changes_the_settings(assets, trained, tmp_path):
  image = tmp_path / "a.png"
  settings = sample.parse(["--run", str(trained), *SIZE, "--task", "animate", str(image)])
  config, _ = loading.read_model(settings)
  autoencoder, found = autoencoder_model(config.autoencoder).config, []
  for name in ("0.png", "0.png", "1.png"):
    shutil.copy(assets / name, image)
    works = work.make_work(settings, ["x"], config, autoencoder)
    found += [one.settings for one in work.with_settings(works, settings, config.sample, "a model", autoencoder)]
  assert found[0] == found[1] != found[2]


def test_output_may_be_one_file(trained, tmp_path, capsys):
  path = tmp_path / "new" / "rabbit.gif"
  arguments = ["--run", str(trained), *SIZE, "--output", str(path), "--prompt"]
  sample.main([*arguments, "a rabbit"])
  assert sorted(p.name for p in path.parent.iterdir()) == ["rabbit.gif", "rabbit.json"]
  assert pictures(path).shape == (3, 48, 64, 3)
  for more, words in (
    (["a bird"], "exists, and was made with other settings; --overwrite replaces it"),
    (["a rabbit", "--num-samples", "2"], "is one gif, but 2 files are to be made; give a folder, and --format"),
    (["a rabbit", "--output", str(tmp_path / "x.png")], "is one png, but a video is to be made"),
  ):
    with pytest.raises(SystemExit):
      sample.main([*arguments, *more])
    assert words in capsys.readouterr().err


def test_safetensors_make_the_video_of_their_run(assets, trained, tmp_path):
  ema, constants, _ = load_weights(trained)
  config = write_config(tmp_path / "config.py", assets, tmp_path / "unused")
  run = Run(tiny_config(assets, tmp_path / "shapes"))
  variables = {"params": ema["denoiser"], "constants": constants["denoiser"]}
  parts = run.parts[0].objective.components
  save_variables(tmp_path / "denoiser.safetensors", "open-sora", variables, config=parts.model.config)
  encoder = {"params": ema["text_encoder"]}
  save_variables(tmp_path / "t5.safetensors", "t5", encoder, config=parts.conditioner.encoder.config)
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
  (["--guidance-channels", "9"], "--guidance-channels is 9; allowed: 1 to 4"),
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


def test_too_little_memory_is_an_error_before_weights_are_read(trained, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(production, "free_memory", lambda: 100_000)
  monkeypatch.setattr("stdit_jax.training.checkpoints.load_weights", None)
  with pytest.raises(SystemExit) as stopped:
    sample.main(["--run", str(trained), *SIZE, "--prompt", "x", "--output", str(tmp_path)])
  assert stopped.value.code == 2
  error = capsys.readouterr().err.splitlines()[-1]
  assert error.startswith("error: memory of each device: 0.0")
  assert "but only 0.00 GiB are free: lower --batch-size" in error


def test_missing_prompts_runs_and_configurations_are_one_line(tmp_path, capsys):
  (tmp_path / "syntax.py").write_text("def get_config(:\n")
  (tmp_path / "none.py").write_text("x = 1\n")
  (tmp_path / "raises.py").write_text("import nothing_of_this_name\n")
  (tmp_path / "latin.txt").write_bytes("Gr\xfcn".encode("latin-1"))
  prompt = ["--prompt", "x"]
  for arguments, words in (
    (["--run", str(tmp_path)], "no prompt; give --prompt"),
    (["--prompt-file", str(tmp_path / "latin.txt")], "is not UTF-8 text"),
    (["--run", str(tmp_path), *prompt], "is no run folder: it has no config.json"),
    (["--config", str(tmp_path / "syntax.py"), *prompt], "syntax.py: SyntaxError"),
    (["--config", str(tmp_path / "none.py"), *prompt], "none.py: the file has no get_config()"),
    (["--config", str(tmp_path / "raises.py"), *prompt], "nothing_of_this_name"),
    (["--config", str(tmp_path / "missing.py"), *prompt], "missing.py: there is no such file"),
    (["--config", "configs/quickstart.py", *prompt], "--weights is empty"),
    (prompt, "give either --run FOLDER"),
  ):
    with pytest.raises(SystemExit) as stopped:
      sample.main(arguments)
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1), error
    assert error.startswith("error: ")
    assert words in error


# --------------------------------------------------------------------------------------------------------------------- tasks


def made_frames(trained, folder, *arguments):
  """Frames of the only video that the command makes, written as a folder of images."""
  what = ["--run", str(trained), *SIZE, "--format", "frames", "--output", str(folder), *map(str, arguments)]
  sample.main(what if {"--prompt", "--prompt-file"} & set(what) else [*what, "--prompt", "columns"])
  (found,) = (p for p in folder.iterdir() if p.is_dir())
  return np.stack([np.asarray(Image.open(path)) for path in sorted(found.iterdir())])


def through(pipeline, frames):
  """Encodes and decodes frames."""
  return pipeline.decode([pipeline.encode(frames)], len(frames))[0]


def test_animate_starts_with_its_image_and_continues(assets, trained, pipeline, tmp_path):
  image = assets / "0.png"
  made = made_frames(trained, tmp_path / "a", "--task", "animate", image, "--num-frames", 4, "--loops", 2)
  assert made.shape == (4 + 3, 48, 64, 3)  # the second clip is given the last frame
  np.testing.assert_array_equal(made[:1], through(pipeline, read_reference(image, (48, 64), 8)))
  free = made_frames(trained, tmp_path / "b", "--num-frames", 4)
  assert (made[1:4] != free[1:4]).any(axis=(1, 2, 3)).all()
  settings = json.loads(next((tmp_path / "a").glob("*.json")).read_text())
  assert settings["references"] == [str(image)]
  assert settings["rules"] == [[0, 0, 0, 0, 1, 0.0], [1, 1, -1, 0, 1, 0.0]]


def test_extended_and_connected_videos_contain_their_files(assets, trained, tmp_path):
  """The files have 24 frames per second; every third frame is read, for 8 frames per second."""
  video = assets / "0.mp4"
  known = read_reference(video, (48, 64), 8)
  assert len(known) == 16
  np.testing.assert_array_equal(known[5], read_frames(video, [15], size=(48, 64))[0])
  forward = made_frames(trained, tmp_path / "f", "--task", "extend-forward", video)
  np.testing.assert_array_equal(forward[:16], known)
  assert len(forward) == 16 + 2
  backward = made_frames(trained, tmp_path / "b", "--task", "extend-backward", video, "--condition-frames", 2)
  np.testing.assert_array_equal(backward[1:], known)
  # The autoencoder turns 166 x 221 pixels into 160 x 216. The frames of the file have this size as well.
  odd = ["--resolution", "144p", "--aspect-ratio", "3:4", "--num-frames", "3", "--fps", "8", "--steps", "1", "--prompt", "x"]
  arguments = ["--run", str(trained), *odd, "--format", "frames", "--output", str(tmp_path / "o")]
  sample.main([*arguments, "--task", "extend-forward", str(video), "--negative-prompt", "Blur!"])
  with Image.open(tmp_path / "o" / "0000-x-extend-forward-seed0" / "00017.png") as last:
    assert last.size == (216, 160)
  joined = made_frames(trained, tmp_path / "c", "--task", "connect", video, assets / "1.mp4")
  np.testing.assert_array_equal(joined[:16], known)
  np.testing.assert_array_equal(joined[17:], read_reference(assets / "1.mp4", (48, 64), 8))


def test_a_loop_has_its_length_and_an_edit_is_near_its_video(assets, trained, pipeline, tmp_path):
  made = made_frames(trained, tmp_path / "l", "--task", "loop", "--num-frames", 6)
  assert len(made) == 6 + 4
  video = assets / "0.mp4"
  known = through(pipeline, read_reference(video, (48, 64), 8)[:3]).astype(int)
  near, far = (
    np.abs(made_frames(trained, tmp_path / s, "--task", "edit", video, "--edit-strength", s, "--num-frames", 3) - known).mean()
    for s in ("0.01", "1")
  )
  assert near < 0.3 * far


def test_strategies_are_read_from_arguments_and_prompt_files(assets, trained, pipeline, tmp_path):
  """The original syntax: files and a strategy as arguments or in a prompt file, and another text for a later loop."""
  image, video = assets / "0.png", assets / "0.mp4"
  strategy = ["--mask-strategy", "0;0,1,-1,-1", "--reference", image, "--reference", video]
  first = made_frames(trained, tmp_path / "a", *strategy)
  for frame, path, number in ((first[0], image, 0), (first[2], video, 15)):
    np.testing.assert_array_equal(frame, through(pipeline, read_reference(path, (48, 64), 8)[[number]])[0])
  text = tmp_path / "prompts.jsonl"
  row = {"prompt": "columns", "reference_path": f"{image};{video}", "mask_strategy": "0;0,1,-1,-1"}
  text.write_text(json.dumps(row) + "\n\n")
  np.testing.assert_array_equal(made_frames(trained, tmp_path / "b", "--prompt-file", text), first)
  two = made_frames(trained, tmp_path / "d", "--prompt", "|0|columns|1|rows", "--loops", 2)
  same = made_frames(trained, tmp_path / "e", "--prompt", "|0|columns|1|columns", "--loops", 2)
  assert len(two) == 3 + 2
  np.testing.assert_array_equal(two[:3], same[:3])
  assert (two[3:] != same[3:]).any()


def test_stdit1_refuses_given_frames(assets, tmp_path, capsys):
  changes = {"model__name": "STDiT-tiny/2", "model__fields": {"model_max_length": 16}, "mask_ratios": {}}
  config = write_config(tmp_path / "config.py", assets, tmp_path / "unused", **changes, diffusion__name="iddpm")
  with pytest.raises(SystemExit):
    sample.main(["--config", str(config), "--weights", "w", "--prompt", "x", "--task", "animate", str(assets / "0.png")])
  assert "STDiT (Open-Sora 1.0) can't be given frames" in capsys.readouterr().err


def test_explain_writes_no_file(assets, trained, tmp_path, capsys):
  arguments = ["--run", str(trained), *SIZE, "--prompt", "x", "--output", str(tmp_path / "none"), "--explain"]
  sample.main([*arguments, "--task", "connect", str(assets / "0.mp4"), str(assets / "0.png"), "--num-frames", "5"])
  text = capsys.readouterr().out
  assert "frame       0  reference 0, frame 15: kept" in text
  assert "frames     1-3  generated from noise" in text
  assert "video: reference 0[0:] + loop 0[1:4] + reference 1[0:]" in text
  assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("arguments", "words"), [
  (["--task", "anmate", "x.png"], "--task 'anmate' is none of animate"),
  (["--task", "animate"], "takes 1 files after its name; 0 are given"),
  (["--task", "animate", "/no/file.png"], "/no/file.png can't be used: no such file"),
  (["--task", "edit", "ASSETS/table.csv"], "table.csv can't be used: not a video"),
  (["--task", "image", "--reference", "x.png"], "not both"),
  (["--mask-strategy", "0"], "there are 0 references"),
  (["--mask-strategy", "0;x"], "'x' is not LOOP"),
  (["--reference", "ASSETS/0.png"], "0.png is given without its place in the clip; give --mask-strategy, or --task"),
  (["--reference", "ASSETS/0.png", "--mask-strategy", "1,0"], ": loop 1 does not exist; give 0 to 0, or more --loops"),
  (["--task", "animate", "ASSETS/0.png", "--num-frames", "1"], "--num-frames is too small for --task animate"),
  (["--task", "endless", "--loops", "3", "--num-frames", "1"], "--num-frames is too small: 1 of the clip's 1 latent frames"),
  (["--guidance-scale", "nan"], "--guidance-scale is nan; give a number"),
  (["--fps", "0.0004"], "--fps is 0.0004; allowed: 0.1 to 240"),
  (["--autoencoder-memory", "-1"], "--autoencoder-memory is -1; allowed: above 0"),
  (["--format", "gif", "--fps", "60"], "a gif shows at most 50 frames per second"),
  (["--weights", "w.safetensors"], "--weights needs --config FILE; a --run has its own"),
  (["--config.sample.fps=3"], "--config.sample.fps=3 needs --config FILE"),
  (["--loops", "0"], "--loops is 0; allowed: at least 1"),
  (["--loops", "2", "--condition-frames", "3"], "--condition-frames is 3; allowed: 1 to 2"),
  (["--condition-edit", "2"], "--condition-edit is 2; allowed: 0 to 1"),
  (["--compat", "open-sora-1.1"], "is for iddpm; the model was trained with rectified-flow"),
  (["--prompt", 'x {"a": 1}'], "'a' is none of reference_path, mask_strategy"),
  (["--prompt", 'x {"reference_path": ["a.png"]}'], "'reference_path' must be text; join several files by ';'"),
])  # fmt: skip
def test_bad_tasks_are_one_line(assets, trained, tmp_path, capsys, arguments, words):
  fixed = ["--run", str(trained), *SIZE, "--prompt", "x", "--output", str(tmp_path / "out")]
  with pytest.raises(SystemExit) as stopped:
    sample.main([*fixed, *(argument.replace("ASSETS", str(assets)) for argument in arguments)])
  assert stopped.value.code == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ")
  assert words in error
  assert error.count("\n") == 1
  assert not (tmp_path / "out").exists()
