"""The objective of denoisers: the diffusion loss over latents, with its batches and weights."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from data import latents, paths, plan, sources
from data.config import DataConfig
from stdit_jax.autoencoders.family import encoder_only
from stdit_jax.autoencoders.registry import autoencoder_model, check_lengths, family_of
from stdit_jax.components import REPLICATED, Components, load_denoiser, load_text_encoder, need_file
from stdit_jax.conditioning import replace_rows
from stdit_jax.config import Autoencoder, Config, TextEncoder
from stdit_jax.diffusion.frame_masks import FrameMasks
from stdit_jax.diffusion.noise import Purpose, element_index, fold_in, sample_keys, token_noise
from stdit_jax.models import flops, t5
from stdit_jax.parallel.shardings import Layout, Tree
from stdit_jax.training.batches import BatchMaker, Encoders, denoiser_batches
from stdit_jax.training.state import init_shapes

QUARTERS = ("t 0-25%", "t 25-50%", "t 50-75%", "t 75-100%")  # of the timesteps


class DenoiserObjective:
  """Trains a denoiser, with or without its text encoder. training/objectives.py lists the methods."""

  part = "denoiser"
  counts_flops = True
  shapes = functools.cached_property(init_shapes)

  def __init__(self, config: Config):
    self.config = config
    self.components = Components.of(config)
    self.model, self.diffusion = self.components.model, self.components.diffusion
    self.init, self.batch = self.components.init, self.components.batch  # components.py describes both
    family, self.frame_masks = self.components.family, FrameMasks.create(dict(config.mask_ratios))
    self.masked = any(n != "identity" and p > 0 for n, p in zip(self.frame_masks.names, self.frame_masks.probabilities))
    if self.masked and not family.supports.frame_masks:
      raise ValueError(f"config: {family.name} has no frame masks; leave mask_ratios empty")
    self.rules, self.from_files = self.components.rules, self.components.conditioner.from_files
    self.resizable = tuple(f"/{name}" for name in (*(f"{stack}/" for stack in family.stacks), *family.resizable))

  # The loss.

  def loss(self, params: Tree, frozen: Tree, batch: Tree, layout: Layout | None = None) -> tuple[jax.Array, Tree]:
    """-> (loss per sample `[B]`, further values per sample). `layout`: of activations on the mesh."""
    keys = functools.partial(sample_keys, self.config.seed, batch["sample_id"])
    frames, sizes = batch["latents_mean"].shape[1], batch["sizes"]
    t = self.diffusion.sample_timesteps(
      keys(Purpose.TIMESTEP),
      sizes["height"], sizes["width"], sizes["num_frames"], batch["latent_size"][:, 0].astype(jnp.float32),
    )  # fmt: skip
    frame_mask = self.frame_masks.draw(keys(Purpose.FRAME_MASK), frames) if self.masked and frames > 1 else None
    drop = jax.vmap(jax.random.uniform)(keys(Purpose.DROP_TEXT)) < self.config.caption_dropout
    loss = self._loss_of(params, frozen, batch, layout, drop)(keys(Purpose.NOISE), t, frame_mask)
    return loss, self._by_timestep(loss, t)

  def fixed_loss(self, params: Tree, frozen: Tree, batch: Tree, count: int, layout: Layout | None = None) -> jax.Array:
    """Loss `[count, B]` at `count` fixed timesteps. Each sample has its own noise at each timestep.

    The loss drops no caption and masks no frame.
    """
    loss_of = self._loss_of(params, frozen, batch, layout)
    keys = sample_keys(self.config.seed, batch["sample_id"], Purpose.NOISE)

    def at(number_and_t):
      number, t = number_and_t
      return loss_of(fold_in(keys, number), jnp.full(keys.shape, t), None)

    return jax.lax.map(at, (jnp.arange(count), jnp.asarray(self.diffusion.fixed_timesteps(count))))

  def fixed_names(self, count: int) -> Sequence[str | None]:
    """For each row of `fixed_loss`, the name in QUARTERS of its timestep."""
    return [QUARTERS[min(3, int(4 * t / self.diffusion.num_timesteps))] for t in self.diffusion.fixed_timesteps(count)]

  def _loss_of(self, params, frozen, batch, layout, drop=None):
    """Returns a function `(noise keys [B], t [B], frame mask [B, T] or None) -> loss [B]` for this batch.

    `drop` `[B]`: samples that get the unconditional branch; None: no sample.
    """
    config, size, sizes = self.model.config, batch["latent_size"], batch["sizes"]
    shape = batch["latents_mean"].shape[1:]  # (T, S, P)
    _, valid = element_index(size, sizes["grid"], shape, config.patch_size)

    def noise(keys):
      return token_noise(keys, size, shape, sizes["grid"], config.patch_size, config.in_channels)

    x0 = batch["latents_mean"]  # [B, T, S, P]
    if "latents_std" in batch:
      x0 = x0 + batch["latents_std"] * noise(sample_keys(self.config.seed, batch["sample_id"], Purpose.POSTERIOR))
    variables, encoder = self.components.weights(params, frozen)
    cond = self.components.conditioner.encode(encoder, batch["cond"], layout)
    if drop is not None:
      cond = replace_rows(cond, self.components.family.null(config, variables.get("constants", {}), cond), drop)
    denoiser = self.model.clone(layout=layout)

    def loss_of(keys, t, frame_mask):
      def denoise(x, t, x_mask):
        return denoiser.apply(variables, x, t, cond, sizes, x_mask=x_mask, valid=valid)

      return self.diffusion.loss(
        denoise, x0, noise(keys), t, num_channels=config.in_channels, frame_mask=frame_mask, valid=valid
      )

    return loss_of

  def _by_timestep(self, loss, t):
    """{"loss/QUARTER": loss of the samples in the quarter, else 0; "loss/QUARTER/share": 1 for these samples, else 0}."""
    quarter = jnp.clip(jnp.floor(4 * t.astype(jnp.float32) / self.diffusion.num_timesteps), 0, 3)
    values = {}
    for q, name in enumerate(f"loss/{name}" for name in QUARTERS):
      values |= {name: jnp.where(quarter == q, loss, 0.0), f"{name}/share": (quarter == q).astype(jnp.float32)}
    return values

  # Batches.

  def work(self, batch: Tree) -> tuple[int, float]:
    """(tokens, model FLOPs) of training on one global batch of `ArraySpec`s.

    The tokens include padding, which is 1 to 7 % of them. The FLOPs are three forward passes of the denoiser, without encoders
    and recomputation.
    """
    rows, frames, space, _ = batch["latents_mean"].shape
    return rows * frames * space, rows * flops.TRAINING * self.components.family.flops(self.model.config, frames, space)

  def splits(self, num_frames: int, devices: int) -> bool:
    """True: padding makes the tokens of any clip divisible by the devices."""
    return True

  def data_config(self, config: DataConfig) -> DataConfig:
    """`config` with the labels that the conditioner needs."""
    if (classes := self.components.conditioner.num_classes) is not None:
      config = dataclasses.replace(config, num_classes=classes, captions="optional")
    return config

  def open_cache(self, data: DataConfig, table: sources.Table) -> latents.Cache:
    """The cache that replaces videos. Raises ValueError with the differences if it has another provenance than the stage."""
    wanted = {**latents.made_from_clips(data, table), "autoencoder": autoencoder_identity(self.config.autoencoder)}
    if self.config.autoencoder.sample_posterior:
      wanted["log_variance"] = True
    found, text = latents.find(data.latents, "latents", wanted), None
    if self.components.conditioner.is_cached(data.latents):
      wanted = {**latents.made_from_captions(data, table), "text_encoder": text_identity(self.config.text_encoder)}
      text = latents.find(data.latents, "text", wanted)
    return latents.Cache(found, text, table, data)

  def worker(self, cache: latents.Cache | None) -> Callable | None:
    """The function with which the loader's workers tokenize captions or read labels, or None."""
    return self.components.conditioner.worker(cached=bool(cache and cache.text))

  def check_plan(self, clips: plan.Plan) -> None:
    """Accepts clips of every size."""

  def batch_maker(self, encoders: Encoders, name: str) -> BatchMaker:
    """Makes the batches of the stage `name`. Loads the encoders of these batches."""
    clips = encoders.clips(self.config.autoencoder, name) if self.encodes_clips else None
    text = encoders.text(self.components.conditioner, name) if self.encodes_ahead else None
    return denoiser_batches(self.components, clips, text)

  # A cache has no rows of the validation, so validation needs the encoders.

  @property
  def encodes_clips(self) -> bool:
    """Whether the run encodes clips of videos."""
    return bool(self.config.validation.every) or not self.config.data.latents

  @property
  def encodes_ahead(self) -> bool:
    """Whether a separate program encodes captions before the step."""
    conditioner, folder = self.components.conditioner, self.config.data.latents
    return conditioner.ahead and (bool(self.config.validation.every) or not conditioner.is_cached(folder))

  # Weights.

  def check_files(self) -> None:
    """Raises ValueError if a file that the run will read does not exist, or if a bucket does not suit the autoencoder."""
    config = self.config
    check_lengths(config, self.components.autoencoder.config)
    if self.encodes_clips:
      need_file(config.autoencoder.weights, "autoencoder.weights")
    if self.encodes_ahead or self.from_files:
      need_file(config.text_encoder.weights, "text_encoder.weights")

  def read_frozen(self, mesh: Mesh) -> Tree:
    """{name of `from_files`: parameters} from the files of the configuration, sharded over the mesh."""
    return {name: self._load_encoder(mesh) for name in self.from_files}

  def read_initial(self, params: Tree, mesh: Mesh) -> Tree:
    """`params` of `init`, with the text encoder from its own file."""
    if "text_encoder" in params and self.config.text_encoder.weights:
      return {**params, "text_encoder": self._load_encoder(mesh)}
    return params

  def _load_encoder(self, mesh):
    return load_text_encoder(self.config.text_encoder, self.components.conditioner.encoder, mesh)

  def load_checkpoint(self, path: str, params: Tree, frozen: Tree, mesh: Mesh) -> tuple[Tree, Tree]:
    """(params, frozen) with the denoiser from a checkpoint in a layout of its family."""
    constants = {"constants": frozen["denoiser"]} if "denoiser" in frozen else {}
    current = {"params": params["denoiser"], **constants}
    loaded = load_denoiser(self.components, path, mesh, current=current, strict=self.config.init_strict)
    frozen = frozen | ({"denoiser": loaded["constants"]} if constants else {})
    return {**params, "denoiser": loaded["params"]}, frozen

  @property
  def encoders(self) -> Sequence[tuple[Tree, Sequence]]:
    """(shapes, sharding rules) of each encoder that lies on the devices and is in neither `params` nor `frozen`.

    Also of the encoded prompts of samples, which every device holds at most once.
    """
    clips = [(encoder_only(self._autoencoder_shapes), REPLICATED)] if self.encodes_clips else []
    text = [self._text_encoder] if self.encodes_ahead else []
    count = len(self.config.sample.prompts) if self.config.sample_every else 0
    return [*clips, *text, (self.components.family.cond(self.model.config, count), REPLICATED)]

  @property
  def sample_weights(self) -> Sequence[tuple[Tree, Sequence]]:
    """(shapes, sharding rules) of the weights that lie on the devices only during a sample (run_samples.py), one after another.

    These are the whole autoencoder, and the text encoder before the step if the training does not hold it.
    """
    if not self.config.sample_every:
      return []
    text = [self._text_encoder] if self.components.conditioner.ahead and not self.encodes_ahead else []
    return [*text, (self._autoencoder_shapes, REPLICATED)]

  @property
  def _autoencoder_shapes(self):
    autoencoder = self.components.autoencoder.config
    return family_of(autoencoder).init_shapes(autoencoder)

  @property
  def _text_encoder(self):
    return t5.init_shapes(self.components.conditioner.encoder.config), t5.RULES


def autoencoder_identity(config: Autoencoder) -> dict[str, Any]:
  """The values of the group `autoencoder` that decide the latents of pixels: the provenance of cached latents."""
  fields = dataclasses.asdict(autoencoder_model(config).config)
  del fields["remat"]
  return {"name": config.name, "dtype": config.dtype, "fields": fields, **_fingerprint(config.weights)}


def text_identity(config: TextEncoder) -> dict[str, Any]:
  """The values of the group `text_encoder` that decide the features of captions."""
  fields = dataclasses.asdict(t5.get_config(config.name, **config.fields))
  fields = {name: value for name, value in fields.items() if name not in ("scan", "remat")}
  tokenizer = paths.fingerprint(config.tokenizer) if paths.is_folder(config.tokenizer) else config.tokenizer
  own = {name: getattr(config, name) for name in ("name", "max_length", "clean_captions")}
  return {**own, "tokenizer": tokenizer, "fields": fields, **_fingerprint(config.weights)}


def _fingerprint(path):
  """{"weights": fingerprint of the file}, or {} without a file. A training from a cache does not need the file."""
  return {"weights": paths.fingerprint(path)} if path and paths.exists(path) else {}
