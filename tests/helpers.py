"""Loads reference values of the original PyTorch modules, converts their layouts and compares them."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from stdit_jax.models.layers import even_frequencies
from tests import denoisers

REFERENCE = pathlib.Path(__file__).parent / "reference" / "open_sora"

# Fields of the originals' constructors that our configurations lack. All released models have the same value.
_NOT_OURS = {"class_dropout_prob"}
_CONFIGS = {"stdit1_tiny": denoisers.STDiT1Config, "stdit2_tiny": denoisers.STDiT2Config, "stdit3_tiny": denoisers.STDiT3Config}

# For `jax.jit(compiler_options=...)`: the optimisation that users get. Other tests have less (tests/conftest.py).
CPU = os.environ.get("JAX_PLATFORMS", "cpu") == "cpu"
SHIPPED = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True} if CPU else {}


def load_json(name):
  return json.loads((REFERENCE / name).read_text())


def load_golden(name):
  """Returns (dict of NumPy arrays, metadata with parsed JSON values) of `<name>.safetensors`."""
  with safe_open(REFERENCE / f"{name}.safetensors", "numpy") as f:
    metadata = {}
    for key, value in (f.metadata() or {}).items():
      try:
        metadata[key] = json.loads(value)
      except json.JSONDecodeError:
        metadata[key] = value
    return {key: f.get_tensor(key) for key in f.keys()}, metadata  # noqa: SIM118


def load_golden_model(name, **overrides):
  """Returns (model, variables) of `stdit1_tiny`, `stdit2_tiny` or `stdit3_tiny` with the reference weights."""
  from stdit_jax.interop import load_variables

  _, metadata = load_golden(name)
  arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in metadata["constructor"].items() if k not in _NOT_OURS}
  config = _CONFIGS[name](**{**arguments, **overrides})
  path = REFERENCE / f"{name}.safetensors"
  # A model without norms of queries and keys does not use their weights. That is no error here.
  strict = overrides.get("qk_norm", True)
  shapes, quiet = denoisers.init_shapes(config), lambda message: None
  variables = load_variables(path, "open-sora", shapes, config=config, strict=strict, log=quiet)
  return denoisers.build(config), variables


def random_variables(config, seed=0):
  """Variables of a denoiser with random values for all parameters. An initial zero could hide an error."""
  shapes = denoisers.init_shapes(config)
  rng = np.random.default_rng(seed)
  draw = lambda s: jnp.asarray(rng.standard_normal(s.shape, np.float32) * (0.2 if len(s.shape) < 3 else 0.1))  # noqa: E731
  constants = {"null_caption": draw(shapes["constants"]["null_caption"])}
  if "rope_frequencies" in shapes["constants"]:
    constants["rope_frequencies"] = jnp.asarray(even_frequencies(config.head_dim))
  return {"params": jax.tree.map(draw, shapes["params"]), "constants": constants}


def to_ours(x):
  """NCTHW to channels last."""
  return jnp.moveaxis(jnp.asarray(x), 1, -1)


def to_theirs(x):
  """Channels last to NCTHW."""
  return np.moveaxis(np.asarray(x), -1, 1)


def relative_error(a, b):
  """max |a - b| / max |b|. The tolerances of the reference values are relative errors."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  assert a.shape == b.shape, f"{a.shape} != {b.shape}"
  return np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
