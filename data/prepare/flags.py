"""Command-line flags as frozen dataclasses: each command has one class, and each field of it is one flag."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import typing
from typing import Any, TypeVar

from data.command_line import OneLineParser

Settings = TypeVar("Settings")
PROGRAM = "python -m data.prepare"
CORES = os.cpu_count() or 1


def flag(help: str, default: Any = dataclasses.MISSING, *names: str) -> Any:
  """A field that is a flag, required without a default. `names`: its names (default: --FIELD); FIELD: it is positional."""
  return dataclasses.field(default=default, metadata={"help": help, "names": names})


def parse(
  cls: type[Settings], program: str, arguments: list[str], *, about: str = "", after: str = ""
) -> tuple[Settings, list[str]]:
  """(settings, arguments that are no flags of the class). A wrong flag ends the program with one line on stderr.

  about: text above the flags in --help (default: docstring of the class); after: text below them.
  """
  how = {
    "description": inspect.cleandoc(about or cls.__doc__ or ""),
    "epilog": after,
    "formatter_class": argparse.RawDescriptionHelpFormatter,
  }
  parser, kinds = OneLineParser(prog=program, **how), typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    names, kind = field.metadata["names"] or ("--" + field.name.replace("_", "-"),), kinds[field.name]
    options: dict[str, Any] = {"help": field.metadata["help"]}
    if names[0].startswith("-"):
      required = field.default is dataclasses.MISSING
      options |= {"dest": field.name, "required": required, "default": None if required else field.default}
    options |= {"action": "store_true"} if kind is bool else {"type": kind}
    parser.add_argument(*names, **options)
  found, rest = parser.parse_known_args(arguments)
  return cls(**vars(found)), rest


def parse_all(cls: type[Settings], command: str, arguments: list[str], about: str) -> Settings:
  """Settings of a command of `data.prepare` that takes no other arguments."""
  settings, rest = parse(cls, f"{PROGRAM} {command}", arguments, about=about)
  if rest:
    raise ValueError(f"unexpected argument {rest[0]!r}; {PROGRAM} {command} --help lists the flags")
  return settings
