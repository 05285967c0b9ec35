"""Captions through a T5 encoder: text features and which of them are valid.

`text_encoder.where` of the configuration says where captions become features: in the training step ("step"), in a separate
program before the step ("ahead"), or before the run ("disk": the tables name files of features).
"""

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from data import latents
from data.captions import Tokenize, clean_caption
from stdit_jax.errors import InputError
from stdit_jax.models import flops, layers, t5
from stdit_jax.parallel.shardings import ArraySpec, Layout, with_shardings

AHEAD_ROWS = 16  # captions that the encoder works on at a time, per device; so its memory does not grow with the batch

log = logging.getLogger("data")  # as data/loader.py


class TokenizeClean(Tokenize):
  """`Tokenize` that first cleans the caption as the original cleans prompts."""

  def __call__(self, caption: str) -> tuple[np.ndarray, np.ndarray]:
    return super().__call__(clean_caption(caption))


def _tokens(tokenize, caption, label):
  ids, mask = tokenize(caption)
  return {"text_ids": ids, "text_mask": mask}


def text_encoder(config: Any) -> t5.T5Encoder:
  """The T5 encoder that the group `text_encoder` of a configuration names. Raises ValueError for unknown names and fields."""
  return t5.build(t5.get_config(config.name, **config.fields))


def tokenizer(config: Any) -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
  """`caption -> (ids, mask)` of the group `text_encoder`. Raises ValueError if it has ids that the encoder does not know."""
  tokenize = (TokenizeClean if config.clean_captions else Tokenize)(config.tokenizer, config.max_length)
  if (ids := tokenize.vocab_size) > (known := t5.get_config(config.name, **config.fields).vocab_size):
    raise ValueError(
      f"config: tokenizer {config.tokenizer!r} has {ids} ids, text encoder {config.name!r} only {known}; choose another pair"
    )
  return tokenize


