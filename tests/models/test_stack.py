"""A stack of layers stores the activations that its remat policy names."""

import jax
import jax.numpy as jnp
import pytest

from stdit_jax.models.stack import run_layers

STORED = {"none": (1, 3, False), "dots": (2, 3, False), "full": (2, 4, False), "offload": (2, 4, True)}


@pytest.mark.parametrize("remat", STORED)
def test_remat_policies_recompute_and_offload(remat):
  """Counts exponentials and products in the gradient of a scanned layer, and checks whether the host stores activations."""

  def loss(kernels, x):
    return run_layers(lambda x, kernel: (x + jnp.exp(x @ kernel), None), x, kernels, scan=True, policy=remat)[0].sum()

  program = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((3, 8, 8)), jnp.ones((4, 8))))
  assert (program.count(" exp "), program.count(" dot_general"), "Host" in program) == STORED[remat]
