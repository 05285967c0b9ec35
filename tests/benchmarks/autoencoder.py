"""What an image autoencoder keeps of pictures, how its latents are distributed, and how fast it is.

  python -m tests.benchmarks.autoencoder --weights data/film/autoencoder.safetensors --images data/film/prepared/images
  python -m tests.benchmarks.autoencoder --weights data/moving_shapes/autoencoder.safetensors \\
      --images shapes://held_out/9/400 --size 64 64

`shift` and `scale` are the mean and standard deviation of the raw latents per channel: what `autoencoder.fields` of a
configuration needs, so that a denoiser sees latents of unit variance. --picture writes originals above reconstructions.
"""

import argparse
import pathlib
import time

import numpy as np
from PIL import Image

from data import shapes
from stdit_jax.autoencoders import image_kl
from stdit_jax.interop import load_variables


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", default="small-kl-f8")
  parser.add_argument("--weights", required=True)
  parser.add_argument("--images", required=True, help="folder of PNG files, or frames of moving shapes: shapes://...")
  parser.add_argument("--size", type=int, nargs=2, default=(144, 256), metavar=("H", "W"))
  parser.add_argument("--picture", help="PNG to write")
  args = parser.parse_args()

  model = image_kl.ImageKL(image_kl.get_config(args.model))
  variables = load_variables(args.weights, "diffusers", image_kl.init_shapes(model.config))
  height, width = args.size
  if args.images.startswith(shapes.SCHEME):
    split, seed, count = shapes.parse(args.images)
    scenes = [shapes.scene(f"{shapes.SCHEME}{split}/{seed}/{i}") for i in range(count)]
    frames = np.concatenate([shapes.draw(s, [i % s.frames], (height, width)) for i, s in enumerate(scenes)])
  else:
    files = sorted(pathlib.Path(args.images).glob("*.png"))
    frames = np.stack([np.asarray(Image.open(f).convert("RGB").resize((width, height), Image.BOX)) for f in files])

  def timed(function, *values):
    function(model, variables, *(v[:4] for v in values))  # compiles
    start = time.perf_counter()
    result = function(model, variables, *values)
    return result, len(frames) / (time.perf_counter() - start)

  (mean, _), encode_rate = timed(image_kl.encode_video, frames)
  decoded, decode_rate = timed(image_kl.decode_video, mean)
  errors = np.square(decoded.astype(np.float64) - frames).mean((1, 2, 3))
  raw = np.asarray(image_kl.denormalise(model.config, mean)).reshape(-1, model.config.latent_channels)
  psnr = 10 * np.log10(255**2 / errors)
  print(f"{'pictures':>10} {'PSNR dB':>8} {'worst':>6} {'best':>6} {'encode/s':>9} {'decode/s':>9}")
  mean_psnr = 10 * np.log10(255**2 / errors.mean())
  print(f"{len(frames):>10} {mean_psnr:8.2f} {psnr.min():6.2f} {psnr.max():6.2f} {encode_rate:9.1f} {decode_rate:9.1f}")
  print("shift", tuple(round(float(v), 3) for v in raw.mean(0)))
  print("scale", tuple(round(float(v), 3) for v in raw.std(0)))
  if args.picture:
    picked = np.linspace(0, len(frames) - 1, 6).astype(int)
    rows = [np.concatenate(list(values[picked]), axis=1) for values in (frames, decoded)]
    Image.fromarray(np.concatenate(rows)).save(args.picture)


if __name__ == "__main__":
  main()
