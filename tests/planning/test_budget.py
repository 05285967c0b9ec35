"""How often each bucket comes, and what a stage costs."""

import pytest

from stdit_jax.planning import budget, meshes
from stdit_jax.training.stages import make_stages
from tests.planning.test_plan import SMALL


def stage_with(buckets, **changes):
  namespace = {}
  exec(SMALL, namespace)
  config = namespace["get_config"]()
  config.stages = (dict(name="main", steps=100, **{"data.buckets": buckets, "data.reference_devices": 1, **changes}),)
  return make_stages(config)[0]


def test_shares_count_steps_not_samples():
  """One row in ten is an image: with batches ten times as large, images take one step in a hundred or so."""
  shares, counted = budget.bucket_shares(stage_with((("144p", 1, 1.0, 40), ("144p", 51, 1.0, 4))))
  assert shares["144p", 1] == pytest.approx((0.1 / 40) / (0.1 / 40 + 0.9 / 4), rel=0.01)
  assert sum(shares.values()) == pytest.approx(1)
  assert "assumed" in counted


def test_hours_of_a_stage():
  stage = stage_with((("144p", 1, 1.0, 4),), **{"optimizer.accumulate": 3})
  shares, _ = budget.bucket_shares(stage)
  assert budget.stage_hours(stage, shares, {("144p", 1): 12.0}, 2.0) == pytest.approx(100 * (3 * 12.0 + 2.0) / 3600)
  resident = {"parameters": 10**9, "gradients": 10**9, "optimizer": 2 * 10**9, "average": 10**9, "frozen": 10**12}
  assert budget.update_seconds(resident, "v5e:2x4") == pytest.approx(10 / 819)


def test_sensible_meshes_make_all_chips_and_whole_tiles():
  found = meshes.sensible_meshes(256, 1152)
  assert {"data": 32, "fsdp": 8, "sequence": 1, "tensor": 1} in found
  assert {"data": 2, "fsdp": 8, "sequence": 16, "tensor": 1} in found
  assert all(m["data"] * m["fsdp"] * m["sequence"] == 256 for m in found)
  assert {m["fsdp"] for m in found} == {4, 8}  # 1152 rows make 72 tiles
  assert {m["fsdp"] for m in meshes.sensible_meshes(256, 1872)} == {4, 8, 16}  # STDiT3-3B/2: no whole tiles, but whole parts
  assert meshes.nearest_batch(100, 256) == 256
