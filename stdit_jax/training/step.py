"""The two programs that train: a gradient program per (resolution, frames), one update program per stage.

A micro step is one bucket's batch; its gradient, normalised by the batch's own weight, is added to an accumulator. An
optimizer step is `accumulate` micro steps of equal weight. Programs count their traces: nothing in the loop retraces.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stdit_jax.parallel.shardings import constrain, tree_shardings
from stdit_jax.training.batches import array_axes
from stdit_jax.training.state import learning_rate

ADVERSARY = "discriminator"  # the network beside the one that it judges: its gradient is clipped by its own norm


class TraceCounter:
  """Counts how often each program is traced; the loop asserts on it, so that a silent recompilation is an error."""

  def __init__(self):
    self.counts = collections.Counter()

  def counted(self, name, function):
    """`function`, which runs only while JAX traces it, with its traces counted under `name`."""

    @functools.wraps(function)
    def traced(*args):
      self.counts[name] += 1
      return function(*args)

    return traced

  def check(self):
    """Raises RuntimeError when a program was traced more than once."""
    again = {name: n for name, n in self.counts.items() if n > 1}
    if again:
      raise RuntimeError(f"programs were traced more than once (shapes or dtypes changed between steps): {again}")


def new_accumulator(params):
  """Sum of the gradients of the micro steps so far, and how many had weight."""
  return {"gradients": jax.tree.map(jnp.zeros_like, params), "count": jnp.zeros((), jnp.float32)}


def accumulate_gradients(loss, layout, micro_batches, scales, params, frozen, batch, accumulator):
  """Adds the gradient of one bucket's batch to the accumulator.

  Args:
    loss: `(params, frozen, batch, layout) -> (loss per sample [b], dict of values per sample)`.
    layout: how the batch and activations lie on the mesh.
    micro_batches: parts into which the batch is split, one after the other; they share the batch's total weight, so that
      the split changes nothing.
    scales: tree of learning rate scales like `params`; where it is 0.0 no gradient is computed, it is zero.
    batch: dict of arrays with the global batch in front; `weight` is 0 for rows that could not be decoded.

  Returns:
    (accumulator, metrics): metrics of the batch, weighted means.
  """

  def weighted(params, part):
    params = jax.tree.map(lambda p, s: p if s else jax.lax.stop_gradient(p), params, scales)
    per_sample, values = loss(params, frozen, part, layout)
    counts = part["weight"] > 0
    total = lambda v: jnp.sum(jnp.where(counts, v * part["weight"], 0.0))  # noqa: E731
    return total(per_sample), {"loss": total(per_sample), **{name: total(v) for name, v in values.items()}}

  gradient = jax.grad(weighted, has_aux=True)
  if micro_batches == 1:
    gradients, sums = gradient(params, batch)
  else:
    # Row i * k + j goes to part j: every part takes rows from every device.
    def split(name, x):
      x = jnp.swapaxes(x.reshape(-1, micro_batches, *x.shape[1:]), 0, 1)
      return constrain(x, layout, None, *array_axes(name))

    def add(carry, part):
      return jax.tree.map(jnp.add, carry, gradient(params, part)), None

    parts = {name: split(name, x) for name, x in batch.items()}
    zero = jax.tree.map(
      lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], parts))
    )
    (gradients, sums), _ = jax.lax.scan(add, zero, parts)

  weight = batch["weight"].sum()
  # A loss that is not finite must not pass unseen, whatever its gradient: the count carries it to `update`.
  one = jnp.where(jnp.isfinite(sums["loss"]), (weight > 0).astype(jnp.float32), jnp.nan)
  scale = jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0)
  accumulator = {
    "gradients": jax.tree.map(lambda a, g: a + g * scale, accumulator["gradients"], gradients),
    "count": accumulator["count"] + one,
  }
  return accumulator, {**{name: value * scale for name, value in sums.items()}, "weight": weight}


def update(optimizer, scales, schedule, clip_norm, ema_decay, state, accumulator, step):
  """One optimizer step from the accumulated gradients; without weight, or with a loss or gradient that is not finite, no
  step: `stepped` and `nonfinite` of the metrics tell.

  Clipping by the global norm over the parameters that train, a discriminator's apart, AdamW, then the moving average
  `ema = decay * ema + (1 - decay) * params`, every step, in float32 (Open-Sora 1.2 `update_ema`), written so that the
  average of a parameter that does not train stays that parameter, bit for bit.

  Returns:
    (state, zeroed accumulator, metrics)
  """
  count = jnp.maximum(accumulator["count"], 1.0)
  gradients = jax.tree.map(lambda g, s: g / count if s else jnp.zeros_like(g), accumulator["gradients"], scales)
  apart = [[name for name in gradients if (name == ADVERSARY) is adversary] for adversary in (False, True)]
  norms = [optax.tree.norm({name: gradients[name] for name in names}) for names in apart if names]
  finite = functools.reduce(jnp.logical_and, map(jnp.isfinite, norms)) & jnp.isfinite(accumulator["count"])
  good = finite & (accumulator["count"] > 0)
  for names, norm in zip(apart, norms):
    clip = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12)) if clip_norm else 1.0
    clipped = jax.tree.map(lambda g: jnp.where(good, g * clip, 0.0), {name: gradients[name] for name in names})  # noqa: B023
    gradients |= clipped

  rate = schedule(step)
  updates, opt = optimizer.update(gradients, state["opt"], state["params"])
  params = jax.tree.map(lambda p, u, s: p - rate * s * u if s else p, state["params"], updates, scales)
  ema = jax.tree.map(lambda e, p: e + (p - e) * (1 - ema_decay), state["ema"], params)
  new = {"params": params, "ema": ema, "opt": opt}
  state = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)
  metrics = {"gradient_norm": norms[0], "learning_rate": rate, "stepped": good, "nonfinite": ~finite}
  return state, jax.tree.map(jnp.zeros_like, accumulator), metrics


class Programs:
  """The jitted programs of one stage, made once and kept: state and accumulator are donated and stay where they are."""

  def __init__(self, loss, mesh, state_shapes, frozen_shapes, optimizer, scales, stage, counter):
    self._loss, self._scales, self._counter, self._name = loss, scales, counter, stage.name
    self._replicated = NamedSharding(mesh, P())
    # Products of gathered kernels stay whole: as a loop over pieces ("windowed einsum"), which the TPU's compiler prefers, the
    # gradients of a layer cross the interconnect twice.
    tpu = mesh.devices.flat[0].platform == "tpu"
    self._options = {"compiler_options": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}} if tpu else {}
    self._state = tree_shardings(state_shapes, mesh)
    self._frozen = tree_shardings(frozen_shapes, mesh)
    self._accumulator = {"gradients": self._state["params"], "count": self._replicated}
    self.gradients = {}
    self.new_accumulator = jax.jit(new_accumulator, out_shardings=self._accumulator)
    self._shapes = state_shapes, frozen_shapes, jax.eval_shape(new_accumulator, state_shapes["params"])
    config, schedule = stage.config, learning_rate(stage.config.optimizer, stage.start, stage.steps)
    function = functools.partial(update, optimizer, scales, schedule, config.optimizer.clip_norm, config.ema_decay)
    self.update = jax.jit(
      counter.counted(f"{stage.name}: update", function),
      in_shardings=(self._state, self._accumulator, self._replicated),
      out_shardings=(self._state, self._accumulator, self._replicated),
      donate_argnums=(0, 1),
    )

  def update_arguments(self):
    """What `update` takes, as shapes: from them it is compiled ahead."""
    return self._shapes[0], self._shapes[2], jax.ShapeDtypeStruct((), jnp.int32)

  def gradient_arguments(self, batch):
    """What a program of `gradients` takes for a batch of these shapes."""
    return self._shapes[0]["params"], self._shapes[1], batch, self._shapes[2]

  def make_gradient(self, bucket, names, micro_batches, layout):
    """Adds the program of a (resolution, frames) bucket to `gradients`:
    `(params, frozen, batch, accumulator) -> (accumulator, metrics)`. `names`: of the arrays of the batch."""
    function = functools.partial(accumulate_gradients, self._loss, layout, micro_batches, self._scales)
    batch = {name: layout.sharding(*array_axes(name)) for name in names}
    self.gradients[bucket] = jax.jit(
      self._counter.counted(f"{self._name}: gradient {bucket[0]} x {bucket[1]}", function),
      **self._options,
      in_shardings=(self._state["params"], self._frozen, batch, self._accumulator),
      out_shardings=(self._accumulator, self._replicated),
      donate_argnums=(3,),
    )
