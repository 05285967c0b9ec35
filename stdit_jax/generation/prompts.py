"""Reads prompts: prompt files, the JSON object behind a prompt, and different texts for the loops of a video."""

import csv
import io
import json
import re
from typing import Any

from data import paths

JSON_KEYS = ("reference_path", "mask_strategy")


def split_json(prompt: str) -> tuple[str, dict[str, str]]:
  """Splits a prompt into its text and the JSON object behind the text, as Open-Sora 1.2 does (`extract_json_from_prompts`).

  Example: `a wave.{"reference_path": "a.png;b.mp4", "mask_strategy": "0"}`. Raises ValueError for other keys or no JSON.
  """
  text, brace, rest = prompt.partition("{")
  if not brace:
    return prompt, {}
  try:
    values = json.loads(brace + rest)
  except json.JSONDecodeError as error:
    raise ValueError(f"prompt {prompt!r}: the text from '{{' on is no JSON object ({error.msg}); mend or remove it") from None
  for key, value in values.items():
    if key not in JSON_KEYS:
      raise ValueError(f"prompt {prompt!r}: {key!r} is none of {', '.join(JSON_KEYS)}")
    if not isinstance(value, str):
      raise ValueError(f"prompt {prompt!r}: {key!r} must be text; join several files by ';'")
  return text, values


def split_loops(prompt: str, loops: int) -> list[str]:
  """The prompt of every loop, in the syntax of Open-Sora 1.1 and 1.2.

  `|0|text|2|other` means "text" in loops 0 and 1, and "other" from loop 2 on. Without |0| at its beginning a prompt holds for
  all loops. Raises ValueError if the numbers of the loops do not ascend.
  """
  if not prompt.startswith("|0|"):
    return [prompt] * loops
  parts = re.split(r"\|(\d+)\|", prompt)
  starts, texts = [int(number) for number in parts[1::2]], parts[2::2]
  if starts != sorted(set(starts)):
    raise ValueError(f"prompt {prompt!r}: the loops {starts} must ascend; order them")
  return [texts[sum(start <= loop for start in starts) - 1] for loop in range(loops)]


def read_prompt_file(path: Any) -> list[str]:
  """Prompts of a text file (one per line), of a table (.csv) or of JSON lines (.jsonl).

  A table has a column `prompt` or `text`. Its optional columns `reference_path` and `mask_strategy` become a JSON object behind
  the prompt, which `split_json` reads. JSON lines have keys of the same names. Raises ValueError if the file has another form.
  """
  try:
    text = paths.read_text(path).removeprefix("\ufeff")  # Excel's byte order mark
  except UnicodeDecodeError:
    raise ValueError(f"--prompt-file {path} is not UTF-8 text; save it in this encoding") from None
  kind = str(path).lower().rsplit(".", 1)[-1]
  if kind == "csv":
    rows = list(csv.DictReader(io.StringIO(text)))
  elif kind == "jsonl":
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # `splitlines` would also split at U+2028, which JSON may contain
      try:
        rows += [json.loads(line)] if line.strip() else []
      except json.JSONDecodeError as error:
        raise ValueError(f"--prompt-file {path}: line {number} is no JSON ({error.msg}); give one object per line") from None
  else:
    return [line.strip() for line in text.split("\n") if line.strip()]
  prompts = []
  for number, row in enumerate(rows, 1):
    prompt = (row.get("prompt") or row.get("text")) if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
      raise ValueError(f"--prompt-file {path}: row {number} has no text under `prompt` (or `text`); every row needs one")
    more = {key: row[key] for key in JSON_KEYS if row.get(key)}
    prompts.append(prompt.strip() + (json.dumps(more) if more else ""))
  return prompts
