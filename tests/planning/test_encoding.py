"""The programs that encode clips: their number, and that a TPU's compiler takes them."""

import dataclasses

import pytest

from configs import open_sora_1_2
from stdit_jax import plan
from stdit_jax.planning.encoding import encode_sizes, typical
from stdit_jax.planning.programs import Compiler, Job
from stdit_jax.training.checkpoints import plain
from stdit_jax.training.stages import make_stages


def test_stage_1_of_open_sora_has_353_programs(capsys):
  """One for each size of images and of chunks of 17 frames. With nine ratios of each resolution there are less than half."""
  stage = next(s for s in make_stages(open_sora_1_2.get_config()) if s.name == "stage1")
  frames, clips = encode_sizes(stage)
  assert (len(frames), len(clips)) == (262, 91)
  assert {size[0] for size in frames} == {1}
  assert {size[0] for size in clips} == {17}
  assert typical(clips) == [clips[45]]
  data = dataclasses.replace(stage.config.data, aspect_ratios=9)
  few = encode_sizes(dataclasses.replace(stage, config=dataclasses.replace(stage.config, data=data)))
  assert sum(map(len, few)) < 353 / 2
  assert all(set(own) <= set(all_sizes) for own, all_sizes in zip(few, (frames, clips)))
  settings = plan.Settings(config="configs/open_sora_1_2.py", topology="v5e:4x4")
  plan.print_encode_programs(settings, lambda job: {"compile_seconds": 3600 * job.size[0]}, stage)
  said = capsys.readouterr().out
  assert "stage1: each host encodes videos with 353 programs, 262 for frames and 91 for clips" in said
  assert "1809.0" in said, said  # hours: 262 of one hour, 91 of 17 hours


def test_a_device_of_a_pod_compiles_the_program_of_a_size(tmp_path):
  """libtpu does not compile for the devices of one host of a pod, so the program is compiled for one device."""
  pytest.importorskip("libtpu")
  config = open_sora_1_2.get_config()
  config.autoencoder.update(name="tiny-temporal", fields={"scale": 1.0, "shift": 0.0})
  job = Job(plain(config), "stage1", ("", 0, 0), "v5e:4x4", size=(5, 32, 40))
  assert Compiler(tmp_path, job.topology)(job)["compile_seconds"] > 0
