"""Meshes that make sense on a topology, to be tried and ranked."""

import math

from stdit_jax.parallel.mesh import AXES
from stdit_jax.training.checkpoints import from_plain, plain

TILE = 16  # rows of a bfloat16 tile: parts of that many are scattered, others summed everywhere (parallel/shardings.py)
MOST_FSDP = 64
SEQUENCE = (1, 2, 4, 8, 16)


def sensible_meshes(chips, width):
  """Meshes of `chips` devices worth trying: [{axis: size}].

  `fsdp` from 4 to 64 where it divides `width`, and into whole tiles if any does, `sequence` in powers of two up to 16, the rest
  `data`. No `tensor`: it moves activations in every block, which for these widths costs more than it saves.
  """
  divide = [d for d in range(min(4, chips), MOST_FSDP + 1) if chips % d == 0 and width % d == 0] or [1]
  fsdp = [d for d in divide if width % (d * TILE) == 0] or divide
  return [
    dict(zip(AXES, (chips // f // s, f, s, 1))) for f in fsdp for s in SEQUENCE if (chips // f) % s == 0
  ]  # fmt: skip


def with_mesh(config, mesh):
  """The configuration (plain values) with this mesh within a slice."""
  config = from_plain(config)
  config.mesh.update(mesh)
  return plain(config)


def nearest_batch(rows, chips):
  """The batch of at least `rows` samples that divides on every mesh of so many chips."""
  return math.ceil(rows / chips) * chips
