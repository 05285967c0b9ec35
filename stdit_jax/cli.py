"""What the entry points share: a user's mistake is one clear line, never a traceback."""

import contextlib
import ctypes
import os
import re
import sys

from data import paths
from data.command_line import OneLineParser as OneLineParser


class InputError(ValueError):
  """A user's mistake that only shows while the run is under way, where a ValueError may also be ours."""


@contextlib.contextmanager
def one_line_errors(kinds=(ValueError, OSError)):
  """Turns errors about what the user gave into one line on stderr and exit code 2, also that a device has too little memory for
  it; STDIT_JAX_TRACEBACK=1 shows where."""
  try:
    yield
  except (*kinds, RuntimeError) as error:
    memory = isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)  # of JAX
    if os.environ.get("STDIT_JAX_TRACEBACK") or not (memory or isinstance(error, kinds)):
      raise
    text = " ".join(str(error).split()) if not isinstance(error, ValueError) else str(error)
    if memory:
      said = str(error).splitlines()[0].rstrip(".")
      text = f"a device has too little memory: {said}. Take fewer frames or pixels, or more devices"
    print(f"error: {text}", file=sys.stderr)
    raise SystemExit(2) from None


def describe_flag_error(error, argv):
  """One line about what the parser refused, or what went wrong in the configuration's own code. Of an unknown key
  ml_collections gives only its quoted name, and a near one."""
  text = " ".join(str(error).replace("\\n", " ").split())
  path = next((a.partition("=")[2] or b for a, b in zip(argv, [*argv[1:], ""]) if a.split("=")[0] == "--config"), "--config")
  if "has no attribute 'get_config'" in text:
    return f"{path} has no get_config()"
  if not_read := re.search(r"\[Errno \d+\] (.*?): ", text):
    return f"--config {path} can't be read: {not_read[1]}"
  if isinstance(error, (SyntaxError, ImportError, NameError, ArithmeticError, LookupError)) and not isinstance(error, KeyError):
    return f"{path} is no configuration: {type(error).__name__}: {text}"
  if said := re.search(r"Error whilst parsing config file: Traceback .* ValueError: (.*)$", text):
    return said[1]  # the file's own refusal of what stands behind its colon
  if not (unknown := re.match(r"""["'\\]+(\w+)["'\\]+(.*?)["']*$""", text)):
    return text
  key, hint = unknown.groups()
  given = next((a for a in argv if key in a.split("=")[0].split(".")), key)
  return (
    f"{given}: there is no key {key!r}.{hint} Keys are in configs/base.py; those of model.fields and other `fields` that "
    "your file does not set have to be added there"
  )


def parse_config(argv, values):
  """The configuration of `--config FILE --config.KEY=VALUE ...`.

  Args:
    argv: program name and arguments, no others than these.
    values: absl FlagValues with the flag `config` of `config_flags.DEFINE_config_file`.

  Raises:
    ValueError: a mistyped flag or key, a file that is none, no configuration.
  """
  sys.modules.pop("config_config", None)  # as which ml_collections loads a file, over what another one has defined there
  try:
    rest = values(argv)
    config = values["config"].value
    if config is not None:
      _ = config.is_locked  # a file that is not there raises here only
  except Exception as error:  # the configuration's own code may raise whatever it likes
    raise ValueError(describe_flag_error(error, argv)) from None
  if len(rest) > 1:
    raise ValueError(f"unexpected argument {rest[1]!r}; give keys as --config.KEY=VALUE")
  if config is None:
    raise ValueError("give a configuration: --config configs/quickstart.py")
  return config


def parse_with_changes(parser, argv):
  """The arguments of a parser, and in `changes` those of a configuration, --config.KEY=VALUE, which `read_config` takes."""
  argv = sys.argv[1:] if argv is None else argv
  args = parser.parse_args([a for a in argv if not a.startswith("--config.")])
  args.changes = [a for a in argv if a.startswith("--config.")]
  return args


def read_config(path, changes=()):
  """The configuration of a file with the arguments --config.KEY=VALUE, for entry points that have other arguments as well."""
  from absl import flags
  from ml_collections import config_flags

  argv, values = ["stdit_jax", f"--config={path}", *changes], flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
  return parse_config(argv, values)


