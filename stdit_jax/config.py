"""The configuration of a run or a stage as frozen dataclasses, checked once.

configs/base.py explains each key and gives its default. The classes here give its type and its allowed values.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from data import paths
from data.config import DataConfig, plain
from stdit_jax.fields import KINDS, is_of_type

Fields = dict[str, Any]  # the dataclass that takes these fields checks them

_AXES = ("data", "fsdp", "sequence", "tensor")
_NO_KEYS = ("rows_per_bucket", "num_classes", "stage")  # fields of DataConfig that the program sets


def _compiles(pattern):
  try:
    return re.compile(pattern)
  except (re.error, TypeError):
    return False


def _is_scale(entry):
  return isinstance(entry, tuple) and len(entry) == 2 and _compiles(entry[0]) and is_of_type(entry[1], float) and entry[1] > 0


def _is_mesh(sizes):
  return set(sizes) <= set(_AXES) and all(is_of_type(size, int) for size in sizes.values())


def _are_steps(steps):
  return not steps or (len(steps) == 2 and all(type(n) is int for n in steps) and 1 <= steps[0] <= steps[1])


# The types of keys: (the allowed values in words, a function that tells whether a value is allowed).
Mesh = Annotated[dict[str, int], (f"whole numbers for the axes {', '.join(_AXES)}; an axis without a key has 1", _is_mesh)]
Whole = Annotated[int, ("a whole number of at least 0", lambda n: n >= 0)]
Count = Annotated[int, ("a whole number of at least 1", lambda n: n >= 1)]
Seed = Annotated[int, ("a whole number of at least 0, at most 4294967295", lambda n: 0 <= n < 2**32)]
Amount = Annotated[float, ("a number of at least 0", lambda x: x >= 0)]
Share = Annotated[float, ("a number of at least 0, at most 1", lambda x: 0 <= x <= 1)]
Pattern = Annotated[str, ("a regular expression", _compiles)]
Scales = Annotated[tuple, ("(regular expression, factor above 0) pairs", lambda pairs: all(map(_is_scale, pairs)))]
Steps = Annotated[tuple, ("(), or (first, last) optimizer steps from 1 on", _are_steps)]
_BUCKETS = re.compile(r"auto|never|always|\w+:\d+(,\w+:\d+)*")
Split = Annotated[str, ("'auto', 'never', 'always', or buckets: '480p:204,720p:51'", _BUCKETS.fullmatch)]
Resume = Annotated[str, ("'auto', 'required', or a step such as '1200'", re.compile(r"auto|required|\d+").fullmatch)]


@dataclasses.dataclass(frozen=True)
class Named:
  """A part chosen by name, and the fields that replace the defaults of this name."""

  name: str
  fields: Fields


@dataclasses.dataclass(frozen=True)
class TextEncoder(Named):
  weights: str
  tokenizer: str
  max_length: int
  where: Literal["step", "ahead", "disk"]
  train: bool
  clean_captions: bool

  def __post_init__(self):
    if self.train and self.where != "step":
      raise ValueError(f"config: text_encoder.train needs text_encoder.where='step', not {self.where!r}; change one of the two")


@dataclasses.dataclass(frozen=True)
class Perceptual:
  name: str
  weights: str
  sha256: str
  frames: Whole


@dataclasses.dataclass(frozen=True)
class Autoencoder(Named):
  weights: str
  sample_posterior: bool
  micro_batch: Count
  dtype: str
  cache_gb: Amount
  crop: int
  reconstruction: Literal["l1", "l2"]
  reconstruction_weight: Amount
  kl_weight: Amount
  latent_weight: Amount
  identity_weight: Amount
  perceptual_weight: Amount
  adversarial_weight: Amount
  adaptive: bool
  pixel_frames: Whole
  image_weights: str
  perceptual: Perceptual
  discriminator: Fields


@dataclasses.dataclass(frozen=True)
class Optimizer:
  learning_rate: Amount
  warmup_steps: Whole
  schedule: Literal["constant", "cosine"]
  b1: Share
  b2: Share
  eps: Amount
  weight_decay: Amount
  clip_norm: Amount
  accumulate: Count
  scales: Scales


@dataclasses.dataclass(frozen=True)
class Validation:
  tables: tuple | str
  every: Whole
  samples_per_bucket: Count
  timesteps: Count


@dataclasses.dataclass(frozen=True)
class Watchdog:
  timeout: Amount
  slow_timeout: Amount


@dataclasses.dataclass(frozen=True)
class Sample:
  prompts: tuple
  resolution: str
  aspect_ratio: str
  num_frames: int
  fps: int
  steps: int
  guidance_scale: float
  seed: int


@dataclasses.dataclass(frozen=True)
class Config:
  """The configuration of a run, or of one of its stages, which has no `stages` of its own."""

  output: str
  seed: Seed
  task: Literal["denoiser", "autoencoder"]
  platform: Literal["", "cpu", "gpu", "tpu"]
  mesh: Mesh
  slices: Mesh
  max_tokens_per_device: Whole
  split_tokens: Split
  init: str
  init_strict: bool
  resume: Resume
  restart_data: bool
  model: Named
  text_encoder: TextEncoder
  autoencoder: Autoencoder
  diffusion: Named
  caption_dropout: Share
  mask_ratios: dict[str, float]
  data: DataConfig
  optimizer: Optimizer
  train: Pattern
  ema_decay: Share
  stages: tuple
  validation: Validation
  compile_threads: Whole
  compilation_cache: str
  profile_steps: Steps
  log_every: Count
  checkpoint_every: Count
  keep_checkpoints: Count
  keep_every: Whole
  max_nonfinite: Count
  watchdog: Watchdog
  sample_every: Whole
  sample: Sample

  def __post_init__(self):
    for name in ("output", "compilation_cache"):
      paths.check(getattr(self, name), f"config: {name}")

  @classmethod
  def of(cls, values: Any) -> "Config":
    """From a ConfigDict or a nested dict. A `Config` is returned as it is.

    Raises ValueError for the first key that is unknown or missing, or whose value has a wrong type or is not allowed.
    """
    return values if isinstance(values, cls) else _group(cls, plain(values))

  def to_dict(self) -> dict[str, Any]:
    """The keys and values as nested dicts."""
    values = dataclasses.asdict(self)
    for name in _NO_KEYS:
      del values["data"][name]
    return values

  def replace(self, changes: Mapping[str, Any]) -> "Config":
    """This configuration with the values of some (dotted) keys replaced. Raises ValueError as `of`."""
    values = self.to_dict()
    for key, value in changes.items():
      group, *names = values, *key.split(".")
      for name in names[:-1]:
        if not isinstance(group.get(name), dict):
          group[name] = {}  # `of` reports the unknown key
        group = group[name]
      group[names[-1]] = value
    return Config.of(values)


def _group(kind: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
  """The dataclass `kind` from the values of its keys. Messages put `prefix` before the keys."""
  kinds = {name: value for name, value in typing.get_type_hints(kind, include_extras=True).items() if name not in _NO_KEYS}
  if not isinstance(values, Mapping):
    raise ValueError(f"config: {prefix[:-1]} must be a group of keys ({', '.join(kinds)}), not {values!r}")
  for key in values:
    if key not in kinds:
      near = difflib.get_close_matches(key, kinds, 1)
      hint = f"did you mean {prefix}{near[0]}?" if near else f"allowed: {', '.join(sorted(kinds))}"
      raise ValueError(f"config: unknown key {prefix + key!r}; {hint}")
  for key in kinds:
    if key not in values:
      raise ValueError(f"config: key {prefix}{key} is missing; configs/base.py has its default")
  return kind(**{key: _checked(f"{prefix}{key}", value, kinds[key]) for key, value in values.items()})


def _checked(key: str, value: Any, annotation: Any) -> Any:
  """A value, or the dataclass of a group. Raises ValueError if `annotation` does not allow the value."""
  kind, *rules = typing.get_args(annotation) if typing.get_origin(annotation) is Annotated else (annotation,)
  if dataclasses.is_dataclass(kind):
    return _group(kind, value, f"{key}.")
  if typing.get_origin(kind) is Literal:
    choices = typing.get_args(kind)
    kind, rules = str, [(", ".join(map(repr, choices)), choices.__contains__)]
  if not is_of_type(value, kind):
    members = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    allowed = " or ".join(KINDS[typing.get_origin(member) or member] for member in members)
    raise ValueError(f"config: {key} is {value!r}; it must be {allowed}")
  for allowed, holds in rules:
    if not holds(value):
      raise ValueError(f"config: {key} is {value!r}; allowed: {allowed}")
  return value
