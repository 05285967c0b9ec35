"""What one training program needs on accelerators: compiled by their real compiler, without having one."""

import dataclasses
import hashlib
import math
import pathlib
import re
import time

import jax
import jaxlib

from data.buckets import Bucket
from stdit_jax.models import flops
from stdit_jax.parallel import hlo
from stdit_jax.parallel.mesh import make_mesh
from stdit_jax.parallel.shardings import tree_shardings
from stdit_jax.parallel.topology import CHIPS, compiler_version, is_gpu, parse_topology, topology_devices
from stdit_jax.planning import gpus
from stdit_jax.training.checkpoints import from_plain
from stdit_jax.training.objectives import make_objective
from stdit_jax.training.stage_data import choose_splits
from stdit_jax.training.stages import make_stages
from stdit_jax.training.state import make_optimizer, state_shapes
from stdit_jax.training.step import Programs, TraceCounter

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Job:
  """A program to be compiled, in plain values.

  Attributes:
    config: the whole run's, as `checkpoints.plain` makes it; stage: the name of one of its stages.
    bucket: (resolution, frames, global batch size).
    topology, slices: as `topology.topology_devices`.
  """

  config: dict
  stage: str
  bucket: tuple
  topology: str
  slices: int = 1


def bytes_per_device(shapes, mesh, rules):
  """Bytes of a tree on one device, as the sharding rules lay it."""
  shardings = tree_shardings(shapes, mesh, rules)
  parts = jax.tree.map(lambda s, d: math.prod(d.shard_shape(s.shape)) * s.dtype.itemsize, shapes, shardings)
  return sum(jax.tree.leaves(parts))


def resident_bytes(config, objective, mesh):
  """{what: bytes on one device} of all that stays in memory while a program runs, its own arguments included."""
  params, frozen = objective.shapes
  states = state_shapes(params, make_optimizer(config.optimizer))
  sizes = {"parameters": states["params"], "average": states["ema"], "optimizer": states["opt"], "gradients": states["params"]}
  sizes = {name: bytes_per_device(tree, mesh, objective.rules) for name, tree in sizes.items()}
  frozen = bytes_per_device(frozen, mesh, objective.rules)
  return sizes | {"frozen": frozen + objective.beside(bytes_per_device, mesh)}


def lower(job):
  """Lowers the gradient program of a bucket: the very function that trains, but for cuDNN's attention on GPUs (gpus.py).

  Returns:
    (the lowered program, what is known of it before it is compiled: a dict of plain values)

  Raises:
    ValueError: a configuration, mesh or batch that does not work.
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
  # While it runs the host makes the next batch, which may be of the same size.
  resident["next batch"] = sum(
    math.prod(layout.sharding(*s.axes).shard_shape(s.shape)) * s.struct.dtype.itemsize for s in jax.tree.leaves(program.batch)
  )
  # The program's own peak holds parameters, gradients and what is frozen in it; the rest waits beside it.
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


def text_digest(lowered, topology):
  """sha256 of all that the measured program depends on: its text, the topology, the compiler, how it is read (hlo.py)."""
  versions = f"{topology} {jax.__version__} {jaxlib.__version__} {compiler_version(topology)}"
  reader = pathlib.Path(hlo.__file__).read_text()
  return hashlib.sha256(f"{versions}\n{reader}\n{lowered.as_text()}".encode()).hexdigest()[:32]


def compile_program(lowered):
  """Compiles and measures a lowered program.

  Returns:
    a dict of plain values: seconds, bytes per device; with the key "oom" where the compiler itself found that memory does not
    suffice.
  """
  started = time.monotonic()
  try:
    compiled = lowered.compile()
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
    "in_loop": in_loop,  # of one turn of each loop, which is one layer
    "between_slices": hlo.slice_bytes(text),
    "memory_traffic": hlo.memory_bytes(text),
  }


def combine(facts, compiled):
  """What is known of a program, before and after it was compiled, as one dict: adds "peak" and whether it fits."""
  result = facts | compiled
  if "oom" in result:
    return result | {"fits": False}
  result["peak"] = result["own_peak"] + result["beside"]
  return result | {"fits": result["peak"] <= result["limit"]}


def roofline(result, topology, slice_gbits):
  """Seconds of a step at the published peaks, by what bounds them, and the model-FLOP utilisation that this allows.

  compute: FLOPs of products, with those that are computed again; memory: `hlo.memory_bytes`; links: what a device sends,
  all-reduce twice; slices: what it sends to other slices, at `slice_gbits` Gbit/s per chip. They are taken to overlap: the
  longest bounds the step.
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
  bound = max(seconds, key=seconds.get)
  utilisation = result["model_flops"] / result["chips"] / (chip.tflops * 1e12) / seconds[bound]
  return seconds | {"bound": bound, "step": seconds[bound], "utilisation": utilisation}
