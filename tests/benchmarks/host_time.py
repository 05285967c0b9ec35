"""Measures what the host of a TPU spends on a training step, and how many videos a core decodes. Needs no TPU.

  python -m tests.benchmarks.host_time latents [--bucket 144p:1 ...]   host time per step from cached latents
  python -m tests.benchmarks.host_time videos [--cores 112]            clips that the cores of a host decode, and the need

The buckets are those of stage 1 of configs/open_sora_1_2.py on v5e:16x16 with the batches EQUAL of configs/batches. A host has
four chips, so it makes a 64th of each batch. The seconds of a step are computed: those of the largest batch in README.md, times
equal / largest.

`latents` writes a few distinct rows of each bucket as a cache, with captions of 100 tokens. It waits between steps until the
loader has read ahead, as if devices computed. Times are processor seconds of the main process, so that other programs on the
machine count little:

  next       until the loader returns a step; threads: of the loader's threads, which fetch and free memory
  arrays     `BatchMaker.arrays`. With `next` it is the work of the thread that makes the next batch, which must take less time
             than a step
  place      `BatchMaker.place`, in the main thread: it hands the arrays to the devices. (A CPU device copies nothing.)
  share      of `place` in the computed step. Required: at most 5 %
  rows/s     that one core of the workers reads; need: rows a second of the host

`videos` writes an mp4 of 10 s for each resolution (H.264, a key frame every 2 s, textures that move) and reads clips of it at
random places, as the loader's workers do. It also reads JPEG files. One process decodes, so the rates are of one core.
"""

import argparse
import contextlib
import ctypes
import importlib
import os
import pathlib
import re
import resource
import sys
import tempfile
import time

import av
import numpy as np

from data import aspect_ratios, latents, loader, plan, sources, video
from data.config import DataConfig
from tests.data import files

HOSTS, TOKENS, CHANNELS, LIMIT = 64, 100, 4096, 0.05
TOPOLOGY, ROOT = "v5e_16x16", pathlib.Path(__file__).parents[2]


