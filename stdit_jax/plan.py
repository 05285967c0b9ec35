"""Tells whether training fits on a TPU topology, how fast it could be and what it would cost. Needs no TPU.

  python -m stdit_jax.plan --config configs/open_sora_1_2.py --topology v5e:16x16 [--stage stage1] [--bucket 480p:51]
  python -m stdit_jax.plan ... --search-batch-size --write-buckets found.py     the largest batch of each bucket
  python -m stdit_jax.plan ... --suggest-mesh                                   meshes, best first

The command compiles the training program of every bucket of every stage with the TPU's compiler. That needs libtpu (pip
install libtpu, best in an environment of its own). With --platform gpu --gpu h100:8 it compiles with XLA for GPUs (pip install
jax-cuda12-plugin). cuDNN's attention only compiles where cuDNN is installed, so operations of the same shapes and memory
replace it. All figures are computed, none is measured on a device:

  batch        samples of the whole mesh. each: samples per device and micro batch; "s": tokens are split over `sequence`
  tokens       of one sample, with padding
  GiB          peak memory per chip, and the limit of the compiler. The peak is the program's memory (memory_analysis),
               plus a device's part of averaged weights, optimizer state, encoders and next batch. A line tells the
               memory of the weights that only samples need (`sample_every`)
  text encoder of each stage that encodes captions before the step: its program for the bucket with most rows. The GiB include
               the whole state, the batch in work and the next one
  TFLOP        matrix products of the model for all samples, by formula (stdit_jax/models/flops.py): three forward passes
  GB moved     by collectives, per device and step. Read from the compiled program, with the iterations of its loops
  compute      seconds: FLOPs, with the forward pass that remat repeats, at the chip's published peak
  memory       seconds: bytes that instructions read and write, an upper estimate
  links        seconds: bytes that a device sends (all-reduce sends its bytes twice). GPUs: NVLink speed, even between hosts
  bound, MFU   bound: the longest of these times and of the traffic between slices (--slice-gbits), as if all overlapped.
               MFU: model-FLOP utilisation at the bound. The published peaks are in stdit_jax/parallel/topology.py
  rows/s       that each host must read, decode and encode at the bound. A host has 4 TPU chips or 8 GPUs
  programs     number of programs that encode clips on each host in a training from videos, and their compile time, estimated
               from one frame size and one clip size
  hours        of a stage: its steps times the mean bound of its buckets, weighted by how often each occurs in the first epoch
               of the tables, or of assumed rows. An update counts as one read and one write of the whole state. A second line
               adds the FLOPs of the encoders at the chips' peak, if their results are not cached. Checkpoints, samples and
               restarts are not included

A search compiles a bucket one to six times and fits a line to the memory. The last compilation confirms the prediction. The
search ends when a batch takes 88 % of the memory, or when the next batch would be less than 5 % larger. --bucket may give the
first BATCH to try. The column "equal" is the batch whose step takes --step-seconds (default: the time of one sample
per device in the slowest bucket).

The command stores results in --cache, and reuses them while program, topology and compiler are the same. ^C loses only the
compilations that are running.
"""

import concurrent.futures
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from data import paths
from data.aspect_ratios import NUM_PIXELS
from data.command_line import flag
from data.shards import duration
from stdit_jax import cli
from stdit_jax.components import Components
from stdit_jax.config import Config
from stdit_jax.models.family import find_model
from stdit_jax.parallel.topology import is_gpu, parse_topology, topology_chips
from stdit_jax.planning import budget, encoding, search
from stdit_jax.planning.budget import Key
from stdit_jax.planning.lines import describe, print_header
from stdit_jax.planning.programs import GIB, Compiler, Job, roofline
from stdit_jax.training.checkpoints import plain
from stdit_jax.training.objectives import make_objective
from stdit_jax.training.stages import Stage, make_stages


