"""The gradient program against direct gradients on plain latents, the update program against NumPy and PyTorch."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import torch

from data.buckets import Bucket
from data.tokens import unpatchify
from stdit_jax.diffusion.noise import Purpose, sample_keys
from stdit_jax.parallel.mesh import AXES, make_mesh
from stdit_jax.parallel.shardings import ArraySpec, Layout
from stdit_jax.training import state as states
from stdit_jax.training import step
from stdit_jax.training.batches import to_global
from stdit_jax.training.counter import CompileCounter
from stdit_jax.training.stage_data import choose_splits
from tests.denoisers import denoise_latents
from tests.helpers import relative_error
from tests.runs import Run
from tests.tiny_run import tiny_config


@pytest.fixture(scope="module")
def made(assets, tmp_path_factory):
  """(run, state with redrawn parameters, frozen, one NumPy batch per bucket with three aspect ratios)."""
  config = tiny_config(
    assets, tmp_path_factory.mktemp("step") / "run", data__buckets=(("144p", 1, 1.0, 3), ("144p", 4, 1.0, 3))
  )
  run = Run(config)
  state, frozen, _ = run.start()
  rng = np.random.default_rng(0)
  # Parameters that start at zero would hide errors.
  params = jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape, np.float32), state["params"])
  make_batch = run.maker()
  batches = {}
  with run.parts[0].data.loader(0) as rows:
    while len(batches) < 2:
      loaded = next(rows)
      batches[loaded.bucket] = jax.tree.map(np.asarray, make_batch(loaded))
  return run, states.new_state(params, run.parts[0].programs.optimizer), frozen, batches


@pytest.fixture(scope="module")
def programs(made):
  """Jitted gradient programs by bucket: whole batches of both buckets, and clips in three micro batches."""
  run, state, _, batches = made
  layout = Layout(run.mesh)
  stage = dataclasses.replace(run.stages[0], name="test")
  programs = step.Programs(run.parts[0].objective, stage, run.mesh, CompileCounter())
  whole = {bucket: programs.gradient(bucket, 3, step.Split(layout)) for bucket in batches}
  parts = programs.gradient(("144p", 4), 3, step.Split(layout, 3))
  return types.SimpleNamespace(
    whole=whole, parts=parts, params=jax.device_put(state["params"], programs.state_shardings["params"]),
    new_accumulator=programs.new_accumulator,
  )  # fmt: skip


def gradient_of(made, programs, program, batch, accumulator=None):
  run, _, frozen, _ = made
  accumulator = programs.new_accumulator(programs.params) if accumulator is None else accumulator
  arrays = to_global(batch, program.batch, Layout(run.mesh))
  return program.jitted(programs.params, frozen, arrays, accumulator)


def test_batches_have_the_shapes_of_their_programs(made):
  run, _, _, batches = made
  for bucket, batch in batches.items():
    specs = run.parts[0].objective.batch(bucket, len(batch["weight"]))
    assert jax.tree.map(lambda v: (v.shape, v.dtype), batch) == jax.tree.map(lambda s: (s.shape, np.dtype(s.dtype)), specs)


def assert_close_groups(ours, theirs, tolerance=1e-5):
  """Asserts that gradients agree, relative to the largest gradient in their module."""
  flat = lambda tree: jax.tree_util.tree_flatten_with_path(tree)[0]  # noqa: E731
  largest = {}
  for path, value in flat(theirs):
    largest[path[:-1]] = max(largest.get(path[:-1], 0), float(np.abs(value).max()))
  for (path, a), (_, b) in zip(flat(ours), flat(theirs), strict=True):
    error = np.abs(np.asarray(a) - np.asarray(b)).max()
    assert error <= tolerance * max(largest[path[:-1]], 1e-30), jax.tree_util.keystr(path)


def direct_loss(run, frozen, batch, row, params):
  """The rectified-flow loss of one row, written again for its unpadded latents and the documented noise keys."""
  config, model = run.config, run.parts[0].objective.model
  size = tuple(int(n) for n in batch["latent_size"][row])
  one = lambda x: jnp.asarray(x[row : row + 1])  # noqa: E731
  seen = {name: one(batch["sizes"][name]) for name in ("height", "width", "num_frames", "fps")}
  latents = lambda name: unpatchify(jnp.asarray(batch[name][row : row + 1]), size, (1, 2, 2))  # noqa: E731
  key = lambda purpose: sample_keys(config.seed, batch["sample_id"][row : row + 1], purpose)  # noqa: E731
  noise = lambda purpose: jax.random.normal(key(purpose)[0], (*size, 4))[None]  # noqa: E731

  x0 = latents("latents_mean") + latents("latents_std") * noise(Purpose.POSTERIOR)
  s = jax.nn.sigmoid(jax.random.normal(key(Purpose.TIMESTEP)[0], ()))
  ratio = jnp.sqrt(seen["height"] * seen["width"] / 512**2) * jnp.sqrt(size[0])
  t = ratio * s / (1 + (ratio - 1) * s)
  mask = run.parts[0].objective.frame_masks.draw(key(Purpose.FRAME_MASK), size[0]) if size[0] > 1 else jnp.ones((1, 1), bool)
  here = mask[:, :, None, None, None]
  e = noise(Purpose.NOISE)
  x_t = jnp.where(here, (1 - t) * x0 + t * e, x0)
  drop = jax.vmap(jax.random.uniform)(key(Purpose.DROP_TEXT)) < config.caption_dropout
  text = run.parts[0].objective.components.conditioner.encoder.apply(
    {"params": params["text_encoder"]}, one(batch["cond"]["text_ids"]), one(batch["cond"]["text_mask"])
  )
  variables = {"params": params["denoiser"], "constants": frozen["denoiser"]}
  text_mask = one(batch["cond"]["text_mask"])
  out = denoise_latents(model, variables, x_t, t * 1000, text, text_mask, x_mask=mask, drop=drop, **seen)
  error = jnp.square(out[..., :4] - (x0 - e))
  return jnp.sum(jnp.where(here, error, 0)) / (mask.sum() * error[0, 0].size)


@pytest.mark.parametrize("frames", [4, 1])
def test_mixed_aspect_ratios_have_the_gradients_of_single_samples(made, programs, frames):
  run, state, frozen, batches = made
  batch = batches["144p", frames]
  assert len({tuple(size) for size in batch["latent_size"]}) > 1

  def losses(params):
    rows = jnp.stack([direct_loss(run, frozen, batch, row, params) for row in range(3)])
    return rows.mean(), rows

  accumulator, values = gradient_of(made, programs, programs.whole["144p", frames], batch)
  if frames == 1:
    _, rows = jax.jit(losses)(state["params"])
  else:
    expected, rows = jax.jit(jax.grad(losses, has_aux=True))(state["params"])
    assert_close_groups(accumulator["gradients"], expected)
  np.testing.assert_allclose(values["loss"], rows.mean(), rtol=1e-5)
  if frames == 4:
    # With one valid row the loss is that of its sample.
    for row in range(3):
      alone = {**batch, "weight": np.eye(3, dtype=np.float32)[row]}
      _, values = gradient_of(made, programs, programs.whole["144p", frames], alone)
      np.testing.assert_allclose(values["loss"], rows[row], rtol=1e-5)


def test_micro_batches_change_nothing(made, programs):
  batch = {**made[3]["144p", 4], "weight": np.array([1, 0, 1], np.float32)}
  whole, values = gradient_of(made, programs, programs.whole["144p", 4], batch)
  parts, of_parts = gradient_of(made, programs, programs.parts, batch)
  np.testing.assert_allclose(of_parts["loss"], values["loss"], rtol=1e-5)
  assert float(of_parts["weight"]) == float(values["weight"]) == 2
  assert_close_groups(parts["gradients"], whole["gradients"])


def test_micro_batch_count_follows_the_limit(made):
  run, _, _, batches = made
  _, frames, space, _ = batches["144p", 4]["latents_mean"].shape

  def parts(limit):
    config = run.stages[0].config.replace({"max_tokens_per_device": limit})
    stage = dataclasses.replace(run.stages[0], config=config)
    splits = choose_splits(stage, run.parts[0].data.config.parsed_buckets(), run.mesh, run.parts[0].objective)
    return splits["144p", 4].micro_batches

  assert parts(0) == 1
  assert parts(3 * frames * space) == 1
  assert parts(3 * frames * space - 1) == 3  # 3 rows divide into 1 or 3 parts only
  assert parts(1) == 3


def test_buckets_with_an_indivisible_batch_split_their_tokens(made):
  """Three devices along `sequence` divide a batch of 3, but not a batch of 2."""
  run, mesh = made[0], jax.sharding.AbstractMesh((1, 1, 3, 1), AXES)
  buckets = (Bucket("144p", 1, 1.0, 2), Bucket("144p", 4, 1.0, 3))

  def split(value, buckets=buckets):
    config = run.stages[0].config.replace({"split_tokens": value})
    stage = dataclasses.replace(run.stages[0], config=config)
    splits = choose_splits(stage, buckets, mesh, run.parts[0].objective)
    return [frames for (_, frames), split in splits.items() if split.layout.split_tokens]

  assert split("auto") == [1]
  assert split("always") == [1, 4]
  assert split("144p:1,144p:4") == [1, 4]
  assert split("144p:4", buckets[1:]) == [4]
  with pytest.raises(ValueError, match="the batch of 2 of bucket 144p x 1 does not divide by the 3 parts"):
    split("144p:4")


def test_masked_rows_have_no_influence(made, programs):
  batch = made[3]["144p", 4]
  weight = np.array([1, 0, 1], np.float32)
  results = []
  for filler in (0.0, 1e6):
    rows = {**batch, "weight": weight}
    for name in ("latents_mean", "latents_std"):
      rows[name] = batch[name].copy()
      rows[name][1] = filler
    results.append(gradient_of(made, programs, programs.whole["144p", 4], rows))
  jax.tree.map(np.testing.assert_array_equal, *results)
  assert np.isfinite(results[0][1]["loss"])


def test_accumulation_is_the_mean_over_valid_batches(made, programs):
  batches = made[3]
  single = [gradient_of(made, programs, programs.whole[b], batches[b])[0]["gradients"] for b in batches]
  accumulator = None
  for bucket in batches:
    accumulator, _ = gradient_of(made, programs, programs.whole[bucket], batches[bucket], accumulator)
  first = next(iter(batches))
  empty = {**batches[first], "weight": np.zeros(3, np.float32)}
  accumulator, values = gradient_of(made, programs, programs.whole[first], empty, accumulator)
  assert float(accumulator["count"]) == 2
  assert float(values["weight"]) == 0
  mean = jax.tree.map(lambda a: a / accumulator["count"], accumulator["gradients"])
  assert_close_groups(mean, jax.tree.map(lambda *g: sum(g) / 2, *single))


def test_a_second_compilation_is_an_error():
  counter = CompileCounter()
  toy = jax.jit(counter.counted("toy: gradient 144p x 1", lambda x: 2 * x))
  toy(np.ones((2, 3), np.float32))
  toy(np.ones((2, 3), np.float32))
  counter.check()
  toy(np.ones((2, 4), np.float32))
  with pytest.raises(RuntimeError, match=r"toy: gradient 144p x 1.*2"):
    counter.check()


# ---------------------------------------------------------------------------------------------------------- update program


OPTIMIZER = {
  "learning_rate": 0.02, "b1": 0.8, "b2": 0.95, "eps": 1e-6, "weight_decay": 0.1, "clip_norm": 1.5, "warmup_steps": 3,
}  # fmt: skip
PARAMS = {"a": {"w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}, "b": {"w": np.ones(5, np.float32)}}


def toy_update(pattern=".*", decay=0.9, scales=(), **settings):
  """(update program, state at step 0) for the toy parameters."""
  config = ml_collections.ConfigDict({**OPTIMIZER, "schedule": "constant", **settings})
  optimizer = states.make_optimizer(config)
  schedule = states.learning_rate(config, 0, 100)
  chosen = states.learning_rate_scales(PARAMS, pattern, scales)
  program = functools.partial(step.update, optimizer, chosen, schedule, config.clip_norm, decay)
  return jax.jit(program), states.new_state(jax.tree.map(jnp.asarray, PARAMS), optimizer)


def accumulated(gradients, count=2.0):
  """The accumulator after `count` micro steps with this mean gradient."""
  return {"gradients": jax.tree.map(lambda g: jnp.asarray(g) * count, gradients), "count": jnp.float32(count)}


def random_gradients(number, scale=1.0):
  rng = np.random.default_rng(number)
  return jax.tree.map(lambda p: rng.standard_normal(p.shape, np.float32) * scale, PARAMS)


def test_clipping_adamw_and_average_match_pytorch():
  update, state = toy_update()
  theirs = [torch.nn.Parameter(torch.from_numpy(p.copy())) for p in jax.tree.leaves(PARAMS)]
  settings = {"lr": 1.0, "betas": (OPTIMIZER["b1"], OPTIMIZER["b2"]), "eps": OPTIMIZER["eps"]}
  reference = torch.optim.AdamW(theirs, **settings, weight_decay=OPTIMIZER["weight_decay"])
  average = [p.detach().numpy().copy() for p in theirs]
  for k in range(8):
    gradients = random_gradients(k, scale=0.1 if k % 2 else 2.0)  # not clipped, clipped
    for group in reference.param_groups:
      group["lr"] = OPTIMIZER["learning_rate"] * min(1, (k + 1) / (OPTIMIZER["warmup_steps"] + 1))
    for p, g in zip(theirs, jax.tree.leaves(gradients)):
      p.grad = torch.from_numpy(g.copy())
    norm = torch.nn.utils.clip_grad_norm_(theirs, OPTIMIZER["clip_norm"])
    reference.step()
    average = [0.9 * e + np.float32(0.1) * p.detach().numpy() for e, p in zip(average, theirs)]
    state, accumulator, metrics = update(state, accumulated(gradients), np.int32(k))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-6)
    np.testing.assert_allclose(metrics["learning_rate"], reference.param_groups[0]["lr"], rtol=1e-6)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(accumulator))
  for ours, p, e, ema in zip(jax.tree.leaves(state["params"]), theirs, average, jax.tree.leaves(state["ema"])):
    assert relative_error(ours, p.detach().numpy()) < 2e-6
    assert relative_error(ema, e) < 2e-6
    assert ema.dtype == jnp.float32


@pytest.mark.parametrize("case", ["no weight", "nan", "inf"])
def test_a_skipped_step_changes_no_bit(case):
  update, state = toy_update()
  state, _, _ = update(state, accumulated(random_gradients(0)), np.int32(0))
  before = jax.tree.map(np.asarray, state)
  gradients = random_gradients(1)
  if case != "no weight":
    gradients["b"]["w"][2] = float(case)
  after, accumulator, metrics = update(state, accumulated(gradients, 0.0 if case == "no weight" else 1.0), np.int32(1))
  assert not metrics["stepped"]
  jax.tree.map(np.testing.assert_array_equal, after, before)
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(accumulator))


def test_train_freezes_all_other_parameters():
  update, state = toy_update(pattern=r"^b/", clip_norm=1.0)
  gradients = random_gradients(3, scale=5.0)
  for k in range(3):
    state, _, metrics = update(state, accumulated(gradients), np.int32(k))
  np.testing.assert_array_equal(state["params"]["a"]["w"], PARAMS["a"]["w"])
  np.testing.assert_array_equal(state["ema"]["a"]["w"], PARAMS["a"]["w"])
  assert not np.asarray(state["opt"][0].mu["a"]["w"]).any()
  assert (np.asarray(state["params"]["b"]["w"]) != PARAMS["b"]["w"]).all()
  np.testing.assert_allclose(metrics["gradient_norm"], np.linalg.norm(gradients["b"]["w"]), rtol=1e-6)
  with pytest.raises(ValueError, match="matches no parameter"):
    states.learning_rate_scales(PARAMS, "c")


def test_a_parameter_that_begins_to_train_later_matches_pytorch():
  """Steps in which a parameter is frozen do not count for its moments. Else its first steps would be several times too long."""
  stages = [toy_update(pattern, clip_norm=0.0, warmup_steps=0) for pattern in (".*", "^b/", ".*")]
  state = stages[0][1]
  theirs = [torch.nn.Parameter(torch.from_numpy(p.copy())) for p in jax.tree.leaves(PARAMS)]
  settings = {"lr": OPTIMIZER["learning_rate"], "betas": (OPTIMIZER["b1"], OPTIMIZER["b2"]), "eps": OPTIMIZER["eps"]}
  reference = torch.optim.AdamW(theirs, **settings, weight_decay=OPTIMIZER["weight_decay"])
  for k in range(24):
    gradients = random_gradients(k)
    for p, g, trains in zip(theirs, jax.tree.leaves(gradients), (not 2 <= k < 20, True)):
      p.grad = torch.from_numpy(g.copy()) if trains else None
    reference.step()
    state, _, _ = stages[0 if k < 2 else 1 if k < 20 else 2][0](state, accumulated(gradients), np.int32(k))
    for ours, p in zip(jax.tree.leaves(state["params"]), theirs, strict=True):
      assert relative_error(ours, p.detach().numpy()) < 2e-6


def test_scales_multiply_the_learning_rate():
  moved = []
  for scales in ((), (("^b/", 0.25), ("w$", 1.0))):
    update, state = toy_update(scales=scales)
    for k in range(3):
      state, _, _ = update(state, accumulated(random_gradients(0)), np.int32(k))
    moved.append(jax.tree.map(lambda p, q: np.asarray(p) - q, state["params"], PARAMS))
  np.testing.assert_array_equal(moved[0]["a"]["w"], moved[1]["a"]["w"])
  # Not exact, because weight decay depends on the moved values.
  np.testing.assert_allclose(moved[1]["b"]["w"], 0.25 * moved[0]["b"]["w"], rtol=2e-2)
  with pytest.raises(ValueError, match=r"optimizer\.scales='z' matches no parameter"):
    states.learning_rate_scales(PARAMS, ".*", (("z", 0.5),))


def test_learning_rate_warms_up_in_each_stage():
  config = ml_collections.ConfigDict({**OPTIMIZER, "schedule": "constant"})
  rate = states.learning_rate(config, 10, 20)
  np.testing.assert_allclose([rate(10 + k) for k in range(6)], 0.02 * np.array([0.25, 0.5, 0.75, 1, 1, 1]), rtol=1e-6)
  config.schedule = "cosine"
  rate = states.learning_rate(config, 10, 20)
  np.testing.assert_allclose(rate(12), 0.015, rtol=1e-6)
  np.testing.assert_allclose(rate(13 + 17 / 2), 0.01, rtol=1e-5)
  np.testing.assert_allclose(rate(30), 0, atol=1e-9)


def test_micro_batches_have_the_weighted_mean_gradient():
  """A batch of 8 in 1, 2, 4 and 8 parts has the weighted mean gradient of NumPy."""
  layout = Layout(make_mesh({"data": 1, "fsdp": 1}, jax.devices()[:1]))
  rng = np.random.default_rng(0)
  x = rng.standard_normal((8, 3)).astype(np.float32)
  weight = np.array([1, 1, 0, 1, 0, 1, 1, 1], np.float32)
  w = np.array([0.5, -1, 2], np.float32)
  error = x @ w - 1
  expected = (2 * (error * weight)[:, None] * x).sum(0) / weight.sum()

  specs = {"x": ArraySpec((8, 3)), "weight": ArraySpec((8,))}

  def loss(params, frozen, batch, layout):
    return jnp.square(batch["x"] @ params["w"] - 1), {}

  for parts in (1, 2, 4, 8):
    run = jax.jit(functools.partial(step.accumulate_gradients, loss, step.Split(layout, parts), specs, {"w": 1.0}))
    params = {"w": jnp.asarray(w)}
    accumulator, values = run(params, {}, {"x": x, "weight": weight}, step.new_accumulator(params))
    np.testing.assert_allclose(accumulator["gradients"]["w"], expected, rtol=1e-5)
    np.testing.assert_allclose(values["loss"], (error**2 * weight).sum() / weight.sum(), rtol=1e-5)
  frozen, _ = step.accumulate_gradients(
    loss, step.Split(layout), specs, {"w": 0.0}, params, {}, {"x": x, "weight": weight}, step.new_accumulator(params)
  )
  assert not frozen["gradients"]["w"].any()
