"""Scene detection and cutting, on small videos made here."""

import io
import itertools
from fractions import Fraction

import av
import cv2
import numpy as np
import polars as pl
import pytest
from PIL import Image

from data import video
from data.prepare import __main__ as main
from data.prepare import caption, cut, scenes
from tests.data.files import number_of as numbered
from tests.data.files import write_video as numbered_video
from tests.data.prepare.videos import number_of, two_scenes, write_video


def cut_clip(path, start, end, output, *, picture=None, short_side=256, max_fps=30.0, trim_dark=True):
  """Cuts one clip. Raises the BadVideo that `cut_clips` returns."""
  clip = cut.Clip(start, end, str(output), picture and str(picture))
  (info,) = cut.cut_clips(path, [clip], cut.Cut(short_side=short_side, max_fps=max_fps, trim_dark=trim_dark))
  if isinstance(info, video.BadVideo):
    raise info
  return info


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  return write_video(tmp_path_factory.mktemp("clips") / "a.mp4", two_scenes())


def test_the_cut_is_found(clip):
  assert scenes.Scenes().detect(clip) == [(0, 40), (40, 90)]


def test_a_video_without_a_cut_is_one_scene(tmp_path):
  assert scenes.Scenes().detect(write_video(tmp_path / "a.mp4", two_scenes()[:30])) == [(0, 30)]


@pytest.mark.parametrize(("start", "end"), [(0, 40), (40, 90), (33, 34), (7, 66)])
def test_cut_is_frame_exact(clip, tmp_path, start, end):
  info = cut_clip(clip, start, end, tmp_path / "c.mp4", picture=tmp_path / "c.png")
  assert info == video.VideoInfo(end - start, 72, 128, 24.0) == video.probe(tmp_path / "c.mp4")
  frames = video.read_frames(tmp_path / "c.mp4")
  assert [number_of(f) for f in frames] == list(range(start, end))
  image = video.read_frames(tmp_path / "c.png")[0]
  assert number_of(image) == start + (end - start) // 2
  original = video.read_frames(clip, [start])[0]
  assert np.abs(original.astype(int) - frames[0]).mean() < 4
  assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_variable_and_high_rates(tmp_path):
  steps = [1, 1, 3, 1, 2] * 8
  slow = write_video(tmp_path / "a.mp4", two_scenes()[:40], fps=24, pts=list(itertools.accumulate(steps, initial=0))[:40])
  info = cut_clip(slow, 10, 30, tmp_path / "b.mp4")
  numbers = [number_of(f) for f in video.read_frames(tmp_path / "b.mp4")]
  assert numbers[0] == 10
  assert set(numbers) <= set(range(10, 30))
  assert numbers == sorted(numbers)
  assert info.num_frames == pytest.approx(sum(steps[10:30]) / 24 * info.fps, abs=1)

  fast = write_video(tmp_path / "c.mp4", two_scenes()[:60], fps=60)
  assert cut_clip(fast, 20, 60, tmp_path / "d.mp4").fps == 30
  assert [number_of(f) for f in video.read_frames(tmp_path / "d.mp4")] == list(range(20, 60, 2))


def test_small_sizes_and_rotation(tmp_path):
  assert cut.small_size(720, 1280, 256) == (256, 456)
  assert cut.small_size(1280, 719, 256) == (456, 256)
  assert cut.small_size(71, 91, 256) == (72, 92)
  turned = write_video(tmp_path / "a.mp4", two_scenes()[:30], turned=True)
  assert (video.probe(turned).height, video.probe(turned).width) == (128, 72)
  info = cut_clip(turned, 5, 20, tmp_path / "b.mp4", short_side=36)
  assert (info.num_frames, info.height, info.width) == (15, 64, 36)
  wanted = video.read_frames(turned, [5], size=(64, 36))[0]
  got = video.read_frames(tmp_path / "b.mp4", [0])[0]
  assert np.abs(wanted.astype(int) - got).mean() < 6


@pytest.mark.parametrize("short_side", [0, 256])
@pytest.mark.parametrize("colors", [None, 1])
def test_colours_of_rotated_videos_stay(tmp_path, short_side, colors):
  """Videos of phones are large and BT.709, with or without a tag."""
  image = cv2.resize(np.random.default_rng(0).integers(20, 235, (9, 16, 3)).astype(np.uint8), (1280, 720))
  with av.open(str(tmp_path / "a.mp4"), "w") as container:
    stream = container.add_stream("libx264", rate=24, options={"crf": "8", "preset": "ultrafast"})
    stream.height, stream.width, stream.pix_fmt = 720, 1280, "yuv420p"
    if colors:
      stream.codec_context.colorspace = colors
    stream.set_display_rotation(90)
    frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p", dst_colorspace="ITU709")
    frame.pts, frame.time_base = 0, Fraction(1, 24)
    container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  info = cut_clip(tmp_path / "a.mp4", 0, 1, tmp_path / "b.mp4", short_side=short_side, trim_dark=False)
  wanted = video.read_frames(tmp_path / "a.mp4", [0], size=(info.height, info.width))[0].astype(int)
  assert np.abs(video.read_frames(tmp_path / "b.mp4", [0])[0] - wanted).mean() < 2.5


