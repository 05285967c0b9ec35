"""Kills `python -m stdit_jax.encode` with SIGKILL at random moments and restarts it. No record may be lost or written twice.

  python -m tests.long.kill_and_encode [--moments 10] [--seed 0] [--folder DIR]

It takes a few minutes on two cores. Exit code 0: all shards hold the records of an uninterrupted command, in the same order.
"""

import subprocess
import sys
import time

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from tensorflow_datasets.proto import tf_example_pb2

from tests import QUICK_FLAGS, tiny_run
from tests.long import kills

CLIPS = 300


def shards(folder):
  return sorted(p.relative_to(folder) for p in folder.glob("*/part-*/[!.]*array_record*"))


def records(folder):
  """{shard: its records}, parsed, because every process writes the fields of a protobuf in another order."""
  parse = tf_example_pb2.Example.FromString
  return {name: list(map(parse, ArrayRecordReader(str(folder / name)).read_all())) for name in shards(folder)}


def main():
  arguments = kills.parser(__doc__, moments=10).parse_args()
  folder, rng = kills.begin(arguments)
  settings = {
    "data__tables": (f"shapes://train/0/{CLIPS}",), "data__buckets": (("64p", 1, 1.0, 4), ("64p", 8, (0.5, 0.5), 2)),
    "data__frame_interval": 1, "data__workers": 0,
    **tiny_run.frozen_text(folder / "assets", "ahead"),
  }  # fmt: skip
  config = tiny_run.write_config(folder / "config.py", folder / "assets", folder / "run", **settings)

  def start(output):
    command = [sys.executable, "-m", "stdit_jax.encode", "--config", str(config), "--output", str(output)]
    command += ["--epochs", "2", "--shard-mb", "0.05"]
    own = tiny_run.environment(XLA_FLAGS=QUICK_FLAGS, JAX_COMPILATION_CACHE_DIR=str(folder / "xla"))
    with (folder / "log").open("a") as log:
      return subprocess.Popen(command, cwd=tiny_run.ROOT, env=own, stdout=log, stderr=subprocess.STDOUT)

  began = time.monotonic()
  assert start(folder / "alone").wait() == 0, (folder / "log").read_text()[-3000:]
  took, want = time.monotonic() - began, records(folder / "alone")
  print(f"uninterrupted: {len(want)} shards in {took:.0f} s", flush=True)
  killed, before = folder / "killed", 0
  for moment in range(arguments.moments):
    process, goal = start(killed), before + rng.randint(0, max(1, 2 * len(want) // arguments.moments))
    kills.wait_for(process, lambda goal=goal: len(shards(killed)) >= min(goal, len(want) - 1))
    time.sleep(rng.uniform(0, 0.2) if goal > before else rng.uniform(0, took / 3))
    kills.kill(process)
    there, half = records(killed), len(list(killed.glob("*/part-*/.*.tmp*")))
    assert all(want[name] == found for name, found in there.items())
    print(f"kill {moment + 1}: {before} -> {len(there)} shards" + f", {half} half written" * bool(half), flush=True)
    before = len(there)
  assert start(killed).wait() == 0, (folder / "log").read_text()[-3000:]
  assert records(killed) == want
  assert not list(killed.glob("*/part-*/.*"))
  for part in sorted(killed.glob("*/part-*")):
    source = tfds.builder_from_directory(part).as_data_source("train")
    keys = np.load(part / "keys.npy")
    if part.parent.name.startswith("latents"):
      found = {(r["table"], r["row"], r["num_frames"], r["height"], r["window"]) for r in source}
    else:
      found = {r["caption"] for r in source}
    assert len(found) == len(source) == len(keys), (len(found), len(source), len(keys))
    print(f"{part.relative_to(killed)}: {len(found)} different records, {len(keys)} wanted")
  print(f"the same records after {arguments.moments} kills; {folder}")


if __name__ == "__main__":
  main()
