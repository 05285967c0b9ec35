"""Captions: cleaning, score suffixes, tokens.

`clean_caption` repeats the cleaning of Open-Sora 1.1 and 1.2 (`text_preprocessing`, from DeepFloyd IF and PixArt), pattern by
pattern. At inference every prompt is cleaned twice. As in Open-Sora, the training does not clean captions by default
(`text_encoder.clean_captions`). The step `clean` of `data.prepare` can clean the table before.
"""

import functools
import html
import os
import pathlib
import re
import urllib.parse
import warnings
from typing import Any

import bs4
import ftfy
import numpy as np

# A caption may look like a file name or an address.
warnings.filterwarnings("ignore", category=bs4.MarkupResemblesLocatorWarning)

_HOST = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)"
_FORMATS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"


def _rules(*rows):
  return tuple((re.compile(pattern), replacement) for pattern, replacement in rows)


# (pattern, replacement), in order. The order matters: cleaning is not idempotent.
_BEFORE_HTML = _rules(
  ("<person>", "person"),
  (rf"\b(?:https?:(?:\/{{1,3}}|[a-zA-Z0-9%])|{_HOST})", ""),  # the scheme of an address, or a bare host
  (rf"\b(?:www:(?:\/{{1,3}}|[a-zA-Z0-9%])|{_HOST})", ""),
)
_AFTER_HTML = _rules(
  (r"@[\w\d]+\b", ""),  # nick names
  ("[\u31c0-\u9fff]+", ""),  # CJK strokes, enclosed letters, compatibility, ideographs; kana and hangul stay
  (
    "[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]+",
    "-",
  ),
  ("[`´«»“”¨]", '"'),
  ("[‘’]", "'"),
  ("&quot;?", ""),
  ("&amp", ""),
  (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IPv4 addresses
  (r"\d:\d\d\s+$", ""),  # article ids
  (r"\\n", " "),  # a backslash and an n
  (r"#\d{1,3}\b", ""),
  (r"#\d{5,}\b", ""),
  (r"\b\d{6,}\b", ""),
  (rf"\S+\.(?:{_FORMATS})", ""),  # file names
  ("[\"']{2,}", '"'),
  (r"\.{2,}", " "),
  (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
  (r"\s+\.\s+", " "),
)
_AFTER_REPAIR = _rules(
  (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
  (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
  (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
  (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
  (r"(?:free\s)?download(?:\sfree)?", ""),
  (r"\bclick\b\s(?:for|on)\s\w+", ""),
  (rf"\b(?:{_FORMATS})(?:\simages?)?", ""),
  (r"\bpage\s+\d+\b", ""),
  (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
  (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # 1920x1080, also with the Cyrillic letter
  (r"\b\s+:\s+", ": "),
  (r"(\D[,./])\b", r"\1 "),
  (r"\s+", " "),
  (r"""^["']([\w\W]+)["']$""", r"\1"),
  (r"^['_,\-:;]", ""),
  (r"['_,\-:+]$", ""),
  (r"^\.\S+$", ""),
)


def _apply(rules, text):
  for pattern, replacement in rules:
    text = pattern.sub(replacement, text)
  return text


def basic_clean(text: str) -> str:
  """Repairs broken Unicode (ftfy), resolves HTML entities twice, strips spaces."""
  return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def clean_once(text: str) -> str:
  """Runs one pass of Open-Sora's `clean_caption`: lower case, without addresses, markup, ids and advertising."""
  text = _apply(_BEFORE_HTML, urllib.parse.unquote_plus(str(text)).strip().lower())
  text = _apply(_AFTER_HTML, bs4.BeautifulSoup(text, features="html.parser").text)
  if len(re.findall("[-_]", text)) > 3:  # words-joined-by-dashes are a sentence
    text = re.sub("[-_]", " ", text)
  return _apply(_AFTER_REPAIR, basic_clean(text)).strip()


def clean_caption(text: str) -> str:
  """Cleans a prompt with two passes of `clean_once`."""
  return clean_once(clean_once(text))


# ---------------------------------------------------------------------------------------------------------------- scores

_CAMERA_MOTIONS = ("pan left", "pan right", "tilt up", "tilt down", "zoom in", "zoom out", "static")


def add_scores(text: str, scores: dict, rng: np.random.Generator, drop_probability: float = 0.2) -> str:
  """Appends scores to a training caption, as the data tool of Open-Sora 1.2 does.

  The result is `{text} Camera motion: pan left. [aesthetic score: 5.3, motion score: 2.0]`. The function drops each of the two
  scores with `drop_probability`, and never drops the camera motion. It omits other camera classes ("pan_left+zoom_in",
  "Undetermined"), which Open-Sora refuses.

  Args:
    scores: columns of the metadata table: {"aes": number, "flow": number, "cmotion": "pan_left"}. Each key may be missing.
    rng: random generator. The function makes two draws even if columns are missing, so that a column does not change later
      draws.
  """
  camera = scores.get("cmotion", "").replace("_", " ")
  if camera in _CAMERA_MOTIONS:
    text = f"{text} Camera motion: {camera}."
  keep = rng.random(2) >= drop_probability
  columns = (("aes", "aesthetic score"), ("flow", "motion score"))
  parts = [f"{name}: {scores[column]:.1f}" for (column, name), kept in zip(columns, keep) if kept and column in scores]
  return f"{text} [{', '.join(parts)}]" if parts else text


def append_scores(prompt: str, aes: float | None = None, flow: float | None = None, camera_motion: str | None = None) -> str:
  """Appends scores to a prompt, except those that the prompt names already (Open-Sora 1.2, `append_score_to_prompts`).

  aes: 4.5 to 6.5. flow: 0 to 100, more is more motion. camera_motion: "pan left", "zoom in", ... Clean the prompt afterwards.
  """
  wishes = (
    ("aesthetic score", None if aes is None else f"{aes:.1f}"),
    ("motion score", None if flow is None else f"{flow:.1f}"),
    ("camera motion", camera_motion),
  )
  suffixes = [f" {name}: {value}." for name, value in wishes if value is not None and f"{name}:" not in prompt]
  return prompt + "".join(suffixes)


# ---------------------------------------------------------------------------------------------------------------- tokens


_PIECES = ("tokenizer.json", "spiece.model")
_NEEDED = f"it needs tokenizer_config.json and one of {', '.join(_PIECES)}"


@functools.cache
def load_tokenizer(spec: str) -> Any:
  """Loads a Hugging Face tokenizer: "byt5" (bytes, needs no file) or a local folder.

  The function downloads nothing, and it runs no code of the folder. Raises ValueError, one line, if the folder is missing or
  incomplete.
  """
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # silences the warning that PyTorch is missing
  import transformers  # takes seconds; only programs that tokenize pay for it

  if spec == "byt5":
    return transformers.ByT5Tokenizer()
  folder = pathlib.Path(spec)
  if not spec or not folder.is_dir():
    raise ValueError(f"tokenizer {str(spec)!r} is neither 'byt5' nor a folder on this machine.")
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
  except Exception as error:  # the library raises errors of any kind
    reason = " ".join(str(error).split())[:200]
    raise ValueError(f"tokenizer folder {folder} can't be read, {_NEEDED}: {reason}") from None
  # If the vocabulary file is missing, the library silently makes a tokenizer that knows no word.
  if not isinstance(tokenizer, transformers.ByT5Tokenizer) and not any((folder / name).is_file() for name in _PIECES):
    raise ValueError(f"tokenizer folder {folder} is incomplete, {_NEEDED}.")
  if tokenizer.pad_token_id is None:
    raise ValueError(f"tokenizer folder {folder}: no pad_token in tokenizer_config.json; T5 tokenizers have '<pad>'.")
  return tokenizer


class Tokenize:
  """Turns a caption into (ids int32 [max_length], mask bool [max_length]). Picklable.

  Pads short captions. Truncates long ones and keeps the end token. Reads only the first 100 * max_length characters, far more
  than the tokens can hold. A worker loads the tokenizer with its first caption. Invalid Unicode becomes replacement characters.
  """

  def __init__(self, spec: str | pathlib.Path, max_length: int):
    if max_length < 1:
      raise ValueError(f"max_length must be at least 1 token, not {max_length}.")
    self.spec, self.max_length = str(spec), int(max_length)

  @property
  def vocab_size(self) -> int:
    """All ids are below this number. The text encoder's vocab_size must not be smaller."""
    return len(load_tokenizer(self.spec))

  def __call__(self, caption: str) -> tuple[np.ndarray, np.ndarray]:
    text = re.sub("[\ud800-\udfff]", "\ufffd", caption[: 100 * self.max_length])
    tokens = load_tokenizer(self.spec)(text, max_length=self.max_length, padding="max_length", truncation=True)
    return np.asarray(tokens["input_ids"], np.int32), np.asarray(tokens["attention_mask"], bool)
