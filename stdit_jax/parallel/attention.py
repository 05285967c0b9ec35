"""Softmax attention, and the choice of the kernel that computes it.

  splash   TPU, long sequences: Pallas flash attention, whose logits never leave the chip's fast memory
  cudnn    GPU in half precision: cuDNN's flash attention, by `jax.nn.dot_product_attention`
  einsum   everywhere else: the formula
  xla      the formula as `jax.nn.dot_product_attention` writes it

Every kernel takes padding at the end (`lengths`) or anywhere (`mask`), and computes the softmax in float32.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from stdit_jax.parallel.shardings import Layout, constrain

IMPLEMENTATIONS = ("auto", "splash", "cudnn", "einsum", "xla")
SPLASH_QUERIES, SPLASH_KEYS = 512, 128  # with fewer, einsum is faster
CUDNN_KEYS = 64  # half a tile of cuDNN's kernel, not measured. At 1,632 keys cuDNN is 4.5 times as fast as einsum (H100).


def attend(
  query: Float[Array, "B G Q H D"], key: Float[Array, "B G K H D"], value: Float[Array, "B G K H D"],
  implementation: str = "auto", layout: Layout | None = None, axes: tuple = ("batch", "tokens", None, "tensor"), *,
  lengths: Integer[Array, "B G"] | None = None, mask: Bool[Array, "B G K"] | None = None,
) -> Float[Array, "B G Q H D"]:  # fmt: skip
  """Attention of every query to the valid keys of its own sequence.

  Either `lengths` or `mask` says which keys are valid; without both, all are. The output of a sequence without any valid key
  is finite and means nothing.

  Args:
    query: `[batch, groups, queries, heads, head_dim]`. Groups are independent sequences of one sample (frames or positions).
      Logits are scaled by `head_dim ** -0.5`.
    key, value: as the query, with keys in place of queries.
    implementation: one of IMPLEMENTATIONS; "auto" chooses by platform, dtype and length.
    layout: how activations lie on the mesh, or None.
    axes: names (of `Layout.axes`) over which batch, groups, queries and heads are split. Keys are whole on every device.
    lengths: numbers of valid keys. Padding comes last.
    mask: False for padding, which may be anywhere.

  Returns:
    like the query, in the dtype of `value`.

  Raises:
    ValueError: an unknown implementation, both lengths and mask, or heads that do not divide.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"attention implementation {implementation!r} is unknown; allowed: {', '.join(IMPLEMENTATIONS)}")
  if lengths is not None and mask is not None:
    raise ValueError("attention got lengths and mask; allowed: one of them. Pass lengths if padding comes last, else mask.")
  heads = query.shape[3]
  if layout is not None and heads % (parts := layout.parts(axes[3])):
    raise ValueError(
      f"attention: {heads} heads do not divide by the {parts} devices of mesh axes {layout.axes[axes[3]]}; "
      f"allowed: divisors of {heads}. Make these axes of the mesh smaller."
    )
  platform = jax.default_backend() if layout is None else layout.mesh.devices.flat[0].platform
  if implementation == "auto":
    implementation = _choose(platform, query, key)
  of_queries, of_keys = axes + (None,), (*axes[:2], None, axes[3], None)
  query = constrain(query, layout, *of_queries)
  key, value = constrain(key, layout, *of_keys), constrain(value, layout, *of_keys)
  if implementation == "einsum":
    return _einsum(query, key, value, lengths, mask)
  cudnn = (layout and layout.cudnn) or cudnn_kernel
  splash = functools.partial(_splash, interpret=platform == "cpu")
  kernel = {"splash": splash, "cudnn": cudnn, "xla": _dot_product}[implementation]
  if layout is not None:  # each device runs the kernel on its own part
    specs = [layout.spec(*names) for names in (of_queries, of_keys, of_keys, of_keys[:2], of_keys[:3])]
    kernel = jax.shard_map(kernel, mesh=layout.mesh, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)
  return kernel(query, key, value, lengths, mask)


def valid_keys(key: Array, lengths: Array | None, mask: Array | None) -> Array | None:
  """Which keys are valid, `[batch, groups, keys]` bool, or None if all are."""
  return mask if lengths is None else jnp.arange(key.shape[2]) < lengths[..., None]


def _choose(platform, query, key):
  half = query.dtype in (jnp.bfloat16, jnp.float16)
  head_dim = query.shape[-1]
  if platform == "gpu" and half and key.shape[2] >= CUDNN_KEYS and head_dim % 8 == 0 and head_dim <= 128:
    return "cudnn"
  if platform == "tpu" and query.shape[2] >= SPLASH_QUERIES and key.shape[2] >= SPLASH_KEYS:
    return "splash"
  return "einsum"


def _dot_product(query, key, value, lengths, mask):
  """The formula as JAX writes it, over batch and groups as one axis."""
  flat = [x.reshape(-1, *x.shape[2:]) for x in (query, key, value)]
  mask = valid_keys(key, lengths, mask)
  mask = None if mask is None else mask.reshape(-1, 1, 1, mask.shape[-1])
  return jax.nn.dot_product_attention(*flat, mask=mask, implementation="xla").reshape(query.shape)


