"""One program over eight CPU devices equals one device: outputs, gradients, placement.

A process with fewer devices runs this file again in a child with eight.
"""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from configs import base
from stdit_jax.autoencoders import causal3d, codec, perceptual, registry
from stdit_jax.conditioning import captions
from stdit_jax.models import t5
from stdit_jax.models.layers import OVER_TIME
from stdit_jax.models.stdit_common import RULES
from stdit_jax.models.step_cache import PyramidBroadcast, ResidualCache, Reuse
from stdit_jax.parallel import hlo, shardings
from stdit_jax.parallel.attention import attend, cudnn_kernel
from stdit_jax.parallel.mesh import make_mesh, mesh_sizes
from stdit_jax.parallel.shardings import Layout, constrain, tree_shardings, with_shardings
from stdit_jax.training import step
from stdit_jax.training.autoencoding import AutoencoderObjective
from stdit_jax.training.counter import CompileCounter
from stdit_jax.training.objectives import make_objective
from stdit_jax.training.stages import make_stages
from tests import denoisers
from tests.helpers import random_variables, relative_error
from tests.models.test_invariants import CONFIGS, join, outputs_and_gradients, sample, split

DEVICES = 8
needs_devices = pytest.mark.skipif(jax.device_count() < DEVICES, reason="runs in the child process")


@pytest.mark.skipif(jax.device_count() >= DEVICES, reason="is the child process")
def test_in_a_process_with_eight_devices():
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
  # NPROC: a waiting collective holds a thread of XLA's pool (see tests/training/test_devices.py).
  environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "NPROC": "64"}
  files = __file__, str(pathlib.Path(__file__).with_name("test_exchange.py"))
  command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", "not in_a_process", *files]
  child = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert child.returncode == 0, child.stdout[-5000:] + child.stderr[-2000:]
  assert "skipped" not in child.stdout


# tests/training/test_devices.py tests meshes with data and fsdp alone.
MESHES = {
  "sequence as batch": ({"fsdp": 2, "sequence": 2, "tensor": 2}, False),
  "tokens split": ({"data": 2, "sequence": 4}, True),
  "tokens and heads split": ({"fsdp": 2, "sequence": 2, "tensor": 2}, True),
  "heads padded": ({"fsdp": 1, "tensor": 8}, False),
}


THREE_LEVELS = {"block_out_channels": (8, 8, 16)}  # the fewest of an autoencoder that joins four frames


run = jax.jit(outputs_and_gradients, static_argnums=0)


@functools.cache
def on_one_device(name):
  """(variables, batch, outputs and gradients) of a model on one device."""
  config = CONFIGS[name]
  variables = random_variables(config)
  batch = join([sample(i % 3, config, frames=3, tokens=12, text=6, junk=0) for i in range(DEVICES)])
  return variables, batch, run(denoisers.build(config), variables, batch)


@needs_devices
@pytest.mark.parametrize(
  ("name", "mesh"), [*[("STDiT3", m) for m in MESHES], *[(n, "tokens and heads split") for n in ("STDiT", "STDiT2")]]
)
def test_eight_devices_equal_one(name, mesh):
  """Outputs and gradients agree, although the devices divide neither the three frames nor the four heads."""
  sizes, split_tokens = MESHES[mesh]
  config = CONFIGS[name]
  variables, batch, expected = on_one_device(name)
  layout = Layout(make_mesh(sizes), split_tokens)
  placed = jax.device_put(variables, tree_shardings(variables, layout.mesh, RULES))
  laid = {k: jax.device_put(v, layout.sharding(*(OVER_TIME if v.ndim == 4 else ("batch",)))) for k, v in batch.items()}
  result = run(denoisers.build(config, layout), placed, laid)
  valid = batch["valid"].any(-1)
  assert relative_error(np.asarray(result[0])[valid], np.asarray(expected[0])[valid]) < 1e-5
  for ours, theirs in zip(jax.tree.leaves(result[1:]), jax.tree.leaves(expected[1:]), strict=True):
    assert relative_error(ours, theirs) < 1e-5

  fc1 = placed["params"]["spatial_blocks" if name == "STDiT3" else "blocks"]["mlp"]["fc1"]["kernel"]
  assert fc1.addressable_shards[0].data.size == fc1.size // (sizes.get("fsdp", 1) * sizes.get("tensor", 1))
  for tokens in (laid["tokens"], result[0]):
    assert tokens.addressable_shards[0].data.size == tokens.size // layout.batch_parts // layout.token_parts


