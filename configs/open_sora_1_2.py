"""Goal: Open-Sora 1.2's whole recipe. STDiT-3 with rectified flow on images and clips of 2 to 16 seconds, 144p to 2048.

Time: 155,000 optimizer steps of adaptation from PixArt-Sigma's image model, then 68,000 steps of stages 1 to 3, on 256 devices.
`plan` estimates the hours and the memory, on a laptop:

  python -m stdit_jax.plan --config configs/open_sora_1_2.py --topology v5p:4x8x8
  python -m stdit_jax.train --config configs/open_sora_1_2.py:stage1 --config.data.tables="(('table.parquet', 1),)" ...

The name after the colon is the first stage. Use `stage1` with weights of STDiT-3 (`init`). Without a name the run starts with
the adaptation. Training also needs weights: `init` (denoiser, with Open-Sora's names; PixArt's names cannot be read yet),
`text_encoder.weights` and `text_encoder.tokenizer` (file and folder of T5 v1.1 XXL), `autoencoder.weights` (SDXL's).

Buckets, keep probabilities, mask ratios, learning rates, epsilon and average are the original's (open_sora_1_2.json, from
Open-Sora v1.2.0, configs/opensora-v1-2/train), steps those of its report 03. The original's batch sizes are per GPU of 80 GB;
it had 96 GPUs, and 8 for the adaptation. This recipe multiplies them by 256 devices. Batches that do not fit on a device are
split into micro batches. An optimizer step sees one bucket, or several with `optimizer.accumulate`.
"""

import json
import pathlib

from configs import base


def bucket_rows(table):
  """The rows of `data.buckets` for a bucket table of the JSON files in this folder."""
  return tuple(
    (resolution, int(frames), tuple(keep) if isinstance(keep, list) else keep, batch)
    for resolution, lengths in table.items()
    for frames, (keep, batch) in lengths.items()
  )


def stage(name, steps, original, **changes):
  """A stage with settings of the original and `changes`. Its optimizer is fresh: in the original each stage is a run."""
  return dict(name=name, steps=steps, keep_optimizer=False) | {
    "data.buckets": bucket_rows(original["buckets"]),
    "mask_ratios": original["mask_ratios"],
    "optimizer.learning_rate": original["lr"],
    "optimizer.eps": original["adam_eps"],
    "optimizer.warmup_steps": original["warmup_steps"],
    "optimizer.clip_norm": original["grad_clip"],
    "ema_decay": original["ema_decay"],
    "checkpoint_every": original["ckpt_every"],
    **changes,
  }


def _adaptation(original, config):
  """The eight steps of report 03 from PixArt-Sigma 2K to STDiT-3. Each step adds one change.

  The report gives the change and the number of optimizer steps. Other settings are those of the only published configuration
  of the adaptation ("adapt", of its last step): learning rate without warm-up, average, buckets. All steps but the last use the
  image buckets alone, and those of 2048 from stage 1, since the report begins "from 144p to 2K". The report mentions no step
  that keeps its optimizer.
  """
  images = original["adapt"]["buckets"] | {"2048": original["stage1"]["buckets"]["2048"]}
  now = {
    "model.fields.qk_norm": False,
    "model.fields.fps_condition": False,
    "model.fields.temporal_blocks": False,
    "diffusion": dict(name="iddpm", fields={}),  # PixArt-Sigma's
    "optimizer.eps": 1e-8,  # default of the original code
    "autoencoder.name": "sdxl-kl-f8",  # with SDXL's scale, as in PixArt-Sigma
    "data.buckets": tuple(row for row in bucket_rows(images) if row[1] == 1),
  }
  stages = []
  for name, steps, changes in (
    ("images", 20_000, {}),
    ("qk_norm", 18_000, {"model.fields.qk_norm": True}),
    ("rectified_flow", 10_000, {"diffusion": dict(name="rectified-flow", fields={})}),
    ("timesteps", 33_000, {"diffusion": config.diffusion.to_dict()}),
    ("epsilon", 8_000, {"optimizer.eps": original["adapt"]["adam_eps"]}),
    ("autoencoder", 25_000, {"autoencoder.name": config.autoencoder.name, "model.fields.fps_condition": True}),
    ("temporal_blocks", 3_000, {"model.fields.temporal_blocks": True}),
    ("videos", 38_000, {"train": "^denoiser/temporal_blocks/", "data.buckets": bucket_rows(original["adapt"]["buckets"])}),
  ):  # fmt: skip
    now |= changes
    stages.append(stage(name, steps, original["adapt"], **now))
  return stages


def get_config(first="images"):
  """256 devices. Parameters are split over 8 of them: then gradients scatter in whole tiles (stdit_jax/parallel/shardings.py).

  Args:
    first: name of the first stage.
  """
  original = json.loads((pathlib.Path(__file__).parent / "open_sora_1_2.json").read_text())
  config = base.get_config()
  config.output = "runs/open_sora_1_2"
  config.mesh = dict(data=-1, fsdp=8, sequence=1, tensor=1)
  config.max_tokens_per_device = 16_384
  config.model.name = "STDiT3-XL/2"
  config.model.fields = dict(dtype="bfloat16", remat="full")
  config.text_encoder.fields = dict(dtype="bfloat16", param_dtype="bfloat16")
  config.autoencoder.name = "open-sora-1.2"
  config.data.reference_devices = 256
  config.diffusion.fields = dict(sample_method="logit-normal", use_timestep_transform=True)
  stages = _adaptation(original, config) + [
    stage(name, steps, original[name], train="^denoiser/(?!caption_embed/)")  # freeze_y_embedder
    for name, steps in (("stage1", 30_000), ("stage2", 23_000), ("stage3", 15_000))
  ]
  names = [s["name"] for s in stages]
  if first not in names:
    raise ValueError(f"there is no stage {first!r} to begin with; there are {', '.join(names)}")
  config.stages = tuple(stages[names.index(first) :])
  return config
