"""Programs compiled for TPUs without a TPU: communication, memory and the output of `plan`. Needs libtpu."""

import json
import math
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from stdit_jax import plan
from stdit_jax.models import t5
from stdit_jax.planning.programs import Compiler, Job
from stdit_jax.training.checkpoints import plain
from stdit_jax.training.objectives import make_objective
from stdit_jax.training.stages import make_stages
from tests.tiny_run import ROOT

SMALL = """
from configs import open_sora_1_2


def get_config():
  config = open_sora_1_2.get_config()
  config.model.fields.update(hidden_size=1024, num_heads=8, depth=2, caption_channels=64)
  config.text_encoder.update(name="byt5-tiny", tokenizer="byt5")
  return config
"""


def command_line(folder, *arguments):
  """Arguments of the command for a small model of width 1024."""
  (folder / "small.py").write_text(SMALL)
  return ["--config", str(folder / "small.py"), "--cache", str(folder / "cache"), *arguments]


def run_plan(folder, *arguments):
  command = [sys.executable, "-m", "stdit_jax.plan", *command_line(folder, *arguments)]
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def plan_here(capsys, folder, *arguments):
  """Output of the command, which runs in this process and compiles in another one."""
  plan.main(command_line(folder, *arguments))
  return capsys.readouterr().out


def test_fsdp_communicates_no_more_than_it_must(tmp_path, capsys):
  """Inside the scan each layer gathers its kernels twice, in bfloat16, and scatters their gradients once.

  Only gradients of biases and norms are summed as well. Activations do not move. The second call compiles nothing. The text
  encoder has a line of its own.
  """
  pytest.importorskip("libtpu")
  arguments = ("--config.mesh.data=1", "--topology", "v5e:2x4", "--bucket", "144p:1:8", "--stage", "stage1")
  first = run_plan(tmp_path, *arguments, "--output", str(tmp_path / "plan.json"))
  assert first.returncode == 0, first.stderr
  assert "1 of 1 buckets fit" in first.stdout
  result, text = json.loads((tmp_path / "plan.json").read_text())
  assert re.search(
    r"stage1: text encoder before the step \(144p x 1, 8 rows\): \S+ / 15.8 GiB, fits, compiled in", first.stdout
  )
  assert sum(text["resident"].values()) < text["peak"] < result["limit"]
  kernels = 2 * 16 * 1024**2 * 2  # two blocks of 16 width^2, bfloat16
  assert result["in_loop"]["all-gather"] == 2 * kernels
  assert result["in_loop"]["reduce-scatter"] == kernels
  assert result["in_loop"]["all-reduce"] < 0.002 * kernels
  assert result["in_loop"]["all-to-all"] == result["in_loop"]["collective-permute"] == 0
  state = sum(result["resident"][name] for name in ("parameters", "average", "optimizer", "gradients"))
  assert state < result["peak"] < result["limit"]
  rate = 8 / 2 / result["roofline"]["step"]  # two hosts of four chips
  assert first.stdout.partition("144p x 1 ")[2].splitlines()[0].endswith(f"  {rate:,.0f}")
  again = plan_here(capsys, tmp_path, *arguments)
  assert next(line for line in again.splitlines() if "144p x 1 " in line) in first.stdout
  # The text of a program is its key, so a change without effect on the program, such as the run's folder, compiles nothing.
  changed = plan_here(capsys, tmp_path, *arguments, "--config.checkpoint_every=7")
  assert next(line for line in changed.splitlines() if "144p x 1 " in line) in first.stdout
  assert len(list((tmp_path / "cache").glob("program-*"))) == 2
  assert len(list((tmp_path / "cache").glob("job-*"))) == 4


