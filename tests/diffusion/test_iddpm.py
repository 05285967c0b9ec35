import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stdit_jax.diffusion import elements
from stdit_jax.diffusion.elements import Noises, StepState, split_channels
from stdit_jax.diffusion.guidance import guided
from stdit_jax.diffusion.iddpm import IDDPM, space_timesteps
from tests.diffusion.common import FAST_COMPILE, cases_of, from_tokens, keys_of, loop_inputs, recording, to_tokens, validity
from tests.helpers import load_golden, load_golden_model, load_json, relative_error

load_golden = functools.cache(load_golden)


# Schedules.


def test_timestep_maps():
  golden = load_json("iddpm.json")
  for steps, expected in golden["timestep_map"].items():
    assert IDDPM(respacing=steps).timestep_map.tolist() == expected
    assert IDDPM().for_sampling(int(steps)).timestep_map.tolist() == expected
  for text, expected in golden["space_timesteps"].items():
    total, respacing = text.split(":") if ":" in text else ("num_timesteps=1000", text)
    assert space_timesteps(int(total.removeprefix("num_timesteps=")), respacing) == expected
  assert space_timesteps(1000, None) == space_timesteps(1000, "") == list(range(1000))


def _tables():
  golden, _ = load_golden("iddpm")
  return sorted({key.split("/")[0] for key in golden if key.startswith(("base", "respaced"))})


@pytest.mark.parametrize("group", _tables())
def test_tables(group):
  golden = cases_of(load_golden("iddpm")[0], group)
  kind, precision = group.split("_")
  steps = int(kind.removeprefix("base").removeprefix("respaced"))
  ours = IDDPM(respacing=steps, tables=precision).schedule
  assert set(ours) == set(golden)
  for name, expected in golden.items():
    assert ours[name].dtype == expected.dtype
    limit = 1e-12 if precision == "float64" else 1e-6
    elementwise = np.abs(ours[name] - expected) <= limit * np.maximum(np.abs(expected), 1e-30)
    assert relative_error(ours[name], expected) < limit
    assert elementwise.all(), (name, np.flatnonzero(~elementwise))


def test_stored_table_samples():
  golden = load_json("iddpm.json")
  for group, tables, limit in (("base1000_samples", "float64", 1e-12), ("respaced1000_float32_samples", "float32", 1e-6)):
    for name, values in golden[group].items():
      for i, value in values.items():
        assert IDDPM(tables=tables).schedule[name][int(i)] == pytest.approx(value, rel=limit)


def test_single_step_and_bad_settings():
  one = IDDPM(respacing=1)
  assert all(np.isfinite(table).all() for table in one.schedule.values())
  for bad in ("1001", "ddim7000", "0", "a", "10,-1", "ddim5,5", "600,600"):
    with pytest.raises(ValueError, match="respacing"):
      IDDPM(respacing=bad)
  with pytest.raises(ValueError, match="no integer stride"):
    IDDPM(respacing="ddim600")
  with pytest.raises(ValueError, match="tables is 'bfloat16'; allowed: float32, float64"):
    IDDPM(tables="bfloat16")
  with pytest.raises(ValueError, match=r"open-sora-1\.1"):
    IDDPM(compat="open-sora-1.2")
  with pytest.raises(ValueError, match="for_sampling"):
    IDDPM().sampling_timesteps(100, np.ones(2))
  np.testing.assert_array_equal(IDDPM(respacing=3).sampling_timesteps(3, np.ones(2))[:, 1], [2, 1, 0, -1])
  t = np.asarray(IDDPM().sample_timesteps(keys_of(20000)))
  assert set(np.unique(t)) == set(range(1000))
  assert abs(t.mean() - 499.5) < 4 * 1000 / np.sqrt(12 * len(t))


# Losses and single steps on stored model outputs.


def _give(layout):
  return to_tokens if layout == "tokens" else lambda x: np.moveaxis(x, 1, -1)


def _loss_inputs(layout):
  case, give = cases_of(load_golden("iddpm")[0], "loss"), _give(layout)
  x0, noise, output = (jnp.asarray(give(case[f"in/{n}"])) for n in ("x_start", "noise", "model_output"))
  valid = validity(case["in/x_start"].shape) if layout == "tokens" else None
  return case, give, x0, noise, output, valid


