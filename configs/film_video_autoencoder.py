"""A small 4 x 8 x 8 video autoencoder like Open-Sora 1.2's, from the image autoencoder of the film, in four stages.

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

data/film/video_autoencoder.safetensors is this run's last checkpoint, 8,000 steps: seven minutes of an H100 (50 ms a step; two
trainings at once kept that rate, so the GPU was not what limited it, and larger batches may cost nothing there); on two cores
about half a day, computed from the time of some steps. What it keeps of the held-out scenes at 8 frames a second, 33 clips:

                                           PSNR dB   perceptual   latents per value
    image autoencoder, every frame           25.34      0.01284             0.0208
    this one                                 22.23      0.01382             0.0061
    this one, without perceptual distance    22.18      0.01558             0.0061
    image autoencoder, every fourth frame    20.79      0.01572             0.0061

It is not trained to its end. On 28 clips of train.csv it keeps 24.0 dB, repetition 22.6, the image autoencoder 26.4: it has
learned too little, not too much; the last 4,000 steps gave 0.2 dB. Of its mean squared error, 0.0060 of a range of 1, the image
autoencoder makes 0.0029, and stills lose 0.001 (tried by hand); the rest is what moves. 23.8 dB would be 0.0042.

The recipe is configs/open_sora_1_2_vae.py's in small: image latents first, with the image autoencoder as it is, then pixels.
No adversary: in so few steps a discriminator learns nothing, and gives noise. Variances that have not been learned are noise
as large as the latents: the first stage goes without them, the second brings them down. Of latents with noise of 10 % of
their variance the image autoencoder makes 22.2 dB, of 5 % 23.3 (tried by hand on 12 clips, of which it keeps 24.9).
In pixels, with one clip a step, a rate of 5e-4 doubled the error in 100 steps.
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
  pixels = dict(
    name="pixels", steps=2000, keep_optimizer=False, train="^autoencoder/",
    **{"data.buckets": (("144p", 17, 1.0, 4), ("144p", 1, 1.0, 16)), "optimizer.learning_rate": 2e-4},
  )  # fmt: skip
  config.stages = (
    dict(name="latents", steps=1500, train="^autoencoder/temporal", **latents, **{"autoencoder.sample_posterior": False}),
    dict(name="posterior", steps=500, train="^autoencoder/temporal", **latents, **{"optimizer.learning_rate": 5e-4}),
    pixels,
    dict(pixels, name="longer", steps=4000, keep_optimizer=True),
  )
  config.validation.update(tables=(("data/film/prepared/held_out.csv", 1),), every=300, samples_per_bucket=16)
  config.log_every = 25
  config.checkpoint_every = 50
  return config
