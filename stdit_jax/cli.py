"""Shared by the entry points: reads configurations, prints errors as one line, connects processes, sets caches and malloc."""

import argparse
import ast
import contextlib
import ctypes
import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import ml_collections

from data import paths
from data.command_line import flag, load_config, make_parser
from stdit_jax.fields import KINDS, is_of_type

T = TypeVar("T")


@contextlib.contextmanager
def one_line_errors(kinds: tuple[type[Exception], ...] = (ValueError, OSError)) -> Iterator[None]:
  """Prints a user's error as one line on stderr and exits with code 2. STDIT_JAX_TRACEBACK=1 shows the traceback instead.

  A device that runs out of memory also counts as a user's error.
  """
  try:
    yield
  except (*kinds, RuntimeError) as error:
    memory = isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)  # how JAX reports it
    if os.environ.get("STDIT_JAX_TRACEBACK") or not (memory or isinstance(error, kinds)):
      raise
    text = " ".join(str(error).split()) if not isinstance(error, ValueError) else str(error)
    if memory:
      said = str(error).splitlines()[0].rstrip(".")
      text = f"a device has too little memory: {said}. Use fewer frames or pixels, or more devices"
    print(f"error: {text}", file=sys.stderr)
    raise SystemExit(2) from None


@contextlib.contextmanager
def interruptible(what: str) -> Iterator[None]:
  """After ^C prints `what` and exits with code 130."""
  try:
    yield
  except KeyboardInterrupt:
    print(f"interrupted; {what}", file=sys.stderr)
    raise SystemExit(130) from None


def parse_with_changes(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
  """The arguments of a parser. `changes` holds the arguments that change a configuration, for `read_config`.

  A change is --config.KEY=VALUE or --config.KEY VALUE. For True and False also --config.KEY and --noconfig.KEY.
  """
  rest, own, changes = list(sys.argv[1:] if argv is None else argv), [], []
  while rest:
    argument = rest.pop(0)
    if not argument.startswith(("--config.", "--noconfig.")):
      own.append(argument)
      continue
    if argument.startswith("--config.") and "=" not in argument and rest and not rest[0].startswith("--"):
      argument += f"={rest.pop(0)}"
    changes.append(argument)
  args = parser.parse_args(own)
  args.changes = changes
  return args


@dataclasses.dataclass(frozen=True)
class ConfigSettings:
  """The flags that name a training configuration, for `read_config`."""

  config: str | None = flag("training configuration: file with get_config(), e.g. configs/quickstart.py", metavar="FILE")
  changes: Sequence[str] = flag("replaces one key, as in --config.data.workers=8", (), "--config.KEY", metavar="VALUE")


def parse_settings(kind: type[T], module: str, description: str | None, argv: Sequence[str] | None = None) -> T:
  """The settings of a command line: a dataclass of flags with a field `changes`. `module`: what `python -m` runs."""
  parser = make_parser(kind, f"python -m {module}", description, allow_abbrev=False)
  return kind(**vars(parse_with_changes(parser, argv)))


def check_positive(settings: Any, *names: str) -> None:
  """Raises ValueError for flags with numbers that are not positive."""
  for name in names:
    value = getattr(settings, name)
    if value is not None and not value > 0:
      allowed = "at least 1" if isinstance(value, int) else "above 0"
      raise ValueError(f"--{name.replace('_', '-')} is {value:g}; allowed: {allowed}")


def choose_stages(stages: Sequence[Any], names: Sequence[str] | None) -> list[Any]:
  """The stages with these names, by default all. Raises ValueError for an unknown name."""
  known = [stage.name for stage in stages]
  if unknown := sorted(set(names or ()) - set(known)):
    raise ValueError(f"--stage {unknown[0]!r} is none of {', '.join(known)}")
  return [stage for stage in stages if not names or stage.name in names]


def read_config(path: str | None, changes: Iterable[str] = ()) -> ml_collections.ConfigDict:
  """The configuration of a file, with the changes of the command line. No key can be added afterwards.

  Raises ValueError, with a message of one line, for an error in the file or in a change.
  """
  if not path:
    raise ValueError("give a configuration: --config configs/quickstart.py")
  config = load_config(path)
  if not isinstance(config, ml_collections.ConfigDict):
    raise ValueError(f"--config {path}: get_config() returns {type(config).__name__}; return an ml_collections.ConfigDict")
  config.lock()
  for argument in changes:
    _change(config, argument)
  return config


def _change(config: ml_collections.ConfigDict, argument: str) -> None:
  flag, equals, text = argument.partition("=")
  keys = flag.partition(".")[2].split(".")
  group: Any = config
  for i, key in enumerate(keys):
    if not isinstance(group, ml_collections.ConfigDict):
      raise ValueError(f"{argument}: {'.'.join(keys[:i])} is {group!r} and has no keys")
    if key not in group:
      near = difflib.get_close_matches(key, group, 1)
      hint = f"did you mean {'.'.join((*keys[:i], near[0]))!r}?" if near else "configs/base.py has all keys."
      hint += " --config.KEY=VALUE replaces an entry of `fields` only if the file sets this entry"
      raise ValueError(f"{argument}: there is no key {'.'.join(keys[: i + 1])!r}; {hint}")
    parent, group = group, group[key]
  if not equals:
    if not isinstance(group, bool):
      raise ValueError(f"{argument}: the value is missing; write {argument}=VALUE")
    text = "false" if flag.startswith("--no") else "true"
  try:
    parent[keys[-1]] = _value(text, group)
  except (ValueError, TypeError):
    like = group.to_dict() if isinstance(group, ml_collections.ConfigDict) else group
    kind = KINDS.get(type(like), "allowed")
    raise ValueError(f"{argument}: {text!r} is not {kind}; write a value like {like!r}") from None


_BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def _value(text: str, default: Any) -> Any:
  """Parses a text of the command line as a value of the type of `default`."""
  kind = type(default)
  if kind in (str, float):
    return kind(text)
  try:
    value = _BOOLEANS[text.lower()] if kind is bool else ast.literal_eval(text)
  except (KeyError, ValueError, SyntaxError):
    if kind in (tuple, list) and set(text) & set(", "):  # a tuple with a typo, not one string
      raise ValueError(text) from None
    value = text
  if kind is ml_collections.ConfigDict and isinstance(value, dict):
    return kind(value)
  if kind in (tuple, list):
    return kind(value) if isinstance(value, (tuple, list, set)) else kind((value,))
  if default is not None and not is_of_type(value, kind):
    raise ValueError(text)
  return value


def parse_mesh(entries: Sequence[str]) -> dict[str, int]:
  """{axis: devices} of arguments AXIS=DEVICES. Raises ValueError for any other form."""
  try:
    return {axis: int(size) for axis, size in (entry.split("=") for entry in entries)}
  except ValueError:
    raise ValueError(f"--mesh {' '.join(entries)}: give AXIS=DEVICES, e.g. data=-1 fsdp=4") from None


def connect_processes(heartbeat_timeout: int = 100, patience: int = 300) -> None:
  """Joins the processes of a run on several hosts. Call it before the first use of a device.

  STDIT_JAX_DISTRIBUTED=1: JAX itself finds the other processes (Cloud TPU, GKE, Slurm, Open MPI). Elsewhere
  STDIT_JAX_COORDINATOR (HOST:PORT of process 0), STDIT_JAX_NUM_PROCESSES and STDIT_JAX_PROCESS_ID describe the processes. The
  scripts in launch/ set them.

  Args:
    heartbeat_timeout: seconds of silence after which the runtime counts a process as lost and aborts the others.
    patience: seconds to wait for processes to start and to end. If they do not start, the exit code is 75, and
      launch/supervise.sh starts this process again.
  """
  place = _place()
  if place is None:
    return
  import jax

  try:
    jax.distributed.initialize(
      **place, heartbeat_timeout_seconds=heartbeat_timeout, initialization_timeout=patience, shutdown_timeout_seconds=patience
    )
  except ValueError as error:
    raise ValueError(f"JAX found no cluster here ({error}); without a cluster, set {', '.join(_PLACE)}") from None
  except jax.errors.JaxRuntimeError as error:
    print(f"the other processes did not start: {str(error).splitlines()[0]}", file=sys.stderr)
    raise SystemExit(os.EX_TEMPFAIL) from None


_PLACE = ("STDIT_JAX_COORDINATOR", "STDIT_JAX_NUM_PROCESSES", "STDIT_JAX_PROCESS_ID")


def _place() -> dict[str, Any] | None:
  """Arguments of `jax.distributed.initialize` from the environment variables; None for a run of one process."""
  coordinator, number, process = given = [os.environ.get(name, "") for name in _PLACE]
  if not any(given):
    return {} if os.environ.get("STDIT_JAX_DISTRIBUTED") else None
  if missing := [name for name, value in zip(_PLACE, given) if not value]:
    raise ValueError(f"{' and '.join(missing)} must be set too: {', '.join(_PLACE)} belong together")
  if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:]+):[0-9]+", coordinator):
    raise ValueError(f"STDIT_JAX_COORDINATOR={coordinator} is not like HOST:PORT")
  if not (number.isdecimal() and process.isdecimal() and int(process) < int(number)):
    raise ValueError(f"STDIT_JAX_PROCESS_ID={process}: processes are numbered 0, 1, ... below STDIT_JAX_NUM_PROCESSES={number}")
  place = {"coordinator_address": coordinator, "num_processes": int(number), "process_id": int(process)}
  # Under Slurm, JAX's cluster detection would hide all devices but one from the process.
  return place | {"cluster_detection_method": "deactivate"}


