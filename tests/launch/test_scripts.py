"""Tests of all launch scripts: shellcheck, --help, --dry-run, and errors of one line."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.launch.stand_ins import GCLOUD, PROGRAM, ROOT

SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "launch").rglob("*.sh"))
POD = ["--name", "film", "--zone", "europe-west4-b", "--topology", "v5e:16x16"]
SLICES = ["--name", "film", "--zone", "europe-west4-b", "--topology", "v5e:16x16", "--slices", "2"]
JOB = ["--name", "film", "--image", "registry/image:1", "--topology", "v5e:16x16"]
TRAIN = ["--", "--config", "configs/film.py"]


def test_shellcheck_accepts_all_scripts():
  program = shutil.which("shellcheck", path=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
  assert program, "shellcheck comes with requirements-test.txt"
  command = [program, "--external-sources", *SCRIPTS]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_multislice.sh", "gpu.sh", "gke/submit.sh", "worker.sh", "supervise.sh"])
def test_help_has_an_example(stand_ins, script):
  text = stand_ins.run(script, "--help").stdout
  assert "bash " in text  # an example
  assert "--config" in text


@pytest.mark.parametrize(
  ("script", "arguments", "message"),
  [
    ("tpu_vm.sh", [], "give a command"),
    ("tpu_vm.sh", ["start", *POD], "unknown command start; known: create"),
    ("tpu_vm.sh", ["create", *POD[2:]], "--name is required"),
    ("tpu_vm.sh", ["create", *POD[:2]], "--zone is required"),
    ("tpu_vm.sh", ["create", *POD[:4]], "give --accelerator-type or --topology"),
    ("tpu_vm.sh", ["create", *POD, "--accelerator-type", "v6e-8"], "exclude each other"),
    ("tpu_vm.sh", ["create", *POD, "--spot", "--reserved"], "exclude each other"),
    ("tpu_vm.sh", ["create", *POD[:4], "--topology", "v5e-256"], "--topology v5e-256 is not like v5e:16x16"),
    (
      "tpu_vm.sh",
      ["create", *POD[:4], "--accelerator-type", "v9-8"],
      "give --runtime-version: this script knows no version for v9",
    ),
    ("tpu_vm.sh", ["create", *POD, "--project"], "--project needs a value"),
    ("tpu_vm.sh", ["create", *POD, "--project", "--spot"], "--project needs a value, not --spot"),
    ("tpu_vm.sh", ["create", *POD, "--slices", "2"], "use launch/tpu_multislice.sh"),
    ("tpu_vm.sh", ["create", *POD, "--colour=red"], "unknown argument --colour"),
    ("tpu_vm.sh", ["create", "--name", "Film", "--zone", "z"], "--name Film: small letters"),
    ("tpu_vm.sh", ["run", *POD], "give the arguments of the training"),
    ("tpu_vm.sh", ["run", *POD, "--env", "A B"], "--env A B is not NAME=VALUE"),
    ("tpu_vm.sh", ["watch", *POD, "--poll", "soon", *TRAIN], "--poll soon is no number"),
    ("tpu_multislice.sh", ["create", *POD], "give --slices, 2 or more"),
    ("gke/submit.sh", ["apply", *JOB[:2], *TRAIN], "--image is required"),
    ("gke/submit.sh", ["apply", *JOB[:4], *TRAIN], "--topology '' is not like"),
    ("gke/submit.sh", ["apply", *JOB], "give the arguments of the training"),
    ("gke/submit.sh", ["apply", *JOB, "--chips-per-host", "3", *TRAIN], "256 chips, not a multiple of 3 per host"),
    ("gke/submit.sh", ["apply", *JOB, "--slices", "none", *TRAIN], "--slices none is no positive number"),
    ("gke/submit.sh", ["logs", *JOB, "--worker", "3"], "--worker 3 is neither 0 nor all"),
    ("gpu.sh", [], "give a configuration"),
    ("gpu.sh", ["--num-processes", "2", *TRAIN], "--coordinator is missing"),
    ("gpu.sh", ["--coordinator=a", "--num-processes=2", "--process-id=0", *TRAIN], "--coordinator a is not like HOST:PORT"),
    ("gpu.sh", ["--coordinator=a:1", "--num-processes=2", "--process-id=2", *TRAIN], "numbered from 0 to 1"),
    ("gpu.sh", ["--cluster", "--process-id=2", *TRAIN], "--cluster excludes"),
    ("worker.sh", ["begin"], "unknown command begin"),
  ],
)
def test_errors_are_one_line(stand_ins, script, arguments, message):
  stand_ins.program("gcloud", GCLOUD)
  stand_ins.program("kubectl", PROGRAM)
  stand_ins.environment["STDIT_JAX_HOME"] = str(stand_ins.folder / "home")
  result = stand_ins.run(script, *arguments, code=2)
  assert result.stderr.count("\n") == 1, result.stderr
  assert result.stderr.startswith("error: ")
  assert message in result.stderr
  assert not result.stdout
  assert not stand_ins.calls


@pytest.mark.parametrize(
  ("script", "arguments"),
  [
    *[("tpu_vm.sh", [verb, *POD]) for verb in ("create", "copy", "install", "logs", "status", "stop", "delete")],
    *[("tpu_vm.sh", [verb, *POD, *TRAIN]) for verb in ("run", "watch")],
    ("tpu_multislice.sh", ["watch", *SLICES, *TRAIN]),
    ("gpu.sh", TRAIN),
    ("gke/submit.sh", ["build", *JOB]),
    ("gke/submit.sh", ["apply", *JOB, *TRAIN]),
    *[("gke/submit.sh", [verb, *JOB]) for verb in ("status", "logs", "delete")],
  ],
)
def test_dry_run_prints_shell_commands_and_runs_none(stand_ins, script, arguments):
  for name in ("gcloud", "kubectl", "docker", "git", "tar"):
    stand_ins.program(name, PROGRAM)
  separator = arguments.index("--") if "--" in arguments else len(arguments)
  text = stand_ins.run(script, *arguments[:separator], "--dry-run", *arguments[separator:]).stdout
  assert not stand_ins.calls
  assert text
  subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_a_dry_run_prints_the_commands_of_a_run(stand_ins):
  """A shell that runs the printed line calls gcloud with the same words."""
  stand_ins.program("gcloud", PROGRAM)
  odd = ["--config.sample.prompts=('it''s \"a\" $HOME; `ls`',)", "--config.output=gs://b/a  b\nc", "--config.init="]
  options, train = ["run", *POD, "--env", "A=x 'y'"], ["--", "--config", "configs/film.py", *odd]
  line = stand_ins.run("tpu_vm.sh", *options, "--dry-run", *train).stdout
  subprocess.run(["bash", "-c", line], env=stand_ins.environment, stdin=subprocess.DEVNULL, check=True)
  stand_ins.run("tpu_vm.sh", *options, *train)
  printed, run = stand_ins.calls
  assert printed["argv"] == run["argv"]
  # The shell of a worker passes the arguments unchanged to the training program.
  remote = run["argv"][-1].removeprefix("--command=").replace("bash stdit_jax/code/launch/worker.sh start", "printf '%s\\0'")
  words = subprocess.run(["bash", "-c", remote], capture_output=True, text=True, check=True).stdout.split("\0")
  assert words == ["--config", "configs/film.py", *odd, "--config.platform=tpu", ""]
  assert "'A=x '\\''y'\\'''" in remote


def test_the_batches_in_the_readme_divide_by_the_chips_of_its_pods():
  """`choose_splits` raises an error if a batch does not divide."""
  import jax

  from configs import film
  from stdit_jax.parallel.mesh import AXES
  from stdit_jax.training.objectives import make_objective
  from stdit_jax.training.stage_data import choose_splits
  from stdit_jax.training.stages import make_stages

  section = (ROOT / "README.md").read_text().partition("## On a pod")[2].partition("\n## ")[0]
  chips = [int(a) * int(b) for a, b in re.findall(r"pod=\(.*--topology \w+:(\d+)x(\d+)", section)]
  assert len(chips) == 2
  config = film.get_config()
  config.data.tables = (("table.csv", 1),)
  config.data.reference_devices = int(re.search(r"reference_devices=(\d+)", section)[1])
  for stage in make_stages(config):
    buckets = stage.config.data.parsed_buckets()
    for count in chips:
      choose_splits(stage, buckets, jax.sharding.AbstractMesh((count, 1, 1, 1), AXES), make_objective(stage.config))
