"""Tests of what the entry points share: configuration files and their changes, memory, errors."""

import subprocess
import sys

import jax
import pytest

from data.command_line import OneLineParser
from stdit_jax.cli import one_line_errors, parse_with_changes, read_config
from tests.tiny_run import ROOT, environment

COUNT_PAGES = """
import ctypes, resource, statistics, sys
import jax
from stdit_jax.cli import keep_freed_memory
if not hasattr(ctypes.CDLL(None), "mallopt"):
  raise SystemExit(3)
if sys.argv[1] == "keep":
  keep_freed_memory()
matrix, x = jax.numpy.ones((4096, 4096)), jax.numpy.ones(4096)
program = jax.jit(lambda matrix, x: jax.lax.fori_loop(0, 3, lambda _, y: ((matrix + y) @ y) / (4096 + y @ (matrix - y)), x))
pages = []
for _ in range(12):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  program(matrix, x).block_until_ready()
  pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(statistics.median(pages))
"""


def test_a_process_reuses_freed_memory():
  """A program with a work space of 64 MB touches new pages in every execution, unless the process keeps freed memory."""
  pages = {}
  for mode in ("free", "keep"):
    command = [sys.executable, "-c", COUNT_PAGES, mode]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    if result.returncode == 3:
      pytest.skip("this C library has no mallopt")
    assert result.returncode == 0, result.stderr
    pages[mode] = float(result.stdout)
  assert pages["keep"] < 0.01 * pages["free"]


def test_an_out_of_memory_error_is_one_line(capsys):
  """Other errors of JAX keep their traceback."""
  with pytest.raises(SystemExit) as exit, one_line_errors():
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nallocations: ...")
  assert exit.value.code == 2
  assert capsys.readouterr().err == (
    "error: a device has too little memory: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes. Use fewer "
    "frames or pixels, or more devices\n"
  )
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), one_line_errors():
    raise jax.errors.JaxRuntimeError("INTERNAL: something else")


VALUES = [
  ("--config.log_every=3", "log_every", 3),
  ("--config.optimizer.learning_rate=1e-4", "optimizer.learning_rate", 1e-4),
  ("--config.optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
  ("--config.optimizer.eps=inf", "optimizer.eps", float("inf")),
  ("--config.mesh.fsdp=-1", "mesh.fsdp", -1),
  ("--config.output=5", "output", "5"),
  ("--config.init_strict=false", "init_strict", False),
  ("--config.restart_data", "restart_data", True),
  ("--noconfig.init_strict", "init_strict", False),
  ("--config.data.read_ahead=4", "data.read_ahead", 4),
  ("--config.data.tables=(('a.csv', 1), ('b.csv', 2))", "data.tables", (("a.csv", 1), ("b.csv", 2))),
  ("--config.data.tables=clips/a.csv", "data.tables", ("clips/a.csv",)),
  ("--config.stages=({'name': 'x', 'steps': 2},)", "stages", ({"name": "x", "steps": 2},)),
  ("--config.mask_ratios={'random': 0.3}", "mask_ratios.random", 0.3),
]


@pytest.mark.parametrize(("change", "key", "value"), VALUES, ids=lambda v: str(v)[:30])
def test_a_change_has_the_type_of_its_key(change, key, value):
  found = read_config("configs/base.py", [change])
  for part in key.split("."):
    found = found[part]
  assert (found, type(found)) == (value, type(value))


def test_changes_are_separated_from_other_arguments():
  parser = OneLineParser("command")
  parser.add_argument("--config")
  argv = ["--config.output", "runs/x", "--config=FILE", "--config.init_strict", "--config.seed=1", "--noconfig.restart_data"]
  args = parse_with_changes(parser, argv)
  assert args.config == "FILE"
  assert args.changes == ["--config.output=runs/x", "--config.init_strict", "--config.seed=1", "--noconfig.restart_data"]


WRONG_CHANGES = [
  ("--config.log_every=1.5", "--config.log_every=1.5: '1.5' is not a whole number; write a value like 10"),
  ("--config.seed=True", "'True' is not a whole number"),
  ("--config.seed", "--config.seed: the value is missing; write --config.seed=VALUE"),
  ("--config.init_strict=maybe", "'maybe' is not True or False"),
  ("--config.ema_decay=high", "'high' is not a number; write a value like 0.99"),
  ("--config.data.tables=('a',", "\"('a',\" is not a tuple"),
  ("--config.mesh=3", "'3' is not a dict; write a value like {'data': -1"),
  ("--config.optimizer.learning_rat=1", "no key 'optimizer.learning_rat'; did you mean 'optimizer.learning_rate'?"),
  ("--config.model.fields.depht=1", "no key 'model.fields.depht'; configs/base.py has all keys"),
  ("--config.output.folder=x", "output is 'runs/base' and has no keys"),
]


@pytest.mark.parametrize(("change", "words"), WRONG_CHANGES)
def test_an_error_in_a_change_is_one_line(change, words):
  with pytest.raises(ValueError, match=r".") as error:
    read_config("configs/base.py", [change])
  assert words in str(error.value)
  assert "\n" not in str(error.value)


WRONG_FILES = [
  (None, "", "there is no such file"),
  ("x = 1\n", "", "the file has no get_config()"),
  ("def get_config(:\n", "", "SyntaxError: invalid syntax (config.py, line 1)"),
  ("import nothing_of_this_name\n", "", "line 1: ModuleNotFoundError: No module named"),
  ("def get_config():\n  return 1 / 0\n", "", "line 2: ZeroDivisionError: division by zero"),
  ("def get_config():\n  return {}\n", "", "get_config() returns dict; return an ml_collections.ConfigDict"),
  ("def get_config():\n  pass\n", ":small", "TypeError: get_config() takes 0 positional arguments"),
  ("def get_config(size):\n  raise ValueError(f'there is no size {size!r}')\n", ":small", "there is no size 'small'"),
]


@pytest.mark.parametrize(("text", "argument", "words"), WRONG_FILES, ids=lambda v: str(v)[:30])
def test_an_error_in_a_configuration_file_is_one_line(tmp_path, text, argument, words):
  path = tmp_path / "config.py"
  if text is not None:
    path.write_text(text)
  with pytest.raises(ValueError, match=r".") as error:
    read_config(f"{path}{argument}")
  assert str(error.value).startswith(f"--config {path}{argument}: {words}")
  assert "\n" not in str(error.value)


def test_each_configuration_file_sees_its_own_names(tmp_path):
  """Files are read in turn, and none stays in `sys.modules`."""
  before = set(sys.modules)
  for name in ("a", "b"):
    (tmp_path / f"{name}.py").write_text(
      f"from configs import base\n\nNAME = {name!r}\n\n\ndef get_config():\n  config = base.get_config()\n"
      "  config.output = NAME\n  return config\n"
    )
  assert [read_config(f"{tmp_path}/{name}.py").output for name in ("a", "b", "a")] == ["a", "b", "a"]
  assert not {name for name in set(sys.modules) - before if "config" in name} - {"configs", "configs.base"}
