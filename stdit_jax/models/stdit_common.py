"""Parts that the three STDiTs share: configuration, embeddings, modulation, final layer, values of some `Family` fields."""

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
from stdit_jax.models.family import token_values
from stdit_jax.models.layers import DTYPES, OVER_SPACE, OVER_TIME, Linear, Mlp, interleaved_sin_cos, layer_norm, modulate
from stdit_jax.models.stack import REMAT_POLICIES
from stdit_jax.parallel.attention import IMPLEMENTATIONS
from stdit_jax.parallel.shardings import BLOCK_RULES, ArraySpec, Layout, constrain

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
    scan, remat: `scan` and `policy` of `stack.run_layers`. Without `scan`, a profile shows each layer's own instructions.
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
    for divisor, why in ((self.num_heads, f"num_heads={self.num_heads}"), (4, "4 (position embedding)")):
      if self.hidden_size % divisor:
        raise ValueError(f"{name}: hidden_size is {self.hidden_size}; allowed: multiples of {why}")
    if self.head_dim % 2:
      raise ValueError(f"{name}: hidden_size / num_heads is {self.head_dim}, but rotary embedding needs an even number")
    fields.check_choices(
      self, name, dtype=layers.COMPUTE_DTYPES, remat=REMAT_POLICIES, attention=IMPLEMENTATIONS, compat=COMPAT
    )
    if self.patch_size[0] != 1:
      raise ValueError(f"{name}: patch_size is {self.patch_size}; the first number must be 1, as in all released models")

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_heads

  @property
  def patch_positions(self) -> int:
    return math.prod(self.patch_size)

  @property
  def out_channels(self) -> int:
    return self.in_channels * (2 if self.pred_sigma else 1)

  @property
  def kinds(self) -> dict[str, dict]:
    """{parameter name of a block: {kind of attention: axes of its output}}, for the blocks of one layer."""
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


class Part(nn.Module):
  """A denoiser or a part of it. `how` holds the keyword arguments (dtype, layout) that all of its layers take."""

  config: STDiTConfig
  layout: Layout | None = None

  @property
  def how(self) -> dict[str, Any]:
    return {"dtype": DTYPES[self.config.dtype], "layout": self.layout}


class Block(Part):
  """Base class of all blocks, `(tokens, Conditions, layer number, call) -> tokens`. `call` runs or reuses an attention."""

  def self_attention(self, axis: str, name: str = "attention", **options) -> layers.SelfAttention:
    cfg = self.config
    return layers.SelfAttention(cfg.num_heads, axis, implementation=cfg.attention, name=name, **self.how, **options)

  def cross_attention(self, axes: tuple = OVER_TIME, out_init: Init = zeros) -> layers.CrossAttention:
    cfg = self.config
    return layers.CrossAttention(cfg.num_heads, out_init, cfg.attention, axes=axes, name="cross_attention", **self.how)

  def block_mlp(self, axes: tuple = OVER_TIME, out_init: Init = None) -> Mlp:
    """The MLP, its hidden side split over `tensor`."""
    width = self.config.hidden_size
    hidden = int(width * self.config.mlp_ratio)
    return Mlp(hidden, width, fc2_init=out_init, axes=axes[:3], tensor=True, name="mlp", **self.how)

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


class STDiT(Part):
  """Parts of all models; every model has its own `__call__`."""

  def pad_frames(self, tokens: Tokens, valid: Valid | None, x_mask: FrameMask | None) -> tuple:
    """Zeroes padding. If the layout splits tokens, pads frames to a multiple of the number of devices that split them.

    Returns (tokens, token_valid `[B, T, S]` or None, x_mask). Raises ValueError if the tokens of a frame are no such multiple.
    """
    token_valid = None
    if valid is not None:
      tokens, token_valid = jnp.where(valid, tokens, 0), valid.any(-1)
    parts = 1 if self.layout is None else self.layout.token_parts
    if tokens.shape[2] % parts:
      raise ValueError(f"{tokens.shape[2]} tokens per frame; mesh axis 'sequence' allows multiples of its {parts} devices")
    if tokens.shape[1] % parts:
      token_valid = jnp.ones(tokens.shape[:3], bool) if token_valid is None else token_valid
      tokens, token_valid, x_mask = jax.tree.map(lambda x: layers.pad(x, 1, parts), (tokens, token_valid, x_mask))
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
    width, bias_init = self.config.hidden_size, layers.torch_uniform(token_values(self.config))
    return Linear((width,), None, init, bias_init, axes=OVER_TIME[:3], name="patch_embed", **self.how)(tokens)

  def scalar_embedder(self, name: str, features: int | None = None, fc1_init: Init = None, fc2_init: Init = None) -> Callable:
    """Returns a function `[B] -> [B, features]`: an MLP over the sinusoid of a timestep, frame rate, length or size."""
    features = features or self.config.hidden_size
    mlp = Mlp(features, features, "silu", fc1_init, fc2_init, name=name, **self.how)
    return lambda values: mlp(layers.sinusoid(values))

  def embed_caption(self, text: Float[ArrayLike, "B L C"], init: Init = None) -> Float[Array, "B L D"]:
    """Text features `[B, L, C] -> [B, L, D]`.

    Also creates the constant `null_caption` `[L, C]`, which never trains. `null` replaces dropped captions by it.
    """
    cfg = self.config
    shape = (cfg.model_max_length, cfg.caption_channels)
    self.variable("constants", "null_caption", lambda: nn.initializers.normal(shape[1] ** -0.5)(self.make_rng("params"), shape))
    return Mlp(cfg.hidden_size, cfg.hidden_size, fc1_init=init, fc2_init=init, name="caption_embed", **self.how)(text)

  def rope(self) -> Float[ArrayLike, " half"]:
    frequencies = layers.even_frequencies(self.config.head_dim)
    return self.variable("constants", "rope_frequencies", jnp.asarray, frequencies).value

  def modulation_vectors(self, name: str, rows: int, embeddings: Sequence, init: Init = None) -> list:
    """SiLU and a linear layer, `[B, D] -> [B, rows * D]`, of (noised, clean) embeddings. The clean one may be None."""
    linear = Linear((rows * self.config.hidden_size,), kernel_init=init, name=name, **self.how)
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
    """Specs (`ArraySpec`) of the cache arrays for model calls on tokens `[batch, frames, space, P]`."""
    cfg, dtype = self.config, DTYPES[self.config.dtype]
    frames += -frames % (1 if self.layout is None else self.layout.token_parts)
    shape = batch, frames, space, cfg.hidden_size
    if isinstance(cache, step_cache.ResidualCache):
      arrays = {"first": ArraySpec(shape, jnp.float32, OVER_TIME), "others": ArraySpec(shape, dtype, OVER_TIME)}
      return arrays | {"computed": ArraySpec((), jnp.int32, ())}
    spec = lambda axes: ArraySpec((cfg.depth, *shape), dtype, (None, *axes))  # noqa: E731
    return {name: {kind: spec(axes) for kind, axes in kinds.items()} for name, kinds in cfg.kinds.items()}


