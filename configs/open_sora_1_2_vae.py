"""Open-Sora 1.2's video autoencoder as the original trained it: three stages, 1.18 million steps.

  python -m stdit_jax.train --config configs/open_sora_1_2_vae.py \\
      --config.data.tables="(('videos.parquet',1),('images.parquet',1))" \\
      --config.autoencoder.image_weights=sdxl_vae.safetensors --config.autoencoder.perceptual.weights=vgg16.safetensors

One sample per device on 8 devices (24 in the third stage), 256 x 256 pixels; reported: 30.59 dB, SSIM 0.880 (report 3; the
steps are those of scripts/train_vae.py and configs/vae/train).

Where the original differs: it adds up pixels where we take means (all the same to Adam; its clipping at norm 1 always acts then
and would hardly act here: it is left out); it divides them by the frames of the clip, but not the KL term (`kl_weight` is 17
times its 1e-6); it takes the first frame of every fifth clip where we mix in pictures of a table of their own: give that table
the weight that makes them a fifth. It crops the middle of frames of 256 pixels, here crops are anywhere in 360p.

As there, clips are encoded whole (`chunk=0`); chunks of 17 frames come with a denoiser, whose configuration has the name alone.
"""

from configs import base


def lengths(most, batch):
  """Buckets of every length from 2 to `most` frames, all equally often, and of pictures: one program each."""
  return (*(("360p", n, (1.0, 1 / (n - 1)), batch) for n in range(most, 1, -1)), ("360p", 1, 1.0, batch))


def get_config():
  """Temporal autoencoder alone, then both on image latents, then both on pixels."""
  config = base.get_config()
  config.output = "runs/open_sora_1_2_vae"
  config.task = "autoencoder"
  config.autoencoder.update(name="open-sora-1.2", dtype="bfloat16", crop=256, reconstruction_weight=0.0, kl_weight=0.0)
  config.autoencoder.fields = dict(chunk=0, remat=True)  # as the original: grad_checkpoint
  config.autoencoder.perceptual.name = "vgg16-lpips"
  config.data.captions = "optional"
  config.data.buckets = (("360p", 17, 1.0, 1), ("360p", 1, 1.0, 1))
  config.data.reference_devices = 8
  config.optimizer.update(learning_rate=1e-5, warmup_steps=0, clip_norm=0.0, eps=1e-8)
  config.ema_decay = 0.0
  fresh = {"keep_optimizer": False}  # each was a run of its own; moments of what was frozen are zeros without a correction
  config.stages = (
    dict(
      name="temporal", steps=380_000, train="^autoencoder/temporal",
      **{"autoencoder.latent_weight": 1.0, "autoencoder.identity_weight": 1.0},
    ),
    dict(name="both", steps=260_000, **fresh, **{"autoencoder.latent_weight": 1.0, "autoencoder.identity_weight": 0.0}),
    dict(
      name="pixels", steps=540_000, **fresh,
      **{
        "autoencoder.latent_weight": 0.0, "autoencoder.reconstruction_weight": 1.0, "autoencoder.perceptual_weight": 0.1,
        "autoencoder.kl_weight": 1.7e-5, "data.buckets": lengths(33, 1), "data.reference_devices": 24,
      },
    ),
  )  # fmt: skip
  config.log_every = 100
  config.checkpoint_every = 5000
  return config
