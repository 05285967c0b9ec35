"""`evaluate --task autoencoder`: which rows it chooses, what it measures, what it prints."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

from data.buckets import Bucket
from stdit_jax import evaluate
from stdit_jax.autoencoders import i3d, image_kl, perceptual, reconstruction, registry
from stdit_jax.interop import model_metadata, save_variables
from tests.data import files


class Darker:
  """A stand-in for a codec. It decodes frames 10 levels darker. Raw latents are the red of every eighth pixel, plus `shift`."""

  config = dataclasses.replace(image_kl.get_config("tiny-kl-f8"), scaling_factor=0.5, shift=2.0)

  def encode(self, frames):
    self.frames = frames
    latents = np.float32(frames[:, ::8, ::8, :1]) / 255
    return (np.tile(latents, (1, 1, 1, 4)) * 0.5,) * 2

  def decode(self, latents, num_frames):
    assert len(latents) == num_frames == len(self.frames)
    return self.frames[:, : self.frames.shape[1] // 8 * 8] - 10


def clips(count, frames=5, size=(20, 24)):
  return np.random.default_rng(0).integers(60, 200, (count, frames, *size, 3)).astype(np.uint8)


def test_measures_of_a_darker_image_are_known():
  exam = reconstruction.Exam(Darker(), reconstruction.Judges())
  videos = clips(3)
  values, (original, decoded) = exam(videos)
  assert original.shape == decoded.shape == (5, 16, 24, 3)
  assert values["clips"] == 3
  assert values["PSNR dB"] == pytest.approx(20 * np.log10(25.5))
  assert values["flicker"] == 0
  assert values["latents per value"] == pytest.approx(3 * 3 * 4 / (20 * 24 * 3))
  assert values["encode frames/s"] > 0
  red = videos[:, :, ::8, ::8, 0] / 255
  np.testing.assert_allclose(exam.shift, [red.mean() + 2] * 4, rtol=1e-6)
  # Denoisers see (z - shift) * scaling_factor / scale.
  np.testing.assert_allclose(red.std() * exam.codec.config.scaling_factor / exam.scale, [1] * 4, rtol=1e-5)
  assert exam(clips(1, frames=1))[0]["flicker"] is None


def test_repeat_shows_the_nearest_frame():
  exam = reconstruction.Exam(Darker(), reconstruction.Judges(), repeat=4)
  videos = clips(1, frames=9)
  values, (_, decoded) = exam(videos)
  np.testing.assert_array_equal(decoded, videos[0, [0, 0, 4, 4, 4, 4, 8, 8, 8], :16] - 10)
  assert values["latents per value"] == pytest.approx(3 / 9 * 3 * 3 * 4 / (20 * 24 * 3))


def test_networks_measure_all_frames(monkeypatch):
  """Stand-ins: the trunk gets all frames of both videos, the video network gets whole parts of 16 frames."""
  monkeypatch.setattr(perceptual, "distance", lambda name, params, a, b: (a - b).max((1, 2, 3)) * 127.5 + params)
  monkeypatch.setattr(i3d, "features", lambda variables, x: np.float64(x[:, 0, 0, 0]) * variables)
  judges = reconstruction.Judges("stand-in", np.float32(1), 2.0)
  exam = reconstruction.Exam(Darker(), judges)
  values, _ = exam(clips(8, frames=33, size=(16, 16)))
  assert values["perceptual"] == pytest.approx(11)
  assert values["FVD"] == pytest.approx(3 * 20**2)  # 16 parts of 16 frames; each of the three means differs by 2 x 10
  assert exam(clips(7, frames=33, size=(16, 16)))[0]["FVD"] is None


def test_chosen_rows_fit_and_spread_over_the_table(tmp_path):
  size = {"height": 144, "width": 256, "text": ""}
  rows = [{"path": f"{i}.mp4", "num_frames": 9 if i % 2 else 8, **size} for i in range(20)]
  rows += [{"path": "small.mp4", "num_frames": 9, "height": 100, "width": 256, "text": ""}]
  rows += [{"path": "tall.mp4", "num_frames": 9, "height": 256, "width": 144, "text": ""}]
  table, (bucket,) = reconstruction.open_rows([files.write_csv(tmp_path / "t.csv", rows)], [("144p", "3")], str(tmp_path))
  assert bucket == Bucket("144p", 3, 1.0, 1)
  chosen = reconstruction.choose(table, bucket, 3, interval=4)
  assert [(row.path.rpartition("/")[2], size) for row, size in chosen] == [
    ("1.mp4", (144, 256)), ("11.mp4", (144, 256)), ("tall.mp4", (256, 144)),
  ]  # fmt: skip
  assert len(reconstruction.choose(table, bucket, 100, interval=4)) == 11
  assert not reconstruction.choose(table, bucket, 100, interval=5)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """A tiny autoencoder in a file with a description of the model, and in a file without one."""
  folder, config = tmp_path_factory.mktemp("weights"), image_kl.get_config("tiny-kl-f8")
  variables = jax.jit(lambda key: image_kl.init(image_kl.ImageKL(config), key))(jax.random.key(1))
  for name, metadata in (("tiny", model_metadata("tiny-kl-f8", config)), ("plain", None)):
    save_variables(folder / f"{name}.safetensors", "diffusers", variables, config=config, metadata=metadata)
  return folder


def run(*arguments):
  evaluate.main(["--task", "autoencoder", *map(str, arguments)])


@pytest.fixture(scope="module")
def media(tmp_path_factory):
  """A folder with an image and a video."""
  folder = tmp_path_factory.mktemp("media")
  Image.fromarray(files.picture(5, 64, 64)).save(folder / "a.png")
  files.write_video(folder / "b.mp4", frames=5, height=64, width=64)
  return folder


def test_the_command_prints_and_writes_its_measures(weights, media, tmp_path, capsys):
  output, picture = tmp_path / "out" / "found.json", tmp_path / "out" / "seen.png"
  run(
    "--autoencoder", weights / "tiny.safetensors", "--tables", media, "--buckets", "64p:3", "64p:1", "--output", output,
    "--picture", picture,
  )  # fmt: skip
  printed = capsys.readouterr().out.splitlines()
  said = r"memory of each device beside the weights: \S+ GiB \(the largest of 64p x 1 \S+, 64p x 3 \S+\) of \S+ GiB free"
  assert re.fullmatch(said, printed[0])
  assert printed[1] == f"{weights}/tiny.safetensors:"
  assert printed[2].split()[:4] == ["clips", "PSNR", "dB", "SSIM"]
  assert [line[:9].strip() for line in printed[3:5]] == ["64p x 1", "64p x 3"]
  assert [line.split()[-1] == "-" for line in printed[3:5]] == [False, False]
  found = json.loads(output.read_text())
  assert list(found["buckets"]) == ["64p x 1", "64p x 3"]
  assert "tiles" not in found
  assert [found["buckets"][f"64p x {frames}"]["clips"] for frames in (1, 3)] == [2, 1]
  assert len(found["shift"]) == len(found["scale"]) == 4
  pixels = np.asarray(Image.open(picture))
  head = reconstruction.HEAD
  assert pixels.shape[0] == head + 64 + head + 3 * 64  # one frame, and three
  original, decoded, error = (pixels[head : head + 64, i * 64 : (i + 1) * 64].astype(int) for i in range(3))
  np.testing.assert_array_equal(original, files.picture(5, 64, 64))
  assert np.abs(original - decoded).max() > 10
  np.testing.assert_array_equal(error, np.minimum(np.abs(original - decoded) * reconstruction.ERROR_FACTOR, 255))


def test_only_frames_that_need_too_much_memory_are_measured_in_tiles(weights, tmp_path, capsys):
  Image.fromarray(files.picture(5, 192, 192)).save(tmp_path / "a.png")
  found = {}
  # With one frame at a time, 64p needs 0.4 MB, 144p 3.6 MB (compiled for a CPU).
  for name, limit in (("whole", ()), ("tiles", ("--autoencoder-memory", 0.001))):
    output = tmp_path / f"{name}.json"
    arguments = "--autoencoder", weights / "tiny.safetensors", "--tables", tmp_path, "--buckets", "64p:1", "144p:1"
    run(*arguments, "--output", output, *limit)
    found[name], printed = json.loads(output.read_text()), capsys.readouterr().out
    assert ("144p x 1 in tiles of" in printed) == (name == "tiles")
    assert "64p x 1 in tiles" not in printed
  assert "tiles" not in found["whole"]
  ((bucket, tiles),) = found["tiles"]["tiles"].items()
  assert bucket == "144p x 1"
  assert f"144p x 1 in tiles of {tiles['height'] * 8} x {tiles['width'] * 8} pixels, to need less memory" in printed
  errors = [{name: values["PSNR dB"] for name, values in found[which]["buckets"].items()} for which in ("whole", "tiles")]
  assert errors[0]["64p x 1"] == errors[1]["64p x 1"]
  assert errors[0]["144p x 1"] != errors[1]["144p x 1"]
  assert errors[0]["144p x 1"] == pytest.approx(errors[1]["144p x 1"], rel=0.1)


def test_too_little_memory_is_an_error_before_anything_is_measured(weights, media, capsys, monkeypatch):
  monkeypatch.setattr(evaluate, "free_memory", lambda: 100_000)
  monkeypatch.setattr(reconstruction.Exam, "__call__", None)
  with pytest.raises(SystemExit) as stopped:
    run("--autoencoder", weights / "tiny.safetensors", "--tables", media, "--buckets", "64p:1")
  assert stopped.value.code == 2
  error = capsys.readouterr().err.splitlines()[-1]
  assert error.startswith("error: memory of each device beside the weights: 0.00 GiB (the largest of 64p x 1 0.00), but only")
  assert error.endswith("0.00 GiB are free: give --buckets with fewer pixels or frames")


def test_unreadable_files_are_skipped(weights, media, tmp_path, capsys):
  """A folder skips them when it lists its files, and a table when it reads a row."""
  for path in media.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  (tmp_path / "broken.png").write_bytes(b"no picture")
  rows = [f"{path},,1,64,64" for path in (tmp_path / "broken.png", next(p for p in media.iterdir() if p.suffix == ".png"))]
  (tmp_path / "table.csv").write_text("\n".join(["path,text,num_frames,height,width", *rows]) + "\n")
  for tables in (tmp_path, tmp_path / "table.csv"):
    run("--autoencoder", weights / "tiny.safetensors", "--tables", tables, "--buckets", "64p:1")
    out, err = capsys.readouterr()
    assert "64p x 1" in out
    assert "broken.png: " in err
    assert "skipped" in err


def test_model_from_a_name_or_a_configuration(weights, media, tmp_path, capsys):
  config = tmp_path / "config.py"
  config.write_text(f"""
