"""Makes and writes the planned videos of `work`, in batches that fit into the memory of the devices."""

import collections
import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence, Set
from typing import Any

import jax
from jax.experimental import multihost_utils
from tqdm import tqdm

from data.captions import clean_caption
from stdit_jax.autoencoders.codec import fit_tiles
from stdit_jax.autoencoders.memory import GIB, free_memory, tile_pixels
from stdit_jax.generation.clips import Item, batches, encoded_lengths, length_of, make_videos
from stdit_jax.generation.media import open_media
from stdit_jax.generation.pipeline import Pipeline, Request
from stdit_jax.generation.references import read_reference
from stdit_jax.generation.settings import SampleSettings
from stdit_jax.generation.work import Work

# ------------------------------------------------------------------------------------------------------------------ memory


def check_memory(pipeline: Pipeline, works: Sequence[Work], settings: SampleSettings) -> None:
  """`fit_memory` for the largest video. Raises ValueError if a device has too little free memory."""
  request = max((one.requests[0] for one in works), key=lambda r: r.height * r.width * r.num_frames)
  batch, config = min(settings.batch_size or pipeline.batch_parts, len(works)), pipeline.codec.config
  of_each = (encoded_lengths(one.job, one.file_frames, config, request.num_frames, settings.compat) for one in works)
  options = {"given": any(one.job.rules for one in works), "negative": settings.negative_prompt is not None}
  how = "lower --batch-size, --num-frames or the size, use --guidance-in-turn, or more devices with --mesh"
  fit_memory(pipeline, request, batch, settings.autoencoder_memory, how, encoded=set().union(*of_each), **options)


def fit_memory(
  pipeline: Pipeline, request: Request, batch: int, limit: float | None, how: str, *, encoded: Set[int], **options: bool
) -> None:
  """Prints the memory that each device will need. Switches the autoencoder to tiles if the memory is too small for it.

  Compiles the programs of `batch` requests like this one, and allocates nothing. Raises ValueError if a device has too little
  free memory.

  Args:
    limit: GiB of the autoencoder's programs. None: the free memory.
    how: what the user can do about too little memory.
    encoded, options: as in `Pipeline.needed_memory`.
  """
  sample, shows = pipeline.components.config.sample, jax.process_index() == 0
  pipeline.diffusion.for_sampling(sample.steps)  # raises ValueError for numbers of steps that the sampler can't take
  if shows:
    print(f"compiling for {batch} x {request.num_frames} x {request.height} x {request.width} ...", file=sys.stderr, flush=True)
  needed = pipeline.needed_memory(request, batch, sample.steps, sample.guidance_scale, encoded=encoded, **options)
  weights, free = needed.pop("weights"), free_memory()
  budget = limit * GIB if limit else free and free - weights
  lengths = {"decode": {request.num_frames}} | ({"encode": encoded} if encoded else {})
  if budget and max(needed[method] for method in lengths) > budget:
    size = pipeline.latent_size(request)[1:]
    pipeline.codec, less = fit_tiles(pipeline.codec, size, lengths, budget)
    needed |= less
    if shows and pipeline.codec.tiles:
      what = " and ".join(f"{method}s" for method in lengths)
      print(f"{what} in tiles of {tile_pixels(pipeline.codec, size)} pixels, to need less memory", flush=True)
  total = weights + max(needed.values())
  parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in needed.items())
  text = f"memory of each device: {total / GIB:.2f} GiB (weights {weights / GIB:.2f}, and the largest of {parts})"
  if free is not None and total > free:
    raise ValueError(f"{text}, but only {free / GIB:.2f} GiB are free: {how}")
  if shows:
    print(text + ("" if free is None else f" of {free / GIB:.2f} GiB free"), flush=True)


# ------------------------------------------------------------------------------------------------------------------ videos


def produce(pipeline: Pipeline, works: Sequence[Work], settings: SampleSettings) -> None:
  """Makes the files, batch after batch. All processes compute, the first one writes. An interruption keeps finished files."""
  if jax.process_index() == 0:
    request, sample = works[0].requests[0], pipeline.components.config.sample
    size = f"{request.num_frames} x {request.height} x {request.width}"
    print(f"{works[0].settings['model']}: {size}, {sample.steps} steps, guidance {sample.guidance_scale:g}")
  done = 0
  sizes = lambda one: [(r.height, r.width, r.num_frames) for r in one.requests]  # noqa: E731
  for batch in batches(works, sizes, settings.batch_size or pipeline.batch_parts):
    first, done = done + 1, done + len(batch)
    make_batch(pipeline, batch, f"{first}-{done}/{len(works)}" if first < done else f"{done}/{len(works)}", settings)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("samples are written")


def make_batch(pipeline: Pipeline, batch: Sequence[Work], label: str, settings: SampleSettings) -> None:
  """Makes the videos of a batch together. The first process writes them, clip after clip."""
  began, writes, first = time.monotonic(), jax.process_index() == 0, batch[0]
  config, compat = pipeline.components.config.sample, settings.compat
  negative = None if settings.negative_prompt is None else clean_caption(settings.negative_prompt)

  def bar(items, stage, loop, unit, **options):
    name = f"{stage} {label}" + (f", clip {loop + 1}/{first.job.loops}" if first.job.loops > 1 else "")
    return tqdm(items, name, unit=unit, leave=False, file=sys.stderr, disable=None if writes else True, **options)

  def sample(loop, requests, given):
    progress = lambda items, stage: bar(items, stage, loop, "step" if stage == "denoise" else "batch")  # noqa: E731
    return pipeline.sample_latents(requests, config.steps, config.guidance_scale, progress, given, negative)

  def decode(loop, latents):
    num_frames = first.requests[loop].num_frames
    with bar(None, "decode", loop, "frame", total=num_frames * len(latents)) as shown:
      return pipeline.decode(latents, num_frames, shown.update)

  items = []
  for one in batch:
    size, fps = (one.settings["height"], one.settings["width"]), one.requests[0].fps
    items.append(Item(one.requests, tuple(read_reference(path, size, fps, compat is not None) for path in one.files), one.job))
  videos = make_videos(pipeline, items, sample, decode if writes else None, compat)
  if not writes:
    collections.deque(videos, maxlen=0)
    return
  with contextlib.ExitStack() as all_files:
    # Each file is closed on its own: an error while one file is closed leaves the earlier files of the batch complete.
    files, writers = [all_files.enter_context(contextlib.ExitStack()) for _ in batch], []
    for file, item, one in zip(files, items, batch):
      made: dict[str, Any] = {"num_frames": length_of(item, pipeline.codec.config)}
      if pipeline.codec.tiles:
        made["tiles"] = dataclasses.asdict(pipeline.codec.tiles)
      opened = open_media(one.path, made["num_frames"], one.requests[0].fps, one.settings | made)
      writers.append(file.enter_context(opened))
    for parts_of_all in videos:
      for write, parts in zip(writers, parts_of_all):
        for part in parts:
          write(part)
    for file, one in zip(files, batch):
      file.close()
      print(f"{one.path}  ({time.monotonic() - began:.1f} s)  {one.requests[0].prompt}", flush=True)
