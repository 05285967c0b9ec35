"""The T5 encoder against transformers.T5EncoderModel."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stdit_jax.models import t5
from tests.helpers import SHIPPED

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONFIGS = {
  "byt5-tiny": t5.TABLE["byt5-tiny"],
  "d_kv is not d_model / heads": t5.T5Config(d_model=48, num_layers=3, num_heads=3, d_kv=10, d_ff=56, vocab_size=101),
  "other buckets": t5.T5Config(
    d_model=32, num_layers=1, num_heads=2, d_kv=32, d_ff=40, vocab_size=64,
    relative_attention_num_buckets=16, relative_attention_max_distance=20,
  ),
  "v1.0": t5.T5Config(d_model=40, num_layers=2, num_heads=5, d_kv=8, d_ff=64, vocab_size=70, feed_forward_proj="relu"),
}  # fmt: skip


def hf_config(config):
  names = (
    "d_model", "num_layers", "num_heads", "d_kv", "d_ff", "vocab_size", "relative_attention_num_buckets",
    "relative_attention_max_distance", "layer_norm_epsilon", "feed_forward_proj",
  )  # fmt: skip
  return transformers.T5Config(**{name: getattr(config, name) for name in names})


def to_params(config, tensors):
  """Our tree from T5EncoderModel's tensors, by the names in the docstring of `t5`."""
  depth, heads = config.num_layers, (config.num_heads, config.d_kv)

  def stack(name):
    return np.stack([np.asarray(tensors[f"encoder.block.{i}.{name}.weight"].detach()) for i in range(depth)])

  def into_heads(name):
    return {"kernel": stack(f"layer.0.SelfAttention.{name}").transpose(0, 2, 1).reshape(depth, -1, *heads)}

  def linear(name):
    return {"kernel": stack(f"layer.1.DenseReluDense.{name}").transpose(0, 2, 1)}

  gated = config.feed_forward_proj == "gated-gelu"
  mlp = {"gate": linear("wi_0"), "up": linear("wi_1")} if gated else {"up": linear("wi")}
  return {
    "token_embedding": np.asarray(tensors["shared.weight"].detach()),
    "relative_bias": np.asarray(tensors["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].detach()),
    "blocks": {
      "attention_norm": {"scale": stack("layer.0.layer_norm")},
      "attention": {
        **{ours: into_heads(name) for ours, name in (("query", "q"), ("key", "k"), ("value", "v"))},
        "out": {"kernel": stack("layer.0.SelfAttention.o").transpose(0, 2, 1).reshape(depth, *heads, -1)},
      },
      "mlp_norm": {"scale": stack("layer.1.layer_norm")},
      "mlp": {**mlp, "down": linear("wo")},
    },
    "final_norm": {"scale": np.asarray(tensors["encoder.final_layer_norm.weight"].detach())},
  }


def reference(config):
  """The encoder of transformers with redrawn weights, and our parameters with equal values."""
  theirs = transformers.T5EncoderModel(hf_config(config)).eval()
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for name, value in theirs.named_parameters():
      draw = torch.randn(value.shape, generator=generator)
      linear = value.ndim == 2 and "shared" not in name and "bias" not in name
      value.copy_(1 + 0.15 * draw if value.ndim == 1 else draw * 0.8 / value.shape[1] ** 0.5 if linear else draw)
  return theirs, to_params(config, dict(theirs.named_parameters()))


def captions(config, batch=3, length=37, seed=0):
  """Random ids, and three masks: full, short, with holes."""
  rng = np.random.default_rng(seed)
  mask = np.ones((batch, length), bool)
  mask[1, 5:] = False
  mask[2] = rng.random(length) < 0.6
  return rng.integers(0, config.vocab_size, (batch, length)).astype(np.int32), mask


def relative_error(ours, theirs):
  theirs = np.asarray(theirs)
  return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_matches_transformers(name):
  config = CONFIGS[name]
  theirs, params = reference(config)
  fresh = t5.init_shapes(config)["params"]
  assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)
  ids, mask = captions(config, length=150 if name == "byt5-tiny" else 37)
  cotangent = np.random.default_rng(1).normal(size=(*ids.shape, config.d_model)).astype(np.float32)
  expected = theirs(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask, dtype=torch.int64)).last_hidden_state
  (expected * torch.tensor(cotangent)).mean().backward()
  model = t5.build(config)

  def loss(params):
    out = model.apply({"params": params}, ids, mask)
    return (out * cotangent).mean(), out

  grads, out = jax.jit(jax.grad(loss, has_aux=True))(params)
  assert relative_error(out, expected.detach()) < 2e-5
  expected_grads = to_params(config, {n: p.grad for n, p in theirs.named_parameters()})
  for (path, ours), other in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected_grads)):
    assert relative_error(ours, other) < 1e-4, path

  expected = theirs(input_ids=torch.tensor(ids)).last_hidden_state.detach()
  assert relative_error(jax.jit(model.apply, compiler_options=SHIPPED)({"params": params}, ids), expected) < 2e-5


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (16, 20), (64, 300), (32, 9)])
def test_position_buckets_are_exact(buckets, distance):
  from transformers.models.t5.modeling_t5 import T5Attention

  distances = np.arange(-2000, 2001)
  expected = T5Attention._relative_position_bucket(torch.tensor(distances), True, buckets, distance)
  np.testing.assert_array_equal(jax.jit(t5.relative_buckets, static_argnums=(1, 2))(distances, buckets, distance), expected)


