"""Named models, the layouts of their files, and the key tables of published sizes in this package."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from data.paths import Path
from stdit_jax.autoencoders.registry import AUTOENCODERS
from stdit_jax.interop.mapping import CheckpointLayout
from stdit_jax.interop.weights import LAYOUTS
from stdit_jax.models import t5
from stdit_jax.models.family import families, find_family

KEY_TABLES = {
  "STDiT-XL/2": "stdit_xl2_v1_0.json",
  "STDiT2-XL/2": "stdit2_xl2_v1_1.json",
  "STDiT3-XL/2": "stdit3_xl2_v1_2.json",
  "STDiT3-3B/2": "stdit3_3b2_v1_2.json",
  "open-sora-1.2": "vae_pipeline_v1_2.json",
  "cogvideox-2b": "cogvideox_vae.json",
  "cogvideox-5b": "cogvideox_vae.json",
}


def described(metadata: dict, path: Path) -> tuple[str | None, dict]:
  """(name, fields) of the model that the metadata of one of our files describes. (None, {}) if they describe none.

  Raises:
    ValueError: the description is damaged.
  """
  if not {"model", "config"} <= set(metadata):
    return None, {}
  with contextlib.suppress(ValueError):
    if isinstance(found := json.loads(metadata["config"]), dict):
      return metadata["model"], found
  raise ValueError(f"{path}: its own description of the model's config is damaged; give --model")


@dataclasses.dataclass(frozen=True)
class NamedModel:
  """A named model, as conversion needs it."""

  part: str  # of a training run: "denoiser", "text_encoder" or "autoencoder"
  config: Any
  init_shapes: Callable[[Any], dict]  # config -> tree of shapes
  layouts: tuple  # of its files, the usual one first

  @property
  def layout_names(self) -> list[str]:
    return [getattr(layout, "name", layout) for layout in self.layouts]

  def layout(self, name: str) -> str | CheckpointLayout:
    """The layout of this name, if the model brings it. Else the name, which is a key of LAYOUTS."""
    return dict(zip(self.layout_names, self.layouts)).get(name, name)

  @property
  def shapes(self) -> dict:
    """The tree of the model's variables as shapes; nothing is allocated."""
    return self.init_shapes(self.config)


def _named(name: str, overrides: Mapping) -> list[NamedModel]:
  """Every model of this name: a denoiser and an encoder may share one."""
  found = []
  if ":" in name or any(name in family.sizes for family in families()):
    family, size = find_family(name)
    found.append(NamedModel("denoiser", family.get_config(size, **overrides), family.init_shapes, family.layouts))
  for family in AUTOENCODERS:
    if name in family.table:
      found.append(NamedModel("autoencoder", family.get_config(name, **overrides), family.init_shapes, family.layouts))
  if name in t5.TABLE:
    found.append(NamedModel("text_encoder", t5.get_config(name, **overrides), t5.init_shapes, t5.LAYOUTS))
  return found


def find_model(name: str, overrides: Mapping, layouts: Collection[str] = (), part: str | None = None) -> NamedModel:
  """A named model with fields of its configuration replaced.

  Args:
    layouts: names of layouts that the model must have.
    part: as in `NamedModel`. `layouts` and `part` choose between models that share a name.

  Raises:
    ValueError: an unknown name, layout or field. The message names the allowed ones.
  """
  named = _named(name, overrides)
  known = {*LAYOUTS, *(name for model in named for name in model.layout_names)}
  if unknown := [layout for layout in layouts if layout not in known]:
    raise ValueError(f"unknown layout {unknown[0]!r}; allowed: {', '.join(sorted(known))}")
  found = [m for m in named if part in (None, m.part) and set(layouts) <= set(m.layout_names)]
  if len(found) != 1:
    what = "no model" if not found else "more than one model"
    which = f" with layout {' and '.join(layouts)}" if layouts else ""
    tables = [family.sizes for family in families()] + [family.table for family in AUTOENCODERS] + [t5.TABLE]
    raise ValueError(f"{what}{which} is called {name!r}; known: {', '.join(name for table in tables for name in table)}")
  return found[0]


def read_key_table(path: Path) -> dict[str, tuple[int, ...]]:
  """{name: shape} of a key table: JSON with the names and shapes under `tensors`, or at the top."""
  try:
    table = json.loads(pathlib.Path(path).read_text())
    return {name: tuple(shape) for name, shape in table.get("tensors", table).items()}
  except (OSError, ValueError, AttributeError, TypeError) as error:
    raise ValueError(f"{path}: not a key table (JSON of names and shapes): {error}") from None


def shipped_key_table(name: str) -> dict[str, tuple[int, ...]] | None:
  """Names and shapes in the original's file for a published model, or None for other models."""
  file = KEY_TABLES.get(name)
  return read_key_table(pathlib.Path(__file__).parent / "keys" / file) if file else None
