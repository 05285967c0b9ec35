"""Goal: Open-Sora 1.2. STDiT-3 with rectified flow learns images and clips of 2 to 16 s, 144p to 2048.

Data: a table with the columns of data/sources.py, also `aes`, `flow` and `cmotion` if known. `python -m data.prepare run
  --config configs/data/open_sora.py` makes one. Published (report 03): stage 1 used WebVid-10M (40,000 hours), stage 2
  20 million clips of Panda-70M (41,000 hours), stage 3 two million better clips (5,000 hours). A stage can have its own
  "data.tables".
Weights: `init` (denoiser, in Open-Sora's layout; PixArt's layout cannot be read), T5 v1.1 XXL and its tokenizer, and Open-Sora
  1.2's autoencoder. The stages before "autoencoder" need SDXL's autoencoder as their own "autoencoder.weights".
Time: 155,000 optimizer steps of adaptation from PixArt-Sigma's image model, then 68,000 steps of stages 1 to 3. Published
  (report 03): 8 GPUs for the adaptation. 96 GPUs for about two weeks, 35,000 H100 hours, for stages 1 to 3. `plan` computes
  memory and hours for TPUs and GPUs. Neither is measured.

  python -m stdit_jax.plan --config configs/open_sora_1_2.py --topology v5p:4x8x8
  python -m stdit_jax.train --config configs/open_sora_1_2.py:stage1 --config.data.tables="(('table.parquet', 1),)" \\
      --config.init=denoiser.safetensors --config.text_encoder.weights=t5 --config.text_encoder.tokenizer=t5 \\
      --config.autoencoder.weights=vae.safetensors

The name after the colon is the first stage. Use `stage1` with weights of STDiT-3. Without a name the run starts with the
adaptation.

Buckets, keep probabilities, mask ratios, learning rates, epsilon and average are the original's (open_sora_1_2.json, from
Open-Sora v1.2.0, configs/opensora-v1-2/train). The steps are those of report 03. Frame rates, resizing and the precision of
both encoders are the original's, too. The comments name the file of v1.2.0 that has each rule. README's section "Differences
from the originals" lists all known differences.

The original's batch sizes are per GPU of 80 GB. This recipe multiplies them by 256 devices. A batch that does not fit on a
device is split into micro batches. An optimizer step uses one bucket, or `optimizer.accumulate` buckets. The original's way of
resizing is slow: it reads 101 frames per CPU second, `--config.data.resize=area` 260 (measured with tests/benchmarks/decode.py,
from a simple film of 720p to 240p).
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
  """A stage with the original's settings and `changes`. Its optimizer is fresh, since each stage is a run in the original."""
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
  """The eight stages of report 03 from PixArt-Sigma 2K to STDiT-3.

  The report names the changes and optimizer steps of each stage. Open-Sora published one configuration of the adaptation, that
  of the last stage ("adapt"). All stages take that configuration's learning rate, average and buckets, and have no warm-up.
  Only the last stage trains on clips. Earlier stages use the image buckets, and the image bucket of 2048 from stage 1: the
  report says "from 144p to 2K". The report mentions no stage that keeps its optimizer.
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
  """Batches for 256 devices. Parameters are sharded over 8 of them, so that XLA scatters gradients in whole tiles.

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
  # scripts/train.py converts both encoders to the run's dtype, bfloat16.
  config.text_encoder.fields = dict(dtype="bfloat16", param_dtype="bfloat16")
  # TPUs compile a program for one frame at a time in a quarter of the time of four (README, "On a pod").
  config.autoencoder.update(name="open-sora-1.2", dtype="bfloat16", micro_batch=1)
  config.data.update(
    reference_devices=256,
    fps_rule="1.2",  # opensora/datasets/datasets.py: rounded down, 23 for 23.976
    resize="original",  # "resize_crop" of opensora/datasets/utils.py and video_transforms.py
  )
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
