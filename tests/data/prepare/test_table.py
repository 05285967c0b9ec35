"""The command `table`: columns that training needs, with only the packages that training has."""

import os
import subprocess
import sys

import polars as pl
import pyarrow.parquet
import pytest

from data import sources
from data.config import DataConfig
from data.prepare import __main__ as main
from data.prepare import collect
from tests.data import files
from tests.data.prepare.videos import two_scenes, write_video

EXTRAS = ("httpx2", "jinja2", "rapidocr", "onnxruntime", "ray", "torch")


def open_table(folder, path, **settings):
  config = DataConfig(tables=(str(path),), buckets=(("144p", 17, 1.0, 2),), **settings)
  return sources.open_table(config, str(folder / "cache"))


@pytest.fixture
def clips(tmp_path):
  """clips/a.mp4, a turned one, a broken one."""
  (tmp_path / "clips").mkdir()
  files.write_video(tmp_path / "clips" / "a.mp4", frames=13)
  files.write_video(tmp_path / "clips" / "turned.mp4", frames=20, rotation=90)
  (tmp_path / "clips" / "bad.mp4").write_text("no video")
  return tmp_path


def test_a_folder_and_a_table(clips, capsys):
  command = ["table", "--workers", "1"]
  assert main.main([*command, str(clips / "clips"), "-o", str(clips / "t.csv")]) == 0
  out, err = capsys.readouterr()
  assert "2 files, 1 skipped" in out
  assert f"skipped {clips}/clips/bad.mp4: probe: not a video" in err
  assert (clips / "t.csv").read_text().splitlines()[:2] == ["path,num_frames,height,width,fps", "clips/a.mp4,13,48,64,24.0"]
  table = open_table(clips, clips / "t.csv", captions="optional")
  assert [(r.path, r.num_frames, r.height, r.width, r.fps) for r in map(table.row, range(2))] == [
    (str(clips / "clips" / "a.mp4"), 13, 48, 64, 24.0),
    (str(clips / "clips" / "turned.mp4"), 20, 64, 48, 24.0),
  ]
  # A table without the columns gets them; its other columns stay. Ranges and crops that don't fit their files are skipped.
  cuts = [
    {"text": "é", "note": "kept", "start": 2, "end": 13, "crop": "0,0,32,32"},
    {"text": "007", "note": "", "start": 4, "end": "", "crop": "[0, 8, 60, 40]"},
    {"text": "x", "note": "", "start": 2, "end": 14, "crop": ""},
    {"text": "x", "note": "", "start": "", "end": "", "crop": "0,0,65,48"},
  ]
  path = files.write_csv(clips / "u.csv", [{"path": "clips/a.mp4", **c} for c in cuts])
  with pytest.raises(ValueError, match=r"python -m data\.prepare table"):
    open_table(clips, path)
  assert main.main([*command, path, "-o", str(clips / "v.parquet")]) == 0
  table = open_table(clips, clips / "v.parquet")
  assert [(r.captions, r.start, r.num_frames, r.height, r.width) for r in map(table.row, range(2))] == [
    (("é",), 2, 11, 32, 32),
    (("007",), 4, 9, 40, 60),
  ]
  assert pyarrow.parquet.read_table(clips / "v.parquet")["note"].to_pylist() == ["kept", None]
  err = capsys.readouterr().err
  assert err.count("/clips/a.mp4: probe: start and end don't fit") == 1
  assert err.count("/clips/a.mp4: probe: crop") == 1


def test_a_table_of_ranges_is_listed_the_same_way_twice(clips):
  """A repeated listing writes shards with the same bytes. Otherwise a second run would repeat all steps."""
  rows = [{"path": "clips/a.mp4", "text": "x", "start": i, "end": i + 5} for i in range(3)]
  step = collect.Collect(sources=(files.write_csv(clips / "r.csv", rows),), rows_per_shard=2)
  for _ in range(2):
    step.list(str(clips / "run"))
    shards = [(clips / "run" / name).read_bytes() for name in ("part-00000.parquet", "part-00001.parquet")]
  step.list(str(clips / "other"))
  assert shards == [(clips / "other" / name).read_bytes() for name in ("part-00000.parquet", "part-00001.parquet")]
  files.write_csv(clips / "r.csv", rows[1:])
  step.list(str(clips / "run"))
  found = [pl.read_parquet(clips / "run" / name)["start"].to_list() for name in ("part-00000.parquet", "part-00001.parquet")]
  assert found == [[0, 1], [2]]  # a row that is no longer listed stays
  collect.Collect(sources=step.sources, forget=True).list(str(clips / "run"))
  assert pl.read_parquet(clips / "run" / "part-00000.parquet")["start"].to_list() == [1]


def test_ranges_stay_when_their_table_is_no_source_any_more(clips):
  """If a folder with the same file is a source, the whole file becomes another row."""
  rows = [{"path": "clips/a.mp4", "text": "x", "start": i, "end": i + 5} for i in range(3)]
  listed, folder = files.write_csv(clips / "r.csv", rows), str(clips / "clips")
  for sources_then, starts in (((listed,), [0, 1, 2]), ((folder,), [0, 1, 2, None]), ((listed, folder), [0, 1, 2, None])):
    for _ in range(2):
      collect.Collect(sources=sources_then).list(str(clips / "run"))
      found = pl.concat([pl.read_parquet(p) for p in sorted((clips / "run").glob("*.parquet"))], how="diagonal_relaxed")
      assert found.filter(pl.col("path").str.ends_with("/a.mp4"))["start"].to_list() == starts
      assert found.height == (3 if len(starts) == 3 else 6)


def test_errors(clips, capsys):
  (clips / "none.csv").write_text("path\nclips/bad.mp4\n")
  mistakes = (
    ("nothing.csv", "t.csv", "does not exist"),
    ("clips", "t.txt", "must end in .csv or .parquet"),
    ("none.csv", "none.csv", "is an input of this command: give another name"),
    ("none.csv", "t.csv", "has no usable file: all 1 failed"),
  )
  for source, output, message in mistakes:
    assert main.main(["table", str(clips / source), "-o", str(clips / output), "--workers", "1"]) == 2
    assert message in capsys.readouterr().err
    assert not (clips / "t.csv").exists()


def test_the_command_needs_only_requirements_txt(clips):
  """And so does the quick start with --clips. The packages of requirements-prepare.txt can't be imported here."""
  write_video(clips / "clips" / "scene.mp4", two_scenes(30, 0))
  (clips / "hook").mkdir()
  (clips / "hook" / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({EXTRAS}))\n")
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(clips / "hook"), os.getcwd()))}
  code = (
    "from data.prepare import __main__, film\n"
    "assert __main__.main(['table', 'clips', '-o', 't.csv', '--workers', '1']) == 0\n"
    "assert film.main(['--clips', 'clips', '--output', 'out', '--processes', '1']) == 0"
  )
  done = subprocess.run([sys.executable, "-c", code], cwd=clips, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert "skipped" in done.stderr
  assert "skipped bad.mp4: probe: not a video" in done.stdout
