"""STDiT-2 of Open-Sora 1.1 (tag v1.1.0, `stdit2.py`): any size, rotary embedding in time, frame masks.

It is conditioned on size, aspect ratio, number of frames and frame rate.
"""

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
  layer_norm,
  modulate,
  rope_frequencies,
)
from stdit_jax.models.stack import run_blocks
from stdit_jax.models.step_cache import Reuse
from stdit_jax.models.types import Cond, Features, FrameMask, PerSample, Sizes, Tokens, Valid
from stdit_jax.parallel.shardings import Layout, constrain

KINDS = {"blocks": {"space": OVER_SPACE, "time": OVER_TIME, "cross": OVER_TIME}}


@dataclasses.dataclass(frozen=True)
class STDiT2Config(common.STDiTConfig):
  """Open-Sora 1.1.

  Attributes:
    qk_norm_legacy: rotate, then norm, as 1.1 trained it; False is STDiT-2 as built by 1.2's code.
    fps_condition: False leaves out the embedding of the frame rate, as 1.1 began.
  """

  model_max_length: int = 200
  qk_norm_legacy: bool = True
  fps_condition: bool = True

  def __post_init__(self):
    super().__post_init__()
    if self.hidden_size % 3:
      raise ValueError(f"STDiT2Config: hidden_size {self.hidden_size} does not divide by 3 (size and aspect embedders)")


class Conditions(NamedTuple):
  """What every block sees beside the tokens; `clean` is of timestep 0, None without x_mask."""

  text: jax.Array  # [B, L, D]
  text_mask: jax.Array | None  # [B, L]
  token_valid: jax.Array | None  # [B, T, S]
  x_mask: jax.Array | None  # [B, T]
  noised: jax.Array  # [B, 6D]
  clean: jax.Array | None  # [B, 6D]
  noised_temporal: jax.Array  # [B, 3D]
  clean_temporal: jax.Array | None  # [B, 3D]
  rope: jax.Array  # [head_dim / 2]


class Block(nn.Module):
  """Spatial and temporal attention with a modulation each, cross attention, MLP."""

  config: STDiT2Config
  layout: Layout | None = None

  @nn.compact
  def __call__(self, x: Features, c: Conditions, number, call=step_cache.compute) -> Features:
    """x `[B, T, S, D]`, Conditions, number of the layer -> `[B, T, S, D]`; `call` calls the attentions."""
    cfg, dtype, layout = self.config, DTYPES[self.config.dtype], self.layout
    attention = functools.partial(
      SelfAttention, cfg.num_heads, qk_norm=cfg.qk_norm, implementation=cfg.attention, dtype=dtype, layout=layout
    )
    cross = CrossAttention(cfg.num_heads, common.zeros, cfg.attention, dtype, layout, OVER_TIME, name="cross_attention")
    table = common.modulation_table(self, "modulation", 6, cfg.hidden_size)
    shift1, scale1, gate1, shift2, scale2, gate2 = common.modulation_rows(table, c.noised, c.clean, c.x_mask)
    table = common.modulation_table(self, "temporal_modulation", 3, cfg.hidden_size)
    shift_t, scale_t, gate_t = common.modulation_rows(table, c.noised_temporal, c.clean_temporal, c.x_mask)

    x = constrain(x, layout, *OVER_SPACE)
    spatial = attention("space", name="attention")
    x = x + gate1 * call("space", spatial, modulate(layer_norm(x), shift1, scale1), c.token_valid)
    x = constrain(x, layout, *OVER_TIME)
    temporal = attention("time", rope_first=cfg.qk_norm_legacy, out_init=common.zeros, name="temporal_attention")
    x = x + gate_t * call("time", temporal, modulate(layer_norm(x), shift_t, scale_t), c.token_valid, c.rope)
    x = x + call("cross", cross, x, c.text, c.text_mask)
    mlp = common.block_mlp(cfg, layout, OVER_TIME)
    return x + gate2 * mlp(modulate(layer_norm(x), shift2, scale2))


