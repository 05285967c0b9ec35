"""Measures time and peak memory of the bucket assignment and the whole plan of millions of rows.

  python -m tests.benchmarks.bucket_assignment [rows]

The table is synthetic, with sizes and lengths of common video collections. The buckets are stages 1 to 3 of Open-Sora 1.2.
Required: 10 million rows in at most 20 s and 4 GB. The program prints one line per bucket table. The last line has the time of
an epoch's plan (assignment, shuffle, steps, files), and of opening the Parquet file, which happens once.
"""

import json
import pathlib
import resource
import sys
import tempfile
import time

import numpy as np
import polars as pl

from configs import open_sora_1_2
from data import buckets, plan, sources
from data.config import DataConfig


def table(rows, seed=0):
  """(num_frames, height, width), int32 [rows]. A third are images, the clips have 8 to 1500 frames and common or odd sizes."""
  rng = np.random.default_rng(seed)
  frames = np.where(rng.random(rows) < 1 / 3, 1, rng.integers(8, 1500, rows)).astype(np.int32)
  common = np.array([(240, 426), (360, 640), (480, 854), (720, 1280), (1080, 1920), (2160, 3840), (1920, 1080), (512, 512)])
  sizes = common[rng.integers(0, len(common), rows)].astype(np.int32)
  odd = rng.random(rows) < 0.3
  sizes[odd] = rng.integers(100, 2400, (odd.sum(), 2))
  return frames, sizes[:, 0].copy(), sizes[:, 1].copy()


def main(rows=10_000_000):
  golden = json.loads((pathlib.Path(__file__).parents[1] / "reference" / "open_sora" / "buckets_v12.json").read_text())
  frames, height, width = table(rows)
  print(f"{'bucket table':16}{'buckets':>8}{'rows':>12}{'seconds':>9}{'cpu s':>8}{'in a bucket':>13}{'peak GB':>9}")
  worst = 0
  for name, config in golden["configs"].items():
    entries = {
      r: {int(f): (tuple(p) if isinstance(p, list) else p, b) for f, (p, b) in e.items()}
      for r, e in config["bucket_config"].items()
    }
    parsed = buckets.parse_buckets(entries)
    start, cpu = time.perf_counter(), time.process_time()
    bucket, _, _, _ = buckets.assign(frames, height, width, (42, 0, 0), parsed, 1)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    worst = max(worst, seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name:16}{len(parsed):8}{rows:12,}{seconds:9.2f}{cpu:8.2f}{(bucket >= 0).mean():12.1%}{peak:9.2f}")
  print(f"worst {worst:.1f} s (at most 20 s and 4 GB are allowed for 10,000,000 rows)")
  with tempfile.TemporaryDirectory() as folder:
    whole_plan(pathlib.Path(folder), frames, height, width)


def whole_plan(folder, frames, height, width):
  """Opens the same rows as a Parquet file, and plans the first epoch of stage 1 of Open-Sora 1.2."""
  names = pl.Series("path", np.arange(len(frames))).cast(pl.String)
  columns = {"num_frames": frames, "height": height, "width": width}
  pl.DataFrame({"path": "clips/" + names + ".mp4", "text": "caption " + names, **columns}).write_parquet(folder / "t.parquet")
  data = next(s for s in open_sora_1_2.get_config().stages if s["name"] == "stage1")["data.buckets"]
  config = DataConfig(tables=((str(folder / "t.parquet"), 1),), buckets=data)
  times = [time.perf_counter()]
  table = sources.open_table(config, str(folder / "data"))
  times.append(time.perf_counter())
  steps = plan.PlanSequence(table, config, str(folder / "data")).plan(0).num_steps
  times.append(time.perf_counter())
  opened, planned = np.diff(times)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  print(f"whole plan: {planned:.1f} s, {steps:,} steps; the table opened in {opened:.1f} s; peak {peak:.2f} GB")


if __name__ == "__main__":
  main(*map(int, sys.argv[1:]))
