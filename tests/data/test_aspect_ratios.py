"""Aspect ratios against the values of the original (tests/reference/open_sora/aspect_v1*.json)."""

import itertools
import json
import math
import pathlib

import numpy as np
import pytest

from data import aspect_ratios as ar

REFERENCE = pathlib.Path(__file__).parents[1] / "reference" / "open_sora"


def load(name):
  return json.loads((REFERENCE / name).read_text())


@pytest.mark.parametrize("name", ["aspect_v11.json", "aspect_v12.json"])
def test_tables_and_closest_ratio(name):
  golden = load(name)
  for resolution, table in golden["tables"].items():
    assert ar.NUM_PIXELS[resolution] == table["num_pixels"]
    assert list(ar.SIZES[resolution].items()) == [(k, tuple(v)) for k, v in table["sizes"].items()]
  for row in golden["get_closest_ratio"]:
    assert ar.closest_ratio(row["height"], row["width"], row["resolution"]) == row["ratio"]


def test_names():
  golden = load("aspect_v12.json")
  assert golden["aspect_ratio_names"] == ar.RATIO_NAMES
  for row in golden["get_image_size"]:
    if row["size"] is None:
      with pytest.raises(ValueError, match="has no aspect ratio"):
        ar.size(row["resolution"], row["aspect_ratio"])
    else:
      assert list(ar.size(row["resolution"], row["aspect_ratio"])) == row["size"]
  for name, frames in golden["get_num_frames"].items():
    assert ar.get_num_frames(name) == frames


def test_closest_ratios_are_the_first_minimum():
  rng = np.random.default_rng(0)
  for resolution in ar.SIZES:
    keys = [float(k) for k in ar.SIZES[resolution]]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(keys)]
    ratios = np.concatenate([rng.uniform(0.1, 5, 2000), middles, keys, [0.01, 100]])
    want = [int(np.argmin([abs(k - r) for k in keys])) for r in ratios]
    np.testing.assert_array_equal(ar.closest_ratios(ratios, np.ones(len(ratios)), resolution), want)


def test_fewer_ratios_keep_the_common_ones_and_the_widest_range():
  keys = list(ar.SIZES["144p"])
  nine = [keys[i] for i in ar.used_ratios("144p", 9)]
  assert nine == ["0.38", "0.48", "0.56", "0.75", "1.00", "1.33", "1.50", "1.78", "2.08"]
  assert [keys[i] for i in ar.used_ratios("144p", 3)] == ["0.56", "1.00", "1.78"]
  assert ar.used_ratios("144p", None) == ar.used_ratios("144p", 17) == ar.used_ratios("144p", 99) == tuple(range(17))
  chosen = ar.closest_ratios([470, 620, 1000], [1000, 1000, 1000], "144p", 9)
  assert [keys[i] for i in chosen] == ["0.48", "0.56", "1.00"]


def test_max_tokens():
  # Counted one by one over the sizes of 144p: 18 x 32 latents of 144 x 256 pixels are 9 x 16 tokens.
  counts = [math.ceil(h // 8 / 2) * math.ceil(w // 8 / 2) for h, w in ar.SIZES["144p"].values()]
  assert ar.max_tokens("144p") == max(counts) == 150
  assert ar.max_tokens("144p", spatial_factor=16, patch=(1, 1)) == max(
    (h // 16) * (w // 16) for h, w in ar.SIZES["144p"].values()
  )


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: ar.check_resolution("241p"), "unknown resolution '241p' .did you mean '240p'"),
    (lambda: ar.size("240p", "7:9"), "no aspect ratio '7:9'"),
    (lambda: ar.get_num_frames("3s"), "no clip length"),
    (lambda: ar.get_num_frames(0), "no clip length"),
  ],
)
def test_errors_name_the_value_and_what_is_allowed(call, message):
  with pytest.raises(ValueError, match=message):
    call()
