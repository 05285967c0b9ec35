"""Configurations as typed values: the same keys as the defaults, changes by key, files of earlier versions, shipped files."""

import dataclasses
import functools
import json
import pathlib
import typing

import numpy as np
import pytest

from configs import base, open_sora_1_1, open_sora_1_2, open_sora_1_2_vae
from data import loader, sources, video
from data.config import DataConfig
from stdit_jax import config as typed
from stdit_jax.cli import read_config
from stdit_jax.config import Config
from stdit_jax.parallel.mesh import AXES
from stdit_jax.training.checkpoints import from_plain, plain
from stdit_jax.training.stages import make_stages
from tests.data import files

FILES = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
DEFAULTS = json.loads(json.dumps(base.get_config().to_dict()))


def groups(kind):
  """The dataclass and those of its fields."""
  yield kind
  for hint in typing.get_type_hints(kind).values():
    if dataclasses.is_dataclass(hint) and hint is not DataConfig:
      yield from groups(hint)


def test_fields_are_the_keys_of_the_defaults_and_have_no_defaults():
  def keys(kind, values):
    hints = typing.get_type_hints(kind)
    assert values.keys() == hints.keys() - set(typed._NO_KEYS)
    for key in values:
      if dataclasses.is_dataclass(hints[key]):
        keys(hints[key], values[key])

  keys(Config, DEFAULTS)
  assert tuple(DEFAULTS["mesh"]) == tuple(DEFAULTS["slices"]) == typed._AXES == AXES
  fields = [field for kind in groups(Config) for field in dataclasses.fields(kind)]
  assert all(field.default is field.default_factory is dataclasses.MISSING for field in fields)


def test_a_change_keeps_all_other_values():
  config = Config.of(base.get_config())
  changed = config.replace(
    {"optimizer.eps": 1, "diffusion.fields.loc": 1.0, "data.tables": [["a.csv", 2]], "mesh": {"fsdp": 2}}
  )
  assert (changed.optimizer.eps, changed.data.tables, changed.mesh) == (1, (("a.csv", 2),), {"fsdp": 2})
  assert changed.diffusion.fields == config.diffusion.fields | {"loc": 1.0}
  assert changed.replace(
    {"optimizer.eps": 1e-15, "diffusion.fields": DEFAULTS["diffusion"]["fields"], "data.tables": (), "mesh": config.mesh}
  ) == config  # fmt: skip


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"seed.x": 1}, "seed is {'x': 1}; it must be a whole number"),
    ({"optimizer.schedul.c": 1}, "unknown key 'optimizer.schedul'; did you mean optimizer.schedule?"),
    ({"data.num_classes": 10}, "unknown key 'data.num_classes'"),
    ({"data.read_ahead": "x"}, "data.read_ahead is 'x'; it must be a whole number or None"),
    ({"optimizer.scales": (("(", 2.0),)}, "allowed: (regular expression, factor above 0) pairs"),
    ({"optimizer.scales": (("denoiser", 0.0),)}, "optimizer.scales is (('denoiser', 0.0),); allowed:"),
    ({"mesh.fsdp": 1.5}, "allowed: whole numbers for the axes data, fsdp, sequence, tensor"),
  ],
)
def test_a_wrong_change_names_key_and_value(changes, words):
  with pytest.raises(ValueError, match=r"^config: ") as error:
    Config.of(base.get_config()).replace(changes)
  assert words in str(error.value)


def test_saved_configurations_of_earlier_versions_are_read():
  old = json.loads(json.dumps(DEFAULTS))
  old["model"] = {"name": "STDiT3-XL/2", "fields": {"depth": 2}}
  old["autoencoder"] |= {"temporal": ""}
  old["mesh"] = {"fsdp": 8}
  for key in ("slices", "watchdog", "compile_threads"):
    del old[key]
  del old["data"]["windows_per_row"]
  read = plain(from_plain(old))
  assert read["model"] == old["model"]  # the file alone decides which fields are set
  assert read["mesh"] == {"data": -1, "fsdp": 8, "sequence": 1, "tensor": 1}
  assert {**read, "model": DEFAULTS["model"], "mesh": DEFAULTS["mesh"]} == DEFAULTS


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_has_valid_stages_that_round_trip(path):
  for stage in make_stages(read_config(str(path))):
    saved = plain(stage.config)
    assert from_plain(saved) == dataclasses.replace(stage.config, data=dataclasses.replace(stage.config.data, stage=None))
    assert stage.config.data.stage == stage.name  # not saved, since the name decides it
    assert saved.keys() == DEFAULTS.keys()
    assert saved["stages"] == []


