"""A small 4 x 8 x 8 video autoencoder like Open-Sora 1.2's, from the image autoencoder of the film, in three stages.

  python -m data.prepare.film --output data/film/prepared
  python -m stdit_jax.interop.fetch hed-vgg16 --output runs/hed.safetensors
  python -m stdit_jax.train --config configs/film_video_autoencoder.py

What it keeps of scenes that it has not seen (the image autoencoder saw some of their frames), beside the baseline, in which the
image autoencoder keeps every fourth frame, so as many numbers. The first also prints shift and scale of the latents, with which
the file for denoisers is written:

  python -m stdit_jax.evaluate --task autoencoder --run runs/film_video_autoencoder --tables data/film/prepared/held_out.csv \\
      --buckets 144p:17 --frame-interval 3 --count 1000 --perceptual hed-vgg16 runs/hed.safetensors --picture film.png
  python -m stdit_jax.evaluate --task autoencoder --autoencoder data/film/autoencoder.safetensors --repeat 4 ...
  python -m stdit_jax.convert --input runs/film_video_autoencoder --dtype float16 \\
      --config '{"shift": [...], "scale": [...]}' --output data/film/video_autoencoder.safetensors

The plain recipe to compare with: --config.autoencoder.perceptual_weight=0 and another --config.output.

Not trained to its end yet. The recipe is configs/open_sora_1_2_vae.py's in small: image latents first, with the image
autoencoder as it is, then pixels. No adversary: in so few steps a discriminator learns nothing, and gives noise. What
was found so far, on held-out scenes:

* The image autoencoder keeps 25.3 dB of every frame, 20.8 dB of every fourth, repeated, 21.2 where the latents of both
  neighbours are mixed. Of latents with noise of 10 % of their variance it makes 22.2 dB, of 5 % 23.3: 3 dB more than
  repetition want 4 %. (Mixing and noise were tried by hand on 12 clips, of which it keeps 24.9 dB.)
* 1,200 steps of the first stage (16 minutes of two cores) leave 8 %; hence 4,000 now.
* In the last stage a rate of 5e-4 doubles the error in 100 steps; 1e-4 lowers it. A step is two seconds.
"""

from configs import base


def get_config():
  """17 frames at 8 a second and single pictures, in random crops of 96 x 96, as the image autoencoder was trained on."""
  config = base.get_config()
  config.output = "runs/film_video_autoencoder"
  config.task = "autoencoder"
  config.autoencoder.update(
    name="small-temporal", crop=96, image_weights="data/film/autoencoder.safetensors", reconstruction="l2",
    perceptual_weight=1.0,
  )  # fmt: skip
  config.autoencoder.perceptual.update(name="hed-vgg16", weights="runs/hed.safetensors", frames=2)
  config.data.tables = (("data/film/prepared/train.csv", 1),)
  config.data.buckets = (("144p", 17, 1.0, 4), ("144p", 1, 1.0, 28))
  config.data.frame_interval = 3
  config.data.captions = "optional"
  config.data.workers = 1
  config.optimizer.update(learning_rate=1e-3, b2=0.99, warmup_steps=50, eps=1e-8, schedule="cosine")
  config.ema_decay = 0.99
  latents = {
    "autoencoder.latent_weight": 1.0, "autoencoder.identity_weight": 0.2,
    "autoencoder.reconstruction_weight": 0.0, "autoencoder.perceptual_weight": 0.0, "autoencoder.kl_weight": 1e-4,
  }  # fmt: skip
  config.stages = (
    # Variances that have not been learned are noise as large as the latents: first without them, then they are brought down.
    dict(name="latents", steps=4000, train="^autoencoder/temporal", **latents, **{"autoencoder.sample_posterior": False}),
    dict(name="posterior", steps=200, train="^autoencoder/temporal", **latents, **{"optimizer.learning_rate": 5e-4}),
    dict(
      name="pixels", steps=1500, keep_optimizer=False, train="^autoencoder/",
      **{"data.buckets": (("144p", 17, 1.0, 4), ("144p", 1, 1.0, 16)), "optimizer.learning_rate": 2e-4},
    ),
  )  # fmt: skip
  config.validation.update(tables=(("data/film/prepared/held_out.csv", 1),), every=300, samples_per_bucket=16)
  config.log_every = 25
  config.checkpoint_every = 50
  return config
