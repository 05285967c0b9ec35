"""The search of batch sizes, with exactly known memory and time."""

import math
import pathlib
import re
import runpy

import pytest

from configs import open_sora_1_2
from stdit_jax import plan
from stdit_jax.planning import search
from stdit_jax.training.stages import make_stages
from tests.planning.test_plan import SMALL, command_line

GIB = 2**30


def device(constant, growth, limit=16.0, beside=2.0, noise=0.0):
  """A compiler whose programs need `constant + growth * n` GiB, and every other time `noise` more."""
  asked = []

  def measure(n):
    asked.append(n)
    peak = (beside + constant + growth * n + noise * (len(asked) % 2)) * GIB
    if peak > limit * GIB:
      return {"fits": False, "oom": "too large", "limit": limit * GIB}
    return {"fits": True, "peak": peak, "limit": limit * GIB, "resident": {"all": beside * GIB}}

  return measure, asked


@pytest.mark.parametrize(("constant", "growth"), [(1.0, 0.01), (0.1, 0.13), (3.0, 1.2), (2.0, 6.0), (0.5, 0.0003)])
def test_the_largest_batch_is_found_with_three_or_four_compilations(constant, growth):
  measure, asked = device(constant, growth)
  found = search.largest_batch(measure)
  best = math.floor((16.0 - 2.0 - constant) / growth + 1e-9)
  assert found.largest <= best
  full = found.result["peak"] > search.FULL * 16 * GIB
  assert full or found.largest * search.WORTH >= search.round_down(best)
  assert len(asked) <= 4  # a fourth one if the first two batches are too close for a line through them


def test_search_finds_a_batch_that_fits_for_nonlinear_memory():
  measure, asked = device(1.0, 0.05, noise=0.1)
  found = search.largest_batch(measure, first=16)
  assert found.results[found.largest]["fits"]
  assert 230 <= found.largest <= 260
  assert len(asked) <= search.ATTEMPTS


def test_search_shrinks_a_first_batch_that_does_not_fit():
  measure, asked = device(1.0, 1.2)
  assert search.largest_batch(measure, first=40).largest == 10
  measure, asked = device(20.0, 1.0)
  assert search.largest_batch(measure, first=8).largest == 0
  assert asked == [8, 4, 2, 1]


def result(n, seconds, fits=True):
  """A result that takes `seconds` of pure computation on v5e."""
  flops = seconds * 197e12
  return {
    "fits": fits, "hardware_flops": flops, "model_flops": flops, "chips": 1, "memory_traffic": 0, "between_slices": 0,
    "collectives": {"all-reduce": 0}, "batch_parts": 8, "hosts": 2, "split_tokens": False,
  }  # fmt: skip


def test_equal_batches_take_equal_time():
  found = search.Found({1: result(1, 0.3), 11: result(11, 2.3), 12: result(12, 9.0, fits=False)})
  constant, slope = found.seconds("v5e:2x4", 25)
  assert (constant, slope) == (pytest.approx(0.1), pytest.approx(0.2))
  assert found.equal(1.1, constant, slope) == 5
  assert found.equal(99.0, constant, slope) == 11  # limited by memory
  assert found.equal(0.0, constant, slope) == 1


