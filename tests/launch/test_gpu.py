"""Tests of how processes find each other: gpu.sh sets environment variables, and `connect_processes` reads them."""

import socket
import subprocess
import sys

import pytest

from stdit_jax.cli import connect_processes
from tests.launch.stand_ins import ROOT

VARIABLES = ("STDIT_JAX_DISTRIBUTED", "STDIT_JAX_COORDINATOR", "STDIT_JAX_NUM_PROCESSES", "STDIT_JAX_PROCESS_ID")

# The Python of a GPU host, with everything installed.
PYTHON = """
import shutil
if sys.argv[1:3] == ["-m", "venv"]:
  path = pathlib.Path(sys.argv[3]) / "bin"
  path.mkdir(parents=True)
  shutil.copy(sys.argv[0], path / "python")
  (path / "activate").write_text(f"PATH={path}:$PATH")
elif sys.argv[1] == "-m":
  record(argv=sys.argv[2:], variables={name: value for name, value in os.environ.items() if name.startswith("STDIT_JAX_")})
  sys.exit(take("codes", 0))
"""


@pytest.mark.parametrize(
  ("options", "variables"),
  [
    ([], {}),
    (["--cluster"], {"STDIT_JAX_DISTRIBUTED": "1"}),
    (
      ["--coordinator", "10.0.0.1:1234", "--num-processes=2", "--process-id", "1"],
      {"STDIT_JAX_COORDINATOR": "10.0.0.1:1234", "STDIT_JAX_NUM_PROCESSES": "2", "STDIT_JAX_PROCESS_ID": "1"},
    ),
  ],
)
def test_gpu_sh_trains_and_restarts(stand_ins, options, variables):
  stand_ins.environment |= {
    "PYTHON": str(stand_ins.program("python", PYTHON)),
    "STDIT_JAX_VENV": str(stand_ins.folder / "venv"),
    "STDIT_JAX_RESTART_WAIT": "0",
  }
  stand_ins.script(codes=[0, 75, 0])  # the installation, then two starts
  stand_ins.run("gpu.sh", *options, "--config", "configs/film.py", "--config.init=a b")
  install, *trained = stand_ins.calls
  assert install["argv"][-5:] == ["-r", "requirements.txt", "jax[cuda12]", "-c", "constraints.txt"]
  assert len(trained) == 2
  for call in trained:
    assert call["argv"] == ["stdit_jax.train", "--config", "configs/film.py", "--config.init=a b", "--config.platform=gpu"]
    assert {name: value for name, value in call["variables"].items() if name in VARIABLES} == variables


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (("", "10.0.0.1:1234", "", ""), "STDIT_JAX_NUM_PROCESSES and STDIT_JAX_PROCESS_ID must be set too"),
    (("1", "10.0.0.1:1234", "2", ""), "STDIT_JAX_PROCESS_ID must be set too"),
    (("", "10.0.0.1", "2", "0"), "STDIT_JAX_COORDINATOR=10.0.0.1 is not like HOST:PORT"),
    (("", "::1:1234", "2", "0"), "is not like HOST:PORT"),
    (("", "[::1]:1234", "2", "2"), "STDIT_JAX_PROCESS_ID=2: processes are numbered 0, 1"),
    (("", "a:1", "two", "0"), "processes are numbered 0, 1"),
    (("", "a:1", "2", "-1"), "processes are numbered 0, 1"),
  ],
)
def test_wrong_environment_variables_are_refused(monkeypatch, values, message):
  for name, value in zip(VARIABLES, values):
    monkeypatch.setenv(name, value)
  with pytest.raises(ValueError, match=message.replace("[", r"\[")):
    connect_processes()


def test_without_variables_a_process_runs_alone(monkeypatch):
  for name in VARIABLES:
    monkeypatch.delenv(name, raising=False)
  connect_processes()  # if it connected, it would raise, since devices are in use


def test_the_error_without_a_cluster_names_the_variables(stand_ins):
  program = "from stdit_jax.cli import *\nwith one_line_errors(): connect_processes()"
  environment = {**stand_ins.environment, "STDIT_JAX_DISTRIBUTED": "1", "JAX_PLATFORMS": "cpu"}
  result = subprocess.run(
    [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
  )
  assert result.returncode == 2
  assert result.stderr.startswith("error: JAX found no cluster here")
  assert result.stderr.rstrip().endswith("STDIT_JAX_PROCESS_ID")


def test_two_processes_find_each_other(stand_ins):
  program = "from stdit_jax.cli import *\nconnect_processes()\nimport jax\nprint(jax.process_index(), jax.process_count())"
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  environment = {**stand_ins.environment, "JAX_PLATFORMS": "cpu", "STDIT_JAX_COORDINATOR": f"localhost:{port}"}
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", program],
      cwd=ROOT,
      env=environment | {"STDIT_JAX_NUM_PROCESSES": "2", "STDIT_JAX_PROCESS_ID": str(i)},
      stdout=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  assert [process.communicate(timeout=60)[0].split() for process in processes] == [["0", "2"], ["1", "2"]]
