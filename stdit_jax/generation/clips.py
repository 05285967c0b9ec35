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
  `latents`: of the references, `[T, h, w, C]` each."""
  taken = placement.reference != NOISE
  if not taken.any() and (placement.ratio == 1).all():
    return None
  laid = np.zeros((len(taken), *(latents[0].shape[1:] if latents else ())), np.float32)
  for t in np.flatnonzero(taken):
    laid[t] = latents[placement.reference[t]][placement.frame[t]]
  return placement.ratio, laid, taken


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
  frames = [list(item.references) for item in items]
  latents = [[pipeline.encode(reference) for reference in item.references] for item in items]
  for loop in range(items[0].job.loops):
    requests = [item.requests[loop] for item in items]
    count = pipeline.latent_size(requests[0])[0]
    given = []
    for item, known in zip(items, latents):
      placement = place_loop(item.job, loop, count, [len(z) for z in known[: len(item.references)]], compat)
      given.append(given_frames(placement, known))
    made = sample(loop, requests, given)
    decoded = pipeline.decode(made) if decode or compat else [None] * len(made)
    for known, seen, z, pixels in zip(latents, frames, made, decoded):
      known.append(pipeline.encode(pixels) if compat else z)
      seen.append(pixels)
  if not decode:
    return None
  return [
    np.concatenate([seen[reference][first:stop] for reference, first, stop in item.job.pieces])
    for item, seen in zip(items, frames)
  ]
