"""Rules of the code base: one place reads the task, only models/ and interop/ name a denoiser, functions are small, public
functions are annotated."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PRODUCT = sorted([*ROOT.glob("stdit_jax/**/*.py"), *ROOT.glob("data/**/*.py")])
OURS = [path for path in PRODUCT if path.is_relative_to(ROOT / "stdit_jax")]
LONGEST, MOST_PARAMETERS = 60, 8
LONG = {"train": "stdit_jax/training/loop.py"}  # one function, so that the training loop can be read in one piece


def functions():
  for path in PRODUCT:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        yield str(path.relative_to(ROOT)), node


def test_only_one_place_reads_the_task():
  found = [
    f"{path.relative_to(ROOT)}: {line.strip()}"
    for path in OURS
    for line in path.read_text().splitlines()
    if re.search(r"config\.task|task ==", line)
  ]
  assert found == ["stdit_jax/training/objectives.py: return config.task"]


def test_only_models_and_interop_name_a_denoiser():
  outside = [path for path in OURS if path.relative_to(ROOT).parts[1] not in ("models", "interop")]
  named = {str(path.relative_to(ROOT)) for path in outside if re.search(r"\bstdit(?!_jax)\w*", path.read_text())}
  assert not named


def test_functions_are_short():
  long = {node.name: path for path, node in functions() if node.end_lineno - node.lineno + 1 > LONGEST}
  assert long == LONG


def test_functions_take_few_parameters():
  def count(arguments):
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))

  assert not {f"{path}: {node.name}" for path, node in functions() if count(node.args) > MOST_PARAMETERS}


def public_functions(body, in_class=False):
  """(function, whether it is a method) of the public functions of a module or class."""
  for node in body:
    public = not getattr(node, "name", "_").startswith("_") or getattr(node, "name", "") == "__call__"
    if isinstance(node, ast.ClassDef) and public:
      yield from public_functions(node.body, in_class=True)
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and public:
      yield node, in_class and "staticmethod" not in map(ast.unparse, node.decorator_list)


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_functions_are_annotated(path):
  for node, is_method in public_functions(ast.parse(path.read_text()).body):
    arguments = [*node.args.posonlyargs, *node.args.args][is_method:] + node.args.kwonlyargs
    missing = [a.arg for a in arguments if a.annotation is None] + ["return"] * (node.returns is None)
    assert not missing, f"{path}:{node.lineno}: {node.name}: {missing}"


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_calls_have_few_arguments(path):
  """A call that constructs an object may have more, if all of them have names."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Call) and not (
      ast.unparse(node.func).rpartition(".")[2].lstrip("_")[:1].isupper() and all(k.arg for k in node.keywords)
    ):
      assert len(node.args) + len(node.keywords) <= MOST_PARAMETERS, f"{path}:{node.lineno}: {ast.unparse(node.func)}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("stdit_jax/models/*.py")), ids=lambda path: path.name)
def test_model_files_are_short(path):
  assert len(path.read_text().splitlines()) <= 350
