"""Metadata tables: columns, ranges, crops, captions, weights, and one clear line for every mistake."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest

from data import sources
from data.config import DataConfig
from tests.data import files

BASE = {"path": "a.mp4", "text": "a cat", "num_frames": 60, "height": 144, "width": 256}
BUCKETS = (("144p", 17, 1.0, 2),)


def open_table(folder, *tables, **settings):
  config = DataConfig(tables=tables, buckets=BUCKETS, **settings)
  config.validate()
  return sources.open_table(config, str(folder / "cache"))


def table_of(tmp_path, rows, **settings):
  return open_table(tmp_path, files.write_csv(tmp_path / "t.csv", rows), **settings)


def problems(table):
  return [sources.PROBLEMS[c] for c in table.column("problem")]


def test_row_of_every_format(tmp_path):
  rows = [
    {**BASE, "fps": 24.0, "aes": 5.5, "cmotion": "static"},
    {**BASE, "path": "/b.png", "num_frames": 1, "fps": None, "aes": None, "cmotion": None},
  ]
  files.write_csv(tmp_path / "t.csv", [{k: "" if v is None else v for k, v in r.items()} for r in rows])
  pa_parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
  (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  for suffix in sources.FORMATS:
    table = open_table(tmp_path, str(tmp_path / ("t" + suffix)))
    assert len(table) == 2
    first, second = table.row(0), table.row(1)
    assert first == sources.Row(
      str(tmp_path / "a.mp4"), ("a cat",), 60, 144, 256, 24.0, 0, None, {"aes": 5.5, "cmotion": "static"}, None
    )
    assert (second.path, second.num_frames, second.fps, second.scores) == ("/b.png", 1, None, {})


def test_ranges_and_crops(tmp_path):
  rows = [
    {**BASE, "start": 10, "end": 40, "crop": "16,0,144,144"},
    {**BASE, "start": 20, "end": "", "crop": "[0, 8, 100, 120]"},
    {**BASE, "num_frames": 30, "start": 100, "end": 130, "crop": ""},  # num_frames counts the range
    {**BASE, "start": 10, "end": 61, "crop": ""},
    {**BASE, "start": 10, "end": 10, "crop": ""},
    {**BASE, "start": "", "end": "", "crop": "200,0,57,144"},
    {**BASE, "start": "", "end": "", "crop": "left half"},
  ]
  table = table_of(tmp_path, rows)
  row = table.row(0)
  assert (row.start, row.num_frames, row.height, row.width, row.crop) == (10, 30, 144, 144, (16, 0, 144, 144))
  row = table.row(1)
  assert (row.start, row.num_frames, row.height, row.width, row.crop) == (20, 40, 120, 100, (0, 8, 100, 120))
  assert (table.row(2).start, table.row(2).num_frames) == (100, 30)
  assert problems(table) == ["", "", ""] + [sources.PROBLEMS[4]] * 2 + [sources.PROBLEMS[5]] * 2
  listed = pa.Table.from_pylist([{**BASE, "crop": [16, 0, 144, 144]}, {**BASE, "crop": None}])
  pa_parquet.write_table(listed, tmp_path / "t.parquet")
  table = open_table(tmp_path, str(tmp_path / "t.parquet"))
  assert [table.row(i).crop for i in range(2)] == [(16, 0, 144, 144), None]


def test_several_captions(tmp_path):
  table = table_of(tmp_path, [{**BASE, "text_2": "another", "text_3": ""}, {**BASE, "text_2": "", "text_3": " third "}])
  assert [table.row(i).captions for i in range(2)] == [("a cat", "another"), ("a cat", "third")]
  pa_parquet.write_table(
    pa.Table.from_pylist([{**BASE, "text": ["one", "", "two"]}, {**BASE, "text": []}]), tmp_path / "t.parquet"
  )
  table = open_table(tmp_path, str(tmp_path / "t.parquet"))
  assert [table.row(i).captions for i in range(2)] == [("one", "two"), ()]
  assert problems(table) == ["", "caption is empty"]


def test_bad_cells_are_counted(tmp_path):
  rows = [BASE, {**BASE, "num_frames": "many"}, {**BASE, "num_frames": 0}, {**BASE, "height": "nan"}, {**BASE, "text": "  "}]
  rows += [{**BASE, "text": "x" * 200}, {**BASE, "path": ""}, {**BASE, "num_frames": "60.0", "text": 'two\nlines, "quoted" é'}]
  path = files.write_csv(tmp_path / "t.csv", rows)
  with open(path, "ab") as f:
    f.write(b"a.mp4,caf\xe9,60,144,256\r\n")
  table = open_table(tmp_path, path, max_caption_length=100)
  p = sources.PROBLEMS
  assert problems(table) == ["", p[2], p[2], p[3], p[7], p[8], p[1], "", p[6]]
  assert table.row(7).captions == ('two\nlines, "quoted" é',)
  assert table.problem_examples()[p[2]].endswith("t.csv row 2 (a.mp4)")
  assert problems(open_table(tmp_path, path, captions="optional"))[4] == ""


def test_one_odd_cell_does_not_change_other_cells(tmp_path):
  """Each cell is parsed alone: a text in the last of 70,001 rows does not turn the other numbers into texts."""
  rows = [BASE] * 70_000 + [{**BASE, "width": "wide"}]
  table = table_of(tmp_path, rows)
  assert (table.column("width")[:-1] == 256).all()
  assert problems(table)[-1] == sources.PROBLEMS[3]


def test_labels_are_problems_only_where_they_are_needed(tmp_path):
  cells = ["0", "4", "5", "-1", "1.5", "two", ""]
  path = files.write_csv(tmp_path / "t.csv", [{**BASE, "label": cell} for cell in cells])
  table = open_table(tmp_path, path)
  assert [table.row(i).label for i in range(7)] == [0, 4, 5, None, None, None, None]
  assert problems(table) == [""] * 7
  assert problems(open_table(tmp_path, path, num_classes=5)) == ["", ""] + [sources.PROBLEMS[9]] * 5
  with pytest.raises(ValueError, match="no column 'label'"):
    open_table(tmp_path, files.write_csv(tmp_path / "none.csv", [BASE]), num_classes=5)


def test_rows_with_huge_captions_are_unusable(tmp_path):
  table = table_of(tmp_path, [BASE, {**BASE, "text": "long " * 1_000_000}, BASE])
  assert problems(table) == ["", "caption is too long", ""]


def test_weights(tmp_path):
  a = files.write_csv(tmp_path / "a.csv", [BASE] * 4)
  b = files.write_csv(tmp_path / "b.csv", [{**BASE, "path": "b.mp4"}] * 400)
  table = open_table(tmp_path, (a, 2.5), (b, 0.25))
  assert len(table) == 12 + 400
  assert [table.locate(i) for i in (0, 3, 4, 11, 12, 411)] == [(0, 0), (0, 3), (0, 0), (0, 3), (1, 0), (1, 399)]
  assert table.row(12).path.endswith("b.mp4")
  left_out = table.left_out((1,), 0)
  assert not left_out[:8].any()
  assert 250 < left_out[12:].sum() < 350
  np.testing.assert_array_equal(left_out, table.left_out((1,), 0))
  assert (left_out != table.left_out((1,), 1)).any()


def test_the_fingerprint_is_of_the_contents(tmp_path):
  tables = []
  for name in ("one", "two", "three"):
    (tmp_path / name).mkdir()
    row = BASE if name != "three" else {**BASE, "text": "a dog"}
    tables.append(open_table(tmp_path, files.write_csv(tmp_path / name / "t.csv", [row])))
  one, two, three = (table.parts[0].fingerprint for table in tables)
  assert one == two != three
  # The same contents share one Arrow file, and paths still belong to each table's own folder.
  assert tables[1].row(0).path == str(tmp_path / "two" / "a.mp4")


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    ([{"path": "a.mp4", "text": "x"}], "no column 'num_frames', 'height', 'width'.*python -m data.prepare table .*t.csv"),
    ([{k: v for k, v in BASE.items() if k != "text"}], "no column 'text' .it has 'path'"),
    ([{"file": "a.mp4", **{k: v for k, v in BASE.items() if k != "path"}}], "no column 'path'"),
  ],
)
def test_missing_columns(tmp_path, rows, message):
  with pytest.raises(ValueError, match=message) as error:
    table_of(tmp_path, rows)
  assert "\n" not in str(error.value)


def test_bad_tables(tmp_path):
  (tmp_path / "short.csv").write_text("path,text,num_frames,height,width\na.mp4,cat,60,144\n")
  (tmp_path / "empty.csv").write_text("path,text,num_frames,height,width\n")
  (tmp_path / "no.parquet").write_text("hello")
  (tmp_path / "t.xls").write_text("hello")
  mistakes = {
    "short.csv": "cannot be read: CSV parse error: Expected 5 columns, got 4",
    "empty.csv": "(has no rows|cannot be read: Empty CSV)",
    "no.parquet": "cannot be read",
    "t.xls": "must end in .parquet, .csv, .jsonl",
    "missing.csv": "does not exist",
  }
  for name, message in mistakes.items():
    with pytest.raises(ValueError, match=message) as error:
      open_table(tmp_path, str(tmp_path / name))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").glob("*.tmp")) if (tmp_path / "cache").exists() else True


def test_config_mistakes():
  good = {"tables": ("a.csv",), "buckets": BUCKETS}
  DataConfig.create(good)
  for change, message in (
    ({"num_classes": 10}, "unknown data key 'num_classes'"),
    ({"bukets": ()}, "unknown data key 'bukets', did you mean 'buckets'"),
    ({"resize": "nearest"}, "data.resize = 'nearest' is none of 'area', 'original'"),
    ({"workers": -1}, "data.workers = -1 is no whole number from 0 up"),
    ({"max_bad_rows": 1.5}, "data.max_bad_rows = 1.5"),
    ({"tables": ()}, "data.tables needs at least one table"),
    ({"tables": (("a.csv", 0),)}, "weight above 0"),
    ({"buckets": ()}, "bucket table is empty"),
    ({"scores": ("aesthetic",)}, "none of aes, flow, cmotion"),
    ({"fps_rule": "2.0"}, "data.fps_rule"),
  ):
    with pytest.raises(ValueError, match=message):
      DataConfig.create({**good, **change})
