"""STDiT (Open-Sora 1.0), STDiT-2 (1.1) and STDiT-3 (1.2): spatial-temporal diffusion transformers over tokens.

Each model is a pure function of `{"params", "constants"}` and tokens; facts and formulas: Open-Sora tags v1.0.0
(`stdit.py`), v1.1.0 (`stdit2.py`) and v1.2.0 (`stdit3.py`). Every sample carries its own token grid, so that aspect ratios
mix in one batch; padding tokens never reach a valid one. The models read top to bottom in the order in which data flows:
embed -> blocks -> final layer.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from data.tokens import grid_size, patchify, unpatchify
from stdit_jax import fields
from stdit_jax.models import step_cache
from stdit_jax.models.layers import (
  COMPUTE_DTYPES,
  DTYPES,
  OVER_SPACE,
  OVER_TIME,
  REMAT_POLICIES,
  CrossAttention,
  Linear,
  Mlp,
  SelfAttention,
  interleaved_sin_cos,
  layer_norm,
  modulate,
  rope_frequencies,
  run_layers,
  sinusoid,
  torch_uniform,
)
from stdit_jax.parallel.attention import IMPLEMENTATIONS
from stdit_jax.parallel.shardings import Layout, constrain, gather_layer

COMPAT = (None, "open-sora")


@dataclasses.dataclass(frozen=True)
class STDiTConfig:
  """What all three models share. Sizes are those of the originals' constructors.

  Attributes:
    input_sq_size: side in pixels at which the spatial position embedding has unit scale (STDiT-2/3).
    pred_sigma: predict C more channels (the variance of IDDPM; ignored by rectified flow).
    scan: run the blocks as one `lax.scan`; False unrolls them (debugging: one name per block in a profile; faster on a CPU).
    remat: what the backward pass keeps of a block, one of REMAT_POLICIES.
    compat: "open-sora" scales positions by the size of the *first* sample of the batch, as the originals do; by default
      every sample has its own.
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
    return self.patch_size[0] * self.patch_size[1] * self.patch_size[2]

  @property
  def patch_values(self):
    """P: values of one input token."""
    return self.patch_positions * self.in_channels

  @property
  def out_channels(self):
    return self.in_channels * (2 if self.pred_sigma else 1)


@dataclasses.dataclass(frozen=True)
class STDiT1Config(STDiTConfig):
  """Open-Sora 1.0. `input_size` (T, H, W) of the latents is only needed to write the fixed position tables of a checkpoint."""

  model_max_length: int = 120
  qk_norm: bool = False
  input_size: tuple[int, int, int] = (16, 32, 32)
  space_scale: float = 0.5
  time_scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class STDiT2Config(STDiTConfig):
  """Open-Sora 1.1. `qk_norm_legacy`: rotate, then norm, as 1.1 trained it; False is STDiT-2 as built by 1.2's code.

  `fps_condition`: False leaves out the embedding of the frame rate, as 1.1 began.
  """

  model_max_length: int = 200
  qk_norm_legacy: bool = True
  fps_condition: bool = True

  def __post_init__(self):
    super().__post_init__()
    if self.hidden_size % 3:
      raise ValueError(f"STDiT2Config: hidden_size {self.hidden_size} does not divide by 3 (size and aspect embedders)")


@dataclasses.dataclass(frozen=True)
class STDiT3Config(STDiTConfig):
  """Open-Sora 1.2. Its adaptation began as PixArt: without embedding the frame rate (`fps_condition`) and, on images only,
  without attention over time (`temporal_blocks`; clips are then frames that know nothing of each other).

  `frame_positions`, which the original does not have, adds a sinusoid of the frame's number to the tokens, as Open-Sora 1.0's
  blocks do. Rotary positions say how far frames are apart; which one is the first they do not say, so that from noise alone no
  frame can know whether something that moves to the right is still left or already right."""

  fps_condition: bool = True
  temporal_blocks: bool = True
  frame_positions: bool = False


