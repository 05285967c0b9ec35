"""Goal: Open-Sora 1.1. STDiT-2 with IDDPM, from PixArt-alpha's image model to clips of 2 to 16 s, 144p to 720p.

Data: a table with the columns of data/sources.py. `python -m data.prepare run --config configs/data/open_sora.py` makes one.
  Published (report 02): 9.7 million clips and 2.6 million images. The last stage used 560,000 better clips and 1.6 million
  images: give the stage "stage3" its own "data.tables".
Weights: `init` (denoiser, in Open-Sora's layout; PixArt's layout cannot be read), T5 v1.1 XXL and its tokenizer, sd-vae-ft-ema.
Time: 113,000 optimizer steps. Published (report 02): about 9 days on 64 H800 of 80 GB. Stage 1a took 4 days, 1b 2 days, 1c 14
  hours, stages 2 and 3 one day each. `plan` computes memory and hours for TPUs and GPUs. Neither is measured.

  python -m stdit_jax.plan --config configs/open_sora_1_1.py --topology v5e:8x8
  python -m stdit_jax.train --config configs/open_sora_1_1.py --config.data.tables="(('table.parquet', 1),)" \\
      --config.init=denoiser.safetensors --config.text_encoder.weights=t5 --config.text_encoder.tokenizer=t5 \\
      --config.autoencoder.weights=sd-vae-ft-ema.safetensors

Buckets, keep probabilities, mask ratios, learning rate and average are the original's (open_sora_1_1.json, from Open-Sora
v1.1.0, configs/opensora-v1-1/train). Stages and steps are those of report 02. Frame rates, resizing and the autoencoder's
precision are the original's, too. The comments name the file of v1.1.0 that has each rule. README's section "Differences from
the originals" lists all known differences. One of them: all stages draw timesteps uniformly, but the original trained stages 0
to 1b with SpeeD's (`iddpm-speed`).

A batch that does not fit on a device is split into micro batches. An optimizer step uses one bucket, or `optimizer.accumulate`
buckets. The original's way of resizing is slow: it reads 101 frames per CPU second, `--config.data.resize=area` 260 (measured
with tests/benchmarks/decode.py, from a simple film of 720p to 240p).
"""

import json
import pathlib

from configs import base
from configs.open_sora_1_2 import stage

# Report 02: the first 24,000 steps of stage 1 mask 10 % of the clips, later steps 25 %. The report does not divide the 10 %
# among the strategies. This recipe uses the proportions of the later steps.
EARLY_MASKS = 0.1


def _masks(ratios, share):
  """Scales mask ratios so that all but `mask_no` sum to `share`."""
  masked = 1 - ratios["mask_no"]
  return {name: 1 - share if name == "mask_no" else ratio * share / masked for name, ratio in ratios.items()}


def get_config():
  """Batches for 64 devices. The parameters are sharded over 8 of them."""
  original = json.loads((pathlib.Path(__file__).parent / "open_sora_1_1.json").read_text())
  config = base.get_config()
  config.output = "runs/open_sora_1_1"
  config.seed = 1024  # of the original's loop; its loader uses 42, the default of `data.seed`
  config.mesh = dict(data=-1, fsdp=8, sequence=1, tensor=1)
  config.max_tokens_per_device = 16_384
  config.model.name = "STDiT2-XL/2"
  config.model.fields = dict(dtype="bfloat16", remat="full")
  # Not the original's float16 (opensora/models/text_encoder/t5.py), in which T5 XXL can overflow.
  config.text_encoder.update(max_length=200, fields=dict(dtype="bfloat16", param_dtype="bfloat16"))
  config.autoencoder.dtype = "bfloat16"  # scripts/train.py converts the autoencoder to the run's dtype
  config.autoencoder.micro_batch = 1  # TPUs compile it in a quarter of the time of four frames
  config.data.update(
    reference_devices=64, scores=(),
    frame_interval=3,  # configs/opensora-v1-1/train
    fps_rule="1.1",  # opensora/datasets/datasets.py: the file's own rate, not divided by the interval
    resize="original",  # "resize_crop" of opensora/datasets/utils.py and video_transforms.py
  )  # fmt: skip
  config.diffusion = dict(name="iddpm", fields={})
  config.sample.fps = 8  # of the written video; the model gets fps * frame_interval = 24 (fps_rule)
  # The report adds the frame rate in stage 1b, and norms of queries and keys in stage 1c. (The released configurations have the
  # norms in all stages.) Stage 1a uses the buckets of stage 2: the report calls them similar.
  early = {"model.fields.qk_norm": False, "model.fields.fps_condition": False}
  norm, fewer = {"model.fields.qk_norm": False}, {"mask_ratios": _masks(original["stage2"]["mask_ratios"], EARLY_MASKS)}
  config.stages = (
    stage("images", 6_000, original["image"], **early),
    stage("stage1a", 24_000, original["stage2"], **early, **fewer),
    stage("stage1b", 40_000, original["stage1"], **norm),
    stage("stage1c", 17_000, original["stage1"]),
    stage("stage2", 22_000, original["stage2"]),
    stage("stage3", 4_000, original["stage3"], keep_optimizer=True),  # according to the report, in this stage alone
  )
  return config
