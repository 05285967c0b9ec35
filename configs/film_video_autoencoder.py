"""Goal: a small 4 x 8 x 8 video autoencoder like Open-Sora 1.2's. It starts with the weights of configs/film_autoencoder.py.

Data: `data.prepare.film` downloads and prepares Big Buck Bunny.
Time: an hour and a quarter on two CPU cores, which are two devices with one thread each (measured).

  python -m data.prepare.film --output data/film/prepared
  python -m stdit_jax.interop.fetch hed-vgg16 --output runs/hed.safetensors
  XLA_FLAGS="--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false" \\
      python -m stdit_jax.train --config configs/film_video_autoencoder.py --config.mesh.data=2

On GPUs and TPUs omit XLA_FLAGS and --config.mesh.data. The first command below measures the result on held-out scenes, and
prints the shift and scale of the latents. The second command measures the baseline: the image autoencoder on every fourth
frame, with the same number of latents. The third command writes the file:

  python -m stdit_jax.evaluate --task autoencoder --run runs/film_video_autoencoder --tables data/film/prepared/held_out.csv \\
      --buckets 144p:17 --frame-interval 3 --count 1000 --perceptual hed-vgg16 runs/hed.safetensors --picture film.png
  python -m stdit_jax.evaluate --task autoencoder --autoencoder data/film/autoencoder.safetensors --repeat 4 ...
  python -m stdit_jax.convert --input runs/film_video_autoencoder --dtype float16 \\
      --config '{"shift": [...], "scale": [...]}' --output data/film/video_autoencoder.safetensors

Results (measured) on 33 clips of held-out scenes at 8 frames per second. The image autoencoder saw some of their frames.

                                           PSNR dB   perceptual   latents per value
    image autoencoder, every frame           25.34      0.01284             0.0208
    this recipe                              24.00      0.01170             0.0061
    third stage without perceptual loss      23.99      0.01198             0.0061
    without the third stage                  23.98      0.01202             0.0061
    image autoencoder, every fourth frame    20.79      0.01572             0.0061

The third row is a run with --config.autoencoder.perceptual_weight=0. Two runs made the shipped file. The run of the first two
stages ended at step 1915 of 2300, where the learning rate was a tenth of its peak. The run of the third stage started from the
exported weights (--config.init).

Why there is a shortcut, measured on the same clips: the network alone, as in the original, reaches 22.2 dB after 8,000 steps on
an H200. The best linear map from the image latents of four frames to one latent and back (principal components) reaches 22.9
dB. With such a map beside the network (`shortcut`), trained at 30 times the rate, the recipe reaches 22.5 dB after 300 steps.
Another 1,600 steps, which train all parts on pixels, give 24.0 dB.

There is no discriminator: in so few steps it learns nothing and adds noise.
"""

from configs import base


def get_config():
  """17 frames at 8 per second and single images, in random crops of 96 x 96 like those of the image autoencoder."""
  config = base.get_config()
  config.output = "runs/film_video_autoencoder"
  config.task = "autoencoder"
  config.autoencoder.update(
    name="small-temporal", crop=96, image_weights="data/film/autoencoder.safetensors", reconstruction="l2",
    pixel_frames=3,  # random frames of a clip; decoding all 17 would cost more than the rest of the step
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
    # The shortcut starts as an average of frames. At the rate of the other parameters it would stay an average.
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