LAYOUTS = pytest.mark.parametrize("layout", ["tokens", "latents"])


@LAYOUTS
@pytest.mark.parametrize("tables", ["float32", "float64"])
def test_loss(layout, tables):
  case, give, x0, noise, output, valid = _loss_inputs(layout)
  t, diffusion = jnp.asarray(case["in/t"]), IDDPM(tables=tables)
  stored = case if tables == "float32" else cases_of(load_golden("iddpm")[0], "loss_float64_tables")
  for name, mask in (("nomask", None), ("mask", jnp.asarray(case["in/mask"]))):
    seen = {}

    def denoise(x_t, t, x_mask, seen=seen):
      seen.update(x_t=x_t, t=t)
      return output

    terms = diffusion.loss_terms(denoise, x0, noise, t, num_channels=4, frame_mask=mask, valid=valid)
    np.testing.assert_array_equal(seen["t"], case[f"{name}/t_sent_to_model"])
    assert relative_error(seen["x_t"], give(case[f"{name}/x_t"])) < 1e-5
    for term in ("mse", "loss", "vb"):
      expected, at_zero = stored[f"{name}/{term}"], np.asarray(t) == 0
      # With float64 tables the stored losses are float64, and ours float32. At t = 0, `vb` then agrees only to 1e-4.
      error = np.abs(terms[term] - expected) / np.abs(expected)
      assert (error <= np.where(at_zero & (term != "mse"), 1e-4, 1e-5)).all(), (term, error)
    loss = diffusion.loss(denoise, x0, noise, t, num_channels=4, frame_mask=mask, valid=valid)
    np.testing.assert_array_equal(loss, terms["loss"])


@LAYOUTS
def test_distributions(layout):
  case, give, x0, noise, output, _ = _loss_inputs(layout)
  t, diffusion = jnp.asarray(case["in/t"]), IDDPM()
  x = diffusion.add_noise(x0, noise, t)
  valid = np.ones(x.shape, bool) if layout == "latents" else validity(case["in/x_start"].shape)

  def check(ours, expected):
    assert relative_error(np.where(valid, ours, 0), give(expected)) < 1e-5

  check(x, case["q_sample"])
  mean, log_variance = diffusion.posterior(x0, x, t)
  check(mean, case["posterior_mean"])
  check(jnp.broadcast_to(log_variance, x.shape), case["posterior_log_variance_clipped"])
  variance = diffusion.schedule["posterior_variance"][case["in/t"]].reshape(-1, *[1] * (x.ndim - 1))
  check(np.broadcast_to(variance, x.shape).astype(np.float32), case["posterior_variance"])
  expected, (noise, v) = cases_of(load_golden("iddpm")[0], "p_mean_variance"), split_channels(output, 4)
  mean, log_variance = diffusion.p_mean_variance(noise, v, x, t)
  check(mean, expected["mean"])
  check(log_variance, expected["log_variance"])
  check(jnp.exp(log_variance), expected["variance"])
  check(diffusion.predict_x0(noise, x, t), expected["pred_xstart"])
  expected = cases_of(load_golden("iddpm")[0], "p_mean_variance_clipped")
  clipped = jnp.clip(diffusion.predict_x0(noise, x, t), -1, 1)
  check(clipped, expected["pred_xstart"])
  check(diffusion.posterior(clipped, x, t)[0], expected["mean"])


def test_gradient_of_the_bound_reaches_the_variance_only():
  case, _, x0, noise, output, _ = _loss_inputs("latents")
  t = jnp.asarray(case["in/t"])

  def gradient(term):
    return jax.grad(lambda out: IDDPM().loss_terms(lambda *_: out, x0, noise, t, num_channels=4)[term].sum())(output)

  vb, mse = gradient("vb"), gradient("mse")
  assert not np.asarray(vb[..., :4]).any()
  assert np.asarray(vb[..., 4:]).any(axis=(1, 2, 3, 4)).all()
  assert np.asarray(mse[..., :4]).all()
  assert not np.asarray(mse[..., 4:]).any()


