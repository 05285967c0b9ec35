"""Softmax attention: which kernel computes it where. The one place that chooses.

On a CPU `jax.nn.dot_product_attention` runs its XLA implementation; on a GPU in half precision it runs cuDNN's flash
attention. Softmax is always computed in float32.
"""

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("auto", "xla", "cudnn")


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
    implementation = "cudnn" if half and jax.default_backend() == "gpu" else "xla"
  mask = None if key_mask is None else key_mask[:, None, None, :]
  return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=implementation)
