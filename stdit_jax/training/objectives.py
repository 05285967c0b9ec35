"""What is trained: a denoiser (with or without its text encoder), or an autoencoder. One class each, one interface.

An objective gives the shapes and initial values of `params` (trained, averaged, checkpointed) and `frozen` (constants beside
them), and the loss per sample of one batch. Everything random comes from the sample's own key.
"""

import functools

import jax
import jax.numpy as jnp

from stdit_jax import fields
from stdit_jax.diffusion.frame_masks import FrameMasks
from stdit_jax.diffusion.iddpm import IDDPM
from stdit_jax.diffusion.noise import Purpose, element_index, fold_in, sample_keys, token_noise
from stdit_jax.diffusion.rectified_flow import RectifiedFlow
from stdit_jax.models import stdit, t5
from stdit_jax.training.autoencoding import AutoencoderObjective
from stdit_jax.training.state import Objective

DIFFUSIONS = {"rectified-flow": RectifiedFlow, "iddpm": IDDPM}
QUARTERS = ("t 0-25%", "t 25-50%", "t 50-75%", "t 75-100%")  # of the timesteps


def make_diffusion(config):
  """The formulation of `config.diffusion`; ValueError names unknown names and fields."""
  return fields.replace(fields.choose(DIFFUSIONS, config.name, "diffusion.name")(), config.fields, "config: diffusion.fields")


def text_model(config):
  """The T5 encoder of `config.text_encoder`, None when embeddings come from disk."""
  if config.where == "disk":
    return None
  return t5.build(t5.get_config(config.name, **config.fields))


