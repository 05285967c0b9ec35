"""Goal: show in minutes that everything works, with a small STDiT-3 and a small byte-level T5 on Big Buck Bunny.

Data: launch/quickstart.sh downloads and prepares the film.
Time: seven minutes of training on two CPU cores (measured). The samples show colours and layout of the scenes (sky, trees, a
  meadow, a gray shape for the rabbit) without detail. configs/film.py trains longer.

  bash launch/quickstart.sh            # prepares the film, trains, samples, exports
  python -m stdit_jax.train --config configs/quickstart.py
"""

from configs import base

PROMPTS = (
  "A pink sky over a sunny green meadow with blue hills and tall green trees on the right.",
  "A purple bird with an orange beak stands on a branch in front of a lilac sky and sings.",
  "A big gray rabbit stands in a yellow meadow under a pink sky.",
)


def get_config():
  """First 144p images, then also clips of half a second and two seconds at 8 fps, in landscape, square and portrait."""
  config = base.get_config()
  config.output = "runs/quickstart"
  config.model.name = "STDiT3-mini/4"
  config.text_encoder.update(
    name="byt5-mini", tokenizer="byt5", max_length=120, where="step", train=True, clean_captions=True
  )  # fmt: skip
  config.autoencoder.update(
    name="small-temporal", weights="data/film/video_autoencoder.safetensors", sample_posterior=False, cache_gb=0.5,
    micro_batch=6,  # frames encoded together; 17 frames take three rounds
  )  # fmt: skip
  # Mean and deviation of the latents of held-out scenes, printed by `evaluate --task autoencoder`.
  config.autoencoder.fields = dict(
    shortcut=True, shift=(1.391, 0.001, 0.604, -0.594), scale=(2.09, 4.327, 3.219, 3.248)
  )  # fmt: skip
  config.data.tables = (("data/film/prepared/table.csv", 1),)
  config.data.buckets = (("144p", 1, 1.0, 8), ("144p", 5, 1.0, 4), ("144p", 17, (1.0, 0.5), 3))
  config.data.frame_interval = 3
  config.data.drop_last = False  # works with a handful of videos
  config.data.windows_per_row = 1  # the cache then encodes every clip once
  config.data.workers = 1
  # loc=1.0 draws mostly noisy timesteps, which decide layout and text. In the predicted video, a squared error at timestep t
  # has the weight (t / 1000)^2.
  config.diffusion.fields = dict(sample_method="logit-normal", loc=1.0, use_timestep_transform=False)
  config.mask_ratios = dict(image_head=0.05, random=0.05)
  config.optimizer.update(learning_rate=8e-4, b2=0.95, warmup_steps=50, eps=1e-8)
  # Measured: at the full rate the text encoder soon maps every caption to the same features.
  config.optimizer.scales = (("^text_encoder", 0.05),)
  config.ema_decay = 0.98
  config.stages = (
    # Training the text encoder as well makes a step 15 to 20 % slower (measured). Its gain in this stage is not measured.
    dict(name="images", steps=800, train="^denoiser", **{"data.buckets": (("144p", 1, 1.0, 8),)}),
    dict(name="videos", steps=160, **{"optimizer.schedule": "cosine"}),
  )
  config.log_every = 50
  config.checkpoint_every = 300
  config.sample.update(
    prompts=PROMPTS, resolution="144p", aspect_ratio="9:16", num_frames=17, fps=8, steps=20, guidance_scale=3.0
  )  # fmt: skip
  return config