def cudnn_kernel(
  query: Array, key: Array, value: Array, lengths: Array | None, mask: Array | None,
  implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Array:  # fmt: skip
  """cuDNN's flash attention. It takes lengths. A mask would have to be an array of all queries by all keys.

  With a mask, valid keys move to the front, since attention does not depend on the order of keys. JAX (0.10, 0.11) refuses
  odd lengths of sequences in training, so the function pads them to even ones. `implementation="xla"` computes the
  same everywhere.
  """
  if mask is not None:
    order = jnp.argsort(~mask, axis=2)[..., None, None]
    key, value = (jnp.take_along_axis(x, order, axis=2) for x in (key, value))
    lengths = mask.sum(2, dtype=jnp.int32)
  if lengths is None:
    lengths = jnp.full(key.shape[:2], key.shape[2], jnp.int32)
  lengths = jnp.maximum(lengths, 1).reshape(-1)  # zero keys would give NaN

  def flat(x):
    return jnp.pad(x.reshape(-1, *x.shape[2:]), ((0, 0), (0, x.shape[2] % 2), (0, 0), (0, 0)))

  y = jax.nn.dot_product_attention(
    flat(query), flat(key), flat(value), key_value_seq_lengths=lengths, implementation=implementation
  )
  return y[:, : query.shape[2]].reshape(query.shape)


def _block(length):
  """(block size, padded length): 128 up to length 256, else the size of 256 to 1024 that pads least (the largest of equals)."""
  blocks = range(256, 1025, 128) if length > 256 else (128,)
  padded = {block: -(-length // block) * block for block in blocks}
  block = min(padded, key=lambda block: (padded[block], -block))
  return block, padded[block]


def _splash(query, key, value, lengths, mask, interpret):
  """Splash attention. Sequences are padded to its blocks; padding has a segment of its own."""
  # Imported here, since the import takes 0.14 seconds.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

  queries, heads = query.shape[2:4]
  (query_block, query_length), (key_block, key_length) = _block(queries), _block(key.shape[2])
  blocks = splash_attention_kernel.BlockSizes(
    block_q=query_block, block_kv=key_block, block_kv_compute=key_block, block_q_dkv=query_block, block_kv_dkv=key_block,
    block_kv_dkv_compute=key_block, block_q_dq=query_block, block_kv_dq=key_block,
  )  # fmt: skip
  full = splash_attention_mask.FullMask((query_length, key_length))
  kernel = splash_attention_kernel.make_splash_mha(
    splash_attention_mask.MultiHeadMask([full] * heads), head_shards=1, q_seq_shards=1, block_sizes=blocks, interpret=interpret
  )

  def one(query, key, value, mask):
    def heads_first(x, length):
      return jnp.swapaxes(jnp.pad(x, ((0, length - x.shape[0]), (0, 0), (0, 0))), 0, 1)

    segments = splash_attention_kernel.SegmentIds(
      jnp.ones(query_length, jnp.int32), jnp.pad(mask.astype(jnp.int32), (0, key_length - mask.shape[0]))
    )
    y: Any = kernel(heads_first(query, query_length), heads_first(key, key_length), heads_first(value, key_length), segments)
    return jnp.swapaxes(y, 0, 1)[:queries]

  query = query * query.shape[-1] ** -0.5
  mask = valid_keys(key, lengths, mask)
  mask = jnp.ones(key.shape[:3], bool) if mask is None else mask
  return jax.vmap(jax.vmap(one))(query, key, value, mask).astype(value.dtype)


def _einsum(query, key, value, lengths, mask):
  """Moves heads in front of sequences, so that XLA never transposes logits and weights, the largest arrays."""
  mask = valid_keys(key, lengths, mask)
  query, key, value = (jnp.swapaxes(x, -3, -2) for x in (query * query.shape[-1] ** -0.5, key, value))
  return jnp.swapaxes(_weigh(query, key, value, mask), -3, -2)


# The gradient is written by hand. Autodiff of `jax.nn.softmax` takes up to 1.27 times as long (forward and backward in float32
# on two CPU cores, shapes of STDiT3-XL/2). For a v5e, autodiff moves 1.13 to 1.24 times the bytes (attention over space).
@jax.custom_vjp
def _weigh(query, key, value, mask):
  """Attention over `[..., heads, sequence, head_dim]` by a scaled query."""
  return _weigh_forward(query, key, value, mask)[0]


def _weigh_forward(query, key, value, mask):
  logits = jnp.einsum("...qh,...kh->...qk", query, key, preferred_element_type=jnp.float32)
  if mask is not None:
    logits = jnp.where(mask[..., None, None, :], logits, 0.7 * jnp.finfo(jnp.float32).min)
  weights = jnp.exp(logits - logits.max(-1, keepdims=True))
  total = weights.sum(-1, keepdims=True)
  weights = weights.astype(value.dtype)
  y = jnp.einsum("...qk,...kh->...qh", weights, value, preferred_element_type=jnp.float32)
  return (y / total).astype(value.dtype), (query, key, value, mask, weights, total)


def _weigh_backward(saved, dy):
  """The gradient from the saved weights: it neither computes the softmax again nor divides weights by their sum."""
  query, key, value, mask, weights, total = saved
  dy = (dy / total).astype(value.dtype)
  d_value = jnp.einsum("...qk,...qh->...kh", weights, dy)
  d_weights = jnp.einsum("...qh,...kh->...qk", dy, value, preferred_element_type=jnp.float32)
  # The sum of `dy * y` over the head dimension is equal and cheaper, but has larger rounding errors.
  mean = (weights * d_weights).sum(-1, keepdims=True) / total
  d_logits = (weights * (d_weights - mean)).astype(value.dtype)
  if mask is not None:  # a sequence without any valid key has weights that are not zero
    d_logits = jnp.where(mask[..., None, None, :], d_logits, 0)
  return jnp.einsum("...qk,...kh->...qh", d_logits, key), jnp.einsum("...qk,...qh->...kh", d_logits, query), d_value, None


_weigh.defvjp(_weigh_forward, _weigh_backward)
