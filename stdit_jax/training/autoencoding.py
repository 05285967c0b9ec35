"""The objective of autoencoders of images or videos: the losses, with their batches and weights."""

import functools
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from data import plan, sources
from data.aspect_ratios import SIZES
from data.config import DataConfig
from stdit_jax.autoencoders import discriminator, losses, perceptual
from stdit_jax.autoencoders.latents import draw, to_float
from stdit_jax.autoencoders.registry import DTYPES, autoencoder_model, check_lengths, family_of
from stdit_jax.components import need_file
from stdit_jax.config import Config
from stdit_jax.diffusion.noise import Purpose, fold_in, sample_keys
from stdit_jax.interop import load_variables, measures
from stdit_jax.parallel.shardings import ArraySpec, Layout, Tree, channels, gather_whole, tree_shardings
from stdit_jax.training.batches import BatchMaker, Encoders, autoencoder_batches
from stdit_jax.training.state import init_shapes

WEIGHTS = ("reconstruction", "kl", "latent", "identity", "perceptual", "adversarial")  # autoencoder.<name>_weight
# `fsdp` splits kernels `[..., in, out]` along the input channels, which are the rows of a TPU tile (parallel/shardings.py). It
# splits output channels if it does not divide the input channels. Other parameters are small, or do not train.
_TRAINED = r"(^|/)((shortcut_)?(encoder|decoder)|quant_conv|post_quant_conv|discriminator)/"
RULES = (
  (rf"{_TRAINED}(.*/)?kernel$", channels(-2), channels(-1), P()),
  (rf"{_TRAINED}|(^|/)perceptual/", P()),
)