def buckets():
  """{(resolution, frames): (rows of a host, seconds of a step)} of the batches EQUAL."""
  found = importlib.import_module(f"configs.batches.open_sora_1_2_stage1_{TOPOLOGY}")
  table = re.findall(r"^\| (\w+) x (\d+) \| [\d,]+ (?:\|[^|]*){3}\| ([\d,]+)(?: `s`)? \|[^|]*\| ([\d.]+), ", readme(), re.M)
  seconds = {(name, int(frames)): float(s) / int(largest.replace(",", "")) for name, frames, largest, s in table}
  rows = found.EQUAL["stage1"]["data.buckets"]
  return {(name, frames): (max(1, batch // HOSTS), seconds[name, frames] * batch) for name, frames, _, batch in rows}


def readme():
  text = (ROOT / "README.md").read_text()
  return text[text.index("Batch sizes of the 26 buckets of stage 1 on v6e and v5e") :].partition("</details>")[0]


# -------------------------------------------------------------------------------------------------------------- latents


def data_config(folder, key, rows, steps, **changes):
  """A table with 4 distinct rows, as often as `steps` steps need them, and its `DataConfig`."""
  height, width = aspect_ratios.size(key[0], aspect_ratios.closest_ratio(9, 16, key[0]))
  row = {"num_frames": key[1] + (key[1] > 1), "height": height, "width": width, "fps": 24}
  files.write_csv(folder / "table.csv", [{"path": f"{i}.mp4", "text": f"clip {i}", **row} for i in range(4)])
  tables = ((str(folder / "table.csv"), -(-rows * steps // 4)),)
  return DataConfig.create({"tables": tables, "buckets": ((*key, 1.0, rows),), **changes})


def write_cache(folder, config, latent_shape, dtype):
  """A cache of random latents and embeddings for the first epoch. Returns the `latents.Cache`."""
  table = sources.open_table(config, str(folder))
  plans, rng = plan.PlanSequence(table, config, str(folder)), np.random.default_rng(0)
  made_for = [{"stage": "main", "epochs": 1, "plan": latents.plan_identity(config, table)}]
  decoder = loader.RowDecoder(config, table, None)
  rows = {latents.caption_key(decoder.caption(table.row(i), 0, i)): 0 for i in range(4)}
  keys = {"latents": latents.plan_keys(plans.plan(0), table, config, 0), "text": np.array(sorted(rows))}
  for kind, channels in (("latents", latent_shape[-1]), ("text", CHANNELS)):
    features = latents.features_of(kind, channels, dtype)
    size_of = lambda keys: np.ones(len(keys))  # noqa: E731
    part = latents.prepare(str(folder / "cache"), kind, {"kind": kind}, keys[kind], made_for, size_of, 1 << 30)
    assert part is not None
    with contextlib.closing(latents.shard_writer(part, range(part.num_shards), features)) as writer:
      next(writer)
      for key in part.keys:
        draw = lambda *shape: rng.standard_normal(shape, np.float32).astype(dtype)  # noqa: E731
        if kind == "latents":
          numbers = dict.fromkeys(("table", "row", "num_frames", "height", "width", "window"), 0)
          texts = {"path": "", "resolution": "", "error": "", "fps": np.array(24.0)}
          writer.send((key, {"mean": draw(*latent_shape), "log_variance": draw(*latent_shape), **numbers, **texts}))
        else:
          writer.send((key, {"caption": "clip", "embedding": draw(TOKENS, CHANNELS)}))
    assert latents.finish(part, features)
  cached, text = (latents._sets(str(folder / "cache"), kind)[0] for kind in ("latents", "text"))
  return latents.Cache(cached, text, table, config)


def make_parts():
  """(Components of stage 1, {whether tokens are split: layout over four devices})."""
  import jax

  from configs import open_sora_1_2
  from stdit_jax.components import Components
  from stdit_jax.config import Config
  from stdit_jax.parallel.mesh import make_mesh
  from stdit_jax.parallel.shardings import Layout
  from stdit_jax.training.stages import make_stages

  (stage, *_) = make_stages(Config.of(open_sora_1_2.get_config("stage1")))
  mesh = make_mesh({"sequence": -1}, jax.devices())
  return Components.of(stage.config), {split: Layout(mesh, split_tokens=split) for split in (False, True)}


def measure_latents(args):
  os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
  os.environ["JAX_PLATFORMS"] = "cpu"
  parts, layouts = make_parts()
  keep_memory()
  print("      bucket  rows   step     next  threads   arrays    place   share   rows/s    need")
  for key, (rows, seconds) in buckets().items():
    if not args.bucket or f"{key[0]}:{key[1]}" in args.bucket:
      of_next, of_threads, of_arrays, of_place, rate = measure_bucket(args, parts, layouts[rows % 4 > 0], key, rows)
      share = of_place / seconds
      note = "" if share <= LIMIT and of_next + of_arrays < seconds else "  !"
      print(
        f"{f'{key[0]} x {key[1]}':>12} {rows:>5} {seconds:>5.2f}s {1e3 * of_next:>6.1f}ms {1e3 * of_threads:>6.1f}ms "
        f"{1e3 * of_arrays:>6.1f}ms {1e3 * of_place:>6.1f}ms "
        f"{share:>7.1%} {rate:>8,.0f} {rows / seconds:>7,.0f}{note}", flush=True
      )  # fmt: skip


def measure_bucket(args, parts, layout, key, rows):
  """(seconds of `next`, of the loader's threads, of arrays, of place, rows a second of one worker) of a bucket; medians."""
  import jax

  from stdit_jax.training.batches import denoiser_batches

  config = parts.autoencoder.config
  size = aspect_ratios.size(key[0], aspect_ratios.closest_ratio(9, 16, key[0]))
  shape = (config.latent_frames(key[1]), *config.latent_size(*size), config.latent_channels)
  with tempfile.TemporaryDirectory(dir=args.folder) as name:
    folder = pathlib.Path(name)
    data = data_config(folder, key, rows, args.steps + 4, workers=args.workers)
    cache = write_cache(folder, data, shape, args.dtype)
    times = []
    with loader.make_loader(data, str(folder), cache=cache) as steps:
      for _ in range(args.steps + 2):
        of_all = time.process_time() + wait_for_idle_workers(args.patience if times else 0)
        of_thread = time.thread_time()
        step = next(steps)
        of_thread = time.thread_time() - of_thread
        of_all = time.process_time() - of_all
        began, maker, batch = time.process_time(), denoiser_batches(parts, None, None), None
        made = None if args.loader_only else maker.arrays(step, layout)
        of_arrays = time.process_time() - began
        if made:
          batch = jax.block_until_ready(maker.place(made, step, layout))
        times.append((of_thread, of_all - of_thread, of_arrays, time.process_time() - began - of_arrays))
        del step, made, batch
    decoder = loader.RowDecoder(data, cache.table, None, cache)
    bucket = data.parsed_buckets()[0]
    ratio = aspect_ratios.closest_ratio(9, 16, key[0])
    decoder((0, 0, 0, ratio, bucket))
    began, count = time.process_time(), 0
    while time.process_time() - began < 0.5:
      decoder((0, 0, count % 4, ratio, bucket))
      count += 1
    rate = count / (time.process_time() - began)
  return *np.median(times[2:], axis=0), rate


def keep_memory():
  """Keeps freed memory, so that a virtual machine need not clear it again: only the work itself is measured."""
  library, mmap_max, trim_threshold = ctypes.CDLL(None), -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
  library.mallopt(mmap_max, 0)
  library.mallopt(trim_threshold, -1)


def wait_for_idle_workers(patience):
  """Waits until the processes of this one do almost nothing. Returns the processor seconds of this thread."""
  start, before, began = time.thread_time(), children_seconds(), time.monotonic()
  while time.monotonic() - began < patience:
    time.sleep(0.5)
    now = children_seconds()
    if now - before < 0.02:
      break
    before = now
  return time.thread_time() - start


def children_seconds():
  """Seconds of processor time of all processes below this one."""
  total, tick, own = 0, os.sysconf("SC_CLK_TCK"), os.getpid()
  for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
    with contextlib.suppress(OSError):
      fields = path.read_text().rpartition(")")[2].split()
      if int(fields[1]) == own:
        total += int(fields[11]) + int(fields[12])
  return total / tick


# --------------------------------------------------------------------------------------------------------------- videos


def write_film(path, height, width, seconds=10, rate=24):
  """Writes an H.264 film of textures that move, at the usual quality."""
  rng = np.random.default_rng(0)
  texture = rng.integers(0, 255, (height // 8 + 64, width // 8 + 64, 3), np.uint8)
  texture = np.asarray(video.Image.fromarray(texture).resize((width + 512, height + 512), video.Image.Resampling.BICUBIC))
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=rate)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.options = {"crf": "23", "preset": "medium", "g": str(2 * rate)}
    for i in range(seconds * rate):
      y, x = i * 2 % 512, i * 3 % 512
      noise = rng.integers(0, 6, (height, width, 1), np.uint8)
      image = np.minimum(texture[y : y + height, x : x + width], 249) + noise
      container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
    container.mux(stream.encode())


def measure_videos(args):
  rates = {}
  print(f"{'file':>6} {'read as':>8} {'frames/s of a core':>19}")
  with tempfile.TemporaryDirectory(dir=args.folder) as name:
    for resolution, height, width in (("144p", 144, 256), ("240p", 240, 426), ("480p", 480, 854), ("720p", 720, 1280)):
      path = os.path.join(name, f"{resolution}.mp4")
      write_film(path, height, width, args.film_seconds)
      size = aspect_ratios.size(resolution, aspect_ratios.closest_ratio(9, 16, resolution))
      for source in dict.fromkeys((path, os.path.join(name, "720p.mp4"))):
        if os.path.exists(source):
          rates[os.path.basename(source)[:-4], resolution] = decode_rate(source, size, args.film_seconds * 24)
    for resolution in ("144p", "240p", "256", "360p", "480p"):
      size = aspect_ratios.size(resolution, aspect_ratios.closest_ratio(9, 16, resolution))
      rates["720p", resolution] = decode_rate(os.path.join(name, "720p.mp4"), size, args.film_seconds * 24)
    images = {resolution: image_rate(name, resolution) for resolution, frames in buckets() if frames == 1}
  for (source, resolution), rate in rates.items():
    print(f"{source:>6} {resolution:>8} {rate:>19,.0f}")
  print(f"\nclips of 720p files, images of at least 720p; {args.cores} cores decode, the host needs:")
  print(f"{'bucket':>12} {'rows':>5} {'step':>6} {'need rows/s':>12} {'cores give':>11} {'cores needed':>13}")
  for (resolution, frames), (rows, seconds) in buckets().items():
    rate, need = rates["720p", resolution] / frames if frames > 1 else images[resolution], rows / seconds
    given = args.cores * rate
    print(f"{f'{resolution} x {frames}':>12} {rows:>5} {seconds:>5.2f}s {need:>12.1f} {given:>11.1f} {need / rate:>13.1f}")


def image_rate(folder, resolution):
  """JPEG files that a core reads a second. They have the size of the bucket, or 1280 x 720 if that is larger."""
  height, width = aspect_ratios.size(resolution, aspect_ratios.closest_ratio(9, 16, resolution))
  high, wide = max((720, 1280), (height, width))
  rng, path = np.random.default_rng(0), f"{folder}/{resolution}.jpg"
  small = video.Image.fromarray(rng.integers(0, 255, (high // 8, wide // 8, 3), np.uint8))
  small.resize((wide, high), video.Image.Resampling.BICUBIC).save(path, quality=90)
  video.read_frames(path, size=(height, width))
  began, count = time.process_time(), 0
  while time.process_time() - began < 1:
    video.read_frames(path, size=(height, width))
    count += 1
  return count / (time.process_time() - began)


def decode_rate(path, size, total, frames=51):
  """Frames of clips that a core decodes a second."""
  rng, count = np.random.default_rng(0), 0
  video.read_clip(path, 0, frames, size=size)  # the index of the file
  began = time.process_time()
  while time.process_time() - began < 3:
    video.read_clip(path, int(rng.integers(total - frames)), frames, size=size)
    count += frames
  return count / (time.process_time() - began)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("what", choices=("latents", "videos"))
  parser.add_argument("--bucket", action="append", help="only this bucket: RESOLUTION:FRAMES")
  parser.add_argument("--loader-only", action="store_true", help="without denoiser_batches")
  parser.add_argument("--steps", type=int, default=5)
  parser.add_argument("--workers", type=int, default=2)
  parser.add_argument("--dtype", default="float16", help="of the cache")
  parser.add_argument("--patience", type=float, default=30.0, help="most seconds to wait for the workers between steps")
  parser.add_argument("--cores", type=int, default=112)
  parser.add_argument("--film-seconds", type=int, default=10)
  parser.add_argument("--folder", help="for temporary files")
  args = parser.parse_args()
  {"latents": measure_latents, "videos": measure_videos}[args.what](args)
  print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB", file=sys.stderr)


if __name__ == "__main__":
  main()
