"""A family in one file: joint attention over text and video in one sequence, patches of two latent frames.

Text comes first, so padding is in the middle of the sequence. The null caption is zeros. No such model is published.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from stdit_jax.models.family import Family
from stdit_jax.models.layers import DTYPES, Linear, Mlp, interleaved_sin_cos, layer_norm, modulate, sinusoid
from stdit_jax.models.stack import run_layers, stacked_params
from stdit_jax.parallel.attention import attend
from stdit_jax.parallel.shardings import BLOCK_RULES, Layout, constrain, gather_layer

RULES = (
  *BLOCK_RULES,
  (r"blocks/(out|modulation)/kernel$", P()),
  (r"(patch|caption)_embed/(kernel|bias)$", P()),
  (r"timestep_embed/fc[12]/(kernel|bias)$", P()),
  (r"final/(kernel|bias)$", P()),
)


@dataclasses.dataclass(frozen=True)
class JointConfig:
  """Sizes. The names are those of the other denoisers."""

  hidden_size: int = 48
  depth: int = 2
  num_heads: int = 4
  in_channels: int = 4
  patch_size: tuple[int, int, int] = (2, 2, 2)
  caption_channels: int = 64
  model_max_length: int = 16
  dtype: str = "float32"
  remat: str = "none"
  scan: bool = True

  @property
  def out_channels(self):
    return self.in_channels


class Block(nn.Module):
  """Attention of all tokens to all valid tokens, and an MLP. The timestep modulates both."""

  config: JointConfig
  layout: Layout | None = None

  @nn.compact
  def __call__(self, x, time, mask):
    """x `[B, N, D]`, time `[B, D]`, mask `[B, N]` -> `[B, N, D]`."""
    cfg, layout, dtype = self.config, self.layout, DTYPES[self.config.dtype]
    heads = cfg.num_heads, cfg.hidden_size // cfg.num_heads
    zeros = nn.initializers.zeros
    modulation = Linear((6, cfg.hidden_size), kernel_init=zeros, dtype=dtype, layout=layout, name="modulation")(nn.silu(time))
    shift1, scale1, gate1, shift2, scale2, gate2 = (modulation[:, None, i] for i in range(6))  # [B, 1, D]

    qkv = Linear((3, *heads), dtype=dtype, layout=layout, tensor=2, name="qkv")(modulate(layer_norm(x), shift1, scale1))
    query, key, value = (qkv[:, None, :, i] for i in range(3))  # [B, 1, N, H, d]
    # Tokens are whole inside attention, and heads are split over the devices that split tokens elsewhere.
    y = attend(query, key, value, layout=layout, axes=("batch", None, None, "heads"), mask=mask[:, None])
    y = Linear((cfg.hidden_size,), heads, dtype=dtype, layout=layout, tensor=0, name="out")(y[:, 0])  # [B, N, D]
    x = x + gate1 * y
    mlp = Mlp(4 * cfg.hidden_size, cfg.hidden_size, dtype=dtype, layout=layout, tensor=True, name="mlp")
    return x + gate2 * mlp(modulate(layer_norm(x), shift2, scale2))


class Joint(nn.Module):
  """The denoiser. models/family.py describes its inputs and output."""

  config: JointConfig
  layout: Layout | None = None

  @nn.compact
  def __call__(self, tokens, t, cond, sizes, *, x_mask=None, valid=None):
    cfg, layout, dtype = self.config, self.layout, DTYPES[self.config.dtype]
    assert x_mask is None
    (rows, frames, space, _), length = tokens.shape, cond["text"].shape[1]
    token_valid = jnp.ones((rows, frames, space), bool)
    if valid is not None:
      tokens, token_valid = jnp.where(valid, tokens, 0), valid.any(-1)

    # embed
    video = Linear((cfg.hidden_size,), dtype=dtype, layout=layout, name="patch_embed")(tokens)  # [B, T, S, D]
    video = video + self.positions(sizes["grid"], frames, space).astype(dtype)
    text = Linear((cfg.hidden_size,), dtype=dtype, layout=layout, name="caption_embed")(cond["text"])  # [B, L, D]
    embed = Mlp(cfg.hidden_size, cfg.hidden_size, "silu", dtype=dtype, layout=layout, name="timestep_embed")
    time = embed(sinusoid(t))  # [B, D]
    x = jnp.concatenate([text, video.reshape(rows, frames * space, -1)], axis=1)  # [B, N, D]
    mask = jnp.concatenate([cond["text_mask"].astype(bool), token_valid.reshape(rows, -1)], axis=1)  # [B, N]

    # blocks
    block = Block(cfg, layout, parent=None)
    stacked = stacked_params(self, {"blocks": block}, cfg.depth, x, time, mask)["blocks"]

    def layer(x, params):
      params = gather_layer(params, "blocks", layout, dtype, RULES)
      return constrain(block.apply({"params": params}, x, time, mask), layout, "batch", None, None), None

    x, _ = run_layers(layer, x, stacked, cfg.scan, cfg.remat)  # [B, N, D]

    # final layer
    video = layer_norm(x[:, length:]).reshape(rows, frames, space, -1)  # [B, T, S, D]
    features = (math.prod(cfg.patch_size) * cfg.out_channels,)
    video = Linear(features, kernel_init=nn.initializers.zeros, dtype=dtype, layout=layout, name="final")(video)
    return video.astype(jnp.float32)  # [B, T, S, P_out]

  def positions(self, grid, frames, space):
    """Sinusoids of frame, row and column: `[B, T, S, D]`."""
    third, index = self.config.hidden_size // 3, jnp.arange(space)
    frame = jnp.broadcast_to(jnp.arange(frames)[None, :, None], (len(grid), frames, space))
    row, column = (jnp.broadcast_to(x[:, None], frame.shape) for x in (index // grid[:, 2:], index % grid[:, 2:]))
    return jnp.concatenate([interleaved_sin_cos(x, third) for x in (frame, row, column)], axis=-1)


def cond(config, rows):
  length = rows, config.model_max_length
  return {
    "text": jax.ShapeDtypeStruct((*length, config.caption_channels), DTYPES[config.dtype]),
    "text_mask": jax.ShapeDtypeStruct(length, jnp.bool_),
  }


def null(config, constants, cond):
  """Features of zeros, as in CogVideoX."""
  return {**cond, "text": jnp.zeros_like(cond["text"])}


def flops(config, frames, space):
  tokens, width = config.model_max_length + frames * space, config.hidden_size
  return config.depth * (24 * tokens * width**2 + 4 * tokens**2 * width)


FAMILY = Family(
  name="joint attention",
  sizes={"tiny": JointConfig()},
  build=Joint,
  condition="captions",
  cond=cond,
  null=null,
  rules=RULES,
  flops=flops,
)
