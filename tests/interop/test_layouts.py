"""The layout tables: names and shapes of published sizes, bit-exact round trips, and the PyTorch classes."""

import json
import math
import pathlib
import re

import einops
import jax
import ml_dtypes
import numpy as np
import pytest

from stdit_jax.autoencoders import causal3d, image_kl
from stdit_jax.interop import CheckpointError, export_tensors, foreign_spec, load_variables, mapping, models, open_checkpoint
from stdit_jax.interop import save_variables as save
from stdit_jax.interop.mapping import AXES, CheckpointLayout, Entry
from stdit_jax.models import t5
from tests import denoisers

REFERENCE = pathlib.Path(__file__).parents[1] / "reference" / "open_sora"
CONFIGS = {"stdit1_tiny": denoisers.STDiT1Config, "stdit2_tiny": denoisers.STDiT2Config, "stdit3_tiny": denoisers.STDiT3Config}


def golden(name):
  """(path, config) of a tiny reference checkpoint."""
  path = REFERENCE / f"{name}.safetensors"
  arguments = json.loads(open_checkpoint(path).metadata["constructor"])
  del arguments["class_dropout_prob"]
  return path, CONFIGS[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()})


def random_tree(shapes, seed=0, dtype=np.float32):
  random = np.random.default_rng(seed)
  return jax.tree.map(lambda s: random.standard_normal(s.shape, np.float32).astype(dtype), shapes)


def assert_same(found, expected):
  assert set(found) == set(expected)
  for name, array in expected.items():
    array = np.asarray(array)
    assert found[name].dtype == array.dtype, name
    assert found[name].shape == array.shape, name
    assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("name", [name for name in models.KEY_TABLES if not name.startswith("cogvideox")])
def test_exported_names_and_shapes_match_the_published_sizes(name):
  model = models.find_model(name, {})
  spec = foreign_spec(model.layouts[0], model.shapes, model.config)
  assert spec == models.read_key_table(REFERENCE / "keys" / models.KEY_TABLES[name])
  assert spec == models.shipped_key_table(name)


def test_open_sora_image_autoencoder_has_its_names_and_shapes():
  """The image autoencoder of the video autoencoder, alone."""
  table = models.read_key_table(REFERENCE / "keys" / "vae_pipeline_v1_2.json")
  prefix = "spatial_vae.module."
  expected = {name.removeprefix(prefix): shape for name, shape in table.items() if name.startswith(prefix)}
  assert foreign_spec("diffusers", image_kl.init_shapes(image_kl.get_config("sdxl-kl-f8"))) == expected


@pytest.mark.parametrize("name", ["cogvideox-2b", "cogvideox-5b"])
def test_cogvideox_autoencoder_has_its_names_and_shapes(name):
  """Names and shapes are those of diffusers at the released size, with 215.6 M parameters."""
  torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
  with torch.device("meta"):
    theirs = diffusers.AutoencoderKLCogVideoX(
      down_block_types=["CogVideoXDownBlock3D"] * 4, up_block_types=["CogVideoXUpBlock3D"] * 4
    )
  expected = {name: tuple(p.shape) for name, p in theirs.state_dict().items()}
  config = causal3d.TABLE[name]
  assert foreign_spec("cogvideox-vae", causal3d.init_shapes(config), config) == expected
  assert models.shipped_key_table(name) == expected
  assert sum(map(math.prod, expected.values())) == 215_583_907