def test_loss_ignores_padding():
  case, _, x0, noise, output, valid = _loss_inputs("tokens")
  pad = [(0, 0), (0, 1), (0, 3), (0, 0)]
  x0, noise = (jnp.where(np.pad(valid, pad), jnp.pad(a, pad), 5.0) for a in (x0, noise))
  output, valid = jnp.pad(output, pad, constant_values=3.0), np.pad(valid, pad)
  mask = jnp.pad(jnp.asarray(case["in/mask"]), [(0, 0), (0, 1)], constant_values=True)

  def denoise(x_t, t, x_mask):
    assert not np.asarray(x_t)[~valid].any()
    return output

  loss = IDDPM().loss(denoise, x0, noise, jnp.asarray(case["in/t"]), num_channels=4, frame_mask=mask, valid=valid)
  assert relative_error(loss, case["mask/loss"]) < 1e-5


@LAYOUTS
@pytest.mark.parametrize("index", [0, 1, 25, 30, 50, 75, 99])
def test_sampling_step(layout, index):
  case, give = cases_of(load_golden("iddpm")[0], "p_sample"), _give(layout)
  diffusion = IDDPM(compat="open-sora-1.1").for_sampling(100)
  x, output = jnp.asarray(give(case["in/x"])), jnp.asarray(give(case["in/model_output"]))
  valid = validity(case["in/x"].shape) if layout == "tokens" else None
  plain, mask = cases_of(case, f"t{index}/plain"), cases_of(case, f"t{index}/mask")
  seen = {}

  def denoise(x, t, x_mask):
    seen.update(x=x, t=t, x_mask=x_mask)
    return output

  noises = Noises(give(plain["in/noise"]))
  sample, edit, _ = diffusion.step(denoise, StepState(x), index, num_channels=4, noises=noises, valid=valid)
  assert edit is None
  assert relative_error(sample, give(plain["sample"])) < 1e-5
  assert (np.asarray(seen["t"]) == diffusion.timestep_map[index]).all()
  x0 = diffusion.predict_x0(split_channels(output, 4)[0], x, jnp.full(4, index))
  assert relative_error(x0 if valid is None else np.where(valid, x0, 0), give(plain["pred_xstart"])) < 1e-5

  noises = Noises(*(jnp.asarray(give(mask[f"in/{name}"])) for name in ("noise", "noise_add")))
  state = StepState(x, elements.start_edit(case["in/mask"]))
  sample, _, _ = diffusion.step(denoise, state, index, num_channels=4, noises=noises, valid=valid)
  assert relative_error(seen["x"], give(mask["model_input"])) < 1e-5
  np.testing.assert_array_equal(seen["x_mask"], mask["x_mask"])
  assert relative_error(sample, give(mask["sample"])) < 1e-5

  # The default differs in two points: frames of ratio 0 never change, and the model sees a frame noised in this step as noisy.
  default = IDDPM().for_sampling(100)
  made, _, _ = default.step(denoise, state, index, num_channels=4, noises=noises, valid=valid)
  ratio = np.asarray(case["in/mask"])
  kept = ratio == 0
  np.testing.assert_array_equal(seen["x_mask"], ~kept & (np.trunc(ratio * 100) >= index))
  np.testing.assert_array_equal(np.asarray(made)[kept], np.asarray(x)[kept])
  np.testing.assert_array_equal(np.asarray(made)[~kept], np.asarray(sample)[~kept])


def test_more_steps_than_timesteps_are_refused():
  with pytest.raises(ValueError, match="1001 sampler steps; iddpm allows at most its 1000 timesteps"):
    IDDPM().for_sampling(1001)


def test_ddim_step():
  golden = load_golden("iddpm")[0]
  case = cases_of(golden, "p_sample")
  diffusion, give = IDDPM(respacing="100"), _give("latents")
  x, output = jnp.asarray(give(case["in/x"])), jnp.asarray(give(case["in/model_output"]))
  sample = diffusion.ddim(split_channels(output, 4)[0], x, jnp.full(4, 12))
  assert relative_error(sample, give(golden["ddim/t12_eta0/sample"])) < 1e-5
  with pytest.raises(ValueError, match="needs noise"):
    diffusion.step(lambda *_: output, StepState(x), 12, num_channels=4)


