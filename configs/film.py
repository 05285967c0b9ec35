"""The quick start with more of everything: a wider model of smaller patches, longer clips. Not run to its end yet.

python -m stdit_jax.train --config configs/film.py
python -m stdit_jax.sample --run runs/film --prompt "A big gray rabbit stands in a green meadow."
"""

from configs import quickstart


def get_config():
  """As configs/quickstart.py with clips of up to two seconds and a wider model."""
  config = quickstart.get_config()
  config.output = "runs/film"
  config.model.name = "STDiT3-S/2"
  config.data.buckets = (("144p", 1, 1.0, 8), ("144p", 4, 0.3, 4), ("144p", 8, 0.5, 2), ("144p", 16, 1.0, 1))
  config.data.windows_per_row = 8
  config.autoencoder.cache_gb = 2.0
  config.optimizer.update(learning_rate=5e-4, schedule="cosine")
  config.ema_decay = 0.998
  config.stages = (dict(name="film", steps=20_000),)
  config.log_every = 50
  config.checkpoint_every = 500
  config.sample_every = 2000
  config.sample.num_frames = 16
  return config