class STDiT2(nn.Module):
  """The denoiser; inputs and output as models/family.py says.

  `sizes` may have `aspect_ratio` `[B]`, by default height / width (1.1 trained with width / height).
  """

  config: STDiT2Config
  layout: Layout | None = None

  @nn.compact
  def __call__(
    self, tokens: Tokens, t: PerSample, cond: Cond, sizes: Sizes, *,
    x_mask: FrameMask | None = None, valid: Valid | None = None, reuse: Reuse | None = None,
  ):  # fmt: skip
    cfg, layout, dtype = self.config, self.layout, DTYPES[self.config.dtype]
    frames = tokens.shape[1]
    tokens, token_valid, x_mask = common.pad_frames(layout, tokens, valid, x_mask)  # [B, T, S, P]

    # embed
    positions = common.scaled_positions(cfg, sizes, tokens.shape[2])  # [B, S, D]
    self.sow("intermediates", "pos_emb", positions)
    x = common.embed_patches(cfg, layout, tokens)  # [B, T, S, D]
    x = x + positions.astype(dtype)[:, None]
    self.sow("intermediates", "tokens_in", x)
    size, length = self.embed_sizes(sizes)  # [B, D] each
    embed_t = common.scalar_embedder(cfg, layout, "timestep_embed", None, common.small, common.small)
    noised = embed_t(t)  # [B, D]
    clean = None if x_mask is None else embed_t(jnp.zeros_like(t))
    common.null_caption(self)  # creates the constant of dropped captions, which only `Family.null` reads

    def modulation(name, rows, added):  # [B, rows * D] of noised and of clean frames
      embeddings = [e if e is None else e + added for e in (noised, clean)]
      return common.modulation_vectors(cfg, layout, name, rows, embeddings, common.small)

    conditions = Conditions(
      common.embed_caption(cfg, layout, cond["text"], common.small), cond["text_mask"], token_valid, x_mask,
      *modulation("timestep_modulation", 6, size), *modulation("temporal_modulation", 3, length),
      self.variable("constants", "rope_frequencies", rope_frequencies, cfg.head_dim).value,
    )  # fmt: skip

    blocks = {"blocks": Block(cfg, layout, parent=None)}
    x, cached = run_blocks(self, blocks, common.RULES, constrain(x, layout, *OVER_TIME), conditions, reuse)  # [B, T, S, D]

    # as Open-Sora 1.1: in the final layer noised frames see the plain timestep, clean frames timestep 0 plus the size.
    clean = None if clean is None else clean + size
    x = common.FinalLayer(cfg, layout, common.zeros, name="final_layer")(x, noised, clean, x_mask)  # [B, T, S, P_out]
    return common.finish(self, x, frames, cached, reuse)

  def embed_sizes(self, sizes):
    """-> embeddings `[B, D]`: of height, width and aspect ratio for the spatial branch, of frames and fps for the temporal."""
    cfg, layout = self.config, self.layout
    height, width, third = sizes["height"], sizes["width"], cfg.hidden_size // 3
    aspect_ratio = sizes.get("aspect_ratio", height / width)
    embed_size = common.scalar_embedder(cfg, layout, "size_embed", third)
    embed_aspect = common.scalar_embedder(cfg, layout, "aspect_embed", third)
    size = jnp.concatenate([embed_size(height), embed_size(width), embed_aspect(aspect_ratio)], axis=-1)
    length = common.scalar_embedder(cfg, layout, "frames_embed")(sizes["num_frames"])
    if cfg.fps_condition:
      length = length + common.scalar_embedder(cfg, layout, "fps_embed")(sizes["fps"])
    return size, length

  def cache_specs(self, cache, batch, frames, space):
    """What calls on `[batch, frames, space]` tokens keep for each other (`step_cache.cache_specs`)."""
    return common.cache_specs(self, KINDS, cache, batch, frames, space)


FAMILY = Family(
  name="STDiT-2 (Open-Sora 1.1)",
  sizes={
    "STDiT2-XL/2": STDiT2Config(),
    "STDiT2-tiny/2": STDiT2Config(hidden_size=96, depth=2, num_heads=4, caption_channels=64, model_max_length=12),
  },
  build=STDiT2,
  condition="captions",
  cond=common.cond,
  null=common.null,
  rules=common.RULES,
  flops=lambda config, frames, space: common.forward_flops(config, frames, space, [(space, frames)]),
  layouts=("open-sora", "native"),
  resizable=("null_caption",),
  supports=Supports(frame_masks=True, step_cache=True),
)
