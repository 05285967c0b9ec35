"""Videos of several clips: finished parts are yielded and released after each clip."""

import types
import weakref

import numpy as np
import pytest

from stdit_jax.autoencoders import image_kl
from stdit_jax.generation import clips, tasks
from stdit_jax.generation.pipeline import Request

FRAMES, REFERENCE = 6, 4


class Pixels:
  """A stand-in for a pipeline. Latents are pixels with the value 10 * clip + frame, and clip 0 is the file. Given frames do not
  change."""

  codec = types.SimpleNamespace(config=image_kl.TABLE["tiny-kl-f8"])

  def __init__(self):
    self.decoded = []

  def encode(self, frames):
    return frames.astype(np.float32)

  def sample(self, loop, requests, given):
    made = np.stack([clip(loop + 1, FRAMES) for _ in requests]).astype(np.float32)
    for z, known in zip(made, given):
      if known:
        z[known[2]] = known[1][known[2]]
    return made

  def decode(self, loop, latents):
    videos = [z.astype(np.uint8) for z in latents]
    self.decoded.append([weakref.ref(video) for video in videos])
    return videos


def clip(number, frames):
  return np.broadcast_to((10 * number + np.arange(frames))[:, None, None, None], (frames, 8, 8, 3)).astype(np.uint8)


@pytest.mark.parametrize(
  ("task", "loops", "expected"),
  [
    ("endless", 3, [[0, 1, 2, 3, *range(11, 16)], [*range(21, 26)], [*range(31, 36)]]),
    ("extend-backward", 1, [[*range(10, 15), 0, 1, 2, 3]]),
    ("loop", 1, [[0, *range(11, 16)], [*range(21, 25)]]),
  ],
)
def test_parts_are_yielded_after_their_clip_and_released(task, loops, expected):
  pipeline, files = Pixels(), REFERENCE if task != "loop" else 1
  job = tasks.make_job(task, FRAMES, [files], loops=loops, length=1)
  item = clips.Item(tuple(Request("x", 8, 8, FRAMES, loop=n) for n in range(job.loops)), (clip(0, files),), job)
  told = []
  for loop, videos in enumerate(clips.make_videos(pipeline, [item, item], pipeline.sample, pipeline.decode)):
    told.append([[int(frame[0, 0, 0]) for part in parts for frame in part] for parts in videos])
    del videos
    # Only the last clip may exist: the loop still holds it.
    assert not any(video() is not None for videos in pipeline.decoded[:loop] for video in videos)
  assert told == [[numbers, numbers] for numbers in expected]
  assert clips.length_of(item, pipeline.codec.config) == sum(map(len, expected))
  (one, _) = clips.whole_videos(clips.make_videos(pipeline, [item, item], pipeline.sample, pipeline.decode))
  assert one[:, 0, 0, 0].tolist() == [number for numbers in expected for number in numbers]


@pytest.mark.parametrize("compat", [None, "open-sora-1.2"])
def test_every_process_encodes_the_same_frames(compat):
  """With compat all clips but the last are encoded again, as in the original code. Otherwise only frames in use are encoded."""
  job = tasks.make_job("endless", FRAMES, [REFERENCE], loops=3, length=1)
  item = clips.Item(tuple(Request("x", 8, 8, FRAMES, loop=n) for n in range(3)), (clip(0, REFERENCE),), job)
  for writes in (True, False):
    pipeline, encoded = Pixels(), []
    pipeline.encode = lambda frames, encoded=encoded: encoded.append(len(frames)) or frames.astype(np.float32)
    pipeline.decode = lambda latents, num_frames: [z.astype(np.uint8) for z in latents]
    decode = (lambda loop, latents, p=pipeline: p.decode(latents, FRAMES)) if writes else None
    parts = list(clips.make_videos(pipeline, [item], pipeline.sample, decode, compat))
    assert encoded == [1, *([FRAMES] * 2 if compat else [])]
    assert set(encoded) == clips.encoded_lengths(job, [REFERENCE], pipeline.codec.config, FRAMES, compat)
    assert [len(videos[0]) for videos in parts] == ([2, 1, 1] if writes else [0, 0, 0])