def test_black_ends_are_dropped(tmp_path):
  black = np.zeros((72, 128, 3), np.uint8)
  images = two_scenes()[:30]
  images[:4], images[12], images[25:] = [black] * 4, black, [black] * 5
  path = write_video(tmp_path / "a.mp4", images)
  assert cut_clip(path, 0, 30, tmp_path / "b.mp4").num_frames == 21
  assert number_of(video.read_frames(tmp_path / "b.mp4", [0])[0]) == 4
  assert cut_clip(path, 0, 30, tmp_path / "b.mp4", trim_dark=False).num_frames == 30
  with pytest.raises(video.BadVideo, match="all black"):
    cut_clip(path, 26, 30, tmp_path / "c.mp4")
  assert not (tmp_path / "c.mp4").exists()
  with pytest.raises(video.BadVideo, match="has 30 frames"):
    cut_clip(path, 20, 40, tmp_path / "c.mp4")


def test_crop_boxes():
  assert cut.crop_boxes(256, 456) == [(100, 0, 256, 256), (156, 0, 144, 256)]
  assert cut.crop_boxes(256, 456, 0.0) == [(0, 0, 256, 256), (0, 0, 144, 256)]
  assert cut.crop_boxes(256, 456, 1.0) == [(200, 0, 256, 256), (312, 0, 144, 256)]
  assert cut.crop_boxes(456, 256, 1.0) == [(0, 200, 256, 256), (0, 312, 256, 144)]
  assert cut.crop_boxes(256, 256) == [(56, 0, 144, 256)]


def test_a_crop_is_cut_and_captioned(tmp_path):
  """`crop` counts in pixels of the upright frame, also in a rotated file."""
  images = two_scenes(20, 0)
  for name, turned, crop in (("a", False, (32, 10, 64, 48)), ("b", True, (7, 20, 48, 64))):
    path = write_video(tmp_path / f"{name}.mp4", images, turned=turned)
    row = {"path": str(path), "start": 4, "end": 16, "num_frames": 12, "height": 128, "width": 72, "fps": 24.0, "id": "x"}
    pl.DataFrame([{**row, "crop": ",".join(map(str, crop))}, {**row, "crop": None}]).write_parquet(tmp_path / "t.parquet")
    assert main.main(["cut", str(tmp_path / "t.parquet"), "-o", str(tmp_path / name / "o.parquet"), "--workers=1"]) == 0
    cropped, whole = pl.read_parquet(tmp_path / name / "o.parquet").to_dicts()
    assert (cropped["crop"], cropped["width"], cropped["height"], cropped["num_frames"]) == (None, crop[2], crop[3], 12)
    assert cropped["path"] != whole["path"]
    wanted = video.read_frames(path, [4, 15], crop=crop)
    assert np.abs(video.read_frames(cropped["path"], [0, 11]).astype(int) - wanted).mean() < 4
    seen = caption._pictures(caption.Pictures(1, 256, False, 0.0), {**row, "crop": list(crop)}, None)
    assert Image.open(io.BytesIO(seen[0])).size == crop[2:]


def test_frames_with_equal_time_stamps_count_separately(tmp_path):
  """A range means the same frames for the loader and for this pipeline."""
  times = [i * 10 for i in range(24)]
  times[10] = times[9] + 1  # in 1/2400 s. Matroska rounds both to the same millisecond
  path = numbered_video(tmp_path / "a.mkv", 24, rate=240, times=times)
  assert video.probe(path).num_frames == 24
  assert video.frame_times(str(path)) is None
  info = cut_clip(path, 14, 24, tmp_path / "b.mp4", trim_dark=False, max_fps=0.0)
  assert info.num_frames == 10
  numbers = [numbered(f) for f in video.read_frames(tmp_path / "b.mp4")]
  assert numbers == [numbered(f) for f in video.read_frames(path, np.arange(14, 24))] == list(range(14, 24))


def test_parts_of_a_long_scene_are_not_too_short():
  step = scenes.Scenes(min_seconds=10.0, max_seconds=15.0)
  assert step._parts(0, 160, 10.0) == [(0, 150)]
  assert step._parts(0, 330, 10.0) == [(0, 110), (110, 220), (220, 330)]
  assert step._parts(0, 310, 10.0) == [(0, 103), (103, 206), (206, 310)]
  assert scenes.Scenes()._parts(0, 160, 10.0) == [(0, 80), (80, 160)]
