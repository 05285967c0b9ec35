"""Names of CogVideoX's 3D causal autoencoder: diffusers' `AutoencoderKLCogVideoX`. Our hierarchy is theirs."""

from stdit_jax.interop.mapping import CheckpointLayout

# Ours, diffusers, kind.
_NORMS = tuple(
  row
  for norm in ("norm1", "norm2")
  for row in (
    (norm, norm, "norm"),  # the encoder's
    (f"{norm}/norm_layer", f"{norm}.norm_layer", "norm"),  # the decoder's
    (f"{norm}/conv_y/conv", f"{norm}.conv_y.conv", "conv3d"),
    (f"{norm}/conv_b/conv", f"{norm}.conv_b.conv", "conv3d"),
  )
)
_RESNET = (
  *_NORMS,
  ("conv1/conv", "conv1.conv", "conv3d"),
  ("conv2/conv", "conv2.conv", "conv3d"),
  ("conv_shortcut", "conv_shortcut", "conv3d"),
)
_RESNET_AT = (
  ("encoder/down_blocks_{a}/resnets_{b}", "encoder.down_blocks.{a}.resnets.{b}"),
  ("decoder/up_blocks_{a}/resnets_{b}", "decoder.up_blocks.{a}.resnets.{b}"),
  ("{part}/mid_block/resnets_{b}", "{part}.mid_block.resnets.{b}"),
)
_REST = (
  ("{part}/conv_in/conv", "{part}.conv_in.conv", "conv3d"),
  ("encoder/down_blocks_{a}/downsamplers_0/conv", "encoder.down_blocks.{a}.downsamplers.0.conv", "conv_frame"),
  ("decoder/up_blocks_{a}/upsamplers_0/conv", "decoder.up_blocks.{a}.upsamplers.0.conv", "conv_frame"),
  ("encoder/norm_out", "encoder.norm_out", "norm"),
  ("decoder/norm_out/norm_layer", "decoder.norm_out.norm_layer", "norm"),
  ("decoder/norm_out/conv_y/conv", "decoder.norm_out.conv_y.conv", "conv3d"),
  ("decoder/norm_out/conv_b/conv", "decoder.norm_out.conv_b.conv", "conv3d"),
  ("{part}/conv_out/conv", "{part}.conv_out.conv", "conv3d"),
)

COGVIDEOX_VAE = CheckpointLayout(
  "cogvideox-vae",
  tuple(
    [(f"params/{ours}/{leaf}", f"{theirs}.{name}", kind) for ours, theirs in _RESNET_AT for leaf, name, kind in _RESNET]
    + [(f"params/{ours}", theirs, kind) for ours, theirs, kind in _REST]
  ),
  prefixes=("", "vae."),
)
