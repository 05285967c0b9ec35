"""Bucket assignment follows the rules and the frequencies of the original (tests/reference/open_sora/buckets_v1*.json)."""

import collections
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


def names_of(parsed, bucket, ratio):
  """[resolution, frames, aspect ratio] of every row, None without a bucket."""
  return [
    None if b < 0 else [parsed[b].resolution, parsed[b].num_frames, list(aspect_ratios.SIZES[parsed[b].resolution])[r]]
    for b, r in zip(bucket, ratio)
  ]


def run(parsed, videos, draws):
  """The rules for given draws [N, buckets, 2]."""
  found: list[list | None] = [None] * len(videos)
  for interval in {v["frame_interval"] for v in videos}:
    rows = [i for i, v in enumerate(videos) if v["frame_interval"] == interval]
    columns = (np.array([videos[i][k] for i in rows]) for k in ("T", "H", "W"))
    bucket, ratio, reason, _ = buckets.choose(*columns, draws=draws[rows], buckets=parsed, interval=interval)
    assert ((bucket < 0) == (reason > 0)).all()
    for row, name in zip(rows, names_of(parsed, bucket, ratio)):
      found[row] = name
  return found


def draws_of_the_original(parsed, seeds):
  """Draws as in Open-Sora, which makes a new generator for each row and bucket.

  If the bucket has a duration probability, the first draw decides on the duration and the second one whether the row stays.
  Otherwise the first draw decides whether the row stays.
  """
  draws = np.zeros((len(seeds), len(parsed), 2))
  for row, seed in enumerate(seeds):
    for index, b in enumerate(parsed):
      first, second = np.random.default_rng(seed + index).random(2)
      draws[row, index] = first, first if b.duration_prob is None else second
  return draws


@pytest.mark.parametrize(("version", "name"), CASES)
def test_the_draws_of_the_original_give_its_buckets(version, name):
  golden, videos = GOLDEN[version]["configs"][name], GOLDEN[version]["videos"]
  parsed = buckets.parse_buckets(config_of(golden))
  order = {}
  for b in parsed:
    order.setdefault(b.resolution, []).append(b.num_frames)
  assert [[r, f] for r, f in order.items()] == golden["search_order"]
  assert run(parsed, videos, draws_of_the_original(parsed, golden["seeds"])) == golden["exact_with_seeds"]
  zeros = np.zeros((len(videos), len(parsed), 2))
  always = buckets.parse_buckets(config_of(golden, lambda p: 1.0))
  assert run(always, videos, zeros) == golden["keep_prob_forced_to_1"]
  but_zero = buckets.parse_buckets(config_of(golden, lambda p: float(p > 0)))
  assert run(but_zero, videos, zeros) == golden["keep_prob_forced_to_1_except_zero"]
  for key, thw in golden["thw"].items():
    resolution, frames, ratio = json.loads(key)
    assert [frames, *aspect_ratios.size(resolution, ratio)] == thw


@pytest.mark.parametrize(("version", "name"), CASES)
def test_frequencies_are_those_of_the_original(version, name):
  """Our counts differ from those of the original by at most 4.5 standard deviations of this difference."""
  golden = GOLDEN[version]["configs"][name]
  parsed = buckets.parse_buckets(config_of(golden))
  number = golden["frequencies"]["draws"]
  for row in golden["frequencies"]["rows"]:
    video = GOLDEN[version]["videos"][row["video"]]
    columns = (np.full(number, video[k]) for k in ("T", "H", "W"))
    bucket, ratio, _, _ = buckets.assign(*columns, seed=(row["video"],), buckets=parsed, interval=video["frame_interval"])
    counts = collections.Counter("null" if f is None else json.dumps(f) for f in names_of(parsed, bucket, ratio))
    for key in counts.keys() | row["counts"].keys():
      ours, theirs = counts[key], row["counts"].get(key, 0)
      both = ours + theirs
      assert abs(ours - theirs) <= 4.5 * np.sqrt(both * (1 - both / (2 * number))), key


def test_draws_follow_from_the_seed_and_not_from_the_chunks(monkeypatch):
  rng = np.random.default_rng(0)
  n = 1000
  columns = rng.integers(1, 200, n), rng.integers(100, 900, n), rng.integers(100, 900, n)
  parsed = buckets.parse_buckets([("144p", 51, (0.5, 0.3), 1), ("144p", 17, 0.5, 1), ("240p", 1, 0.4, 1), ("240p", 51, 0.5, 1)])
  want = buckets.assign(*columns, (7, 3), parsed, 1)
  assert (buckets.assign(*columns, (7, 4), parsed, 1)[0] != want[0]).any()
  monkeypatch.setattr(buckets, "_CHUNK", 64)
  for a, b in zip(buckets.assign(*columns, (7, 3), parsed, 1), want):
    np.testing.assert_array_equal(a, b)


def test_reasons():
  parsed = buckets.parse_buckets([("240p", 51, 0.0, None), ("144p", 51, 1.0, 2), ("240p", 17, 0.0, 1)])
  frames, sides = np.array([60, 60, 20, 1, 52, 51]), np.array([[50] * 6, [50] * 6])
  sides[:, 1:] = 400
  bucket, _, reason, refused = buckets.assign(frames, *sides, seed=(0,), buckets=parsed, interval=1)
  assert bucket.tolist() == [-1, 2, -1, -1, 2, -1]
  # Rows of 20 and 51 frames fit 240p x 17, whose keep probability is 0. The image fits no bucket, since none has one frame.
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
def test_errors_name_the_value_and_what_is_allowed(row, message):
  with pytest.raises(ValueError, match=message) as error:
    buckets.parse_buckets([row])
  assert "\n" not in str(error.value)


def test_same_bucket_twice_and_empty():
  with pytest.raises(ValueError, match="stands twice"):
    buckets.parse_buckets([("240p", 51, 1.0, 1), ("240p", "2s", 1.0, 1)])
  with pytest.raises(ValueError, match="empty"):
    buckets.parse_buckets([])
