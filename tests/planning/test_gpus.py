"""The stand-in for cuDNN's attention, which compiles for GPUs without cuDNN."""

import functools

import jax
import jax.numpy as jnp
import pytest

from stdit_jax.parallel.attention import attend
from stdit_jax.parallel.mesh import make_mesh
from stdit_jax.parallel.shardings import Layout
from stdit_jax.planning.programs import stand_in


def both_ways(kernel, query, key, value, lengths=None, mask=None):
  """Attention and its gradients."""
  y, backward = jax.vjp(lambda *x: kernel(*x, lengths=lengths, mask=mask), query, key, value)
  return y, backward(y)


@pytest.mark.parametrize("padding", [{}, {"lengths": jnp.ones((2, 3), int)}, {"mask": jnp.ones((2, 3, 5), bool)}])
def test_the_stand_in_matches_attention_and_its_gradients(padding):
  query, keys = (jax.ShapeDtypeStruct((2, 3, length, 4, 16), jnp.bfloat16) for length in (8, 5))
  layout = Layout(make_mesh({"data": 1}, jax.devices()[:1]), cudnn=stand_in)
  replaced, formula = (
    jax.eval_shape(
      functools.partial(both_ways, functools.partial(attend, implementation=name, layout=layout), **padding), query, keys, keys
    )
    for name in ("cudnn", "einsum")
  )
  assert replaced == formula


def test_the_stand_in_reads_the_arrays_that_attention_reads():
  """Each argument changes the result, and each gradient depends on the saved arrays. So XLA can't remove any of them."""
  query, key, value = jnp.arange(1.0, 3 * 48 + 1).reshape(3, 1, 1, 6, 2, 4)
  lengths, mask = jnp.full((1, 1), 6), jnp.ones((1, 1, 6), bool)
  y, gradients = both_ways(stand_in, query, key, value, mask=mask)
  for changed in (
    (query + 1, key, value, lengths),
    (query, key + 1, value, lengths),
    (query, key, value + 1, lengths),
    (query, key, value, lengths - 1),
    (query, key, value, None, mask.at[0, 0, 0].set(False)),
  ):
    assert (both_ways(stand_in, *changed)[0] != y).any()
  assert all((g != 0).any() for g in gradients)
