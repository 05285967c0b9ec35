"""Tests that tpu_vm.sh and tpu_multislice.sh call a stand-in for gcloud with the right commands, in the right order."""

import re
import shutil
import subprocess

import pytest

from tests.launch.stand_ins import GCLOUD, ROOT, wait_for

POD = ["--name", "film", "--zone", "z", "--topology", "v5e:16x16"]
VERBS = ("describe", "list", "create", "delete", "ssh", "scp")
TRAIN = ["--poll", "0", "--", "--config", "configs/film.py", "--config.output=gs://bucket/film"]


@pytest.fixture
def gcloud(stand_ins):
  stand_ins.program("gcloud", GCLOUD)
  # Packing the project takes longer than all other work, so only two tests do it.
  stand_ins.program("tar", "record(packed=bool(sys.stdin.read()))")
  return stand_ins


def deeds(stand_ins):
  """The commands that gcloud got, without queries, as one word each."""
  words = []
  for argv in [call["argv"] for call in stand_ins.calls if "argv" in call]:
    verb = next(word for word in argv if word in VERBS)
    if verb == "ssh":
      verb = match[1] if (match := re.search(r"worker\.sh (\w+)", argv[-1])) else "unpack"
    if verb not in ("describe", "list", "status"):
      words.append(verb)
  return words


PREPARED = ["scp", "unpack", "install", "start"]


@pytest.mark.parametrize(
  ("script", "options", "expected"),
  [
    (
      "tpu_vm.sh",
      ["--topology", "v5e:16x16", "--spot"],
      "tpu-vm create film --zone=z --quiet --accelerator-type=v5litepod-256 --version=v2-alpha-tpuv5-lite --spot",
    ),
    (
      "tpu_vm.sh",
      ["--accelerator-type=v6e-8", "--project=p", "--queued", "--reserved", "--create-flag=--labels=a=b", "--network=n"],
      "queued-resources create film --zone=z --quiet --project=p --accelerator-type=v6e-8 --runtime-version=v2-alpha-tpuv6e "
      "--node-id=film --reserved --labels=a=b --network=n",
    ),
    (
      "tpu_vm.sh",
      ["--topology", "v5p:4x8x8", "--internal-ips", "--runtime-version", "own"],
      "tpu-vm create film --zone=z --quiet --type=v5p --topology=4x8x8 --version=own --internal-ips",
    ),
    (
      "tpu_multislice.sh",
      ["--topology", "v4:2x2x4", "--slices", "3"],
      "queued-resources create film --zone=z --quiet --type=v4 --topology=2x2x4 --runtime-version=tpu-ubuntu2204-base "
      "--node-count=3 --node-prefix=film",
    ),
  ],
)
def test_create_calls_gcloud(gcloud, script, options, expected):
  gcloud.script(states=["ABSENT"])
  gcloud.run(script, "create", "--name", "film", "--zone", "z", *options)
  assert gcloud.calls[-1]["argv"] == ["compute", "tpus", *expected.split()]
  assert deeds(gcloud) == ["create"]


@pytest.mark.parametrize(
  ("command", "state", "code", "expected"),
  [
    ("create", "ACTIVE", 0, []),
    ("create", "WAITING_FOR_RESOURCES", 0, []),
    ("create", "SUSPENDED", 2, []),
    ("create", "OFFLINE", 1, []),  # a failed query does not count as absent
    ("delete", "ABSENT", 0, []),
    ("delete", "SUSPENDED", 0, ["delete"]),
    ("delete", "OFFLINE", 1, []),
  ],
)
def test_finished_work_is_not_repeated(gcloud, command, state, code, expected):
  gcloud.script(states=[state])
  gcloud.run("tpu_vm.sh", command, *POD, "--queued", code=code)
  assert deeds(gcloud) == expected


def test_commands_reach_all_workers_of_all_slices(gcloud):
  for command in ("copy", "install", "run", "stop"):
    gcloud.run("tpu_multislice.sh", command, *POD, "--internal-ip", *TRAIN)
  assert deeds(gcloud) == [*PREPARED, "stop"]
  for argv in [call["argv"] for call in gcloud.calls if "argv" in call]:
    assert argv[:3] == ["compute", "tpus", "queued-resources"]
    assert {"--worker=all", "--node=all", "--internal-ip"} < set(argv)