@pytest.mark.parametrize("name", CONFIGS)
def test_golden_weights_round_trip_bit_for_bit(name, tmp_path):
  path, config = golden(name)
  variables = load_variables(path, "open-sora", denoisers.init_shapes(config), config=config)
  original = open_checkpoint(path)
  expected = {tensor: original.read(tensor) for tensor in original.tensors}
  assert_same(dict(export_tensors("open-sora", variables, config)), expected)
  # Our own layout, in a file with one tensor per layer, round-trips as well.
  save(tmp_path / "x.safetensors", "native", variables)
  native = open_checkpoint(tmp_path / "x.safetensors")
  stack = "spatial_blocks" if name == "stdit3_tiny" else "blocks"
  assert native.tensors[f"params/{stack}/1/mlp/fc1/kernel"].shape == (config.hidden_size, config.hidden_size * 4)
  again = load_variables(tmp_path / "x.safetensors", "native", denoisers.init_shapes(config))
  assert jax.tree.all(jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), again, variables))
  # the right one of several layouts is found
  load_variables(tmp_path / "x.safetensors", ("open-sora", "native"), denoisers.init_shapes(config))


def test_linear_kernels_have_the_documented_axes():
  path, config = golden("stdit3_tiny")
  ours, theirs = load_variables(path, "open-sora", denoisers.init_shapes(config)), open_checkpoint(path)
  block = ours["params"]["spatial_blocks"]
  heads, d = config.num_heads, config.head_dim
  qkv = theirs.read("spatial_blocks.1.attn.qkv.weight")  # rows: (which, head, feature)
  np.testing.assert_array_equal(block["attention"]["qkv"]["kernel"][1][:, 2, 3, 5], qkv[2 * heads * d + 3 * d + 5])
  out = theirs.read("spatial_blocks.0.attn.proj.weight")
  np.testing.assert_array_equal(block["attention"]["out"]["kernel"][0][3, 5], out[:, 3 * d + 5])
  patch = theirs.read("x_embedder.proj.weight")  # [D, C, 1, 2, 2]; ours (row, column, channel)
  np.testing.assert_array_equal(ours["params"]["patch_embed"]["kernel"][(1 * 2 + 0) * 4 + 3], patch[:, 3, 0, 1, 0])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", ["STDiT2-tiny/2", "tiny-kl-f8", "byt5-tiny", "tiny-temporal", "tiny-causal3d"])
def test_every_layout_of_a_random_tree_round_trips(name, dtype, tmp_path):
  model = models.find_model(name, {})
  config = model.config
  shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), model.shapes)
  tree = random_tree(shapes, dtype=dtype)
  for layout in model.layouts:
    if layout == "t5-v1.0":
      continue
    path = tmp_path / f"{layout}.safetensors"
    save(path, layout, tree, config=config)
    again = load_variables(path, layout, shapes, config=config)
    assert_same(*({k: np.asarray(v) for k, v in mapping.flatten(t).items()} for t in (again, tree)))


@pytest.mark.parametrize("axes", [name for name, pattern in AXES.items() if pattern])
def test_axes_are_exactly_invertible(axes):
  lengths = {"n": 3, "h": 2, "d": 5, "i": 7, "o": 11, "y": 2, "x": 3, "c": 4, "t": 1}
  foreign, ours = AXES[axes].split(" -> ")
  names = re.findall("[a-z]", foreign)
  values = np.random.default_rng(0).permutation(math.prod(lengths[a] for a in names)).reshape([lengths[a] for a in names])
  array, expected = (einops.rearrange(values, f"{' '.join(names)} -> {side}") for side in (foreign, ours))
  entry = Entry("x", None, ("x",), axes, expected.shape, np.dtype(int))
  np.testing.assert_array_equal(mapping.to_ours(entry, array), expected)
  assert mapping.foreign_shape(entry, lengths) == array.shape
  np.testing.assert_array_equal(mapping.to_foreign(entry, expected, lengths), array)
  for wrong in (array[:-1], array[None], array[..., None]):
    with pytest.raises(CheckpointError, match="'x': "):
      mapping.to_ours(entry, wrong)
  copies = ("patch", "patch2d")  # they merge axes that are not adjacent
  assert np.shares_memory(mapping.to_ours(entry, array), array) == (axes not in copies)


