"""Will it fit, how fast could it be, what will it cost: compiles training for a TPU topology, on a machine without a TPU.

  python -m stdit_jax.plan --config configs/open_sora_1_2.py --topology v5e:16x16 [--stage stage1] [--bucket 480p:51]
  python -m stdit_jax.plan ... --search-batch-size --write-buckets found.py     the largest batch of every bucket
  python -m stdit_jax.plan ... --suggest-mesh                                   which mesh, best first

For every bucket of every stage the very program that trains is lowered and compiled by the TPU's compiler (pip install
libtpu, best in an environment of its own); with --platform gpu --gpu h100:8 by XLA for GPUs (pip install jax-cuda12-plugin),
where attention by cuDNN, which can't be compiled without it, is replaced by operations with the same arguments, results and
float32 gradient sums: its part of the memory is computed. "links" are NVLink's, between hosts, too. All figures are
computed, none is measured on a device:

  batch        samples of the whole mesh; per device and micro batch; "s": tokens split over `sequence`
  tokens       of one sample, padding included
  GiB          peak of memory per chip against what the compiler may use: the program's own by the compiler
               (memory_analysis), and beside it what waits: average, optimizer, encoders, next batch (by their shardings)
  TFLOP        of the model, all samples: products by formula (stdit_jax/models/flops.py), three forward passes
  GB moved     by collectives, per device and step, read from the compiled program, loops counted as often as they run
  seconds      compute: FLOPs, with the forward pass that remat repeats, at the chip's published peak; memory: bytes that
               instructions read and write, from above; links: what a device sends, all-reduce twice; slices: what crosses
               slices, at --slice-gbits. At the published peaks (stdit_jax/parallel/topology.py)
  bound, MFU   the longest of them, if they overlap, and the model-FLOP utilisation that it allows
  hours        of a stage: its steps times the mean bound of its buckets, by how often each comes: in the first epoch of the
               config's tables, or of assumed rows; and the updates, which read and write the whole state once. Beside them
               what the encoders of videos and captions take where these are not cached: their FLOPs at the chips' peak; not
               in it: checkpoints, samples, restarts

A search fits memory to compilations of a bucket, mostly one to three, six at most, the last of which confirms what was
predicted; it ends where a batch takes 88 % of the memory, or the next one would be less than 5 % larger. It begins with BATCH
where --bucket gives one. "equal" is the batch with which a step takes as long as the longest bucket's at one sample per device,
or --step-seconds.

Results are kept in --cache, and used again while program, topology and compiler are the same; ^C loses only what is compiling.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import shlex
import sys
import time

from data import paths
from data.aspect_ratios import NUM_PIXELS
from data.config import DataConfig
from stdit_jax.cli import OneLineParser, one_line_errors, parse_with_changes, read_config
from stdit_jax.models.family import find_model
from stdit_jax.parallel.topology import is_gpu, parse_topology, topology_chips
from stdit_jax.planning import budget, meshes, search
from stdit_jax.planning.jobs import Compiler
from stdit_jax.planning.programs import Job, roofline
from stdit_jax.training.checkpoints import plain
from stdit_jax.training.metrics import duration
from stdit_jax.training.objectives import make_objective
from stdit_jax.training.stages import make_stages

GIB = 2**30


def make_parser():
  parser = OneLineParser(
    "python -m stdit_jax.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add("--config", required=True, help="file with get_config()")
  add("--config.KEY", metavar="VALUE", help="replaces one key of it, as for train: --config.mesh.fsdp=4")
  add("--topology", help="of TPUs: KIND:AxB or KIND:AxBxC, e.g. v5e:16x16, v5p:4x8x8, v6e:16x16")
  add("--platform", choices=("tpu", "gpu"), default="tpu", help="default: %(default)s")
  add("--gpu", metavar="KIND:COUNT", help="with --platform gpu, in place of --topology: h100:8, h200:64, a100:16")
  add("--slices", type=int, default=1, help="slices of that topology (default: %(default)s)")
  add("--slice-gbits", type=float, default=25.0, help="Gbit/s between slices, per chip (default: %(default)s)")
  add("--stage", action="append", help="only this stage; may be given several times")
  add("--bucket", action="append", metavar="RESOLUTION:FRAMES[:BATCH]", help="only this bucket, or one of your own")
  mode = parser.add_mutually_exclusive_group()
  mode.add_argument("--search-batch-size", action="store_true", help="finds the largest batch of every bucket that fits")
  mode.add_argument("--suggest-mesh", action="store_true", help="tries the sensible meshes and ranks them")
  add("--step-seconds", type=float, help="with a search: what a step of every bucket shall take at its bound")
  add("--write-buckets", metavar="FILE.py", help="with a search: writes what it found as a config fragment")
  add("--fraction", type=float, default=0.5, help="of the bound, for the hours that are likely (default: %(default)s)")
  add("--jobs", type=int, default=1, help="compilations at a time, about 2 GB each (default: %(default)s)")
  add("--output", help="writes all results as JSON")
  add("--cache", default="~/.cache/stdit_jax/plan", help="folder of earlier results (default: %(default)s)")
  return parser


def parse_bucket(text, stage_buckets):
  """'480p:51' or '480p:51:256' -> (resolution, frames, batch)."""
  parts = text.split(":")
  if len(parts) not in (2, 3) or not all(p.isdigit() and int(p) for p in parts[1:]):
    raise ValueError(f"--bucket {text!r} is no RESOLUTION:FRAMES or RESOLUTION:FRAMES:BATCH")
  known = {(b.resolution, b.num_frames): b.batch_size for b in stage_buckets}
  key = parts[0], int(parts[1])
  if len(parts) == 2 and key not in known:
    names = ", ".join(f"{resolution}:{frames}" for resolution, frames in known)
    raise ValueError(f"--bucket {text!r} has no batch size in this stage; give one as {text}:BATCH, or one of {names}")
  return *key, int(parts[2]) if len(parts) == 3 else known[key]


def choose_topology(args):
  """The topology that is asked for; ValueError when it is none, or of the other platform."""
  given, other = (args.gpu, args.topology) if args.platform == "gpu" else (args.topology, args.gpu)
  if not given or other:
    need = "--gpu KIND:COUNT, as in h100:8" if args.platform == "gpu" else "--topology KIND:AxB, as in v5e:16x16"
    raise ValueError(f"--platform {args.platform} needs {need}" + (", and nothing of the other platform" if other else ""))
  parse_topology(given)
  if is_gpu(given) != (args.platform == "gpu"):
    raise ValueError(f"{given!r} is of the other platform than --platform {args.platform}")
  if args.slices > 1 and args.platform == "gpu":
    raise ValueError("--slices is of TPUs: GPUs of several hosts are one topology, as in h100:64")
  return given


def make_jobs(args):
  """(the stages that are asked for, [Job])."""
  config = read_config(args.config, args.changes)
  stages = make_stages(config)
  unknown = sorted(set(args.stage or ()) - {s.name for s in stages})
  if unknown:
    raise ValueError(f"--stage {unknown[0]!r} is none of {', '.join(s.name for s in stages)}")
  stages = [s for s in stages if not args.stage or s.name in args.stage]
  jobs = []
  for stage in stages:
    buckets = stage_buckets(stage)
    wanted = [parse_bucket(text, buckets) for text in args.bucket or ()]
    for bucket in wanted or [(b.resolution, b.num_frames, b.batch_size) for b in buckets]:
      jobs.append(Job(plain(config), stage.name, bucket, args.topology, args.slices))
  return stages, jobs


def stage_buckets(stage):
  """The buckets of a stage that have a batch."""
  return [b for b in DataConfig(**stage.config.data.to_dict()).parsed_buckets() if b.batch_size]


COLUMNS = (
  ("stage", 10), ("bucket", 12), ("batch", 7), ("each", 5), ("parts", 5), ("tokens", 8), ("compile", 8), ("GiB", 13),
  ("activations", 11), ("TFLOP", 9), ("GB moved", 9), ("compute", 8), ("memory", 8), ("links", 8), ("bound", 8), ("MFU", 5),
)  # fmt: skip


def line(values):
  """One line of the table, of as many columns as there are values."""
  return " ".join(f"{value:>{width}}" for value, (_, width) in zip(values, COLUMNS))


def describe(result, bound):
  """A result and its roofline (or None) as a line of the table."""
  values = [
    result["stage"], f"{result['resolution']} x {result['frames']}", result["batch"],
    f"{result['samples_per_part']}" + ("s" if result["split_tokens"] else ""), result["micro_batches"],
    result.get("tokens", ""), f"{result['compile_seconds']:.0f}s",
  ]  # fmt: skip
  if "oom" in result:
    return f"{line(values)}   does not fit: {result['oom']}"
  values.append(f"{result['peak'] / GIB:.1f} / {result['limit'] / GIB:.1f}" + ("" if result["fits"] else " !"))
  values.append(f"{result['activations'] / GIB:.1f}")
  if bound:
    seconds = [f"{bound[what]:.2f}s" for what in ("compute", "memory", "links")]
    moved = sum(result["collectives"].values()) / 1e9
    values += [f"{result['model_flops'] / 1e12:.0f}", f"{moved:.1f}", *seconds, bound["bound"], f"{bound['utilisation']:.0%}"]
  return line(values)


def print_header():
  print("each: samples per device and micro batch, s: tokens split; parts: micro batches; !: does not fit")
  print(line([name for name, _ in COLUMNS]), flush=True)


def in_order(args, function, items):
  """Results of `function` over `items`, several at a time, in order; says how far it is and how long it will take."""
  started = time.monotonic()
  with concurrent.futures.ThreadPoolExecutor(max(1, args.jobs)) as pool:
    try:
      for i, result in enumerate(pool.map(function, items)):
        yield result
        if (spent := time.monotonic() - started) > 5 and i + 1 < len(items):
          left = spent / (i + 1) * (len(items) - i - 1)
          print(f"  {i + 1}/{len(items)}, about {duration(left)} left", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
      pool.shutdown(cancel_futures=True)
      raise


def bound_of(args, result):
  """Roofline of a result, None where there is none."""
  known = "model_flops" in result and "oom" not in result
  return roofline(result, args.topology, args.slice_gbits) if known else None


def print_plan(args, compiler, stages, jobs):
  """One line per bucket, what waits in memory, and what the stages cost -> results."""
  print_header()
  results, seconds = [], {}
  for result in in_order(args, compiler, jobs):
    bound = bound_of(args, result)
    results.append(result | ({"roofline": bound} if bound else {}))
    if bound:
      seconds[result["stage"], result["resolution"], result["frames"]] = bound["step"]
    print(describe(result, bound), flush=True)
  print("per chip, beside activations: " + ", ".join(f"{k} {size / GIB:.2f} GiB" for k, size in results[0]["resident"].items()))
  print(f"mesh: {results[0]['mesh']}; {sum(r['fits'] for r in results)} of {len(results)} buckets fit")
  print_budget(args, stages, seconds, results[0])
  return results


def print_budget(args, stages, seconds, result):
  """Hours and chip-hours of the stages of which every bucket has a bound."""
  counted_hours, chips = [], result["chips"]
  update = budget.update_seconds(result["resident"], args.topology)
  for stage in stages:
    own = {key[1:]: value for key, value in seconds.items() if key[0] == stage.name}
    if any((b.resolution, b.num_frames) not in own for b in stage_buckets(stage)):
      continue
    shares, counted = budget.bucket_shares(stage)
    hours = budget.stage_hours(stage, shares, own, update)
    counted_hours.append(hours)
    print(f"{stage.name}: {stage.steps:,} steps, {hours_text(args, hours, chips)}; computed from {counted}")
    objective = make_objective(stage.config)
    if objective.counts_flops:
      print_encoders(args, stage, objective.parts, shares, chips)
  if len(counted_hours) == len(stages) > 1:
    print(f"together: {hours_text(args, sum(counted_hours), chips)}")


def print_encoders(args, stage, parts, shares, chips):
  """What the encoders of a stage add to its hours, if they do."""
  seconds = budget.encoder_seconds(stage, parts, shares, args.topology, chips)
  hours = {what: stage.steps * stage.config.optimizer.accumulate * each / 3600 for what, each in seconds.items()}
  if total := sum(hours.values()):
    parts = " and ".join(f"{what} {each / total:.0%}" for what, each in hours.items() if each)
    print(f"{stage.name}: encoding in the step adds {hours_text(args, total, chips)}: {parts}; nothing where it is cached")


def hours_text(args, hours, chips):
  likely = hours / args.fraction
  return (
    f"{hours:,.1f} h at the bound ({hours * chips:,.0f} chip-hours), {likely:,.1f} h at {args.fraction:.0%} of it "
    f"({likely * chips:,.0f} chip-hours)"
  )


def print_search(args, compiler, stages, jobs):
  """The largest batch of every bucket, and the one with which all take the same time -> all results."""
  print_header()
  found, chips = {}, topology_chips(args.topology) * args.slices
  given = {tuple(text.split(":")[:2]) for text in args.bucket or () if text.count(":") == 2}

  def find(job):
    """Begins with the batch that `--bucket` gives."""
    resolution, frames, rows = job.bucket
    return search.search_bucket(compiler, job, chips, rows if (resolution, str(frames)) in given else None)

  for job, answer in zip(jobs, in_order(args, find, jobs)):
    found[job.stage, *job.bucket[:2]] = answer
    print(describe(answer.result, bound_of(args, answer.result)), flush=True)
  fits = {key: answer for key, answer in found.items() if answer.largest}
  lines = {key: answer.seconds(args.topology, args.slice_gbits) for key, answer in fits.items()}
  target = args.step_seconds or max((constant + slope for constant, slope in lines.values()), default=0.0)
  print(f"\nwith steps of {target:.2f} s at their bound:")
  print(f"{'stage':>10} {'bucket':>12} {'largest':>8} {'takes':>8} {'equal':>8} {'takes':>8}")
  equal = {}
  for key, answer in fits.items():
    constant, slope = lines[key]
    unit, n = answer.result["batch_parts"], answer.equal(target, constant, slope)
    equal[key] = n * unit
    print(
      f"{key[0]:>10} {f'{key[1]} x {key[2]}':>12} {answer.largest * unit:>8} {constant + slope * answer.largest:>7.2f}s "
      f"{n * unit:>8} {constant + slope * n:>7.2f}s"
    )
  if args.write_buckets:
    command = f"python -m stdit_jax.plan {shlex.join(args.argv)}"
    paths.write_text(args.write_buckets, search.fragment(stages, fits, equal, args.topology, command))
    print(f"wrote {args.write_buckets}; buckets of which not one sample fits are left out: {len(found) - len(fits)}")
  return [result for answer in found.values() for result in answer.results.values()]


def probe_buckets(stage):
  """The bucket with the most pixels, and the one that comes most often."""
  buckets = stage_buckets(stage)
  shares, _ = budget.bucket_shares(stage)
  largest = max(buckets, key=lambda b: NUM_PIXELS[b.resolution] * b.num_frames)
  usual = max(buckets, key=lambda b: shares.get((b.resolution, b.num_frames), 0.0))
  return list(dict.fromkeys((b.resolution, b.num_frames, b.batch_size) for b in (largest, usual)))


def print_meshes(args, compiler, stages, jobs):
  """Every sensible mesh with a few buckets, ranked by the sum of their bounds -> all results."""
  chips = topology_chips(args.topology)
  width = find_model(stages[0].config.model.name, stages[0].config.model.fields)[1].hidden_size
  if not args.bucket:
    wanted = {(stage.name, bucket) for stage in stages for bucket in probe_buckets(stage)}
    jobs = [job for job in jobs if (job.stage, job.bucket) in wanted]
  tries = []
  for mesh in meshes.sensible_meshes(chips, width):
    for job in jobs:
      rows = meshes.nearest_batch(job.bucket[2], chips * args.slices)
      tries.append(dataclasses.replace(job, config=meshes.with_mesh(job.config, mesh), bucket=(*job.bucket[:2], rows)))
  print_header()
  by_mesh = {}
  for result in in_order(args, compiler, tries):
    bound = bound_of(args, result)
    by_mesh.setdefault(tuple(result["mesh"].items()), []).append((result, bound))
    mesh = " ".join(f"{axis}={size}" for axis, size in result["mesh"].items() if size > 1)
    print(f"{describe(result, bound)}  {mesh}", flush=True)
  print("\nmeshes, best first: seconds of a step of each of these buckets together, at their bounds")
  ranked = sorted(by_mesh.items(), key=lambda item: mesh_rank(item[1]))
  for mesh, results in ranked:
    fits = all(result["fits"] for result, _ in results)
    peak = max(result.get("peak", math.inf) for result, _ in results) / GIB
    seconds = sum(bound["step"] for _, bound in results if bound)
    text = f"{seconds:>8.2f}s  largest peak {peak:.1f} GiB" if fits else "does not fit"
    print("  " + " ".join(f"--config.mesh.{axis}={size}" for axis, size in mesh) + f"  {text}")
  return [result for results in by_mesh.values() for result, _ in results]


def mesh_rank(results):
  """Order of a mesh: first those on which all fits, then by time, then by memory."""
  fits = all(result["fits"] for result, _ in results)
  return not fits, sum(bound["step"] for _, bound in results if bound), max(r.get("peak", 0) for r, _ in results)


def main(argv=None):
  args = parse_with_changes(make_parser(), argv)
  args.argv = sys.argv[1:] if argv is None else argv
  with one_line_errors():
    args.topology = choose_topology(args)
    if args.write_buckets and not args.search_batch_size:
      raise ValueError("--write-buckets needs --search-batch-size, which finds what it writes")
    for name, value in (("slices", args.slices), ("slice-gbits", args.slice_gbits), ("jobs", args.jobs)):
      if value <= 0:
        raise ValueError(f"--{name} {value}: allowed: above 0")
    if not 0 < args.fraction <= 1:
      raise ValueError(f"--fraction {args.fraction}: allowed: above 0, at most 1")
    stages, jobs = make_jobs(args)
    if args.search_batch_size and not all(make_objective(stage.config).counts_flops for stage in stages):
      raise ValueError("--search-batch-size is of denoisers: of an autoencoder there is no count of FLOPs to tell times by")
    compiler = Compiler(args.cache, args.topology)
    print(f"{args.slices} x {args.topology}; all figures are computed, none is measured", flush=True)
    show = print_search if args.search_batch_size else print_meshes if args.suggest_mesh else print_plan
    results = show(args, compiler, stages, jobs)
    if args.output:
      paths.write_text(args.output, json.dumps(results, indent=1))


if __name__ == "__main__":
  try:
    main()
  except KeyboardInterrupt:
    print("interrupted; what was compiled is kept, the same command goes on from there", file=sys.stderr)
    raise SystemExit(130) from None
