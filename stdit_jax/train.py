"""Trains a denoiser or an autoencoder, stage after stage, resumable.

  python -m stdit_jax.train --config configs/quickstart.py [--config.output=runs/mine --config.optimizer.learning_rate=1e-4]

configs/base.py has every key of a configuration; --config.KEY=VALUE replaces one. Stop the training at any time: the same
command resumes from the newest checkpoint in `output`. On a pod every host runs the same command (see launch/).

Exit codes: 0 finished; 2 an error, which the message explains; 130 interrupted. 75 means: start the command again. Reasons:
SIGTERM, a process that hangs or ended (also one of the loader's workers), an I/O error that may pass, storage that gives no
answer, an error of JAX's runtime. After 10 starts in a row from the same step the exit code is 2.
"""

import contextlib
import functools
import logging
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import absl.logging

from stdit_jax import cli
from stdit_jax.config import Config
from stdit_jax.errors import InputError, may_pass
from stdit_jax.parallel.processes import coordination
from stdit_jax.training.claim import claim
from stdit_jax.training.stages import make_stages
from stdit_jax.training.watchdog import RESTART, StartAgain, Watchdog, exit_to_start_again, start_again


def run(config: Config, watchdog: Watchdog) -> None:
  """Trains. Exits with 2 and one line after a user's error, with RESTART after SIGTERM, with 130 after ^C."""
  with cli.interruptible("the same command resumes from the newest checkpoint"), contextlib.ExitStack() as held:
    with cli.one_line_errors(), start_again():
      from stdit_jax.interop import CheckpointError
      from stdit_jax.run_samples import Sampler
      from stdit_jax.training.loop import train
      from stdit_jax.training.restarts import Restarts
      from stdit_jax.training.run import Run
      from stdit_jax.training.signals import Preempted

      cli.keep_freed_memory()
      training = Run(config, watchdog.beat, watchdog.alive)
      if watchdog.index == 0:
        held.enter_context(claim(config.output, functools.partial(watchdog.leave, code=2)))
      on_sample = Sampler(training) if config.sample_every else None
      restarts = Restarts(training)
      started = restarts.start()
    with cli.one_line_errors((InputError, CheckpointError, OSError)), start_again():
      try:
        train(training, on_sample, restarts, started)
      except Preempted as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(RESTART) from None


def main(argv: Sequence[str] | None = None) -> None:
  settings = cli.parse_settings(cli.ConfigSettings, "stdit_jax.train", __doc__, argv)
  # Orbax reports every step of a checkpoint, and each error with tracebacks of all its threads before it raises the error.
  absl.logging.set_verbosity(absl.logging.FATAL)
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  with exit_to_start_again(), cli.one_line_errors(), start_again():
    config = Config.of(cli.read_config(settings.config, settings.changes))
    make_stages(config)  # finds errors before any process waits for another
    cli.use_compilation_cache(config.compilation_cache or f"{config.output}/compilation_cache")
    timeout, slow_timeout = config.watchdog.timeout, config.watchdog.slow_timeout
    # The watchdog must act before JAX's heartbeat, which does not say which process hangs.
    cli.connect_processes(max(100, int(2 * timeout)), patience=max(300, int(slow_timeout)))
    watchdog = Watchdog(timeout, slow_timeout, *coordination())
  with watchdog:
    try:
      run(config, watchdog)
    except BaseException as error:
      preempted = isinstance(error, SystemExit) and error.code == RESTART  # all processes exit, at the same step
      again = isinstance(error, StartAgain)
      if watchdog.count == 1 or preempted:
        with exit_to_start_again():
          raise
      # A normal exit would wait for the other processes, and they would wait for this one.
      code: Any = error.code if isinstance(error, SystemExit) else RESTART if again or may_pass(error) else 1
      if not again and not isinstance(error, SystemExit):
        traceback.print_exc()
        watchdog.connection_lost()
      watchdog.leave(f"exit code {code}" if isinstance(error, SystemExit) else str(error), code)


if __name__ == "__main__":
  main()
