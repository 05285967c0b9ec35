"""Clips are encoded by one program per size, which a process compiles once in its life."""

import concurrent.futures
import dataclasses
import json
import re
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

from configs import base
from stdit_jax.autoencoders import temporal
from stdit_jax.autoencoders.family import encoder_only
from stdit_jax.autoencoders.registry import find, make_codec
from stdit_jax.config import Config
from stdit_jax.interop import save_variables
from stdit_jax.training import clip_encoder, executables
from stdit_jax.training.batches import NextBatch
from stdit_jax.training.compilation import AheadOfTime
from tests.data import files
from tests.helpers import relative_error
from tests.tiny_run import start_processes, text_from_disk, write_config

SMALL = {"channel_multipliers": (1, 1), "temporal_downsample": (True,)}  # a video autoencoder of two levels
SIZES = [(64, 64), (56, 72), (48, 80), (72, 56)]  # of the source rows: each has an aspect ratio of its own


def train_in_two_processes(assets, folder, name):
  """Returns the names of the encode programs that each process compiled, and the log of each process."""
  (folder / name).mkdir()
  weights = str(folder / "autoencoder.safetensors")
  autoencoder = {"autoencoder__name": "tiny-temporal", "autoencoder__fields": SMALL, "autoencoder__weights": weights}
  buckets = tuple(("64p", frames, 1.0, 8) for frames in (25, 1))
  settings = {"data__buckets": buckets, "data__drop_last": False, "checkpoint_every": 100, **text_from_disk(assets)}
  settings |= {"data__frame_interval": 1, "data__tables": ((str(folder / "table.csv"), 1),)}
  config = write_config(
    folder / name / "config.py", assets, folder / name / "run", stages=({"name": "same", "steps": 3},), mesh={"data": 8},
    **autoencoder, **settings,
  )  # fmt: skip
  own = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "COMPILATIONS": str(folder / name / "compilations")}
  started = start_processes(config, folder / name, devices=4, module="tests.training.train_and_count", **own)
  try:
    codes = [process.wait(600) for process in started]
  finally:
    for process in started:
      process.kill()
  logs = [(folder / name / f"{i}.log").read_text() for i in (0, 1)]
  assert codes == [0, 0], [log[-3000:] for log in logs]
  found = [json.loads((folder / name / f"compilations.{i}").read_text()) for i in (0, 1)]
  return [[name for name in own if "encode" in name] for own in found], logs


def test_each_process_compiles_each_size_once_and_never_again(assets, tmp_path):
  """Twelve sizes, in two processes with four devices each: chunks of 17 and 8 frames, and images. JAX's cache never holds
  these programs."""
  small = temporal.get_config("tiny-temporal", **SMALL)
  variables = temporal.init(temporal.build(small), jax.random.key(0))
  save_variables(tmp_path / "autoencoder.safetensors", "open-sora-vae", variables, config=small)
  rows = []
  for i, (height, width) in enumerate(SIZES):
    files.write_video(tmp_path / f"{i}.mp4", frames=48, height=height, width=width)
    Image.fromarray(files.picture(i, height, width)).save(tmp_path / f"{i}.png")
    size = {"height": height, "width": width}
    rows += [{"path": path, "num_frames": n, **size} for path, n in ((f"{i}.mp4", 48), (f"{i}.png", 1))]
  features = {"text": "columns", "fps": 24, "text_features": f"{assets}/text0.safetensors"}
  files.write_csv(tmp_path / "table.csv", [{**row, **features} for row in rows])
  first, logs = train_in_two_processes(assets, tmp_path, "first")
  assert all(len(programs) == len(set(programs)) for programs in first)  # a process may load the file of the other process
  assert len({*first[0], *first[1]}) == 12
  assert re.search(r"12 encode programs: \d from files, \d+ to compile", logs[0])
  assert logs[0].index("the first batch is ready") < logs[0].index("none is left")
  again, logs = train_in_two_processes(assets, tmp_path, "again")
  assert again == [[], []]
  assert "12 encode programs: 12 from files, 0 to compile" in logs[0]
  assert not [path.name for path in (tmp_path / "cache").iterdir() if "encode" in path.name]


def clip_encoder_of(name):
  """Returns a `ClipEncoder` that stores no programs, its codec, its compiler, and the arguments of all calls of `alive`."""
  family = find(name)
  model = family.build(family.get_config(name))
  codec = make_codec(model, family.init(model, jax.random.key(0)), 2)
  alive = []
  compiler = AheadOfTime(1, lambda text: None, lambda waits=0: alive.append(waits))
  config = dataclasses.replace(Config.of(base.get_config()).autoencoder, cache_gb=0.0)
  own = dataclasses.replace(codec, variables=encoder_only(codec.variables))
  return clip_encoder.ClipEncoder(own, config, compiler, "tiny"), codec, compiler, alive


