"""Text features have the dtype of the denoiser from the host to the model. This dtype changes no result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.loader import Sample
from stdit_jax.components import Components
from stdit_jax.conditioning import replace_rows
from stdit_jax.config import Config
from stdit_jax.models import t5
from stdit_jax.models.family import find_model
from stdit_jax.parallel.mesh import make_mesh
from stdit_jax.parallel.shardings import Layout
from tests.tiny_run import MAX_LENGTH, tiny_config

DENOISERS = ("STDiT-tiny/2", "STDiT2-tiny/2", "STDiT3-tiny/2", "tests.new_families.joint:tiny")
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16)}


def components(folder, name, dtype, where, **fields):
  fields |= {"hidden_size": 48, "depth": 1, "dtype": dtype, "model_max_length": MAX_LENGTH}
  changes = {"model__name": name, "model__fields": fields, "mask_ratios": {}, "text_encoder__where": where}
  return Components.of(Config.of(tiny_config(folder, folder, **changes, text_encoder__train=where == "step")))


@pytest.mark.parametrize("name", DENOISERS[2:])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_batches_hold_features_in_the_denoisers_dtype(tmp_path, name, dtype, stored):
  """The values are those of the file or the cache, rounded once."""
  parts = components(tmp_path, name, dtype, "disk")
  features = np.random.default_rng(0).standard_normal((5, 64)).astype(stored)
  rows = [Sample(None, "", 1, 64, 64, 24.0, 1.0 - i, (0, i), i, str(i), text_features=(features, None)[i]) for i in range(2)]
  batch = parts.conditioner.collate(rows)
  spec = parts.batch(("64p", 1), 2)["cond"]["text"]
  assert batch["text"].dtype == spec.dtype == DTYPES[dtype]
  assert batch["text"].nbytes == 2 * MAX_LENGTH * 64 * DTYPES[dtype].itemsize
  np.testing.assert_array_equal(batch["text"][0, :5], jnp.asarray(features).astype(dtype))
  assert not batch["text"][0, 5:].any()
  assert not batch["text"][1].any()


@pytest.mark.parametrize("encoder", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_encoded_captions_have_the_denoisers_dtype(tmp_path, dtype, encoder):
  """In the step and before it, the features are those of the encoder, rounded to the denoiser's dtype."""
  layout, cond = Layout(make_mesh({"data": 1}, jax.devices()[:1])), {}
  for where in ("step", "ahead"):
    parts = components(tmp_path, DENOISERS[2], dtype, where)
    model = t5.build(t5.get_config("byt5-tiny", dtype=encoder))
    parts.conditioner.encoder, weights = model, t5.init(model.config, jax.random.key(0))["params"]
    arrays = parts.conditioner.prompts(["a cat", "two dogs run"])
    if where == "step":
      cond[where] = jax.jit(parts.conditioner.encode)(weights, arrays)
    else:
      cond[where] = parts.conditioner.lower(2, layout).compile()(weights, arrays)
    assert cond[where]["text"].dtype == DTYPES[dtype]
    made = jax.jit(model.apply)({"params": weights}, arrays["text_ids"], arrays["text_mask"])
    assert made.dtype == DTYPES[encoder]
    np.testing.assert_array_equal(cond[where]["text"], made.astype(dtype))
  jax.tree.map(np.testing.assert_array_equal, *cond.values())


@pytest.mark.parametrize("name", DENOISERS)
def test_a_bfloat16_denoiser_gives_the_same_bits_for_float32_and_bfloat16_features(name):
  """The denoiser first casts text to bfloat16. Null captions and the gradient are cast, too."""
  family, config = find_model(name, {"dtype": "bfloat16", "hidden_size": 48, "depth": 1})
  rng = np.random.default_rng(1)
  draw = lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
  variables = jax.tree.map(lambda s: 0.2 * draw(s.shape), family.init_shapes(config))
  tokens, t, cond, sizes = family.example(config, 2, 2, 2)
  tokens, text = draw(tokens.shape), draw(cond["text"].shape)
  assert (text.astype(jnp.bfloat16) != text).mean() > 0.9
  model, mask = family.build(config, None), jnp.ones_like(cond["text_mask"])

  @jax.jit
  def loss_and_gradient(params, text):
    def loss(params):
      own = {**variables, "params": params}
      given = {"text": text, "text_mask": mask}
      given = replace_rows(given, family.null(config, own.get("constants", {}), given), jnp.asarray([False, True]))
      out = model.apply(own, tokens, 500 * t, given, sizes)
      return jnp.square(out).mean(), out

    return jax.value_and_grad(loss, has_aux=True)(params)

  results = [loss_and_gradient(variables["params"], features) for features in (text, text.astype(jnp.bfloat16))]
  assert all(np.any(leaf) for leaf in jax.tree.leaves(results[0][1]["caption_embed"]))  # the text matters
  jax.tree.map(np.testing.assert_array_equal, *results)