class Modulation:
  """Shift, scale and gate rows of one block, `[B, T or 1, 1, D]` each, chosen per frame by x_mask.

  As the originals' `t_mask_select`: frames to generate take the timestep's modulation, clean frames that of timestep 0.
  """

  def __init__(self, table, noised, clean, x_mask):
    rows, features = table.shape

    def add(m):
      return table.astype(m.dtype) + m.reshape(-1, rows, features)

    if clean is None:
      chosen = add(noised)[:, None]
    else:
      chosen = jnp.where(x_mask[:, :, None, None], add(noised)[:, None], add(clean)[:, None])
    self.rows = [chosen[:, :, i, None, :] for i in range(rows)]

  def __iter__(self):
    return iter(self.rows)


def modulation_table(module, name, rows, features):
  """A learned `[rows, features]` table, initialised N(0, 1) / sqrt(features)."""
  return module.param(name, nn.initializers.normal(features**-0.5), (rows, features))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Conditions:
  """What every block sees beside the tokens. A pytree, closed over by the scan.

  Attributes: text `[B, L, D]`, text_mask `[B, L]`, token_valid `[B, T, S]` or None, x_mask `[B, T]` or None; modulation
  `[B, 6D]`, clean modulation (timestep 0) or None; the same for the temporal branch of STDiT-2 `[B, 3D]`; rope
  frequencies `[head_dim / 2]`; time_embedding `[T, D]` (STDiT 1.0).
  """

  text: jax.Array
  text_mask: jax.Array | None
  token_valid: jax.Array | None
  x_mask: jax.Array | None
  modulation: jax.Array
  clean_modulation: jax.Array | None
  temporal_modulation: jax.Array | None = None
  clean_temporal_modulation: jax.Array | None = None
  rope: jax.Array | None = None
  time_embedding: jax.Array | None = None


zeros = nn.initializers.zeros


def block_mlp(config, layout, axes, out_init=None):
  """The MLP of a block, its hidden side split over `tensor`."""
  hidden, dtype = int(config.hidden_size * config.mlp_ratio), DTYPES[config.dtype]
  return Mlp(hidden, config.hidden_size, fc2_init=out_init, dtype=dtype, layout=layout, axes=axes[:3], tensor=True, name="mlp")


class STDiT1Block(nn.Module):
  """Block of Open-Sora 1.0: one modulation table, no norms in attention.

  `keep` of all blocks calls their attention (`models.step_cache`); `kinds`: how each kind's output lies on a mesh.
  """

  config: STDiT1Config
  layout: Layout | None = None

  @property
  def kinds(self):
    return {"space": OVER_SPACE, "time": OVER_TIME, "cross": OVER_TIME}

  @nn.compact
  def __call__(self, x, c, is_first, keep=step_cache.compute):
    cfg, dtype, layout = self.config, DTYPES[self.config.dtype], self.layout
    attention = functools.partial(SelfAttention, cfg.num_heads, implementation=cfg.attention, dtype=dtype, layout=layout)
    cross = CrossAttention(cfg.num_heads, zeros, cfg.attention, dtype, layout, OVER_TIME, name="cross_attention")
    x = constrain(x, layout, *OVER_SPACE)
    table = modulation_table(self, "modulation", 6, cfg.hidden_size)
    shift1, scale1, gate1, shift2, scale2, gate2 = Modulation(table, c.modulation, None, None)
    spatial = attention("space", name="attention")
    x = x + gate1 * keep("space", spatial, modulate(layer_norm(x), shift1, scale1), c.token_valid)
    # as Open-Sora 1.0: the temporal branch is neither normalised nor modulated, reuses the spatial gate, and sees the
    # temporal position table in the first block only, outside the residual stream.
    x = constrain(x, layout, *OVER_TIME)
    positioned = x + jnp.where(is_first, c.time_embedding, 0).astype(x.dtype)[:, None]
    temporal = attention("time", out_init=zeros, name="temporal_attention")
    x = x + gate1 * keep("time", temporal, positioned, c.token_valid)
    x = x + keep("cross", cross, x, c.text, c.text_mask)
    mlp = block_mlp(cfg, layout, OVER_TIME)
    return x + gate2 * mlp(modulate(layer_norm(x), shift2, scale2))


