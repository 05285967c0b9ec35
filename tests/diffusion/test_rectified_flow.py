import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from stdit_jax.diffusion import elements, rectified_flow
from stdit_jax.diffusion.elements import Noises, StepState
from stdit_jax.diffusion.guidance import guided
from stdit_jax.diffusion.rectified_flow import RectifiedFlow, compat_latent_frames, timestep_transform
from stdit_jax.interop import weights
from tests.diffusion.common import FAST_COMPILE, cases_of, from_tokens, keys_of, loop_inputs, recording, to_tokens, validity
from tests.helpers import load_golden, load_golden_model, load_json, relative_error

load_golden = functools.cache(load_golden)


def _close(a, b, tolerance):
  a, b = np.asarray(a, np.float64), np.array(b, np.float64)  # null in the JSON files is NaN
  np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
  assert np.abs(np.nan_to_num(a - b)).max() <= tolerance * np.nanmax(np.abs(b), initial=1e-30)


def _f32(values):
  return np.asarray(values, np.float32)


# Timestep transform and timesteps.


@pytest.mark.parametrize("xp", [np, jnp])
def test_timestep_transform(xp):
  golden = load_json("rflow.json")
  t = xp.asarray(_f32(golden["t_in"]))
  for case in golden["timestep_transform"]:
    frames = compat_latent_frames(xp.asarray(_f32([case["num_frames"]])))
    with np.errstate(invalid="ignore"):
      out = timestep_transform(t, _f32([case["height"]]), _f32([case["width"]]), frames, scale=case["scale"])
    _close(out, case["t_out"], 1e-6)


def test_timestep_transform_with_other_bases():
  for case in load_json("rflow.json")["special"]:
    options = {name: case[name] for name in ("base_resolution", "base_num_frames") if name in case}
    if max(case["t_in"]) <= 1:
      options["num_timesteps"] = 1
    frames = compat_latent_frames(_f32(case["num_frames"]))
    out = timestep_transform(_f32(case["t_in"]), _f32(case["height"]), _f32(case["width"]), frames, **options)
    _close(out, case["t_out"], 1e-6)


def test_bfloat16_conditioning():
  for case in load_json("rflow.json")["bfloat16_conditioning"]:
    height, width, frames = (np.array([case[n]], ml_dtypes.bfloat16) for n in ("height", "width", "num_frames"))
    assert float(width[0]) == case["stored_width"]
    flow = RectifiedFlow(compat="open-sora-1.2", use_timestep_transform=True)
    out = flow._transform(_f32(case["t_in"]), (height, width, frames, None), 1.0)
    assert out.dtype == np.float32
    _close(out, case["t_out"], 1e-6)


