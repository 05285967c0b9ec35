"""Latents <-> tokens: the one patchify of the project, for NumPy arrays on the host and JAX arrays on the device.

Tokens are `[..., time, space, patch values]`. Space runs over rows, then columns (columns fastest). The values of one patch
have the order (patch time, patch row, patch column, channel), channels fastest. The Open-Sora models write their output in this
order. `patchify` pads latents with zeros at the end of each axis (bottom, right, last) to whole patches, as Open-Sora 1.1 and
1.2 do (`PatchEmbed3D`).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import einops
import numpy as np


def grid_size(latent_size: Iterable[int], patch_size: Sequence[int] = (1, 2, 2)) -> tuple[int, ...]:
  """Size of the token grid (T, rows, columns) for latents of size (time, height, width)."""
  return tuple(-(-n // p) for n, p in zip(latent_size, patch_size, strict=True))


def patchify(latents: Any, patch_size: Sequence[int] = (1, 2, 2)) -> Any:
  """Turns latents `[..., T, H, W, C]` into tokens `[..., T', rows * columns, pt * ph * pw * C]`."""
  *batch, t, h, w, _ = latents.shape
  pt, ph, pw = patch_size
  t_grid, rows, columns = grid_size((t, h, w), patch_size)
  pad = [(0, t_grid * pt - t), (0, rows * ph - h), (0, columns * pw - w), (0, 0)]
  if any(after for _, after in pad):
    xp = np if isinstance(latents, np.ndarray) else latents.__array_namespace__()
    latents = xp.pad(latents, [(0, 0)] * len(batch) + pad)
  return einops.rearrange(latents, "... (t pt) (h ph) (w pw) c -> ... t (h w) (pt ph pw c)", pt=pt, ph=ph, pw=pw)


def unpatchify(tokens: Any, latent_size: Sequence[int], patch_size: Sequence[int] = (1, 2, 2)) -> Any:
  """Turns tokens `[..., T', S, pt * ph * pw * C]` into latents `[..., T, H, W, C]`. S may contain padding at its end."""
  pt, ph, pw = patch_size
  t_grid, rows, columns = grid_size(latent_size, patch_size)
  tokens = tokens[..., :t_grid, : rows * columns, :]
  latents = einops.rearrange(
    tokens, "... t (h w) (pt ph pw c) -> ... (t pt) (h ph) (w pw) c", h=rows, w=columns, pt=pt, ph=ph, pw=pw
  )
  t, h, w = latent_size
  return latents[..., :t, :h, :w, :]
