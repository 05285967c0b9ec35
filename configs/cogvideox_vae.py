"""Goal: CogVideoX's video autoencoder, 4 x 8 x 8, from scratch. Published: 29.1 dB on 17 frames of 256 x 256 pixels of WebVid.

Data: a table of clips and a table of images, without captions.
Weights: VGG16 with LPIPS (stdit_jax/autoencoders/perceptual.py).
Time: 120,000 optimizer steps on 64 devices. The number of steps is our own. Hardware and duration are not published, and
  nothing here is measured.

  python -m stdit_jax.train --config configs/cogvideox_vae.py \\
      --config.data.tables="(('videos.parquet',1),('images.parquet',0.2))" \\
      --config.autoencoder.perceptual.weights=vgg16.safetensors

Stages, sizes and loss terms are those of the paper (arXiv 2408.06072, section 2.1 and appendix). The model first trains on 17
frames of 256 x 256 pixels with L1, LPIPS and KL. A 3D patch discriminator follows. The last stage trains on 161 frames, split
in time over the mesh. The paper publishes neither loss weights nor learning rates nor numbers of steps. This file uses
VQGAN's values and our own.
"""

from configs import base


def get_config():
  """The autoencoder of the 2B model. Eight devices, the `sequence` axis of the mesh, share a long clip."""
  config = base.get_config()
  config.output = "runs/cogvideox_vae"
  config.task = "autoencoder"
  config.mesh.sequence = 8
  config.autoencoder.update(name="cogvideox-2b", dtype="bfloat16", crop=256, kl_weight=1e-6, perceptual_weight=1.0)
  config.data.captions = "optional"
  config.data.frame_interval = 2  # 12 of 24 frames per second; the paper draws a rate between 8 and 16
  config.data.buckets = (("360p", 17, 1.0, 64), ("360p", 1, 1.0, 64))
  config.optimizer.update(learning_rate=1e-4, b1=0.5, b2=0.9, warmup_steps=1000, eps=1e-8)
  config.ema_decay = 0.999
  adversary = {"autoencoder.adversarial_weight": 0.5, "optimizer.learning_rate": 5e-5}
  config.stages = (
    dict(name="reconstruction", steps=5000),
    dict(name="adversary", steps=95_000, **adversary),
    # Each long clip is split over eight devices, with about 20 frames on each. With fewer devices lower the batches.
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
