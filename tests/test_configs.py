"""Configurations as typed values: the same keys as the defaults, changes by key, files of earlier versions, shipped files."""

import dataclasses
import json
import pathlib
import typing

import pytest

from configs import base
from data.config import DataConfig
from stdit_jax import config as typed
from stdit_jax.cli import read_config
from stdit_jax.config import Config
from stdit_jax.parallel.mesh import AXES
from stdit_jax.training.checkpoints import from_plain, plain
from stdit_jax.training.stages import make_stages

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
