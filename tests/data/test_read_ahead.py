"""Bytes limit the rows that are decoded ahead. Groups of rows keep their order, in threads and in worker processes."""

import os
import pathlib
import time

import numpy as np
import pytest

from data import plan, read_ahead, sources, video
from data.aspect_ratios import NUM_PIXELS
from data.config import DataConfig
from data.groups import ListSource, RowSource
from data.loader import make_loader
from data.read_ahead import Ahead, Rows

IMAGE = 3 * NUM_PIXELS["64p"]  # bytes


def config_of(seed=0, **settings):
  """Drawn clips. Other seeds have other clips."""
  return DataConfig.create({"tables": f"shapes://train/{seed}/96", "buckets": (("64p", 1, 1.0, 16),), "workers": 0, **settings})


def wait_for(count, least, seconds=20.0):
  """Waits until `count()` is at least `least`, then until it stops growing."""
  end = time.monotonic() + seconds
  while count() < least and time.monotonic() < end:
    time.sleep(0.01)
  time.sleep(0.3)
  return count()


def rows_ahead(monkeypatch, folder, config, least):
  """Number of rows that the loader decodes while nobody takes a step after the first one."""
  decoded, read = [], video.read_frames
  own = config.tables.rpartition("/")[0]  # threads of another loader may still decode a clip

  def counted(path, *more, **how):
    decoded.append(path) if path.startswith(own) else None
    return read(path, *more, **how)

  monkeypatch.setattr(video, "read_frames", counted)
  with make_loader(config, str(folder)) as steps:
    taken = len(next(steps).samples)
    return wait_for(lambda: len(decoded), taken + least) - taken


def test_a_bucket_of_long_clips_does_not_starve_the_images(tmp_path, monkeypatch):
  """Two steps of images are ready, although a clip of the other bucket has as many bytes as 100,000 images."""
  config = config_of(buckets=(("64p", 1, 1.0, 16), ("720p", 408, 1.0, 1)))
  assert rows_ahead(monkeypatch, tmp_path, config, 32) >= 32


def test_free_memory_limits_the_rows_ahead(tmp_path, monkeypatch):
  monkeypatch.setattr(read_ahead, "free_memory", lambda shared: 4 * 8 * IMAGE)
  assert rows_ahead(monkeypatch, tmp_path, config_of(1), 8) == 8
  assert rows_ahead(monkeypatch, tmp_path / "rows", config_of(2, read_ahead=5), 5) == 5


@pytest.mark.parametrize(("most", "parts"), [(1, (0,)), (5 * IMAGE, (1,)), (10**9, (0, 2))])
def test_groups_have_the_rows_of_the_plan(tmp_path, most, parts):
  """Any grouping, from any step, over several epochs. The places of the groups follow each other."""
  config = config_of(buckets=(("64p", 1, 1.0, 12), ("64p", 4, 1.0, 3)))
  table = sources.open_table(config, str(tmp_path))
  plans = plan.PlanSequence(table, config, str(tmp_path))
  assert [b.num_frames for b in config.parsed_buckets()] == [4, 1]
  rows_per_step, weights = [len(parts), 4 * len(parts)], (4 * IMAGE, IMAGE)
  groups = tuple(max(1, min(n, most // w)) for n, w in zip(rows_per_step, weights))
  ahead = Ahead(0, 1, 10**9, False, weights, groups, ("a", "b"))

  def read(start):
    source, rows, number = RowSource(plans, [(parts, 3)] * 2, rows_per_step, ahead, start, 2), [], 0
    end = 0
    while group := source[number]:
      begin, weight = source.place(number)
      assert begin == end
      assert weight == sum(weights[bucket.num_frames == 1] for *_, bucket, _ in group)
      assert len({(epoch, plans.plan(epoch).slot(slot)[3]) for epoch, slot, *_ in group}) == 1  # of one step
      end, number, rows = begin + weight, number + 1, rows + group
    return rows

  wanted = []  # the rows of these parts of each step
  for epoch in range(2):
    for step in range(plans.plan(epoch).num_steps):
      begin, end = plans.plan(epoch).slots(step)
      slots = np.split(np.arange(begin, end), 3)
      wanted.append([(epoch, int(slot)) for part in parts for slot in slots[part]])
  steps = plans.plan(0).num_steps
  for first in (0, 1, 7, steps - 1, steps, steps + 3):
    found = [row[:2] for row in read((first // steps, first % steps))]
    assert found == [row for step in wanted[first:] for row in step]


def decode(row):
  """A picklable decoder: notes that it decoded a row, and returns arrays of several sizes."""
  folder, number, size = row
  (pathlib.Path(folder) / str(number)).touch()
  return {"number": number, "pixels": np.full(size, number % 256, np.uint8), "mean": np.arange(number, dtype=np.float32)}


@pytest.mark.parametrize("workers", [0, 2])
def test_bytes_limit_what_is_decoded_ahead(tmp_path, workers):
  """Rows of 100 to 60,000 bytes. What is decoded and not taken never has more bytes than allowed, nor much fewer."""
  sizes = np.tile([100, 60_000, 5_000], 100)
  rows = np.empty(len(sizes), object)
  rows[:] = [(str(tmp_path), number, int(size)) for number, size in enumerate(sizes)]
  ahead = Ahead(workers, 3, 500_000, False, (1,), (1,), ("rows",))
  decoded = lambda: sum(sizes[int(name)] for name in os.listdir(tmp_path))  # noqa: E731
  reader = Rows(ListSource(rows, sizes, 20_000), decode, ahead)
  for number in range(200):
    row = next(reader)
    assert row["number"] == number
    np.testing.assert_array_equal(row["pixels"], np.full(sizes[number], number % 256, np.uint8))
    np.testing.assert_array_equal(row["mean"], np.arange(number))
    if number in (0, 77, 150):
      taken = sizes[: number + 1].sum()
      now = wait_for(lambda: decoded() - taken, 420_000)  # noqa: B023 - called at once
      assert 420_000 <= now <= 500_000 + 20_000  # some rows of the group in hand are not taken yet
  began = time.monotonic()
  reader.close()
  assert time.monotonic() - began < 20  # grain kills workers that do not end by themselves, after 25 s each


def test_the_machine_decides_the_number_of_workers(monkeypatch):
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(112)), raising=False)
  monkeypatch.setattr(read_ahead, "free_memory", lambda shared: 180 << 30)
  names, clip = ["144p x 1", "360p x 408"], 408 * 3 * 230_400
  videos = Ahead.of(config_of(workers=None), [110_592, clip], [640, 1], names)
  assert videos.workers == 98
  assert 2 * clip <= videos.room <= 4 << 30
  assert str(videos) == "98 worker processes, at most 2.26 GB ahead (8 rows of 360p x 408 to 20,400 of 144p x 1)"
  assert Ahead.of(config_of(workers=None), [2**20], [640], ["144p x 1"], cached=True).workers == 16
  assert Ahead.of(config_of(workers=3), [2**20], [640], ["144p x 1"], cached=True).workers == 3
  assert Ahead.of(config_of(workers=0), [clip], [1], ["a"]).workers == 0
  two = Ahead.of(config_of(workers=None), [5 * 2**20], [2400], ["144p x 1"], cached=True)
  assert two.room == 2 * 2400 * 5 * 2**20  # two steps, although they have more than 4 GiB
  rows = Ahead.of(config_of(read_ahead=7, workers=1), [100], [4], ["a"])
  assert (str(rows), rows.room, rows.weights) == ("1 worker process, at most 7 rows ahead", 7, (1,))
