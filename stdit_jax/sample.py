"""Makes videos and images from text, images and videos, with a training run's folder or converted weights.

  python -m stdit_jax.sample --run runs/quickstart --prompt "a gray rabbit in a meadow" --num-frames 17
  python -m stdit_jax.sample --run runs/quickstart --prompt "the rabbit hops away" --task animate rabbit.png
  python -m stdit_jax.sample --run runs/quickstart --prompt "|0|a meadow|2|a forest" --task endless --loops 4 --num-frames 34
  python -m stdit_jax.sample --config configs/open_sora_1_2.py --weights stdit3.safetensors --text-encoder t5-xxl/ \\
      --config.text_encoder.tokenizer=t5-xxl/ --autoencoder vae.safetensors --prompt "..." --resolution 480p --aspect-ratio 9:16

Tasks, given as NAME and its files:
{tasks}

A prompt `|0|text|2|other` changes with the loops; one that ends with {{"reference_path": "a.png;b.mp4", "mask_strategy":
"0;0,1,0,-1"}} has its own files and mask strategy, as with Open-Sora. --explain prints what becomes of every frame.

Files are named after the number of the prompt, its first words, the task and the seed; what exists with the same settings (in
the JSON file beside it) is kept unless --overwrite, and other settings get another name, -2, -3, ...
Of several processes (`cli.connect_processes`) all run the same command, and the first one writes.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import sys
import time

from data import paths, video
from stdit_jax import loading
from stdit_jax.cli import (
  InputError,
  OneLineParser,
  connect_processes,
  keep_freed_memory,
  one_line_errors,
  parse_with_changes,
  use_compilation_cache,
)
from stdit_jax.generation import conditions, tasks
from stdit_jax.generation.media import FRAMES, IMAGE_FORMATS, VIDEO_FORMATS, check_rate, settings_file

MADE = ("num_frames", "tiles")  # in the JSON beside a file, but no settings that were given


def make_parser():
  parser = OneLineParser(
    "python -m stdit_jax.sample", description=__doc__.format(tasks=tasks.__doc__.partition("\n\n")[2].strip("\n")),
    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
  )  # fmt: skip
  loading.add_model_arguments(parser)
  what = parser.add_argument_group("what to make")
  what.add_argument("--prompt", action="append", default=[], help="a prompt; may be given several times")
  what.add_argument(
    "--prompt-file", help="prompts: text, one a line; .csv or .jsonl, in the column or key `prompt` (or `text`), with "
    "`reference_path` and `mask_strategy` if wanted",
  )  # fmt: skip
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

  given = parser.add_argument_group("what is given")
  given.add_argument("--task", nargs="+", metavar=("NAME", "FILE"), help="a task and its files, see above")
  given.add_argument("--reference", action="append", default=[], metavar="FILE", help="image or video for --mask-strategy")
  given.add_argument(
    "--mask-strategy", metavar="TEXT", help="Open-Sora's: LOOP,REFERENCE,ITS FRAME,FRAME,FRAMES,EDIT RATIO;..."
  )
  given.add_argument("--loops", type=int, default=1, help="clips, each going on from the last frames of the one before")
  given.add_argument("--condition-frames", type=int, help="frames given of a video or of the clip before (default: up to 4)")
  given.add_argument("--condition-edit", type=float, default=0.0, help="edit ratio of frames of the clip before (default: 0)")
  given.add_argument("--edit-strength", type=float, default=0.6, help="of --task edit, up to 1 (default: %(default)s)")
  given.add_argument("--explain", action="store_true", help="prints what becomes of every frame, and makes nothing")

  how = parser.add_argument_group("how")
  loading.add_sampler_arguments(how)
  how.add_argument("--negative-prompt", help="what guidance leads away from (default: the null caption)")
  how.add_argument(
    "--batch-size", type=int, help="videos made together (default: 1, or as many as the mesh splits a batch into)"
  )
  how.add_argument(
    "--autoencoder-memory", type=float, metavar="GIB", help="of each device for encoding and decoding, which are done in "
    "tiles if they need more (autoencoders/tiles.py; default: what is free)",
  )  # fmt: skip
  how.add_argument(
    "--output", default="samples", help="folder for the files, or one .mp4, .gif, .webp, .png (default: samples)"
  )
  how.add_argument(
    "--format", default="mp4", choices=(*VIDEO_FORMATS, FRAMES), help="of videos, a folder of png; images are png"
  )
  how.add_argument("--overwrite", action="store_true", help="make again what exists")
  return parser


def check_numbers(args):
  """Raises ValueError for a number of the command line that can't be."""
  for name in ("num_samples", "batch_size", "steps", "loops"):
    value = getattr(args, name)
    if value is not None and value < 1:
      raise ValueError(f"--{name.replace('_', '-')} is {value}; allowed: at least 1")
  last_seed = args.seed + args.num_samples - 1
  if args.seed < 0 or last_seed >= 2**32:
    raise ValueError(f"--seed: seeds are {args.seed} to {last_seed}; allowed: 0 to {2**32 - 1}")
  if not 0 <= args.condition_edit <= 1:
    raise ValueError(f"--condition-edit is {args.condition_edit:g}; allowed: 0 to 1")
  if args.autoencoder_memory is not None and not args.autoencoder_memory > 0:
    raise ValueError(f"--autoencoder-memory is {args.autoencoder_memory:g}; allowed: above 0 (GiB)")


