"""Fills the columns path, num_frames, height, width, fps of a metadata table by looking into the files.

  python -m data.probe FOLDER -o table.csv       # lists all videos and images below a folder
  python -m data.probe TABLE [-o out.parquet]    # fills the columns of a table, in place unless -o names another

Files that cannot be used are listed on stderr and left out of the result; all other columns of a table are kept.
"""

import argparse
import csv
import os
import sys
from concurrent import futures

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from data import paths, sources, video


def main(argv=None):
  parser = argparse.ArgumentParser(
    prog="python -m data.probe", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("source", help="a folder, or a table (.csv, .parquet, .jsonl) with a column `path`")
  parser.add_argument("-o", "--output", help="table to write (.csv or .parquet)")
  parser.add_argument("--decode", action="store_true", help="decode every frame (slow, finds damage in the middle of files)")
  parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
  args = parser.parse_args(argv)
  try:
    good, bad = probe_source(args.source, args.output, decode=args.decode, workers=args.workers)
  except ValueError as e:
    print(f"error: {e}", file=sys.stderr)
    return 2
  print(f"{good} files probed, {bad} left out")
  return 0


def probe_source(source, output=None, *, decode=False, workers=1):
  """Probes a folder or table and writes the table -> (rows written, files left out); these are listed on stderr."""
  if paths.is_folder(source):
    output = output or paths.join(source, "table.csv")
    folder = os.path.dirname(paths.absolute(output))
    extensions = video.VIDEO_EXTENSIONS + video.IMAGE_EXTENSIONS
    files = [paths.absolute(p) for p in paths.files_below(source) if p.lower().endswith(extensions)]
    if not files:
      raise ValueError(f"folder {source} has no file that ends in {' '.join(extensions)}")
    # Between a disk and a bucket there is no relative path.
    near = paths.is_remote(source) == paths.is_remote(folder)
    rows = [{"path": os.path.relpath(p, folder) if near else p} for p in files]
  else:
    output = output or source
    folder = os.path.dirname(paths.absolute(source))
    rows = _rows(source)
    if os.path.dirname(paths.absolute(output)) != folder:  # relative paths must stay right beside the new table
      rows = [{**r, "path": sources.resolve(r["path"], folder)} for r in rows]
  if not output.endswith((".csv", ".parquet")):
    raise ValueError(f"{output}: the output's name must end in .csv or .parquet")
  found = _probe_all([sources.resolve(r["path"], folder) for r in rows], decode, workers)
  infos = [info or video.VideoInfo(1, 1, 1, 1.0) for info, _ in found]
  cuts = {k: [r.get(k) for r in rows] for k in ("start", "end", "crop") if k in rows[0]}
  misfits = sources.check_cuts(cuts, *([getattr(i, k) for i in infos] for k in sources.PROBED))
  good, bad = [], 0
  for row, info, (_, error), misfit in zip(rows, infos, found, misfits):
    if error or misfit:
      bad += 1
      print(f"left out {row['path']}: {error or misfit}", file=sys.stderr)
    else:
      good.append({**row, "num_frames": info.num_frames, "height": info.height, "width": info.width, "fps": info.fps})
  if not good:
    raise ValueError(f"none of {len(rows)} files of {source} can be used")
  _write(good, output)
  return len(good), bad


def _rows(source):
  sources.check_table(source)
  try:
    batches = list(sources.read_table(source, needed=("path",)))
  except pa.ArrowException as e:
    raise ValueError(f"table {source} cannot be read: {str(e).splitlines()[0]}") from None
  rows = [row for batch in batches for row in batch.to_pylist()]
  if not rows:
    raise ValueError(f"table {source} has no rows")
  rows = [{k: v.decode(errors="replace") if isinstance(v, bytes) else v for k, v in row.items()} for row in rows]
  return [{**row, "path": row["path"] or ""} for row in rows]


def _probe_all(paths, decode, workers):
  """(info, "") or (None, reason) for each path, in order; a decoder that crashes costs its own process only."""
  if workers <= 1 or len(paths) < 8:
    return [_probe_one(p, decode) for p in paths]
  import multiprocessing

  with futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
    return list(pool.map(_probe_one, paths, [decode] * len(paths), chunksize=4))


def _probe_one(path, decode):
  try:
    return video.probe(path, decode=decode), ""
  except video.BadVideo as e:
    return None, str(e)


def _write(rows, output):
  names = list(dict.fromkeys(k for row in rows for k in row))
  with paths.whole(output) as temporary:
    if output.endswith(".csv"):
      with open(temporary, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
    else:
      pa.parquet.write_table(pa.Table.from_pylist(rows), temporary)


if __name__ == "__main__":
  sys.exit(main())
