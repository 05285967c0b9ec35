"""The small KL-f8 autoencoder that the repository ships (data/film/autoencoder.safetensors), trained on Big Buck Bunny.

  python -m data.prepare.film --output data/film/prepared
  python -m stdit_jax.train --config configs/film_autoencoder.py
  python -m stdit_jax.convert --input runs/film_autoencoder --to diffusers --dtype float16 --output data/film/autoencoder.safetensors

1.7 M parameters, random 96 x 96 crops of 144p frames, L1 and KL 1e-6 (no perceptual term: pictures are a little soft).
About an hour on two cores; expect a squared error of about 0.004 in [-1, 1] (30 dB).
"""

from configs import base


def get_config():
  """Reconstruction of single frames and of pairs of frames a third of a second apart."""
  config = base.get_config()
  config.output = "runs/film_autoencoder"
  config.task = "autoencoder"
  config.autoencoder.name = "small-kl-f8"
  config.autoencoder.crop = 96
  config.autoencoder.reconstruction = "l2"
  config.autoencoder.chroma_weight = 3.0
  config.data.tables = (("data/film/prepared/table.csv", 1),)
  config.data.buckets = (("144p", 1, 1.0, 8), ("144p", 2, 1.0, 4))
  config.data.frame_interval = 8
  config.data.captions = "optional"
  config.optimizer.update(learning_rate=2e-3, warmup_steps=100, schedule="cosine", eps=1e-8)
  config.ema_decay = 0.99
  # Posterior noise from the start drowns what the latents say at first: colours then take thousands of steps to appear.
  config.stages = (
    dict(name="mean", steps=1100, **{"autoencoder.sample_posterior": False}),
    dict(name="sampled", steps=500, **{"optimizer.learning_rate": 1e-3, "optimizer.warmup_steps": 20}),
  )
  config.log_every = 25
  config.checkpoint_every = 200
  return config
