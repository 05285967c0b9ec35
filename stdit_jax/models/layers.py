"""Layers that several denoisers share.

Norms, softmax, rotations and sinusoids run in float32, all else in `dtype`. Parameters are float32.
"""

import functools
import math
from collections.abc import Callable

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Num

from stdit_jax.arrays import ArrayLike, Features, TokenValid
from stdit_jax.parallel.attention import attend
from stdit_jax.parallel.shardings import Layout, constrain

MAX_PERIOD = 10000.0

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
COMPUTE_DTYPES = ("float32", "bfloat16")  # for training; float16 would need a scaled loss
# Names (of `Layout.axes`) of the dimensions of `[B, T, S, D]` during attention over space and during attention over time.
# "tokens" names the dimension that this attention does not mix, T or S. The mesh may split it.
OVER_SPACE, OVER_TIME = ("batch", "tokens", None, None), ("batch", None, "tokens", None)


def uniform(bound: float) -> Callable:
  """An initializer, uniform in +-bound for any shape."""
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def torch_uniform(fan_in: int) -> Callable:
  """PyTorch's default for the weight (kaiming with a = sqrt(5)) and bias of a layer."""
  return uniform(1.0 / math.sqrt(fan_in))


class Linear(nn.Module):
  """`[..., *inputs] -> [..., *features]`, a matrix product.

  The kernel is `[*inputs, *features]`. Heads are separate axes, so that they can be sharded. The default initialisation is
  Xavier uniform, over the fused matrix as in the original, with a zero bias (`_basic_init` in Open-Sora 1.0-1.2).

  The layer pins its input, its output and their gradients to one layout. The gradient of the kernel sums over tokens. XLA's
  partitioner (jax 0.10.2) drops a part of that sum when one factor is split over frames and the other one over positions.

  Attributes:
    inputs: sizes of the axes that the product sums over; by default the last axis of the input.
    axes: names (of `Layout.axes`) of the first dimensions of the input. The mesh splits later ones only if `tensor` says so.
    tensor: the axis of the kernel that the mesh axis `tensor` splits. Zeros pad heads up to a multiple of its size. The output
      then has more heads than `features`, and the next layer accepts more heads than its `inputs`.
  """

  features: tuple[int, ...]
  inputs: tuple[int, ...] | None = None
  kernel_init: nn.initializers.Initializer | None = None
  bias_init: nn.initializers.Initializer = nn.initializers.zeros
  dtype: DTypeLike = jnp.float32
  layout: Layout | None = None
  axes: tuple[str | None, ...] = ("batch",)
  tensor: int | None = None

  @nn.compact
  def __call__(self, x: ArrayLike) -> Array:
    inputs = self.inputs or x.shape[-1:]
    kernel_init = self.kernel_init or uniform(math.sqrt(6.0 / (math.prod(inputs) + math.prod(self.features))))
    kernel = self.param("kernel", kernel_init, (*inputs, *self.features)).astype(self.dtype)
    bias = self.param("bias", self.bias_init, self.features).astype(self.dtype)
    lead, x = x.shape[: -len(inputs)], x.astype(self.dtype)
    lead_names = [*self.axes, None, None, None][: len(lead)]
    kernel_names = ["tensor" if axis == self.tensor else None for axis in range(kernel.ndim)]
    x = constrain(x, self.layout, *lead_names, *kernel_names[: len(inputs)])
    parts = 1 if self.layout is None else self.layout.parts("tensor")
    if parts == 1:
      # One plain matrix product. With separate axes for heads, every step would transpose the kernel and its gradient.
      y = x.reshape(*lead, math.prod(inputs)) @ kernel.reshape(math.prod(inputs), math.prod(self.features))
      y = y.reshape(*lead, *self.features) + bias
    else:
      if self.tensor is not None:
        kernel = pad(kernel, self.tensor, parts)
        if self.tensor >= len(inputs):
          bias = pad(bias, self.tensor - len(inputs), parts)
      y = jnp.tensordot(x, kernel, len(inputs)) + bias
    return constrain(y, self.layout, *lead_names, *kernel_names[len(inputs) :])


