"""Every key of a run, with its default. Other configs start from this one and change what they need:

  python -m stdit_jax.train --config configs/NAME.py [--config.output=runs/x --config.optimizer.learning_rate=1e-4 ...]

A key that is not here is refused. Configs import only ml_collections, so that `data/` can read them too.
"""

import ml_collections


def get_config():
  """The default run: STDiT-3 by rectified flow; a table, buckets, weights and steps have to be given."""
  config = ml_collections.ConfigDict()
  config.output = "runs/base"  # folder of the run, or gs://BUCKET/NAME: checkpoints, metrics, samples; belongs to one run
  config.seed = 42
  config.task = "denoiser"  # or "autoencoder": what is trained
  config.platform = ""  # "cpu", "gpu" or "tpu": refuse to run anywhere else; "" takes what is there
  # Devices along each axis within a slice, and slices along each axis; -1 takes the rest (stdit_jax/parallel/mesh.py).
  config.mesh = dict(data=-1, fsdp=1, sequence=1, tensor=1)
  config.slices = dict(data=-1, fsdp=1, sequence=1, tensor=1)
  config.max_tokens_per_device = 0  # larger batches of a denoiser are split into micro batches that accumulate; 0: never
  # Which buckets split tokens over the `sequence` axis, instead of taking it as more batch: "auto" those whose batch does not
  # divide by all devices, or whose samples have more than max_tokens_per_device tokens; "never"; "always"; or those that it
  # names, as "480p:204,720p:51".
  config.split_tokens = "auto"

  # Where to start: a run folder of ours or safetensors in the original layout; "" is the original initialisation.
  config.init = ""
  config.init_strict = True  # False: load what fits, report the rest
  # "auto": the newest checkpoint of `output` that can be read, or from the start without any; "required": never from the
  # start; "1200": that of step 1200. Newer ones are moved to `<output>/set-aside`;
  # the same command goes on, afterwards, from the newest.
  config.resume = "auto"
  config.restart_data = False  # start the data order anew when the table, the buckets or the model changed since the checkpoint

  # Denoiser: a size of a family in stdit_jax/models, like STDiT3-XL/2, or MODULE:SIZE of a module of yours; and fields that
  # replace its own (dtype, remat, scan, depth, ...).
  config.model = dict(name="STDiT3-XL/2", fields=dict(dtype="float32", remat="none"))

  # Text encoder of denoisers that take captions: a name of stdit_jax.models.t5.TABLE. `where` is "step" (in the training step),
  # "ahead" (a program of its own before it) or "disk" (column `text_features` of the table). `train` puts it into the trained
  # state; it needs "step".
  # `tokenizer`: "byt5" (bytes, needs no file) or a folder that transformers' AutoTokenizer reads.
  config.text_encoder = dict(
    name="xxl", weights="", tokenizer="", max_length=300, where="ahead", train=False,
    fields=ml_collections.ConfigDict(),  # of stdit_jax.models.t5.T5Config: dtype, param_dtype, remat, ...
    clean_captions=False,  # clean training captions as prompts are cleaned; the original expects clean tables
  )  # fmt: skip

  # Autoencoder: a name of a TABLE in stdit_jax/autoencoders (image_kl, temporal, causal3d) and its weights (safetensors).
  config.autoencoder = dict(
    name="sd-kl-f8", fields=ml_collections.ConfigDict(), weights="", sample_posterior=True, micro_batch=4, dtype="float32",
    cache_gb=0.0,  # host memory per process for latents of clips that come again (data.windows_per_row, images)
    # Only when it is what is trained: side of the random crops, "l1" or "l2", weights of the terms of the loss, which are what
    # stdit_jax/training/autoencoding.py says.
    crop=128, reconstruction="l1", reconstruction_weight=1.0, kl_weight=1e-6, latent_weight=0.0, identity_weight=0.0,
    perceptual_weight=0.0, adversarial_weight=0.0, adaptive=True,
    # Pixels of so many frames of a clip, drawn anew every time, are decoded and compared, 0: of all (Open-Sora 1.2's kind only,
    # whose image autoencoder knows single frames and costs most).
    pixel_frames=0,
    image_weights="",  # of Open-Sora 1.2's image autoencoder, to begin with (safetensors of it alone)
    # stdit_jax/autoencoders/perceptual.py; frames: of so many of these, drawn again, 0: of all.
    perceptual=dict(name="vgg16-lpips", weights="", sha256="", frames=0),
    discriminator=ml_collections.ConfigDict(),  # fields of stdit_jax.autoencoders.discriminator.DiscriminatorConfig
  )  # fmt: skip

  # Diffusion: "rectified-flow" or "iddpm", and the fields of its class in stdit_jax/diffusion.
  config.diffusion = dict(
    name="rectified-flow", fields=dict(sample_method="logit-normal", use_timestep_transform=True)
  )  # fmt: skip
  config.caption_dropout = 0.1  # share of samples that see the null caption
  config.mask_ratios = ml_collections.ConfigDict()  # strategy -> share; what is left over to 1 is "identity"

  # Data: data/config.py says what each field means.
  config.data = dict(
    tables=(), buckets=(), reference_devices=1, seed=42, frame_interval=1, drop_last=True, captions="required",
    max_caption_length=20_000, windows_per_row=0, resize="area", scores=("aes", "flow", "cmotion"), score_drop=0.2,
    fps_rule="exact", latents="", workers=2, read_ahead=None, max_bad_rows=0.1,
  )  # fmt: skip

  config.optimizer = dict(
    learning_rate=1e-4, warmup_steps=1000, schedule="constant", b1=0.9, b2=0.999, eps=1e-15,
    weight_decay=0.0, clip_norm=1.0, accumulate=1,
    scales=(),  # (regular expression over parameter names, factor of the learning rate); the first that matches counts
  )  # fmt: skip
  config.train = ".*"  # regular expression over parameter names: which parameters train
  config.ema_decay = 0.99

  # A run is a list of stages: name, steps, and keys above (dotted) that the stage changes, for itself alone, e.g.
  # dict(name="second", steps=1000, keep_optimizer=True, **{"optimizer.learning_rate": 5e-5}). `model`, `diffusion` and the
  # autoencoder's name, fields and weights may change: parameters of equal name and shape are kept, new ones initialised, and a
  # line says which. `mesh`, `seed`, `output` and the text encoder (but for max_length) are the run's.
  config.stages = (dict(name="main", steps=1000),)

  # Loss of the averaged weights on fixed rows of these tables, at fixed timesteps and noise, every so many optimizer steps and
  # at the end of a stage (0: never); of every bucket that the stage trains on, on rows that fit it, whatever its probabilities.
  config.validation = dict(tables=(), every=0, samples_per_bucket=64, timesteps=10)

  config.compile_threads = 1  # programs compiled at a time beside training, as soon as the first one is there
  # Folder that keeps compiled programs, so that a restart compiles nothing: "" is `<output>/compilation_cache`. The environment
  # variable JAX_COMPILATION_CACHE_DIR comes before it.
  config.compilation_cache = ""
  config.profile_steps = ()  # (first, last) optimizer step of a profile in `<output>/profile`; SIGUSR1 takes the next three
  config.log_every = 10
  config.checkpoint_every = 200
  config.keep_checkpoints = 3
  # A step whose loss or gradient is not finite changes nothing. After so many in a row the run goes back to the last
  # checkpoint and passes over the micro steps that failed; when that does not help it stops.
  config.max_nonfinite = 5
  # Seconds without progress, on any process, after which the run ends with exit code 75 and a message that names who hangs;
  # `slow_timeout` holds while a checkpoint is read or written, programs are compiled, samples are made. 0: never.
  config.watchdog = dict(timeout=300.0, slow_timeout=3600.0)
  config.sample_every = 0  # optimizer steps; 0: no sample videos while training
  config.sample = dict(
    prompts=(), resolution="144p", aspect_ratio="9:16", num_frames=16, fps=24, steps=30, guidance_scale=7.0, seed=0
  )  # fmt: skip
  return config
