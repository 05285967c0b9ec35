"""Measures what a model of moving shapes (`data.shapes`) has learned, in the pixels of the videos that it makes.

text          one object of the caption, with combinations from training and with held-out combinations
sizes         every aspect ratio with every length; one of these pairs does not occur in training
two           two objects: their number, colours, shapes and directions
animate       the first frame is given
extend        the first frames are given
interpolate   the first and the last frame are given
connect       the first and the last frames are given
loop          two clips that form a loop (`tasks`): difference of the last and the first frame, divided by the median difference
              of neighbouring frames

The given frames of the video, and their round trip through the autoencoder, are compared with the true frames. The motion is
measured in the generated frames and their neighbours. It is smooth if every step of the video differs from the fitted step by
less than half of the scene's true step.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data import aspect_ratios, shapes, shapes_vision
from stdit_jax.autoencoders.metrics import psnr
from stdit_jax.generation import tasks
from stdit_jax.generation.clips import Item, batches, make_videos, whole_videos
from stdit_jax.generation.pipeline import Request

RESOLUTION = "64p"
SEED = 1_000_000  # of the scenes; not used for training
PARTS = ("text", "sizes", "two", "animate", "extend", "interpolate", "connect", "loop")


@dataclasses.dataclass(frozen=True)
class Exam:
  """Settings of the evaluation."""

  steps: int
  scale: float  # of guidance
  count: int = 200  # scenes of each part
  frames: int = 8  # of a clip
  batch: int = 20  # videos made together


def examine(
  pipeline: Any, exam: Exam, parts: Sequence[str] = PARTS, progress: Callable = lambda items, name: items
) -> dict[str, dict[str, float]]:
  """Returns {part: {measure: value}}. Values are shares from 0 to 1, unless the name ends with "dB" or "ratio".

  `progress(batches, name)` wraps the batches of one part.
  """
  measures, results = {"text": _text, "sizes": _sizes, "two": _two, "loop": _loop}, {}
  for part in parts:
    results |= measures.get(part, _given)(pipeline, exam, part, progress)
  return results


def scenes_of(split: str, count: int, frames: int, objects: int = 1) -> list[tuple[shapes.Scene, str]]:
  """`count` scenes with exactly `objects` objects and more than `frames` frames, each with one caption.

  Captions use the four wordings in turn. Only the split "sizes" contains the size that training shows in short clips only.
  """
  scenes = (shapes.scene(f"{shapes.SCHEME}{split}/{SEED}/{number}") for number in itertools.count())
  sized = (one for one in scenes if split == "sizes" or (one.height, one.width) != shapes.NOT_LONG)
  found = (one for one in sized if len(one.objects) == objects and one.frames > frames)
  return [(scene, shapes.captions(scene)[i % 4]) for i, scene in enumerate(itertools.islice(found, count))]


def _size(scene):
  return aspect_ratios.size(RESOLUTION, aspect_ratios.closest_ratio(scene.height, scene.width, RESOLUTION))


def largest_request(exam: Exam) -> Request:
  """A request with the size and length of the largest clip."""
  height, width = max(aspect_ratios.SIZES[RESOLUTION].values(), key=math.prod)
  return Request("a red circle", height, width, max(exam.frames, max(shapes.LENGTHS) - 1))


def _make(pipeline, exam, items, name, progress):
  """The videos of `clips.Item`s, in the order of `items`, made in batches of one size."""
  size = lambda i: (items[i].requests[0].height, items[i].requests[0].width)  # noqa: E731
  of_one_size = list(batches(sorted(range(len(items)), key=size), size, exam.batch))
  made = {}

  def sample(loop, requests, given):
    return pipeline.sample_latents(requests, exam.steps, exam.scale, given=given)

  def decode(loop, latents):
    return pipeline.decode(latents, items[0].requests[loop].num_frames)

  for batch in progress(of_one_size, name):
    # The last batch of a size is filled up, so that each size needs one program only.
    filled = [*batch, *[batch[-1]] * (exam.batch - len(batch))]
    parts = make_videos(pipeline, [items[i] for i in filled], sample, decode)
    made |= zip(batch, whole_videos(parts))
  return [made[i] for i in range(len(items))]


def _item(scene, caption, number, frames, references=(), job=None):
  job = job or tasks.of_strategy((), 0, 1, 0)
  requests = tuple(Request(caption, *_size(scene), frames, float(shapes.FPS), number, loop) for loop in range(job.loops))
  return Item(requests, references, job)


def _videos(pipeline, exam, pairs, name, progress, frames=None, job=None):
  items = [_item(scene, caption, i, frames or exam.frames, job=job) for i, (scene, caption) in enumerate(pairs)]
  return _make(pipeline, exam, items, name, progress)


def _judged(videos, pairs):
  return [shapes_vision.judge(video, scene) for video, (scene, _) in zip(videos, pairs)]


def _means(judged, names):
  return {name: float(np.mean([one[name] for one in judged])) for name in names}


def _shares(judged):
  """The shares of all properties, and the share of videos that have colour, shape and direction right."""
  right = [one["color"] and one["shape"] and one["direction"] for one in judged]
  return _means(judged, judged[0]) | {"color, shape, direction": float(np.mean(right))}


def _text(pipeline, exam, part, progress):
  results = {}
  for split, name in (("train", "text, seen combinations"), ("held_out", "text, held-out combinations")):
    pairs = scenes_of(split, exam.count, exam.frames)
    results[name] = _shares(_judged(_videos(pipeline, exam, pairs, f"text, {split}", progress), pairs))
  return results


def _two(pipeline, exam, part, progress):
  pairs = scenes_of("train", exam.count, exam.frames, objects=2)
  judged = _judged(_videos(pipeline, exam, pairs, part, progress), pairs)
  return {part: _means(judged, ("count", "color", "shape", "direction", "always"))}


def _sizes(pipeline, exam, part, progress):
  results = {}
  pairs = scenes_of("sizes", exam.count, max(shapes.LENGTHS) - 1)
  for frames in (length - 1 for length in shapes.LENGTHS):
    videos = _videos(pipeline, exam, pairs, f"sizes, {frames} frames", progress, frames)
    for height, width in aspect_ratios.SIZES[RESOLUTION].values():
      if of_size := [(video, pair) for video, pair in zip(videos, pairs) if video.shape[1:3] == (height, width)]:
        results[f"{height} x {width}, {frames} frames"] = _shares(_judged(*zip(*of_size)))
  return results


def _given(pipeline, exam, part, progress):
  """A task with given frames: how well they are `kept`, and how well the other frames (`made`) fit the scene."""
  pairs, items, known = scenes_of("train", exam.count, exam.frames), [], []
  length = tasks.condition_length(None, exam.frames)
  ends = [*range(length), *range(exam.frames - length, exam.frames)]
  for i, (scene, caption) in enumerate(pairs):
    true = shapes.draw(scene, range(exam.frames), _size(scene))
    task, references, kept, made = {
      "animate": ("animate", (true[:1],), [0], slice(0, None)),
      "extend": ("extend-forward", (true[:length],), ends[:length], slice(length - 1, None)),
      "interpolate": ("interpolate", (true[:1], true[-1:]), [0, exam.frames - 1], slice(0, None)),
      "connect": ("connect", (true[:length], true[-length:]), ends, slice(length - 1, exam.frames - length + 1)),
    }[part]
    job = tasks.make_job(task, exam.frames, [*map(len, references)])
    job = dataclasses.replace(job, pieces=((len(references), 0, None),))  # the clip alone, without the files
    items.append(_item(scene, caption, i, exam.frames, references, job))
    known.append((true, kept))
  videos = _make(pipeline, exam, items, part, progress)
  judged, rows = [], []
  for video, (scene, _), (true, kept) in zip(videos, pairs, known):
    judged.append(shapes_vision.judge(video[made], scene))
    alone = pipeline.decode([pipeline.encode(true[kept])], len(kept))[0]
    seen = next(iter(shapes_vision.objects_of(video)), None)
    smooth = bool(seen and seen.smooth < np.hypot(*scene.objects[0].step) / 2)
    (drawn,) = shapes_vision.objects_of(true)  # the measured middle of a triangle is not its true middle
    error = np.abs(seen.path - drawn.path) if seen else np.full(1, np.inf)
    if seen:  # an object that is lost in a frame counts as infinitely far from its path
      error[np.isnan(seen.path) & ~np.isnan(drawn.path)] = np.inf
    rows.append((psnr(video[kept], true[kept]), psnr(alone, true[kept]), smooth, np.nanmax(error)))
  own, alone, smooth, error = np.array(rows, np.float64).T
  return {part: {
    "given frames, dB": float(own.mean()), "autoencoder alone, dB": float(alone.mean()),
    **_means(judged, ("direction", "color", "shape", "always")), "smooth": float(smooth.mean()),
    "within 0.1 short sides of the true path": float((error < 0.1).mean()),
  }}  # fmt: skip


def _loop(pipeline, exam, part, progress):
  pairs, ratios, jumps = scenes_of("train", exam.count, exam.frames), [], []
  videos = _videos(pipeline, exam, pairs, part, progress, job=tasks.make_job("loop", exam.frames, []))
  for video in videos:
    frames = video.astype(np.float32)
    neighbours = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
    usual = max(np.median(neighbours), 1e-6)  # the median ignores a jump between the two clips
    ratios.append(np.abs(frames[-1] - frames[0]).mean() / usual)
    jumps.append(neighbours.max() / usual)
  return {part: {
    "last to first frame over neighbours, ratio": float(np.mean(ratios)),
    "largest neighbours over usual ones, ratio": float(np.mean(jumps)),
    "closed: at most 1.5": float(np.mean(np.array(ratios) <= 1.5)),
    **_means(_judged(videos, pairs), ("color", "shape", "ground", "always")),
  }}  # fmt: skip