@needs_devices
@pytest.mark.parametrize("cache", [PyramidBroadcast(), ResidualCache(0.9)])
def test_cached_outputs_are_sharded(cache):
  """Three frames over four devices. The second step reuses outputs of the first step, which stay sharded like activations."""
  config = dataclasses.replace(CONFIGS["STDiT3"], depth=2)
  variables = random_variables(config)
  batch = join([sample(i % 3, config, frames=3, tokens=12, text=6, junk=0) for i in range(2)])
  inputs, masks = split(batch)
  layout = Layout(make_mesh({"data": 2, "sequence": 4}), True)
  results = []
  for model in (denoisers.build(config), denoisers.build(config, layout)):
    specs = model.cache_specs(cache, 2, 3, 12)
    cached = jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), specs)
    call, outputs = jax.jit(functools.partial(model.apply, variables)), []
    for t, computes in ((500.0, dict(space=True, time=True, cross=True)), (499.0, dict(space=False, time=True, cross=False))):
      reuse = Reuse(cache, cached, computes if isinstance(cache, PyramidBroadcast) else {})
      y, cached = call(inputs[0], jnp.full((2,), t), *inputs[2:], **masks, reuse=reuse)
      outputs.append(np.asarray(y)[batch["valid"].any(-1)])
    results.append(outputs)
    if isinstance(cache, ResidualCache):
      assert int(cached["computed"]) == 1
  for ours, alone in zip(results[1], results[0]):
    assert relative_error(ours, alone) < 1e-5
  for array, spec in zip(jax.tree.leaves(cached), jax.tree.leaves(specs)):
    assert array.sharding.is_equivalent_to(layout.sharding(*spec.axes), array.ndim), (spec, array.sharding)


@needs_devices
@pytest.mark.parametrize(("method", "statistics"), [("encode", "chunks"), ("decode", "clip")])
def test_a_clip_of_cogvideox_is_split_in_time(method, statistics):
  """Values equal those of one device, with and without a single first frame.

  `test_an_autoencoder_trains_on_clips_split_in_time` tests the gradients.
  """
  model = causal3d.build(causal3d.get_config("tiny-causal3d", statistics=statistics, **THREE_LEVELS))
  variables = causal3d.init(model, jax.random.key(0))
  mesh = make_mesh({"data": 2, "sequence": 4})
  split = causal3d.over_devices(model, mesh, "sequence", method, ("data",))
  alone = functools.partial(model.apply, method=method)
  rng = np.random.default_rng(0)

  for count in (33, 32) if method == "encode" else (9, 8):
    size = (16, 24, 3) if method == "encode" else (2, 3, 4)
    x = rng.standard_normal((2, count, *size), np.float32)
    made = (jax.tree.leaves(jax.jit(function)(variables, x)) for function in (split, alone))
    for ours, one in zip(*made, strict=True):
      assert relative_error(ours, one) < 1e-5
  with pytest.raises(ValueError, match="can't be split over the 4 devices of mesh axis 'sequence'"):
    split(variables, x[:, :7])


@needs_devices
@pytest.mark.parametrize(
  ("name", "length"), [("tiny-kl-f8", 11), ("tiny-temporal", 23), ("tiny-causal3d", 33), ("tiny-causal3d", 17)]
)
def test_a_codec_over_devices_gives_the_values_of_one(name, length):
  """Clips with more pieces than devices, with a remaining piece, and with frames that four or only two devices divide."""
  module = registry.find(name)
  model = module.build(module.get_config(name, **({"chunk": 5} if name == "tiny-temporal" else {})))
  variables = module.init(model, jax.random.key(0))
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:4]), ("pieces",))
  one, spread = (
    registry.make_codec(model, jax.device_put(variables, place), micro_batch=2)
    for place in (jax.devices()[0], jax.sharding.NamedSharding(mesh, P()))
  )
  assert (one.devices, spread.devices) == (1, 4)
  frames = np.random.default_rng(length).integers(0, 256, (length, 16, 16, 3), dtype=np.uint8)
  expected, made = one.encode(frames), spread.encode(frames)
  for a, b in zip(made, expected):
    assert relative_error(a, b) < 1e-5
  a, b = (each.decode(expected[0], length).astype(int) for each in (spread, one))
  assert np.abs(a - b).max() <= 1
  assert np.abs(a - b).mean() < 0.01
  programs = spread.lower("decode", expected[0].shape[1:3], length)
  assert len(programs) == {"tiny-temporal": 3}.get(name, 1)
  if name == "tiny-causal3d":
    (text,) = (program.as_text() for program in programs)
    assert "stablehlo.collective_permute" in text


