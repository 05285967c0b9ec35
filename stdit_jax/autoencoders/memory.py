"""The memory of one device: how much is free, and how an autoencoder fits into it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from data.read_ahead import available_memory

GIB = 2**30


def free_memory() -> int | None:
  """Free bytes of one device, None if unknown."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() if device.platform != "cpu" else None
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
  return available_memory()


def tile_pixels(codec: Any, size: Sequence[int]) -> str:
  """Height and width of the tiles of a codec in pixels, in words. `size`: (h, w) of the whole latents."""
  return " x ".join(str(min(pair) * codec.config.downsampling) for pair in zip((codec.tiles.height, codec.tiles.width), size))


def check_fits(what: str, weights: float, needed: float, budget: float | None, how: str) -> str:
  """The memory of each device for `what`, in words. Raises ValueError if a device has too little.

  Args:
    weights, needed: bytes of the weights, and of the largest program beside them.
    budget: bytes that `needed` may take. None: unknown.
    how: what the user can do about too little memory.
  """
  text = f"memory of each device for {what}: {(weights + needed) / GIB:.2f} GiB (weights {weights / GIB:.2f})"
  if budget is not None and needed > budget:
    raise ValueError(f"{text}; allowed beside the weights are {max(0.0, budget) / GIB:.2f} GiB. {how}")
  return text


def halve_to_fit(needed: Callable[[int], float], count: int, budget: float) -> tuple[int, float]:
  """-> (`count`, halved until `needed(count)` bytes fit into the budget; these bytes). A count of 1 may still need too much."""
  while (size := needed(count)) > budget and count > 1:
    count //= 2
  return count, size
