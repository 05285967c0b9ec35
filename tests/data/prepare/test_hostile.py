"""Hostile files are recorded and skipped, in bounded time and memory."""

import os
import struct
import subprocess
import sys
import zlib

import av
import numpy as np
import polars as pl
import pytest

from data.prepare import __main__ as main
from data.prepare import collect, steps
from tests.data.files import write_audio
from tests.data.files import write_video as numbered_video
from tests.data.prepare.videos import two_scenes, write_video

CONFIG = """
def get_config():
  return dict(
    output={output!r}, steps=("collect", "probe", "duplicates", "scenes", "cut"), workers=2,
    collect=dict(sources=({sources!r},)),
    scenes=dict(min_seconds=1.0), cut=dict(short_side=36), duplicates=dict(pictures=False),
    limits=dict(seconds=20.0, memory_gb=1.0),
  )
"""


def png(width, height, rows=0):
  """A PNG that declares a size and has `rows` rows, compressed a thousandfold."""
  chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))  # noqa: E731
  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + chunk(b"IDAT", zlib.compress(bytes(rows * (width * 3 + 1))))
    + chunk(b"IEND", b"")
  )


def many_streams(path, count):
  with av.open(str(path), "w", format="matroska") as container:
    streams = [container.add_stream("libx264", rate=24) for _ in range(count)]
    for stream in streams:
      stream.width = stream.height = 32
      stream.pix_fmt = "yuv420p"
    for stream in streams:
      frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
      frame.pts = 0
      container.mux(stream.encode(frame))
      container.mux(stream.encode())


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
  """(folder, {name: words of its failure, None for a good file})."""
  folder = tmp_path_factory.mktemp("hostile")
  good = write_video(folder / "good.mp4", two_scenes(30, 40))
  content = good.read_bytes()
  expected = {"good.mp4": None}

  def add(name, data, reason):
    with open(os.path.join(os.fsencode(folder), os.fsencode(name)), "wb") as f:
      f.write(data)
    expected[name if isinstance(name, str) else name.decode("utf-8", "backslashreplace")] = reason

  add("zero.mp4", b"", "empty")
  add("cut short.mp4", content[: len(content) // 2], "not a video")
  add("text.mkv", b"no video at all\n" * 100, "not a video")
  add("noise.webm", np.random.default_rng(0).bytes(50_000), "not a video")
  add("picture.mp4", png(8, 8, 8), "not a video")
  add("video.png", content, "no image")
  add("huge.png", png(100_000, 100_000), "too large|frames of")
  add("bomb.png", png(12_000, 12_000, 12_000), "too large|frames of")
  # A huge size in the sample entry of an mp4. The decoder finds the true size, but only after the entry was read.
  at = content.index(b"avc1") + 28
  add("enormous.mp4", content[:at] + struct.pack(">HH", 65535, 65535) + content[at + 4 :], "65535 x 65535|.*")
  playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://" + str(good) + "\n#EXT-X-ENDLIST\n"
  add("playlist.mp4", playlist.encode(), "not a video")
  add("list.mp4", f"ffconcat version 1.0\nfile '{good}'\n".encode(), "not a video")
  names = ("two words.mp4", 'it\'s "quoted".mp4', "line\nbreak.mp4", "-rf.mp4", "$(touch pwned); `id`.mp4", "unié — 字.mp4")
  for i, name in enumerate(names):
    write_video(folder / "v.mp4", two_scenes(31 + i, 40))
    os.rename(folder / "v.mp4", folder / name)
    expected[name] = None
  add(b"bytes\xff\xfe.mp4", content, "not UTF-8")
  many_streams(folder / "streams.mkv", 60)
  expected["streams.mkv"] = "60 streams"
  write_audio(folder / "sound.mp4")
  expected["sound.mp4"] = "no video stream"
  (folder / "folder.mp4").mkdir()
  os.mkfifo(folder / "pipe.mp4")
  os.symlink(folder / "nowhere", folder / "dangling.mp4")
  return folder, expected


def test_hostile_files_are_recorded_and_skipped(hostile, tmp_path):
  folder, expected = hostile
  config = tmp_path / "c.py"
  config.write_text(CONFIG.format(output=str(tmp_path / "out"), sources=str(folder)))
  before = set(os.listdir(os.fsencode(folder)))
  run = subprocess.run(
    [sys.executable, "-m", "data.prepare", "run", "--config", str(config)], capture_output=True, text=True, timeout=120
  )
  assert run.returncode == 0, run.stderr
  assert set(os.listdir(os.fsencode(folder))) == before  # no name was taken for a command
  rows = pl.read_parquet(tmp_path / "out" / "cut" / "part-00000.parquet")
  names = rows.select(pl.coalesce("video", "path").str.strip_prefix(f"{folder}/"), "error", "retry").rows()
  found = {}
  for name, error, retry in names:
    found.setdefault(name, []).append(error)
    assert not retry, (name, error)
  assert set(found) == set(expected)
  for name in found:
    reason = expected[name]
    if reason is None:
      assert set(found[name]) == {None}, (name, found[name])
    elif reason != "65535 x 65535|.*":
      assert len(found[name]) == 1
      assert any(word in found[name][0] for word in reason.split("|")), (name, found[name])
  printed = run.stdout + run.stderr
  assert "Traceback" not in printed
  assert "\x1b" not in printed


def test_file_names_survive_the_table(hostile, tmp_path):
  folder, _ = hostile
  config = tmp_path / "c.py"
  config.write_text(CONFIG.format(output=str(tmp_path / "out"), sources=str(folder)))
  assert main.main(["run", "--config", str(config), "--until", "collect"]) == 0
  listed = pl.read_parquet(tmp_path / "out" / "collect" / "part-00000.parquet").filter(pl.col("error").is_null())
  assert all(os.path.exists(path) for path in listed["path"])


@pytest.mark.parametrize(
  ("ending", "codec"),
  [("mp4", "libx264"), ("mov", "mpeg4"), ("mkv", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4"), ("mpg", "mpeg2video"),
   ("ts", "libx264"), ("ogv", "libvpx"), ("gif", "gif")],
)  # fmt: skip
def test_common_containers_are_read(tmp_path, ending, codec):
  path = numbered_video(tmp_path / f"a.{ending}", frames=30, codec=codec, pix_fmt="rgb8" if ending == "gif" else "yuv420p")
  (row,) = collect.Probe().rows([{"path": path}], steps.Context("", ""), None)
  assert (row["num_frames"], row["height"], row["width"], row["audio"]) == (30, 48, 64, False)
  assert row["duration"] == pytest.approx(30 / row["fps"])
  assert len(row["picture_hash"]) == 48
