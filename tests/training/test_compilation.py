"""Programs compile during training, each one once, and a second start finds all of them in the cache."""

import json
import re

import pytest

from stdit_jax.training.compilation import AheadOfTime
from tests.tiny_run import frozen_text, run_module, write_config


def losses(output):
  return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_second_start_compiles_nothing(assets, tmp_path):
  """Two output folders can share one cache. The losses are the same. Equal programs of two stages are compiled once."""
  cache = tmp_path / "first" / "compilation_cache"
  texts = []
  for name, settings in (("first", {}), ("second", {"compilation_cache": str(cache)})):
    stages = {"name": "a", "steps": 2}, {"name": "b", "steps": 1}
    settings |= {"data__buckets": (("64p", 1, 1.0, 2),), "stages": stages, **frozen_text(assets, "ahead")}
    config = write_config(tmp_path / f"{name}.py", assets, tmp_path / name, **settings)
    result = run_module("stdit_jax.train", "--config", config, JAX_COMPILATION_CACHE_DIR="")
    assert result.returncode == 0, result.stderr[-3000:]
    texts.append(result.stdout)
    if name == "first":
      files = {p.name for p in cache.iterdir()}
  programs = [f"{stage}: {name}" for name in ("text encoder, 2 captions", "gradient 64p x 1", "update") for stage in "ab"]
  for program in programs:
    how = "compiled" if program in (programs[0], programs[2], *programs[4:]) else "from the compilation cache"
    assert re.search(rf"{program}: {how} in \d+", texts[0]), texts[0]
    assert re.search(rf"{program}: from the compilation cache in \d+", texts[1]), texts[1]
  assert re.search(r"\d programs are ready: 0 from the cache, \d compiled", texts[0])
  assert re.search(r"\d programs are ready: (\d) from the cache, 0 compiled", texts[1])
  assert "3 encode programs: 0 from files, 3 to compile" in texts[0]
  assert "3 encode programs: 3 from files, 0 to compile" in texts[1]
  # No program was added to the cache.
  assert {p.name for p in cache.iterdir() if p.name.endswith("-cache")} == {f for f in files if f.endswith("-cache")}
  assert losses(tmp_path / "first") == losses(tmp_path / "second")
  assert not (tmp_path / "second" / "compilation_cache").exists()


def test_background_compilation_returns_programs_and_errors():
  import jax
  import jax.numpy as jnp

  said = []
  compiler = AheadOfTime(1, said.append)
  shape = jax.ShapeDtypeStruct((2,), jnp.float32)
  double = compiler.add("double", jax.jit(lambda x: 2 * x).lower(shape))
  wrong = compiler.add("wrong", jax.jit(lambda x: x + 1, compiler_options={"no_such_option": True}).lower(shape))
  assert double.result()(jnp.ones(2)).tolist() == [2, 2]
  with pytest.raises(Exception, match="no_such_option"):
    wrong.result()
  assert wrong.done()
  assert said[0].startswith("double: ")
  compiler.close()
