"""CogVideoX's video autoencoder from scratch: short clips first, an adversary after some thousand steps, then long clips.

  python -m stdit_jax.train --config configs/cogvideox_vae.py \\
      --config.data.tables="(('videos.parquet',1),('images.parquet',0.2))" \\
      --config.autoencoder.perceptual.weights=vgg16.safetensors

Stages, sizes and losses are the paper's (arXiv 2408.06072, section 2.1 and appendix): 17 frames of 256 x 256 pixels, L1, LPIPS
and KL, a 3D patch discriminator after some thousand steps, then 161 frames, split in time over the mesh (context parallelism).
Weights of the terms, learning rates and numbers of steps were never published: those here are VQGAN's and ours. The paper draws
the frame rate between 8 and 16; every second frame is taken here, 12 of 24.
"""

from configs import base


def get_config():
  """The 2B model's autoencoder on 64 devices, of which every 8, the mesh's `sequence` axis, share a long clip."""
  config = base.get_config()
  config.output = "runs/cogvideox_vae"
  config.task = "autoencoder"
  config.mesh.sequence = 8
  config.autoencoder.update(name="cogvideox-2b", dtype="bfloat16", crop=256, kl_weight=1e-6, perceptual_weight=1.0)
  config.data.captions = "optional"
  config.data.frame_interval = 2
  config.data.buckets = (("360p", 17, 1.0, 64), ("360p", 1, 1.0, 64))
  config.optimizer.update(learning_rate=1e-4, b1=0.5, b2=0.9, warmup_steps=1000, eps=1e-8)
  config.ema_decay = 0.999
  adversary = {"autoencoder.adversarial_weight": 0.5, "optimizer.learning_rate": 5e-5}
  config.stages = (
    dict(name="reconstruction", steps=5000),
    dict(name="adversary", steps=95_000, **adversary),
    # On 64 devices each long clip lies on eight of them, some 20 frames on each; with fewer devices lower the batches.
    dict(
      name="long", steps=20_000,
      **adversary,
      **{
        "split_tokens": "360p:161",
        "data.buckets": (("360p", 161, (1.0, 0.5), 8), ("360p", 17, 1.0, 64), ("360p", 1, 1.0, 64)),
      },
    ),
  )  # fmt: skip
  config.log_every = 100
  config.checkpoint_every = 2000
  return config