def parse_mesh(entries):
  """{axis: devices} of arguments AXIS=DEVICES; ValueError when they are none."""
  try:
    return {axis: int(size) for axis, size in (entry.split("=") for entry in entries)}
  except ValueError:
    raise ValueError(f"--mesh {' '.join(entries)}: give AXIS=DEVICES, e.g. data=-1 fsdp=4") from None


def connect_processes(heartbeat_timeout=100, patience=300):
  """Joins the processes of a run on several hosts, before the first use of a device; launch/ sets the variables.

  STDIT_JAX_DISTRIBUTED=1: JAX finds the others itself (Cloud TPU, GKE, Slurm, Open MPI). Elsewhere STDIT_JAX_COORDINATOR
  (HOST:PORT of process 0), STDIT_JAX_NUM_PROCESSES and STDIT_JAX_PROCESS_ID say who and where they are. A process that the
  runtime has not heard of for `heartbeat_timeout` seconds makes it abort the others. Those that have not come, or not ended,
  are waited for `patience` seconds; the exit code without them is the one on which a supervisor starts again.
  """
  names = ("STDIT_JAX_COORDINATOR", "STDIT_JAX_NUM_PROCESSES", "STDIT_JAX_PROCESS_ID")
  coordinator, number, process = given = [os.environ.get(name, "") for name in names]
  if any(given):
    if missing := [name for name, value in zip(names, given) if not value]:
      raise ValueError(f"{' and '.join(missing)} must be set too: {', '.join(names)} belong together")
    if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:]+):[0-9]+", coordinator):
      raise ValueError(f"STDIT_JAX_COORDINATOR={coordinator} is not like HOST:PORT")
    if not (number.isdecimal() and process.isdecimal() and int(process) < int(number)):
      raise ValueError(
        f"STDIT_JAX_PROCESS_ID={process} of STDIT_JAX_NUM_PROCESSES={number}: processes are numbered 0, 1, ..., number - 1"
      )
    place = dict(coordinator_address=coordinator, num_processes=int(number), process_id=int(process))
    place["cluster_detection_method"] = "deactivate"  # it would hide all but one device from a process under Slurm
  elif os.environ.get("STDIT_JAX_DISTRIBUTED"):
    place = {}
  else:
    return
  import jax

  try:
    jax.distributed.initialize(
      **place, heartbeat_timeout_seconds=heartbeat_timeout, initialization_timeout=patience, shutdown_timeout_seconds=patience
    )
  except ValueError as error:
    raise ValueError(f"JAX found no cluster here ({error}); without one, set {', '.join(names)}") from None
  except jax.errors.JaxRuntimeError as error:
    print(f"the other processes did not come: {str(error).splitlines()[0]}", file=sys.stderr)
    raise SystemExit(os.EX_TEMPFAIL) from None


def use_compilation_cache(folder=None):
  """Keeps compiled programs between runs in `folder`, by default one of the user's: a restart compiles nothing.
  JAX_COMPILATION_CACHE_DIR comes before it."""
  import jax

  if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(folder or paths.user_cache("xla")))
  if paths.is_remote(jax.config.jax_compilation_cache_dir):
    # JAX would give a warning for every program.
    paths.check_writable(jax.config.jax_compilation_cache_dir, "folder of compiled programs")
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # of GPUs: XLA itself knows no buckets
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def keep_freed_memory():
  """On a CPU, lets the C library keep what is freed. Call it before the first use of a device.

  XLA's CPU client allocates its work space anew in every execution, and glibc gives blocks of that size back to the kernel at
  once, so that every step would touch hundreds of thousands of fresh pages. Programs run in the thread that calls them,
  because glibc maps large blocks for any other thread, whatever it is told (the training step of
  tests/benchmarks/denoiser.py: 433 000 page faults and 4.8 s, with both measures none and 4.3 s).
  """
  import jax

  jax.config.update("jax_cpu_enable_async_dispatch", False)
  try:
    platform = jax.default_backend()
  except (RuntimeError, AssertionError):  # JAX_PLATFORMS names one that is not there; whoever needs the devices says so
    return
  mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
  if platform == "cpu" and hasattr(library := ctypes.CDLL(None), "mallopt"):
    library.mallopt(mmap_max, 0)  # no mappings of their own, which free() would end
    library.mallopt(trim_threshold, -1)  # never
