"""Reads and writes checkpoints of PyTorch projects (safetensors). Tables describe their names and axes (mapping.py)."""

from stdit_jax.interop.mapping import CheckpointLayout
from stdit_jax.interop.safetensors_io import CheckpointError, open_checkpoint, write_checkpoint
from stdit_jax.interop.weights import export_tensors, foreign_spec, load_variables, model_metadata, open_source, save_variables

__all__ = [
  "CheckpointError", "CheckpointLayout", "export_tensors", "foreign_spec", "load_variables", "model_metadata",
  "open_checkpoint", "open_source", "save_variables", "write_checkpoint",
]  # fmt: skip