def test_logs_of_one_worker(gcloud):
  gcloud.run("tpu_vm.sh", "logs", *POD, "--worker", "3", "--tunnel-through-iap")
  expected = "alpha compute tpus tpu-vm ssh film --zone=z --quiet --tunnel-through-iap --worker=3"
  assert gcloud.calls[0]["argv"][:-1] == expected.split()


@pytest.mark.parametrize(
  ("states", "nodes", "workers", "expected", "code"),
  [
    # From nothing to the end.
    (["ABSENT", "PROVISIONING", "ACTIVE"], ["READY"], [["absent"], ["running"], ["finished"]], ["create", *PREPARED], 0),
    # Preempted: waits until the machine can be deleted, creates it again and trains again.
    (
      ["ABSENT", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "DELETING", "ABSENT", "WAITING_FOR_RESOURCES", "ACTIVE"],
      ["READY"],
      [["absent"], ["running"], ["absent"], ["running"], ["finished"]],
      ["create", *PREPARED, "delete", "create", *PREPARED],
      0,
    ),
    # The queued resource is still ACTIVE after its node was preempted.
    (
      ["ACTIVE", "ACTIVE", "ABSENT", "ACTIVE"],
      ["READY", "PREEMPTED", "READY"],
      [["running"], ["absent"], ["finished"]],
      ["delete", "create", *PREPARED],
      0,
    ),
    # A failed query does not count as absent.
    (["ACTIVE", "OFFLINE", "OFFLINE", "ACTIVE"], ["READY"], [["running"], ["finished"]], [], 0),
    # A worker was rebooted in place.
    (["ACTIVE"], ["READY"], [["running", "interrupted"], ["running"], ["finished"]], ["start"], 0),
    # One worker has finished, and the other will finish soon.
    (["ACTIVE"], ["READY"], [["running", "finished"], ["finished"]], [], 0),
    # An error of the user ends the training on all workers. A stop by hand ends watch.
    (["ACTIVE"], ["READY"], [["running"], ["failed 2", "running"]], ["stop"], 1),
    (["ACTIVE"], ["READY"], [["running"], ["stopped"]], [], 0),
    # The state of an earlier run does not end this run.
    (["ACTIVE"], ["READY"], [["failed 2"], ["running"], ["finished"]], PREPARED, 0),
    (["ACTIVE"], ["READY"], [["finished"], ["running"], ["finished"]], PREPARED, 0),
    # A refused request ends watch, unless the machine existed before.
    (["FAILED", "ABSENT", "FAILED"], ["READY"], [], ["delete", "create", "delete"], 2),
    (
      ["ACTIVE", "FAILED", "ABSENT", "FAILED", "ABSENT", "ACTIVE"],
      ["READY"],
      [["running"], ["absent"], ["finished"]],
      ["delete", "create", "delete", "create", *PREPARED],
      0,
    ),
  ],
)
def test_watch_reacts_to_each_state(gcloud, states, nodes, workers, expected, code):
  gcloud.script(states=states, nodes=nodes, workers=workers)
  gcloud.run("tpu_vm.sh", "watch", *POD, "--queued", *TRAIN, code=code)
  assert deeds(gcloud) == expected
  assert [call["packed"] for call in gcloud.calls if "packed" in call] == [True]  # packed once: each start uses the same code


def test_watch_recreates_all_slices_after_one_is_lost(gcloud):
  gcloud.script(
    states=["ACTIVE", "ACTIVE", "ABSENT", "ACTIVE"],
    nodes=["READY\nREADY", "READY\nPREEMPTED", "READY\nREADY"],
    workers=[["running"], ["absent", "absent"], ["finished", "finished"]],
  )
  gcloud.run("tpu_multislice.sh", "watch", *POD, "--slices", "2", *TRAIN)
  assert deeds(gcloud) == ["delete", "create", *PREPARED]
  listing = next(call["argv"] for call in gcloud.calls if "list" in call.get("argv", ()))
  pattern = next(word for word in listing if word.startswith("--filter=")).removeprefix('--filter=name~"').removesuffix('"')
  names = ["film-0", "projects/p/locations/z/nodes/film-1", "my-film-0", "film-0-b", "film"]
  assert [bool(re.search(pattern, name)) for name in names] == [True, True, False, False, False]


