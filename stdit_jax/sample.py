"""Makes videos and images from text, with a training run's folder or converted weights.

  python -m stdit_jax.sample --run runs/quickstart --prompt "a gray rabbit in a meadow" --num-frames 16
  python -m stdit_jax.sample --config configs/opensora_v1_2.py --weights stdit3.safetensors --text-encoder t5-xxl/ \\
      --autoencoder vae.safetensors --prompt "..." --resolution 480p --aspect-ratio 9:16

Files are named after the number of the prompt, its first words and the seed; what exists is skipped unless --overwrite.
Of several processes (`cli.connect_processes`) all run the same command, and the first one writes.
"""

import argparse
import re
import sys
import time

from data import paths
from stdit_jax.cli import (
  OneLineParser,
  connect_processes,
  keep_freed_memory,
  one_line_errors,
  parse_mesh,
  use_compilation_cache,
)


def make_parser():
  parser = OneLineParser(
    "python -m stdit_jax.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )  # fmt: skip
  model = parser.add_argument_group("model")
  model.add_argument("--run", help="folder of a training run (its `output`)")
  model.add_argument("--item", default="ema", choices=("ema", "params"), help="which of the run's weights (default: ema)")
  model.add_argument("--step", type=int, help="which checkpoint of the run (default: the newest)")
  model.add_argument("--config", help="instead of --run: configuration file of the model")
  model.add_argument("--weights", help="with --config: safetensors of the denoiser, original names")
  model.add_argument("--text-encoder", help="safetensors file or folder of the T5 encoder, if not the config's")
  model.add_argument("--autoencoder", help="safetensors of the image autoencoder, if not the config's")

  what = parser.add_argument_group("what to make")
  what.add_argument("--prompt", action="append", default=[], help="a prompt; may be given several times")
  what.add_argument("--prompt-file", help="text file, one prompt a line")
  what.add_argument("--num-samples", type=int, default=1, help="videos per prompt, with seeds SEED, SEED + 1, ...")
  what.add_argument("--seed", type=int, default=0, help="one seed makes one noise, whatever the batch (default: 0)")
  what.add_argument("--resolution", help="name of a pixel count: 144p, 240p, 360p, 480p, 720p, ...")
  what.add_argument("--aspect-ratio", help="height:width, e.g. 9:16 (landscape), 1:1, 16:9")
  what.add_argument("--image-size", type=int, nargs=2, metavar=("H", "W"), help="instead of the two: pixels")
  what.add_argument("--num-frames", help="frames, or seconds at 24 fps as 2s, 4s, 8s, 16s; 1 makes an image")
  what.add_argument("--fps", type=float, help="frames per second")
  what.add_argument("--aesthetic-score", type=float, help="appended to the prompt, 4.5 to 6.5")
  what.add_argument("--motion-score", type=float, help="appended to the prompt, 0 to 100")
  what.add_argument("--camera-motion", help="appended to the prompt: pan left, zoom in, ...")

  how = parser.add_argument_group("how")
  how.add_argument("--steps", type=int, help="sampler steps")
  how.add_argument("--guidance-scale", type=float, help="classifier-free guidance; 1 is none")
  how.add_argument("--guidance-channels", type=int, help="guide only so many latent channels; Open-Sora 1.1: 3 (default: all)")
  how.add_argument(
    "--batch-size", type=int, help="videos made together (default: 1, or as many as the mesh splits a batch into)"
  )
  how.add_argument(
    "--mesh", nargs="+", metavar="AXIS=DEVICES",
    help="over all devices, e.g. data=-1 fsdp=4; sequence=4 splits each video (default: one device; processes: data=-1)",
  )  # fmt: skip
  how.add_argument("--output", default="samples", help="folder for the files (default: samples)")
  how.add_argument("--format", default="mp4", choices=("mp4", "gif", "webp"), help="of videos; images are png")
  how.add_argument("--overwrite", action="store_true", help="make again what exists")
  return parser


def read_prompts(args):
  """All prompts of the command line; ValueError when there are none, the file is not text, or a count is below 1."""
  for name in ("num_samples", "batch_size", "steps"):
    value = getattr(args, name)
    if value is not None and value < 1:
      raise ValueError(f"--{name.replace('_', '-')} is {value}; allowed: at least 1")
  prompts = list(args.prompt)
  if args.prompt_file:
    try:
      lines = paths.read_text(args.prompt_file).splitlines()
    except UnicodeDecodeError:
      raise ValueError(f"--prompt-file {args.prompt_file} is not UTF-8 text") from None
    prompts += [line.strip() for line in lines if line.strip()]
  if not prompts:
    raise ValueError('no prompt; give --prompt "..." or --prompt-file FILE')
  return prompts


def make_requests(args, config, downsampling):
  """The videos to make: (file stem, Request), sizes checked.

  Raises ValueError for sizes, lengths or counts that can't be, with the nearest that can.
  """
  from data import aspect_ratios
  from data.captions import append_scores, clean_caption
  from stdit_jax.generation.pipeline import Request

  defaults = config.sample
  if args.image_size:
    height, width = args.image_size
    for name, side in (("H", height), ("W", width)):
      if side < downsampling or side % downsampling:
        near = max(downsampling, round(side / downsampling) * downsampling)
        raise ValueError(f"--image-size: {name} is {side}; it must be a multiple of {downsampling}, e.g. {near}")
  else:
    resolution = args.resolution or defaults.resolution
    height, width = aspect_ratios.size(resolution, args.aspect_ratio or defaults.aspect_ratio)
  num_frames = aspect_ratios.get_num_frames(args.num_frames or defaults.num_frames)
  fps = defaults.fps if args.fps is None else args.fps
  last_seed = args.seed + args.num_samples - 1
  if args.seed < 0 or last_seed >= 2**32:
    raise ValueError(f"--seed: seeds are {args.seed} to {last_seed}; allowed: 0 to {2**32 - 1}")
  if not 0 < fps <= 240:
    raise ValueError(f"--fps is {fps}; allowed: above 0, at most 240")
  requests = []
  for i, prompt in enumerate(read_prompts(args)):
    full = clean_caption(append_scores(prompt, args.aesthetic_score, args.motion_score, args.camera_motion))
    words = "-".join(re.findall(r"[a-z0-9]+", prompt.lower())[:6]) or "prompt"
    for seed in range(args.seed, args.seed + args.num_samples):
      requests.append((f"{i:04d}-{words}-seed{seed}", Request(full, height, width, num_frames, fps, seed)))
  return requests


def load_pipeline(args):
  """(pipeline, configuration, description of the weights) of a run folder, or of a configuration and safetensors."""
  import jax

  from stdit_jax.generation.pipeline import Pipeline
  from stdit_jax.generation.prompts import TokenizeText
  from stdit_jax.interop import load_variables
  from stdit_jax.models import stdit
  from stdit_jax.parallel.mesh import make_mesh
  from stdit_jax.parallel.shardings import tree_shardings
  from stdit_jax.training import checkpoints, weights
  from stdit_jax.training.objectives import DenoiserObjective, autoencoder_model
  from stdit_jax.training.stages import make_stages

  if bool(args.run) == bool(args.config):
    raise ValueError("give either --run FOLDER (a training run) or --config FILE with --weights FILE")
  if args.run:
    config, step = checkpoints.stage_config(args.run, args.step)
  else:
    config = make_stages(read_config_file(args.config))[-1].config
  for key, value in (("autoencoder", args.autoencoder), ("text_encoder", args.text_encoder)):
    if value:
      config[key].weights = value
  if config.task != "denoiser":
    raise ValueError(f"{args.run or args.config} trains an {config.task}; sampling needs a denoiser")
  if config.text_encoder.where == "disk":
    raise ValueError("the run took its text embeddings from disk; give --text-encoder and set text_encoder.where to 'ahead'")
  sizes = parse_mesh(args.mesh) if args.mesh else {"data": -1} if jax.process_count() > 1 else None
  mesh = make_mesh(sizes) if sizes else None
  objective = DenoiserObjective(config)
  autoencoder = autoencoder_model(config.autoencoder)
  if args.run:
    params, frozen, _ = checkpoints.load_weights(args.run, args.item, step, mesh)
    described = f"{args.run}, step {step}, {args.item}"
  else:
    path = weights.need_file(args.weights, "--weights")
    shapes, place = stdit.init_shapes(objective.model.config), None
    if mesh:
      place = tree_shardings(shapes, mesh)
    variables = load_variables(path, "open-sora", shapes, config=objective.model.config, shardings=place)
    params, frozen, described = {"denoiser": variables["params"]}, {"denoiser": variables["constants"]}, path
  text_params = None
  if "text_encoder" not in params or args.text_encoder:
    params.pop("text_encoder", None)
    text_params = weights.load_text_encoder(config, objective.text, mesh)
  tokenize = TokenizeText(config.text_encoder.tokenizer, config.text_encoder.max_length)
  autoencoder = autoencoder, weights.load_autoencoder(config, autoencoder)
  if not mesh:
    params, frozen = jax.device_put((params, frozen), jax.local_devices()[0])
  pipeline = Pipeline(objective, params, frozen, autoencoder, tokenize, text_params, args.guidance_channels, mesh)
  return pipeline, config, described


def read_config_file(path):
  """`get_config()` of a Python file."""
  import runpy

  try:
    return runpy.run_path(path)["get_config"]()
  except KeyError:
    raise ValueError(f"{path} has no get_config()") from None
  except OSError as error:
    raise ValueError(f"--config {path} can't be read: {error.strerror}") from None
  except Exception as error:  # whatever the file's own code raises
    raise ValueError(f"{path} is no configuration: {type(error).__name__}: {error}") from None


def main(argv=None):
  args = make_parser().parse_args(argv)
  with one_line_errors():
    read_prompts(args)
    connect_processes()
    use_compilation_cache()
    keep_freed_memory()
    pipeline, config, described = load_pipeline(args)
    requests = make_requests(args, config, pipeline.autoencoder.config.downsampling)
    steps = args.steps or config.sample.steps
    scale = config.sample.guidance_scale if args.guidance_scale is None else args.guidance_scale
    pipeline.diffusion.for_sampling(steps)
    paths.check(args.output, "--output")
    paths.make_folder(args.output)
  with one_line_errors((OSError,)):
    run_requests(pipeline, requests, steps, scale, args, described)


def run_requests(pipeline, requests, steps, scale, args, described):
  """Makes and writes what is not there yet, a batch at a time; interrupting keeps what is finished. All processes make, the
  first decodes and writes."""
  import jax
  import numpy as np
  from jax.experimental import multihost_utils
  from tqdm import tqdm

  from stdit_jax.generation.media import write_media

  ending = "png" if requests[0][1].num_frames == 1 else args.format
  files = [paths.join(args.output, f"{stem}.{ending}") for stem, _ in requests]
  missing = np.asarray([args.overwrite or not paths.exists(path) for path in files])
  if jax.process_count() > 1:
    missing = multihost_utils.broadcast_one_to_all(missing)  # they need not see the same files
  todo, writes = np.flatnonzero(missing), jax.process_index() == 0
  if writes and len(todo) < len(requests):
    print(f"{len(requests) - len(todo)} of {len(requests)} files exist and are kept (--overwrite makes them again)")
  first, size = requests[0][1], args.batch_size or pipeline.batch_parts
  if writes:
    print(f"{described}: {first.num_frames} x {first.height} x {first.width}, {steps} steps, guidance {scale:g}")
  for start in range(0, len(todo), size):
    batch = todo[start : start + size]
    began = time.monotonic()
    label = f"{start + 1}-{start + len(batch)}/{len(todo)}"

    def progress(iterable, label=label):
      return tqdm(
        iterable, desc=f"denoise {label}", unit="step", leave=False, file=sys.stderr, disable=None if writes else True
      )

    latents = pipeline.sample_latents([requests[i][1] for i in batch], steps, scale, progress)
    for i, frames in zip(batch, pipeline.decode(latents) if writes else ()):
      request = requests[i][1]
      settings = {
        "prompt": request.prompt, "seed": request.seed, "steps": steps, "guidance_scale": scale, "height": frames.shape[1],
        "width": frames.shape[2], "num_frames": len(frames), "fps": request.fps, "model": described,
      }  # fmt: skip
      write_media(files[i], frames, request.fps, settings)
      print(f"{files[i]}  ({time.monotonic() - began:.1f} s)  {request.prompt}", flush=True)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("samples are written")


if __name__ == "__main__":
  try:
    main()
  except KeyboardInterrupt:
    print("interrupted; finished files are kept", file=sys.stderr)
    raise SystemExit(130) from None
