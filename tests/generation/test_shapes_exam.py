"""The evaluation of moving shapes, with stand-in models whose results are known."""

import dataclasses
import types

import numpy as np
import pytest

from data import shapes, shapes_vision
from stdit_jax.autoencoders import image_kl
from stdit_jax.generation import shapes_exam

EXAM = shapes_exam.Exam(count=12, steps=1, scale=1.0, batch=5)
TWO = {caption: scene for scene, caption in shapes_exam.scenes_of("train", EXAM.count, EXAM.frames, objects=2)}


@dataclasses.dataclass
class Pupil:
  """A stand-in for a pipeline without an autoencoder. It draws the scene of the caption, continues given frames, and makes the
  errors that it is told to make."""

  mistakes: dict = dataclasses.field(default_factory=dict)
  forgets: bool = False  # ignores the given frames
  hides: int = 0  # number of last frames without the object
  made: int = 0

  codec = types.SimpleNamespace(config=image_kl.TABLE["tiny-kl-f8"])  # gives the lengths

  def encode(self, frames):
    return frames.astype(np.float32)

  def decode(self, latents, num_frames):
    return [np.rint(z).clip(0, 255).astype(np.uint8) for z in latents]

  def sample_latents(self, requests, steps, scale, given):
    self.made += len(requests)
    return np.stack([self.draw(request, known) for request, known in zip(requests, given or [None] * len(requests))])

  def draw(self, request, known):
    text = request.prompt
    if text in TWO:
      return shapes.draw(TWO[text], range(request.num_frames), (request.height, request.width)).astype(np.float32)
    ground = next(word for word in shapes.GROUNDS if word in text)
    words = [next(w for w in table if w in text) for table in (shapes.SHAPES, shapes.COLORS)]
    words += [max((w for w in shapes.DIRECTIONS if w in text), key=len), next(w for w in shapes.SPEEDS if w in text)]
    words = dict(zip(("shape", "color", "direction", "speed"), words)) | self.mistakes
    one = shapes.Object(**words, start=(0, 0))
    middle = shapes.Scene((one,), ground, "striped" in text, request.height, request.width, 9)
    start = -np.array(one.step) * (request.num_frames - 1) / 2
    if known is not None:
      frame = int(np.flatnonzero(known[2])[0])
      (seen,) = shapes_vision.objects_of(known[1][[frame]].astype(np.uint8))
      (centred,) = shapes_vision.objects_of(shapes.draw(middle, [0]))  # the measured middle of a triangle is off
      start = seen.path[0] - centred.path[0] - np.array(one.step) * frame
    scene = dataclasses.replace(middle, objects=(shapes.Object(**words, start=tuple(start)),))
    video = shapes.draw(scene, range(request.num_frames)).astype(np.float32)
    if self.hides:
      video[-self.hides :] = video.mean(-1, keepdims=True)[-self.hides :]
    if known is not None and not self.forgets:
      video[known[2]] = known[1][known[2]]
    return video


def test_a_perfect_model_passes():
  pupil = Pupil()
  results = shapes_exam.examine(pupil, EXAM)
  for part in ("text, seen combinations", "text, held-out combinations"):
    assert set(results[part].values()) == {1.0}, results[part]
  sizes = {name: values for name, values in results.items() if "frames" in name}
  assert len(sizes) >= 6
  assert {name.partition(", ")[2] for name in sizes} == {"4 frames", "8 frames"}
  assert all(values["color, shape, direction"] == 1 for values in sizes.values())
  assert min(results["two"]["count"], results["two"]["color"]) == 1
  assert min(results["two"]["shape"], results["two"]["direction"]) > 0.9
  for part in ("animate", "extend", "interpolate", "connect"):
    values = results[part]
    assert values["given frames, dB"] == values["autoencoder alone, dB"] == 99
    assert values["direction"] == values["within 0.1 short sides of the true path"] == 1
    assert values["smooth"] > 0.9  # measured positions of given frames are off by a fraction of a pixel
  assert results["loop"]["closed: at most 1.5"] < 1  # a straight path does not return
  assert results["loop"]["ground"] == 1
  assert pupil.made % EXAM.batch == 0  # every batch is full: one program per size


@pytest.mark.parametrize(("word", "mistake"), [("color", "red"), ("shape", "circle"), ("direction", "up"), ("speed", "slowly")])
def test_each_error_is_found(word, mistake):
  pairs = shapes_exam.scenes_of("train", EXAM.count, EXAM.frames)
  right = np.mean([getattr(scene.objects[0], word) == mistake for scene, _ in pairs])
  values = shapes_exam.examine(Pupil({word: mistake}), EXAM, ("text",))["text, seen combinations"]
  assert values[word] == pytest.approx(right)
  assert all(values[other] == 1 for other in ("color", "shape", "direction", "speed") if other != word)


def test_an_object_that_disappears_is_found():
  results = shapes_exam.examine(Pupil(hides=2), EXAM, ("text", "animate"))
  for part in ("text, seen combinations", "animate"):
    assert results[part]["always"] == 0
  assert results["animate"]["within 0.1 short sides of the true path"] == 0


def test_ignored_frames_are_found():
  values = shapes_exam.examine(Pupil({"color": "red"}, forgets=True), EXAM, ("animate",))["animate"]
  assert values["given frames, dB"] < 40
  assert values["autoencoder alone, dB"] == 99


def test_held_out_scenes_are_held_out():
  for split in shapes.SPLITS:
    for scene, _ in shapes_exam.scenes_of(split, 30, 8):
      (one,) = scene.objects
      assert shapes.is_held_out(one.shape, one.color, one.direction) == (split == "held_out")
