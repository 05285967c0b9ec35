"""Files in a bucket behave like files on a disk: no partial files, the same errors, the same samples."""

import csv
import errno
from typing import Any

import fsspec
import numpy as np
import pytest
import safetensors.numpy

from data import loader, paths, sources, video
from data.config import DataConfig
from data.prepare import __main__ as prepare
from tests.data import files
from tests.object_store import BUCKET


@pytest.fixture(params=["disk", "bucket"])
def place(request, store, tmp_path):
  """A folder that does not exist yet, on a disk or in the bucket."""
  return str(tmp_path / "new") if request.param == "disk" else f"gs://{BUCKET}/{request.node.originalname}"


def test_files_are_written_deleted_and_moved(place):
  path = paths.join(place, "a", "file.txt")
  assert not paths.exists(path)
  assert paths.names(place) == list(paths.files_below(place)) == []
  with pytest.raises(FileNotFoundError) as error:
    paths.read_text(path)
  assert error.value.errno == errno.ENOENT
  paths.write_text(path, "one")
  before = paths.stat(path)
  paths.write_text(path, "two, ä")
  assert paths.read_text(path) == "two, ä"
  assert paths.stat(path)[0] == 7
  assert paths.stat(path)[1] != before[1]
  assert paths.exists(place)
  assert paths.is_folder(place)
  assert not paths.is_folder(path)
  with pytest.raises(IsADirectoryError):
    paths.stat(place)
  for i in range(60):  # more than a page of a listing
    paths.write_text(paths.join(place, "a", "b", f"{i:02}"), str(i))
  assert paths.names(paths.join(place, "a")) == ["b", "file.txt"]
  assert len(paths.names(paths.join(place, "a", "b"))) == 60
  paths.move(paths.join(place, "a"), paths.join(place, "c", "d"))
  assert paths.names(place) == ["c"]
  assert [paths.read_text(p) for p in list(paths.files_below(place))[:3]] == ["0", "1", "2"]
  with paths.open_file(paths.join(place, "c", "d", "file.txt")) as file:
    file.seek(5)
    assert file.read() == "ä".encode()
  paths.remove(paths.join(place, "c", "d", "file.txt"))
  assert paths.names(paths.join(place, "c", "d")) == ["b"]


def test_a_failed_write_keeps_the_old_file(place, tmp_path):
  path = paths.join(place, "file.bin")
  lines: Any = ["half", None]
  for before in ([], ["file.bin"]):
    with pytest.raises(TypeError), paths.whole(path) as temporary, open(temporary, "w") as file:
      file.writelines(lines)
    assert paths.names(place) == before
    paths.write_text(path, "whole")
  assert paths.read_text(path) == "whole"


def test_a_failed_upload_leaves_no_object(store, tmp_path, monkeypatch):
  path = f"gs://{BUCKET}/half/large.bin"
  chunks = []

  def refuse(method, url, query):
    if "upload_id" in query and method != "DELETE":
      chunks.append(url)
      return 403 if len(chunks) == 2 else None
    return None

  monkeypatch.setattr(store, "refuse", refuse)
  with pytest.raises(PermissionError), paths.whole(path) as temporary, open(temporary, "wb") as file:
    file.truncate(51 << 20)  # gcsfs sends 50 MiB at a time
  assert len(chunks) == 2
  assert not store.uploads
  monkeypatch.undo()
  assert not paths.exists(path)


def test_errors_of_a_bucket_become_os_errors(store, monkeypatch):
  path = f"gs://{BUCKET}/errors/file"
  paths.write_text(path, "text")
  for status, number in ((401, errno.EACCES), (403, errno.EACCES), (404, errno.ENOENT), (410, errno.EIO)):
    monkeypatch.setattr(store, "refuse", lambda *_, status=status: status)
    for call in (paths.read_bytes, paths.stat, lambda path: paths.write_text(path, "new")):
      with pytest.raises(OSError, match=path) as error:
        call(path)
      assert error.value.errno == number, (status, call)
    monkeypatch.undo()
  assert paths.read_text(path) == "text"
  with pytest.raises(FileNotFoundError):
    paths.write_text("gs://no-such-bucket/file", "text")
  with pytest.raises(ValueError, match="x='gs://no-such-bucket/x' can't be used: there is no such bucket; give another"):
    paths.check_writable("gs://no-such-bucket/x", "x")
  for address in ("s3://bucket/file", "gs://", "gs://bucket", "gs://Bucket/x"):
    with pytest.raises(ValueError, match=r"output='.*' is neither a local path nor gs://BUCKET/NAME"):
      paths.check(address, "output")


@pytest.mark.parametrize("kind", [TimeoutError, fsspec.FSTimeoutError])  # fsspec's is that of asyncio, without a number
def test_timeouts_of_a_bucket_pass(clips, store, tmp_path, monkeypatch, kind):
  """The reader tries again. If every attempt fails, the run ends. The row is not taken for a damaged file."""
  store.copy_in(clips / "videos", "slow")  # no other test reads these objects: readers cache their contents
  path, attempts = f"gs://{BUCKET}/slow/1.mp4", []
  monkeypatch.setattr(video, "RETRY_DELAYS", (0, 0))
  expected = video.read_frames(path, [3])
  bucket = fsspec.filesystem("gs")
  original = bucket.info

  def slow(*args, **kwargs):
    attempts.append(args)
    if len(attempts) <= failures:
      raise kind
    return original(*args, **kwargs)

  monkeypatch.setattr(bucket, "info", slow)

  def forget():
    for cache in (video._cached_index, video._bucket_stat, video._bucket_content):
      cache.cache_clear()

  forget()
  failures = 2
  np.testing.assert_array_equal(video.read_frames(path, [3]), expected)
  assert len(attempts) > 2
  forget()
  failures = 10**9
  with pytest.raises(OSError, match="reading failed again and again: the bucket gives no answer in time"):
    load(clips / "slow.csv", tmp_path, max_bad_rows=6)


