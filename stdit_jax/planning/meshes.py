"""The meshes that `plan --suggest-mesh` tries."""

import math
from typing import Any

from stdit_jax.parallel.mesh import AXES

TILE = 16  # rows of a bfloat16 tile. XLA scatters a gradient only in whole tiles (parallel/shardings.py)
MOST_FSDP = 64
SEQUENCE = (1, 2, 4, 8, 16)


def sensible_meshes(chips: int, width: int) -> list[dict[str, int]]:
  """Meshes of `chips` devices that are worth a compilation: [{axis: size}].

  `fsdp` is 4 to 64 and divides `width`, into whole tiles if possible. `sequence` is a power of two up to 16, and `data` is the
  rest. `tensor` stays 1: it moves activations in each block, which costs more than it saves for these widths.
  """
  divide = [d for d in range(min(4, chips), MOST_FSDP + 1) if chips % d == 0 and width % d == 0] or [1]
  fsdp = [d for d in divide if width % (d * TILE) == 0] or divide
  return [dict(zip(AXES, (chips // f // s, f, s, 1))) for f in fsdp for s in SEQUENCE if (chips // f) % s == 0]


def with_mesh(config: dict[str, Any], mesh: dict[str, int]) -> dict[str, Any]:
  """The configuration (plain values) with this mesh for each slice."""
  return {**config, "mesh": {**config["mesh"], **mesh}}


def nearest_batch(rows: int, chips: int) -> int:
  """The smallest batch of at least `rows` samples that every mesh of `chips` devices can split."""
  return math.ceil(rows / chips) * chips
