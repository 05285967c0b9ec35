"""Names of the KL image autoencoder: diffusers' `AutoencoderKL`, and the original latent-diffusion code.

Our hierarchy is that of diffusers. The original counts the levels of the decoder from the full resolution, diffusers from
the latents. The attention projections of the original are 1 x 1 convolutions. diffusers before 0.18 called them query, key,
value and proj_attn.
"""

from stdit_jax.interop.mapping import CheckpointLayout

# Ours, diffusers (the name written first), original, kind.
_RESNET = (
  ("norm1", "norm1", "norm1", "norm"),
  ("conv1", "conv1", "conv1", "conv"),
  ("norm2", "norm2", "norm2", "norm"),
  ("conv2", "conv2", "conv2", "conv"),
  ("conv_shortcut", "conv_shortcut", "nin_shortcut", "conv"),
)
_ATTENTION = (
  ("to_q", ("to_q", "query"), ("q",)),
  ("to_k", ("to_k", "key"), ("k",)),
  ("to_v", ("to_v", "value"), ("v",)),
  ("to_out_0", ("to_out.0", "proj_attn"), ("proj_out",)),
)
_RESNET_AT = (
  ("encoder/down_blocks_{a}/resnets_{b}", "encoder.down_blocks.{a}.resnets.{b}", "encoder.down.{a}.block.{b}"),
  ("decoder/up_blocks_{a}/resnets_{b}", "decoder.up_blocks.{a}.resnets.{b}", "decoder.up.{-a}.block.{b}"),
  ("{part}/mid_block/resnets_0", "{part}.mid_block.resnets.0", "{part}.mid.block_1"),
  ("{part}/mid_block/resnets_1", "{part}.mid_block.resnets.1", "{part}.mid.block_2"),
)
_REST = (
  ("{part}/conv_in", "{part}.conv_in", "{part}.conv_in", "conv"),
  (
    "encoder/down_blocks_{a}/downsamplers_0/conv",
    "encoder.down_blocks.{a}.downsamplers.0.conv",
    "encoder.down.{a}.downsample.conv",
    "conv",
  ),
  (
    "decoder/up_blocks_{a}/upsamplers_0/conv",
    "decoder.up_blocks.{a}.upsamplers.0.conv",
    "decoder.up.{-a}.upsample.conv",
    "conv",
  ),
  ("{part}/mid_block/attentions_0/group_norm", "{part}.mid_block.attentions.0.group_norm", "{part}.mid.attn_1.norm", "norm"),
  ("{part}/conv_norm_out", "{part}.conv_norm_out", "{part}.norm_out", "norm"),
  ("{part}/conv_out", "{part}.conv_out", "{part}.conv_out", "conv"),
  ("quant_conv", "quant_conv", "quant_conv", "conv"),
  ("post_quant_conv", "post_quant_conv", "post_quant_conv", "conv"),
)


def _rows(column, attention_kind):
  """The rows of one layout, from column 1 (diffusers) or 2 (original) of the tables above."""
  rows = []
  for block in _RESNET_AT:
    rows += [(f"params/{block[0]}/{leaf[0]}", f"{block[column]}.{leaf[column]}", leaf[3]) for leaf in _RESNET]
  rows += [(f"params/{row[0]}", row[column], row[3]) for row in _REST]
  at = ("{part}/mid_block/attentions_0", "{part}.mid_block.attentions.0", "{part}.mid.attn_1")
  rows += [(f"params/{at[0]}/{row[0]}", tuple(f"{at[column]}.{n}" for n in row[column]), attention_kind) for row in _ATTENTION]
  return tuple(rows)


# "spatial_vae.module.": inside Open-Sora 1.2's video autoencoder. "vae.": inside the state dict of a pipeline.
DIFFUSERS = CheckpointLayout("diffusers", _rows(1, "linear"), prefixes=("", "spatial_vae.module.", "vae."))

LDM = CheckpointLayout(
  "ldm",
  _rows(2, "conv1x1"),
  prefixes=("first_stage_model.", ""),
  ignored=(r"loss\..*", r"model_ema\..*"),  # discriminator, perceptual network and averages of a training checkpoint
)
