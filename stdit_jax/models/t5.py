"""The T5 v1.1 text encoder: caption tokens -> features, one row per token.

Raffel et al. 2020 and the T5 v1.1 notes: gated GELU, no attention scaling, RMS norms without mean, relative position buckets
shared by all layers. Values equal those of `transformers.T5EncoderModel`. ByT5 and the text encoders of Open-Sora
(`DeepFloyd/t5-v1_1-xxl`) are this model. There is no dropout, since the original runs frozen in eval mode.

Parameters, with the PyTorch names in brackets. Under `blocks` the leading axis is the layer, `i` in the PyTorch names:

  token_embedding [V,D]                    (shared.weight; encoder.embed_tokens.weight is the same tensor)
  relative_bias [buckets,heads]            (encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight)
  blocks.attention_norm.scale [D]          (encoder.block.i.layer.0.layer_norm.weight)
  blocks.attention.{query,key,value}.kernel [D,heads,d]    (encoder.block.i.layer.0.SelfAttention.{q,k,v}.weight [heads*d,D])
  blocks.attention.out.kernel [heads,d,D]  (encoder.block.i.layer.0.SelfAttention.o.weight [D,heads*d])
  blocks.mlp_norm.scale [D]                (encoder.block.i.layer.1.layer_norm.weight)
  blocks.mlp.gate.kernel [D,F]             (encoder.block.i.layer.1.DenseReluDense.wi_0.weight [F,D]; gated only)
  blocks.mlp.up.kernel [D,F]               (....wi_1.weight; wi.weight if not gated)
  blocks.mlp.down.kernel [F,D]             (....wo.weight [D,F])
  final_norm.scale [D]                     (encoder.final_layer_norm.weight)
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key, Shaped

from stdit_jax import fields
from stdit_jax.arrays import ArrayLike
from stdit_jax.models.layers import DTYPES, RMSNorm
from stdit_jax.models.stack import REMAT_POLICIES, run_layers, stacked_params
from stdit_jax.parallel.shardings import BLOCK_RULES, Layout, constrain, gather_layer

FEED_FORWARDS = ("gated-gelu", "relu")
RULES = (*BLOCK_RULES, (r"token_embedding$", P(None, "fsdp")), (r"(relative_bias|final_norm/scale)$", P()))
LAYOUTS = ("t5", "t5-v1.0", "native")  # of checkpoints


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Sizes, named as in Hugging Face's `config.json`.

  Attributes:
    feed_forward_proj: "gated-gelu" (v1.1) or "relu" (v1.0).
    dtype: of the computation; norms, softmax and position bias are float32.
    param_dtype: of the parameters; bfloat16 halves the memory of a frozen XXL.
    relative_bias_std: standard deviation of the initial position biases. None: d_model ** -0.5, as in the original. With a
      larger value, each head initially attends to distances of its own, so an untrained encoder can tell words apart.
    scan, remat: `scan` and `policy` of `stack.run_layers`.
  """

  d_model: int = 4096
  num_layers: int = 24
  num_heads: int = 64
  d_kv: int = 64
  d_ff: int = 10240
  vocab_size: int = 32128
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  layer_norm_epsilon: float = 1e-6
  feed_forward_proj: str = "gated-gelu"
  relative_bias_std: float | None = None
  dtype: str = "float32"
  param_dtype: str = "float32"
  scan: bool = True
  remat: str = "none"

  def __post_init__(self):
    fields.check_choices(
      self, "T5Config", feed_forward_proj=FEED_FORWARDS, dtype=DTYPES, param_dtype=DTYPES, remat=REMAT_POLICIES
    )
    buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
    if buckets < 4 or buckets % 4 or distance <= buckets // 4:
      raise ValueError(
        f"T5Config: relative_attention_num_buckets is {buckets}, relative_attention_max_distance {distance}; buckets must be a "
        "multiple of 4, at least 4, and the distance more than a quarter of the buckets"
      )


class Linear(nn.Module):
  """A matrix product without bias. `equation` is its einsum, `std` the deviation of the normal initialisation."""

  config: T5Config
  equation: str
  shape: tuple[int, ...]
  std: float
  layout: Layout | None = None

  @nn.compact
  def __call__(self, x: ArrayLike) -> Array:
    init = nn.initializers.normal(self.std)
    kernel = self.param("kernel", init, self.shape, DTYPES[self.config.param_dtype])
    y = jnp.einsum(self.equation, x, kernel.astype(DTYPES[self.config.dtype]))
    return constrain(y, self.layout, "batch", *[None] * (y.ndim - 1))