def read_prompts(args):
  """All prompts of the command line; ValueError when there are none, or the file is none of prompts."""
  from stdit_jax.generation.prompts import read_prompt_file

  prompts = list(args.prompt)
  if args.prompt_file:
    prompts += read_prompt_file(args.prompt_file)
  if not prompts:
    where = f" in {args.prompt_file}" if args.prompt_file else ""
    raise ValueError(f'no prompt{where}; give --prompt "..." or --prompt-file FILE')
  return prompts


@dataclasses.dataclass(frozen=True)
class Work:
  """One file to make. Attributes: stem: of its name; requests: one per loop; files: references; job: of `tasks`; file_frames,
  file_latents: how many frames and latent frames the files have."""

  stem: str
  requests: tuple
  files: tuple
  job: tasks.Job
  file_frames: tuple
  file_latents: tuple


def picture_shape(args, config, files, downsampling):
  """(height, width) of the videos: as asked for, else of the configuration, in the shape of the first file that is given."""
  from data import aspect_ratios
  from stdit_jax.generation.references import picture_size

  if args.image_size:
    for name, side in zip("HW", args.image_size):
      if side < downsampling or side % downsampling:
        near = max(downsampling, round(side / downsampling) * downsampling)
        raise ValueError(f"--image-size: {name} is {side}; it must be a multiple of {downsampling}, e.g. {near}")
    return tuple(args.image_size)
  resolution, ratio = args.resolution or config.sample.resolution, args.aspect_ratio or config.sample.aspect_ratio
  if files and not args.aspect_ratio:
    ratio = aspect_ratios.closest_ratio(*picture_size(files[0]), resolution)
  return aspect_ratios.size(resolution, ratio)


