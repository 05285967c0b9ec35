"""Computes what Open-Sora's 16-bit numbers change. The figures are in README, "Differences from the originals".

  python -m tests.benchmarks.rounding

The original rounds timesteps, frame rates, sizes and frequencies to bfloat16, and runs T5 in float16 (1.1) or bfloat16 (1.2).
The sizes are those of all buckets of both recipes. The T5 has random weights, and the depth of XXL with an eighth of its width.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from configs import open_sora_1_1, open_sora_1_2
from data import aspect_ratios
from stdit_jax.diffusion.rectified_flow import compat_latent_frames, timestep_transform
from stdit_jax.models import t5
from stdit_jax.models.layers import even_frequencies
from stdit_jax.training.stages import make_stages


def rounded(values):
  return np.asarray(values, np.float32).astype(ml_dtypes.bfloat16)


def errors(values):
  """Absolute errors of float32 values in bfloat16."""
  return np.abs(rounded(values).astype(np.float32) - np.asarray(values, np.float32))


def clips(recipe):
  """{(frames, height, width)} of all buckets of a recipe."""
  buckets = {b for stage in make_stages(recipe.get_config()) for b in stage.config.data.parsed_buckets() if b.batch_size}
  return {(b.num_frames, *size) for b in buckets for size in aspect_ratios.SIZES[b.resolution].values()}


def transform_errors():
  """Absolute errors of the transformed timesteps of Open-Sora 1.2, `[clips, timesteps]`."""
  t = np.linspace(0, 1000, 1001, dtype=np.float32)
  made = []
  for frames, height, width in sorted(clips(open_sora_1_2)):
    sizes = [np.asarray([value], np.float32) for value in (height, width, frames)]
    exact, rough = (
      timestep_transform(t, h, w, compat_latent_frames(n)) for h, w, n in (sizes, [rounded(value) for value in sizes])
    )
    made.append(np.abs(np.asarray(exact, np.float32) - np.asarray(rough, np.float32)))
  return np.stack(made)


def embedding_errors():
  """Absolute errors of the spatial position embedding, whose positions are 0 to 32."""
  exact = even_frequencies(1152 // 2)
  positions = np.linspace(0, 32, 3201, dtype=np.float32)[:, None]
  angles, rough = (positions * frequencies for frequencies in (exact, rounded(exact).astype(np.float32)))
  return np.abs(np.concatenate([np.sin(angles) - np.sin(rough), np.cos(angles) - np.cos(rough)]))


def feature_errors():
  """{dtype: relative root-mean-square error of the features of a random T5}."""
  config = t5.get_config("xxl", d_model=512, num_heads=8, d_ff=1280)
  variables = t5.init(config, jax.random.key(0))
  ids, mask = jax.random.randint(jax.random.key(1), (2, 40), 0, config.vocab_size), jnp.ones((2, 40), bool)

  def features(dtype):
    model = t5.build(dataclasses.replace(config, dtype=dtype, param_dtype=dtype))
    return jax.jit(model.apply)(jax.tree.map(lambda x: x.astype(dtype), variables), ids, mask).astype(jnp.float32)

  exact = features("float32")
  return {dtype: float(jnp.linalg.norm(features(dtype) - exact) / jnp.linalg.norm(exact)) for dtype in ("bfloat16", "float16")}


def main():
  t, rope = np.linspace(0, 1000, 100_001), even_frequencies(1152 // 16)
  sizes = np.array(sorted({*clips(open_sora_1_1), *clips(open_sora_1_2)}))
  sides = np.unique(sizes[:, 1:])
  ratios = sizes[:, 1] / sizes[:, 2]
  print(f"timestep of 1000: at most {errors(t).max():.2f}, mean {errors(t).mean():.2f}")
  for name, values in (("height and width", sides), ("aspect ratio", ratios)):
    print(f"{name}: at most {(errors(values) / values).max():.2%}")
  print("frame rates:", ", ".join(f"{float(rounded(fps))} for {fps}" for fps in (23.976, 25, 29.97, 59.94)))
  print(f"timestep transform: at most {transform_errors().max():.2f} of 1000, mean {transform_errors().mean():.2f}")
  print(f"spatial embedding: at most {embedding_errors().max():.3f}, mean {embedding_errors().mean():.4f}")
  for frames in (120, 128):  # latent frames of the longest clips of 1.2 and 1.1
    print(f"angles of the temporal embedding, {frames} latent frames: at most {(frames - 1) * errors(rope).max():.2f}")
  print("features of T5:", ", ".join(f"{error:.2%} in {dtype}" for dtype, error in feature_errors().items()))


if __name__ == "__main__":
  main()
