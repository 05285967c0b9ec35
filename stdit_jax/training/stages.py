"""The stages of a run. A stage is the run's configuration with a few keys changed.

The number of optimizer steps alone tells the loop the stage, the step within the stage, and the next micro step of the data.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stdit_jax.config import Config

# Keys of the whole run, which no stage may change.
_FIXED = (
  "output", "seed", "task", "platform", "mesh", "slices", "init", "stages", "keep_checkpoints", "keep_every", "resume",
  "restart_data", "watchdog", "compile_threads", "compilation_cache", "profile_steps",
  *(f"text_encoder.{key}" for key in ("name", "weights", "tokenizer", "where", "train", "fields", "clean_captions")),
  *(f"autoencoder.{key}" for key in ("dtype", "micro_batch", "cache_gb", "perceptual", "image_weights")),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of a run.

  Attributes:
    index: of the stage; start: its first optimizer step; steps: their number.
    keep_optimizer: False starts with a fresh optimizer, and with the parameters as their average.
    config: the run's configuration with the changes of the stage.
  """

  name: str
  index: int
  start: int
  steps: int
  keep_optimizer: bool
  config: Config


def make_stages(config: Any) -> list[Stage]:
  """The stages of a configuration (what `Config.of` takes).

  Raises:
    ValueError: an error of `Config.of`, a stage without name or steps, a stage that changes a key of the run, or no stage.
  """
  run = Config.of(config)
  if not run.stages:
    raise ValueError("config: stages is empty; a run needs at least one, e.g. (dict(name='main', steps=1000),)")
  stages, start = [], 0
  for index, changes in enumerate(run.stages):
    if not isinstance(changes, Mapping):
      raise ValueError(f"config: stages[{index}] is {changes!r}; every stage is a dict such as dict(name='main', steps=1000)")
    changes = dict(changes)
    try:
      name, steps = changes.pop("name"), changes.pop("steps")
    except KeyError as error:
      raise ValueError(f"config: stage {index} has no {error}; every stage needs name and steps") from None
    if not isinstance(name, str):
      raise ValueError(f"config: stages[{index}]: name is {name!r}; allowed: a text such as 'main'")
    if any(stage.name == name for stage in stages):
      raise ValueError(f"config: two stages are called {name!r}; give each its own name")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
      raise ValueError(f"config: stage {name!r}: steps is {steps!r}; allowed: a whole number of at least 1")
    keep_optimizer = changes.pop("keep_optimizer", True)
    for key in changes:
      if any(f"{key}.".startswith(f"{fixed}.") or fixed.startswith(f"{key}.") for fixed in _FIXED):
        raise ValueError(f"config: stage {name!r} changes {key}, which belongs to the whole run; set it outside of the stages")
    with naming(name):
      own = run.replace({**changes, "stages": ()})
      if own.validation.every and not own.validation.tables:
        raise ValueError("validation.tables is empty; give the tables to measure the loss on, or set validation.every=0")
    # The name alone decides: the same stage has the same data in a run with other stages before it.
    data = dataclasses.replace(own.data, stage=name)
    stages.append(Stage(name, index, start, steps, keep_optimizer, dataclasses.replace(own, data=data)))
    start += steps
  return stages


def stage_of(stages: Sequence[Stage], step: int) -> Stage:
  """The stage of optimizer step `step` (0 = the first). A step after the end of the run belongs to the last stage."""
  return next((stage for stage in stages if step < stage.start + stage.steps), stages[-1])


def stage_that_made(stages: Sequence[Stage], step: int) -> Stage:
  """The stage that made the checkpoint after `step` optimizer steps. It is the stage of the last of these steps."""
  return stage_of(stages, max(step - 1, 0))


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
  """The values of a stage's plain configuration that identify its run. If one of them changes, checkpoints no longer fit."""
  parts = {"text_encoder": ("name", "train"), "autoencoder": ("name",)}
  parts = {part: {key: config[part][key] for key in keys} for part, keys in parts.items()}
  if config["task"] == "autoencoder":
    parts["autoencoder"]["fields"] = config["autoencoder"].get("fields", {})
    if config["autoencoder"].get("adversarial_weight"):
      parts["autoencoder"]["discriminator"] = config["autoencoder"]["discriminator"]
  return parts | {key: config[key] for key in ("task", "seed", "model")}


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
  """Dotted keys whose values differ between two nested dicts, sorted."""
  changed = []
  for key in sorted(old.keys() | new.keys()):
    a, b = old.get(key), new.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      changed += changed_keys(a, b, f"{prefix}{key}.")
    elif a != b:
      changed.append(f"{prefix}{key}")
  return changed


@contextlib.contextmanager
def naming(stage: str) -> Iterator[None]:
  """Adds the name of the stage to a ValueError."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f"config: stage {stage!r}: {str(error).removeprefix('config: ')}") from None