def pad(x: Array, axis: int, parts: int) -> Array:
  """Pads an axis with zeros to a multiple of `parts`."""
  return jnp.pad(x, [(0, -x.shape[i] % parts if i == axis else 0) for i in range(x.ndim)])


class Mlp(nn.Module):
  """Linear, activation, linear (`fc1`, `fc2`)."""

  hidden: int
  features: int
  activation: str = "gelu"
  fc1_init: nn.initializers.Initializer | None = None
  fc2_init: nn.initializers.Initializer | None = None
  dtype: DTypeLike = jnp.float32
  layout: Layout | None = None
  axes: tuple[str | None, ...] = ("batch",)
  tensor: bool = False  # split the hidden side over `tensor`

  @nn.compact
  def __call__(self, x: ArrayLike) -> Array:
    linear = functools.partial(Linear, dtype=self.dtype, layout=self.layout, axes=self.axes)
    into, out = (1, 0) if self.tensor else (None, None)
    x = linear((self.hidden,), kernel_init=self.fc1_init, tensor=into, name="fc1")(x)
    x = nn.silu(x) if self.activation == "silu" else nn.gelu(x, approximate=True)
    return linear((self.features,), kernel_init=self.fc2_init, tensor=out, name="fc2")(x)


def layer_norm(x: Float[Array, "*lead D"], eps: float = 1e-6) -> Float[Array, "*lead D"]:
  """LayerNorm over the last axis without scale and bias, computed in float32; keeps the dtype of `x`."""
  y = x.astype(jnp.float32)
  y = y - y.mean(-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
  return y.astype(x.dtype)


def modulate(x: Float[Array, "*lead D"], shift: Array, scale: Array) -> Float[Array, "*lead D"]:
  """adaLN: `x * (1 + scale) + shift` (DiT, section 3.2)."""
  return x * (1 + scale) + shift


class RMSNorm(nn.Module):
  """Root-mean-square norm over the last axis: float32 inside, back to the input dtype *before* the weight (as Llama, T5)."""

  eps: float = 1e-6
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: ArrayLike) -> Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
    return y.astype(x.dtype) * scale.astype(x.dtype)


# NumPy computes frequencies on the host, since its functions round correctly. The order of operations is the originals'. An
# error in the last digit of a frequency, times a timestep of 1000, is an error of 1e-5 in the embedding.


def sinusoid(values: Num[ArrayLike, "*lead"], dim: int = 256) -> Float[Array, "*lead dim"]:
  """`[...] -> [..., dim]` float32: [cos, sin] of `values` times `dim / 2` frequencies 10000^(-2k / dim) (DiT)."""
  half = dim // 2
  exponents = np.float32(-math.log(MAX_PERIOD)) * np.arange(half, dtype=np.float32) / np.float32(half)
  frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
  angles = values.astype(jnp.float32)[..., None] * frequencies
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def even_frequencies(dim: int) -> np.ndarray:
  """`[dim / 2]` frequencies 10000^(-2k / dim): `rope.freqs` of Open-Sora 1.1 and 1.2 (RoFormer, section 3.2.2)."""
  exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
  return np.float32(1) / (MAX_PERIOD ** exponents.astype(np.float64)).astype(np.float32)


