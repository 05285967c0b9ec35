"""Fresh denoisers have the published names, shapes and counts, and the original initialisation of every weight."""

import math

import jax
import numpy as np
import pytest

from stdit_jax.interop import export_tensors, foreign_spec
from tests import denoisers
from tests.helpers import load_json

KEYS = {
  "STDiT-XL/2": "stdit_xl2_v1_0",
  "STDiT2-XL/2": "stdit2_xl2_v1_1",
  "STDiT3-XL/2": "stdit3_xl2_v1_2",
  "STDiT3-3B/2": "stdit3_3b2_v1_2",
}
SIZES = {"hidden_size": 96, "depth": 3, "num_heads": 4, "caption_channels": 64, "model_max_length": 20}
CONFIGS = {
  "STDiT": denoisers.STDiT1Config(**SIZES),
  "STDiT2": denoisers.STDiT2Config(**SIZES),
  "STDiT3": denoisers.STDiT3Config(**SIZES),
}


@pytest.mark.parametrize("name", KEYS)
def test_published_sizes_have_the_original_names_shapes_and_counts(name):
  table = load_json(f"keys/{KEYS[name]}.json")
  config = denoisers.get_config(name)
  shapes = denoisers.init_shapes(config)
  assert foreign_spec("open-sora", shapes, config) == {key: tuple(shape) for key, shape in table["tensors"].items()}
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"])) == table["parameters_trainable"]


def expected(name, weight, version, sizes):
  """The initialisation of a weight by its original name: ("normal", std), ("uniform", bound) or ("constant", value).

  Open-Sora 1.0, 1.1: `initialize_weights` of stdit.py and stdit2.py; 1.2: of stdit3.py.
  """
  fan_in = math.prod(weight.shape[1:])
  xavier = "uniform", math.sqrt(6 / (fan_in + weight.shape[0]))
  normal, zero = ("normal", 0.02), ("constant", 0.0)
  if "scale_shift_table" in name:
    return "normal", sizes["hidden_size"] ** -0.5
  if name == "y_embedder.y_embedding":
    return "normal", sizes["caption_channels"] ** -0.5
  if "norm" in name:
    return "constant", 1.0
  if name.startswith("x_embedder"):
    return ("uniform", 16**-0.5) if version == 3 or name.endswith("bias") else xavier
  if name.endswith("bias"):
    return zero
  if version == 3:
    if name == "fps_embedder.mlp.0.weight":
      return normal
    zeroed = ("attn.proj.weight", "cross_attn.proj.weight", "mlp.fc2.weight")
    is_zero = name == "fps_embedder.mlp.2.weight" or (name.startswith("temporal_blocks") and name.endswith(zeroed))
    return zero if is_zero else xavier
  if name.startswith(("t_embedder", "t_block", "y_embedder.y_proj")):
    return normal
  return zero if name.endswith(("cross_attn.proj.weight", "attn_temp.proj.weight", "final_layer.linear.weight")) else xavier


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_starts_as_in_the_original(name):
  config, version = CONFIGS[name], {"STDiT": 1, "STDiT2": 2, "STDiT3": 3}[name]
  variables = jax.jit(denoisers.init, static_argnums=0)(config, jax.random.key(3))
  seen = {}
  for key, weight in export_tensors("open-sora", variables, config):
    if key.startswith(("rope", "pos_embed")):
      continue
    kind, size = expected(key, weight, version, SIZES)
    error = 5 / math.sqrt(weight.size)  # about five standard errors of a standard deviation
    if kind == "constant":
      assert np.all(weight == size), key
    elif kind == "uniform":
      assert np.abs(weight).max() <= size, key
      assert np.abs(weight).max() > size * (1 - 10 / weight.size), key
      assert abs(weight.std() / (size / math.sqrt(3)) - 1) < error, key
    else:
      assert abs(weight.std() / size - 1) < error, key
      assert abs(weight.mean()) < error * size, key
      assert np.abs(weight).max() > 1.5 * size, key
    if kind != "constant":
      layers = seen.setdefault(weight.shape, [])
      assert not any(np.array_equal(weight, other) for other in layers), f"{key} repeats another weight"
      layers.append(weight)


def test_constants_match_the_original():
  shapes = denoisers.init_shapes(denoisers.get_config("STDiT3-XL/2"))
  assert {k: v.shape for k, v in shapes["constants"].items()} == {"null_caption": (300, 4096), "rope_frequencies": (36,)}
