"""Which frames of a clip are given, and how far each may change: the mask strategies of Open-Sora.

A strategy is text, tuples joined by ";", each of up to six numbers joined by ",":

  loop, reference (0), its first frame (0), first frame in the clip (0), frames (1), edit ratio (0)

In that loop of a long video the frames of the reference are laid over those of the clip; numbers below 0 count from the end.
The edit ratio says how far they may change: 0 keeps them, 1 generates them from noise, in between they are kept until the noise
of the run has come down to that level, then noised and generated on (SDEdit, arXiv 2108.01073). Later tuples go over earlier
ones. Frames are latent frames: with an autoencoder without compression in time those of the video.

Here a position outside the clip or the reference is refused, a length is cut to what fits, and frames with edit ratio 1 are
generated from noise. `compat` restores what the originals do:

  open-sora-1.1   a length that does not fit is an error, but one frame fills any length; positions far below 0 wrap around
  open-sora-1.2   positions are moved to multiples of 5 latent frames, never the last ones of a clip; lengths are cut
  both            frames with edit ratio 1 start from the reference, without noise
"""

import dataclasses

import numpy as np

COMPAT = (None, "open-sora-1.1", "open-sora-1.2")
GROUP = 5  # latent frames of one chunk of Open-Sora 1.2's autoencoder: its `align`
NOISE = -1  # in `Placement.reference`: the frame comes from noise


@dataclasses.dataclass(frozen=True)
class Rule:
  """One tuple of a mask strategy: `length` frames of a reference, from `reference_start` on, over those from `start` on."""

  loop: int
  reference: int = 0
  reference_start: int = 0
  start: int = 0
  length: int = 1
  edit: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
  """Where the latent frames of one clip come from.

  Attributes: ratio: float32 `[T]`, the edit ratios (1 = generate); reference, frame: int `[T]`, which frame of which reference,
  NOISE where there is none.
  """

  ratio: np.ndarray
  reference: np.ndarray
  frame: np.ndarray


def parse_mask_strategy(text):
  """The rules of a mask strategy, none for "" and None.

  Raises:
    ValueError: it is none, naming the tuple.
  """
  rules = []
  for part in (text or "").split(";") if (text or "").strip() else ():
    numbers, kinds = part.split(","), (int, int, int, int, int, float)
    try:
      if len(numbers) > len(kinds):
        raise ValueError
      rule = Rule(*(kind(number) for kind, number in zip(kinds, numbers)))
    except ValueError:
      raise ValueError(
        f"mask strategy {text!r}: {part.strip()!r} is not LOOP[,REFERENCE[,FIRST FRAME OF IT[,FIRST FRAME IN THE CLIP"
        "[,FRAMES[,EDIT RATIO]]]]]: whole numbers, and a ratio from 0 to 1"
      ) from None
    if rule.loop < 0 or rule.reference < 0 or rule.length < 0 or not 0 <= rule.edit <= 1:
      raise ValueError(
        f"mask strategy {text!r}: in {part.strip()!r} loop, reference and frames must be at least 0, the edit ratio 0 to 1"
      )
    rules.append(rule)
  return tuple(rules)


def nearest_group(value, total, group=GROUP):
  """The multiple of `group` near `value` as Open-Sora 1.2 chooses it (`find_nearest_point`): up only from more than half on,
  and never to the last whole group from the one before."""
  count = value // group
  up = value % group > group / 2 and count < total // group - 1
  return (count + up) * group


def place(rules, loop, num_frames, reference_frames, compat=None, align=True):
  """Lays the references over the frames of the clip of one loop.

  Args:
    rules: of `parse_mask_strategy`.
    num_frames: latent frames of the clip; reference_frames: those of each reference.
    compat: one of COMPAT; align: False is the original's 1.2 without `align`.

  Returns:
    Placement

  Raises:
    ValueError: a reference that is not there, or frames outside it or the clip.
  """
  ratio = np.ones(num_frames, np.float32)
  reference, frame = np.full(num_frames, NOISE), np.full(num_frames, NOISE)
  for rule in rules:
    if rule.loop != loop:
      continue
    if rule.reference >= len(reference_frames):
      raise ValueError(f"{describe(rule)}: there are {len(reference_frames)} references, numbered from 0")
    total = reference_frames[rule.reference]
    first = rule.reference_start + total * (rule.reference_start < 0)
    start = rule.start + num_frames * (rule.start < 0)
    length = rule.length
    if compat is None:
      for value, end, of in ((first, total, f"reference {rule.reference}"), (start, num_frames, "the clip")):
        if not 0 <= value < end:
          raise ValueError(f"{describe(rule)}: {of} has {end} frames, {-end} to {end - 1}")
    if compat == "open-sora-1.2" and align:
      first, start = nearest_group(first, total), nearest_group(start, num_frames)
    if compat != "open-sora-1.1":
      length = min(length, num_frames - start, total - first)
    # Slices as in Python, numbers below 0 included: the originals slice tensors with them.
    try:
      frame[start : start + length] = np.arange(total)[first : first + length]
    except ValueError:
      raise ValueError(
        f"{describe(rule)}: {length} frames from {first} of the {total} of reference {rule.reference} don't fit into those "
        f"from {start} of the {num_frames} of the clip"
      ) from None
    reference[start : start + length] = rule.reference
    ratio[start : start + length] = rule.edit
  if compat is None:
    reference[ratio == 1], frame[ratio == 1] = NOISE, NOISE
  return Placement(ratio, reference, frame)


def describe(rule):
  """A rule as it is written."""
  values = dataclasses.astuple(rule)
  return f"mask strategy '{','.join(f'{value:g}' for value in values)}'"


def explain(placement, files):
  """Lines that say, frame by frame, what becomes of a clip; references from number `files` on are the clips before."""
  lines, begin = [], 0
  steps = [np.diff(part) for part in (placement.ratio, placement.reference, placement.frame)]
  follows = (steps[0] == 0) & (steps[1] == 0) & ((steps[2] == 1) | (placement.reference[1:] == NOISE))
  for end in [*(np.flatnonzero(~follows) + 1), len(placement.ratio)]:
    ratio, reference, first = placement.ratio[begin], placement.reference[begin], placement.frame[begin]
    of = f"{begin}" if end == begin + 1 else f"{begin}-{end - 1}"
    if reference == NOISE:
      what = "generated from noise"
    else:
      its = f"{first}" if end == begin + 1 else f"{first}-{first + end - begin - 1}"
      of_what = f"reference {reference}" if reference < files else f"clip of loop {reference - files}"
      what = f"{of_what}, {'frame' if end == begin + 1 else 'frames'} {its}"
      what += ": kept" if ratio == 0 else f": generated on from noise level {ratio:g}"
    lines.append(f"{'frame' if end == begin + 1 else 'frames'} {of:>7}  {what}")
    begin = end
  return lines
