"""Trains the tokenizer for captions of moving shapes: byte pairs, with one token for every word of these captions.

python -m data.shapes_tokenizer data/moving_shapes/tokenizer
"""

import argparse
import pathlib
import string
from typing import Any

from data import shapes

SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2, as T5's
VOCABULARY, CAPTIONS = 320, 4000


def train() -> Any:
  """A `transformers.PreTrainedTokenizerFast` that lower-cases captions and ends each with </s>."""
  import tokenizers
  import transformers
  from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

  made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
  made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
  made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
  letters = list(string.ascii_lowercase + string.digits + string.punctuation)
  trainer = trainers.BpeTrainer(
    vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=letters, show_progress=False
  )
  scenes = (shapes.scene(f"{shapes.SCHEME}sizes/0/{i}") for i in range(CAPTIONS))
  made.train_from_iterator((text for scene in scenes for text in shapes.captions(scene)), trainer)
  made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
  names = dict(zip(("pad_token", "eos_token", "unk_token"), SPECIAL))
  return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("folder", type=pathlib.Path)
  tokenizer, folder = train(), parser.parse_args().folder
  tokenizer.save_pretrained(folder)
  print(f"{folder}: {len(tokenizer)} tokens")


if __name__ == "__main__":
  main()
