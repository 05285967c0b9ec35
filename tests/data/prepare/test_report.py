"""The report as a parsed page, and `check` on tables with broken files."""

import csv
import html.parser
import re

import numpy as np
import polars as pl
import pytest
from PIL import Image

from data.prepare import __main__ as main
from data.prepare import config as configs
from data.prepare import report
from tests.data.prepare.videos import two_scenes, write_video

TRAINING = """
def get_config():
  return dict(data=dict(buckets=(("144p", 8, 1.0, 2), ("144p", 1, 1.0, 1)), frame_interval=1, drop_last=False), stages=(
    dict(name="short", steps=1), dict(name="long", steps=1, **{"data.buckets": (("144p", 30, 0.5, 2),)}),
    dict(name="again", steps=1)))
"""


class Page(html.parser.HTMLParser):
  """Texts, tags and addresses of a page."""

  def __init__(self, text):
    super().__init__()
    self.texts, self.tags, self.addresses = [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    self.addresses += [v for k, v in attributes if k in ("src", "href", "action", "srcset", "data")]

  def handle_data(self, data):
    self.texts += [data.strip()] if data.strip() else []


@pytest.fixture(scope="module")
def table(tmp_path_factory):
  """Eight clips, one of them broken, one with a hostile caption."""
  folder = tmp_path_factory.mktemp("report")
  (folder / "training.py").write_text(TRAINING)
  rows = []
  for i in range(8):
    images = [np.repeat(np.repeat(image, 2, 0), 2, 1) for image in two_scenes(20 if i < 4 else 40, 0, seeds=(i, i))]
    path = write_video(folder / f"{i}.mp4", images)
    rows.append({"path": str(path), "text": f"Clip {i}." if i else "<script>alert(1)</script> & co", "num_frames": len(images),
                 "height": 144, "width": 256, "fps": 24.0, "duration": len(images) / 24, "flow": float(i), "sharpness": None,
                 "text_area": i / 10, "cmotion": "static", "error": None, "retry": False})  # fmt: skip
  content = (folder / "3.mp4").read_bytes()
  (folder / "3.mp4").write_bytes(content[: len(content) // 2])
  rows.append({**rows[1], "path": "/x/<b>.mp4", "error": "probe: not a video", "flow": None})
  pl.DataFrame(rows, schema_overrides={"sharpness": pl.Float64, "error": pl.String}).write_parquet(folder / "t.parquet")
  return folder


def test_the_report_shows_the_table(table, tmp_path, capsys):
  target = tmp_path / "r.html"
  command = ["report", str(table / "t.parquet"), "-o", str(target), "--config", str(table / "training.py"), "--workers", "1"]
  assert main.main(command) == 0
  text = target.read_text()
  page = Page(text)
  assert all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)
  assert "script" not in page.tags
  assert "http" not in text.replace("http-equiv", "")
  assert "9 rows, 1 of them failed; 0.00278 hours" in " ".join(page.texts)
  assert "<script>alert(1)</script> & co" in page.texts
  for wanted in ("motion (optical flow)", "share of text", "short", "long", "144p x 8", "144p x 30", "probe: not a video"):
    assert wanted in page.texts
  assert "again" not in page.texts  # the same data as "short"
  assert "sharpness" not in page.texts  # has no value
  # Best, worst and random clips of the two existing scores. The broken clip has a name and no image.
  assert page.texts.count("best") == page.texts.count("worst") == page.texts.count("random") == 2
  assert "can't be read" in page.texts
  motion = text[text.index("motion (optical flow)</h3>", text.index("Contact sheets")) :]
  assert motion.index("7.mp4") < motion.index("6.mp4") < motion.index("worst")


def test_the_report_shows_rows_before_the_filter(table, tmp_path):
  """Scores, failures and clips of all rows, although the run's table has only the selected ones."""
  values = dict(
    output=str(tmp_path), steps=("collect", "probe", "filter", "caption", "report"), workers=1,
    collect=dict(sources=(str(table / "t.parquet"),), rows_per_shard=5), probe=dict(picture_hash=False),
    filter=dict(where=dict(moves="flow >= 4")), caption=dict(backend="existing", name=True),
  )  # fmt: skip
  configs.chain(values).run()
  page = Page((tmp_path / "report.html").read_text())
  text = " ".join(page.texts)
  assert "9 rows, 2 of them failed; 4 are kept; 0.00185 hours" in text
  steps = text[text.index("work") : text.index("Failures")].split()
  assert steps[steps.index("filter") :][:5] == ["filter", "9", "4", "0", "0"]
  # Per condition: the rows that it removes, and those that it alone removes. `moves` removes 0 to 3 and the row without a
  # value. Two of these five rows also have an error.
  assert re.search(r" no error +2 +0\n +moves +5 +3\n +together +5 of 9 ", text)
  assert "probe: not a video, or damaged" in text
  assert "/x/<b>.mp4 by the next run" in text
  motion = text[text.index("motion (optical flow) flow") :]
  assert sum(map(int, re.findall(r"from [\d.]+ to [\d.]+: (\d+) rows", motion[: motion.index("mean")]))) == 7
  assert "mean 3.57, 0 to 7" in motion
  sheets = text[text.index("Contact sheets") :]
  assert re.search(r"worst 0 0\.mp4 .* 1 1\.mp4 Clip 1\. 2 2\.mp4", sheets)
  assert "best 7 7.mp4 7 6 6.mp4 6" in sheets  # with the captions that they got after the filter


def test_histograms_and_thresholds():
  values = np.random.default_rng(0).exponential(2.0, 20_000)
  table = pl.DataFrame({"flow": [*values, None, float("nan")], "text_area": [*values / 20, None, None]}).lazy()
  found = report.measure(table, "flow")
  assert (found["count"], found["missing"], found["sign"]) == (20_000, 2, ">=")
  assert sum(b["count"] for b in found["bars"]) == 20_000
  assert max(b["h"] for b in found["bars"]) == 100
  for cut, share in zip(found["cuts"], report._THRESHOLDS, strict=True):
    assert (values < cut["value"]).mean() == pytest.approx(cut["share"], abs=0.0002) == pytest.approx(share, abs=0.0002)
  low_is_good = report.measure(table, "text_area")
  assert low_is_good["sign"] == "<="
  for cut in low_is_good["cuts"]:
    assert (values / 20 > cut["value"]).mean() == pytest.approx(cut["share"], abs=0.0002)
  # A value that many rows share gives only one threshold. A threshold also removes the rows without a value.
  cuts = lambda *values, name: [tuple(c.values()) for c in report.measure(pl.DataFrame({name: values}).lazy(), name)["cuts"]]  # noqa: E731
  assert cuts(24.0, 24.0, 24.0, name="fps") == [(0.0, 24.0)]
  assert cuts(*[0.0] * 90, *[0.5] * 10, name="black") == [(0.0, 0.5), (pytest.approx(0.1), 0.0)]
  assert cuts(*[24.0] * 75, *[None] * 25, name="fps") == [(0.25, 24.0)]
  assert report.measure(pl.DataFrame({"flow": [None]}).lazy(), "flow") is None
  assert len(report.measure(pl.DataFrame({"fps": [24.0] * 3}).lazy(), "fps")["bars"]) == 40


def test_the_report_shows_numbers_of_other_scorers(tmp_path):
  """And images, copies, frequent words, and failures grouped by reason."""
  rows = []
  for i in range(6):
    Image.fromarray(two_scenes(1, 0, seeds=(i, i))[0]).save(tmp_path / f"{i}.png")
    text = f"A rabbit sits{' quietly' * (i > 2)}, number {i}."
    rows.append({"path": str(tmp_path / f"{i}.png"), "text": text, "num_frames": 1, "height": 72,
                 "width": 128, "my_score": i / 10, "brightness": 9.0 * i, "error": None})  # fmt: skip
  for i in range(3):
    rows += [{"path": f"/c/{i}.mp4", "error": f"duplicates: the same content as /a b/{'x' * i}.mp4"},
             {"path": f"/d/{i}.mp4", "error": f"caption: its caption file of {'x' * i} a.txt is empty"}]  # fmt: skip
  pl.DataFrame(rows, schema_overrides={"error": pl.String}).write_parquet(tmp_path / "t.parquet")
  command = ["report", str(tmp_path / "t.parquet"), "-o", str(tmp_path / "r.html"), "--workers=1"]
  assert main.main(command) == 0
  page = Page((tmp_path / "r.html").read_text())
  text = " ".join(page.texts)
  assert "12 rows, 3 of them failed, 3 of them copies" in text
  assert "duplicates: the same content as ... 3 /c/0.mp4" in text
  assert "caption: its caption file ... is empty 3 /d/0.mp4" in text
  sheets = page.texts[page.texts.index("Contact sheets") :]
  assert [t for t in sheets if t in ("my score", "brightness", "highest", "lowest")] == [
    "brightness",
    "highest",
    "lowest",
    "my score",
    "highest",
    "lowest",
  ]
  assert sheets[sheets.index("my score") :][1:3] == ["highest", "0.5"]
  assert "frequent words captions that have them number 6 rabbit 6 sits 6 quietly 3" in text
  pl.DataFrame({"path": ["/a.mp4"], "flow": [1.0]}).write_parquet(tmp_path / "t.parquet")
  assert main.main(command) == 0


def test_check_finds_clips_that_the_loader_can_not_read(table, tmp_path, capsys):
  pl.read_parquet(table / "t.parquet").filter(pl.col("error").is_null()).write_parquet(table / "fine.parquet")
  command = ["check", str(table / "fine.parquet"), "--config", str(table / "training.py"), "--workers", "1"]
  assert main.main([*command, "--bad", str(tmp_path / "bad.csv")]) == 1
  printed = capsys.readouterr().out
  assert "short: 8 clips read, 1 broken" in printed
  assert "long: 4 clips read, 0 broken" in printed
  assert "row 4: " in printed
  with open(tmp_path / "bad.csv", newline="") as f:
    (row,) = csv.DictReader(f)
  assert row["row"] == "4"
  assert row["path"].endswith("3.mp4")
  assert main.main([*command, "--buckets-only"]) == 0
  good = pl.read_parquet(table / "fine.parquet").filter(~pl.col("path").str.ends_with("3.mp4"))
  good.write_parquet(table / "good.parquet")
  assert main.main([*command[:1], str(table / "good.parquet"), *command[2:], "--sample", "3"]) == 0
  assert "short: 3 clips read, 0 broken" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("table_name", "config", "message"),
  [
    ("nothing.parquet", "training.py", "does not exist"),
    ("fine.parquet", "nothing.py", "no such file"),
    ("fine.parquet", "t.parquet", "cannot contain null bytes"),
  ],
)
def test_errors_are_one_line(table, capsys, table_name, config, message):
  assert main.main(["check", str(table / table_name), "--config", str(table / config)]) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count("\n") == 1


def test_inputs_are_not_overwritten(table, tmp_path, capsys):
  (tmp_path / "t.parquet").write_bytes((table / "t.parquet").read_bytes())
  (tmp_path / "link.parquet").symlink_to(tmp_path / "t.parquet")
  for command in (["report", "-o"], ["check", f"--config={table / 'training.py'}", "--bad"]):
    arguments = [*command, str(tmp_path / "link.parquet"), str(tmp_path / "t.parquet")]
    assert main.main([*arguments, "--workers=1"]) == 2
    assert "is an input of this command: give another name" in capsys.readouterr().err
  assert (tmp_path / "t.parquet").read_bytes() == (table / "t.parquet").read_bytes()


def test_the_report_follows_the_training_config(table, tmp_path):
  """Its content counts, not only its name."""
  (tmp_path / "training.py").write_text(TRAINING)
  values = dict(
    output=str(tmp_path / "out"), steps=("collect", "report"), workers=1, collect=dict(sources=(str(table / "t.parquet"),)),
    report=dict(training=str(tmp_path / "training.py"), sheets=False),
  )  # fmt: skip
  pages = []
  for text in (TRAINING, TRAINING + "# another comment", TRAINING.replace('"144p", 8', '"144p", 16')):
    (tmp_path / "training.py").write_text(text)
    configs.chain(values).run()
    pages.append(((tmp_path / "out" / "report.html").stat().st_mtime_ns, (tmp_path / "out" / "report.html").read_text()))
  assert pages[0] == pages[1]
  assert "144p x 16" in pages[2][1]