@pytest.mark.parametrize("compat", [None, "open-sora-1.2"])
def test_sampling_timesteps(compat):
  for case in load_json("rflow.json")["sample_timesteps"]:
    flow = RectifiedFlow(
      use_timestep_transform=case["use_timestep_transform"],
      use_discrete_timesteps=case["use_discrete_timesteps"],
      compat=compat,
    )
    sizes = {name: _f32([case[name]] * 2) for name in ("height", "width", "num_frames")}
    sizes["latent_frames"] = np.where(sizes["num_frames"] == 1, 1, sizes["num_frames"] // 17 * 5)
    t = flow.sampling_timesteps(case["num_sampling_steps"], **sizes)
    assert t.dtype == np.float32
    _close(t, np.array([*case["timesteps"], 0.0])[:, None].repeat(2, 1), 1e-6)
    if compat is None:
      assert (t <= 1000).all()


def test_default_transform_counts_latent_frames_of_every_length():
  flow = RectifiedFlow(use_timestep_transform=True, transform_scale=2.0)
  sizes = {"height": _f32([512] * 3), "width": _f32([512] * 3), "latent_frames": np.array([1, 4, 9])}
  t = flow.sampling_timesteps(4, **sizes)
  np.testing.assert_allclose(t[2], [1000 * r * 0.5 / (1 + (r - 1) * 0.5) for r in (2, 4, 6)], rtol=1e-6)
  compat = RectifiedFlow(use_timestep_transform=True, transform_scale=2.0, compat="open-sora-1.2")
  t = compat.sampling_timesteps(4, sizes["height"], sizes["width"], num_frames=_f32([16, 16, 33]))
  assert np.isnan(t[0, :2]).all()  # the original's clips below 17 frames
  np.testing.assert_allclose(t[2, 2], 1000 * np.sqrt(5) / (1 + np.sqrt(5)), rtol=1e-6)  # scale ignored, 5 of 9 frames
  for bad in (flow, compat):
    with pytest.raises(ValueError, match="transform needs"):
      bad.sampling_timesteps(4, sizes["height"], sizes["width"])


def test_training_timesteps():
  keys = keys_of(200000)
  for case in load_json("rflow.json")["logit_normal_t_over_num_timesteps"]:
    flow = RectifiedFlow(sample_method="logit-normal", loc=case["loc"], scale=case["scale"])
    t = np.asarray(flow.sample_timesteps(keys)) / 1000
    n = len(t)
    assert abs(t.mean() - case["mean"]) < 4 * case["std"] * np.sqrt(2 / n)
    assert abs(t.std() - case["std"]) < 4 * case["std"] / np.sqrt(n)
    for q, value in case["quantiles"].items():
      q = float(q)
      assert abs((t < value).mean() - q) < 4 * np.sqrt(2 * q * (1 - q) / n)
  t = np.asarray(RectifiedFlow().sample_timesteps(keys))
  assert 0 <= t.min() < 1
  assert 999 < t.max() < 1000
  assert abs(t.mean() - 500) < 4 * 1000 / np.sqrt(12 * len(t))
  t = np.asarray(RectifiedFlow(use_discrete_timesteps=True).sample_timesteps(keys))
  assert set(np.unique(t)) == set(range(1000))
  flow = RectifiedFlow(use_timestep_transform=True)
  sizes = [jnp.full(len(keys), v, jnp.float32) for v in (512, 512, 51, 15)]
  shifted = np.asarray(jax.jit(flow.sample_timesteps)(keys, *sizes))
  s = np.asarray(RectifiedFlow().sample_timesteps(keys)) / 1000
  np.testing.assert_allclose(shifted, 1000 * np.sqrt(15) * s / (1 + (np.sqrt(15) - 1) * s), rtol=1e-5, atol=1e-3)


def test_bad_settings_are_refused():
  with pytest.raises(ValueError, match="allowed: uniform, logit-normal"):
    RectifiedFlow(sample_method="normal")
  with pytest.raises(ValueError, match="needs sample_method"):
    RectifiedFlow(sample_method="logit-normal", use_discrete_timesteps=True)
  with pytest.raises(ValueError, match=r"open-sora-1\.2"):
    RectifiedFlow(compat="1.2")
  with pytest.raises(ValueError, match="at least one step"):
    RectifiedFlow().sampling_timesteps(0, _f32([8]))
  with pytest.raises(ValueError, match="prediction of shape"):
    elements.prediction_of(jnp.zeros((1, 2, 3, 8)), jnp.zeros((1, 2, 3, 16)), 4)


# Losses on stored model outputs.


def _inputs(layout):
  golden, _ = load_golden("rflow")
  case = cases_of(golden, "loss")
  give = to_tokens if layout == "tokens" else lambda x: np.moveaxis(x, 1, -1)
  shape = case["in/x_start"].shape
  valid = validity(shape) if layout == "tokens" else None
  x0, noise, output = (jnp.asarray(give(case[f"in/{n}"])) for n in ("x_start", "noise", "model_output"))
  return case, x0, noise, output, valid, give


@pytest.mark.parametrize("layout", ["tokens", "latents"])
def test_loss(layout):
  case, x0, noise, output, valid, give = _inputs(layout)
  t = jnp.asarray(case["in/t"])
  flow = RectifiedFlow()
  assert relative_error(flow.add_noise(x0, noise, t), give(case["add_noise"])) < 1e-6
  assert relative_error(x0 - noise, give(case["velocity_target"])) < 1e-6
  for name, mask in (("nomask", None), ("mask", jnp.asarray(case["in/mask"]))):
    seen = {}

    def denoise(x_t, t, x_mask, seen=seen):
      seen.update(x_t=x_t, t=t, x_mask=x_mask)
      return output

    loss = flow.loss(denoise, x0, noise, t, num_channels=4, frame_mask=mask, valid=valid)
    assert relative_error(seen["x_t"], give(case[f"{name}/x_t"])) < 1e-6
    assert relative_error(loss, case[f"{name}/loss"]) < 1e-6
    assert seen["x_mask"] is mask
  t = jnp.asarray(case["weighted_mask/in/t"])
  loss = flow.loss(lambda *_: output, x0, noise, t, num_channels=4, frame_mask=mask, valid=valid)
  assert relative_error(loss * case["weighted_mask/in/weights"][t], case["weighted_mask/loss"]) < 1e-6


def test_loss_ignores_padding():
  case, x0, noise, output, valid, _ = _inputs("tokens")
  pad = [(0, 0), (0, 1), (0, 3), (0, 0)]
  valid = np.pad(valid, pad)
  garbage = [jnp.where(valid, jnp.pad(a, pad), value) for a, value in ((x0, 5.0), (noise, -7.0))]
  output = jnp.pad(output, [*pad[:3], (0, 0)], constant_values=3.0)
  seen = []

  def denoise(x_t, t, x_mask):
    seen.append(x_t)
    return output

  mask = jnp.pad(jnp.asarray(case["in/mask"]), [(0, 0), (0, 1)], constant_values=True)
  loss = RectifiedFlow().loss(denoise, *garbage, case["in/t"], num_channels=4, frame_mask=mask, valid=valid)
  assert relative_error(loss, case["mask/loss"]) < 1e-6
  assert not np.asarray(seen[0])[~valid].any()
  none = jnp.zeros_like(mask)  # no frame to generate: no loss, instead of the original's 0 / 0
  loss = RectifiedFlow().loss(denoise, *garbage, case["in/t"], num_channels=4, frame_mask=none, valid=valid)
  np.testing.assert_array_equal(loss, 0)


# Through the models.


@functools.cache
def _model():
  return load_golden_model("stdit3_tiny")


def test_training_through_stdit3():
  golden, _ = load_golden("rflow")
  case, train = cases_of(golden, "loss/in"), cases_of(golden, "train")
  x0, noise = (jnp.asarray(to_tokens(case[n])) for n in ("x_start", "noise"))
  valid, t = jnp.asarray(validity(case["x_start"].shape)), jnp.asarray(case["t"])
  model, variables = _model()
  sizes = {n: jnp.asarray(train[f"in/{n}"]) for n in ("height", "width", "num_frames", "fps")}
  sizes["grid"] = jnp.tile(jnp.array([[5, 2, 2]], jnp.int32), (4, 1))
  cond = {"text": jnp.asarray(train["in/y"][:, 0]), "text_mask": jnp.asarray(train["in/mask"]) > 0}

  def losses(params):
    def denoise(x_t, t, x_mask):
      return model.apply({**variables, "params": params}, x_t, t, cond, sizes, x_mask=x_mask, valid=valid)

    mask = jnp.asarray(train["in/x_mask"])
    loss = RectifiedFlow().loss(denoise, x0, noise, t, num_channels=4, frame_mask=mask, valid=valid)
    return loss.mean(), loss

  (_, loss), grads = jax.jit(jax.value_and_grad(losses, has_aux=True), compiler_options=FAST_COMPILE)(variables["params"])
  assert relative_error(loss, train["loss"]) < 1e-5
  norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
  assert relative_error(norm, train["grad_global_norm"]) < 1e-5
  ours = dict(weights.export_tensors("open-sora", {**variables, "params": grads}, config=model.config))
  stored = cases_of(golden, "train/grad")
  errors = {name: relative_error(ours[name], expected) for name, expected in stored.items()}
  assert max(errors.values()) < 1e-4, errors


LOOPS = (
  "steps4_cfg7",
  "steps4_cfg7_transform",
  "steps4_cfg7_mask",
  "steps4_cfg7_transform_mask",
  "steps10_cfg7_transform_mask",
  "image_steps4_cfg4_transform_discrete",
)


@functools.partial(jax.jit, static_argnames="scale", compiler_options=FAST_COMPILE)
def _loop_step(variables, inputs, x, t, t_next, frame_noise, edit, scale):
  """One guided step, shared by the stored loops; also returns inputs and output of the model."""
  model, _ = _model()
  shown = {}
  call = recording(lambda x, t, x_mask: model.apply(variables, x, t, **inputs, x_mask=x_mask), shown)
  denoise, valid = guided(call, scale, num_channels=4), inputs["valid"][: len(x)]
  state, noises = StepState(x, edit), Noises(frames=frame_noise)
  x, edit, _ = RectifiedFlow().step(denoise, state, t, t_next, num_channels=4, noises=noises, valid=valid)
  return shown, x, edit


@pytest.mark.parametrize("name", LOOPS)
def test_sampling_loop(name):
  golden, metadata = load_golden("rflow_sample")
  case, settings = cases_of(golden, name), metadata["cases"][name]
  z, steps = case["in/z"], settings["num_sampling_steps"]
  _, variables = _model()
  inputs = loop_inputs(case, variables)
  edit = elements.start_edit(case["in/mask"]) if "in/mask" in case else None
  options = {key: settings[key] for key in ("use_timestep_transform", "use_discrete_timesteps")}
  sizes = {name: case[f"in/{name}"] for name in ("height", "width", "num_frames")}
  latent_frames = np.where(sizes["num_frames"] == 1, 1, sizes["num_frames"] // 17 * 5)
  timesteps = RectifiedFlow(**options).sampling_timesteps(steps, **sizes, latent_frames=latent_frames)
  # `compat` changes only the timesteps, not the step. So its timesteps are compared, too.
  original = RectifiedFlow(**options, compat="open-sora-1.2").sampling_timesteps(steps, **sizes)
  _close(original[:-1], np.stack([case[f"step{i}/t"] for i in range(steps)]), 1e-6)
  x = jnp.asarray(to_tokens(z))
  for i in range(steps):
    noise = None if edit is None else jnp.asarray(to_tokens(case["in/noise"][i]))
    shown, x, edit = _loop_step(variables, inputs, x, timesteps[i], timesteps[i + 1], noise, edit, settings["cfg_scale"])
    _close(shown["t"], np.tile(case[f"step{i}/t"], 2), 1e-6)
    assert relative_error(from_tokens(shown["x"], z.shape[2:]), np.tile(case[f"step{i}/z"], (2, 1, 1, 1, 1))) < 1e-5
    assert relative_error(from_tokens(shown["output"], z.shape[2:]), case[f"step{i}/model_output"]) < 1e-5
    if edit is not None:
      np.testing.assert_array_equal(shown["x_mask"], np.tile(case[f"step{i}/x_mask"], (2, 1)))
  assert relative_error(from_tokens(x, z.shape[2:]), case["out"]) < 1e-5


def test_compat_keeps_the_rounding_above_1000():
  """Sizes exist whose first transformed timestep is above 1000 in float32: the original then skips frames to generate."""
  heights, widths = np.arange(64, 500, 4, dtype=np.float32), np.full(109, 64, np.float32)
  flow = RectifiedFlow(use_timestep_transform=True, compat=rectified_flow.COMPAT[1])
  t = flow.sampling_timesteps(4, heights, widths, num_frames=np.ones_like(heights))
  over = np.flatnonzero(t[0] > 1000)
  assert len(over)
  x, ones = jnp.ones((1, 2, 3, 4)), jnp.ones((1, 2))
  state = StepState(x, elements.start_edit(ones))
  stepped, _, _ = flow.step(lambda x, *_: x, state, t[0, over[:1]], t[1, over[:1]], num_channels=4, noises=Noises(frames=x))
  np.testing.assert_array_equal(stepped, x)
  default = RectifiedFlow(use_timestep_transform=True).sampling_timesteps(
    4, heights, heights, latent_frames=np.ones_like(heights)
  )
  assert (default[0] <= 1000).all()


def test_reference_frames_are_exact_and_padding_zero():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 2, 4)), jnp.float32)
  valid = jnp.ones(x.shape, bool).at[:, :, 1, 2:].set(False)
  edit = elements.start_edit(jnp.array([[0.0, 0.5, 1.0]]))
  flow, state, noises = RectifiedFlow(), StepState(x, edit), Noises(frames=-x)
  for t in (1000.0, 600.0, 200.0):
    state = flow.step(lambda x, *_: x + 1, state, t, t - 100, num_channels=4, noises=noises, valid=valid)
    assert not np.asarray(state.x)[~np.asarray(valid)].any()
  np.testing.assert_array_equal(state.x[:, 0], jnp.where(valid, x, 0)[:, 0])
  assert state.edit[1].tolist() == [[False, True, True]]
  with pytest.raises(ValueError, match=r"noises\.frames"):
    flow.step(lambda x, *_: x, state, 1000.0, 900.0, num_channels=4)


