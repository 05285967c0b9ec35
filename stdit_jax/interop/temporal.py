"""Names of Open-Sora 1.2's `VideoAutoencoderPipeline`: diffusers' image autoencoder and the temporal autoencoder."""

import numpy as np

from stdit_jax.interop.image_kl import DIFFUSERS
from stdit_jax.interop.mapping import CheckpointLayout, same_path

# (name in the original's temporal autoencoder, kind). Our modules are nested as in the original.
_BLOCK = (("norm1", "norm"), ("norm2", "norm"), ("conv1.conv", "conv3d"), ("conv2.conv", "conv3d"), ("conv3.conv", "conv3d"))
_TEMPORAL = (
  *(
    (f"{place}.{leaf}", kind) for place in ("{part}.block_res_blocks.{a}.{b}", "{part}.res_blocks.{b}") for leaf, kind in _BLOCK
  ),
  ("encoder.conv_in.conv", "conv3d"),
  ("{part}.conv_blocks.{a}.conv", "conv3d"),
  ("{part}.norm1", "norm"),
  ("encoder.conv2.conv", "conv3d"),
  ("decoder.conv1.conv", "conv3d"),
  ("decoder.conv_out.conv", "conv3d"),
  ("quant_conv.conv", "conv3d"),
  ("post_quant_conv.conv", "conv3d"),
  ("shortcut_{part}", "linear"),  # only our models have it
)


def _computed(config):
  """The buffers with which the original normalises its latents."""

  def buffer(values):
    return np.broadcast_to(np.asarray(values, np.float32), (config.latent_channels,)).reshape(1, -1, 1, 1, 1)

  return {"shift": buffer(config.shift), "scale": buffer(config.scale)}


OPEN_SORA_VAE = CheckpointLayout(
  "open-sora-vae",
  (
    *(
      (ours.replace("params/", "params/image/", 1), tuple(f"spatial_vae.module.{name}" for name in theirs), kind)
      for ours, theirs, kind in DIFFUSERS.rows
    ),
    *((f"params/temporal/{same_path(name)}", f"temporal_vae.{name}", kind) for name, kind in _TEMPORAL),
  ),
  computed=_computed,
)