class STDiT2Block(nn.Module):
  """Block of Open-Sora 1.1: spatial and temporal attention with a modulation each, cross attention, MLP."""

  config: STDiT2Config
  layout: Layout | None = None
  kinds = STDiT1Block.kinds  # the same three

  @nn.compact
  def __call__(self, x, c, is_first, keep=step_cache.compute):
    cfg, dtype, layout = self.config, DTYPES[self.config.dtype], self.layout
    attention = functools.partial(
      SelfAttention, cfg.num_heads, qk_norm=cfg.qk_norm, implementation=cfg.attention, dtype=dtype, layout=layout
    )
    cross = CrossAttention(cfg.num_heads, zeros, cfg.attention, dtype, layout, OVER_TIME, name="cross_attention")
    table = modulation_table(self, "modulation", 6, cfg.hidden_size)
    shift1, scale1, gate1, shift2, scale2, gate2 = Modulation(table, c.modulation, c.clean_modulation, c.x_mask)
    table = modulation_table(self, "temporal_modulation", 3, cfg.hidden_size)
    shift_t, scale_t, gate_t = Modulation(table, c.temporal_modulation, c.clean_temporal_modulation, c.x_mask)

    x = constrain(x, layout, *OVER_SPACE)
    spatial = attention("space", name="attention")
    x = x + gate1 * keep("space", spatial, modulate(layer_norm(x), shift1, scale1), c.token_valid)
    x = constrain(x, layout, *OVER_TIME)
    temporal = attention("time", rope_first=cfg.qk_norm_legacy, out_init=zeros, name="temporal_attention")
    x = x + gate_t * keep("time", temporal, modulate(layer_norm(x), shift_t, scale_t), c.token_valid, c.rope)
    x = x + keep("cross", cross, x, c.text, c.text_mask)
    mlp = block_mlp(cfg, layout, OVER_TIME)
    return x + gate2 * mlp(modulate(layer_norm(x), shift2, scale2))


class STDiT3Block(nn.Module):
  """Block of Open-Sora 1.2: attention over space, or over time with rotary embedding; then cross attention and MLP.

  Temporal blocks start as the identity: their three output projections are zero.
  """

  config: STDiT3Config
  axis: str
  layout: Layout | None = None

  @property
  def kinds(self):
    axes = OVER_SPACE if self.axis == "space" else OVER_TIME
    return {self.axis: axes, "cross": axes}

  @nn.compact
  def __call__(self, x, c, is_first, keep=step_cache.compute):
    cfg, dtype, layout = self.config, DTYPES[self.config.dtype], self.layout
    out_init = zeros if self.axis == "time" else None
    table = modulation_table(self, "modulation", 6, cfg.hidden_size)
    shift1, scale1, gate1, shift2, scale2, gate2 = Modulation(table, c.modulation, c.clean_modulation, c.x_mask)

    axes = self.kinds[self.axis]
    x = constrain(x, layout, *axes)
    attention = SelfAttention(
      cfg.num_heads, self.axis, cfg.qk_norm, False, out_init, cfg.attention, dtype, layout, name="attention"
    )
    rope = c.rope if self.axis == "time" else None
    x = x + gate1 * keep(self.axis, attention, modulate(layer_norm(x), shift1, scale1), c.token_valid, rope)
    cross = CrossAttention(cfg.num_heads, out_init, cfg.attention, dtype, layout, axes, name="cross_attention")
    x = x + keep("cross", cross, x, c.text, c.text_mask)
    mlp = block_mlp(cfg, layout, axes, out_init)
    return x + gate2 * mlp(modulate(layer_norm(x), shift2, scale2))


