"""The loader yields the same sequence on any number of processes and workers, from any step. Bad rows have weight 0."""

import dataclasses
import logging
import pathlib
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet
import pytest
import safetensors.numpy
from PIL import Image

from data import loader, plan, sources, video
from data.config import DataConfig
from data.paths import PASSING
from tests.data import files

BUCKETS = (("144p", 17, (1.0, 0.5), 2), ("144p", 9, 1.0, 4), ("144p", 1, 1.0, 2))


def condition(caption, label):
  """16 bytes of the caption, and the label if there is one."""
  ids = np.zeros(16, np.int32)
  data = caption.encode()[:16]
  ids[: len(data)] = list(data)
  return {"text_ids": ids, "text_mask": ids > 0, "label": np.int32(-1 if label is None else label)}


def test_skipped_rows_are_logged_although_the_root_logger_is_silent(monkeypatch):
  """`train` silences the root logger because of orbax."""
  monkeypatch.setattr(logging.getLogger(), "level", logging.ERROR)
  assert loader.log.isEnabledFor(logging.WARNING)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Ten clips, three images, and a table of them."""
  folder = tmp_path_factory.mktemp("loader")
  rows = []
  for i in range(10):
    h, w = [(144, 256), (256, 144), (192, 192)][i % 3]
    files.write_video(folder / f"{i}.mp4", frames=24 + i, height=h, width=w)
    rows.append({"path": f"{i}.mp4", "text": f"clip {i}", "text_2": f"film {i}", "num_frames": 24 + i, "height": h, "width": w})
  for i in range(3):
    Image.fromarray(files.picture(i, 200, 300)).save(folder / f"{i}.png")
    rows.append({"path": f"{i}.png", "text": f"image {i}", "num_frames": 1, "height": 200, "width": 300})
  rows[4] |= {"start": 4, "end": 24, "crop": "0,0,256,144", "path": "3.mp4", "height": 144, "width": 256}
  files.write_csv(folder / "t.csv", rows)
  files.write_csv(
    folder / "bad.csv", [*rows, {**rows[0], "path": "missing.mp4"}, {**rows[0], "num_frames": 90, "text": "too long"}]
  )
  return folder


def config_of(folder, table="t.csv", **settings):
  return DataConfig.create({"tables": (str(folder / table),), "buckets": BUCKETS, "workers": 0, **settings})


def load(folder, steps, config=None, **how):
  with loader.make_loader(config or config_of(folder), str(folder / "cache"), **how) as steps_of:
    return [step for step, _ in zip(steps_of, range(steps))]


def assert_same(a, b):
  assert (a.bucket, a.step, a.epoch, a.batch_size) == (b.bucket, b.step, b.epoch, b.batch_size)
  assert len(a.samples) == len(b.samples)
  for x, y in zip(a.samples, b.samples):
    for name, value in vars(x).items():
      np.testing.assert_equal(value, getattr(y, name), err_msg=name)


@pytest.fixture(scope="module")
def sequence(folder):
  """16 steps, more than three epochs."""
  return load(folder, 16, condition=condition)


def test_samples_are_what_the_table_says(folder, sequence):
  table = sources.open_table(config_of(folder), str(folder / "cache"))
  assert [s.step for s in sequence] == list(range(16))
  assert sequence[-1].epoch >= 2
  slots = [s.sample_id for step in sequence for s in step.samples]
  assert len(set(slots)) == len(slots)
  captions = set()
  for step in sequence:
    assert len(step.samples) == step.batch_size
    for s in step.samples:
      row = table.row(s.row)
      assert s.pixels.shape == (step.bucket[1], s.height, s.width, 3)
      assert (s.height > s.width) == (row.height > row.width)
      assert (s.weight, s.error, s.path) == (1.0, "", row.path)
      assert s.caption in row.captions
      captions.add(s.caption.split()[0])
      assert s.label is None
      np.testing.assert_equal(s.cond, condition(s.caption, None))
      assert s.fps == (120 if s.num_frames == 1 else 24)
      if s.num_frames > 1:
        numbers = [files.number_of(f) for f in s.pixels]
        assert numbers == list(range(numbers[0], numbers[0] + s.num_frames))
        assert row.start <= numbers[0] and numbers[-1] < row.start + row.num_frames  # noqa: PT018
  assert captions == {"clip", "film", "image"}


def test_resume_from_any_step(folder, sequence):
  for start in range(16):
    for a, b in zip(load(folder, 2, start=start, condition=condition), sequence[start:]):
      assert_same(a, b)


def test_shards_of_two_processes_make_the_same_batches(folder, sequence):
  """Two shards together are the batches of one. A run may resume with another number of shards."""
  halves = [load(folder, 6, shard=(i, 2), start=5, condition=condition) for i in range(2)]
  for whole, *parts in zip(sequence[5:], *halves):
    assert [len(p.samples) for p in parts] == [whole.batch_size // 2] * 2
    parts[0].samples += parts[1].samples
    assert_same(whole, parts[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_process_without_rows_of_a_step_reads_nothing_and_stays_in_step(folder, sequence, workers, monkeypatch):
  """The process reads no row of the single-frame bucket, and the second half of each other bucket. In the last case it reads
  no row at all.
  """
  shard = {("144p", 17): ((1,), 2), ("144p", 9): ((2, 3), 4), ("144p", 1): ((), 2)}
  for start, whole in ((0, shard), (5, shard), (0, dict.fromkeys(shard, ((), 2)))):
    if not any(parts for parts, _ in whole.values()) and not workers:
      monkeypatch.setattr(video, "read_frames", None)
    steps = load(folder, 6, config_of(folder, workers=workers), shard=whole, start=start, condition=condition)
    assert len(steps) == 6
    for ours, wanted in zip(steps, sequence[start:], strict=False):
      assert (ours.bucket, ours.step, ours.batch_size) == (wanted.bucket, wanted.step, wanted.batch_size)
      if whole[ours.bucket][0]:
        ours.samples = [*wanted.samples[: -len(ours.samples)], *ours.samples]
        assert_same(ours, wanted)
      else:
        (only,) = ours.samples
        assert (only.weight, only.error) == (0, "")
        np.testing.assert_array_equal(only.pixels, np.zeros_like(wanted.samples[0].pixels))
        assert only.cond.keys() == wanted.samples[0].cond.keys()


def test_worker_processes_change_nothing(folder, sequence):
  config = config_of(folder, workers=2)
  with loader.make_loader(config, str(folder / "cache"), start=1, condition=condition) as steps:
    for want in sequence[1:12]:
      assert_same(next(steps), want)
    assert steps.state == 12


def test_the_loader_ends_after_epochs(folder):
  steps = load(folder, 100, epochs=2)
  sequence = plan.PlanSequence(
    sources.open_table(config_of(folder), str(folder / "cache")), config_of(folder), str(folder / "cache")
  )
  assert len(steps) == sequence.first_step(2)
  assert load(folder, 100, epochs=2, start=len(steps)) == []


def test_bad_rows_have_weight_0(folder):
  config = config_of(folder, "bad.csv", max_bad_rows=2)
  with loader.make_loader(config, str(folder / "cache"), epochs=2) as steps:
    samples = [s for step in steps for s in step.samples]
    # The table gives one row more frames than its file has. It fails only if its clip lies beyond the end of the file.
    assert steps.bad_rows[str(folder / "missing.mp4")] == "no such file"
    assert set(steps.bad_rows) <= {str(folder / "missing.mp4"), str(folder / "0.mp4")}
  bad = [s for s in samples if s.error]
  assert bad
  for s in bad:
    assert s.weight == 0
    np.testing.assert_array_equal(s.pixels, np.zeros((s.num_frames, s.height, s.width, 3)), strict=False)
  assert all(s.weight == 1 for s in samples if not s.error)
  strict = config_of(folder, "bad.csv", max_bad_rows=0, buckets=(("144p", 9, 1.0, 2),))
  with pytest.raises(
    ValueError, match=r"1 files cannot be decoded, more than data.max_bad_rows allows .0.; first: .*missing.mp4"
  ):
    load(folder, 12, strict)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_hangs_is_a_bad_row(folder, monkeypatch, workers):
  """A server accepts the connection and never answers."""
  with socket.create_server(("127.0.0.1", 0)) as silent:
    address = f"http://127.0.0.1:{silent.getsockname()[1]}/clip.mp4"
    rows = [{"path": f"{i}.mp4", "text": f"clip {i}", "num_frames": 24, "height": 144, "width": 256} for i in range(6)]
    rows[2]["path"] = address
    files.write_csv(folder / "hangs.csv", rows)
    monkeypatch.setenv(video.SCHEMES, "http")
    settings = {"buckets": (("144p", 9, 1.0, 2),), "row_timeout": 3.0, "workers": workers}
    steps = load(folder, 3, config_of(folder, "hangs.csv", **settings, max_bad_rows=1))
    samples = [sample for step in steps for sample in step.samples]
    assert {s.path: s.weight for s in samples if s.error} == {address: 0.0}
    assert next(s.error for s in samples if s.error) == "reading took longer than data.row_timeout=3 s"
    with pytest.raises(ValueError, match=r"1 files cannot be decoded.*took longer than"):
      load(folder, 3, config_of(folder, "hangs.csv", **settings, max_bad_rows=0))


def test_rows_that_all_hang_are_a_fault_of_the_network(folder, monkeypatch):
  """Otherwise the training would make steps of rows that were not read, up to `max_bad_rows`."""
  with socket.create_server(("127.0.0.1", 0)) as silent:
    address = f"http://127.0.0.1:{silent.getsockname()[1]}"
    rows = [{"path": f"{address}/{i}.mp4", "text": "clip", "num_frames": 24, "height": 144, "width": 256} for i in range(6)]
    files.write_csv(folder / "all_hang.csv", rows)
    monkeypatch.setenv(video.SCHEMES, "http")
    settings = {"buckets": (("144p", 9, 1.0, 2),), "row_timeout": 0.5, "workers": 0, "max_bad_rows": 6}
    with pytest.raises(OSError, match=r"4 files, one after the other: .*took longer") as error:
      load(folder, 1, config_of(folder, "all_hang.csv", **settings))
    assert error.value.errno in PASSING


def test_threads_that_read_rows_end_with_their_reader():
  found = []

  def read():
    found.extend([*(loader.in_time(60.0, threading.get_ident) for _ in range(2)), threading.get_ident()])

  before = threading.active_count()
  reader = threading.Thread(target=read)
  reader.start()
  reader.join()
  end = time.monotonic() + 10
  while threading.active_count() > before and time.monotonic() < end:
    time.sleep(0.01)
  assert threading.active_count() <= before
  assert found[0] == found[1] != found[2]


def test_persistent_io_errors_are_fatal(folder, monkeypatch):
  def broken(*_, **__):
    raise OSError(5, "Input/output error")

  monkeypatch.setattr(video, "read_frames", broken)
  with pytest.raises(OSError, match="failed again and again: Input/output error"):
    load(folder, 1)


def test_text_features_and_scores(folder, monkeypatch):
  y = np.arange(12, dtype=np.float32).reshape(3, 4)
  safetensors.numpy.save_file({"y": y}, folder / "y.safetensors")
  row = {
    "path": "0.mp4",
    "text": "a cat",
    "num_frames": 24,
    "height": 144,
    "width": 256,
    "aes": 5.5,
    "flow": "",
    "cmotion": "static",
  }
  files.write_csv(folder / "f.csv", [{**row, "text_features": "y.safetensors"}, {**row, "text_features": "none.safetensors"}])
  seen = []
  captions = pytest.importorskip("data.captions")
  monkeypatch.setattr(captions, "add_scores", lambda text, scores, rng, p: seen.append((scores, p)) or text + "!")
  config = config_of(folder, "f.csv", buckets=(("144p", 9, 1.0, 2),), max_bad_rows=1.0)
  (step,) = load(folder, 1, config)
  good, bad = sorted(step.samples, key=lambda s: s.row)
  np.testing.assert_array_equal(good.text_features, y)
  assert good.caption == "a cat!"
  assert seen[0] == ({"aes": 5.5, "cmotion": "static"}, 0.2)
  assert (bad.weight, "no such file" in bad.error) == (0.0, True)
  seen.clear()
  assert load(folder, 1, config_of(folder, "f.csv", buckets=(("144p", 9, 1.0, 2),), scores=()))[0].samples[0].caption == "a cat"


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_labels_and_conditions_pass_through_worker_processes(tmp_path, suffix):
  def row(path, label):
    return {"path": path, "label": label, "num_frames": 1, "height": 144, "width": 256}

  for i in range(6):
    Image.fromarray(files.picture(i, 144, 256)).save(tmp_path / f"{i}.png")
  rows = [row(f"{i}.png", i % 3) for i in range(6)] + [row("missing.png", 2), row("0.png", 3), row("0.png", None)]
  table = pa.Table.from_pylist(rows)
  (pa_csv.write_csv if suffix == ".csv" else pa_parquet.write_table)(table, tmp_path / ("t" + suffix))
  settings = {"captions": "optional", "workers": 2, "max_bad_rows": 1}
  config = config_of(tmp_path, "t" + suffix, buckets=(("144p", 1, 1.0, 7),), **settings)
  config = dataclasses.replace(config, num_classes=3)
  with loader.make_loader(config, str(tmp_path / "cache"), condition=condition, epochs=1) as steps:
    (step,) = steps
    assert steps.plans.report(0).dropped == {"label missing or outside 0 to N - 1": 2}
  assert sorted((s.row, s.label, s.weight) for s in step.samples) == [*((i, i % 3, 1.0) for i in range(6)), (6, 2, 0.0)]
  for s in step.samples:
    np.testing.assert_equal(s.cond, condition("", s.label))


def test_fps_rules(folder):
  element = (0, 0, 0, "0.56", config_of(folder).parsed_buckets()[1])
  for rule, want in (("exact", 24 / 5), ("1.2", 4.0), ("1.1", 24.0)):
    config = config_of(folder, fps_rule=rule, frame_interval=5)
    table = sources.open_table(config, str(folder / "cache"))
    assert loader.RowDecoder(config, table, None)(element)["fps"] == want


def test_data_imports_no_jax():
  names = ["aspect_ratios", "buckets", "config", "loader", "plan", "prepare.__main__", "sources", "video"]
  imported = f"import sys, {', '.join(f'data.{name}' for name in names)}"
  code = f"{imported}; sys.exit(any(m in sys.modules for m in ('jax', 'flax', 'stdit_jax')))"
  assert subprocess.run([sys.executable, "-c", code], cwd=pathlib.Path(__file__).parents[2], check=False).returncode == 0


def test_errors_name_the_cause(folder, tmp_path):
  with pytest.raises(ValueError, match="batch size 4 of bucket 144p x 9 cannot be split into 3"):
    load(folder, 1, config_of(folder, buckets=BUCKETS[1:2]), shard=(0, 3))
  with pytest.raises(ValueError, match=r"data folder .* cannot be used: .*(Not a directory|File exists)"):
    loader.make_loader(config_of(folder), str(folder / "t.csv"))
  files.write_csv(tmp_path / "t.csv", [{"path": "gone.mp4", "text": "x", "num_frames": 24, "height": 144, "width": 256}])
  with pytest.raises(ValueError, match="none of the first 1 files exists"):
    load(tmp_path, 1, config_of(tmp_path, buckets=(("144p", 9, 1.0, 1),)))


def test_windows_repeat_after_windows_per_row_epochs(folder):
  def clips(epochs, **settings):
    """{(row, bucket): [pixels of every epoch]}"""
    config = config_of(folder, buckets=BUCKETS[1:2], drop_last=False, **settings)
    steps = loader.make_loader(config, str(folder / "cache"), epochs=epochs)
    found = {}
    with steps:
      for step in steps:
        for s in step.samples:
          found.setdefault((s.row, s.num_frames), {})[step.epoch] = s.pixels
    return found.values()

  two = clips(3, windows_per_row=2)
  assert len(two) == 10
  assert all(np.array_equal(pixels[0], pixels[2]) for pixels in two)
  assert any(not np.array_equal(pixels[0], pixels[1]) for pixels in two)
  one = clips(2, windows_per_row=1)
  assert all(np.array_equal(pixels[0], pixels[1]) for pixels in one)
  assert any(not np.array_equal(pixels[0], pixels[1]) for pixels in clips(2))
