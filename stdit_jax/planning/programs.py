"""Time and memory of one training program on an accelerator, from the real compiler and without the accelerator."""

import dataclasses
import hashlib
import importlib.metadata
import math
import pathlib
import re
import time
from collections.abc import Sequence
from typing import Any

import jax

from data.buckets import Bucket
from stdit_jax.config import Config
from stdit_jax.models import flops
from stdit_jax.parallel import hlo
from stdit_jax.parallel.mesh import make_mesh
from stdit_jax.parallel.shardings import AnyMesh, tree_shardings
from stdit_jax.parallel.topology import CHIPS, compiler_version, is_gpu, parse_topology, topology_devices
from stdit_jax.planning import gpus
from stdit_jax.training.checkpoints import from_plain
from stdit_jax.training.objectives import Objective, make_objective
from stdit_jax.training.stage_data import choose_splits
from stdit_jax.training.stages import make_stages
from stdit_jax.training.state import make_optimizer, state_shapes
from stdit_jax.training.step import Programs, TraceCounter

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Job:
  """A program to compile, in plain values.

  Attributes:
    config: of the whole run, made plain by `checkpoints.plain`; stage: name of one of its stages.
    bucket: (resolution, frames, global batch size).
    topology, slices: of `topology.topology_devices`.
  """

  config: dict[str, Any]
  stage: str
  bucket: tuple[str, int, int]
  topology: str
  slices: int = 1


def bytes_per_device(shapes: Any, mesh: AnyMesh, rules: Sequence) -> int:
  """Bytes of a tree on one device under the sharding rules."""
  shardings = tree_shardings(shapes, mesh, rules)
  parts = jax.tree.map(lambda s, d: math.prod(d.shard_shape(s.shape)) * s.dtype.itemsize, shapes, shardings)
  return sum(jax.tree.leaves(parts))


def resident_bytes(config: Config, objective: Objective, mesh: AnyMesh) -> dict[str, int]:
  """{what: bytes on one device} of the arrays that stay in memory while a program runs, with its arguments."""
  params, frozen = objective.shapes
  states = state_shapes(params, make_optimizer(config.optimizer))
  sizes = {"parameters": states["params"], "average": states["ema"], "optimizer": states["opt"], "gradients": states["params"]}
  sizes = {name: bytes_per_device(tree, mesh, objective.rules) for name, tree in sizes.items()}
  frozen = bytes_per_device(frozen, mesh, objective.rules)
  return sizes | {"frozen": frozen + objective.beside(bytes_per_device, mesh)}


