"""What stands in for cuDNN's attention where programs are compiled for GPUs without one."""

import functools

import jax
import jax.numpy as jnp

from stdit_jax.parallel import attention
from stdit_jax.planning import gpus


def both_ways(kernel, query, key, value, key_mask):
  """Attention and its gradients."""
  y, backward = jax.vjp(lambda *x: kernel(*x, key_mask), query, key, value)
  return y, backward(y)


def test_the_stand_in_has_the_arguments_results_and_sharding_of_attention(monkeypatch):
  shape = jax.ShapeDtypeStruct((2, 3, 8, 4, 16), jnp.bfloat16)
  keys, mask = jax.ShapeDtypeStruct((2, 3, 5, 4, 16), jnp.bfloat16), jax.ShapeDtypeStruct((2, 3, 5), bool)
  monkeypatch.setattr(attention, "cudnn_kernel", attention.cudnn_kernel)
  gpus.replace_cudnn()
  stand_in, formula = (
    jax.eval_shape(
      functools.partial(both_ways, functools.partial(attention.attend, implementation=name)), shape, keys, keys, mask
    )
    for name in ("cudnn", "einsum")
  )
  assert stand_in == formula


def test_the_stand_in_reads_all_that_attention_reads():
  """Every argument changes the result and every gradient depends on what the kernel keeps: nothing is optimised away."""
  query, key, value = jnp.arange(1.0, 3 * 48 + 1).reshape(3, 1, 1, 6, 2, 4)
  mask = jnp.ones((1, 1, 6), bool)
  y, gradients = both_ways(gpus._stand_in, query, key, value, mask)
  for changed in (
    (query + 1, key, value, mask),
    (query, key + 1, value, mask),
    (query, key, value + 1, mask),
    (query, key, value, mask.at[0, 0, 0].set(False)),
  ):
    assert (both_ways(gpus._stand_in, *changed)[0] != y).any()
  assert all((g != 0).any() for g in gradients)