# Fixed variances and other betas.


@pytest.mark.parametrize(("variance", "table"), [("fixed-small", "posterior_variance"), ("fixed-large", "betas")])
def test_a_fixed_variance_needs_no_variance_channels(variance, table):
  case, _, x0, noise, output, _ = _loss_inputs("latents")
  t, diffusion = jnp.asarray(case["in/t"]), IDDPM(variance=variance)
  alone = output[..., :4]
  terms = diffusion.loss_terms(lambda *_: alone, x0, noise, t, num_channels=4)
  assert set(terms) == {"loss", "mse"}
  np.testing.assert_array_equal(terms["loss"], terms["mse"])
  np.testing.assert_allclose(terms["mse"], case["nomask/mse"], rtol=1e-5)
  np.testing.assert_array_equal(diffusion.loss(lambda *_: output, x0, noise, t, num_channels=4), terms["loss"])
  _, log_variance = diffusion.p_mean_variance(alone, None, x0, t)
  expected = diffusion.schedule[table].copy()
  expected[0] = diffusion.schedule["posterior_variance"][1]
  np.testing.assert_allclose(np.exp(log_variance)[:, 0, 0, 0, 0], expected[np.asarray(t)], rtol=1e-5)
  # v = -1 and v = 1 are the bounds of a learned variance.
  bound = jnp.full_like(alone, 1.0 if variance == "fixed-large" else -1.0)
  index, draw = jnp.full(len(t), 500), jnp.ones_like(x0)
  state, noises = StepState(x0), Noises(draw)
  learned = IDDPM().step(lambda *_: jnp.concatenate([alone, bound], -1), state, index, num_channels=4, noises=noises)
  fixed = diffusion.step(lambda *_: alone, state, index, num_channels=4, noises=noises)
  np.testing.assert_allclose(fixed[0], learned[0], rtol=1e-5, atol=1e-6)


def test_a_learned_variance_needs_variance_channels():
  with pytest.raises(ValueError, match=r"needs variance channels, but the model output has shape \(1, 2, 3, 8\).*fixed-large"):
    IDDPM(sampler="ddim").step(lambda x, *_: x, StepState(jnp.ones((1, 2, 3, 8))), 5, num_channels=4)


def test_cosine_betas():
  """The cumulative product of alphas follows the squared cosine (Nichol & Dhariwal 2021, eq. 17); betas end at 0.999."""
  schedule = IDDPM(betas="cosine", tables="float64").schedule
  angle = (np.arange(1, 1001) / 1000 + 0.008) / 1.008 * np.pi / 2
  expected = (np.cos(angle) / np.cos(0.008 / 1.008 * np.pi / 2)) ** 2
  np.testing.assert_allclose(schedule["alphas_cumprod"][:-1], expected[:-1], rtol=1e-9)
  assert schedule["betas"].max() == 0.999
  for field in ("betas", "variance"):
    with pytest.raises(ValueError, match=f"{field} is 'learned'; allowed: "):
      IDDPM(**{field: "learned"})


# Through the model.


@functools.cache
def _model():
  return load_golden_model("stdit2_tiny")