@dataclasses.dataclass(frozen=True)
class Settings(cli.ConfigSettings):
  """The flags of one call."""

  topology: str = flag("of TPUs: KIND:AxB or KIND:AxBxC, e.g. v5e:16x16, v5p:4x8x8, v6e:16x16", "")
  platform: str = flag("kind of accelerator (default: %(default)s)", "tpu", choices=("tpu", "gpu"))
  gpu: str = flag("with --platform gpu, instead of --topology: h100:8, h200:64, a100:16", "", metavar="KIND:COUNT")
  slices: int = flag("slices of that topology (default: %(default)s)", 1)
  slice_gbits: float = flag("Gbit/s between slices, per chip (default: %(default)s)", 25.0)
  stage: Sequence[str] | None = flag("only this stage; may be given several times", action="append")
  bucket: Sequence[str] | None = flag(
    "only this bucket, or another one with its batch; may be repeated", action="append", metavar="RESOLUTION:FRAMES[:BATCH]"
  )
  search_batch_size: bool = flag("find the largest batch of each bucket that fits", False)
  suggest_mesh: bool = flag("try the sensible meshes and rank them", False)
  step_seconds: float | None = flag("for a search: seconds that a step of every bucket should take at its bound")
  write_buckets: str = flag("for a search: write the batches as a config fragment", "", metavar="FILE.py")
  fraction: float = flag("also print the hours at this fraction of the bound's speed (default: %(default)s)", 0.5)
  jobs: int = flag("compilations at a time, with about 2 GB each (default: %(default)s)", 1)
  output: str = flag("write all results as JSON", "", metavar="FILE")
  cache: str = flag("folder of earlier results (default: %(default)s)", "~/.cache/stdit_jax/plan")

  argv: Sequence[str] = ()  # the arguments as they were given

  @property
  def chips(self) -> int:
    return topology_chips(self.topology) * self.slices


def parse_bucket(text: str, known: Mapping[Key, int]) -> tuple[str, int, int]:
  """(resolution, frames, batch) of a text like '480p:51' or '480p:51:256'. `known`: batches, as of `stage_buckets`."""
  parts = text.split(":")
  if len(parts) not in (2, 3) or not all(p.isdigit() and int(p) for p in parts[1:]):
    raise ValueError(f"--bucket {text!r} is not RESOLUTION:FRAMES[:BATCH]; write it like 480p:51 or 480p:51:256")
  key = parts[0], int(parts[1])
  if len(parts) == 2 and key not in known:
    names = ", ".join(f"{resolution}:{frames}" for resolution, frames in known)
    raise ValueError(f"--bucket {text!r} has no batch size in this stage; give one as {text}:BATCH, or one of {names}")
  return *key, int(parts[2]) if len(parts) == 3 else known[key]


def check_settings(settings: Settings) -> None:
  """Raises ValueError for values that are not allowed, and for flags that do not go together."""
  if settings.search_batch_size and settings.suggest_mesh:
    raise ValueError("--search-batch-size and --suggest-mesh exclude each other; leave one out")
  if settings.write_buckets and not settings.search_batch_size:
    raise ValueError("--write-buckets needs --search-batch-size, which finds the batches; give both")
  cli.check_positive(settings, "slices", "slice_gbits", "jobs", "step_seconds")
  if not 0 < settings.fraction <= 1:
    raise ValueError(f"--fraction is {settings.fraction}; allowed: above 0, at most 1")


def choose_topology(settings: Settings) -> str:
  """The topology of --topology or --gpu. Raises ValueError for an unknown topology, or one of the other platform."""
  of_gpus = settings.platform == "gpu"
  given, other = (settings.gpu, settings.topology) if of_gpus else (settings.topology, settings.gpu)
  if not given or other:
    need = "--gpu KIND:COUNT, as in h100:8" if of_gpus else "--topology KIND:AxB, as in v5e:16x16"
    raise ValueError(f"--platform {settings.platform} needs {need}{', and nothing of the other platform' if other else ''}")
  parse_topology(given)
  if is_gpu(given) != of_gpus:
    raise ValueError(f"{given!r} is no topology of --platform {settings.platform}; give the other --platform")
  if settings.slices > 1 and of_gpus:
    raise ValueError(f"--slices is {settings.slices}; GPUs of several hosts are one topology, as in h100:64")
  return given


