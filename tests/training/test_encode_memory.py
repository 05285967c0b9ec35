"""`encode` estimates its memory before it encodes: it takes fewer frames at a time, or stops."""

import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data.shards import Share
from stdit_jax import encode
from stdit_jax.training import encoding
from tests.tiny_run import frozen_text, write_config


@pytest.fixture(scope="module")
def config(assets, tmp_path_factory):
  folder = tmp_path_factory.mktemp("memory")
  own = {"data__buckets": (("64p", 1, 1.0, 2), ("64p", 4, 1.0, 2)), **frozen_text(assets, "ahead")}
  return write_config(folder / "config.py", assets, folder / "run", **own)


def run(config, output, *more):
  settings = encode.parse(["--config", str(config), "--output", str(output), "--epochs", "1", *more])
  encode.check(settings)
  encode.run(settings, encode.choose(settings), Share(0, 1))


def latents_of(folder):
  """{(path, frames): mean}"""
  (part,) = pathlib.Path(folder).glob("latents-*/part-0")
  records = tfds.builder_from_directory(str(part)).as_data_source("train")
  return part.parent.name, {(r["path"], len(r["mean"])): r["mean"] for r in records}


def test_fewer_frames_at_a_time_need_less_memory(config, tmp_path, capsys):
  """Four frames of 64 x 64 pixels need 1.6 MB, two need 0.8 MB (compiled for a CPU). The provenance is the same."""
  made = []
  for name, limit in (("all", ()), ("fewer", ("--autoencoder-memory", "0.001"))):
    run(config, tmp_path / name, "--no-text", *limit)
    made.append(latents_of(tmp_path / name))
    out = capsys.readouterr().out
    assert "memory of each device for clips of 4 x 64 x 64 pixels: 0.00 GiB (weights 0.00)" in out
    assert ("with 2 instead of 4 frames at a time" in out) == (name == "fewer")
  (one, values), (other, fewer) = made
  assert one == other  # the folder's name depends on the provenance
  assert values.keys() == fewer.keys()
  for key, mean in values.items():
    np.testing.assert_allclose(fewer[key], mean, atol=1e-5)


def test_too_little_memory_is_an_error_before_anything_is_encoded(config, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(encoding, "load_encoder", None)
  monkeypatch.setattr(encoding, "load_text_encoder", None)
  arguments = ["--config", str(config), "--epochs", "1"]
  with pytest.raises(SystemExit) as stopped:
    encode.main([*arguments, "--output", str(tmp_path / "a"), "--autoencoder-memory", "0.0001"])
  assert stopped.value.code == 2
  assert capsys.readouterr().err == (
    "error: memory of each device for clips of 4 x 64 x 64 pixels: 0.00 GiB (weights 0.00); allowed beside the weights are "
    "0.00 GiB. Remove these buckets, set autoencoder.dtype='bfloat16', or take a device with more memory\n"
  )
  # The text encoder's weights alone need 0.4 MB.
  monkeypatch.setattr(encoding, "free_memory", lambda: 300_000)
  with pytest.raises(SystemExit):
    encode.main([*arguments, "--output", str(tmp_path / "b"), "--autoencoder-memory", "1"])
  assert capsys.readouterr().err.startswith("error: memory of each device for captions: 0.00 GiB (weights 0.00); allowed")
  assert not list(tmp_path.rglob("*array_record*"))
