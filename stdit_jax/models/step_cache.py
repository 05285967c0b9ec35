"""Step caches: a sampler step reuses outputs of an earlier step.

Both caches are optional, because they change the result slightly:

PyramidBroadcast  several steps share one output of an attention. Outputs that change less are shared for longer: cross
                  attention most, then attention over time, then attention over space (Zhao et al. 2024, arXiv 2408.12588).
ResidualCache     a step skips all layers but the first if the first layer adds nearly the same as at the last full step. The
                  step then adds what the other layers added at the full step ("first block cache" of ParaAttention and
                  diffusers; TeaCache measures the change in the same way, Liu et al. 2024, arXiv 2411.19108).

Cached outputs are an argument and a result of the model (`reuse`). On a mesh they have the layout of the activations.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stdit_jax.arrays import ArrayLike


@dataclasses.dataclass(frozen=True)
class PyramidBroadcast:
  """Several steps share one output of an attention. The defaults come from VideoSys for Open-Sora 1.2.

  Attributes:
    space, time, cross: number of steps that share one output of this kind of attention. The first of them computes it.
    interval: the timesteps between which steps reuse outputs.
  """

  space: int = 2
  time: int = 4
  cross: int = 6
  interval: tuple[float, float] = (450.0, 930.0)

  def __post_init__(self):
    if min(self.space, self.time, self.cross) < 1:
      raise ValueError(f"pyramid broadcast: an output serves at least 1 step, not {self.space}, {self.time}, {self.cross}")

  def computes(self, step: int, t: ArrayLike) -> dict:
    """{kind of attention: whether it is computed} in sampler step number `step`, at timestep `t`."""
    inside = self.interval[0] < t < self.interval[1]
    return {kind: step == 0 or not inside or step % getattr(self, kind) == 0 for kind in ("space", "time", "cross")}


@dataclasses.dataclass(frozen=True)
class ResidualCache:
  """A step skips all layers but the first if the residual of the first layer changed little since the last full step.

  Attributes:
    threshold: limit of the mean absolute change of the residual, relative to its mean absolute value. Below the limit, the
      step skips the other layers. The sample that changed most decides for its batch.
  """

  threshold: float = 0.1

  def __post_init__(self):
    if not 0 <= self.threshold < 1:
      raise ValueError(f"residual cache: threshold is {self.threshold:g}; allowed: from 0, below 1")

  def computes(self, step: int, t: ArrayLike) -> dict:
    """{}: the step itself decides."""
    return {}


Cache = PyramidBroadcast | ResidualCache


def parse(text: str) -> Cache:
  """'pyramid', 'pyramid:2,4,6', 'residual' or 'residual:0.1' -> the cache; ValueError for anything else."""
  if match := re.fullmatch(r"pyramid(?::(\d+),(\d+),(\d+))?", text):
    return PyramidBroadcast(int(match[1]), int(match[2]), int(match[3])) if match[1] else PyramidBroadcast()
  if match := re.fullmatch(r"residual(?::([\d.]+))?", text):
    try:
      return ResidualCache(float(match[1])) if match[1] else ResidualCache()
    except ValueError as error:
      raise ValueError(f"step cache {text!r}: {error}") from None
  raise ValueError(f"step cache {text!r}: allowed: pyramid, pyramid:SPACE,TIME,CROSS (steps), residual, residual:THRESHOLD")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Reuse:
  """Cached outputs of earlier calls of a model.

  Attributes:
    cache: PyramidBroadcast or ResidualCache.
    cached: the arrays of the model's `cache_specs`, zeros before the first step.
    computes: {kind of attention: bool scalar}, from `computes` of the cache.
  """

  cache: Cache = dataclasses.field(metadata={"static": True})
  cached: dict
  computes: dict


Call = Callable[..., Any]  # (kind of attention, module, *inputs) -> output: `compute`, or `CachedCalls`


def compute(kind: str, function: Callable, *inputs) -> Any:
  """Returns `function(*inputs)`. It is the default `call` of a block, without cached outputs."""
  return function(*inputs)


@dataclasses.dataclass
class CachedCalls:
  """Takes the place of `compute` if outputs of attention are cached."""

  cached: dict  # {kind: output} of this block
  computes: dict  # as in `Reuse`
  outputs: dict = dataclasses.field(default_factory=dict)  # {kind: output} after the calls

  def __call__(self, kind: str, function: Any, *inputs) -> Any:
    run, reuse = lambda module, *inputs: module(*inputs), lambda module, *inputs: self.cached[kind]
    self.outputs[kind] = nn.cond(self.computes[kind], run, reuse, function, *inputs)
    return self.outputs[kind]


def residual_layers(layers: Callable, x: ArrayLike, first_layer: Callable, cached: Mapping, threshold: float) -> tuple:
  """Runs the first layer. Runs the others only if the first layer's residual changed by `threshold` or more.

  `cached` holds the last full step's residuals, "first" (first layer) and "others" (all other layers), and "computed" (number
  of full steps). Returns (x, cached for the next step).
  """
  y = first_layer(x)
  added = (y - x).astype(jnp.float32)
  axes = (1, 2, 3)
  change = jnp.abs(added - cached["first"]).mean(axes) / jnp.abs(cached["first"]).mean(axes)  # not finite at the first step
  skip = (change < threshold).all()
  others = jax.lax.cond(skip, lambda: cached["others"], lambda: layers(y) - y)
  first = jnp.where(skip, cached["first"], added)
  return y + others, {"first": first, "others": others, "computed": cached["computed"] + ~skip}
