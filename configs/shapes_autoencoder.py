"""Goal: the autoencoder of moving shapes (data/shapes.py), from the film's autoencoder.

Data: none. The loader draws the images.
Time: 1,200 optimizer steps, not measured.

  python -m stdit_jax.train --config configs/shapes_autoencoder.py
  python -m stdit_jax.convert --input runs/shapes_autoencoder --to diffusers --dtype float16 \\
      --output data/moving_shapes/autoencoder.safetensors
"""

from configs import base


def get_config():
  """Single frames of 64p, 48 x 80 to 80 x 48 pixels, in random crops of 48 x 48."""
  config = base.get_config()
  config.output = "runs/shapes_autoencoder"
  config.task = "autoencoder"
  config.init = "data/film/autoencoder.safetensors"
  config.autoencoder.update(name="small-kl-f8", crop=48, reconstruction="l2")
  config.data.tables = (("shapes://train/0/20000", 1),)
  config.data.buckets = (("64p", 1, 1.0, 32),)
  config.data.captions = "optional"
  config.data.workers = 1
  config.optimizer.update(learning_rate=1e-3, b2=0.99, warmup_steps=50, schedule="cosine", eps=1e-8)
  config.ema_decay = 0.99
  config.stages = (dict(name="main", steps=1200),)
  config.log_every = 50
  config.checkpoint_every = 200
  return config
