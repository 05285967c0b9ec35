"""Configs of the pipeline: Python files with `get_config()`, as those of the training, and what is set on the command line.

`steps` names the steps in order; the key of the same name holds a step's settings (fields of its class). A step may be there
twice under names of its own: `config.second = dict(step="scores", ...)`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import importlib.util
import os
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

from data import paths
from data.config import plain
from data.prepare.chain import Chain
from data.prepare.steps import Source, Step
from data.prepare.workers import Limits

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


def step_class(title: str) -> type[Step]:
  """The class of a step by what configs call it."""
  if not isinstance(title, str) or title not in STEPS:
    near = difflib.get_close_matches(str(title), STEPS, 1)
    raise ValueError(
      f"there is no step {title!r}" + (f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(STEPS)}")
    )
  module, _, name = STEPS[title].partition(":")
  return getattr(importlib.import_module(f"data.prepare.{module}"), name)


def load(file: str, overrides: list[str] = ()) -> dict[str, Any]:
  """The config of a file, with `--config.KEY=VALUE` set. ValueError in one line for whatever is wrong with either."""
  if not os.path.isfile(file):
    raise ValueError(f"--config {file}: no such file")
  if not file.endswith(".py"):
    raise ValueError(f"--config {file}: is no Python file with get_config()")
  spec = importlib.util.spec_from_file_location("prepare_config", file)
  module = importlib.util.module_from_spec(spec)
  sys.path.insert(0, os.getcwd())  # configs import each other as `configs.data.NAME`
  try:
    spec.loader.exec_module(module)
    values = plain(module.get_config())
  except AttributeError as error:
    raise ValueError(f"--config {file}: {error}") from None
  except SyntaxError as error:
    raise ValueError(f"--config {file} line {error.lineno}: {error.msg}") from None
  except Exception as error:  # whatever the file does wrong
    raise ValueError(f"--config {file}: {type(error).__name__}: {' '.join(str(error).split())}") from None
  finally:
    sys.path.pop(0)
  for argument in overrides:
    key, sign, value = argument.removeprefix("--config.").partition("=")
    if not argument.startswith("--config.") or not sign:
      raise ValueError(f"unexpected argument {argument!r}; give keys as --config.KEY=VALUE")
    _set(values, key.split("."), literal(value), key)
  return values


def _set(values: dict, keys: list[str], value: Any, whole: str) -> None:
  for key in keys[:-1]:
    if key not in values:
      if key not in (*STEPS, "limits"):
        raise ValueError(f"--config.{whole}: there is no {key!r}; there is {', '.join(values)}")
      values[key] = {}
    values = values[key]
    if not isinstance(values, dict):
      raise ValueError(f"--config.{whole}: {key!r} holds no keys")
  values[keys[-1]] = value  # a step refuses what it does not know


def literal(text: str) -> Any:
  """A Python literal, else the text itself."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def chain(values: Mapping[str, Any], *, workers: int = 0, shard: tuple[int, int] = (0, 1)) -> Chain:
  """The chain that a config declares, every setting checked."""
  if "steps" not in values:
    raise ValueError("steps is missing: the config is none of this pipeline, as configs/data/local.py is")
  names = values["steps"]
  names = (names,) if isinstance(names, str) else names
  if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
    raise ValueError(f"steps = {names!r} is no tuple of names; known: {', '.join(STEPS)}")
  if not values.get("output"):
    raise ValueError("output is missing: the folder of the run, or gs://BUCKET/NAME")
  if not isinstance(values["output"], str):
    raise ValueError(f"output = {values['output']!r} is no folder")
  paths.check(values["output"], "output")
  for key in values:
    if key not in (*_OWN, *names) and key not in STEPS:
      near = difflib.get_close_matches(key, [*_OWN, *names], 1)
      raise ValueError(f"there is no key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
  steps = {}
  for name in names:
    if name in steps:
      raise ValueError(f"steps has {name!r} twice: give the second one a name and config.NAME = dict(step={name!r}, ...)")
    settings = _settings(values, name)
    title = settings.pop("step", name)
    steps[name] = create(step_class(title), settings, name)
  if not steps or not isinstance(next(iter(steps.values())), Source):
    raise ValueError("steps has to begin with collect")
  if sources := [n for n, s in list(steps.items())[1:] if isinstance(s, Source)]:
    raise ValueError(f"{sources[0]} can only be the first step")
  limits = create(Limits, _settings(values, "limits"), "limits")
  for key, kind in (("workers", int), ("patience", (int, float))):
    if not isinstance(value := values.get(key, 0), kind) or isinstance(value, bool) or value < 0:
      raise ValueError(f"{key} = {value!r} is no number from 0 up")
  workers = workers or values.get("workers") or os.cpu_count() or 1
  return Chain(
    values["output"], steps, workers=workers, limits=limits, shard=shard, patience=values.get("patience", 3600.0)
  )  # fmt: skip


def _settings(values: Mapping[str, Any], key: str) -> dict[str, Any]:
  """What a config holds for a step, or for `limits`."""
  found = values.get(key) or {}
  if not isinstance(found, Mapping):
    raise ValueError(f"{key} = {found!r} is none: it holds settings")
  return dict(found)


def defaults(cls: type) -> dict[str, Any]:
  """{setting: its default} of a step."""
  return {f.name: getattr(cls(), f.name) for f in dataclasses.fields(cls)}


def create(cls: type, settings: Mapping[str, Any], where: str) -> Any:
  """A dataclass from a mapping of a config. ValueError for unknown keys, wrong types and values, naming the allowed ones."""
  fields, kinds = {f.name: f for f in dataclasses.fields(cls)}, _kinds(cls)
  values = {}
  for key, value in settings.items():
    if key not in fields:
      near = difflib.get_close_matches(key, fields, 1)
      hint = f", did you mean {near[0]!r}?" if near else f"; it has: {', '.join(fields)}"
      raise ValueError(f"{where}: there is no setting {key!r}{hint}")
    values[key] = _typed(f"{where}.{key}", plain(value), kinds.get(key, Any))
  made = cls(**values)
  try:
    if hasattr(made, "check"):
      made.check()
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from None
  return made


def _kinds(cls: type) -> dict[str, Any]:
  """{field: its type}; none for a class whose annotations have names that are not there (under `TYPE_CHECKING`)."""
  try:
    return typing.get_type_hints(cls)
  except (NameError, AttributeError):
    return {}


def _typed(where: str, value: Any, kind: Any) -> Any:
  """The value, if it is of a field's type; a text for one that wants several is the only one of them."""
  if isinstance(value, str) and not _fits(value, kind) and _fits((value,), kind):
    value = (value,)
  if not _fits(value, kind):
    text = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    raise ValueError(f"{where} = {value!r} is no {text.replace('|', 'or')}")
  return value


def _fits(value: Any, kind: Any) -> bool:
  """Whether a config's value is of a type; of one that configs can't hold nothing is asked."""
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
