"""What a model that was trained on moving shapes (`data.shapes`) has learned, measured in the pixels of what it makes.

text          one object, as the caption says: combinations seen in training, and held out
sizes         every aspect ratio with every length, one of which was never seen together
two           two objects: both there, with their colours, shapes and directions
animate       the first frame is given; extend: the first ones; interpolate: first and last; connect: the first and last ones
loop          two clips, the second from the end of the first back to its beginning (`tasks`): how far its last frame is from
              its first, against the median of neighbours

Given frames are compared with what the autoencoder alone makes of them, and the motion is judged in those that are not given
and the ones beside them. It is smooth when no step is further from the mean step than half of it.
"""

import dataclasses

import numpy as np

from data import aspect_ratios, shapes, shapes_vision
from stdit_jax.autoencoders.metrics import psnr
from stdit_jax.generation import tasks
from stdit_jax.generation.clips import Item, make_videos, whole_videos
from stdit_jax.generation.pipeline import Request

RESOLUTION = "64p"
SEED = 1_000_000  # of the scenes: not one of those trained on
PARTS = ("text", "sizes", "two", "animate", "extend", "interpolate", "connect", "loop")


@dataclasses.dataclass(frozen=True)
class Exam:
  """Settings. Attributes: steps, scale: of the sampler; count: scenes of each part; frames: of a clip; batch: videos made
  together."""

  steps: int
  scale: float
  count: int = 200
  frames: int = 8
  batch: int = 20


def examine(pipeline, exam, parts=PARTS, progress=lambda items, name: items):
  """-> {part: {measure: value}}; shares are from 0 to 1, names of decibels and ratios end with "dB" and "ratio".

  Args:
    parts: some of PARTS.
    progress: wraps the iterable of batches of one part.
  """
  results = {}
  for part in parts:
    if part == "text":
      for split, name in (("train", "text, seen combinations"), ("held_out", "text, held-out combinations")):
        results[name] = _text(pipeline, exam, split, progress)
    elif part == "sizes":
      results |= _sizes(pipeline, exam, progress)
    elif part in ("two", "loop"):
      results[part] = {"two": _two, "loop": _loop}[part](pipeline, exam, progress)
    else:
      results[part] = _given(pipeline, exam, part, progress)
  return results


def scenes_of(split, count, frames, objects=1):
  """`count` scenes of so many objects, with a caption each (the wordings take turns), of at least so many frames. But for
  the split "sizes" none has the size that was trained with short clips only: one thing is examined at a time."""
  found, number = [], 0
  while len(found) < count:
    scene = shapes.scene(f"{shapes.SCHEME}{split}/{SEED}/{number}")
    number += 1
    if (scene.height, scene.width) == shapes.NOT_LONG and split != "sizes":
      continue
    if len(scene.objects) == objects and scene.frames > frames:
      found.append((scene, shapes.captions(scene)[len(found) % 4]))
  return found


def _size(scene):
  return aspect_ratios.size(RESOLUTION, aspect_ratios.closest_ratio(scene.height, scene.width, RESOLUTION))


def _make(pipeline, exam, items, name, progress):
  """Videos of `clips.Item`s, in order, made in batches of one size."""
  order = sorted(range(len(items)), key=lambda i: (items[i].requests[0].height, items[i].requests[0].width))
  batches = []
  for i in order:
    size = lambda k: (items[k].requests[0].height, items[k].requests[0].width)  # noqa: E731
    if not batches or len(batches[-1]) == exam.batch or size(batches[-1][0]) != size(i):
      batches.append([])
    batches[-1].append(i)
  made = [None] * len(items)

  def sample(loop, requests, given):
    return pipeline.sample_latents(requests, exam.steps, exam.scale, given=given)

  def decode(loop, latents):
    return pipeline.decode(latents, items[0].requests[loop].num_frames)

  for batch in progress(batches, name):
    # Filled up, so that every batch of a size is one program.
    filled = [*batch, *[batch[-1]] * (exam.batch - len(batch))]
    parts = make_videos(pipeline, [items[i] for i in filled], sample, decode)
    for i, video in zip(batch, whole_videos(parts)):
      made[i] = video
  return made


def _item(scene, caption, number, frames, references=(), job=None):
  job = job or tasks.of_strategy((), 0, 1, 0)
  requests = tuple(Request(caption, *_size(scene), frames, float(shapes.FPS), number, loop) for loop in range(job.loops))
  return Item(requests, references, job)


def _shares(judged):
  """Means of dicts of bools, and of colour, shape and direction together."""
  result = {name: float(np.mean([one[name] for one in judged])) for name in judged[0]}
  result["color, shape, direction"] = float(np.mean([one["color"] and one["shape"] and one["direction"] for one in judged]))
  return result


def _text(pipeline, exam, split, progress):
  pairs = scenes_of(split, exam.count, exam.frames)
  items = [_item(scene, caption, i, exam.frames) for i, (scene, caption) in enumerate(pairs)]
  videos = _make(pipeline, exam, items, f"text, {split}", progress)
  return _shares([shapes_vision.judge(video, scene) for video, (scene, _) in zip(videos, pairs)])


