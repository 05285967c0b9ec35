"""Running a stack of layers: remat keeps what its policy says."""

import jax
import jax.numpy as jnp
import pytest

from stdit_jax.models.stack import run_layers

KEPT = {"none": (1, 3, False), "dots": (2, 3, False), "full": (2, 4, False), "offload": (2, 4, True)}


@pytest.mark.parametrize("remat", KEPT)
def test_remat_policies(remat):
  """How often the gradient of a scanned layer computes an exponential and a product, and whether anything goes to the host."""

  def loss(kernels, x):
    return run_layers(lambda x, kernel: (x + jnp.exp(x @ kernel), None), x, kernels, scan=True, policy=remat)[0].sum()

  program = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((3, 8, 8)), jnp.ones((4, 8))))
  assert (program.count(" exp "), program.count(" dot_general"), "Host" in program) == KEPT[remat]
