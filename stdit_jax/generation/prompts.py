"""Prompts as they are written, and as the models see them."""

import csv
import io
import json
import re

from data import paths

JSON_KEYS = ("reference_path", "mask_strategy")


def split_json(prompt):
  """(text, {"reference_path": ..., "mask_strategy": ...}) of a prompt with a JSON object behind it, as Open-Sora 1.2 reads it
  (`extract_json_from_prompts`): `a wave.{"reference_path": "a.png;b.mp4", "mask_strategy": "0"}`.

  Raises:
    ValueError: what stands behind the first "{" is no such object.
  """
  text, brace, rest = prompt.partition("{")
  if not brace:
    return prompt, {}
  try:
    values = json.loads(brace + rest)
  except json.JSONDecodeError as error:
    raise ValueError(f"prompt {prompt!r}: what follows '{{' is no JSON object ({error.msg})") from None
  for key, value in values.items():
    if key not in JSON_KEYS:
      raise ValueError(f"prompt {prompt!r}: {key!r} is none of {', '.join(JSON_KEYS)}")
    if not isinstance(value, str):
      raise ValueError(f"prompt {prompt!r}: {key!r} must be text, of several files joined by ';'")
  return text, values


def split_loops(prompt, loops):
  """The prompt of every loop: `|0|text|2|other` is text in loops 0 and 1, other from loop 2 on (Open-Sora 1.1 and 1.2).

  A prompt that does not begin with |0| is that of all loops. Pieces keep their spaces.

  Raises:
    ValueError: loops that do not ascend.
  """
  if not prompt.startswith("|0|"):
    return [prompt] * loops
  parts = re.split(r"\|(\d+)\|", prompt)
  starts, texts = [int(number) for number in parts[1::2]], parts[2::2]
  if starts != sorted(set(starts)):
    raise ValueError(f"prompt {prompt!r}: the loops {starts} must ascend")
  return [texts[sum(start <= loop for start in starts) - 1] for loop in range(loops)]


def read_prompt_file(path):
  """Prompts of a text file (one a line), of a table (.csv) or of JSON lines (.jsonl): key `prompt` or `text`, and, if wanted,
  `reference_path` and `mask_strategy`, which become what `split_json` reads.

  Raises:
    ValueError: no UTF-8 text, no such column, a line that is no JSON object. OSError: the file can't be read.
  """
  try:
    text = paths.read_text(path).removeprefix("\ufeff")  # as Excel begins its files
  except UnicodeDecodeError:
    raise ValueError(f"--prompt-file {path} is not UTF-8 text") from None
  kind = str(path).lower().rsplit(".", 1)[-1]
  if kind == "csv":
    rows = list(csv.DictReader(io.StringIO(text)))
  elif kind == "jsonl":
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # other ends of lines may stand within JSON
      try:
        rows += [json.loads(line)] if line.strip() else []
      except json.JSONDecodeError as error:
        raise ValueError(f"--prompt-file {path}: line {number} is no JSON ({error.msg})") from None
  else:
    return [line.strip() for line in text.split("\n") if line.strip()]
  return [_prompt_of(row, f"--prompt-file {path}: row {number}") for number, row in enumerate(rows, 1)]


def _prompt_of(row, where):
  """A row's prompt, with its files and strategy behind it."""
  prompt = (row.get("prompt") or row.get("text")) if isinstance(row, dict) else None
  if not isinstance(prompt, str) or not prompt.strip():
    raise ValueError(f"{where} has no text under `prompt` (or `text`)")
  more = {key: row[key] for key in JSON_KEYS if row.get(key)}
  return prompt.strip() + (json.dumps(more) if more else "")
