"""Names of the Hugging Face T5 encoders, `T5EncoderModel`: v1.1 (gated) and v1.0 (`wi` in place of `wi_0`, `wi_1`).

`encoder.embed_tokens.weight` and `shared.weight` are one tensor. Both names are read; `shared.weight` is written, as
transformers does. The decoder of a full T5 file is ignored.
"""

from stdit_jax.interop.mapping import CheckpointLayout

_LAYER = "encoder.block.*.layer"


def _rows(up):
  return (
    ("params/token_embedding", ("shared.weight", "encoder.embed_tokens.weight"), "same"),
    ("params/relative_bias", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "same"),
    ("params/blocks/*/attention_norm", f"{_LAYER}.0.layer_norm", "norm"),
    ("params/blocks/*/attention/query", f"{_LAYER}.0.SelfAttention.q", "heads"),
    ("params/blocks/*/attention/key", f"{_LAYER}.0.SelfAttention.k", "heads"),
    ("params/blocks/*/attention/value", f"{_LAYER}.0.SelfAttention.v", "heads"),
    ("params/blocks/*/attention/out", f"{_LAYER}.0.SelfAttention.o", "heads_out"),
    ("params/blocks/*/mlp_norm", f"{_LAYER}.1.layer_norm", "norm"),
    ("params/blocks/*/mlp/gate", f"{_LAYER}.1.DenseReluDense.wi_0", "linear"),
    ("params/blocks/*/mlp/up", f"{_LAYER}.1.DenseReluDense.{up}", "linear"),
    ("params/blocks/*/mlp/down", f"{_LAYER}.1.DenseReluDense.wo", "linear"),
    ("params/final_norm", "encoder.final_layer_norm", "norm"),
  )


_DECODER = (r"decoder\..*", r"lm_head\.weight")
T5 = CheckpointLayout("t5", _rows("wi_1"), prefixes=("", "text_encoder."), ignored=_DECODER)
T5_V1_0 = CheckpointLayout("t5-v1.0", _rows("wi"), prefixes=("", "text_encoder."), ignored=_DECODER)