class Captions:
  """The conditioner of captions (conditioning/__init__.py)."""

  name, num_classes = "captions", None

  def __init__(self, config, family, model_config):
    self.config = config.text_encoder
    spec = family.cond(model_config, 1)["text"]
    (_, self.length, self.channels), self.dtype = spec.shape, spec.dtype  # of the features of a caption
    self.in_step, self.ahead = (self.config.where == where for where in ("step", "ahead"))
    self.from_files = ("text_encoder",) if self.in_step and not self.config.train else ()
    self.encoder: Any = None if self.config.where == "disk" else text_encoder(self.config)  # None: features come from disk
    self._cut = False  # whether the warning about cut features was logged
    self._taken = f"the denoiser takes caption_channels={self.channels}; set model.fields.caption_channels"
    if self.encoder is not None and (made := self.encoder.config.d_model) != self.channels:
      raise ValueError(f"config: text encoder {self.config.name!r} gives {made} features, but {self._taken}={made}")
    if self.config.max_length != self.length:
      raise ValueError(
        f"config: text_encoder.max_length is {self.config.max_length}, but the denoiser's null caption has "
        f"model_max_length={self.length}; make them equal"
      )

  def init(self, key: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    if not self.in_step:
      return {}, {}
    own = {"text_encoder": t5.init(self.encoder.config, key)["params"]}
    return (own, {}) if self.config.train else ({}, own)

  def worker(self, cached: bool) -> Callable | None:
    """A tokenizer, or None if features come from disk or from a cache (`cached`)."""
    return None if self.encoder is None or cached else functools.partial(_tokens, tokenizer(self.config))

  def specs(self, rows: int) -> dict[str, ArraySpec]:
    ids, text = ArraySpec((rows, self.length), jnp.int32), ArraySpec((rows, self.length, self.channels), self.dtype)
    return {**({"text_ids": ids} if self.in_step else {"text": text}), "text_mask": ArraySpec((rows, self.length), jnp.bool_)}

  def collate(self, samples: Sequence[Any]) -> dict[str, np.ndarray]:
    if samples[0].cond is not None:
      return {name: np.stack([s.cond[name] for s in samples]) for name in ("text_ids", "text_mask")}
    return self._features(samples)

  def _features(self, samples):
    """Features of every sample, cut or padded to one length. Rows that could not be read have none."""
    text = np.zeros((len(samples), self.length, self.channels), self.dtype)
    mask = np.zeros((len(samples), self.length), bool)
    for i, s in enumerate(samples):
      if s.text_features is None:
        if s.weight:
          raise InputError(f"{s.path}: the table has no text_features for this row; text_encoder.where='disk' needs the column")
        continue
      if s.text_features.shape[1] != self.channels:
        raise InputError(f"{s.path}: its text_features have {s.text_features.shape[1]} channels, but {self._taken}")
      if (tokens := len(s.text_features)) > self.length and not self._cut:
        self._cut = True
        what = "%s: cut text_features of %d tokens to text_encoder.max_length=%d; later cuts are not logged"
        log.warning(what, s.path, tokens, self.length)
      rows = s.text_features[: self.length]
      text[i, : len(rows)], mask[i, : len(rows)] = rows, True
    return {"text": text, "text_mask": mask}

  def encode(self, weights: Any, arrays: Mapping[str, Any], layout: Layout | None = None) -> Mapping[str, Any]:
    """{"text": `[B, L, C]` in the denoiser's dtype, "text_mask": `[B, L]`}. Returns `arrays` that hold features unchanged."""
    if "text" in arrays:
      return arrays
    encoder = self.encoder.clone(layout=layout)
    text = encoder.apply({"params": weights}, arrays["text_ids"], arrays["text_mask"])
    return {"text": text.astype(self.dtype), "text_mask": arrays["text_mask"]}

  def lower(self, rows: int, layout: Layout, name: str = "text encoder") -> jax.stages.Lowered:
    """The program `(weights, arrays of collate) -> cond` for captions that are encoded before the step, lowered for shapes.

    JAX reports the program by `name`.
    """
    place, embed = layout.sharding("batch"), embed_in_pieces(self.encoder, self.dtype, layout)

    def text_encoder(weights, arrays):
      ids, mask = arrays["text_ids"], arrays["text_mask"]
      return {"text": embed(weights, ids, mask), "text_mask": mask}

    text_encoder.__name__ = name
    tokens = {"text_ids": jnp.int32, "text_mask": jnp.bool_}
    arrays = {name: jax.ShapeDtypeStruct((rows, self.length), dtype, sharding=place) for name, dtype in tokens.items()}
    weights = with_shardings(t5.init_shapes(self.encoder.config)["params"], layout.mesh, t5.RULES)
    return jax.jit(text_encoder, out_shardings=place).lower(weights, arrays)

  def is_cached(self, folder: str | None) -> bool:
    """Whether the loader reads the features of captions from this folder of `data.latents`."""
    return bool(folder) and self.ahead and latents.has_text(folder)

  def prompts(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
    ids, mask = zip(*map(Tokenize(self.config.tokenizer, self.config.max_length), texts))
    return {"text_ids": np.stack(ids), "text_mask": np.stack(mask)}

  def encoder_flops(self, rows: int | float) -> int | float:
    times = flops.TRAINING if self.config.train else 1
    return 0 if self.encoder is None else rows * times * flops.text(self.encoder.config, self.config.max_length)


def embed_in_pieces(encoder: Any, dtype: DTypeLike, layout: Layout) -> Callable[[Any, Any, Any], jax.Array]:
  """A function to jit: (parameters of the text encoder, ids `[B, L]`, mask) -> features `[B, L, C]` of this dtype.

  It works on at most AHEAD_ROWS rows of every device at a time.
  """
  model, parts = encoder.clone(layout=layout), layout.batch_parts

  def embed(params, ids, mask):
    apply = lambda rows: model.apply({"params": params}, *rows).astype(dtype)  # noqa: E731
    own = len(ids) // parts  # rows of one device
    pieces = math.ceil(own / AHEAD_ROWS)
    if pieces == 1:
      return apply((ids, mask))
    each = math.ceil(own / pieces)  # rows of one device in one piece

    # A device holds contiguous rows, so a piece takes `each` rows of every device. The last piece of a device is padded.
    def split(x):  # [pieces, parts, each, L]
      x = layers.pad(x.reshape(parts, own, *x.shape[1:]), 1, each)
      return x.reshape(parts, pieces, each, *x.shape[2:]).swapaxes(0, 1)

    merge = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    piece = lambda rows: apply(tuple(map(merge, rows))).reshape(parts, each, *ids.shape[1:], -1)  # noqa: E731
    made = jax.lax.map(piece, (split(ids), split(mask)))  # [pieces, parts, each, L, C]
    made = made.swapaxes(0, 1).reshape(parts, pieces * each, *made.shape[3:])[:, :own]
    return made.reshape(len(ids), *made.shape[2:])

  return embed