@pytest.mark.parametrize("name", ["steps4_cfg7_ch3", "steps4_cfg7_chNone", "steps4_cfg7_ch3_mask", "steps10_cfg4_ch3_mask"])
def test_sampling_loop(name):
  golden, metadata = load_golden("iddpm_sample")
  case, settings = cases_of(golden, name), metadata["cases"][name]
  z, num_steps, draws = case["in/z"], settings["num_sampling_steps"], settings["noise_draws_per_step"]
  batch, size = len(z), z.shape[2:]
  model, variables = _model()
  inputs, valid = loop_inputs(case, variables), jnp.asarray(validity(z.shape))
  diffusion = IDDPM(compat="open-sora-1.1").for_sampling(num_steps)

  @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
  def step(x, index, noises, edit):
    shown = {}
    call = recording(lambda x, t, x_mask: model.apply(variables, x, t, **inputs, x_mask=x_mask), shown)
    denoise = guided(call, settings["cfg_scale"], num_channels=4, guided_channels=settings["cfg_channel"])
    x, edit, _ = diffusion.step(denoise, StepState(x, edit), index, num_channels=4, noises=noises, valid=valid)
    return shown, x, edit

  x = jnp.asarray(to_tokens(z))
  edit = elements.start_edit(case["in/mask"]) if "in/mask" in case else None
  indices = diffusion.sampling_timesteps(num_steps, case["in/height"])
  for i in range(num_steps):
    drawn = [jnp.asarray(to_tokens(noise[:batch])) for noise in case["in/noise"][i * draws : (i + 1) * draws]]
    noises = Noises(drawn[-1], drawn[0] if edit is not None else None)
    shown, x, edit = step(x, indices[i], noises, edit)
    assert relative_error(from_tokens(shown["x"], size), case[f"step{i}/model_input"]) < 1e-5
    assert relative_error(from_tokens(shown["output"], size), case[f"step{i}/model_output"]) < 1e-5
    np.testing.assert_array_equal(shown["t"], case[f"step{i}/t"])
    if edit is not None:
      np.testing.assert_array_equal(shown["x_mask"], case[f"step{i}/x_mask"])
  assert relative_error(from_tokens(x, size), case["out"]) < 1e-5


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm++", 2)])
def test_order_of_the_samplers_without_noise(sampler, order):
  """Half the step size leaves 2^-order of the error at the last index.

  For normal data of standard deviation c, the noise to predict is sigma x / V with V = alpha^2 c^2 + sigma^2, and x keeps its
  ratio to sqrt(V).
  """
  c, x = 0.5, jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 3, 4)), jnp.float32)

  def error(steps):
    diffusion = IDDPM(sampler=sampler, tables="float64").for_sampling(steps)
    abar = np.asarray(diffusion.schedule["alphas_cumprod"], np.float32)
    variance = abar * c**2 + 1 - abar
    state = StepState(x, previous=elements.no_previous(x) if diffusion.multistep else None)
    for index in range(steps - 1, 0, -1):
      noise = lambda x, *_, i=index: jnp.concatenate([np.sqrt(1 - abar[i]) / variance[i] * x, 0 * x], -1)  # noqa: E731
      state = diffusion.step(noise, state, index, num_channels=4)
    return float(jnp.abs(state.x - x * np.sqrt(variance[0] / variance[-1])).max())

  coarse, fine = error(50), error(100)
  np.testing.assert_allclose(np.log2(coarse / fine), order, atol=0.35)
  # The last step ends at the predicted data.
  diffusion = IDDPM(sampler=sampler).for_sampling(10)
  state = StepState(x, previous=elements.no_previous(x) if diffusion.multistep else None)
  last, _, _ = diffusion.step(lambda x, *_: jnp.zeros((*x.shape[:-1], 8)), state, 0, num_channels=4)
  np.testing.assert_allclose(last, x / np.sqrt(diffusion.schedule["alphas_cumprod"][0]), rtol=1e-5)


def test_dpm_steps_keep_frames_and_start_first_order_where_frames_become_active():
  diffusion = IDDPM(sampler="dpm++").for_sampling(10)
  x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 2, 4)), jnp.float32)
  state = StepState(x, elements.start_edit(jnp.array([[0.0, 0.5, 1.0]])), elements.no_previous(x))
  output = jnp.asarray(np.random.default_rng(2).normal(size=(1, 3, 2, 8)), jnp.float32)
  for index in range(9, -1, -1):
    before = state.x
    state = diffusion.step(lambda *_: output, state, index, num_channels=4, noises=Noises(frames=-x))
    if index == 5:  # the frame is noised and then denoised in the same step, by a first-order update
      noised = diffusion.add_noise(before, -x, index)
      first, _ = diffusion.dpm(split_channels(output, 4)[0], noised, jnp.full(1, index), elements.no_previous(x))
      np.testing.assert_allclose(state.x[:, 1], first[:, 1], rtol=1e-5)
    np.testing.assert_array_equal(state.x[:, 0], x[:, 0])
  with pytest.raises(ValueError, match="sampler is 'euler'; allowed: ancestral, ddim"):
    IDDPM(sampler="euler")