def test_position_bias_lies_along_diagonals():
  table = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
  for length in (1, 2, 7):
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    expected = np.moveaxis(table[np.asarray(t5.relative_buckets(distance, 32, 128))], -1, 0)
    ours = jax.jit(t5.relative_bias, static_argnums=(1, 2))(table, length, 128)
    np.testing.assert_array_equal(ours, expected)


@functools.cache
def small():
  config = CONFIGS["d_kv is not d_model / heads"]
  return config, reference(config)[1], *captions(config)


def test_scan_remat_and_no_jit_agree():
  config, params, ids, mask = small()

  def gradients(config):
    def loss(params):
      out = t5.build(config).apply({"params": params}, ids, mask)
      return jnp.square(out).mean(), out

    return jax.jit(jax.grad(loss, has_aux=True))(params)

  expected = gradients(config)
  for fields in ({"scan": False}, {"remat": "full"}, {"remat": "dots"}):
    ours = gradients(dataclasses.replace(config, **fields))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), ours, expected)
  plain = t5.build(dataclasses.replace(config, scan=False)).apply({"params": params}, ids, mask)
  np.testing.assert_allclose(plain, expected[1], atol=1e-5)


def test_masked_tokens_do_not_change_outputs():
  config, params, ids, mask = small()
  encode = jax.jit(lambda ids, mask: t5.build(config).apply({"params": params}, ids, mask))
  expected = encode(ids, mask)
  other = np.where(mask, ids, (ids + 7) % config.vocab_size)
  np.testing.assert_array_equal(np.asarray(encode(other, mask))[mask], np.asarray(expected)[mask])
  short = encode(ids[1:2, :5], mask[1:2, :5])
  np.testing.assert_allclose(short, expected[1:2, :5], atol=1e-5)
  nothing = encode(ids, np.zeros_like(mask))
  assert np.isfinite(nothing).all()


def test_bfloat16_stays_near_float32():
  config, params, ids, mask = small()
  exact = np.asarray(jax.jit(t5.build(config).apply)({"params": params}, ids, mask))[mask]
  rough_config = dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16")
  rough_params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
  assert jax.tree.map(lambda x: x.dtype, t5.init_shapes(rough_config)["params"]) == jax.tree.map(
    lambda x: x.dtype, rough_params
  )
  rough = jax.jit(t5.build(rough_config).apply)({"params": rough_params}, ids, mask)
  assert rough.dtype == jnp.bfloat16
  assert np.linalg.norm(np.asarray(rough, np.float32)[mask] - exact) < 0.05 * np.linalg.norm(exact)


def test_initialisation_matches_the_original():
  config = t5.T5Config(d_model=128, num_layers=2, num_heads=4, d_kv=16, d_ff=512, vocab_size=384)
  ours = jax.jit(t5.init, static_argnums=0)(config, jax.random.key(0))["params"]
  with torch.random.fork_rng():
    torch.manual_seed(0)
    theirs = to_params(config, dict(transformers.T5EncoderModel(hf_config(config)).named_parameters()))
  for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs)):
    assert a.shape == b.shape
    np.testing.assert_allclose(np.std(a), np.std(b), rtol=0.15, atol=1e-6, err_msg=str(path))
    np.testing.assert_allclose(np.mean(a), np.mean(b), atol=0.15 * np.std(b) + 1e-6, err_msg=str(path))
  blocks = ours["blocks"]["attention"]["query"]["kernel"]
  assert np.abs(blocks[0] - blocks[1]).max() > 0.01  # layers have different draws


@pytest.mark.parametrize(
  ("name", "parameters"), [("small", 35_332_800), ("base", 109_628_544), ("large", 341_231_104), ("xxl", 4_762_310_656)]
)
def test_published_sizes_have_their_parameters(name, parameters):
  config = t5.get_config(name)
  with torch.device("meta"):
    theirs = transformers.T5EncoderModel(hf_config(config))
  count = sum(leaf.size for leaf in jax.tree.leaves(t5.init_shapes(config)))
  assert count == sum(p.numel() for p in theirs.parameters()) == parameters


def test_ids_outside_the_vocabulary_give_nan():
  config, params, ids, mask = small()
  out = t5.build(config).apply({"params": params}, np.full_like(ids, config.vocab_size), mask)
  assert np.isnan(out).all()


def test_bad_config_is_refused():
  with pytest.raises(ValueError, match="allowed: small, base"):
    t5.get_config("huge")
  with pytest.raises(ValueError, match="unknown field 'width'"):
    t5.get_config("small", width=3)
  for field in ("feed_forward_proj", "dtype", "remat"):
    with pytest.raises(ValueError, match=f"{field} is 'none at all'; allowed"):
      t5.get_config("small", **{field: "none at all"})
  with pytest.raises(ValueError, match="multiple of 4"):
    t5.get_config("small", relative_attention_num_buckets=30)
