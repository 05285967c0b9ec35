"""Names of the KL image autoencoder: diffusers' `AutoencoderKL`, and the original latent-diffusion code.

Our hierarchy is that of diffusers. The original counts the levels of the decoder from the full resolution, diffusers from
the latents. The attention projections of the original are 1 x 1 convolutions. diffusers before 0.18 called them query, key,
value and proj_attn.
"""

from stdit_jax.interop.mapping import CheckpointLayout, same_path

# Columns: name in diffusers, name in the original, kind.
_RESNET = (
  ("norm1", "norm1", "norm"),
  ("conv1", "conv1", "conv"),
  ("norm2", "norm2", "norm"),
  ("conv2", "conv2", "conv"),
  ("conv_shortcut", "nin_shortcut", "conv"),
)
_RESNET_AT = (
  ("encoder.down_blocks.{a}.resnets.{b}", "encoder.down.{a}.block.{b}"),
  ("decoder.up_blocks.{a}.resnets.{b}", "decoder.up.{-a}.block.{b}"),
  ("{part}.mid_block.resnets.0", "{part}.mid.block_1"),
  ("{part}.mid_block.resnets.1", "{part}.mid.block_2"),
)
_REST = (
  ("{part}.conv_in", "{part}.conv_in", "conv"),
  ("encoder.down_blocks.{a}.downsamplers.0.conv", "encoder.down.{a}.downsample.conv", "conv"),
  ("decoder.up_blocks.{a}.upsamplers.0.conv", "decoder.up.{-a}.upsample.conv", "conv"),
  ("{part}.mid_block.attentions.0.group_norm", "{part}.mid.attn_1.norm", "norm"),
  ("{part}.conv_norm_out", "{part}.norm_out", "norm"),
  ("{part}.conv_out", "{part}.conv_out", "conv"),
  ("quant_conv", "quant_conv", "conv"),
  ("post_quant_conv", "post_quant_conv", "conv"),
)
_ATTENTION_AT = ("{part}.mid_block.attentions.0", "{part}.mid.attn_1")
_ATTENTION = (
  (("to_q", "query"), ("q",)),
  (("to_k", "key"), ("k",)),
  (("to_v", "value"), ("v",)),
  (("to_out.0", "proj_attn"), ("proj_out",)),
)


def _rows(column, attention_kind):
  """The rows of one layout, from column 0 (diffusers) or 1 (original) of the tables above."""
  # [((name in diffusers, name in the original), kind)]
  rows = [(tuple(f"{at}.{name}" for at, name in zip(place, leaf)), leaf[2]) for place in _RESNET_AT for leaf in _RESNET]
  rows += [(row[:2], row[2]) for row in _REST]
  table: list[tuple[str, tuple[str, ...], str]] = [(same_path(names[0]), (names[column],), kind) for names, kind in rows]
  for names in _ATTENTION:
    several = tuple(f"{_ATTENTION_AT[column]}.{name}" for name in names[column])
    table.append((same_path(f"{_ATTENTION_AT[0]}.{names[0][0]}"), several, attention_kind))
  return tuple((f"params/{path}", names, kind) for path, names, kind in table)


# "spatial_vae.module.": inside Open-Sora 1.2's video autoencoder. "vae.": inside the state dict of a pipeline.
DIFFUSERS = CheckpointLayout("diffusers", _rows(0, "linear"), prefixes=("", "spatial_vae.module.", "vae."))

LDM = CheckpointLayout(
  "ldm",
  _rows(1, "conv1x1"),
  prefixes=("first_stage_model.", ""),
  ignored=(r"loss\..*", r"model_ema\..*"),  # discriminator, perceptual network and averages of a training checkpoint
)
