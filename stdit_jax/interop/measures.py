"""Reads VGG16, the network for perceptual distances, from safetensors."""

import hashlib
from typing import Any

import numpy as np

from data import paths
from stdit_jax.autoencoders import perceptual
from stdit_jax.interop.safetensors_io import CheckpointError, open_checkpoint


def load_perceptual(name: str, path: paths.Path, sha256: str = "") -> dict:
  """The parameters of the trunk `name`, NumPy float32, as `perceptual.shapes` describes them.

  Other tensors of the file, like a classifier, are skipped.

  Raises:
    ValueError: the file has another SHA-256, holds another trunk, or lacks tensors.
  """
  shapes: dict[str, Any] = perceptual.shapes(name)
  if sha256 and (found := hashlib.sha256(paths.read_bytes(path)).hexdigest()) != sha256.lower():
    raise CheckpointError(f"{path} has the SHA-256 {found}, not {sha256}. Give the expected file or correct the SHA-256")
  file = open_checkpoint(path)
  if file.metadata.get("trunk", name) != name:
    raise ValueError(f"{path} holds the trunk {file.metadata['trunk']!r}, not {name!r}")

  def read(tensor, shape):
    if tensor not in file.tensors:
      raise ValueError(f"{path} has no tensor {tensor!r}; {name!r} needs VGG16 with torchvision's names, features.N.weight")
    if (found := file.tensors[tensor].shape) != shape:
      raise ValueError(f"{path}: {tensor!r} is {list(found)}; {name!r} needs {list(shape)}")
    return file.read(tensor).astype(np.float32)

  trunk = {}
  for number, (key, layer) in zip(perceptual.NUMBERS, shapes["trunk"].items()):
    y, x, before, after = layer["kernel"].shape
    kernel = read(f"features.{number}.weight", (after, before, y, x)).transpose(2, 3, 1, 0)
    trunk[key] = {"kernel": np.ascontiguousarray(kernel), "bias": read(f"features.{number}.bias", (after,))}
  if "heads" not in shapes:
    return {"trunk": trunk}
  heads = open_checkpoint(perceptual.HEADS)
  return {"trunk": trunk, "heads": {k: heads.read(f"lin{i}.model.1.weight").reshape(-1) for i, k in enumerate(shapes["heads"])}}