def test_search_starts_with_the_given_batch(tmp_path, monkeypatch, capsys):
  """`--bucket 144p:51:192` is 24 samples on each of 8 devices. 31 samples fill the memory that the state leaves free."""
  measure, asked = device(1.0, 0.4)
  texts = []

  def compiler(job):
    n = job.bucket[2] // 8
    if job.text:
      texts.append(job.bucket)
      shown = {"stage": "stage1", "resolution": "144p", "frames": 51, "batch": 8 * n, "compile_seconds": 1, "text": True}
      return shown | {"fits": False, "peak": 17 * GIB, "limit": 16 * GIB}
    shown = {"stage": "stage1", "resolution": "144p", "frames": 51, "batch": 8 * n, "samples_per_part": n, "micro_batches": 1}
    return result(n, n / 10) | shown | {"compile_seconds": 1, "activations": 0, "text": False} | measure(n)

  monkeypatch.setattr(plan, "Compiler", lambda *_: compiler)
  plan.main(
    command_line(tmp_path, "--topology", "v5e:2x4", "--stage", "stage1", "--search-batch-size", "--bucket", "144p:51:192")
  )
  assert asked == [24, 31]
  assert texts == [("144p", 51, 248)]  # the text encoder is compiled for the largest batch
  out = capsys.readouterr().out
  assert re.search(r"144p x 51 +248 +3.10s", out)
  assert re.search(r"144p x 51 +248 +31 .* compute +100% +40\n", out)  # 124 rows of a host in 3.1 s
  assert "stage1: text encoder before the step (144p x 51, 248 rows): 17.0 / 16.0 GiB, does not fit, compiled in 1s" in out


def test_shipped_batches_belong_to_their_stage():
  """Their stage accepts the batches, which contain every bucket of the stage."""
  files = sorted((pathlib.Path(__file__).parents[2] / "configs" / "batches").glob("*.py"))
  assert files
  for path in files:
    found = runpy.run_path(path)
    for batches in (found["LARGEST"], found["EQUAL"]):
      for name, changes in batches.items():
        config = open_sora_1_2.get_config(name)
        old = make_stages(config)[0]
        config.stages = ({**config.stages[0], **changes},)
        (new,) = make_stages(config)
        old, new = (stage.config.data.parsed_buckets() for stage in (old, new))
        keys = [{(b.resolution, b.num_frames, b.keep_prob, b.duration_prob) for b in of if b.batch_size} for of in (old, new)]
        assert keys[0] == keys[1]


def test_the_written_fragment_is_a_valid_stage(tmp_path):
  """The fragment is Python with buckets, unchanged keep probabilities and split buckets. A stage accepts it."""
  from stdit_jax.training.checkpoints import from_plain, plain

  namespace = {}
  exec(SMALL, namespace)
  stages = make_stages(namespace["get_config"]())
  split = result(1, 1.0) | {"split_tokens": True}
  found = {
    ("stage1", "144p", 51): search.Found({1: result(1, 1.0), 4: result(4, 4.0)}),
    ("stage1", "360p", 408): search.Found({1: split}),
  }
  text = search.fragment(
    stages, found, {("stage1", "144p", 51): 8, ("stage1", "360p", 408): 8}, "v5e:2x4", "plan --config c.py"
  )
  made = {}
  exec(text, made)
  assert made["LARGEST"]["stage1"]["data.buckets"] == (("360p", 408, (0.15, 0.1), 8), ("144p", 51, 1.0, 32))
  assert made["EQUAL"]["stage1"]["data.buckets"] == (("360p", 408, (0.15, 0.1), 8), ("144p", 51, 1.0, 8))
  assert made["EQUAL"]["stage1"]["split_tokens"] == "360p:408"
  config = from_plain(plain(namespace["get_config"]()) | {"stages": [dict(name="stage1", steps=1, **made["EQUAL"]["stage1"])]})
  (stage,) = make_stages(config)
  assert stage.config.data.reference_devices == 1


def test_planned_batches_replace_those_of_the_stage():
  config = {"max_tokens_per_device": 5, "split_tokens": "auto", "stages": [{"name": "a", "max_tokens_per_device": 7}]}
  assert search.with_whole_batches(config, ("480p:204",)) == {
    "max_tokens_per_device": 0, "split_tokens": "480p:204", "stages": [{"name": "a"}]
  }  # fmt: skip
  sizes = {"mesh": {"data": -1, "fsdp": 8, "sequence": 4}, "slices": {"data": -1}}
  assert search.batch_units(sizes, 512, 2) == (512, 128)