def _two(pipeline, exam, progress):
  pairs = scenes_of("train", exam.count, exam.frames, objects=2)
  items = [_item(scene, caption, i, exam.frames) for i, (scene, caption) in enumerate(pairs)]
  videos = _make(pipeline, exam, items, "two", progress)
  judged = [shapes_vision.judge(video, scene) for video, (scene, _) in zip(videos, pairs)]
  return {name: float(np.mean([one[name] for one in judged])) for name in ("count", "color", "shape", "direction", "always")}


def _sizes(pipeline, exam, progress):
  results = {}
  pairs = scenes_of("sizes", exam.count, max(shapes.LENGTHS) - 1)
  for frames in (length - 1 for length in shapes.LENGTHS):
    items = [_item(scene, caption, i, frames) for i, (scene, caption) in enumerate(pairs)]
    videos = _make(pipeline, exam, items, f"sizes, {frames} frames", progress)
    for height, width in aspect_ratios.SIZES[RESOLUTION].values():
      of_size = [(v, s) for v, (s, _) in zip(videos, pairs) if v.shape[1:3] == (height, width)]
      if of_size:
        results[f"{height} x {width}, {frames} frames"] = _shares([shapes_vision.judge(v, s) for v, s in of_size])
  return results


def _given(pipeline, exam, part, progress):
  """The tasks that give frames of a scene: how well they are kept, and whether the motion is the caption's and smooth."""
  pairs, items, known = scenes_of("train", exam.count, exam.frames), [], []
  length, last = tasks.condition_length(None, exam.frames), exam.frames - 1
  for i, (scene, caption) in enumerate(pairs):
    true = shapes.draw(scene, range(exam.frames), _size(scene))
    if part == "animate":
      references, kept, made = (true[:1],), [0], slice(0, None)
      job = tasks.make_job("animate", exam.frames, [1])
    elif part == "extend":
      references, kept, made = (true[:length],), [*range(length)], slice(length - 1, None)
      job = tasks.make_job("extend-forward", exam.frames, [length])
    elif part == "interpolate":
      references, kept, made = (true[:1], true[-1:]), [0, last], slice(0, None)
      job = tasks.make_job("interpolate", exam.frames, [1, 1])
    else:
      references, made = (true[:length], true[-length:]), slice(length - 1, exam.frames - length + 1)
      kept = [*range(length), *range(exam.frames - length, exam.frames)]
      job = tasks.make_job("connect", exam.frames, [length, length])
    job = dataclasses.replace(job, pieces=((len(references), 0, None),))  # the clip alone, as the model made it
    items.append(_item(scene, caption, i, exam.frames, references, job))
    known.append((true, kept))
  videos = _make(pipeline, exam, items, part, progress)
  judged, rows = [], []
  for video, (scene, _), (true, kept) in zip(videos, pairs, known):
    judged.append(shapes_vision.judge(video[made], scene))
    alone = pipeline.decode([pipeline.encode(true[kept])], len(kept))[0]
    seen = next(iter(shapes_vision.objects_of(video)), None)
    step = np.hypot(*scene.objects[0].step)
    (drawn,) = shapes_vision.objects_of(true)  # a triangle is not seen where its middle is
    error = np.abs(seen.path - drawn.path) if seen else np.full(1, np.inf)
    if seen:
      error[np.isnan(seen.path) & ~np.isnan(drawn.path)] = np.inf
    rows.append(
      (psnr(video[kept], true[kept]), psnr(alone, true[kept]), bool(seen and seen.smooth < step / 2), np.nanmax(error))
    )
  own, alone, smooth, error = np.array(rows, np.float64).T
  shares = _shares(judged)
  return {
    "given frames, dB": float(own.mean()), "autoencoder alone, dB": float(alone.mean()), "direction": shares["direction"],
    "color": shares["color"], "shape": shares["shape"], "always": shares["always"], "smooth": float(smooth.mean()),
    "within 0.1 short sides of the true path": float((error < 0.1).mean()),
  }  # fmt: skip


def _loop(pipeline, exam, progress):
  pairs = scenes_of("train", exam.count, exam.frames)
  job = tasks.make_job("loop", exam.frames, [])
  items = [_item(scene, caption, i, exam.frames, job=job) for i, (scene, caption) in enumerate(pairs)]
  ratios, jumps, judged = [], [], []
  for video, (scene, _) in zip(_make(pipeline, exam, items, "loop", progress), pairs):
    frames = video.astype(np.float32)
    judged.append(shapes_vision.judge(video, scene))
    neighbours = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
    usual = max(np.median(neighbours), 1e-6)  # a jump between the two clips makes it no larger
    ratios.append(np.abs(frames[-1] - frames[0]).mean() / usual)
    jumps.append(neighbours.max() / usual)
  return {
    "last to first frame over neighbours, ratio": float(np.mean(ratios)),
    "largest neighbours over usual ones, ratio": float(np.mean(jumps)),
    "closed: at most 1.5": float(np.mean(np.array(ratios) <= 1.5)),
    **{name: float(np.mean([one[name] for one in judged])) for name in ("color", "shape", "ground", "always")},
  }
