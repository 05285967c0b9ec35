"""Tests of gke/submit.sh with stand-ins for kubectl and docker: its commands, and its manifest as Kubernetes reads it."""

import io
import re
import tarfile

import pytest
import yaml

from tests.launch.stand_ins import PROGRAM, ROOT

JOB = ["--name", "film", "--image", "registry/image:1", "--topology", "v5e:16x16"]
TRAIN = ["--", "--config", "configs/film.py"]


@pytest.fixture
def kubectl(stand_ins):
  stand_ins.program("kubectl", PROGRAM)
  return stand_ins


def manifest(stand_ins, *arguments):
  return yaml.safe_load(stand_ins.run("gke/submit.sh", "render", *arguments).stdout)


def parts(job):
  """The replicated job, its job and its pod."""
  (replicated,) = job["spec"]["replicatedJobs"]
  return replicated, replicated["template"]["spec"], replicated["template"]["spec"]["template"]["spec"]


def test_apply_submits_the_manifest(kubectl):
  kubectl.run("gke/submit.sh", "apply", *JOB, "--namespace", "team", "--context=c", *TRAIN)
  (call,) = kubectl.calls
  assert call["argv"] == ["kubectl", "--namespace=team", "--context=c", "apply", "--filename=-"]
  assert yaml.safe_load(call["stdin"]) == manifest(kubectl, *JOB, *TRAIN)


@pytest.mark.parametrize(
  ("options", "accelerator", "hosts", "chips"),
  [
    (["--topology", "v5e:16x16"], "tpu-v5-lite-podslice", 64, 4),
    (["--topology", "v6e:2x4", "--chips-per-host", "8"], "tpu-v6e-slice", 1, 8),
    (["--topology", "v5p:4x8x8"], "tpu-v5p-slice", 64, 4),
    (["--topology", "v4:2x2x4"], "tpu-v4-podslice", 4, 4),
    (["--topology", "v5e:1x1"], "tpu-v5-lite-podslice", 1, 1),
  ],
)
def test_the_topology_sets_hosts_and_chips(stand_ins, options, accelerator, hosts, chips):
  replicated, job, pod = parts(manifest(stand_ins, *JOB[:4], *options, "--slices", "2", *TRAIN))
  assert replicated["replicas"] == 2
  assert job["parallelism"] == job["completions"] == hosts
  assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
  topology = options[1].split(":")[1]
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": accelerator,
    "cloud.google.com/gke-tpu-topology": topology,
  }


def test_only_exit_code_2_ends_the_run(stand_ins):
  """Code 2 fails the job by policy, which fails the set. Other codes fail the job by its limit, which restarts the set."""
  text = manifest(stand_ins, *JOB, "--max-restarts", "7", *TRAIN)
  _, job, pod = parts(text)
  assert job["backoffLimit"] == 0
  assert pod["restartPolicy"] == "Never"  # else Kubernetes refuses the policy
  name = pod["containers"][0]["name"]
  on_exit_codes = {"containerName": name, "operator": "In", "values": [2]}
  assert job["podFailurePolicy"] == {"rules": [{"action": "FailJob", "onExitCodes": on_exit_codes}]}
  (rule,) = text["spec"]["failurePolicy"]["rules"]
  assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
  assert text["spec"]["failurePolicy"]["maxRestarts"] == 7


def test_options_change_the_manifest(stand_ins):
  plain = parts(manifest(stand_ins, *JOB, *TRAIN))[2]
  assert not {"tolerations", "serviceAccountName"} & set(plain)
  spot = parts(manifest(stand_ins, *JOB, "--spot", "--service-account", "writer", "--grace-seconds", "25", *TRAIN))[2]
  assert spot["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  assert [toleration["key"] for toleration in spot["tolerations"]] == ["cloud.google.com/gke-spot"]
  assert spot["serviceAccountName"] == "writer"
  assert spot["terminationGracePeriodSeconds"] == 25
  reserved = parts(manifest(stand_ins, *JOB, "--reservation", "ours", *TRAIN))[2]
  assert reserved["nodeSelector"]["cloud.google.com/reservation-name"] == "ours"


def test_special_characters_in_arguments_arrive_unchanged(stand_ins):
  odd = ["--config.a='it''s: \"b\" #'", "--config.b=${NAME} $HOME", "--config.c=\n- d", "--config.train=.*$(X)"]
  container = parts(manifest(stand_ins, *JOB, "--env", "A=b: 'c'", *TRAIN, *odd))[2]["containers"][0]
  unexpanded = [word.replace("$$(", "$(") for word in container["args"]]  # as Kubernetes reads it
  assert unexpanded == ["--config", "configs/film.py", *odd, "--config.platform=tpu"]
  assert not any(re.search(r"(?<!\$)\$\(", word) for word in container["args"])
  assert container["env"] == [{"name": "STDIT_JAX_DISTRIBUTED", "value": "1"}, {"name": "A", "value": "b: 'c'"}]


@pytest.mark.parametrize(
  ("command", "expected"),
  [
    (["delete"], "delete jobset film --ignore-not-found"),
    (
      ["logs"],
      "logs --follow --prefix --tail=200 --max-log-requests=10000 --selector=jobset.sigs.k8s.io/jobset-name=film,"
      "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0",
    ),
    (
      ["logs", "--worker", "all"],
      "logs --follow --prefix --tail=200 --max-log-requests=10000 --selector=jobset.sigs.k8s.io/jobset-name=film",
    ),
  ],
)
def test_other_commands_call_kubectl(kubectl, command, expected):
  kubectl.run("gke/submit.sh", *command, "--name", "film")
  (call,) = kubectl.calls
  assert call["argv"] == ["kubectl", *expected.split()]


def test_build_sends_the_code_and_pushes(stand_ins):
  stand_ins.program(
    "docker", "record(argv=sys.argv[1:]); sys.argv[1] == 'build' and (folder / 'context').write_bytes(sys.stdin.buffer.read())"
  )
  stand_ins.run("gke/submit.sh", "build", "--image", "registry/image:1")
  build, push = (call["argv"] for call in stand_ins.calls)
  assert build == ["build", "--platform=linux/amd64", "--tag=registry/image:1", "--file=launch/gke/Dockerfile", "-"]
  assert push == ["push", "registry/image:1"]
  with tarfile.open(fileobj=io.BytesIO((stand_ins.folder / "context").read_bytes())) as context:
    names = set(context.getnames())
  copied = re.findall(r"^COPY (.*) \./$", (ROOT / "launch/gke/Dockerfile").read_text(), re.MULTILINE)[0].split()
  assert {"launch/gke/Dockerfile", "stdit_jax/train.py", *copied} <= names