def test_watch_ends_if_the_machine_cannot_be_created(gcloud):
  gcloud.script(states=["ABSENT"], create=[1])
  gcloud.run("tpu_vm.sh", "watch", *POD, *TRAIN, code=2)
  assert deeds(gcloud) == ["create", "create"]


def test_watch_deletes_the_machine_with_delete_when_finished(gcloud):
  gcloud.script(states=["READY"], workers=[["finished"]])
  gcloud.run("tpu_vm.sh", "watch", *POD, "--delete-when-finished", *TRAIN)
  assert gcloud.calls[-1]["argv"] == ["compute", "tpus", "tpu-vm", "delete", "film", "--zone=z", "--quiet"]


def test_watch_also_deletes_the_machine_of_a_failed_training(gcloud):
  """Before that it prints the logs, which are deleted with the machine."""
  gcloud.script(states=["READY"], workers=[["running"], ["failed 2"]])
  gcloud.run("tpu_vm.sh", "watch", *POD, "--delete-when-finished", *TRAIN, code=1)
  *_, logs, last = [call["argv"] for call in gcloud.calls if "argv" in call]
  assert "worker.sh logs" in logs[-1]
  assert "delete" in last


# A stand-in for gcloud with two workers, which are folders. Commands over ssh run there, with the real worker.sh. Deleting the
# machine kills its processes.
MACHINE = """
import glob, shutil, signal, subprocess
words = sys.argv[1:]
record(argv=words)
verb = next(word for word in words if word in ("describe", "list", "create", "delete", "ssh", "scp"))
state = folder / "state"
homes = [folder / "worker0", folder / "worker1"]
if verb == "create":
  for home in homes:
    home.mkdir()
  state.write_text("ACTIVE")
elif verb == "delete":
  for home in homes:
    for pids in home.glob("stdit_jax/pids"):
      try:
        os.killpg(int(pids.read_text().split()[0]), signal.SIGKILL)
      except ProcessLookupError:
        pass
    shutil.rmtree(home)
  state.unlink()
elif verb == "describe":
  if not state.exists():
    sys.exit("ERROR: NOT_FOUND: no such resource")
  print(state.read_text())
elif verb == "scp":
  for home in homes:
    shutil.copy(words[words.index("scp") + 1], home)
elif verb == "ssh":
  command = words[-1].removeprefix("--command=")
  codes = [
    subprocess.run(["bash", "-c", command], cwd=home, env={**os.environ, "HOME": str(home), "WORKER": str(i)}).returncode
    for i, home in enumerate(homes)
  ]
  sys.exit(max(codes))
"""

# The Python of a worker: makes an environment and trains. The test scripts the end of each training: an exit code, or a
# preemption. The scripts are in a folder that outlives the machine.
PYTHON = """
import shutil, time
if sys.argv[1:3] == ["-m", "venv"]:
  path = pathlib.Path(sys.argv[3]) / "bin"
  path.mkdir(parents=True)
  shutil.copy(sys.argv[0], path / "python")
  (path / "activate").touch()
elif sys.argv[1:3] == ["-m", "pip"]:
  record(pip=sys.argv[3:])
elif sys.argv[1:3] == ["-m", "stdit_jax.train"]:
  record(train=sys.argv[3:], distributed=os.environ["STDIT_JAX_DISTRIBUTED"], code=os.path.exists("stdit_jax/train.py"))
  deed = take("training" + os.environ["WORKER"])
  if deed == "preempted":
    (folder / "state").write_text("SUSPENDED")
    time.sleep(60)
  sys.exit(deed)
elif sys.argv[1] != "-c":
  sys.exit(99)
"""


