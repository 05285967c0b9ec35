"""Codecs compute clips in pieces: the values are those of the whole clip, and memory does not grow."""

import collections
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stdit_jax.autoencoders import causal3d, codec, image_kl, registry, temporal, tiles
from stdit_jax.autoencoders.codec import fit_tiles
from stdit_jax.autoencoders.family import encoder_only
from stdit_jax.autoencoders.latents import to_uint8
from stdit_jax.autoencoders.registry import make_codec
from tests.helpers import relative_error

CONFIGS = {
  "image": image_kl.get_config(
    "tiny-kl-f8", block_out_channels=(8, 16), scaling_factor=0.5, shift=(0.1, 0.2, -0.3, 0.0), scale=[1.0, 2.0, 0.5, 1.5]
  ),
  "Open-Sora": temporal.get_config("tiny-temporal", chunk=5),
  "Open-Sora, whole": temporal.get_config("tiny-temporal", chunk=0),
  "CogVideoX": causal3d.get_config("tiny-causal3d", scaling_factor=0.7),
  "CogVideoX, whole": causal3d.get_config("tiny-causal3d", statistics="clip"),
}


@pytest.fixture(scope="module", params=CONFIGS)
def made(request):
  """(codec, names of the functions that it runs)."""
  config, ran = CONFIGS[request.param], []
  module = registry.family_of(config)
  model = module.build(config)

  def run(function, *args, **static):
    ran.append(function.__name__)
    return codec.run_jitted(function, *args, **static)

  return make_codec(model, module.init(model, jax.random.key(0)), micro_batch=4, run=run), ran


def whole(made, frames):
  """Normalised (mean, std) and pixels of the whole clip, by the model itself."""
  model, variables, config = made.model, made.variables, made.config
  x = (frames / 127.5 - 1.0).astype(np.float32)
  x = x if isinstance(model, image_kl.ImageKL) else x[None]
  apply = lambda value, method, *rest: jax.jit(lambda v, x: model.apply(v, x, *rest, method=method))(variables, value)  # noqa: E731
  mean, logvar = apply(x, "encode")
  rest = (len(frames),) if isinstance(model, temporal.VideoAutoencoder) else ()
  pixels = apply(mean, "decode", *rest)
  squeeze = lambda y: np.asarray(y).reshape(-1, *y.shape[-3:])  # noqa: E731
  factor = config.scaling_factor / np.asarray(config.scale)
  normalised = (mean - np.asarray(config.shift)) * factor
  return squeeze(normalised), squeeze(np.exp(0.5 * logvar) * factor), squeeze(to_uint8(pixels))


def test_encoding_needs_only_the_encoder(made):
  made, _ = made
  frames = np.random.default_rng(0).integers(0, 256, (9, 16, 24, 3), np.uint8)
  reduced = dataclasses.replace(made, variables=encoder_only(made.variables))
  jax.tree.map(np.testing.assert_array_equal, reduced.encode(frames), made.encode(frames))


@pytest.mark.parametrize("config", [*CONFIGS.values(), temporal.get_config("tiny-temporal", shortcut=True)])
def test_encoder_only_keeps_exactly_what_encode_initialises(config):
  family = registry.family_of(config)
  init = functools.partial(family.build(config).init, method="encode")
  needed = jax.eval_shape(init, jax.random.key(0), jnp.zeros(family.example_shape(config)))["params"]
  whole = family.init_shapes(config)
  assert encoder_only(whole) == {"params": needed} != whole


@pytest.mark.parametrize("length", [9, 16])
def test_pieces_equal_the_whole_clip(made, length):
  made, _ = made
  assert made.config.keeps(length)
  frames = np.random.default_rng(length).integers(0, 256, (length, 16, 24, 3), dtype=np.uint8)
  mean, std = made.encode(frames)
  expected_mean, expected_std, expected = whole(made, frames)
  assert mean.shape == (made.config.latent_frames(length), *made.config.latent_size(16, 24), made.config.latent_channels)
  assert relative_error(mean, expected_mean) < 1e-5
  assert relative_error(std, expected_std) < 1e-5
  told = []
  pixels = made.decode(mean, length, told.append)
  assert sum(told) == length
  assert pixels.shape == frames.shape
  assert pixels.dtype == np.uint8
  assert np.abs(pixels.astype(int) - expected[:length].astype(int)).max() <= 1


@pytest.mark.parametrize("made", [name for name in CONFIGS if name != "Open-Sora, whole"], indirect=True)
def test_memory_does_not_grow_with_the_clip(made):
  """The largest program of the decoder stays the same, unless norms see the whole clip."""
  made, _ = made
  size = made.config.latent_size(16, 24)
  peaks = []
  for length in (17, 34 + 17):
    programs = made.lower("decode", size, length)
    peaks.append(max(p.compile().memory_analysis().temp_size_in_bytes for p in programs))
  if getattr(made.config, "statistics", "") == "clip":
    assert peaks[1] > 2 * peaks[0]
  else:
    assert peaks[1] == peaks[0]


