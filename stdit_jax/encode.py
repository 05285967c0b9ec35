"""Precomputes what training reads: latents of videos and embeddings of captions, as shards of ArrayRecord.

  python -m stdit_jax.encode --config configs/film.py --output runs/film-latents --epochs 2
  python -m stdit_jax.train --config configs/film.py --config.data.latents=runs/film-latents

The command writes each clip (row, bucket, place in time) and each caption of the first epochs once. A training from these files
sees the same batches in the same order as a training from videos. After the last encoded epoch the training repeats the
encoded epochs from the first on, and prints a warning.

Stop the command at any time. The same command continues with the missing shards, on any number of processes and devices. A
shard is complete or does not exist. A later command with more epochs or another stage adds what is missing.

Several processes share the work and write into one folder. Connect them as for training, or number them with --shard I/N.
A row that can't be decoded is written with the reason, and training masks it out. Each `part-*` in the output is a TFDS
data set that can be read without TensorFlow:
tfds.builder_from_directory(PART).as_data_source("train").

Exit codes: 0 finished, 2 an error that the message names, 130 interrupted. 75 means: start the command again. Reasons: SIGTERM,
an I/O error that may pass.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from data import latents, paths
from data.command_line import flag
from data.shards import Progress, Share, duration
from stdit_jax import cli
from stdit_jax.errors import InputError
from stdit_jax.parallel.processes import coordination
from stdit_jax.training.watchdog import RESTART, exit_to_start_again, start_again

_PENDING = 64  # records that wait for the writer


@dataclasses.dataclass(frozen=True)
class Settings(cli.ConfigSettings):
  """The flags of one call."""

  output: str = flag("folder for the shards, on a disk that all processes share", required=True, metavar="FOLDER")
  epochs: int = flag("encode the first epochs of each stage's data", required=True)
  stage: Sequence[str] | None = flag("only this stage; may be given several times (default: all)", action="append")
  dtype: str = flag(
    "type of the stored values. With float32 (default) the losses equal those from videos. The others take half the space. "
    "float16 rounds by up to 0.05 %%. bfloat16 rounds by up to 0.4 %%, but holds values above 65504",
    "float32", choices=latents.DTYPES,
  )  # fmt: skip
  text: bool | None = flag(
    "encode captions as well (default: if text_encoder.where is 'ahead')", action=argparse.BooleanOptionalAction
  )
  shard_mb: float = flag("approximate size of a shard (default: %(default)s)", 256.0)
  autoencoder_memory: float | None = flag(
    "memory of a device beside the weights; the autoencoder takes fewer frames at a time if it needs more (default: the free "
    "memory)", metavar="GIB",
  )  # fmt: skip
  shard: str | None = flag("this process is number I of N, counted from 0 (default: JAX numbers the processes)", metavar="I/N")


# The stages to encode, whether captions are encoded, and whether the variance of latents is stored.
Choice = tuple[Sequence[Any], bool, bool]


def parse(argv: Sequence[str] | None = None) -> Settings:
  """The settings of a command line (default: of this process)."""
  return cli.parse_settings(Settings, "stdit_jax.encode", __doc__, argv)


def check(settings: Settings) -> None:
  """Raises ValueError for values that are not allowed."""
  if paths.is_remote(settings.output):
    raise ValueError(f"--output {settings.output}: ArrayRecord reads local folders only; give one, or a bucket mounted as one")
  cli.check_positive(settings, "epochs", "shard_mb", "autoencoder_memory")
  if settings.shard:
    Share.parse(settings.shard)


def choose(settings: Settings) -> Choice:
  """What the flags and the configuration ask for. Raises ValueError if it can't be encoded."""
  from stdit_jax.autoencoders.registry import check_lengths
  from stdit_jax.components import Components, need_file
  from stdit_jax.training.objectives import part_of
  from stdit_jax.training.stages import make_stages

  every = make_stages(cli.read_config(settings.config, settings.changes))
  stages = cli.choose_stages(every, settings.stage)
  if (part := part_of(stages[0].config)) != "denoiser":
    raise ValueError(f"config: task={part!r}: encode precomputes the data of denoisers only; set task='denoiser'")
  parts = [Components.of(stage.config) for stage in stages]
  text = choose_text(settings, stages[0].config, parts[0].conditioner)
  for stage, own in zip(stages, parts):
    need_file(stage.config.autoencoder.weights, "autoencoder.weights")
    check_lengths(stage.config, own.autoencoder.config)
  if text:
    need_file(stages[0].config.text_encoder.weights, "text_encoder.weights")
  # If any stage samples the posterior, all latents get a variance, so that a later call with another --stage reuses them.
  return stages, text, any(stage.config.autoencoder.sample_posterior for stage in every)


def choose_text(settings: Settings, config: Any, conditioner: Any) -> bool:
  """Whether captions are encoded. Raises ValueError for --text if no training can read the embeddings."""
  wanted = conditioner.ahead if settings.text is None else settings.text
  if settings.text and conditioner.name != "captions":
    raise ValueError(f"--text: the denoiser {config.model.name} takes {conditioner.name}, which need no encoding; leave it out")
  if settings.text and config.text_encoder.train:
    raise ValueError("--text: text_encoder.train is set, so embeddings change in each step; leave --text out")
  if wanted and config.text_encoder.where == "disk":
    raise ValueError("--text: text_encoder.where is 'disk': the table names files of embeddings; leave --text out")
  return wanted


