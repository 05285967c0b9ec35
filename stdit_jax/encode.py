"""Encodes ahead what training will ask for: videos to latents, captions to embeddings, as shards of ArrayRecord.

  python -m stdit_jax.encode --config configs/film.py --output runs/film-latents --epochs 2
  python -m stdit_jax.train --config configs/film.py --config.data.latents=runs/film-latents

Every clip (row, bucket, place in time) and every caption that the plans of the first epochs ask for is written once.
Training from them sees the batches of a training from videos, in the same order; past these epochs they go round again,
and it says so. Stop it at any time, by any means: the same command goes on with the shards that are not there, on any
number of processes and devices; a shard is there whole or not at all. A later command with more epochs, or another
stage, adds what is missing.

Of several processes (`cli.connect_processes`, or --shard without any connection between them, over a common folder)
each takes every n-th shard. A row that can't be decoded is written with the reason, and has no weight in training, as
from videos. Every `part-*` below the output is a TFDS data set, which can be read without TensorFlow:
tfds.builder_from_directory(PART).as_data_source("train").

Exit codes: 0 finished, 2 a mistake that the message names, 75 stopped by SIGTERM, 130 interrupted.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import json
import re
import shutil
import signal
import sys

from absl import logging

from data import latents, paths
from stdit_jax.cli import (
  InputError,
  OneLineParser,
  connect_processes,
  keep_freed_memory,
  one_line_errors,
  parse_with_changes,
  read_config,
  use_compilation_cache,
)

_PENDING = 64  # records that wait to be written
_FOREVER = 1 << 30  # milliseconds
_STOPPED = 75  # exit code, as of training: start it again


def make_parser():
  parser = OneLineParser(
    "python -m stdit_jax.encode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  add = parser.add_argument
  add("--config", required=True, help="training configuration: file with get_config()")
  add("--config.KEY", metavar="VALUE", help="replaces one key of it, as for train: --config.data.workers=8")
  add("--output", required=True, metavar="FOLDER", help="for the shards; on a disk that all processes share")
  add("--epochs", type=int, required=True, help="of each stage's data, from the first on")
  add("--stage", action="append", help="only this stage; may be given several times (default: all)")
  add(
    "--dtype", choices=latents.DTYPES, default="float32",
    help="of the stored values. float32 (default): losses as from videos; float16: half the size, values to 0.05 %%; "
    "bfloat16: as large and eight times as coarse, for values that float16 can't hold (above 65504)",
  )  # fmt: skip
  add(
    "--text", action=argparse.BooleanOptionalAction, default=None,
    help="embeddings of captions, too (default: if text_encoder.where is 'ahead', which then reads them)",
  )  # fmt: skip
  add("--shard-mb", type=float, default=256, help="size of a shard, about (default: %(default)s)")
  add("--shard", metavar="I/N", help="this process is the I-th of N, from 0 (default: as JAX counts its processes)")
  return parser


def check(args):
  """Raises ValueError for arguments that can't be."""
  if paths.is_remote(args.output):
    raise ValueError(f"--output {args.output}: ArrayRecord reads local folders only; give one, or a bucket mounted as one")
  for name in ("epochs", "shard_mb"):
    if getattr(args, name) <= 0:
      raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; allowed: above 0")
  if args.shard:
    numbers = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    if not numbers or int(numbers[1]) >= int(numbers[2]):
      raise ValueError(f"--shard {args.shard} is not I/N with I from 0 to N - 1")


def choose_stages(args):
  """The stages of the configuration that are asked for; `args.text` is decided then."""
  from stdit_jax.autoencoders.registry import check_lengths
  from stdit_jax.components import Components, need_file
  from stdit_jax.training.objectives import part_of
  from stdit_jax.training.stages import make_stages

  stages = make_stages(read_config(args.config, args.changes))
  if unknown := sorted(set(args.stage or ()) - {s.name for s in stages}):
    raise ValueError(f"--stage {unknown[0]!r} is none of {', '.join(s.name for s in stages)}")
  # For all stages alike, so that the latents of one are not made anew when another one is added.
  args.log_variance = any(stage.config.autoencoder.sample_posterior for stage in stages)
  stages = [s for s in stages if not args.stage or s.name in args.stage]
  if (part := part_of(stages[0].config)) != "denoiser":
    raise ValueError(f"config: task={part!r}: only a denoiser's data can be encoded ahead")
  text, conditioner = stages[0].config.text_encoder, Components.of(stages[0].config).conditioner
  if args.text and conditioner.name != "captions":
    raise ValueError(f"--text: the denoiser {stages[0].config.model.name} takes {conditioner.name}, which need no encoding")
  if args.text and text.train:
    raise ValueError("--text: text_encoder.train is set, and a text encoder that trains gives other embeddings every step")
  args.text = conditioner.ahead if args.text is None else args.text
  if args.text and text.where == "disk":
    raise ValueError("--text: text_encoder.where is 'disk', where embeddings are in the table: no training would read these")
  for stage in stages:
    need_file(stage.config.autoencoder.weights, "autoencoder.weights")
    check_lengths(stage.config, Components.of(stage.config).autoencoder.config)
  if args.text:
    need_file(text.weights, "text_encoder.weights")
  return stages


