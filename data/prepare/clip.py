"""Aesthetic score and text-video matching by a CLIP in ONNX, with the formulas of Open-Sora 1.2 (`tools/scoring`).

The user provides the files: nothing is downloaded and no pickle is opened. `optimum-cli export onnx` or `torch.onnx.export`
make a model from a CLIP. Its input `pixel_values` [N, 3, S, S] gives `image_embeds`, and `input_ids` [N, L] (with
`attention_mask`) gives `text_embeds`. A model with a single input or output may use other names.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any, ClassVar

import numpy as np
import polars as pl
from PIL import Image

from data.prepare.decode import at_shares
from data.prepare.messages import one_line

# CLIP's preprocessing (OpenAI CLIP, `clip.py`): bicubic to the shorter side, centre crop, then mean and std of values 0 to 1.
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def preprocess(image: np.ndarray, side: int) -> np.ndarray:
  """uint8 [H, W, 3] -> float32 [3, side, side], CLIP's input."""
  height, width = image.shape[:2]
  scale = side / min(height, width)
  size = (side, int(height * scale)) if width <= height else (int(width * scale), side)
  resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC), np.float32)
  y, x = (resized.shape[0] - side) // 2, (resized.shape[1] - side) // 2
  return ((resized[y : y + side, x : x + side] / 255.0 - _MEAN) / _STD).transpose(2, 0, 1)


@functools.cache
def _session(path: str) -> Any:
  """The ONNX Runtime session of a file, one per process. Raises ValueError if it can't be opened."""
  try:
    import onnxruntime
  except ImportError:
    raise ValueError("CLIP scores need `pip install -c constraints.txt -r requirements-prepare.txt`") from None
  if not os.path.isfile(path):
    raise ValueError(f"there is no model file {path!r}: give an ONNX file")
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = options.inter_op_num_threads = 1  # processes are the parallelism
  options.log_severity_level = 4
  try:
    return onnxruntime.InferenceSession(path, options, providers=onnxruntime.get_available_providers())
  except Exception as error:  # the library has several error types
    raise ValueError(f"{path} is no ONNX model ({one_line(error)[:150]})") from None


def _embed(path: str, name: str, wanted: str, values: np.ndarray) -> np.ndarray:
  """Output `wanted` of a model for its input `name`, [N, C], rows L2-normalised."""
  session, own = _session(path), _input(path, name)
  feeds = {own.name: values}
  for other in session.get_inputs():
    if other.name == "attention_mask" and name == "input_ids":
      feeds[other.name] = np.ones_like(values)
    elif other.name != own.name:  # a whole CLIP also needs an input for its other half
      feeds[other.name] = _blank(path, other)
  outputs = [o.name for o in session.get_outputs()]
  (found,) = session.run([wanted if wanted in outputs else outputs[0]], feeds)
  return found / np.linalg.norm(found, axis=-1, keepdims=True)


def _input(path: str, name: str) -> Any:
  """A model's input with this name, or else its first input."""
  inputs = _session(path).get_inputs()
  return next((i for i in inputs if i.name == name), inputs[0])


def _side(path: str) -> int:
  side = _input(path, "pixel_values").shape[-1]
  return side if isinstance(side, int) else 224


def _blank(path: str, wanted: Any) -> np.ndarray:
  """A small value for an input that does not matter: one black image, one text of two tokens, or its mask."""
  if wanted.name == "pixel_values":
    return np.zeros((1, 3, _side(path), _side(path)), np.float32)
  length = wanted.shape[-1]
  return np.ones((1, length if isinstance(length, int) else 2), np.int64)


def embed_images(path: str, images: np.ndarray) -> np.ndarray:
  """Images uint8 [T, H, W, 3] -> L2-normalised features [T, C]."""
  side = _side(path)
  return _embed(path, "pixel_values", "image_embeds", np.stack([preprocess(image, side) for image in images]))


@functools.cache
def _tokenizer(folder: str) -> Any:
  from tokenizers import Tokenizer

  file = os.path.join(folder, "tokenizer.json")
  if not os.path.isfile(file):
    raise ValueError(f"the tokenizer's folder {folder} has no tokenizer.json")
  return Tokenizer.from_file(file)


