"""The two programs that train: a gradient program per (resolution, frames), and an update program per stage.

A micro step is the batch of one bucket. The gradient program normalises its gradient by the weight of the batch, and adds it to
an accumulator. An optimizer step is `accumulate` micro steps of equal weight. A counter listens to JAX's compile events, so a
test and the loop notice a second compilation.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stdit_jax.parallel.shardings import Layout, Tree, constrain, tree_shardings
from stdit_jax.training.counter import CompileCounter
from stdit_jax.training.objectives import Objective
from stdit_jax.training.stages import Stage
from stdit_jax.training.state import learning_rate, learning_rate_scales, make_optimizer, state_shapes

ADVERSARY = "discriminator"  # name of the discriminator's parameters; `update` clips their gradient by its own norm


@dataclasses.dataclass(frozen=True)
class Split:
  """How to split the batch of a bucket: over the mesh by `layout`, then into `micro_batches` that run one after another."""

  layout: Layout
  micro_batches: int = 1


def new_accumulator(params: Tree) -> Tree:
  """An empty accumulator. It sums gradients, and counts micro steps with a weight above 0."""
  return {"gradients": jax.tree.map(jnp.zeros_like, params), "count": jnp.zeros((), jnp.float32)}


def accumulate_gradients(
  loss: Callable, split: Split, specs: Tree, scales: Tree, params: Tree, frozen: Tree, batch: Tree, accumulator: Tree
) -> tuple[Tree, Tree]:
  """Adds the gradient of one bucket's batch to the accumulator.

  Args:
    loss: `(params, frozen, batch, layout) -> (loss per sample [b], dict of values per sample)`.
    split: `Split` of the batch. All micro batches use the total weight of the batch, so the split changes no value.
    specs: tree of `ArraySpec` like `batch`.
    scales: tree of learning rate scales like `params`. A parameter with scale 0.0 gets the gradient zero, without computing it.
    batch: tree of arrays, whose first axis is the global batch. `weight` is 0 for rows that could not be decoded.

  Returns:
    (accumulator, metrics). Metrics are weighted means over the batch.
  """

  def weighted(params, part):
    params = jax.tree.map(lambda p, s: p if s else jax.lax.stop_gradient(p), params, scales)
    per_sample, values = loss(params, frozen, part, split.layout)
    chex.assert_shape(per_sample, part["weight"].shape)
    counts = part["weight"] > 0
    total = lambda v: jnp.sum(jnp.where(counts, v * part["weight"], 0.0))  # noqa: E731
    return total(per_sample), {"loss": total(per_sample), **{name: total(v) for name, v in values.items()}}

  chex.assert_trees_all_equal_shapes_and_dtypes(batch, jax.tree.map(lambda spec: spec.struct, specs))
  gradient = jax.grad(weighted, has_aux=True)
  if split.micro_batches == 1:
    gradients, sums = gradient(params, batch)
  else:
    # Row i * micro_batches + j goes to micro batch j, so that each micro batch has rows of each device.
    def take_apart(spec, x):
      x = jnp.swapaxes(x.reshape(-1, split.micro_batches, *x.shape[1:]), 0, 1)
      return constrain(x, split.layout, None, *spec.axes)

    def add(carry, part):
      return jax.tree.map(jnp.add, carry, gradient(params, part)), None

    parts = jax.tree.map(take_apart, specs, batch)
    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], parts)))
    (gradients, sums), _ = jax.lax.scan(add, zero, parts)

  weight = batch["weight"].sum()
  # A non-finite loss may have a finite gradient. The count then becomes NaN, so that `update` skips the step.
  one = jnp.where(jnp.isfinite(sums["loss"]), (weight > 0).astype(jnp.float32), jnp.nan)
  scale = jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0)
  accumulator = {
    "gradients": jax.tree.map(lambda a, g: a + g * scale, accumulator["gradients"], gradients),
    "count": accumulator["count"] + one,
  }
  return accumulator, {**{name: value * scale for name, value in sums.items()}, "weight": weight}


def update(
  optimizer: optax.GradientTransformationExtraArgs, scales: Tree, schedule: Callable, clip_norm: float, ema_decay: float,
  state: Tree, accumulator: Tree, step: jax.Array,
) -> tuple[Tree, Tree, Tree]:  # fmt: skip
  """One optimizer step from the accumulated gradients.

  Skips the step if no sample had weight, or if a loss or gradient is not finite. The metrics `stepped` and `nonfinite` report
  this. Clips the gradients by their global norm, separately for a discriminator. AdamW follows, then the moving
  average `ema = decay * ema + (1 - decay) * params` in float32 (Open-Sora 1.2, `update_ema`). The average of a parameter that
  does not train equals the parameter, bit for bit.

  Returns:
    (state, zeroed accumulator, metrics)
  """
  count = jnp.maximum(accumulator["count"], 1.0)
  gradients = jax.tree.map(lambda g, s: g / count if s else jnp.zeros_like(g), accumulator["gradients"], scales)
  # [[names of all parts but the discriminator], [name of the discriminator]]. Each list is clipped by its own norm.
  apart = [[name for name in gradients if (name == ADVERSARY) is adversary] for adversary in (False, True)]
  norms = [optax.tree.norm({name: gradients[name] for name in names}) for names in apart if names]
  finite = functools.reduce(jnp.logical_and, map(jnp.isfinite, norms)) & jnp.isfinite(accumulator["count"])
  good = finite & (accumulator["count"] > 0)
  for names, norm in zip(apart, norms):
    clip = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12)) if clip_norm else 1.0
    gradients |= jax.tree.map(lambda g: jnp.where(good, g * clip, 0.0), {name: gradients[name] for name in names})  # noqa: B023

  rate = schedule(step)
  updates, opt = optimizer.update(gradients, state["opt"], state["params"], scales=scales)
  params = jax.tree.map(lambda p, u, s: p - rate * s * u if s else p, state["params"], updates, scales)
  ema = jax.tree.map(lambda e, p: e + (p - e) * (1 - ema_decay), state["ema"], params)
  new = {"params": params, "ema": ema, "opt": opt}
  state = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)
  metrics = {"gradient_norm": norms[0], "learning_rate": rate, "stepped": good, "nonfinite": ~finite}
  return state, jax.tree.map(jnp.zeros_like, accumulator), metrics


@dataclasses.dataclass(frozen=True)
class Program:
  """A program that is not compiled yet.

  Attributes:
    jitted: the function; arguments: shapes of its arguments.
    batch, work: of a gradient program: the batch as a tree of `ArraySpec`, and its (tokens, model FLOPs).
  """

  name: str
  jitted: Any
  arguments: tuple
  batch: Any = None
  work: tuple[int, float] = (0, 0.0)

  def lower(self) -> jax.stages.Lowered:
    """The program, traced and lowered for its arguments."""
    return self.jitted.lower(*self.arguments)


class Programs:
  """The programs of one stage. They donate state and accumulator, which stay on their devices.

  Attributes:
    optimizer: of the stage; scales: of the learning rate, a tree like the parameters.
    shapes: (state, frozen, accumulator); state_shardings: of the state.
    new_accumulator: `params -> accumulator`.
    update: the `Program` `(state, accumulator, step) -> (state, accumulator, metrics)`.
  """

  def __init__(self, objective: Objective, stage: Stage, mesh: Mesh, counter: CompileCounter):
    self.objective, self.name, self._counter = objective, stage.name, counter
    params, frozen = objective.shapes
    config = stage.config
    self.optimizer = make_optimizer(config.optimizer)
    self.scales = learning_rate_scales(params, config.train, config.optimizer.scales)
    shapes = state_shapes(params, self.optimizer)
    self.shapes = shapes, frozen, jax.eval_shape(new_accumulator, params)
    self._replicated = NamedSharding(mesh, P())
    self.state_shardings = tree_shardings(shapes, mesh, objective.rules)
    self._frozen = tree_shardings(frozen, mesh, objective.rules)
    self._accumulator = {"gradients": self.state_shardings["params"], "count": self._replicated}
    # The TPU's compiler prefers to compute products of gathered kernels in a loop over pieces ("windowed einsum"). Then the
    # gradients of a layer cross the interconnect twice. This option keeps the products whole.
    tpu = mesh.devices.flat[0].platform == "tpu"
    self._options = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"} if tpu else None
    self.new_accumulator = jax.jit(new_accumulator, out_shardings=self._accumulator)
    schedule = learning_rate(config.optimizer, stage.start, stage.steps)
    function = functools.partial(update, self.optimizer, self.scales, schedule, config.optimizer.clip_norm, config.ema_decay)
    places = self.state_shardings, self._accumulator, self._replicated
    jitted = jax.jit(counter.counted("update", function), in_shardings=places, out_shardings=places, donate_argnums=(0, 1))
    arguments = self.shapes[0], self.shapes[2], jax.ShapeDtypeStruct((), jnp.int32)
    self.update = Program(f"{stage.name}: update", jitted, arguments)

  def gradient(self, bucket: tuple[str, int], rows: int, split: Split) -> Program:
    """`(params, frozen, batch, accumulator) -> (accumulator, metrics)` of a (resolution, frames) bucket, for `rows` samples."""
    layout, batch = split.layout, self.objective.batch(bucket, rows, split.layout.token_parts)
    function = functools.partial(accumulate_gradients, self.objective.loss, split, batch, self.scales)
    places = jax.tree.map(lambda spec: layout.sharding(*spec.axes), batch)
    name = f"gradient {bucket[0]} x {bucket[1]}"  # without the stage: JAX's cache serves equal programs of other stages
    jitted = jax.jit(
      self._counter.counted(name, function),
      compiler_options=self._options,
      in_shardings=(self.state_shardings["params"], self._frozen, places, self._accumulator),
      out_shardings=(self._accumulator, self._replicated),
      donate_argnums=(3,),
    )
    arguments = self.shapes[0]["params"], self.shapes[1], jax.tree.map(lambda spec: spec.struct, batch), self.shapes[2]
    return Program(f"{self.name}: {name}", jitted, arguments, batch, self.objective.work(batch))
