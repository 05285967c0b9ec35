"""Random numbers per sample, independent of padding, batch and sharding.

Every random draw of a sample comes from key(seed) folded with the sample's (epoch, slot) and with a purpose. Noise of
latents is defined as `jax.random.normal(key, (T, H, W, C))` at the sample's own, unpadded latent size; `token_noise` gives
exactly these bits already as tokens, for a batch of different sizes: it works out where every token element lies in the
unpadded array and hashes that position, as JAX's counter-based generator does.
"""

import enum

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p


class Purpose(enum.IntEnum):
  """What a key is for. The numbers are part of every run's randomness: add new ones, never renumber."""

  TIMESTEP = 0
  NOISE = 1
  FRAME_MASK = 2
  DROP_TEXT = 3
  POSTERIOR = 4
  SAMPLING_START = 5
  SAMPLING_STEP = 6
  FRAME_NOISE = 7
  PERCEPTUAL_FRAMES = 8
  PIXEL_FRAMES = 9


def sample_keys(seed, sample_id, purpose):
  """One key per sample `[B]`: fold_in(fold_in(fold_in(key(seed), epoch), slot), purpose).

  `sample_id` uint32 `[B, 2]` = (epoch, slot in the epoch's plan); `purpose` a `Purpose` or another integer.
  """
  root = jax.random.key(seed, impl="threefry2x32")

  def key_of(sample):
    return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(root, sample[0]), sample[1]), int(purpose))

  return jax.vmap(key_of)(jnp.asarray(sample_id, jnp.uint32))


def fold_in(keys, data):
  """`jax.random.fold_in` for keys `[B]` with one number for all, for instance the sampling step."""
  return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def element_index(latent_size, grid, token_shape, patch_size=(1, 2, 2)):
  """Where every token element lies in its sample's unpadded latents.

  Args:
    latent_size: int `[B, 3]`, unpadded latents (T, H, W).
    grid: int `[B, 3]`, token grid (T, rows, columns).
    token_shape: static (T, S, P) of the padded tokens.
    patch_size: static (pt, ph, pw); P = pt * ph * pw * channels, ordered as in `data.tokens`.

  Returns:
    index: uint32 `[B, T, S, P]`, flat position in `[T, H, W, C]` (undefined where not valid).
    valid: bool `[B, T, S, P]`.
  """
  frames, spaces, features = token_shape
  channels = features // int(np.prod(patch_size))
  if features != channels * int(np.prod(patch_size)):
    raise ValueError(f"{features} values per token do not divide into patches of {patch_size}")
  if frames * spaces * features >= 2**32:
    raise ValueError(f"tokens of shape {token_shape} hold more than 2^32 values per sample")
  inside = np.unravel_index(np.arange(features), (*patch_size, channels))

  def axis(values, size):  # [B] -> [B, 1, 1, 1]
    return values.astype(jnp.uint32).reshape(-1, *[1] * size)

  _, rows, columns = (axis(grid[:, i], 2) for i in range(3))
  space = jnp.arange(spaces, dtype=jnp.uint32)[None, :, None]
  pt, ph, pw = patch_size
  dt, dh, dw, channel = (jnp.asarray(i, jnp.uint32) for i in inside)
  t = (jnp.arange(frames, dtype=jnp.uint32)[:, None] * pt + dt)[None, :, None, :]
  row, column = space // columns, space % columns
  h, w = (row * ph + dh)[:, None], (column * pw + dw)[:, None]
  time, height, width = (axis(latent_size[:, i], 3) for i in range(3))
  valid = (t < time) & (h < height) & (w < width) & (row < rows)[:, None]
  return ((t * height + h) * width + w) * channels + channel, valid


def token_noise(keys, latent_size, token_shape, grid, patch_size=(1, 2, 2), channels=4):
  """Standard normal noise float32 `[B, T, S, P]`, zero where the tokens are padding.

  Bit-equal, per sample, to `patchify(jax.random.normal(key, (T, H, W, channels)))` at the sample's own size. `keys` `[B]`
  are threefry keys (`sample_keys`), other arguments as in `element_index`.

  Raises:
    ValueError: keys of another generator, or shapes that do not fit.
  """
  if str(jax.random.key_impl(keys)) != "threefry2x32":
    raise ValueError(f"token_noise needs threefry2x32 keys, got {jax.random.key_impl(keys)}: make them with sample_keys")
  if token_shape[2] != int(np.prod(patch_size)) * channels:
    raise ValueError(f"{token_shape[2]} values per token are not patches of {patch_size} with {channels} channels")
  index, valid = element_index(latent_size, grid, token_shape, patch_size)
  # As jax.random.bits does with jax_threefry_partitionable (the default): the counter is the 64-bit position, the high
  # word of which is always 0 here, and the two words of the hash are combined by exclusive or.
  key_words = jax.random.key_data(keys)[:, :, None, None, None]
  high, low = threefry2x32_p.bind(
    jnp.broadcast_to(key_words[:, 0], index.shape), jnp.broadcast_to(key_words[:, 1], index.shape), jnp.zeros_like(index), index
  )
  return jnp.where(valid, _normal(high ^ low), 0.0)


def _normal(bits):
  """uint32 -> standard normal float32 as `jax.random.normal` does: 23 bits to (-1, 1), then the inverse error function."""
  low = np.nextafter(np.float32(-1), np.float32(0))
  fraction = jax.lax.bitcast_convert_type((bits >> 9) | np.uint32(0x3F800000), jnp.float32) - 1
  uniform = jnp.maximum(low, fraction * (np.float32(1) - low) + low)
  return np.float32(np.sqrt(2)) * jax.lax.erf_inv(uniform)
