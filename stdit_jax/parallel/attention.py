"""Softmax attention: which kernel computes it where. The one place that chooses.

  splash   TPU, long sequences: Pallas flash attention, whose logits never leave the chip's fast memory
  cudnn    GPU in half precision: cuDNN's flash attention, through `jax.nn.dot_product_attention`
  einsum   everywhere else: the formula itself
  xla      the formula as `jax.nn.dot_product_attention` writes it

Softmax is always computed in float32.
"""

import functools

import jax
import jax.numpy as jnp

from stdit_jax.parallel.shardings import constrain

IMPLEMENTATIONS = ("auto", "splash", "cudnn", "einsum", "xla")
SPLASH_QUERIES, SPLASH_KEYS = 512, 128  # from so many on; shorter attention is faster as einsum
CUDNN_KEYS = (
  64  # half a tile of its kernel. On an H100 it is 4.5 times as fast as einsum at 1,632 keys; below nothing was measured.
)


def attend(
  query, key, value, implementation="auto", layout=None, axes=("batch", "tokens", None, "tensor"), *, lengths=None, mask=None
):
  """Attention of every query to the valid keys of its own sequence.

  Either `lengths` or `mask` says which keys are valid; without both, all are. The output of a sequence without any valid key
  is finite and means nothing.

  Args:
    query: `[batch, groups, queries, heads, head_dim]`. Groups are independent sequences of one sample (frames or positions).
      Logits are scaled by `head_dim ** -0.5`.
    key, value: `[batch, groups, keys, heads, head_dim]`.
    implementation: one of IMPLEMENTATIONS; "auto" chooses by platform, dtype and length.
    layout: how activations lie on the mesh, or None.
    axes: names (of `Layout.axes`) over which batch, groups, queries and heads are split. Keys are whole on every device.
    lengths: `[batch, groups]` int, the number of valid keys. Padding comes last.
    mask: `[batch, groups, keys]` bool, False for padding. Padding may be anywhere.

  Returns:
    `[batch, groups, queries, heads, head_dim]` in the dtype of `value`.
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


def _as_mask(key, lengths, mask):
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
  mask = _as_mask(key, lengths, mask)
  mask = None if mask is None else mask.reshape(-1, 1, 1, mask.shape[-1])
  return jax.nn.dot_product_attention(*flat, mask=mask, implementation="xla").reshape(query.shape)


def cudnn_kernel(query, key, value, lengths, mask, implementation="cudnn"):
  """cuDNN's flash attention, which takes lengths: a mask would be an array of all queries by all keys to it.

  With a mask, valid keys move to the front, since attention does not depend on the order of keys. JAX (0.10, 0.11) refuses
  odd lengths of sequences in training, so they become even. `implementation="xla"` computes the same everywhere.
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
  """(block, padded length): the least padding with blocks of 256 to 1024, the larger block where several have it."""
  blocks = range(256, 1025, 128) if length > 256 else (128,)
  padded = {block: -(-length // block) * block for block in blocks}
  block = min(padded, key=lambda block: (padded[block], -block))
  return block, padded[block]


def _splash(query, key, value, lengths, mask, interpret):
  """Splash attention. Sequences are padded to its blocks; padding has a segment of its own."""
  # Here, since it costs every start a seventh of a second.
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

  def one(query, key, value, key_mask):
    def heads_first(x, length):
      return jnp.swapaxes(jnp.pad(x, ((0, length - x.shape[0]), (0, 0), (0, 0))), 0, 1)

    segments = splash_attention_kernel.SegmentIds(
      jnp.ones(query_length, jnp.int32), jnp.pad(key_mask.astype(jnp.int32), (0, key_length - key_mask.shape[0]))
    )
    y = kernel(heads_first(query, query_length), heads_first(key, key_length), heads_first(value, key_length), segments)
    return jnp.swapaxes(y, 0, 1)[:queries]

  query = query * query.shape[-1] ** -0.5
  mask = jnp.ones(key.shape[:3], bool) if lengths is None and mask is None else _as_mask(key, lengths, mask)
  return jax.vmap(jax.vmap(one))(query, key, value, mask).astype(value.dtype)


def _einsum(query, key, value, lengths, mask):
  """Heads in front of the sequences, so that neither logits nor weights, the largest arrays, are ever transposed."""
  mask = _as_mask(key, lengths, mask)
  query, key, value = (jnp.swapaxes(x, -3, -2) for x in (query * query.shape[-1] ** -0.5, key, value))
  return jnp.swapaxes(_weigh(query, key, value, mask), -3, -2)


@jax.custom_vjp
def _weigh(query, key, value, key_mask):
  """Attention over `[..., heads, sequence, head_dim]`; the query is scaled already."""
  return _weigh_forward(query, key, value, key_mask)[0]


def _weigh_forward(query, key, value, key_mask):
  logits = jnp.einsum("...qh,...kh->...qk", query, key, preferred_element_type=jnp.float32)
  if key_mask is not None:
    logits = jnp.where(key_mask[..., None, None, :], logits, 0.7 * jnp.finfo(jnp.float32).min)
  weights = jnp.exp(logits - logits.max(-1, keepdims=True))
  total = weights.sum(-1, keepdims=True)
  weights = weights.astype(value.dtype)
  y = jnp.einsum("...qk,...kh->...qh", weights, value, preferred_element_type=jnp.float32)
  return (y / total).astype(value.dtype), (query, key, value, key_mask, weights, total)


def _weigh_backward(saved, dy):
  """As autodiff has it, but from the weights themselves: softmax is not computed again, nor divided by its sum."""
  query, key, value, key_mask, weights, total = saved
  dy = (dy / total).astype(value.dtype)
  d_value = jnp.einsum("...qk,...qh->...kh", weights, dy)
  d_weights = jnp.einsum("...qh,...kh->...qk", dy, value, preferred_element_type=jnp.float32)
  # The sum of `dy * y` over the head dimension is the same and cheaper, but its rounding errors are larger.
  mean = (weights * d_weights).sum(-1, keepdims=True) / total
  d_logits = (weights * (d_weights - mean)).astype(value.dtype)
  if key_mask is not None:  # weights are zero there already, but in a sequence without any valid key
    d_logits = jnp.where(key_mask[..., None, None, :], d_logits, 0)
  return jnp.einsum("...qk,...kh->...qh", d_logits, key), jnp.einsum("...qk,...qh->...kh", d_logits, query), d_value, None


_weigh.defvjp(_weigh_forward, _weigh_backward)
