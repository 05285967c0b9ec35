"""Time and memory of training programs on an accelerator, from the real compiler and without the accelerator.

Each program is compiled in a process of its own, which bounds the memory. Several run at a time. A cache of results has two
levels. The first finds the result of a job with the same configuration and code. The second finds the result of a program with
the same text. For this the job is lowered, which takes seconds. To compile it would take minutes.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from data import paths
from data.buckets import Bucket
from stdit_jax.autoencoders.memory import GIB
from stdit_jax.components import Components
from stdit_jax.config import Config
from stdit_jax.models import flops, t5
from stdit_jax.parallel import hlo
from stdit_jax.parallel.attention import valid_keys
from stdit_jax.parallel.mesh import make_mesh
from stdit_jax.parallel.shardings import AnyMesh, tree_shardings
from stdit_jax.parallel.topology import CHIPS, TPU_ENVIRONMENT, compiler_version, is_gpu, parse_topology, topology_devices
from stdit_jax.planning.encoding import compile_seconds, lower_encoder
from stdit_jax.training.checkpoints import from_plain
from stdit_jax.training.counter import CompileCounter
from stdit_jax.training.objectives import Objective, make_objective
from stdit_jax.training.stage_data import choose_splits
from stdit_jax.training.stages import Stage, make_stages
from stdit_jax.training.state import make_optimizer, state_shapes
from stdit_jax.training.step import Programs

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Job:
  """A program to compile, in plain values.

  Attributes:
    config: of the whole run, made plain by `checkpoints.plain`; stage: name of one of its stages.
    bucket: (resolution, frames, global batch size).
    topology, slices: of `topology.topology_devices`.
    text: False: the gradient program. True: the program that encodes captions before the step (`Objective.encodes_ahead`).
    size: if given, the program that encodes clips of this size (frames, height, width) on one host.
  """

  config: dict[str, Any]
  stage: str
  bucket: tuple[str, int, int]
  topology: str
  slices: int = 1
  text: bool = False
  size: tuple[int, ...] = ()

  def objective(self) -> tuple[Stage, Objective]:
    """The job's stage and its objective. Raises ValueError for a configuration that is not allowed."""
    stage = next(s for s in make_stages(from_plain(self.config)) if s.name == self.stage)
    return stage, make_objective(stage.config)


