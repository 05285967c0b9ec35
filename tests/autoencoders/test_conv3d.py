"""Both implementations of convolutions in time and space agree."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from stdit_jax.autoencoders.layers import Conv3D

CASES = {
  "causal": dict(kernel_size=(3, 3, 3), padding=((2, 0), (1, 1), (1, 1))),
  "half the frames": dict(kernel_size=(3, 3, 3), strides=(2, 1, 1), padding=((1, 0), (1, 1), (1, 1))),
  "half the size": dict(kernel_size=(1, 3, 3), strides=(1, 2, 2), padding=((0, 0), (0, 1), (0, 1))),
  "patches": dict(kernel_size=(3, 4, 4), strides=(2, 2, 2), padding=((1, 1), (1, 1), (1, 1))),
  "same": dict(kernel_size=(7, 5, 3), strides=(2, 2, 2), padding="SAME"),
  "a matrix": dict(kernel_size=(1, 1, 1), use_bias=False),
}


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_match_flax(case):
  x = np.random.default_rng(0).standard_normal((2, 8, 9, 10, 3), np.float32)
  own, flax = (conv(4, **CASES[case]) for conv in (Conv3D, nn.Conv))
  variables = flax.init(jax.random.key(1), x)

  def both(model):
    def run(variables, x):
      y, back = jax.vjp(model.apply, variables, x)
      return y, back(jnp.sin(y))

    return jax.tree.leaves(jax.jit(run)(variables, x))

  for a, b in zip(both(own), both(flax), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_bfloat16_rounds_only_the_sum():
  """The error against float32 is at most that of one rounding to the 8 significant bits of bfloat16."""
  x = jax.random.normal(jax.random.key(0), (2, 8, 9, 10, 16))
  model = Conv3D(4, **CASES["causal"], use_bias=False)
  variables = model.init(jax.random.key(1), x)
  x, variables = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), (x, variables))
  y = model.clone(dtype=jnp.bfloat16).apply(variables, x)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(jnp.float32), model.apply(variables, x), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_only_cpus_convolve_frame_by_frame(platform):
  """The platform for which a program is lowered decides the implementation, also in the gradient."""
  model, x = Conv3D(4, **CASES["causal"]), jnp.zeros((2, 8, 9, 10, 3))
  variables = model.init(jax.random.key(0), x)
  loss = jax.jit(jax.grad(lambda v: model.apply(v, x).sum()))
  text = loss.trace(variables).lower(lowering_platforms=(platform,)).as_text()
  dims = {len(m.split("x")) - 1 for m in re.findall(r"stablehlo.convolution.*-> tensor<(\S+)>", text)}
  assert dims == ({4} if platform == "cpu" else {5})
