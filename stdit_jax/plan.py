"""Will it fit, and how fast could it be: compiles the training step for a TPU topology, on a machine without a TPU.

  python -m stdit_jax.plan --config configs/open_sora_1_2.py --topology v5e:16x16 [--stage stage1] [--bucket 480p:51]

For every bucket of every stage the very program that trains is lowered and compiled by the TPU's compiler (pip install
libtpu, best in an environment of its own). All figures are computed, none is measured on a device:

  batch        samples of the whole mesh; per device and micro batch; "tokens split" when a sample is spread over `sequence`
  tokens       of one sample, padding included
  GiB          peak of memory per chip against what the compiler may use: the program's own by the compiler
               (memory_analysis), and beside it what waits: average, optimizer, encoders (by their shardings)
  TFLOP        of the model, all samples: products by formula (stdit_jax/models/flops.py), three forward passes
  GB moved     by collectives, per device and step, read from the compiled program, loops counted as often as they run
  seconds      compute: FLOPs, with the forward pass that remat repeats, at the chip's published peak; memory: bytes that all
               instructions read and write, from above; interconnect: what a device sends, all-reduce twice. At the published
               peaks (stdit_jax/parallel/topology.py)
  bound, MFU   the longest of the three, if they overlap, and the model-FLOP utilisation that it allows

A result is kept in --cache and used again while configuration, topology, code and jax are the same.
"""

import argparse
import concurrent.futures
import hashlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import time

from absl import flags
from ml_collections import config_flags

from data import paths
from data.config import DataConfig
from stdit_jax.cli import one_line_errors, parse_config
from stdit_jax.parallel.topology import TPU_ENVIRONMENT, parse_topology
from stdit_jax.training.checkpoints import plain
from stdit_jax.training.planning import compile_bucket, roofline
from stdit_jax.training.stages import make_stages

GIB = 2**30
ROOT = pathlib.Path(__file__).parents[1]


def make_parser():
  parser = argparse.ArgumentParser(
    "python -m stdit_jax.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--config", required=True, help="file with get_config()")
  parser.add_argument("--config.KEY", metavar="VALUE", help="replaces one key of it, as for train: --config.mesh.fsdp=4")
  parser.add_argument("--topology", required=True, help="KIND:AxB or KIND:AxBxC, e.g. v5e:16x16, v5p:4x8x8, v6e:16x16")
  parser.add_argument("--slices", type=int, default=1, help="slices of that topology (default: 1)")
  parser.add_argument("--stage", action="append", help="only this stage; may be given several times")
  parser.add_argument(
    "--bucket", action="append", metavar="RESOLUTION:FRAMES[:BATCH]", help="only this bucket, or one of your own"
  )
  parser.add_argument("--jobs", type=int, default=1, help="compilations at a time, about 2 GB each (default: 1)")
  parser.add_argument("--output", help="writes all results as JSON")
  parser.add_argument("--cache", default="~/.cache/stdit_jax/plan", help="folder of earlier results (default: %(default)s)")
  parser.add_argument("--work", help=argparse.SUPPRESS)  # the compiling process: a job as JSON
  return parser


def read_config(path, changes):
  """The configuration of a file with the arguments --config.KEY=VALUE, as `train` reads it."""
  argv = ["plan", f"--config={path}", *changes]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
  return parse_config(argv, values)


def parse_bucket(text, stage_buckets):
  """'480p:51' or '480p:51:256' -> (resolution, frames, batch)."""
  parts = text.split(":")
  if len(parts) not in (2, 3) or not all(p.isdigit() for p in parts[1:]):
    raise ValueError(f"--bucket {text!r} is no RESOLUTION:FRAMES or RESOLUTION:FRAMES:BATCH")
  known = {(b.resolution, b.num_frames): b.batch_size for b in stage_buckets}
  key = parts[0], int(parts[1])
  if len(parts) == 2 and key not in known:
    names = ", ".join(f"{resolution}:{frames}" for resolution, frames in known)
    raise ValueError(f"--bucket {text!r} has no batch size in this stage; give one as {text}:BATCH, or one of {names}")
  return *key, int(parts[2]) if len(parts) == 3 else known[key]


def make_jobs(args):
  """What is to be compiled: dicts of plain values."""
  parse_topology(args.topology)
  config = read_config(args.config, args.changes)
  stages = make_stages(config)
  unknown = sorted(set(args.stage or ()) - {s.name for s in stages})
  if unknown:
    raise ValueError(f"--stage {unknown[0]!r} is none of {', '.join(s.name for s in stages)}")
  jobs = []
  for stage in stages:
    if args.stage and stage.name not in args.stage:
      continue
    buckets = [b for b in DataConfig(**stage.config.data.to_dict()).parsed_buckets() if b.batch_size]
    wanted = [parse_bucket(text, buckets) for text in args.bucket or ()]
    for bucket in wanted or [(b.resolution, b.num_frames, b.batch_size) for b in buckets]:
      jobs.append(
        {"config": plain(config), "stage": stage.name, "bucket": bucket, "topology": args.topology, "slices": args.slices}
      )
  return jobs


