"""STDiT-2 of Open-Sora 1.1 (tag v1.1.0, `stdit2.py`): any size, rotary embedding in time, frame masks.

It is conditioned on size, aspect ratio, number of frames and frame rate.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from stdit_jax.arrays import ArrayLike, Cond, Embedding, Features, FrameMask, PerSample, Sizes, Tokens, Valid
from stdit_jax.models import stdit_common as common
from stdit_jax.models.family import Family, Supports
from stdit_jax.models.layers import DTYPES, OVER_SPACE, OVER_TIME, layer_norm, modulate
from stdit_jax.models.stack import run_blocks
from stdit_jax.models.step_cache import Call, Reuse, compute
from stdit_jax.parallel.shardings import constrain


@dataclasses.dataclass(frozen=True)
class STDiT2Config(common.STDiTConfig):
  """Open-Sora 1.1.

  Attributes:
    qk_norm_legacy: rotate before the norm, as 1.1 was trained. With False, norm first, as the code of 1.2 builds STDiT-2.
    fps_condition: embed the frame rate. The first stages of 1.1 lack this embedding.
  """

  model_max_length: int = 200
  qk_norm_legacy: bool = True
  fps_condition: bool = True

  def __post_init__(self):
    super().__post_init__()
    if self.hidden_size % 3:
      raise ValueError(f"STDiT2Config: hidden_size is {self.hidden_size}; allowed: multiples of 3 (size and aspect embedders)")


class Block(common.Block):
  """Spatial and temporal attention with a modulation each, cross attention, MLP."""

  config: STDiT2Config

  @nn.compact
  def __call__(self, x: Features, c: common.Conditions, number: ArrayLike, call: Call = compute) -> Features:
    cfg, layout = self.config, self.layout
    shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation_rows("modulation", 6, c.modulation, c.x_mask)
    shift_t, scale_t, gate_t = self.modulation_rows("temporal_modulation", 3, c.temporal, c.x_mask)

    x = constrain(x, layout, *OVER_SPACE)
    spatial = self.self_attention("space", qk_norm=cfg.qk_norm)
    x = x + gate1 * call("space", spatial, modulate(layer_norm(x), shift1, scale1), c.token_valid)
    x = constrain(x, layout, *OVER_TIME)
    temporal = self.self_attention(
      "time", "temporal_attention", qk_norm=cfg.qk_norm, rope_first=cfg.qk_norm_legacy, out_init=common.zeros
    )
    x = x + gate_t * call("time", temporal, modulate(layer_norm(x), shift_t, scale_t), c.token_valid, c.rope)
    x = x + call("cross", self.cross_attention(), x, c.text, c.text_mask)
    return x + gate2 * self.block_mlp()(modulate(layer_norm(x), shift2, scale2))


class STDiT2(common.STDiT):
  """The denoiser; inputs and output as models/family.py says.

  `sizes` may have `aspect_ratio` `[B]`. The default is height / width, as 1.1 samples; 1.1 trained with width / height.
  """

  config: STDiT2Config

  @nn.compact
  def __call__(
    self, tokens: Tokens, t: PerSample, cond: Cond, sizes: Sizes, *,
    x_mask: FrameMask | None = None, valid: Valid | None = None, reuse: Reuse | None = None,
  ) -> Features | tuple:  # fmt: skip
    cfg, layout, dtype = self.config, self.layout, DTYPES[self.config.dtype]
    frames = tokens.shape[1]
    tokens, token_valid, x_mask = self.pad_frames(tokens, valid, x_mask)  # [B, T, S, P]

    # embed
    positions = self.scaled_positions(sizes, tokens.shape[2])  # [B, S, D]
    x = self.embed_patches(tokens) + positions.astype(dtype)[:, None]  # [B, T, S, D]
    self.sow("intermediates", "tokens_in", x)
    size, length = self.embed_sizes(sizes)  # [B, D] each
    embed_t = self.scalar_embedder("timestep_embed", None, common.small, common.small)
    noised = embed_t(t)  # [B, D]
    clean = None if x_mask is None else embed_t(jnp.zeros_like(t))

    def modulation(name, rows, added):  # [B, rows * D] of noised and of clean frames
      embeddings = [e if e is None else e + added for e in (noised, clean)]
      return self.modulation_vectors(name, rows, embeddings, common.small)

    conditions = common.Conditions(
      self.embed_caption(cond["text"], common.small), cond["text_mask"], token_valid, x_mask,
      modulation("timestep_modulation", 6, size), modulation("temporal_modulation", 3, length), self.rope(),
    )  # fmt: skip

    blocks = {"blocks": Block(cfg, layout, parent=None)}
    x, cached = run_blocks(self, blocks, common.RULES, x, conditions, reuse)  # [B, T, S, D]

    # as Open-Sora 1.1: in the final layer noised frames see the plain timestep, clean frames timestep 0 plus the size.
    clean = None if clean is None else clean + size
    x = common.FinalLayer(cfg, layout, common.zeros, name="final_layer")(x, noised, clean, x_mask)  # [B, T, S, P_out]
    return self.finish(x, frames, cached, reuse)

  def embed_sizes(self, sizes: Sizes) -> tuple[Embedding, Embedding]:
    """Two embeddings `[B, D]`: size and aspect ratio for the spatial branch, frames and fps for the temporal branch."""
    height, width, third = sizes["height"], sizes["width"], self.config.hidden_size // 3
    aspect_ratio = sizes.get("aspect_ratio", height / width)
    embed_size, embed_aspect = self.scalar_embedder("size_embed", third), self.scalar_embedder("aspect_embed", third)
    size = jnp.concatenate([embed_size(height), embed_size(width), embed_aspect(aspect_ratio)], axis=-1)
    length = self.scalar_embedder("frames_embed")(sizes["num_frames"])
    if self.config.fps_condition:
      length = length + self.scalar_embedder("fps_embed")(sizes["fps"])
    return size, length


FAMILY = Family(
  name="STDiT-2 (Open-Sora 1.1)",
  sizes={
    "STDiT2-XL/2": STDiT2Config(),
    "STDiT2-tiny/2": STDiT2Config(hidden_size=96, depth=2, num_heads=4, caption_channels=64, model_max_length=12),
  },
  build=STDiT2,
  supports=Supports(frame_masks=True, step_cache=True),
  **common.RECORD,
)