def test_a_2d_patch_kernel_is_ordered_row_column_channel():
  kernel = np.random.default_rng(0).standard_normal((5, 4, 2, 3), np.float32)  # [D, C, y, x], as in Conv2d
  entry = Entry("patch_embed/kernel", None, ("proj.weight",), "patch2d", (2 * 3 * 4, 5), kernel.dtype)
  ours = mapping.to_ours(entry, kernel)
  np.testing.assert_array_equal(ours[(1 * 3 + 2) * 4 + 3], kernel[:, 3, 1, 2])
  np.testing.assert_array_equal(mapping.to_foreign(entry, ours, {"y": 2, "x": 3}), kernel)


def test_a_new_model_brings_its_own_layout(tmp_path):
  """The layout is an object with its own stacks. It is in no table of this package."""
  rows = (("params/patch", "proj", "patch2d"), ("params/layers/*/fc", "h.*.fc", "linear"))
  layout = CheckpointLayout("mine", rows, stacks=("layers",), sizes=lambda config: {"y": config, "x": config})
  native = CheckpointLayout("native", rows=(), stacks=("layers",))
  tree = random_tree(
    {
      "params": {
        "patch": {"kernel": jax.ShapeDtypeStruct((2 * 2 * 4, 6), np.float32)},
        "layers": {"fc": {"kernel": jax.ShapeDtypeStruct((3, 6, 7), np.float32)}},
      }
    }
  )
  spec = foreign_spec(layout, tree, 2)
  assert spec == {"proj.weight": (6, 4, 2, 2)} | {f"h.{i}.fc.weight": (7, 6) for i in range(3)}
  assert set(foreign_spec(native, tree)) == {"params/patch/kernel"} | {f"params/layers/{i}/fc/kernel" for i in range(3)}
  for one in (layout, native):
    path = tmp_path / f"{one.name}.safetensors"
    save(path, one, tree, config=2)
    assert open_checkpoint(path).tensors.keys() == dict(export_tensors(one, tree, 2)).keys()
    again = load_variables(path, (layout, native), tree, config=2)  # the best match is chosen
    assert_same(*({k: np.asarray(v) for k, v in mapping.flatten(t).items()} for t in (again, tree)))


def test_a_path_without_a_row_is_an_error():
  with pytest.raises(CheckpointError, match="no name for our parameter 'params/new/kernel'"):
    foreign_spec("open-sora", {"params": {"new": {"kernel": np.zeros(3)}}})
  with pytest.raises(ValueError, match="unknown layout 'opensora'; allowed: native"):
    foreign_spec("opensora", {})


# The PyTorch classes.


def test_diffusers_autoencoder_loads_our_file_strictly(tmp_path):
  diffusers = pytest.importorskip("diffusers")
  torch = pytest.importorskip("torch")
  config = image_kl.ImageKLConfig(block_out_channels=(8, 16, 16), layers_per_block=2, norm_num_groups=4)
  theirs = diffusers.AutoencoderKL(
    block_out_channels=config.block_out_channels,
    layers_per_block=config.layers_per_block,
    norm_num_groups=config.norm_num_groups,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
  )
  theirs.save_pretrained(tmp_path)
  shapes = image_kl.init_shapes(config)
  variables = load_variables(tmp_path, "diffusers", shapes)
  exported = dict(export_tensors("diffusers", variables))
  assert_same(exported, theirs.state_dict())
  theirs.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in exported.items()}, strict=True)

  # Names of diffusers before 0.18, and in Open-Sora 1.2's video autoencoder.
  old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
  old_names = {re.sub(r"to_(q|k|v|out\.0)", lambda m: old[m[0]], name): array for name, array in exported.items()}
  assert len(set(old_names) - set(exported)) == 16
  in_pipeline = {f"spatial_vae.module.{k}": v for k, v in exported.items()} | {"temporal_vae.x": np.ones(2, np.float32)}
  for i, tensors in enumerate((old_names, in_pipeline)):
    path = tmp_path / f"variant{i}.safetensors"
    write_all(path, tensors)
    assert_same(dict(export_tensors("diffusers", load_variables(path, "diffusers", shapes))), exported)