class Attention(nn.Module):
  """Self-attention of `x [B,L,D]` with bias `[heads,L,L]` (float32) and key mask `[B,L]` (bool) or None, without scaling."""

  config: T5Config
  layout: Layout | None = None

  @nn.compact
  def __call__(self, x: ArrayLike, bias: ArrayLike, mask: ArrayLike | None) -> Array:
    c = self.config
    heads, into, out = (c.d_model, c.num_heads, c.d_kv), "bld,dhk->blhk", "blhk,hkd->bld"
    query = Linear(c, into, heads, (c.d_model * c.d_kv) ** -0.5, self.layout, name="query")(x)
    key = Linear(c, into, heads, c.d_model**-0.5, self.layout, name="key")(x)
    value = Linear(c, into, heads, c.d_model**-0.5, self.layout, name="value")(x)
    logits = jnp.einsum("bqhk,bmhk->bhqm", query, key, preferred_element_type=jnp.float32) + bias
    if mask is not None:
      logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    x = jnp.einsum("bhqm,bmhk->bqhk", probabilities, value)
    return Linear(c, out, (*heads[1:], c.d_model), (c.num_heads * c.d_kv) ** -0.5, self.layout, name="out")(x)


class Mlp(nn.Module):
  """down(gelu(gate(x)) * up(x)) in v1.1, down(relu(up(x))) in v1.0."""

  config: T5Config
  layout: Layout | None = None

  @nn.compact
  def __call__(self, x: ArrayLike) -> Array:
    c, shape = self.config, (self.config.d_model, self.config.d_ff)
    h = Linear(c, "bld,df->blf", shape, c.d_model**-0.5, self.layout, name="up")(x)
    if c.feed_forward_proj == "relu":
      h = nn.relu(h)
    else:
      h = h * nn.gelu(Linear(c, "bld,df->blf", shape, c.d_model**-0.5, self.layout, name="gate")(x), approximate=True)
    return Linear(c, "blf,fd->bld", shape[::-1], c.d_ff**-0.5, self.layout, name="down")(h)


class Block(nn.Module):
  """Pre-norm attention and MLP, each with a residual connection."""

  config: T5Config
  layout: Layout | None = None

  @nn.compact
  def __call__(self, x: ArrayLike, bias: ArrayLike, mask: ArrayLike | None) -> Array:
    c = self.config
    norm = functools.partial(RMSNorm, c.layer_norm_epsilon, DTYPES[c.param_dtype])
    x = x + Attention(c, self.layout, name="attention")(norm(name="attention_norm")(x), bias, mask)
    return x + Mlp(c, self.layout, name="mlp")(norm(name="mlp_norm")(x))


def relative_buckets(distance: Int[ArrayLike, "*shape"], num_buckets: int, max_distance: int) -> Int[Array, "*shape"]:
  """The bucket of every distance (key position - query position).

  Half of the buckets are for keys after the query. In each direction the first half of the buckets holds one distance each: 0,
  1, 2, ... The sizes of the others grow by a constant factor up to `max_distance`. Larger distances share the last bucket.
  """
  half = num_buckets // 2
  exact = half // 2
  side = jnp.where(distance > 0, half, 0)  # first bucket of the key's side of the query
  distance = jnp.abs(distance)
  # float32 and truncation as in the original: at whole numbers the rounding decides the bucket.
  steps = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact) * (half - exact)
  far = jnp.minimum(exact + steps.astype(jnp.int32), half - 1)
  return side + jnp.where(distance < exact, distance, far)


def relative_bias(
  table: Float[ArrayLike, "buckets heads"], length: int, max_distance: int
) -> Float[Array, "heads {length} {length}"]:
  """The float32 bias (head, query, key) of a table of position biases.

  All positions of a diagonal share one value per head, so the function repeats and reshapes the values. A gather of length^2
  rows would have a scatter as its gradient, and scatters are slow on accelerators.
  """
  num_buckets, heads = table.shape
  buckets = relative_buckets(jnp.arange(1 - length, length), num_buckets, max_distance)
  values = jnp.einsum(
    "nb,bh->hn", jax.nn.one_hot(buckets, num_buckets), table.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
  )
  # Repeats 2L values and cuts the result into rows of 2L - 1. Each row then starts one value earlier than the previous row.
  rows = jnp.tile(jnp.pad(values, ((0, 0), (0, 1))), (1, length))[:, : length * (2 * length - 1)]
  return rows.reshape(heads, length, 2 * length - 1)[:, :, length - 1 :]


