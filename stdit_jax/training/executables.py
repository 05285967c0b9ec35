"""Compiled programs of one process's own devices: compiled once, run on each device, and kept in files between starts.

On a large slice of v5e, libtpu compiles programs for one device or for all devices of all hosts, not for those of one host ("On
platforms with limited ICI routing device assignment should include all slice devices"). So the program of a host is a program
of one device, which every device of the host loads.

JAX's cache does not serve these programs: only process 0 writes to it, and on a TPU its keys contain the device. It does not
store them either: XLA can't serialize again what came from that cache. A file is as dangerous as the cache, since both hold
machine code. Nobody but the user may write to the folder.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import io
import os
import pathlib
import platform
import sys
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import config as jax_config  # no public name sets an option for one thread
from jaxlib import xla_client

import stdit_jax
from data import paths
from data.shards import digest

_PACKAGES = ("jax", "jaxlib", "flax", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
_SOURCES = ("autoencoders/*.py", "parallel/*.py", "training/clip_encoder.py")  # of stdit_jax: the code that the programs run
_OPTIONS = ("jax_default_matmul_precision", "jax_enable_x64", "jax_numpy_dtype_promotion")
_ERRORS = (OSError, ValueError, KeyError, zlib.error, zipfile.BadZipFile, jax.errors.JaxRuntimeError)  # of a file


@dataclasses.dataclass(frozen=True)
class OwnProgram:
  """A program for each device of this process.

  Attributes:
    name, kind: name of the program and of its kind, for messages.
    what: value for JSON that, with the code and the devices, determines the program.
    lower: `(device, name) -> Lowered` for this device. JAX reports the program by `name`. The program keeps unused arguments
      (`keep_unused`), because `Loaded` passes all of them.
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
  """The programs in the files of a folder. `folder=None`: nothing is stored or found.

  A file holds one executable, which each device loads, or one for each device of this process.
  """

  def __init__(self, folder: str | None):
    self._folder = folder or ""

  @classmethod
  def beside_jax(cls) -> "Executables":
    """Files beside JAX's compilation cache; none if that cache is off."""
    place: str | None = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009 - type checkers do not know it
    return cls(place and paths.join(place, "own_devices"))

  def _path(self, program, *devices):
    """The file of a program, or of its programs for these devices alone."""
    return paths.join(self._folder, f"{digest([program.what, _environment(), *(d.id for d in devices)])}.npz")

  def _found(self, program):
    """The file of a program. "" if there is none."""
    for devices in ((), jax.local_devices()) if self._folder else ():
      if paths.exists(path := self._path(program, *devices)):
        return path
    return ""

  def has(self, program: OwnProgram) -> bool:
    """Whether a file exists. False if the folder can't be read."""
    try:
      return bool(self._found(program))
    except OSError:
      return False

  def load(self, program: OwnProgram) -> Loaded | None:
    """The program from its file, or None if no file can be used."""
    path = self._folder
    try:
      if not (path := self._found(program)):
        return None
      with np.load(io.BytesIO(paths.read_bytes(path))) as file:
        stored = [zlib.decompress(file[name].tobytes()) for name in file.files]
      devices = jax.local_devices()
      return Loaded([_on_device(stored[i % len(stored)], device) for i, device in enumerate(devices)], program.outputs)
    except _ERRORS as error:
      _warn(f"{path} can't be used, so {program.name} is compiled again: {error}")
      return None

  def compile(self, program: OwnProgram) -> Loaded:
    """Compiles the program once, stores it, and loads it for each device."""
    first, *others = jax.local_devices()
    made, path = [_compile(program.lower(first, program.name))], self._folder and self._path(program)
    stored = [first.client.serialize_executable(made[0])] if path or others else []
    try:
      loaded = made + [_on_device(stored[0], device) for device in others]
    except (ValueError, jax.errors.JaxRuntimeError) as error:
      _warn(f"{program.name} can't be shared by devices, so it is compiled for each of them: {error}")
      loaded = made + [_compile(program.lower(device, f"{program.name} for {device}")) for device in others]
      stored = [device.client.serialize_executable(one) for device, one in zip(jax.local_devices(), loaded)]
      path = self._folder and self._path(program, *jax.local_devices())
    if path:
      try:
        with paths.whole(path) as place, pathlib.Path(place).open("wb") as file:
          np.savez(file, *(np.frombuffer(zlib.compress(data, 1), np.uint8) for data in stored))
      except OSError as error:
        _warn(f"{path} can't be written, so a restart compiles {program.name} again: {error}")
    return Loaded(loaded, program.outputs)


def _compile(lowered):
  with jax_config.persistent_cache_min_compile_time_secs(1e9):  # JAX's cache would hold a second copy
    return lowered.compile().runtime_executable()


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
  sources = [path.read_text() for pattern in _SOURCES for path in sorted(root.glob(pattern))]
  return {
    "device": device.device_kind, "platform": device.client.platform_version, "versions": versions, "sources": digest(sources),
    "flags": {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")},
    "options": {name: getattr(jax.config, name) for name in _OPTIONS}, "cpu": _cpu() if device.platform == "cpu" else "",
  }  # fmt: skip


def _cpu():
  """The instructions that the CPU knows. A program for another CPU could end the process."""
  with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
    return next((line for line in file if line.startswith(("flags", "Features"))), "")
  return platform.machine()


def _installed(name):
  try:
    return bool(importlib.metadata.version(name))
  except importlib.metadata.PackageNotFoundError:
    return False
