"""Padding, other samples in the batch, scan, jit and remat do not change the outputs of a denoiser."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.tokens import grid_size, patchify
from tests import denoisers
from tests.helpers import random_variables, relative_error

SIZES = {"hidden_size": 48, "depth": 2, "num_heads": 2, "caption_channels": 16, "model_max_length": 6, "in_channels": 2}
CONFIGS = {
  "STDiT": denoisers.STDiT1Config(**SIZES),
  "STDiT2": denoisers.STDiT2Config(**SIZES),
  "STDiT3": denoisers.STDiT3Config(**SIZES),
}
# Latent sizes (T, H, W) of a video, a wide video and an image. Odd sides: half of each border token is padding.
LATENT_SIZES = (3, 5, 7), (2, 3, 10), (1, 6, 4)
TOLERANCE = 1e-5


def sample(index, config, frames, tokens, text, junk):
  """One sample, padded to `frames`, `tokens` and `text`, with `junk` in all invalid places."""
  rng = np.random.default_rng(index)
  size = LATENT_SIZES[index]
  kept = (4, 6, 1)[index]
  values = patchify(rng.standard_normal((*size, config.in_channels), np.float32))
  cotangent = rng.standard_normal((*values.shape[:2], config.patch_positions * config.out_channels), np.float32)
  valid = patchify(np.ones((*size, config.in_channels), bool))
  valid_out = np.repeat(valid[..., :: config.in_channels], config.out_channels, axis=-1)
  caption = rng.standard_normal((kept, config.caption_channels), np.float32)

  def pad(x, fill=0):
    return np.pad(x, [(0, frames - x.shape[0]), (0, tokens - x.shape[1]), (0, 0)], constant_values=fill)

  pixels = ((240, 426, 51, 24), (144, 256, 16, 8), (512, 512, 1, 120))[index]
  named = zip(("height", "width", "num_frames", "fps"), np.float32(pixels))
  batch = {
    "tokens": np.where(pad(valid), pad(values), junk),
    "valid": pad(valid),
    "t": np.float32((800, 30.5, 512)[index]),
    "text": np.pad(caption, [(0, text - kept), (0, 0)], constant_values=junk),
    "text_mask": np.arange(text) < kept,
    "grid": np.int32(grid_size(size)),
    "cotangent": np.where(pad(valid_out), pad(cotangent), 0),
    **dict(named),
  }
  if not isinstance(config, denoisers.STDiT1Config):
    batch["x_mask"] = np.arange(frames) != index % 2  # clean frame of each sample: the second, the first, the second (padding)
  return jax.tree.map(lambda x: np.asarray(x)[None], batch)


def join(samples):
  return jax.tree.map(lambda *rows: np.concatenate(rows), *samples)


def split(batch):
  """The arguments of a model for a batch of `sample`s: ((tokens, t, cond, sizes), masks)."""
  cond = {name: batch[name] for name in ("text", "text_mask")}
  sizes = {name: batch[name] for name in ("grid", "height", "width", "num_frames", "fps")}
  masks = {name: batch[name] for name in ("x_mask", "valid") if name in batch}
  return (batch["tokens"], batch["t"], cond, sizes), masks


def outputs_and_gradients(model, variables, batch):
  """The output with 0 at invalid elements, and the gradients of its product with the cotangent (parameters, tokens)."""
  cotangent, ((tokens, *inputs), masks) = batch["cotangent"], split(batch)

  def loss(params, tokens):
    out = model.apply({**variables, "params": params}, tokens, *inputs, **masks)
    return jnp.sum(out * cotangent), jnp.where(cotangent != 0, out, 0)

  (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], tokens)
  return out, *gradients


run = jax.jit(outputs_and_gradients, static_argnums=0)


def assert_gradients_equal(a, b):
  """Asserts that every gradient agrees to TOLERANCE of its largest value."""
  errors = {
    jax.tree_util.keystr(path): relative_error(x, y)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True)
  }
  worst = max(errors, key=errors.get)
  assert errors[worst] < TOLERANCE, (worst, errors[worst])


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_and_other_samples_change_nothing(name):
  """Three samples of different sizes in a padded batch give the same as alone. Alone, the first one needs no padding.

  One program serves all samples that are alone.
  """
  config = CONFIGS[name]
  model, variables = denoisers.build(config), random_variables(config)
  mixed = join([sample(i, config, frames=4, tokens=14, text=6, junk=1e3) for i in range(3)])
  out, d_params, d_tokens = run(model, variables, mixed)
  assert np.all(np.asarray(d_tokens)[~mixed["valid"]] == 0)

  summed = None
  for i, size in enumerate(LATENT_SIZES):
    frames, rows, columns = grid_size(size)
    alone = sample(i, config, frames=3, tokens=12, text=6, junk=0)
    out_alone, d_params_alone, d_tokens_alone = run(model, variables, alone)
    for ours, theirs in ((out[i], out_alone[0]), (d_tokens[i], d_tokens_alone[0])):
      assert relative_error(ours[:frames, : rows * columns], theirs[:frames, : rows * columns]) < TOLERANCE
    summed = d_params_alone if summed is None else jax.tree.map(jnp.add, summed, d_params_alone)
  assert_gradients_equal(d_params, summed)


@pytest.mark.parametrize("name", CONFIGS)
def test_scan_jit_and_remat_change_nothing(name):
  """All models share the code of `remat`, so one of them tests its other values."""
  config = CONFIGS[name]
  variables = random_variables(config)
  batch = sample(0, config, frames=3, tokens=12, text=6, junk=0)
  expected = run(denoisers.build(config), variables, batch)
  changed = [{"scan": False}, {"remat": "full"}]
  if name == "STDiT3":
    changed += [{"remat": "dots"}, {"remat": "offload"}]
  for changes in changed:
    result = run(denoisers.build(dataclasses.replace(config, **changes)), variables, batch)
    assert relative_error(result[0], expected[0]) < TOLERANCE
    assert_gradients_equal(result[1:], expected[1:])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_debugging_path_without_jit_and_scan_agrees(name):
  config = dataclasses.replace(CONFIGS[name], scan=False)
  variables = random_variables(config)
  batch = sample(0, config, frames=3, tokens=12, text=6, junk=0)
  inputs, masks = split(batch)
  expected = jax.jit(denoisers.build(CONFIGS[name]).apply)(variables, *inputs, **masks)
  with jax.disable_jit():
    out = denoisers.build(config).apply(variables, *inputs, **masks)
  valid = batch["valid"].any(-1)
  assert relative_error(out[valid], expected[valid]) < TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_keeps_float32_islands(name):
  """Outputs are float32, and close to those of a float32 model. No exp, rsqrt, sin or cos runs in half precision."""
  config = CONFIGS[name]
  variables = random_variables(config)
  batch = sample(0, config, frames=3, tokens=12, text=6, junk=0)
  half = denoisers.build(dataclasses.replace(config, dtype="bfloat16"))
  exact, rounded = run(denoisers.build(config), variables, batch), run(half, variables, batch)
  assert rounded[0].dtype == jnp.float32
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(rounded[1]))
  assert 1e-4 < relative_error(rounded[0], exact[0]) < 5e-2

  def equations(jaxpr):
    for equation in jaxpr.eqns:
      yield equation
      for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "jaxpr")):
        if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
          yield from equations(getattr(value, "jaxpr", value))

  jaxpr = jax.make_jaxpr(functools.partial(outputs_and_gradients, half))(variables, batch).jaxpr
  islands = [e for e in equations(jaxpr) if e.primitive.name in ("exp", "rsqrt", "sin", "cos")]
  assert {e.primitive.name for e in islands} == {"exp", "rsqrt", "sin", "cos"}
  assert all(e.invars[0].aval.dtype == jnp.float32 for e in islands)
  dots = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
  assert sum(e.invars[0].aval.dtype == jnp.bfloat16 for e in dots) > len(dots) / 2


def test_a_row_without_valid_tokens_stays_finite():
  """A masked row has no valid element and no text. Its output has no meaning, but must not spread NaN to the batch."""
  config = CONFIGS["STDiT3"]
  model, variables = denoisers.build(config), random_variables(config)
  batch = join([sample(i, config, frames=4, tokens=14, text=6, junk=0) for i in range(3)])
  batch["valid"][1], batch["text_mask"][1], batch["cotangent"][1] = False, False, 0
  batch["grid"][1], batch["height"][1], batch["width"][1] = 1, 1, 1
  out, d_params, _ = run(model, variables, batch)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out, d_params)))


@pytest.mark.parametrize(("name", "positioned"), [("STDiT2", False), ("STDiT3", False), ("STDiT3", True)])
def test_rotary_positions_do_not_distinguish_equal_frames(name, positioned):
  """Equal frames have equal outputs: attention over time sees only differences of positions and averages equal values.

  `frame_positions` distinguish the frames.
  """
  config = dataclasses.replace(CONFIGS[name], **({"frame_positions": True} if positioned else {}))
  batch = sample(0, config, 3, 12, 6, 0.0)
  batch["tokens"] = np.repeat(batch["tokens"][:, :1], 3, axis=1)
  inputs, _ = split(batch)
  out = jax.jit(denoisers.build(config).apply)(random_variables(config), *inputs)
  differences = [relative_error(out[:, i], out[:, 0]) for i in (1, 2)]
  assert min(differences) > 1e-3 if positioned else max(differences) < 1e-5
