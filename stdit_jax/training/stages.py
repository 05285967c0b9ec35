"""The configuration of a run, checked whole before anything compiles, and the list of stages it makes.

A stage is the run's configuration with a few keys changed. The loop knows from the number of optimizer steps alone in
which stage it is, at which step of it, and which micro step of the data comes next.
"""

import contextlib
import dataclasses
import difflib
import functools
import re
from collections.abc import Mapping

import ml_collections

from configs import base
from data import paths
from stdit_jax.fields import is_of_type

# Below these keys the fields belong to a dataclass or table of their own, which checks them.
FREE = (
  "model.fields", "text_encoder.fields", "autoencoder.fields", "autoencoder.discriminator", "diffusion.fields", "mask_ratios",
)  # fmt: skip
# Groups whose keys may be left out: an axis that is not named has one device.
_PARTIAL = ("mesh.", "slices.")
# What a stage must not change: it would be another mesh, another text encoder, another run.
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
  """One stage of a run: `config` with the stage's changes, run for `steps` optimizer steps, the first being `start`."""

  name: str
  index: int
  start: int
  steps: int
  keep_optimizer: bool
  config: ml_collections.ConfigDict


def check_keys(config, reference=None, prefix=""):
  """Raises ValueError for a key that `configs/base.py` does not have, naming the nearest one, and for missing ones."""
  reference = base.get_config() if reference is None else reference
  for key in config:
    name = f"{prefix}{key}"
    if key not in reference:
      near = difflib.get_close_matches(key, list(reference), 1)
      hint = f"did you mean {prefix}{near[0]}?" if near else f"allowed: {', '.join(sorted(reference))}"
      raise ValueError(f"config: unknown key {name!r}; {hint}")
    nested = isinstance(reference[key], ml_collections.ConfigDict)
    if nested and not isinstance(config[key], ml_collections.ConfigDict):
      raise ValueError(f"config: {name} must be a group of keys ({', '.join(reference[key])}), not {config[key]!r}")
    if nested and name not in FREE:
      check_keys(config[key], reference[key], f"{name}.")
  for key in reference:
    if key not in config and prefix not in _PARTIAL:
      raise ValueError(f"config: key {prefix}{key} is missing; configs/base.py has its default")


def check_types(config, reference, prefix=""):
  """Raises ValueError for the first value that is of another type than its default in `reference`."""
  for key, default in reference.items():
    if key not in config and prefix in _PARTIAL:
      continue
    name, value = f"{prefix}{key}", config[key]
    if isinstance(default, ml_collections.ConfigDict):
      if name not in FREE:
        check_types(value, default, f"{name}.")
      continue
    several = ("data.tables", "data.buckets", "data.max_bad_rows", "validation.tables")
    if default is None or name in several:
      continue  # of several types: checked by data.config
    if not is_of_type(value, type(default)):
      raise ValueError(f"config: {name} is {value!r}; it must be {_KINDS[type(default)]}, like {default!r}")


def _number(config, key, low, high=None, whole=False):
  value = config
  for part in key.split("."):
    value = value[part]
  kind = int if whole else (int, float)
  if isinstance(value, bool) or not isinstance(value, kind) or value < low or (high is not None and value > high):
    allowed = f"{'a whole number' if whole else 'a number'} of at least {low}" + ("" if high is None else f", at most {high}")
    raise ValueError(f"config: {key} is {value!r}; allowed: {allowed}")


def _regular_expression(key, pattern):
  try:
    re.compile(pattern)
  except (re.error, TypeError) as error:
    raise ValueError(f"config: {key} is no regular expression: {pattern!r} ({error})") from None


