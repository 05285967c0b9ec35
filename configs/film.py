"""Goal: better videos than those of configs/quickstart.py, with four times the tokens and more steps. README shows one.

Data: `data.prepare.film` downloads and prepares Big Buck Bunny.
Time: less than an hour on two CPU cores (measured).

  python -m data.prepare.film --output data/film/prepared
  python -m stdit_jax.train --config configs/film.py
  python -m stdit_jax.sample --run runs/film --prompt "A big gray rabbit stands in a green meadow."
"""

from configs import quickstart


def get_config():
  """configs/quickstart.py with patches of 2 x 2 latents, two windows per clip and a slower average of the weights."""
  config = quickstart.get_config()
  config.output = "runs/film"
  config.model.name = "STDiT3-mini/2"
  config.data.windows_per_row = 2
  config.autoencoder.cache_gb = 2.0
  config.ema_decay = 0.995
  images, videos = config.stages
  config.stages = (dict(images, steps=2200), dict(videos, steps=800))
  config.checkpoint_every = 200
  config.sample_every = 1000
  return config