def make_work(args, prompts, config, autoencoder):
  """The files to make of the prompts, everything checked before any weight is read.

  Raises ValueError for sizes, lengths, counts, tasks or strategies that can't be, with what can.
  """
  from data import aspect_ratios
  from data.captions import append_scores, clean_caption
  from stdit_jax.autoencoders.registry import nearest_lengths
  from stdit_jax.generation.clips import place_loop
  from stdit_jax.generation.pipeline import Request
  from stdit_jax.generation.prompts import split_json, split_loops
  from stdit_jax.generation.references import count_frames

  task, *files = args.task or (None,)
  if task and (args.reference or args.mask_strategy):
    raise ValueError("give --task with its files, or --reference and --mask-strategy; not both")
  if task:
    tasks.check_files(task, len(files))
  fps = config.sample.fps if args.fps is None else args.fps
  if not 0.1 <= fps <= 240:
    raise ValueError(f"--fps is {fps:g}; allowed: 0.1 to 240")
  work = []
  for i, prompt in enumerate(prompts):
    text, own = split_json(prompt)
    if own and task:
      raise ValueError(f"prompt {prompt!r} has files or a mask strategy of its own, which does not go with --task {task}")
    named = tuple(own.get("reference_path", "").split(";")) if own.get("reference_path") else tuple(args.reference)
    files = tuple(files) if task else named
    counts = [count_frames(path, fps, args.compat is not None) for path in files]
    frames = 1 if task in tasks.ONE_FRAME else aspect_ratios.get_num_frames(args.num_frames or config.sample.num_frames)
    said = f"--num-frames is {frames}"
    if task in tasks.WHOLE_FILE and not args.num_frames:
      frames = counts[0]
      said = f"{files[0]} has {frames} frames (--num-frames takes fewer)"
    if not autoencoder.keeps(frames):
      allowed = nearest_lengths(autoencoder, frames)
      raise ValueError(f"{said}, a length that the autoencoder does not give back; nearest: {allowed}")
    lengths, count = tuple(map(autoencoder.latent_frames, counts)), autoencoder.latent_frames(frames)
    if not args.compat:
      tasks.check_length(task, args.loops, frames, args.condition_frames, autoencoder)
    if task:
      options = {"loops": args.loops, "length": args.condition_frames, "strength": args.edit_strength}
      job = tasks.make_job(task, count, lengths, **options, edit=args.condition_edit, group=autoencoder.group)
    else:
      rules = conditions.parse_mask_strategy(own.get("mask_strategy", args.mask_strategy))
      if not args.compat:
        check_rules(rules, files, args.loops)
      carried = tasks.condition_length(args.condition_frames, count, autoencoder.group) if args.loops > 1 else 0
      job = tasks.of_strategy(rules, len(files), args.loops, carried, args.condition_edit)
    for loop in range(job.loops):
      place_loop(job, loop, count, lengths, args.compat)
    height, width = picture_shape(args, config, files, autoencoder.downsampling)
    scores = args.aesthetic_score, args.motion_score, args.camera_motion
    texts = [clean_caption(append_scores(piece, *scores)) for piece in split_loops(text, job.loops)]
    words = [word[:40] for word in re.findall(r"[a-z0-9]+", texts[0].lower())[:6]]
    words = "-".join([*words, *([task] if task else [])]) or "prompt"
    for seed in range(args.seed, args.seed + args.num_samples):
      requests = tuple(Request(piece, height, width, frames, fps, seed, loop) for loop, piece in enumerate(texts))
      work.append(Work(f"{i:04d}-{words}-seed{seed}", requests, files, job, tuple(counts), lengths))
  return work


def check_rules(rules, files, loops):
  """Raises ValueError where files or rules would do nothing, which the originals pass over."""
  if files and not rules:
    raise ValueError(f"{files[0]} is given, but nothing says where; give --mask-strategy, or --task, e.g. --task animate FILE")
  for rule in rules:
    if rule.loop >= loops:
      raise ValueError(f"{conditions.describe(rule)} is of loop {rule.loop}, and there are {loops}, numbered from 0 (--loops)")


def explain(work, autoencoder, compat):
  """Prints what becomes of every latent frame of every loop."""
  from stdit_jax.generation.clips import place_loop

  alone = autoencoder.latent_frames(100) == 100
  what = "frames" if alone else "latent frames"
  for one in (one for one in work if one.requests[0].seed == work[0].requests[0].seed):
    print(f"{one.stem}:")
    for number, (path, count) in enumerate(zip(one.files, one.file_latents)):
      print(f"  reference {number}: {path}, {count} {what if count > 1 else what[:-1]}")
    for loop, request in enumerate(one.requests):
      count = autoencoder.latent_frames(request.num_frames)
      placement = place_loop(one.job, loop, count, one.file_latents, compat)
      latents = "" if alone else f" ({count} latent frames)"
      print(f"  loop {loop}: {request.num_frames} x {request.height} x {request.width}{latents}, {request.prompt}")
      print("\n".join(f"    {line}" for line in conditions.explain(placement, len(one.files))))
    names = [f"reference {r}" if r < len(one.files) else f"loop {r - len(one.files)}" for r, _, _ in one.job.pieces]
    parts = [f"{name}[{first}:{'' if stop is None else stop}]" for name, (_, first, stop) in zip(names, one.job.pieces)]
    print(f"  video: {' + '.join(parts)}")


