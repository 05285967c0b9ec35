"""Checks of fields that users set by name: the name is known, and the value has the field's type."""

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")
KINDS = {
  bool: "True or False", int: "a whole number", float: "a number", str: "a text", tuple: "a tuple", list: "a list",
  dict: "a dict", Mapping: "a dict", types.NoneType: "None",
}  # fmt: skip
_ACCEPTED = {float: (float, int), tuple: (tuple, list)}


def is_of_type(value: Any, annotation: Any) -> bool:
  """Whether a value has a type or one type of a union. A float may be a whole number, and a tuple may be a list."""
  members = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
  kinds = [typing.get_origin(member) or member for member in members]
  accepted = tuple(kind for member in kinds for kind in _ACCEPTED.get(member, (member,)))
  return isinstance(value, accepted) and (not isinstance(value, bool) or bool in kinds)


def replace(config: Any, overrides: Mapping[str, Any], what: str) -> Any:
  """A dataclass with some fields replaced. Lists become tuples.

  Raises ValueError if a field is unknown or has another type (the message begins with `what`), or if `__post_init__` raises it.
  """
  fields = {field.name: field for field in dataclasses.fields(config)}
  for key, value in overrides.items():
    if key not in fields:
      raise ValueError(f"{what}: unknown field {key!r}; allowed: {', '.join(sorted(fields))}")
    if not is_of_type(value, fields[key].type):
      raise ValueError(f"{what}: {key} is {value!r}; give a value like {getattr(config, key)!r}")
  return dataclasses.replace(config, **{k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()})


def choose(table: Mapping[str, Value], name: str, what: str) -> Value:
  """`table[name]`. Raises ValueError, with the known names, if the name is unknown."""
  if name not in table:
    raise ValueError(f"unknown {what} {name!r}; allowed: {', '.join(table)}")
  return table[name]


def check_choices(config: Any, what: str, **choices: Iterable) -> None:
  """Raises ValueError if a field of `config` has none of the values that `choices` allows for it."""
  for name, allowed in choices.items():
    if (value := getattr(config, name)) not in allowed:
      raise ValueError(f"{what}: {name} is {value!r}; allowed: {', '.join(map(str, allowed))}")
