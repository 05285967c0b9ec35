"""From the loader's rows to the arrays that cross the jit boundary.

Each process encodes the pixels of its rows with the autoencoder, on its own devices. It turns latents into tokens and pads them
to the length of their (resolution, frames) bucket. The rows of all processes form one global array.
"""

import concurrent.futures
import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from data.loader import LoadedStep, Sample
from data.tokens import patchify
from stdit_jax.components import Components, load_text_encoder
from stdit_jax.config import Autoencoder, Config
from stdit_jax.errors import InputError
from stdit_jax.models.family import SCALARS, token_grid
from stdit_jax.parallel.exchange import crosses_processes, exchange, row_places
from stdit_jax.parallel.shardings import ArraySpec, Layout, Tree
from stdit_jax.training.clip_encoder import ClipEncoder, Size, load_encoder
from stdit_jax.training.compilation import AheadOfTime

log = logging.getLogger("data")  # where data/loader.py reports skipped rows
ROWS = ArraySpec(())  # any array whose first axis is the rows


def to_global(batch: Any, specs: Any, layout: Layout, count: int | None = None) -> Any:
  """Global arrays over the mesh from the rows of this process. If processes share parts of the batch, they exchange rows.

  Args:
    batch: tree of NumPy arrays. Their rows are `exchange.process_rows`, in this order.
    specs: tree of `ArraySpec`. Only the axes matter.
    count: rows of the global batch. Needed if the devices of `layout` belong to several processes.
  """
  if crosses_processes(layout):
    assert count, "processes share parts of the batch, so they need the number of its rows"
    return exchange(batch, specs, layout, row_places(layout, count))
  parts, count = layout.process_parts(), layout.batch_parts

  def lay_out(spec, value):
    rows = len(value) // len(parts)

    def piece(index):
      start, stop, _ = index[0].indices(rows * count)  # rows of the global array
      here = parts.index(start // rows) * rows + start % rows  # `start` among the rows of this process
      return value[(slice(here, here + stop - start), *index[1:])]

    return jax.make_array_from_callback((rows * count, *value.shape[1:]), layout.sharding(*spec.axes), piece)

  return jax.tree.map(lay_out, specs, batch)


def sample_fields(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
  """The arrays that every batch has: weight and number of each sample."""
  return {
    "weight": np.asarray([s.weight for s in samples], np.float32),
    "sample_id": np.asarray([s.sample_id for s in samples], np.uint32),
  }


@dataclasses.dataclass(frozen=True)
class BatchMaker:
  """Makes the global batches of a stage from the rows of this process.

  Attributes:
    arrays: `(LoadedStep, layout) -> (NumPy arrays, tree of ArraySpec)` of the rows of this process. It uses this process's own
      devices alone, so a thread may call it.
    place: `(result of arrays, LoadedStep, layout) -> global arrays`. All processes must call it in the same order.
    prepare: `(sizes, batches)`, starts to compile the programs that encode clips of these sizes (frames, height, width) and
      captions of these batches (rows, layout), in this order.
  """

  arrays: Callable[[LoadedStep, Layout], tuple[Tree, Tree]]
  place: Callable[[tuple[Tree, Tree], LoadedStep, Layout], Tree]
  prepare: Callable[[Iterable[Size], Iterable[tuple[int, Layout]]], None] = lambda sizes, batches: None

  def __call__(self, step: LoadedStep, layout: Layout) -> Tree:
    """The global batch of a step."""
    return self.place(self.arrays(step, layout), step, layout)


class NextBatch:
  """An iterator of (LoadedStep, result of `make`). A thread makes one item ahead, while the device works on the current one.

  Args:
    loader: its steps; count: number of steps to take from it.
    make: called with each `LoadedStep`.
  """

  def __init__(self, loader: Iterator[LoadedStep], count: int, make: Callable[[LoadedStep], Any]):
    self._loader, self._left, self._make = loader, count, make
    self._start()

  def _start(self):
    self._left -= 1
    self._next = concurrent.futures.Future() if self._left >= 0 else None
    if self._next:  # a thread of an executor would hold up the end of the program if a read hangs
      threading.Thread(target=self._load, args=(self._next,), name="next batch", daemon=True).start()

  def _load(self, made):
    try:
      step = self._next_step()
      made.set_result((step, self._make(step)))
    except BaseException as error:
      made.set_exception(error)

  def _next_step(self):
    try:
      return next(self._loader)
    except (ValueError, RuntimeError) as error:  # too many bad files
      raise InputError(str(error)) from error

  def __next__(self) -> tuple[LoadedStep, Any]:
    """Waits for the next item. Raises InputError if too many files can't be decoded."""
    if self._next is None:
      raise StopIteration
    made = self._next.result()
    self._start()
    return made

  def __enter__(self) -> "NextBatch":
    return self

  def __exit__(self, *_):
    if self._next:  # the loader must not close while the thread reads from it; a read that hangs does not end
      concurrent.futures.wait([self._next], timeout=30)


def denoiser_batches(components: Components, clips: ClipEncoder | None, text: "TextEncoder | None") -> BatchMaker:
  """Makes batches as `Components.batch` describes them.

  Args:
    clips: encodes rows without cached latents; text: encodes captions. None if not needed.
  """

  def prepare(sizes, batches):
    if clips:
      clips.prepare(sizes)
    if text:
      text.prepare(batches)

  def place(made, step, layout):
    arrays, specs = made
    batch = to_global(arrays, specs, layout, step.batch_size)
    return {**batch, "cond": text(batch["cond"], layout)} if text else batch

  return BatchMaker(functools.partial(_denoiser_arrays, components, clips), place, prepare)


def _denoiser_arrays(components, clips, step, layout):
  samples, config = step.samples, components.model.config
  pixels: list[Any] = [s.pixels for s in samples]
  latents: Any = clips(pixels) if clips and pixels[0] is not None else [(s.latents_mean, s.latents_std) for s in samples]
  specs = components.batch(step.bucket, len(samples), layout.token_parts)
  moments = {name: np.zeros(spec.shape, spec.dtype) for name, spec in specs.items() if name.startswith("latents_")}
  for i, of_sample in enumerate(latents):
    for array, values in zip(moments.values(), of_sample):
      tokens = patchify(values, config.patch_size)
      array[i, :, : tokens.shape[1]] = tokens
  sizes = np.asarray([mean.shape[:3] for mean, _ in latents], np.int32)
  grids = np.asarray([token_grid(config, size) for size in sizes], np.int32)
  scalars = {name: np.asarray([getattr(s, name) for s in samples], np.float32) for name in SCALARS}
  cond = components.conditioner.collate(samples)
  batch = {**moments, "latent_size": sizes, "sizes": {"grid": grids, **scalars}, "cond": cond, **sample_fields(samples)}
  return batch, specs | {"cond": dict.fromkeys(cond, ROWS)}


def autoencoder_batches(config: Config) -> BatchMaker:
  """Makes the autoencoder's batches: a random square crop of each clip. The sample alone decides the place of the crop."""
  return BatchMaker(_Crops(config), lambda made, step, layout: to_global(made[0], made[1], layout, step.batch_size))


class _Crops:
  def __init__(self, config):
    self.config, self._too_small = config, set()

  def __call__(self, step, layout):
    samples, pixels = zip(*map(self._cropped, step.samples))
    batch = {"pixels": np.stack(pixels)} | sample_fields(samples)
    return batch, dict.fromkeys(batch, ROWS)

  def _cropped(self, s):
    """(sample, its pixels). A clip that is too small gets weight 0, since an error would end a run after days.

    When the run starts, `check_plan` refuses such clips in the first epoch.
    """
    crop, (height, width) = self.config.autoencoder.crop, s.pixels.shape[1:3]
    if min(height, width) < crop:
      if s.path not in self._too_small:
        log.warning("skipped %s: autoencoder.crop=%d does not fit into its %d x %d pixels", s.path, crop, height, width)
      self._too_small.add(s.path)
      return dataclasses.replace(s, weight=0.0), np.zeros((len(s.pixels), crop, crop, 3), np.uint8)
    rng = np.random.default_rng([self.config.seed, *map(int, s.sample_id)])
    top, left = rng.integers(height - crop + 1), rng.integers(width - crop + 1)
    return s, s.pixels[:, top : top + crop, left : left + crop]


class Encoders:
  """The frozen encoders of the stages. Stages with the same encoder share its weights."""

  def __init__(self, compiler: AheadOfTime, mesh: Mesh):
    self._compiler, self._mesh = compiler, mesh
    self.clip_encoder: Any = None  # a ClipEncoder
    self.text_weights: Any = None  # of the text encoder that runs before the step, once `text` has loaded it
    self._source: Any = None
    self._names = set()

  def clips(self, config: Autoencoder, stage: str) -> ClipEncoder:
    """The `ClipEncoder` of the group `autoencoder`. Its programs count under the name of the stage."""
    if not self.holds(config):
      while stage in self._names:  # the run came back to this stage: the counter needs a new name for new programs
        stage += " again"
      self._names.add(stage)
      self.clip_encoder, self._source = load_encoder(config, self._compiler, stage), config
    return self.clip_encoder

  def holds(self, config: Autoencoder) -> bool:
    """Whether the last `ClipEncoder` has the settings of this group `autoencoder`. Its own `cache_gb` stays."""
    return self._source is not None and dataclasses.replace(config, cache_gb=self._source.cache_gb) == self._source

  def text(self, conditioner: Any, stage: str) -> "TextEncoder":
    """The `TextEncoder` of a conditioner that encodes before the step. All stages share the weights."""
    if self.text_weights is None:
      self.text_weights = load_text_encoder(conditioner.config, conditioner.encoder, self._mesh)
    return TextEncoder(conditioner, self.text_weights, self._compiler, stage)


class TextEncoder:
  """Encodes captions before the step, by one program of the whole mesh for each number of rows and layout.

  Args:
    conditioner: its `lower` makes the programs; weights: of its encoder.
  """

  def __init__(self, conditioner: Any, weights: Tree, compiler: AheadOfTime, stage: str):
    self._conditioner, self._weights, self._compiler, self._stage = conditioner, weights, compiler, stage
    self._programs = {}  # {(rows, layout): future}

  def prepare(self, batches: Iterable[tuple[int, Layout]]) -> None:
    """Lowers the programs of batches (rows, layout), and starts to compile them in this order."""
    for rows, layout in batches:
      if (rows, layout) not in self._programs:
        name = f"text encoder, {rows} captions"
        self._compiler.counter.expect(name)
        lowered = self._conditioner.lower(rows, layout, name)
        self._programs[rows, layout] = self._compiler.add(f"{self._stage}: {name}", lowered)

  def __call__(self, arrays: Tree, layout: Layout) -> Tree:
    """Global arrays of `Captions.collate` -> `cond`. Features from a cache stay as they are."""
    if "text" in arrays:
      return arrays
    rows = len(arrays["text_ids"])
    self.prepare([(rows, layout)])
    return self._programs[rows, layout].result()(self._weights, arrays)
