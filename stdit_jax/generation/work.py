"""Plans the videos that `sample` makes: their clips and given frames, their files, and the settings stored beside each file."""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from data import aspect_ratios, paths, video
from data.captions import append_scores, clean_caption
from stdit_jax.autoencoders.registry import check_length
from stdit_jax.generation import conditions, tasks
from stdit_jax.generation.clips import placements_of
from stdit_jax.generation.media import FRAMES, IMAGE_FORMATS, VIDEO_FORMATS, check_rate, settings_file
from stdit_jax.generation.pipeline import Request
from stdit_jax.generation.prompts import split_json, split_loops
from stdit_jax.generation.references import frame_numbers, probe
from stdit_jax.generation.settings import SampleSettings
from stdit_jax.models.family import find_model

MADE = ("num_frames", "tiles")  # keys of the JSON file that are results and not settings


@dataclasses.dataclass(frozen=True)
class Work:
  """One video or image to make."""

  stem: str  # of the file's name
  requests: tuple[Request, ...]  # one per loop
  files: tuple[str, ...]  # references
  job: tasks.Job
  file_frames: tuple[int, ...]  # number of frames of each file
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # for the file and the JSON file beside it
  path: str = ""  # of the file (`choose_targets`)

  @property
  def is_image(self) -> bool:
    return self.requests[0].num_frames == 1 and len(self.job.pieces) == 1


# ------------------------------------------------------------------------------------------------------------------ videos


def make_work(settings: SampleSettings, prompts: Sequence[str], config: Any, autoencoder: Any) -> list[Work]:
  """The videos of the prompts. Checks everything, and reads no weights. `autoencoder`: its configuration.

  Raises ValueError if a size, length, count, task or mask strategy is not allowed, or if the model takes no frames.
  """
  if settings.task and (settings.reference or settings.mask_strategy):
    raise ValueError("give --task with its files, or --reference and --mask-strategy; not both")
  if settings.task:
    tasks.check_files(settings.task[0], len(settings.task) - 1)
  fps = config.sample.fps if settings.fps is None else settings.fps
  if not 0.1 <= fps <= 240:
    raise ValueError(f"--fps is {fps:g}; allowed: 0.1 to 240")
  works = []
  for number, prompt in enumerate(prompts):
    text, files, strategy = split_prompt(settings, prompt)
    counts = tuple(frame_numbers(path, fps, settings.compat is not None).size for path in files)
    frames = choose_length(settings, config, files, counts, autoencoder)
    lengths, count = tuple(map(autoencoder.latent_frames, counts)), autoencoder.latent_frames(frames)
    job = make_job(settings, strategy, files, lengths, count, autoencoder.group)
    placements_of(job, counts, autoencoder, frames, settings.compat)  # raises ValueError for positions outside the clip
    height, width = choose_size(settings, config, files, autoencoder.downsampling)
    scores = settings.aesthetic_score, settings.motion_score, settings.camera_motion
    texts = [clean_caption(append_scores(piece, *scores)) for piece in split_loops(text, job.loops)]
    words = [word[:40] for word in re.findall(r"[a-z0-9]+", texts[0].lower())[:6]]
    name = "-".join([*words, *filter(None, [settings.task_name])]) or "prompt"
    for seed in range(settings.seed, settings.seed + settings.num_samples):
      requests = tuple(Request(piece, height, width, frames, fps, seed, loop) for loop, piece in enumerate(texts))
      works.append(Work(f"{number:04d}-{name}-seed{seed}", requests, files, job, counts))
  family, _ = find_model(config.model.name, config.model.fields)
  if any(one.job.rules for one in works) and not family.supports.frame_masks:
    raise ValueError(f"{family.name} can't be given frames, only text; leave --task and --mask-strategy out")
  return works


def split_prompt(settings: SampleSettings, prompt: str) -> tuple[str, tuple[str, ...], str | None]:
  """(text, reference files, mask strategy). The prompt may give files and strategy. Otherwise the flags give them."""
  text, own = split_json(prompt)
  if own and settings.task:
    raise ValueError(f"prompt {prompt!r} has own files or an own mask strategy; remove these, or leave --task out")
  if settings.task:
    return text, tuple(settings.task[1:]), None
  files = own["reference_path"].split(";") if own.get("reference_path") else settings.reference or ()
  return text, tuple(files), own.get("mask_strategy", settings.mask_strategy)


