"""STDiT, STDiT-2 and STDiT-3 against reference values: outputs, activations, gradients, caption dropout."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stdit_jax.interop import export_tensors
from tests import denoisers
from tests.helpers import SHIPPED, load_golden, load_golden_model, relative_error, to_ours, to_theirs

MODELS = ("stdit1_tiny", "stdit2_tiny", "stdit3_tiny")
# Required: 2e-5 and 1e-4. The last digits of the sinusoid frequencies set the limit (`t_embedder.mlp.0.weight`).
TOLERANCE, GRADIENT_TOLERANCE = 5e-6, 5e-5

golden = functools.cache(load_golden)
golden_model = functools.cache(load_golden_model)
CASES = [(name, case) for name in MODELS for case in golden(f"{name}_cases")[1]["cases"]]

# Our names by the names of the reference activations.
STEM = {
  "tokens_in": "tokens_in",
  "pos_emb": "pos_emb",
  "x_embedder": "patch_embed",
  "y_embedder": "caption_embed",
  "t_embedder": "timestep_embed",
  "t_block": "timestep_modulation",
  "t_block_temp": "temporal_modulation",
  "fps_embedder": "fps_embed",
  "fl_embedder": "frames_embed",
  "csize_embedder": "size_embed",
  "ar_embedder": "aspect_embed",
  "final_layer": "final_layer",
}
STACKS = {"block": "blocks", "spatial": "spatial_blocks", "temporal": "temporal_blocks"}
BRANCHES = {"attn": "attention", "attn_temp": "temporal_attention", "cross_attn": "cross_attention", "mlp": "mlp"}


class Capturing:
  """A model that stores the intermediate values of its last call."""

  def __init__(self, model):
    self.model, self.config = model, model.config

  def apply(self, *args, **kwargs):
    out, state = self.model.apply(*args, **kwargs, capture_intermediates=True, mutable="intermediates")
    self.intermediates = state["intermediates"]
    return out


def case_inputs(name, case):
  """(arguments of denoise_latents after the variables, keyword arguments) for a reference case."""
  data, _ = golden(f"{name}_cases")
  value = {key.rsplit("/", 1)[1]: data[key] for key in data if key.startswith(f"{case}/in/")}
  mask = value["mask"].astype(bool) if "mask" in value else None
  conditions = {key: value[key] for key in ("height", "width", "num_frames", "fps", "x_mask") if key in value}
  if "ar" in value:
    conditions["aspect_ratio"] = value["ar"]
  return (to_ours(value["x"]), value["timestep"], value["y"][:, 0], mask), conditions


@functools.partial(jax.jit, static_argnums=0, compiler_options=SHIPPED)
def run(model, variables, args, conditions):
  return denoisers.denoise_latents(model, variables, *args, **conditions)


@functools.partial(jax.jit, static_argnums=0)
def run_capturing(model, variables, args, conditions):
  model = Capturing(model)
  out = denoisers.denoise_latents(model, variables, *args, **conditions)
  return out, model.intermediates


def activation(intermediates, name):
  """Our value of the reference activation `name`, e.g. `t_block.1` (second call), `spatial0_attn`."""
  name, _, call = name.partition(".")
  if name in STEM:
    value = intermediates[STEM[name]]
    if name in ("tokens_in", "pos_emb"):
      return value[0][:1] if name == "pos_emb" else value[0]
    calls = value["__call__"]
    return jnp.concatenate(calls, axis=-1) if name == "csize_embedder" else calls[int(call or 0)]
  stack, layer, branch = re.fullmatch(r"(block|spatial|temporal)(\d+)_?(\w*)", name).groups()
  value = intermediates[STACKS[stack]][int(layer)]
  value = (value[BRANCHES[branch]] if branch else value)["__call__"][0]
  over_time = branch == "attn_temp" or (stack, branch) == ("temporal", "attn")
  return jnp.swapaxes(value, 1, 2) if over_time else value


@pytest.mark.parametrize(("name", "case"), CASES)
def test_outputs_and_activations_match_the_original(name, case):
  data, _ = golden(f"{name}_cases")
  args, conditions = case_inputs(name, case)
  # The originals use the position scale of the first sample for all samples. It differs if sizes are mixed.
  model, variables = golden_model(name, scan=False, compat="open-sora" if case == "cond_mixed" else None)
  out, intermediates = run_capturing(model, variables, args, conditions)
  errors = {"out": relative_error(to_theirs(out), data[f"{case}/out"])}
  for key in data:
    if key.startswith(f"{case}/act/"):
      ours = activation(intermediates, key.rsplit("/", 1)[1])
      errors[key] = relative_error(np.reshape(ours, data[key].shape), data[key])
  assert len(errors) > (1 if "plain_" not in case else 0)
  worst = max(errors, key=errors.get)
  assert errors[worst] < TOLERANCE, (worst, errors[worst])


@pytest.mark.parametrize(
  ("name", "file", "key", "overrides"),
  [
    ("stdit2_tiny", "stdit2_tiny_cases", "out_qk_norm_false", {"qk_norm": False}),
    ("stdit3_tiny", "stdit3_tiny_cases", "out_qk_norm_false", {"qk_norm": False}),
    ("stdit2_tiny", "stdit2_v12_norm_order", "out_qk_norm_legacy_true", {"qk_norm_legacy": True}),
    ("stdit2_tiny", "stdit2_v12_norm_order", "out_qk_norm_legacy_false", {"qk_norm_legacy": False}),
  ],
)
def test_options_match_the_original(name, file, key, overrides):
  model, variables = golden_model(name, **overrides)
  out = run(model, variables, *case_inputs(name, "plain"))
  assert relative_error(to_theirs(out), golden(file)[0][f"plain/{key}"]) < TOLERANCE


def test_positions_scale_per_sample_unless_compat():
  """With mixed sizes only the first sample equals the original, which uses this sample's scale for all."""
  reference = golden("stdit3_tiny_cases")[0]["cond_mixed/out"]
  out = to_theirs(run(*golden_model("stdit3_tiny"), *case_inputs("stdit3_tiny", "cond_mixed")))
  assert relative_error(out[:1], reference[:1]) < TOLERANCE
  assert relative_error(out[1:], reference[1:]) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_gradients_match_the_original(name):
  data, metadata = golden(f"{name}_cases")
  model, variables = golden_model(name)
  (x, t, y, mask), conditions = case_inputs(name, metadata["gradient_case"])
  cotangent = to_ours(data["grad/cotangent"])

  @jax.jit
  def gradients(params, x, y):
    def loss(params, x, y):
      variables_ = {**variables, "params": params}
      return jnp.sum(denoisers.denoise_latents(model, variables_, x, t, y, mask, **conditions) * cotangent)

    return jax.grad(loss, argnums=(0, 1, 2))(params, x, y)

  d_params, d_x, d_y = gradients(variables["params"], x, y)
  exported = dict(export_tensors("open-sora", {**variables, "params": d_params}, model.config))
  errors = {
    "x": relative_error(to_theirs(d_x), data["grad/d_x"]),
    "y": relative_error(d_y[:, None], data["grad/d_y"]),
  }
  for key in data:
    if key.startswith("grad/param/"):
      errors[key] = relative_error(exported[key.removeprefix("grad/param/")], data[key])
  assert len(errors) > 25
  worst = max(errors, key=errors.get)
  assert errors[worst] < GRADIENT_TOLERANCE, (worst, errors[worst])


