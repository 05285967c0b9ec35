"""Every key of a run with its default. Other configs start from this one and change what they need.

  python -m stdit_jax.train --config configs/NAME.py [--config.output=runs/x --config.optimizer.learning_rate=1e-4 ...]

A key that is not in this file is an error. stdit_jax/config.py has the type and the allowed values of each key. Configs import
only ml_collections, so that `data/` can read them as well.
"""

import ml_collections


def get_config():
  """The default run: STDiT-3 with rectified flow. A run must set its table, buckets, weights and steps."""
  config = ml_collections.ConfigDict()
  config.output = "runs/base"  # folder of this run alone, or gs://BUCKET/NAME, for checkpoints, metrics and samples
  config.seed = 42
  config.task = "denoiser"  # what is trained: "denoiser" or "autoencoder"
  config.platform = ""  # "cpu", "gpu" or "tpu" refuses other devices. "" uses the devices that JAX finds
  # Devices along each axis within a slice, and slices along each axis. -1 takes the rest (stdit_jax/parallel/mesh.py).
  config.mesh = dict(data=-1, fsdp=1, sequence=1, tensor=1)
  config.slices = dict(data=-1, fsdp=1, sequence=1, tensor=1)
  config.max_tokens_per_device = 0  # a denoiser splits larger batches into accumulated micro batches; 0: never
  # Buckets that split their tokens over the `sequence` axis. The other buckets use this axis for the batch.
  # "auto": buckets whose batch does not divide by all devices, or whose samples exceed max_tokens_per_device.
  # Or "never", "always", or the names of buckets, such as "480p:204,720p:51".
  config.split_tokens = "auto"

  # Initial weights: a run folder, or safetensors in the original layout. "" is the original initialisation.
  config.init = ""
  config.init_strict = True  # False: load the parameters that fit and report the others
  # "auto": the newest readable checkpoint of `output`. Without a checkpoint the run starts at step 0.
  # "required": like "auto", but no checkpoint is an error.
  # "1200": the checkpoint of step 1200. The run moves newer checkpoints to `<output>/set-aside`. If the same command runs
  # again, it resumes from its own newest checkpoint.
  config.resume = "auto"
  config.restart_data = False  # True: start a new data order if table, buckets or model changed since the checkpoint

  # Denoiser. `name` is a size of a family in stdit_jax/models, or MODULE:SIZE of your own module. `fields` replace fields of
  # this size (dtype, remat, depth, ...).
  config.model = dict(name="STDiT3-XL/2", fields=dict(dtype="float32", remat="none"))

  # Text encoder of denoisers that take captions: a name of stdit_jax.models.t5.TABLE. `where`: "step" (inside the training
  # step), "ahead" (a separate program before the step) or "disk" (column `text_features` of the table). `train` trains the
  # encoder and needs "step".
  # `tokenizer`: "byt5" (bytes, without a file) or a folder that transformers' AutoTokenizer reads.
  config.text_encoder = dict(
    name="xxl", weights="", tokenizer="", max_length=300, where="ahead", train=False,
    fields=ml_collections.ConfigDict(),  # of stdit_jax.models.t5.T5Config: dtype, param_dtype, remat, ...
    clean_captions=False,  # clean training captions like prompts; the original expects clean tables
  )  # fmt: skip

  # Autoencoder: a name of a TABLE in stdit_jax/autoencoders (image_kl, temporal, causal3d), and its weights (safetensors).
  config.autoencoder = dict(
    name="sd-kl-f8", fields=ml_collections.ConfigDict(), weights="", sample_posterior=True, micro_batch=4, dtype="float32",
    cache_gb=0.0,  # host memory per process to cache latents of images and of repeated clips (data.windows_per_row)
    # For task="autoencoder": side of the random crops in pixels, "l1" or "l2", and weights of the loss terms of
    # stdit_jax/training/autoencoding.py.
    crop=128, reconstruction="l1", reconstruction_weight=1.0, kl_weight=1e-6, latent_weight=0.0, identity_weight=0.0,
    perceptual_weight=0.0, adversarial_weight=0.0, adaptive=True,
    # Number of random frames of a clip that the loss decodes and compares in pixels; 0: all. Only for autoencoders like
    # Open-Sora 1.2's, whose image autoencoder works on single frames and costs most.
    pixel_frames=0,
    image_weights="",  # initial weights of Open-Sora 1.2's image autoencoder alone (safetensors)
    # stdit_jax/autoencoders/perceptual.py. `frames`: random frames among the decoded ones; 0: all.
    perceptual=dict(name="vgg16-lpips", weights="", sha256="", frames=0),
    discriminator=ml_collections.ConfigDict(),  # fields of stdit_jax.autoencoders.discriminator.DiscriminatorConfig
  )  # fmt: skip

  # Diffusion: "rectified-flow" or "iddpm", and the fields of its class in stdit_jax/diffusion.
  config.diffusion = dict(
    name="rectified-flow", fields=dict(sample_method="logit-normal", use_timestep_transform=True)
  )  # fmt: skip
  config.caption_dropout = 0.1  # share of samples that get the null caption
  config.mask_ratios = ml_collections.ConfigDict()  # strategy -> share of the clips; the rest up to 1 is "identity"

  # Data: data/config.py describes each field.
  config.data = dict(
    tables=(), buckets=(), reference_devices=1, seed=42, frame_interval=1, drop_last=True, captions="required",
    max_caption_length=20_000, aspect_ratios=None, windows_per_row=0, resize="area", scores=("aes", "flow", "cmotion"),
    score_drop=0.2, fps_rule="exact", latents="", workers=None, read_ahead=None, row_timeout=240.0, max_bad_rows=0.1,
  )  # fmt: skip

  config.optimizer = dict(
    learning_rate=1e-4, warmup_steps=1000, schedule="constant", b1=0.9, b2=0.999, eps=1e-15,
    weight_decay=0.0, clip_norm=1.0, accumulate=1,
    scales=(),  # (regular expression for parameter names, factor of the learning rate) pairs; the first match counts
  )  # fmt: skip
  config.train = ".*"  # regular expression: parameters with a match in their name train
  config.ema_decay = 0.99

  # The stages of a run: name, steps, and (dotted) keys that this stage alone changes, e.g.
  # dict(name="second", steps=1000, keep_optimizer=True, **{"optimizer.learning_rate": 5e-5}). With keep_optimizer=False a stage
  # begins like a run: with a fresh optimizer, and with the parameters as their average.
  # A stage may change `model`, `diffusion` and the autoencoder's name, fields and weights. Parameters of equal name and shape
  # stay. New parameters are initialised, and one line of output lists them. `mesh`, `seed`, `output` and the text encoder (but
  # not its max_length) belong to the whole run.
  config.stages = (dict(name="main", steps=1000),)

  # Validation: the loss of the averaged weights on fixed rows of `tables`, with fixed timesteps and noise. It runs after every
  # `every` optimizer steps and at the end of a stage (0: never). It measures each bucket of the stage on rows that fit the
  # bucket, whatever its keep probabilities.
  config.validation = dict(tables=(), every=0, samples_per_bucket=64, timesteps=10)

  config.compile_threads = 0  # programs compiled at the same time; 0: one for each eight cores, at most 16
  # Folder of compiled programs, so that a restart compiles nothing. "" is `<output>/compilation_cache`. The environment
  # variable JAX_COMPILATION_CACHE_DIR overrides this key.
  config.compilation_cache = ""
  config.profile_steps = ()  # (first, last) optimizer step of a profile in `<output>/profile`; SIGUSR1 profiles the next three
  config.log_every = 10
  # A run also saves at the end of every stage, and after every `keep_every` steps (0: never), or at the next finite step. It
  # never deletes these checkpoints. It also keeps the newest `keep_checkpoints` of all.
  config.checkpoint_every = 200
  config.keep_checkpoints = 3
  config.keep_every = 10_000
  # An optimizer step with a non-finite loss or gradient changes nothing. After `max_nonfinite` such steps in a row the run goes
  # back to the last checkpoint and skips the failed micro steps. If the failure repeats, the run stops.
  config.max_nonfinite = 5
  # Seconds without progress on any process before the run exits with code 75 and names the process that hangs. `slow_timeout`
  # applies to reading and writing checkpoints, compiling and sampling. 0: never.
  config.watchdog = dict(timeout=300.0, slow_timeout=3600.0)
  config.sample_every = 0  # optimizer steps; 0: no sample videos while training
  config.sample = dict(
    prompts=(), resolution="144p", aspect_ratio="9:16", num_frames=16, fps=24, steps=30, guidance_scale=7.0, seed=0
  )  # fmt: skip
  return config
