"""Model FLOPs by formula: matrix products only, two FLOPs per multiply-add, as the models are written."""

TRAINING = 3  # a training step computes every product of the forward pass three times: once there, twice for gradients


def self_attention(config, tokens, span):
  """Queries, keys, values, output over `tokens` tokens, and attention of each over `span` tokens."""
  width = config.hidden_size
  return 8 * tokens * width**2 + 4 * tokens * span * width


def cross_attention(config, tokens, text):
  width = config.hidden_size
  return 4 * tokens * width**2 + 4 * text * width**2 + 4 * tokens * text * width


def mlp(config, tokens):
  return 4 * tokens * config.hidden_size * int(config.hidden_size * config.mlp_ratio)


def text(config, tokens):
  """FLOPs of one caption of so many tokens, padding included, by a T5 encoder (`t5.T5Config`)."""
  inner = config.num_heads * config.d_kv
  mlp_kernels = 3 if config.feed_forward_proj == "gated-gelu" else 2
  products = 8 * config.d_model * inner + 2 * mlp_kernels * config.d_model * config.d_ff
  return config.num_layers * tokens * (products + 4 * tokens * inner)
