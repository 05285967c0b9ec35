"""The provenance of cached latents and text features, and the cache that a training opens in place of videos.

`data/latents.py` has the keys, shards and readers of a cache. `encoding.py` makes it.
"""

import dataclasses
import json
from typing import Any

from data import latents, paths
from data.config import DataConfig
from data.sources import Table
from stdit_jax.autoencoders.registry import autoencoder_model
from stdit_jax.config import Autoencoder, Config, TextEncoder
from stdit_jax.models import t5


def _plain(values):
  return json.loads(json.dumps(values))


def _if_there(path):
  """{"weights": fingerprint of the file}, or {} without a file. A training from a cache does not need the file."""
  return {"weights": paths.fingerprint(path)} if path and paths.exists(path) else {}


def autoencoder_identity(config: Autoencoder) -> dict[str, Any]:
  """The values of the group `autoencoder` that decide the latents of pixels."""
  fields = dataclasses.asdict(autoencoder_model(config).config)
  del fields["remat"]
  return {"name": config.name, "dtype": config.dtype, "fields": _plain(fields), **_if_there(config.weights)}


def text_identity(config: TextEncoder) -> dict[str, Any]:
  """The values of the group `text_encoder` that decide the features of captions."""
  fields = dataclasses.asdict(t5.get_config(config.name, **config.fields))
  fields = {name: value for name, value in fields.items() if name not in ("scan", "remat")}
  tokenizer = paths.fingerprint(config.tokenizer) if paths.is_folder(config.tokenizer) else config.tokenizer
  plain = {name: getattr(config, name) for name in ("name", "max_length", "clean_captions")}
  return {**plain, "tokenizer": tokenizer, "fields": _plain(fields), **_if_there(config.weights)}


def open_cache(config: Config, conditioner: Any, data: DataConfig, table: Table) -> latents.Cache:
  """The `data.latents.Cache` of a stage. Raises ValueError with the differences if the cache has another provenance.

  Args:
    config: of the stage; conditioner: of its denoiser.
    data: its `DataConfig`; table: its rows.
  """
  wanted = {**latents.made_from_clips(data, table), "autoencoder": autoencoder_identity(config.autoencoder)}
  if config.autoencoder.sample_posterior:
    wanted["log_variance"] = True
  found, text = latents.find(data.latents, "latents", wanted), None
  if conditioner.is_cached(data.latents):
    wanted = {**latents.made_from_captions(data, table), "text_encoder": text_identity(config.text_encoder)}
    text = latents.find(data.latents, "text", wanted)
  return latents.Cache(found, text, table, data)
