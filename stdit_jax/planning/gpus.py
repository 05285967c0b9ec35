"""A stand-in for cuDNN's attention. With it, programs for GPUs compile without cuDNN."""

import jax
import jax.numpy as jnp
from jax import Array

from stdit_jax.parallel.attention import valid_keys


@jax.custom_vjp
def stand_in(query: Array, key: Array, value: Array, lengths: Array | None, mask: Array | None) -> Array:
  """Reads, writes and saves as many bytes as cuDNN's flash attention. Its values mean nothing.

  Arguments are those of `attention.cudnn_kernel`.
  """
  return _forward(query, key, value, lengths, mask)[0]


def _masked(x, lengths, mask):
  valid = valid_keys(x, lengths, mask)
  return x if valid is None else jnp.where(valid[..., None, None], x, 0)


def _forward(query, key, value, lengths, mask):
  context = _masked(key + value, lengths, mask).mean(2, keepdims=True)
  y = query + context
  log_sum = y.astype(jnp.float32).sum(-1)  # one number per query and head, saved for the backward pass
  return y, (query, key, value, lengths, mask, y, log_sum)


def _backward(saved, dy):
  query, key, value, lengths, mask, y, log_sum = saved
  # cuDNN's backward kernel sums the gradient of the queries in float32.
  d_query = jax.lax.optimization_barrier((dy * y).astype(jnp.float32) * log_sum[..., None] + query)
  d_context = dy.mean(2, keepdims=True)
  d_key = _masked(d_context * value, lengths, mask)
  return d_query.astype(query.dtype), d_key, d_key * key, None, None


stand_in.defvjp(_forward, _backward)
