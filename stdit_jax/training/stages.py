"""Checks the configuration of a run before anything compiles, and makes its list of stages.

A stage is the run's configuration with a few keys changed. The number of optimizer steps alone tells the loop the stage, the
step within the stage, and the next micro step of the data.
"""

import contextlib
import dataclasses
import difflib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from configs import base
from data import paths
from stdit_jax.fields import is_of_type

# The fields below these keys belong to a dataclass or a table, which checks them.
FREE = (
  "model.fields", "text_encoder.fields", "autoencoder.fields", "autoencoder.discriminator", "diffusion.fields", "mask_ratios",
)  # fmt: skip
# Groups with optional keys: an axis without a key has one device.
_PARTIAL = ("mesh.", "slices.")
# Keys of the whole run, which no stage may change.
_FIXED = (
  "output", "seed", "task", "platform", "mesh", "slices", "init", "stages", "keep_checkpoints", "resume", "restart_data",
  "watchdog", "compile_threads", "compilation_cache", "profile_steps",
  *(f"text_encoder.{key}" for key in ("name", "weights", "tokenizer", "where", "train", "fields", "clean_captions")),
  *(f"autoencoder.{key}" for key in ("dtype", "micro_batch", "cache_gb", "perceptual", "image_weights")),
)  # fmt: skip


WEIGHTS = ("reconstruction", "kl", "latent", "identity", "perceptual", "adversarial")  # autoencoder.<name>_weight

_KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "True or False", tuple: "a list or tuple"}


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of a run.

  Attributes:
    index: of the stage; start: its first optimizer step; steps: their number.
    keep_optimizer: False starts with a fresh optimizer.
    config: the run's configuration with the changes of the stage.
  """

  name: str
  index: int
  start: int
  steps: int
  keep_optimizer: bool
  config: ConfigDict


def check_keys(config: ConfigDict, reference: ConfigDict | None = None, prefix: str = "") -> None:
  """Raises ValueError for a missing key, and for a key that `configs/base.py` does not have. Suggests the nearest key."""
  reference = base.get_config() if reference is None else reference
  for key in config:
    name = f"{prefix}{key}"
    if key not in reference:
      near = difflib.get_close_matches(key, list(reference), 1)
      hint = f"did you mean {prefix}{near[0]}?" if near else f"allowed: {', '.join(sorted(reference))}"
      raise ValueError(f"config: unknown key {name!r}; {hint}")
    nested = isinstance(reference[key], ConfigDict)
    if nested and not isinstance(config[key], ConfigDict):
      raise ValueError(f"config: {name} must be a group of keys ({', '.join(reference[key])}), not {config[key]!r}")
    if nested and name not in FREE:
      check_keys(config[key], reference[key], f"{name}.")
  for key in reference:
    if key not in config and prefix not in _PARTIAL:
      raise ValueError(f"config: key {prefix}{key} is missing; configs/base.py has its default")


def check_types(config: ConfigDict, reference: ConfigDict, prefix: str = "") -> None:
  """Raises ValueError for the first value whose type differs from that of its default in `reference`."""
  for key, default in reference.items():
    if key not in config and prefix in _PARTIAL:
      continue
    name, value = f"{prefix}{key}", config[key]
    if isinstance(default, ConfigDict):
      if name not in FREE:
        check_types(value, default, f"{name}.")
      continue
    several = ("data.tables", "data.buckets", "data.max_bad_rows", "validation.tables")
    if default is None or name in several:
      continue  # data.config checks keys that take several types
    if not is_of_type(value, type(default)):
      raise ValueError(f"config: {name} is {value!r}; it must be {_KINDS[type(default)]}, like {default!r}")


def _value(config, key):
  return functools.reduce(lambda group, part: group[part], key.split("."), config)


def _number(config, key, low, high=None, whole=False):
  value = _value(config, key)
  kind = int if whole else (int, float)
  if isinstance(value, bool) or not isinstance(value, kind) or value < low or (high is not None and value > high):
    allowed = f"{'a whole number' if whole else 'a number'} of at least {low}" + ("" if high is None else f", at most {high}")
    raise ValueError(f"config: {key} is {value!r}; allowed: {allowed}")


def _regular_expression(key, pattern):
  try:
    re.compile(pattern)
  except (re.error, TypeError) as error:
    raise ValueError(f"config: {key} is no regular expression: {pattern!r} ({error}); give a valid one") from None


def _choice(config, key, allowed):
  value = _value(config, key)
  if value not in allowed:
    raise ValueError(f"config: {key} is {value!r}; allowed: {', '.join(repr(a) for a in allowed)}")


def check_values(config: ConfigDict) -> None:
  """Raises ValueError for the first value with a wrong type or out of range."""
  check_types(config, base.get_config())
  paths.check(config.output, "config: output")
  paths.check(config.compilation_cache, "config: compilation_cache")
  _choice(config, "task", ("denoiser", "autoencoder"))
  _choice(config, "platform", ("", "cpu", "gpu", "tpu"))
  _check_text(config)
  _choice(config, "optimizer.schedule", ("constant", "cosine"))
  _check_numbers(config)
  _check_steps(config)
  _regular_expression("train", config.train)
  for entry in config.optimizer.scales:
    if not isinstance(entry, (tuple, list)) or len(entry) != 2 or not is_of_type(entry[1], float) or entry[1] <= 0:
      raise ValueError(f"config: optimizer.scales has {entry!r}; allowed: (regular expression, factor above 0)")
    _regular_expression("optimizer.scales", entry[0])


def _check_text(config):
  if config.split_tokens not in ("auto", "never", "always") and not re.fullmatch(r"(\w+:\d+)(,\w+:\d+)*", config.split_tokens):
    raise ValueError(
      f"config: split_tokens is {config.split_tokens!r}; allowed: 'auto', 'never', 'always', or buckets: '480p:204,720p:51'"
    )
  _choice(config, "text_encoder.where", ("step", "ahead", "disk"))
  if config.text_encoder.train and config.text_encoder.where != "step":
    raise ValueError(
      f"config: text_encoder.train needs text_encoder.where='step', but it is {config.text_encoder.where!r}: precomputed "
      "embeddings can't train. Change one of the two"
    )


def _check_numbers(config):
  for key in ("caption_dropout", "ema_decay", "optimizer.b1", "optimizer.b2"):
    _number(config, key, 0, 1)
  _number(config, "seed", 0, 2**32 - 1, whole=True)
  for key in ("learning_rate", "warmup_steps", "clip_norm", "eps", "weight_decay"):
    _number(config, f"optimizer.{key}", 0)
  for key in ("watchdog.timeout", "watchdog.slow_timeout", "autoencoder.cache_gb"):
    _number(config, key, 0)
  for name in WEIGHTS:
    _number(config, f"autoencoder.{name}_weight", 0)
  for key in ("max_tokens_per_device", "sample_every", "validation.every"):
    _number(config, key, 0, whole=True)
  for key in (
    "optimizer.accumulate", "log_every", "checkpoint_every", "keep_checkpoints", "max_nonfinite", "compile_threads",
    "validation.samples_per_bucket", "validation.timesteps", "autoencoder.micro_batch",
  ):  # fmt: skip
    _number(config, key, 1, whole=True)
  if config.validation.every and not config.validation.tables:
    raise ValueError("config: validation.tables is empty; give the tables to measure the loss on, or set validation.every=0")


def _check_steps(config):
  if config.resume not in ("auto", "required") and not config.resume.isdigit():
    raise ValueError(f"config: resume is {config.resume!r}; allowed: 'auto', 'required', or a step such as '1200'")
  first_last = tuple(config.profile_steps)
  if first_last and not (
    len(first_last) == 2 and all(type(n) is int for n in first_last) and 1 <= first_last[0] <= first_last[1]
  ):
    raise ValueError(
      f"config: profile_steps is {config.profile_steps!r}; allowed: (), or (first, last) optimizer steps from 1 on"
    )


def make_stages(config: ConfigDict) -> list[Stage]:
  """Checks the whole configuration and returns its stages.

  Raises:
    ValueError: a key is unknown or missing, a value is out of range, a stage changes a key of the run, or no stage exists.
  """
  check_keys(config)
  if not config.stages:
    raise ValueError("config: stages is empty; a run needs at least one, e.g. (dict(name='main', steps=1000),)")
  stages, start = [], 0
  for index, changes in enumerate(config.stages):
    if not isinstance(changes, Mapping):
      raise ValueError(f"config: stages[{index}] is {changes!r}; every stage is a dict such as dict(name='main', steps=1000)")
    changes = dict(changes)
    try:
      name, steps = changes.pop("name"), changes.pop("steps")
    except KeyError as error:
      raise ValueError(f"config: stage {index} has no {error}; every stage needs name and steps") from None
    if any(stage.name == name for stage in stages):
      raise ValueError(f"config: two stages are called {name!r}; give each its own name")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
      raise ValueError(f"config: stage {name!r}: steps is {steps!r}; allowed: a whole number of at least 1")
    keep_optimizer = changes.pop("keep_optimizer", True)
    own = ConfigDict(config.to_dict())
    for key, value in changes.items():
      if any(f"{key}.".startswith(f"{fixed}.") or fixed.startswith(f"{key}.") for fixed in _FIXED):
        raise ValueError(f"config: stage {name!r} changes {key}, which belongs to the whole run; set it outside of the stages")
      check_key(own, key, f"stage {name!r}")
      with own.ignore_type():
        own.update_from_flattened_dict({key: value})
    check_values(own)
    own.stages = ()
    stages.append(Stage(name, index, start, steps, keep_optimizer, own.lock()))
    start += steps
  return stages


def check_key(config: ConfigDict, key: str, where: str) -> None:
  """Raises ValueError if `config` does not have the dotted `key`. Suggests the nearest key."""
  prefix = ""
  for part in key.split("."):
    if not isinstance(config, ConfigDict) or (part not in config and f"{prefix}".rstrip(".") not in FREE):
      near = difflib.get_close_matches(part, list(config) if isinstance(config, ConfigDict) else [], 1)
      raise ValueError(f"config: {where}: unknown key {key!r}" + (f"; did you mean {prefix}{near[0]}?" if near else ""))
    config = config.get(part)
    prefix += f"{part}."


def stage_of(stages: Sequence[Stage], step: int) -> Stage:
  """The stage of optimizer step `step`. After the end of the run, its last stage."""
  return next((stage for stage in stages if step < stage.start + stage.steps), stages[-1])


def stage_that_made(stages: Sequence[Stage], step: int) -> Stage:
  """The stage whose model is in a checkpoint after `step` optimizer steps: the stage of the last of these steps."""
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
def naming(stage: Stage) -> Iterator[None]:
  """Adds the name of the stage to a ValueError."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f"config: stage {stage.name!r}: {str(error).removeprefix('config: ')}") from None


def total_steps(stages: Sequence[Stage]) -> int:
  """Optimizer steps of the whole run."""
  return stages[-1].start + stages[-1].steps
