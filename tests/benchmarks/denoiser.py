"""Compares STDiT-3 in JAX with a similar PyTorch model of the same size: `python -m tests.benchmarks.denoiser`.

The PyTorch model is `LatteTransformer3DModel` of diffusers. Its temporal blocks have no cross attention, but it projects the
caption to keys and values once per frame. Both models have float32, width 1152, 16 heads, 4 spatial and 4 temporal blocks, 5
frames of 9 x 16 tokens, 300 text tokens, one video, two threads, and no masks.

The table compares seconds per FLOP of the matrix products, which a formula counts for each model as it is written. A sampling
step is an Euler step with guidance, whose two branches are one batch: it counts as two forward passes. A training step is
loss, gradients and AdamW: it counts as three. The last rows time one matrix product of the MLP, by XLA and by PyTorch.

The repetitions of all programs are interleaved, and the table has medians, so that load on the machine affects both models. If
load affected only one model, the ratio of CPU seconds (of all threads) would differ from that of wall-clock seconds. Both
models reuse freed memory, as `train` and `sample` do (`stdit_jax.cli.keep_freed_memory`).
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from diffusers import LatteTransformer3DModel

from stdit_jax.cli import keep_freed_memory
from stdit_jax.diffusion.elements import StepState
from stdit_jax.diffusion.guidance import guided
from stdit_jax.diffusion.rectified_flow import RectifiedFlow
from stdit_jax.models.stack import REMAT_POLICIES
from stdit_jax.models.stdit3 import FAMILY, STDiT3Config

WIDTH, HEADS, DEPTH, FRAMES, ROWS, COLUMNS, TEXT, CAPTION, CHANNELS = 1152, 16, 4, 5, 9, 16, 300, 4096, 4
GUIDANCE = 7.0
TOKENS = FRAMES * ROWS * COLUMNS


def block_flops(span, text_tokens, text_rows):
  """Forward FLOPs of one block: self attention over `span` tokens, cross attention, MLP (two FLOPs a multiply-add)."""
  self_attention = 8 * TOKENS * WIDTH**2 + 4 * TOKENS * span * WIDTH
  cross_attention = 4 * TOKENS * WIDTH**2 + 4 * text_rows * WIDTH**2 + 4 * TOKENS * text_tokens * WIDTH
  return self_attention + (cross_attention if text_tokens else 0) + 16 * TOKENS * WIDTH**2


def outer_flops(embedders):
  """Forward FLOPs outside the blocks: patches, caption, final layer, modulation, and `embedders` of scalars (timesteps)."""
  patches = 2 * TOKENS * WIDTH * (4 * CHANNELS + 8 * CHANNELS)
  caption = 2 * TEXT * (CAPTION + WIDTH) * WIDTH
  return patches + caption + 2 * embedders * (256 + WIDTH) * WIDTH + 12 * WIDTH**2


def latte_flops():
  blocks = block_flops(ROWS * COLUMNS, TEXT, TEXT * FRAMES) + block_flops(FRAMES, 0, 0)
  return DEPTH * blocks + outer_flops(embedders=1)


def our_config(**fields):
  sizes = {"num_heads": HEADS, "caption_channels": CAPTION, "model_max_length": TEXT}
  return STDiT3Config(WIDTH, DEPTH, **sizes, **fields)


def our_programs(rng, remat, scan):
  """Returns (forward, sampling step, training step): functions without arguments, which return when the device is done."""
  config = our_config(remat=remat, scan=scan)
  model = FAMILY.build(config, None)
  variables = jax.jit(FAMILY.init, static_argnums=0)(config, jax.random.key(0))
  optimizer = optax.adamw(1e-4)
  one = jnp.ones((1,))
  conditions = {"grid": jnp.asarray([[FRAMES, ROWS, COLUMNS]]), "height": 144 * one, "width": 256 * one, "fps": 24 * one}
  both = {name: jnp.tile(values, (2, *[1] * (values.ndim - 1))) for name, values in conditions.items()}
  tokens, text, target = (
    jnp.asarray(rng.standard_normal(shape, np.float32))
    for shape in ((1, FRAMES, ROWS * COLUMNS, 4 * CHANNELS), (1, TEXT, CAPTION), (1, FRAMES, ROWS * COLUMNS, 8 * CHANNELS))
  )

  def apply(params, tokens, text):
    own = {"params": params, "constants": variables["constants"]}
    return model.apply(own, tokens, 500 * one, {"text": text, "text_mask": None}, conditions)

  def guided_step(params, tokens, text):
    def denoise(x, t, x_mask):
      own = {"params": params, "constants": variables["constants"]}
      return model.apply(own, x, t, {"text": text, "text_mask": None}, both, x_mask=x_mask)

    denoise = guided(denoise, GUIDANCE, num_channels=CHANNELS)
    return RectifiedFlow().step(denoise, StepState(tokens), 500 * one, 480 * one, num_channels=CHANNELS).x

  def update(state, tokens, text, target):
    params, moments = state
    loss, grads = jax.value_and_grad(lambda p: jnp.square(apply(p, tokens, text) - target).mean())(params)
    updates, moments = optimizer.update(grads, moments, params)
    return (optax.apply_updates(params, updates), moments), loss

  forward_jit, guided_jit, update_jit = jax.jit(apply), jax.jit(guided_step), jax.jit(update, donate_argnums=0)
  captions = jnp.concatenate([text, text[:, ::-1]])
  params = variables["params"]
  state = jax.tree.map(jnp.copy, (params, optimizer.init(params)))

  def forward():
    jax.block_until_ready(forward_jit(params, tokens, text))

  def sampling_step():
    jax.block_until_ready(guided_jit(params, tokens, captions))

  def step():
    nonlocal state
    state, loss = update_jit(state, tokens, text, target)
    jax.block_until_ready((state, loss))

  return forward, sampling_step, step


def latte_programs(rng):
  """`our_programs` in PyTorch, with its fastest AdamW, the fused one."""
  torch.manual_seed(0)
  model = LatteTransformer3DModel(
    num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=CHANNELS, out_channels=2 * CHANNELS,
    num_layers=DEPTH, cross_attention_dim=WIDTH, attention_bias=True, sample_size=64, patch_size=2,
    activation_fn="gelu-approximate", norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    caption_channels=CAPTION, video_length=FRAMES,
  )  # fmt: skip
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
  latents, text, target = (
    torch.from_numpy(rng.standard_normal(shape, np.float32))
    for shape in (
      (1, CHANNELS, FRAMES, 2 * ROWS, 2 * COLUMNS), (1, TEXT, CAPTION), (1, 2 * CHANNELS, FRAMES, 2 * ROWS, 2 * COLUMNS),
    )
  )  # fmt: skip
  timestep = torch.tensor([500])
  captions = torch.cat([text, text.flip(1)])

  def apply():
    return model(latents, timestep=timestep, encoder_hidden_states=text).sample

  def forward():
    with torch.inference_mode():
      apply()

  def sampling_step():
    with torch.inference_mode():
      twice = model(torch.cat([latents] * 2), timestep=timestep.expand(2), encoder_hidden_states=captions).sample
      prompt, null = twice[:, :CHANNELS].chunk(2)
      latents + 0.02 * (null + GUIDANCE * (prompt - null))

  def step():
    optimizer.zero_grad(set_to_none=True)
    torch.nn.functional.mse_loss(apply(), target).backward()
    optimizer.step()

  return forward, sampling_step, step


def product_programs(rng):
  """The first product of the MLP, `[tokens, width] x [width, 4 width]`, by XLA and by PyTorch."""
  x, kernel = (rng.standard_normal(shape, np.float32) for shape in ((TOKENS, WIDTH), (WIDTH, 4 * WIDTH)))
  ours, theirs = (jnp.asarray(x), jnp.asarray(kernel)), (torch.from_numpy(x), torch.from_numpy(kernel))
  multiply = jax.jit(jnp.matmul)
  return (lambda: jax.block_until_ready(multiply(*ours)),), (lambda: torch.matmul(*theirs),)


def measure(programs, repeats):
  """{name: (median seconds, median CPU seconds of all threads)} over interleaved repetitions, after two calls each."""
  for program in programs.values():
    program()
    program()
  seconds = {name: [] for name in programs}
  for _ in range(repeats):
    for name, program in programs.items():
      wall, cpu = time.perf_counter(), time.process_time()
      program()
      seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
  return {name: tuple(map(statistics.median, zip(*values))) for name, values in seconds.items()}


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--repeats", type=int, default=9)
  parser.add_argument("--remat", default="none", choices=tuple(REMAT_POLICIES), help="what our backward pass stores")
  parser.add_argument("--scan", action="store_true", help="loop over our blocks, as on pods, instead of unrolling them")
  arguments = parser.parse_args()
  torch.set_num_threads(2)
  keep_freed_memory()
  rng = np.random.default_rng(0)
  ours = FAMILY.flops(our_config(), FRAMES, ROWS * COLUMNS)
  counts = {
    what: (times * ours, times * latte_flops()) for what, times in (("forward", 1), ("sampling step", 2), ("training step", 3))
  }
  counts["one product"] = (8 * TOKENS * WIDTH**2,) * 2
  programs = [*zip(our_programs(rng, arguments.remat, arguments.scan), latte_programs(rng)), *zip(*product_programs(rng))]
  # In this order the two programs of each ratio run one after the other.
  programs = {(what, who): f for what, pair in zip(counts, programs) for who, f in zip(("ours", "PyTorch"), pair)}
  seconds = measure(programs, arguments.repeats)
  print(f"{'':14} {'':8} {'GFLOP':>8} {'seconds':>9} {'CPU s':>7} {'GFLOP/s':>8}  seconds per FLOP, ours / PyTorch")
  for what, pair in counts.items():
    rows = [(count, *seconds[what, who]) for who, count in zip(("ours", "PyTorch"), pair)]
    for who, (count, wall, cpu) in zip(("ours", "PyTorch"), rows):
      print(f"{what:14} {who:8} {count / 1e9:8.1f} {wall:9.3f} {cpu:7.2f} {count / wall / 1e9:8.1f}")
    ratio = [ours / rows[0][0] / (theirs / rows[1][0]) for ours, theirs in zip(*(row[1:] for row in rows))]
    print(f"{'':50}  wall {ratio[0]:.3f}, CPU {ratio[1]:.3f}")


if __name__ == "__main__":
  main()
