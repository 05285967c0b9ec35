"""What the three STDiTs share: configuration, embeddings, modulation, the final layer, and the fields of their records."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer

from stdit_jax.models import flops, step_cache
from stdit_jax.models.layers import (
  COMPUTE_DTYPES,
  DTYPES,
  OVER_TIME,
  Linear,
  Mlp,
  interleaved_sin_cos,
  layer_norm,
  modulate,
  sinusoid,
  torch_uniform,
)
from stdit_jax.models.stack import REMAT_POLICIES
from stdit_jax.models.types import Cond, Embedding, Features, FrameMask, PerSample, Sizes, Tokens, Valid
from stdit_jax.parallel.attention import IMPLEMENTATIONS
from stdit_jax.parallel.shardings import BLOCK_RULES, Layout, constrain

COMPAT = (None, "open-sora")
zeros = nn.initializers.zeros
small = nn.initializers.normal(0.02)

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
  """What all three models share. Sizes are those of the originals' constructors.

  Attributes:
    input_sq_size: side in pixels at which the spatial position embedding has unit scale (STDiT-2 and 3).
    pred_sigma: predict C more channels (the variance of IDDPM; ignored by rectified flow).
    scan: run the blocks as one `lax.scan`; False unrolls them (debugging: one name per block in a profile; faster on a CPU).
    remat: what the backward pass keeps of a block, one of REMAT_POLICIES.
    compat: "open-sora" scales positions by the size of the *first* sample of the batch, as the originals do; by default
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
    for field, allowed in (
      ("dtype", COMPUTE_DTYPES),
      ("remat", tuple(REMAT_POLICIES)),
      ("attention", IMPLEMENTATIONS),
      ("compat", COMPAT),
    ):
      if getattr(self, field) not in allowed:
        raise ValueError(f"{name}: {field} is {getattr(self, field)!r}; allowed: {', '.join(map(str, allowed))}")
    if self.patch_size[0] != 1:
      raise ValueError(f"{name}: patch_size {self.patch_size}: patches of one latent frame only, as in all released models")

  @property
  def head_dim(self):
    return self.hidden_size // self.num_heads

  @property
  def patch_positions(self):
    return math.prod(self.patch_size)

  @property
  def patch_values(self):
    """P: values of one input token."""
    return self.patch_positions * self.in_channels

  @property
  def out_channels(self):
    return self.in_channels * (2 if self.pred_sigma else 1)


# ------------------------------------------------------------------------------------------------------------------ embed


def pad_frames(layout: Layout | None, tokens: Tokens, valid: Valid | None, x_mask: FrameMask | None) -> tuple:
  """Zeroes padding, and adds frames of padding if the layout splits tokens and the frames do not divide.

  Args:
    tokens: `[B, T, S, P]`; valid: bool of the same shape or None; x_mask: `[B, T]` or None.

  Returns:
    (tokens, token_valid `[B, T, S]` or None, x_mask)

  Raises:
    ValueError: the tokens of a frame do not divide.
  """
  token_valid = None
  if valid is not None:
    tokens, token_valid = jnp.where(valid, tokens, 0), valid.any(-1)
  parts = 1 if layout is None else layout.token_parts
  if tokens.shape[2] % parts:
    raise ValueError(f"{tokens.shape[2]} tokens per frame do not divide by the {parts} devices of mesh axis 'sequence'")
  if extra := -tokens.shape[1] % parts:
    if token_valid is None:
      token_valid = jnp.ones(tokens.shape[:3], bool)
    tokens, token_valid, x_mask = jax.tree.map(
      lambda x: jnp.pad(x, [(0, extra if axis == 1 else 0) for axis in range(x.ndim)]), (tokens, token_valid, x_mask)
    )
  return constrain(tokens, layout, *OVER_TIME), token_valid, x_mask


def embed_patches(config, layout: Layout | None, tokens: Tokens, kernel_init=None) -> Features:
  """`[B, T, S, P] -> [B, T, S, D]`; the originals' Conv3d, whose bias has PyTorch's default initialisation."""
  linear = Linear(
    (config.hidden_size,), kernel_init=kernel_init, bias_init=torch_uniform(config.patch_values), dtype=DTYPES[config.dtype],
    layout=layout, axes=OVER_TIME[:3], name="patch_embed",
  )  # fmt: skip
  return linear(tokens)