def interleaved_sin_cos(positions: Num[ArrayLike, "*lead"], dim: int) -> Float[Array, "*lead dim"]:
  """`[...] -> [..., dim]` float32: [sin, cos] with `dim / 2` frequencies 10000^(-2k / dim) (Open-Sora)."""
  angles = positions.astype(jnp.float32)[..., None] * even_frequencies(dim)
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def apply_rope(
  x: Float[Array, "*lead time heads head_dim"], frequencies: Float[ArrayLike, " half"]
) -> Float[Array, "*lead time heads head_dim"]:
  """Rotates adjacent pairs of channels of `x [..., time, heads, head_dim]` by time * frequency, in float32.

  Pair j is channels (2j, 2j + 1), the interleaved layout of rotary_embedding_torch 0.5.
  """
  time, _, head_dim = x.shape[-3:]
  angles = jnp.arange(time, dtype=jnp.float32)[:, None] * frequencies.astype(jnp.float32)
  cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
  even, odd = jnp.moveaxis(x.astype(jnp.float32).reshape(*x.shape[:-1], head_dim // 2, 2), -1, 0)
  rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
  return rotated.reshape(x.shape).astype(x.dtype)


class SelfAttention(nn.Module):
  """Self attention over one axis of `[batch, time, space, features]`.

  Attributes:
    axis: "space" (within each frame) or "time" (at each position).
    qk_norm: RMS norm of queries and keys over the head dimension.
    rope_first: rotate before the norm (Open-Sora 1.1, `qk_norm_legacy`) instead of after it (1.2).
  """

  num_heads: int
  axis: str
  qk_norm: bool = False
  rope_first: bool = False
  out_init: nn.initializers.Initializer | None = None
  implementation: str = "auto"
  dtype: DTypeLike = jnp.float32
  layout: Layout | None = None

  @nn.compact
  def __call__(self, x: Features, token_valid: TokenValid | None = None, rope: Float[Array, " half"] | None = None) -> Features:
    features = x.shape[-1]
    heads = (self.num_heads, features // self.num_heads)
    axes = (OVER_SPACE if self.axis == "space" else OVER_TIME)[:3]
    linear = functools.partial(Linear, dtype=self.dtype, layout=self.layout, axes=axes)
    qkv = linear((3, *heads), tensor=2, name="qkv")(x)
    groups = "b t s 1 h d -> b t s h d" if self.axis == "space" else "b t s 1 h d -> b s t h d"
    query, key, value = (einops.rearrange(x, groups) for x in jax.lax.split(qkv, (1, 1, 1), axis=3))
    if rope is not None and self.rope_first:
      query, key = apply_rope(query, rope), apply_rope(key, rope)
    if self.qk_norm:
      query, key = RMSNorm(name="query_norm")(query), RMSNorm(name="key_norm")(key)
    if rope is not None and not self.rope_first:
      query, key = apply_rope(query, rope), apply_rope(key, rope)
    # Padding comes last, so each sequence needs only its number of valid tokens: [B, T] or [B, S].
    lengths = None if token_valid is None else token_valid.sum(2 if self.axis == "space" else 1)
    y = attend(query, key, value, self.implementation, self.layout, lengths=lengths)
    if self.axis == "time":
      y = jnp.swapaxes(y, 1, 2)
    return linear((features,), heads, self.out_init, tensor=0, name="out")(y)


class CrossAttention(nn.Module):
  """Attention of all tokens of a sample to its valid text tokens: no norm, no gate (PixArt; Open-Sora 1.0-1.2)."""

  num_heads: int
  out_init: nn.initializers.Initializer | None = None
  implementation: str = "auto"
  dtype: DTypeLike = jnp.float32
  layout: Layout | None = None
  axes: tuple[str | None, ...] = OVER_SPACE  # or OVER_TIME: how the mesh splits the tokens

  @nn.compact
  def __call__(self, x: Features, text: Float[ArrayLike, "B L D"], text_mask: Bool[ArrayLike, "B L"] | None) -> Features:
    _, t, s, features = x.shape
    heads = (self.num_heads, features // self.num_heads)
    linear = functools.partial(Linear, dtype=self.dtype, layout=self.layout)
    query = linear(heads, axes=self.axes[:3], tensor=1, name="query")(x)
    key_value = linear((2, *heads), tensor=2, name="key_value")(text)
    # One group of all tokens. The axis that may be split comes first, so that each device has one contiguous piece.
    space_first = self.axes == OVER_TIME and self.layout is not None and self.layout.split_tokens
    query = einops.rearrange(query, "b t s h d -> b 1 (s t) h d" if space_first else "b t s h d -> b 1 (t s) h d")
    key, value = jax.lax.split(jnp.swapaxes(key_value, 1, 2), (1, 1), axis=1)
    mask = None if text_mask is None else text_mask[:, None].astype(bool)
    y = attend(query, key, value, self.implementation, self.layout, ("batch", None, "tokens", "tensor"), mask=mask)
    y = einops.rearrange(y, "b 1 (s t) h d -> b t s h d" if space_first else "b 1 (t s) h d -> b t s h d", t=t, s=s)
    return linear((features,), heads, self.out_init, axes=self.axes[:3], tensor=0, name="out")(y)