class FinalLayer(nn.Module):
  """Norm, modulation from a 2-row table plus the timestep embedding, linear to `patch positions * out channels`."""

  config: STDiTConfig
  layout: Layout | None = None

  @nn.compact
  def __call__(self, x, noised, clean, x_mask):
    """x `[B, T, S, D]`, noised and clean embeddings `[B, D]` (clean: None without x_mask) -> `[B, T, S, P_out]`."""
    cfg = self.config
    table = modulation_table(self, "modulation", 2, cfg.hidden_size).astype(x.dtype)
    out = modulate(layer_norm(x), *(table[i] + noised[:, None, None] for i in (0, 1)))
    if x_mask is not None:
      # as Open-Sora 1.1 and 1.2: the clean branch starts from the already modulated tensor, so norm and modulation act
      # twice. Neither loss nor sampler reads these frames; parity of masked outputs needs it.
      twice = modulate(layer_norm(out), *(table[i] + clean[:, None, None] for i in (0, 1)))
      out = jnp.where(x_mask[:, :, None, None], out, twice)
    init = None if isinstance(cfg, STDiT3Config) else zeros
    linear = Linear(
      (cfg.patch_positions * cfg.out_channels,), kernel_init=init, dtype=DTYPES[cfg.dtype], layout=self.layout,
      axes=OVER_TIME[:3], name="linear",
    )  # fmt: skip
    return linear(out)


