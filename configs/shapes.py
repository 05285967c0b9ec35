"""Goal: a small STDiT-3 and a small T5 learn moving shapes (data/shapes.py). `evaluate --task shapes` measures them.

Data: none. The loader draws the shapes.
Time: about two hours on two CPU cores.

  python -m stdit_jax.train --config configs/shapes.py
  python -m stdit_jax.evaluate --run runs/shapes --task shapes

README's section "Generate" has the results of the shipped files in data/moving_shapes. Four runs made them, each from the
exported weights of the previous run: 1,000 steps of images and 1,983 of clips, then 3,000, 1,400 and 1,000 steps of clips.
This file trains for about as many steps in one run, which is not measured. The commands of the second run and of the export:

  python -m stdit_jax.train --config configs/shapes.py --config.output=runs/shapes-on \\
      --config.init=denoiser.safetensors --config.text_encoder.weights=text_encoder.safetensors \\
      --config.stages="({'name':'videos','steps':3000,'optimizer.schedule':'cosine'},)"
  python -m stdit_jax.convert --input runs/shapes --to open-sora --dtype float16 \\
      --output data/moving_shapes/denoiser.safetensors
  python -m stdit_jax.convert --input runs/shapes --part text_encoder --dtype float16 \\
      --output data/moving_shapes/text_encoder.safetensors

The third and the fourth run set 'optimizer.learning_rate':6e-4. The fourth run also sets
--config.data.buckets="(('64p',1,0.25,64),('64p',4,1.0,64),('64p',8,1.0,32))", which skips three of four images. It changes
--config.mask_ratios: image_head and image_head_tail 0.1, quarter_head_tail 0.08. The model learns directions last: 33, 67, 87
and 94 % of the videos have the right direction after the four runs.
"""

from configs import base

PROMPTS = (
  "a red circle moves slowly right on a gray ground",
  "a blue cross moves quickly up and to the left on a striped black ground",
  "a yellow triangle moves slowly down and a cyan square moves quickly left on a white ground",
)


def get_config():
  """First 64p images, then also clips of 4 and 8 frames, in five aspect ratios. A third of the clips have given frames."""
  config = base.get_config()
  config.output = "runs/shapes"
  config.model.name = "STDiT3-mini/2"
  config.model.fields.update(
    hidden_size=160, num_heads=5, caption_channels=128, model_max_length=32, scan=False, frame_positions=True
  )  # fmt: skip
  config.text_encoder.update(name="mini", tokenizer="data/moving_shapes/tokenizer", max_length=32, where="step", train=True)
  config.autoencoder.update(
    name="small-kl-f8", weights="data/moving_shapes/autoencoder.safetensors", sample_posterior=False, cache_gb=1.0
  )  # fmt: skip
  # Mean and deviation of the latents of moving shapes, printed by `evaluate --task autoencoder`.
  config.autoencoder.fields = dict(shift=(2.025, 0.501, 0.146, -0.543), scale=(1.673, 2.526, 1.144, 2.13))
  config.data.tables = (("shapes://train/0/20000", 1),)
  config.data.buckets = (("64p", 1, 1.0, 64), ("64p", 4, 1.0, 64), ("64p", 8, 1.0, 32))
  config.data.windows_per_row = 1  # the cache then encodes every clip once
  config.data.workers = 1
  config.diffusion.fields = dict(sample_method="logit-normal", loc=1.0, use_timestep_transform=False)
  config.mask_ratios = dict(
    random=0.03, intepolate=0.02, quarter_head=0.05, quarter_tail=0.03, quarter_head_tail=0.05, image_head=0.07,
    image_tail=0.03, image_head_tail=0.05,
  )  # fmt: skip
  config.optimizer.update(learning_rate=1e-3, b2=0.98, warmup_steps=100, eps=1e-8)
  config.optimizer.scales = (("^text_encoder", 0.1),)
  config.ema_decay = 0.998
  config.stages = (
    dict(name="images", steps=1000, **{"data.buckets": (("64p", 1, 1.0, 64),)}),
    dict(name="videos", steps=7400, **{"optimizer.schedule": "cosine"}),
  )
  config.log_every = 50
  config.checkpoint_every = 500
  config.sample_every = 500
  config.sample.update(
    prompts=PROMPTS, resolution="64p", aspect_ratio="0.75", num_frames=8, fps=8, steps=30, guidance_scale=3.0
  )  # fmt: skip
  return config
