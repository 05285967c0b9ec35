"""Measures time and the largest resident memory of filtering, exporting and previewing the buckets of ten million rows.

python tests/benchmarks/prepare_tables.py [--rows 10_000_000] [--shards 100] [--folder /tmp/tables]
"""

import argparse
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np
import polars as pl


def make(folder, rows, shards):
  """Writes shards with the columns of a pipeline, and captions of 150 characters."""
  for i in range(shards):
    target = folder / f"part-{i:05}.parquet"
    if target.exists():
      continue
    n, rng = rows // shards, np.random.default_rng(i)
    height = rng.choice([360, 480, 720, 1080], n)
    words = rng.choice(["meadow", "rabbit", "bird", "river", "city"], (n, 3))
    pl.DataFrame({
      "path": [f"/data/clips/{i:05}/{k:08}.mp4" for k in range(n)], "id": [f"{k * shards + i:016x}" for k in range(n)],
      "text": [f"A {a} and a {b} beside a {c} " + "in the soft light of a long summer evening " * 3 for a, b, c in words],
      "num_frames": rng.integers(24, 500, n), "height": height, "width": height * 16 // 9,
      "fps": rng.choice([24.0, 30.0, 60.0], n),
      "aes": rng.normal(5, 0.7, n), "flow": rng.exponential(2.0, n),
      "cmotion": rng.choice(["static", "pan_left", "zoom_in"], n),
      "error": pl.Series([None] * n, dtype=pl.String), "retry": [False] * n,
    }).write_parquet(target)  # fmt: skip


def run(name, command):
  begin = time.monotonic()
  child = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
  output = child.communicate()[0]
  seconds = time.monotonic() - begin
  peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # of the largest child so far
  print(f"{name:<40} {seconds:>8.1f} {peak:>8.2f}", flush=True)
  assert child.returncode == 0, output
  return output


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rows", type=int, default=10_000_000)
  parser.add_argument("--shards", type=int, default=100)
  parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("/tmp/prepare-tables"))
  args = parser.parse_args()
  shards = args.folder / f"in-{args.rows}-{args.shards}"
  shards.mkdir(parents=True, exist_ok=True)
  make(shards, args.rows, args.shards)
  out = args.folder / f"out-{time.time_ns()}"
  print(f"{args.rows:,} rows in {args.shards} shards, {sum(p.stat().st_size for p in shards.iterdir()) / 2**20:.0f} MB")
  print(f"{'':<40} {'seconds':>8} {'peak GB':>8}")
  where = "--where=('flow >= 0.5', 'aes >= 4.5', 'fps <= 30 or fps is null', 'num_frames >= 51', 'height >= 480')"
  run("filter, 5 conditions, write shards", ["-m", "data.prepare", "filter", str(shards), "-o", str(out), where])
  run("export as one table", ["-m", "data.prepare", "export", str(out), "-o", str(out / "e"), f"--folder={out}"])
  preview = [
    "-m",
    "data.prepare",
    "check",
    str(out / "table.parquet"),
    "--config",
    "configs/open_sora_1_2.py",
    "--buckets-only",
    "--stage",
    "stage1",
  ]
  run("bucket preview of the kept rows", preview)
  run("export all as one table", ["-m", "data.prepare", "export", str(shards), "-o", str(out / "f"), f"--folder={out / 'f'}"])
  preview[3] = str(out / "f" / "table.parquet")
  run("bucket preview of all rows", preview)


if __name__ == "__main__":
  main()
