"""A denoiser family: all that the rest of the project knows about one published denoiser.

A family is one file: a frozen configuration, a linen module and a `FAMILY` record. The families of this package are in models/.
Any other module that Python can import may hold a family, too. The project asks the record, never the type of the model.

The module is called as `model.apply(variables, tokens, t, cond, sizes, x_mask=None, valid=None)`:

  tokens   noisy latents `[B, T, S, P]`; P values of a patch, ordered (time, row, column, channel)
  t        timesteps `[B]`, 0 (clean) to 1000 (noise), need not be whole
  cond     the output of the conditioner, a dict of arrays (`Family.cond`)
  sizes    {"grid": int32 `[B, 3]`, token grid (T, rows, columns); "height", "width": pixels `[B]`; "num_frames": pixel frames
           `[B]`; "fps": `[B]`}
  x_mask   bool `[B, T]`, True = frame to generate, False = clean frame; None = generate all. Only if `supports.frame_masks`.
  valid    bool `[B, T, S, P]`, False for padding; None = all values are valid. Padding never changes a valid result.

It returns float32 `[B, T, S, patch positions * out_channels]`. Its configuration has the fields or properties `patch_size`,
`in_channels`, `out_channels`, `hidden_size`, `depth`, `dtype` and `remat`.
"""

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from data.tokens import grid_size
from stdit_jax import fields
from stdit_jax.parallel.shardings import Layout

SCALARS = ("height", "width", "num_frames", "fps")


@dataclasses.dataclass(frozen=True)
class Supports:
  """Abilities of a family beyond denoising."""

  frame_masks: bool = False  # the model takes `x_mask` (image to video, extension, masks in training)
  step_cache: bool = False  # the model takes `reuse` and has `cache_specs` (models/step_cache.py)


@dataclasses.dataclass(frozen=True)
class Family:
  """One published denoiser.

  Attributes:
    name: for messages.
    sizes: {name: configuration}, e.g. "STDiT3-XL/2".
    build: `(config, layout) -> nn.Module`. A layout of None means one device.
    condition: its conditioner, a key of `conditioning.CONDITIONERS`.
    cond: `(config, rows) -> {name: ShapeDtypeStruct}`, the model input `cond` of a batch of `rows`. Batches have these dtypes.
    null: `(config, constants, cond) -> cond`, the unconditional branch; `constants` is the model's collection of that name.
    rules: sharding rules of the parameters (`parallel.shardings.spec_for`).
    flops: `(config, frames, space) -> FLOPs` of one forward pass over one sample of `frames * space` tokens.
    layouts: checkpoint layouts of its files, the usual one first: names (`interop.weights.LAYOUTS`) or objects.
    stacks: parameters whose leading axis is the depth.
    resizable: constants whose first axis may change between training stages. If it grows, the last row repeats.
    supports: see `Supports`.
  """

  name: str
  sizes: Mapping[str, Any]
  build: Callable[[Any, Layout | None], nn.Module]
  condition: str
  cond: Callable[[Any, int], dict]
  null: Callable[[Any, dict, dict], dict]
  rules: tuple
  flops: Callable[[Any, int, int], float]
  layouts: tuple = ("native",)
  stacks: tuple[str, ...] = ("blocks",)
  resizable: tuple[str, ...] = ()
  supports: Supports = Supports()

  def get_config(self, size: str, **overrides) -> Any:
    """The configuration of a size with some fields replaced. Raises ValueError naming the allowed sizes or fields."""
    return fields.replace(fields.choose(self.sizes, size, "denoiser"), overrides, f"denoiser {size}")

  def example(self, config: Any, rows: int = 1, frames: int = 1, side: int = 1) -> tuple:
    """Placeholder inputs (tokens, t, cond, sizes) of a call over `frames` token frames of `side * side` tokens."""
    ones = jnp.ones((rows,), jnp.float32)
    cond = {name: jnp.zeros(s.shape, s.dtype) for name, s in self.cond(config, rows).items()}
    grid = jnp.tile(jnp.asarray((frames, side, side), jnp.int32), (rows, 1))
    tokens = jnp.zeros((rows, frames, side * side, token_values(config)))
    return tokens, ones, cond, {"grid": grid, **dict.fromkeys(SCALARS, ones)}

  def init(self, config: Any, key: jax.Array) -> Any:
    """Variables {"params": ..., "constants": ... if the family has any} with the original initialisation."""
    return self.build(config, None).init(key, *self.example(config))

  def init_shapes(self, config: Any) -> dict:
    """The tree of `init` as shapes. Allocates nothing. Calls share one tree, so do not change it."""
    return _init_shapes(self.init, config)


@functools.cache
def _init_shapes(init, config):
  return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


OURS = ("stdit1", "stdit2", "stdit3")  # modules of this package with a FAMILY


def families() -> list[Family]:
  """All families of this package."""
  return [importlib.import_module(f"{__package__}.{name}").FAMILY for name in OURS]


def find_family(name: str) -> tuple[Family, str]:
  """The family of a denoiser, and the name of its size.

  Args:
    name: a size of this package ("STDiT3-XL/2"), or MODULE:SIZE of a module with a `FAMILY` ("my_models.mmdit:S").

  Raises:
    ValueError: the name is unknown. The message gives the allowed names.
  """
  module, colon, size = name.partition(":")
  if not colon:
    known = {size: family for family in families() for size in family.sizes}
    if name in known:
      return known[name], name
    raise ValueError(f"unknown denoiser {name!r}; allowed: {', '.join(known)}, or MODULE:SIZE of a module of yours")
  try:
    family = importlib.import_module(module).FAMILY
  except (ImportError, AttributeError) as error:
    raise ValueError(f"denoiser {name!r}: {module} is no module with a FAMILY ({error}); give MODULE:SIZE") from None
  if size not in family.sizes:
    raise ValueError(f"unknown denoiser {name!r}; {module} has {', '.join(f'{module}:{s}' for s in family.sizes)}")
  return family, size


def find_model(name: str, overrides: Mapping[str, Any]) -> tuple[Family, Any]:
  """The family and the configuration of a named denoiser. Raises ValueError naming the allowed names or fields."""
  family, size = find_family(name)
  return family, family.get_config(size, **overrides)


def token_values(config: Any) -> int:
  """P: values of one input token."""
  return math.prod(config.patch_size) * config.in_channels


def token_grid(config: Any, latent_size: Sequence | np.ndarray) -> tuple:
  """The token grid (T, rows, columns) of latents of size (T, H, W)."""
  return grid_size(latent_size, config.patch_size)
