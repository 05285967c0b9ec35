"""Compiled programs of one process's own devices, kept in files, so that a restart compiles none of them.

JAX's cache does not serve these programs: only process 0 writes to it, and on a TPU its keys contain the devices.

A file is as dangerous as the cache of JAX itself: both hold machine code. `jax.experimental.serialize_executable` reads it, so
nobody but the user may write to the folder.
"""

import functools
import importlib.metadata
import os
import pathlib
import zlib
from typing import Any

import jax
from jax.experimental import serialize_executable

import stdit_jax
from data import paths
from data.shards import digest

_PACKAGES = ("jax", "jaxlib", "flax", "libtpu", "jax-cuda12-plugin")
_SOURCES = ("autoencoders", "parallel")  # folders of stdit_jax whose code the programs run


class Executables:
  """The files of a folder. `folder=None`: nothing is stored or found."""

  def __init__(self, folder: str | None):
    self._folder = folder

  @classmethod
  def beside_jax(cls) -> "Executables":
    """Files beside JAX's compilation cache; none if that cache is off."""
    place: str | None = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009 - type checkers do not know it
    return cls(place and paths.join(place, "own_devices"))

  def path(self, what: Any) -> str:
    """The file of the program that `what` (a value for JSON) and this process's environment determine, or ""."""
    return paths.join(self._folder, f"{digest([what, _environment()])}.bin") if self._folder else ""

  def has(self, what: Any) -> bool:
    return bool(path := self.path(what)) and paths.exists(path)

  def load(self, what: Any, inputs: Any, outputs: Any) -> jax.stages.Compiled | None:
    """The program, or None if it has no file that can be loaded. `inputs`, `outputs`: trees like (args, kwargs), result."""
    if not self.has(what):
      return None
    try:
      trees = jax.tree.structure(inputs), jax.tree.structure(outputs)
      data = zlib.decompress(paths.read_bytes(self.path(what)))
      return serialize_executable.deserialize_and_load(data, *trees, execution_devices=jax.local_devices())
    except Exception as error:  # JAX raises many types; whatever it is, the program can be compiled again
      print(f"warning: {self.path(what)} can't be used, so its program is compiled again: {error}", flush=True)
      return None

  def save(self, what: Any, compiled: jax.stages.Compiled) -> None:
    if not self._folder:
      return
    try:
      data, _, _ = serialize_executable.serialize(compiled)
      with paths.whole(self.path(what)) as path:
        pathlib.Path(path).write_bytes(zlib.compress(data, 1))
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError, OSError) as error:
      print(f"warning: {self.path(what)} can't be written, so the next start compiles this program: {error}", flush=True)


@functools.cache
def _environment():
  """Everything besides its description that a program depends on."""
  devices = jax.local_devices()
  versions = {name: importlib.metadata.version(name) for name in _PACKAGES if _installed(name)}
  root = pathlib.Path(stdit_jax.__file__).parent
  sources = [path.read_text() for folder in _SOURCES for path in sorted((root / folder).glob("*.py"))]
  flags = {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
  return {
    "process": jax.process_index(), "devices": [[d.id, d.device_kind] for d in devices], "versions": versions,
    "platform": devices[0].client.platform_version, "sources": digest(sources), "flags": flags,
    "precision": getattr(jax.config, "jax_default_matmul_precision"),  # noqa: B009
  }  # fmt: skip


def _installed(name):
  try:
    return bool(importlib.metadata.version(name))
  except importlib.metadata.PackageNotFoundError:
    return False