def write_all(path, tensors):
  from stdit_jax.interop import write_checkpoint

  tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
  write_checkpoint(path, {name: (a.shape, a.dtype) for name, a in tensors.items()}, tensors.items())


def to_original_names(name):
  """The latent-diffusion name for a name of diffusers, for three levels. Written by hand after diffusers' conversion script."""
  name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
  name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
  name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{2 - int(m[1])}.block", name)
  name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{2 - int(m[1])}.upsample", name)
  name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
  name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm").replace("to_out.0", "proj_out")
  name = re.sub(r"to_([qkv])\.", r"\1.", name)
  return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_names_of_the_original_autoencoder_are_read(prefix, tmp_path):
  config = image_kl.ImageKLConfig(block_out_channels=(8, 16, 16), layers_per_block=2, norm_num_groups=4)
  shapes = image_kl.init_shapes(config)
  tree = random_tree(shapes)
  expected = {}
  for name, array in export_tensors("diffusers", tree):
    new = to_original_names(name)
    expected[new] = array[:, :, None, None] if "attn_1" in new and array.ndim == 2 else array
  assert_same(dict(export_tensors("ldm", tree)), expected)
  others = {"loss.logvar": np.zeros(1, np.float32)} | ({"cond_stage_model.x": np.zeros(1, np.float32)} if prefix else {})
  write_all(tmp_path / "x.safetensors", {prefix + name: array for name, array in expected.items()} | others)
  again = load_variables(tmp_path / "x.safetensors", "ldm", shapes)
  assert_same(*({k: np.asarray(v) for k, v in mapping.flatten(t).items()} for t in (again, tree)))


@pytest.mark.parametrize(("layout", "projection"), [("t5", "gated-gelu"), ("t5-v1.0", "relu")])
def test_transformers_t5_loads_our_file_strictly(layout, projection, tmp_path):
  transformers = pytest.importorskip("transformers")
  import safetensors.torch
  import torch

  sizes = {"d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 3, "num_heads": 4, "vocab_size": 50}
  theirs = transformers.T5EncoderModel(transformers.T5Config(**sizes, feed_forward_proj=projection))
  theirs.save_pretrained(tmp_path / "theirs")
  shapes = t5.init_shapes(t5.T5Config(**sizes, feed_forward_proj=projection))
  variables = load_variables(tmp_path / "theirs", layout, shapes)
  (written,) = save(tmp_path / "ours" / "model.safetensors", layout, variables)
  # Tied tensors are written once. safetensors loads them strictly in this way.
  again = transformers.T5EncoderModel(theirs.config)
  assert safetensors.torch.load_model(again, written, strict=True) == (set(), [])
  assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), theirs.state_dict().values()))
  (tmp_path / "ours" / "config.json").write_text((tmp_path / "theirs" / "config.json").read_text())
  loaded, info = transformers.T5EncoderModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
  assert not info["missing_keys"]
  assert not info["unexpected_keys"]
  assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), theirs.state_dict().values()))

  # The file of a full T5 has a decoder and both names of the embedding, here first with equal, then with different values.
  state = {name: value.numpy() for name, value in theirs.state_dict().items()} | {"decoder.x": np.ones(1, np.float32)}
  assert {"shared.weight", "encoder.embed_tokens.weight"} <= set(state)
  write_all(tmp_path / "both.safetensors", state)
  load_variables(tmp_path / "both.safetensors", layout, shapes)
  write_all(tmp_path / "differ.safetensors", state | {"shared.weight": state["shared.weight"] + 1})
  with pytest.raises(CheckpointError, match="should be one tensor but differ"):
    load_variables(tmp_path / "differ.safetensors", layout, shapes)