def test_shift_of_the_sampling_timesteps():
  """The ends stay, the middle moves to 3/4, and training timesteps do not change."""
  shifted = RectifiedFlow(sampling_shift=3.0)
  times = shifted.sampling_timesteps(4, _f32([64]))[:, 0]
  np.testing.assert_allclose(times, [1000, 900, 750, 500, 0], rtol=1e-6)
  keys = jax.random.split(jax.random.key(0), 8)
  np.testing.assert_array_equal(shifted.sample_timesteps(keys), RectifiedFlow().sample_timesteps(keys))
  with pytest.raises(ValueError, match=r"sampling_shift is 0\.0, allowed: above 0"):
    RectifiedFlow(sampling_shift=0.0)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("adams-bashforth", 2)])
def test_order_of_the_samplers(sampler, order):
  """Half the step size leaves 2^-order of the error.

  For normal data of standard deviation c, the velocity is ((1 - s) c^2 - s) / V x with V = (1 - s)^2 c^2 + s^2, and sampling
  turns noise into c times this noise.
  """
  c, x = 0.3, jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 8)), jnp.float32)

  def denoise(x, t, x_mask):
    s = (t / 1000)[:, None, None, None]
    return x * ((1 - s) * c**2 - s) / ((1 - s) ** 2 * c**2 + s**2)

  def error(steps):
    flow = RectifiedFlow(sampler=sampler, use_timestep_transform=True)
    state = StepState(x, previous=elements.no_previous(x) if flow.multistep else None)
    times = flow.sampling_timesteps(steps, _f32([256, 720]), _f32([256, 1280]), latent_frames=_f32([1, 4]))
    for t, t_next in itertools.pairwise(times):
      state = flow.step(denoise, state, t, t_next, num_channels=8)
    return np.asarray(jnp.abs(state.x - c * x).max((1, 2, 3)))

  coarse, fine = error(80), error(160)
  np.testing.assert_allclose(np.log2(coarse / fine), order, atol=0.25)
  assert (fine < 0.05).all()


def test_a_frame_that_becomes_active_has_no_previous_prediction():
  """Its first step is Euler's. Frames that took part in the previous step extrapolate."""
  flow, x = RectifiedFlow(sampler="adams-bashforth"), jnp.ones((1, 2, 3, 4))
  state = StepState(x, elements.start_edit(jnp.array([[0.5, 1.0]])), elements.no_previous(x))
  velocity = 1.0
  for t in (600.0, 500.0):
    before, noises = state.x, Noises(frames=state.x)
    state = flow.step(lambda x, *_, v=velocity: jnp.full_like(x, v), state, t, t - 100, num_channels=4, noises=noises)
    velocity = 3.0
  np.testing.assert_allclose((state.x - before)[0, :, 0, 0], [0.3, 0.1 * (3 + 0.5 * (3 - 1))], rtol=1e-5)
