"""Finds the largest batch of a bucket that fits, the batches with equal step times, and the fastest mesh.

Open-Sora searches batch sizes on the hardware (v1.2, scripts/misc/search_bs.py). Here the compiler tells the memory. Memory
grows by a fixed amount per sample. A formula estimates the first batch. Each compilation improves the estimate, until a
compilation confirms it.
"""

import dataclasses
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from stdit_jax.parallel.mesh import AXES, mesh_sizes
from stdit_jax.parallel.topology import CHIPS, parse_topology
from stdit_jax.planning.programs import Job, resident_bytes, roofline
from stdit_jax.training.stages import Stage

ATTEMPTS = 6  # most compilations per bucket
FILL = 0.85  # share of the memory that the state leaves free, for the first batch
# A search ends with a batch that takes this share of the memory. For larger batches XLA recomputes activations, which takes
# time (compiled for v5p at 1080p: 69 samples in 89.9 GiB, 96 in 95.4), and the compilations take long.
FULL = 0.88
LEAST = 0.7  # at least this share of the memory besides the state grows with the batch (compiled for v5p: 84 to 100 %)
WORTH = 1.05  # the search ends if the predicted largest batch is below this multiple of the largest batch so far
# Arrays of activations that a layer saves for the backward pass, by remat policy, and arrays that the running layer needs.
# Counted for STDiT3-XL/2 on v5p, where the 26 buckets of stage 1 need 160 to 245 kB per token. They only set the first batch.
LEFT = {"none": 40, "dots": 12, "full": 1, "offload": 0}
AT_WORK = 60


def with_whole_batches(config: dict[str, Any], split: Sequence[str]) -> dict[str, Any]:
  """The configuration (plain values) without micro batches, so that memory grows linearly with the batch. Only the buckets
  `split` ("480p:204") split their tokens over the `sequence` axis."""
  changes = {"max_tokens_per_device": 0, "split_tokens": ",".join(split) or "never"}
  stages = [{key: value for key, value in stage.items() if key not in changes} for stage in config["stages"]]
  return {**config, **changes, "stages": stages}


