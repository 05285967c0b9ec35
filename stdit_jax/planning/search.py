"""The largest batch of a bucket that fits, and the batch with which all buckets take the same time.

Open-Sora searches batch sizes on the hardware (v1.2, scripts/misc/search_bs.py); here the compiler answers. Memory grows by a
fixed amount per sample: the first compilation, of a batch that is estimated by formula, tells it roughly, the next ones
better, until one confirms what was predicted of it.
"""

import dataclasses
import math
import textwrap

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from data.config import DataConfig
from stdit_jax.parallel.mesh import AXES, mesh_sizes
from stdit_jax.parallel.topology import CHIPS, parse_topology
from stdit_jax.planning.programs import resident_bytes, roofline
from stdit_jax.training.checkpoints import from_plain
from stdit_jax.training.objectives import make_objective
from stdit_jax.training.stages import make_stages

ATTEMPTS = 6  # compilations per bucket at most
FILL = 0.85  # of the memory that the state leaves, with which a search begins
# A search ends where a batch takes so much of the memory: what XLA still squeezes in it computes again, which takes time (1080p
# on v5p: 69 samples in 89.9 GiB, but 96 in 95.4), and its compilations take long.
FULL = 0.88
LEAST = 0.7  # of what is not state, how much grows with the batch at least: 84 to 100 % on v5p
WORTH = 1.05  # of what fits: a larger batch that is predicted is tried when it is larger than this
# Arrays of activations that a layer leaves for the backward pass, by remat policy, and that the layer at work needs: counted
# on STDiT3-XL/2 on v5p, where the 26 buckets of stage 1 took 160 to 245 kB per token. A search only begins there.
LEFT = {"none": 40, "dots": 12, "full": 1, "offload": 0}
AT_WORK = 60


def with_whole_batches(config, split):
  """The configuration (plain values) with batches that are not split into micro batches, and the tokens of the buckets
  `split` ("480p:204"), of no others, over the mesh's `sequence` axis."""
  changes = {"max_tokens_per_device": 0, "split_tokens": ",".join(split) or "never"}
  stages = [{key: value for key, value in stage.items() if key not in changes} for stage in config["stages"]]
  return {**config, **changes, "stages": stages}