def main(argv=None):
  args = parse_with_changes(make_parser(), argv)
  from stdit_jax.models.family import find_model

  with one_line_errors():
    check_numbers(args)
    prompts = read_prompts(args)
    connect_processes()
    config, step = loading.read_model(args)
    loading.guidance_of(args)
    autoencoder = autoencoder_of(config)
    work = make_work(args, prompts, config, autoencoder)
    if any(one.job.rules for one in work):
      family, _ = find_model(config.model.name, config.model.fields)
      if not family.supports.frame_masks:
        raise ValueError(f"{family.name} can't be given frames: it makes videos from text alone")
    if args.explain:
      return explain(work, autoencoder, args.compat)
    steps, scale = loading.steps_and_scale(args, config)
    described, marks = loading.describe(args, step), fingerprints(args, work)
    settings = [settings_of(one, args, steps, scale, described, autoencoder, marks) for one in work]
    paths.check(args.output, "--output")
    use_compilation_cache()
    keep_freed_memory()
    files, missing = choose_files(args, work, settings)
    if not missing:
      return print(f"all {len(work)} files exist and are kept (--overwrite makes them again)")
    paths.check_writable(os.path.dirname(files[0]) or ".", "--output")
    check = lambda pipeline: check_memory(pipeline, [work[i] for i in missing], steps, scale, args)  # noqa: E731
    pipeline = loading.load_pipeline(args, config, step, check)
  with one_line_errors((OSError, InputError)):
    run_work(pipeline, work, files, missing, settings, steps, scale, args)


def check_memory(pipeline, work, steps, scale, args):
  """Says how much memory each device will need, with the autoencoder in tiles where that is too much for it; ValueError when
  there is less, with what takes less. Compiles, allocates nothing."""
  import jax

  from stdit_jax.autoencoders.codec import fit_tiles
  from stdit_jax.generation.clips import encoded_lengths

  pipeline.diffusion.for_sampling(steps)
  largest = max(work, key=lambda one: one.requests[0].height * one.requests[0].width * one.requests[0].num_frames)
  request, batch = largest.requests[0], min(args.batch_size or pipeline.batch_parts, len(work))
  config, frames = pipeline.codec.config, request.num_frames
  encoded = set().union(*(encoded_lengths(one.job, one.file_frames, config, frames, args.compat) for one in work))
  given = any(one.job.rules for one in work)
  options = {"given": given, "encoded": encoded, "negative": args.negative_prompt is not None}
  if jax.process_index() == 0:
    print(f"compiling for {batch} x {request.num_frames} x {request.height} x {request.width} ...", file=sys.stderr, flush=True)
  needed = pipeline.needed_memory(request, batch, steps, scale, **options)
  weights, gib = needed.pop("weights"), 2**30
  free = loading.free_memory()
  budget = args.autoencoder_memory * gib if args.autoencoder_memory else free and free - weights
  lengths = {"decode": {frames}} | ({"encode": encoded} if encoded else {})
  if budget and max(needed[method] for method in lengths) > budget:
    pipeline.codec, less = fit_tiles(pipeline.codec, pipeline.latent_size(request)[1:], lengths, budget)
    needed |= less
    if jax.process_index() == 0 and pipeline.codec.tiles:
      tiles, size = pipeline.codec.tiles, pipeline.latent_size(request)[1:]
      sides = (min(pair) * config.downsampling for pair in zip((tiles.height, tiles.width), size))
      what = " and ".join(f"{method}s" for method in lengths)
      print(f"{what} in tiles of {' x '.join(map(str, sides))} pixels, to need less memory", flush=True)
  parts = ", ".join(f"{name} {size / gib:.2f}" for name, size in needed.items())
  total = weights + max(needed.values())
  text = f"memory of each device: {total / gib:.2f} GiB (weights {weights / gib:.2f}, beside them in turn {parts})"
  if free is not None and total > free:
    raise ValueError(
      f"{text}, but only {free / gib:.2f} GiB are free: lower --batch-size, --num-frames or the size, use --guidance-in-turn, "
      "or more devices with --mesh"
    )
  if jax.process_index() == 0:
    print(text + ("" if free is None else f" of {free / gib:.2f} that are free"), flush=True)


def autoencoder_of(config):
  """The configuration of the autoencoder of a configuration."""
  from stdit_jax.autoencoders.registry import autoencoder_model

  return autoencoder_model(config.autoencoder).config


def fingerprints(args, work):
  """{path: fingerprint} of the files that are given: another one of the same name is another setting."""
  given = {args.weights, args.autoencoder, args.text_encoder, *(path for one in work for path in one.files)}
  return {path: paths.fingerprint(path) for path in given if path and paths.exists(path)}


