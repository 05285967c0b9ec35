"""Model FLOPs by formula. They count the matrix products of the models, two FLOPs per multiply-add."""

from typing import Any

TRAINING = 3  # one matrix product of the forward pass needs two more for its gradients


def self_attention(config: Any, tokens: int, span: int) -> int:
  """FLOPs of self attention: four projections of `tokens` tokens, each of which attends to `span` tokens."""
  width = config.hidden_size
  return 8 * tokens * width**2 + 4 * tokens * span * width


def cross_attention(config: Any, tokens: int, text: int) -> int:
  width = config.hidden_size
  return 4 * tokens * width**2 + 4 * text * width**2 + 4 * tokens * text * width


def mlp(config: Any, tokens: int) -> int:
  return 4 * tokens * config.hidden_size * int(config.hidden_size * config.mlp_ratio)


def text(config: Any, tokens: int) -> int:
  """FLOPs of a T5 encoder (`t5.T5Config`) for one caption of this number of tokens, with padding."""
  inner = config.num_heads * config.d_kv
  mlp_kernels = 3 if config.feed_forward_proj == "gated-gelu" else 2
  products = 8 * config.d_model * inner + 2 * mlp_kernels * config.d_model * config.d_ff
  return config.num_layers * tokens * (products + 4 * tokens * inner)