def axis_sizes(config, chips, slices):
  """{axis: size} of the whole mesh."""
  within, over = mesh_sizes(config["mesh"], chips // slices), mesh_sizes(config["slices"], slices, "slices", "slices")
  return {axis: within[axis] * over[axis] for axis in within}


def batch_units(config, chips, slices):
  """Samples of the whole mesh when every device has one, and when the `sequence` axis shares one."""
  sizes = axis_sizes(config, chips, slices)
  split = sizes["data"] * sizes["fsdp"]
  return split * sizes["sequence"], split


def round_down(n):
  """To two significant digits: 16 to 99 as they are, 1234 -> 1200."""
  step = 10 ** max(0, len(str(n)) - 2)
  return n // step * step


@dataclasses.dataclass
class Found:
  """What a search found of one bucket; `results` are those of `Compiler`, by samples per device, all tried."""

  results: dict

  @property
  def largest(self):
    """Samples per device of the largest batch that was compiled and fits; 0 when not even one does."""
    return max((n for n, result in self.results.items() if result["fits"]), default=0)

  @property
  def result(self):
    """The result of that batch; of the smallest that was tried where none fits."""
    return self.results[self.largest or min(self.results)]

  def seconds(self, topology, slice_gbits):
    """(a, b): a step on n samples per device takes a + b * n at its bound."""
    fits = sorted(n for n, result in self.results.items() if result["fits"])
    low, high = ((n, roofline(self.results[n], topology, slice_gbits)["step"]) for n in (fits[0], fits[-1]))
    slope = (high[1] - low[1]) / (high[0] - low[0]) if high[0] > low[0] else low[1] / low[0]
    return low[1] - slope * low[0], slope

  def equal(self, seconds, constant, slope):
    """Samples per device with which a step takes about `seconds`, at `constant + slope * n`, and fits; at least 1."""
    return max(1, min(self.largest, round_down(max(1, round((seconds - constant) / slope)))))


def most_growth(result, n):
  """Bytes per sample if all that is not state grows with the batch, of a result for `n` samples per device."""
  return (result["peak"] - sum(size for name, size in result["resident"].items() if name != "next batch")) / n


def predict(results, limit):
  """Samples per device that fill `limit` bytes, by the two largest batches that fit; by one, the growth is not known, and
  all that is not waiting beside the program is taken for it, as where XLA began to compute again and took less for more."""
  fits = sorted(n for n, result in results.items() if result["fits"])
  high = fits[-1]
  growth = (results[high]["peak"] - results[fits[-2]]["peak"]) / (high - fits[-2]) if len(fits) > 1 else 0
  if growth <= 0:
    growth = most_growth(results[high], high)
  return high + math.floor((limit - results[high]["peak"]) / growth)


def largest_batch(measure, first=1, attempts=ATTEMPTS):
  """Searches the largest batch that fits.

  Args:
    measure: samples per device -> result of `Compiler`.
    first: samples to begin with: enough that what grows shows beside what does not.

  Returns:
    Found
  """
  results, n = {}, first
  while n and len(results) < attempts:
    results[n] = measure(n)
    n = next_batch(results)
  return Found(results)


def next_batch(results):
  """Samples per device to try next, None when the search is over: not even one fits, or what fits fills the memory."""
  fits = [n for n, result in results.items() if result["fits"]]
  failed = [n for n, result in results.items() if not result["fits"]]
  if not fits:
    return min(failed) // 2 or None
  high = max(fits)
  if results[high]["peak"] > FULL * results[high]["limit"]:
    return None
  n = round_down(predict(results, results[high]["limit"]))
  if failed and n >= (least := min(failed)):  # memory is no line there: 5 % less, then 20, then half
    n = max(high, round_down(int(least * (1 - min(0.5, 0.05 * 4 ** (len(failed) - 1))))))
  if len(results) == 1 and n <= high:  # of growth only the most is known: is one more as good as impossible?
    n = high + (results[high]["peak"] + LEAST * most_growth(results[high], high) <= results[high]["limit"])
  return n if n > high * WORTH and n not in results else None


def first_batch(job, chips):
  """Samples per device to begin with: those whose activations take about `FILL` of what the state leaves; 1 or more."""
  stage = next(s for s in make_stages(from_plain(job.config)) if s.name == job.stage)
  objective = make_objective(stage.config)
  tokens, _ = objective.work(objective.batch(job.bucket[:2], 1))
  if not tokens:  # of an autoencoder there is no formula
    return 1
  mesh = AbstractMesh(tuple(axis_sizes(job.config, chips, job.slices).values()), AXES)
  free = CHIPS[parse_topology(job.topology)].memory_gib * 2**30 - sum(resident_bytes(stage.config, objective, mesh).values())
  model = objective.model.config
  arrays = model.depth * LEFT[model.remat] + AT_WORK
  return max(1, round_down(int(FILL * free / (tokens * model.hidden_size * jnp.dtype(model.dtype).itemsize * arrays))))


def search_bucket(compiler, job, chips, start=None):
  """Searches the largest batch of a job's bucket, whole samples first; where not one fits, tokens are split -> Found.

  `start`: samples of the whole mesh to begin with; by default `first_batch` estimates.
  """
  key = job.bucket[:2]
  whole, split = batch_units(job.config, chips, job.slices)
  for unit, names in ((whole, ()), (split, (f"{key[0]}:{key[1]}",))):
    config = with_whole_batches(job.config, names)

    def measure(n, config=config, unit=unit):
      return compiler(dataclasses.replace(job, config=config, bucket=(*key, n * unit)))

    found = largest_batch(measure, max(1, start // unit) if start else first_batch(job, chips))
    if found.largest or whole == split:
      break
  return found


def fragment(stages, found, equal, topology, command):
  """Python text of a config fragment.

  Args:
    stages: of the configuration; found: {(stage, resolution, frames): Found} of buckets that fit; equal: their equal batches.
    command: the command that made it.
  """
  lines = [
    f'"""Batch sizes found by the compiler for {topology}, of the whole mesh. Computed, not measured on a device.',
    "",
    " \\\\\n".join(textwrap.wrap(command, 120, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False)),
    "",
    "LARGEST fills the memory; EQUAL makes the steps of all buckets take about the same time. A stage takes them up, on the",
    "mesh of that command, by",
    "  dict(name=..., steps=..., **EQUAL[name])",
    '"""',
  ]
  largest = {key: answer.largest * answer.result["batch_parts"] for key, answer in found.items()}
  for name, batches in (("LARGEST", largest), ("EQUAL", equal)):
    lines += ["", f"{name} = {{"]
    for stage in stages:
      rows, split = [], []
      for b in DataConfig(**stage.config.data.to_dict()).parsed_buckets():
        key = stage.name, b.resolution, b.num_frames
        if key in batches:
          keep = b.keep_prob if b.duration_prob is None else (b.keep_prob, b.duration_prob)
          rows.append(f"      {(b.resolution, b.num_frames, keep, batches[key])!r},")
          split += [f"{b.resolution}:{b.num_frames}"] * found[key].result["split_tokens"]
      lines += [f'  "{stage.name}": {{', '    "data.buckets": (', *rows, "    ),", '    "data.reference_devices": 1,']
      lines += ['    "max_tokens_per_device": 0,', f'    "split_tokens": {",".join(split) or "never"!r},', "  },"]
    lines.append("}")
  return "\n".join(lines).replace("'", '"') + "\n"
