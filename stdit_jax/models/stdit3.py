"""STDiT-3 of Open-Sora 1.2 (tag v1.2.0, `stdit3.py`): spatial and temporal blocks in turn, conditioned on the frame rate."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from stdit_jax.arrays import ArrayLike, Cond, Features, FrameMask, PerSample, Sizes, Tokens, Valid
from stdit_jax.models import stdit_common as common
from stdit_jax.models.family import Family, Supports, token_values
from stdit_jax.models.layers import DTYPES, OVER_SPACE, OVER_TIME, interleaved_sin_cos, layer_norm, modulate, torch_uniform
from stdit_jax.models.stack import run_blocks
from stdit_jax.models.step_cache import Call, Reuse, compute
from stdit_jax.parallel.shardings import constrain


@dataclasses.dataclass(frozen=True)
class STDiT3Config(common.STDiTConfig):
  """Open-Sora 1.2, which starts from the weights of PixArt.

  Attributes:
    fps_condition: embed the frame rate. PixArt has no such embedding.
    temporal_blocks: False leaves out attention over time: frames of a clip then know nothing of each other.
    frame_positions: adds a sinusoid of the frame's number to the tokens, as Open-Sora 1.0's blocks do. The original has none.
      Rotary positions tell how far frames are apart, but not which frame is the first. From noise alone, no frame can then know
      how far a movement has come.
  """

  fps_condition: bool = True
  temporal_blocks: bool = True
  frame_positions: bool = False

  @property
  def kinds(self) -> dict[str, dict]:
    spatial = {"spatial_blocks": {"space": OVER_SPACE, "cross": OVER_SPACE}}
    return spatial | ({"temporal_blocks": {"time": OVER_TIME, "cross": OVER_TIME}} if self.temporal_blocks else {})


class Block(common.Block):
  """Attention over space, or over time with rotary embedding; then cross attention and MLP.

  Temporal blocks start as the identity: their three output projections are zero.
  """

  axis: str = "space"

  @nn.compact
  def __call__(self, x: Features, c: common.Conditions, number: ArrayLike, call: Call = compute) -> Features:
    axes, rope, out_init = (OVER_SPACE, None, None) if self.axis == "space" else (OVER_TIME, c.rope, common.zeros)
    shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation_rows("modulation", 6, c.modulation, c.x_mask)

    x = constrain(x, self.layout, *axes)
    attention = self.self_attention(self.axis, qk_norm=self.config.qk_norm, out_init=out_init)
    x = x + gate1 * call(self.axis, attention, modulate(layer_norm(x), shift1, scale1), c.token_valid, rope)
    x = x + call("cross", self.cross_attention(axes, out_init), x, c.text, c.text_mask)
    return x + gate2 * self.block_mlp(axes, out_init)(modulate(layer_norm(x), shift2, scale2))


class STDiT3(common.STDiT):
  """The denoiser; inputs and output as models/family.py says."""

  config: STDiT3Config

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
    x = self.embed_patches(tokens, torch_uniform(token_values(cfg))) + positions.astype(dtype)[:, None]  # [B, T, S, D]
    if cfg.frame_positions:
      x = x + interleaved_sin_cos(jnp.arange(tokens.shape[1], dtype=jnp.float32), cfg.hidden_size).astype(dtype)[:, None]
    self.sow("intermediates", "tokens_in", x)
    embed_t, speed = self.scalar_embedder("timestep_embed"), 0.0
    if cfg.fps_condition:
      speed = self.scalar_embedder("fps_embed", None, common.small, common.zeros)(sizes["fps"])  # [B, D]
    noised = embed_t(t) + speed  # [B, D]
    clean = None if x_mask is None else embed_t(jnp.zeros_like(t)) + speed
    conditions = common.Conditions(
      self.embed_caption(cond["text"]), cond["text_mask"], token_valid, x_mask,
      self.modulation_vectors("timestep_modulation", 6, (noised, clean)), rope=self.rope(),
    )  # fmt: skip

    blocks = {name: Block(cfg, layout, axis, parent=None) for name, (axis, _) in cfg.kinds.items()}
    x, cached = run_blocks(self, blocks, common.RULES, x, conditions, reuse)  # [B, T, S, D]

    x = common.FinalLayer(cfg, layout, name="final_layer")(x, noised, clean, x_mask)  # [B, T, S, P_out]
    return self.finish(x, frames, cached, reuse)


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
  stacks=("spatial_blocks", "temporal_blocks"),
  supports=Supports(frame_masks=True, step_cache=True),
  **common.RECORD,
)