def settings_of(one, args, steps, scale, described, autoencoder, marks):
  """What makes a file what it is, as it is written into it and beside it, where what making it adds (`MADE`) comes as well.
  `marks`: of `fingerprints`."""
  first, prompts, step = one.requests[0], [r.prompt for r in one.requests], autoencoder.downsampling
  settings = {
    "prompt": prompts[0] if len(set(prompts)) == 1 else prompts, "seed": first.seed, "steps": steps, "guidance_scale": scale,
    # What the autoencoder makes of the size that was asked for.
    "height": first.height // step * step, "width": first.width // step * step, "fps": first.fps,
    "frames_of_clip": first.num_frames, "model": described,
  }  # fmt: skip
  if one.files or one.job.loops > 1:
    settings |= {"references": one.files, "loops": one.job.loops, "task": args.task[0] if args.task else None}
    settings |= {"rules": [dataclasses.astuple(rule) for rule in one.job.rules], "pieces": one.job.pieces}
  names = "negative_prompt", "sampler", "timestep_shift", "guidance_interval", "guidance_rescale", "guidance_channels"
  names += "step_cache", "compat"
  names += "config", "changes", "autoencoder", "text_encoder", "autoencoder_memory"
  settings |= {name: value for name in names if (value := getattr(args, name)) not in (None, 0, [], ())}
  used = *one.files, args.weights, args.autoencoder, args.text_encoder
  settings |= {"files": {path: marks[path] for path in used if path in marks}}
  return json.loads(json.dumps(settings))


def choose_files(args, work, settings):
  """(files, numbers of those that have to be made); of several processes as the first one sees them. A name whose JSON file
  says other settings is passed over for one with -2, -3, ...

  Raises ValueError when `--output` is a file, and several are to be made, it can't hold what is made, or it holds another.
  """
  import jax
  import numpy as np
  from jax.experimental import multihost_utils

  ending = os.path.splitext(args.output)[1][1:].lower()
  alone = ending in VIDEO_FORMATS + IMAGE_FORMATS
  if not alone and f".{ending}" in video.VIDEO_EXTENSIONS + video.IMAGE_EXTENSIONS:
    allowed = ", ".join(VIDEO_FORMATS + IMAGE_FORMATS)
    raise ValueError(f"--output {args.output}: allowed endings are {allowed}; or give a folder")
  if alone and (len(work) > 1 or (ending in IMAGE_FORMATS and not is_image(work[0]))):
    what = f"{len(work)} files are" if len(work) > 1 else "a video is"
    raise ValueError(f"--output {args.output} is one {ending}, but {what} to be made; give a folder, and --format")
  files, missing, taken = [], [], False
  for one, own in zip(work, settings):
    kind = "png" if is_image(one) else "" if args.format == FRAMES else args.format
    stem = os.path.splitext(args.output)[0] if alone else paths.join(args.output, one.stem)
    check_rate(ending if alone else kind, one.requests[0].fps)
    path, number = args.output if alone else f"{stem}.{kind}".rstrip("."), 1
    while not args.overwrite and made_with(path) not in (None, own):
      if taken := alone:
        break
      number += 1
      path = f"{stem}-{number}.{kind}".rstrip(".")
    files.append(path)
    missing.append(args.overwrite or not paths.exists(path))
  if jax.process_count() > 1:  # they need not see the same files
    taken, *missing = multihost_utils.broadcast_one_to_all(np.asarray([taken, *missing]))
  if taken:
    raise ValueError(f"--output {args.output} exists, and was made with other settings; --overwrite replaces it")
  return files, np.flatnonzero(missing).tolist()


def made_with(path):
  """The settings with which the file of this name, or one that differs in its ending, was made; None where there is none."""
  try:
    found = json.loads(paths.read_text(settings_file(path)))
    found = {key: value for key, value in found.items() if key not in MADE}
  except FileNotFoundError:
    return {} if paths.exists(path) else None
  except (ValueError, KeyError, AttributeError, TypeError):
    return {}
  return found


