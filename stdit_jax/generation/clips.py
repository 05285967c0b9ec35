"""Makes the videos of jobs (`tasks.Job`), one clip per loop. A clip may start from frames of files and of earlier clips."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from stdit_jax.generation.conditions import NOISE, Placement, place
from stdit_jax.generation.tasks import Job

Frames = UInt8[np.ndarray, "T H W 3"]
Given = tuple[Float[np.ndarray, " T"], Float[np.ndarray, "T h w C"], Bool[np.ndarray, " T"]]


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
  """One video to make."""

  requests: tuple  # one `pipeline.Request` per loop, all of one size
  references: tuple  # the frames of the job's files, uint8 `[T, H, W, 3]`, of the same size
  job: Job


def placements_of(job: Job, lengths: Iterable[int], config: Any, num_frames: int, compat: str | None = None) -> list[Placement]:
  """The placement of each loop of a job. `lengths`: frames of each file."""
  files, clip = [config.latent_frames(frames) for frames in lengths], config.latent_frames(num_frames)
  return [place(job.rules, loop, clip, [*files, *[clip] * loop], compat) for loop in range(job.loops)]


def given_frames(placement: Placement, latents: Sequence) -> Given | None:
  """Turns a placement into the argument `given` of `Pipeline.sample_latents`: (edit ratio, latents, mask) or None.

  `latents`: for each reference {latent frame: `[h, w, C]`}, or an array `[T, h, w, C]`.
  """
  taken = placement.reference != NOISE
  if not taken.any():
    return None
  laid = [latents[r][t] if r != NOISE else None for r, t in zip(placement.reference, placement.frame)]
  empty = np.zeros_like(next(z for z in laid if z is not None))
  return placement.ratio, np.stack([empty if z is None else z for z in laid]), taken


def frames_to_encode(
  number: int, frames: int, placements: Sequence[Placement], config: Any, num_frames: int | None = None
) -> tuple[np.ndarray, dict[int, int]]:
  """Chooses the frames of reference `number` to encode: (frame numbers, {latent frame in use: index of its latents}).

  An image autoencoder encodes only the frames in use. A video autoencoder encodes the whole reference, unless the clip begins
  with the last latent frames of the reference. Then it encodes the last frames alone, like the start of a clip: as many as the
  first latent frames of a clip cover. If `num_frames` (of a clip) is None, a video autoencoder always encodes the whole
  reference, as in the original code.
  """
  uses = {(slot, int(t)) for p in placements for slot, (r, t) in enumerate(zip(p.reference, p.frame)) if r == number}
  used, count = sorted({t for _, t in uses}), config.latent_frames(frames)
  in_order = {t: index for index, t in enumerate(used)}
  if not used or count == frames:  # one latent frame per frame: an image autoencoder, or an image
    return np.asarray(used, int), in_order
  # The last latent frames of the reference fill the slots 0, 1, ... of the clip.
  if num_frames and used[0] and uses == {(slot, count - len(used) + slot) for slot in range(len(used))}:
    return np.arange(frames)[-config.frame_starts(num_frames)[len(used)] :], in_order
  return np.arange(frames), {t: t for t in used}


def encode_used(
  pipeline: Any, references: Sequence[Frames], placements: Sequence[Placement], num_frames: int | None = None
) -> list[dict[int, np.ndarray]]:
  """Encodes the latent frames that `placements` use. Returns {latent frame: latents `[h, w, C]`} for each reference."""
  encoded = []
  for number, frames in enumerate(references):
    which, used = frames_to_encode(number, len(frames), placements, pipeline.codec.config, num_frames)
    latents = pipeline.encode(frames[which]) if used else []
    encoded.append({t: latents[index] for t, index in used.items()})
  return encoded


def encoded_lengths(job: Job, file_frames: Sequence[int], config: Any, num_frames: int, compat: str | None = None) -> set[int]:
  """The lengths of all clips that `make_videos` encodes for a job. `file_frames`: frames of each file."""
  placements = placements_of(job, file_frames, config, num_frames, compat)
  own = None if compat else num_frames
  lengths = {len(frames_to_encode(i, n, placements, config, own)[0]) for i, n in enumerate(file_frames)} - {0}
  return lengths | ({num_frames} if compat and job.loops > 1 else set())


def batches(items: Sequence, size: Callable, most: int) -> Iterator[Sequence]:
  """Yields lists of at most `most` items that follow each other and have the same `size(item)`."""
  for _, group in itertools.groupby(items, size):
    same = list(group)
    yield from (same[i : i + most] for i in range(0, len(same), most))


def make_videos(
  pipeline: Any, items: Sequence[Item], sample: Callable, decode: Callable | None, compat: str | None = None
) -> Iterator[list[list[Frames]]]:
  """Makes the videos of items together. Yields, after each clip, the list of finished parts of every video.

  So a video of many clips needs the memory of two clips.

  Args:
    items: of one size and with the same number of loops.
    sample: `(loop, requests, given) -> latents`, a call of `Pipeline.sample_latents`.
    decode: `(loop, latents) -> videos`, a call of `Pipeline.decode`. None for a process that writes no files.
    compat: if set, a clip continues from the re-encoded pixels of the previous clip. None: from the latents of that clip.
  """
  frames, loops, config = [list(item.references) for item in items], range(items[0].job.loops), pipeline.codec.config
  num_frames = items[0].requests[0].num_frames
  placements = [placements_of(item.job, map(len, item.references), config, num_frames, compat) for item in items]
  own = None if compat else num_frames
  latents = [encode_used(pipeline, item.references, placed, own) for item, placed in zip(items, placements)]
  waiting = [list(item.job.pieces) for item in items]
  for loop in loops:
    given = [given_frames(placed[loop], known) for placed, known in zip(placements, latents)]
    made = sample(loop, [item.requests[loop] for item in items], given)
    encodes = compat and loop + 1 < len(loops)
    # A process decodes only if it writes the video, or encodes its pixels again.
    videos = decode(loop, made) if decode else pipeline.decode(made, num_frames) if encodes else [None] * len(made)
    for known, seen, z, pixels in zip(latents, frames, made, videos):
      known.append(pipeline.encode(pixels) if encodes else z)
      seen.append(pixels if decode else None)
    yield [take_finished(seen, pieces, config) if decode else [] for seen, pieces in zip(frames, waiting)]


def take_finished(seen: list, pieces: list, config: Any) -> list[Frames]:
  """Pops pieces from the front of `pieces` (`Job.pieces`) while `seen` has their frames, and returns these frames.

  Releases the entries of `seen` that no remaining piece needs.
  """
  parts = []
  while pieces and pieces[0][0] < len(seen):
    number, first, stop = pieces.pop(0)
    begin, end = cut(len(seen[number]), config, first, stop)
    parts.append(seen[number][begin:end])
  needed = {number for number, _, _ in pieces}
  seen[:] = [frames if number in needed else None for number, frames in enumerate(seen)]
  return parts


def whole_videos(parts: Iterable[list[list[Frames]]]) -> list[Frames]:
  """Joins the parts from `make_videos` to one array `[T, H, W, 3]` per video."""
  return [np.concatenate([part for after_a_clip in video for part in after_a_clip]) for video in zip(*parts)]


def length_of(item: Item, config: Any) -> int:
  """Frames of the video that `make_videos` makes of an item. `config`: of the autoencoder."""
  lengths = [*map(len, item.references), *(request.num_frames for request in item.requests)]
  ranges = (cut(lengths[number], config, first, stop) for number, first, stop in item.job.pieces)
  return sum(end - begin for begin, end in ranges)


def cut(num_frames: int, config: Any, first: int, stop: int | None) -> tuple[int, int]:
  """(first frame, frame after the last) of latent frames `first` to `stop` of a clip. `stop` None: to the end."""
  starts = config.frame_starts(num_frames)
  return int(starts[first]), int(starts[len(starts) - 1 if stop is None else stop])