class DenoiserObjective(Objective):
  """Diffusion loss of an STDiT over latents; `params` = denoiser (and text encoder when it trains)."""

  def __init__(self, config):
    self.config = config
    self.model = stdit.build(stdit.get_config(config.model.name, **config.model.fields))
    self.text = text_model(config.text_encoder)
    self.diffusion = make_diffusion(config.diffusion)
    self.frame_masks = FrameMasks.create(config.mask_ratios)
    self._check()

  def _check(self):
    model, text = self.model.config, self.config.text_encoder
    if self.text is not None and self.text.config.d_model != model.caption_channels:
      raise ValueError(
        f"config: text encoder {text.name!r} gives {self.text.config.d_model} features, but the denoiser takes "
        f"caption_channels={model.caption_channels}; set model.fields.caption_channels={self.text.config.d_model}"
      )
    if text.max_length != model.model_max_length:
      raise ValueError(
        f"config: text_encoder.max_length is {text.max_length}, but the denoiser's null caption has "
        f"model_max_length={model.model_max_length}; make them equal"
      )
    if isinstance(model, stdit.STDiT1Config) and any(n != "identity" and p > 0 for n, p in self._ratios()):
      raise ValueError("config: STDiT (1.0) has no frame masks; leave mask_ratios empty")

  def _ratios(self):
    return zip(self.frame_masks.names, self.frame_masks.probabilities)

  def splits(self, num_frames, devices):
    """Whether clips of so many frames can be split over so many devices: tokens are padded until they divide."""
    return True

  def init(self, key):
    """-> (params, frozen) with the original initialisation; jit it with sharded outputs."""
    denoiser_key, text_key = jax.random.split(key)
    variables = stdit.init(self.model.config, denoiser_key)
    params, frozen = {"denoiser": variables["params"]}, {"denoiser": variables["constants"]}
    if self.text is not None and self.config.text_encoder.where == "step":
      text_params = t5.init(self.text.config, text_key)["params"]
      (params if self.config.text_encoder.train else frozen)["text_encoder"] = text_params
    return params, frozen

  def embed_text(self, params, frozen, batch, layout=None):
    """Text features `[B, L, C]`: those of the batch, or those of the encoder in the step."""
    if "text" in batch:
      return batch["text"]
    weights = params.get("text_encoder", frozen.get("text_encoder"))
    return self.text.clone(layout=layout).apply({"params": weights}, batch["text_ids"], batch["text_mask"])

  def loss(self, params, frozen, batch, layout=None):
    """-> (loss per sample `[B]`, further values per sample). `layout`: how activations lie on the mesh."""
    keys = functools.partial(sample_keys, self.config.seed, batch["sample_id"])
    frames = batch["latents_mean"].shape[1]
    t = self.diffusion.sample_timesteps(
      keys(Purpose.TIMESTEP),
      batch["height"], batch["width"], batch["num_frames"], batch["latent_size"][:, 0].astype(jnp.float32),
    )  # fmt: skip
    masked = frames > 1 and any(name != "identity" and p > 0 for name, p in self._ratios())
    frame_mask = self.frame_masks.draw(keys(Purpose.FRAME_MASK), frames) if masked else None
    drop = jax.vmap(jax.random.uniform)(keys(Purpose.DROP_TEXT)) < self.config.caption_dropout
    loss = self._loss_of(params, frozen, batch, layout)(keys(Purpose.NOISE), t, frame_mask, drop)
    return loss, self._by_timestep(loss, t)

  def fixed_loss(self, params, frozen, batch, count, layout=None):
    """Loss `[count, B]` at `count` fixed timesteps, with noise of the sample's own for each; no caption is dropped and no
    frame masked."""
    loss_of = self._loss_of(params, frozen, batch, layout)
    keys = sample_keys(self.config.seed, batch["sample_id"], Purpose.NOISE)

    def at(number_and_t):
      number, t = number_and_t
      return loss_of(fold_in(keys, number), jnp.full(keys.shape, t), None, jnp.zeros(keys.shape, bool))

    return jax.lax.map(at, (jnp.arange(count), jnp.asarray(self.diffusion.fixed_timesteps(count))))

  def fixed_names(self, count):
    """What the rows of `fixed_loss` count for: the quarter of the timesteps."""
    return [QUARTERS[min(3, int(4 * t / self.diffusion.num_timesteps))] for t in self.diffusion.fixed_timesteps(count)]

  def _loss_of(self, params, frozen, batch, layout):
    """-> `(noise keys [B], t [B], frame mask [B, T] or None, drop_text [B]) -> loss [B]` of these latents and captions."""
    model, size, grid = self.model.config, batch["latent_size"], batch["grid"]
    shape = batch["latents_mean"].shape[1:]
    _, valid = element_index(size, grid, shape, model.patch_size)

    def noise(keys):
      return token_noise(keys, size, shape, grid, model.patch_size, model.in_channels)

    x0 = batch["latents_mean"]
    if "latents_std" in batch:
      x0 = x0 + batch["latents_std"] * noise(sample_keys(self.config.seed, batch["sample_id"], Purpose.POSTERIOR))
    text = self.embed_text(params, frozen, batch, layout)
    denoiser = self.model.clone(layout=layout)

    def loss_of(keys, t, frame_mask, drop):
      def denoise(x, t, x_mask):
        return denoiser.apply(
          {"params": params["denoiser"], "constants": frozen["denoiser"]},
          x, t, text, batch["text_mask"], grid=grid, x_mask=x_mask, valid=valid, drop_text=drop,
          **{name: batch[name] for name in ("height", "width", "num_frames", "fps")},
        )  # fmt: skip

      return self.diffusion.loss(
        denoise, x0, noise(keys), t, num_channels=model.in_channels, frame_mask=frame_mask, valid=valid
      )

    return loss_of

  def _by_timestep(self, loss, t):
    """The loss in each quarter of the timesteps, 0 elsewhere, and where it counts (`metrics.Averages`)."""
    quarter = jnp.clip(jnp.floor(4 * t.astype(jnp.float32) / self.diffusion.num_timesteps), 0, 3)
    values = {}
    for q, name in enumerate(f"loss/{name}" for name in QUARTERS):
      values |= {name: jnp.where(quarter == q, loss, 0.0), f"{name}/share": (quarter == q).astype(jnp.float32)}
    return values


OBJECTIVES = {"denoiser": DenoiserObjective, "autoencoder": AutoencoderObjective}
