"""Bucket assignment of millions of rows: seconds and peak memory. `python -m tests.benchmarks.bucket_assignment [rows]`.

The table is synthetic (sizes and lengths of common video collections), the buckets are stages 1 to 3 of Open-Sora 1.2.
Required (issue 2): 10 million rows in at most 20 s and 4 GB. Prints one line per bucket table.
"""

import json
import pathlib
import resource
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from data import buckets


def table(rows, seed=0):
  """num_frames, height, width int32 [rows]: a third images, clips of 8 to 1500 frames, common and odd sizes."""
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
    bucket, _, _, _ = buckets.assign(frames, height, width, (42, 0, 0), parsed)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    worst = max(worst, seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name:16}{len(parsed):8}{rows:12,}{seconds:9.2f}{cpu:8.2f}{(bucket >= 0).mean():12.1%}{peak:9.2f}")
  print(f"worst {worst:.1f} s (at most 20 s and 4 GB are allowed for 10,000,000 rows)")


if __name__ == "__main__":
  main(*map(int, sys.argv[1:]))