@pytest.mark.parametrize("made", ["image", "Open-Sora", "CogVideoX"], indirect=True)
def test_an_image_is_computed_once(made):
  """Its FLOPs do not depend on the micro batch."""
  made, _ = made
  for method in ("encode", "decode"):
    several, one = (dataclasses.replace(made, micro_batch=n).flops(method, (4, 6), 1) for n in (4, 1))
    assert several == one


def test_lowered_programs_are_those_that_run(made):
  made, ran = made
  length, size = 17, made.config.latent_size(16, 24)
  latents = np.zeros((made.config.latent_frames(length), *size, made.config.latent_channels), np.float32)
  for method, arguments in (("decode", (latents, length)), ("encode", (np.zeros((length, 16, 24, 3), np.uint8),))):
    ran.clear()
    getattr(made, method)(*arguments)
    lowered = collections.Counter()
    for program, times in made.lower(method, size, length).items():
      lowered[str(program.as_text()).split("module @jit_", 1)[1].split()[0]] += times
    assert lowered == collections.Counter(ran)


def test_join_reports_finished_pieces():
  """It reports a NumPy piece before it asks for the next one."""
  told = []

  def parts():
    for number in range(4):
      assert told == [3] * number
      yield np.zeros((3, 2))

  assert codec.join(parts(), 10, told.append).shape == (10, 2)
  assert told == [3, 3, 3, 1]


@pytest.mark.parametrize("size", [(90, 160), (60, 107), (30, 53), (64, 64)])
def test_no_tile_lies_within_another_one(size):
  for each in tiles.sizes_for(size):
    for starts, tile, side in zip(each.starts(size), (each.height, each.width), size):
      assert all(start + tile < side for start in starts[:-1])
      assert starts[-1] + tile >= side
  first = itertools.islice(tiles.sizes_for((90, 160)), 3)
  assert [sum(map(len, each.places((90, 160)))) for each in first] == [2, 3, 6]


@pytest.mark.parametrize("made", ["image", "Open-Sora"], indirect=True)  # test_causal3d.py compares CogVideoX's with diffusers
def test_tiles_need_less_memory(made):
  """`fit_tiles` takes the largest tiles that fit. Outside of overlaps, values are those of the tile alone."""
  made, _ = made
  made = dataclasses.replace(made, micro_batch=1)
  length, size = 5, (40, 18)  # so large that the copies of kernels that CPUs make hardly count
  latents = np.random.default_rng(0).standard_normal(
    (made.config.latent_frames(length), *size, made.config.latent_channels), np.float32
  )
  needed = {method: made.memory(method, size, length) for method in ("encode", "decode")}
  lengths = {method: {length} for method in needed}
  tiled, less = fit_tiles(made, size, lengths, max(needed.values()) / 2)
  assert max(less.values()) <= max(needed.values()) / 2
  assert less == {method: tiled.memory(method, size, length) for method in needed}
  assert fit_tiles(made, size, lengths, max(needed.values())) == (made, needed)
  fewer, same = fit_tiles(dataclasses.replace(made, micro_batch=4), size, lengths, max(needed.values()))
  assert (fewer.micro_batch, fewer.tiles, same) == (1, None, needed)
  told = []
  pixels, whole = tiled.decode(latents, length, told.append), made.decode(latents, length)
  assert sum(told) == pytest.approx(length)
  assert len(told) == sum(map(len, tiled.tiles.places(size)))
  assert (pixels.shape, pixels.dtype) == (whole.shape, whole.dtype)
  tile, factor = tiled.tiles, made.config.downsampling
  height, width = (n * factor for n in tile.steps)
  alone = made.decode(latents[:, : tile.height, : tile.width], length)
  assert np.abs(pixels[:, :height, :width].astype(int) - alone[:, :height, :width]).max() <= 1
  assert not np.array_equal(pixels, whole)
  mean, std = tiled.encode(whole)
  assert mean.shape == std.shape == latents.shape
  alone = made.encode(whole[:, : tile.height * factor, : tile.width * factor])
  for ours, one in zip((mean, std), alone):
    assert relative_error(*(m[:, : tile.steps[0], : tile.steps[1]] for m in (ours, one))) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_latent_frames_cover_the_clip(name):
  config = CONFIGS[name]
  for length in range(1, 40):
    starts = config.frame_starts(length)
    assert len(starts) == config.latent_frames(length) + 1
    assert starts[0] == 0
    assert starts[-1] == length
    assert (np.diff(starts) > 0).all()
  kept = [length for length in range(1, 40) if config.keeps(length)]
  assert kept == ([1, 8, 9, 16, 17, 24, 25, 32, 33] if "Cog" in name else list(range(1, 40)))


def test_decode_refuses_changed_lengths():
  model = causal3d.build(CONFIGS["CogVideoX"])
  with pytest.raises(ValueError, match="3 latent frames do not decode to 12 frames"):
    make_codec(model, {}).decode(np.zeros((3, 2, 2, 4), np.float32), 12)


def test_wrong_values_are_refused():
  with pytest.raises(ValueError, match=r"unknown autoencoder 'vq'; allowed: sd-kl-f8, .*open-sora-1.2, .*cogvideox-2b"):
    registry.find("vq")
  model = image_kl.ImageKL(CONFIGS["image"])
  with pytest.raises(ValueError, match="micro_batch must be at least 1, not 0"):
    make_codec(model, {}, micro_batch=0)
