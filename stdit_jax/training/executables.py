"""Compiled programs of one process's own devices: compiled once, run on each device, and kept in files between starts.

On a slice of v5e, libtpu compiles programs for one device or for all devices of all hosts, not for those of one host ("On
platforms with limited ICI routing device assignment should include all slice devices"). So the program of a host is a program
of one device, which every device of the host loads.

JAX's cache does not serve these programs: only process 0 writes to it, and on a TPU its keys contain the device. A file is as
dangerous as that cache, since both hold machine code. Nobody but the user may write to the folder.
"""

import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import sys
import uuid
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxlib import xla_client

import stdit_jax
from data import paths
from data.shards import digest
from stdit_jax.training import counter

_PACKAGES = ("jax", "jaxlib", "flax", "libtpu", "jax-cuda12-plugin")
_SOURCES = ("autoencoders", "parallel")  # folders of stdit_jax whose code the programs run


@dataclasses.dataclass(frozen=True)
class OwnProgram:
  """A program for each device of this process.

  Attributes:
    name, kind: name of the program and of its kind, for messages.
    what: value for JSON that, with the code and the devices, determines the program.
    lower: `(device, name) -> Lowered` for this device. JAX reports the program by `name`. No argument may be unused, or else
      must be kept (`keep_unused`).
    outputs: a tree like the result.
  """

  name: str
  kind: str
  what: Any
  lower: Callable[[Any, str], jax.stages.Lowered]
  outputs: Any


class Loaded:
  """A program on each device of this process."""

  def __init__(self, executables: list, outputs: Any):
    self._executables, self._outputs = executables, jax.tree.structure(outputs)

  def __call__(self, number: int, *args: Any) -> Any:
    """Starts the program on the local device with this number, which holds the arguments."""
    results = self._executables[number].execute_sharded(jax.tree.leaves(args)).disassemble_into_single_device_arrays()
    return self._outputs.unflatten(array for (array,) in results)


class Executables:
  """The programs in the files of a folder. `folder=None`: nothing is stored or found."""

  def __init__(self, folder: str | None):
    self._folder = folder

  @classmethod
  def beside_jax(cls) -> "Executables":
    """Files beside JAX's compilation cache; none if that cache is off."""
    place: str | None = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009 - type checkers do not know it
    return cls(place and paths.join(place, "own_devices"))

  def _path(self, program):
    return paths.join(self._folder, f"{digest([program.what, _environment()])}.bin") if self._folder else ""

  def has(self, program: OwnProgram) -> bool:
    return bool(path := self._path(program)) and paths.exists(path)

  def load(self, program: OwnProgram) -> Loaded | None:
    """The program from its file, or None if no file can be used."""
    if not self.has(program):
      return None
    try:
      data = zlib.decompress(paths.read_bytes(self._path(program)))
      return Loaded([_on_device(data, device) for device in jax.local_devices()], program.outputs)
    except (OSError, zlib.error, jax.errors.JaxRuntimeError) as error:
      _warn(f"{self._path(program)} can't be used, so its program is compiled again: {error}")
      return None

  def compile(self, program: OwnProgram) -> Loaded:
    """Compiles the program once, stores it, and loads it for each device."""
    first, *others = jax.local_devices()
    # A new name keeps the program out of JAX's cache: XLA can't serialize again what came from a file.
    new = f"{counter.UNIQUE}{uuid.uuid4().hex[:8]}"
    compiled = program.lower(first, program.name + new).compile().runtime_executable()
    try:
      data = first.client.serialize_executable(compiled)
      loaded = [compiled, *(_on_device(data, device) for device in others)]
    except (ValueError, jax.errors.JaxRuntimeError) as error:
      _warn(f"{program.name} can't be shared by devices, so it is compiled for each of them: {error}")
      lowered = [program.lower(device, f"{program.name} for {device}{new}") for device in others]
      return Loaded([compiled, *(one.compile().runtime_executable() for one in lowered)], program.outputs)
    if self._folder:
      try:
        with paths.whole(self._path(program)) as path:
          pathlib.Path(path).write_bytes(zlib.compress(data, 1))
      except OSError as error:
        _warn(f"{self._path(program)} can't be written, so a restart compiles it again: {error}")
    return Loaded(loaded, program.outputs)


def _warn(text):
  print(f"warning: {text}", file=sys.stderr, flush=True)


def _on_device(data, device):
  options = xla_client.CompileOptions()
  options.device_assignment = xla_client.DeviceAssignment.create(np.array([[device.id]]))
  return device.client.deserialize_executable(data, [device], options)


@functools.cache
def _environment():
  """Everything besides its description that a program depends on."""
  device = jax.local_devices()[0]
  versions = {name: importlib.metadata.version(name) for name in _PACKAGES if _installed(name)}
  root = pathlib.Path(stdit_jax.__file__).parent
  sources = [path.read_text() for folder in _SOURCES for path in sorted((root / folder).glob("*.py"))]
  return {
    "device": device.device_kind, "platform": device.client.platform_version, "versions": versions, "sources": digest(sources),
    "flags": {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")},
    "precision": getattr(jax.config, "jax_default_matmul_precision"),  # noqa: B009 - type checkers do not know it
  }  # fmt: skip


def _installed(name):
  try:
    return bool(importlib.metadata.version(name))
  except importlib.metadata.PackageNotFoundError:
    return False
