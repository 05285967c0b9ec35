"""Trains a denoiser or an autoencoder, stage after stage, resumable.

  python -m stdit_jax.train --config configs/quickstart.py [--config.output=runs/mine --config.optimizer.learning_rate=1e-4]

Every key of the configuration is in configs/base.py. Stop it at any time: the same command resumes from the newest
checkpoint in `output`. On a pod the same command runs on every host (see launch/).
"""

import re
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from stdit_jax.cli import InputError, connect_processes, keep_freed_memory, one_line_errors, use_compilation_cache

_HELP = "file with get_config(), e.g. configs/quickstart.py"
_CONFIG = config_flags.DEFINE_config_file("config", None, _HELP)


def describe(error, argv):
  """One line about what the parser refused. Of an unknown key ml_collections gives only its quoted name, and a near one."""
  text = " ".join(str(error).replace("\\n", " ").split())
  if not (unknown := re.match(r"""["'\\]+(\w+)["'\\]+(.*?)["']*$""", text)):
    return text
  key, hint = unknown.groups()
  given = next((a for a in argv if key in a.split("=")[0].split(".")), key)
  return (
    f"{given}: there is no key {key!r}.{hint} Keys are in configs/base.py; those of model.fields and other `fields` that "
    "your file does not set have to be added there"
  )


def parse_flags(argv):
  """absl's parser; a mistyped flag or key is one line. -h and --help print the above and the flags."""
  if any(a in ("-h", "--help", "--helpfull") for a in argv[1:]):
    print(f"{__doc__}\nflags:\n  --config FILE        {_HELP}")
    print("  --config.KEY=VALUE   replaces one key; the keys are in configs/base.py")
    raise SystemExit(0)
  try:
    rest = flags.FLAGS(argv)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError, ImportError) as error:
    print(f"error: {describe(error, argv)}", file=sys.stderr)
    raise SystemExit(2) from None
  if len(rest) > 1:
    print(f"error: unexpected argument {rest[1]!r}; give keys as --config.KEY=VALUE", file=sys.stderr)
    raise SystemExit(2)
  if _CONFIG.value is None:
    print("error: give a configuration: --config configs/quickstart.py", file=sys.stderr)
    raise SystemExit(2)
  return rest


def main(_):
  logging.set_verbosity(logging.WARNING)  # orbax reports every step of a checkpoint at INFO
  with one_line_errors():
    use_compilation_cache()
    connect_processes()
    keep_freed_memory()
    from stdit_jax.interop import CheckpointError
    from stdit_jax.training.loop import Run
    from stdit_jax.training.sampling import Sampler

    run = Run(_CONFIG.value)
    on_sample = Sampler(run) if run.config.sample_every else None
    started = run.start()
  try:
    with one_line_errors((InputError, CheckpointError, OSError)):
      run.train(on_sample, started)
  except KeyboardInterrupt:
    print("interrupted; the same command resumes from the newest checkpoint", file=sys.stderr)
    raise SystemExit(130) from None


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
