"""Kills five programs with SIGKILL at random moments and starts them again. No bit of their results may differ.

  python -m tests.long.kills [--kills 200] [--programs train encode ...] [--seed 0] [--folder DIR]

The programs are `train`, `encode` and `sample`, the training of an autoencoder, and `data.prepare`. They take turns. A third of
the kills hits any moment of a start, a third a moment after new work, a third a half-written file. If a program ends before its
kill, its result is compared and it starts from nothing. If this script is killed, the same command with its `--folder` resumes.
It takes about ten seconds per kill on two idle cores. Exit code 0: all results have the bits of an undisturbed run.
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
from array_record.python.array_record_module import ArrayRecordReader
from tensorflow_datasets.proto import tf_example_pb2

from data.shards import duration
from tests import QUICK_FLAGS, tiny_run
from tests.data.prepare import runs
from tests.data.prepare.videos import two_scenes, write_video
from tests.training import test_resume

STEPS, CLIPS, PROMPTS, VIDEOS = 40, 120, 8, 6
# Changed keys and stages of the autoencoder's training.
AUTOENCODER = {
  **tiny_run.small_autoencoder(),
  "data__buckets": (("64p", 1, 1.0, 2), ("64p", 4, 1.0, 2)),
  "autoencoder__discriminator": {"features": 8, "layers": 2, "groups": 4},
}
ADVERSARY = (
  {"name": "pixels", "optimizer.accumulate": 2},
  {"name": "adversary", "autoencoder.adversarial_weight": 0.5},
)


@dataclasses.dataclass(frozen=True)
class Program:
  """A program that can be killed.

  Attributes:
    command: output folder -> arguments of Python.
    done: output folder -> how much is finished.
    writes: output folder -> whether a file is half written.
    result: output folder -> {name: what must not differ}.
    stride: `done` grows by up to this number from kill to kill.
  """

  command: Callable[[pathlib.Path], list[str]]
  done: Callable[[pathlib.Path], int]
  writes: Callable[[pathlib.Path], bool]
  result: Callable[[pathlib.Path], dict]
  stride: int


def training(folder, changes, stages):
  """The `Program` of a training in two stages."""
  stages = tuple({**stage, "steps": steps} for stage, steps in zip(stages, (STEPS - STEPS // 3, STEPS // 3)))

  def command(output):
    settings = {**changes, "stages": stages, "checkpoint_every": 4, "keep_checkpoints": 100}
    config = tiny_run.write_config(output.with_suffix(".py"), folder / "assets", output, **settings)
    return ["-m", "stdit_jax.train", "--config", str(config)]

  def result(output):
    leaves = jax.tree_util.tree_flatten_with_path(test_resume.items(output, STEPS))[0]
    assert len(leaves) > 50
    found = {jax.tree_util.keystr(path): hashlib.sha256(leaf.tobytes()).hexdigest() for path, leaf in leaves}
    return {**found, "metrics": test_resume.metrics(output)}

  done = lambda output: max(test_resume.metrics_steps(output), default=0)  # noqa: E731
  return Program(command, done, test_resume.writes_a_checkpoint, result, 6)


def encoding(folder):
  settings = {
    "data__tables": (f"shapes://train/0/{CLIPS}",), "data__buckets": (("64p", 1, 1.0, 4), ("64p", 8, (0.5, 0.5), 2)),
    "data__frame_interval": 1, **tiny_run.frozen_text(folder / "assets", "ahead"),
  }  # fmt: skip
  config = tiny_run.write_config(folder / "encode.py", folder / "assets", folder / "unused", **settings)

  def command(output):
    flags = ["--config", str(config), "--output", str(output), "--epochs", "2", "--shard-mb", "0.05"]
    return ["-m", "stdit_jax.encode", *flags]

  def result(output):
    # Every process writes the fields of a protobuf in another order.
    parse, found = tf_example_pb2.Example.FromString, {}
    for path in output.glob("*/part-*/*"):
      is_shard = "array_record" in path.name
      content = list(map(parse, ArrayRecordReader(str(path)).read_all())) if is_shard else path.read_bytes()
      found[str(path.relative_to(output))] = content
    assert any("array_record" in name for name in found)
    return found

  shards = lambda output: len(list(output.glob("*/part-*/[!.]*array_record*")))  # noqa: E731
  return Program(command, shards, lambda output: any(output.glob("*/part-*/.*.tmp*")), result, 3)


def sampling(folder):
  (folder / "prompts.txt").write_text("".join(f"clip {i} of columns\n" for i in range(PROMPTS)))
  flags = ["--prompt-file", str(folder / "prompts.txt"), "--text-encoder", str(folder / "assets" / "t5.safetensors")]

  def command(output):
    return ["-m", "stdit_jax.sample", "--run", str(folder / "train" / "alone"), *flags, "--output", str(output)]

  def result(output):
    found = {path.name: path.read_bytes() for path in output.glob("[!.]*")}
    assert len(found) == 2 * PROMPTS
    return found

  return Program(
    command, lambda output: len(list(output.glob("[!.]*.json"))), lambda output: any(output.glob(".*.tmp*")), result, 2
  )


def preparing(folder):
  (folder / "videos").mkdir(exist_ok=True)
  for i in range(VIDEOS):
    write_video(folder / "videos" / f"{i}.mp4", two_scenes(30 + i, 40))

  def command(output):
    return ["-m", "data.prepare", "run", "--config", runs.config_file(output.parent, folder / "videos", output.name)]

  def result(output):
    clips = {path.name: path.read_bytes() for path in output.glob("cut/clips-*/*/[!.]*.mp4")}
    assert len(clips) == 2 * VIDEOS
    return {**clips, "rows": runs.table(output).rows()}

  parts = lambda output: len(list(output.glob("*/[!.]*"))) + len(list(output.glob("cut/clips-*/*/[!.]*.mp4")))  # noqa: E731
  return Program(command, parts, lambda output: any(output.rglob(".*.tmp*")), result, 6)


class Victim:
  """A program, its undisturbed result, and the folder of the run that is killed again and again."""

  def __init__(self, name: str, program: Program, folder: pathlib.Path):
    self.name, self.program, self.folder = name, program, folder / name
    self.folder.mkdir(exist_ok=True)
    self.own = tiny_run.environment(XLA_FLAGS=QUICK_FLAGS, JAX_COMPILATION_CACHE_DIR=str(folder / "xla"))
    self.output, self.compared = self.folder / "killed", 0
    self.finish(self.folder / "alone")
    began = time.monotonic()
    self.finish(self.folder / "alone")  # all is finished: the time of a start
    self.start_seconds, self.want = time.monotonic() - began, program.result(self.folder / "alone")
    print(f"{name}: the undisturbed run has {len(self.want)} results; a start takes {self.start_seconds:.0f} s", flush=True)

  def start(self, output: pathlib.Path) -> subprocess.Popen:
    command = [sys.executable, *self.program.command(output)]
    with (self.folder / f"{output.name}.log").open("a") as log:
      return subprocess.Popen(command, cwd=tiny_run.ROOT, env=self.own, stdout=log, stderr=subprocess.STDOUT)

  def finish(self, output: pathlib.Path) -> None:
    code = self.start(output).wait()
    assert code == 0, f"{self.name}: exit code {code}: {(self.folder / f'{output.name}.log').read_text()[-3000:]}"

  def compare(self) -> None:
    """Raises AssertionError if the killed run, now finished, has another result."""
    found = self.program.result(self.output)
    wrong = sorted(name for name in {*self.want, *found} if self.want.get(name) != found.get(name))
    assert not wrong, f"{self.name}: {len(wrong)} results differ, such as {wrong[:5]}; see {self.folder}"
    self.compared += 1
    self.output.rename(self.folder / "compared")  # a killed deletion would leave half a run
    shutil.rmtree(self.folder / "compared")

  def kill(self, rng: random.Random) -> str:
    """Starts the program and kills it. Returns what happened. If it ends before, compares the result and tries again."""
    while True:
      before, process = self.program.done(self.output), self.start(self.output)
      self.wait_for_the_moment(process, before, rng)
      if process.poll() is None:
        process.kill()
        process.wait()
        half = " with half a file" if self.program.writes(self.output) else ""
        return f"{before} -> {self.program.done(self.output)}{half}"
      assert process.returncode == 0, f"{self.name}: exit code {process.returncode}: {self.folder / 'killed.log'}"
      self.compare()

  def wait_for_the_moment(self, process: subprocess.Popen, before: int, rng: random.Random) -> None:
    done, writes, goal = self.program.done, self.program.writes, before + rng.randint(1, self.program.stride)
    condition, seconds = rng.choice((
      (lambda: True, 1.2 * self.start_seconds),
      (lambda: done(self.output) >= goal, 0.3),
      (lambda: done(self.output) >= goal - 1 and writes(self.output), 0.03),
    ))  # fmt: skip
    wait_for(process, condition)
    wait_for(process, lambda: False, rng.uniform(0, seconds))


def wait_for(process: subprocess.Popen, condition: Callable[[], bool], seconds: float = 300.0) -> None:
  """Returns when `condition()` holds, the process has ended, or `seconds` have passed."""
  end = time.monotonic() + seconds
  while process.poll() is None and time.monotonic() < end and not condition():
    time.sleep(0.0005)


def make(folder: pathlib.Path) -> dict[str, Callable[[], Program]]:
  """The programs by name. `sample` uses the run of `train`."""
  return {
    "train": lambda: training(folder, tiny_run.text_from_disk(folder / "assets"), test_resume.STAGES),
    "encode": lambda: encoding(folder),
    "sample": lambda: sampling(folder),
    "autoencoder": lambda: training(folder, AUTOENCODER, ADVERSARY),
    "prepare": lambda: preparing(folder),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--kills", type=int, default=200, help="of all programs together (default: %(default)s)")
  parser.add_argument("--programs", nargs="+", choices=make(pathlib.Path()), default=list(make(pathlib.Path())))
  parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: %(default)s)")
  parser.add_argument("--folder", type=pathlib.Path, help="folder, which stays (default: a temporary folder)")
  arguments = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  folder = (arguments.folder or pathlib.Path(tempfile.mkdtemp(prefix="kills-"))).absolute()
  if not (folder / "assets" / "t5.safetensors").exists():  # the last file
    (folder / "assets").mkdir(parents=True, exist_ok=True)
    tiny_run.make_assets(folder / "assets")
  programs, wanted = make(folder), {*arguments.programs, *(["train"] if "sample" in arguments.programs else [])}
  victims = [Victim(name, programs[name](), folder) for name in programs if name in wanted]
  victims = [victim for victim in victims if victim.name in arguments.programs]
  notes = folder / "kills.jsonl"
  killed = first = len(notes.read_text().splitlines()) if notes.exists() else 0
  began = time.monotonic()
  for killed in range(first, arguments.kills):
    victim = victims[killed % len(victims)]
    happened = victim.kill(random.Random(f"{arguments.seed} {killed}"))
    with notes.open("a") as file:
      file.write(json.dumps({"kill": killed + 1, "program": victim.name, "happened": happened}) + "\n")
    each = (time.monotonic() - began) / (killed + 1 - first)
    left = duration(each * (arguments.kills - killed - 1))
    print(f"kill {killed + 1}/{arguments.kills}  {victim.name}: {happened}  {each:.1f} s per kill  {left} left", flush=True)
  for victim in victims:
    victim.finish(victim.output)
    victim.compare()
    print(f"{victim.name}: {victim.compared} killed runs of this call have the bits of the undisturbed run", flush=True)
  print(f"no bit differs after {arguments.kills} kills of {', '.join(victim.name for victim in victims)}; {folder}")


if __name__ == "__main__":
  main()