def axis_sizes(config: dict[str, Any], chips: int, slices: int) -> dict[str, int]:
  """{axis: size} of the whole mesh."""
  within, over = mesh_sizes(config["mesh"], chips // slices), mesh_sizes(config["slices"], slices, "slices", "slices")
  return {axis: within[axis] * over[axis] for axis in within}


def batch_units(config: dict[str, Any], chips: int, slices: int) -> tuple[int, int]:
  """The smallest batch of the whole mesh: (without split tokens, with tokens split over `sequence`)."""
  sizes = axis_sizes(config, chips, slices)
  split = sizes["data"] * sizes["fsdp"]
  return split * sizes["sequence"], split


def round_down(n: int) -> int:
  """`n` with two significant digits: 99 stays 99, 1234 becomes 1200."""
  step = 10 ** max(0, len(str(n)) - 2)
  return n // step * step


@dataclasses.dataclass
class Found:
  """The answer of a search. `results`: {samples per device: result of `Compiler`} of all compilations."""

  results: dict[int, dict[str, Any]]

  @property
  def fits(self) -> list[int]:
    """Samples per device of the compiled batches that fit, ascending."""
    return sorted(n for n, result in self.results.items() if result["fits"])

  @property
  def largest(self) -> int:
    """Samples per device of the largest compiled batch that fits. 0 if none fits."""
    return max(self.fits, default=0)

  @property
  def result(self) -> dict[str, Any]:
    """The result of the largest batch that fits, or else of the smallest batch."""
    return self.results[self.largest or min(self.results)]

  def seconds(self, topology: str, slice_gbits: float) -> tuple[float, float]:
    """(a, b): a step with n samples per device takes a + b * n seconds at its bound."""
    low, high = ((n, roofline(self.results[n], topology, slice_gbits)["step"]) for n in (self.fits[0], self.largest))
    slope = (high[1] - low[1]) / (high[0] - low[0]) if high[0] > low[0] else low[1] / low[0]
    return low[1] - slope * low[0], slope

  def equal(self, seconds: float, constant: float, slope: float) -> int:
    """Samples per device, at least 1, that fit and whose step takes about `seconds`. A step takes `constant + slope * n`."""
    return max(1, min(self.largest, round_down(max(1, round((seconds - constant) / slope)))))


def most_growth(result: dict[str, Any], n: int) -> float:
  """Bytes per sample if all memory besides the state grows with the batch. `result`: for `n` samples per device."""
  return (result["peak"] - sum(size for name, size in result["resident"].items() if name != "next batch")) / n


def predict(found: Found) -> int:
  """Samples per device that fill the memory, by a line through the two largest batches that fit.

  With one result the growth is unknown. If XLA recomputes activations, the larger batch may need less memory. In both cases
  the line uses `most_growth`.
  """
  (low, high), result = [0, *found.fits][-2:], found.result
  growth = (result["peak"] - found.results[low]["peak"]) / (high - low) if low else 0
  if growth <= 0:
    growth = most_growth(result, high)
  return high + math.floor((result["limit"] - result["peak"]) / growth)


def largest_batch(measure: Callable[[int], dict[str, Any]], first: int = 1) -> Found:
  """Finds the largest batch that fits.

  Args:
    measure: compiles a batch of so many samples per device, and returns the result of `Compiler`.
    first: samples of the first compilation, enough to make the growth visible.
  """
  found, n = Found({}), first
  while n and len(found.results) < ATTEMPTS:
    found.results[n] = measure(n)
    n = next_batch(found)
  return found


def next_batch(found: Found) -> int | None:
  """Samples per device to try next. None: no sample fits, the memory is full, or no larger batch is WORTH a compilation."""
  failed, high, result = found.results.keys() - set(found.fits), found.largest, found.result
  if not high:
    return min(failed) // 2 or None
  if result["peak"] > FULL * result["limit"]:
    return None
  n = round_down(predict(found))
  if failed and n >= (least := min(failed)):  # the line is wrong there: try 5 % less, then 20 %, then half
    n = max(high, round_down(int(least * (1 - min(0.5, 0.05 * 4 ** (len(failed) - 1))))))
  if len(found.results) == 1 and n <= high:  # only an upper bound of the growth is known: one more may fit
    n = high + (result["peak"] + LEAST * most_growth(result, high) <= result["limit"])
  return n if n > high * WORTH and n not in found.results else None


def first_batch(job: Job, chips: int) -> int:
  """Samples per device, at least 1, whose activations take about `FILL` of the memory that the state leaves free."""
  stage, objective = job.objective()
  tokens, _ = objective.work(objective.batch(job.bucket[:2], 1))
  if not tokens:  # autoencoders have no formula
    return 1
  mesh = AbstractMesh(tuple(axis_sizes(job.config, chips, job.slices).values()), AXES)
  free = CHIPS[parse_topology(job.topology)].memory_gib * 2**30 - sum(resident_bytes(stage.config, objective, mesh).values())
  model = objective.model.config
  arrays = model.depth * LEFT[model.remat] + AT_WORK
  return max(1, round_down(int(FILL * free / (tokens * model.hidden_size * jnp.dtype(model.dtype).itemsize * arrays))))


def search_bucket(compiler: Callable[[Job], dict[str, Any]], job: Job, chips: int, start: int | None = None) -> Found:
  """Finds the largest batch of a job's bucket. If not one whole sample fits, its tokens are split.

  Args:
    start: samples of the whole mesh in the first compilation (default: `first_batch`).
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


def largest_job(job: Job, found: Found) -> Job:
  """The job of the largest batch that fits."""
  (resolution, frames, _), result = job.bucket, found.result
  config = with_whole_batches(job.config, [f"{resolution}:{frames}"] if result["split_tokens"] else ())
  return dataclasses.replace(job, config=config, bucket=(resolution, frames, found.largest * result["batch_parts"]))


def fragment(stages: Sequence[Stage], found: dict[tuple, Found], equal: dict[tuple, int], topology: str, command: str) -> str:
  """The text of a config fragment in Python.

  Args:
    found: {(stage, resolution, frames): answer} of the buckets that fit; equal: their batches of equal time.
    command: the command that made it.
  """
  lines = [
    f'"""Global batch sizes for {topology}, found by `plan`. Computed, not measured on a device.',
    "",
    " \\\\\n".join(textwrap.wrap(command, 120, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False)),
    "",
    "LARGEST fills the memory. EQUAL makes the steps of all buckets take about the same time. To use a table, train",
    "on the mesh of this plan and write a stage:",
    "  dict(name=..., steps=..., **EQUAL[name])",
    '"""',
  ]
  largest = {key: answer.largest * answer.result["batch_parts"] for key, answer in found.items()}
  for name, batches in (("LARGEST", largest), ("EQUAL", equal)):
    lines += ["", f"{name} = {{"]
    for stage in stages:
      rows, split = [], []
      for b in stage.config.data.parsed_buckets():
        key = stage.name, b.resolution, b.num_frames
        if key in batches:
          keep = b.keep_prob if b.duration_prob is None else (b.keep_prob, b.duration_prob)
          rows.append(f"      {(b.resolution, b.num_frames, keep, batches[key])!r},")
          split += [f"{b.resolution}:{b.num_frames}"] * found[key].result["split_tokens"]
      lines += [f'  "{stage.name}": {{', '    "data.buckets": (', *rows, "    ),", '    "data.reference_devices": 1,']
      lines += ['    "max_tokens_per_device": 0,', f'    "split_tokens": {",".join(split) or "never"!r},', "  },"]
    lines.append("}")
  return "\n".join(lines).replace("'", '"') + "\n"


# ----------------------------------------------------------------------------------------------------------------- meshes

TILE = 16  # rows of a bfloat16 tile. XLA scatters a gradient only in whole tiles (parallel/shardings.py)
MOST_FSDP = 64
SEQUENCE = (1, 2, 4, 8, 16)


def sensible_meshes(chips: int, width: int) -> list[dict[str, int]]:
  """Meshes of `chips` devices that are worth a compilation: [{axis: size}].

  `fsdp` is 4 to 64 and divides `width`, into whole tiles if possible. `sequence` is a power of two up to 16, and `data` is the
  rest. `tensor` stays 1: it moves activations in each block, which costs more than it saves for these widths.
  """
  divide = [d for d in range(min(4, chips), MOST_FSDP + 1) if chips % d == 0 and width % d == 0] or [1]
  fsdp = [d for d in divide if width % (d * TILE) == 0] or divide
  return [dict(zip(AXES, (chips // f // s, f, s, 1))) for f in fsdp for s in SEQUENCE if (chips // f) % s == 0]


def nearest_batch(rows: int, chips: int) -> int:
  """The smallest batch of at least `rows` samples that every mesh of `chips` devices can split."""
  return math.ceil(rows / chips) * chips