def embed_positions(
  width: int, grid: Integer[ArrayLike, "B 3"], num_tokens: int, scale: PerSample, base: bool = True
) -> Float[Array, "B S D"]:
  """Embedding of the row and the column of every token: the first half of the channels encodes the column, the second the row.

  Positions are index / scale * base / side, with base = round(sqrt(rows * columns)), half to even (`PositionEmbedding2D` of
  Open-Sora). Every grid then spans about the same range. Nothing reads the embedding of tokens past the sample's own grid.
  `base=False` leaves out the factor base / side (STDiT 1.0). `grid` is the token grid (T, rows, columns) of every sample.
  """
  rows, columns = (grid[:, i, None].astype(jnp.float32) for i in (1, 2))
  index = jnp.arange(num_tokens, dtype=jnp.int32)
  row = (index // grid[:, 2, None]).astype(jnp.float32) / scale[:, None]  # [B, S]
  column = (index % grid[:, 2, None]).astype(jnp.float32) / scale[:, None]  # [B, S]
  if base:
    base_size = jnp.round(jnp.sqrt(rows * columns))
    row, column = row * (base_size / rows), column * (base_size / columns)
  return jnp.concatenate([interleaved_sin_cos(side, width // 2) for side in (column, row)], axis=-1)


class FinalLayer(Part):
  """Norm, modulation from a 2-row table plus the timestep embedding, linear to `patch positions * out channels`."""

  kernel_init: nn.initializers.Initializer | None = None

  @nn.compact
  def __call__(self, x: Features, noised: Embedding, clean: Embedding | None = None, x_mask: FrameMask | None = None) -> Array:
    table = modulation_table(self, "modulation", 2).astype(x.dtype)
    out = modulate(layer_norm(x), *(table[i] + noised[:, None, None] for i in (0, 1)))
    if x_mask is not None and clean is not None:
      # as Open-Sora 1.1 and 1.2: the clean branch starts from the already modulated tensor, so norm and modulation act
      # twice. Loss and sampler ignore clean frames. Only the comparison with the original's masked outputs needs this step.
      twice = modulate(layer_norm(out), *(table[i] + clean[:, None, None] for i in (0, 1)))
      out = jnp.where(x_mask[:, :, None, None], out, twice)
    features = (self.config.patch_positions * self.config.out_channels,)
    return Linear(features, kernel_init=self.kernel_init, axes=OVER_TIME[:3], name="linear", **self.how)(out)


def cond(config: Any, rows: int) -> dict:
  """`Family.cond`: text features, in the dtype of the model, and which of them are valid."""
  length = rows, config.model_max_length
  return {
    "text": jax.ShapeDtypeStruct((*length, config.caption_channels), DTYPES[config.dtype]),
    "text_mask": jax.ShapeDtypeStruct(length, jnp.bool_),
  }


def null(config: Any, constants: dict, cond: Cond) -> dict:
  """`Family.null`: the null caption, cut to the length of the text. The mask stays the caption's, as in the originals."""
  text = cond["text"]
  null_text = constants["null_caption"][: text.shape[1]].astype(text.dtype)
  return {**cond, "text": jnp.broadcast_to(null_text, text.shape)}


def forward_flops(config: Any, frames: int, space: int) -> int:
  """`Family.flops`: FLOPs of a forward pass over one sample of `frames * space` tokens."""
  width, tokens, text = config.hidden_size, frames * space, config.model_max_length
  rest = flops.cross_attention(config, tokens, text) + flops.mlp(config, tokens)
  own = {kind: flops.self_attention(config, tokens, span) for kind, span in (("space", space), ("time", frames))}
  layer = sum(rest + sum(own.get(kind, 0) for kind in kinds) for kinds in config.kinds.values())
  patches = 2 * tokens * width * (token_values(config) + config.patch_positions * config.out_channels)
  caption = 2 * text * (config.caption_channels + width) * width
  embeddings = 2 * 2 * (256 + width) * width + 12 * width**2  # timestep and fps, modulation
  return config.depth * layer + patches + caption + embeddings


# Fields that the records of all three have in common.
RECORD: dict[str, Any] = dict(
  condition="captions", cond=cond, null=null, rules=RULES, flops=forward_flops, layouts=("open-sora", "native"),
  resizable=("null_caption",),
)  # fmt: skip
