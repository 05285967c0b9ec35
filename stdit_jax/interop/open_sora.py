"""Names of the Open-Sora denoisers: STDiT (tag v1.0.0), STDiT-2 (v1.1.0), STDiT-3 (v1.2.0).

PyTorch layouts: Linear [out, in]; the patch embedding is a Conv3d [D, C, t, y, x].
"""

import numpy as np

from stdit_jax.interop.mapping import CheckpointLayout

STACKS = ("blocks", "spatial_blocks", "temporal_blocks")

_EMBEDDERS = (
  ("timestep_embed", "t_embedder"),
  ("fps_embed", "fps_embedder"),
  ("frames_embed", "fl_embedder"),
  ("size_embed", "csize_embedder"),
  ("aspect_embed", "ar_embedder"),
)

_BLOCK = (
  ("modulation", "scale_shift_table", "same"),
  ("temporal_modulation", "scale_shift_table_temporal", "same"),
  ("attention/qkv", "attn.qkv", "qkv"),
  ("attention/query_norm", "attn.q_norm", "norm"),
  ("attention/key_norm", "attn.k_norm", "norm"),
  ("attention/out", "attn.proj", "heads_out"),
  ("temporal_attention/qkv", "attn_temp.qkv", "qkv"),
  ("temporal_attention/query_norm", "attn_temp.q_norm", "norm"),
  ("temporal_attention/key_norm", "attn_temp.k_norm", "norm"),
  ("temporal_attention/out", "attn_temp.proj", "heads_out"),
  ("cross_attention/query", "cross_attn.q_linear", "heads"),
  ("cross_attention/key_value", "cross_attn.kv_linear", "qkv"),
  ("cross_attention/out", "cross_attn.proj", "heads_out"),
  ("mlp/fc1", "mlp.fc1", "linear"),
  ("mlp/fc2", "mlp.fc2", "linear"),
)

ROWS = (
  ("params/patch_embed", "x_embedder.proj", "patch"),
  *((f"params/{ours}/fc1", f"{theirs}.mlp.0", "linear") for ours, theirs in _EMBEDDERS),
  *((f"params/{ours}/fc2", f"{theirs}.mlp.2", "linear") for ours, theirs in _EMBEDDERS),
  ("params/timestep_modulation", "t_block.1", "linear"),
  ("params/temporal_modulation", "t_block_temp.1", "linear"),
  ("params/caption_embed/fc1", "y_embedder.y_proj.fc1", "linear"),
  ("params/caption_embed/fc2", "y_embedder.y_proj.fc2", "linear"),
  *((f"params/{stack}/*/{o}", f"{stack}.*.{t}", k) for stack in STACKS for o, t, k in _BLOCK),
  ("params/final_layer/modulation", "final_layer.scale_shift_table", "same"),
  ("params/final_layer/linear", "final_layer.linear", "linear"),
  ("{collection}/null_caption", "y_embedder.y_embedding", "rows"),
  ("constants/rope_frequencies", "rope.freqs", "same"),
)


def _sin_cos(positions, features):
  """[n] positions -> [n, features]: sines, then cosines, of frequencies 10000^(-2k / features), in float64."""
  angles = np.outer(positions, 1.0 / 10000 ** (np.arange(features // 2) / (features / 2)))
  return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def _computed(config):
  """The two position tables of STDiT 1.0 checkpoints. Our models compute positions."""
  if not hasattr(config, "input_size"):
    return {}
  frames, rows, columns = (np.arange(size // patch) for size, patch in zip(config.input_size, config.patch_size))
  row, column = np.meshgrid(rows / config.space_scale, columns / config.space_scale, indexing="ij")
  spatial = np.concatenate([_sin_cos(side.ravel(), config.hidden_size // 2) for side in (column, row)], axis=1)  # [S, D]
  temporal = _sin_cos(frames / config.time_scale, config.hidden_size)  # [T, D]
  return {"pos_embed": spatial.astype(np.float32)[None], "pos_embed_temporal": temporal.astype(np.float32)[None]}


OPEN_SORA = CheckpointLayout(
  "open-sora", ROWS, stacks=STACKS, prefixes=("module.", ""), sizes=lambda config: dict(zip("tyx", config.patch_size)),
  computed=_computed,
  droppable=("pos_embed", "pos_embed_temporal"),  # Open-Sora's own loader drops them before a non-strict load
)  # fmt: skip
