"""Loading into device arrays: shardings, strict and non-strict loads, reports, casts."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stdit_jax.interop import CheckpointError, export_tensors, load_variables, open_checkpoint, open_source, save_variables
from tests import denoisers
from tests.interop.test_layouts import assert_same, golden, random_tree, write_all


@pytest.fixture(scope="module")
def tensors():
  path, _ = golden("stdit3_tiny")
  found = open_checkpoint(path)
  return {name: found.read(name) for name in found.tensors}


@pytest.fixture(scope="module")
def shapes():
  return denoisers.init_shapes(golden("stdit3_tiny")[1])


def load(tmp_path, tensors, target, **options):
  (tmp_path / "x.safetensors").unlink(missing_ok=True)
  write_all(tmp_path / "x.safetensors", tensors)
  return load_variables(tmp_path / "x.safetensors", "open-sora", target, **options)


def test_a_strict_load_names_every_misfit(tmp_path, tensors, shapes):
  tensors = dict(tensors)
  del tensors["spatial_blocks.0.attn.qkv.bias"], tensors["spatial_blocks.1.attn.qkv.bias"], tensors["t_block.1.bias"]
  tensors["extra.weight"] = np.ones(3, np.float32)
  tensors["final_layer.linear.bias"] = np.ones(5, np.float32)
  with pytest.raises(CheckpointError) as error:
    load(tmp_path, tensors, shapes)
  message = str(error.value)
  assert "85 of 89 tensors fit; 3 missing, 1 unexpected, 1 mis-shaped" in message.splitlines()[0]
  for line in (
    "spatial_blocks.{0,1}.attn.qkv.bias",
    "t_block.1.bias",
    "extra.weight",
    "final_layer.linear.bias: [5], needed [32]",
  ):
    assert f"  {line}\n" in message + "\n"


def test_patches_of_another_shape_are_refused(tmp_path, tensors, shapes):
  kernel = tensors["x_embedder.proj.weight"]
  config = golden("stdit3_tiny")[1]
  for shape, options in (((96, 4, 2, 2), {}), ((96, 16, 1, 1, 1), {"config": config}), ((96, 5, 1, 2, 2), {})):
    wrong = dict(tensors) | {"x_embedder.proj.weight": np.resize(kernel, shape)}
    with pytest.raises(CheckpointError, match=r"x_embedder.proj.weight: \[96"):
      load(tmp_path, wrong, shapes, **options)


def test_a_non_strict_load_keeps_initial_values_and_adapts_the_null_caption(tmp_path, tensors, shapes):
  initial = jax.tree.map(jnp.asarray, random_tree(shapes, seed=5))
  for rows in (5, 20):
    partial = dict(tensors)
    caption = partial["y_embedder.y_embedding"]
    partial["y_embedder.y_embedding"] = np.resize(caption, (rows, caption.shape[1]))
    del partial["t_block.1.bias"], partial["spatial_blocks.1.mlp.fc1.bias"]
    partial["final_layer.linear.bias"] = np.ones(5, np.float32)
    partial["pos_embed"] = np.ones((1, 4, 96), np.float32)
    partial["other"] = np.ones(1, np.float32)
    with pytest.raises(CheckpointError, match="needs initialised arrays"):
      load(tmp_path, partial, shapes, strict=False, log=lambda line: None)
    lines = []
    loaded = load(tmp_path, partial, initial, strict=False, log=lines.append)
    (report,) = lines
    assert "2 missing, 1 unexpected, 1 mis-shaped" in report
    assert f"y_embedder.y_embedding: {rows} rows {'filled up with its last row' if rows < 12 else 'cut'} to 12" in report
    assert "pos_embed" not in report
    expected = dict(tensors)
    kept = dict(export_tensors("open-sora", initial, golden("stdit3_tiny")[1]))
    for name in ("t_block.1.bias", "spatial_blocks.1.mlp.fc1.bias", "final_layer.linear.bias"):
      expected[name] = kept[name]
    whole = partial["y_embedder.y_embedding"]
    expected["y_embedder.y_embedding"] = whole[np.minimum(np.arange(12), rows - 1)]
    assert_same(dict(export_tensors("open-sora", loaded, golden("stdit3_tiny")[1])), expected)


def test_a_file_without_any_fitting_tensor_is_refused(tmp_path, shapes):
  initial = jax.tree.map(jnp.asarray, random_tree(shapes))
  message = r"does not fit this model \(layout open-sora\). The model needs \d+ tensors such as .* the file has 1 such as 'a'\."
  with pytest.raises(CheckpointError, match=message):
    load(tmp_path, {"a": np.ones(3, np.float32)}, initial, strict=False)


def test_open_sora_1_1_loads_common_tensors_of_1_0(tmp_path):
  """Open-Sora 1.1 takes all tensors that a 1.0 checkpoint shares with it."""
  path, _ = golden("stdit1_tiny")
  config = denoisers.get_config("STDiT2-tiny/2", hidden_size=72)
  initial = jax.tree.map(jnp.asarray, random_tree(denoisers.init_shapes(config)))
  lines = []
  loaded = load_variables(path, "open-sora", initial, strict=False, log=lines.append)
  same = open_checkpoint(path)
  exported = dict(export_tensors("open-sora", loaded, config))
  assert all(exported[n].tobytes() == same.read(n).tobytes() for n in same.tensors if not n.startswith("pos_embed"))
  assert "scale_shift_table_temporal" in lines[0]
  assert "unexpected:" not in lines[0]


def test_position_tables_of_1_0_are_checked_with_a_config():
  path, config = golden("stdit1_tiny")
  shapes = denoisers.init_shapes(config)
  load_variables(path, "open-sora", shapes)
  for fields, message in (({"space_scale": 1.0}, "differs from the buffer"), ({"input_size": (4, 8, 16)}, "pos_embed: ")):
    other = denoisers.get_config("STDiT-tiny/2", **fields)
    with pytest.raises(CheckpointError, match=message):
      load_variables(path, "open-sora", shapes, config=other)


def test_casts_refuse_overflow_and_non_finite_values(tmp_path, tensors, shapes):
  def of_type(dtype):
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), shapes)

  loaded = load(tmp_path, tensors, of_type(jnp.bfloat16))
  assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.bfloat16)}
  kernel = tensors["t_block.1.weight"].T.astype(jnp.bfloat16)
  np.testing.assert_array_equal(np.asarray(loaded["params"]["timestep_modulation"]["kernel"]), kernel)
  big = dict(tensors) | {"t_block.1.bias": np.full_like(tensors["t_block.1.bias"], 1e6)}
  with pytest.raises(CheckpointError, match="beyond the range of float16"):
    load(tmp_path, big, of_type(jnp.float16))
  big["t_block.1.bias"][3] = np.nan
  with pytest.raises(CheckpointError, match=r"'t_block.1.bias' holds 1 NaN"):
    load(tmp_path, big, shapes)
  source = open_source(tmp_path / "x.safetensors", "open-sora", shapes, allow_non_finite=True)
  (entry,) = (entry for entry in source.entries if "t_block.1.bias" in entry.names)
  assert np.isnan(source.read(entry)[3])


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P, SingleDeviceSharding
from stdit_jax.interop import load_variables, save_variables
from tests import denoisers
from stdit_jax.parallel.mesh import make_mesh
from stdit_jax.models.stdit_common import RULES
from stdit_jax.parallel.shardings import tree_shardings

path, out = sys.argv[1:]
config = denoisers.get_config("STDiT3-tiny/2")
shapes = denoisers.init_shapes(config)
whole = load_variables(path, "open-sora", shapes)
mesh = make_mesh({"data": 2, "fsdp": 4})
rules = tree_shardings(shapes, mesh, RULES)
layers = jax.tree.map(lambda s: NamedSharding(mesh, P("data") if s.shape[0] == 2 else P()), shapes)
for shardings in (rules, layers):
  loaded = load_variables(path, "open-sora", shapes, shardings=shardings)
  for a, b, sharding in zip(*map(jax.tree.leaves, (loaded, whole, shardings))):
    assert a.sharding == sharding
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
  # A non-strict load keeps the shardings of the given arrays.
  again = load_variables(path, "open-sora", loaded, strict=False)
  assert all(a.sharding == b.sharding for a, b in zip(*map(jax.tree.leaves, (again, loaded))))
assert not loaded["params"]["spatial_blocks"]["mlp"]["fc1"]["kernel"].sharding.is_fully_replicated
save_variables(out, "open-sora", loaded, config=config)
"""


def test_sharded_loads_on_eight_devices(tmp_path, tensors):
  out = tmp_path / "out.safetensors"
  environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
  root = pathlib.Path(__file__).parents[2]
  path, _ = golden("stdit3_tiny")
  command = [sys.executable, "-c", SHARDED, str(path), str(out)]
  done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  found = open_checkpoint(out)
  assert_same({name: found.read(name) for name in found.tensors}, tensors)


def test_saved_files_are_cast_and_sharded(tmp_path, shapes):
  config = golden("stdit3_tiny")[1]
  tree = random_tree(shapes)
  files = save_variables(tmp_path, "open-sora", tree, config=config, dtype=jnp.bfloat16, max_shard_bytes=200_000)
  assert len(files) > 3
  loaded = load_variables(tmp_path, "open-sora", shapes, config=config)
  for a, b in zip(*map(jax.tree.leaves, (loaded, tree))):
    np.testing.assert_array_equal(np.asarray(a), b.astype(jnp.bfloat16).astype(np.float32))
