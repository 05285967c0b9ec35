"""Step caches: cached outputs equal the computed ones and are used in the right steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stdit_jax.models import step_cache
from stdit_jax.models.step_cache import PyramidBroadcast, ResidualCache, Reuse
from tests import denoisers
from tests.helpers import random_variables

MODELS = ("STDiT-tiny/2", "STDiT2-tiny/2", "STDiT3-tiny/2")
ALL = {"space": True, "time": True, "cross": True}


def make(name, seed=0, **fields):
  """(model, random variables, inputs: tokens, t, text; call)."""
  config = denoisers.get_config(name, **fields)
  model, variables = denoisers.build(config), random_variables(config)
  tokens, t, cond, sizes = denoisers.example_inputs(config, batch=2, frames=4, size=(4, 6))
  rng = np.random.default_rng(seed)
  draw = lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32)  # noqa: E731

  @jax.jit
  def call(inputs, reuse=None):
    """Calls the model. Without `reuse` it computes everything."""
    tokens, t, text = inputs
    return model.apply(variables, tokens, t, {**cond, "text": text}, sizes, reuse=reuse)

  return model, call, (draw(tokens), 500 * t, draw(cond["text"]))


def empty(model, cache):
  return jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), model.cache_specs(cache, 2, 4, 6))


@pytest.mark.parametrize("cache", [PyramidBroadcast(), ResidualCache(0.1)])
@pytest.mark.parametrize(("name", "scan"), [*((name, True) for name in MODELS), (MODELS[-1], False)])
def test_the_first_step_computes_everything(name, cache, scan):
  model, call, inputs = make(name, scan=scan)
  cached = empty(model, cache)
  expected = call(inputs)
  y, after = call(inputs, Reuse(cache, cached, cache.computes(0, 500.0)))
  np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
  assert shapes(after) == shapes(cached)  # one program serves all steps


@pytest.mark.parametrize("name", MODELS)
def test_cached_attention_is_not_computed(name):
  """The text does not matter if everything is cached. It matters if cross attention is computed."""
  model, call, inputs = make(name)
  cache = PyramidBroadcast()
  first, cached = call(inputs, Reuse(cache, empty(model, cache), ALL))
  other = (*inputs[:2], 1 - inputs[2])
  expected = call(other)
  again, after = call(other, Reuse(cache, cached, dict.fromkeys(ALL, False)))
  np.testing.assert_array_equal(again, first)
  assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), after, cached))
  cross, _ = call(other, Reuse(cache, cached, {"space": False, "time": False, "cross": True}))
  assert np.abs(cross - first).max() > 1e-3 * np.abs(first).max()
  full, _ = call(other, Reuse(cache, cached, ALL))
  np.testing.assert_allclose(full, expected, atol=1e-5 * np.abs(expected).max())


def test_pyramid_computes_the_steps_of_videosys():
  """Inside the interval every 2nd step computes attention over space, every 4th over time, every 6th to text. Outside, all."""
  cache = PyramidBroadcast()
  computes = [cache.computes(step, 1000 - 50 * step) for step in range(14)]
  assert [c["space"] for c in computes] == [True, True, True, False, True, False, True, False, True, False, True] + [True] * 3
  assert [c["time"] for c in computes][2:11] == [False, False, True, False, False, False, True, False, False]
  assert [c["cross"] for c in computes][2:11] == [False, False, False, False, True, False, False, False, False]
  assert PyramidBroadcast(interval=(0.0, 1001.0)).computes(0, 1000.0) == ALL


@pytest.mark.parametrize("name", MODELS)
def test_residuals_are_reused_while_the_first_layer_changes_little(name):
  model, call, inputs = make(name, depth=3)
  cache = ResidualCache(0.1)
  _, cached = call(inputs, Reuse(cache, empty(model, cache), {}))
  assert int(cached["computed"]) == 1
  near = (inputs[0] * 1.001, *inputs[1:])
  again, after = call(near, Reuse(cache, cached, {}))
  assert int(after["computed"]) == 1
  np.testing.assert_array_equal(after["others"], cached["others"])
  np.testing.assert_array_equal(after["first"], cached["first"])  # of the last computed step
  exact = call(near)
  assert 0 < np.abs(again - exact).max() < 0.05 * np.abs(exact).max()
  # If one sample of the batch changes, all are computed.
  far = (inputs[0].at[1].multiply(-1.0), *inputs[1:])
  moved, after = call(far, Reuse(cache, cached, {}))
  assert int(after["computed"]) == 2
  exact = call(far)
  # In STDiT 1.0 with random weights the norms amplify one token. A rounding of the input moves this token by up to 8e-5 of the
  # largest output (other tokens by less than 1e-6). The roundings depend on the processor.
  rounded = [call((far[0] * np.float32(1 + sign * 2.0**-23), *far[1:])) for sign in (1, -1)]
  noise = max(np.abs(one - exact).max() for one in rounded)
  np.testing.assert_allclose(moved, exact, atol=max(noise, 1e-5 * np.abs(exact).max()))


@pytest.mark.parametrize(
  ("text", "cache"),
  [
    ("pyramid", PyramidBroadcast()), ("pyramid:1,2,3", PyramidBroadcast(1, 2, 3)), ("residual", ResidualCache()),
    ("residual:0.25", ResidualCache(0.25)),
  ],
)  # fmt: skip
def test_names_of_step_caches_are_parsed(text, cache):
  assert step_cache.parse(text) == cache


@pytest.mark.parametrize("text", ["", "pyramid:1,2", "pyramid:0,1,1", "residual:2", "residual:.", "teacache"])
def test_other_names_are_refused(text):
  with pytest.raises(ValueError, match=r"step cache|serves at least 1"):
    step_cache.parse(text)
