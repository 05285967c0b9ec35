"""Makes the videos of jobs (`tasks.Job`): a clip per loop, each of which may be given frames of files and of earlier clips."""

import dataclasses

import numpy as np

from stdit_jax.generation.conditions import NOISE, place
from stdit_jax.generation.tasks import Job


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
  """One video to make. Attributes: requests: `pipeline.Request` of every loop, of one size; references: frames uint8
  `[T, H, W, 3]` of its files, of that size, too; job: of `tasks`."""

  requests: tuple
  references: tuple
  job: Job


def place_loop(job, loop, latent_frames, reference_frames, compat=None):
  """`conditions.Placement` of one loop of a job, whose files have so many latent frames."""
  return place(job.rules, loop, latent_frames, [*reference_frames, *[latent_frames] * loop], compat)


def given_frames(placement, latents):
  """What `Pipeline.sample_latents` takes of a placement: None, or (edit ratio, latents, which frames start from them).
  `latents`: of every reference, `[h, w, C]` by the number of the frame."""
  taken = placement.reference != NOISE
  if not taken.any():
    return None
  laid = [latents[r][t] if r != NOISE else None for r, t in zip(placement.reference, placement.frame)]
  empty = np.zeros_like(next(z for z in laid if z is not None))
  return placement.ratio, np.stack([empty if z is None else z for z in laid]), taken


def encode_used(pipeline, references, placements, num_frames=None):
  """Latents of those latent frames of the references that a placement uses: {number: `[h, w, C]`} of each. Where frames are
  encoded alone, a long video is not encoded as a whole for its last ones.

  With a video autoencoder the latents of a clip hold different numbers of frames. Where the first of a clip of `num_frames`
  are the last of a reference, so many of its frames as those hold are encoded as a clip of their own; None: as the originals.
  """
  encoded, config = [], pipeline.codec.config
  for number, frames in enumerate(references):
    places = {(slot, int(t)) for p in placements for slot, (r, t) in enumerate(zip(p.reference, p.frame)) if r == number}
    used, count = sorted({t for _, t in places}), config.latent_frames(len(frames))
    if not used:
      encoded.append({})
    elif count == len(frames):
      encoded.append(dict(zip(used, pipeline.encode(frames[used]))))
    elif num_frames and used[0] and places == {(slot, count - len(used) + slot) for slot in range(len(used))}:
      encoded.append(dict(zip(used, pipeline.encode(frames[-config.frame_starts(num_frames)[len(used)] :]))))
    else:
      latents = pipeline.encode(frames)
      encoded.append({t: latents[t] for t in used})
  return encoded


def make_videos(pipeline, items, sample, decode=True, compat=None):
  """The videos of items that are made together.

  Args:
    items: of one size and with equally many loops.
    sample: `(loop, requests, given) -> latents`, of `Pipeline.sample_latents` with its settings.
    decode: False: only take part, as the processes do that write nothing.
    compat: of `conditions`; with one, clips go on from the encoded pixels of the one before as the originals do, by default
      from its latents, which no autoencoder has changed.

  Returns:
    list of uint8 `[T, H, W, 3]`, or None without `decode`.
  """
  frames, loops, config = [list(item.references) for item in items], range(items[0].job.loops), pipeline.codec.config
  num_frames = items[0].requests[0].num_frames
  count = config.latent_frames(num_frames)
  placements = [
    [place_loop(item.job, loop, count, [config.latent_frames(len(f)) for f in item.references], compat) for loop in loops]
    for item in items
  ]
  own = None if compat else num_frames
  latents = [encode_used(pipeline, item.references, placed, own) for item, placed in zip(items, placements)]
  for loop in loops:
    given = [given_frames(placed[loop], known) for placed, known in zip(placements, latents)]
    made = sample(loop, [item.requests[loop] for item in items], given)
    decoded = pipeline.decode(made, num_frames) if decode or compat else [None] * len(made)
    for known, seen, z, pixels in zip(latents, frames, made, decoded):
      known.append(pipeline.encode(pixels) if compat else z)
      seen.append(pixels)
  if not decode:
    return None
  return [np.concatenate([cut(seen[r], config, *part) for r, *part in item.job.pieces]) for item, seen in zip(items, frames)]


def cut(frames, config, first, stop):
  """The frames `[T, H, W, 3]` of the latent frames from `first` to `stop` (None: to the end) of a clip."""
  starts = config.frame_starts(len(frames))
  return frames[starts[first] : starts[len(starts) - 1 if stop is None else stop]]
