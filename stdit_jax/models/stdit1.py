"""STDiT of Open-Sora 1.0 (tag v1.0.0, `stdit.py`): fixed sizes, additive positions, text by cross attention."""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from stdit_jax.models import stdit_common as common
from stdit_jax.models import step_cache
from stdit_jax.models.family import Family, Supports
from stdit_jax.models.layers import (
  DTYPES,
  OVER_SPACE,
  OVER_TIME,
  CrossAttention,
  SelfAttention,
  interleaved_sin_cos,
  layer_norm,
  modulate,
)
from stdit_jax.models.stack import run_blocks
from stdit_jax.models.step_cache import Reuse
from stdit_jax.models.types import Cond, Features, FrameMask, PerSample, Sizes, Tokens, Valid
from stdit_jax.parallel.shardings import Layout, constrain

KINDS = {"blocks": {"space": OVER_SPACE, "time": OVER_TIME, "cross": OVER_TIME}}


@dataclasses.dataclass(frozen=True)
class STDiT1Config(common.STDiTConfig):
  """Open-Sora 1.0.

  Attributes:
    input_size: (T, H, W) of the latents, which only the fixed position tables of a written checkpoint need.
    space_scale: 0.5 for 256 pixels, 1.0 for 512.
  """

  model_max_length: int = 120
  qk_norm: bool = False
  input_size: tuple[int, int, int] = (16, 32, 32)
  space_scale: float = 0.5
  time_scale: float = 1.0


class Conditions(NamedTuple):
  """What every block sees beside the tokens."""

  text: jax.Array  # [B, L, D]
  text_mask: jax.Array | None  # [B, L]
  token_valid: jax.Array | None  # [B, T, S]
  modulation: jax.Array  # [B, 6D]
  time_embedding: jax.Array  # [T, D]


class Block(nn.Module):
  """Attention over space, over time, to the text, then the MLP; one modulation table, no norms in attention."""

  config: STDiT1Config
  layout: Layout | None = None

  @nn.compact
  def __call__(self, x: Features, c: Conditions, number, call=step_cache.compute) -> Features:
    """x `[B, T, S, D]`, Conditions, number of the layer -> `[B, T, S, D]`; `call` calls the attentions."""
    cfg, dtype, layout = self.config, DTYPES[self.config.dtype], self.layout
    attention = functools.partial(SelfAttention, cfg.num_heads, implementation=cfg.attention, dtype=dtype, layout=layout)
    cross = CrossAttention(cfg.num_heads, common.zeros, cfg.attention, dtype, layout, OVER_TIME, name="cross_attention")
    x = constrain(x, layout, *OVER_SPACE)
    table = common.modulation_table(self, "modulation", 6, cfg.hidden_size)
    shift1, scale1, gate1, shift2, scale2, gate2 = common.modulation_rows(table, c.modulation)

    spatial = attention("space", name="attention")
    x = x + gate1 * call("space", spatial, modulate(layer_norm(x), shift1, scale1), c.token_valid)
    # as Open-Sora 1.0: the temporal branch is neither normalised nor modulated, reuses the spatial gate, and sees the
    # temporal position table in the first block only, outside the residual stream.
    x = constrain(x, layout, *OVER_TIME)
    positioned = x + jnp.where(number == 0, c.time_embedding, 0).astype(x.dtype)[:, None]
    temporal = attention("time", out_init=common.zeros, name="temporal_attention")
    x = x + gate1 * call("time", temporal, positioned, c.token_valid)
    x = x + call("cross", cross, x, c.text, c.text_mask)
    mlp = common.block_mlp(cfg, layout, OVER_TIME)
    return x + gate2 * mlp(modulate(layer_norm(x), shift2, scale2))


class STDiT1(nn.Module):
  """The denoiser; inputs and output as models/family.py says."""

  config: STDiT1Config
  layout: Layout | None = None

  @nn.compact
  def __call__(
    self, tokens: Tokens, t: PerSample, cond: Cond, sizes: Sizes, *,
    x_mask: FrameMask | None = None, valid: Valid | None = None, reuse: Reuse | None = None,
  ):  # fmt: skip
    cfg, layout, dtype = self.config, self.layout, DTYPES[self.config.dtype]
    if x_mask is not None:
      raise ValueError("STDiT (1.0) has no frame masks: x_mask must be None; STDiT2 and STDiT3 have them")
    frames = tokens.shape[1]
    tokens, token_valid, _ = common.pad_frames(layout, tokens, valid, None)  # [B, T, S, P]

    # embed
    scale = jnp.full((len(tokens),), cfg.space_scale, jnp.float32)
    row, column = common.spatial_positions(sizes["grid"], tokens.shape[2], scale, base=False)  # [B, S]
    x = common.embed_patches(cfg, layout, tokens)  # [B, T, S, D]
    x = x + common.embed_positions(cfg, row, column).astype(dtype)[:, None]  # [B, 1, S, D]
    self.sow("intermediates", "tokens_in", x)
    embed_t = common.scalar_embedder(cfg, layout, "timestep_embed", None, common.small, common.small)
    noised = embed_t(t)  # [B, D]
    common.null_caption(self)  # creates the constant of dropped captions, which only `Family.null` reads
    (modulation,) = common.modulation_vectors(cfg, layout, "timestep_modulation", 6, [noised], common.small)  # [B, 6D]
    text = common.embed_caption(cfg, layout, cond["text"], common.small)  # [B, L, D]
    time_embedding = interleaved_sin_cos(  # [T, D]
      jnp.arange(tokens.shape[1], dtype=jnp.float32) / cfg.time_scale, cfg.hidden_size
    )
    conditions = Conditions(text, cond["text_mask"], token_valid, modulation, time_embedding)

    blocks = {"blocks": Block(cfg, layout, parent=None)}
    x, cached = run_blocks(self, blocks, common.RULES, constrain(x, layout, *OVER_TIME), conditions, reuse)  # [B, T, S, D]

    x = common.FinalLayer(cfg, layout, common.zeros, name="final_layer")(x, noised, None, None)  # [B, T, S, P_out]
    return common.finish(self, x, frames, cached, reuse)

  def cache_specs(self, cache, batch, frames, space):
    """What calls on `[batch, frames, space]` tokens keep for each other (`step_cache.cache_specs`)."""
    return common.cache_specs(self, KINDS, cache, batch, frames, space)


FAMILY = Family(
  name="STDiT (Open-Sora 1.0)",
  sizes={
    "STDiT-XL/2": STDiT1Config(),
    "STDiT-tiny/2": STDiT1Config(
      hidden_size=72, depth=2, num_heads=4, caption_channels=64, model_max_length=12, input_size=(4, 8, 8)
    ),
  },
  build=STDiT1,
  condition="captions",
  cond=common.cond,
  null=common.null,
  rules=common.RULES,
  flops=lambda config, frames, space: common.forward_flops(config, frames, space, [(space, frames)]),
  layouts=("open-sora", "native"),
  resizable=("null_caption",),
  supports=Supports(step_cache=True),
)