def make_jobs(settings: Settings) -> tuple[list[Stage], list[Job]]:
  """(stages, a job for each bucket) of the flags."""
  config = Config.of(cli.read_config(settings.config, settings.changes))
  stages, jobs = cli.choose_stages(make_stages(config), settings.stage), []
  for stage in stages:
    known = stage_buckets(stage)
    for bucket in [parse_bucket(text, known) for text in settings.bucket or ()] or [(*key, known[key]) for key in known]:
      jobs.append(Job(plain(config), stage.name, bucket, settings.topology, settings.slices))
  return stages, jobs


def text_jobs(stages: Sequence[Stage], jobs: Sequence[Job]) -> list[Job]:
  """For each stage that encodes captions before the step: the job of this program, for the bucket with most rows."""
  ahead = [stage.name for stage in stages if make_objective(stage.config).encodes_ahead]
  of_stages = [[job for job in jobs if job.stage == name] for name in ahead]
  return [dataclasses.replace(max(own, key=lambda job: job.bucket[2]), text=True) for own in of_stages if own]


def stage_buckets(stage: Stage) -> dict[Key, int]:
  """{(resolution, frames): batch} of the buckets of a stage that have a batch size."""
  return {(b.resolution, b.num_frames): b.batch_size for b in stage.config.data.parsed_buckets() if b.batch_size}


