"""`python -m stdit_jax.convert`: conversions, checks, and one line for each error."""

import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stdit_jax import convert
from stdit_jax.autoencoders import temporal
from stdit_jax.interop import load_variables, open_checkpoint, save_variables, weights
from tests import denoisers
from tests.interop.test_layouts import REFERENCE, assert_same, golden, random_tree, write_all

TINY = {"stdit1_tiny": "STDiT-tiny/2", "stdit2_tiny": "STDiT2-tiny/2", "stdit3_tiny": "STDiT3-tiny/2"}


def run(capsys, *arguments):
  """Runs the command: (exit code, stdout, stderr)."""
  capsys.readouterr()
  code = 0
  try:
    convert.main([str(a) for a in arguments])
  except SystemExit as stop:
    code = stop.code
  return code, *capsys.readouterr()


def read_all(path):
  found = open_checkpoint(path)
  return {name: found.read(name) for name in found.tensors}


@pytest.mark.parametrize("name", TINY)
def test_conversion_round_trips(name, tmp_path, capsys):
  path = REFERENCE / f"{name}.safetensors"
  there = run(capsys, "--input", path, "--model", TINY[name], "--output", tmp_path / "ours", "--max-shard-size", "500KB")
  assert there[0] == 0, there
  assert "tensors fit" in there[1]
  assert (tmp_path / "ours" / "model.safetensors.index.json").exists()
  back = run(capsys, "--input", tmp_path / "ours", "--output", tmp_path / "back.safetensors")  # the file names its model
  assert back[0] == 0, back
  assert_same(read_all(tmp_path / "back.safetensors"), read_all(path))
  assert json.loads(open_checkpoint(tmp_path / "back.safetensors").metadata["config"])["depth"] == 2


def test_conversion_takes_a_dtype_and_other_sizes(tmp_path, capsys):
  config = denoisers.get_config("STDiT3-tiny/2", depth=1, patch_size=(1, 1, 2))
  save_variables(tmp_path / "x.safetensors", "open-sora", random_tree(denoisers.init_shapes(config)), config=config)
  (tmp_path / "fields.json").write_text('{"depth": 1, "patch_size": [1, 1, 2]}')
  for dtype in ("bfloat16", "float16"):
    out = tmp_path / f"{dtype}.safetensors"
    flags = ("--input", tmp_path / "x.safetensors", "--model", "STDiT3-tiny/2", "--dtype", dtype, "--to", "open-sora")
    assert run(capsys, *flags, "--config", tmp_path / "fields.json", "--output", out)[0] == 0
    expected = {name: array.astype(jnp.dtype(dtype)) for name, array in read_all(tmp_path / "x.safetensors").items()}
    assert_same(read_all(out), expected)


def test_config_replaces_shift_and_scale_of_a_video_autoencoder(tmp_path, capsys):
  """The file stores shift and scale, as the original does. --config replaces both in the file, here by other numbers."""
  config = temporal.get_config("tiny-temporal")
  first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
  metadata = weights.model_metadata("tiny-temporal", config)
  save_variables(first, "open-sora-vae", random_tree(temporal.init_shapes(config)), config=config, metadata=metadata)
  numbers = {"shift": [1, 2, 3, 4.5], "scale": 2.0}
  flags = ("--to", "open-sora-vae", "--config", json.dumps(numbers))
  assert run(capsys, "--input", first, "--output", second, *flags)[0] == 0
  before, after = read_all(first), read_all(second)
  np.testing.assert_array_equal(after["shift"].ravel(), numbers["shift"])
  np.testing.assert_array_equal(after["scale"].ravel(), [2.0] * 4)
  assert_same({**before, "shift": after["shift"], "scale": after["scale"]}, after)
  assert run(capsys, "--check", "--input", second)[0] == 0
  code, _, error = run(capsys, "--check", "--input", second, "--config", json.dumps({"shift": 0.0}))
  assert code == 2
  assert "'shift' (1, 2, 3, 4.5) differs from the buffer that the config gives" in error
  code, _, error = run(capsys, "--input", second, "--output", tmp_path / "x.safetensors", "--config", '{"filters": 16}')
  assert code == 2
  assert "doesn't fit the model" in error


@pytest.mark.parametrize("name", ["STDiT-XL/2", "STDiT2-XL/2", "STDiT3-XL/2", "STDiT3-3B/2"])
def test_check_accepts_published_sizes(name, capsys):
  code, out, _ = run(capsys, "--check", "--model", name)
  assert code == 0
  assert f"{name} exported as open-sora: all" in out


def test_check_compares_a_file_with_its_model(capsys, tmp_path):
  path = REFERENCE / "stdit1_tiny.safetensors"
  assert "56 tensors imported and exported: bit-exact" in run(capsys, "--check", "--model", "STDiT-tiny/2", "--input", path)[1]
  table = tmp_path / "keys.json"
  table.write_text(json.dumps({"tensors": {"x": [1]}}))
  code, _, error = run(capsys, "--check", "--model", "STDiT-tiny/2", "--keys", table)
  assert code == 2
  assert "1 missing, 56 unexpected" in error.splitlines()[0]


