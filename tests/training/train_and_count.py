"""Runs `stdit_jax.train`. At exit it writes the names of the programs that JAX compiled or read from its cache."""

import atexit
import json
import os

import jax

found = []


def note_program(event, seconds, fun_name="", **_):
  if event == "/jax/core/compile/backend_compile_duration":
    found.append(fun_name)


def write():
  with open(f"{os.environ['COMPILATIONS']}.{jax.process_index()}", "w") as file:
    json.dump(found, file)


if __name__ == "__main__":
  jax.monitoring.register_event_duration_secs_listener(note_program)
  atexit.register(write)
  from stdit_jax import train

  train.main()
