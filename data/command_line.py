"""What every command of this project shares: one line per error, flags as dataclasses, configuration files."""

import argparse
import dataclasses
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import traceback
import typing
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


class OneLineParser(argparse.ArgumentParser):
  """An ArgumentParser whose errors are one line, without the usage in front."""

  def error(self, message: str) -> NoReturn:
    print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
    raise SystemExit(2)


def flag(help: str, default: Any = None, *names: str, group: str = "", **options: Any) -> Any:
  """Makes a field of a settings class that is also a command-line flag.

  Args:
    names: names of the flag (default: --FIELD). A name without dashes makes the flag a positional argument.
    group: title under which --help lists the flag.
    options: further arguments of `ArgumentParser.add_argument`. The type of the flag is the type of the field.
  """
  return dataclasses.field(default=default, metadata={"flag": (names, group, {"help": help, **options})})


def make_parser(settings: type, program: str, about: str | None, **options: Any) -> OneLineParser:
  """A parser with the flags of a settings class. `about`: text above the flags. `options`: arguments of `ArgumentParser`."""
  how: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, **options}
  parser = OneLineParser(program, description=inspect.cleandoc(about or ""), **how)
  add_flags(parser, settings)
  return parser


def parse(settings: type[T], program: str, arguments: list[str], about: str | None) -> T:
  """Parses the arguments of a command into its settings. An error ends the program with one line on stderr."""
  return settings(**vars(make_parser(settings, program, about).parse_args(arguments)))


def add_flags(parser: argparse.ArgumentParser, settings: type) -> None:
  groups: dict[str, Any] = {"": parser}
  kinds = typing.get_type_hints(settings)
  for field in dataclasses.fields(settings):
    if "flag" not in field.metadata:
      continue
    names, group, options = field.metadata["flag"]
    kind = kinds[field.name]
    while inner := typing.get_args(kind):  # Sequence[str] | None -> str
      kind = inner[0]
    if group not in groups:
      groups[group] = parser.add_argument_group(group)
    names = names or (f"--{field.name.replace('_', '-')}",)
    usual: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": kind}
    if names[0].startswith("-"):
      usual["dest"] = field.name
    groups[group].add_argument(*names, **{"default": field.default, **usual, **options})


def load_config(path: str) -> Any:
  """Returns what `get_config()` of a Python file returns. For FILE:ARGUMENT it calls `get_config(ARGUMENT)`.

  Raises:
    ValueError: the file does not exist, has no `get_config`, or its code raises an error. The message is one line.
  """
  file, *argument = path.split(":", 1)
  if not os.path.isfile(file):
    raise ValueError(f"--config {file}: there is no such file; give a Python file with get_config()")
  # The module stays out of sys.modules, where the next configuration file would replace it.
  loader = importlib.machinery.SourceFileLoader("configuration", file)
  spec = importlib.util.spec_from_file_location(loader.name, file, loader=loader)
  assert spec is not None
  module = importlib.util.module_from_spec(spec)
  try:
    loader.exec_module(module)
    if not hasattr(module, "get_config"):
      raise ValueError("the file has no get_config()")
    return module.get_config(*argument)
  except Exception as error:  # the file may raise anything
    text = " ".join(str(error).split())
    if not isinstance(error, ValueError):  # a ValueError is how a configuration refuses its argument
      lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
      text = f"{f'line {lines[-1]}: ' if lines else ''}{type(error).__name__}: {text}"
    raise ValueError(f"--config {path}: {text}") from None