@pytest.mark.skipif(not shutil.which("setsid") or not shutil.which("flock"), reason="workers are Linux machines")
def test_watch_finishes_the_training_after_a_preemption(stand_ins):
  """All scripts are real. Only gcloud and the Python of the workers are stand-ins."""
  stand_ins.program("gcloud", MACHINE)
  stand_ins.environment |= {"PYTHON": str(stand_ins.program("python", PYTHON)), "STDIT_JAX_RESTART_WAIT": "0"}
  stand_ins.script(training0=[75, "preempted", 0], training1=[75, "preempted", 75, 0])
  odd = "--config.sample.prompts=('it''s \"a\" $HOME\n',)"
  result = stand_ins.run("tpu_vm.sh", "watch", *POD, "--queued", *TRAIN, odd)
  assert result.stdout.splitlines()[-1].endswith("training has finished")
  assert deeds(stand_ins) == ["create", *PREPARED, "delete", "create", *PREPARED]
  trained = [call for call in stand_ins.calls if "train" in call]
  assert len(trained) == 7  # [75, preempted] on two workers, then [0] and [75, 0]
  expected = ["--config", "configs/film.py", "--config.output=gs://bucket/film", odd, "--config.platform=tpu"]
  assert all(call == {"train": expected, "distributed": "1", "code": True} for call in trained)
  installed = [call["pip"] for call in stand_ins.calls if "pip" in call]
  assert len(installed) == 4
  assert all(words[-5:] == ["-r", "requirements.txt", "jax[tpu]", "-c", "constraints.txt"] for words in installed)


@pytest.mark.skipif(not shutil.which("setsid") or not shutil.which("flock"), reason="workers are Linux machines")
def test_a_worker_starts_one_training_and_stops_it(stand_ins):
  home = stand_ins.folder / "home"
  stand_ins.environment["STDIT_JAX_HOME"] = str(home)
  (home / "venv" / "bin").mkdir(parents=True)
  waiting = """
    import signal, time
    signal.signal(signal.SIGTERM, lambda *_: (record(saved=True), sys.exit(75)))
    record(train=sys.argv[3:])
    time.sleep(60)
  """
  shutil.move(stand_ins.program("python", waiting), home / "venv" / "bin" / "python")

  def status():
    return stand_ins.run("worker.sh", "status").stdout.split()[-1]

  assert status() == "absent"
  stand_ins.run("worker.sh", "start", "--config", "a b")
  assert status() == "running"
  assert "training already" in stand_ins.run("worker.sh", "start", "--config", "a b").stdout
  assert "with other arguments" in stand_ins.run("worker.sh", "start", "--config", "c", code=2).stderr
  wait_for(lambda: stand_ins.calls)
  assert stand_ins.run("worker.sh", "stop").stdout.endswith(" stopped\n")
  assert stand_ins.calls == [{"train": ["--config", "a b"]}, {"saved": True}]
  assert status() == "stopped"


@pytest.mark.skipif(not shutil.which("flock"), reason="workers are Linux machines")
def test_a_worker_reports_a_failed_training(stand_ins):
  home = stand_ins.folder / "home"
  stand_ins.environment["STDIT_JAX_HOME"] = str(home)
  (home / "venv" / "bin").mkdir(parents=True)
  shutil.move(stand_ins.program("python", "sys.exit(2)"), home / "venv" / "bin" / "python")
  stand_ins.run("worker.sh", "background", "--config", "x")
  assert stand_ins.run("worker.sh", "status").stdout.endswith(" failed 2\n")


def test_copy_packs_the_files_that_git_would_track(stand_ins):
  """Copies tracked and new files, but no ignored ones."""
  stand_ins.program(
    "gcloud", "import shutil; shutil.copy(sys.argv[5], folder) if 'scp' in sys.argv else record(argv=sys.argv[1:])"
  )
  stand_ins.run("tpu_vm.sh", "copy", *POD)
  command = ["tar", "-tzf", str(stand_ins.folder / "stdit_jax.tar.gz")]
  packed = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())
  listed = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert packed == {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
  assert {"stdit_jax/train.py", "launch/worker.sh"} < packed
  assert not any(name.endswith(".pyc") for name in packed)