def check_values(config):
  """Raises ValueError for the first value that is of another type or out of range."""
  check_types(config, base.get_config())
  paths.check(config.output, "config: output")
  paths.check(config.compilation_cache, "config: compilation_cache")
  for key, allowed in (
    ("task", ("denoiser", "autoencoder")),
    ("platform", ("", "cpu", "gpu", "tpu")),
  ):
    value = functools.reduce(lambda group, part: group[part], key.split("."), config)
    if value not in allowed:
      raise ValueError(f"config: {key} is {value!r}; allowed: {', '.join(repr(a) for a in allowed)}")
  if config.split_tokens not in ("auto", "never", "always") and not re.fullmatch(r"(\w+:\d+)(,\w+:\d+)*", config.split_tokens):
    raise ValueError(
      f"config: split_tokens is {config.split_tokens!r}; allowed: 'auto', 'never', 'always', or buckets: '480p:204,720p:51'"
    )
  if config.text_encoder.where not in ("step", "ahead", "disk"):
    raise ValueError(f"config: text_encoder.where is {config.text_encoder.where!r}; allowed: 'step', 'ahead', 'disk'")
  if config.text_encoder.train and config.text_encoder.where != "step":
    raise ValueError("config: text_encoder.train needs text_encoder.where='step': embeddings made before the step can't train")
  for schedule in (config.optimizer.schedule,):
    if schedule not in ("constant", "cosine"):
      raise ValueError(f"config: optimizer.schedule is {schedule!r}; allowed: 'constant', 'cosine'")
  _number(config, "caption_dropout", 0, 1)
  _number(config, "ema_decay", 0, 1)
  _number(config, "seed", 0, 2**32 - 1, whole=True)
  _number(config, "max_tokens_per_device", 0, whole=True)
  for key in ("learning_rate", "warmup_steps", "clip_norm", "eps", "weight_decay"):
    _number(config, f"optimizer.{key}", 0)
  for key in ("b1", "b2"):
    _number(config, f"optimizer.{key}", 0, 1)
  _number(config, "optimizer.accumulate", 1, whole=True)
  if config.resume not in ("auto", "required") and not config.resume.isdigit():
    raise ValueError(f"config: resume is {config.resume!r}; allowed: 'auto', 'required', or a step such as '1200'")
  first_last = tuple(config.profile_steps)
  if first_last and not (
    len(first_last) == 2 and all(type(n) is int for n in first_last) and 1 <= first_last[0] <= first_last[1]
  ):
    raise ValueError(
      f"config: profile_steps is {config.profile_steps!r}; allowed: (), or (first, last) optimizer steps from 1 on"
    )
  for key in ("watchdog.timeout", "watchdog.slow_timeout"):
    _number(config, key, 0)
  for key in ("log_every", "checkpoint_every", "keep_checkpoints", "max_nonfinite", "compile_threads"):
    _number(config, key, 1, whole=True)
  for key in ("sample_every", "validation.every"):
    _number(config, key, 0, whole=True)
  for key in ("validation.samples_per_bucket", "validation.timesteps"):
    _number(config, key, 1, whole=True)
  if config.validation.every and not config.validation.tables:
    raise ValueError("config: validation.tables is empty; give the tables to measure the loss on, or set validation.every=0")
  _number(config, "autoencoder.cache_gb", 0)
  _number(config, "autoencoder.micro_batch", 1, whole=True)
  for name in WEIGHTS:
    _number(config, f"autoencoder.{name}_weight", 0)
  _regular_expression("train", config.train)
  for entry in config.optimizer.scales:
    if not isinstance(entry, (tuple, list)) or len(entry) != 2 or not is_of_type(entry[1], float) or entry[1] <= 0:
      raise ValueError(f"config: optimizer.scales has {entry!r}; allowed: (regular expression, factor above 0)")
    _regular_expression("optimizer.scales", entry[0])


def make_stages(config):
  """Checks the whole configuration and returns its stages.

  Raises:
    ValueError: unknown or missing keys, values out of range, a stage that changes what it must not, no stage.
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
    own = ml_collections.ConfigDict(config.to_dict())
    for key, value in changes.items():
      if any(f"{key}.".startswith(f"{fixed}.") or fixed.startswith(f"{key}.") for fixed in _FIXED):
        raise ValueError(f"config: stage {name!r} changes {key}, which belongs to the whole run")
      with_near_key(own, key, f"stage {name!r}")
      with own.ignore_type():
        own.update_from_flattened_dict({key: value})
    check_values(own)
    own.stages = ()
    stages.append(Stage(name, index, start, steps, keep_optimizer, own.lock()))
    start += steps
  return stages


def with_near_key(config, key, where):
  """Raises ValueError when the dotted `key` is not in `config`, naming the nearest one."""
  prefix = ""
  for part in key.split("."):
    if not isinstance(config, ml_collections.ConfigDict) or (part not in config and f"{prefix}".rstrip(".") not in FREE):
      near = difflib.get_close_matches(part, list(config) if isinstance(config, ml_collections.ConfigDict) else [], 1)
      raise ValueError(f"config: {where}: unknown key {key!r}" + (f"; did you mean {prefix}{near[0]}?" if near else ""))
    config = config.get(part)
    prefix += f"{part}."


def stage_of(stages, step):
  """The stage that optimizer step `step` belongs to; the last one when the run is over."""
  return next((stage for stage in stages if step < stage.start + stage.steps), stages[-1])


def stage_that_made(stages, step):
  """The stage whose model a checkpoint after `step` optimizer steps holds: that of the last of them, also where it ends."""
  return stage_of(stages, max(step - 1, 0))


def identity(config):
  """What makes a run what it is, of the plain values of a stage's configuration: with others its checkpoints fit no more."""
  parts = {"text_encoder": ("name", "train"), "autoencoder": ("name",)}
  parts = {part: {key: config[part][key] for key in keys} for part, keys in parts.items()}
  if config["task"] == "autoencoder":
    parts["autoencoder"]["fields"] = config["autoencoder"].get("fields", {})
    if config["autoencoder"].get("adversarial_weight"):
      parts["autoencoder"]["discriminator"] = config["autoencoder"]["discriminator"]
  return parts | {key: config[key] for key in ("task", "seed", "model")}


def changed_keys(old, new, prefix=""):
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
def naming(stage):
  """Says in which stage the mistake of a ValueError is."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f"config: stage {stage.name!r}: {str(error).removeprefix('config: ')}") from None


def total_steps(stages):
  return stages[-1].start + stages[-1].steps
