"""Goal: the small KL-f8 autoencoder data/film/autoencoder.safetensors of Big Buck Bunny, with 1.7 million parameters.

Data: `data.prepare.film` downloads and prepares the film.
Time (measured): half an hour on two CPU cores for the first two stages (22.4 dB), half an hour on one core for the third
  (24.0 dB).

  python -m data.prepare.film --output data/film/prepared
  python -m stdit_jax.train --config configs/film_autoencoder.py
  python -m stdit_jax.convert --input runs/film_autoencoder --to diffusers --dtype float16 \\
      --output data/film/autoencoder.safetensors
  python -m stdit_jax.evaluate --task autoencoder --autoencoder data/film/autoencoder.safetensors \\
      --tables data/film/prepared/images --buckets 144p:1 --count 1000

The last command prints the quality, and the shift and scale of the latents for `autoencoder.fields`. Two runs made the shipped
file: one of the first two stages, which was exported in float16, and one of the third stage from these weights
(--config.init).
"""

from configs import base


def get_config():
  """Single frames and pairs of frames a third of a second apart, in random crops of 96 x 96. No perceptual term."""
  config = base.get_config()
  config.output = "runs/film_autoencoder"
  config.task = "autoencoder"
  config.autoencoder.name = "small-kl-f8"
  config.autoencoder.crop = 96
  config.autoencoder.reconstruction = "l2"
  config.data.tables = (("data/film/prepared/table.csv", 1),)
  config.data.buckets = (("144p", 1, 1.0, 8), ("144p", 2, 1.0, 4))
  config.data.frame_interval = 8
  config.data.captions = "optional"
  config.optimizer.update(learning_rate=3e-4, b2=0.95, warmup_steps=20, schedule="cosine", eps=1e-8)
  config.ema_decay = 0.99
  # The first stage has no posterior noise. Measured: at learning rates of 1.5e-3 and 2e-3 the error stays at that of gray
  # images for more than 400 steps. At 3e-4 with b2 = 0.95 colours appear after about 450 steps.
  config.stages = (
    dict(name="mean", steps=1300, **{"autoencoder.sample_posterior": False}),
    dict(name="sampled", steps=300, **{"optimizer.learning_rate": 1e-4, "optimizer.warmup_steps": 20}),
    # Once colours have appeared, a higher rate works: 20.9 dB on crops in 150 steps, more than the lower rate in 700.
    dict(
      name="details", steps=1800, keep_optimizer=False,
      **{"optimizer.learning_rate": 1e-3, "optimizer.warmup_steps": 50, "optimizer.b2": 0.99},
    ),
  )  # fmt: skip
  config.log_every = 25
  config.checkpoint_every = 200
  return config