def embed_text(path: str, folder: str, text: str, length: int = 77) -> np.ndarray:
  """A text, truncated to `length` tokens with the end token -> L2-normalised features [C]."""
  tokenizer = _tokenizer(folder)
  tokenizer.enable_truncation(length)
  ids = tokenizer.encode(text).ids
  fixed = _input(path, "input_ids").shape[-1]
  if isinstance(fixed, int):
    ids += ids[-1:] * (fixed - len(ids))  # CLIP pads with its end token and reads the first one
  return _embed(path, "input_ids", "text_embeds", np.array([ids], np.int64))[0]


@functools.cache
def _head(path: str) -> list[tuple[np.ndarray, np.ndarray]]:
  """[(weight, bias)] of the linear layers `layers.N.weight` and `layers.N.bias`, ordered by N."""
  from safetensors import SafetensorError
  from safetensors.numpy import load_file

  if not path.endswith(".safetensors"):
    raise ValueError(f"aesthetic head {path} must be .safetensors: pickled files (.pth) can run code and are never opened")
  try:
    tensors = load_file(path)
  except (OSError, SafetensorError) as error:
    raise ValueError(f"aesthetic head {path} can't be read ({error})") from None
  numbers = sorted(int(name.split(".")[1]) for name in tensors if name.startswith("layers.") and name.endswith(".weight"))
  if not numbers:
    raise ValueError(f"aesthetic head {path} has no tensors layers.N.weight")
  return [(tensors[f"layers.{n}.weight"], tensors[f"layers.{n}.bias"]) for n in numbers]


def aesthetic(features: np.ndarray, layers: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
  """L2-normalised features [N, C] -> scores [N]: linear layers without activations between them."""
  for weight, bias in layers:
    features = features @ weight.T + bias
  return features[:, 0]


@dataclasses.dataclass(frozen=True)
class Aesthetic:
  """`aes`: LAION's aesthetic score (improved-aesthetic-predictor) of CLIP's image features, averaged over frames.

  model: ONNX file (Open-Sora: ViT-L/14). head: safetensors of the linear layers (Open-Sora: 768-1024-128-64-16-1).
  at: places of the frames, as shares of the clip (Open-Sora's three by default).
  """

  columns: ClassVar[dict[str, Any]] = {"aes": pl.Float64}
  side: ClassVar[int] = 336

  model: str = ""
  head: str = ""
  at: tuple[float, ...] = (0.1, 0.5, 0.9)

  def check(self) -> None:
    _session(self.model)
    _head(self.head)

  def frames(self, num_frames: int, fps: float) -> np.ndarray:
    return at_shares(num_frames, self.at)

  def __call__(self, images: np.ndarray, row: dict) -> dict[str, float]:
    return {"aes": float(aesthetic(embed_images(self.model, images), _head(self.head)).mean())}


@dataclasses.dataclass(frozen=True)
class Matching:
  """`match`: scale times the cosine between the caption and the middle frame, like CLIP's logits.

  image_model, text_model: ONNX files; one file may serve as both. tokenizer: folder with tokenizer.json.
  scale: exp of CLIP's learned parameter, 100 for the published models.
  """

  columns: ClassVar[dict[str, Any]] = {"match": pl.Float64}
  side: ClassVar[int] = 336

  image_model: str = ""
  text_model: str = ""
  tokenizer: str = ""
  scale: float = 100.0

  def check(self) -> None:
    _session(self.image_model)
    _session(self.text_model)
    _tokenizer(self.tokenizer)

  def frames(self, num_frames: int, fps: float) -> np.ndarray:
    return np.array([num_frames // 2])

  def __call__(self, images: np.ndarray, row: dict) -> dict[str, float | None]:
    if not row.get("text"):
      return {"match": None}
    text = embed_text(self.text_model, self.tokenizer, row["text"])
    return {"match": float(self.scale * (embed_images(self.image_model, images)[0] @ text))}