def in_order(settings: Settings, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
  """Yields the results of `function` in the order of `items`. Runs --jobs calls at a time, and prints the remaining time."""
  started = time.monotonic()
  with concurrent.futures.ThreadPoolExecutor(settings.jobs) as pool:
    try:
      for i, result in enumerate(pool.map(function, items)):
        yield result
        if (spent := time.monotonic() - started) > 5 and i + 1 < len(items):
          left = spent / (i + 1) * (len(items) - i - 1)
          print(f"  {i + 1}/{len(items)}, about {duration(left)} left", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
      pool.shutdown(cancel_futures=True)
      raise


def bound_of(settings: Settings, result: dict[str, Any]) -> dict[str, Any] | None:
  """Roofline of a result. None if the program does not compile, or if its FLOPs are unknown."""
  known = "model_flops" in result and "oom" not in result
  return roofline(result, settings.topology, settings.slice_gbits) if known else None


def print_plan(settings: Settings, compiler: Compiler, stages: Sequence[Stage], jobs: Sequence[Job]) -> list[dict[str, Any]]:
  """Prints a line per bucket, the bytes per chip besides activations, and the hours of the stages. Returns all results."""
  print_header()
  results, seconds = [], {}
  for result in in_order(settings, compiler, [*jobs, *text_jobs(stages, jobs)]):
    bound = bound_of(settings, result)
    results.append(result | ({"roofline": bound} if bound else {}))
    if bound:
      seconds[result["stage"], result["resolution"], result["frames"]] = bound["step"]
    print(describe(result, bound), flush=True)
  print("per chip besides activations: " + ", ".join(f"{k} {size / GIB:.2f} GiB" for k, size in results[0]["resident"].items()))
  if in_samples := max(result["in_samples"] for result in results):
    print(f"per chip during a sample, without the activations of a step: {in_samples / GIB:.2f} GiB more for weights")
  print(f"mesh: {results[0]['mesh']}; {sum(r['fits'] for r in results[: len(jobs)])} of {len(jobs)} buckets fit")
  print_budget(settings, stages, seconds, results[0])
  for stage in stages:
    print_encode_programs(settings, compiler, stage)
  return results


def print_encode_programs(settings: Settings, compiler: Compiler, stage: Stage) -> None:
  """Prints how many programs encode the clips of a stage on each host, and their compile time.

  Nothing for a training from cached latents, or with --bucket.
  """
  if settings.bucket or not make_objective(stage.config).encodes_clips:
    return
  kinds = encoding.encode_sizes(stage)
  job = Job(plain(Config.of(cli.read_config(settings.config, settings.changes))), stage.name, ("", 0, 0), settings.topology)
  seconds = []
  for sizes in kinds:
    for size in encoding.typical(sizes):
      own = compiler(dataclasses.replace(job, size=size))["compile_seconds"]
      seconds.append((len(sizes) * own, f"{own:.0f} s for {' x '.join(map(str, size))}"))
  total = sum(own for own, _ in seconds)
  print(
    f"{stage.name}: each host encodes videos with {sum(map(len, kinds))} programs, {len(kinds[0])} for frames and "
    f"{len(kinds[1])} for clips; they take about {total / 3600:.1f} processor hours to compile once "
    f"({', '.join(text for _, text in seconds)}). data.aspect_ratios lowers their number"
  )


def print_budget(settings: Settings, stages: Sequence[Stage], seconds: Mapping[tuple, float], result: dict[str, Any]) -> None:
  """Prints the hours of the stages whose buckets all have a bound. `seconds`: {(stage, *bucket): seconds of a micro step}."""
  counted_hours, chips = [], result["chips"]
  update = budget.update_seconds(result["resident"], settings.topology)
  for stage in stages:
    own = {key[1:]: value for key, value in seconds.items() if key[0] == stage.name}
    if stage_buckets(stage).keys() - own.keys():
      continue
    shares, counted = budget.bucket_shares(stage)
    hours = budget.stage_hours(stage, shares, own, update)
    counted_hours.append(hours)
    print(f"{stage.name}: {stage.steps:,} steps, {hours_text(settings, hours, chips)}; computed from {counted}")
    if make_objective(stage.config).counts_flops:
      print_encoders(settings, stage, shares, chips)
  if len(counted_hours) == len(stages) > 1:
    print(f"together: {hours_text(settings, sum(counted_hours), chips)}")


def print_encoders(settings: Settings, stage: Stage, shares: Mapping[Key, float], chips: int) -> None:
  """Prints the hours that the encoders of a stage add, if any."""
  seconds = budget.encoder_seconds(stage, Components.of(stage.config), shares, settings.topology, chips)
  hours = {what: stage.steps * stage.config.optimizer.accumulate * each / 3600 for what, each in seconds.items()}
  if total := sum(hours.values()):
    parts = " and ".join(f"{what} {each / total:.0%}" for what, each in hours.items() if each)
    print(f"{stage.name}: encoding in the step adds {hours_text(settings, total, chips)}: {parts}; 0 with a cache")


def hours_text(settings: Settings, hours: float, chips: int) -> str:
  text = lambda hours, where: f"{hours:,.1f} h at {where} ({hours * chips:,.0f} chip-hours)"  # noqa: E731
  return f"{text(hours, 'the bound')}, {text(hours / settings.fraction, f'{settings.fraction:.0%} of that speed')}"


def print_search(settings: Settings, compiler: Compiler, stages: Sequence[Stage], jobs: Sequence[Job]) -> list[dict[str, Any]]:
  """Prints the largest batch of each bucket, and the batch with which all steps take equal time. Returns all results."""
  print_header()
  found = {}
  given = {tuple(text.split(":")[:2]) for text in settings.bucket or () if text.count(":") == 2}

  def find(job):
    resolution, frames, rows = job.bucket
    return search.search_bucket(compiler, job, settings.chips, rows if (resolution, str(frames)) in given else None)

  for job, answer in zip(jobs, in_order(settings, find, jobs)):
    found[job.stage, *job.bucket[:2]] = answer
    print(describe(answer.result, bound_of(settings, answer.result)), flush=True)
  fits = {key: answer for key, answer in found.items() if answer.largest}
  largest = [search.largest_job(job, fits[key]) for job in jobs if (key := (job.stage, *job.bucket[:2])) in fits]
  texts = list(in_order(settings, compiler, text_jobs(stages, largest)))
  for result in texts:
    print(describe(result, None))
  lines = {key: answer.seconds(settings.topology, settings.slice_gbits) for key, answer in fits.items()}
  target = settings.step_seconds or max((constant + slope for constant, slope in lines.values()), default=0.0)
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
  if settings.write_buckets:
    command = f"python -m stdit_jax.plan {shlex.join(settings.argv)}"
    paths.write_text(settings.write_buckets, search.fragment(stages, fits, equal, settings.topology, command))
    missing = len(found) - len(fits)
    note = f"; {missing} buckets are missing, because not one sample of them fits" if missing else ""
    print(f"wrote {settings.write_buckets}{note}")
  return [result for answer in found.values() for result in answer.results.values()] + texts


def probe_buckets(stage: Stage) -> list[tuple[str, int, int]]:
  """The bucket with the most pixels, and the bucket that occurs most often."""
  known = stage_buckets(stage)
  shares, _ = budget.bucket_shares(stage)
  largest = max(known, key=lambda key: NUM_PIXELS[key[0]] * key[1])
  usual = max(known, key=lambda key: shares.get(key, 0.0))
  return [(*key, known[key]) for key in dict.fromkeys((largest, usual))]


def print_meshes(settings: Settings, compiler: Compiler, stages: Sequence[Stage], jobs: Sequence[Job]) -> list[dict[str, Any]]:
  """Prints each sensible mesh with a few buckets, and the meshes ranked by the sum of the bounds. Returns all results."""
  width = find_model(stages[0].config.model.name, stages[0].config.model.fields)[1].hidden_size
  if not settings.bucket:
    wanted = {(stage.name, bucket) for stage in stages for bucket in probe_buckets(stage)}
    jobs = [job for job in jobs if (job.stage, job.bucket) in wanted]
  tries = []
  for mesh in search.sensible_meshes(topology_chips(settings.topology), width):
    on_mesh = []
    for job in jobs:
      rows = search.nearest_batch(job.bucket[2], settings.chips)
      config = {**job.config, "mesh": {**job.config["mesh"], **mesh}}
      on_mesh.append(dataclasses.replace(job, config=config, bucket=(*job.bucket[:2], rows)))
    tries += [*on_mesh, *text_jobs(stages, on_mesh)]
  print_header()
  by_mesh = {}
  for result in in_order(settings, compiler, tries):
    bound = bound_of(settings, result)
    by_mesh.setdefault(tuple(result["mesh"].items()), []).append((result, bound))
    mesh = " ".join(f"{axis}={size}" for axis, size in result["mesh"].items() if size > 1)
    print(f"{describe(result, bound)}  {mesh}", flush=True)
  print("\nmeshes, best first: the bounds of one step of each of these buckets, added up")
  for mesh, results in sorted(by_mesh.items(), key=lambda found: mesh_rank(found[1])):
    misfit, seconds, peak = mesh_rank(results)
    text = "does not fit" if misfit else f"{seconds:>8.2f}s  largest peak {peak / GIB:.1f} GiB"
    print("  " + " ".join(f"--config.mesh.{axis}={size}" for axis, size in mesh) + f"  {text}")
  return [result for results in by_mesh.values() for result, _ in results]


def mesh_rank(results: Sequence[tuple[dict[str, Any], dict[str, Any] | None]]) -> tuple[bool, float, float]:
  """Sort key of a mesh: meshes on which all buckets fit come first, then short times, then little memory."""
  fits = all(result["fits"] for result, _ in results)
  return not fits, sum(bound["step"] for _, bound in results if bound), max(r.get("peak", 0) for r, _ in results)


def main(argv: Sequence[str] | None = None) -> None:
  settings = cli.parse_settings(Settings, "stdit_jax.plan", __doc__, argv)
  with cli.one_line_errors():
    given = tuple(sys.argv[1:] if argv is None else argv)
    settings = dataclasses.replace(settings, topology=choose_topology(settings), argv=given)
    check_settings(settings)
    stages, jobs = make_jobs(settings)
    if settings.search_batch_size and not all(make_objective(stage.config).counts_flops for stage in stages):
      raise ValueError("--search-batch-size is for denoisers: the FLOPs of an autoencoder are unknown; leave it out")
    compiler = Compiler(settings.cache, settings.topology)
    print(f"{settings.slices} x {settings.topology}; all figures are computed, none is measured", flush=True)
    show = print_search if settings.search_batch_size else print_meshes if settings.suggest_mesh else print_plan
    results = show(settings, compiler, stages, jobs)
    if settings.output:
      paths.write_text(settings.output, json.dumps(results, indent=1))


if __name__ == "__main__":
  with cli.interruptible("compiled results are kept, and the same command continues"):
    main()
