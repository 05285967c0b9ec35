"""Reference tensors (NCTHW) as tokens and back; model calls of the reference loops."""

import jax
import jax.numpy as jnp
import numpy as np

from data import tokens

PATCH = (1, 2, 2)


def to_tokens(x):
  """`[B, C, T, H, W]` -> tokens `[B, T, S, P]` (NumPy)."""
  return tokens.patchify(np.moveaxis(np.asarray(x), 1, -1), PATCH)


def from_tokens(x, size):
  """tokens -> `[B, C, T, H, W]` with `size` = (T, H, W)."""
  return np.moveaxis(tokens.unpatchify(np.asarray(x), size, PATCH), -1, 1)


def validity(shape):
  """Element validity of tokens of an array of shape `[B, C, T, H, W]`."""
  return to_tokens(np.ones(shape, np.float32)).astype(bool)


def loop_inputs(case, variables):
  """{"cond", "sizes", "valid"} of the model for a stored sampling case, rows doubled: prompts first, then the null caption."""
  batch, _, frames, height, width = case["in/z"].shape
  text = jnp.asarray(case["in/y"][:, 0])
  null = jnp.broadcast_to(variables["constants"]["null_caption"][: text.shape[1]], text.shape)
  one = {name: jnp.asarray(case[f"in/{name}"]) for name in ("height", "width", "num_frames", "fps")}
  if "in/ar" in case:
    one["aspect_ratio"] = jnp.asarray(case["in/ar"])
  grid = jnp.asarray(tokens.grid_size((frames, height, width), PATCH), jnp.int32)
  one["grid"] = jnp.tile(grid, (batch, 1))
  mask, valid = jnp.asarray(case["in/text_mask"]) > 0, jnp.asarray(validity(case["in/z"].shape))
  mask, valid, sizes = jax.tree.map(lambda value: jnp.concatenate([value] * 2), (mask, valid, one))
  return {"cond": {"text": jnp.concatenate([text, null]), "text_mask": mask}, "sizes": sizes, "valid": valid}


def recording(call, shown):
  """`call(x, t, x_mask)` that stores its inputs and its output in the dictionary `shown`."""

  def apply(x, t, x_mask):
    output = call(x, t, x_mask)
    shown.update(x=x, t=t, output=output, x_mask=x_mask)
    return output

  return apply


def cases_of(golden, prefix):
  """Tensors below `prefix/`, without it."""
  return {key.removeprefix(f"{prefix}/"): value for key, value in golden.items() if key.startswith(f"{prefix}/")}


def keys_of(count, seed=0):
  return jax.random.split(jax.random.key(seed, impl="threefry2x32"), count)


# XLA spends most of a test's time on optimising programs that run once.
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
