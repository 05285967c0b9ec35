"""The stack of blocks: equal layers whose parameters are stacked over depth, `[depth, ...]`.

`run_layers` loops over depth. `remat` selects the activations to store for the backward pass. `run_blocks` adds the needs of
denoisers: gathering of sharded parameters, cached outputs of earlier sampling steps (step_cache.py), captured activations.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from stdit_jax.arrays import ArrayLike
from stdit_jax.models import step_cache
from stdit_jax.models.layers import DTYPES, OVER_TIME
from stdit_jax.parallel.shardings import constrain, gather_layer

BLOCK_INPUT = "block_input"
REMAT_POLICIES = {  # activations of a layer to store for the backward pass, which recomputes the others
  "none": None,  # everything
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # products with parameters, not attention
  "full": jax.checkpoint_policies.nothing_saveable,  # inputs of the layer only
  "offload": jax.checkpoint_policies.save_and_offload_only_these_names(  # inputs of the layer, in the host's memory
    names_which_can_be_saved=[], names_which_can_be_offloaded=[BLOCK_INPUT], offload_src="device", offload_dst="pinned_host"
  ),
}


def remat(layer: Callable, policy: str, scan: bool) -> Callable:
  """`layer` that stores the activations of `policy`, one of REMAT_POLICIES, for its backward pass."""
  if policy == "none":
    return layer

  def named(x, parameters):
    return layer(checkpoint_name(x, BLOCK_INPUT), parameters)

  return jax.checkpoint(named if policy == "offload" else layer, policy=REMAT_POLICIES[policy], prevent_cse=not scan)


def run_layers(layer: Callable, x: jax.Array, stacked: Any, scan: bool, policy: str) -> tuple:
  """`x` through equal layers, `layer(x, parameters) -> (x, output)`.

  Args:
    stacked: pytree of arrays `[depth, ...]`.
    scan: one `lax.scan`, compiled once for any depth. False unrolls: compile time grows with depth, but the program copies no
      parameters into a loop and no gradients out of it (faster on a CPU: tests/benchmarks/denoiser.py).
    policy: one of REMAT_POLICIES.

  Returns:
    (x, outputs stacked over depth, None if the layers return None)
  """
  layer = remat(layer, policy, scan)
  if scan:
    return jax.lax.scan(layer, x, stacked)
  leaves, structure = jax.tree.flatten(stacked)
  # The gradient of a split is one concatenation. The gradient of indexing is a sum of arrays padded to full depth.
  outputs = []
  for parts in zip(*(jax.lax.split(leaf, (1,) * len(leaf)) for leaf in leaves)):
    x, output = layer(x, structure.unflatten(part[0] for part in parts))
    outputs.append(output)
  return x, jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *outputs)


def stacked_params(module: nn.Module, blocks: Mapping[str, nn.Module], depth: int, *inputs) -> dict:
  """The parameters `[depth, ...]` of `blocks`, declared in `module` if they do not exist. `inputs` are examples for a block."""

  def init(block):
    return lambda key: jax.vmap(lambda k: block.init(k, *inputs)["params"])(jax.random.split(key, depth))

  def parameters(name, block):
    # If the parameters exist, `param` would trace a whole block only to compare shapes. The layers inside it check them, too.
    return module.get_variable("params", name) if module.has_variable("params", name) else module.param(name, init(block))

  return {name: parameters(name, block) for name, block in blocks.items()}


def run_blocks(
  module: nn.Module,
  blocks: Mapping[str, nn.Module],
  rules: tuple,
  x: ArrayLike,
  conditions: Any,
  reuse: step_cache.Reuse | None = None,
) -> tuple:
  """Tokens `[B, T, S, D]` through the layers of a denoiser.

  Args:
    module: the denoiser; it has `config` and `layout`. Only its compact method may call `run_blocks`.
    blocks: {name of its parameters: block}, the blocks of one layer in order, called as `block(x, conditions, layer number)`.
    rules: sharding rules of the parameters.
    reuse: `step_cache.Reuse`, or None.

  Returns:
    (x, cached outputs for the next sampling step or None)
  """
  config, layout = module.config, module.layout
  x = constrain(x, layout, *OVER_TIME)
  layers = stacked_params(module, blocks, config.depth, x, conditions, 0), jnp.arange(config.depth)
  capturing = module.is_mutable_collection("intermediates") and not module.is_initializing()
  pyramid = reuse if reuse is not None and isinstance(reuse.cache, step_cache.PyramidBroadcast) else None

  def apply(name, params, *inputs):
    if not capturing or config.scan:  # `sow` cannot take values out of a scan
      return blocks[name].apply({"params": params}, *inputs)
    x, state = blocks[name].apply({"params": params}, *inputs, capture_intermediates=True, mutable="intermediates")
    module.sow("intermediates", name, state["intermediates"])
    return x

  def layer(x, inputs):
    params, number, cached = inputs
    outputs = {}
    for name in blocks:
      own = gather_layer(params[name], name, layout, DTYPES[config.dtype], rules)
      # Without cached attention outputs the block gets no `call`: the list is empty.
      calls = [step_cache.CachedCalls(cached[name], pyramid.computes)] if pyramid else []
      x = apply(name, own, x, conditions, number, *calls)
      for call in calls:
        outputs[name] = call.outputs
    return constrain(x, layout, *OVER_TIME), outputs or None

  # A captured value cannot leave a layer that the backward pass recomputes.
  run = functools.partial(run_layers, layer, scan=config.scan, policy="none" if capturing else config.remat)
  if reuse is None or isinstance(reuse.cache, step_cache.PyramidBroadcast):
    return run(x, (*layers, reuse and reuse.cached))
  # ResidualCache: the first layer always runs, and its output decides whether the others run.
  first, others = jax.tree.map(lambda p: p[0], layers), jax.tree.map(lambda p: p[1:], layers)

  def first_layer(x):
    return layer(x, (*first, None))[0]

  def other_layers(x):
    return run(x, (*others, None))[0]

  return step_cache.residual_layers(other_layers, x, first_layer, reuse.cached, reuse.cache.threshold)
