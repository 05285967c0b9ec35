"""Open-Sora 1.2, stages 1 to 3: STDiT-3 by rectified flow on images and clips of 2 to 16 seconds, 144p to 2048.

  python -m stdit_jax.plan --config configs/open_sora_1_2.py --topology v5p:4x8x8     what it needs, on a laptop
  python -m stdit_jax.train --config configs/open_sora_1_2.py --config.data.tables="(('table.parquet', 1),)" ...

Buckets, keep probabilities, mask ratios, learning rates, epsilon and average are the original's (open_sora_1_2.json, from
Open-Sora v1.2.0, configs/opensora-v1-2/train), steps those of its report 03: 30 000, 23 000 and 15 000. Batch sizes are per
device there, for GPUs of 80 GB; here they stand for 256 of them, and what a device does not hold at a time is split into micro
batches. Training needs weights: `init` (denoiser), `text_encoder.weights` (T5 v1.1 XXL), `autoencoder.weights`.
"""

import json
import pathlib

from configs import base

STEPS = {"stage1": 30_000, "stage2": 23_000, "stage3": 15_000}


def _stage(name, original):
  return dict(
    name=name, steps=STEPS[name], keep_optimizer=False,
    train="^denoiser/(?!caption_embed/)",  # freeze_y_embedder
    mask_ratios=original["mask_ratios"],
    ema_decay=original["ema_decay"],
    checkpoint_every=original["ckpt_every"],
    **{
      "data.buckets": tuple(
        (resolution, int(frames), tuple(keep) if isinstance(keep, list) else keep, batch)
        for resolution, lengths in original["buckets"].items()
        for frames, (keep, batch) in lengths.items()
      ),
      "optimizer.learning_rate": original["lr"],
      "optimizer.eps": original["adam_eps"],
      "optimizer.warmup_steps": original["warmup_steps"],
      "optimizer.clip_norm": original["grad_clip"],
    },
  )  # fmt: skip


def get_config():
  """256 devices. Parameters are split over 8: gradients are then scattered in whole tiles (stdit_jax/parallel/shardings.py)."""
  original = json.loads((pathlib.Path(__file__).parent / "open_sora_1_2.json").read_text())
  config = base.get_config()
  config.output = "runs/open_sora_1_2"
  config.mesh = dict(data=-1, fsdp=8, sequence=1, tensor=1)
  config.max_tokens_per_device = 16_384
  config.model.name = "STDiT3-XL/2"
  config.model.fields = dict(dtype="bfloat16", remat="full")
  config.text_encoder.fields = dict(dtype="bfloat16", param_dtype="bfloat16")
  config.autoencoder.temporal = "open-sora-1.2"
  config.data.reference_devices = 256
  config.diffusion.fields = dict(sample_method="logit-normal", use_timestep_transform=True)
  config.stages = tuple(_stage(name, original[name]) for name in STEPS)
  return config
