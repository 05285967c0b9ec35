"""Moving shapes: the frames show what the caption says, and the measurement finds it in the frames."""

import dataclasses

import numpy as np
import pytest

from data import aspect_ratios, shapes, shapes_vision, video
from data.config import DataConfig
from data.loader import make_loader

SIZES = aspect_ratios.SIZES["64p"]


def drawn(number, split="train", frames=None):
  """(scene, its frames as a 64p bucket has them)."""
  address = f"shapes://{split}/3/{number}"
  scene = shapes.scene(address)
  size = SIZES[aspect_ratios.closest_ratio(scene.height, scene.width, "64p")]
  return scene, video.read_frames(address, frames, size=size)


@pytest.fixture(scope="module")
def examples():
  return [drawn(number, split) for split in shapes.SPLITS for number in range(40)]


def test_drawn_objects_are_measured(examples):
  """All properties of a single object are measured, and nearly all of two objects, in every aspect ratio."""
  right, count = 0, 0
  for scene, frames in examples:
    judged = shapes_vision.judge(frames, scene)
    exact = len(scene.objects) == 1  # of two small objects a property may be missed; `right` counts the others
    assert all(judged[name] for name in (judged if exact else ("color", "count", "ground"))), (scene, judged)
    found = {seen.color: seen for seen in shapes_vision.objects_of(frames)}
    assert sorted(found) == sorted(o.color for o in scene.objects), scene
    for o in scene.objects:
      count += 1
      seen = found[o.color]
      right += (seen.shape, seen.direction, seen.speed) == (o.shape, o.direction, o.speed)
      expected = np.array(o.start) + np.arange(len(frames))[:, None] * o.step
      error = np.abs(seen.path - expected)[~np.isnan(seen.path)].max()
      assert error < 0.4 * o.size  # a triangle's centre of mass is not its middle
  assert count > 80
  assert right >= count - 2


def test_videos_of_other_scenes_are_judged_wrong(examples):
  """Every property alone: the same scene with another colour, shape, direction, speed, ground, or number of objects."""
  scene, _ = next((s, f) for s, f in examples if len(s.objects) == 1 and s.frames == 9 and s.objects[0].speed == "slowly")
  one = scene.objects[0]
  other = {
    "color": next(c for c in shapes.COLORS if c != one.color), "shape": next(s for s in shapes.SHAPES if s != one.shape),
    "direction": list(shapes.DIRECTIONS)[(list(shapes.DIRECTIONS).index(one.direction) + 1) % 8], "speed": "quickly",
  }  # fmt: skip
  start = tuple(-np.array(shapes.Object(one.shape, one.color, other["direction"], "quickly", (0, 0)).step) * 3.5)
  middle = shapes.Object(one.shape, one.color, one.direction, one.speed, tuple(-np.array(one.step) * 3.5))
  base = shapes.Scene((middle,), scene.ground, scene.striped, 128, 128, 8)
  assert all(shapes_vision.judge(shapes.draw(base, range(8), (64, 64)), base).values())
  for name, word in other.items():
    changed = {**{f: getattr(middle, f) for f in ("shape", "color", "direction", "speed", "start")}, name: word}
    if name in ("direction", "speed"):
      changed["start"] = start
    made = shapes.Scene((shapes.Object(**changed),), scene.ground, scene.striped, 128, 128, 8)
    judged = shapes_vision.judge(shapes.draw(made, range(8), (64, 64)), base)
    assert [key for key, right in judged.items() if not right] == [name]
  # A spot of the right colour on another object is not the object.
  blot = shapes.Scene((dataclasses.replace(middle, color=other["color"]),), scene.ground, scene.striped, 128, 128, 8)
  spotted = shapes.draw(blot, range(8), (64, 64))
  for frame, (x, y) in zip(spotted, np.rint((np.add(middle.start, np.outer(range(8), middle.step)) + 0.5) * 64).astype(int)):
    frame[y - 2 : y + 2, x - 2 : x + 2] = shapes.COLORS[one.color]
  assert not shapes_vision.judge(spotted, base)["color"]
  still = shapes.draw(base, [3] * 8, (64, 64))
  assert not shapes_vision.judge(still, base)["direction"]
  noise = np.random.default_rng(0).integers(0, 256, still.shape).astype(np.uint8)
  gray = np.full_like(still, 110)
  for frames in (noise, gray):
    judged = shapes_vision.judge(frames, base)
    assert not judged["direction"]
    assert not judged["count"]


