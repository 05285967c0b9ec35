"""Frames are the right ones, for every kind of file; resizing is the original's; bad files give one reason."""

import errno
import functools
import http.server
import threading
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from data import video
from tests.data import files

KINDS = {
  "plain.mp4": {},
  "variable_rate.mp4": {"times": np.cumsum(np.random.default_rng(0).integers(3, 40, 40)).tolist()},
  "ten_bit.mp4": {"pix_fmt": "yuv420p10le"},
  "open_gop.mp4": {"x264-params": "open-gop=1:bframes=3:keyint=12"},
  "odd.mkv": {"codec": "ffv1", "pix_fmt": "yuv444p", "width": 65, "height": 47},
  "alpha.mov": {"codec": "png", "pix_fmt": "rgba"},
  "vp9.webm": {"codec": "libvpx-vp9"},
  "mpeg4.avi": {"codec": "mpeg4"},
  "stream.ts": {},
  "no_times.h264": {},
  "moving.gif": {"codec": "gif", "pix_fmt": "rgb8"},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  return files.write_video(tmp_path_factory.mktemp("video") / "plain.mp4")


@pytest.mark.parametrize("name", KINDS)
def test_read_frames_returns_the_wanted_frames(tmp_path, name):
  path = files.write_video(tmp_path / name, **KINDS[name])
  info = video.probe(path)
  height, width = KINDS[name].get("height", 48), KINDS[name].get("width", 64)
  assert (info.num_frames, info.height, info.width) == (40, height, width)
  for i in range(40):
    (frame,) = video.read_frames(path, [i])
    assert frame.shape == (height, width, 3)
    assert files.number_of(frame) == i
  clip = video.read_clip(path, 11, 7, 4, size=(30, 40))
  assert clip.shape == (7, 30, 40, 3)
  assert clip.dtype == np.uint8
  assert [files.number_of(f) for f in clip] == list(range(11, 39, 4))


@pytest.mark.parametrize("rotation", [90, -90, 180])
@pytest.mark.parametrize("resize", video.RESIZE_MODES)
def test_rotated(tmp_path, rotation, resize):
  path = files.write_video(tmp_path / "rotated.mp4", frames=13, rotation=rotation)
  upright = (48, 64) if rotation == 180 else (64, 48)
  assert (video.probe(path).height, video.probe(path).width) == upright
  # The flag turns counter-clockwise (OpenCV shows the same).
  want = np.rot90(files.picture(5), rotation // 90).astype(int)
  size = upright[0] // 2, upright[1] // 2
  (frame,) = video.read_frames(path, [5], size=size, resize=resize)
  assert frame.shape == (*size, 3)
  assert np.abs(frame - want.reshape(size[0], 2, size[1], 2, 3).mean((1, 3))).mean() < 10
  # The crop counts in pixels of the upright frame.
  (part,) = video.read_frames(path, [5], size=(16, 8), resize=resize, crop=(4, 8, 16, 32))
  assert np.abs(part - want[8:40, 4:20].reshape(16, 2, 8, 2, 3).mean((1, 3))).mean() < 12


def test_repeated_and_distant_frames(plain, monkeypatch):
  monkeypatch.setattr(video, "_SEEK_GAP", 5)
  frames = video.read_frames(plain, [0, 0, 1, 9, 9, 20, 38, 39])
  assert [files.number_of(f) for f in frames] == [0, 0, 1, 9, 9, 20, 38, 39]


def test_clip_indices():
  rng = np.random.default_rng(0)
  starts = set()
  for _ in range(300):
    indices = video.clip_indices(20, 16, 1, rng)
    assert (np.diff(indices) == 1).all()
    starts.add(int(indices[0]))
  assert starts == set(range(4))  # [0, total - window - 1]: the very last start is never taken, as in the original
  # With interval 3, 16 frames span 48. A file of only 30 frames gives 16 frames that are evenly spaced over the file.
  np.testing.assert_array_equal(video.clip_indices(49, 16, 3, rng), np.linspace(0, 47, 16).astype(int))
  np.testing.assert_array_equal(video.clip_indices(30, 16, 3, rng), np.linspace(0, 29, 16).astype(int))
  assert video.clip_indices(1, 1, 3, rng).tolist() == [0]


@pytest.mark.parametrize(
  ("source", "target"), [((48, 64), (30, 25)), ((48, 64), (64, 100)), ((47, 65), (47, 30)), ((48, 64), (48, 64))]
)
def test_original_resize_is_torchs(source, target):
  picture = np.random.default_rng(0).integers(0, 256, (*source, 3), dtype=np.uint8)
  h, w = video.cover_size(source[0], source[1], target)
  floats = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
  want = torch.nn.functional.interpolate(floats, size=(h, w), mode="bilinear", align_corners=False)[0].permute(1, 2, 0).numpy()
  y, x = int(round(h - target[0]) / 2), int(round(w - target[1]) / 2)
  want = want[y : y + target[0], x : x + target[1]] * 255
  got = video.resize_crop_bilinear(picture, target)
  assert got.shape == (*target, 3)
  assert np.abs(got - want).max() <= 0.5 + 1e-3


def test_original_resize_of_a_file(plain):
  container, stream = video.open_stream(plain)
  full = next(container.decode(stream)).to_ndarray(format="rgb24")
  got = video.read_frames(plain, [0], size=(30, 30), resize="original")[0]
  np.testing.assert_array_equal(got, video.resize_crop_bilinear(full, (30, 30)))


def test_area_is_the_mean_and_keeps_colors(tmp_path):
  """A lossless file has the drawn colours, whether it names BT.709, BT.601 or neither of them (then HD is BT.709)."""
  for height, width, space in ((720, 1280, None), (48, 64, None), (48, 64, 1), (48, 64, 5)):
    picture = np.empty((height, width, 3), np.uint8)
    picture[:] = 200, 60, 30
    picture[:, width // 2 :] = 20, 90, 220
    matrix = "ITU709" if space == 1 or (space is None and height >= 720) else "ITU601"
    path = str(tmp_path / f"{height}-{space}.mkv")
    with av.open(path, "w") as container:
      stream = container.add_stream("ffv1", rate=24)
      stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p"
      if space:
        stream.codec_context.colorspace = space
      frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv444p", dst_colorspace=matrix)
      frame.colorspace = space or 2
      container.mux(stream.encode(frame))
      container.mux(stream.encode())
    hows: list[dict[str, Any]] = [{"size": (12, 16)}, {"size": (12, 16), "crop": (0, 0, width, height)}, {}]
    for how in hows:
      (got,) = video.read_frames(path, [0], **how)
      assert np.abs(got[:, 0].astype(int) - picture[0, 0]).max() <= 3, (height, space, how)
      assert np.abs(got[:, -1].astype(int) - picture[0, -1]).max() <= 3, (height, space, how)


def test_images(tmp_path):
  picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
  path = str(tmp_path / "a.png")
  Image.fromarray(picture).save(path)
  assert video.probe(path) == video.VideoInfo(1, 40, 60, video.IMAGE_FPS)
  np.testing.assert_array_equal(video.read_frames(path, [0])[0], picture)
  got = video.read_frames(path, [0], size=(20, 20), resize="original")[0]
  np.testing.assert_array_equal(got, np.asarray(Image.fromarray(picture).resize((30, 20), Image.Resampling.BICUBIC))[:, 5:25])
  area = video.read_frames(path, [0], size=(20, 30))[0]
  assert np.abs(area - picture.reshape(20, 2, 30, 2, 3).mean((1, 3))).max() <= 2
  cut = video.read_frames(path, [0], size=(10, 10), crop=(10, 5, 20, 20))[0]
  assert np.abs(cut - picture[5:25, 10:30].reshape(10, 2, 10, 2, 3).mean((1, 3))).max() <= 2
  exif = Image.Exif()
  exif[0x0112] = 6  # a photo held upright: shown turned clockwise
  Image.fromarray(picture).save(tmp_path / "turned.jpg", exif=exif, quality=95)
  assert video.probe(tmp_path / "turned.jpg").height == 60
  with_alpha = np.dstack([picture, np.full((40, 60), 7, np.uint8)])
  Image.fromarray(with_alpha).save(tmp_path / "alpha.png")
  np.testing.assert_array_equal(video.read_frames(tmp_path / "alpha.png", [0])[0], picture)
  Image.fromarray((picture[..., 0].astype(np.uint16) << 8) + 3).save(tmp_path / "deep.png")
  np.testing.assert_array_equal(video.read_frames(tmp_path / "deep.png", [0])[0][..., 0], picture[..., 0])
  stills = [Image.fromarray(picture), Image.fromarray(255 - picture)]
  stills[0].save(tmp_path / "moving.webp", save_all=True, append_images=stills[1:])
  with pytest.raises(video.BadVideo, match="an animation of 2 frames; webp is read as a still only"):
    video.probe(tmp_path / "moving.webp")


def bad_files(folder):
  files.write_video(folder / "whole.mp4", frames=60)
  data = (folder / "whole.mp4").read_bytes()
  (folder / "end_missing.mp4").write_bytes(data[: len(data) // 2])
  files.write_video(folder / "fast.mp4", frames=60, movflags="faststart", crf=5, g=60)
  data = (folder / "fast.mp4").read_bytes()
  (folder / "start_only.mp4").write_bytes(data[: len(data) * 3 // 4])
  (folder / "empty.mp4").write_bytes(b"")
  (folder / "text.mp4").write_text("this is no video " * 100)
  (folder / "broken.png").write_bytes(b"\x89PNG no image")
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(folder / "whole.png")
  (folder / "short.png").write_bytes((folder / "whole.png").read_bytes()[:9000])
  files.write_audio(folder / "sound.m4a")
  (folder / "folder.mp4").mkdir()


def test_bad_files(tmp_path):
  bad_files(tmp_path)
  reasons = {
    "missing.mp4": "no such file",
    "missing.png": "no such file",
    "empty.mp4": "empty .0 bytes",
    "text.mp4": "not a video, or damaged or cut short",
    "end_missing.mp4": "not a video, or damaged or cut short",
    "start_only.mp4": "cut short: [0-9]+ of 60 frames",
    "sound.m4a": "no video stream .audio only",
    "broken.png": "cannot be read .cannot identify image",
    "short.png": "damaged or cut short",
    "folder.mp4": "is a folder",
  }
  for name, reason in reasons.items():
    with pytest.raises(video.BadVideo, match=reason) as error:
      video.probe(tmp_path / name)
    assert "\n" not in str(error.value)
  # The first frames of a file that was cut short can be read, not the last ones.
  assert files.number_of(video.read_frames(tmp_path / "start_only.mp4", [3])[0]) == 3
  with pytest.raises(video.BadVideo, match=r"frame 59 is asked for, the file has [0-9]+ .cut short"):
    video.read_frames(tmp_path / "start_only.mp4", [59])


def test_damage_in_the_middle_is_found(tmp_path):
  path = files.write_video(tmp_path / "a.mkv", frames=40, codec="ffv1", slicecrc=1)
  data = bytearray((tmp_path / "a.mkv").read_bytes())
  data[len(data) // 2 : len(data) // 2 + 3000] = b"\x55" * 3000
  (tmp_path / "a.mkv").write_bytes(bytes(data))
  with pytest.raises(video.BadVideo):
    video.probe(path, decode=True)


def test_crop_outside_and_unknown_resize(plain):
  with pytest.raises(video.BadVideo, match="leaves the frame of 64 x 48"):
    video.read_frames(plain, [0], crop=(60, 0, 10, 10))
  with pytest.raises(ValueError, match="resize 'nearest' is none of area, original"):
    video.read_frames(plain, [0], resize="nearest")


def test_network_addresses_need_permission(tmp_path, monkeypatch):
  """An allowed address may not redirect to a file of this machine, nor to a scheme that is not allowed."""
  path, secret = tmp_path / "clip.mp4", tmp_path / "secret.mp4"
  files.write_video(path, frames=6)
  files.write_video(secret, frames=6)

  class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
      if self.path == "/redirect.mp4":
        self.send_response(302)
        self.send_header("Location", f"file://{secret}")
        self.end_headers()
        return
      super().do_GET()

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path)) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for scheme, allowed in (("http", ""), ("http", "https"), ("rtmp", "http")):
      monkeypatch.setenv(video.SCHEMES, allowed)
      with pytest.raises(video.BadVideo, match=f"a network address. To allow {scheme}:// set STDIT_JAX_SCHEMES={scheme}"):
        video.read_frames(address.replace("http", scheme) + "/clip.mp4", [2])
    monkeypatch.setenv(video.SCHEMES, "https,http")
    np.testing.assert_array_equal(video.read_frames(f"{address}/clip.mp4", [2]), video.read_frames(path, [2]))
    with pytest.raises(video.BadVideo, match="not a video, or damaged"):
      video.read_frames(f"{address}/redirect.mp4", [2])
    server.shutdown()


def test_transient_errors_are_retried(monkeypatch):
  monkeypatch.setattr(video, "RETRY_DELAYS", (0, 0))
  calls = []

  def flaky(times, code):
    calls.append(code)
    if len(calls) <= times:
      raise OSError(code, "trouble")
    return "read"

  assert video.retry(flaky, 2, errno.ESTALE) == "read"
  calls.clear()
  with pytest.raises(OSError, match="trouble"):
    video.retry(flaky, 3, errno.EIO)
  assert len(calls) == 3
  calls.clear()
  with pytest.raises(OSError, match="trouble"):
    video.retry(flaky, 1, errno.ENOENT)
  assert len(calls) == 1
