"""Random frame masks: which frames of a training clip stay clean as a condition, and which are generated.

Names are those of Open-Sora 1.2 (`utils/train_utils.py`), its spelling included, and of 1.1 with `mask_` in front. With T
latent frames and q = T // 4, the clean frames are

  identity (1.1: mask_no)   none
  quarter_random            a run of 1..q frames anywhere
  quarter_head / _tail      the first / last 1..q frames
  quarter_head_tail         the first n and the last n frames, n in 1..q
  image_random              one frame anywhere
  image_head / _tail        the first / last frame
  image_head_tail           the first and the last frame
  random (1.2)              each frame with probability r, r uniform in (0.1, 0.9) per clip
  intepolate (1.2)          every second frame, from the first or the second

Two errors of the original are corrected. With T < 4 its quarter masks raise an error (empty range); here q is at least 1.
With T = 2 its image_head_tail makes all frames clean, and the loss is 0 / 0. Here, if a mask would make all frames clean, the
last frame is generated, as in the original's `random`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Key

_SHARED = tuple(f"{kind}_{where}" for kind in ("quarter", "image") for where in ("random", "head", "tail", "head_tail"))
NAMES_1_1 = ("mask_no", *(f"mask_{name}" for name in _SHARED))
NAMES_1_2 = ("identity", "random", "intepolate", *_SHARED)


@dataclasses.dataclass(frozen=True)
class FrameMasks:
  """A distribution of frame masks; `create` makes one. `names` are those of Open-Sora 1.2, `probabilities` sum to 1."""

  names: tuple[str, ...]
  probabilities: tuple[float, ...]

  @classmethod
  def create(cls, ratios: dict[str, float]) -> "FrameMasks":
    """Makes a distribution from {name: probability}. The names are all of 1.1, or all of 1.2.

    With names of 1.2, a missing `identity` gets the remaining probability.

    Raises:
      ValueError: unknown or mixed names, probabilities outside [0, 1] or with a wrong sum.
    """
    ratios = {name: float(ratio) for name, ratio in ratios.items()}
    old = bool(ratios) and all(name in NAMES_1_1 for name in ratios)
    if unknown := [name for name in ratios if name not in (NAMES_1_1 if old else NAMES_1_2)]:
      raise ValueError(
        f"mask_ratios: unknown name {', '.join(unknown)}; allowed: {', '.join(NAMES_1_2)} (Open-Sora 1.2),"
        f" or only names of 1.1: {', '.join(NAMES_1_1)}"
      )
    if wrong := [f"{name} = {ratio:g}" for name, ratio in ratios.items() if not 0 <= ratio <= 1]:
      raise ValueError(f"mask_ratios: {', '.join(wrong)} is no probability; allowed: 0 to 1")
    total = math.fsum(ratios.values())
    if total > 1 + 1e-6:
      raise ValueError(f"mask_ratios sum to {total:g}, more than 1; lower them ({_listed(ratios)})")
    if not old and "identity" not in ratios:
      ratios["identity"] = max(1.0 - total, 0.0)
    elif total < 1 - 1e-6:
      filler = "mask_no" if old else "identity"
      raise ValueError(f"mask_ratios sum to {total:g}, not 1: raise {filler} (no masking) by {1 - total:g} ({_listed(ratios)})")
    names = tuple("identity" if name == "mask_no" else name.removeprefix("mask_") for name in ratios)
    return cls(names, tuple(ratios.values()))

  def draw(self, keys: Key[Array, " B"], num_frames: int) -> Bool[Array, "B num_frames"]:
    """Masks of latent frames, True = frame to generate, from one random key per sample.

    Every clip generates at least one frame. A clip of one frame generates that frame.
    """
    if num_frames <= 1:
      return jnp.ones((keys.shape[0], num_frames), bool)
    used = [(name, p) for name, p in zip(self.names, self.probabilities, strict=True) if p > 0]
    bounds = np.cumsum([p for _, p in used])[:-1].astype(np.float32)
    # One call of the generator per sample: one number for the strategy, two for its parameters, one per frame.
    choice, *numbers = jnp.split(jax.vmap(lambda key: jax.random.uniform(key, (3 + num_frames,)))(keys), (1, 2, 3), axis=1)
    choice = (choice >= bounds).sum(axis=1)[:, None]
    clean = jnp.zeros((keys.shape[0], num_frames), bool)
    for i, (name, _) in enumerate(used):
      clean = jnp.where(choice == i, _clean_frames(name, numbers, num_frames), clean)
    return (~clean).at[:, -1].set(~clean[:, -1] | clean.all(axis=1))


def _listed(ratios):
  return ", ".join(f"{name} {ratio:g}" for name, ratio in ratios.items())


def _clean_frames(name, numbers, num_frames):
  """Clean frames of a mask, bool `[B or 1, T]`. `numbers` are uniform: `[B, 1]`, `[B, 1]`, `[B, T]`."""
  first, second, per_frame = numbers
  frame = jnp.arange(num_frames)[None]
  if name == "identity":
    return jnp.zeros_like(frame, bool)
  if name == "random":
    return per_frame < 0.1 + 0.8 * first
  if name == "intepolate":
    return frame % 2 == _integer(first, 2)
  kind, where = name.split("_", 1)
  length = 1 + _integer(first, max(num_frames // 4, 1)) if kind == "quarter" else 1
  if where == "random":
    start = _integer(second, num_frames - length + 1)
    return (frame >= start) & (frame < start + length)
  head, tail = frame < length, frame >= num_frames - length
  return {"head": head, "tail": tail, "head_tail": head | tail}[where]


def _integer(uniform, count):
  """Uniform integer below `count` from a uniform number of 23 bits in [0, 1)."""
  return jnp.floor(uniform * count).astype(jnp.int32)