@pytest.mark.parametrize("name", MODELS)
def test_dropped_captions_become_the_null_caption(name):
  data, _ = golden(f"{name}_cases")
  model, variables = golden_model(name, scan=False)
  drop = data["caption_drop/in/force_drop_ids"] == 1
  tokens, t, cond, sizes = denoisers.example_inputs(model.config, batch=len(drop))
  cond["text"] = data["caption_drop/in/y"][:, 0]

  @jax.jit
  def embedded(variables):
    dropped = denoisers.drop_text(model.config, variables, cond, drop)
    _, state = model.apply(variables, tokens, t, dropped, sizes, capture_intermediates=True, mutable="intermediates")
    return state["intermediates"]["caption_embed"]["__call__"][0]

  assert relative_error(embedded(variables)[:, None], data["caption_drop/out"]) < TOLERANCE


def test_null_caption_is_cut_to_a_shorter_text():
  model, variables = golden_model("stdit3_tiny")
  tokens, t, cond, sizes = denoisers.example_inputs(model.config, batch=1)
  null = variables["constants"]["null_caption"]

  @jax.jit
  def apply(text, drop):
    given = {"text": text, "text_mask": cond["text_mask"][:, :5]}
    return model.apply(variables, tokens, t, denoisers.drop_text(model.config, variables, given, drop), sizes)

  dropped, given = apply(cond["text"][:, :5], jnp.ones(1, bool)), apply(null[None, :5], jnp.zeros(1, bool))
  np.testing.assert_array_equal(dropped, given)


def test_stdit1_refuses_frame_masks():
  model, variables = golden_model("stdit1_tiny")
  with pytest.raises(ValueError, match="no frame masks"):
    model.apply(variables, *denoisers.example_inputs(model.config), x_mask=jnp.ones((1, 1), bool))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_heads": 5}, "multiples of num_heads=5"),
    ({"num_heads": 32, "hidden_size": 1120}, "rotary embedding needs an even"),
    ({"hidden_size": 1122, "num_heads": 2}, "multiples of 4"),
    ({"dtype": "float64"}, "dtype is 'float64'; allowed: float32, bfloat16"),
    ({"remat": "some"}, "allowed: none, dots, full, offload"),
    ({"attention": "flash"}, "attention is 'flash'; allowed"),
    ({"compat": "latte"}, "allowed: None, open-sora"),
    ({"patch_size": (2, 2, 2)}, "first number must be 1"),
    ({"widht": 3}, "unknown field 'widht'; allowed: .*hidden_size"),
  ],
)
def test_bad_configurations_get_one_clear_line(changes, message):
  with pytest.raises(ValueError, match=message) as error:
    denoisers.get_config("STDiT3-XL/2", **changes)
  assert "\n" not in str(error.value)


def test_unknown_names_and_sizes_are_refused():
  with pytest.raises(ValueError, match="allowed: STDiT-XL/2"):
    denoisers.get_config("STDiT4")
  with pytest.raises(ValueError, match="multiples of 3"):
    denoisers.get_config("STDiT2-XL/2", hidden_size=64, num_heads=2)
  assert dataclasses.is_dataclass(denoisers.get_config("STDiT3-3B/2", scan=False))
