"""The film's download and captions, and videos of the user."""

import csv
import io
import itertools
import tarfile
import zipfile

import pytest

from data import video
from data.prepare import __main__ as main
from data.prepare import film
from tests.data.prepare.videos import two_scenes, write_video


def read_table(folder, name="table.csv"):
  with open(folder / name, newline="", encoding="utf-8") as f:
    return list(csv.DictReader(f))


def test_every_tenth_scene_is_held_out_with_all_its_rows(tmp_path):
  rows = [
    {"path": f"{folder}/film_{i:03d}.{ending}", "text": f'scene {i}, "quoted"', "crop": crop}
    for i in range(23)
    for folder, ending, crop in (("clips", "mp4", ""), ("clips", "mp4", "0,0,8,8"), ("images", "png", ""))
  ]
  with open(tmp_path / "table.csv", "w", newline="", encoding="utf-8") as f:
    writer = csv.DictWriter(f, rows[0])
    writer.writeheader()
    writer.writerows(rows)
  film.hold_out(tmp_path / "table.csv")
  held_out, train = (read_table(tmp_path, f"{name}.csv") for name in ("held_out", "train"))
  assert held_out == [row for i in (4, 14) for row in rows[3 * i : 3 * i + 3]]
  assert train == [row for row in rows if row not in held_out]


def test_videos_of_the_user(tmp_path, capsys):
  folder, output = tmp_path / "mine", tmp_path / "out"
  (folder / "sub").mkdir(parents=True)
  write_video(folder / "red_ball-01.mp4", two_scenes())
  write_video(folder / "sub" / "b.mp4", two_scenes())
  write_video(folder / "c.mp4", two_scenes())
  write_video(folder / "d.mp4", two_scenes())
  (folder / "c.txt").write_text("A sidecar\ncaption.\n", encoding="utf-8")
  (folder / "d.txt").write_bytes(b"\xff\xfe\xfa")
  (folder / "captions.csv").write_text("path,text,start,focus\nsub/b.mp4,Second part.,1.7,0\n", encoding="utf-8")
  (folder / "cut.mp4").write_bytes((folder / "c.mp4").read_bytes()[:3000])
  (folder / "text.mp4").write_text("not a video")
  (folder / "empty.mp4").touch()
  command = ["--clips", str(folder), "--output", str(output), "--processes", "1"]
  assert film.main(command) == 0
  printed = capsys.readouterr().out
  for name in ("cut.mp4", "text.mp4", "empty.mp4", "d.mp4"):
    assert f"skipped {name}: " in printed
  assert "5 clips, 30 rows, 4 skipped" in printed
  rows = read_table(output)
  texts = [(r["text"], r["num_frames"]) for r in rows if r["path"].startswith("clips") and not r["crop"]]
  sidecar, second, words = "A sidecar caption.", "Second part.", "red ball 01"
  assert sorted(texts) == [(sidecar, "40"), (sidecar, "50"), (second, "50"), (words, "40"), (words, "50")]
  assert len(read_table(output, "held_out.csv")) == 6  # one scene of five
  assert len(read_table(output, "train.csv")) == 24
  assert {r["crop"] for r in rows if r["text"] == "Second part."} == {"", "0,0,72,72", "0,0,40,72"}
  for row in rows:
    info = video.probe(output / row["path"])
    found = (info.num_frames, info.height, info.width, info.fps)
    assert found == (int(row["num_frames"]), int(row["height"]), int(row["width"]), float(row["fps"]))
    if row["crop"]:
      crop = tuple(int(v) for v in row["crop"].split(","))
      assert video.read_frames(output / row["path"], [0], crop=crop).shape[1:3] == (crop[3], crop[2])

  # The second run only makes the missing files.
  before = (output / "table.csv").read_bytes()
  times = {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file()}
  missing = output / rows[0]["path"]
  missing.unlink()
  assert film.main(command) == 0
  clips = [p for p in times if p.parent.name in ("clips", "images")]
  assert {p.stem for p in clips if p.stat().st_mtime_ns != times[p]} == {missing.stem}
  assert all(p.stat().st_mtime_ns == when for p, when in times.items() if p.parent.name in ("probe", "scenes"))
  assert (output / "table.csv").read_bytes() == before
  # Other settings make new clips and keep the old files. The rows of a deleted video leave the table.
  (folder / "red_ball-01.mp4").unlink()
  assert film.main([*command, "--short-side", "64"]) == 0
  assert "short_side: 256 -> 64" in capsys.readouterr().out
  assert {r["height"] for r in read_table(output)} == {"64"}
  assert words not in {r["text"] for r in read_table(output)}
  assert missing.exists()