class T5Encoder(nn.Module):
  """The encoder: `model.apply({"params": ...}, ids, mask)`."""

  config: T5Config
  layout: Layout | None = None

  @nn.compact
  def __call__(
    self, ids: Int[Array | np.ndarray, "B L"], mask: Shaped[Array | np.ndarray, "B L"] | None = None
  ) -> Float[Array, "B L D"]:
    """Encodes token ids (L >= 1). Features are in the compute dtype.

    `mask` is bool or 0/1; None: all tokens are valid. Invalid tokens do not influence valid ones, and their own rows have no
    meaning. An id outside the vocabulary gives NaN, so the loss shows the error.
    """
    c, dtype, param_dtype = self.config, DTYPES[self.config.dtype], DTYPES[self.config.param_dtype]
    embedding = self.param("token_embedding", nn.initializers.normal(1.0), (c.vocab_size, c.d_model), param_dtype)
    buckets = (c.relative_attention_num_buckets, c.num_heads)
    bias_std = c.d_model**-0.5 if c.relative_bias_std is None else c.relative_bias_std
    table = self.param("relative_bias", nn.initializers.normal(bias_std), buckets, param_dtype)

    x = constrain(jnp.take(embedding, ids, axis=0, mode="fill").astype(dtype), self.layout, "batch", None, None)
    bias = relative_bias(table, ids.shape[1], c.relative_attention_max_distance)
    mask = None if mask is None else jnp.asarray(mask, bool)
    block = Block(c, self.layout, parent=None)
    stacked = stacked_params(self, {"blocks": block}, c.num_layers, x, bias, mask)["blocks"]

    def layer(x, params):
      params = gather_layer(params, "blocks", self.layout, dtype, RULES)
      return constrain(block.apply({"params": params}, x, bias, mask), self.layout, "batch", None, None), None

    x, _ = run_layers(layer, x, stacked, c.scan, c.remat)
    return RMSNorm(c.layer_norm_epsilon, param_dtype, name="final_norm")(x)


TABLE = {
  "small": T5Config(d_model=512, num_layers=8, num_heads=6, d_ff=1024),
  "base": T5Config(d_model=768, num_layers=12, num_heads=12, d_ff=2048),
  "large": T5Config(d_model=1024, num_layers=24, num_heads=16, d_ff=2816),
  "xl": T5Config(d_model=2048, num_layers=24, num_heads=32, d_ff=5120),
  "xxl": T5Config(),
  # Small encoders that train with the denoiser, in the quick start and the tests. "byt5" reads bytes (ByT5Tokenizer).
  "byt5-mini": T5Config(d_model=192, num_layers=2, num_heads=4, d_kv=48, d_ff=384, vocab_size=384, relative_bias_std=3.0),
  "mini": T5Config(d_model=128, num_layers=2, num_heads=4, d_kv=32, d_ff=256, vocab_size=256),
  "byt5-tiny": T5Config(d_model=64, num_layers=2, num_heads=4, d_kv=16, d_ff=128, vocab_size=384),
}


def get_config(name: str, **overrides: Any) -> T5Config:
  """The named configuration with some fields replaced. Raises ValueError, with the allowed names, for unknown ones."""
  return fields.replace(fields.choose(TABLE, name, "text encoder"), overrides, f"text encoder {name}")


build = T5Encoder  # `(config, layout) -> nn.Module`, as in `family.Family`


def init(config: T5Config, key: Key[Array, ""]) -> Any:
  """Variables {"params": ...} with the original initialisation (factor 1.0, `T5PreTrainedModel._init_weights`)."""
  return build(config).init(key, jnp.zeros((1, 1), jnp.int32))


@functools.cache
def init_shapes(config: T5Config) -> Any:
  """The tree of `init` as shapes. Allocates nothing. Calls share one tree, so do not change it."""
  return jax.eval_shape(functools.partial(init, config), jax.random.key(0))