@needs_devices
def test_an_autoencoder_trains_on_clips_split_in_time(monkeypatch):
  """Loss and gradients equal those of one device. Clips whose length does not divide are not split. `fsdp` splits kernels."""
  monkeypatch.setattr(shardings, "SMALL", 1)
  config = base.get_config()
  config.task, config.data.buckets = "autoencoder", (("144p", 33, 1.0, 2),)
  config.autoencoder.update(name="tiny-causal3d", crop=16, reconstruction="l2", fields=THREE_LEVELS)
  objective = AutoencoderObjective(config)
  assert [objective.splits(n, 4) for n in (33, 32, 17, 1)] == [True, True, False, False]
  params, frozen = objective.init(jax.random.key(0))
  rng = np.random.default_rng(0)
  batch = {"pixels": rng.integers(0, 256, (2, 33, 16, 16, 3), np.uint8), "sample_id": np.asarray([[0, 0], [0, 1]], np.uint32)}

  def results(layout):
    total = lambda p: objective.loss(p, frozen, batch, layout)[0].sum()  # noqa: E731
    return jax.tree.leaves(jax.jit(jax.value_and_grad(total))(params))

  for ours, alone in zip(results(Layout(make_mesh({"fsdp": 2, "sequence": 4}), True)), results(None)):
    assert relative_error(ours, alone) < 1e-5


@needs_devices
def test_fsdp_splits_an_autoencoder_that_trains():
  """Loss and gradients are those of whole parameters. A device needs less memory, and gathers each kernel once."""
  config = base.get_config()
  config.task, config.data.buckets = "autoencoder", (("64p", 1, 1.0, 8),)
  config.autoencoder.update(name="tiny-kl-f8", crop=16)
  config.autoencoder.fields = {"block_out_channels": (128, 128)}
  stage = make_stages(config)[0]
  objective, rng = make_objective(stage.config), np.random.default_rng(0)
  params, frozen = objective.init(jax.random.key(0))
  batch = {
    "pixels": rng.integers(0, 256, (8, 1, 16, 16, 3), np.uint8), "weight": np.ones(8, np.float32),
    "sample_id": np.stack([np.zeros(8, np.uint32), np.arange(8, dtype=np.uint32)], 1),
  }  # fmt: skip

  def results(**axes):
    mesh = make_mesh(axes)
    programs = step.Programs(objective, stage, mesh, CompileCounter())
    program = programs.gradient(("64p", 1), 8, step.Split(Layout(mesh)))
    compiled = program.lower().compile()
    placed = jax.device_put((params, frozen, batch), compiled.input_shardings[0][:3])
    accumulator, values = compiled(*placed, programs.new_accumulator(placed[0]))
    state = codec.bytes_on_device(with_shardings(programs.shapes[0], mesh, objective.rules))
    memory, gathered = compiled.memory_analysis(), 0
    for c in hlo.collectives(compiled.as_text()):
      gathered += c.bytes * c.times if c.kind == "all-gather" else 0
    return accumulator["gradients"], values["loss"], state, memory.argument_size_in_bytes + memory.temp_size_in_bytes, gathered

  ours, loss, state, memory, gathered = results(data=2, fsdp=4)
  expected, expected_loss, whole_state, whole_memory, _ = results(data=8)
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
  largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected))
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
    assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 1e-5 * largest
  assert state < 0.27 * whole_state
  total = sum(x.nbytes for x in jax.tree.leaves(params))
  assert 0.98 * total < gathered <= total
  assert memory < whole_memory - total  # parameters and accumulator are split, the gathered kernels are temporary


