"""The work of `encode`: latents and text embeddings for the first epochs of the stages.

`data/latents.py` has their keys, shards and readers. `denoising.py` has their provenance.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from data import latents, loader, plan, sources
from data.config import DataConfig
from stdit_jax.autoencoders.codec import bytes_on_device, needed_memory
from stdit_jax.autoencoders.family import encoder_only
from stdit_jax.autoencoders.memory import check_fits, free_memory, halve_to_fit
from stdit_jax.autoencoders.registry import autoencoder_model
from stdit_jax.components import Components, codec_of_shapes, load_text_encoder
from stdit_jax.conditioning.captions import embed_in_pieces, text_encoder, tokenizer
from stdit_jax.errors import InputError
from stdit_jax.models import t5
from stdit_jax.parallel.mesh import make_mesh, own_devices
from stdit_jax.parallel.shardings import Layout, with_shardings
from stdit_jax.training import batches
from stdit_jax.training.clip_encoder import ClipEncoder, load_encoder, lower_program, program_sizes
from stdit_jax.training.denoising import autoencoder_identity, text_identity
from stdit_jax.training.objectives import make_objective
from stdit_jax.training.stages import Stage, naming

_MICRO_BATCHES = 8  # per device, encoded together (a turn). A half-empty last one costs little among eight
_CAPTIONS = 8  # per device, encoded together
_RECORD_BYTES = 400  # approximate size of a record without its arrays


def _one_behind(started: Iterator[Any]) -> Iterator[Any]:
  """The items of an iterator, one item late. So the devices compute the next item while the host waits for this item."""
  return (previous for previous, _ in itertools.pairwise(itertools.chain(started, [None])))


@dataclasses.dataclass(frozen=True)
class Source:
  """The data of a stage: its table, and the plans of its epochs."""

  stage: Stage
  data: DataConfig
  plans: plan.PlanSequence

  @classmethod
  def open(cls, stage: Stage, folder: str) -> "Source":
    """The data of a stage. Stores tables and plans in `folder`. Raises ValueError if no row fits, or if a file is missing."""
    with naming(stage.name):
      stage.config.data.validate()
      data = dataclasses.replace(make_objective(stage.config).data_config(stage.config.data), latents="")
      return cls(stage, data, plan.PlanSequence(sources.open_table(data, folder), data, folder))

  def made_for(self, epochs: int) -> dict[str, Any]:
    """Names the stage and the plan that need the records of the first epochs (`made_for` of `latents.Part`)."""
    identity = latents.plan_identity(self.data, self.plans.table)
    return {"stage": self.stage.name, "epochs": epochs, "plan": identity}


class LatentsWork:
  """The clips of the first epochs of several stages, and their latents.

  Attributes:
    part: the `latents.Part` that lacks shards. None if all exist.
    features: of its records; unit: of `cost`.
    bad_rows: counts the files that can't be decoded; away: keys of the clips whose files do not exist.
  """

  unit = "Mpx"

  @staticmethod
  def made_from(source: Source, dtype: str, log_variance: bool) -> dict[str, Any]:
    """The provenance of the latents. Stages with the same provenance share their latents."""
    clips = latents.made_from_clips(source.data, source.plans.table)
    identity = autoencoder_identity(source.stage.config.autoencoder)
    return {**clips, "autoencoder": identity, "dtype": dtype, "log_variance": log_variance}

  def __init__(self, made_from, members: Sequence[Source], folder: str, epochs: int, shard_bytes: int, compiler):
    self.source, self._compiler = members[0], compiler
    # Without a cache of latents: each clip is encoded once.
    self._config = dataclasses.replace(self.source.stage.config.autoencoder, cache_gb=0.0)
    self._autoencoder = autoencoder_model(self._config).config
    dtype, channels, self._log_variance = made_from["dtype"], self._autoencoder.latent_channels, made_from["log_variance"]
    self._bytes = (4 if dtype == "float32" else 2) * channels * (1 + self._log_variance)
    keys = [latents.plan_keys(s.plans.plan(e), s.plans.table, s.data, e) for s in members for e in range(epochs)]
    keys = np.unique(np.concatenate(keys))
    made_for = [s.made_for(epochs) for s in members]
    self.part = latents.prepare(folder, "latents", made_from, keys, made_for, self.sizes, shard_bytes)
    self.features = latents.features_of("latents", channels, dtype, self._log_variance)
    self.bad_rows: loader.BadRows | None = None
    self.away: list[int] = []

  def _kinds(self, keys):
    """[(frames, height, width)] of the different clips, and the index of each clip in this list."""
    fields = latents.unpack(keys)
    kinds = np.stack([fields[name] for name in ("resolution", "num_frames", "ratio")])
    kinds, inverse = np.unique(kinds, axis=1, return_inverse=True)
    return [(int(n), *latents.size_of(int(r), int(a))[2]) for r, n, a in kinds.T], inverse.reshape(-1)

  def _per_clip(self, keys, function):
    """An array with `function(frames, height, width)` of each clip."""
    kinds, inverse = self._kinds(keys)
    return np.asarray([function(*kind) for kind in kinds])[inverse]

  def sizes(self, keys: np.ndarray) -> np.ndarray:
    """Bytes of the record of each clip."""
    config, each = self._autoencoder, self._bytes
    sizes = self._per_clip(keys, lambda t, *size: config.latent_frames(t) * math.prod(config.latent_size(*size)) * each)
    return sizes + _RECORD_BYTES

  def expected_bytes(self, keys: np.ndarray) -> int:
    """Bytes of all records."""
    return int(self.sizes(keys).sum())

  def cost(self, keys: np.ndarray) -> np.ndarray:
    """Megapixels of each clip."""
    return self._per_clip(keys, lambda frames, height, width: frames * height * width / 1e6)

  def count(self, keys: np.ndarray) -> str:
    """The number of clips, in words."""
    fields = latents.unpack(keys)
    frames = int(fields["num_frames"].sum())
    return f"{len(keys):,} clips ({frames:,} frames) of {len(np.unique(fields['row'])):,} rows"

  @functools.cached_property
  def encoder(self) -> ClipEncoder:
    return load_encoder(self._config, self._compiler, self.source.stage.name)

  def fit(self, keys: np.ndarray, limit: float | None) -> str:
    """Halves `autoencoder.micro_batch` until the largest clips fit into the memory of a device. Returns the memory in words.

    Compiles programs, and allocates nothing. Raises ValueError if a clip does not fit. There are no tiles, because
    tiles change the latents.

    Args:
      limit: bytes beside the weights. None: the free memory.
    """
    codec, kinds = codec_of_shapes(self._config), self._kinds(keys)[0]
    codec = dataclasses.replace(codec, variables=encoder_only(codec.variables))
    weights, free = bytes_on_device(codec.variables), free_memory()
    budget = limit or (free and free - weights)
    # Depending on the autoencoder, memory grows with the pixels of a frame or of the whole clip.
    largest = {max(kinds, key=lambda kind: (kind[1] * kind[2], kind[0])), max(kinds, key=math.prod)}

    def needed(micro_batch):
      made = dataclasses.replace(codec, micro_batch=micro_batch)
      programs = {size for clip in largest for size in program_sizes(codec.config, clip)}
      return max(needed_memory(lower_program(made, size, jax.local_devices()[0]), codec.variables) for size in programs)

    first = codec.micro_batch
    micro_batch, size = halve_to_fit(needed, first, math.inf if budget is None else budget)
    names = " and ".join(" x ".join(map(str, kind)) for kind in sorted(largest))
    how = "Remove these buckets, set autoencoder.dtype='bfloat16', or take a device with more memory"
    text = check_fits(f"clips of {names} pixels", weights, size, budget, how)
    if micro_batch == first:
      return text
    self._config = dataclasses.replace(self._config, micro_batch=micro_batch)
    return f"{text}, with {micro_batch} instead of {first} frames at a time"

  def _turn(self, num_frames):
    """Number of clips that are encoded together."""
    frames = _MICRO_BATCHES * self.encoder.codec.micro_batch * jax.local_device_count()
    return max(-(-frames // num_frames), jax.local_device_count())

  def measure(self, keys: np.ndarray) -> tuple[float, str]:
    """(seconds per megapixel of the encoder alone, description). Measures the clip size that contributes most pixels.

    Raises ValueError if none of up to 64 tested files exists.
    """
    loader.check_files(self.source.plans.table, latents.unpack(keys[:: -(-len(keys) // 64)])["row"].tolist())
    costs, first, counts = np.unique(self.cost(keys), return_index=True, return_counts=True)
    most = (costs * counts).argmax()
    fields = latents.unpack(keys[first[most]])
    resolution, _, size = latents.size_of(fields["resolution"], fields["ratio"])
    clips = [np.zeros((fields["num_frames"], *size, 3), np.uint8)] * self._turn(fields["num_frames"])
    self.encoder(clips)  # compiles
    began = time.monotonic()
    self.encoder(clips)
    seconds = (time.monotonic() - began) / len(clips)
    name = f"{resolution} x {fields['num_frames']}"
    return seconds / costs[most], f"{name} takes {seconds:.3g} s a clip on {jax.local_device_count()} device(s)"

  def records(self, keys: np.ndarray) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yields (key, record) of these clips in order. The caller must close it.

    Raises:
      InputError: too many files can't be decoded. `away` then has the keys of the clips without a file. The caller drops
        their records, since the disk may come back.
    """
    data, table = self.source.data, self.source.plans.table
    self.bad_rows = loader.BadRows(data.max_bad_rows, len(np.unique(latents.unpack(keys)["row"])))
    kinds, numbers = self._kinds(keys)
    self.encoder.prepare(kinds[number] for number in dict.fromkeys(numbers.tolist()))
    clip_bytes = (3e6 * self.cost(keys)).round().astype(np.int64)  # three per pixel
    frames = int(latents.unpack(keys[clip_bytes.argmax()])["num_frames"])
    clips: Any = loader.read_clips(data, table, keys, clip_bytes, self._turn(frames))
    with contextlib.closing(clips):
      started = ((turn, self.encoder.start([clip["pixels"] for _, clip in turn])) for turn in self._turns(clips, self.bad_rows))
      for turn, finish in _one_behind(started):
        yield from self._finished(turn, finish)
    del self.encoder  # captions, which follow, need the memory

  def _turns(self, clips, bad_rows):
    """Yields the clips that are encoded together, [(key, clip)]: clips of one size that follow each other."""
    turn = []
    try:
      for key, clip in clips:
        if clip["away"]:
          self.away.append(key)
        bad_rows.add(clip["path"], clip["error"])
        shape = clip["pixels"].shape
        if turn and (shape != turn[0][1]["pixels"].shape or len(turn) == self._turn(shape[0])):
          yield turn
          turn = []
        turn.append((key, clip))
    except (ValueError, RuntimeError) as error:
      raise InputError(str(error)) from error
    if turn:
      yield turn

  def _finished(self, turn, finish):
    for (key, clip), (mean, std) in zip(turn, finish()):
      fields = {name: int(value) for name, value in latents.unpack(key).items()}
      resolution, _, (height, width) = latents.size_of(fields["resolution"], fields["ratio"])
      table, row = self.source.plans.table.locate(fields["row"])
      dtype = self.features["mean"].np_dtype
      values = {"mean": mean.astype(dtype)}
      if self._log_variance:
        values["log_variance"] = (2 * np.log(std)).astype(dtype)
      yield key, {
        **values, **{name: clip[name] for name in ("path", "error")}, "fps": np.array(clip["fps"], np.float64),
        "table": table, "row": row, "num_frames": fields["num_frames"], "window": fields["window"],
        "resolution": resolution, "height": height, "width": width,
      }  # fmt: skip


