"""The implementations of attention agree in value and gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stdit_jax.parallel.attention import attend, cudnn_kernel
from tests.helpers import relative_error

# batch, groups, queries, keys, heads, head dimension
SHAPES = {"space": (1, 3, 20, 20, 2, 72), "time": (2, 12, 5, 5, 4, 24), "text": (2, 1, 30, 12, 3, 8)}


def inputs(name, dtype=jnp.float32, offset=0.0):
  """query, key, value and a cotangent; values with a common offset, as a trained model's have."""
  batch, groups, queries, keys, heads, head_dim = SHAPES[name]
  rng = np.random.default_rng(0)
  draw = lambda n: jnp.asarray(rng.standard_normal((batch, groups, n, heads, head_dim)), dtype)  # noqa: E731
  return 3 * draw(queries), draw(keys), draw(keys) + offset, draw(queries)


def masks(name):
  """None, padding at the end, and a first sequence without any valid key."""
  batch, groups, _, keys, _, _ = SHAPES[name]
  padding = np.arange(keys) < np.random.default_rng(1).integers(1, keys + 1, (batch, groups, 1))
  first = np.arange(batch * groups).reshape(batch, groups, 1) == 0
  return {"none": None, "padding": padding, "empty": padding & ~first}


@functools.partial(jax.jit, static_argnums=5)
def value_and_gradients(query, key, value, cotangent, mask, implementation):
  y, pull = jax.vjp(lambda *args: attend(*args, mask, implementation), query, key, value)
  return y, *pull(cotangent)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("mask", ["none", "padding", "empty"])
@pytest.mark.parametrize("implementation", ["einsum", "splash"])
def test_implementations_agree_with_jax(name, mask, implementation):
  """Splash is the TPU's kernel, interpreted. What it gives for a sequence without any valid key is finite; nobody reads it."""
  read = np.ones(SHAPES[name][:2], bool) if mask != "empty" or implementation == "einsum" else masks(name)[mask].any(-1)
  mask = masks(name)[mask]
  *args, cotangent = inputs(name, offset=2.0)
  cotangent = jnp.where(read[..., None, None, None], cotangent, 0)
  for ours, theirs in zip(*(value_and_gradients(*args, cotangent, mask, which) for which in (implementation, "xla"))):
    assert ours.dtype == theirs.dtype
    assert np.isfinite(ours).all()
    assert relative_error(np.asarray(ours)[read], np.asarray(theirs)[read]) < 2e-6


def test_masked_keys_get_nothing():
  query, key, value, cotangent = inputs("text")
  mask = masks("text")["padding"]
  junk = jnp.where(mask[..., None, None], 0, 1e4)
  clean, dirty = (value_and_gradients(query, key + x, value + x, cotangent, mask, "einsum") for x in (0, junk))
  for a, b in zip(clean, dirty):
    np.testing.assert_array_equal(a, b)
  for gradient in clean[2:]:
    assert not np.asarray(gradient)[~mask].any()


def test_softmax_is_float32_in_half_precision():
  """bfloat16 in and out agrees with float32 throughout, and the exponential is taken in float32."""
  program = str(jax.make_jaxpr(lambda q, k, v, _: attend(q, k, v, None, "einsum"))(*inputs("space", jnp.bfloat16)))
  assert re.findall(r":(\w+)\[[\d,]+\] = exp ", program) == ["f32"]
  half = value_and_gradients(*inputs("space", jnp.bfloat16), None, "einsum")
  full = value_and_gradients(*(x.astype(jnp.float32) for x in inputs("space", jnp.bfloat16)), None, "einsum")
  for a, b in zip(half, full):
    assert a.dtype == jnp.bfloat16
    assert relative_error(a.astype(jnp.float32), b) < 2e-2


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("mask", ["none", "padding", "empty"])
def test_flash_attention_by_lengths(name, mask):
  """What cuDNN is asked for, computed by XLA: lengths say the same as the mask, and no sequence is empty."""
  mask = masks(name)[mask]
  whole = np.ones((*SHAPES[name][:2], SHAPES[name][3]), bool) if mask is None else mask
  read = whole.any(-1)
  *args, cotangent = inputs(name, offset=2.0)
  cotangent = jnp.where(read[..., None, None, None], cotangent, 0)
  y, pull = jax.vjp(lambda *args: cudnn_kernel(*args, jnp.asarray(whole), "xla"), *args)
  for ours, theirs in zip((y, *pull(cotangent)), value_and_gradients(*args, cotangent, mask, "einsum")):
    assert np.isfinite(ours).all()
    assert relative_error(np.asarray(ours)[read], np.asarray(theirs)[read]) < 2e-6


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN is on GPUs: JAX_PLATFORMS=cuda")
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("mask", ["none", "padding", "empty"])
def test_cudnn_agrees_with_float32(name, mask):
  """Odd lengths, head dimensions of 8 to 72, padding; values and gradients as near as bfloat16 allows."""
  mask = masks(name)[mask]
  read = np.ones(SHAPES[name][:2], bool) if mask is None else mask.any(-1)
  half = inputs(name, jnp.bfloat16)
  half = (*half[:3], jnp.where(read[..., None, None, None], half[3], 0))
  ours = value_and_gradients(*half, mask, "cudnn")
  with jax.default_matmul_precision("highest"):
    theirs = value_and_gradients(*(x.astype(jnp.float32) for x in half), mask, "einsum")
  for a, b in zip(ours, theirs):
    assert a.dtype == jnp.bfloat16
    assert np.isfinite(a.astype(jnp.float32)).all()
    assert relative_error(np.asarray(a.astype(jnp.float32))[read], np.asarray(b)[read]) < 2e-2


def test_unknown_implementation():
  query, key, value, _ = inputs("time")
  with pytest.raises(ValueError, match="'flash' is unknown; allowed: auto, splash, cudnn, einsum, xla"):
    attend(query, key, value, None, "flash")
