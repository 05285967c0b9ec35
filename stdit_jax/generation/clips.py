"""Makes the videos of jobs (`tasks.Job`): a clip per loop, each of which may be given frames of files and of earlier clips.

What is finished is handed out clip after clip, so that a video of many clips needs the memory of one.
"""

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


def make_videos(pipeline, items, sample, decode, compat=None):
  """Makes the videos of items together. After each clip it yields what is finished: of every video the list of its next parts,
  uint8 `[T, H, W, 3]`.

  Args:
    items: of one size and with equally many loops.
    sample: `(loop, requests, given) -> latents`, of `Pipeline.sample_latents` with its settings.
    decode: `(loop, latents) -> videos`, of `Pipeline.decode`; None: only take part and yield empty lists, as the processes do
      that write nothing.
    compat: of `conditions`; with one, clips go on from the encoded pixels of the one before as the originals do, by default
      from its latents, which no autoencoder has changed.
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
  waiting = [list(item.job.pieces) for item in items]
  for loop in loops:
    given = [given_frames(placed[loop], known) for placed, known in zip(placements, latents)]
    made = sample(loop, [item.requests[loop] for item in items], given)
    if decode:
      decoded = decode(loop, made)
    else:
      decoded = pipeline.decode(made, num_frames) if compat else [None] * len(made)
    for known, seen, z, pixels in zip(latents, frames, made, decoded):
      known.append(pipeline.encode(pixels) if compat else z)
      seen.append(pixels)
    yield [take_finished(seen, pieces, config) for seen, pieces in zip(frames, waiting)] if decode else []


def take_finished(seen, pieces, config):
  """Takes those `pieces` of a video, from the first on, of which references and clips are there, and lets go of what no piece
  that is left needs. -> the frames of each."""
  parts = []
  while pieces and pieces[0][0] < len(seen):
    number, first, stop = pieces.pop(0)
    begin, end = cut(len(seen[number]), config, first, stop)
    parts.append(seen[number][begin:end])
  needed = {number for number, _, _ in pieces}
  seen[:] = [frames if number in needed else None for number, frames in enumerate(seen)]
  return parts


def whole_videos(parts):
  """The videos of `make_videos`, each as one array `[T, H, W, 3]`."""
  return [np.concatenate([part for some in video for part in some]) for video in zip(*parts)]


def length_of(item, config):
  """Frames of the video that `make_videos` makes of an item."""
  lengths = [*map(len, item.references), *(request.num_frames for request in item.requests)]
  ranges = (cut(lengths[number], config, *part) for number, *part in item.job.pieces)
  return sum(end - begin for begin, end in ranges)


def cut(num_frames, config, first, stop):
  """(first frame, frame after the last) of the latent frames from `first` to `stop` (None: to the end) of so many frames."""
  starts = config.frame_starts(num_frames)
  return int(starts[first]), int(starts[len(starts) - 1 if stop is None else stop])