@needs_devices
@pytest.mark.parametrize(("term", "crop"), [("perceptual", 16), ("adversarial", 32), ("adversarial", 24)])
def test_perceptual_loss_and_discriminator_are_split_like_their_clips(monkeypatch, term, crop):
  """Values and gradients equal those of one device, and each of eight devices computes an eighth of the convolutions.

  As in training, the inputs are split over the batch only, with two clips per part. The devices divide neither the 33 frames
  nor the 12 image rows after the first layer.
  """
  monkeypatch.setattr(perceptual, "BLOCKS", tuple((count, 4) for count, _ in perceptual.BLOCKS))
  config = base.get_config()
  config.task, config.data.buckets = "autoencoder", (("144p", 33, 1.0, 2),)
  config.autoencoder.update(name="tiny-causal3d", crop=crop, discriminator={"features": 8, "layers": 2, "groups": 4})
  config.autoencoder[f"{term}_weight"] = 1.0
  objective, rng = AutoencoderObjective(config), np.random.default_rng(0)
  draw = lambda s: rng.standard_normal(s.shape, np.float32) * 0.2  # noqa: E731
  params, frozen = jax.tree.map(draw, jax.eval_shape(objective.init, jax.random.key(0)))
  clips = rng.standard_normal((2, 4, 33, crop, crop, 3), np.float32)

  def losses(layout, params, made, real):
    if term == "perceptual":
      return objective._pixel_terms(frozen, made, real, {}, layout)[1]["perceptual"]
    return sum(jnp.square(objective._score(params["discriminator"], x, layout)).mean((1, 2, 3)) for x in (real, made))

  def results(layout):
    gradient = jax.value_and_grad(lambda *a: losses(layout, *a).sum(), argnums=(0, 1) if term == "adversarial" else 1)
    place = functools.partial(jax.device_put, device=layout and layout.sharding("batch"))
    compiled = jax.jit(gradient).lower(params, *map(place, clips)).compile()
    instructions, _ = hlo.computations(compiled.as_text())
    convolved = [hlo.shape_bytes(kind) for i in instructions.values() for _, kind, opcode, _ in i if opcode == "convolution"]
    return jax.tree.leaves(compiled(params, *map(place, clips))), max(convolved)

  split, most = results(Layout(make_mesh({"data": 2, "sequence": 4}), True))
  alone, whole = results(None)
  assert whole / 8 <= most < whole / 6
  for ours, theirs in zip(split, alone, strict=True):
    assert relative_error(ours, theirs) < 1e-5


@needs_devices
def test_one_trace_that_is_compiled_for_each_device_is_an_error():
  counter = CompileCounter()
  toy = jax.jit(counter.counted("toy: encode", lambda x: 2 * x))
  for device in jax.devices()[:2]:
    toy(jax.device_put(np.ones(2, np.float32), device))
  with pytest.raises(RuntimeError, match=r"toy: encode.*2"):
    counter.check()


@needs_devices
def test_captions_are_embedded_in_pieces_on_every_device(monkeypatch):
  config = t5.get_config("byt5-tiny")
  params = t5.init(config, jax.random.key(0))["params"]
  ids = np.random.default_rng(0).integers(3, 200, (40, 5)).astype(np.int32)
  mask = np.arange(5) < np.arange(1, 41)[:, None] % 5 + 1
  model, mesh = t5.build(config), make_mesh({"data": 2, "fsdp": 4})
  expected = model.apply({"params": params}, ids, mask)
  monkeypatch.setattr(captions, "AHEAD_ROWS", 2)  # each device has five rows: three pieces, the last one padded
  layout = Layout(mesh)
  place = functools.partial(jax.device_put, device=layout.sharding("batch"))
  embed = captions.embed_in_pieces(model, np.float32, layout)
  params = jax.device_put(params, tree_shardings(params, mesh, t5.RULES))
  made = jax.jit(embed, out_shardings=layout.sharding("batch"))(params, place(ids), place(mask))
  assert "length=3" in str(jax.make_jaxpr(embed)(params, ids, mask))
  assert made.sharding.is_equivalent_to(layout.sharding("batch"), made.ndim)
  assert relative_error(np.asarray(made)[mask], np.asarray(expected)[mask]) < 1e-5


