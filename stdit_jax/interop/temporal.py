"""Names of Open-Sora 1.2's `VideoAutoencoderPipeline`: diffusers' image autoencoder and the temporal autoencoder."""

import numpy as np

from stdit_jax.interop.image_kl import DIFFUSERS
from stdit_jax.interop.mapping import CheckpointLayout

_BLOCK = (
  ("norm1", "norm1", "norm"),
  ("norm2", "norm2", "norm"),
  *((f"{conv}/conv", f"{conv}.conv", "conv3d") for conv in ("conv1", "conv2", "conv3")),
)
_BLOCK_AT = (
  ("{part}/block_res_blocks_{a}_{b}", "{part}.block_res_blocks.{a}.{b}"),
  ("{part}/res_blocks_{b}", "{part}.res_blocks.{b}"),
)
_REST = (
  ("encoder/conv_in/conv", "encoder.conv_in.conv", "conv3d"),
  ("{part}/conv_blocks_{a}/conv", "{part}.conv_blocks.{a}.conv", "conv3d"),
  ("{part}/norm1", "{part}.norm1", "norm"),
  ("encoder/conv2/conv", "encoder.conv2.conv", "conv3d"),
  ("decoder/conv1/conv", "decoder.conv1.conv", "conv3d"),
  ("decoder/conv_out/conv", "decoder.conv_out.conv", "conv3d"),
  ("quant_conv/conv", "quant_conv.conv", "conv3d"),
  ("post_quant_conv/conv", "post_quant_conv.conv", "conv3d"),
  ("shortcut_{part}", "shortcut_{part}", "linear"),  # only our models have it
)
_TEMPORAL = (
  *((f"{ours}/{leaf}", f"{theirs}.{name}", kind) for ours, theirs in _BLOCK_AT for leaf, name, kind in _BLOCK),
  *_REST,
)


def _in(prefix, names):
  """Foreign names, one or several, with a prefix."""
  return prefix + names if isinstance(names, str) else tuple(prefix + name for name in names)


def _computed(config):
  """The buffers with which the original normalises its latents."""
  numbers = {"shift": config.shift, "scale": config.scale}

  def make(values):
    return lambda: np.broadcast_to(np.asarray(values, np.float32), (config.latent_channels,)).reshape(1, -1, 1, 1, 1)

  return {name: make(values) for name, values in numbers.items()}


OPEN_SORA_VAE = CheckpointLayout(
  "open-sora-vae",
  (
    *(
      (ours.replace("params/", "params/image/", 1), _in("spatial_vae.module.", theirs), kind)
      for ours, theirs, kind in DIFFUSERS.rows
    ),
    *((f"params/temporal/{ours}", f"temporal_vae.{theirs}", kind) for ours, theirs, kind in _TEMPORAL),
  ),
  computed=_computed,
)
