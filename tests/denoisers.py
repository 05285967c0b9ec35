"""Builds denoisers from a configuration alone, and calls them on latents of one size."""

import jax.numpy as jnp

from data.tokens import patchify, unpatchify
from stdit_jax.conditioning import replace_rows
from stdit_jax.models.family import families, find_model, token_grid
from stdit_jax.models.stdit1 import STDiT1Config
from stdit_jax.models.stdit2 import STDiT2Config
from stdit_jax.models.stdit3 import STDiT3Config

__all__ = ["STDiT1Config", "STDiT2Config", "STDiT3Config"]


def get_config(name, **fields):
  return find_model(name, fields)[1]


def family_of(config):
  return next(family for family in families() if type(next(iter(family.sizes.values()))) is type(config))


def build(config, layout=None):
  return family_of(config).build(config, layout)


def init(config, key):
  return family_of(config).init(config, key)


def init_shapes(config):
  return family_of(config).init_shapes(config)


def example_inputs(config, batch=1, frames=1, size=(2, 2)):
  """(tokens, t, cond, sizes) of a call on latents of this size. Every text token is valid."""
  tokens, t, cond, sizes = family_of(config).example(config, batch, frames)
  tokens = patchify(jnp.zeros((batch, frames, *size, config.in_channels)), config.patch_size)
  sizes["grid"] = jnp.tile(jnp.asarray(token_grid(config, (frames, *size)), jnp.int32), (batch, 1))
  return tokens, t, {**cond, "text_mask": jnp.ones_like(cond["text_mask"])}, sizes


def drop_text(config, variables, cond, drop):
  """`cond` with the null caption in the rows where `drop` is True."""
  return replace_rows(cond, family_of(config).null(config, variables["constants"], cond), jnp.asarray(drop))


def denoise_latents(model, variables, latents, t, text, text_mask=None, *, x_mask=None, drop=None, **sizes):
  """Calls the model on latents `[B, T, H, W, C]` of one size. Pads them to the patch as the original, and crops the output.

  Repeats numbers and masks that have fewer rows than the batch, as the originals do for classifier-free guidance. The
  conditional and the null half then share their text mask, so the null caption has the prompt's length.
  Returns float32 `[B, T, H, W, out_channels]`.
  """
  config, batch, size = model.config, latents.shape[0], latents.shape[1:4]

  def repeat(value):
    if value is None:
      return None
    value = jnp.asarray(value)
    return jnp.tile(value, (batch // value.shape[0],) + (1,) * (value.ndim - 1))

  sizes = {name: repeat(value) for name, value in sizes.items()}
  sizes["grid"] = jnp.tile(jnp.asarray(token_grid(config, size), jnp.int32), (batch, 1))
  cond = {"text": jnp.asarray(text), "text_mask": repeat(text_mask)}
  if drop is not None:
    cond = drop_text(config, variables, cond, drop)
  tokens = patchify(latents, config.patch_size)
  out = model.apply(variables, tokens, repeat(t), cond, sizes, x_mask=repeat(x_mask))
  return unpatchify(out, size, config.patch_size)
