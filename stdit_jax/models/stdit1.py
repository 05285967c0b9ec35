"""STDiT of Open-Sora 1.0 (tag v1.0.0, `stdit.py`): fixed sizes, additive positions, text by cross attention."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from stdit_jax.arrays import ArrayLike, Cond, Features, FrameMask, PerSample, Sizes, Tokens, Valid
from stdit_jax.models import stdit_common as common
from stdit_jax.models.family import Family, Supports
from stdit_jax.models.layers import DTYPES, OVER_SPACE, OVER_TIME, interleaved_sin_cos, layer_norm, modulate
from stdit_jax.models.stack import run_blocks
from stdit_jax.models.step_cache import Call, Reuse, compute
from stdit_jax.parallel.shardings import constrain


@dataclasses.dataclass(frozen=True)
class STDiT1Config(common.STDiTConfig):
  """Open-Sora 1.0.

  Attributes:
    input_size: (T, H, W) of the latents. The model does not use it. Files of the original hold position tables of this size.
    space_scale: 0.5 for 256 pixels, 1.0 for 512.
  """

  model_max_length: int = 120
  qk_norm: bool = False
  input_size: tuple[int, int, int] = (16, 32, 32)
  space_scale: float = 0.5
  time_scale: float = 1.0


class Block(common.Block):
  """Attention over space, over time, to the text, then the MLP; one modulation table, no norms in attention."""

  @nn.compact
  def __call__(self, x: Features, c: common.Conditions, number: ArrayLike, call: Call = compute) -> Features:
    x = constrain(x, self.layout, *OVER_SPACE)
    shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation_rows("modulation", 6, c.modulation, c.x_mask)

    spatial = self.self_attention("space")
    x = x + gate1 * call("space", spatial, modulate(layer_norm(x), shift1, scale1), c.token_valid)
    # as Open-Sora 1.0: the temporal branch is neither normalised nor modulated, reuses the spatial gate, and sees the
    # temporal position table in the first block only, outside the residual stream.
    x = constrain(x, self.layout, *OVER_TIME)
    positioned = x + jnp.where(number == 0, c.time_embedding, 0).astype(x.dtype)[:, None]
    temporal = self.self_attention("time", "temporal_attention", out_init=common.zeros)
    x = x + gate1 * call("time", temporal, positioned, c.token_valid)
    x = x + call("cross", self.cross_attention(), x, c.text, c.text_mask)
    return x + gate2 * self.block_mlp()(modulate(layer_norm(x), shift2, scale2))


class STDiT1(common.STDiT):
  """The denoiser; inputs and output as models/family.py says."""

  config: STDiT1Config

  @nn.compact
  def __call__(
    self, tokens: Tokens, t: PerSample, cond: Cond, sizes: Sizes, *,
    x_mask: FrameMask | None = None, valid: Valid | None = None, reuse: Reuse | None = None,
  ) -> Features | tuple:  # fmt: skip
    cfg, layout, dtype = self.config, self.layout, DTYPES[self.config.dtype]
    if x_mask is not None:
      raise ValueError("STDiT (1.0) has no frame masks: x_mask must be None; STDiT2 and STDiT3 have them")
    frames = tokens.shape[1]
    tokens, token_valid, _ = self.pad_frames(tokens, valid, None)  # [B, T, S, P]

    # embed
    scale = jnp.full((len(tokens),), cfg.space_scale, jnp.float32)
    positions = common.embed_positions(cfg.hidden_size, sizes["grid"], tokens.shape[2], scale, base=False)  # [B, S, D]
    x = self.embed_patches(tokens) + positions.astype(dtype)[:, None]  # [B, T, S, D]
    self.sow("intermediates", "tokens_in", x)
    noised = self.scalar_embedder("timestep_embed", None, common.small, common.small)(t)  # [B, D]
    modulation = self.modulation_vectors("timestep_modulation", 6, (noised, None), common.small)  # [B, 6D]
    text = self.embed_caption(cond["text"], common.small)  # [B, L, D]
    times = jnp.arange(tokens.shape[1], dtype=jnp.float32) / cfg.time_scale
    conditions = common.Conditions(
      text, cond["text_mask"], token_valid, None, modulation, time_embedding=interleaved_sin_cos(times, cfg.hidden_size)
    )

    blocks = {"blocks": Block(cfg, layout, parent=None)}
    x, cached = run_blocks(self, blocks, common.RULES, x, conditions, reuse)  # [B, T, S, D]

    x = common.FinalLayer(cfg, layout, common.zeros, name="final_layer")(x, noised)  # [B, T, S, P_out]
    return self.finish(x, frames, cached, reuse)


FAMILY = Family(
  name="STDiT (Open-Sora 1.0)",
  sizes={
    "STDiT-XL/2": STDiT1Config(),
    "STDiT-tiny/2": STDiT1Config(
      hidden_size=72, depth=2, num_heads=4, caption_channels=64, model_max_length=12, input_size=(4, 8, 8)
    ),
  },
  build=STDiT1,
  supports=Supports(step_cache=True),
  **common.RECORD,
)