def test_a_training_run_is_converted(tmp_path, capsys):
  checkpoints = pytest.importorskip("stdit_jax.training.checkpoints")
  config = denoisers.get_config("STDiT3-tiny/2")
  tree = jax.tree.map(jnp.asarray, random_tree(denoisers.init_shapes(config)))
  params = {"denoiser": tree["params"]}
  ema = jax.tree.map(lambda x: x + 1, params)
  (tmp_path / "run").mkdir()
  described = {"task": "denoiser", "model": {"name": "STDiT3-tiny/2", "fields": {"remat": "full"}}}
  (tmp_path / "run" / "config.json").write_text(json.dumps(described))
  run_folder = checkpoints.Checkpoints(tmp_path / "run")
  state = {"params": params, "ema": ema, "opt": {"count": jnp.zeros(())}}
  run_folder.save(7, state, {"denoiser": tree["constants"]}, {"step": 7})
  run_folder.wait()
  run_folder.close()
  for item, expected in (("ema", ema), ("params", params)):
    out = tmp_path / f"{item}.safetensors"
    code, text, error = run(capsys, "--input", tmp_path / "run", "--output", out, "--item", item)
    assert code == 0, error
    assert f"wrote the {item} weights of the denoiser at step 7 in layout open-sora" in text
    loaded = load_variables(out, "open-sora", denoisers.init_shapes(config), config=config)
    for a, b in zip(jax.tree.leaves(loaded["params"]), jax.tree.leaves(expected)):
      np.testing.assert_array_equal(a, b)
  code, _, error = run(capsys, "--input", tmp_path / "run", "--output", tmp_path / "x.safetensors", "--part", "text_encoder")
  assert (code, error.count("\n")) == (2, 1)
  assert "no own weights for --part text_encoder" in error


MISTAKES = {
  "unrecognized arguments: --inptu": ("--inptu", "x"),
  "give --input and --output": ("--input", "x"),
  "unknown layout 'opensora'": ("--input", "GOLDEN", "--output", "y", "--model", "STDiT3-tiny/2", "--from", "opensora"),
  "invalid choice: 'float8'": ("--dtype", "float8"),
  "'5 apples' is no size": ("--max-shard-size", "5 apples"),
  "no such file or folder": ("--input", "nowhere.safetensors", "--output", "y"),
  "--model is missing": ("--input", "GOLDEN", "--output", "y"),
  "no model is called 'STDiT3-tiny'": ("--input", "GOLDEN", "--output", "y", "--model", "STDiT3-tiny"),
  "unknown field 'dept'": ("--input", "GOLDEN", "--output", "y", "--model", "STDiT3-tiny/2", "--config", '{"dept": 1}'),
  "depth is 'two'": ("--input", "GOLDEN", "--output", "y", "--model", "STDiT3-tiny/2", "--config", '{"depth": "two"}'),
  "give a JSON object": ("--input", "GOLDEN", "--output", "y", "--model", "STDiT3-tiny/2", "--config", '{"depth"'),
  "multiples of num_heads=7": ("--check", "--model", "STDiT3-XL/2", "--config", '{"num_heads": 7}'),
  "has no key table": ("--check", "--model", "STDiT3-tiny/2"),
  "must end in .safetensors": ("--input", "GOLDEN", "--output", "y.json", "--model", "STDiT3-tiny/2"),
  "with layout t5 is called": ("--input", "GOLDEN", "--output", "y", "--model", "STDiT3-tiny/2", "--to", "t5"),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_errors_are_one_line(message, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  arguments = [str(REFERENCE / "stdit3_tiny.safetensors") if a == "GOLDEN" else a for a in MISTAKES[message]]
  code, _, error = run(capsys, *arguments)
  assert code == 2
  assert message in error
  assert error.count("\n") == 1
  assert list(tmp_path.iterdir()) == []


def test_other_models_and_broken_files_are_refused(capsys, tmp_path):
  path = REFERENCE / "stdit3_tiny.safetensors"
  code, _, error = run(capsys, "--input", path, "--output", tmp_path / "y", "--model", "STDiT2-tiny/2")
  assert code == 2
  assert "doesn't fit the model: 21 of 83 tensors fit" in error.splitlines()[0]
  (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-5])
  code, _, error = run(capsys, "--input", tmp_path / "cut.safetensors", "--output", tmp_path / "y", "--model", "STDiT3-tiny/2")
  assert (code, error.count("\n")) == (2, 1)
  assert "It may be damaged or cut short" in error
  for name in ("w.pth", "w.ckpt"):
    code, _, error = run(capsys, "--input", tmp_path / name, "--output", tmp_path / "y", "--model", "STDiT3-tiny/2")
    assert code == 2
    assert "from safetensors.torch import save_file" in error
  assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.safetensors"]


def test_a_full_disk_leaves_no_partial_file(capsys, tmp_path):
  path = REFERENCE / "stdit3_tiny.safetensors"
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, limits[1]))  # longer files fail to be written
  try:
    code, _, error = run(capsys, "--input", path, "--output", tmp_path / "y.safetensors", "--model", "STDiT3-tiny/2")
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert (code, error.count("\n")) == (2, 1)
  assert "y.safetensors: can't be written: File too large" in error
  assert list(tmp_path.iterdir()) == []


def test_unexpected_tensors_may_be_skipped(capsys, tmp_path):
  golden_path, _ = golden("stdit3_tiny")
  tensors = read_all(golden_path)
  write_all(tmp_path / "x.safetensors", tensors | {"extra": np.ones(2, np.float32)})
  flags = ("--input", tmp_path / "x.safetensors", "--output", tmp_path / "y.safetensors", "--model", "STDiT3-tiny/2")
  code, _, error = run(capsys, *flags, "--to", "open-sora")
  assert code == 2
  assert "  extra\n" in error
  assert run(capsys, *flags, "--to", "open-sora", "--allow-unexpected")[0] == 0
  assert_same(read_all(tmp_path / "y.safetensors"), tensors)
  assert run(capsys, *flags, "--allow-unexpected")[0] == 2  # the output exists
  assert run(capsys, *flags, "--allow-unexpected", "--overwrite")[0] == 0