@pytest.mark.parametrize("name", ["tiny-kl-f8", "tiny-temporal", "tiny-causal3d"])
def test_latents_are_those_of_the_codec(name, monkeypatch):
  """The clips have several sizes. The last chunk of one clip has the size of another clip. One call takes two images."""
  monkeypatch.setattr(executables.Executables, "beside_jax", lambda: executables.Executables(None))
  encoder, codec, compiler, _ = clip_encoder_of(name)
  calls, call = [], executables.Loaded.__call__
  monkeypatch.setattr(executables.Loaded, "__call__", lambda self, *args: calls.append(args[-1].shape) or call(self, *args))
  rng = np.random.default_rng(0)
  shapes = [(1, 16, 24), (8, 16, 24), (25, 16, 24), (1, 16, 24), (1, 24, 16), (1, 16, 24), (25, 16, 24)]
  clips = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
  for clip, made in zip(clips, encoder(clips), strict=True):
    for ours, theirs in zip(made, codec.encode(clip), strict=True):
      assert relative_error(ours, theirs) < 1e-5
  programs = {"tiny-kl-f8": (1,), "tiny-temporal": (1, 17, 8), "tiny-causal3d": (1, 8, 25)}[name]
  assert compiler.counter.counts == dict.fromkeys([*(f"tiny: encode {t}x16x24" for t in programs), "tiny: encode 1x24x16"], 1)
  images = 61 if name == "tiny-kl-f8" else 3  # this autoencoder encodes the frames of clips as images
  assert calls.count((2, 1, 16, 24, 3)) == -(-images // 2)
  compiler.close()


def test_a_batch_waits_only_for_the_programs_of_its_own_sizes(monkeypatch):
  """The compiler blocks on the second size until the clips of the first size are encoded."""
  go_on = threading.Event()
  lower = clip_encoder.lower_program

  def wait_with_others(codec, size, *more):
    assert size[2] == 16 or go_on.wait(60)
    return lower(codec, size, *more)

  monkeypatch.setattr(clip_encoder, "lower_program", wait_with_others)
  monkeypatch.setattr(executables.Executables, "beside_jax", lambda: executables.Executables(None))
  encoder, _, compiler, alive = clip_encoder_of("tiny-kl-f8")
  encoder.prepare([(1, 16, 16), (1, 16, 24)])
  (mean, _), *_ = encoder([np.zeros((1, 16, 16, 3), np.uint8)])
  assert sum(alive) == 0
  assert {*alive} <= {-1, 0, 1}
  assert alive.count(0) >= 2  # a program is ready, a batch begins
  assert mean.shape == (1, 2, 2, 4)
  assert compiler.counter.counts == {"tiny: encode 1x16x16": 1, "tiny: encode 1x16x24": 0}
  go_on.set()
  assert encoder([np.zeros((1, 16, 24, 3), np.uint8)])[0][0].shape == (1, 2, 3, 4)
  compiler.close()


def test_the_end_of_a_run_wakes_a_thread_that_waits_for_a_program(monkeypatch):
  """Else the thread would hold up the end of the process for ever. The compiler still works on another program."""
  blocked, go_on = threading.Event(), threading.Event()
  monkeypatch.setattr(clip_encoder, "lower_program", lambda *_: blocked.set() or go_on.wait(60))
  monkeypatch.setattr(executables.Executables, "beside_jax", lambda: executables.Executables(None))
  encoder, _, compiler, alive = clip_encoder_of("tiny-kl-f8")
  encoder.prepare([(1, 16, 16), (1, 16, 24)])
  clips = [np.zeros((1, 16, 24, 3), np.uint8)]
  with NextBatch(iter([0]), 1, lambda _: encoder(clips)) as batches:
    assert blocked.wait(60)
    while alive != [1]:
      time.sleep(0.01)
    began = time.monotonic()
    compiler.close()
    with pytest.raises(concurrent.futures.CancelledError):
      next(batches)
  assert time.monotonic() - began < 10
  assert alive == [1, -1]
  go_on.set()


def test_next_batch_makes_one_item_ahead_and_no_more():
  taken, made = iter(range(10)), []
  with NextBatch(taken, 3, lambda step: made.append(step) or -step) as batches:
    assert next(batches) == (0, 0)
    assert [next(batches), next(batches)] == [(1, -1), (2, -2)]
    with pytest.raises(StopIteration):
      next(batches)
  assert (next(taken), made) == (3, [0, 1, 2])


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
    (file,) = tmp_path.glob("*.npz")
    np.testing.assert_array_equal(store.load(double)(0, x), [0, 2, 4])
    file.write_bytes(file.read_bytes()[:-20])
    assert store.load(double) is None
    assert "so double is compiled again" in capsys.readouterr().err
  assert store.load(dataclasses.replace(double, what="triple")) is None
