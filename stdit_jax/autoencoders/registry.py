"""Finds an autoencoder by its name, by its configuration, or by the group `autoencoder` of a run's configuration."""

from typing import Any

import jax.numpy as jnp

from data.buckets import parse_buckets
from stdit_jax import fields
from stdit_jax.autoencoders import causal3d, image_kl, temporal
from stdit_jax.autoencoders.codec import Codec, run_jitted
from stdit_jax.autoencoders.family import Autoencoder

AUTOENCODERS = (image_kl.FAMILY, temporal.FAMILY, causal3d.FAMILY)
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def find(name: str) -> Autoencoder:
  """The `Autoencoder` that has a size of this name. Raises ValueError with all names."""
  return fields.choose({size: family for family in AUTOENCODERS for size in family.table}, name, "autoencoder")


def family_of(config: Any) -> Autoencoder:
  """The `Autoencoder` with this class of configurations."""
  return next(family for family in AUTOENCODERS if isinstance(config, family.config))


def autoencoder_model(config: Any) -> Any:
  """The model of the group `autoencoder` of a configuration. Raises ValueError for an unknown name, field or dtype."""
  if config.dtype not in DTYPES:
    raise ValueError(f"config: autoencoder.dtype is {config.dtype!r}; allowed: {', '.join(DTYPES)}")
  family = find(config.name)
  return family.build(family.get_config(config.name, **config.fields), DTYPES[config.dtype])


def make_codec(model: Any, variables: dict, micro_batch: int = 4, run: Any = run_jitted) -> Codec:
  """The `Codec` of a model and its variables."""
  return family_of(model.config).codec(model, variables, micro_batch, run)


def check_length(config: Any, num_frames: int, what: str) -> None:
  """Raises ValueError if the autoencoder changes the length of a clip. `what`: the first words of the message."""
  if not config.keeps(num_frames):
    near = [n for n in range(1, 2 * num_frames + 20) if config.keeps(n)]
    lower, upper = max((n for n in near if n < num_frames), default=None), min(n for n in near if n > num_frames)
    allowed = f"{lower} or {upper}" if lower else f"{upper}"
    raise ValueError(f"{what}, but the autoencoder changes this length; give {allowed}")


def check_lengths(config: Any, autoencoder: Any) -> None:
  """Raises ValueError if the autoencoder changes the length of the clips of a bucket.

  Args:
    config: a whole configuration.
    autoencoder: the configuration of its autoencoder, `autoencoder_model(config.autoencoder).config`.
  """
  for bucket in parse_buckets(config.data.buckets):
    if bucket.batch_size:
      what = f"config: bucket {bucket.name} has clips of {bucket.num_frames} frames for {config.autoencoder.name!r}"
      check_length(autoencoder, bucket.num_frames, what)