def lower(job: Job) -> tuple[jax.stages.Lowered, dict[str, Any]]:
  """Lowers the gradient program of a bucket. It is the program that trains, except for cuDNN's attention on GPUs (gpus.py).

  Returns:
    (lowered program, facts that are known before it is compiled: a dict of plain values)

  Raises:
    ValueError: a configuration, mesh or batch that is not allowed.
  """
  stage = next(s for s in make_stages(from_plain(job.config)) if s.name == job.stage)
  config, (resolution, frames, rows) = stage.config, job.bucket
  mesh = make_mesh(config.mesh, topology_devices(job.topology, job.slices), config.slices)
  objective = make_objective(config)
  split = choose_splits(stage, [Bucket(resolution, frames, 1.0, rows)], mesh, objective)[resolution, frames]
  if is_gpu(job.topology):
    split = dataclasses.replace(split, layout=dataclasses.replace(split.layout, cudnn=gpus.stand_in))
  program = Programs(objective, stage, mesh, TraceCounter()).gradient((resolution, frames), rows, split)
  layout, parts, resident = split.layout, split.micro_batches, resident_bytes(config, objective, mesh)
  # The host prepares the next batch during the step. It may be of the same bucket.
  resident["next batch"] = sum(
    math.prod(layout.sharding(*s.axes).shard_shape(s.shape)) * s.struct.dtype.itemsize for s in jax.tree.leaves(program.batch)
  )
  # The program's peak includes parameters, gradients and frozen arrays. All else stays beside it.
  own = resident["parameters"] + resident["gradients"] + bytes_per_device(objective.shapes[1], mesh, objective.rules)
  facts = {
    "stage": stage.name, "resolution": resolution, "frames": frames, "batch": rows, "batch_parts": layout.batch_parts,
    "samples_per_part": rows // layout.batch_parts // parts, "micro_batches": parts, "split_tokens": layout.split_tokens,
    "mesh": dict(mesh.shape), "chips": mesh.devices.size, "resident": resident, "beside": sum(resident.values()) - own,
    "limit": CHIPS[parse_topology(job.topology)].memory_gib * GIB,
  }  # fmt: skip
  tokens, model_flops = program.work
  if model_flops:
    # The backward pass computes the whole forward pass of the blocks again.
    again = objective.model.config.remat in ("full", "offload")
    hardware = model_flops * (flops.TRAINING + again) / flops.TRAINING
    facts |= {"tokens": tokens // rows, "model_flops": model_flops, "hardware_flops": hardware}
  return program.lower(), facts


def text_digest(lowered: jax.stages.Lowered, topology: str) -> str:
  """sha256 of program text, topology, compiler, and the reader of its output (hlo.py). They decide the result."""
  versions = f"{topology} {jax.__version__} {importlib.metadata.version('jaxlib')} {compiler_version(topology)}"
  reader = pathlib.Path(hlo.__file__).read_text()
  return hashlib.sha256(f"{versions}\n{reader}\n{lowered.as_text()}".encode()).hexdigest()[:32]


def compile_program(lowered: jax.stages.Lowered) -> dict[str, Any]:
  """Compiles a lowered program and reads its memory and traffic.

  Returns:
    seconds and bytes per device, in plain values. If the compiler finds too little memory, the key "oom" has its message.
  """
  started = time.monotonic()
  try:
    compiled: Any = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    text = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" not in text:
      raise
    sizes = re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", text)
    return {"oom": sizes.group(0) if sizes else text[:200], "compile_seconds": time.monotonic() - started}
  text, memory = compiled.as_text(), compiled.memory_analysis()
  moved, in_loop = dict.fromkeys(hlo.COLLECTIVES, 0), dict.fromkeys(hlo.COLLECTIVES, 0)
  for c in hlo.collectives(text):
    moved[c.kind] += c.bytes * c.times
    in_loop[c.kind] += c.bytes * c.in_loop
  return {
    "compile_seconds": time.monotonic() - started,
    "own_peak": int(memory.peak_memory_in_bytes),
    "activations": int(memory.temp_size_in_bytes),
    "collectives": moved,
    "in_loop": in_loop,  # in one iteration of each loop, which is one layer
    "between_slices": hlo.slice_bytes(text),
    "memory_traffic": hlo.memory_bytes(text),
  }


def combine(facts: dict[str, Any], compiled: dict[str, Any]) -> dict[str, Any]:
  """The facts of `lower` and of `compile_program` as one dict, with "peak" and "fits"."""
  result = facts | compiled
  if "oom" in result:
    return result | {"fits": False}
  result["peak"] = result["own_peak"] + result["beside"]
  return result | {"fits": result["peak"] <= result["limit"]}


def roofline(result: dict[str, Any], topology: str, slice_gbits: float) -> dict[str, Any]:
  """Seconds of a step at the published peaks, and the model-FLOP utilisation at this bound.

  compute: FLOPs of products, with the recomputed ones. memory: `hlo.memory_bytes`. links: bytes that a device sends, all-reduce
  twice. slices: bytes that it sends to other slices, at `slice_gbits` Gbit/s per chip. The four times are assumed to
  overlap, so the longest bounds the step.
  """
  chip = CHIPS[parse_topology(topology)]
  moved = result["collectives"]
  wire = sum(moved.values()) + moved["all-reduce"]
  seconds = {
    "compute": result["hardware_flops"] / result["chips"] / (chip.tflops * 1e12),
    "memory": result["memory_traffic"] / (chip.memory_gbs * 1e9),
    "links": wire * 8 / (chip.interconnect_gbits * 1e9),
    "slices": result["between_slices"] * 8 / (slice_gbits * 1e9),
  }
  bound = max(seconds, key=lambda what: seconds[what])
  utilisation = result["model_flops"] / result["chips"] / (chip.tflops * 1e12) / seconds[bound]
  return seconds | {"bound": bound, "step": seconds[bound], "utilisation": utilisation}
