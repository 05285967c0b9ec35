"""Random numbers per sample, independent of padding, batch and sharding.

Every random draw of a sample comes from key(seed) folded with the sample's id (epoch and stage, slot) and with a purpose.
The noise of latents is `jax.random.normal(key, (T, H, W, C))` at the sample's own, unpadded latent size. `token_noise` returns
exactly these bits as tokens, for a batch of different sizes: it computes the position of every token element in the unpadded
array and hashes that position, as JAX's counter-based generator does.
"""

import enum

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Key, UInt32

from stdit_jax.arrays import ArrayLike


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


def sample_keys(seed: int, sample_id: Integer[ArrayLike | np.ndarray, "B 2"], purpose: int) -> Key[Array, " B"]:
  """One key per sample `[B]`: fold_in(fold_in(fold_in(key(seed), epoch), slot), purpose).

  `sample_id` is (`DataConfig.sample_epoch`, slot in the epoch's plan); `purpose` is a `Purpose` or another integer.
  """
  root = jax.random.key(seed, impl="threefry2x32")

  def key_of(sample):
    return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(root, sample[0]), sample[1]), int(purpose))

  return jax.vmap(key_of)(jnp.asarray(sample_id, jnp.uint32))


def fold_in(keys: Key[Array, " B"], data: int | Integer[Array, ""]) -> Key[Array, " B"]:
  """`jax.random.fold_in` of one number, for instance the sampling step, into every key."""
  return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def element_index(
  latent_size: Integer[ArrayLike, "B 3"], grid: Integer[ArrayLike, "B 3"], token_shape: tuple, patch_size: tuple = (1, 2, 2)
) -> tuple[UInt32[Array, "B T S P"], Bool[Array, "B T S P"]]:
  """Position of every token element in its sample's unpadded latents.

  Args:
    latent_size: unpadded latents (T, H, W).
    grid: token grid (T, rows, columns).
    token_shape: static (T, S, P) of the padded tokens.
    patch_size: static (pt, ph, pw); P = pt * ph * pw * channels, ordered as in `data.tokens`.

  Returns:
    (flat position in `[T, H, W, C]`, undefined in padding; which elements are valid)
  """
  frames, spaces, features = token_shape
  channels = features // int(np.prod(patch_size))
  if features != channels * int(np.prod(patch_size)):
    raise ValueError(f"token noise: {features} values per token do not divide into patches of {patch_size}; use multiples")
  if frames * spaces * features >= 2**32:
    raise ValueError(f"token noise: tokens of shape {token_shape} hold 2^32 or more values per sample; make clips smaller")
  inside = np.unravel_index(np.arange(features), (*patch_size, channels))  # position of every value in its patch

  def with_axes(values, count):  # [B] -> [B, 1, ...] with `count` axes of size 1
    return values.astype(jnp.uint32).reshape(-1, *[1] * count)

  _, rows, columns = (with_axes(grid[:, i], 2) for i in range(3))  # [B, 1, 1]
  space = jnp.arange(spaces, dtype=jnp.uint32)[None, :, None]  # [1, S, 1]
  pt, ph, pw = patch_size
  dt, dh, dw, channel = (jnp.asarray(i, jnp.uint32) for i in inside)  # [P]
  t = (jnp.arange(frames, dtype=jnp.uint32)[:, None] * pt + dt)[None, :, None, :]  # [1, T, 1, P]
  row, column = space // columns, space % columns  # [B, S, 1]
  h, w = (row * ph + dh)[:, None], (column * pw + dw)[:, None]  # [B, 1, S, P]
  time, height, width = (with_axes(latent_size[:, i], 3) for i in range(3))  # [B, 1, 1, 1]
  valid = (t < time) & (h < height) & (w < width) & (row < rows)[:, None]
  return ((t * height + h) * width + w) * channels + channel, valid


def token_noise(
  keys: Key[Array, " B"], latent_size: Integer[ArrayLike, "B 3"], token_shape: tuple, grid: Integer[ArrayLike, "B 3"],
  patch_size: tuple = (1, 2, 2), channels: int = 4,
) -> Float[Array, "B T S P"]:  # fmt: skip
  """Standard normal noise, zero in padding.

  Bit-equal, per sample, to `patchify(jax.random.normal(key, (T, H, W, channels)))` at the sample's own size. `keys` are
  threefry keys (`sample_keys`), other arguments as in `element_index`.

  Raises:
    ValueError: keys of another generator, or shapes that do not fit.
  """
  if str(jax.random.key_impl(keys)) != "threefry2x32":
    raise ValueError(f"token_noise got {jax.random.key_impl(keys)} keys; allowed: threefry2x32. Make them with sample_keys.")
  if token_shape[2] != int(np.prod(patch_size)) * channels:
    raise ValueError(
      f"token_noise: {token_shape[2]} values per token are not patches of {patch_size} with {channels} channels; "
      f"allowed: {int(np.prod(patch_size)) * channels}. Check patch_size and channels."
    )
  index, valid = element_index(latent_size, grid, token_shape, patch_size)
  # JAX hashes a position to the two words of `fold_in(key, position)`. The bits of that element are the XOR of both words
  # (jax_threefry_partitionable, the default). A draw at the padded shape would need a gather of every element.
  words = jax.vmap(lambda key, positions: jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(key, positions)))
  words = words(keys, index.reshape(len(index), -1)).reshape(*index.shape, 2)
  return jnp.where(valid, _normal(words[..., 0] ^ words[..., 1]), 0.0)


def _normal(bits):
  """uint32 -> standard normal float32 as `jax.random.normal` does: 23 bits to (-1, 1), then the inverse error function.

  JAX has no public function from bits to normal numbers.
  """
  low = np.nextafter(np.float32(-1), np.float32(0))
  fraction = jax.lax.bitcast_convert_type((bits >> 9) | np.uint32(0x3F800000), jnp.float32) - 1
  uniform = jnp.maximum(low, fraction * (np.float32(1) - low) + low)
  return np.float32(np.sqrt(2)) * jax.lax.erf_inv(uniform)