def spatial_positions(grid: Integer[ArrayLike, "B 3"], num_tokens: int, scale: PerSample, base: bool = True) -> tuple:
  """Row and column coordinates `[B, S]` of every token in the units of the position embedding, float32.

  Open-Sora 1.1 and 1.2, `PositionEmbedding2D`: index / scale * base / side with base = round(sqrt(rows * columns)) (half to
  even), so that every grid spans about the same range. Tokens past the sample's own grid get coordinates that nobody reads.

  Args:
    grid: `[B, 3]` token grid (T, rows, columns) of every sample.
    num_tokens: S.
    scale: `[B]`; 1.0 keeps the plain index (with `base=False`, STDiT 1.0: index / space_scale).
  """
  rows, columns = (grid[:, i, None].astype(jnp.float32) for i in (1, 2))
  index = jnp.arange(num_tokens, dtype=jnp.int32)
  row = (index // grid[:, 2, None]).astype(jnp.float32) / scale[:, None]
  column = (index % grid[:, 2, None]).astype(jnp.float32) / scale[:, None]
  if not base:
    return row, column
  base_size = jnp.round(jnp.sqrt(rows * columns))
  return row * (base_size / rows), column * (base_size / columns)


def embed_positions(config, row: Float[Array, "B S"], column: Float[Array, "B S"]) -> Float[Array, "B S D"]:
  """Coordinates `[B, S]` -> `[B, S, D]`: the first half of the channels encodes the column, the second half the row."""
  half = config.hidden_size // 2
  return jnp.concatenate([interleaved_sin_cos(column, half), interleaved_sin_cos(row, half)], axis=-1)


def scaled_positions(config, sizes: Sizes, num_tokens: int) -> Float[Array, "B S D"]:
  """Position embedding `[B, S, D]` of STDiT-2 and 3, scaled by the size of the frames in pixels."""
  height, width = sizes["height"], sizes["width"]
  if config.compat:
    height, width = (jnp.broadcast_to(side[0], side.shape) for side in (height, width))
  scale = jnp.sqrt(height.astype(jnp.float32) * width.astype(jnp.float32)) / config.input_sq_size
  return embed_positions(config, *spatial_positions(sizes["grid"], num_tokens, scale))


def scalar_embedder(config, layout, name, features=None, fc1_init=None, fc2_init=None):
  """-> `[B] -> [B, features]`: an MLP over the sinusoid of a timestep, frame rate, length or size."""
  features = features or config.hidden_size
  mlp = Mlp(features, features, "silu", fc1_init, fc2_init, DTYPES[config.dtype], layout, name=name)
  return lambda values: mlp(sinusoid(values))


def null_caption(module: nn.Module) -> Float[ArrayLike, "L C"]:
  """The fixed null caption `[L, C]`, which `module` stores and never trains."""
  shape = (module.config.model_max_length, module.config.caption_channels)
  init = lambda: nn.initializers.normal(shape[1] ** -0.5)(module.make_rng("params"), shape)  # noqa: E731
  return module.variable("constants", "null_caption", init).value


def embed_caption(config, layout: Layout | None, text: Float[ArrayLike, "B L C"], init=None) -> Float[Array, "B L D"]:
  """Text features `[B, L, C] -> [B, L, D]`."""
  mlp = Mlp(
    config.hidden_size, config.hidden_size, fc1_init=init, fc2_init=init, dtype=DTYPES[config.dtype], layout=layout,
    name="caption_embed",
  )  # fmt: skip
  return mlp(text)


# ----------------------------------------------------------------------------------------------------------------- blocks


def modulation_vectors(config, layout, name, rows, embeddings, init=None):
  """SiLU, then a linear layer to `rows * D`, for the noised and (None without x_mask) the clean embedding `[B, D]`."""
  features, dtype = (rows * config.hidden_size,), DTYPES[config.dtype]
  linear = Linear(features, kernel_init=init, dtype=dtype, layout=layout, name=name)
  return [None if e is None else linear(nn.silu(e)) for e in embeddings]


def modulation_table(module: nn.Module, name: str, rows: int, features: int) -> Float[ArrayLike, "rows D"]:
  """A learned `[rows, features]` table, initialised N(0, 1) / sqrt(features)."""
  return module.param(name, nn.initializers.normal(features**-0.5), (rows, features))


def modulation_rows(table: Float[ArrayLike, "rows D"], noised, clean=None, x_mask: FrameMask | None = None) -> list[Array]:
  """Shift, scale and gate rows of one block, a list of `[B, T or 1, 1, D]`.

  As the originals' `t_mask_select`: frames to generate take the modulation of their timestep, clean frames that of timestep 0.

  Args:
    table: `[rows, D]`; noised, clean: `[B, rows * D]`, clean None without x_mask `[B, T]`.
  """
  rows, features = table.shape

  def add(m):
    return table.astype(m.dtype) + m.reshape(-1, rows, features)

  if clean is None:
    chosen = add(noised)[:, None]
  else:
    chosen = jnp.where(x_mask[:, :, None, None], add(noised)[:, None], add(clean)[:, None])
  return [chosen[:, :, i, None, :] for i in range(rows)]


def block_mlp(config, layout, axes, out_init=None):
  """The MLP of a block, its hidden side split over `tensor`."""
  hidden, dtype = int(config.hidden_size * config.mlp_ratio), DTYPES[config.dtype]
  return Mlp(hidden, config.hidden_size, fc2_init=out_init, dtype=dtype, layout=layout, axes=axes[:3], tensor=True, name="mlp")


class FinalLayer(nn.Module):
  """Norm, modulation from a 2-row table plus the timestep embedding, linear to `patch positions * out channels`."""

  config: STDiTConfig
  layout: Layout | None = None
  kernel_init: nn.initializers.Initializer | None = None

  @nn.compact
  def __call__(self, x: Features, noised: Embedding, clean: Embedding | None, x_mask: FrameMask | None):
    """x `[B, T, S, D]`, noised and clean embeddings `[B, D]` (clean: None without x_mask) -> `[B, T, S, P_out]`."""
    cfg = self.config
    table = modulation_table(self, "modulation", 2, cfg.hidden_size).astype(x.dtype)
    out = modulate(layer_norm(x), *(table[i] + noised[:, None, None] for i in (0, 1)))
    if x_mask is not None:
      # as Open-Sora 1.1 and 1.2: the clean branch starts from the already modulated tensor, so norm and modulation act
      # twice. Neither loss nor sampler reads these frames; parity of masked outputs needs it.
      twice = modulate(layer_norm(out), *(table[i] + clean[:, None, None] for i in (0, 1)))
      out = jnp.where(x_mask[:, :, None, None], out, twice)
    linear = Linear(
      (cfg.patch_positions * cfg.out_channels,), kernel_init=self.kernel_init, dtype=DTYPES[cfg.dtype], layout=self.layout,
      axes=OVER_TIME[:3], name="linear",
    )  # fmt: skip
    return linear(out)


def finish(module, x, frames, cached, reuse):
  """The model's result: float32, without padding frames; with `reuse` also the cached outputs, where they belong."""
  layout = module.layout
  padded = x.shape[:3]
  x = constrain(x.astype(jnp.float32)[:, :frames], layout, *OVER_TIME)
  if reuse is None:
    return x
  specs = module.cache_specs(reuse.cache, *padded)
  return x, jax.tree.map(lambda spec, array: constrain(array, layout, *spec.axes), specs, cached)


# ----------------------------------------------------------------------------------------------------------------- record


def cache_specs(module, blocks, cache, batch, frames, space):
  """What calls of `module` on `[batch, frames, space]` tokens keep for each other; `blocks` as in `step_cache.cache_specs`."""
  config, layout = module.config, module.layout
  frames += -frames % (1 if layout is None else layout.token_parts)
  shape = batch, frames, space, config.hidden_size
  return step_cache.cache_specs(cache, shape, DTYPES[config.dtype], blocks, config.depth, OVER_TIME)


def cond(config, rows: int) -> dict:
  """`Family.cond`: text features and which of them are valid."""
  length = rows, config.model_max_length
  return {
    "text": jax.ShapeDtypeStruct((*length, config.caption_channels), jnp.float32),
    "text_mask": jax.ShapeDtypeStruct(length, jnp.bool_),
  }


def null(config, constants: dict, cond: Cond) -> dict:
  """`Family.null`: the null caption, cut to the length of the text; its mask is that of the caption, as in the originals."""
  text = cond["text"]
  null_text = constants["null_caption"][: text.shape[1]].astype(text.dtype)
  return {**cond, "text": jnp.broadcast_to(null_text, text.shape)}


def forward_flops(config, frames: int, space: int, blocks: list[tuple[int, ...]]) -> int:
  """FLOPs of a forward pass over one sample of `frames * space` tokens.

  Args:
    blocks: for each block of a layer the tokens that its self attentions span.
  """
  width, tokens, text = config.hidden_size, frames * space, config.model_max_length
  rest = flops.cross_attention(config, tokens, text) + flops.mlp(config, tokens)
  layer = sum(rest + sum(flops.self_attention(config, tokens, span) for span in spans) for spans in blocks)
  patches = 2 * tokens * width * (config.patch_values + config.patch_positions * config.out_channels)
  caption = 2 * text * (config.caption_channels + width) * width
  embeddings = 2 * 2 * (256 + width) * width + 12 * width**2  # timestep and fps, modulation
  return config.depth * layer + patches + caption + embeddings
