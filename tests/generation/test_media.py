"""Media files: frames and settings round-trip, and a failure leaves no partial file."""

import json
import os

import av
import numpy as np
import pytest
from PIL import Image

from data import video
from stdit_jax.generation.media import contact_sheet, open_media, write_media
from tests.data.files import number_of, picture

SETTINGS = {"prompt": 'a "gräu" rabbit\n☂', "seed": 7}


def frames(height=48, width=64, count=5):
  return np.stack([picture(i, height, width) for i in range(count)])


def files_in(folder):
  return sorted(p.name for p in folder.iterdir())


def test_mp4_round_trips(tmp_path):
  write_media(tmp_path / "a.mp4", frames(49, 65), 12.5, SETTINGS)
  with av.open(str(tmp_path / "a.mp4")) as container:
    stream = container.streams.video[0]
    assert float(stream.average_rate) == 12.5
    decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert json.loads(container.metadata["comment"]) == SETTINGS
  assert [frame.shape for frame in decoded] == [(48, 64, 3)] * 5  # even sides
  assert [number_of(frame) for frame in decoded] == list(range(5))
  assert json.loads((tmp_path / "a.json").read_text()) == SETTINGS
  assert files_in(tmp_path) == ["a.json", "a.mp4"]


@pytest.mark.parametrize("height", [64, 720])
def test_an_mp4_keeps_its_colours(tmp_path, height):
  """Without colour marks, players and `data.video` read other colours from 720 lines on."""
  colors = np.array([(40, 180, 60), (225, 40, 40), (30, 60, 200)], np.uint8)
  given = np.broadcast_to(colors[:, None, None], (3, height, 64, 3))
  write_media(tmp_path / "a.mp4", given, 24, SETTINGS)
  read = video.read_frames(tmp_path / "a.mp4")
  assert np.abs(read.astype(int) - given).max() <= 2
  with av.open(str(tmp_path / "a.mp4")) as container:
    codec = container.streams.video[0].codec_context
    assert (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range) == (1, 1, 1, 1)


@pytest.mark.parametrize(("kind", "fps", "durations"), [("gif", 24, [40, 40, 40, 50, 40]), ("webp", 24, [42, 41, 42, 42, 41])])
def test_animated_images_keep_the_mean_frame_rate(tmp_path, kind, fps, durations):
  write_media(tmp_path / f"a.{kind}", frames(), fps, SETTINGS)
  with Image.open(tmp_path / f"a.{kind}") as image:
    found = []
    for i in range(5):
      image.seek(i)
      image.load()
      found.append(image.info["duration"])
  assert found == durations


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_animated_images_round_trip(tmp_path, kind):
  write_media(tmp_path / f"a.{kind}", frames(), 10, SETTINGS)
  with Image.open(tmp_path / f"a.{kind}") as image:
    assert image.n_frames == 5
    assert image.size == (64, 48)
    numbers = []
    for i in range(5):
      image.seek(i)
      numbers.append(number_of(np.asarray(image.convert("RGB"))))
      assert image.info["duration"] == 100
    image.seek(0)
    comment = image.info["comment"] if kind == "gif" else image.info["xmp"]
    assert json.loads(comment) == SETTINGS
    assert image.info["loop"] == 0
  assert numbers == list(range(5))
  assert files_in(tmp_path) == sorted(["a.json", f"a.{kind}"])


def test_png_round_trips(tmp_path):
  write_media(tmp_path / "new" / "a.png", frames(count=1), 24, SETTINGS)
  with Image.open(tmp_path / "new" / "a.png") as image:
    np.testing.assert_array_equal(np.asarray(image), frames(count=1)[0])
    assert json.loads(image.text["Comment"]) == SETTINGS
  with pytest.raises(ValueError, match="5 frames don't fit into a png; choose one of mp4, gif, webp"):
    write_media(tmp_path / "a.png", frames(), 24, SETTINGS)
  with pytest.raises(ValueError, match="unknown ending; allowed: mp4, gif, webp, png"):
    write_media(tmp_path / "a.avi", frames(), 24, SETTINGS)
  assert files_in(tmp_path) == ["new"]


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a"])
def test_frames_may_come_in_parts(tmp_path, name):
  """The file equals one written at once. It does not exist before the last part."""
  (tmp_path / "parts").mkdir()
  write_media(tmp_path / "whole" / name, frames(), 24, SETTINGS)
  with open_media(tmp_path / "parts" / name, 5, 24, SETTINGS) as write:
    for part in (frames()[:2], frames()[:0], frames()[2:]):
      write(part)
    assert not (tmp_path / "parts" / name).exists()
  one, other = (sorted(p for p in (tmp_path / folder).rglob("*") if p.is_file()) for folder in ("whole", "parts"))
  assert len(one) == (2 if "." in name else 6)
  for a, b in zip(one, other, strict=True):
    assert a.name == b.name
    np.testing.assert_array_equal(*map(shown, (a, b)))


def shown(path):
  """Frames of a media file, bytes of a JSON file."""
  if path.suffix == ".json":
    return list(path.read_bytes())
  with av.open(str(path)) as container:
    return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("count", [4, 6])
def test_a_wrong_number_of_frames_is_an_error(tmp_path, count):
  with pytest.raises(ValueError, match="5 frames were given, not"), open_media(tmp_path / "a.gif", count, 24, {}) as write:
    write(frames())
  assert files_in(tmp_path) == []


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a"])
def test_a_failure_leaves_no_file(tmp_path, name):
  with pytest.raises(KeyboardInterrupt), open_media(tmp_path / name, 500, 24, SETTINGS) as write:  # noqa: PT012
    for _ in range(20):  # more than H.264's encoder looks ahead
      write(frames())
    assert name == "a.gif" or len(files_in(tmp_path)) == 1
    raise KeyboardInterrupt
  with pytest.raises((TypeError, ValueError)):
    write_media(tmp_path / name, frames().astype(np.float64), 24, SETTINGS)
  assert files_in(tmp_path) == []


def test_contact_sheet_shows_evenly_spaced_frames():
  sheet = contact_sheet([frames(), frames()], columns=3)
  assert sheet.size == (3 * 64, 2 * 48)
  assert [number_of(np.asarray(sheet)[:48, x * 64 : (x + 1) * 64]) for x in range(3)] == [0, 2, 4]


@pytest.mark.parametrize("name", ["a.mp4", "a"])
def test_a_kill_leaves_settings_without_a_file_and_no_file_without_settings(tmp_path, monkeypatch, name):
  """So `sample` makes the file again under the same name. An old file with other settings is gone."""
  write_media(tmp_path / name, frames(), 24, {"prompt": "old"})

  def killed(source, target):
    if str(target) == str(tmp_path / name):
      raise KeyboardInterrupt
    rename(source, target)

  rename = os.rename
  monkeypatch.setattr(os, "rename", killed)
  monkeypatch.setattr(os, "replace", killed)
  with pytest.raises(KeyboardInterrupt):
    write_media(tmp_path / name, frames(), 24, SETTINGS)
  assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
  assert json.loads((tmp_path / "a.json").read_text()) == SETTINGS
