"""Sampling without computing everything in every step: what a model found in an earlier step serves again.

Two ways, both of choice, since both change the result a little:

PyramidBroadcast  outputs of attention serve several steps, those that change least the longest: cross attention longer than
                  attention over time, that longer than attention over space (Zhao et al. 2024, arXiv 2408.12588).
ResidualCache     all layers but the first are left out of a step in which the first one adds nearly what it added when the
                  others were computed last; what they added then is added again ("first block cache", as ParaAttention and
                  diffusers have it; the idea of measuring the change is TeaCache's, Liu et al. 2024, arXiv 2411.19108).

What is kept is an argument and a result of the model (`STDiT.__call__`, `reuse`); on a mesh it lies as the activations do.
"""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class PyramidBroadcast:
  """Attributes: space, time, cross: steps that one output of this attention serves, with the one that computes it; interval:
  timesteps between which it does. Defaults as VideoSys sets them for Open-Sora 1.2 (`OpenSoraPABConfig`)."""

  space: int = 2
  time: int = 4
  cross: int = 6
  interval: tuple[float, float] = (450.0, 930.0)

  def __post_init__(self):
    if min(self.space, self.time, self.cross) < 1:
      raise ValueError(f"pyramid broadcast: an output serves at least 1 step, not {self.space}, {self.time}, {self.cross}")

  def computes(self, step, t):
    """{kind of attention: whether it is computed} in sampler step number `step`, at timestep `t`."""
    inside = self.interval[0] < t < self.interval[1]
    return {kind: step == 0 or not inside or step % getattr(self, kind) == 0 for kind in ("space", "time", "cross")}


@dataclasses.dataclass(frozen=True)
class ResidualCache:
  """Attributes: threshold: mean absolute change of what the first layer adds, relative to its mean absolute value, below which
  the others are left out; of a batch the sample that changed most decides."""

  threshold: float = 0.1

  def __post_init__(self):
    if not 0 <= self.threshold < 1:
      raise ValueError(f"residual cache: threshold is {self.threshold:g}; allowed: from 0, below 1")

  def computes(self, step, t):
    """Nothing that could be said beforehand."""
    del step, t
    return {}


def parse(text):
  """'pyramid', 'pyramid:2,4,6', 'residual' or 'residual:0.1' -> the cache; ValueError for anything else."""
  if match := re.fullmatch(r"pyramid(?::(\d+),(\d+),(\d+))?", text):
    return PyramidBroadcast(*(int(n) for n in match.groups())) if match[1] else PyramidBroadcast()
  if match := re.fullmatch(r"residual(?::([\d.]+))?", text):
    try:
      return ResidualCache(float(match[1])) if match[1] else ResidualCache()
    except ValueError as error:
      raise ValueError(f"step cache {text!r}: {error}") from None
  raise ValueError(f"step cache {text!r}: allowed: pyramid, pyramid:SPACE,TIME,CROSS (steps), residual, residual:THRESHOLD")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Reuse:
  """What one call of a model may take from earlier ones.

  Attributes:
    cache: PyramidBroadcast or ResidualCache.
    kept: arrays as `kept_arrays` says, or what the call before returned.
    computes: {kind: bool scalar}, see `computes` of the cache.
  """

  cache: PyramidBroadcast | ResidualCache = dataclasses.field(metadata={"static": True})
  kept: dict
  computes: dict


def compute(kind, function, *inputs):
  """`function(*inputs)`: how a block calls its attention when nothing is kept."""
  del kind
  return function(*inputs)


class Keeper:
  """How a block calls its attention, in place of `compute`, when outputs are kept.

  Args:
    kept: {kind: output} of this block; computes: as in `Reuse`.

  Attributes: outputs: {kind: output} after the calls.
  """

  def __init__(self, kept, computes):
    self._kept, self._computes, self.outputs = kept, computes, {}

  def __call__(self, kind, function, *inputs):
    before = self._kept[kind]
    self.outputs[kind] = nn.cond(
      self._computes[kind], lambda module, *inputs: module(*inputs), lambda module, *inputs: before, function, *inputs
    )
    return self.outputs[kind]


@dataclasses.dataclass(frozen=True)
class Kept:
  """One array that is kept, zeros before the first step. Attributes: shape, dtype; axes: names of dimensions for a `Layout`."""

  shape: tuple
  dtype: jnp.dtype
  axes: tuple = ()


def kept_arrays(cache, shape, dtype, blocks, depth, axes):
  """What a model keeps, as a tree of `Kept`.

  Args:
    shape: `[B, T, S, D]` of the tokens in the model; dtype, axes: theirs between layers.
    blocks: {name of a block of each layer: {kind of attention: axes of its output}}.
  """
  if isinstance(cache, ResidualCache):
    return {"first": Kept(shape, jnp.float32, axes), "others": Kept(shape, dtype, axes), "computed": Kept((), jnp.int32)}
  return {
    name: {kind: Kept((depth, *shape), dtype, (None, *axes)) for kind, axes in kinds.items()} for name, kinds in blocks.items()
  }


def residual_layers(layers, x, first_layer, kept, threshold):
  """`x` through the first layer, and through the others unless it adds about what it added when they were computed last.

  Args:
    first_layer, layers: `[B, T, S, D] -> [B, T, S, D]`.
    kept: {"first": what the first layer added then, "others": what the others did, "computed": in how many steps}.

  Returns:
    (x, what is kept)
  """
  y = first_layer(x)
  added = (y - x).astype(jnp.float32)
  axes = (1, 2, 3)
  change = jnp.abs(added - kept["first"]).mean(axes) / jnp.abs(kept["first"]).mean(axes)  # before the first step no number
  again = (change < threshold).all()
  others = jax.lax.cond(again, lambda: kept["others"], lambda: layers(y) - y)
  first = jnp.where(again, kept["first"], added)
  return y + others, {"first": first, "others": others, "computed": kept["computed"] + ~again}
