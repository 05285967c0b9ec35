"""What the three STDiTs share: configuration, embeddings, modulation, the final layer, and fields of `family.Family`."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Integer

from stdit_jax import fields
from stdit_jax.arrays import ArrayLike, Cond, Embedding, Features, FrameMask, PerSample, Sizes, Tokens, Valid
from stdit_jax.models import flops, layers, step_cache
from stdit_jax.models.layers import DTYPES, OVER_SPACE, OVER_TIME, Linear, Mlp, interleaved_sin_cos, layer_norm, modulate
from stdit_jax.models.stack import REMAT_POLICIES
from stdit_jax.parallel.attention import IMPLEMENTATIONS
from stdit_jax.parallel.shardings import BLOCK_RULES, Layout, constrain

COMPAT = (None, "open-sora")
zeros = nn.initializers.zeros
small = nn.initializers.normal(0.02)
Init = Callable | None  # None: the layer's own initializer

RULES = (
  *BLOCK_RULES,
  (r"(timestep|temporal)_modulation/kernel$", P("fsdp")),
  (r"(caption|timestep|fps|frames)_embed/fc[12]/kernel$", P(None, "fsdp")),
  (r"(size|aspect)_embed/fc[12]/kernel$", P()),
  (r"(patch_embed|_embed/fc[12]|_modulation)/bias$", P()),
  (r"patch_embed/kernel$", P()),
  (r"final_layer/(modulation|linear/kernel|linear/bias)$", P()),
  (r"(null_caption|rope_frequencies)$", P()),
)


@dataclasses.dataclass(frozen=True)
class STDiTConfig:
  """The fields of all three models. The sizes have the meaning of the originals' constructor arguments.

  Attributes:
    input_sq_size: side in pixels at which the spatial position embedding has unit scale (STDiT-2 and 3).
    pred_sigma: the model also predicts one variance per channel, for IDDPM. Rectified flow ignores the variances.
    scan: run the blocks as one `lax.scan`. False unrolls them: a profile then has one name per block, and CPUs are faster.
    remat: the activations of a block that the backward pass stores, one of REMAT_POLICIES.
    compat: "open-sora" scales positions by the size of the *first* sample of the batch, as the originals do. By default
      every sample has its own scale.
  """

  hidden_size: int = 1152
  depth: int = 28
  num_heads: int = 16
  mlp_ratio: float = 4.0
  in_channels: int = 4
  patch_size: tuple[int, int, int] = (1, 2, 2)
  caption_channels: int = 4096
  model_max_length: int = 300
  input_sq_size: int = 512
  qk_norm: bool = True
  pred_sigma: bool = True
  dtype: str = "float32"
  scan: bool = True
  remat: str = "none"
  attention: str = "auto"
  compat: str | None = None

  def __post_init__(self):
    name = type(self).__name__
    for divisor, why in ((self.num_heads, "num_heads"), (4, "4 (position embedding)")):
      if self.hidden_size % divisor:
        raise ValueError(f"{name}: hidden_size {self.hidden_size} does not divide by {why}")
    if self.head_dim % 2:
      raise ValueError(f"{name}: hidden_size / num_heads is {self.head_dim}, but rotary embedding needs an even number")
    fields.check_choices(
      self, name, dtype=layers.COMPUTE_DTYPES, remat=REMAT_POLICIES, attention=IMPLEMENTATIONS, compat=COMPAT
    )
    if self.patch_size[0] != 1:
      raise ValueError(f"{name}: patch_size {self.patch_size}: patches of one latent frame only, as in all released models")

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_heads

  @property
  def patch_positions(self) -> int:
    return math.prod(self.patch_size)

  @property
  def patch_values(self) -> int:
    """P: values of one input token."""
    return self.patch_positions * self.in_channels

  @property
  def out_channels(self) -> int:
    return self.in_channels * (2 if self.pred_sigma else 1)

  @property
  def kinds(self) -> dict[str, dict]:
    """{name of a block of a layer: {kind of attention: how its output lies on a mesh}}."""
    return {"blocks": {"space": OVER_SPACE, "time": OVER_TIME, "cross": OVER_TIME}}


class Conditions(NamedTuple):
  """The inputs of every block beside the tokens.

  A modulation is a pair of vectors `[B, rows * D]`: one for noised frames, one for clean frames (None without x_mask).
  """

  text: jax.Array  # [B, L, D]
  text_mask: jax.Array | None  # [B, L]
  token_valid: jax.Array | None  # [B, T, S]
  x_mask: jax.Array | None  # [B, T]
  modulation: list  # 6 rows
  temporal: Any = None  # 3 rows (STDiT-2)
  rope: jax.Array | None = None  # [head_dim / 2] (STDiT-2 and 3)
  time_embedding: Any = None  # [T, D] (STDiT 1.0)


class Block(nn.Module):
  """Parts of the blocks of all models."""

  config: STDiTConfig
  layout: Layout | None = None

  def self_attention(self, axis: str, name: str = "attention", **options) -> layers.SelfAttention:
    cfg = self.config
    return layers.SelfAttention(
      cfg.num_heads, axis, implementation=cfg.attention, dtype=DTYPES[cfg.dtype], layout=self.layout, name=name, **options
    )

  def cross_attention(self, axes: tuple = OVER_TIME, out_init: Init = zeros) -> layers.CrossAttention:
    cfg = self.config
    return layers.CrossAttention(
      cfg.num_heads, out_init, cfg.attention, DTYPES[cfg.dtype], self.layout, axes, name="cross_attention"
    )

  def block_mlp(self, axes: tuple = OVER_TIME, out_init: Init = None) -> Mlp:
    """The MLP, its hidden side split over `tensor`."""
    width = self.config.hidden_size
    return Mlp(
      int(width * self.config.mlp_ratio), width, fc2_init=out_init, dtype=DTYPES[self.config.dtype], layout=self.layout,
      axes=axes[:3], tensor=True, name="mlp",
    )  # fmt: skip

  def modulation_rows(self, name: str, rows: int, vectors: list, x_mask: FrameMask | None) -> list[Array]:
    """Shift, scale and gate rows `[B, T or 1, 1, D]`: a learned table plus the modulation `vectors` of `Conditions`.

    Clean frames take the modulation of timestep 0, as in the originals' `t_mask_select`.
    """
    table = modulation_table(self, name, rows)  # [rows, D]

    def add(vector):  # [B, 1, rows, D]
      return (table.astype(vector.dtype) + vector.reshape(-1, *table.shape))[:, None]

    noised, clean = vectors
    chosen = add(noised) if x_mask is None else jnp.where(x_mask[:, :, None, None], add(noised), add(clean))
    return [chosen[:, :, i, None, :] for i in range(rows)]


def modulation_table(module: nn.Module, name: str, rows: int) -> Float[ArrayLike, "rows D"]:
  """A learned table, initialised N(0, 1) / sqrt(D)."""
  width = module.config.hidden_size
  return module.param(name, nn.initializers.normal(width**-0.5), (rows, width))


class STDiT(nn.Module):
  """Parts of all models; every model has its own `__call__`."""

  config: STDiTConfig
  layout: Layout | None = None

  def pad_frames(self, tokens: Tokens, valid: Valid | None, x_mask: FrameMask | None) -> tuple:
    """Zeroes padding, and adds frames of padding if the layout splits tokens and the frames do not divide.

    Returns (tokens, token_valid `[B, T, S]` or None, x_mask). Raises ValueError if the tokens of a frame do not divide.
    """
    token_valid = None
    if valid is not None:
      tokens, token_valid = jnp.where(valid, tokens, 0), valid.any(-1)
    parts = 1 if self.layout is None else self.layout.token_parts
    if tokens.shape[2] % parts:
      raise ValueError(f"{tokens.shape[2]} tokens per frame do not divide by the {parts} devices of mesh axis 'sequence'")
    if extra := -tokens.shape[1] % parts:
      if token_valid is None:
        token_valid = jnp.ones(tokens.shape[:3], bool)
      tokens, token_valid, x_mask = jax.tree.map(
        lambda x: jnp.pad(x, [(0, extra if axis == 1 else 0) for axis in range(x.ndim)]), (tokens, token_valid, x_mask)
      )
    return constrain(tokens, self.layout, *OVER_TIME), token_valid, x_mask

  def scaled_positions(self, sizes: Sizes, num_tokens: int) -> Float[Array, "B S D"]:
    """Position embedding of STDiT-2 and 3, scaled by the size of the frames in pixels."""
    height, width = sizes["height"], sizes["width"]
    if self.config.compat:
      height, width = (jnp.broadcast_to(side[0], side.shape) for side in (height, width))
    scale = jnp.sqrt(height.astype(jnp.float32) * width.astype(jnp.float32)) / self.config.input_sq_size
    positions = embed_positions(self.config.hidden_size, sizes["grid"], num_tokens, scale)
    self.sow("intermediates", "pos_emb", positions)
    return positions

  def embed_patches(self, tokens: Tokens, init: Init = None) -> Features:
    """`[B, T, S, P] -> [B, T, S, D]`: the originals' Conv3d, whose bias has PyTorch's default initialisation."""
    cfg = self.config
    linear = Linear(
      (cfg.hidden_size,), kernel_init=init, bias_init=layers.torch_uniform(cfg.patch_values), dtype=DTYPES[cfg.dtype],
      layout=self.layout, axes=OVER_TIME[:3], name="patch_embed",
    )  # fmt: skip
    return linear(tokens)

  def scalar_embedder(self, name: str, features: int | None = None, fc1_init: Init = None, fc2_init: Init = None) -> Callable:
    """-> `[B] -> [B, features]`: an MLP over the sinusoid of a timestep, frame rate, length or size."""
    features = features or self.config.hidden_size
    mlp = Mlp(features, features, "silu", fc1_init, fc2_init, DTYPES[self.config.dtype], self.layout, name=name)
    return lambda values: mlp(layers.sinusoid(values))

  def embed_caption(self, text: Float[ArrayLike, "B L C"], init: Init = None) -> Float[Array, "B L D"]:
    """Text features `[B, L, C] -> [B, L, D]`.

    Creates the constant `null_caption` `[L, C]`, too. `null` puts it in the place of dropped captions. It never trains.
    """
    cfg = self.config
    shape = (cfg.model_max_length, cfg.caption_channels)
    self.variable("constants", "null_caption", lambda: nn.initializers.normal(shape[1] ** -0.5)(self.make_rng("params"), shape))
    mlp = Mlp(
      cfg.hidden_size, cfg.hidden_size, fc1_init=init, fc2_init=init, dtype=DTYPES[cfg.dtype], layout=self.layout,
      name="caption_embed",
    )  # fmt: skip
    return mlp(text)

  def rope(self) -> Float[ArrayLike, " half"]:
    """The constant rotary frequencies `[head_dim / 2]`."""
    return self.variable("constants", "rope_frequencies", layers.rope_frequencies, self.config.head_dim).value

  def modulation_vectors(self, name: str, rows: int, embeddings: Sequence, init: Init = None) -> list:
    """SiLU, then a linear layer: `[B, D] -> [B, rows * D]` for each embedding, the noised and the clean one or None."""
    cfg = self.config
    linear = Linear((rows * cfg.hidden_size,), kernel_init=init, dtype=DTYPES[cfg.dtype], layout=self.layout, name=name)
    return [None if e is None else linear(nn.silu(e)) for e in embeddings]

  def finish(self, x: ArrayLike, frames: int, cached: Any, reuse: step_cache.Reuse | None) -> Array | tuple:
    """The result of the model, float32 without padding frames. With `reuse` also the cached outputs, in their layout."""
    padded = x.shape[:3]
    x = constrain(x.astype(jnp.float32)[:, :frames], self.layout, *OVER_TIME)
    if reuse is None:
      return x
    specs = self.cache_specs(reuse.cache, *padded)
    return x, jax.tree.map(lambda spec, array: constrain(array, self.layout, *spec.axes), specs, cached)

  def cache_specs(self, cache: step_cache.Cache, batch: int, frames: int, space: int) -> dict:
    """The arrays that calls on `[batch, frames, space]` tokens cache for the next call (`step_cache.cache_specs`)."""
    cfg = self.config
    frames += -frames % (1 if self.layout is None else self.layout.token_parts)
    shape = batch, frames, space, cfg.hidden_size
    return step_cache.cache_specs(cache, shape, DTYPES[cfg.dtype], cfg.kinds, cfg.depth, OVER_TIME)


def embed_positions(
  width: int, grid: Integer[ArrayLike, "B 3"], num_tokens: int, scale: PerSample, base: bool = True
) -> Float[Array, "B S D"]:
  """Embedding of the row and the column of every token: the first half of the channels encodes the column, the second the row.

  Open-Sora 1.1 and 1.2, `PositionEmbedding2D`: index / scale * base / side with base = round(sqrt(rows * columns)) (half to
  even), so that every grid spans about the same range. Nothing reads the embedding of tokens past the sample's own grid.

  Args:
    width: D.
    grid: `[B, 3]` token grid (T, rows, columns) of every sample.
    num_tokens: S.
    scale: `[B]`.
    base: False leaves out the factor base / side: STDiT 1.0.
  """
  rows, columns = (grid[:, i, None].astype(jnp.float32) for i in (1, 2))
  index = jnp.arange(num_tokens, dtype=jnp.int32)
  row = (index // grid[:, 2, None]).astype(jnp.float32) / scale[:, None]  # [B, S]
  column = (index % grid[:, 2, None]).astype(jnp.float32) / scale[:, None]  # [B, S]
  if base:
    base_size = jnp.round(jnp.sqrt(rows * columns))
    row, column = row * (base_size / rows), column * (base_size / columns)
  return jnp.concatenate([interleaved_sin_cos(side, width // 2) for side in (column, row)], axis=-1)


class FinalLayer(nn.Module):
  """Norm, modulation from a 2-row table plus the timestep embedding, linear to `patch positions * out channels`."""

  config: STDiTConfig
  layout: Layout | None = None
  kernel_init: nn.initializers.Initializer | None = None

  @nn.compact
  def __call__(self, x: Features, noised: Embedding, clean: Embedding | None = None, x_mask: FrameMask | None = None) -> Array:
    """x `[B, T, S, D]`, noised and clean embeddings `[B, D]` (clean: None without x_mask) -> `[B, T, S, P_out]`."""
    cfg = self.config
    table = modulation_table(self, "modulation", 2).astype(x.dtype)
    out = modulate(layer_norm(x), *(table[i] + noised[:, None, None] for i in (0, 1)))
    if x_mask is not None and clean is not None:
      # as Open-Sora 1.1 and 1.2: the clean branch starts from the already modulated tensor, so norm and modulation act
      # twice. Neither loss nor sampler reads these frames; parity of masked outputs needs it.
      twice = modulate(layer_norm(out), *(table[i] + clean[:, None, None] for i in (0, 1)))
      out = jnp.where(x_mask[:, :, None, None], out, twice)
    linear = Linear(
      (cfg.patch_positions * cfg.out_channels,), kernel_init=self.kernel_init, dtype=DTYPES[cfg.dtype], layout=self.layout,
      axes=OVER_TIME[:3], name="linear",
    )  # fmt: skip
    return linear(out)


def cond(config: Any, rows: int) -> dict:
  """`Family.cond`: text features and which of them are valid."""
  length = rows, config.model_max_length
  return {
    "text": jax.ShapeDtypeStruct((*length, config.caption_channels), jnp.float32),
    "text_mask": jax.ShapeDtypeStruct(length, jnp.bool_),
  }


def null(config: Any, constants: dict, cond: Cond) -> dict:
  """`Family.null`: the null caption, cut to the length of the text. It keeps the caption's mask, as in the originals."""
  text = cond["text"]
  null_text = constants["null_caption"][: text.shape[1]].astype(text.dtype)
  return {**cond, "text": jnp.broadcast_to(null_text, text.shape)}


def forward_flops(config: Any, frames: int, space: int) -> int:
  """`Family.flops`: FLOPs of a forward pass over one sample of `frames * space` tokens."""
  width, tokens, text = config.hidden_size, frames * space, config.model_max_length
  rest = flops.cross_attention(config, tokens, text) + flops.mlp(config, tokens)
  own = {kind: flops.self_attention(config, tokens, span) for kind, span in (("space", space), ("time", frames))}
  layer = sum(rest + sum(own.get(kind, 0) for kind in kinds) for kinds in config.kinds.values())
  patches = 2 * tokens * width * (config.patch_values + config.patch_positions * config.out_channels)
  caption = 2 * text * (config.caption_channels + width) * width
  embeddings = 2 * 2 * (256 + width) * width + 12 * width**2  # timestep and fps, modulation
  return config.depth * layer + patches + caption + embeddings


# Fields that the records of all three have in common.
RECORD: dict[str, Any] = dict(
  condition="captions", cond=cond, null=null, rules=RULES, flops=forward_flops, layouts=("open-sora", "native"),
  resizable=("null_caption",),
)  # fmt: skip
