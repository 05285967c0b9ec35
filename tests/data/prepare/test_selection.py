"""Filter, sample, balance, split, export: against polars and Python by hand, read back by the libraries that others use."""

import json
import tarfile

import numpy as np
import polars as pl
import pytest

from data import config as data_config
from data import loader, sources
from data.prepare import __main__ as main
from data.prepare import selection
from tests.data.prepare.videos import two_scenes, write_video


def write_shards(folder, rows=3000, shards=3):
  """A table of random scores in shards."""
  rng = np.random.default_rng(0)
  folder.mkdir()
  table = pl.DataFrame({
    "path": [f"/v/{i // 10}.mp4" for i in range(rows)], "id": [f"{i:016x}" for i in range(rows)],
    "source_id": [f"{i // 10:016x}" for i in range(rows)], "flow": rng.exponential(2.0, rows),
    "aes": [None if i % 7 == 0 else 4 + i % 5 / 2 for i in range(rows)],
    "cmotion": rng.choice(["static", "pan_left"], rows, p=[0.9, 0.1]),
    "error": [None if i % 11 else "probe: bad" for i in range(rows)], "retry": [False] * rows,
  })  # fmt: skip
  for i in range(shards):
    table[i * rows // shards : (i + 1) * rows // shards].write_parquet(folder / f"part-{i:05}.parquet")
  return table


def read(folder):
  return pl.concat([pl.read_parquet(p) for p in sorted(folder.glob("*.parquet"))])


def test_the_filter_counts_what_each_condition_removes(tmp_path, capsys):
  table = write_shards(tmp_path / "in")
  where = '{"moves": "flow >= 0.5", "beautiful": "aes >= 5.0"}'
  assert main.main(["filter", str(tmp_path / "in"), "-o", str(tmp_path / "out"), f"--where={where}"]) == 0
  fine = [(r["error"] is None, r["flow"] >= 0.5, r["aes"] is not None and r["aes"] >= 5) for r in table.to_dicts()]
  assert read(tmp_path / "out").equals(table.filter(pl.Series([all(f) for f in fine])))
  printed = capsys.readouterr().out
  for i, name in enumerate(("no error", "moves", "beautiful")):
    alone = sum(not f[i] for f in fine)
    only = sum(not f[i] and sum(f) == 2 for f in fine)
    assert f"{name:>40} {alone:>12,} {only:>12,}" in printed
  removed = sum(not all(f) for f in fine)
  assert f"{'together':>40} {removed:>12,} of 3,000 ({removed / 30:.1f} %)" in printed


@pytest.mark.parametrize(
  ("where", "message"),
  [
    ("('flow >',)", "is no SQL expression"),
    ("('flaw > 1',)", 'unable to find column "flaw"'),
    ("(1,)", "filter.where = (1,) is no tuple[str, ...] or dict[str, Any]"),
    ("('flow > avg(flow)',)", "needs more rows than one"),
    ("('count(*) > 1',)", "needs more rows than one"),
    ("('row_number() over (order by flow) < 9',)", "needs more rows than one"),
  ],
)
def test_errors_in_conditions(tmp_path, capsys, where, message):
  write_shards(tmp_path / "in", 30, 1)
  assert main.main(["filter", str(tmp_path / "in"), "-o", str(tmp_path / "out"), f"--where={where}"]) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count("\n") == 1


def test_temporary_files_of_a_killed_write_are_no_tables(tmp_path):
  write_shards(tmp_path / "in", 30, 1)
  (tmp_path / "in" / ".part-00000.tmp1-a.parquet").write_bytes((tmp_path / "in" / "part-00000.parquet").read_bytes())
  (tmp_path / "in" / ".part-00001.tmp1-a.parquet").write_bytes(b"PAR1")
  assert main.main(["filter", str(tmp_path / "in"), "-o", str(tmp_path / "out")]) == 0
  assert read(tmp_path / "out").height == 27
  assert [p.name for p in (tmp_path / "out").iterdir()] == ["part-00000.parquet"]
  assert main.main(["report", str(tmp_path / "in"), "-o", str(tmp_path / "r.html"), "--no-sheets"]) == 0
  assert "30 rows, 3 of them failed" in (tmp_path / "r.html").read_text()


def test_draws_are_uniform_and_depend_on_key_and_seed_alone():
  keys = pl.Series([f"{i:016x}" for i in range(20_000)])
  values = selection.draws(keys, 1)
  assert abs(values.mean() - 0.5) < 0.01
  assert np.histogram(values, 10, (0, 1))[0].min() > 1800
  assert abs(np.corrcoef(values, selection.draws(keys, 2))[0, 1]) < 0.03
  assert np.array_equal(values[::3], selection.draws(keys[::3], 1))
  # splitmix64 of seed 0: its first output for state 0 is 0xE220A8397B1DCDAF.
  assert selection.draws(pl.Series(["0" * 16]), 0)[0] == (0xE220A8397B1DCDAF >> 11) * 2.0**-53
  assert 0 <= selection.draws(pl.Series(["no digits"]), 0)[0] < 1


def test_samples_do_not_depend_on_shards(tmp_path):
  table = write_shards(tmp_path / "three")
  write_shards(tmp_path / "one", shards=1)
  for name in ("one", "three"):
    assert main.main(["sample", str(tmp_path / name), "-o", str(tmp_path / f"{name}-out"), "--rows=100", "--seed=3"]) == 0
  found = read(tmp_path / "one-out")
  assert found.height == 100
  assert found["error"].null_count() == 100
  assert found.equals(read(tmp_path / "three-out"))
  assert main.main(["sample", str(tmp_path / "one"), "-o", str(tmp_path / "share"), "--share=0.25"]) == 0
  usable = table["error"].null_count()
  assert read(tmp_path / "share").height == pytest.approx(usable / 4, rel=0.15)


def test_balance_caps_every_group(tmp_path):
  write_shards(tmp_path / "in")
  assert main.main(["balance", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--by=cmotion", "--most=120"]) == 0
  counts = dict(read(tmp_path / "out").group_by("cmotion").len().iter_rows())
  assert counts == {"static": 120, "pan_left": 120}


def test_clips_of_a_file_stay_together(tmp_path):
  write_shards(tmp_path / "in")
  shares = '{"train": 8, "validation": 1, "test": 1}'
  assert main.main(["split", str(tmp_path / "in"), "-o", str(tmp_path / "out"), f"--shares={shares}"]) == 0
  found = read(tmp_path / "out")
  assert found.group_by("source_id").agg(pl.col("split").n_unique())["split"].max() == 1
  parts = dict(found.group_by("split").len().iter_rows())
  assert parts["train"] == pytest.approx(2400, rel=0.08)
  assert set(parts) == {"train", "validation", "test"}


# ------------------------------------------------------------------------------------------------------------------ export


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
  """Six real clips with captions, in a split table."""
  folder = tmp_path_factory.mktemp("export")
  rows = []
  for i in range(6):
    path = write_video(folder / f"clip {i}.mp4", two_scenes(12 + i, 0))
    rows.append({"path": str(path), "text": f"Clip number {i}.", "num_frames": 12 + i, "height": 72, "width": 128, "fps": 24.0,
                 "id": f"{i:016x}", "flow": 1.5, "cmotion": "static", "label": i, "split": "train" if i < 4 else "validation",
                 "error": None if i else "probe: bad", "hash": "x"})  # fmt: skip
  pl.DataFrame(rows).write_parquet(folder / "in.parquet")
  return folder


def export(clips, *more):
  return main.main(["export", str(clips / "in.parquet"), "-o", str(clips), *more])


def test_the_loader_reads_the_table(clips, tmp_path):
  assert export(clips) == 0
  table = pl.read_parquet(clips / "train.parquet")
  assert table["path"].to_list() == [f"clip {i}.mp4" for i in (1, 2, 3)]
  assert "hash" not in table.columns
  assert table["label"].to_list() == [1, 2, 3]
  assert pl.read_parquet(clips / "validation.parquet").height == 2
  config = data_config.DataConfig.create(
    dict(tables=(str(clips / "train.parquet"),), buckets=(("144p", 8, 1.0, 3),), workers=0)
  )
  opened = sources.open_table(config, str(tmp_path))
  assert opened.row(0).captions == ("Clip number 1.",)
  del opened
  with pytest.raises(ValueError, match="too small"):
    loader.make_loader(config, str(tmp_path))  # these clips are too small for 144p


def test_foreign_tables_are_not_overwritten(clips, tmp_path, capsys):
  (tmp_path / "train.parquet").write_bytes((clips / "in.parquet").read_bytes())
  assert export(clips, f"--folder={tmp_path}") == 2
  assert "was not written by this program" in capsys.readouterr().err


def test_webdataset(clips, tmp_path):
  assert export(clips, "--formats=('webdataset',)", f"--folder={tmp_path}", "--samples=2") == 0
  names = sorted(p.name for p in (tmp_path / "webdataset").iterdir())
  assert names == ["train-000000.tar", "train-000001.tar", "validation-000000.tar"]
  webdataset = pytest.importorskip("webdataset")
  url = str(tmp_path / "webdataset" / "train-{000000..000001}.tar")
  found = list(webdataset.WebDataset(url, shardshuffle=False, empty_check=False))
  assert [json.loads(s["json"])["id"] for s in found] == [f"{i:016x}" for i in (1, 2, 3)]
  assert [s["txt"].decode() for s in found] == [f"Clip number {i}." for i in (1, 2, 3)]
  assert found[0]["mp4"] == (clips / "clip 1.mp4").read_bytes()
  with tarfile.open(tmp_path / "webdataset" / "train-000000.tar") as archive:
    assert {m.mtime for m in archive} == {0}


def test_names_of_a_foreign_table_stay_in_their_folder(clips, tmp_path, capsys):
  table = pl.read_parquet(clips / "in.parquet").filter(pl.col("error").is_null())
  hostile = ["../../evil", "a/b", "v1.mp4", None, "0123"]
  table.with_columns(id=pl.Series(hostile)).drop("split").write_parquet(tmp_path / "ids.parquet")
  command = ["-o", str(tmp_path), "--formats=('webdataset',)"]
  assert main.main(["export", str(tmp_path / "ids.parquet"), *command]) == 0
  with tarfile.open(tmp_path / "webdataset" / "train-000000.tar") as archive:
    keys = list(dict.fromkeys(name.split(".")[0] for name in archive.getnames()))
  assert [k.rpartition("_")[0] for k in keys] == ["evil", "b", "v1", "clip_4", ""]
  assert keys[-1] == "0123"
  table.with_columns(split=pl.lit("../evil")).write_parquet(tmp_path / "splits.parquet")
  assert main.main(["export", str(tmp_path / "splits.parquet"), *command]) == 2
  assert "the column split has '../evil'" in capsys.readouterr().err
  cut = table.with_columns(start=0, end=5, id=pl.Series(hostile))
  cut.write_parquet(tmp_path / "ranges.parquet")
  assert main.main(["cut", str(tmp_path / "ranges.parquet"), "-o", str(tmp_path / "cut" / "c.parquet"), "--workers=1"]) == 0
  errors = pl.read_parquet(tmp_path / "cut" / "c.parquet")["error"].to_list()
  assert [e is not None and "can't be part of a file name" in e for e in errors] == [True] * 4 + [False]


def test_tfds(clips, tmp_path):
  import tensorflow_datasets as tfds

  assert export(clips, "--formats=('tfds',)", f"--folder={tmp_path}") == 0
  builder = tfds.builder_from_directory(tmp_path / "tfds" / "clips" / "1.0.0")
  source = builder.as_data_source()
  assert (len(source["train"]), len(source["validation"])) == (3, 2)
  row = next(r for r in source["train"] if r["id"] == f"{2:016x}".encode())
  assert row["video"] == (clips / "clip 2.mp4").read_bytes()
  assert (row["text"], row["num_frames"], row["fps"]) == (b"Clip number 2.", 14, 24.0)


def test_all_captions_are_exported(clips, tmp_path):
  """The loader draws one of them."""
  table = pl.read_parquet(clips / "in.parquet").drop("split")
  table = table.with_columns(text_10=pl.lit("ten"), text_2=pl.lit("two"), text_len=pl.lit(3))
  table.write_parquet(tmp_path / "t.parquet")
  assert main.main(["export", str(tmp_path / "t.parquet"), "-o", str(tmp_path / "out")]) == 0
  exported = tmp_path / "out" / "table.parquet"
  assert pl.read_parquet(exported).columns[:4] == ["path", "text", "text_2", "text_10"]
  assert "text_len" not in pl.read_parquet(exported).columns
  config = data_config.DataConfig.create(dict(tables=(str(exported),), buckets=(("144p", 8, 1.0, 3),)))
  assert sources.open_table(config, str(tmp_path)).row(0).captions == ("Clip number 1.", "two", "ten")


def test_rows_with_one_id_are_several_samples(clips, tmp_path):
  """Copies have one id if the chain has no step `duplicates`."""
  table = pl.read_parquet(clips / "in.parquet").filter(pl.col("error").is_null()).drop("split")
  table.with_columns(id=pl.Series(["same", "same", "other", "", ""])).write_parquet(tmp_path / "t.parquet")
  command = ["export", str(tmp_path / "t.parquet"), "-o", str(tmp_path / "out" / "new")]
  for samples in (1, 100):  # the second export deletes the archives of the first one
    assert main.main([*command, "--formats=('webdataset',)", f"--samples={samples}"]) == 0
  (archive,) = (tmp_path / "out" / "new" / "webdataset").iterdir()
  with tarfile.open(archive) as opened:
    names = opened.getnames()
  assert len(set(names)) == len(names) == 15
  assert [name for name in names if name.endswith("mp4")][:3] == ["same_1.mp4", "same_2.mp4", "other.mp4"]
  for _ in range(2):  # the first export makes the folder, the second one replaces it
    assert main.main([*command, "--formats=('tfds',)", f"--folder={tmp_path / 'deep' / 'tfds'}"]) == 0
  import tensorflow_datasets as tfds

  place = tmp_path / "deep" / "tfds" / "tfds" / "clips"
  assert [p.name for p in place.iterdir()] == ["1.0.0"]
  assert len(tfds.builder_from_directory(place / "1.0.0").as_data_source()["train"]) == 5


def test_ranges_are_not_exported_as_files(clips, tmp_path, capsys):
  pl.read_parquet(clips / "in.parquet").with_columns(start=pl.lit(0), end=pl.lit(5)).write_parquet(tmp_path / "r.parquet")
  command = ["export", str(tmp_path / "r.parquet"), "-o", str(tmp_path / "e"), "--formats=('webdataset',)"]
  assert main.main(command) == 2
  assert "put the step cut" in capsys.readouterr().err
