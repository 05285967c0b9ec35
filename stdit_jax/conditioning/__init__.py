"""Conditioners turn a row of a table, or a prompt, into the model's `cond`: its inputs beside the noisy latents.

`CONDITIONERS[name](config, family, model_config)` makes a conditioner for the configuration of a stage. A conditioner has

  name                of the conditioner
  num_classes         number of classes in the `label` column, None without labels
  encoder             its encoder of captions, None if there is none
  init(key)           (params, frozen): its parameters that train, and those that do not; {} for none
  from_files          names in `frozen` (see `init`) that every start reads from files; checkpoints do not hold them
  worker(cached)      picklable `(caption, label) -> {name: array}` for the loader's processes, or None if files hold the arrays
  specs(rows)         {name: ArraySpec}: what a batch holds
  collate(samples)    the arrays of `specs` from `data.loader.Sample`s; if `ahead`, the inputs of `lower`'s program
  ahead               whether its encoder runs in a separate program before the training step
  lower(rows, layout) that program, `(weights, arrays) -> cond`, lowered for so many rows; only if `ahead`
  is_cached(folder)   whether a folder of cached latents also holds the outputs of its encoder
  encode(weights, arrays, layout)   inside a program: arrays of `collate` -> `cond`; `weights` are those of its encoder
  prompts(texts)      the arrays of `collate` for prompts
  encoder_flops(rows) FLOPs of its encoder for so many rows
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from stdit_jax.conditioning.captions import Captions
from stdit_jax.conditioning.labels import Labels

CONDITIONERS: dict[str, Callable] = {"captions": Captions, "labels": Labels}


def replace_rows(cond: dict, null: dict, drop: jax.Array) -> dict:
  """`cond` with the rows of `null` where `drop` `[B]` is True."""

  def choose(own, other):
    return jnp.where(drop.reshape(-1, *[1] * (own.ndim - 1)), other, own)

  return jax.tree.map(choose, cond, null)