class TextWork:
  """The captions of the first epochs of several stages, each once, and their embeddings. Same methods as `LatentsWork`."""

  unit = "captions"
  bad_rows, away = None, ()

  @staticmethod
  def made_from(source: Source, dtype: str) -> dict[str, Any]:
    """The provenance of the embeddings."""
    captions = latents.made_from_captions(source.data, source.plans.table)
    return {**captions, "text_encoder": text_identity(source.stage.config.text_encoder), "dtype": dtype}

  def __init__(self, made_from, members: Sequence[Source], folder: str, epochs: int, shard_bytes: int):
    self._members, self._config = members, members[0].stage.config.text_encoder
    self._turn = _CAPTIONS * len(own_devices())  # captions that are encoded together
    self._decoders = [loader.RowDecoder(s.data, s.plans.table, None) for s in members]
    self._tokenize = tokenizer(self._config)
    self._channels = t5.get_config(self._config.name, **self._config.fields).d_model
    self._bytes = self._channels * (4 if made_from["dtype"] == "float32" else 2)
    found = np.concatenate([self._found(number, epochs) for number in range(len(members))])
    keys, first = np.unique(found[:, 0], return_index=True)
    self._keys, self._where = keys, found[first, 1:]
    made_for = [s.made_for(epochs) for s in members]
    self.part = latents.prepare(folder, "text", made_from, keys, made_for, self.sizes, shard_bytes)
    self.features = latents.features_of("text", self._channels, made_from["dtype"])

  def _found(self, number, epochs):
    """int64 `[captions, (key, member, epoch, slot row)]` of one stage. Captions that are the same in all epochs occur once."""
    source, decoder, rows_of = self._members[number], self._decoders[number], []
    same = np.zeros(len(source.plans.table), bool)
    for epoch in range(epochs):
      rows = np.unique(source.plans.plan(epoch).all_slots()[1])
      for slot_row in rows[~same[rows]].tolist():
        row = source.plans.table.row(slot_row)
        same[slot_row] = len(row.captions) < 2 and not (row.scores.keys() & set(source.data.scores))
        key = latents.caption_key(decoder.caption(row, epoch, slot_row))
        rows_of.append((key, number, epoch, slot_row))
    return np.asarray(rows_of, np.int64)

  def _caption(self, key):
    number, epoch, slot_row = self._where[np.searchsorted(self._keys, key)].tolist()
    return self._decoders[number].caption(self._members[number].plans.table.row(slot_row), epoch, slot_row)

  def sizes(self, keys: np.ndarray) -> np.ndarray:
    """Upper bound of the bytes of each record. It decides the number of captions of a shard."""
    return np.full(len(keys), self._config.max_length * self._bytes + _RECORD_BYTES)

  def expected_bytes(self, keys: np.ndarray) -> float:
    """Bytes of all records, estimated from the tokens of some captions."""
    some = keys[:: -(-len(keys) // 256)]
    tokens = float(np.mean([self._tokenize(self._caption(key))[1].sum() for key in some]))
    return len(keys) * (tokens * self._bytes + _RECORD_BYTES)

  def cost(self, keys: np.ndarray) -> np.ndarray:
    return np.ones(len(keys))

  def count(self, keys: np.ndarray) -> str:
    return f"{len(keys):,} captions"

  def fit(self, keys: np.ndarray, limit: float | None) -> str:
    """The memory of the text encoder on each device, in words. Raises ValueError if it does not fit. `limit` does not count."""
    conditioner = Components.of(self._members[0].stage.config).conditioner
    weights = with_shardings(t5.init_shapes(conditioner.encoder.config)["params"], self._layout.mesh, t5.RULES)
    needed = needed_memory(conditioner.lower(self._turn, self._layout), weights)
    own, free = bytes_on_device(weights), free_memory()
    how = "Set text_encoder.fields.param_dtype='bfloat16', or take more devices, which share the weights"
    return check_fits("captions", own, needed, free and free - own, how)

  @functools.cached_property
  def _layout(self):
    """`own_devices` share the encoder."""
    return Layout(make_mesh({"fsdp": -1}, own_devices(), {"data": -1}))

  @functools.cached_property
  def _embed(self):
    """A function that starts the encoder: (ids `[B, L]`, mask) -> features."""
    model, layout = text_encoder(self._config), self._layout
    weights = load_text_encoder(self._config, model, layout.mesh)
    program = jax.jit(embed_in_pieces(model, np.float32, layout), out_shardings=layout.sharding("batch"))

    def embed(ids, mask):
      ids, mask = batches.to_global([ids, mask], [batches.ROWS] * 2, layout)
      return program(weights, ids, mask)

    return embed

  def _start(self, captions):
    """([number of tokens], features that the devices compute) of at most one turn of captions."""
    ids, masks = zip(*map(self._tokenize, captions))
    fill = [(0, self._turn - len(captions)), (0, 0)]
    return [int(mask.sum()) for mask in masks], self._embed(np.pad(ids, fill), np.pad(masks, fill, constant_values=True))

  def measure(self, keys: np.ndarray) -> tuple[float, str]:
    captions = [self._caption(key) for key in keys[: self._turn]]
    np.asarray(self._start(captions)[1])  # compiles
    began = time.monotonic()
    np.asarray(self._start(captions)[1])
    seconds = (time.monotonic() - began) / self._turn
    del self._embed  # the latents need the memory first; `records` loads the encoder again
    return seconds, f"a caption takes {seconds:.3g} s on {len(own_devices())} device(s)"

  def records(self, keys: np.ndarray) -> Iterator[tuple[Any, dict[str, Any]]]:
    def start(turn):
      captions = [self._caption(key) for key in turn]
      return turn, captions, *self._start(captions)

    turns = (start(keys[begin : begin + self._turn]) for begin in range(0, len(keys), self._turn))
    for turn, captions, lengths, features in _one_behind(turns):
      # The valid tokens come first, the padding last.
      for key, caption, length, values in zip(turn, captions, lengths, np.asarray(features)):
        yield key, {"caption": caption, "embedding": values[:length].astype(self.features["embedding"].np_dtype)}
