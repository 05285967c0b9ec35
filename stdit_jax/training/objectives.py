"""An objective is what a stage trains, with everything that depends on it. Only this file branches on the key `task`.

The configuration of a stage makes an objective. It has

  part                 what it trains, the name of its parameters in a checkpoint
  rules                sharding rules of its parameters
  resizable            parts of array names. A later stage may change the first axis of these arrays (transition.py)
  from_files           names in `frozen`. Every start reads these weights from files. Checkpoints do not have them
  counts_flops         whether `work` counts FLOPs
  shapes, init(key)    (params, frozen). `params` train, and have averages. `frozen` are constants
  loss                 the loss per sample of a batch in training
  fixed_loss           the losses of a batch in validation, one row per timestep; fixed_names: the names of these rows
  batch, work, data_config, worker, open_cache, check_plan, batch_maker            for its data
  encodes_ahead        whether a separate program encodes captions before the step
  splits               whether the mesh may split the tokens of clips of this length
  check_files, read_frozen, read_initial, load_checkpoint                          for its weights
  encoders             (shapes, sharding rules) of each encoder that lies on the devices and is in neither `params` nor `frozen`
  sample_weights       (shapes, sharding rules) of the weights that lie on the devices only during a sample, one after another

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
