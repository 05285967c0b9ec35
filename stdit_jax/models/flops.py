"""Model FLOPs by formula: matrix products only, two FLOPs a multiply-add, of the work as the models are written."""

from stdit_jax.models.stdit import STDiT3Config

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


def forward(config, frames, space, text):
  """FLOPs of one forward pass over one sample.

  Args:
    config: of an STDiT; frames, space: latent frames and tokens per frame; text: text tokens.
  """
  width, tokens = config.hidden_size, frames * space
  spatial, temporal = self_attention(config, tokens, space), self_attention(config, tokens, frames)
  rest = cross_attention(config, tokens, text) + mlp(config, tokens)
  layer = spatial + temporal + rest
  if isinstance(config, STDiT3Config):  # one or two blocks a layer
    layer = spatial + rest + (temporal + rest if config.temporal_blocks else 0)
  patches = 2 * tokens * width * (config.patch_values + config.patch_positions * config.out_channels)
  caption = 2 * text * (config.caption_channels + width) * width
  embeddings = 2 * 2 * (256 + width) * width + 12 * width**2  # timestep and fps, modulation
  return config.depth * layer + patches + caption + embeddings


def text(config, tokens):
  """FLOPs of one caption of so many tokens, padding included, by a T5 encoder (`t5.T5Config`)."""
  inner = config.num_heads * config.d_kv
  mlp_kernels = 3 if config.feed_forward_proj == "gated-gelu" else 2
  products = 8 * config.d_model * inner + 2 * mlp_kernels * config.d_model * config.d_ff
  return config.num_layers * tokens * (products + 4 * tokens * inner)
