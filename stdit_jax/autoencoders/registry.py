"""The autoencoder that the group `autoencoder` of a configuration names."""

import jax.numpy as jnp

from data.buckets import parse_buckets
from stdit_jax.autoencoders import codec

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def autoencoder_model(config):
  """The model of the group `autoencoder` of a configuration. Raises ValueError for an unknown name, field or dtype."""
  if config.dtype not in DTYPES:
    raise ValueError(f"config: autoencoder.dtype is {config.dtype!r}; allowed: {', '.join(DTYPES)}")
  module = codec.find(config.name)
  return module.build(module.get_config(config.name, **config.fields), DTYPES[config.dtype])


def check_lengths(config, autoencoder):
  """Raises ValueError if the autoencoder changes the length of the clips of a bucket.

  Args:
    config: a whole configuration.
    autoencoder: the configuration of its autoencoder, `autoencoder_model(config.autoencoder).config`.
  """
  for bucket in parse_buckets(config.data.buckets):
    if bucket.batch_size and not autoencoder.keeps(bucket.num_frames):
      raise ValueError(
        f"config: bucket {bucket.name} has clips of {bucket.num_frames} frames, which {config.autoencoder.name!r} does not "
        f"give back; nearest: {codec.nearest_lengths(autoencoder, bucket.num_frames)}"
      )
