"""The share of each bucket, and the cost of a stage."""

import dataclasses
import math

import jax
import pytest

from stdit_jax.autoencoders import registry
from stdit_jax.autoencoders.family import encoder_only
from stdit_jax.components import Components
from stdit_jax.models import t5
from stdit_jax.parallel.mesh import AXES
from stdit_jax.planning import budget, search
from stdit_jax.planning.programs import bytes_per_device, resident_bytes
from stdit_jax.training.autoencoding import autoencoder_model
from stdit_jax.training.objectives import make_objective
from stdit_jax.training.stages import make_stages
from tests.planning.test_plan import SMALL


def stage_with(buckets, text=None, **changes):
  namespace = {}
  exec(SMALL, namespace)
  config = namespace["get_config"]()
  config.text_encoder.update(text or {})
  config.stages = (dict(name="main", steps=100, **{"data.buckets": buckets, "data.reference_devices": 1, **changes}),)
  return make_stages(config)[0]


def test_shares_count_steps_not_samples():
  """One row in ten is an image. With batches ten times as large, images take about one step in a hundred."""
  shares, counted = budget.bucket_shares(stage_with((("144p", 1, 1.0, 40), ("144p", 51, 1.0, 4))))
  assert shares["144p", 1] == pytest.approx((0.1 / 40) / (0.1 / 40 + 0.9 / 4), rel=0.01)
  assert sum(shares.values()) == pytest.approx(1)
  assert "assumed" in counted


def test_hours_of_a_stage_follow_its_shares():
  stage = stage_with((("144p", 1, 1.0, 4),), **{"optimizer.accumulate": 3})
  shares, _ = budget.bucket_shares(stage)
  assert budget.stage_hours(stage, shares, {("144p", 1): 12.0}, 2.0) == pytest.approx(100 * (3 * 12.0 + 2.0) / 3600)
  resident = {"parameters": 10**9, "gradients": 10**9, "optimizer": 2 * 10**9, "average": 10**9, "frozen": 10**12}
  assert budget.update_seconds(resident, "v5e:2x4") == pytest.approx(10 / 819)


def test_memory_counts_the_encoders_that_training_uses(tmp_path):
  """Of the autoencoder only its encoder, and no text encoder if its results are cached. Samples add the other weights."""
  size = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
  mesh = jax.sharding.AbstractMesh((1, 8, 1, 1), AXES)
  (tmp_path / "text-0123456789ab").mkdir()
  (tmp_path / "text-0123456789ab" / "made_from.json").write_text("{}")

  def frozen(**changes):
    objective = make_objective(stage_with((("144p", 1, 1.0, 8),), {"where": "ahead"}, **changes).config)
    constants = bytes_per_device(objective.shapes[1], mesh, objective.rules)
    weights = [bytes_per_device(shapes, mesh, rules) for shapes, rules in objective.sample_weights]
    return objective, resident_bytes(objective.config, objective, mesh)["frozen"] - constants, weights

  objective, held, in_samples = frozen()
  autoencoder, text = objective.components.autoencoder, objective.components.conditioner.encoder
  whole = registry.family_of(autoencoder.config).init_shapes(autoencoder.config)
  split_text = bytes_per_device(t5.init_shapes(text.config), mesh, t5.RULES)
  assert split_text < size(t5.init_shapes(text.config))
  assert held == size(encoder_only(whole)) + split_text
  assert size(encoder_only(whole)) < 0.5 * size(whole)
  assert in_samples == []

  sampling = {"sample_every": 10, "sample.prompts": ("a cat", "a dog")}
  config = objective.model.config
  prompts = 2 * config.model_max_length * (2 * config.caption_channels + 1)  # features in bfloat16, and the mask
  _, with_prompts, in_samples = frozen(**sampling)
  assert with_prompts == held + prompts
  assert in_samples == [size(whole)]
  _, with_prompts, in_samples = frozen(**sampling, **{"data.latents": str(tmp_path)})
  assert with_prompts == prompts
  assert in_samples == [split_text, size(whole)]


def test_each_host_reads_its_share_of_the_rows():
  assert budget.host_rate({"batch": 96, "hosts": 64}, 1.5) == pytest.approx(1.0)


def test_encoder_cost_grows_with_rows_frames_and_pixels():
  buckets = (("144p", 1, 1.0, 8), ("144p", 51, 1.0, 2))

  def seconds(**text):
    stage, shares = stage_with(buckets, text), {("144p", 1): 0.5, ("144p", 51): 0.5}
    return budget.encoder_seconds(stage, Components.of(stage.config), shares, "v5e:2x4", 8)

  both = seconds(where="ahead")
  config = stage_with(buckets).config
  text = t5.get_config(config.text_encoder.name, **config.text_encoder.fields)
  kernels = [x for x in jax.tree.leaves(t5.init_shapes(text)["params"]["blocks"]) if len(x.shape) > 2]
  length = config.text_encoder.max_length
  attention = 4 * text.num_layers * length**2 * text.num_heads * text.d_kv
  each = 2 * length * sum(math.prod(x.shape) for x in kernels) + attention
  assert both["captions"] == pytest.approx(5 * each / (8 * 197e12))
  trained = seconds(where="step", train=True)
  assert trained["captions"] == pytest.approx(3 * both["captions"])
  assert seconds(where="disk")["captions"] == 0

  model = autoencoder_model(config.autoencoder)
  image, chunk, clip = (budget._video_flops(model, "144p", frames) for frames in (1, 17, 51))
  assert clip == pytest.approx(3 * chunk)
  assert chunk < 17 * image
  assert budget._video_flops(model, "256", 1) == pytest.approx(image * 256**2 / 192**2, rel=0.05)  # attention grows faster
  alone = autoencoder_model(dataclasses.replace(config.autoencoder, name="sd-kl-f8"))
  assert budget._video_flops(alone, "144p", 5) == pytest.approx(5 * budget._video_flops(alone, "144p", 1))
  assert both["videos"] == pytest.approx((0.5 * 8 * image + 0.5 * 2 * clip) / (8 * 197e12))


def test_proposed_meshes_use_all_chips_and_whole_tiles():
  found = search.sensible_meshes(256, 1152)
  assert {"data": 32, "fsdp": 8, "sequence": 1, "tensor": 1} in found
  assert {"data": 2, "fsdp": 8, "sequence": 16, "tensor": 1} in found
  assert all(m["data"] * m["fsdp"] * m["sequence"] == 256 for m in found)
  assert {m["fsdp"] for m in found} == {4, 8}  # 1152 rows are 72 tiles, which 16 chips do not divide
  assert {m["fsdp"] for m in search.sensible_meshes(256, 1872)} == {4, 8, 16}  # STDiT3-3B/2: equal parts without whole tiles
  assert search.nearest_batch(100, 256) == 256