# Values of every stage, with the file of Open-Sora that has them (tags v1.1.0 and v1.2.0).
ORIGINALS = {
  open_sora_1_1: {
    "seed": 1024,  # scripts/train.py, set_seed
    "data.seed": 42,  # configs/opensora-v1-1/train
    "data.frame_interval": 3,  # configs/opensora-v1-1/train
    "data.fps_rule": "1.1",  # opensora/datasets/datasets.py: the file's own rate
    "data.resize": "original",  # configs/opensora-v1-1/train, transform_name="resize_crop"
    "autoencoder.name": "sd-kl-f8",  # configs/opensora-v1-1/train, stabilityai/sd-vae-ft-ema
    "autoencoder.dtype": "bfloat16",  # scripts/train.py, vae.to(device, dtype)
    "autoencoder.sample_posterior": True,  # opensora/models/vae/vae.py
    "text_encoder.max_length": 200,  # configs/opensora-v1-1/train
    "text_encoder.clean_captions": False,  # opensora/models/text_encoder/t5.py cleans nothing in training
    "model.fields.dtype": "bfloat16",  # configs/opensora-v1-1/train
    "caption_dropout": 0.1,  # opensora/models/stdit/stdit2.py, class_dropout_prob
    "optimizer.learning_rate": 2e-5,  # configs/opensora-v1-1/train
    "optimizer.eps": 1e-8,  # scripts/train.py, default of HybridAdam
    "optimizer.warmup_steps": 0,  # scripts/train.py, lr_scheduler=None
    "optimizer.clip_norm": 1.0,  # configs/opensora-v1-1/train
    "optimizer.weight_decay": 0.0,  # scripts/train.py
    "ema_decay": 0.9999,  # opensora/utils/train_utils.py, update_ema
    "diffusion.name": "iddpm",  # configs/opensora-v1-1/train
  },
  open_sora_1_2: {
    "seed": 42,  # configs/opensora-v1-2/train
    "data.seed": 42,  # configs/opensora-v1-2/train
    "data.frame_interval": 1,  # opensora/datasets/datasets.py, default
    "data.fps_rule": "1.2",  # opensora/datasets/datasets.py: fps // frame_interval
    "data.resize": "original",  # configs/opensora-v1-2/train, transform_name="resize_crop"
    "autoencoder.dtype": "bfloat16",  # scripts/train.py, .to(device, dtype)
    "autoencoder.sample_posterior": True,  # opensora/models/vae/vae_temporal.py
    "text_encoder.max_length": 300,  # configs/opensora-v1-2/train
    "text_encoder.clean_captions": False,  # opensora/models/text_encoder/t5.py cleans nothing in training
    "text_encoder.fields": {"dtype": "bfloat16", "param_dtype": "bfloat16"},  # scripts/train.py, dtype=dtype
    "model.fields.dtype": "bfloat16",  # configs/opensora-v1-2/train
    "caption_dropout": 0.1,  # opensora/models/stdit/stdit3.py, class_dropout_prob
    "optimizer.learning_rate": 1e-4,  # configs/opensora-v1-2/train
    "optimizer.clip_norm": 1.0,  # configs/opensora-v1-2/train
    "optimizer.weight_decay": 0.0,  # scripts/train.py
    "ema_decay": 0.99,  # configs/opensora-v1-2/train
  },
  open_sora_1_2_vae: {
    "seed": 42,  # configs/vae/train
    "data.frame_interval": 1,  # configs/vae/train
    "data.resize": "original",  # opensora/datasets/video_transforms.py: bilinear without antialiasing
    "autoencoder.name": "open-sora-1.2",  # configs/vae/train
    "autoencoder.dtype": "bfloat16",  # configs/vae/train
    "autoencoder.crop": 256,  # configs/vae/train, image_size
    "optimizer.learning_rate": 1e-5,  # configs/vae/train
    "optimizer.eps": 1e-8,  # scripts/train_vae.py, default of HybridAdam
    "optimizer.warmup_steps": 0,  # scripts/train_vae.py, lr_scheduler=None
    "optimizer.weight_decay": 0.0,  # scripts/train_vae.py
    "ema_decay": 0.0,  # configs/vae/train
  },
}


@pytest.mark.parametrize("recipe", ORIGINALS, ids=lambda module: module.__name__)
def test_recipes_of_open_sora_have_the_values_of_the_original(recipe):
  for stage in make_stages(recipe.get_config()):
    values = plain(stage.config)
    found = {key: functools.reduce(lambda group, name: group[name], key.split("."), values) for key in ORIGINALS[recipe]}
    assert found == ORIGINALS[recipe], stage.name


@pytest.mark.parametrize("recipe", ORIGINALS, ids=lambda module: module.__name__)
def test_stages_begin_with_a_fresh_optimizer_and_average_as_the_runs_of_the_original(recipe):
  """Each stage of the original is a run of its own (scripts/train.py, update_ema with decay=0).

  The original's report 02 names the only exception: stage 3 of Open-Sora 1.1 continues stage 2.
  """
  kept = [stage.name for stage in make_stages(recipe.get_config())[1:] if stage.keep_optimizer]
  assert kept == (["stage3"] if recipe is open_sora_1_1 else [])


@pytest.mark.parametrize(("recipe", "fps"), [(open_sora_1_1, 23.976), (open_sora_1_2, 23.0)])
def test_recipes_read_clips_as_the_original(recipe, fps, tmp_path):
  """The frame rate that the model is told for a file of 23.976 frames per second, and the way of resizing."""
  path = files.write_video(tmp_path / "clip.mp4", frames=60, height=288, width=512)
  row = {"path": path, "text": "x", "num_frames": 60, "height": 288, "width": 512, "fps": 23.976}
  table = files.write_csv(tmp_path / "table.csv", [row])
  data = make_stages(recipe.get_config())[-1].config.data
  data = dataclasses.replace(data, tables=(table,), buckets=(("144p", 16, 1.0, 1),), reference_devices=1)
  decode = loader.RowDecoder(data, sources.open_table(data, str(tmp_path)), None)
  sample = decode((0, 0, 0, "0.56", data.parsed_buckets()[0]))
  assert sample["fps"] == np.float32(fps)  # the loader stores rates in float32
  first = files.number_of(sample["pixels"][0])
  original = video.read_frames(path, [first], size=(144, 256), resize="original")
  assert not np.array_equal(original, video.read_frames(path, [first], size=(144, 256)))
  np.testing.assert_array_equal(sample["pixels"][:1], original)
