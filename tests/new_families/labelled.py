"""A family in one file: images of classes. The label is added to the timestep. Label N means "no class", as in DiT."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from stdit_jax.models.family import Family
from stdit_jax.models.layers import DTYPES, Linear, Mlp, SelfAttention, interleaved_sin_cos, layer_norm, modulate, sinusoid
from stdit_jax.models.stack import run_layers, stacked_params
from stdit_jax.parallel.shardings import BLOCK_RULES, Layout, constrain, gather_layer

RULES = (
  *BLOCK_RULES,
  (r"blocks/modulation/kernel$", P()),
  (r"(label_embed/embedding|patch_embed/(kernel|bias)|timestep_embed/fc[12]/(kernel|bias)|final/(kernel|bias))$", P()),
)


@dataclasses.dataclass(frozen=True)
class LabelledConfig:
  """Sizes. `num_classes` does not count "no class"."""

  hidden_size: int = 48
  depth: int = 2
  num_heads: int = 4
  in_channels: int = 4
  patch_size: tuple[int, int, int] = (1, 2, 2)
  num_classes: int = 3
  dtype: str = "float32"
  remat: str = "none"
  scan: bool = True

  @property
  def out_channels(self):
    return self.in_channels


class Block(nn.Module):
  """Attention over the frame and an MLP. The timestep and the label modulate both."""

  config: LabelledConfig
  layout: Layout | None = None

  @nn.compact
  def __call__(self, x, time, token_valid):
    """x `[B, T, S, D]`, time `[B, D]`, token_valid `[B, T, S]` -> `[B, T, S, D]`."""
    cfg, layout, dtype = self.config, self.layout, DTYPES[self.config.dtype]
    zeros = nn.initializers.zeros
    modulation = Linear((6, cfg.hidden_size), kernel_init=zeros, dtype=dtype, layout=layout, name="modulation")(nn.silu(time))
    shift1, scale1, gate1, shift2, scale2, gate2 = (modulation[:, None, None, i] for i in range(6))  # [B, 1, 1, D]
    attention = SelfAttention(cfg.num_heads, "space", dtype=dtype, layout=layout, name="attention")
    x = x + gate1 * attention(modulate(layer_norm(x), shift1, scale1), token_valid)
    mlp = Mlp(4 * cfg.hidden_size, cfg.hidden_size, dtype=dtype, layout=layout, tensor=True, name="mlp")
    return x + gate2 * mlp(modulate(layer_norm(x), shift2, scale2))


class Labelled(nn.Module):
  """The denoiser. models/family.py describes its inputs and output."""

  config: LabelledConfig
  layout: Layout | None = None

  @nn.compact
  def __call__(self, tokens, t, cond, sizes, *, x_mask=None, valid=None):
    cfg, layout, dtype = self.config, self.layout, DTYPES[self.config.dtype]
    assert x_mask is None
    token_valid = None
    if valid is not None:
      tokens, token_valid = jnp.where(valid, tokens, 0), valid.any(-1)

    # embed
    half, index = cfg.hidden_size // 2, jnp.arange(tokens.shape[2])
    row, column = index // sizes["grid"][:, 2:], index % sizes["grid"][:, 2:]  # [B, S]
    positions = jnp.concatenate([interleaved_sin_cos(x, half) for x in (row, column)], axis=-1)
    x = Linear((cfg.hidden_size,), dtype=dtype, layout=layout, name="patch_embed")(tokens)  # [B, T, S, D]
    x = x + positions.astype(dtype)[:, None]
    embed = Mlp(cfg.hidden_size, cfg.hidden_size, "silu", dtype=dtype, layout=layout, name="timestep_embed")
    time = embed(sinusoid(t)) + nn.Embed(cfg.num_classes + 1, cfg.hidden_size, name="label_embed")(cond["label"])  # [B, D]

    # blocks
    block = Block(cfg, layout, parent=None)
    stacked = stacked_params(self, {"blocks": block}, cfg.depth, x, time, token_valid)["blocks"]

    def layer(x, params):
      params = gather_layer(params, "blocks", layout, dtype, RULES)
      return constrain(block.apply({"params": params}, x, time, token_valid), layout, "batch", None, None, None), None

    x, _ = run_layers(layer, x, stacked, cfg.scan, cfg.remat)  # [B, T, S, D]

    # final layer
    features = (math.prod(cfg.patch_size) * cfg.out_channels,)
    x = Linear(features, kernel_init=nn.initializers.zeros, dtype=dtype, layout=layout, name="final")(layer_norm(x))
    return x.astype(jnp.float32)  # [B, T, S, P_out]


def flops(config, frames, space):
  tokens, width = frames * space, config.hidden_size
  return config.depth * (24 * tokens * width**2 + 4 * tokens * space * width)


FAMILY = Family(
  name="labelled images",
  sizes={"tiny": LabelledConfig()},
  build=Labelled,
  condition="labels",
  cond=lambda config, rows: {"label": jax.ShapeDtypeStruct((rows,), jnp.int32)},
  null=lambda config, constants, cond: {"label": jnp.full_like(cond["label"], config.num_classes)},
  rules=RULES,
  flops=flops,
)