def run_work(pipeline, work, files, missing, settings, steps, scale, args):
  """Makes and writes what is missing, a batch at a time; interrupting keeps what is finished. All processes make, the first
  decodes and writes."""
  import jax
  from jax.experimental import multihost_utils

  if jax.process_index() == 0:
    if len(missing) < len(work):
      print(f"{len(work) - len(missing)} of {len(work)} files exist and are kept (--overwrite makes them again)")
    first = work[missing[0]].requests[0]
    size = f"{first.num_frames} x {first.height} x {first.width}"
    print(f"{settings[0]['model']}: {size}, {steps} steps, guidance {scale:g}")
  for batch, label in batches(work, missing, args.batch_size or pipeline.batch_parts):
    make_batch(pipeline, [(work[i], files[i], settings[i]) for i in batch], label, steps, scale, args)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("samples are written")


def is_image(one):
  """Whether a work is a picture: one frame, of one clip."""
  return one.requests[0].num_frames == 1 and len(one.job.pieces) == 1


def batches(work, todo, size):
  """(numbers of the works that are made together, "1-2/7"): at most `size` that follow each other and are of one size."""
  start = 0
  while start < len(todo):
    first, stop = work[todo[start]], start + 1
    while stop < min(start + size, len(todo)) and same_size(first, work[todo[stop]]):
      stop += 1
    yield todo[start:stop], f"{start + 1}-{stop}/{len(todo)}" if stop > start + 1 else f"{stop}/{len(todo)}"
    start = stop


def same_size(a, b):
  """Whether two works can be made together."""
  shape = lambda one: (one.requests[0].height, one.requests[0].width, one.requests[0].num_frames, one.job.loops)  # noqa: E731
  return shape(a) == shape(b)


def make_batch(pipeline, batch, label, steps, scale, args):
  """Makes the videos of (work, file, settings) together; the first process writes them, clip after clip."""
  import jax
  from tqdm import tqdm

  from data.captions import clean_caption
  from stdit_jax.generation.clips import Item, length_of, make_videos
  from stdit_jax.generation.media import open_media
  from stdit_jax.generation.references import read_reference

  began, writes = time.monotonic(), jax.process_index() == 0
  negative = None if args.negative_prompt is None else clean_caption(args.negative_prompt)

  def bar(items, stage, loop, unit, **options):
    loops = batch[0][0].job.loops
    name = f"{stage} {label}" + (f", clip {loop + 1}/{loops}" if loops > 1 else "")
    return tqdm(items, name, unit=unit, leave=False, file=sys.stderr, disable=None if writes else True, **options)

  def sample(loop, requests, given):
    progress = lambda items, stage: bar(items, stage, loop, "step" if stage == "denoise" else "batch")  # noqa: E731
    return pipeline.sample_latents(requests, steps, scale, progress, given, negative)

  def decode(loop, latents):
    num_frames = batch[0][0].requests[loop].num_frames
    with bar(None, "decode", loop, "frame", total=num_frames * len(latents)) as shown:
      return pipeline.decode(latents, num_frames, shown.update)

  items = []
  for one, _, own in batch:
    size, fps = (own["height"], own["width"]), one.requests[0].fps
    references = tuple(read_reference(path, size, fps, args.compat is not None) for path in one.files)
    items.append(Item(one.requests, references, one.job))
  videos = make_videos(pipeline, items, sample, decode if writes else None, args.compat)
  if not writes:
    for _ in videos:
      pass
    return
  with contextlib.ExitStack() as all_files:
    # Each file is closed by itself, in order: one that can't be takes none with it that is whole.
    files, writers = [all_files.enter_context(contextlib.ExitStack()) for _ in batch], []
    for file, item, (one, path, own) in zip(files, items, batch):
      count = length_of(item, pipeline.codec.config)
      made = {"num_frames": count} | ({"tiles": dataclasses.asdict(tiles)} if (tiles := pipeline.codec.tiles) else {})
      writers.append(file.enter_context(open_media(path, count, one.requests[0].fps, own | made)))
    for parts_of_all in videos:
      for write, parts in zip(writers, parts_of_all):
        for part in parts:
          write(part)
    for file, (one, path, _) in zip(files, batch):
      file.close()
      print(f"{path}  ({time.monotonic() - began:.1f} s)  {one.requests[0].prompt}", flush=True)


if __name__ == "__main__":
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that unfinished files go
  try:
    main()
  except KeyboardInterrupt:
    print("interrupted; finished files are kept", file=sys.stderr)
    raise SystemExit(130) from None
