"""Goal: Open-Sora 1.2's video autoencoder, 4 x 8 x 8. Published (report 03): 30.59 dB, SSIM 0.880.

Data: a table of clips and a table of images, without captions. Published: 3 million clips of Pexels and Pixabay.
Weights: SDXL's autoencoder, and VGG16 with LPIPS (stdit_jax/autoencoders/perceptual.py).
Time: 380,000, 260,000 and 540,000 optimizer steps. Published: 8 GPUs, 24 in the third stage, with one clip on each. The
  duration is not published, and nothing here is measured. Computed with `plan`: a step of the last stage with 33 frames takes
  17.8 GiB per device.

  python -m stdit_jax.train --config configs/open_sora_1_2_vae.py \\
      --config.data.tables="(('videos.parquet',1),('images.parquet',1))" \\
      --config.autoencoder.image_weights=sdxl_vae.safetensors --config.autoencoder.perceptual.weights=vgg16.safetensors

Stages and steps are those of scripts/train_vae.py and configs/vae/train. As in the original, the model encodes whole clips
(`chunk=0`). A denoiser's configuration omits `chunk=0`: its autoencoder encodes chunks of 17 frames.

Differences from the original:
* The original sums over pixels. This recipe takes means. Adam ignores the factor. Clipping at norm 1 always changes the
  gradients of sums, and would rarely change those of means. So this recipe does not clip.
* The original divides pixel terms by the frames of the clip, but not the KL term. So `kl_weight` is 17 times its 1e-6.
* The original takes the first frame of every fifth clip as an image. This recipe mixes in images of a second table. Give this
  table the weight that makes images a fifth.
* The original cuts the central square and scales it to 256 pixels. This recipe crops at random places in 360p.
"""

from configs import base


def lengths(most, batch):
  """Buckets of images and of all lengths from 2 to `most` frames, which occur equally often. Each bucket is one program."""
  return (*(("360p", n, (1.0, 1 / (n - 1)), batch) for n in range(most, 1, -1)), ("360p", 1, 1.0, batch))


def get_config():
  """First the temporal autoencoder, then both autoencoders on image latents, then both on pixels."""
  config = base.get_config()
  config.output = "runs/open_sora_1_2_vae"
  config.task = "autoencoder"
  config.autoencoder.update(name="open-sora-1.2", dtype="bfloat16", crop=256, reconstruction_weight=0.0, kl_weight=0.0)
  config.autoencoder.fields = dict(chunk=0, remat=True)  # `grad_checkpoint` in the original
  config.autoencoder.perceptual.name = "vgg16-lpips"
  # The original scales bilinearly without antialiasing (opensora/datasets/video_transforms.py).
  config.data.update(captions="optional", resize="original")
  config.data.buckets = (("360p", 17, 1.0, 1), ("360p", 1, 1.0, 1))
  config.data.reference_devices = 8
  config.optimizer.update(learning_rate=1e-5, warmup_steps=0, clip_norm=0.0, eps=1e-8)
  config.ema_decay = 0.0
  fresh = {"keep_optimizer": False}  # in the original each stage is a run
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
