"""`stdit_jax.train` that writes at its end what JAX reported about its compiler: [[program, whether from JAX's cache]]."""

import atexit
import json
import os

import jax

found, hits = [], []


def note_hit(event, **_):
  if event == "/jax/compilation_cache/cache_hits":
    hits.append(1)


def note_program(event, seconds, fun_name="", **_):
  if event == "/jax/core/compile/backend_compile_duration":
    found.append([fun_name, bool(hits)])
    hits.clear()


def write():
  with open(f"{os.environ['COMPILATIONS']}.{jax.process_index()}", "w") as file:
    json.dump(found, file)


if __name__ == "__main__":
  jax.monitoring.register_event_listener(note_hit)
  jax.monitoring.register_event_duration_secs_listener(note_program)
  atexit.register(write)
  from stdit_jax import train

  train.main()
