"""A small 4 x 8 x 8 video autoencoder like Open-Sora 1.2's, from the image autoencoder of the film, in two stages.

  python -m data.prepare.film --output data/film/prepared
  python -m stdit_jax.interop.fetch hed-vgg16 --output runs/hed.safetensors
  python -m stdit_jax.train --config configs/film_video_autoencoder.py
  python -m stdit_jax.convert --input runs/film_video_autoencoder --dtype float16 \\
      --output data/film/video_autoencoder.safetensors
  python -m stdit_jax.evaluate --task autoencoder --autoencoder data/film/video_autoencoder.safetensors \\
      --tables data/film/prepared/held_out.csv --buckets 144p:17 --frame-interval 3

Not trained yet: steps, rates and weights are first guesses, for an hour of two cores by counts of FLOPs. The recipe is
configs/open_sora_1_2_vae.py's in small: image latents first, with the image autoencoder as it is, then pixels. No adversary: in
so few steps a discriminator learns nothing, and gives noise.
"""

from configs import base


def get_config():
  """17 frames at 8 a second and single pictures, in random crops of 64 x 64."""
  config = base.get_config()
  config.output = "runs/film_video_autoencoder"
  config.task = "autoencoder"
  config.autoencoder.update(
    name="small-temporal", crop=64, image_weights="data/film/autoencoder.safetensors", reconstruction="l2"
  )  # fmt: skip
  config.autoencoder.perceptual.update(name="hed-vgg16", weights="runs/hed.safetensors", frames=2)
  config.data.tables = (("data/film/prepared/train.csv", 1),)
  config.data.buckets = (("144p", 17, 1.0, 4), ("144p", 1, 1.0, 32))
  config.data.frame_interval = 3
  config.data.captions = "optional"
  config.data.workers = 1
  config.optimizer.update(learning_rate=1e-3, b2=0.99, warmup_steps=50, eps=1e-8)
  config.ema_decay = 0.99
  latents = {
    "autoencoder.latent_weight": 1.0, "autoencoder.identity_weight": 0.2,
    "autoencoder.reconstruction_weight": 0.0, "autoencoder.kl_weight": 0.0,
    "autoencoder.sample_posterior": False,  # one that has not been learned is noise as large as the latents
  }  # fmt: skip
  pixels = {
    "autoencoder.perceptual_weight": 1.0,  # its values are about 0.01 (perceptual.py): as much as the squared error
    "data.buckets": (("144p", 17, 1.0, 2), ("144p", 1, 1.0, 16)),
    "optimizer.learning_rate": 5e-4, "optimizer.schedule": "cosine",
  }  # fmt: skip
  config.stages = (
    dict(name="latents", steps=1200, train="^autoencoder/temporal", **latents),
    dict(name="pixels", steps=900, keep_optimizer=False, **pixels),
  )
  config.log_every = 25
  config.checkpoint_every = 50
  return config