def use_compilation_cache(folder: str | None = None) -> None:
  """Keeps compiled programs between runs, so that a restart compiles nothing.

  The folder is JAX_COMPILATION_CACHE_DIR if set, else `folder`, else a cache folder of the user.
  """
  import jax

  option = "jax_compilation_cache_dir"
  place: str = getattr(jax.config, option) or str(folder or paths.user_cache("xla"))
  jax.config.update(option, place)
  if paths.is_remote(place):
    paths.check_writable(place, "folder of compiled programs")  # else JAX would print a warning for every program
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # XLA's own caches, for GPUs, need a local folder
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def keep_freed_memory() -> None:
  """On a CPU, lets the C library keep freed memory. Call it before the first use of a device.

  XLA's CPU client allocates its work space in every execution. glibc returns a freed large block to the kernel, so every step
  would touch hundreds of thousands of new pages. This function also turns off asynchronous dispatch, which runs programs
  outside the main thread, where glibc always maps large blocks. Measured with tests/benchmarks/denoiser.py (a training step):
  4.8 s and 433 000 page faults without these settings, 4.3 s and no page faults with them.
  """
  import jax

  jax.config.update("jax_cpu_enable_async_dispatch", False)
  try:
    platform = jax.default_backend()
  except (RuntimeError, AssertionError):  # JAX_PLATFORMS names a missing platform; the first use of a device reports it
    return
  mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
  if platform == "cpu" and hasattr(library := ctypes.CDLL(None), "mallopt"):
    library.mallopt(mmap_max, 0)  # no separate mappings, which free() would return to the kernel
    library.mallopt(trim_threshold, -1)  # never give the heap back
