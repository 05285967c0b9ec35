import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data import tokens
from stdit_jax.diffusion import noise


def _case(sizes, token_shape, patch=(1, 2, 2)):
  keys = noise.sample_keys(7, np.array([[3, i] for i in range(len(sizes))], np.uint32), noise.Purpose.NOISE)
  grid = np.array([tokens.grid_size(size, patch) for size in sizes], np.int32)
  return keys, jnp.asarray(sizes, jnp.int32), token_shape, jnp.asarray(grid)


def _expected(key, size, token_shape, patch, channels):
  latents = np.asarray(jax.random.normal(key, (*size, channels)))
  ours = tokens.patchify(latents, patch)
  return np.pad(ours, [(0, full - n) for full, n in zip(token_shape, ours.shape, strict=True)])


@pytest.mark.parametrize(
  ("patch", "channels", "sizes", "token_shape"),
  [
    ((1, 2, 2), 4, [(5, 7, 9), (5, 8, 8), (1, 1, 1)], (5, 24, 16)),
    ((1, 1, 1), 4, [(3, 5, 7)], (4, 36, 4)),
    ((2, 2, 2), 16, [(5, 7, 9)], (3, 21, 128)),
    ((1, 2, 2), 4, [(15, 18, 32), (15, 24, 24)], (15, 152, 16)),
  ],
)
def test_bit_equal_to_random_normal_at_each_size(patch, channels, sizes, token_shape):
  keys, latent_size, token_shape, grid = _case(sizes, token_shape, patch)
  got = np.asarray(jax.jit(noise.token_noise, static_argnums=(2, 4, 5))(keys, latent_size, token_shape, grid, patch, channels))
  for i, size in enumerate(sizes):
    np.testing.assert_array_equal(got[i], _expected(keys[i], size, token_shape, patch, channels))


def test_independent_of_padding_and_batch():
  keys, latent_size, _, grid = _case([(5, 7, 9), (5, 8, 8)], None)
  both = np.asarray(noise.token_noise(keys, latent_size, (5, 20, 16), grid))  # not jitted: the same bits
  np.testing.assert_array_equal(both[0], _expected(keys[0], (5, 7, 9), (5, 20, 16), (1, 2, 2), 4))
  alone = np.asarray(noise.token_noise(keys[1:], latent_size[1:], (6, 33, 16), grid[1:]))
  np.testing.assert_array_equal(both[1, :5, :16], alone[0, :5, :16])
  assert not alone[0, 5:].any()
  assert not alone[0, :, 16:].any()


def test_position_of_every_element():
  _, latent_size, shape, grid = _case([(5, 7, 9), (3, 4, 4)], (5, 24, 16))
  index, valid = noise.element_index(latent_size, grid, shape)
  for i, size in enumerate([(5, 7, 9), (3, 4, 4)]):
    flat = np.arange(np.prod(size) * 4, dtype=np.uint32).reshape(*size, 4)
    expected = tokens.patchify(flat + 1)
    expected = np.pad(expected, [(0, full - n) for full, n in zip(shape, expected.shape, strict=True)])
    np.testing.assert_array_equal(np.where(valid[i], index[i] + 1, 0), expected)


def test_keys_are_folded_in_order():
  keys = noise.sample_keys(5, np.array([[1, 9], [2, 2**32 - 1]], np.uint32), noise.Purpose.TIMESTEP)
  key = jax.random.key(5, impl="threefry2x32")
  for number in (2, np.uint32(2**32 - 1), 0):
    key = jax.random.fold_in(key, number)
  np.testing.assert_array_equal(jax.random.key_data(keys[1]), jax.random.key_data(key))
  other = noise.sample_keys(5, np.array([[1, 9]], np.uint32), noise.Purpose.NOISE)
  assert not np.array_equal(jax.random.key_data(keys[0]), jax.random.key_data(other[0]))
  folded = noise.fold_in(keys, 3)
  np.testing.assert_array_equal(jax.random.key_data(folded[0]), jax.random.key_data(jax.random.fold_in(keys[0], 3)))


def test_wrong_arguments_are_refused():
  keys, latent_size, shape, grid = _case([(5, 7, 9)], (5, 24, 16))
  with pytest.raises(ValueError, match="threefry2x32"):
    noise.token_noise(jax.random.split(jax.random.key(0, impl="rbg"), 1), latent_size, shape, grid)
  with pytest.raises(ValueError, match="16 values per token"):
    noise.token_noise(keys, latent_size, shape, grid, channels=3)
  with pytest.raises(ValueError, match="2\\^32"):
    noise.element_index(latent_size, grid, (2**10, 2**20, 16))
