"""The mask strategies of Open-Sora: the given frames of a clip, and how far each may change.

A strategy is a text of tuples joined by ";". Each tuple has up to six numbers joined by ",", here with their defaults:

  loop, reference (0), first frame of the reference (0), first frame in the clip (0), number of frames (1), edit ratio (0)

In that loop of a long video the frames of the reference replace frames of the clip. Negative positions count from the end. A
later tuple overrides an earlier one. All frames are latent frames.

The edit ratio says how far the frames may change. 0 keeps them, 1 generates them from noise. Any other ratio is a noise level.
When the sampler reaches this level, the frames get noise and are denoised with the rest (SDEdit, arXiv 2108.01073).

By default a position outside the clip or the reference is an error, a length is cut to what fits, and frames with edit ratio 1
are generated from noise. `compat` restores the behaviour of the original code:

  open-sora-1.1   a length that does not fit is an error, but one frame fills any length. A position that is still negative
                  after it was counted from the end is counted from the end once more
  open-sora-1.2   positions are rounded to multiples of 5 latent frames. They are not rounded up beyond the start of the last
                  whole group of 5. Lengths are cut
  both            frames with edit ratio 1 start from the reference, without noise
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

COMPAT = (None, "open-sora-1.1", "open-sora-1.2")
GROUP = 5  # latent frames in one chunk of Open-Sora 1.2's autoencoder, its `align`
NOISE = -1  # in `Placement.reference`: the frame is generated from noise


@dataclasses.dataclass(frozen=True)
class Rule:
  """One tuple of a mask strategy: the frame range of a reference, and where the range starts in the clip."""

  loop: int
  reference: int = 0
  reference_start: int = 0
  start: int = 0
  length: int = 1
  edit: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
  """The sources of the latent frames of one clip."""

  ratio: Float[np.ndarray, " T"]  # edit ratio
  reference: Int[np.ndarray, " T"]  # number of the reference, or NOISE
  frame: Int[np.ndarray, " T"]  # number of the frame in the reference


def parse_mask_strategy(text: str | None) -> tuple[Rule, ...]:
  """Parses a mask strategy. "" and None give no rules. Raises ValueError for a tuple that is not allowed."""
  rules = []
  for part in text.split(";") if text and text.strip() else ():
    numbers = part.split(",")
    try:
      values: list[Any] = [*map(int, numbers[:5]), *map(float, numbers[5:])]
      rule = Rule(*values)
      if min(rule.loop, rule.reference, rule.length) < 0 or not 0 <= rule.edit <= 1:
        raise ValueError
    except (ValueError, TypeError):
      raise ValueError(
        f"mask strategy {text!r}: {part.strip()!r} is not LOOP[,REFERENCE[,FRAME OF THE REFERENCE[,FRAME OF THE CLIP"
        "[,FRAMES[,EDIT RATIO]]]]]. Give whole numbers, negative ones only for frame positions, and an edit ratio from 0 to 1"
      ) from None
    rules.append(rule)
  return tuple(rules)


def nearest_group(value: int, total: int) -> int:
  """The multiple of GROUP near `value`, as in Open-Sora 1.2 (`find_nearest_point`).

  Only a remainder above half a group rounds up. No value rounds up past the start of the last whole group.
  """
  count = value // GROUP
  up = value % GROUP > GROUP / 2 and count < total // GROUP - 1
  return (count + up) * GROUP


def place(rules: Sequence[Rule], loop: int, num_frames: int, lengths: Sequence[int], compat: str | None = None) -> Placement:
  """Applies the rules of one loop to a clip of `num_frames` latent frames. `lengths`: latent frames of each reference.

  Raises ValueError if a reference does not exist, or if frames lie outside the reference or the clip.
  """
  ratio = np.ones(num_frames, np.float32)
  reference, frame = np.full(num_frames, NOISE), np.full(num_frames, NOISE)
  for rule in rules:
    if rule.loop != loop:
      continue
    if rule.reference >= len(lengths):
      raise ValueError(f"{describe(rule)}: there are {len(lengths)} references, counted from 0; give another or more files")
    total = lengths[rule.reference]
    first = rule.reference_start + total * (rule.reference_start < 0)
    start = rule.start + num_frames * (rule.start < 0)
    length = rule.length
    if compat is None:
      for value, end, of in ((first, total, f"reference {rule.reference}"), (start, num_frames, "the clip")):
        if not 0 <= value < end:
          raise ValueError(f"{describe(rule)}: {of} has {end} frames, {-end} to {end - 1}; give one of them")
    if compat == "open-sora-1.2":
      first, start = nearest_group(first, total), nearest_group(start, num_frames)
    if compat != "open-sora-1.1":
      length = min(length, num_frames - start, total - first)
    # Negative numbers count from the end, as in the tensor slices of the original code.
    try:
      frame[start : start + length] = np.arange(total)[first : first + length]
    except ValueError:
      fit = f"reference {rule.reference} has {total - first} from {first} on, the clip {num_frames - start} from {start} on"
      raise ValueError(f"{describe(rule)}: {length} frames do not fit: {fit}. Give fewer frames") from None
    reference[start : start + length] = rule.reference
    ratio[start : start + length] = rule.edit
  if compat is None:
    reference[ratio == 1], frame[ratio == 1] = NOISE, NOISE
  return Placement(ratio, reference, frame)


def describe(rule: Rule) -> str:
  """The rule as text of a mask strategy."""
  values = dataclasses.astuple(rule)
  return f"mask strategy '{','.join(f'{value:g}' for value in values)}'"


def explain(placement: Placement, files: int) -> list[str]:
  """Describes the source of each frame of a clip, one line per range. `files`: number of references that are files."""
  lines, begin = [], 0
  steps = [np.diff(part) for part in (placement.ratio, placement.reference, placement.frame)]
  follows = (steps[0] == 0) & (steps[1] == 0) & ((steps[2] == 1) | (placement.reference[1:] == NOISE))
  for end in [*(np.flatnonzero(~follows) + 1), len(placement.ratio)]:
    ratio, reference, first = placement.ratio[begin], placement.reference[begin], placement.frame[begin]
    more = end - begin - 1
    own, its = (f"{n}-{n + more}" if more else f"{n}" for n in (begin, first))
    what, word = "generated from noise", "frames" if more else "frame"
    if reference != NOISE:
      source = f"reference {reference}" if reference < files else f"clip of loop {reference - files}"
      what = f"{source}, {word} {its}: " + ("kept" if ratio == 0 else f"denoised from noise level {ratio:g}")
    lines.append(f"{word} {own:>7}  {what}")
    begin = end
  return lines
