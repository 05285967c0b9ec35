"""Makes the videos of jobs (`tasks.Job`): a clip per loop, each of which may be given frames of files and of earlier clips.

What is finished is handed out clip after clip, so that a video of many clips needs the memory of two, not of all.
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


def what_is_encoded(number, frames, placements, config, num_frames=None):
  """Which frames of a reference are encoded because placements use it, and what that gives.

  Where frames are encoded alone, a long video is not encoded as a whole for its last ones. With a video autoencoder the latents
  of a clip hold different numbers of frames. Where the first of a clip of `num_frames` are the last of a reference, so many of
  its frames as those hold are encoded as a clip of their own; None: as the originals.

  Args:
    number, frames: of the reference, and how many it has; config: of the autoencoder.

  Returns:
    (numbers of frames, {latent frame that is used: its place among the latents of these frames}); nothing is used: (none, {}).
  """
  places = {(slot, int(t)) for p in placements for slot, (r, t) in enumerate(zip(p.reference, p.frame)) if r == number}
  used, count = sorted({t for _, t in places}), config.latent_frames(frames)
  in_order = {t: place for place, t in enumerate(used)}
  if not used or count == frames:
    return np.asarray(used, int), in_order
  if num_frames and used[0] and places == {(slot, count - len(used) + slot) for slot in range(len(used))}:
    return np.arange(frames)[-config.frame_starts(num_frames)[len(used)] :], in_order
  return np.arange(frames), {t: t for t in used}


def encode_used(pipeline, references, placements, num_frames=None):
  """Latents of those latent frames of the references that placements use: {number: `[h, w, C]`} of each."""
  encoded = []
  for number, frames in enumerate(references):
    which, used = what_is_encoded(number, len(frames), placements, pipeline.codec.config, num_frames)
    latents = pipeline.encode(frames[which]) if used else None
    encoded.append({t: latents[place] for t, place in used.items()})
  return encoded


def encoded_lengths(job, file_frames, config, num_frames, compat=None):
  """Frames of the clips that `make_videos` encodes for a job with clips of `num_frames` and files of so many frames: a set."""
  count, files = config.latent_frames(num_frames), [config.latent_frames(n) for n in file_frames]
  placements = [place_loop(job, loop, count, files, compat) for loop in range(job.loops)]
  own = None if compat else num_frames
  lengths = {len(what_is_encoded(i, n, placements, config, own)[0]) for i, n in enumerate(file_frames)} - {0}
  return lengths | ({num_frames} if compat and job.loops > 1 else set())


def make_videos(pipeline, items, sample, decode, compat=None):
  """Makes the videos of items together. After each clip it yields what is finished: of every video the list of its next parts,
  uint8 `[T, H, W, 3]`.

  Args:
    items: of one size and with equally many loops.
    sample: `(loop, requests, given) -> latents`, of `Pipeline.sample_latents` with its settings.
    decode: `(loop, latents) -> videos`, of `Pipeline.decode`; None: only take part and yield no parts, as the processes do that
      write nothing.
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
    encodes = compat and loop + 1 < len(loops)
    videos = decode(loop, made) if decode else pipeline.decode(made, num_frames) if encodes else [None] * len(made)
    for known, seen, z, pixels in zip(latents, frames, made, videos):
      known.append(pipeline.encode(pixels) if encodes else z)
      seen.append(pixels if decode else None)
    yield [take_finished(seen, pieces, config) if decode else [] for seen, pieces in zip(frames, waiting)]


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
  return [np.concatenate([part for after_a_clip in video for part in after_a_clip]) for video in zip(*parts)]


def length_of(item, config):
  """Frames of the video that `make_videos` makes of an item."""
  lengths = [*map(len, item.references), *(request.num_frames for request in item.requests)]
  ranges = (cut(lengths[number], config, *part) for number, *part in item.job.pieces)
  return sum(end - begin for begin, end in ranges)


def cut(num_frames, config, first, stop):
  """(first frame, frame after the last) of the latent frames from `first` to `stop` (None: to the end) of so many frames."""
  starts = config.frame_starts(num_frames)
  return int(starts[first]), int(starts[len(starts) - 1 if stop is None else stop])