def test_one_aspect_ratio_has_short_clips_only_in_training():
  found = {
    split: {(s.height, s.width, s.frames) for s in (shapes.scene(f"shapes://{split}/0/{i}") for i in range(200))}
    for split in shapes.SPLITS
  }
  everything = {(*side, frames) for side in shapes.SIDES for frames in shapes.LENGTHS}
  assert found["sizes"] == found["held_out"] == everything
  assert everything - found["train"] == {(*shapes.NOT_LONG, max(shapes.LENGTHS))}


def test_training_lacks_held_out_combinations():
  train = [shapes.scene(f"shapes://train/0/{i}") for i in range(2000)]
  seen = {(o.shape, o.color, o.direction) for s in train for o in s.objects}
  held_out = {(s, c, d) for s in shapes.SHAPES for c in shapes.COLORS for d in shapes.DIRECTIONS if shapes.is_held_out(s, c, d)}
  assert not seen & held_out
  assert len(seen | held_out) == 4 * 6 * 8
  assert 15 <= len(held_out) <= 30
  # Training shows every word, and every pair of shape and colour.
  assert {(s, c) for s, c, _ in seen} == {(s, c) for s in shapes.SHAPES for c in shapes.COLORS}
  scenes = [shapes.scene(f"shapes://held_out/0/{i}") for i in range(100)]
  assert {(o.shape, o.color, o.direction) for s in scenes for o in s.objects} <= held_out


def test_captions_name_every_property(examples):
  for scene, _ in examples[:60]:
    for caption in shapes.captions(scene):
      for o in scene.objects:
        assert f"{o.color} {o.shape}" in caption
        assert f"{o.speed} {o.direction}" in caption
      assert scene.ground in caption
      assert ("striped" in caption) == scene.striped
  assert len(set(shapes.captions(examples[0][0]))) == 4


def test_a_table_of_shapes_trains_like_files(tmp_path):
  config = DataConfig(tables=("shapes://train/0/120",), buckets=(("64p", 1, 1.0, 4), ("64p", 4, 1.0, 4)), workers=0)
  with make_loader(config, str(tmp_path), epochs=1) as loader:
    steps = list(loader)
  assert {step.bucket for step in steps} == {("64p", 1), ("64p", 4)}
  samples = [sample for step in steps for sample in step.samples]
  assert sum(s.num_frames == 1 for s in samples) == sum(s.num_frames == 4 for s in samples) == 120
  assert not loader.bad_rows
  assert {(s.height, s.width) for s in samples} == set(SIZES.values())
  clip = next(s for s in samples if s.num_frames == 4 and len(shapes.scene(s.path).objects) == 1)
  assert clip.fps == 8
  assert clip.pixels is not None
  scene = shapes.scene(clip.path)
  assert clip.caption in shapes.captions(scene)
  assert all(shapes_vision.judge(clip.pixels, scene).values())


@pytest.mark.parametrize("address", ["shapes://train/0", "shapes://test/0/1", "shapes://train/a/1", "shapes://train/0/-1"])
def test_wrong_addresses_are_refused(address, tmp_path):
  with pytest.raises(ValueError, match=r"is no address of shapes: shapes://SPLIT/SEED/NUMBER"):
    make_loader(DataConfig(tables=(address,), buckets=(("64p", 8, 1.0, 4),), workers=0), str(tmp_path))
