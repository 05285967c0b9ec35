"""Prompts as the models see them, and how a training run writes its captions."""

import dataclasses

from data.captions import Tokenize, clean_caption


@dataclasses.dataclass(frozen=True)
class TokenizeText:
  """`caption -> (ids, mask)`; picklable, for the loader's workers. `clean` first cleans as the original cleans prompts."""

  tokenizer: str
  max_length: int
  clean: bool = False

  def __call__(self, text):
    return self._tokenize(clean_caption(text) if self.clean else text)

  @property
  def vocab_size(self):
    """Ids are below this."""
    return self._tokenize.vocab_size

  def __post_init__(self):
    object.__setattr__(self, "_tokenize", Tokenize(self.tokenizer, self.max_length))