@needs_devices
@pytest.mark.parametrize("implementation", ["einsum", "cudnn"])
def test_joint_attention_with_split_heads_equals_one_device(implementation):
  """Padding is in the middle. Tokens are split outside attention, heads inside. XLA computes the call of cuDNN."""
  rng = np.random.default_rng(0)
  *arrays, cotangent = rng.standard_normal((4, 2, 1, 12, 8, 16), np.float32)
  mask = rng.random((2, 1, 12)) < 0.6
  split_tokens, split_heads = ("batch", None, "tokens", None), ("batch", None, None, "heads")
  layout = Layout(make_mesh({"sequence": 4, "tensor": 2}), True, functools.partial(cudnn_kernel, implementation="xla"))

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def results(layout, implementation, arrays, cotangent, mask):
    def joint(*arrays):
      arrays = (constrain(x, layout, *split_tokens) for x in arrays)
      return constrain(attend(*arrays, implementation, layout, split_heads, mask=mask), layout, *split_tokens)

    y, pull = jax.vjp(joint, *arrays)
    return y, *pull(cotangent)

  alone = results(None, "einsum", arrays, cotangent, mask)
  for ours, theirs in zip(results(layout, implementation, arrays, cotangent, mask), alone, strict=True):
    assert relative_error(ours, theirs) < 1e-5
  program = results.lower(layout, implementation, arrays, cotangent, mask).compile().as_text()
  assert "all-to-all" in {c.kind for c in hlo.collectives(program)}
  with pytest.raises(ValueError, match=r"6 heads do not divide by the 8 devices of mesh axes \('sequence', 'tensor'\)"):
    attend(*(x[..., :6, :] for x in arrays), implementation, layout, split_heads)


@needs_devices
def test_constraints_are_in_the_program():
  """Counts the sharding constraints. The body of the scan counts once.

  Constrained are: tokens in, embedded, after a layer, and out; the input of each block; queries, keys and values of both
  attentions; both sides of every linear layer (patches, two of the caption, of timestep and of fps, the modulation, seven per
  block, the final one); and every kernel of a block before and after it is gathered.
  """
  config = CONFIGS["STDiT3"]
  inputs = denoisers.example_inputs(config, batch=DEVICES)

  def constraints(layout):
    model = denoisers.build(config, layout)
    lowered = jax.jit(lambda v: model.apply(v, *inputs)).lower(denoisers.init_shapes(config))
    return lowered.as_text().count("sharding_constraint")

  assert (
    constraints(Layout(make_mesh({"data": 2, "fsdp": 4}))) == 4 + 2 * (1 + 2 * 3) + 2 * (1 + 3 * 2 + 1 + 2 * 7 + 1) + 2 * 2 * 7
  )
  assert constraints(None) == 0


@needs_devices
def test_every_leaf_of_a_tree_gets_its_sharding():
  config = CONFIGS["STDiT3"]
  mesh = make_mesh({"data": 1, "fsdp": 8})
  shapes = denoisers.init_shapes(config)
  state = {"params": shapes["params"], "opt": [{"mu": shapes["params"]}], "step": jax.ShapeDtypeStruct((), np.int32)}
  shardings = tree_shardings(state, mesh, RULES)
  assert shardings["step"].spec == P()
  assert shardings["opt"][0]["mu"] == shardings["params"]
  with pytest.raises(ValueError, match=r"'odd/blocks/mlp/fc1/kernel': dimension 1 .* 8 devices of mesh axis 'fsdp'"):
    tree_shardings({"odd": {"blocks": {"mlp": {"fc1": {"kernel": np.zeros((2, 12, 4))}}}}}, mesh, RULES)
  with pytest.raises(ValueError, match="no sharding rule matches the parameter 'params/adapter/kernel'"):
    tree_shardings({"params": {"adapter": {"kernel": np.zeros((2, 8))}}}, mesh, RULES)


def test_mesh_sizes_are_completed_or_refused():
  assert mesh_sizes({"data": -1, "fsdp": 4}, 8) == {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 1}
  assert mesh_sizes({"fsdp": 1}, 1) == dict.fromkeys(("data", "fsdp", "sequence", "tensor"), 1)
  for sizes, message in (
    ({"data": 3}, "does not make 8 devices"),
    ({"data": -1, "fsdp": 3}, "factors of 8"),
    ({"data": -1, "fsdp": -1}, "at least 1, and -1 for one axis"),
    ({"data": 0}, "whole numbers of at least 1"),
    ({"model": 2}, "unknown axis 'model'; allowed: data, fsdp, sequence, tensor"),
  ):
    with pytest.raises(ValueError, match=message):
      mesh_sizes(sizes, 8)
