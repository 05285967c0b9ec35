"""Bucket assignment against the values of the original (tests/reference/open_sora/buckets_v1*.json)."""

import json
import pathlib

import numpy as np
import pytest

from data import aspect_ratios, buckets

REFERENCE = pathlib.Path(__file__).parents[1] / "reference" / "open_sora"
GOLDEN = {v: json.loads((REFERENCE / f"buckets_v{v}.json").read_text()) for v in ("11", "12")}
CASES = [(v, name) for v, golden in GOLDEN.items() for name in golden["configs"]]


def config_of(golden, change=lambda p: p):
  table = golden["bucket_config"]

  def probability(p):
    return tuple(change(x) for x in p) if isinstance(p, list) else change(p)  # fmt: skip

  return {r: {int(f): (probability(p), b or 1) for f, (p, b) in lengths.items()} for r, lengths in table.items()}


def run(parsed, videos, seeds):
  columns = ([v[k] for v in videos] for k in ("T", "H", "W"))
  interval = np.array([v["frame_interval"] for v in videos])
  bucket, ratio, reason, _ = buckets.assign(
    *map(np.array, columns), np.array(seeds, np.uint64), parsed, frame_interval=interval
  )
  assert ((bucket < 0) == (reason > 0)).all()
  found = []
  for b, r in zip(bucket, ratio):
    found.append(
      None if b < 0 else [parsed[b].resolution, parsed[b].num_frames, list(aspect_ratios.SIZES[parsed[b].resolution])[r]]
    )
  return found


@pytest.mark.parametrize(("version", "name"), CASES)
def test_exact(version, name):
  golden, videos = GOLDEN[version]["configs"][name], GOLDEN[version]["videos"]
  parsed = buckets.parse_buckets(config_of(golden))
  order = {}
  for b in parsed:
    order.setdefault(b.resolution, []).append(b.num_frames)
  assert [[r, f] for r, f in order.items()] == golden["search_order"]
  assert buckets.num_buckets(parsed) == golden["num_bucket"]
  assert run(parsed, videos, golden["seeds"]) == golden["exact_with_seeds"]
  zeros = np.zeros(len(videos))
  always = buckets.parse_buckets(config_of(golden, lambda p: 1.0))
  assert run(always, videos, zeros) == golden["keep_prob_forced_to_1"]
  but_zero = buckets.parse_buckets(config_of(golden, lambda p: float(p > 0)))
  assert run(but_zero, videos, zeros) == golden["keep_prob_forced_to_1_except_zero"]
  for key, thw in golden["thw"].items():
    resolution, frames, ratio = json.loads(key)
    assert [frames, *aspect_ratios.size(resolution, ratio)] == thw


@pytest.mark.parametrize(("version", "name"), CASES)
def test_frequencies_are_equal_counts(version, name):
  """The same seeds give the very same counts, not only similar ones."""
  golden = GOLDEN[version]["configs"][name]
  parsed = buckets.parse_buckets(config_of(golden))
  number = golden["frequencies"]["draws"]
  for row in golden["frequencies"]["rows"]:
    found = run(parsed, [GOLDEN[version]["videos"][row["video"]]] * number, np.arange(number))
    counts = {}
    for f in found:
      key = "null" if f is None else json.dumps(f)
      counts[key] = counts.get(key, 0) + 1
    assert counts == row["counts"]


def test_draws_are_numpys():
  rng = np.random.default_rng(1)
  large = rng.integers(0, 2**63, 300, dtype=np.uint64)
  seeds = np.concatenate([large, np.array([*range(50), 2**32 - 1, 2**32, 2**64 - 1], np.uint64)])
  first, second = buckets.draws(seeds, 2)
  want = np.array([np.random.default_rng(int(s)).random(2) for s in seeds])
  np.testing.assert_array_equal(first, want[:, 0])
  np.testing.assert_array_equal(second, want[:, 1])


def test_seeds_by_row_number_and_chunks(monkeypatch):
  rng = np.random.default_rng(0)
  n = 1000
  frames, height, width = rng.integers(1, 200, n), rng.integers(100, 900, n), rng.integers(100, 900, n)
  parsed = buckets.parse_buckets([("144p", 51, (0.5, 0.3), 1), ("144p", 17, 0.5, 1), ("240p", 1, 0.4, 1), ("240p", 51, 0.5, 1)])
  seeds = 7 + 3 + np.arange(n, dtype=np.uint64) * np.uint64(buckets.num_buckets(parsed))
  want = buckets.assign(frames, height, width, seeds, parsed)
  monkeypatch.setattr(buckets, "_CHUNK", 64)
  for a, b in zip(buckets.assign(frames, height, width, (7, 3, 0), parsed), want):
    np.testing.assert_array_equal(a, b)


def test_reasons():
  parsed = buckets.parse_buckets([("240p", 51, 0.0, None), ("144p", 51, 1.0, 2), ("240p", 17, 0.0, 1)])
  frames, sides = np.array([60, 60, 20, 1, 52, 51]), np.array([[50] * 6, [50] * 6])
  sides[:, 1:] = 400
  bucket, _, reason, refused = buckets.assign(frames, *sides, np.arange(6), parsed)
  assert bucket.tolist() == [-1, 2, -1, -1, 2, -1]
  # The 20 and 51 frames fit 240p x 17, which keeps nothing; the image finds no 1-frame bucket.
  assert [buckets.REASONS[r] for r in reason] == ["too small", "", "keep probability", "too short", "", "keep probability"]
  assert refused.tolist() == [2, 2, 0]


@pytest.mark.parametrize(
  ("row", "message"),
  [
    (("241p", 51, 1.0, 1), "unknown resolution '241p'.*there are 144p"),
    (("240p", 51, 1.2, 1), "keep probability 1.2 is no number from 0 to 1"),
    (("240p", 51, (1.0, -0.1), 1), "duration probability -0.1"),
    (("240p", 51, (1.0, 0.1, 3), 1), "a pair is"),
    (("240p", 1, (1.0, 0.1), 1), "images take one probability"),
    (("240p", 51, 1.0, None), "batch_size None"),
    (("240p", 51, 1.0, 0), "batch_size 0"),
    (("240p", -3, 1.0, 1), "no clip length"),
    (("240p", 51, 1.0), "needs 4 values"),
  ],
)
def test_mistakes(row, message):
  with pytest.raises(ValueError, match=message) as error:
    buckets.parse_buckets([row])
  assert "\n" not in str(error.value)


def test_same_bucket_twice_and_empty():
  with pytest.raises(ValueError, match="stands twice"):
    buckets.parse_buckets([("240p", 51, 1.0, 1), ("240p", "2s", 1.0, 1)])
  with pytest.raises(ValueError, match="empty"):
    buckets.parse_buckets([])
