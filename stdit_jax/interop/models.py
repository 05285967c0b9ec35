"""Which models there are by name, whose layouts they have, and which key tables of the real sizes ship with us."""

import importlib
import json
import pathlib

# module with TABLE and get_config -> layouts of its files, the usual one first
FAMILIES = {
  "stdit_jax.models.stdit": ("open-sora", "native"),
  "stdit_jax.autoencoders.image_kl": ("diffusers", "ldm", "native"),
  "stdit_jax.autoencoders.temporal": ("open-sora-vae", "native"),
  "stdit_jax.autoencoders.causal3d": ("cogvideox-vae", "native"),
  "stdit_jax.models.t5": ("t5", "t5-v1.0", "native"),
}
# part of a training run -> layout by which its models are told from others of equal name
LAYOUTS = {"denoiser": ("open-sora",), "autoencoder": (), "text_encoder": ("t5",)}
KEY_TABLES = {
  "STDiT-XL/2": "stdit_xl2_v1_0.json",
  "STDiT2-XL/2": "stdit2_xl2_v1_1.json",
  "STDiT3-XL/2": "stdit3_xl2_v1_2.json",
  "STDiT3-3B/2": "stdit3_3b2_v1_2.json",
  "open-sora-1.2": "vae_pipeline_v1_2.json",
  "cogvideox-2b": "cogvideox_vae.json",
  "cogvideox-5b": "cogvideox_vae.json",
}


def described(metadata: dict, path) -> tuple[str | None, dict]:
  """(name, fields) of the model that one of our own files says it holds; (None, {}) of a file that says nothing.

  Raises:
    ValueError: a description that is damaged.
  """
  if not {"model", "config"} <= set(metadata):
    return None, {}
  try:
    found = json.loads(metadata["config"])
    if isinstance(found, dict):
      return metadata["model"], found
  except ValueError:
    pass
  raise ValueError(f"{path}: its own description of the model's config is damaged; give --model")


def find_model(name: str, overrides: dict, layouts=()) -> tuple[object, str]:
  """(config, module name) of a named model with fields replaced.

  Args:
    layouts: layouts in play; narrow the search where two families use a name.
  Raises:
    ValueError naming the allowed names or fields.
  """
  known, found = [], []
  for module_name, own in FAMILIES.items():
    if any(layout not in own for layout in layouts):
      continue
    table = importlib.import_module(module_name).TABLE
    known += table
    found += [module_name] if name in table else []
  if len(found) != 1:
    what = "no model" if not found else "more than one model"
    which = f" with layout {' and '.join(layouts)}" if layouts else ""
    raise ValueError(f"{what}{which} is called {name!r}; known: {', '.join(known)}")
  module = importlib.import_module(found[0])
  return module.get_config(name, **overrides), found[0]


def shapes(config, module_name: str):
  """The tree of the model's variables as shapes; nothing is allocated."""
  return importlib.import_module(module_name).init_shapes(config)


def read_key_table(path) -> dict[str, tuple[int, ...]]:
  """{name: shape} of a key table: JSON with the names and shapes under `tensors`, or at the top."""
  try:
    table = json.loads(pathlib.Path(path).read_text())
    return {name: tuple(shape) for name, shape in table.get("tensors", table).items()}
  except (OSError, ValueError, AttributeError, TypeError) as error:
    raise ValueError(f"{path}: not a key table (JSON of names and shapes): {error}") from None


def shipped_key_table(name: str) -> dict[str, tuple[int, ...]] | None:
  """The original's names and shapes of a model of a real size, or None."""
  file = KEY_TABLES.get(name)
  return read_key_table(pathlib.Path(__file__).parent / "keys" / file) if file else None
