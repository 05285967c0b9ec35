"""STDiT-3 of Open-Sora 1.2 (tag v1.2.0, `stdit3.py`): spatial and temporal blocks in turn, conditioned on the frame rate."""

import dataclasses
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
  rope_frequencies,
  torch_uniform,
)
from stdit_jax.models.stack import run_blocks
from stdit_jax.models.step_cache import Reuse
from stdit_jax.models.types import Cond, Features, FrameMask, PerSample, Sizes, Tokens, Valid
from stdit_jax.parallel.shardings import Layout, constrain

# {name of the parameters: {kind of attention: how its output lies on a mesh}}
KINDS = {
  "spatial_blocks": {"space": OVER_SPACE, "cross": OVER_SPACE},
  "temporal_blocks": {"time": OVER_TIME, "cross": OVER_TIME},
}


@dataclasses.dataclass(frozen=True)
class STDiT3Config(common.STDiTConfig):
  """Open-Sora 1.2, whose adaptation began as PixArt.

  Attributes:
    fps_condition: False leaves out the embedding of the frame rate, as the adaptation began.
    temporal_blocks: False leaves out attention over time: frames of a clip then know nothing of each other.
    frame_positions: adds a sinusoid of the frame's number to the tokens, as Open-Sora 1.0's blocks do. The original has none.
      Rotary positions tell how far frames are apart, not which one is the first, so that from noise alone no frame can know
      whether something that moves to the right is still left or already right.
  """

  fps_condition: bool = True
  temporal_blocks: bool = True
  frame_positions: bool = False

  @property
  def kinds(self):
    """KINDS of the blocks that a layer has."""
    return {name: kinds for name, kinds in KINDS.items() if self.temporal_blocks or name == "spatial_blocks"}


class Conditions(NamedTuple):
  """What every block sees beside the tokens; `clean` is of timestep 0, None without x_mask."""

  text: jax.Array  # [B, L, D]
  text_mask: jax.Array | None  # [B, L]
  token_valid: jax.Array | None  # [B, T, S]
  x_mask: jax.Array | None  # [B, T]
  noised: jax.Array  # [B, 6D]
  clean: jax.Array | None  # [B, 6D]
  rope: jax.Array  # [head_dim / 2]


class Block(nn.Module):
  """Attention over space, or over time with rotary embedding; then cross attention and MLP.

  Temporal blocks start as the identity: their three output projections are zero.
  """

  config: STDiT3Config
  axis: str
  layout: Layout | None = None

  @nn.compact
  def __call__(self, x: Features, c: Conditions, number, call=step_cache.compute) -> Features:
    """x `[B, T, S, D]`, Conditions, number of the layer -> `[B, T, S, D]`; `call` calls the attentions."""
    cfg, dtype, layout = self.config, DTYPES[self.config.dtype], self.layout
    axes, rope, out_init = (OVER_SPACE, None, None) if self.axis == "space" else (OVER_TIME, c.rope, common.zeros)
    table = common.modulation_table(self, "modulation", 6, cfg.hidden_size)
    shift1, scale1, gate1, shift2, scale2, gate2 = common.modulation_rows(table, c.noised, c.clean, c.x_mask)

    x = constrain(x, layout, *axes)
    attention = SelfAttention(
      cfg.num_heads, self.axis, cfg.qk_norm, False, out_init, cfg.attention, dtype, layout, name="attention"
    )
    x = x + gate1 * call(self.axis, attention, modulate(layer_norm(x), shift1, scale1), c.token_valid, rope)
    cross = CrossAttention(cfg.num_heads, out_init, cfg.attention, dtype, layout, axes, name="cross_attention")
    x = x + call("cross", cross, x, c.text, c.text_mask)
    mlp = common.block_mlp(cfg, layout, axes, out_init)
    return x + gate2 * mlp(modulate(layer_norm(x), shift2, scale2))


class STDiT3(nn.Module):
  """The denoiser; inputs and output as models/family.py says."""

  config: STDiT3Config
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
    x = common.embed_patches(cfg, layout, tokens, torch_uniform(cfg.patch_values))  # [B, T, S, D]
    x = x + positions.astype(dtype)[:, None]
    if cfg.frame_positions:
      x = x + interleaved_sin_cos(jnp.arange(tokens.shape[1], dtype=jnp.float32), cfg.hidden_size).astype(dtype)[:, None]
    self.sow("intermediates", "tokens_in", x)
    embed_t, speed = common.scalar_embedder(cfg, layout, "timestep_embed"), 0.0
    if cfg.fps_condition:
      speed = common.scalar_embedder(cfg, layout, "fps_embed", None, common.small, common.zeros)(sizes["fps"])  # [B, D]
    noised = embed_t(t) + speed  # [B, D]
    clean = None if x_mask is None else embed_t(jnp.zeros_like(t)) + speed
    common.null_caption(self)  # creates the constant of dropped captions, which only `Family.null` reads
    conditions = Conditions(
      common.embed_caption(cfg, layout, cond["text"]), cond["text_mask"], token_valid, x_mask,
      *common.modulation_vectors(cfg, layout, "timestep_modulation", 6, [noised, clean]),
      self.variable("constants", "rope_frequencies", rope_frequencies, cfg.head_dim).value,
    )  # fmt: skip

    blocks = {"spatial_blocks": "space", "temporal_blocks": "time"}
    blocks = {name: Block(cfg, axis, layout, parent=None) for name, axis in blocks.items() if name in cfg.kinds}
    x, cached = run_blocks(self, blocks, common.RULES, constrain(x, layout, *OVER_TIME), conditions, reuse)  # [B, T, S, D]

    x = common.FinalLayer(cfg, layout, name="final_layer")(x, noised, clean, x_mask)  # [B, T, S, P_out]
    return common.finish(self, x, frames, cached, reuse)

  def cache_specs(self, cache, batch, frames, space):
    """What calls on `[batch, frames, space]` tokens keep for each other (`step_cache.cache_specs`)."""
    return common.cache_specs(self, self.config.kinds, cache, batch, frames, space)


def flops(config, frames, space):
  """FLOPs of a forward pass over one sample of `frames * space` tokens."""
  blocks = [(space,), (frames,)] if config.temporal_blocks else [(space,)]
  return common.forward_flops(config, frames, space, blocks)


FAMILY = Family(
  name="STDiT-3 (Open-Sora 1.2)",
  sizes={
    "STDiT3-XL/2": STDiT3Config(),
    "STDiT3-3B/2": STDiT3Config(hidden_size=1872, num_heads=26),
    # Small ones: for tests, and for the quick start on two cores.
    "STDiT3-mini/2": STDiT3Config(hidden_size=192, depth=4, num_heads=4, caption_channels=192, model_max_length=120),
    "STDiT3-mini/4": STDiT3Config(
      hidden_size=192, depth=4, num_heads=4, patch_size=(1, 4, 4), caption_channels=192, model_max_length=120
    ),
    "STDiT3-tiny/2": STDiT3Config(hidden_size=96, depth=2, num_heads=4, caption_channels=64, model_max_length=12),
  },
  build=STDiT3,
  condition="captions",
  cond=common.cond,
  null=common.null,
  rules=common.RULES,
  flops=flops,
  layouts=("open-sora", "native"),
  stacks=("spatial_blocks", "temporal_blocks"),
  resizable=("null_caption",),
  supports=Supports(frame_masks=True, step_cache=True),
)
