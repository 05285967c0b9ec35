"""Measures decoding: 51-frame 240p clips from a film, with one seek, `area` resize and crop each, in worker processes.

  python tests/benchmarks/decode.py FILM.mp4 [clips] [workers]

Required: at least 300 frames per second with two workers on the 720p film Big Buck Bunny. The measurement begins
after the start of the workers. Clip positions are random, with a fixed seed. The program also measures one process in each
resize mode.
"""

import multiprocessing
import os
import pathlib
import random
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from data import video

FRAMES, SIZE = 51, (240, 426)


def read(job):
  """Returns (frames, seconds of processor time)."""
  path, begin, resize = job
  start = time.process_time()
  return len(video.read_clip(path, begin, FRAMES, size=SIZE, resize=resize)), time.process_time() - start


def main(film, clips=60, workers=2):
  info = video.probe(film)
  rng = random.Random(0)
  jobs = [(film, rng.randrange(info.num_frames - FRAMES), "area") for _ in range(clips)]
  print(f"{film}: {info.num_frames} frames of {info.width} x {info.height}")
  print(
    f"{clips} clips of {FRAMES} frames at {SIZE[1]} x {SIZE[0]}; load before: {os.getloadavg()[0]:.1f}, cores: {os.cpu_count()}"
  )
  print(f"{'':24}{'frames/s':>10}{'clips/s':>9}{'per cpu second':>16}")
  context = multiprocessing.get_context("spawn")
  with context.Pool(workers) as pool:
    pool.map(read, jobs[:workers] * 2, chunksize=1)  # for the imports and the film's index
    start = time.perf_counter()
    results = list(pool.imap_unordered(read, jobs))
    seconds = time.perf_counter() - start
  show(f"area, {workers} workers", results, seconds, "at least 300 frames/s are required")
  for resize in video.RESIZE_MODES:
    start = time.perf_counter()
    results = [read((film, begin, resize)) for _, begin, _ in jobs[: clips // 4]]
    show(f"{resize}, this process", results, time.perf_counter() - start)


def show(name, results, seconds, note=""):
  frames, cpu = sum(r[0] for r in results), sum(r[1] for r in results)
  print(f"{name:24}{frames / seconds:10.0f}{len(results) / seconds:9.1f}{frames / cpu:16.0f}   {note}")


if __name__ == "__main__":
  main(sys.argv[1], *map(int, sys.argv[2:]))