def make_work(settings: Settings, choice: Choice, compiler: Any) -> Iterator[Any]:
  """Yields a `LatentsWork` or `TextWork` for each group of stages with the same provenance."""
  from stdit_jax.training import encoding

  stages, text, log_variance = choice
  members = [encoding.Source.open(stage, paths.join(settings.output, "data")) for stage in stages]
  common = (settings.output, settings.epochs, int(settings.shard_mb * 2**20))

  def groups(made_from):
    found = collections.defaultdict(list)
    for member in members:
      found[json.dumps(made_from(member))].append(member)
    return [(json.loads(values), group) for values, group in found.items()]

  for values, group in groups(lambda m: encoding.LatentsWork.made_from(m, settings.dtype, log_variance)):
    yield encoding.LatentsWork(values, group, *common, compiler)
  if text:
    for values, group in groups(lambda m: encoding.TextWork.made_from(m, settings.dtype)):
      yield encoding.TextWork(values, group, *common)


def gigabytes(size: float) -> str:
  return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def estimate(
  works: Sequence[Any], own: Share, say: Callable[[str], None], limit: float | None = None
) -> list[tuple[Any, list[int], np.ndarray]]:
  """[(work, numbers of its shards, keys of their records)] for this process. `say` prints sizes, memory and writing time.

  Raises InputError if the disk has too little space, and ValueError if a device has too little memory. Nothing is encoded then.

  Args:
    limit: bytes of a device for the autoencoder beside its weights. None: the free memory.
  """
  jobs, sizes = [], []
  for work in works:
    part, missing = work.part, work.part.missing()
    numbers = list(filter(own.owns, missing))
    keys = np.concatenate([part.keys[part.starts[i] : part.starts[i + 1]] for i in numbers] or [part.keys[:0]])
    shards = f"{part.num_shards} shards, {part.num_shards - len(missing)} of which exist"
    say(f"{part.folder}: {work.count(part.keys)}, {gigabytes(work.expected_bytes(part.keys))} in {shards}")
    if numbers:
      jobs.append((work, numbers, keys))
      sizes.append(work.expected_bytes(keys))
  if jobs and sum(sizes) > (free := shutil.disk_usage(folder := jobs[0][0].part.folder).free):
    raise InputError(f"{gigabytes(sum(sizes))} are to be written, and {folder} has {gigabytes(free)} left; free some space")
  for work, _, keys in jobs:
    say(work.fit(keys, limit))
  for (work, numbers, keys), size in zip(jobs, sizes):
    seconds, how = work.measure(keys)
    time = duration(seconds * work.cost(keys).sum())
    say(f"{gigabytes(size)} in {len(numbers)} shards to write, in {time} at the encoder's speed: {how}")
  return jobs


def write(work: Any, numbers: Sequence[int], keys: np.ndarray, shows: bool = True) -> None:
  """Writes these shards with the records of these keys. After ^C or an error only complete shards exist."""
  writer, pending = latents.shard_writer(work.part, numbers, work.features), collections.deque()
  next(writer)
  done = work.cost(keys).cumsum()
  progress = Progress(work.part.kind, done[-1], work.unit)
  with concurrent.futures.ThreadPoolExecutor(1) as pool, contextlib.closing(work.records(keys)) as records:
    try:
      for now, item in zip(done, records, strict=True):
        pending.append(pool.submit(writer.send, item))
        if len(pending) > _PENDING:
          pending.popleft().result()
        if shows:
          progress(now)
      for future in pending:
        future.result()
    except InputError:  # too many files can't be read
      pool.shutdown()
      work.part.drop(work.away)  # the next call retries the clips whose files did not exist
      raise
    finally:
      pool.shutdown(cancel_futures=True)
      writer.close()


def main(argv: Sequence[str] | None = None) -> None:
  settings = parse(argv)
  logging.set_verbosity(logging.ERROR)
  with exit_to_start_again(), cli.one_line_errors(), start_again():
    check(settings)
    choice = choose(settings)
    paths.check_writable(settings.output, "--output")
    cli.connect_processes()
    cli.use_compilation_cache()
    cli.keep_freed_memory()
    import jax

    run(settings, choice, Share.parse(settings.shard) if settings.shard else Share(jax.process_index(), jax.process_count()))


def run(settings: Settings, choice: Choice, own: Share) -> None:
  """Encodes this process's share of the choice."""
  from stdit_jax.autoencoders.memory import GIB
  from stdit_jax.training.compilation import AheadOfTime
  from stdit_jax.training.run import check_platform

  shows = bool(settings.shard) or own.index == 0
  say = functools.partial(print, flush=True) if shows else lambda text: None
  check_platform(choice[0][0].config.platform)
  with contextlib.closing(AheadOfTime(choice[0][0].config.compile_threads, say)) as compiler:
    works = [work for work in make_work(settings, choice, compiler) if work.part is not None]
    limit = settings.autoencoder_memory and settings.autoencoder_memory * GIB
    for work, numbers, keys in estimate(works, own, say, limit):
      write(work, numbers, keys, shows)
      latents.finish(work.part, work.features)
      compiler.counter.check()
  bad = sum(len(work.bad_rows.found) for work in works if work.bad_rows)
  client, _, _ = coordination()
  if client:
    client.wait_at_barrier("encoded", 1 << 30)  # milliseconds; without this the first process to exit ends the others
  parts = ", ".join(work.part.folder for work in works if latents.finish(work.part, work.features))
  left = sum(len(work.part.missing()) for work in works)
  note = f", {bad} files could not be decoded" if bad else ""
  if left:
    say(f"this process's shards are written{note}; other processes have {left} left to write")
  else:
    say(f"finished{note}: {parts or f'{settings.output} has everything already'}")


if __name__ == "__main__":

  def stop(*_):
    print("stopped; the same command continues", file=sys.stderr)
    raise SystemExit(RESTART)

  signal.signal(signal.SIGTERM, stop)
  with cli.interruptible("the same command continues"):
    main()