def spatial_positions(grid, num_tokens, scale=None, base=True):
  """Row and column coordinates `[B, S]` of every token in the units of the position embedding, float32.

  Open-Sora 1.1/1.2 `PositionEmbedding2D`: index / scale * base / side with base = round(sqrt(rows * columns)) (half to
  even), so that every grid spans about the same range. Tokens past the sample's own grid get coordinates nobody reads.

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


class STDiT(nn.Module):
  """What the three models share: patch and caption embedding, the stack of blocks, the final layer.

  Attributes:
    config: one of STDiT1Config, STDiT2Config, STDiT3Config.
    layout: how activations lie on the mesh; None on a single device.
  """

  config: STDiTConfig
  layout: Layout | None = None

  @nn.compact
  def __call__(
    self, tokens, t, text, text_mask, *, grid, height=None, width=None, num_frames=None, fps=None,
    aspect_ratio=None, x_mask=None, valid=None, drop_text=None, reuse=None,
  ):  # fmt: skip
    """Predicts noise or velocity (and variance) for every token.

    Args:
      tokens: noisy latents `[B, T, S, P]`, patch values ordered (row, column, channel).
      t: timesteps `[B]`, 0 (clean) to 1000 (noise), need not be whole.
      text: text features `[B, L, caption_channels]`; text_mask: `[B, L]` bool, or None when all tokens count.
      grid: `[B, 3]` int32, token grid (T, rows, columns) of every sample.
      height, width: `[B]` size in pixels (STDiT-2/3); num_frames: `[B]` pixel frames (STDiT-2); fps: `[B]` (STDiT-2/3).
      aspect_ratio: `[B]` (STDiT-2), height / width unless given (1.1 trained with width / height).
      x_mask: `[B, T]` bool, True = frame to generate, False = clean frame; None = generate all (STDiT-2/3).
      valid: `[B, T, S, P]` bool, False for padding; None = everything counts.
      drop_text: `[B]` bool, these samples see the null caption.
      reuse: `step_cache.Reuse`, what to take from an earlier call; None = compute everything.

    Returns:
      float32 `[B, T, S, patch positions * out_channels]`; with `reuse`, and what is kept for the next call. Values at invalid
      elements mean nothing.
    """
    cfg, dtype = self.config, DTYPES[self.config.dtype]
    token_valid = None
    if valid is not None:
      tokens = jnp.where(valid, tokens, 0)
      token_valid = valid.any(-1)
    frames = tokens.shape[1]
    tokens, token_valid, x_mask = self.pad_frames(tokens, token_valid, x_mask)
    tokens = constrain(tokens, self.layout, *OVER_TIME)

    patch_init = None if isinstance(cfg, (STDiT1Config, STDiT2Config)) else torch_uniform(cfg.patch_values)
    x = Linear(
      (cfg.hidden_size,), kernel_init=patch_init, bias_init=torch_uniform(cfg.patch_values), dtype=dtype, layout=self.layout,
      axes=OVER_TIME[:3], name="patch_embed",
    )(tokens)  # fmt: skip
    x = x + self.position_embedding(grid, tokens.shape[2], height, width).astype(dtype)[:, None]
    if getattr(cfg, "frame_positions", False):
      x = x + interleaved_sin_cos(jnp.arange(tokens.shape[1], dtype=jnp.float32), cfg.hidden_size).astype(dtype)[:, None]
    self.sow("intermediates", "tokens_in", x)

    conditions, noised, clean = self.conditions(t, x_mask, height, width, aspect_ratio, num_frames, fps)
    text = self.embed_caption(text, drop_text)
    conditions = dataclasses.replace(conditions, text=text, text_mask=text_mask, token_valid=token_valid)
    conditions = self.add_time(conditions, tokens.shape[1])

    x, kept = self.run_blocks(constrain(x, self.layout, *OVER_TIME), conditions, reuse)
    x = FinalLayer(cfg, self.layout, name="final_layer")(x, noised, clean, x_mask)
    x = constrain(x.astype(jnp.float32)[:, :frames], self.layout, *OVER_TIME)
    if reuse is None:
      return x
    arrays = self.kept_arrays(reuse.cache, *tokens.shape[:3])
    return x, jax.tree.map(lambda part, array: constrain(array, self.layout, *part.axes), arrays, kept)

  def kept_arrays(self, cache, batch, frames, space):
    """What calls on `[batch, frames, space]` tokens keep for each other (`step_cache.kept_arrays`)."""
    frames += -frames % (1 if self.layout is None else self.layout.token_parts)
    shape = batch, frames, space, self.config.hidden_size
    kinds = {name: block.kinds for name, block in self.blocks()}
    return step_cache.kept_arrays(cache, shape, DTYPES[self.config.dtype], kinds, self.config.depth, OVER_TIME)

  def pad_frames(self, tokens, token_valid, x_mask):
    """Adds frames of padding where the layout splits tokens and frames don't divide; refuses positions that don't."""
    parts = 1 if self.layout is None else self.layout.token_parts
    if tokens.shape[2] % parts:
      raise ValueError(f"{tokens.shape[2]} tokens per frame do not divide by the {parts} devices of mesh axis 'sequence'")
    if not (extra := -tokens.shape[1] % parts):
      return tokens, token_valid, x_mask
    if token_valid is None:
      token_valid = jnp.ones(tokens.shape[:3], bool)

    def pad(x):
      return None if x is None else jnp.pad(x, [(0, extra if axis == 1 else 0) for axis in range(x.ndim)])

    return pad(tokens), pad(token_valid), pad(x_mask)

  # What differs between the models.

  def position_embedding(self, grid, num_tokens, height, width):
    """`[B, S, D]`: the first half of the channels encodes the column, the second half the row (Open-Sora 1.1/1.2)."""
    if self.config.compat:
      height, width = (jnp.broadcast_to(side[0], side.shape) for side in (height, width))
    scale = jnp.sqrt(height.astype(jnp.float32) * width.astype(jnp.float32)) / self.config.input_sq_size
    row, column = spatial_positions(grid, num_tokens, scale)
    half = self.config.hidden_size // 2
    embedding = jnp.concatenate([interleaved_sin_cos(column, half), interleaved_sin_cos(row, half)], axis=-1)
    self.sow("intermediates", "pos_emb", embedding)
    return embedding

  def conditions(self, t, x_mask, height, width, aspect_ratio, num_frames, fps):
    """-> (Conditions without text, embedding of noised frames for the final layer, the same for clean frames or None)."""
    raise NotImplementedError

  def add_time(self, conditions, num_frames):
    """Adds what attention over time needs: rotary frequencies, or the position table of 1.0."""
    frequencies = self.variable("constants", "rope_frequencies", rope_frequencies, self.config.head_dim)
    return dataclasses.replace(conditions, rope=frequencies.value)

  def blocks(self):
    """-> list of (name, block module) that make one layer of the stack."""
    raise NotImplementedError

  # What is common.

  def embed_scalar(self, name, features=None, fc1_init=None, fc2_init=None):
    """An MLP over the sinusoid of a number: timestep, fps, frames, sizes."""
    features = features or self.config.hidden_size
    mlp = Mlp(features, features, "silu", fc1_init, fc2_init, DTYPES[self.config.dtype], self.layout, name=name)
    return lambda values: mlp(sinusoid(values))

  def embed_caption(self, text, drop):
    """`[B, L, C]` -> `[B, L, D]`; dropped captions become the fixed null caption, which is stored but never trained."""
    cfg = self.config
    shape = (cfg.model_max_length, cfg.caption_channels)
    null_caption = self.variable(
      "constants", "null_caption", lambda: nn.initializers.normal(shape[1] ** -0.5)(self.make_rng("params"), shape)
    ).value
    if drop is not None:
      text = jnp.where(drop[:, None, None], null_caption[: text.shape[1]].astype(text.dtype), text)
    init = None if isinstance(cfg, STDiT3Config) else nn.initializers.normal(0.02)
    mlp = Mlp(
      cfg.hidden_size, cfg.hidden_size, fc1_init=init, fc2_init=init, dtype=DTYPES[cfg.dtype], layout=self.layout,
      name="caption_embed",
    )  # fmt: skip
    return mlp(text)

  def modulation_vectors(self, name, rows, embeddings):
    """SiLU, then a linear layer to `rows * D`, for the noised and (None without x_mask) the clean embedding."""
    init = None if isinstance(self.config, STDiT3Config) else nn.initializers.normal(0.02)
    features, dtype = (rows * self.config.hidden_size,), DTYPES[self.config.dtype]
    linear = Linear(features, kernel_init=init, dtype=dtype, layout=self.layout, name=name)
    return [None if e is None else linear(nn.silu(e)) for e in embeddings]

  def run_blocks(self, x, conditions, reuse=None):
    """The stack of layers over parameters stacked in depth: one `lax.scan`, or unrolled, with remat by name -> (x, kept)."""
    cfg = self.config
    names, modules = zip(*self.blocks())

    def init(module):
      return lambda key: jax.vmap(lambda k: module.init(k, x, conditions, False)["params"])(jax.random.split(key, cfg.depth))

    stacked = tuple(self.param(name, init(module)) for name, module in zip(names, modules))
    capture = self.is_mutable_collection("intermediates") and not self.is_initializing()
    pyramid = reuse is not None and isinstance(reuse.cache, step_cache.PyramidBroadcast)

    def layer(x, per_layer):
      params, is_first, kept = per_layer
      outputs = {} if pyramid else None
      for name, module, p in zip(names, modules, params):
        p = gather_layer(p, name, self.layout, DTYPES[cfg.dtype])
        if capture and not cfg.scan:
          x, state = module.apply({"params": p}, x, conditions, is_first, capture_intermediates=True, mutable="intermediates")
          self.sow("intermediates", name, state["intermediates"])
        elif pyramid:
          keeper = step_cache.Keeper(kept[name], reuse.computes)
          x, outputs[name] = module.apply({"params": p}, x, conditions, is_first, keeper), keeper.outputs
        else:
          x = module.apply({"params": p}, x, conditions, is_first)
      return constrain(x, self.layout, *OVER_TIME), outputs

    remat = "none" if capture else cfg.remat  # captured values could not leave a checkpointed layer
    layers = stacked, jnp.arange(cfg.depth) == 0
    if reuse is None or pyramid:
      return run_layers(layer, x, (*layers, reuse and reuse.kept), cfg.scan, remat)
    first, others = jax.tree.map(lambda p: p[0], layers), jax.tree.map(lambda p: p[1:], layers)
    run_others = lambda x: run_layers(layer, x, (*others, None), cfg.scan, remat)[0]  # noqa: E731
    run_first = lambda x: layer(x, (*first, None))[0]  # noqa: E731
    return step_cache.residual_layers(run_others, x, run_first, reuse.kept, reuse.cache.threshold)


class STDiT1(STDiT):
  """Open-Sora 1.0: fixed sizes, additive positions, no size conditions, no frame masks."""

  def position_embedding(self, grid, num_tokens, height, width):
    """Coordinates are index / space_scale: 0.5 for 256 pixels, 1.0 for 512."""
    scale = jnp.full((grid.shape[0],), self.config.space_scale, jnp.float32)
    row, column = spatial_positions(grid, num_tokens, scale, base=False)
    half = self.config.hidden_size // 2
    return jnp.concatenate([interleaved_sin_cos(column, half), interleaved_sin_cos(row, half)], axis=-1)

  def conditions(self, t, x_mask, height, width, aspect_ratio, num_frames, fps):
    if x_mask is not None:
      raise ValueError("STDiT (1.0) has no frame masks: x_mask must be None; STDiT2 and STDiT3 have them")
    init = nn.initializers.normal(0.02)
    embedding = self.embed_scalar("timestep_embed", fc1_init=init, fc2_init=init)(t)
    (modulation,) = self.modulation_vectors("timestep_modulation", 6, [embedding])
    return Conditions(None, None, None, None, modulation, None), embedding, None

  def add_time(self, conditions, num_frames):
    return dataclasses.replace(conditions, time_embedding=temporal_position_table(self.config, num_frames))

  def blocks(self):
    return [("blocks", STDiT1Block(self.config, self.layout, parent=None))]


class STDiT2(STDiT):
  """Open-Sora 1.1: any size, conditioned on size, aspect ratio, frames and fps; rotary embedding in time; frame masks."""

  def conditions(self, t, x_mask, height, width, aspect_ratio, num_frames, fps):
    third = self.config.hidden_size // 3
    aspect_ratio = height / width if aspect_ratio is None else aspect_ratio
    embed_size = self.embed_scalar("size_embed", third)
    embed_aspect = self.embed_scalar("aspect_embed", third)
    size = jnp.concatenate([embed_size(height), embed_size(width), embed_aspect(aspect_ratio)], axis=-1)
    length = self.embed_scalar("frames_embed")(num_frames)
    if self.config.fps_condition:
      length = length + self.embed_scalar("fps_embed")(fps)

    init = nn.initializers.normal(0.02)
    embed_t = self.embed_scalar("timestep_embed", fc1_init=init, fc2_init=init)
    noised = embed_t(t)
    clean = None if x_mask is None else embed_t(jnp.zeros_like(t))
    embeddings = noised, clean
    spatial = self.modulation_vectors("timestep_modulation", 6, [e if e is None else e + size for e in embeddings])
    temporal = self.modulation_vectors("temporal_modulation", 3, [e if e is None else e + length for e in embeddings])
    # as Open-Sora 1.1: in the final layer noised frames see the plain timestep, clean frames timestep 0 plus the size.
    final_clean = None if clean is None else clean + size
    return Conditions(None, None, None, x_mask, *spatial, *temporal), noised, final_clean

  def blocks(self):
    return [("blocks", STDiT2Block(self.config, self.layout, parent=None))]


class STDiT3(STDiT):
  """Open-Sora 1.2: separate spatial and temporal blocks, conditioned on fps; any size; frame masks."""

  def conditions(self, t, x_mask, height, width, aspect_ratio, num_frames, fps):
    embed_t = self.embed_scalar("timestep_embed")
    speed = 0.0
    if self.config.fps_condition:
      speed = self.embed_scalar("fps_embed", fc1_init=nn.initializers.normal(0.02), fc2_init=zeros)(fps)
    noised = embed_t(t) + speed
    clean = None if x_mask is None else embed_t(jnp.zeros_like(t)) + speed
    modulation = self.modulation_vectors("timestep_modulation", 6, [noised, clean])
    return Conditions(None, None, None, x_mask, *modulation), noised, clean

  def blocks(self):
    spatial = "spatial_blocks", STDiT3Block(self.config, "space", self.layout, parent=None)
    temporal = "temporal_blocks", STDiT3Block(self.config, "time", self.layout, parent=None)
    return [spatial, temporal] if self.config.temporal_blocks else [spatial]


def temporal_position_table(config, num_frames):
  """`[T, D]` of STDiT 1.0: [sin, cos] of frame / time_scale with D / 2 frequencies 10000^(-2k / D)."""
  return interleaved_sin_cos(jnp.arange(num_frames, dtype=jnp.float32) / config.time_scale, config.hidden_size)


TABLE = {
  "STDiT-XL/2": STDiT1Config(),
  "STDiT2-XL/2": STDiT2Config(),
  "STDiT3-XL/2": STDiT3Config(),
  "STDiT3-3B/2": STDiT3Config(hidden_size=1872, num_heads=26),
  # Small ones: for tests, and for the quick start on two cores.
  "STDiT3-mini/2": STDiT3Config(hidden_size=192, depth=4, num_heads=4, caption_channels=192, model_max_length=120),
  "STDiT3-mini/4": STDiT3Config(
    hidden_size=192, depth=4, num_heads=4, patch_size=(1, 4, 4), caption_channels=192, model_max_length=120
  ),
  "STDiT3-tiny/2": STDiT3Config(hidden_size=96, depth=2, num_heads=4, caption_channels=64, model_max_length=12),
  "STDiT2-tiny/2": STDiT2Config(hidden_size=96, depth=2, num_heads=4, caption_channels=64, model_max_length=12),
  "STDiT-tiny/2": STDiT1Config(
    hidden_size=72, depth=2, num_heads=4, caption_channels=64, model_max_length=12, input_size=(4, 8, 8)
  ),
}


def get_config(name, **overrides):
  """The named configuration with some fields replaced; ValueError names the allowed ones."""
  return fields.replace(fields.choose(TABLE, name, "denoiser"), overrides, f"denoiser {name}")


def build(config, layout=None):
  """The model of a configuration."""
  return {STDiT1Config: STDiT1, STDiT2Config: STDiT2, STDiT3Config: STDiT3}[type(config)](config, layout)


def example_inputs(config, batch=1, frames=1, size=(2, 2)):
  """Smallest inputs with which parameters can be initialised."""
  ones = jnp.ones((batch,), jnp.float32)
  tokens = patchify(jnp.zeros((batch, frames, *size, config.in_channels)), config.patch_size)
  grid = jnp.tile(jnp.asarray(grid_size((frames, *size), config.patch_size), jnp.int32), (batch, 1))
  text = jnp.zeros((batch, config.model_max_length, config.caption_channels))
  args = (tokens, ones, text, jnp.ones(text.shape[:2], bool))
  return args, {"grid": grid, "height": ones, "width": ones, "num_frames": ones, "fps": ones}


def init(config, key):
  """Variables `{"params", "constants"}` with the original initialisation."""
  args, conditions = example_inputs(config)
  return build(config).init(key, *args, **conditions)


@functools.cache
def init_shapes(config):
  """The tree of `init` as shapes: nothing is allocated. Made once per configuration, so not to be changed."""
  return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


def denoise_latents(model, variables, latents, t, text, text_mask=None, **conditions):
  """The model over latents `[B, T, H, W, C]` of one size: pads to the patch as the original pads, crops the output.

  Scalars and masks with fewer rows than the batch are repeated, as the originals do for classifier-free guidance (rows of
  the conditional and the null half share their text mask, so the null caption is cut to the prompt's length).

  Returns:
    float32 `[B, T, H, W, out_channels]`.
  """
  config, batch, size = model.config, latents.shape[0], latents.shape[1:4]

  def repeat(value):
    if value is None:
      return None
    value = jnp.asarray(value)
    return jnp.tile(value, (batch // value.shape[0],) + (1,) * (value.ndim - 1))

  grid = jnp.tile(jnp.asarray(grid_size(size, config.patch_size), jnp.int32), (batch, 1))
  out = model.apply(
    variables,
    patchify(latents, config.patch_size),
    repeat(t),
    text,
    repeat(text_mask),
    grid=grid,
    **{name: repeat(value) for name, value in conditions.items()},
  )
  return unpatchify(out, size, config.patch_size)
