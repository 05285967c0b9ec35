"""What the entry points share: a user's mistake is one clear line, never a traceback."""

import contextlib
import os
import pathlib
import sys


class InputError(ValueError):
  """A user's mistake that only shows while the run is under way, where a ValueError may also be ours."""


@contextlib.contextmanager
def one_line_errors(kinds=(ValueError, OSError)):
  """Turns errors about what the user gave into one line on stderr and exit code 2; STDIT_JAX_TRACEBACK=1 shows where."""
  try:
    yield
  except kinds as error:
    if os.environ.get("STDIT_JAX_TRACEBACK"):
      raise
    text = " ".join(str(error).split()) if not isinstance(error, ValueError) else str(error)
    print(f"error: {text}", file=sys.stderr)
    raise SystemExit(2) from None


def use_compilation_cache():
  """Keeps compiled programs between runs: a restart compiles nothing. JAX_COMPILATION_CACHE_DIR chooses another folder."""
  import jax

  if not jax.config.jax_compilation_cache_dir:
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "stdit_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
