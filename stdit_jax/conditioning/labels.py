"""Class labels: one whole number per sample, the column `label` of a table.

The model's configuration has `num_classes`. Its table of embeddings has one more row, with index `num_classes`, for "no class".
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from stdit_jax.parallel.shardings import ArraySpec


class Labels:
  """The conditioner of labels (conditioning/__init__.py). It encodes nothing."""

  name, from_files, ahead, encoder = "labels", (), False, None

  def __init__(self, config, family, model_config):
    self.family, self.num_classes = family.name, model_config.num_classes

  def init(self, key: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return {}, {}

  def worker(self, cached: bool) -> Callable:
    return _label  # also if latents come from a cache: only the table holds the labels

  def specs(self, rows: int) -> dict[str, ArraySpec]:
    return {"label": ArraySpec((rows,), jnp.int32)}

  def collate(self, samples: Sequence[Any]) -> dict[str, np.ndarray]:
    return {"label": np.asarray([s.cond["label"] for s in samples], np.int32)}

  def encode(self, weights: Any, arrays: Mapping[str, Any], layout: Any = None) -> Mapping[str, Any]:
    return arrays

  def is_cached(self, folder: str | None) -> bool:
    return False

  def prompts(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """A prompt is the number of a class. Raises ValueError for anything else."""
    for text in texts:
      if not text.isdecimal() or int(text) >= self.num_classes:
        raise ValueError(f"prompt {text!r}: {self.family} takes the number of a class, 0 to {self.num_classes - 1}")
    return {"label": np.asarray([int(text) for text in texts], np.int32)}

  def encoder_flops(self, rows: int | float) -> int:
    return 0


def _label(caption, label):
  return {"label": np.int32(0 if label is None else label)}  # None: a row that could not be read, of weight 0
