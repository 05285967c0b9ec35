"""A small 4 x 8 x 8 video autoencoder like Open-Sora 1.2's, from the image autoencoder of the film, in three stages.

  python -m data.prepare.film --output data/film/prepared
  python -m stdit_jax.interop.fetch hed-vgg16 --output runs/hed.safetensors
  python -m stdit_jax.train --config configs/film_video_autoencoder.py
  python -m stdit_jax.convert --input runs/film_video_autoencoder --dtype float16 \\
      --output data/film/video_autoencoder.safetensors

Not trained yet: steps, rates and weights are first guesses. The recipe is configs/open_sora_1_2_vae.py's in small: image
latents first, with the image autoencoder as it is, then pixels, then pixels with an adversary.
"""

from configs import base


def get_config():
  """17 frames at 8 a second and single pictures, in random crops of 64 x 64."""
  config = base.get_config()
  config.output = "runs/film_video_autoencoder"
  config.task = "autoencoder"
  config.autoencoder.update(
    name="small-temporal", crop=64, image_weights="data/film/autoencoder.safetensors", reconstruction="l2",
    discriminator=dict(features=16, layers=2),
  )  # fmt: skip
  config.autoencoder.perceptual.update(name="hed-vgg16", weights="runs/hed.safetensors")
  config.data.tables = (("data/film/prepared/table.csv", 1),)
  config.data.buckets = (("144p", 17, 1.0, 4), ("144p", 1, 1.0, 32))
  config.data.frame_interval = 3
  config.data.captions = "optional"
  config.data.workers = 1
  config.optimizer.update(learning_rate=1e-3, b2=0.99, warmup_steps=50, eps=1e-8)
  config.ema_decay = 0.99
  latents = {"latent_weight": 1.0, "identity_weight": 0.2, "reconstruction_weight": 0.0, "kl_weight": 0.0}
  pixels = {"perceptual_weight": 1.0}  # its values are about 0.01 (perceptual.py): as much as the squared error
  stages = (
    ("latents", 1500, 1e-3, latents), ("pixels", 800, 5e-4, pixels),
    ("adversary", 300, 1e-4, pixels | {"adversarial_weight": 0.1}),
  )  # fmt: skip
  config.stages = tuple(
    dict(
      name=name, steps=steps, train="^autoencoder/temporal" if name == "latents" else ".*",
      **{"optimizer.learning_rate": rate, "optimizer.schedule": "constant" if name == "latents" else "cosine"},
      **{f"autoencoder.{key}": value for key, value in weights.items()},
    )
    for name, steps, rate, weights in stages
  )  # fmt: skip
  config.log_every = 25
  config.checkpoint_every = 200
  return config
