"""The state of a sampler, which every formulation takes and returns, and the models that it calls.

The leaves of the named tuples are arrays, shapes or shardings.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from stdit_jax.arrays import FrameMask, Latents

Denoise = Callable[..., Array]  # (x_t, t, x_mask or None) -> output
Edit = tuple[Float[Array, "B T"], FrameMask]  # (ratio, frames that carry noise already)
Previous = tuple[Latents, Float[Array, " B"], FrameMask]  # of the previous step: prediction, size, frames that took part


class StepState(NamedTuple):
  """What a sampler carries from step to step.

  Attributes:
    x: present latents (`Latents`).
    edit: state of `elements.start_edit` (`Edit`), None if no frames are given.
    previous: a `Previous`, `elements.no_previous` before the first step of a multistep sampler, None for others.
  """

  x: Any
  edit: Any = None
  previous: Any = None


class Noises(NamedTuple):
  """Standard normal noise of a step: `step` for stochastic samplers, `frames` for frames that become active."""

  step: Any = None
  frames: Any = None


NO_NOISES = Noises()