def make_work(stages, args, counter):
  """Everything that is asked for, as `LatentsWork` and `TextWork`: stages whose latents are made alike share them."""
  from stdit_jax.training import encoding

  members = [encoding.Source.open(stage, paths.join(args.output, "data")) for stage in stages]
  common = (args.output, args.epochs, int(args.shard_mb * 2**20))

  def alike(made_from):
    groups = collections.defaultdict(list)
    for member in members:
      groups[json.dumps(made_from(member))].append(member)
    return [(json.loads(values), group) for values, group in groups.items()]

  for values, group in alike(lambda m: encoding.LatentsWork.made_from(m, args.dtype, args.log_variance)):
    yield encoding.LatentsWork(values, group, *common, counter)
  if args.text:
    for values, group in alike(lambda m: encoding.TextWork.made_from(m, args.dtype)):
      yield encoding.TextWork(values, group, *common)


def gigabytes(size):
  return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def estimate(works, index, count, say):
  """[(work, shards, keys)] that are this process's to write; says before how large they become and how long they take."""
  import numpy as np

  from stdit_jax.training.metrics import duration

  jobs, sizes = [], []
  for work in works:
    part, missing = work.part, work.part.missing()
    own = [number for number in missing if number % count == index]
    keys = np.concatenate([part.keys[part.starts[i] : part.starts[i + 1]] for i in own] or [part.keys[:0]])
    shards = f"{part.num_shards} shards, {part.num_shards - len(missing)} of which are there"
    say(f"{part.folder}: {work.count(part.keys)}, {gigabytes(work.expected_bytes(part.keys))} in {shards}")
    if own:
      jobs.append((work, own, keys))
      sizes.append(work.expected_bytes(keys))
  if jobs and sum(sizes) > (free := shutil.disk_usage(jobs[0][0].part.folder).free):
    raise InputError(f"{gigabytes(sum(sizes))} are to be written, and {jobs[0][0].part.folder} has {gigabytes(free)} left")
  for (work, own, keys), size in zip(jobs, sizes):
    seconds, how = work.measure(keys)
    time = duration(seconds * work.cost(keys).sum())
    say(f"{gigabytes(size)} in {len(own)} shards to write, in {time} at the encoder's speed: {how}")
  return jobs


def quiet(text):
  """Says nothing, as processes other than the first."""


def write(work, numbers, keys, shows=True):
  """Writes these shards, of the records of these keys; ^C and errors leave only whole ones."""
  from tqdm import tqdm

  writer, pending = latents.ShardWriter(work.part, numbers, work.features), collections.deque()
  costs = work.cost(keys)
  bar = tqdm(total=float(costs.sum()), unit=work.unit, unit_scale=True, disable=None if shows else True)
  with bar, concurrent.futures.ThreadPoolExecutor(1) as pool, contextlib.closing(work.records(keys)) as records:
    try:
      for cost, (key, record) in zip(costs, records, strict=True):
        pending.append(pool.submit(writer.add, key, record))
        if len(pending) > _PENDING:
          pending.popleft().result()
        bar.update(cost)
      for future in pending:
        future.result()
    except InputError:  # too many files can't be read
      pool.shutdown()
      work.part.drop(work.away)  # those on a disk that is away are not missing for good
      raise
    finally:
      pool.shutdown(cancel_futures=True)
      writer.close()


def main(argv=None):
  args = parse_with_changes(make_parser(), argv)
  logging.set_verbosity(logging.ERROR)
  with one_line_errors():
    check(args)
    stages = choose_stages(args)
    paths.check_writable(args.output, "--output")
    connect_processes()
    use_compilation_cache()
    keep_freed_memory()
    import jax

    index, count = map(int, args.shard.split("/")) if args.shard else (jax.process_index(), jax.process_count())
    run(stages, args, index, count)


def run(stages, args, index, count):
  """Encodes everything, as process `index` of `count`."""
  from jax._src.distributed import global_state  # nothing public waits for other processes as long as it takes

  from stdit_jax.training.loop import check_platform
  from stdit_jax.training.step import TraceCounter

  say = functools.partial(print, flush=True) if args.shard or index == 0 else quiet
  check_platform(stages[0].config.platform)
  counter = TraceCounter()
  works = [work for work in make_work(stages, args, counter) if work.part is not None]
  for work, own, keys in estimate(works, index, count, say):
    write(work, own, keys, shows=say is not quiet)
    latents.finish(work.part, work.features)
    counter.check()
  bad = sum(len(work.bad_rows.found) for work in works if work.bad_rows)
  if global_state.client:
    global_state.client.wait_at_barrier("encoded", _FOREVER)  # or the first to end would end the others
  parts = ", ".join(work.part.folder for work in works if latents.finish(work.part, work.features))
  left = sum(len(work.part.missing()) for work in works)
  note = f", {bad} files could not be decoded" if bad else ""
  if left:
    say(f"this process's shards are written{note}; {left} are left to others")
  else:
    say(f"finished{note}: {parts or f'{args.output} has everything already'}")


if __name__ == "__main__":

  def stop(*_):
    print("stopped; the same command goes on", file=sys.stderr)
    raise SystemExit(_STOPPED)

  signal.signal(signal.SIGTERM, stop)
  try:
    main()
  except KeyboardInterrupt:
    print("interrupted; the same command goes on", file=sys.stderr)
    raise SystemExit(130) from None