@pytest.fixture(scope="module")
def clips(tmp_path_factory, store):
  """A folder of six clips, text features and three tables. The bucket holds the same files under clips/."""
  folder, rows = tmp_path_factory.mktemp("clips"), []
  (folder / "videos").mkdir()
  for i in range(6):
    files.write_video(folder / "videos" / f"{i}.mp4", frames=30, height=144, width=256)
  safetensors.numpy.save_file({"y": np.arange(12, dtype=np.float32).reshape(3, 4)}, folder / "y.safetensors")
  for i in range(6):
    rows.append({"path": f"../clips/videos/{i}.mp4" if i else "videos/0.mp4", "text": f"clip {i}", "num_frames": 30,
                 "height": 144, "width": 256, "fps": 24, "text_features": "y.safetensors"})  # fmt: skip
  folder.rename(folder.parent / "clips")
  folder = folder.parent / "clips"
  files.write_csv(folder / "table.csv", rows)
  slow = [{**row, "path": f"gs://{BUCKET}/slow/{i}.mp4", "text_features": ""} for i, row in enumerate(rows)]
  files.write_csv(folder / "slow.csv", slow)
  files.write_csv(folder / "one_gone.csv", [*rows[:5], {**rows[5], "path": "videos/gone.mp4"}])
  files.write_csv(folder / "gone.csv", [{**row, "path": f"videos/gone{i}.mp4"} for i, row in enumerate(rows)])
  store.copy_in(folder, "clips")
  return folder


def load(table, cache, steps=3, **settings):
  config = DataConfig.create({"tables": (str(table),), "buckets": (("144p", 8, 1.0, 2),), "workers": 0, **settings})
  with loader.make_loader(config, str(cache)) as rows:
    return [next(rows) for _ in range(steps)], rows.bad_rows


def test_a_bucket_gives_the_same_samples_with_one_download_per_file(clips, store, tmp_path, monkeypatch):
  remote_table = f"gs://{BUCKET}/clips/table.csv"
  local, _ = load(clips / "table.csv", tmp_path / "local")
  before = len(store.requests)
  remote, bad = load(remote_table, tmp_path / "remote")
  assert not bad
  reads = [path for method, path in store.requests[before:] if path.startswith("/download") and path.endswith(".mp4")]
  monkeypatch.setattr(video, "_IN_MEMORY", 0)  # all files are now too large for memory and are read in pieces
  video._cached_index.cache_clear()
  pieces, _ = load(remote_table, tmp_path / "remote")
  for a, b, c in zip(local, remote, pieces, strict=True):
    for x, y, z in zip(a.samples, b.samples, c.samples, strict=True):
      assert (x.caption, x.sample_id, x.row, x.fps) == (y.caption, y.sample_id, y.row, y.fps)
      assert y.path == f"gs://{BUCKET}/clips/videos/{y.row}.mp4"
      for other in (y, z):
        np.testing.assert_array_equal(x.pixels, other.pixels)
        np.testing.assert_array_equal(x.text_features, other.text_features)
  assert 6 <= len(reads) <= 8  # rows are read ahead


def test_missing_files_give_the_same_error_in_a_bucket_and_on_a_disk(clips, tmp_path):
  lines = []
  for folder in (str(clips), f"gs://{BUCKET}/clips"):
    found = []
    for table in ("none.csv", "gone.csv"):
      with pytest.raises(ValueError, match=r"\w") as error:
        load(f"{folder}/{table}", tmp_path / "cache")
      found.append(str(error.value))
    _, bad = load(f"{folder}/one_gone.csv", tmp_path / "cache", max_bad_rows=1)
    found += [f"{path}: {reason}" for path, reason in bad.items()]
    with pytest.raises(video.BadVideo) as error:
      sources.text_embedding(f"{folder}/none.safetensors")
    lines.append([line.replace(folder, "FOLDER") for line in (*found, str(error.value))])
  assert lines[0] == lines[1]
  assert lines[0][0] == "table FOLDER/none.csv does not exist. Correct the path in data.tables."
  assert lines[0][2] == "FOLDER/videos/gone.mp4: no such file"


def test_probing_a_bucket_gives_the_same_table(clips, store, tmp_path):
  command = ["table", "--workers", "1"]
  assert prepare.main([*command, str(clips / "videos"), "-o", str(clips / "probed.csv")]) == 0
  assert prepare.main([*command, f"gs://{BUCKET}/clips/videos", "-o", f"gs://{BUCKET}/clips/probed.csv"]) == 0
  assert store.read("clips/probed.csv") == (clips / "probed.csv").read_bytes()
  here = tmp_path / "here.csv"
  assert prepare.main([*command, f"gs://{BUCKET}/clips/table.csv", "-o", str(here)]) == 0
  with here.open(newline="") as file:
    assert [row["path"] for row in csv.DictReader(file)] == [f"gs://{BUCKET}/clips/videos/{i}.mp4" for i in range(6)]