def test_split_tokens_use_all_to_all(tmp_path):
  """Tokens move between attention over space and over time, twice per layer and pass. Kernels are gathered as before.

  The model is narrower than above, since XLA compiles it in a third of the time.
  """
  pytest.importorskip("libtpu")
  width = 256
  mesh = ("--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.sequence=2", "--config.split_tokens=always")
  model = (f"--config.model.fields.hidden_size={width}", "--config.model.fields.num_heads=2")
  mesh += ("--config.text_encoder.where=disk",)  # without the text encoder's program
  plan.main(
    command_line(
      tmp_path, *mesh, *model, "--topology", "v5e:2x2", "--bucket", "144p:17:2", "--stage", "stage1",
      "--output", str(tmp_path / "plan.json"),
    )
  )  # fmt: skip
  (result,) = json.loads((tmp_path / "plan.json").read_text())
  assert result["split_tokens"]
  tokens = 6 * 150 * width * 2 // 2  # one sample on one device: 5 latent frames, padded to 6, and 150 tokens
  assert 0 < result["in_loop"]["all-to-all"] <= 8 * tokens
  kernels = 2 * 16 * width**2 * 2
  assert 2 * kernels <= result["in_loop"]["all-gather"] < 2.01 * kernels


def test_memory_of_the_text_encoder_includes_the_state(tmp_path):
  """The encoder needs the same memory of its own in both jobs. Only beside the larger state it does not fit."""
  pytest.importorskip("libtpu")
  namespace, results = {}, []
  exec(SMALL, namespace)
  config = namespace["get_config"]()
  config.mesh.fsdp = 1
  for width, depth in ((256, 1), (2048, 26)):
    config.model.fields.update(hidden_size=width, depth=depth)
    job = Job(plain(config), "stage1", ("144p", 1, 512), "v5e:2x2", text=True)
    results.append(Compiler(tmp_path, job.topology)(job))
  small, large = results
  assert small["own_peak"] == large["own_peak"]
  assert small["fits"]
  assert not large["fits"]
  cond = jax.tree.leaves(make_objective(make_stages(config)[0].config).batch(("144p", 1), 512)["cond"])
  features = sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in cond) // 4  # of one device, with the mask
  for result in results:
    weights = 2 * sum(x.size for x in jax.tree.leaves(t5.init_shapes(t5.get_config("byt5-tiny"))))  # bfloat16
    batch = result["resident"]["next batch"]
    state = sum(result["resident"].values()) - batch
    # The program's own peak has weights and features, which are also in the state and in the next batch.
    assert result["peak"] == result["own_peak"] + state - weights + 2 * batch - features


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("--topology", "v5e-16"), "--topology 'v5e-16' is unknown. Give KIND:AxB"),
    (("--topology", "v5e:2x4", "--stage", "stage9"), "--stage 'stage9' is none of images, qk_norm, rectified_flow"),
    (("--topology", "v5e:2x4", "--stage", "stage1", "--bucket", "144p:52"), "has no batch size in this stage; give one as"),
    (("--platform", "gpu", "--topology", "v5e:2x4"), "--platform gpu needs --gpu KIND:COUNT, as in h100:8, and nothing"),
    (("--platform", "gpu", "--gpu", "h100:12"), "COUNT 1, 2, 4 or a multiple of 8"),
    (("--topology", "v5e:2x4", "--write-buckets", "x.py"), "--write-buckets needs --search-batch-size"),
    (("--topology", "v5e:2x4", "--config.mesh.fdsp=4"), "there is no key 'mesh.fdsp'; did you mean 'mesh.fsdp'?"),
    (("--topology", "v5e:2x4", "--bucket", "144p:51:12", "--stage", "stage1"), "the batch of 12 of bucket 144p x 51"),
    (("--topology", "v5e:2x4", "--config.mesh.fsdp=3", "--bucket", "144p:51:12"), "does not make 8 devices"),
  ],
)
def test_errors_are_one_line(tmp_path, arguments, message, capsys):
  pytest.importorskip("libtpu")
  with pytest.raises(SystemExit) as exit:
    plan.main(command_line(tmp_path, *arguments))
  assert exit.value.code == 2
  said = capsys.readouterr().err
  assert message in said
  assert len(said.strip().splitlines()) == 1
