"""The process with eight CPU devices that test_devices.py starts: python -m tests.training.on_devices FOLDER."""

import pathlib
import sys

import jax
import numpy as np
from safetensors.numpy import save_file

from stdit_jax.components import load_text_encoder
from stdit_jax.diffusion.noise import sample_keys, token_noise
from stdit_jax.parallel.mesh import make_mesh
from stdit_jax.parallel.shardings import Layout, path_name, tree_shardings
from stdit_jax.training import step
from stdit_jax.training.batches import to_global
from stdit_jax.training.counter import CompileCounter
from tests.runs import Run
from tests.tiny_run import eight_config, frozen_text, small_autoencoder

AUTOENCODER = {**small_autoencoder(), "autoencoder__fields": {"block_out_channels": (128, 128)}}
del AUTOENCODER["data__buckets"]  # `eight_config` has its own


def one_micro_step(run, mesh, params, frozen, batch):
  """(gradients, loss, noise bits) of a batch on a mesh."""
  objective, split = run.parts[0].objective, step.Split(Layout(mesh))
  programs = step.Programs(objective, run.stages[0], mesh, CompileCounter())
  program = programs.gradient(("64p", 1), 8, split)
  placed, constants = jax.device_put((params, frozen), tree_shardings((params, frozen), mesh, objective.rules))
  arrays = to_global(batch, program.batch, split.layout)
  accumulator, values = program.jitted(placed, constants, arrays, programs.new_accumulator(placed))
  shape = batch["latents_mean"].shape[1:]
  noise = jax.jit(lambda b: token_noise(sample_keys(42, b["sample_id"], 1), b["latent_size"], shape, b["sizes"]["grid"]))(
    arrays
  )
  gradients = {path_name(p): np.asarray(g) for p, g in jax.tree_util.tree_flatten_with_path(accumulator["gradients"])[0]}
  kernel = placed["denoiser"]["spatial_blocks"]["mlp"]["fc1"]["kernel"]
  split = np.asarray(kernel.size // kernel.addressable_shards[0].data.size)
  return {**gradients, "loss": np.asarray(values["loss"]), "noise": np.asarray(noise), "split": split}


def main(folder):
  assets, folder = folder / "assets", folder / "devices"
  assert jax.device_count() == 8
  run = Run(eight_config(assets, folder / "eight", mesh={"data": 2, "fsdp": 4}))
  state, frozen, _ = run.start()
  rng = np.random.default_rng(0)
  host = jax.tree.map(lambda p: np.asarray(p) + 0.1 * rng.standard_normal(p.shape, np.float32), state["params"])
  with run.parts[0].data.loader(0) as rows:
    batch = jax.tree.map(np.asarray, run.maker()(next(rows)))
  frozen_host = jax.tree.map(np.asarray, frozen)
  eight = one_micro_step(run, run.mesh, host, frozen_host, batch)
  one_device = make_mesh({"data": 1, "fsdp": 1}, jax.devices()[:1])
  one = one_micro_step(run, one_device, host, frozen_host, batch)
  save_file(eight, folder / "eight.safetensors")
  save_file(one, folder / "one.safetensors")

  run.train(started=(state, frozen, 0))  # writes a checkpoint on eight devices
  resumed = Run(eight_config(assets, folder / "single", mesh={"data": 2, "fsdp": 4}, steps=3))
  state, frozen, at = resumed.start()  # reads a checkpoint of one device
  assert at == 2, at
  params = {path_name(p): np.asarray(x) for p, x in jax.tree_util.tree_flatten_with_path(state["params"])[0]}
  save_file(params, folder / "resumed.safetensors")
  resumed.train(started=(state, frozen, at))

  # `fsdp` splits the kernels of an autoencoder, and everything that the optimizer keeps for them.
  trained = Run(eight_config(assets, folder / "autoencoder", steps=1, mesh={"data": 2, "fsdp": 4}, **AUTOENCODER)).train()
  share = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(trained)) / sum(
    x.nbytes for x in jax.tree.leaves(trained)
  )
  assert 0.25 < share < 0.27, share
  arrays = {path_name(p): np.asarray(x) for p, x in jax.tree_util.tree_flatten_with_path(trained)[0]}
  save_file(arrays, folder / "split_autoencoder.safetensors")

  # A separate program runs the text encoder, sharded like the denoiser.
  ahead = Run(eight_config(assets, folder / "ahead", steps=1, mesh={"data": 2, "fsdp": 4}, **frozen_text(assets, "ahead")))
  text = load_text_encoder(ahead.config.text_encoder, ahead.parts[0].objective.components.conditioner.encoder, ahead.mesh)
  kernel = text["blocks"]["mlp"]["up"]["kernel"]
  assert kernel.size // kernel.addressable_shards[0].data.size == 4
  ahead.train()


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
