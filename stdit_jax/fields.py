"""Fields that users set by name: is the name known, is the value of the field's type. One check for every configuration."""

import dataclasses
import types
import typing

_ACCEPTED = {float: (float, int), tuple: (tuple, list)}


def is_of_type(value, annotation):
  """Whether `value` may stand for `annotation`, a type or a union: whole numbers pass for float, lists for tuples."""
  members = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
  kinds = [typing.get_origin(member) or member for member in members]
  accepted = tuple(kind for member in kinds for kind in _ACCEPTED.get(member, (member,)))
  return isinstance(value, accepted) and (not isinstance(value, bool) or bool in kinds)


def replace(config, overrides, what):
  """The dataclass `config` with the fields of the mapping `overrides` replaced, lists turned into tuples.

  Raises:
    ValueError: a field that is unknown, of another type, or refused by the dataclass; `what` begins the first two lines.
  """
  fields = {field.name: field for field in dataclasses.fields(config)}
  for key, value in overrides.items():
    if key not in fields:
      raise ValueError(f"{what}: unknown field {key!r}; allowed: {', '.join(sorted(fields))}")
    if not is_of_type(value, fields[key].type):
      raise ValueError(f"{what}: {key} is {value!r}; needed is a value like {getattr(config, key)!r}")
  return dataclasses.replace(config, **{k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()})


def choose(table, name, what):
  """`table[name]`; ValueError names what is allowed."""
  if name not in table:
    raise ValueError(f"unknown {what} {name!r}; allowed: {', '.join(table)}")
  return table[name]