def test_a_folder_of_an_older_version(tmp_path, capsys):
  write_video(tmp_path / "one.mp4", two_scenes())
  command = ["--clips", str(tmp_path), "--output", str(tmp_path / "out"), "--processes", "1"]
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "table.csv").write_text("path\n")
  assert main.main(["film", *command]) == 2
  assert "was not written by this program" in capsys.readouterr().err
  (tmp_path / "out" / "scenes.json").write_text("{}")
  assert film.main(command) == 0
  assert (tmp_path / "out" / "old-table.csv").read_text() == "path\n"
  assert len(read_table(tmp_path / "out")) == 12


def test_two_processes(tmp_path, capsys):
  for name in ("one.mp4", "two.mp4"):
    write_video(tmp_path / name, two_scenes())
  assert film.main(["--clips", str(tmp_path), "--output", str(tmp_path / "out"), "--processes", "2"]) == 0
  assert "4 clips, 24 rows, 0 skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"start,words\n1,a\n", "has no column text"),
    (b"start,text\n1,a\n0.5,b\n", "line 3: every row needs a start"),
    (b"start,text\n1,  \n", "line 2: the text is empty"),
    (b"start,text,focus\n1,a,2\n", "line 2: start must be seconds >= 0 and focus lie in"),
    (b"start,text\nx,a\n", "line 2: start 'x'"),
    (b"start,text\n1,\xff\n", "is not UTF-8"),
  ],
)
def test_bad_captions(tmp_path, content, message):
  path = tmp_path / "captions.csv"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    film.read_captions(path)


def sdist_of(tmp_path, content, member=film.MEMBER):
  inner, path = io.BytesIO(), tmp_path / "package.tar.gz"
  with zipfile.ZipFile(inner, "w") as archive:
    archive.writestr(member, content)
  with tarfile.open(path, "w:gz") as archive:
    info = tarfile.TarInfo(film.ARCHIVE)
    info.size = len(inner.getvalue())
    archive.addfile(info, io.BytesIO(inner.getvalue()))
  return path


def test_hashes_are_checked(tmp_path, capsys, monkeypatch):
  sdist = sdist_of(tmp_path, b"no film")
  command = ["--output", str(tmp_path / "out"), "--sdist", str(sdist)]
  assert main.main(["film", *command]) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: source distribution")
  assert "sha256" in error
  assert error.count("\n") == 1
  monkeypatch.setattr(film, "SDIST_SHA256", film.sha256_of(sdist))
  assert main.main(["film", *command]) == 2
  assert capsys.readouterr().err.startswith("error: film ")
  assert list((tmp_path / "out" / "film").iterdir()) == []


def test_a_film_with_the_right_hash_is_kept(tmp_path, monkeypatch):
  sdist = sdist_of(tmp_path, b"a film")
  monkeypatch.setattr(film, "SDIST_SHA256", film.sha256_of(sdist))
  (tmp_path / "film").write_bytes(b"a film")
  monkeypatch.setattr(film, "FILM_SHA256", film.sha256_of(tmp_path / "film"))
  monkeypatch.setattr(film, "download_sdist", lambda folder: sdist)
  path = film.fetch_film(tmp_path / "out")
  assert path.read_bytes() == b"a film"
  monkeypatch.setattr(film, "download_sdist", lambda folder: pytest.fail("downloaded again"))
  assert film.fetch_film(tmp_path / "out") == path


def test_the_films_captions():
  captions = film.read_captions(film.CAPTIONS)
  assert len(captions) >= 60
  assert all(a.start < b.start for a, b in itertools.pairwise(captions))
  assert captions[-1].start < 596.5
  assert not any(488.67 < c.start < 580 for c in captions)  # the credits
  for caption in captions:
    assert 20 < len(caption.text.encode("utf-8")) < 300
    assert caption.text.isascii()
    assert caption.text.endswith(".")
