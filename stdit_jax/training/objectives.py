"""Objectives: what a stage trains, with everything that depends on it. The only place that branches on the key `task`.

An objective is made of a stage's configuration and has

  part                 what it trains, the name of its parameters in a checkpoint
  rules                sharding rules of its parameters
  resizable            beginnings of names of arrays whose leading axis a later stage may change (transition.py)
  from_files           names in `frozen` that are read from files at every start, and are in no checkpoint
  counts_flops         whether `work` counts FLOPs
  shapes, init(key)    (params, frozen): what trains, is averaged and saved; and constants beside it
  loss, fixed_loss, fixed_names                  the loss per sample of a batch, and the one that validations measure
  batch, work, splits, data_config, worker, open_cache, check_plan, batch_maker    its data
  check_files, read_frozen, read_initial, load_checkpoint, beside                  its weights

Everything random comes from the sample's own key.
"""

from stdit_jax.training.autoencoding import AutoencoderObjective
from stdit_jax.training.denoising import DenoiserObjective

OBJECTIVES = {"denoiser": DenoiserObjective, "autoencoder": AutoencoderObjective}


def part_of(config):
  """What a configuration trains: "denoiser" or "autoencoder", the name of its parameters in a checkpoint."""
  return config.task


def make_objective(config):
  """The objective of a stage's configuration. Raises ValueError for parts that do not fit."""
  return OBJECTIVES[part_of(config)](config)
