"""Foreign checkpoints: PyTorch safetensors in and out, names and layouts as data."""

from stdit_jax.interop.mapping import Report
from stdit_jax.interop.safetensors_io import CheckpointError, SafetensorsFile, open_checkpoint, write_checkpoint
from stdit_jax.interop.weights import (
  LAYOUTS,
  export_tensors,
  foreign_spec,
  load_variables,
  model_metadata,
  open_source,
  save_variables,
)

__all__ = [
  "LAYOUTS",
  "CheckpointError",
  "Report",
  "SafetensorsFile",
  "export_tensors",
  "foreign_spec",
  "load_variables",
  "model_metadata",
  "open_checkpoint",
  "open_source",
  "save_variables",
  "write_checkpoint",
]
