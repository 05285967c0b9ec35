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
  """Query, key, value and a cotangent. The values have a common offset, like those of trained models."""
  batch, groups, queries, keys, heads, head_dim = SHAPES[name]
  rng = np.random.default_rng(0)
  draw = lambda n: jnp.asarray(rng.standard_normal((batch, groups, n, heads, head_dim)), dtype)  # noqa: E731
  return 3 * draw(queries), draw(keys), draw(keys) + offset, draw(queries)


PADDINGS = ("none", "lengths", "empty lengths", "holes", "empty mask")


def padding(kind, name):
  """The arguments of `attend` for valid keys, and whether each sequence has a valid key `[batch, groups]`."""
  batch, groups, _, keys, _, _ = SHAPES[name]
  rng = np.random.default_rng(1)
  first = np.arange(batch * groups).reshape(batch, groups) == 0
  lengths = np.where(first & (kind == "empty lengths"), 0, rng.integers(1, keys + 1, (batch, groups)))
  mask = (rng.random((batch, groups, keys)) < 0.6) & ~(first & (kind == "empty mask"))[..., None]
  mask[..., 0] = False  # the first key is padding, unlike with lengths
  mask[..., -1] |= ~mask.any(-1) & ~(first & (kind == "empty mask"))
  if kind == "none":
    return {}, np.ones((batch, groups), bool)
  if kind.endswith("lengths"):
    return {"lengths": jnp.asarray(lengths)}, lengths > 0
  return {"mask": jnp.asarray(mask)}, mask.any(-1)


def as_mask(valid, name):
  """The padding as a mask, for lengths and masks."""
  if "lengths" in valid:
    return {"mask": jnp.arange(SHAPES[name][3]) < valid["lengths"][..., None]}
  return valid


@functools.partial(jax.jit, static_argnums=5)
def value_and_gradients(query, key, value, cotangent, valid, implementation):
  y, pull = jax.vjp(lambda *args: attend(*args, implementation, **valid), query, key, value)
  return y, *pull(cotangent)


@jax.jit
def cudnn_by_xla(query, key, value, cotangent, valid):
  """cuDNN's call, computed by XLA: padding as lengths, even and non-empty sequences only."""
  y, pull = jax.vjp(lambda *args: cudnn_kernel(*args, valid.get("lengths"), valid.get("mask"), "xla"), query, key, value)
  return y, *pull(cotangent)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("implementation", ["einsum", "splash", "cudnn by xla"])
def test_implementations_agree_with_jax(name, kind, implementation):
  """Padding is at the end or anywhere. A sequence without a valid key gives finite values, which are masked out."""
  valid, read = padding(kind, name)
  if implementation == "einsum":  # agrees in empty sequences as well
    read = np.ones_like(read)
  *args, cotangent = inputs(name, offset=2.0)
  cotangent = jnp.where(read[..., None, None, None], cotangent, 0)
  if implementation == "cudnn by xla":
    results = cudnn_by_xla(*args, cotangent, valid)
  else:
    results = value_and_gradients(*args, cotangent, valid, implementation)
  for ours, theirs in zip(results, value_and_gradients(*args, cotangent, as_mask(valid, name), "xla")):
    assert ours.dtype == theirs.dtype
    assert np.isfinite(ours).all()
    assert relative_error(np.asarray(ours)[read], np.asarray(theirs)[read]) < 2e-6


@pytest.mark.parametrize("implementation", ["einsum", "splash", "cudnn by xla"])
def test_padding_does_not_change_results(implementation):
  query, key, value, cotangent = inputs("text")
  valid, _ = padding("holes", "text")
  padded = ~valid["mask"][..., None, None]
  run = (
    cudnn_by_xla if implementation == "cudnn by xla" else functools.partial(value_and_gradients, implementation=implementation)
  )
  clean, dirty = (run(query, key + x, value + x, cotangent, valid) for x in (0, jnp.where(padded, 1e4, 0)))
  for a, b in zip(clean, dirty):
    np.testing.assert_array_equal(a, b)
  for gradient in clean[2:]:
    assert not np.asarray(gradient)[~np.asarray(valid["mask"])].any()


def test_softmax_is_float32_in_half_precision():
  """bfloat16 inputs agree with float32 inputs, and the exponential is float32."""
  program = str(jax.make_jaxpr(lambda q, k, v, _: attend(q, k, v, "einsum"))(*inputs("space", jnp.bfloat16)))
  assert re.findall(r":(\w+)\[[\d,]+\] = exp ", program) == ["f32"]
  half = value_and_gradients(*inputs("space", jnp.bfloat16), {}, "einsum")
  full = value_and_gradients(*(x.astype(jnp.float32) for x in inputs("space", jnp.bfloat16)), {}, "einsum")
  for a, b in zip(half, full):
    assert a.dtype == jnp.bfloat16
    assert relative_error(a.astype(jnp.float32), b) < 2e-2


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU: JAX_PLATFORMS=cuda")
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", PADDINGS)
def test_cudnn_agrees_with_float32(name, kind):
  """Values and gradients agree to the precision of bfloat16, with odd lengths, head dimensions of 8 to 72, and padding."""
  valid, read = padding(kind, name)
  half = inputs(name, jnp.bfloat16)
  half = (*half[:3], jnp.where(read[..., None, None, None], half[3], 0))
  ours = value_and_gradients(*half, valid, "cudnn")
  with jax.default_matmul_precision("highest"):
    theirs = value_and_gradients(*(x.astype(jnp.float32) for x in half), valid, "einsum")
  for a, b in zip(ours, theirs):
    assert a.dtype == jnp.bfloat16
    assert np.isfinite(a.astype(jnp.float32)).all()
    assert relative_error(np.asarray(a.astype(jnp.float32))[read], np.asarray(b)[read]) < 2e-2


def test_an_unknown_implementation_is_refused():
  query, key, value, _ = inputs("time")
  with pytest.raises(ValueError, match="'flash' is unknown; allowed: auto, splash, cudnn, einsum, xla"):
    attend(query, key, value, "flash")


def test_lengths_and_mask_exclude_each_other():
  query, key, value, _ = inputs("time")
  with pytest.raises(ValueError, match="got lengths and mask; allowed: one of them"):
    attend(query, key, value, lengths=jnp.ones((2, 12), int), mask=jnp.ones((2, 12, 5), bool))
