"""Softmax attention: which kernel computes it where. The one place that chooses.

On a GPU in half precision cuDNN's flash attention runs, through `jax.nn.dot_product_attention`; everywhere else "einsum", the
formula itself. "xla" is the formula as `jax.nn.dot_product_attention` writes it. Softmax is always computed in float32.
"""

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("auto", "einsum", "xla", "cudnn")


def attend(query, key, value, key_mask=None, implementation="auto"):
  """Attention of every query to the valid keys of its own sequence.

  Args:
    query: `[batch, queries, heads, head_dim]`; logits are scaled by `head_dim ** -0.5`.
    key, value: `[batch, keys, heads, head_dim]`.
    key_mask: `[batch, keys]` bool, False for padding, or None. A sequence without any valid key attends evenly: finite
      values that nobody reads, where the originals, which pack valid tokens, have no such rows.
    implementation: one of IMPLEMENTATIONS; "auto" chooses by platform and dtype.

  Returns:
    `[batch, queries, heads, head_dim]` in the dtype of `value`.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"attention implementation {implementation!r} is unknown; allowed: {', '.join(IMPLEMENTATIONS)}")
  if implementation == "auto":
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    implementation = "cudnn" if half and jax.default_backend() == "gpu" else "einsum"
  if implementation == "einsum":
    return _einsum(query, key, value, key_mask)
  mask = None if key_mask is None else key_mask[:, None, None, :]
  return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=implementation)


def _einsum(query, key, value, key_mask):
  """Heads in front of the sequences, so that neither logits nor weights, the largest arrays, are ever transposed."""
  query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
  return jnp.swapaxes(_weigh(query, key, value, key_mask), 1, 2)


@jax.custom_vjp
def _weigh(query, key, value, key_mask):
  """Attention over `[batch, heads, sequence, head_dim]`; the query is scaled already."""
  return _weigh_forward(query, key, value, key_mask)[0]


def _weigh_forward(query, key, value, key_mask):
  logits = jnp.einsum("bnqh,bnkh->bnqk", query, key, preferred_element_type=jnp.float32)
  if key_mask is not None:
    logits = jnp.where(key_mask[:, None, None, :], logits, 0.7 * jnp.finfo(jnp.float32).min)
  weights = jnp.exp(logits - logits.max(-1, keepdims=True))
  total = weights.sum(-1, keepdims=True)
  weights = weights.astype(value.dtype)
  y = jnp.einsum("bnqk,bnkh->bnqh", weights, value, preferred_element_type=jnp.float32)
  return (y / total).astype(value.dtype), (query, key, value, key_mask, weights, total)


def _weigh_backward(saved, dy):
  """As autodiff has it, but from the weights themselves: softmax is not computed again, nor divided by its sum."""
  query, key, value, key_mask, weights, total = saved
  dy = (dy / total).astype(value.dtype)
  d_value = jnp.einsum("bnqk,bnqh->bnkh", weights, dy)
  d_weights = jnp.einsum("bnqh,bnkh->bnqk", dy, value, preferred_element_type=jnp.float32)
  # The sum of `dy * y` over the head dimension is the same and cheaper, but its rounding errors are larger.
  mean = (weights * d_weights).sum(-1, keepdims=True) / total
  d_logits = (weights * (d_weights - mean)).astype(value.dtype)
  if key_mask is not None:  # weights are zero there already, but in a sequence without any valid key
    d_logits = jnp.where(key_mask[:, None, None, :], d_logits, 0)
  return jnp.einsum("bnqk,bnkh->bnqh", d_logits, key), jnp.einsum("bnqk,bnqh->bnkh", d_logits, query), d_value, None


_weigh.defvjp(_weigh_forward, _weigh_backward)
