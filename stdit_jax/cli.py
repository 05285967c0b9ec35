"""What the entry points share: a user's mistake is one clear line, never a traceback."""

import contextlib
import os
import pathlib
import sys


@contextlib.contextmanager
def one_line_errors(prefix="error"):
  """Turns errors about what the user gave (ValueError and its kin, files) into one line on stderr and exit code 2."""
  try:
    yield
  except (ValueError, OSError) as error:
    if os.environ.get("STDIT_JAX_TRACEBACK"):
      raise
    text = " ".join(str(error).split()) if not isinstance(error, ValueError) else str(error)
    print(f"{prefix}: {text}", file=sys.stderr)
    raise SystemExit(2) from None


def use_compilation_cache():
  """Keeps compiled programs between runs: a restart compiles nothing. JAX_COMPILATION_CACHE_DIR chooses another folder."""
  import jax

  if not jax.config.jax_compilation_cache_dir:
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "stdit_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
