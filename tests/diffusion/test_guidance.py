import jax.numpy as jnp
import numpy as np
import pytest

from stdit_jax.diffusion.elements import masked_mean, split_channels
from stdit_jax.diffusion.guidance import Guidance, guided
from tests.diffusion.common import to_tokens

RNG = np.random.default_rng(0)
CONDITIONAL, UNCONDITIONAL = RNG.normal(size=(2, 3, 8, 5, 4, 6)).astype(np.float32)
X = jnp.zeros((3, 5, 6, 16))


def _expected(scale, channels):
  scale = np.asarray(scale).reshape(-1, 1, 1, 1, 1)
  out = CONDITIONAL.copy()
  out[:, :channels] = UNCONDITIONAL[:, :channels] + scale * (CONDITIONAL - UNCONDITIONAL)[:, :channels]
  return to_tokens(out)


@pytest.mark.parametrize("channels", [1, 3, None])
@pytest.mark.parametrize("scale", [7.0, np.array([1.0, 4.0, 7.5], np.float32)])
def test_batched_and_sequential_guidance_agree(channels, scale):
  seen = []

  def both(x, t, x_mask):
    seen.append((x.shape, t.shape, x_mask))
    return jnp.concatenate([to_tokens(CONDITIONAL), to_tokens(UNCONDITIONAL)])

  pair = (lambda *_: jnp.asarray(to_tokens(CONDITIONAL)), lambda *_: jnp.asarray(to_tokens(UNCONDITIONAL)))
  expected = _expected(scale, channels or 4)
  for denoise in (both, pair):
    out = guided(denoise, scale, num_channels=4, guided_channels=channels)(X, jnp.zeros(3), None)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
  assert seen == [((6, 5, 6, 16), (6,), None)]


def test_variance_comes_from_the_conditional_branch():
  pair = (lambda *_: jnp.asarray(to_tokens(CONDITIONAL)), lambda *_: jnp.asarray(to_tokens(UNCONDITIONAL)))
  out = guided(pair, 7.0, num_channels=4)(X, jnp.zeros(3))
  np.testing.assert_array_equal(split_channels(out, 4)[1], to_tokens(CONDITIONAL[:, 4:]))
  alone = guided((pair[0], None), 1.0, num_channels=4)(X, jnp.zeros(3))
  np.testing.assert_array_equal(alone, to_tokens(CONDITIONAL))
  with pytest.raises(ValueError, match="1 to 4"):
    guided(pair, 7.0, num_channels=4, guided_channels=5)


def test_split_channels():
  prediction, variance = split_channels(jnp.asarray(to_tokens(CONDITIONAL)), 4)
  np.testing.assert_array_equal(prediction, to_tokens(CONDITIONAL[:, :4]))
  np.testing.assert_array_equal(variance, to_tokens(CONDITIONAL[:, 4:]))
  with pytest.raises(ValueError, match="no multiple of 2 x 5"):
    split_channels(jnp.zeros((1, 32)), 5)


def test_masked_mean():
  values = jnp.arange(2 * 3 * 4, dtype=jnp.float32).reshape(2, 3, 4)
  np.testing.assert_allclose(masked_mean(values), [5.5, 17.5])
  mask = jnp.array([[True, False, False], [False, False, False]])
  np.testing.assert_allclose(masked_mean(values, mask), [1.5, 0])
  valid = jnp.ones(values.shape, bool).at[0, 0, 2:].set(False)
  np.testing.assert_allclose(masked_mean(values, mask, valid), [0.5, 0])


def test_guidance_in_an_interval_of_timesteps():
  pair = (lambda *_: jnp.asarray(to_tokens(CONDITIONAL)), lambda *_: jnp.asarray(to_tokens(UNCONDITIONAL)))
  out = guided(pair, 7.0, num_channels=4, interval=(300.0, 700.0))(X, jnp.array([200.0, 700.0, 999.0]))
  np.testing.assert_allclose(out, _expected([1.0, 7.0, 1.0], 4), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("amount", [0.3, 1.0])
def test_rescaled_guidance_has_the_spread_of_the_prompt(amount):
  """Only valid elements of the predicted channels count. Variances do not change."""
  pair = (lambda *_: jnp.asarray(to_tokens(CONDITIONAL)), lambda *_: jnp.asarray(to_tokens(UNCONDITIONAL)))
  valid = np.ones((3, 4, 5, 4, 6), bool)
  valid[..., 4:] = False
  out = guided(pair, 7.0, num_channels=4, rescale=amount, valid=jnp.asarray(to_tokens(valid)))(X, jnp.zeros(3))
  plain = _expected(7.0, 4)
  conditional, mixed = split_channels(jnp.asarray(to_tokens(CONDITIONAL)), 4), split_channels(jnp.asarray(plain), 4)
  kept = to_tokens(valid)
  for i in range(3):
    factor = np.std(np.asarray(conditional[0][i])[kept[i]]) / np.std(np.asarray(mixed[0][i])[kept[i]])
    expected = np.asarray(mixed[0][i]) * (amount * factor + 1 - amount)
    np.testing.assert_allclose(split_channels(out, 4)[0][i], expected, rtol=1e-4)
  np.testing.assert_array_equal(split_channels(out, 4)[1], mixed[1])
  with pytest.raises(ValueError, match="rescale is 2"):
    Guidance(rescale=2.0)
  with pytest.raises(ValueError, match="must not be above"):
    Guidance(interval=(2.0, 1.0))
