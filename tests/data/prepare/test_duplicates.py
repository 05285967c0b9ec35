"""Copies of files and of frames in another encoding, and rows that are no copies."""

import shutil

import cv2
import numpy as np
import polars as pl

from data.prepare import __main__ as main
from data.prepare import collect
from tests.data.files import write_video as numbered_video
from tests.data.prepare.videos import two_scenes, write_video


def run(tmp_path, folder, **settings):
  config = tmp_path / "c.py"
  config.write_text(f"""
def get_config():
  return dict(output={str(tmp_path / "out")!r}, steps=("collect", "probe", "duplicates"), workers=2,
              collect=dict(sources=({str(folder)!r},), rows_per_shard=3), duplicates={settings!r})
""")
  assert main.main(["run", "--config", str(config)]) == 0
  table = pl.concat([pl.read_parquet(p) for p in sorted((tmp_path / "out" / "duplicates").glob("*.parquet"))])
  return {path.rpartition("/")[2]: error for path, error in table.select("path", "error").iter_rows()}


def test_copies_are_found_across_shards(tmp_path):
  folder = tmp_path / "videos"
  folder.mkdir()
  write_video(folder / "m.mp4", two_scenes())
  shutil.copy(folder / "m.mp4", folder / "a copy.mp4")
  # A smaller copy in another container: the larger file stays, whatever the names.
  small = [cv2.resize(image, (64, 36), interpolation=cv2.INTER_AREA) for image in two_scenes()]
  write_video(folder / "b small.mkv", small)
  write_video(folder / "other.mp4", two_scenes(seeds=(7, 8)))
  write_video(folder / "longer.mp4", two_scenes(40, 110))
  for i in range(3):  # black frames are not compared
    write_video(folder / f"black{i}.mp4", [np.zeros((72, 128, 3), np.uint8)] * (20 + i))
  found = run(tmp_path, folder)
  place = f"{folder}/"
  assert found.pop("m.mp4") == f"duplicates: the same content as {place}a copy.mp4"
  assert found.pop("b small.mkv") == f"duplicates: the same pictures as {place}a copy.mp4"
  assert set(found.values()) == {None}
  assert run(tmp_path, folder, pictures=False)["b small.mkv"] is None


def test_hashes_depend_on_images_not_on_encodings(tmp_path):
  first, second = numbered_video(tmp_path / "a.mp4", crf=18), numbered_video(tmp_path / "b.mp4", crf=30)
  hashes = [int(collect._picture_hash(path, 40), 16) for path in (first, second)]
  assert bin(hashes[0] ^ hashes[1]).count("1") <= 5
  ramp = np.repeat(np.arange(0, 240, 2, dtype=np.uint8)[None, ::-1, None], 90, 0).repeat(3, 2)
  assert collect.difference_hash(np.ascontiguousarray(ramp)) == 0  # brightness falls from left to right in all rows
  assert collect.difference_hash(np.ascontiguousarray(ramp[:, ::-1])) == 2**64 - 1
