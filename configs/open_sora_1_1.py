"""Open-Sora 1.1, the whole recipe: STDiT-2 by IDDPM from PixArt-alpha's image model to clips of 2 to 16 seconds, 144p to 720p.

  python -m stdit_jax.plan --config configs/open_sora_1_1.py --topology v5e:8x8       what it needs, on a laptop
  python -m stdit_jax.train --config configs/open_sora_1_1.py --config.data.tables="(('table.parquet', 1),)" ...

Buckets, keep probabilities, mask ratios, learning rate and average are the original's (open_sora_1_1.json, from Open-Sora
v1.1.0, configs/opensora-v1-1/train), the order of the stages and their steps those of its report 02, for 64 devices as there
(H800, 80 GB); what a device does not hold at a time is split into micro batches. Every optimizer step is one bucket;
`optimizer.accumulate` makes it several. Training needs weights: `init` (denoiser, with Open-Sora's names: PixArt's are not read
yet), `text_encoder.weights` and `text_encoder.tokenizer` (T5 v1.1 XXL's), `autoencoder.weights` (sd-vae-ft-ema).
The last stage was trained on better videos: give it a "data.tables" of its own.
"""

import json
import pathlib

from configs import base
from configs.open_sora_1_2 import stage

# Report 02: the first 24 000 steps of stage 1 masked 10 % of the clips, all later ones 25 %, as published. How the 10 % were
# shared among the strategies is not said: here in the same proportions.
EARLY_MASKS = 0.1


def _masks(ratios, share):
  """Mask ratios of which all but `mask_no` sum to `share`, in the proportions of `ratios`."""
  masked = 1 - ratios["mask_no"]
  return {name: 1 - share if name == "mask_no" else ratio * share / masked for name, ratio in ratios.items()}


def get_config():
  """Not here: the timesteps of SpeeD (`iddpm-speed`), with which stages 0 to 1b were trained; all stages draw uniformly."""
  original = json.loads((pathlib.Path(__file__).parent / "open_sora_1_1.json").read_text())
  config = base.get_config()
  config.output = "runs/open_sora_1_1"
  config.seed = 1024  # of the original's loop; that of its loader is 42, as ours
  config.mesh = dict(data=-1, fsdp=8, sequence=1, tensor=1)
  config.max_tokens_per_device = 16_384
  config.model.name = "STDiT2-XL/2"
  config.model.fields = dict(dtype="bfloat16", remat="full")
  config.text_encoder.update(max_length=200, fields=dict(dtype="bfloat16", param_dtype="bfloat16"))
  config.data.update(reference_devices=64, frame_interval=3, fps_rule="1.1", scores=())
  config.diffusion = dict(name="iddpm", fields={})
  config.sample.fps = 8  # of the video; the model is told 24
  # The released configurations have norms of queries and keys throughout; by the report they came with stage 1c, and the
  # frame rate with 1b. Of the buckets of 1a it says that they resemble those of stage 2.
  early = {"model.fields.qk_norm": False, "model.fields.fps_condition": False}
  norm, fewer = {"model.fields.qk_norm": False}, {"mask_ratios": _masks(original["stage2"]["mask_ratios"], EARLY_MASKS)}
  config.stages = (
    stage("images", 6_000, original["image"], **early),
    stage("stage1a", 24_000, original["stage2"], **early, **fewer),
    stage("stage1b", 40_000, original["stage1"], **norm),
    stage("stage1c", 17_000, original["stage1"]),
    stage("stage2", 22_000, original["stage2"]),
    stage("stage3", 4_000, original["stage3"], keep_optimizer=True),  # said of this stage alone
  )
  return config