def fingerprint(job):
  """Of a job and of everything its result depends on: code and versions."""
  digest = hashlib.sha256(json.dumps(job, sort_keys=True).encode())
  for path in sorted([*ROOT.glob("stdit_jax/**/*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("configs/*.py")]):
    digest.update(path.read_bytes())
  for name in ("jax", "flax", "libtpu"):
    try:
      digest.update(importlib.metadata.version(name).encode())
    except importlib.metadata.PackageNotFoundError:
      raise ValueError(f"{name} is not installed, which compiles for TPUs: pip install -c constraints.txt {name}") from None
  return digest.hexdigest()[:32]


def run_job(job, cache):
  """The result of a job, from the cache or from a process of its own; (result, whether it was there)."""
  path = cache / f"{fingerprint(job)}.json"
  if path.exists():
    return json.loads(path.read_text()), True
  command = [sys.executable, "-m", "stdit_jax.plan", "--config", "-", "--topology", job["topology"], "--work", json.dumps(job)]
  environment = {
    **os.environ,
    **TPU_ENVIRONMENT,
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
  }
  done = subprocess.run(command, capture_output=True, text=True, env=environment)
  if done.returncode:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    raise ValueError(lines[-1].removeprefix("error: ") if lines else f"the compiling process ended with {done.returncode}")
  result = json.loads(done.stdout.splitlines()[-1])
  paths.write_text(path, json.dumps(result))
  return result, False


def work(job):
  """The compiling process: prints the result as JSON."""
  result = compile_bucket(job["config"], job["stage"], job["bucket"], job["topology"], job["slices"])
  if "collectives" in result and "model_flops" in result:
    result["roofline"] = roofline(result, job["topology"])
  print(json.dumps(result))


COLUMNS = (
  ("stage", 10), ("bucket", 12), ("batch", 7), ("each", 5), ("parts", 5), ("tokens", 8), ("compile", 8), ("GiB", 13),
  ("activations", 11), ("TFLOP", 9), ("GB moved", 9), ("compute", 8), ("memory", 8), ("links", 8), ("bound", 13), ("MFU", 5),
)  # fmt: skip


def line(values):
  """One line of the table, of as many columns as there are values."""
  return " ".join(f"{value:>{width}}" for value, (_, width) in zip(values, COLUMNS))


def describe(result):
  """A result as a line of the table."""
  values = [
    result["stage"], f"{result['resolution']} x {result['frames']}", result["batch"],
    f"{result['samples_per_part']}" + ("s" if result["split_tokens"] else ""), result["micro_batches"],
    result.get("tokens", ""), f"{result['compile_seconds']:.0f}s",
  ]  # fmt: skip
  if "oom" in result:
    return f"{line(values)}   does not fit: {result['oom']}"
  values.append(f"{result['peak'] / GIB:.1f} / {result['limit'] / GIB:.1f}" + ("" if result["fits"] else " !"))
  values.append(f"{result['activations'] / GIB:.1f}")
  if r := result.get("roofline"):
    seconds = [f"{r[what]:.2f}s" for what in ("compute", "memory", "interconnect")]
    moved = sum(result["collectives"].values()) / 1e9
    values += [f"{result['model_flops'] / 1e12:.0f}", f"{moved:.1f}", *seconds, r["bound"], f"{r['utilisation']:.0%}"]
  return line(values)


def main(argv=None):
  argv = sys.argv[1:] if argv is None else argv
  changes = [a for a in argv if a.startswith("--config.")]
  args = make_parser().parse_args([a for a in argv if not a.startswith("--config.")])
  args.changes = changes
  with one_line_errors():
    if args.work:
      work(json.loads(args.work))
      return
    jobs = make_jobs(args)
    cache = pathlib.Path(args.cache).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    print(f"{len(jobs)} programs for {args.slices} x {args.topology}; all figures are computed, none is measured", flush=True)
    print("each: samples per device and micro batch, s: tokens split; parts: micro batches; !: does not fit")
    print(line([name for name, _ in COLUMNS]), flush=True)
    started, results, compiled = time.monotonic(), [], 0
    with concurrent.futures.ThreadPoolExecutor(max(1, args.jobs)) as pool:
      for i, (result, known) in enumerate(pool.map(lambda job: run_job(job, cache), jobs)):
        results.append(result)
        compiled += not known
        print(describe(result), flush=True)
        if compiled and i + 1 < len(jobs):
          left = (time.monotonic() - started) / compiled * (len(jobs) - i - 1)
          print(f"  {i + 1}/{len(jobs)}, about {left / 60:.0f} min left", file=sys.stderr, flush=True)
    memory = results[0]["resident"]
    print("per chip, beside activations: " + ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in memory.items()))
    print(f"mesh: {results[0]['mesh']}; {sum('oom' not in r and r['fits'] for r in results)} of {len(results)} buckets fit")
    if args.output:
      paths.write_text(args.output, json.dumps(results, indent=1))


if __name__ == "__main__":
  main()
