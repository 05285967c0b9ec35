"""Every parameter of every size has a sharding rule and divides; other parameters are refused."""

import functools
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from stdit_jax.autoencoders import discriminator, registry
from stdit_jax.models import t5
from stdit_jax.models.stdit_common import RULES
from stdit_jax.parallel.shardings import path_name, spec_for
from stdit_jax.training import autoencoding
from tests import denoisers

AUTOENCODERS = ("sd-kl-f8", "open-sora-1.2", "cogvideox-2b")
DENOISERS = ("STDiT-XL/2", "STDiT2-XL/2", "STDiT3-XL/2", "STDiT3-3B/2")


def fake_mesh(fsdp, tensor=1):
  return types.SimpleNamespace(shape={"data": 2, "fsdp": fsdp, "sequence": 2, "tensor": tensor})


@functools.cache
def shapes_of(name):
  """(shapes, prefix of parameter names, rules) of a denoiser, or of "T5 <size>"."""
  if name.startswith("T5 "):
    return t5.init_shapes(t5.get_config(name[3:])), "text_encoder/", t5.RULES
  return denoisers.init_shapes(denoisers.get_config(name)), "", RULES


@pytest.mark.parametrize(("fsdp", "tensor"), [(8, 1), (16, 1), (8, 2), (4, 4)])
@pytest.mark.parametrize("name", [*DENOISERS, *(f"T5 {size}" for size in ("small", "base", "large", "xl", "xxl", "byt5-mini"))])
def test_every_parameter_has_a_rule_and_divides(name, fsdp, tensor):
  """Replicated parameters are a small part of the model."""
  shapes, prefix, rules = shapes_of(name)
  whole = total = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["params"]):
    spec = spec_for(f"params/{prefix}{path_name(path)}", leaf.shape, fake_mesh(fsdp, tensor), rules)
    assert len(spec) <= len(leaf.shape)
    total += np.prod(leaf.shape)
    whole += np.prod(leaf.shape) if "fsdp" not in str(spec) else 0
  assert whole < 0.01 * total or total < 1e7
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes.get("constants", {})):
    assert spec_for(f"constants/{path_name(path)}", leaf.shape, fake_mesh(fsdp, tensor), rules) == P()


@pytest.mark.parametrize("fsdp", [2, 8, 16])
@pytest.mark.parametrize("name", [*AUTOENCODERS, "discriminator"])
def test_fsdp_splits_the_kernels_of_autoencoders(name, fsdp):
  """Kernels of two to five dimensions. Less than 0.3 % of the values are in parameters that stay whole."""
  if name == "discriminator":
    model = discriminator.Discriminator(discriminator.get_config({}))
    shapes = jax.eval_shape(functools.partial(discriminator.init, model), jax.random.key(0))
  else:
    shapes = registry.find(name).init_shapes(registry.find(name).get_config(name))["params"]
  whole = total = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(
    {"discriminator" if name == "discriminator" else "autoencoder": shapes}
  ):
    spec = spec_for(f"opt/0/mu/{path_name(path)}", leaf.shape, fake_mesh(fsdp), autoencoding.RULES)
    assert [size for size, axis in zip(leaf.shape, spec) if axis and size % fsdp] == []
    assert list(spec[:-2]) == [None] * len(spec[:-2])  # only channels are split
    total += leaf.size
    whole += 0 if "fsdp" in spec else leaf.size
  assert whole < 0.003 * total


def test_a_kernel_whose_channels_do_not_divide_stays_whole():
  spec_of = functools.partial(
    spec_for, "params/autoencoder/encoder/conv1/conv/kernel", mesh=fake_mesh(8), rules=autoencoding.RULES
  )
  assert spec_of(shape=(3, 3, 3, 64, 64)) == P(None, None, None, "fsdp")
  assert spec_of(shape=(3, 3, 3, 12, 64)) == P(None, None, None, None, "fsdp")
  assert spec_of(shape=(3, 3, 3, 60, 60)) == P()
  assert spec_of(shape=(3, 3, 16, 64)) == P()  # small


def test_optimizer_state_follows_the_path_of_its_parameter():
  name = "opt/0/mu/spatial_blocks/mlp/fc1/kernel"
  assert spec_for(name, (28, 1152, 4608), fake_mesh(8), RULES) == P(None, "fsdp", "tensor")


def test_a_parameter_without_a_rule_is_refused():
  with pytest.raises(
    ValueError, match=r"no sharding rule matches the parameter 'params/blocks/adapter/down' of shape \(4, 8\)"
  ):
    spec_for("params/blocks/adapter/down", (4, 8), fake_mesh(8), RULES)
  with pytest.raises(ValueError, match="no sharding rule"):
    spec_for("params/text_encoder/new_table", (4, 8), fake_mesh(8), RULES)


def test_a_dimension_that_does_not_divide_is_refused_by_name():
  message = (
    r"'params/blocks/mlp/fc1/kernel': dimension 1 of \(28, 1152, 4608\) does not divide by the 7 devices of mesh axis 'fsdp'"
  )
  with pytest.raises(ValueError, match=message):
    spec_for("params/blocks/mlp/fc1/kernel", (28, 1152, 4608), fake_mesh(7), RULES)
