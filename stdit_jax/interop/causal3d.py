"""Names of CogVideoX's 3D causal autoencoder: diffusers' `AutoencoderKLCogVideoX`. Our modules are nested in the same way."""

from stdit_jax.interop.mapping import CheckpointLayout, same_path

# (suffix of the name in diffusers, kind). A norm of the encoder has the empty suffix, a norm of the decoder the other three.
_NORM = (("", "norm"), (".norm_layer", "norm"), (".conv_y.conv", "conv3d"), (".conv_b.conv", "conv3d"))
_RESNET = (
  *((f"{norm}{leaf}", kind) for norm in ("norm1", "norm2") for leaf, kind in _NORM),
  ("conv1.conv", "conv3d"),
  ("conv2.conv", "conv3d"),
  ("conv_shortcut", "conv3d"),
)
_RESNET_AT = ("encoder.down_blocks.{a}.resnets.{b}", "decoder.up_blocks.{a}.resnets.{b}", "{part}.mid_block.resnets.{b}")
_ROWS = (
  *((f"{place}.{leaf}", kind) for place in _RESNET_AT for leaf, kind in _RESNET),
  ("{part}.conv_in.conv", "conv3d"),
  ("encoder.down_blocks.{a}.downsamplers.0.conv", "conv_frame"),
  ("decoder.up_blocks.{a}.upsamplers.0.conv", "conv_frame"),
  ("encoder.norm_out", "norm"),
  *((f"decoder.norm_out{leaf}", kind) for leaf, kind in _NORM[1:]),
  ("{part}.conv_out.conv", "conv3d"),
)

COGVIDEOX_VAE = CheckpointLayout(
  "cogvideox-vae", tuple((f"params/{same_path(name)}", name, kind) for name, kind in _ROWS), prefixes=("", "vae.")
)
