"""Configs of the pipeline: Python files with `get_config()`, as for training, and changes from the command line.

`steps` names the steps in order. The key with a step's name holds its settings, the fields of its class. A step may appear
twice under other names: `config.second = dict(step="scores", ...)`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from data import paths
from data.command_line import load_config
from data.config import plain
from data.prepare.chain import Chain
from data.prepare.collect import Collect
from data.prepare.steps import Step
from data.prepare.workers import CORES, Limits

STEPS = {
  "collect": "collect:Collect",
  "probe": "collect:Probe",
  "duplicates": "duplicates:Duplicates",
  "scenes": "scenes:Scenes",
  "cut": "cut:Cut",
  "crops": "cut:Crops",
  "scores": "scores:Scores",
  "caption": "caption:Caption",
  "clean": "clean:Clean",
  "filter": "selection:Filter",
  "sample": "selection:Sample",
  "balance": "selection:Balance",
  "split": "selection:Split",
  "export": "export:Export",
  "report": "report:Report",
}
_OWN = ("output", "steps", "workers", "limits", "patience")


def unknown(what: str, name: object, known: Iterable[str]) -> ValueError:
  """The error for an unknown name. It names the closest known name, or all of them."""
  near = difflib.get_close_matches(str(name), known, 1)
  hint = f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
  return ValueError(f"there is no {what} {name!r}{hint}")


def import_class(path: str, where: str) -> type:
  """The class that "module:Class" names. Raises ValueError, which starts with `where`."""
  module, _, name = path.partition(":")
  try:
    return getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError) as error:
    raise ValueError(f"{where}: {path} can't be imported ({error})") from None


def step_class(title: str) -> type[Step]:
  """The class of the step that configs call `title`."""
  if not isinstance(title, str) or title not in STEPS:
    raise unknown("step", title, STEPS)
  return import_class(f"data.prepare.{STEPS[title]}", title)


def load(file: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
  """The config of a file, changed by `--config.KEY=VALUE`. Raises ValueError, in one line, for any error in either."""
  values = plain(load_config(file))
  for key, value in assignments(overrides, "--config."):
    _set(values, key.split("."), value, key)
  return values


def assignments(arguments: Iterable[str], prefix: str) -> list[tuple[str, Any]]:
  """[(key, value)] of arguments PREFIX + "KEY=VALUE". A value is a Python literal, or else a text."""
  found = []
  for argument in arguments:
    key, sign, text = argument.removeprefix(prefix).partition("=")
    if not argument.startswith(prefix) or not sign:
      raise ValueError(f"unexpected argument {argument!r}; give {prefix}KEY=VALUE, or see --help for the flags")
    try:
      value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      value = text
    found.append((key, value))
  return found


def _set(values: dict, keys: list[str], value: Any, whole: str) -> None:
  for key in keys[:-1]:
    if key not in values:
      if key not in (*STEPS, "limits"):
        raise ValueError(f"--config.{whole}: {unknown('key', key, values)}")
      values[key] = {}
    values = values[key]
    if not isinstance(values, dict):
      raise ValueError(f"--config.{whole}: {key!r} is no dict of settings")
  values[keys[-1]] = value  # `create` refuses unknown settings


def chain(values: Mapping[str, Any], *, workers: int = 0, shard: tuple[int, int] = (0, 1)) -> Chain:
  """The chain that a config declares. Raises ValueError for a wrong key, step or setting."""
  if "steps" not in values:
    raise ValueError("steps is missing: this is no config of data.prepare. Start from configs/data/local.py")
  names = values["steps"]
  names = (names,) if isinstance(names, str) else names
  if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
    raise ValueError(f"steps = {names!r} is no tuple of names; known: {', '.join(STEPS)}")
  output = values.get("output")
  if not output or not isinstance(output, str):
    raise ValueError(f"output = {output!r} is no folder: give the folder of the run, or gs://BUCKET/NAME")
  paths.check(output, "output")
  if wrong := next((key for key in values if key not in (*_OWN, *names, *STEPS)), None):
    raise unknown("key", wrong, [*_OWN, *names])
  for key, kind in (("workers", int), ("patience", (int, float))):
    if not isinstance(value := values.get(key, 0), kind) or isinstance(value, bool) or value < 0:
      raise ValueError(f"{key} = {value!r} is no number from 0 up")
  workers = workers or values.get("workers") or CORES
  limits = create(Limits, _settings(values, "limits"), "limits")
  steps = _steps(values, names)
  return Chain(output, steps, workers=workers, limits=limits, shard=shard, patience=values.get("patience", 3600.0))


def _steps(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Step]:
  steps: dict[str, Step] = {}
  for name in names:
    if name in steps:
      raise ValueError(f"steps has {name!r} twice: give the second one a name and config.NAME = dict(step={name!r}, ...)")
    settings = _settings(values, name)
    steps[name] = create(step_class(settings.pop("step", name)), settings, name)
  if [i for i, step in enumerate(steps.values()) if isinstance(step, Collect)] != [0]:
    raise ValueError(f"steps = {tuple(steps)} must begin with collect and contain collect once")
  return steps


def _settings(values: Mapping[str, Any], key: str) -> dict[str, Any]:
  found = values.get(key) or {}
  if not isinstance(found, Mapping):
    raise ValueError(f"{key} = {found!r} is no dict of settings")
  return dict(found)


def create(cls: type, settings: Mapping[str, Any], where: str) -> Any:
  """A dataclass from a mapping. Raises ValueError for unknown keys, wrong types and values, and names the allowed ones."""
  fields, kinds = [f.name for f in dataclasses.fields(cls)], _kinds(cls)
  values = {}
  for key, value in settings.items():
    if key not in fields:
      raise ValueError(f"{where}: {unknown('setting', key, fields)}")
    values[key] = _typed(f"{where}.{key}", plain(value), kinds.get(key, Any))
  made = cls(**values)
  try:
    if hasattr(made, "check"):
      made.check()
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from None
  return made


def _kinds(cls: type) -> dict[str, Any]:
  """{field: its type}; {} for a user's class whose annotations can't be resolved (imports under `TYPE_CHECKING`)."""
  try:
    return typing.get_type_hints(cls)
  except (NameError, AttributeError):
    return {}


def _typed(where: str, value: Any, kind: Any) -> Any:
  """The value if it has the field's type. A single text may stand for a tuple of texts."""
  if isinstance(value, str) and not _fits(value, kind) and _fits((value,), kind):
    value = (value,)
  if not _fits(value, kind):
    text = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    raise ValueError(f"{where} = {value!r} is no {text.replace('|', 'or')}")
  return value


def _fits(value: Any, kind: Any) -> bool:
  """Whether a value has a type. Types that a config can't hold are not checked."""
  origin, inner = typing.get_origin(kind), typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    return any(_fits(value, one) for one in inner)
  if origin is tuple:
    each = inner[:1] * len(value) if inner[1:] == (...,) and isinstance(value, tuple) else inner
    return isinstance(value, tuple) and len(value) == len(each) and all(map(_fits, value, each))
  if origin is dict:
    return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
  if kind not in (int, float, str, bool, tuple, dict, type(None)):
    return True
  return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