from configs import base
def get_config():
  config = base.get_config()
  config.autoencoder.update(name="tiny-kl-f8", weights="{weights}/plain.safetensors")
  config.data.tables = (("{media}", 2),)
  config.data.frame_interval = 2
  config.data.buckets = (("64p", 1, 1.0, 2), ("64p", 3, 0.5, 2))
  return config
""")
  run("--config", config, "--count", 1)
  by_config = capsys.readouterr().out.splitlines()
  assert by_config[1].endswith(", one of 2 frames:")
  assert [line[:9].strip() for line in by_config[3:5]] == ["64p x 1", "64p x 3"]
  where = "--tables", media, "--buckets", "64p:1", "64p:3", "--count", 1, "--frame-interval", 2
  run("--autoencoder", weights / "plain.safetensors", "--model", "tiny-kl-f8", *where)
  by_name = capsys.readouterr().out.splitlines()
  assert [line.split()[4:6] for line in by_name[3:5]] == [line.split()[4:6] for line in by_config[3:5]]


def test_wrong_arguments_are_refused(weights, tmp_path, capsys):
  tiny, tables = ("--autoencoder", weights / "tiny.safetensors"), ("--tables", "shapes://held_out/9/2")
  (tmp_path / "empty").mkdir()
  for arguments, reason in (
    ((), "give --run FOLDER, --config FILE or --autoencoder FILE"),
    (("--autoencoder", weights / "plain.safetensors", *tables), "doesn't say which autoencoder it is; give --model NAME"),
    (("--autoencoder", weights / "plain.safetensors", "--model", "vae"), "unknown autoencoder 'vae'; allowed: sd-kl-f8"),
    ((*tiny, *tables, "--picture", "a.jpg"), "--picture is a.jpg; allowed: names that end in .png"),
    ((*tiny, "--buckets", "64p:1"), "give the tables and buckets to measure on: --tables TABLE"),
    ((*tiny, *tables, "--buckets", "64p"), "--buckets 64p: write RESOLUTION:FRAMES, like 144p:17"),
    ((*tiny, *tables, "--buckets", "65p:1"), "unknown resolution '65p'"),
    ((*tiny, *tables, "--buckets", "64p:14"), "no row of --tables is large and long enough for 64p x 14"),
    ((*tiny, "--tables", tmp_path / "empty", "--buckets", "64p:1"), "empty is no table (.parquet, .csv, .jsonl), no image"),
    ((*tiny, *tables, "--buckets", "64p:1", "--repeat", 0), "--repeat is 0; allowed: at least 1"),
    ((*tiny, *tables, "--buckets", "64p:1", "--autoencoder-memory", -1), "--autoencoder-memory is -1; allowed: above 0"),
    ((*tiny, *tables, "--mesh", "data=2"), "--mesh has no effect on --task autoencoder"),
    ((*tiny, *tables, "--config.autoencoder.dtype=bfloat16"), "changes need --config FILE"),
    ((*tiny, *tables, "--output", weights / "tiny.safetensors" / "a.json"), "can't be used"),
    ((*tiny, *tables, "--buckets", "64p:1", "--perceptual", "vgg", "x"), "unknown trunk 'vgg'; allowed: vgg16-lpips"),
  ):
    with pytest.raises(SystemExit):
      run(*arguments)
    assert reason in capsys.readouterr().err


def test_changed_lengths_are_refused():
  model = registry.find("cogvideox-2b").build(registry.find("cogvideox-2b").get_config("cogvideox-2b"))
  exam = reconstruction.Exam(registry.make_codec(model, {}), reconstruction.Judges())
  exam.check(Bucket("144p", 17, 1.0, 1))
  with pytest.raises(ValueError, match="144p x 12 has clips of 12 frames, but the autoencoder changes this length; give 9 or"):
    exam.check(Bucket("144p", 12, 1.0, 1))
