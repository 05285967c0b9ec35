"""Captions from a model of `transformers` on this machine; needs torch (`pip install torch`)."""

from __future__ import annotations

import importlib.util
import io
import os
from typing import Any

from PIL import Image

from data.prepare.caption import Caption, Pictures, question, usable
from data.prepare.messages import one_line
from data.prepare.workers import Failure


def check(model: str) -> None:
  """Raises ValueError if the model's folder or a package is missing."""
  if not os.path.isfile(os.path.join(model, "config.json")):
    raise ValueError(f"model = {model!r} is no folder with a transformers model (config.json)")
  if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
    raise ValueError(f"backend 'local' needs {' and '.join(missing)} (pip install)")


class LocalCaptioner:
  """An image-text-to-text (LLaVA, Qwen-VL, PaliGemma ...) or image-to-text (BLIP, GIT ...) model from a folder.

  Weights must be safetensors, and no code from the folder is run. The model runs on a GPU if there is one.
  """

  def __init__(self, step: Caption):
    import torch
    import transformers

    self.step, self._torch = step, torch
    self.pictures = Pictures(step.frames, step.side, step.grid, 0.0)
    how = {"local_files_only": True, "trust_remote_code": False}
    try:
      self._processor = transformers.AutoProcessor.from_pretrained(step.model, **how)
      self._model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
        step.model, use_safetensors=True, **how
      ).eval()
    except Exception as error:  # the library has many error types
      raise ValueError(f"caption.model {step.model} can't be read: {one_line(error)[:200]}") from None
    self._device = "cuda" if torch.cuda.is_available() else "cpu"
    self._model.to(self._device)

  def make(self, rows: list[dict], pictures: list[list[bytes]]) -> list[Any]:
    """For each clip a text, or a `Failure` for a useless answer."""
    images = [[Image.open(io.BytesIO(p)).convert("RGB") for p in clip] for clip in pictures]
    template = getattr(self._processor, "chat_template", None)
    if template:
      texts = [self._chat(row, clip) for row, clip in zip(rows, images)]
      inputs = self._processor(text=texts, images=images, return_tensors="pt", padding=True)
    else:  # image-to-text models take no prompt
      inputs = self._processor(images=[clip[0] for clip in images], return_tensors="pt")
    inputs = inputs.to(self._device)
    sampling = {"do_sample": True, "temperature": self.step.temperature} if self.step.temperature else {"do_sample": False}
    with self._torch.inference_mode():
      out = self._model.generate(**inputs, max_new_tokens=self.step.max_tokens, **sampling)
    if template:  # the answer follows the question
      out = out[:, inputs["input_ids"].shape[1] :]
    return [_checked(text) for text in self._processor.batch_decode(out, skip_special_tokens=True)]

  def _chat(self, row: dict, clip: list[Image.Image]) -> str:
    content = [*({"type": "image"} for _ in clip), {"type": "text", "text": question(self.step, self.pictures, row)}]
    return self._processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def _checked(text: str) -> str | Failure:
  try:
    return usable(text)
  except ValueError as error:
    return Failure(f"a useless answer ({error})")
