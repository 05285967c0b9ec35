"""What one training program needs on a TPU topology: compiled by the real compiler, without a TPU."""

import math
import re
import time

import jax

from data.buckets import Bucket
from stdit_jax.autoencoders import image_kl
from stdit_jax.models import flops, t5
from stdit_jax.parallel import hlo
from stdit_jax.parallel.mesh import make_mesh
from stdit_jax.parallel.shardings import tree_shardings
from stdit_jax.parallel.topology import CHIPS, parse_topology, topology_devices
from stdit_jax.training.batches import batch_shapes
from stdit_jax.training.checkpoints import from_plain
from stdit_jax.training.metrics import batch_work
from stdit_jax.training.objectives import OBJECTIVES, autoencoder_model
from stdit_jax.training.stage_data import choose_layouts
from stdit_jax.training.stages import make_stages
from stdit_jax.training.state import learning_rate_scales, make_optimizer, state_shapes
from stdit_jax.training.step import Programs, TraceCounter

GIB = 2**30


def bytes_per_device(shapes, mesh):
  """Bytes of a tree on one device, as the sharding table lays it."""
  shardings = tree_shardings(shapes, mesh)
  parts = jax.tree.map(lambda s, d: math.prod(d.shard_shape(s.shape)) * s.dtype.itemsize, shapes, shardings)
  return sum(jax.tree.leaves(parts))


def resident_bytes(config, objective, states, frozen, mesh):
  """{what: bytes on one device} of all that stays in memory while a program runs, its own arguments included."""
  sizes = {"parameters": states["params"], "average": states["ema"], "optimizer": states["opt"], "gradients": states["params"]}
  sizes = {name: bytes_per_device(tree, mesh) for name, tree in sizes.items()}
  sizes["frozen"] = bytes_per_device(frozen, mesh)
  if config.task == "denoiser":
    if config.text_encoder.where == "ahead":
      sizes["frozen"] += bytes_per_device(t5.init_shapes(objective.text.config), mesh)
    autoencoder = image_kl.init_shapes(autoencoder_model(config.autoencoder).config)
    sizes["frozen"] += sum(math.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(autoencoder))
  return sizes


def compile_bucket(config, stage_name, bucket, topology, slices=1):
  """Compiles the gradient program of a bucket and measures it. All figures are computed, none is measured on a device.

  Args:
    config: the whole run's, as plain values (`checkpoints.plain`).
    bucket: (resolution, frames, global batch size).
    topology, slices: as `topology.topology_devices`.

  Returns:
    a dict of plain values, or with the key "oom" where the compiler itself found that memory does not suffice.

  Raises:
    ValueError: a configuration, mesh or batch that does not work.
  """
  stage = next(s for s in make_stages(from_plain(config)) if s.name == stage_name)
  config = stage.config
  mesh = make_mesh(config.mesh, topology_devices(topology, slices), config.slices)
  resolution, frames, rows = bucket
  objective = OBJECTIVES[config.task](config)
  params, frozen = jax.eval_shape(objective.init, jax.random.key(0))
  optimizer = make_optimizer(config.optimizer)
  states = state_shapes(params, optimizer)
  layouts, micro_batches = choose_layouts(stage, [Bucket(resolution, frames, 1.0, rows)], mesh, objective)
  layout, parts = layouts[resolution, frames], micro_batches[resolution, frames]
  batch = batch_shapes(config, objective, (resolution, frames), rows, layout.token_parts)
  scales = learning_rate_scales(params, config.train, config.optimizer.scales)
  programs = Programs(objective.loss, mesh, states, frozen, optimizer, scales, stage, TraceCounter())
  programs.make_gradient((resolution, frames), tuple(batch), parts, layout)
  resident = resident_bytes(config, objective, states, frozen, mesh)
  result = {
    "stage": stage.name, "resolution": resolution, "frames": frames, "batch": rows,
    "samples_per_part": rows // layout.batch_parts // parts, "micro_batches": parts, "split_tokens": layout.split_tokens,
    "mesh": dict(mesh.shape), "chips": mesh.devices.size, "resident": resident,
    "limit": CHIPS[parse_topology(topology)].memory_gib * GIB,
  }  # fmt: skip
  tokens, model_flops = batch_work(config, objective, batch)
  if model_flops:
    # What is computed again in the backward pass is the whole forward pass of the blocks.
    again = objective.model.config.remat in ("full", "offload")
    hardware = model_flops * (flops.TRAINING + again) / flops.TRAINING
    result |= {"tokens": tokens // rows, "model_flops": model_flops, "hardware_flops": hardware}
  started = time.monotonic()
  lowered = programs.gradients[resolution, frames].lower(*programs.gradient_arguments(batch))
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    text = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" not in text:
      raise
    sizes = re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", text)
    return result | {"oom": sizes.group(0) if sizes else text[:200], "compile_seconds": time.monotonic() - started}
  text = compiled.as_text()
  memory = compiled.memory_analysis()
  moved, in_loop = dict.fromkeys(hlo.COLLECTIVES, 0), dict.fromkeys(hlo.COLLECTIVES, 0)
  for c in hlo.collectives(text):
    moved[c.kind] += c.bytes * c.times
    in_loop[c.kind] += c.bytes * c.in_loop
  # The program's own peak holds parameters, gradients and what is frozen in it; the rest waits beside it.
  own = resident["parameters"] + resident["gradients"] + bytes_per_device(frozen, mesh)
  peak = int(memory.peak_memory_in_bytes) + sum(resident.values()) - own
  return result | {
    "compile_seconds": time.monotonic() - started,
    "peak": peak,
    "activations": int(memory.temp_size_in_bytes),
    "collectives": moved,
    "in_loop": in_loop,  # of one turn of each loop, which is one layer
    "memory_traffic": hlo.memory_bytes(text),
    "fits": peak <= result["limit"],
  }


def roofline(result, topology):
  """Seconds of a step at the published peaks, by what bounds them, and the model-FLOP utilisation that this allows.

  compute: FLOPs of products, with those that are computed again; memory: `hlo.memory_bytes`; interconnect: what a device
  sends, all-reduce twice; between slices, too, at the speed within one. They are taken to overlap: the longest bounds the step.
  """
  chip = CHIPS[parse_topology(topology)]
  moved = result["collectives"]
  wire = sum(moved.values()) + moved["all-reduce"]
  seconds = {
    "compute": result["hardware_flops"] / result["chips"] / (chip.tflops * 1e12),
    "memory": result["memory_traffic"] / (chip.memory_gbs * 1e9),
    "interconnect": wire * 8 / (chip.interconnect_gbits * 1e9),
  }
  bound = max(seconds, key=seconds.get)
  utilisation = result["model_flops"] / result["chips"] / (chip.tflops * 1e12) / seconds[bound]
  return seconds | {"bound": bound, "step": seconds[bound], "utilisation": utilisation}
