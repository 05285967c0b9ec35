"""Frame masks occur as often as in the original, in 20,000 draws. Names that 1.1 and 1.2 share use the same draws."""

import collections
import functools
import itertools

import jax
import numpy as np
import pytest

from stdit_jax.diffusion.frame_masks import NAMES_1_1, NAMES_1_2, FrameMasks
from tests.diffusion.common import keys_of
from tests.helpers import load_json

VERSIONS = ("masks_v11.json", "masks_v12.json")
DRAWS = 20000


@functools.cache
def _keys():
  return keys_of(DRAWS, seed=1)


@functools.cache
def _draw(masks, num_frames):
  drawn = np.asarray(masks.draw(_keys(), num_frames))
  assert drawn.shape == (DRAWS, num_frames)
  assert drawn.any(axis=1).all(), "a mask without a frame to generate"
  return drawn


def _counts(drawn):
  length = drawn.shape[1]
  values, counts = np.unique(drawn @ (1 << np.arange(length)[::-1]), return_counts=True)
  return collections.Counter({f"{value:0{length}b}": int(count) for value, count in zip(values, counts, strict=True)})


def _close(ours, theirs):
  """Two counts differ by at most 4 standard errors of their difference."""
  p = (ours + theirs) / (2 * DRAWS)
  assert abs(ours - theirs) <= 4 * np.sqrt(2 * DRAWS * p * (1 - p)) + 1e-9, (ours, theirs)


def _single_cases():
  return [
    pytest.param(name, int(length), result, id=f"{name}-{length}")
    for file in VERSIONS
    for name, per_length in load_json(file)["mask_types"]["results"].items()
    for length, result in per_length.items()
  ]


@pytest.mark.parametrize(("name", "length", "result"), _single_cases())
def test_each_strategy(name, length, result):
  drawn = _draw(FrameMasks.create({name: 1.0}), length)
  if "error" in result:  # the original's quarter masks of 2 or 3 latent frames fail; ours give one frame, or one at each end
    assert (~drawn).sum(axis=1).max() == (2 if "head_tail" in name and length == 3 else 1)
  elif "number_of_true_frames" in result:
    counts = collections.Counter(drawn.sum(axis=1).tolist())
    for number, count in result["number_of_true_frames"].items():
      _close(counts[int(number)], count)
    assert sum(counts.values()) == DRAWS
  elif name.endswith("image_head_tail") and length == 2:  # original: nothing to generate
    assert _counts(drawn) == {"01": DRAWS}
  elif length == 1:
    assert drawn.all()
  else:
    counts = _counts(drawn)
    assert set(counts) == set(result["masks"])
    for mask, count in result["masks"].items():
      _close(counts[mask], count)


def _distribution(name, length):
  """Exact probabilities of the masks called `name`, from the original's description."""
  masks = collections.Counter()

  def add(clean, probability):
    masks["".join("01"[i not in clean] for i in range(length))] += probability

  name, quarter = name.removeprefix("mask_"), length // 4
  if name in ("identity", "no"):
    add((), 1)
  elif name == "random":
    nodes, weights = np.polynomial.legendre.leggauss(32)
    rates = 0.5 + 0.4 * nodes
    for clean in itertools.product((False, True), repeat=length):
      k = sum(clean)
      chosen = {i for i in range(length - (k == length)) if clean[i]}
      add(chosen, (weights / 2 * rates**k * (1 - rates) ** (length - k)).sum())
  elif name == "intepolate":
    for start in (0, 1):
      add(range(start, length, 2), 1 / 2)
  else:
    sizes = range(1, quarter + 1) if name.startswith("quarter") else (1,)
    for n in sizes:
      starts = {
        "random": [range(i, i + n) for i in range(length - n + 1)],
        "head": [range(n)],
        "tail": [range(length - n, length)],
        "head_tail": [{*range(n), *range(length - n, length)}],
      }[name.split("_", 1)[1]]
      for clean in starts:
        add(clean, 1 / len(sizes) / len(starts))
  return masks


def _mixed_cases():
  return [
    pytest.param(int(name.split("/T")[1]), case, id=f"{file[6:9]}-{name}")
    for file in VERSIONS
    for name, case in load_json(file)["mixed_ratios"].items()
  ]


@pytest.mark.parametrize(("length", "case"), _mixed_cases())
def test_published_ratios(length, case):
  assert case["draws"] == DRAWS
  counts = _counts(_draw(FrameMasks.create(case["mask_ratios"]), length))
  exact = collections.Counter()
  for name, ratio in case["mask_ratios"].items():
    for mask, probability in _distribution(name, length).items():
      exact[mask] += ratio * probability
  for mask, count in case["masks"].items():
    _close(counts[mask], count)
  # The original's run stored only its 40 most frequent masks, so its count of all other masks is biased. Our count of the
  # others is compared with their exact probability.
  other = 1 - sum(exact[mask] for mask in case["masks"])
  ours = sum(count for mask, count in counts.items() if mask not in case["masks"])
  assert abs(ours - DRAWS * other) <= 4 * np.sqrt(DRAWS * max(other, 0) * (1 - other)) + 1e-6
  assert set(counts) <= set(exact)


@pytest.mark.parametrize("file", VERSIONS)
def test_accepted_ratios(file):
  for case in load_json(file)["validation"]:
    if case["accepted"]:
      masks = FrameMasks.create(case["mask_ratios"])
      assert dict(zip(masks.names, masks.probabilities, strict=True)) == pytest.approx(case["completed"])
    else:
      with pytest.raises(ValueError, match="mask_ratios"):
        FrameMasks.create(case["mask_ratios"])


def test_wrong_ratios_are_refused():
  with pytest.raises(ValueError, match="more than 1"):
    FrameMasks.create({"image_head": 0.7, "random": 0.5})
  with pytest.raises(ValueError, match="unknown name quarter_middle; allowed: identity, random, intepolate"):
    FrameMasks.create({"quarter_middle": 0.5})
  with pytest.raises(ValueError, match="unknown name mask_no"):
    FrameMasks.create({"mask_no": 0.5, "random": 0.5})
  with pytest.raises(ValueError, match="raise mask_no"):
    FrameMasks.create({"mask_image_head": 0.4})
  with pytest.raises(ValueError, match=r"mask_image_head = 1\.1"):
    FrameMasks.create({"mask_no": -0.1, "mask_image_head": 1.1})
  assert FrameMasks.create({}).names == ("identity",)
  assert len(NAMES_1_1) == 9
  assert len(NAMES_1_2) == 11


def test_masks_of_a_sample_depend_on_its_key_only():
  masks, keys = FrameMasks.create({"random": 0.5, "quarter_random": 0.5}), keys_of(6)
  all_of_them = np.asarray(masks.draw(keys, 15))
  np.testing.assert_array_equal(all_of_them[4:], np.asarray(masks.draw(keys[4:], 15)))
  np.testing.assert_array_equal(all_of_them, np.asarray(jax.jit(masks.draw, static_argnums=1)(keys, 15)))
