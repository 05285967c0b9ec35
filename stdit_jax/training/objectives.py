"""An objective is what a stage trains, with everything that depends on it. Only this file branches on the key `task`.

The configuration of a stage makes an objective. It has

  part                 what it trains, the name of its parameters in a checkpoint
  rules                sharding rules of its parameters
  resizable            beginnings of names of arrays whose leading axis a later stage may change (transition.py)
  from_files           names in `frozen` that every start reads from files, and that no checkpoint has
  counts_flops         whether `work` counts FLOPs
  shapes, init(key)    (params, frozen): parameters that train, with averages and checkpoints; and constants
  loss, fixed_loss, fixed_names                  the loss per sample of a batch in training, and in validation
  batch, work, splits, data_config, worker, open_cache, check_plan, batch_maker    its data
  check_files, read_frozen, read_initial, load_checkpoint, beside                  its weights

All randomness comes from the key of the sample.
"""

from stdit_jax.config import Config
from stdit_jax.training.autoencoding import AutoencoderObjective
from stdit_jax.training.denoising import DenoiserObjective

Objective = DenoiserObjective | AutoencoderObjective
OBJECTIVES = {"denoiser": DenoiserObjective, "autoencoder": AutoencoderObjective}


def part_of(config: Config) -> str:
  """What a configuration trains: "denoiser" or "autoencoder", the name of its parameters in a checkpoint."""
  return config.task


def make_objective(config: Config) -> Objective:
  """The objective of a stage's configuration. Raises ValueError for parts that do not fit."""
  return OBJECTIVES[part_of(config)](config)