class Compiler:
  """Compiles jobs and caches their results in a folder."""

  def __init__(self, cache: str | pathlib.Path, topology: str):
    self.cache = pathlib.Path(cache).expanduser()
    self.cache.mkdir(parents=True, exist_ok=True)
    code = hashlib.sha256(compiler_version(topology).encode())
    for path in sorted([*ROOT.glob("stdit_jax/**/*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("configs/*.py")]):
      code.update(path.read_bytes())
    self._code = code.hexdigest()

  def __call__(self, job: Job) -> dict[str, Any]:
    """The result of `work` in another process. Raises ValueError with the message of that process."""
    values = json.dumps(dataclasses.asdict(job), sort_keys=True)
    path = self.cache / f"job-{hashlib.sha256((self._code + values).encode()).hexdigest()[:32]}.json"
    if path.exists():
      return json.loads(path.read_text())
    command = [sys.executable, "-m", "stdit_jax.planning.programs", str(self.cache)]
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **TPU_ENVIRONMENT, "PYTHONPATH": python_path}
    done = subprocess.run(command, input=values, capture_output=True, text=True, env=environment)
    if done.returncode:
      lines = [line for line in done.stderr.splitlines() if line.strip()]
      raise ValueError(lines[-1].removeprefix("error: ") if lines else f"the compiling process ended with {done.returncode}")
    result = json.loads(done.stdout.splitlines()[-1])
    paths.write_text(path, json.dumps(result))
    return result


def work(values: dict[str, Any], cache: str) -> dict[str, Any]:
  """Lowers the job, and compiles it if the cache has no program of the same text. Runs in the compiling process.

  Returns:
    the facts of `lower` and `compile_program`, whether the program "fits", and its "peak" of memory. For the program of a
    `size`: its "compile_seconds" of a processor.
  """
  job = Job(**values)
  if job.size:
    stage, _ = job.objective()
    frames, height, width = job.size
    device = topology_devices(job.topology, job.slices)[0]
    return {"compile_seconds": compile_seconds(lower_encoder(stage.config.autoencoder, (frames, height, width), device))}
  lowered, facts = lower(job)
  versions = f"{job.topology} {jax.__version__} {importlib.metadata.version('jaxlib')} {compiler_version(job.topology)}"
  text = f"{versions}\n{pathlib.Path(hlo.__file__).read_text()}\n{lowered.as_text()}"  # the results also depend on hlo.py
  path = pathlib.Path(cache) / f"program-{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
  if path.exists():
    compiled = json.loads(path.read_text())
  else:
    compiled = compile_program(lowered, traffic=not job.text)
    paths.write_text(path, json.dumps(compiled))
  if "oom" in compiled:
    return facts | compiled | {"fits": False}
  peak = compiled["own_peak"] + facts["beside"]
  return facts | compiled | {"peak": peak, "fits": peak <= facts["limit"]}


def bytes_per_device(shapes: Any, mesh: AnyMesh, rules: Sequence) -> int:
  """Bytes of a tree on one device under the sharding rules."""
  return _bytes(shapes, tree_shardings(shapes, mesh, rules))


def _bytes(shapes, shardings):
  parts = jax.tree.map(lambda s, d: math.prod(d.shard_shape(s.shape)) * s.dtype.itemsize, shapes, shardings)
  return sum(jax.tree.leaves(parts))


def resident_bytes(config: Config, objective: Objective, mesh: AnyMesh) -> dict[str, int]:
  """{what: bytes on one device} of the arrays that are in memory while a program runs, including the program's arguments.

  "frozen" are the constants, the parts of the encoders that training uses, and the encoded prompts of samples.
  """
  params, frozen = objective.shapes
  states = state_shapes(params, make_optimizer(config.optimizer))
  sizes = {"parameters": states["params"], "average": states["ema"], "optimizer": states["opt"], "gradients": states["params"]}
  sizes = {name: bytes_per_device(tree, mesh, objective.rules) for name, tree in sizes.items()}
  frozen = bytes_per_device(frozen, mesh, objective.rules)
  return sizes | {"frozen": frozen + sum(bytes_per_device(shapes, mesh, rules) for shapes, rules in objective.encoders)}


def lower(job: Job) -> tuple[jax.stages.Lowered, dict[str, Any]]:
  """Lowers a job. It is the program that trains, except for attention on GPUs (`stand_in`).

  Returns:
    (lowered program, facts that are known before it is compiled: a dict of plain values)

  Raises:
    ValueError: a configuration, mesh or batch that is not allowed.
  """
  (stage, objective), (resolution, frames, rows) = job.objective(), job.bucket
  mesh = make_mesh(stage.config.mesh, topology_devices(job.topology, job.slices), stage.config.slices)
  split = choose_splits(stage, [Bucket(resolution, frames, 1.0, rows)], mesh, objective)[resolution, frames]
  if is_gpu(job.topology):
    split = dataclasses.replace(split, layout=dataclasses.replace(split.layout, cudnn=stand_in))
  program = Programs(objective, stage, mesh, CompileCounter()).gradient((resolution, frames), rows, split)
  layout, parts, resident = split.layout, split.micro_batches, resident_bytes(stage.config, objective, mesh)
  # The host prepares the next batch during the step. It may be of the same bucket.
  places = jax.tree.map(lambda s: layout.sharding(*s.axes), program.batch)
  resident["next batch"] = _bytes(program.arguments[2], places)
  if job.text:
    lowered, own = _lower_text(stage, rows, layout)
    own -= resident["next batch"]  # the host makes a batch while the previous batch trains, so there are two
  else:
    # The program's peak includes parameters, gradients and frozen arrays. The other arrays are added to it.
    lowered = program.lower()
    own = resident["parameters"] + resident["gradients"] + bytes_per_device(objective.shapes[1], mesh, objective.rules)
  facts = {
    "stage": stage.name, "resolution": resolution, "frames": frames, "batch": rows, "batch_parts": layout.batch_parts,
    "samples_per_part": rows // layout.batch_parts // parts, "micro_batches": parts, "split_tokens": layout.split_tokens,
    "in_samples": max([bytes_per_device(shapes, mesh, rules) for shapes, rules in objective.sample_weights], default=0),
    "hosts": len({device.process_index for device in mesh.devices.flat}), "mesh": dict(mesh.shape), "chips": mesh.devices.size,
    "resident": resident, "beside": sum(resident.values()) - own,
    "limit": CHIPS[parse_topology(job.topology)].memory_gib * GIB, "text": job.text,
  }  # fmt: skip
  tokens, model_flops = program.work
  if model_flops and not job.text:
    # The backward pass computes the whole forward pass of the blocks again.
    again = objective.model.config.remat in ("full", "offload")
    hardware = model_flops * (flops.TRAINING + again) / flops.TRAINING
    facts |= {"tokens": tokens // rows, "model_flops": model_flops, "hardware_flops": hardware}
  return lowered, facts


def _lower_text(stage, rows, layout):
  """-> (the lowered program that encodes captions before the step, bytes of its weights and results on one device)."""
  conditioner = Components.of(stage.config).conditioner
  weights = bytes_per_device(t5.init_shapes(conditioner.encoder.config), layout.mesh, t5.RULES)
  lowered = conditioner.lower(rows, layout)
  results = jax.tree.map(lambda s: layout.sharding("batch"), lowered.out_info)  # they are in the next batch
  return lowered, weights + _bytes(lowered.out_info, results)


def compile_program(lowered: jax.stages.Lowered, traffic: bool = True) -> dict[str, Any]:
  """Compiles a lowered program and reads its memory and, if wanted, its traffic. libtpu can't print every text encoder for v5p.

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
  memory = compiled.memory_analysis()
  found = {"own_peak": int(memory.peak_memory_in_bytes), "activations": int(memory.temp_size_in_bytes)}
  if not traffic:
    return found | {"compile_seconds": time.monotonic() - started}
  text = compiled.as_text()
  moved, in_loop = dict.fromkeys(hlo.COLLECTIVES, 0), dict.fromkeys(hlo.COLLECTIVES, 0)
  for c in hlo.collectives(text):
    moved[c.kind] += c.bytes * c.times
    in_loop[c.kind] += c.bytes * c.in_loop
  return found | {
    "compile_seconds": time.monotonic() - started,
    "collectives": moved,
    "in_loop": in_loop,  # in one iteration of each loop, which is one layer
    "between_slices": hlo.slice_bytes(text),
    "memory_traffic": hlo.memory_bytes(text),
  }


def roofline(result: dict[str, Any], topology: str, slice_gbits: float) -> dict[str, Any]:
  """Seconds of a step at the published peaks, and the model-FLOP utilisation at this bound.

  compute: FLOPs of products, with the recomputed ones. memory: `hlo.memory_bytes`. links: bytes that a device sends, all-reduce
  twice. slices: bytes that it sends to other slices, at `slice_gbits` Gbit/s per chip. The longest of the four bounds the step,
  as if they overlapped.
  """
  chip, moved = CHIPS[parse_topology(topology)], result["collectives"]
  seconds = {
    "compute": result["hardware_flops"] / result["chips"] / (chip.tflops * 1e12),
    "memory": result["memory_traffic"] / (chip.memory_gbs * 1e9),
    "links": (sum(moved.values()) + moved["all-reduce"]) * 8 / (chip.interconnect_gbits * 1e9),
    "slices": result["between_slices"] * 8 / (slice_gbits * 1e9),
  }
  bound = max(seconds, key=lambda what: seconds[what])
  utilisation = result["model_flops"] / result["chips"] / (chip.tflops * 1e12) / seconds[bound]
  return seconds | {"bound": bound, "step": seconds[bound], "utilisation": utilisation}


@jax.custom_vjp
def stand_in(query: Array, key: Array, value: Array, lengths: Array | None, mask: Array | None) -> Array:
  """Takes the place of `attention.cudnn_kernel` in programs for GPUs, so that they compile without cuDNN.

  It reads, writes and saves as many bytes as cuDNN's flash attention. Its values mean nothing.
  """
  return _forward(query, key, value, lengths, mask)[0]


def _masked(x, lengths, mask):
  valid = valid_keys(x, lengths, mask)
  return x if valid is None else jnp.where(valid[..., None, None], x, 0)


def _forward(query, key, value, lengths, mask):
  y = query + _masked(key + value, lengths, mask).mean(2, keepdims=True)
  log_sum = y.astype(jnp.float32).sum(-1)  # one number per query and head, saved for the backward pass
  return y, (query, key, value, lengths, mask, y, log_sum)


def _backward(saved, dy):
  query, key, value, lengths, mask, y, log_sum = saved
  # cuDNN's backward kernel sums the gradient of the queries in float32.
  d_query = jax.lax.optimization_barrier((dy * y).astype(jnp.float32) * log_sum[..., None] + query)
  d_context = dy.mean(2, keepdims=True)
  d_key = _masked(d_context * value, lengths, mask)
  return d_query.astype(query.dtype), d_key, d_key * key, None, None


stand_in.defvjp(_forward, _backward)


if __name__ == "__main__":
  from stdit_jax.cli import one_line_errors

  with one_line_errors():
    print(json.dumps(work(json.load(sys.stdin), sys.argv[1])))
