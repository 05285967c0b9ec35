"""A small 4 x 8 x 8 video autoencoder like Open-Sora 1.2's, from the image autoencoder of the film, in three stages.

  python -m data.prepare.film --output data/film/prepared
  python -m stdit_jax.interop.fetch hed-vgg16 --output runs/hed.safetensors
  XLA_FLAGS="--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false" \\
      python -m stdit_jax.train --config configs/film_video_autoencoder.py --config.mesh.data=2  # elsewhere: the config alone

What it keeps of scenes that it has not seen (the image autoencoder saw some of their frames), beside the baseline, in which the
image autoencoder keeps every fourth frame, so as many numbers. The first also prints shift and scale of the latents, with which
the file for denoisers is written:

  python -m stdit_jax.evaluate --task autoencoder --run runs/film_video_autoencoder --tables data/film/prepared/held_out.csv \\
      --buckets 144p:17 --frame-interval 3 --count 1000 --perceptual hed-vgg16 runs/hed.safetensors --picture film.png
  python -m stdit_jax.evaluate --task autoencoder --autoencoder data/film/autoencoder.safetensors --repeat 4 ...
  python -m stdit_jax.convert --input runs/film_video_autoencoder --dtype float16 \\
      --config '{"shift": [...], "scale": [...]}' --output data/film/video_autoencoder.safetensors

The plain recipe to compare with, as long: --config.autoencoder.perceptual_weight=0 and another --config.output.

data/film/video_autoencoder.safetensors took an hour and a quarter of two cores (two devices of one thread each), in two runs:
the first two stages, broken off at step 1915 of 2300, where the rate was a tenth of its highest, exported, and from there
(--config.init) the third. What it keeps of the held-out scenes at 8 frames a second, 33 clips:

                                           PSNR dB   perceptual   latents per value
    image autoencoder, every frame           25.34      0.01284             0.0208
    this one                                 24.00      0.01170             0.0061
    the third stage by the plain recipe      23.99      0.01198             0.0061
    without its third stage                  23.98      0.01202             0.0061
    image autoencoder, every fourth frame    20.79      0.01572             0.0061

What it took, on the same clips: the network alone, as the original has it, kept 22.2 dB after 8,000 steps on an H100, less than
the best linear map of four frames' image latents to one and back (principal components, tried by hand): 22.9. With such a map
beside the network (`shortcut`), learned at 30 times the rate, 22.5 after 300 steps. All of it on pixels, the image autoencoder
as well: 24.0 after 1,600 more. Three frames of a clip, others every time, are decoded: 17 would cost more than all the rest.

No adversary: in so few steps a discriminator learns nothing, and gives noise.
"""

from configs import base


def get_config():
  """17 frames at 8 a second and single pictures, in random crops of 96 x 96, as the image autoencoder was trained on."""
  config = base.get_config()
  config.output = "runs/film_video_autoencoder"
  config.task = "autoencoder"
  config.autoencoder.update(
    name="small-temporal", crop=96, image_weights="data/film/autoencoder.safetensors", reconstruction="l2", pixel_frames=3,
    perceptual_weight=1.0,
  )  # fmt: skip
  config.autoencoder.fields = dict(shortcut=True)
  config.autoencoder.perceptual.update(name="hed-vgg16", weights="runs/hed.safetensors", frames=1)
  config.data.tables = (("data/film/prepared/train.csv", 1),)
  config.data.buckets = (("144p", 17, 1.0, 4), ("144p", 1, 1.0, 16))
  config.data.frame_interval = 3
  config.data.captions = "optional"
  config.data.workers = 1
  config.optimizer.update(learning_rate=1e-3, b2=0.99, warmup_steps=50, eps=1e-8, schedule="cosine")
  config.ema_decay = 0.99
  plain = {"autoencoder.perceptual_weight": 0.0}
  config.stages = (
    # The shortcut alone, nearly: at the rate of the others it stays the average that it begins as.
    dict(name="time", steps=300, train="^autoencoder/temporal", **plain, **{"optimizer.scales": (("shortcut", 30.0),)}),
    dict(
      name="pixels", steps=2000, keep_optimizer=False, **plain,
      **{"optimizer.learning_rate": 5e-4, "optimizer.warmup_steps": 100},
    ),
    dict(name="perceptual", steps=200, keep_optimizer=False, **{"optimizer.learning_rate": 2e-4}),
  )  # fmt: skip
  config.validation.update(tables=(("data/film/prepared/held_out.csv", 1),), every=300, samples_per_bucket=16)
  config.log_every = 25
  config.checkpoint_every = 100
  return config
