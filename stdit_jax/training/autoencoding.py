"""What trains an autoencoder, of pictures or of videos: reconstruction, and whatever else its recipe weighs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from data.aspect_ratios import SIZES
from data.config import DataConfig
from stdit_jax.autoencoders import causal3d, codec, discriminator, image_kl, losses, perceptual, temporal
from stdit_jax.autoencoders.registry import DTYPES, autoencoder_model, check_lengths
from stdit_jax.components import need_file
from stdit_jax.diffusion.noise import Purpose, fold_in, sample_keys
from stdit_jax.interop import load_variables, measures
from stdit_jax.interop.models import IMAGE_LAYOUTS, autoencoder_layouts
from stdit_jax.parallel.shardings import ArraySpec, tree_shardings
from stdit_jax.training.batches import AutoencoderBatches
from stdit_jax.training.stages import WEIGHTS
from stdit_jax.training.state import init_shapes

# Autoencoders, and the networks that train them, are small: whole on every device.
RULES = ((r"(^|/)((shortcut_)?(encoder|decoder)|quant_conv|post_quant_conv|discriminator|perceptual)/", P()),)

# Where the last layer of a decoder is in the parameters: by its gradients the adversarial term is weighted.
_LAST_LAYER = {
  image_kl: ("decoder", "conv_out"),
  temporal: ("image", "decoder", "conv_out"),
  causal3d: ("decoder", "conv_out"),
}


class AutoencoderObjective:
  """The losses of an autoencoder over random crops of clips; `params` = autoencoder, and discriminator when there is one.

  The loss of a sample is a sum of means, weighted by `config.autoencoder.<name>_weight`:
    reconstruction: absolute or squared error of the pixels;
    kl: of the posterior, summed over the latents, per pixel value of the sample;
    latent: absolute error of the image latents between Open-Sora 1.2's two autoencoders (its `z_rec`);
    identity: absolute difference of the temporal and the image latent of clips of one frame (its `image_identity`);
    perceptual: `perceptual.distance` of every frame;
    adversarial: what the discriminator says, times `discriminator.adaptive_weight` if `adaptive`. The discriminator's own loss
      is added: each network gets the gradient of its own terms, and both step at once.
  Where no term looks at pixels they are not decoded, else of `autoencoder.pixel_frames` frames. A term begins with the stage
  that gives it a weight above 0.
  """

  part = "autoencoder"
  counts_flops = False
  rules, resizable = RULES, ()

  def __init__(self, config):
    self.config = config
    own = config.autoencoder
    self.model, self.module = autoencoder_model(own), codec.find(own.name)
    self.weights = {name: own[f"{name}_weight"] for name in WEIGHTS}
    self.discriminator = discriminator.Discriminator(discriminator.get_config(own.discriminator), DTYPES[own.dtype])
    self.from_files = ("perceptual",) if self.weights["perceptual"] else ()
    self._check(own)

  @functools.cached_property
  def shapes(self):
    """(params, frozen) of `init` as shapes; nothing is allocated."""
    return init_shapes(self)

  def _check(self, own):
    factor = self.model.config.downsampling
    if own.crop % factor or own.crop < factor:
      raise ValueError(f"config: autoencoder.crop is {own.crop}; allowed: multiples of {factor}")
    if own.reconstruction not in losses.KINDS:
      raise ValueError(f"config: autoencoder.reconstruction is {own.reconstruction!r}; allowed: {', '.join(losses.KINDS)}")
    for name in ("latent", "identity"):
      if self.weights[name] and self.module is not temporal:
        raise ValueError(
          f"config: autoencoder.{name}_weight is {self.weights[name]}, but {own.name!r} has no image autoencoder inside as "
          "Open-Sora 1.2's has: set it to 0"
        )
    for name, count in (("pixel_frames", own.pixel_frames), ("perceptual.frames", own.perceptual.frames)):
      if count < 0:
        raise ValueError(f"config: autoencoder.{name} is {count}; allowed: frames of a clip, or 0 for all")
    if own.pixel_frames and (self.module is not temporal or self.weights["adversarial"]):
      what = "the discriminator looks at whole clips" if self.module is temporal else f"{own.name!r} decodes them together"
      raise ValueError(f"config: autoencoder.pixel_frames is {own.pixel_frames}, but {what}: set it to 0 for all frames")
    if own.image_weights and self.module is not temporal:
      raise ValueError(f"config: autoencoder.image_weights is given, but {own.name!r} has no image autoencoder inside")
    if not any(self.weights[name] for name in WEIGHTS):
      raise ValueError(
        f"config: all weights of the autoencoder's loss are 0; give one of autoencoder.<name>_weight: {', '.join(WEIGHTS)}"
      )
    if limit := self.config.max_tokens_per_device:
      # Micro batches would change the result: each would weigh the adversary by gradients of its own (`_adaptive_weight`).
      raise ValueError(
        f"config: max_tokens_per_device is {limit}, but autoencoders train on pixels, and their batches are not split: set it "
        "to 0; smaller batches in data.buckets and a larger optimizer.accumulate take less memory"
      )
    check_lengths(self.config, self.model.config)
    if self.weights["adversarial"]:
      if own.adaptive and not (self.weights["reconstruction"] or self.weights["perceptual"]):
        raise ValueError(
          "config: autoencoder.adaptive weighs the adversary by the gradients of reconstruction and perceptual distance, whose "
          "weights are 0, so that it would count nothing: give one of these a weight, or set autoencoder.adaptive=False"
        )
      layers = self.discriminator.config.layers
      if own.crop < 2**layers:
        raise ValueError(
          f"config: autoencoder.crop is {own.crop}, of which {layers} layers of the discriminator leave nothing; take at least "
          f"{2**layers}, or fewer autoencoder.discriminator.layers"
        )
    if self.weights["perceptual"]:
      perceptual.shapes(own.perceptual.name)
      if own.crop < perceptual.SMALLEST:
        raise ValueError(
          f"config: autoencoder.crop is {own.crop}; the perceptual distance needs sides of at least {perceptual.SMALLEST}"
        )

  # Batches.

  def batch(self, bucket, rows, token_parts=1):
    """The arrays of one batch as a tree of `ArraySpec`."""
    del token_parts
    crop = self.config.autoencoder.crop
    return {
      "pixels": ArraySpec((rows, bucket[1], crop, crop, 3), jnp.uint8),
      "weight": ArraySpec((rows,)),
      "sample_id": ArraySpec((rows, 2), jnp.uint32),
    }

  def work(self, batch):
    """(tokens, model FLOPs) of a batch: (0, 0), since there is no formula."""
    del batch
    return 0, 0

  def data_config(self, values):
    """`DataConfig` of the group `data`. Raises ValueError."""
    return DataConfig.create(values)

  def open_cache(self, data, table):
    """Raises ValueError: an autoencoder reads no latents."""
    raise ValueError(f"data.latents={data.latents!r} are for denoisers; an autoencoder needs videos")

  def worker(self, cache):
    """None: captions do not matter."""

  def check_plan(self, clips):
    """Raises ValueError if a clip of the first epoch is smaller than the crop: it would end the run where it comes."""
    crop, seen = self.config.autoencoder.crop, DataConfig.create(self.config.data.to_dict()).parsed_buckets()
    numbers, _, ratios = clips.all_slots()
    for number, ratio in np.unique(np.stack([numbers, ratios], 1), axis=0).tolist():
      name = seen[number].resolution
      height, width = list(SIZES[name].values())[ratio]
      if min(height, width) < crop:
        raise ValueError(
          f"autoencoder.crop is {crop}, but there are clips of {height} x {width} pixels in {name}; take at most "
          f"{min(height, width)}, a larger resolution, or leave such files out"
        )

  def batch_maker(self, encoders, name):
    """`(LoadedStep, layout) -> global arrays`."""
    del encoders, name
    return AutoencoderBatches(self.config)

  # Weights.

  def check_files(self):
    """Raises ValueError if a file that a run will read does not exist, or the configuration names weights in vain."""
    own, init = self.config.autoencoder, self.config.init
    if own.weights:
      raise ValueError(
        "config: autoencoder.weights are of one that encodes for a denoiser; to train an autoencoder from a file set init"
      )
    if own.image_weights:
      if init:
        raise ValueError("config: init brings the image autoencoder inside, too; set either it or autoencoder.image_weights")
      need_file(own.image_weights, "autoencoder.image_weights")
    for name in ("latent", "identity"):
      if self.weights[name] and not (init or own.image_weights):
        raise ValueError(
          f"config: autoencoder.{name}_weight compares with latents of the image autoencoder inside, which would be random; "
          "give autoencoder.image_weights, or init"
        )
    if self.weights["perceptual"]:
      self._load_perceptual()  # only to see it: a wrong file must not end the run days later

  def _load_perceptual(self):
    own = self.config.autoencoder.perceptual
    return measures.load_perceptual(own.name, need_file(own.weights, "autoencoder.perceptual.weights"), own.sha256)

  def read_frozen(self, mesh):
    """{name of `from_files`: parameters} from the files that the configuration names, laid over the mesh."""
    if not self.from_files:
      return {}
    trunk = {"perceptual": self._load_perceptual()}
    return jax.device_put(trunk, tree_shardings(trunk, mesh, self.rules))

  def read_initial(self, params, mesh):
    """`params` of `init` with those that files of their own bring."""
    if not (path := self.config.autoencoder.image_weights):
      return params
    image = self.model.config.image_config
    shapes = image_kl.init_shapes(image)
    shardings = tree_shardings({"encoder": shapes}, mesh, self.rules)["encoder"]
    loaded = load_variables(path, IMAGE_LAYOUTS, shapes, config=image, shardings=shardings)
    return {**params, "autoencoder": {**params["autoencoder"], "image": loaded["params"]}}

  def load_checkpoint(self, path, params, frozen, mesh):
    """(params, frozen) with the autoencoder of a checkpoint, whatever shift and scale its latents are to be used with."""
    current = {"params": params["autoencoder"]}
    shardings = tree_shardings(current, mesh, self.rules)
    config = self.model.config
    loaded = load_variables(
      path, autoencoder_layouts(config), current, config=config, strict=self.config.init_strict, numbers=False,
      shardings=shardings,
    )  # fmt: skip
    return {**params, "autoencoder": loaded["params"]}, frozen

  def beside(self, bytes_per_device, mesh):
    """Bytes on one device of encoders that are in neither `params` nor `frozen`: none."""
    del bytes_per_device, mesh
    return 0

  @property
  def decodes(self):
    """Whether a term looks at pixels."""
    return any(self.weights[name] for name in ("reconstruction", "perceptual", "adversarial"))

  def splits(self, num_frames, devices):
    """Whether clips of so many frames can be split in time over so many devices."""
    return self.module is causal3d and causal3d.splits(self.model.config, num_frames, devices)

  def init(self, key):
    """-> (params, frozen) with the original initialisation; the perceptual trunk is zeros until it is read from its file."""
    model_key, discriminator_key = jax.random.split(key)
    params, frozen = {"autoencoder": self.module.init(self.model, model_key)["params"]}, {}
    if self.weights["adversarial"]:
      params["discriminator"] = discriminator.init(self.discriminator, discriminator_key)
    if self.weights["perceptual"]:
      shapes = perceptual.shapes(self.config.autoencoder.perceptual.name)
      frozen["perceptual"] = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return params, frozen

  def loss(self, params, frozen, batch, layout=None):
    """Batch: pixels uint8 `[B, T, crop, crop, 3]`. -> (loss per sample, its terms and further values per sample)."""
    loss, values, made = self._terms(params["autoencoder"], frozen, batch, layout)
    if not self.weights["adversarial"]:
      return loss, values
    still, weight = jax.lax.stop_gradient, self.weights["adversarial"]
    real, fake = image_kl.to_float(batch["pixels"]), made["pixels"]
    if self.config.autoencoder.adaptive:
      weight *= still(self._adaptive_weight(still(params), frozen, batch, still(made), layout))
    judge = functools.partial(self._judge, params["discriminator"], layout=layout)
    values["adversarial"] = discriminator.generator_loss(self._judge(still(params["discriminator"]), fake, layout))
    values["discriminator"] = discriminator.hinge_loss(judge(real), judge(still(fake)))
    return loss + weight * values["adversarial"] + values["discriminator"], values

  def fixed_loss(self, params, frozen, batch, count, layout=None):
    """Loss `[1, B]` without what a discriminator says: there are no timesteps, and crops and noise belong to the sample."""
    return self._terms(params["autoencoder"], frozen, batch, layout)[0][None]

  def fixed_names(self, count):
    return [None]

  def _terms(self, params, frozen, batch, layout):
    """-> (loss per sample without the adversarial term, its terms and more, `made` as `_encode` and `_decode` leave it)."""
    frames, weights = image_kl.to_float(batch["pixels"]), self.weights
    made = self._encode(params, frames, batch, layout)
    kl = losses.kl_divergence(made["mean"], made["logvar"])
    values = {"kl": kl / made["mean"][0].size}
    loss = weights["kl"] * kl / frames[0].size  # as sums over pixels and latents: losses.py
    if self.module is temporal:
      made["again"] = self._apply(params, made["latents"], frames.shape[1], method="decode_latents")
      values["latent"] = losses.reconstruction_error(made["again"], made["image_latents"])
      loss += weights["latent"] * values["latent"]
      if frames.shape[1] == 1:
        values["identity"] = losses.reconstruction_error(made["latents"], made["image_latents"])
        loss += weights["identity"] * values["identity"]
    if self.decodes:
      if self.module is temporal:
        count = self.config.autoencoder.pixel_frames
        made["again"], frames = self._some_frames(count, Purpose.PIXEL_FRAMES, batch, made["again"], frames)
      made["pixels"] = self._decode(params, made, layout)
      of_pixels, more = self._pixel_terms(frozen, made["pixels"], frames, batch, layout)
      loss, values = loss + of_pixels, values | more
    return loss, values, made

  def _pixel_terms(self, frozen, pixels, frames, batch, layout):
    """-> (weighted terms per sample that look at pixels, but for the adversarial one; their values)."""
    own = self.config.autoencoder
    error = losses.reconstruction_error(pixels, frames, own.reconstruction)
    values = {"reconstruction": error, "squared_error": losses.reconstruction_error(pixels, frames, "l2")}
    loss = self.weights["reconstruction"] * error
    if self.weights["perceptual"]:
      # Its network costs more than the autoencoder.
      count = self.config.autoencoder.perceptual.frames
      pixels, frames = self._some_frames(count, Purpose.PERCEPTUAL_FRAMES, batch, pixels, frames)
      values["perceptual"] = self._distance(frozen["perceptual"], layout, pixels, frames).mean(1)
      loss += self.weights["perceptual"] * values["perceptual"]
    return loss, values

  def _some_frames(self, count, purpose, batch, *clips):
    """Of clips `[B, T, ...]` the same `count` frames, drawn for each sample; 0: all."""
    total = clips[0].shape[1]
    if not 0 < count < total:
      return clips
    keys = sample_keys(self.config.seed, batch["sample_id"], purpose)
    numbers = jax.vmap(lambda key: jax.random.choice(key, total, (count,), replace=False))(keys)
    return [jnp.take_along_axis(clip, numbers[:, :, None, None, None], axis=1) for clip in clips]

  def _distance(self, params, layout, *clips):
    """The perceptual distance of every frame of two clips `[B, T, ...]` -> `[B, T]`."""

    def distance(params, *clips):
      of_frames = perceptual.distance(self.config.autoencoder.perceptual.name, params, *map(_frames, clips))
      return of_frames.reshape(clips[0].shape[:2])

    if layout is None or not layout.split_tokens:
      return distance(params, *clips)
    # Every device looks at frames of its own. A constraint could not say so: frames are folded into the batch, and folded, a
    # device's part of several clips is no range of rows. What is padded is cut off again.
    frames = clips[0].shape[1]
    padded = (jnp.pad(clip, ((0, 0), (0, -frames % layout.token_parts), *[(0, 0)] * 3)) for clip in clips)
    spec = layout.spec("batch", "tokens")
    split = jax.shard_map(distance, mesh=layout.mesh, in_specs=(P(), spec, spec), out_specs=spec, check_vma=False)
    return split(params, *padded)[:, :frames]

  def _judge(self, params, clips, layout):
    return self.discriminator.clone(layout=layout).apply({"params": params}, clips)

  def _adaptive_weight(self, params, frozen, batch, made, layout):
    """`discriminator.adaptive_weight` of the batch (VQGAN, equation 7)."""
    path, frames = _LAST_LAYER[self.module], image_kl.to_float(batch["pixels"])
    last = functools.reduce(lambda tree, name: tree[name], path, params["autoencoder"])
    with_last = functools.partial(_replaced, params["autoencoder"], path)
    pixels, pull = jax.vjp(lambda last: self._decode(with_last(last), made, layout), last)
    share = batch["weight"] / jnp.maximum(batch["weight"].sum(), 1e-12)
    terms = (
      lambda x: self._pixel_terms(frozen, x, frames, batch, layout)[0],
      lambda x: discriminator.generator_loss(self._judge(params["discriminator"], x, layout)),
    )
    gradients = [jax.grad(lambda x, term=term: jnp.sum(share * term(x)))(pixels) for term in terms]
    return discriminator.adaptive_weight(*map(pull, gradients))

  # The three kinds of autoencoders.

  def _encode(self, params, frames, batch, layout):
    """-> {"mean", "logvar", "latents": `[B, T', h, w, C]`, drawn from the posterior if the configuration says so}, and
    "image_latents" `[B, T, h, w, C]` of Open-Sora 1.2's image autoencoder, drawn as well."""
    made = {}
    if self.module is image_kl:
      moments = (_clips(m, frames) for m in self._apply(params, _frames(frames), method="encode"))
    elif self.module is temporal:
      noise = self._noise(batch, 1, frames.shape[1])
      made["image_latents"] = self._apply(params, frames, noise, method="image_latents")
      moments = self._apply(params, made["image_latents"], method="encode_latents")
    else:
      moments = self._causal(params, frames, "encode", layout)
    made["mean"], made["logvar"] = moments
    made["latents"], noise = made["mean"], self._noise(batch, 0, made["mean"].shape[1])
    if noise is not None:
      made["latents"] += jnp.exp(0.5 * made["logvar"]) * noise
    return made

  def _decode(self, params, made, layout):
    """-> pixels `[B, T, H, W, 3]`, about [-1, 1]."""
    if self.module is image_kl:
      return _clips(self._apply(params, _frames(made["latents"]), method="decode"), made["latents"])
    if self.module is temporal:
      return self._apply(params, made["again"], method="pixels")
    return self._causal(params, made["latents"], "decode", layout)

  def _causal(self, params, x, method, layout):
    """Whole clips, or split in time over the mesh's `sequence` axis."""
    if layout is None or not layout.split_tokens:
      return self._apply(params, x, method=method)
    run = causal3d.over_devices(self.model, layout.mesh, "sequence", method, layout.axes["batch"])
    return run({"params": params}, x)

  def _apply(self, params, *args, method):
    return self.model.apply({"params": params}, *args, method=method)

  def _noise(self, batch, number, frames):
    """Normal noise `[B, frames, h, w, C]` of the samples' own, for the posterior of the last (0) or of the image (1)
    autoencoder; None where means are taken."""
    if not self.config.autoencoder.sample_posterior:
      return None
    config, keys = self.model.config, sample_keys(self.config.seed, batch["sample_id"], Purpose.POSTERIOR)
    shape = (frames, *config.latent_size(*batch["pixels"].shape[2:4]), config.latent_channels)
    return jax.vmap(lambda key: jax.random.normal(key, shape))(fold_in(keys, number) if number else keys)


def _frames(clips):
  """`[B, T, ...]` -> `[B * T, ...]`."""
  return clips.reshape(-1, *clips.shape[2:])


def _clips(frames, like):
  """`[B * T, ...]` -> `[B, T, ...]` with B and T of `like`."""
  return frames.reshape(*like.shape[:2], *frames.shape[1:])


def _replaced(tree, path, leaf):
  """`tree` with the subtree at `path` replaced."""
  return {**tree, path[0]: _replaced(tree[path[0]], path[1:], leaf)} if path else leaf
