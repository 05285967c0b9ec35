"""Types that all formulations share.

Arrays are tokens `[B, T, S, P]` (P = patch positions * channels) or latents `[B, T, H, W, C]`. Only axis 0 (batch), axis 1
(time) and the last axis (channels, possibly of several patch positions) have a meaning.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer, Num

Elements = Float[Array, "B T *S P"]
Latents = Float[ArrayLike, "B T *S P"]
FrameMask = Bool[ArrayLike, "B T"]  # True = frame to generate
Valid = Bool[ArrayLike, "B T *S P"]  # False = padding
PerSample = Num[ArrayLike, " B"]
Time = Num[ArrayLike, ""] | Num[ArrayLike, " B"]  # a timestep, or an index in a schedule
Index = Integer[ArrayLike, " B"]
Table = Float[np.ndarray, " n"]
Denoise = Callable  # (x_t, t, x_mask or None) -> output
Edit = tuple[Float[Array, "B T"], FrameMask]  # (ratio, frames that carry noise already)
Previous = tuple[Elements, Float[Array, " B"], FrameMask]  # of the previous step: prediction, size, frames that took part


class StepState(NamedTuple):
  """What a sampler carries from step to step.

  Attributes:
    x: present latents.
    edit: state of `elements.start_edit`, None if no frames are given.
    previous: `elements.no_previous` before the first step of a multistep sampler, None for others.
  """

  x: Latents
  edit: Edit | None = None
  previous: Previous | None = None


class Noises(NamedTuple):
  """Standard normal noise of a step: `step` for stochastic samplers, `frames` for frames that become active."""

  step: Latents | None = None
  frames: Latents | None = None


NO_NOISES = Noises()