def choose_length(settings: SampleSettings, config: Any, files: Sequence[str], counts: Sequence[int], autoencoder: Any) -> int:
  """Frames of a clip. Raises ValueError for a length that the autoencoder or the task can't use."""
  task = settings.task_name
  frames = 1 if task in tasks.ONE_FRAME else aspect_ratios.get_num_frames(settings.num_frames or config.sample.num_frames)
  said = f"--num-frames is {frames}"
  if task in tasks.WHOLE_FILE and not settings.num_frames:
    frames = counts[0]
    said = f"{files[0]} has {frames} frames (--num-frames takes fewer)"
  check_length(autoencoder, frames, said)
  if not settings.compat:
    tasks.check_length(task, settings.loops, frames, settings.condition_frames, autoencoder)
  return frames


def make_job(
  settings: SampleSettings, strategy: str | None, files: Sequence[str], lengths: Sequence[int], count: int, group: int
) -> tasks.Job:
  """The job of the task or of the mask strategy. `lengths`, `count`: latent frames of the files, and of a clip."""
  loops, length, edit = settings.loops, settings.condition_frames, settings.condition_edit
  if settings.task:
    options = {"loops": loops, "length": length, "strength": settings.edit_strength, "edit": edit, "group": group}
    return tasks.make_job(settings.task[0], count, lengths, **options)
  rules = conditions.parse_mask_strategy(strategy)
  if files and not rules and not settings.compat:  # the original code ignores files and rules without effect
    raise ValueError(f"{files[0]} is given without its place in the clip; give --mask-strategy, or --task animate FILE")
  if (late := [rule for rule in rules if rule.loop >= loops]) and not settings.compat:
    rule = conditions.describe(late[0])
    raise ValueError(f"{rule}: loop {late[0].loop} does not exist; give 0 to {loops - 1}, or more --loops")
  carried = tasks.condition_length(length, count, group) if loops > 1 else 0
  return tasks.of_strategy(rules, len(files), loops, carried, edit)


def choose_size(settings: SampleSettings, config: Any, files: Sequence[str], downsampling: int) -> tuple[int, int]:
  """(height, width) of the videos, by the flags or the configuration. By default the first file gives the aspect ratio."""
  if settings.image_size:
    for name, side in zip("HW", settings.image_size):
      if side < downsampling or side % downsampling:
        near = max(downsampling, round(side / downsampling) * downsampling)
        raise ValueError(f"--image-size: {name} is {side}; it must be a multiple of {downsampling}, e.g. {near}")
    return settings.image_size[0], settings.image_size[1]
  resolution = settings.resolution or config.sample.resolution
  ratio = settings.aspect_ratio or config.sample.aspect_ratio
  if files and not settings.aspect_ratio:
    picture = probe(files[0])
    ratio = aspect_ratios.closest_ratio(picture.height, picture.width, resolution)
  return aspect_ratios.size(resolution, ratio)


def explain(works: Sequence[Work], autoencoder: Any, compat: str | None) -> None:
  """Prints where each latent frame of each loop comes from, for the first seed of each prompt."""
  single = autoencoder.latent_frames(100) == 100  # an image autoencoder: each frame has its own latent frame
  what = "frames" if single else "latent frames"
  for one in (one for one in works if one.requests[0].seed == works[0].requests[0].seed):
    print(f"{one.stem}:")
    for number, (path, count) in enumerate(zip(one.files, map(autoencoder.latent_frames, one.file_frames))):
      print(f"  reference {number}: {path}, {count} {what if count > 1 else what[:-1]}")
    placements = placements_of(one.job, one.file_frames, autoencoder, one.requests[0].num_frames, compat)
    for loop, (request, placement) in enumerate(zip(one.requests, placements)):
      latents = "" if single else f" ({autoencoder.latent_frames(request.num_frames)} latent frames)"
      print(f"  loop {loop}: {request.num_frames} x {request.height} x {request.width}{latents}, {request.prompt}")
      print("\n".join(f"    {line}" for line in conditions.explain(placement, len(one.files))))
    names = [f"reference {r}" if r < len(one.files) else f"loop {r - len(one.files)}" for r, _, _ in one.job.pieces]
    parts = [f"{name}[{first}:{'' if stop is None else stop}]" for name, (_, first, stop) in zip(names, one.job.pieces)]
    print(f"  video: {' + '.join(parts)}")


# ------------------------------------------------------------------------------------------------------------------- files


