"""Captions: cleaning and score suffixes against the original's own results, tokens against the Hugging Face tokenizers."""

import json
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from data import captions

REFERENCE = pathlib.Path(__file__).parents[1] / "reference" / "open_sora"
ROOT = pathlib.Path(__file__).parents[2]


def test_cleaning_matches_the_original():
  rows = json.loads((REFERENCE / "text_preprocessing.json").read_text())["rows"]
  assert len(rows) > 100
  for row in rows:
    text = row["input"]
    assert captions.clean_once(text) == row["clean_once"]
    assert captions.clean_caption(text) == row["output"]
    assert captions.basic_clean(text) == row["basic_clean"]


def test_prompt_scores_match_the_original():
  for case in json.loads((REFERENCE / "prompt_helpers.json").read_text())["append_score_to_prompts"]:
    assert [captions.append_scores(p, **case["args"]) for p in case["prompts"]] == case["result"]


def test_training_scores():
  rng = np.random.default_rng(0)
  scores = {"aes": 5.25, "flow": 2, "cmotion": "pan_left"}
  everything = "a dog. Camera motion: pan left. [aesthetic score: 5.2, motion score: 2.0]"
  assert captions.add_scores("a dog.", scores, rng, drop_probability=0) == everything
  assert captions.add_scores("a dog.", {"aes": np.float32(5.25)}, rng, 0) == "a dog. [aesthetic score: 5.2]"
  assert captions.add_scores("a dog.", scores, rng, 1) == "a dog. Camera motion: pan left."
  assert captions.add_scores("a dog.", {"cmotion": "pan_left+zoom_in"}, rng, 0) == "a dog."
  drawn = [captions.add_scores("", {"aes": 5, "flow": 2}, rng) for _ in range(4000)]
  counts = {"": 0.04, " [aesthetic score: 5.0]": 0.16, " [motion score: 2.0]": 0.16}
  counts[" [aesthetic score: 5.0, motion score: 2.0]"] = 0.64
  assert set(drawn) == set(counts)
  for text, share in counts.items():
    assert abs(drawn.count(text) / 4000 - share) < 4 * (share / 4000) ** 0.5


def test_missing_columns_do_not_shift_draws():
  a, b = np.random.default_rng(3), np.random.default_rng(3)
  captions.add_scores("", {}, a)
  captions.add_scores("", {"aes": 5, "flow": 2}, b)
  assert a.random() == b.random()


def test_bytes_as_tokens():
  tokenize = pickle.loads(pickle.dumps(captions.Tokenize("byt5", 12)))
  ids, mask = tokenize("héy")
  assert ids.dtype == np.int32
  assert mask.dtype == bool
  assert ids.tolist() == [107, 198, 172, 124, 1] + [0] * 7
  assert mask.tolist() == [True] * 5 + [False] * 7
  assert tokenize.vocab_size == 384
  ids, mask = tokenize("x" * 5_000_000)
  assert ids.tolist() == [123] * 11 + [1]
  assert mask.all()
  ids, mask = tokenize("")
  assert ids.tolist() == [1] + [0] * 11
  assert mask.sum() == 1


def test_invalid_unicode_becomes_replacement_characters():
  tokenize = captions.Tokenize("byt5", 8)
  assert tokenize("a\udcffb")[0].tolist() == tokenize("a\ufffdb")[0].tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A tokenizer folder like T5's: unigram pieces, <pad> 0, </s> 1, <unk> 2."""
  transformers = pytest.importorskip("transformers")
  path = tmp_path_factory.mktemp("tokenizer")
  words = ["▁a", "▁dog", "▁runs", "▁", *"adogruns."]
  vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -float(i)) for i, word in enumerate(words))]
  transformers.T5Tokenizer(vocab=vocab, extra_ids=0).save_pretrained(path)
  return path


def test_tokenizer_from_a_folder(folder):
  tokenize = pickle.loads(pickle.dumps(captions.Tokenize(folder, 6)))
  ids, mask = tokenize("a dog runs")
  assert ids.tolist() == [3, 4, 5, 1, 0, 0]
  assert mask.tolist() == [True] * 4 + [False] * 2
  ids, mask = tokenize("a dog " * 1000)
  assert ids.tolist() == [3, 4, 3, 4, 3, 1]
  assert mask.all()


def test_tokenizer_from_sentencepiece(tmp_path):
  """The published T5 folders hold spiece.model and no tokenizer.json."""
  sentencepiece = pytest.importorskip("sentencepiece")
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["a dog runs over the field", "a cat sits on the table", "the dog and the cat"] * 20),
    model_prefix=str(tmp_path / "spiece"), vocab_size=24, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
  )  # fmt: skip
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
  pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
  for text in ("a dog on the table", "the  cat", "zzz"):
    ids, mask = captions.Tokenize(tmp_path, 40)(text)
    assert ids[mask].tolist() == [*pieces.encode(text), 1]
    assert (ids[~mask] == 0).all()


def test_bad_tokenizers_get_one_line(folder, tmp_path):
  for spec in ("", "google/t5-v1_1-xxl", tmp_path / "missing"):
    with pytest.raises(ValueError, match="neither 'byt5' nor a folder"):
      captions.Tokenize(spec, 8)("a dog")
  (tmp_path / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
  with pytest.raises(ValueError, match="is incomplete, it needs") as error:
    captions.load_tokenizer(str(tmp_path))
  assert "\n" not in str(error.value)
  (tmp_path / "tokenizer.json").write_text("{cut short")
  with pytest.raises(ValueError, match="can't be read"):
    captions.load_tokenizer(str(tmp_path))
  with pytest.raises(ValueError, match="at least 1"):
    captions.Tokenize("byt5", 0)


def test_code_in_a_tokenizer_folder_is_not_run(folder, tmp_path):
  config = json.loads((folder / "tokenizer_config.json").read_text())
  config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
  with pytest.raises(ValueError, match="can't be read"):
    captions.load_tokenizer(str(tmp_path))
  assert not (tmp_path / "ran").exists()


def test_no_jax_and_no_transformers_on_import():
  code = "import sys, data.captions; assert not {'jax', 'flax', 'torch', 'transformers'} & set(sys.modules)"
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
