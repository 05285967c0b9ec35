"""Clips are encoded by one program per size, which a process compiles once in its life."""

import dataclasses
import json
import re
import threading

import jax
import numpy as np
import pytest

from configs import base
from stdit_jax.autoencoders import temporal
from stdit_jax.autoencoders.family import encoder_only
from stdit_jax.autoencoders.registry import find, make_codec
from stdit_jax.config import Config
from stdit_jax.interop import save_variables
from stdit_jax.training import clip_encoder, executables
from stdit_jax.training.compilation import AheadOfTime
from tests.data import files
from tests.helpers import relative_error
from tests.tiny_run import SIZES, start_processes, text_from_disk, write_config

LENGTHS = {9: 48, 5: 20, 2: 10, 1: 1}  # {frames of a bucket: frames of the rows that fit it alone}


def train_in_two_processes(assets, folder, name):
  """(names of compiled encode programs, log) of each process. The cache of compiled programs is `folder/cache`."""
  (folder / name).mkdir()
  autoencoder = {"autoencoder__name": "tiny-temporal", "autoencoder__weights": str(folder / "autoencoder.safetensors")}
  buckets = tuple(("64p", frames, 1.0, 8) for frames in LENGTHS)
  settings = {"data__buckets": buckets, "data__drop_last": False, **text_from_disk(assets)}
  settings |= {"data__tables": ((str(folder / "table.csv"), 1),)}
  config = write_config(
    folder / name / "config.py", assets, folder / name / "run", stages=({"name": "same", "steps": 8},), mesh={"data": 8},
    **autoencoder, **settings,
  )  # fmt: skip
  own = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "COMPILATIONS": str(folder / name / "compilations")}
  started = start_processes(config, folder / name, devices=4, module="tests.training.train_and_count", **own)
  codes = [process.wait(600) for process in started]
  logs = [(folder / name / f"{i}.log").read_text() for i in (0, 1)]
  assert codes == [0, 0], [log[-3000:] for log in logs]
  found = [json.loads((folder / name / f"compilations.{i}").read_text()) for i in (0, 1)]
  return [[name.partition(" #")[0] for name, cached in own if "encode" in name and not cached] for own in found], logs


def test_each_process_compiles_each_size_once_and_never_again(assets, tmp_path):
  """Twelve sizes of clips, in two processes with four devices each."""
  variables = temporal.init(temporal.build(temporal.TABLE["tiny-temporal"]), jax.random.key(0))
  save_variables(tmp_path / "autoencoder.safetensors", "open-sora-vae", variables, config=temporal.TABLE["tiny-temporal"])
  rows = [
    {"path": f"{assets}/{i}.{'png' if frames == 1 else 'mp4'}", "num_frames": frames, "height": height, "width": width}
    for i, (height, width) in enumerate(SIZES) for frames in LENGTHS.values()
  ]  # fmt: skip
  features = {"text": "columns", "fps": 24, "text_features": f"{assets}/text0.safetensors"}
  files.write_csv(tmp_path / "table.csv", [{**row, **features} for row in rows])
  first, logs = train_in_two_processes(assets, tmp_path, "first")
  assert all(len(programs) == len(set(programs)) for programs in first)  # a process may find a file of the other one
  assert len({*first[0], *first[1]}) == 12
  assert re.search(r"12 encode programs: \d from files, \d+ to compile", logs[0])
  assert logs[0].index("step 1/8") < logs[0].index("none is left")  # training waits only for the sizes of its step
  again, logs = train_in_two_processes(assets, tmp_path, "again")
  assert again == [[], []]
  assert "12 encode programs: 12 from files, 0 to compile" in logs[0]


def clip_encoder_of(name):
  """(`ClipEncoder`, whose programs have no files, its codec, its compiler)."""
  family = find(name)
  model = family.build(family.get_config(name))
  codec = make_codec(model, family.init(model, jax.random.key(0)), 2)
  compiler = AheadOfTime(1, lambda text: None)
  config = dataclasses.replace(Config.of(base.get_config()).autoencoder, cache_gb=0.0)
  own = dataclasses.replace(codec, variables=encoder_only(codec.variables))
  return clip_encoder.ClipEncoder(own, config, compiler, "tiny"), codec, compiler


@pytest.mark.parametrize("name", ["tiny-kl-f8", "tiny-temporal", "tiny-causal3d"])
def test_latents_are_those_of_the_codec(name, monkeypatch):
  """Clips of several sizes, with a shorter last chunk that is alone in another clip, and more images than one program takes."""
  monkeypatch.setattr(executables.Executables, "beside_jax", lambda: executables.Executables(None))
  encoder, codec, compiler = clip_encoder_of(name)
  rng = np.random.default_rng(0)
  shapes = [(1, 16, 24), (8, 16, 24), (25, 16, 24), (1, 16, 24), (1, 24, 16), (1, 16, 24), (25, 16, 24)]
  clips = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
  for clip, made in zip(clips, encoder(clips), strict=True):
    for ours, theirs in zip(made, codec.encode(clip), strict=True):
      assert relative_error(ours, theirs) < 1e-5
  programs = {"tiny-kl-f8": (1,), "tiny-temporal": (1, 17, 8), "tiny-causal3d": (1, 8, 25)}[name]
  assert compiler.counter.counts == dict.fromkeys([*(f"tiny: encode {t}x16x24" for t in programs), "tiny: encode 1x24x16"], 1)
  compiler.close()


def test_a_batch_waits_only_for_the_programs_of_its_own_sizes(monkeypatch):
  """The compiler is kept from the second size until the clips of the first one are encoded."""
  go_on = threading.Event()
  lower = clip_encoder.lower_program

  def wait_with_others(codec, size, *more):
    assert size[2] == 16 or go_on.wait(60)
    return lower(codec, size, *more)

  monkeypatch.setattr(clip_encoder, "lower_program", wait_with_others)
  monkeypatch.setattr(executables.Executables, "beside_jax", lambda: executables.Executables(None))
  encoder, _, compiler = clip_encoder_of("tiny-kl-f8")
  encoder.prepare([(1, 16, 16), (1, 16, 24)])
  (mean, _), *_ = encoder([np.zeros((1, 16, 16, 3), np.uint8)])
  assert mean.shape == (1, 2, 2, 4)
  assert compiler.counter.counts == {"tiny: encode 1x16x16": 1, "tiny: encode 1x16x24": 0}
  go_on.set()
  assert encoder([np.zeros((1, 16, 24, 3), np.uint8)])[0][0].shape == (1, 2, 3, 4)
  compiler.close()


def test_a_damaged_file_is_compiled_again(tmp_path, capsys):
  store = executables.Executables(str(tmp_path))
  shape = lambda device: jax.ShapeDtypeStruct((3,), np.float32, sharding=jax.sharding.SingleDeviceSharding(device))  # noqa: E731

  def lower(device, name):
    function = lambda x: 2 * x  # noqa: E731
    function.__name__ = name
    return jax.jit(function).lower(shape(device))

  double = executables.OwnProgram("double", "test", "double", lower, 0)
  assert store.load(double) is None
  x = jax.device_put(np.arange(3, dtype=np.float32), jax.local_devices()[0])
  for _ in range(2):
    np.testing.assert_array_equal(store.compile(double)(0, x), [0, 2, 4])
    (file,) = tmp_path.glob("*.bin")
    np.testing.assert_array_equal(store.load(double)(0, x), [0, 2, 4])
    file.write_bytes(file.read_bytes()[:-20])
    assert store.load(double) is None
    assert "so its program is compiled again" in capsys.readouterr().err
  assert store.load(dataclasses.replace(double, what="triple")) is None