def with_settings(works: Sequence[Work], settings: SampleSettings, sample: Any, model: str, autoencoder: Any) -> list[Work]:
  """The works with the settings that determine them, as JSON values. `model`: description of the model's weights."""
  names = (
    "negative_prompt", "sampler", "timestep_shift", "guidance_interval", "guidance_rescale", "guidance_channels", "step_cache",
    "compat", "autoencoder_memory", "config", "changes", "autoencoder", "text_encoder",
  )  # fmt: skip
  given = {name: value for name in names if (value := getattr(settings, name)) not in (None, 0, (), [])}
  own_files = tuple(filter(None, (settings.weights, settings.autoencoder, settings.text_encoder)))
  all_files = {*own_files, *(path for one in works for path in one.files)}
  # A file with new content counts as another setting.
  marks = {path: paths.fingerprint(path) for path in all_files if paths.exists(path)}
  stored = []
  for one in works:
    first, prompts, step = one.requests[0], [request.prompt for request in one.requests], autoencoder.downsampling
    own = {
      "prompt": prompts[0] if len(set(prompts)) == 1 else prompts, "seed": first.seed,
      "steps": sample.steps, "guidance_scale": sample.guidance_scale,
      # The autoencoder rounds sizes down.
      "height": first.height // step * step, "width": first.width // step * step, "fps": first.fps,
      "frames_of_clip": first.num_frames, "model": model, **given,
      "files": {path: marks[path] for path in (*own_files, *one.files) if path in marks},
    }  # fmt: skip
    if one.files or one.job.loops > 1:
      own |= {"references": one.files, "loops": one.job.loops, "task": settings.task_name}
      own |= {"rules": [dataclasses.astuple(rule) for rule in one.job.rules], "pieces": one.job.pieces}
    stored.append(dataclasses.replace(one, settings=json.loads(json.dumps(own))))
  return stored


def choose_targets(settings: SampleSettings, works: Sequence[Work]) -> list[Work]:
  """The works whose files are missing, with their paths. The first process decides for all processes.

  A file with other settings keeps its name, and the new file gets -2, -3, ... With --overwrite all files are made. Raises
  ValueError if --output names one file that cannot hold the videos, or that exists with other settings.
  """
  ending = one_file(settings.output, works)
  files, missing, taken = [], [], False
  for one in works:
    kind = "png" if one.is_image else "" if settings.format == FRAMES else settings.format
    stem = os.path.splitext(settings.output)[0] if ending else paths.join(settings.output, one.stem)
    check_rate(ending or kind, one.requests[0].fps)
    path, number = settings.output if ending else f"{stem}.{kind}".rstrip("."), 1
    while not settings.overwrite and made_with(path) not in (None, one.settings):
      if taken := bool(ending):
        break
      number += 1
      path = f"{stem}-{number}.{kind}".rstrip(".")
    files.append(dataclasses.replace(one, path=path))
    missing.append(settings.overwrite or not paths.exists(path))
  if jax.process_count() > 1:  # other processes may see other files
    taken, *missing = multihost_utils.broadcast_one_to_all(np.asarray([taken, *missing]))
  if taken:
    raise ValueError(f"--output {settings.output} exists, and was made with other settings; --overwrite replaces it")
  return list(itertools.compress(files, missing))


def one_file(output: str, works: Sequence[Work]) -> str:
  """The ending of --output if it names one file, "" for a folder. Raises ValueError if the videos do not fit into the file."""
  ending = os.path.splitext(output)[1][1:].lower()
  if ending not in VIDEO_FORMATS + IMAGE_FORMATS:
    if f".{ending}" in video.VIDEO_EXTENSIONS + video.IMAGE_EXTENSIONS:
      allowed = ", ".join(VIDEO_FORMATS + IMAGE_FORMATS)
      raise ValueError(f"--output {output}: allowed endings are {allowed}; or give a folder")
    return ""
  if len(works) > 1 or (ending in IMAGE_FORMATS and not works[0].is_image):
    what = f"{len(works)} files are" if len(works) > 1 else "a video is"
    raise ValueError(f"--output {output} is one {ending}, but {what} to be made; give a folder, and --format")
  return ending


def made_with(path: str) -> dict[str, Any] | None:
  """The settings in the JSON file of `path`. {} if the file has none that can be read, None if there is no file."""
  try:
    found = json.loads(paths.read_text(settings_file(path)))
    return {key: value for key, value in found.items() if key not in MADE}
  except FileNotFoundError:
    return {} if paths.exists(path) else None
  except (ValueError, KeyError, AttributeError, TypeError):
    return {}