class AutoencoderObjective:
  """Trains an autoencoder on random crops of clips. training/objectives.py lists the methods.

  `params` has the autoencoder, and a discriminator if one trains. The loss of a sample is a sum of means with the weights
  `config.autoencoder.<name>_weight`:
    reconstruction: absolute or squared error of the pixels;
    kl: KL divergence of the posterior, summed over the latents and divided by the number of pixel values;
    latent: absolute error of the image latents that the temporal autoencoder reconstructs (`z_rec` of Open-Sora 1.2);
    identity: absolute difference of the temporal and the image latent of clips of one frame (its `image_identity`);
    perceptual: mean `perceptual.distance` of the frames;
    adversarial: the negative score of the discriminator, times `discriminator.adaptive_weight` if `adaptive`. The loss of the
      discriminator is added. Each network gets the gradient of its own terms, and both step at the same time.
  The loss decodes `autoencoder.pixel_frames` frames, and none if no term needs pixels. A later stage may add a term.
  """

  part = "autoencoder"
  counts_flops = encodes_ahead = encodes_clips = False
  rules, resizable, encoders, sample_weights = RULES, (), (), ()
  shapes = functools.cached_property(init_shapes)

  def __init__(self, config: Config):
    self.config = config
    own = config.autoencoder
    self.model = autoencoder_model(own)
    self.family = family_of(self.model.config)
    self.weights = {name: getattr(own, f"{name}_weight") for name in WEIGHTS}
    self.discriminator = discriminator.Discriminator(discriminator.get_config(own.discriminator), DTYPES[own.dtype])
    self.from_files = ("perceptual",) if self.weights["perceptual"] else ()
    self._check(own)
    self._check_image_autoencoder(own)
    check_lengths(config, self.model.config)
    if self.weights["adversarial"]:
      self._check_adversary(own)

  def _check(self, own):
    factor = self.model.config.downsampling
    if own.crop % factor or own.crop < factor:
      raise ValueError(f"config: autoencoder.crop is {own.crop}; allowed: multiples of {factor}")
    if not any(self.weights.values()):
      raise ValueError(
        f"config: all weights of the autoencoder's loss are 0. Set one of autoencoder.<name>_weight: {', '.join(WEIGHTS)}"
      )
    if limit := self.config.max_tokens_per_device:
      # Micro batches would change the result: `_adaptive_weight` takes the gradients of one micro batch, not of the batch.
      raise ValueError(
        f"config: max_tokens_per_device is {limit}, but autoencoders train on pixels, and their batches are not split. Set it "
        "to 0. To save memory, give smaller batches in data.buckets and a larger optimizer.accumulate"
      )
    if self.weights["perceptual"]:
      perceptual.shapes(own.perceptual.name)  # raises ValueError for an unknown name
      if own.crop < (least := perceptual.SMALLEST):
        raise ValueError(f"config: autoencoder.crop is {own.crop}; the perceptual distance needs sides of at least {least}")

  def _check_image_autoencoder(self, own):
    if self.family.image_autoencoder:
      if own.pixel_frames and self.weights["adversarial"]:
        raise ValueError(
          f"config: autoencoder.pixel_frames is {own.pixel_frames}, but the discriminator needs whole clips. Set it to 0 for "
          "all frames"
        )
      return
    inside = "has no image autoencoder inside"
    reasons = {"latent_weight": inside, "identity_weight": inside, "image_weights": inside}
    for key, why in (reasons | {"pixel_frames": "decodes all frames together"}).items():
      if value := getattr(own, key):
        raise ValueError(f"config: autoencoder.{key} is {value!r}, but {own.name!r} {why}. Set it to {type(value)()!r}")

  def _check_adversary(self, own):
    if own.adaptive and not (self.weights["reconstruction"] or self.weights["perceptual"]):
      raise ValueError(
        "config: autoencoder.adaptive scales the adversarial term by the gradients of reconstruction and perceptual distance. "
        "Both weights are 0, so the term would be 0. Set one of these weights, or autoencoder.adaptive=False"
      )
    layers = self.discriminator.config.layers
    if own.crop < 2**layers:
      raise ValueError(
        f"config: autoencoder.crop is {own.crop}, too small for {layers} layers of the discriminator. Take at least "
        f"{2**layers}, or fewer autoencoder.discriminator.layers"
      )

  # Batches.

  def batch(self, bucket: tuple[str, int], rows: int, token_parts: int = 1) -> Tree:
    """The arrays of one batch as a tree of `ArraySpec`."""
    crop = self.config.autoencoder.crop
    pixels = ArraySpec((rows, bucket[1], crop, crop, 3), jnp.uint8)
    return {"pixels": pixels, "weight": ArraySpec((rows,)), "sample_id": ArraySpec((rows, 2), jnp.uint32)}

  def work(self, batch: Tree) -> tuple[int, float]:
    """(0, 0): there is no formula for tokens and FLOPs."""
    return 0, 0

  def data_config(self, config: DataConfig) -> DataConfig:
    """`config` unchanged: an autoencoder needs no labels."""
    return config

  def open_cache(self, data: DataConfig, table: sources.Table) -> NoReturn:
    """Raises ValueError: an autoencoder reads no latents."""
    raise ValueError(f"data.latents={data.latents!r} is for denoisers. An autoencoder needs videos; set data.latents=''")

  def worker(self, cache: Any) -> None:
    """None: an autoencoder needs no captions."""

  def check_plan(self, clips: plan.Plan) -> None:
    """Raises ValueError if a clip of the first epoch is smaller than the crop."""
    crop, buckets = self.config.autoencoder.crop, self.config.data.parsed_buckets()
    numbers, _, ratios = clips.all_slots()
    for number, ratio in np.unique(np.stack([numbers, ratios], 1), axis=0).tolist():
      name = buckets[number].resolution
      height, width = list(SIZES[name].values())[ratio]
      if min(height, width) < crop:
        raise ValueError(
          f"autoencoder.crop is {crop}, but there are clips of {height} x {width} pixels in {name}; take at most "
          f"{min(height, width)}, a larger resolution, or remove such files from the table"
        )

  def batch_maker(self, encoders: Encoders, name: str) -> BatchMaker:
    return autoencoder_batches(self.config)

  # Weights.

  def check_files(self) -> None:
    """Raises ValueError if a file that the run will read does not exist, or if the run would not read a given file."""
    own, init = self.config.autoencoder, self.config.init
    if own.weights:
      raise ValueError(
        "config: autoencoder.weights is for the training of denoisers. To start an autoencoder from a file, set init instead"
      )
    if own.image_weights:
      if init:
        raise ValueError("config: init and autoencoder.image_weights both give the image autoencoder; set only one of the two")
      need_file(own.image_weights, "autoencoder.image_weights")
    for name in ("latent", "identity"):
      if self.weights[name] and not (init or own.image_weights):
        raise ValueError(
          f"config: autoencoder.{name}_weight compares with latents of the image autoencoder, whose weights would be random. "
          "Give autoencoder.image_weights or init"
        )
    if self.weights["perceptual"]:
      self._load_perceptual()  # only a check: a wrong file of a later stage must not end the run after days

  def _load_perceptual(self):
    own = self.config.autoencoder.perceptual
    return measures.load_perceptual(own.name, need_file(own.weights, "autoencoder.perceptual.weights"), own.sha256)

  def read_frozen(self, mesh: Mesh) -> Tree:
    """{name of `from_files`: parameters} from the files of the configuration, placed on the mesh."""
    if not self.from_files:
      return {}
    trunk = {"perceptual": self._load_perceptual()}
    return jax.device_put(trunk, tree_shardings(trunk, mesh, self.rules))

  def read_initial(self, params: Tree, mesh: Mesh) -> Tree:
    """`params` of `init`, with the image autoencoder from its own file."""
    if not (path := self.config.autoencoder.image_weights):
      return params
    image = self.model.config.image_config
    shapes = family_of(image).init_shapes(image)
    shardings = tree_shardings(shapes, mesh, self.rules)
    loaded = load_variables(path, family_of(image).layouts, shapes, config=image, shardings=shardings)
    return {**params, "autoencoder": {**params["autoencoder"], "image": loaded["params"]}}

  def load_checkpoint(self, path: str, params: Tree, frozen: Tree, mesh: Mesh) -> tuple[Tree, Tree]:
    """(params, frozen) with the autoencoder of a checkpoint. Its shift and scale of latents may differ from the model's."""
    current = {"params": params["autoencoder"]}
    options = {"strict": self.config.init_strict, "numbers": False, "shardings": tree_shardings(current, mesh, self.rules)}
    loaded = load_variables(path, self.family.layouts, current, config=self.model.config, **options)
    return {**params, "autoencoder": loaded["params"]}, frozen

  def splits(self, num_frames: int, devices: int) -> bool:
    """Whether clips of so many frames can be split in time over so many devices."""
    return self.family.splits(self.model.config, num_frames, devices)

  def init(self, key: jax.Array) -> tuple[Tree, Tree]:
    """(params, frozen) with the original initialisation. The perceptual trunk is zeros until `read_frozen`."""
    model_key, discriminator_key = jax.random.split(key)
    params, frozen = {"autoencoder": self.family.init(self.model, model_key)["params"]}, {}
    if self.weights["adversarial"]:
      params["discriminator"] = discriminator.init(self.discriminator, discriminator_key)
    if self.weights["perceptual"]:
      shapes = perceptual.shapes(self.config.autoencoder.perceptual.name)
      frozen["perceptual"] = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return params, frozen

  def loss(self, params: Tree, frozen: Tree, batch: Tree, layout: Layout | None = None) -> tuple[jax.Array, Tree]:
    """A batch with pixels uint8 `[B, T, crop, crop, 3]` -> (loss per sample, its terms and further values per sample)."""
    params = self._gathered(params, layout)
    loss, values, made = self._terms(params["autoencoder"], frozen, batch, layout)
    if not self.weights["adversarial"]:
      return loss, values
    still, weight = jax.lax.stop_gradient, self.weights["adversarial"]
    real, fake = to_float(batch["pixels"]), made["pixels"]
    if self.config.autoencoder.adaptive:
      weight *= still(self._adaptive_weight(still(params), frozen, batch, still(made), layout))
    score = functools.partial(self._score, params["discriminator"], layout=layout)
    values["adversarial"] = discriminator.generator_loss(self._score(still(params["discriminator"]), fake, layout))
    values["discriminator"] = discriminator.hinge_loss(score(real), score(still(fake)))
    return loss + weight * values["adversarial"] + values["discriminator"], values

  def fixed_loss(self, params: Tree, frozen: Tree, batch: Tree, count: int, layout: Layout | None = None) -> jax.Array:
    """Loss `[1, B]` without the adversarial term. There are no timesteps. The sample alone decides its crop and noise."""
    return self._terms(self._gathered(params, layout)["autoencoder"], frozen, batch, layout)[0][None]

  def _gathered(self, params, layout):
    """Whole parameters on all devices. Layers cast kernels to the model's dtype anyway."""
    return gather_whole(params, layout, DTYPES[self.config.autoencoder.dtype], self.rules)

  def fixed_names(self, count: int) -> Sequence[str | None]:
    return [None]

  def _terms(self, params, frozen, batch, layout):
    """-> (loss per sample without the adversarial term, its terms and further values, intermediate arrays)."""
    frames, weights = to_float(batch["pixels"]), self.weights
    made = self._encode(params, frames, batch, layout)
    kl = losses.kl_divergence(made["mean"], made["logvar"])
    values = {"kl": kl / made["mean"][0].size}
    loss = weights["kl"] * kl / frames[0].size  # per pixel value, like the reconstruction error (losses.py)
    made["frame_latents"] = self.family.frame_latents(self.model, params, made["latents"], frames.shape[1])
    if self.family.image_autoencoder:
      values["latent"] = losses.reconstruction_error(made["frame_latents"], made["image_latents"])
      loss += weights["latent"] * values["latent"]
      if frames.shape[1] == 1:
        values["identity"] = losses.reconstruction_error(made["latents"], made["image_latents"])
        loss += weights["identity"] * values["identity"]
    if weights["reconstruction"] or weights["perceptual"] or weights["adversarial"]:
      count = self.config.autoencoder.pixel_frames
      made["frame_latents"], frames = self._some_frames(count, Purpose.PIXEL_FRAMES, batch, made["frame_latents"], frames)
      made["pixels"] = self.family.decode(self.model, params, made["frame_latents"], layout)
      of_pixels, more = self._pixel_terms(frozen, made["pixels"], frames, batch, layout)
      loss, values = loss + of_pixels, values | more
    return loss, values, made

  def _encode(self, params, frames, batch, layout):
    """-> {"mean", "logvar", "latents"} `[B, T', h, w, C]` and "image_latents" `[B, T, h, w, C]` or None."""
    image_noise = self._noise(batch, 1, frames.shape[1]) if self.family.image_autoencoder else None
    mean, logvar, image_latents = self.family.encode(self.model, params, frames, image_noise, layout)
    latents = draw(mean, logvar, self._noise(batch, 0, mean.shape[1]))
    return {"mean": mean, "logvar": logvar, "latents": latents, "image_latents": image_latents}

  def _noise(self, batch, number, frames):
    """Normal noise `[B, frames, h, w, C]` from the keys of the samples, or None if the latents are means.

    `number`: 0 for the posterior of the autoencoder, 1 for the posterior of its image autoencoder.
    """
    if not self.config.autoencoder.sample_posterior:
      return None
    config, keys = self.model.config, sample_keys(self.config.seed, batch["sample_id"], Purpose.POSTERIOR)
    shape = (frames, *config.latent_size(*batch["pixels"].shape[2:4]), config.latent_channels)
    return jax.vmap(lambda key: jax.random.normal(key, shape))(fold_in(keys, number) if number else keys)

  def _pixel_terms(self, frozen, pixels, frames, batch, layout):
    """-> (weighted sum per sample of the pixel terms without the adversarial term, their values)."""
    own = self.config.autoencoder
    error = losses.reconstruction_error(pixels, frames, own.reconstruction)
    values = {"reconstruction": error, "squared_error": losses.reconstruction_error(pixels, frames, "l2")}
    loss = self.weights["reconstruction"] * error
    if self.weights["perceptual"]:
      # Some frames only: the VGG16 network costs more than the autoencoder.
      pixels, frames = self._some_frames(own.perceptual.frames, Purpose.PERCEPTUAL_FRAMES, batch, pixels, frames)
      values["perceptual"] = self._distance(frozen["perceptual"], layout, pixels, frames).mean(1)
      loss += self.weights["perceptual"] * values["perceptual"]
    return loss, values

  def _some_frames(self, count, purpose, batch, *clips):
    """The same `count` frames of all clips `[B, T, ...]`, drawn for each sample. 0 means all frames."""
    total = clips[0].shape[1]
    if not 0 < count < total:
      return clips
    keys = sample_keys(self.config.seed, batch["sample_id"], purpose)
    numbers = jax.vmap(lambda key: jax.random.choice(key, total, (count,), replace=False))(keys)
    return [jnp.take_along_axis(clip, numbers[:, :, None, None, None], axis=1) for clip in clips]

  def _distance(self, params, layout, *clips):
    """The perceptual distance of every frame of two clips `[B, T, ...]` -> `[B, T]`."""

    def distance(params, *clips):
      frames = (clip.reshape(-1, *clip.shape[2:]) for clip in clips)
      return perceptual.distance(self.config.autoencoder.perceptual.name, params, *frames).reshape(clips[0].shape[:2])

    if layout is None or not layout.split_tokens:
      return distance(params, *clips)
    # Each device scores its own frames of each clip. `distance` turns frames into rows, and then a device's frames are not
    # contiguous rows. So a sharding constraint cannot express this split.
    frames = clips[0].shape[1]
    padded = (jnp.pad(clip, ((0, 0), (0, -frames % layout.token_parts), *[(0, 0)] * 3)) for clip in clips)
    spec = layout.spec("batch", "tokens")
    split = jax.shard_map(distance, mesh=layout.mesh, in_specs=(P(), spec, spec), out_specs=spec, check_vma=False)
    return split(params, *padded)[:, :frames]

  def _score(self, params, clips, layout):
    return self.discriminator.clone(layout=layout).apply({"params": params}, clips)

  def _adaptive_weight(self, params, frozen, batch, made, layout):
    """`discriminator.adaptive_weight` of the batch (VQGAN, equation 7)."""
    path, frames = self.family.last_layer, to_float(batch["pixels"])
    last = functools.reduce(lambda tree, name: tree[name], path, params["autoencoder"])
    with_last = functools.partial(_replaced, params["autoencoder"], path)
    decode = lambda last: self.family.decode(self.model, with_last(last), made["frame_latents"], layout)  # noqa: E731
    pixels, to_last_layer = jax.vjp(decode, last)  # turns a gradient of the pixels into one of the last layer
    share = batch["weight"] / jnp.maximum(batch["weight"].sum(), 1e-12)  # `[B]`, of each sample in the mean of the batch
    terms = (
      lambda x: self._pixel_terms(frozen, x, frames, batch, layout)[0],
      lambda x: discriminator.generator_loss(self._score(params["discriminator"], x, layout)),
    )
    gradients = [jax.grad(lambda x, term=term: jnp.sum(share * term(x)))(pixels) for term in terms]
    return discriminator.adaptive_weight(*map(to_last_layer, gradients))


def _replaced(tree, path, leaf):
  """`tree` with the subtree at `path` replaced."""
  return {**tree, path[0]: _replaced(tree[path[0]], path[1:], leaf)} if path else leaf
